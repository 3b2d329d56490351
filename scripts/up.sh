#!/usr/bin/env bash
# Starts a cluster on this machine with the demo in it, and shows how to go on.
set -euo pipefail
cd "$(dirname "$0")/.."
data=/var/lib/orlop
kubeconfig=/etc/orlop/admin.kubeconfig
service=10.96.0.80
node_port=30080

die() { echo "up: $*" >&2; exit 1; }
[ "$(id -u)" -eq 0 ] || die "not root; run make as root"

# One request without curl, which a fresh machine may lack.
ask() {
    timeout 3 bash -c "exec 3<>/dev/tcp/$1/$2 && printf 'GET / HTTP/1.1\r\nHost: demo\r\n\r\n' >&3 && cat <&3" 2>/dev/null |
        tr -d '\r' | sed -n '/^$/,$p' | sed 1d
}
go_on() {
    cat <<TEXT

  export KUBECONFIG=$kubeconfig
  kubectl get pods -A -o wide
  curl http://$service/            the demo by its Service address
  curl http://127.0.0.1:$node_port/       the same by its node port
  make down                        stop it; \`make purge\` also deletes $data
TEXT
    command -v kubectl >/dev/null || echo "  (kubectl is not on PATH; any version from 1.30 on will do)"
}

# `orlop up` holds this lock as long as it runs.
if [ -e /run/orlop/up/lock ] && ! flock -n /run/orlop/up/lock true; then
    echo "up: it runs already (process $(cat /run/orlop/up/pid))"
    go_on
    exit 0
fi

echo "up: building the demo's image"
scripts/demo-image.sh target/demo/demo-web.tar
target/release/orlop image import target/demo/demo-web.tar --images-dir "$data/images" >/dev/null
mkdir -p "$data/server/manifests"
cp deploy/demo/demo.yaml "$data/server/manifests/demo.yaml"

echo "up: starting"
target/release/orlop up --detach --data-dir "$data" --write-kubeconfig "$kubeconfig"

for _ in $(seq 100); do
    answer=$(ask "$service" 80 || true)
    [ -n "$answer" ] && break
    sleep 0.1
done
[ -n "${answer:-}" ] || die "the demo does not answer on http://$service/; see /var/log/orlop.log"
echo "up: the demo answers: $answer"
go_on
