# criu writes a running counter down: the archive is whole, and the counter counts on.
# shellcheck shell=sh
set -eu
failed() { echo "checkpoint: $*"; tail -n 30 /var/log/cri.log; exit 1; }
cat >/run/pod.json <<'JSON'
{"metadata": {"name": "counter", "namespace": "default", "uid": "uid-counter", "attempt": 0},
 "log_directory": "/var/log/pods/counter", "linux": {"cgroup_parent": "/orlop-vm/counter"}}
JSON
mkdir -p /run/volume
cat >/run/counter.json <<'JSON'
{"metadata": {"name": "counter", "attempt": 0}, "image": {"image": "localhost/busybox:test"}, "log_path": "counter.log",
 "mounts": [{"host_path": "/run/volume", "container_path": "/var/volume"}],
 "command": ["sh", "-c", "i=0; while true; do i=$((i+1)); echo $i >/count; echo $i; sleep 0.05; done"],
 "linux": {"resources": {"memory_limit_in_bytes": 67108864}}}
JSON
pod=$(crictl runp /run/pod.json) || failed "$pod"
container=$(crictl create "$pod" /run/counter.json /run/pod.json) || failed "$container"
crictl start "$container" >/dev/null || failed "no start"
count() { tail -n 1 /var/log/pods/counter/counter.log | sed 's/.* //'; }
reaches() {
    for _ in $(seq 200); do
        [ "$(count || true)" -ge "$1" ] 2>/dev/null && return
        sleep 0.1
    done
    failed "the counter stands at $(count)"
}
reaches 5
mkdir -p /run/checkpoints
if ! crictl checkpoint --export=/run/checkpoints/counter.tar "$container" >/run/said 2>&1; then
    cat /run/said
    failed "no checkpoint"
fi
before=$(count)
reaches $((before + 5))
echo "counts=on"
pid=$(crictl inspect -o go-template --template '{{.info.pid}}' "$container")
echo "frozen=$(cat "/sys/fs/cgroup$(sed -n 's/^0:://p' "/proc/$pid/cgroup")/cgroup.freeze")"
echo "beside=$(find /run/checkpoints -type f | tr '\n' ' ')"
echo "left=$(find /var/lib/orlop/cri/transfer -mindepth 1 | tr '\n' ' ')"
mkdir -p /run/unpacked/files
tar -xf /run/checkpoints/counter.tar -C /run/unpacked
tar -xf /run/unpacked/rootfs-diff.tar -C /run/unpacked/files
seconds=$(sed -n "s/^(0*\([0-9.]*\)) Dumping finished successfully/\1/p" /run/unpacked/dump.log)
echo "seconds=$seconds"
cd /run/unpacked
echo "files=$(find . -maxdepth 1 -type f | sed 's#./##' | tr '\n' ' ')"
echo "count_on_disk=$(cat files/count)"
echo "images=$(find checkpoint -type f | sed 's#.*/##; s/-[0-9]*//' | sort -u | tr '\n' ' ')"
# The shell's memory holds its script.
grep -q 'while true' checkpoint/pages-*.img && echo "memory=there"
cd /
# One with a terminal, whose other end is not the container's.
sed 's/"name": "counter"/"name": "terminal"/; s/counter.log/terminal.log/; s/"command"/"tty": true, "command"/' \
    /run/counter.json >/run/terminal.json
terminal=$(crictl create "$pod" /run/terminal.json /run/pod.json) || failed "$terminal"
crictl start "$terminal" >/dev/null || failed "no start"
crictl checkpoint --export=/run/checkpoints/terminal.tar "$terminal" >/run/said 2>&1 || { cat /run/said; failed "none"; }
[ -s /run/checkpoints/terminal.tar ] && echo "terminal=done"
crictl stopp "$pod" >/dev/null || failed "no stopp"
crictl rmp "$pod" >/dev/null || failed "no rmp"
