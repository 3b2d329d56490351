# A container with limits and huge pages, to look at in groups of version 1 (v1_limits.sh) or 2 (v2_limits.sh).
# shellcheck shell=sh disable=SC2034
set -eu
failed() { echo "limits: $*"; tail -n 30 /var/log/cri.log; exit 1; }
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
