# A whole cluster, and the demo through its Service.
# shellcheck shell=sh
kill "$(cat /run/cri.pid)" 2>/dev/null
while kill -0 "$(cat /run/cri.pid)" 2>/dev/null; do sleep 0.1; done
set -eu
rm -f /etc/cni/net.d/*
mkdir -p /var/lib/orlop/server/manifests
cp /vm/demo.yaml /var/lib/orlop/server/manifests/
orlop image import /vm/demo-web.tar
orlop up --detach --wait 100 || { tail -n 60 /var/log/orlop.log; exit 1; }
# Busybox's wget looks the protocol up in a way that a static program cannot; its nc does not.
ask() { printf 'GET / HTTP/1.0\r\nHost: demo\r\n\r\n' | nc -w 5 "$1" "$2" 2>/dev/null | tail -n 1; }
for target in '10.96.0.80 80' '192.0.2.10 30080'; do
    answer=
    for _ in $(seq 50); do
        answer=$(ask "${target% *}" "${target#* }")
        [ -n "$answer" ] && break
        sleep 0.2
    done
    echo "${target% *}=$answer"
done
[ -n "$answer" ] || { tail -n 60 /var/log/orlop.log; exit 1; }
# What the agent allows pods, all together and one.
set -- /sys/fs/cgroup/kubepods/burstable/pod*
for limit in kubepods/memory.max kubepods/cpu.weight kubepods/pids.max kubepods/besteffort/cpu.weight; do
    echo "$limit=$(cat "/sys/fs/cgroup/$limit")"
done
echo "pod/memory.max=$(cat "$1/memory.max")"
echo "pod/cpu.max=$(cat "$1/cpu.max")"
# Since the step before, containers can have the default profile.
echo "confined=$(cat /proc/[0-9]*/attr/current 2>/dev/null | grep -c "^orlop-default")"
echo "memory=$(($(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo) * 1024))"
orlop down || { tail -n 30 /var/log/orlop.log; exit 1; }
