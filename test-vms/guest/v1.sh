# Limits, what changes of them, huge pages, and what is counted, in the groups of version 1.
# shellcheck shell=sh
set -eu
failed() { echo "v1: $*"; tail -n 30 /var/log/cri.log; exit 1; }
mkdir -p /run/huge
mount -t hugetlbfs -o pagesize=2M huge /run/huge
cat >/run/pod.json <<'JSON'
{"metadata": {"name": "limits", "namespace": "default", "uid": "uid-limits", "attempt": 0},
 "log_directory": "/var/log/pods/limits", "linux": {"cgroup_parent": "/orlop-vm/limits"}}
JSON
cat >/run/limits.json <<'JSON'
{"metadata": {"name": "limits", "attempt": 0}, "image": {"image": "localhost/busybox:test"}, "log_path": "limits.log",
 "command": ["sh", "-c", "dd if=/dev/zero of=/dev/shm/held bs=1M count=8; sleep 1000"],
 "mounts": [{"host_path": "/vm/huge", "container_path": "/bin/huge", "readonly": true},
   {"host_path": "/run/huge", "container_path": "/huge"}],
 "linux": {"resources": {"cpu_period": 100000, "cpu_quota": 50000, "cpu_shares": 512, "memory_limit_in_bytes": 33554432,
   "hugepage_limits": [{"page_size": "2MB", "limit": 4194304}, {"page_size": "1GB", "limit": 0}]}}}
JSON
pod=$(crictl runp /run/pod.json) || failed "$pod"
container=$(crictl create "$pod" /run/limits.json /run/pod.json) || failed "$container"
crictl start "$container" >/dev/null || failed "no start"
pid=$(crictl inspect -o go-template --template '{{.info.pid}}' "$container")
# Of a controller: its folder for the container.
of() { echo "/sys/fs/cgroup/$1$(sed -n "s/^[0-9]*:\([a-z_]*,\)*$1\(,[a-z_]*\)*://p" "/proc/$pid/cgroup")"; }
for controller in cpu cpuacct cpuset memory pids hugetlb blkio devices freezer; do
    case $(of $controller) in
        "/sys/fs/cgroup/$controller/orlop-vm/limits/"*) echo "in:$controller=yes" ;;
        *) echo "in:$controller=$(of $controller)" ;;
    esac
done
say() {
    echo "$1=$(cat "$(of cpu)/cpu.shares") $(cat "$(of cpu)/cpu.cfs_quota_us") $(cat "$(of cpu)/cpu.cfs_period_us") \
$(cat "$(of cpuset)/cpuset.cpus") $(cat "$(of memory)/memory.limit_in_bytes") $(cat "$(of memory)/memory.memsw.limit_in_bytes")"
}
change() {
    name=$1
    shift
    crictl update "$@" "$container" >/dev/null || failed "no update: $name"
    say "$name"
}
say created
change all --cpu-share 256 --cpu-period 50000 --cpu-quota 20000 --cpuset-cpus 0 --cpuset-mems 0 --memory 50331648
change share --cpu-share 1024
change quota --cpu-quota 40000
change period --cpu-period 200000
change cpus --cpuset-cpus 0-1
change less --memory 25165824
change none --cpu-quota=-1
for f in hugetlb.2MB.limit_in_bytes hugetlb.2MB.rsvd.limit_in_bytes hugetlb.1GB.limit_in_bytes; do
    echo "$f=$(cat "$(of hugetlb)/$f")"
done
# `huge` maps as many pages as it has words and ends with the error number.
# shellcheck disable=SC2016
crictl exec --sync "$container" sh -c '
    huge; echo "1_page=$?"
    huge second; echo "2_pages=$?"
    huge second third; echo "3_pages=$?"
    fallocate -l 4M /huge/file && echo "file=allocated"
    fallocate -l 6M /huge/larger 2>/dev/null || echo "larger=refused"' || failed "no exec"
rm /run/huge/*
echo "container=$container"
echo "exec_in=$(crictl exec --sync "$container" cat /proc/self/cgroup | sed -n 's/^[0-9]*:[^:]*:\(\/.\)/\1/p' | sort -u | tr '\n' ' ')"

# What is counted lies between two looks at the kernel's own figures; memory of a container that sleeps stays.
usage() { cat "$(of cpuacct)/cpuacct.usage"; }
for _ in $(seq 300); do
    grep -q 'records out' /var/log/pods/limits/limits.log && break
    sleep 0.1
done
echo "cpu_before=$(usage)"
crictl stats -o json "$container" >/run/stats
crictl metricsp -o json >/run/metrics || failed "no metrics"
echo "cpu_after=$(usage)"
echo "memory=$(cat "$(of memory)/memory.usage_in_bytes")"
stat() { echo "stats:$1=$(jq -r ".stats[0].$2.value" /run/stats)"; }
stat cpu cpu.usageCoreNanoSeconds
stat usage memory.usageBytes
stat working_set memory.workingSetBytes
for name in cpu_usage_seconds_total memory_usage_bytes memory_cache processes spec_memory_limit_bytes spec_cpu_shares spec_cpu_period \
    oom_events_total; do
    value=$(jq -r "[.. | objects | select(.name? == \"container_$name\" and (.labelValues | index(\"limits\"))) | .value.value] | last" /run/metrics)
    echo "metrics:$name=$value"
done
echo "cache=$(sed -n 's/^total_cache //p' "$(of memory)/memory.stat")"
echo "processes=$(wc -l <"$(of pids)/cgroup.procs")"
crictl stopp "$pod" >/dev/null || failed "no stopp"
crictl rmp "$pod" >/dev/null || failed "no rmp"
# The pod's own group is the caller's.
echo "left=$(find /sys/fs/cgroup/ -type d -path '*/orlop-vm/limits/*' | tr '\n' ' ')"
umount /run/huge
echo "free=$(cat /sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages)"
