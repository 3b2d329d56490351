# Debian's policy alone, enforced: it names types for containers that it does not have, so pods run in the server's own domain. The next part
# of the step follows.
# shellcheck shell=sh
set -eu
echo 1 >/sys/fs/selinux/enforce
mkdir -p /var/log/containers
failed() { echo "debian: $*"; tail -n 30 /var/log/containers/cri.log; dmesg | grep 'avc: *denied' | tail -n 20; exit 1; }
of_process() { tr -d '\0' <"/proc/$(crictl inspect -o go-template --template '{{.info.pid}}' "$1")/attr/current"; }
# The program's type says what the server becomes.
serve() {
    orlop cri >/var/log/containers/cri.log 2>&1 &
    echo $! >/run/cri.pid
    for _ in $(seq 300); do
        crictl version >/dev/null 2>&1 && break
        sleep 0.1
    done
    tr -d '\0' <"/proc/$(cat /run/cri.pid)/attr/current"
}
end() {
    kill "$(cat /run/cri.pid)" || failed "the server is gone"
    while kill -0 "$(cat /run/cri.pid)" 2>/dev/null; do sleep 0.1; done
}
echo "named=$(grep -c container_t /etc/selinux/default/contexts/lxc_contexts)"
orlop image import /vm/busybox.tar || failed "no import"
echo "plain_server=$(serve)"
cat >/run/pod.json <<'JSON'
{"metadata": {"name": "plain", "namespace": "default", "uid": "uid-plain", "attempt": 0}, "log_directory": "/var/log/pods/plain",
 "linux": {"cgroup_parent": "/orlop-vm/plain"}}
JSON
cat >/run/plain.json <<'JSON'
{"metadata": {"name": "plain", "attempt": 0}, "image": {"image": "localhost/busybox:test"}, "log_path": "plain.log", "command": ["sleep", "1000"]}
JSON
pod=$(crictl runp /run/pod.json 2>&1) || failed "$pod"
container=$(crictl create "$pod" /run/plain.json /run/pod.json 2>&1) || failed "$container"
crictl start "$container" >/dev/null || failed "no start"
echo "plain_process=$(of_process "$container")"
sed 's/"plain"/"asked"/; s/"image"/"linux": {"security_context": {"selinux_options": {"level": "s0:c1,c2"}}}, "image"/' /run/plain.json >/run/asked.json
echo "plain_asked=$(crictl create "$pod" /run/asked.json /run/pod.json 2>&1 | tail -n 1)"
crictl rmp -f "$pod" >/dev/null || failed "no rmp"
echo "plain_warned=$(grep -c 'WARN.*no labels for containers.*container_t' /var/log/containers/cri.log)"
end
