# Upstream's kube-proxy by IPVS, killed when all is in place; then what `orlop proxy cleanup --kube-proxy` leaves of it and of others'.
# shellcheck shell=sh
set -eu
# Busybox's ip and modprobe do not do.
for family in iptables ip6tables; do
    for what in '' -save -restore; do
        ln -s xtables-nft-multi "/usr/local/bin/$family$what"
        ln -s xtables-nft-multi "/usr/local/bin/$family-nft$what"
    done
done
orlop server --listen 127.0.0.1:6443 --advertise-address 127.0.0.1 --data-dir /tmp/data --write-kubeconfig /tmp/admin \
    --manifests /vm/manifests >/tmp/server.log 2>&1 &
until [ -s /tmp/admin ]; do sleep 0.2; done
kube-proxy --kubeconfig /tmp/admin --proxy-mode ipvs --hostname-override n1 --bind-address 192.0.2.10 --conntrack-max-per-core 0 \
    >/tmp/kube-proxy.log 2>&1 &
proxy=$!
# Rules come after sets, and sets after servers.
tries=0
until iptables-save | grep '^-A KUBE-NODE-PORT' | grep -q KUBE-NODE-PORT-TCP && ipset save | grep -q '^add KUBE-NODE-PORT-TCP 30080'; do
    tries=$((tries + 1))
    [ $tries -lt 300 ] || { tail -n 30 /tmp/server.log /tmp/kube-proxy.log; ipvsadm -Sn; ipset save; iptables-save; exit 1; }
    sleep 0.2
done
kill -9 $proxy
ipvsadm -A -t 192.0.2.10:8888 -s rr
ipvsadm -A -f 7 -s rr
ipset create MINE hash:ip
iptables -t nat -N MINE
iptables -t nat -A POSTROUTING -j MINE
servers() { ipvsadm -Sn | sed -n 's/^-A \(.*\) -s rr$/\1/p' | sort | tr '\n' ' '; }
echo "before=$(servers)"
echo "link_before=$(ip -o address show dev kube-ipvs0 | grep -c 'inet ')"
orlop proxy cleanup --kube-proxy | sed 's/^/said=/'
echo "servers=$(servers)"
echo "sets=$(ipset list -n | tr '\n' ' ')"
echo "rules=$( (iptables-save && ip6tables-save) | sed -n '/^-A/p; s/^:\([^ ]*\) - .*/\1/p' | tr '\n' ' ')"
echo "link=$(ip link | grep -c kube-ipvs0)"
