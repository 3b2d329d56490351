# Controllers of version 1 as systemd mounts them in its hybrid layout, and an empty version 2 beside them for BPF programs.
# shellcheck shell=sh
mount -t tmpfs -o mode=755 cgroups /sys/fs/cgroup
for group in cpu,cpuacct net_cls,net_prio cpuset memory pids hugetlb blkio devices freezer perf_event; do
    mkdir "/sys/fs/cgroup/$group"
    mount -t cgroup -o "$group" cgroup "/sys/fs/cgroup/$group" || echo "no $group"
done
for link in cpu:cpu,cpuacct cpuacct:cpu,cpuacct net_cls:net_cls,net_prio net_prio:net_cls,net_prio; do
    ln -s "${link#*:}" "/sys/fs/cgroup/${link%%:*}"
done
mkdir /sys/fs/cgroup/systemd /sys/fs/cgroup/unified
mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
mount -t cgroup2 cgroup /sys/fs/cgroup/unified
