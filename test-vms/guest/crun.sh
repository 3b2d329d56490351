# A pod of another OCI runtime: crun, which refuses machines with both cgroup versions, as those that build often are.
# shellcheck shell=sh
set -eu
failed() { echo "crun: $*"; tail -n 30 /var/log/cri.log; exit 1; }
cat >/run/pod.json <<'JSON'
{"metadata": {"name": "other", "namespace": "default", "uid": "uid-other", "attempt": 0},
 "log_directory": "/var/log/pods/other", "hostname": "other", "linux": {"cgroup_parent": "/orlop-vm/other"}}
JSON
cat >/run/other.json <<'JSON'
{"metadata": {"name": "other", "attempt": 0}, "image": {"image": "localhost/busybox:test"}, "log_path": "other.log",
 "command": ["sh", "-c", "echo to-stdout; trap 'exit 7' TERM; while true; do sleep 0.2; done"],
 "linux": {"resources": {"memory_limit_in_bytes": 67108864}}}
JSON
pod=$(crictl runp --runtime=crun /run/pod.json) || failed "$pod"
container=$(crictl create "$pod" /run/other.json /run/pod.json) || failed "$container"
crictl start "$container" >/dev/null || failed "no start"
[ -d "/run/orlop/cri/s/$pod/external/state/$container" ] && echo "state=crun"
pid=$(crictl inspect -o go-template --template '{{.info.pid}}' "$container")
echo "memory=$(cat "/sys/fs/cgroup$(sed -n 's/^0:://p' "/proc/$pid/cgroup")/memory.max")"
echo "exec=$(crictl exec --sync "$container" sh -c 'hostname; cat /proc/self/cgroup' | tr '\n' ' ')"
crictl checkpoint --export=/run/other.tar "$container" >/run/said 2>&1 || true
echo "checkpoint=$(sed -n 's/.*code = \([A-Za-z]*\) desc = \(.*\)/\1 \2/p' /run/said | head -n 1)"
crictl stop -t 20 "$container" >/dev/null || failed "no stop"
echo "exit_code=$(crictl inspect -o go-template --template '{{.status.exitCode}}' "$container")"
echo "stdout=$(grep -c 'stdout F to-stdout$' /var/log/pods/other/other.log)"
crictl stopp "$pod" >/dev/null || failed "no stopp"
crictl rmp "$pod" >/dev/null || failed "no rmp"
echo "left=$(find /sys/fs/cgroup/orlop-vm/other -type d | grep -v '/other$' | tr '\n' ' ')"
