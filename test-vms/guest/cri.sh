# Starts the CRI server with the flags of the file that the test left; the steps after this one use it.
# shellcheck shell=sh
set -eu
orlop image import /vm/busybox.tar
# shellcheck disable=SC2046
orlop cri $(cat /vm/cri-flags) >/var/log/cri.log 2>&1 &
echo $! >/run/cri.pid
for _ in $(seq 300); do
    [ -S /run/orlop/cri.sock ] && break
    sleep 0.1
done
crictl version || { cat /var/log/cri.log; exit 1; }
