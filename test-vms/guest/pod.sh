# One pod whose container has limits: runs, is seen into, ends with its code, and leaves no cgroup, link or mount.
# shellcheck shell=sh
set -eu
failed() { echo "pod: $*"; tail -n 30 /var/log/cri.log; exit 1; }
things() { find /sys/fs/cgroup -type d | sort; ls /sys/class/net; grep /run/orlop/cri/s/ /proc/mounts || true; }
cat >/run/pod.json <<'JSON'
{"metadata": {"name": "limited", "namespace": "default", "uid": "uid-limited", "attempt": 0},
 "log_directory": "/var/log/pods/limited", "hostname": "limited",
 "linux": {"cgroup_parent": "/orlop-vm/limited"}}
JSON
cat >/run/limited.json <<'JSON'
{"metadata": {"name": "limited", "attempt": 0}, "image": {"image": "localhost/busybox:test"}, "log_path": "limited.log",
 "command": ["sh", "-c", "echo to-stdout; echo to-stderr >&2; trap 'exit 7' TERM; while true; do sleep 0.2; done"],
 "linux": {"resources": {"cpu_period": 100000, "cpu_quota": 50000, "cpu_shares": 512,
   "memory_limit_in_bytes": 67108864, "unified": {"pids.max": "64"}}}}
JSON
mkdir -p /sys/fs/cgroup/orlop-vm/limited
things >/run/before
pod=$(crictl runp /run/pod.json) || failed "$pod"
container=$(crictl create "$pod" /run/limited.json /run/pod.json) || failed "$container"
crictl start "$container" >/dev/null || failed "no start"
echo "address=$(crictl inspectp -o go-template --template '{{.status.network.ip}}' "$pod")"
pid=$(crictl inspect -o go-template --template '{{.info.pid}}' "$container")
group=/sys/fs/cgroup$(sed -n 's/^0:://p' "/proc/$pid/cgroup")
echo "cgroup=$group"
for f in memory.max cpu.max cpu.weight pids.max; do
    echo "$f=$(cat "$group/$f")"
done
echo "exec=$(crictl exec --sync "$container" sh -c 'hostname; cat /proc/self/cgroup' | tr '\n' ' ')"
# crictl ends with 1 and says what the command ended with.
crictl exec --sync "$container" sh -c 'exit 5' >/run/exec 2>&1 || true
echo "exec_code=$(sed -n 's/.* exited with \([0-9]*\).*/\1/p' /run/exec)"
ping -c 1 -W 5 "$(crictl inspectp -o go-template --template '{{.status.network.ip}}' "$pod")" >/dev/null && echo "ping=ok"
crictl stop -t 20 "$container" >/dev/null || failed "no stop"
echo "exit_code=$(crictl inspect -o go-template --template '{{.status.exitCode}}' "$container")"
echo "stdout=$(grep -c 'stdout F to-stdout$' /var/log/pods/limited/limited.log)"
echo "stderr=$(grep -c 'stderr F to-stderr$' /var/log/pods/limited/limited.log)"
crictl stopp "$pod" >/dev/null || failed "no stopp"
crictl rmp "$pod" >/dev/null || failed "no rmp"
things >/run/after
echo "left=$(diff /run/before /run/after | tr '\n' ' ')"
