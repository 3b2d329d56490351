#!/usr/bin/env bash
# Runs a command with mounts, pinned BPF objects and a network of its own, which end with it: `isolated.sh COMMAND [ARG…]`. The
# network has a link `eth0` with a default route that leads nowhere. What a killed run leaves is not in the way of the next one.
set -euo pipefail
[ "$(id -u)" -eq 0 ] || { echo "isolated: not root; namespaces cannot be made" >&2; exit 1; }
if [ "${1:-}" != --inside ]; then
    [ $# -gt 0 ] || { echo "isolated: which command?" >&2; exit 1; }
    exec unshare --mount --net "$0" --inside "$@"
fi
shift
mount -t bpf bpf /sys/fs/bpf
ip link set lo up
ip link add eth0 type veth peer name uplink
ip link set uplink up
ip link set eth0 up
ip address add 192.0.2.10/24 dev eth0
ip route add default via 192.0.2.1
exec "$@"
