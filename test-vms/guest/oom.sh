# A container that takes more memory than it may.
# shellcheck shell=sh
set -eu
cat >/run/pod.json <<'JSON'
{"metadata": {"name": "greedy", "namespace": "default", "uid": "uid-greedy", "attempt": 0},
 "log_directory": "/var/log/pods/greedy", "linux": {"cgroup_parent": "/orlop-vm/greedy"}}
JSON
cat >/run/greedy.json <<'JSON'
{"metadata": {"name": "greedy", "attempt": 0}, "image": {"image": "localhost/busybox:test"}, "log_path": "greedy.log",
 "command": ["dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1"],
 "linux": {"resources": {"memory_limit_in_bytes": 16777216}}}
JSON
pod=$(crictl runp /run/pod.json)
container=$(crictl create "$pod" /run/greedy.json /run/pod.json)
crictl start "$container" >/dev/null
for _ in $(seq 100); do
    state=$(crictl inspect -o go-template --template '{{.status.state}}' "$container")
    [ "$state" = CONTAINER_EXITED ] && break
    sleep 0.2
done
echo "state=$state"
echo "reason=$(crictl inspect -o go-template --template '{{.status.reason}}' "$container")"
echo "exit_code=$(crictl inspect -o go-template --template '{{.status.exitCode}}' "$container")"
crictl stopp "$pod" >/dev/null
crictl rmp "$pod" >/dev/null
