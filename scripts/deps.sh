#!/usr/bin/env bash
# Installs what is missing: `deps.sh build` for building, `deps.sh test` for the gate as well. Idempotent, quiet when there is nothing to do.
set -euo pipefail
cd "$(dirname "$0")/.."

build_packages=(rustc-web rust-web-src llvm-22-dev libpolly-22-dev)
test_packages=(linux-libc-dev busybox-static criu docker-registry skopeo nftables iptables ipset ipvsadm qemu-system-x86 linux-image-cloud-amd64 cpio curl iproute2 jq shellcheck containernetworking-plugins socat bind9-dnsutils containerd runc crun apparmor secilc m4 checkpolicy semodule-utils policycoreutils zstd systemd dbus-daemon dbus-system-bus-common)
bpf_linker_version=0.13.0

die() { echo "deps: $*" >&2; exit 1; }

[ "$(id -u)" -eq 0 ] || die "not root; run make as root"
PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
command -v cargo >/dev/null || die "cargo is not on PATH; install rustup's stable Rust first"
command -v cc >/dev/null || die "no C compiler; apt-get install gcc libc6-dev"
# On a terminal the long steps show what they do; in a log they are quiet unless they fail.
shown() { if [ -t 1 ]; then "$@"; else "$@" >/dev/null; fi; }
quiet=(--quiet)
[ ! -t 1 ] || quiet=()

# Debian 12 had older compilers at first; its updates bring those that fit each other.
fits() { # package, version
    case $1 in
        rust*-web*) dpkg --compare-versions "$2" ge 1.96 ;;
        *) [ -n "$2" ] ;;
    esac
}
installed() { # package
    local said
    said=$(dpkg-query -W -f='${db:Status-Abbrev} ${Version}' "$1" 2>/dev/null) && [ "${said%% *}" = ii ] && fits "$1" "${said##* }"
}
want=("${build_packages[@]}")
[ "${1:-build}" = test ] && want+=("${test_packages[@]}")
missing=()
for p in "${want[@]}"; do
    installed "$p" || missing+=("$p")
done
if [ "${#missing[@]}" -gt 0 ]; then
    echo "deps: installing Debian packages: ${missing[*]}"
    shown apt-get update -q || die "apt-get update failed; check the package sources"
    for p in "${missing[@]}"; do
        fits "$p" "$(apt-cache policy "$p" | sed -n 's/^  Candidate: \([0-9].*\)/\1/p')" ||
            die "$p is missing or too old in the package sources; add Debian's updates (bookworm-security, component main) to /etc/apt/sources.list"
    done
    DEBIAN_FRONTEND=noninteractive shown apt-get install -y -q --no-install-recommends "${missing[@]}" ||
        die "apt-get install failed for: ${missing[*]}"
fi

if ! bpf-linker --version 2>/dev/null | grep -q "$bpf_linker_version"; then
    echo "deps: building bpf-linker $bpf_linker_version (a few minutes, once)"
    LLVM_PREFIX=/usr/lib/llvm-22 cargo install bpf-linker --version "$bpf_linker_version" \
        --no-default-features --features llvm-22 --locked "${quiet[@]}" || die "bpf-linker did not build"
fi

[ "${1:-build}" = test ] || exit 0

# Test clients that Debian does not have are built once from their Go modules.
tools=${ORLOP_TOOLS:-/var/cache/orlop-tools}
mkdir -p "$tools"
# SELinux's policy as Debian's users have it, for a virtual machine: unpacked only, because this machine is not to get one.
if [ ! -e "$tools/selinux-policy" ]; then
    echo "deps: unpacking Debian's SELinux policy"
    work=$(mktemp -d "$tools/.selinux-policy.XXXXXX")
    (
        cd "$work"
        apt-get download -q selinux-policy-default selinux-policy-dev selinux-policy-src >/dev/null 2>log ||
            { tail -5 log >&2; exit 1; }
        for package in *.deb; do dpkg-deb -x "$package" root; done
        # Its postinst says which modules are off.
        dpkg-deb --ctrl-tarfile selinux-policy-default_*.deb | tar -xC root ./postinst
        mv root "$tools/selinux-policy"
    ) || { rm -rf "$work"; die "Debian's SELinux policy was not unpacked; apt-get update, then try again"; }
    rm -rf "$work"
fi
go_tool() { # name, package, module, version, ldflags
    [ -x "$tools/$1-$4" ] && { ln -sfn "$1-$4" "$tools/$1"; return; }
    command -v go >/dev/null || die "$1 is not on PATH and Go is missing to build it; apt-get install golang, or put $1 on PATH"
    echo "deps: building $1 $4"
    (
        work=$(mktemp -d)
        trap 'rm -rf "$work"' EXIT
        cd "$work"
        printf 'module orlop.invalid/tools\ngo 1.24.0\nrequire %s %s\n' "$3" "$4" >go.mod
        # A module that is built in one tree with those that it names.
        go mod download -json "$3@$4" >module.json 2>log || { tail -5 log >&2; exit 1; }
        sed -n 's/.*"GoMod": "\(.*\)".*/\1/p' module.json | xargs sed -n 's/^\t\(k8s\.io\/[a-z-]*\) => .*/\1/p' |
            while read -r staged; do echo "replace $staged => $staged v0.${4#v1.}" >>go.mod; done
        target=$2
        if [ "$1" = kubectl ]; then
            # The module has the command but no main package.
            target=.
            cat >main.go <<'GO'
package main

import (
	"os"

	"k8s.io/component-base/cli"
	"k8s.io/kubectl/pkg/cmd"
)

func main() { os.Exit(cli.Run(cmd.NewDefaultKubectlCommand())) }
GO
        else
            printf '//go:build tools\npackage tool\nimport _ "%s"\n' "$2" >tool.go
        fi
        build=(go build)
        # A suite is a test binary.
        [ "$1" = critest ] && build=(go test -c)
        go mod tidy >log 2>&1 && CGO_ENABLED=0 "${build[@]}" -ldflags "-s -w $5" -o "$tools/$1-$4" "$target" >>log 2>&1 ||
            { tail -5 log >&2; exit 1; }
    ) || die "$1 did not build from $3 $4"
    ln -sfn "$1-$4" "$tools/$1"
}
go_tool crictl sigs.k8s.io/cri-tools/cmd/crictl sigs.k8s.io/cri-tools v1.36.0 "-X sigs.k8s.io/cri-tools/pkg/version.Version=1.36.0"
go_tool critest sigs.k8s.io/cri-tools/cmd/critest sigs.k8s.io/cri-tools v1.36.0 ""
go_tool ginkgo github.com/onsi/ginkgo/v2/ginkgo github.com/onsi/ginkgo/v2 v2.28.1 ""
go_tool portmap github.com/containernetworking/plugins/plugins/meta/portmap github.com/containernetworking/plugins v1.9.1 ""
# One after the other, because they share most of their packages. etcd's version is the one that Kubernetes names.
for program in kubelet kube-proxy kube-apiserver; do
    go_tool $program k8s.io/kubernetes/cmd/$program k8s.io/kubernetes v1.36.3 "-X k8s.io/component-base/version.gitVersion=v1.36.3 -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36"
done
go_tool etcd go.etcd.io/etcd/server/v3 go.etcd.io/etcd/server/v3 v3.6.8 ""
if ! command -v kubectl >/dev/null; then
    go_tool kubectl kubectl k8s.io/kubectl v0.36.3 ""
fi

# The plugin of the CRI server's tests is ours, its library upstream's.
nri_version=v0.12.5
source=$PWD/cri-shim/server/tests/nri-plugin/main.go
plugin=nri-test-plugin-$nri_version-$(sha256sum "$source" | cut -c 1-12)
if [ ! -x "$tools/$plugin" ]; then
    command -v go >/dev/null || die "Go is missing to build the tests' NRI plugin; apt-get install golang"
    echo "deps: building the tests' NRI plugin"
    (
        work=$(mktemp -d)
        trap 'rm -rf "$work"' EXIT
        cd "$work"
        cp "$source" .
        printf 'module orlop.invalid/tools\ngo 1.24.0\nrequire github.com/containerd/nri %s\n' "$nri_version" >go.mod
        go mod tidy >log 2>&1 && CGO_ENABLED=0 go build -ldflags "-s -w" -o "$tools/$plugin" . >>log 2>&1 ||
            { tail -5 log >&2; exit 1; }
    ) || die "the tests' NRI plugin did not build with github.com/containerd/nri $nri_version"
fi
ln -sfn "$plugin" "$tools/nri-test-plugin"
