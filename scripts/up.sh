#!/usr/bin/env bash
# Starts a cluster on this machine with the demo in it, and shows how to go on. ORLOP_PROGRAMS names another folder of
# programs than target/release.
set -euo pipefail
cd "$(dirname "$0")/.."
programs=${ORLOP_PROGRAMS:-target/release}
data=/var/lib/orlop
run=/run/orlop
log=/var/log/orlop.log
kubeconfig=/etc/orlop/admin.kubeconfig
service=10.96.0.80
node_port=30080

die() { echo "up: $*" >&2; exit 1; }
[ "$(id -u)" -eq 0 ] || die "not root; run make as root"
[ -x "$programs/orlop" ] || die "$programs/orlop is missing; run make build"

# `orlop up` holds this lock as long as it runs.
runs() { [ -e $run/up/lock ] && ! flock -n $run/up/lock true; }
# One request without curl, which a fresh machine may lack.
ask() {
    timeout 3 bash -c "exec 3<>/dev/tcp/$1/$2 && printf 'GET / HTTP/1.1\r\nHost: demo\r\n\r\n' >&3 && cat <&3" 2>/dev/null |
        tr -d '\r' | sed -n '/^$/,$p' | sed 1d
}
wait_for_answer() { # address, port; up to 10 s
    for _ in $(seq 100); do
        answer=$(ask "$1" "$2" || true)
        [ -z "$answer" ] || return 0
        sleep 0.1
    done
    die "the demo's pods are ready, but http://$1:$2/ does not answer; \`$programs/orlop proxy trace $1:$2\` shows how far a connection gets; $log ends with: $(tail -n 1 $log)"
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

if runs; then
    echo "up: it runs already (process $(cat $run/up/pid))"
    go_on
    exit 0
fi

# A start that fails takes back what it has made, and nothing that was there before: pods of a killed `orlop up` go on.
[ -e $data ] || new_data=yes
take_back() {
    if runs; then return; fi
    [ -z "${new_run:-}" ] || "$programs/orlop" down --data-dir $data || true
    [ -z "${new_data:-}" ] || rm -rf $data
}
trap take_back EXIT

echo "up: building the demo's image"
scripts/demo-image.sh target/demo/demo-web.tar
echo "up: importing it"
"$programs/orlop" image import target/demo/demo-web.tar --images-dir $data/images >/dev/null
mkdir -p $data/server/manifests
cp deploy/demo/demo.yaml $data/server/manifests/demo.yaml

echo "up: starting; the log is $log"
[ -e $run ] || new_run=yes
# Returns when the node and the demo's Deployment are ready, and says meanwhile what it waits for.
"$programs/orlop" up --detach --data-dir $data --write-kubeconfig $kubeconfig --log-file $log
for address in "$service 80" "127.0.0.1 $node_port"; do
    # shellcheck disable=SC2086
    wait_for_answer $address
done
echo "up: the demo answers: $answer"
go_on
