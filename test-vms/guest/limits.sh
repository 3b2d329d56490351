# Limits that change while a container runs, and huge pages: what the cgroup says, and what a program gets.
# shellcheck shell=sh
set -eu
failed() { echo "limits: $*"; tail -n 30 /var/log/cri.log; exit 1; }
mkdir -p /sys/fs/cgroup/orlop-vm/limits /run/huge
mount -t hugetlbfs -o pagesize=2M huge /run/huge
cat >/run/pod.json <<'JSON'
{"metadata": {"name": "limits", "namespace": "default", "uid": "uid-limits", "attempt": 0},
 "log_directory": "/var/log/pods/limits", "linux": {"cgroup_parent": "/orlop-vm/limits"}}
JSON
cat >/run/limits.json <<'JSON'
{"metadata": {"name": "limits", "attempt": 0}, "image": {"image": "localhost/busybox:test"}, "log_path": "limits.log",
 "command": ["sleep", "1000"],
 "mounts": [{"host_path": "/vm/huge", "container_path": "/bin/huge", "readonly": true},
   {"host_path": "/run/huge", "container_path": "/huge"}],
 "linux": {"resources": {"cpu_period": 100000, "cpu_quota": 50000, "cpu_shares": 512, "memory_limit_in_bytes": 33554432,
   "hugepage_limits": [{"page_size": "2MB", "limit": 4194304}, {"page_size": "1GB", "limit": 0}]}}}
JSON
pod=$(crictl runp /run/pod.json) || failed "$pod"
container=$(crictl create "$pod" /run/limits.json /run/pod.json) || failed "$container"
crictl start "$container" >/dev/null || failed "no start"
pid=$(crictl inspect -o go-template --template '{{.info.pid}}' "$container")
group=/sys/fs/cgroup$(sed -n 's/^0:://p' "/proc/$pid/cgroup")
say() {
    echo "$1=$(cat "$group/cpu.weight") $(cat "$group/cpu.max") $(cat "$group/cpuset.cpus") $(cat "$group/memory.max") $(cat "$group/memory.swap.max")"
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
for f in hugetlb.2MB.max hugetlb.2MB.rsvd.max hugetlb.1GB.max; do
    echo "$f=$(cat "$group/$f")"
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
crictl stopp "$pod" >/dev/null || failed "no stopp"
crictl rmp "$pod" >/dev/null || failed "no rmp"
umount /run/huge
echo "free=$(cat /sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages)"
