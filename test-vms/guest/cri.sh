# Starts the CRI server with the flags of the file that the test left; the steps after this one use it.
# shellcheck shell=sh
set -eu
mkdir -p /etc/cni/net.d
cat >/etc/cni/net.d/10-orlop.conflist <<'JSON'
{"cniVersion": "1.1.0", "name": "orlop", "plugins": [
  {"type": "orlop-cni", "mtu": 1500, "capabilities": {"ips": true, "mac": true},
   "ipam": {"ranges": ["10.244.0.0/24"], "dataDir": "/var/lib/orlop/cni"}}]}
JSON
cat >/etc/crictl.yaml <<'YAML'
runtime-endpoint: unix:///run/orlop/cri.sock
image-endpoint: unix:///run/orlop/cri.sock
timeout: 60
YAML
orlop image import /vm/busybox.tar
# shellcheck disable=SC2046
orlop cri $(cat /vm/cri-flags) >/var/log/cri.log 2>&1 &
echo $! >/run/cri.pid
for _ in $(seq 300); do
    [ -S /run/orlop/cri.sock ] && break
    sleep 0.1
done
crictl version || { cat /var/log/cri.log; exit 1; }
