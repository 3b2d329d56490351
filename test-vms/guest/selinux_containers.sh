# The same machine after `semodule -i container.pp orlop.pp` and `restorecon`.
# shellcheck shell=sh disable=SC2154
within() { crictl exec --sync "$@" 2>&1 | tr -d '\0' | tr '\n' ' '; }
info() { crictl inspect -o go-template --template "{{.info.$2}}" "$1"; }
# Not busybox's own, which tells no labels.
label() { /usr/local/bin/stat -c %C "$1"; }
# pod NAME
pod() {
    cat >"/run/$1.json" <<JSON
{"metadata": {"name": "$1", "namespace": "default", "uid": "uid-$1", "attempt": 0}, "log_directory": "/var/log/pods/$1",
 "linux": {"cgroup_parent": "/orlop-vm/$1", "security_context": {$2 "namespace_options": {"network": 0, "pid": 1}}}}
JSON
    crictl runp "/run/$1.json"
}
# container POD-ID POD-NAME NAME CONTEXT RELABEL
started() {
    cat >"/run/$2-$3.json" <<JSON
{"metadata": {"name": "$3", "attempt": 0}, "image": {"image": "localhost/busybox:test"}, "log_path": "$3.log",
 "mounts": [{"host_path": "$volume", "container_path": "/volume", "selinux_relabel": $5},
   {"host_path": "/srv/host", "container_path": "/host"}],
 "command": ["sh", "-c", "echo said; sleep 1000"],
 "linux": {"security_context": {$4 "namespace_options": {"network": 0, "pid": 1}}}}
JSON
    id=$(crictl create "$1" "/run/$2-$3.json" "/run/$2.json") && crictl start "$id" >/dev/null && echo "$id"
}
dd if=/vm/containers/policy of=/sys/fs/selinux/load bs=16M 2>/dev/null
volume=/var/lib/kubelet/pods/uid-first/volumes/kubernetes.io~empty-dir/volume
mkdir -p $volume /srv/host
echo text >$volume/file
echo text >/srv/host/file
setfiles -F /vm/containers/file_contexts / /dev /run 2>&1 | tail -n 3
# As if another pod had it before.
chcon -R -l s0:c1,c2 $volume
echo "program=$(label /usr/local/bin/orlop)"
echo "server=$(serve)"
first=$(pod first '' 2>&1) || failed "$first"
a=$(started "$first" first a '' false) || failed "$a"
echo "process=$(of_process "$a")"
echo "exec=$(within "$a" cat /proc/self/attr/current)"
echo "inspect=$(info "$a" runtimeSpec.process.selinuxLabel) $(info "$a" runtimeSpec.linux.mountLabel)"
echo "file=$(label "/proc/$(info "$a" pid)/root/bin/busybox")"
echo "written=$(within "$a" sh -c 'echo x >/new && cat /new && echo y >/dev/shm/new && cat /dev/shm/new')"
echo "host=$(within "$a" cat /host/file)"
echo "host_is=$(label /srv/host/file)"
echo "others=$(within "$a" cat /volume/file)"
b=$(started "$first" first b '' true) || failed "$b"
echo "labelled=$(within "$b" cat /volume/file)"
echo "labelled_is=$(label $volume/file)"
echo "not_ours=$(volume=/srv/host && started "$first" first n '' true 2>&1 | tail -n 1)"
second=$(pod second '' 2>&1) || failed "$second"
c=$(started "$second" second c '' false) || failed "$c"
echo "second=$(of_process "$c")"
echo "second_reads=$(within "$c" cat /volume/file)"
third=$(pod third '"privileged": true,' 2>&1) || failed "$third"
p=$(started "$third" third p '"privileged": true,' false) || failed "$p"
echo "privileged=$(of_process "$p")"
echo "privileged_exec=$(within "$p" cat /proc/self/attr/current)"
echo "privileged_reads=$(within "$p" cat /host/file)"
echo "log=$(cut -d' ' -f4 /var/log/pods/first/a.log)"
crictl stop -t 0 "$a" >/dev/null || failed "no stop"
for p in "$first" "$second" "$third"; do
    crictl stopp "$p" >/dev/null || failed "no stopp"
    crictl rmp -f "$p" >/dev/null || failed "no rmp"
done
end
# Of the server and its monitors: all that it tried and was not allowed.
dmesg | grep 'avc: *denied.*scontext=[^ ]*:container_engine_t:' | sed 's/.*denied/denied/; s/pid=[0-9]* //; s/ino=[0-9]* //' | sort -u
