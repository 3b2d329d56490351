# What labels pods, containers, execs and volumes get, and that the kernel holds containers to them.
# shellcheck shell=sh
set -eu
failed() { echo "selinux: $*"; tail -n 30 /var/log/cri.log; dmesg | grep avc | tail -n 20; exit 1; }
# pod NAME CONTEXT, with the node's network unless it is the first.
pod() {
    net='"network": 2'
    [ "$1" = first ] && net='"network": 0'
    cat >"/run/$1.json" <<JSON
{"metadata": {"name": "$1", "namespace": "default", "uid": "uid-$1", "attempt": 0}, "log_directory": "/var/log/pods/$1",
 "linux": {"cgroup_parent": "/orlop-vm/selinux", "security_context": {$2 "namespace_options": {$net, "pid": 1}}}}
JSON
    crictl runp "/run/$1.json"
}
# container POD-ID POD-NAME NAME CONTEXT RELABEL [CRICTL-OPTION]
container() {
    cat >"/run/$2-$3.json" <<JSON
{"metadata": {"name": "$3", "attempt": 0}, "image": {"image": "localhost/busybox:test"}, "log_path": "$3.log",
 "mounts": [{"host_path": "/run/volume", "container_path": "/volume", "selinux_relabel": $5}],
 "command": ["sh", "-c", "sleep 1000"],
 "linux": {"security_context": {$4 "namespace_options": {"network": $(sed -n 's/.*"network": \([0-9]\).*/\1/p' "/run/$2.json"), "pid": 1}}}}
JSON
    crictl create "$1" "/run/$2-$3.json" "/run/$2.json"
}
started() { id=$(container "$@") && crictl start "$id" >/dev/null && echo "$id"; }
within() { crictl exec --sync "$@" 2>&1 | tr -d '\0' | tr '\n' ' '; }
info() { crictl inspect -o go-template --template "{{.info.$2}}" "$1"; }
of_process() { tr -d '\0' <"/proc/$(info "$1" pid)/attr/current"; }
# Not busybox's own, which tells no labels.
label() { /usr/local/bin/stat -c %C "$1"; }

mkdir -p /run/volume/deep /sys/fs/cgroup/orlop-vm/selinux
echo text >/run/volume/deep/file
echo text >/run/outside
ln -s /run/outside /run/volume/link
first=$(pod first '') || failed "$first"
echo "images=$(label /var/lib/orlop/images) $(label /var/lib/orlop/images/layers)"
echo "pod=$(crictl inspectp -o go-template --template '{{.info.processLabel}} {{.info.mountLabel}}' "$first")"
a=$(started "$first" first a '' false) || failed "$a"
echo "process=$(of_process "$a")"
echo "exec=$(within "$a" cat /proc/self/attr/current)"
root=/proc/$(info "$a" pid)/root
for f in / /bin/busybox /dev /dev/null /dev/pts /dev/shm /dev/mqueue /etc/hosts /etc/resolv.conf /proc/acpi; do
    [ ! -e "$root$f" ] || echo "file:$f=$(label "$root$f")"
done
echo "written=$(within "$a" sh -c 'echo x >/new && cat /new && echo y >/dev/shm/new && cat /dev/shm/new')"
echo "unlabelled=$(within "$a" cat /volume/deep/file)"
echo "unlabelled_is=$(label /run/volume/deep/file)"

# With the volume's label set, it can be read; the system's own files keep theirs.
b=$(started "$first" first b '"selinux_options": {"type": "reader_t"},' true) || failed "$b"
echo "reader=$(of_process "$b")"
echo "relabelled=$(label /run/volume) $(label /run/volume/deep/file)"
echo "outside=$(label /run/outside)"
echo "labelled=$(within "$a" cat /volume/deep/file)"
echo "labelled_reader=$(within "$b" cat /volume/deep/file)"
echo "reader_write=$(within "$b" sh -c 'echo x >/volume/deep/file')"
sed 's#/run/volume#/etc#' /run/first-b.json | sed 's/"name": "b"/"name": "etc"/' >/run/first-etc.json
echo "etc=$(crictl create "$first" /run/first-etc.json /run/first.json 2>&1 | tr '\n' ' ')"

# Another pod has another level.
second=$(pod second '') || failed "$second"
c=$(started "$second" second c '' false) || failed "$c"
echo "second=$(of_process "$c")"
echo "second_reads=$(within "$c" cat /volume/deep/file)"

# What is asked for; a privileged container has no label of ours.
level='"selinux_options": {"level": "s0:c7,c9"},'
third=$(pod third "$level \"privileged\": true,") || failed "$third"
d=$(started "$third" third d "$level" false) || failed "$d"
echo "level=$(of_process "$d")"
p=$(started "$third" third p "$level \"privileged\": true," false) || failed "$p"
echo "privileged=$(of_process "$p")"

# One with a mount that a CDI file asks for.
mkdir -p /etc/cdi
cat >/etc/cdi/vm.json <<'JSON'
{"cdiVersion": "0.6.0", "kind": "vm.test/mount", "devices": [{"name": "odd", "containerEdits": {"mounts":
  [{"hostPath": "tmpfs", "containerPath": "/odd", "type": "tmpfs", "options": ["atime"]}]}}]}
JSON
sed 's#"name": "a"#"name": "odd"#; s#"mounts"#"CDI_devices": [{"name": "vm.test/mount=odd"}], "mounts"#' /run/first-a.json >/run/first-odd.json
odd=$(crictl create "$first" /run/first-odd.json /run/first.json) || failed "$odd"
crictl start "$odd" >/dev/null || failed "no start"
echo "odd=$(of_process "$odd")"
echo "odd_mount=$(label "/proc/$(info "$odd" pid)/root/odd")"
echo "odd_dev=$(label "/proc/$(info "$odd" pid)/root/dev/null")"

# In a user namespace only some file systems take a label.
users='"mode": 0, "uids": [{"host_id": 100000, "container_id": 0, "length": 65536}], "gids": [{"host_id": 100000, "container_id": 0, "length": 65536}]'
sed "s/second/users/g; s/\"network\": 2/\"network\": 0, \"userns_options\": {$users}/" /run/second.json >/run/users.json
users=$(crictl runp /run/users.json) || failed "$users"
u=$(started "$users" users u '' false) || failed "$u"
echo "users=$(of_process "$u")"
echo "users_exec=$(within "$u" cat /proc/self/attr/current)"
for f in / /dev /dev/mqueue; do
    echo "users:$f=$(label "/proc/$(info "$u" pid)/root$f")"
done

# One that another OCI runtime makes.
fourth=$(crictl runp --runtime=crun /run/second.json 2>&1) && failed "one name, two pods: $fourth"
sed 's/second/fourth/g' /run/second.json >/run/fourth.json
fourth=$(crictl runp --runtime=crun /run/fourth.json) || failed "$fourth"
e=$(started "$fourth" fourth e '' false) || failed "$e"
echo "crun=$(of_process "$e")"
echo "crun_exec=$(within "$e" cat /proc/self/attr/current)"

# Labels that the policy does not have.
things() { grep -c /run/orlop/cri /proc/mounts; find /run/orlop/cri/s /var/lib/orlop/cri -maxdepth 3 -type d | sort; crictl ps -aq; }
things >/run/before
echo "wrong_type=$(container "$first" first wrong '"selinux_options": {"type": "nobody_t"},' false 2>&1 | tr '\n' ' ')"
echo "wrong_level=$(container "$first" first wrong '"selinux_options": {"level": "s0:c1024"},' false 2>&1 | tr '\n' ' ')"
echo "wrong_text=$(container "$first" first wrong '"selinux_options": {"user": "a:b"},' false 2>&1 | tr '\n' ' ')"
echo "wrong_pod=$(pod wrong '"selinux_options": {"role": "nobody_r"},' 2>&1 | tr '\n' ' ')"
things >/run/after
echo "left=$(diff /run/before /run/after | tr '\n' ' ')"

# The level is the pod's as long as it lives, also over a restart of the server.
kill -9 "$(cat /run/cri.pid)"
orlop cri >>/var/log/cri.log 2>&1 &
echo $! >/run/cri.pid
for _ in $(seq 300); do
    crictl version >/dev/null 2>&1 && break
    sleep 0.1
done
echo "exec_later=$(within "$a" cat /proc/self/attr/current)"
for p in "$first" "$second" "$third" "$fourth" "$users"; do
    crictl stopp "$p" >/dev/null || failed "no stopp"
    crictl rmp "$p" >/dev/null || failed "no rmp"
done
dmesg | grep 'avc:.*denied' | tail -n 20
