#!/bin/sh
# Stage two: what an init system would mount, then the steps, then off. What the steps say goes to the second serial port.
export PATH=/usr/local/bin:/bin HOME=/root
mkdir -p /root
there() { grep -qs " $1 " /proc/mounts; }
there /proc || mount -t proc proc /proc
there /sys || mount -t sysfs sys /sys
there /dev || mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
there /dev/pts || mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
there /dev/shm || mount -t tmpfs shm /dev/shm
# shellcheck source=/dev/null
[ ! -e /vm/cgroups ] || . /vm/cgroups
there /sys/fs/cgroup || mount -t cgroup2 -o nsdelegate cgroup /sys/fs/cgroup
there /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
there /run || mount -t tmpfs -o mode=755 run /run
mount --make-rshared /
while read -r m; do
    insmod "/vm/modules/$m" || echo "module $m did not load"
done </vm/modules/order
ip link set lo up
hostname vm
# Addresses and a default route as a machine has them, on a link that leads nowhere.
ip link add uplink type dummy
ip addr add 192.0.2.10/24 dev uplink
ip link set uplink up
ip route add default via 192.0.2.1
exec 3>/dev/ttyS1
for s in /vm/steps/*; do
    name=${s##*/}
    name=${name#*-}
    echo "@@ begin $name" >&3
    sh "$s" >&3 2>&1 3>&-
    echo "@@ end $name $?" >&3
done
sync
poweroff -f
