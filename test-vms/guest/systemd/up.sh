# A whole cluster whose pods' slices systemd makes, and the demo through its Service.
# shellcheck shell=sh
while kill -0 "$(cat /run/cri.pid)" 2>/dev/null; do sleep 0.1; done
set -eu
failed() { echo "up: $*"; tail -n 60 /var/log/orlop.log; exit 1; }
rm -f /etc/cni/net.d/*
mkdir -p /var/lib/orlop/server/manifests
cp /vm/demo.yaml /var/lib/orlop/server/manifests/
orlop image import /vm/demo-web.tar
orlop up --cgroup-driver systemd --detach --wait 100 || failed "not up"
answer=
for _ in $(seq 100); do
    answer=$(printf 'GET / HTTP/1.0\r\nHost: demo\r\n\r\n' | nc -w 5 10.96.0.80 80 2>/dev/null | tail -n 1) || true
    [ -n "$answer" ] && break
    sleep 0.2
done
echo "answer=$answer"
pods=/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice
set -- $pods/kubepods-burstable-pod*.slice
slice=${1##*/}
echo "slice=$(echo "$slice" | sed 's/-pod[0-9a-f_]*/-podUID/')"
limits() { for f in memory.max cpu.max pids.max; do printf '%s ' "$(cat "$pods/$slice/$f")"; done; }
weights() { printf '%s %s' "$(cat /sys/fs/cgroup/kubepods.slice/cpu.weight)" "$(cat /sys/fs/cgroup/kubepods.slice/kubepods-besteffort.slice/cpu.weight)"; }
echo "limits=$(limits)"
echo "weights=$(weights)"
systemctl daemon-reload
echo "reloaded_limits=$(limits)"
echo "reloaded_weights=$(weights)"
echo "unit=$(systemctl show -p ActiveState --value "$slice") $(systemctl show -p MemoryMax --value "$slice")"
echo "scopes=$(find "$pods/$slice" -mindepth 1 -maxdepth 1 -name 'orlop-*.scope' | wc -l)"
orlop down || failed "not down"
echo "left=$(systemctl list-units --all --no-legend --plain '*.scope' 'kubepods*' | grep -v '^init.scope' | tr '\n' ' ')$(find /sys/fs/cgroup -path '*kubepods*' -type d | tr '\n' ' ')"
