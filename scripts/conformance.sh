#!/usr/bin/env bash
# Runs upstream's conformance tests against `orlop up` on this machine:
#   conformance.sh [FOCUS [SKIP]]     both are regular expressions over the names of specs; sig-network's specs by default
# What it needs is built once into $ORLOP_CONFORMANCE [target/conformance]: e2e.test (ten minutes) and images.
# $ORLOP_PROGRAMS is the folder of the programs [target/release]. The log and junit report stay in the folder.
set -euo pipefail
cd "$(dirname "$0")/.."
focus=${1:-'\[sig-network\].*\[Conformance\]'}
skip=${2:-}
kubernetes=v1.36.3
programs=$(realpath "${ORLOP_PROGRAMS:-target/release}")
mkdir -p "${ORLOP_CONFORMANCE:-target/conformance}"
dir=$(realpath "${ORLOP_CONFORMANCE:-target/conformance}")

die() { echo "conformance: $*" >&2; exit 1; }
[ "$(id -u)" -eq 0 ] || die "not root; a node needs to be"
for p in orlop orlop-monitor orlop-cni; do
    [ -x "$programs/$p" ] || die "$programs/$p is missing; run make build"
done

go_build() { # folder, module, version, what go is to do
    command -v go >/dev/null || die "Go is missing; apt-get install golang"
    mkdir -p "$1"
    (
        cd "$1"
        printf 'module orlop.invalid/conformance\ngo 1.26.0\nrequire %s %s\n' "$2" "$3" >go.mod
        mod=$(go mod download -json "$2@$3" | sed -n 's/.*"GoMod": "\(.*\)".*/\1/p')
        sed -n 's/^\t\(k8s\.io\/[a-z-]*\) => .*/\1/p' "$mod" | while read -r m; do
            echo "replace $m => $m v0.${3#v1.}" >>go.mod
        done
        printf '//go:build tools\npackage conformance\nimport _ "%s"\n' "$4" >tools.go
        go mod tidy >log 2>&1 && CGO_ENABLED=0 go "${@:5}" "$4" >>log 2>&1
    ) || die "$4 did not build; see $1/log (Go modules come from the proxy that \$GOPROXY names)"
}
version=k8s.io/component-base/version
[ -x "$dir/e2e.test" ] || go_build "$dir/go-e2e" k8s.io/kubernetes "$kubernetes" k8s.io/kubernetes/test/e2e \
    test -c -vet=off -o "$dir/e2e.test" -ldflags "-s -w -X $version.gitVersion=$kubernetes -X $version.gitMajor=1 -X $version.gitMinor=36"
# Anew when it makes more than it did.
[ "$dir/images/agnhost-2.63.0.tar" -nt test-vms/images/build.sh ] || test-vms/images/build.sh "$dir/images" "$programs/orlop"

run=$dir/run
export KUBECONFIG=$run/admin.kubeconfig
up=(--data-dir "$run/data" --write-kubeconfig "$KUBECONFIG" --listen 0.0.0.0:28443 --service-cidr 10.68.0.0/16
    --cluster-cidr 10.69.0.0/16 --node-name conformance --run-dir /run/orlop-conformance --kubelet-dir "$run/kubelet"
    --pod-logs-dir "$run/pods" --container-logs-dir "$run/containers" --static-pod-dir "$run/manifests"
    --cni-conf-dir "$run/net.d" --cgroup-root /orlop-conformance --config "$run/kubelet.yaml"
    --kubelet-port 28250 --proxy-health-address none --proxy-metrics-address none
    --bpf-dir /sys/fs/bpf/orlop-conformance --dns-address 169.254.21.230 --dns-link orl-dnsconf --log-file "$run/log")
down() {
    [ -n "${pid:-}" ] && kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null
    "$programs/orlop" down "${up[@]}" >/dev/null 2>&1 || true
}
pid=
down
rm -rf "$run"
mkdir -p "$run/report"
trap down EXIT
cat >"$run/kubelet.yaml" <<'Y'
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
evictionHard: {}
imageGCHighThresholdPercent: 100
clusterDNS: [169.254.21.230]
clusterDomain: cluster.local
cgroupRoot: /orlop-conformance
Y
for image in "$dir"/images/*.tar; do
    "$programs/orlop" image import "$image" --images-dir "$run/data/images" >/dev/null
done
"$programs/orlop" up "${up[@]}" >"$run/up.log" 2>&1 </dev/null &
pid=$!
for _ in $(seq 120); do
    kubectl get nodes 2>/dev/null | grep -qw Ready && break
    kill -0 "$pid" 2>/dev/null || die "orlop up ended; see $run/up.log"
    sleep 0.5
done
"$dir/e2e.test" --provider=skeleton --kubeconfig="$KUBECONFIG" --num-nodes=1 --allowed-not-ready-nodes=0 \
    --ginkgo.no-color --ginkgo.timeout=6h --disable-log-dump=true --report-dir="$run/report" \
    --ginkgo.focus="$focus" ${skip:+--ginkgo.skip="$skip"} >"$run/e2e.log" 2>&1 || failed=1
grep -E '^  \[FAIL\]|^(Ran|SUCCESS!|FAIL!)' "$run/e2e.log" || tail -5 "$run/e2e.log"
exit "${failed:-0}"
