# Containers under AppArmor: the default profile, one of the node's, none; and that the kernel holds them to it.
# shellcheck shell=sh
set -eu
failed() { echo "apparmor: $*"; tail -n 30 /var/log/cri.log; dmesg | grep apparmor | tail -n 20; exit 1; }
cat >/run/pod.json <<'JSON'
{"metadata": {"name": "guarded", "namespace": "default", "uid": "uid-guarded", "attempt": 0},
 "log_directory": "/var/log/pods/guarded",
 "linux": {"cgroup_parent": "/orlop-vm/guarded", "security_context": {"privileged": true, "namespace_options": {"network": 2, "pid": 1}}}}
JSON
# container NAME CONTEXT
container() {
    cat >"/run/$1.json" <<JSON
{"metadata": {"name": "$1", "attempt": 0}, "image": {"image": "localhost/busybox:test"}, "log_path": "$1.log",
 "command": ["sh", "-c", "trap 'exit 7' TERM; while true; do sleep 0.2; done"],
 "linux": {"security_context": {$2 "capabilities": {"add_capabilities": ["SYS_ADMIN"]}, "namespace_options": {"network": 2, "pid": 1}}}}
JSON
    crictl create "$pod" "/run/$1.json" /run/pod.json 2>&1 | tr '\n' ' '
}
started() { id=$(container "$@" | tr -d ' ') && crictl start "$id" >/dev/null && echo "$id"; }
within() { crictl exec --sync "$@" 2>&1 | tr '\n' ' '; }
profile() { cat "/proc/$(crictl inspect -o go-template --template '{{.info.pid}}' "$1")/attr/current"; }
mounts='/bin/busybox mount -t tmpfs none /tmp && echo mounted'

pod=$(crictl runp /run/pod.json) || failed "$pod"
mount -t securityfs securityfs /sys/kernel/security
# Without the program that loads profiles nobody has one, and who asks for one is told.
a=$(started without '') || failed "$a"
echo "without=$(profile "$a")"
echo "without_asked=$(container asked '"apparmor": {"profile_type": 0},')"
mkdir -p /usr/sbin
ln -s /usr/local/bin/apparmor_parser /usr/sbin/apparmor_parser

a=$(started default '') || failed "$a"
echo "default=$(profile "$a")"
echo "exec=$(within "$a" cat /proc/self/attr/current)"
echo "default_writes=$(within "$a" sh -c 'echo x >/tmp/x && cat /tmp/x')"
echo "default_mounts=$(within "$a" sh -c "$mounts")"
b=$(started unconfined '"apparmor": {"profile_type": 1},') || failed "$b"
echo "unconfined=$(profile "$b")"
echo "unconfined_mounts=$(within "$b" sh -c "$mounts")"
c=$(started privileged '"privileged": true,') || failed "$c"
echo "privileged=$(profile "$c")"

cat >/run/profile <<'TXT'
profile vm-no-tmp flags=(attach_disconnected) {
  file,
  capability,
  network,
  signal,
  deny /tmp/** w,
}
TXT
local='"apparmor": {"profile_type": 2, "localhost_ref": "localhost/vm-no-tmp"},'
echo "missing=$(container missing "$local")"
apparmor_parser -K /run/profile
d=$(started local "$local") || failed "$d"
echo "local=$(profile "$d")"
echo "local_writes=$(within "$d" sh -c 'echo x >/x && cat /x')"
echo "local_denied=$(within "$d" sh -c 'echo x >/tmp/x')"
for id in "$a" "$d"; do
    crictl stop -t 20 "$id" >/dev/null || failed "no stop"
    echo "exit_code_$id=$(crictl inspect -o go-template --template '{{.status.exitCode}}' "$id")" | sed "s/$a/default/; s/$d/local/"
done
crictl stopp "$pod" >/dev/null || failed "no stopp"
crictl rmp "$pod" >/dev/null || failed "no rmp"
