# What a node has that runs pods by `orlop cri`: a network and crictl's settings.
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
