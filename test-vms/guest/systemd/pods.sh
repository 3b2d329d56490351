# Pods whose cgroups systemd makes: limits and devices are as asked, also after systemd has read its units again; what ends leaves
# no unit behind.
# shellcheck shell=sh
set -eu
failed() { echo "systemd: $*"; tail -n 30 /var/log/cri.log; exit 1; }
systemctl --version | head -n 1
# As the kubelet does: the pod's slice is there before its sandbox.
systemctl start kubepods-burstable-podx.slice
slice=kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podx.slice
cat >/run/pod.json <<JSON
{"metadata": {"name": "limited", "namespace": "default", "uid": "uid-limited", "attempt": 0},
 "log_directory": "/var/log/pods/limited", "hostname": "limited", "linux": {"cgroup_parent": "/$slice"}}
JSON
cat >/run/limited.json <<'JSON'
{"metadata": {"name": "limited", "attempt": 0}, "image": {"image": "localhost/busybox:test"}, "log_path": "limited.log",
 "command": ["sh", "-c", "trap 'exit 7' TERM; while true; do sleep 0.2; done"],
 "linux": {"resources": {"cpu_period": 100000, "cpu_quota": 50000, "cpu_shares": 512,
   "memory_limit_in_bytes": 67108864, "unified": {"pids.max": "64"}}}}
JSON
pod=$(crictl runp /run/pod.json) || failed "$pod"
container=$(crictl create "$pod" /run/limited.json /run/pod.json) || failed "$container"
crictl start "$container" >/dev/null || failed "no start"
pid=$(crictl inspect -o go-template --template '{{.info.pid}}' "$container")
path=$(sed -n 's/^0:://p' "/proc/$pid/cgroup")
scope=${path##*/}
echo "path=${path%/*}"
echo "named=$(echo "$scope" | sed "s/$container/ID/")"
echo "state=$(systemctl show -p ActiveState --value "$scope")"
limits() { for f in memory.max cpu.max cpu.weight pids.max; do printf '%s ' "$(cat "/sys/fs/cgroup$path/$f")"; done; }
echo "limits=$(limits)"
echo "memory=$(systemctl show -p MemoryMax --value "$scope")"
# A node of its own may be made, and not be opened; one of the usual devices may.
devices() {
    crictl exec --sync "$container" sh -c \
        'rm -f /tmp/mem; mknod /tmp/mem c 1 1 && dd if=/tmp/mem of=/dev/null bs=1 count=1; dd if=/dev/zero of=/dev/null bs=1 count=1' 2>&1 |
        grep -c -e 'Operation not permitted' -e '^1+0 records in' || true
}
echo "devices=$(devices)"
systemctl daemon-reload
echo "reloaded=$(limits)$(devices)"
crictl update --memory 33554432 --cpu-quota 20000 --cpu-period 100000 "$container" >/dev/null || failed "no update"
echo "updated=$(limits)"
systemctl daemon-reload
echo "updated_reloaded=$(limits)$(devices)"
echo "exec=$(crictl exec --sync "$container" sh -c 'hostname; cat /proc/self/cgroup' | tr '\n' ' ')"
kill -9 "$(cat /run/cri.pid)"
orlop cri --cgroup-driver systemd >>/var/log/cri.log 2>&1 &
echo $! >/run/cri.pid
for _ in $(seq 300); do
    crictl version >/dev/null 2>&1 && break
    sleep 0.1
done
echo "adopted=$(crictl inspect -o go-template --template '{{.status.state}}' "$container")"
sed 's/"name": "limited"/"name": "greedy"/; s/limited.log/greedy.log/; s/"command": \[.*\],/"command": ["dd", "if=\/dev\/zero", "of=\/dev\/null", "bs=100M", "count=1"],/' \
    /run/limited.json >/run/greedy.json
greedy=$(crictl create "$pod" /run/greedy.json /run/pod.json) || failed "$greedy"
crictl start "$greedy" >/dev/null || failed "no start of greedy"
for _ in $(seq 100); do
    [ "$(crictl inspect -o go-template --template '{{.status.state}}' "$greedy")" = CONTAINER_EXITED ] && break
    sleep 0.2
done
echo "greedy=$(crictl inspect -o go-template --template '{{.status.reason}} {{.status.exitCode}}' "$greedy")"
crictl stop -t 20 "$container" >/dev/null || failed "no stop"
echo "exit_code=$(crictl inspect -o go-template --template '{{.status.exitCode}}' "$container")"
crictl stopp "$pod" >/dev/null || failed "no stopp"
crictl rmp "$pod" >/dev/null || failed "no rmp"
systemctl stop kubepods-burstable-podx.slice
echo "left=$(systemctl list-units --all --no-legend --plain '*.scope' | grep -v '^init.scope' | tr '\n' ' ')$(find /sys/fs/cgroup/kubepods.slice -mindepth 2 -type d 2>/dev/null | tr '\n' ' ')"
kill "$(cat /run/cri.pid)"
