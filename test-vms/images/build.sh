#!/usr/bin/env bash
# Builds the images that upstream's conformance tests use, under the names and tags that the tests ask for, as OCI archives:
#   build.sh OUT [ORLOP]
# No image registry is needed: user land comes from Debian packages, upstream's own test program from its Go module. The archives
# go into a store with `orlop image import`, so nothing is pulled during the tests (their pull policy is IfNotPresent).
set -euo pipefail
out=$(realpath -m "$1")
orlop=$(realpath "${2:-$(dirname "$0")/../../target/release/orlop}")
kubernetes=v1.36.3
registry=registry.k8s.io/e2e-test-images
base_packages=(base-files bash coreutils dash grep sed gawk findutils hostname libc-bin procps util-linux tar gzip
    bind9-dnsutils ca-certificates curl iperf iproute2 iputils-ping netcat-openbsd perl-base)

die() { echo "conformance images: $*" >&2; exit 1; }
[ "$(id -u)" -eq 0 ] || die "not root; files in the images must belong to root"
for p in go apt-get dpkg-deb busybox; do
    command -v "$p" >/dev/null || die "$p is missing; apt-get install golang apt dpkg busybox-static"
done
[ -x "$orlop" ] || die "$orlop is missing; run make build, or name the program as the second argument"
mkdir -p "$out/debs/partial" "$out/go"
work=$(mktemp -d "$out/work.XXXXXX")
trap 'rm -rf "$work"' EXIT

# Unpacks packages and all that they depend on, as on a machine where nothing is installed.
unpack() { # rootfs, packages...
    local rootfs=$1; shift
    : >"$work/status"
    mkdir -p "$work/none/partial"
    local apt=(apt-get -q -y --no-install-recommends -o "Dir::State::status=$work/status" -o Debug::NoLocking=1)
    "${apt[@]}" -o "Dir::Cache::archives=$out/debs/" --download-only install "$@" >"$work/apt.log" 2>&1 ||
        { tail -3 "$work/apt.log" >&2; die "packages could not be fetched; run apt-get update"; }
    "${apt[@]}" -o "Dir::Cache::archives=$work/none/" --print-uris install "$@" |
        sed -n "s/^'[^']*' \([^ ]*\.deb\) .*/\1/p" | while read -r deb; do
        dpkg-deb -x "$out/debs/$deb" "$rootfs"
    done
}

accounts() { # rootfs
    cat >"$1/etc/passwd" <<'P'
root:x:0:0:root:/root:/bin/sh
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
user-defined-in-image:x:1000:1000::/home/user-defined-in-image:/bin/sh
P
    cat >"$1/etc/group" <<'G'
root:x:0:
www-data:x:33:
nogroup:x:65534:
user-defined-in-image:x:1000:
group-defined-in-image:x:50000:user-defined-in-image
G
    printf 'hosts: files dns\n' >"$1/etc/nsswitch.conf"
    mkdir -p "$1"/{proc,sys,dev,tmp,run,root,home/user-defined-in-image} && chmod 1777 "$1/tmp"
}

build() { # rootfs, name:tag, options of orlop image build...
    local rootfs=$1 tag=$2; shift 2
    local file=${tag##*/}
    "$orlop" image build "$rootfs" --output "$out/${file//:/-}.tar" --tag "$tag" "$@" >/dev/null
    echo "$tag"
}

# Upstream's test programs, without cgo.
if [ ! -x "$out/go/agnhost" ] || [ ! -x "$out/go/nnp" ]; then
    (
        cd "$out/go"
        printf 'module orlop.invalid/images\ngo 1.26.0\nrequire k8s.io/kubernetes %s\n' "$kubernetes" >go.mod
        mod=$(go mod download -json "k8s.io/kubernetes@$kubernetes" | sed -n 's/.*"GoMod": "\(.*\)".*/\1/p')
        sed -n 's/^\t\(k8s\.io\/[a-z-]*\) => .*/\1/p' "$mod" | while read -r m; do
            echo "replace $m => $m v0.${kubernetes#v1.}" >>go.mod
        done
        printf '//go:build tools\npackage images\nimport _ "k8s.io/kubernetes/test/images/agnhost"\n' >images.go
        export CGO_ENABLED=0
        go mod tidy >log 2>&1 &&
            go build -ldflags "-s -w -X main.Version=2.63.0" -o agnhost k8s.io/kubernetes/test/images/agnhost >>log 2>&1 &&
            go build -ldflags "-s -w" -o nnp k8s.io/kubernetes/test/images/nonewprivs >>log 2>&1
    ) || die "agnhost did not build; see $out/go/log (Go modules come from the proxy that \$GOPROXY names)"
fi
source=$(cd "$out/go" && go list -m -f '{{.Dir}}' k8s.io/kubernetes)

base=$work/base
mkdir "$base"
unpack "$base" "${base_packages[@]}"
accounts "$base"
ln -sf dash "$base/bin/sh"
ln -sf nc.openbsd "$base/bin/nc"
ln -sf gawk "$base/usr/bin/awk"
rm -rf "$base"/usr/share/{doc,man,locale,info,lintian,perl5/Debconf} "$base"/usr/lib/x86_64-linux-gnu/gconv
build "$base" "$registry/glibc-dns-testing:2.0.0" --cmd /bin/sh
build "$base" "$registry/perl:5.26" --cmd perl
build "$base" "$registry/ipc-utils:1.4" --cmd /bin/sh

agnhost=$work/agnhost
cp -al "$base" "$agnhost"
install -m 0755 "$out/go/agnhost" "$agnhost/agnhost"
ln -s agnhost "$agnhost/agnhost-2"
install -m 0644 "$source"/test/images/agnhost/porter/localhost.{crt,key} "$agnhost/"
mkdir -p "$agnhost/uploads"
build "$agnhost" "$registry/agnhost:2.63.0" --entrypoint /agnhost --cmd pause
build "$agnhost" "$registry/agnhost:2.55" --entrypoint /agnhost --cmd pause

nnp=$work/nnp
mkdir -p "$nnp/usr/local/bin" "$nnp/etc"
accounts "$nnp"
install -m 4755 "$out/go/nnp" "$nnp/usr/local/bin/nnp"
build "$nnp" "$registry/nonewprivs:1.4" --cmd /usr/local/bin/nnp

pause=$work/pause
mkdir "$pause"
install -m 0755 "$out/go/agnhost" "$pause/pause"
build "$pause" registry.k8s.io/pause:3.10.2 --entrypoint /pause --cmd pause

bb=$work/busybox
mkdir -p "$bb/bin" "$bb/etc"
accounts "$bb"
install -m 0755 "$(command -v busybox)" "$bb/bin/busybox"
for a in $(busybox --list); do [ "$a" = busybox ] || ln "$bb/bin/busybox" "$bb/bin/$a"; done
# Debian's busybox ash drops variables like data-1 from the environment, which the tests set; newer ones do not.
unpack "$work/sh" bash-static
install -m 0755 "$work/sh/bin/bash-static" "$work/sh/sh" && mv "$work/sh/sh" "$bb/bin/sh"
mkdir -p "$bb/usr" "$bb/var/spool/mail" && ln -s ../bin "$bb/usr/bin"
build "$bb" "$registry/busybox:1.37.0-1" --cmd sh
build "$bb" "$registry/nonroot:1.5" --user 1234 --cmd sh

nginx=$work/nginx
mkdir "$nginx"
unpack "$nginx" "${base_packages[@]}" nginx-light
accounts "$nginx"
ln -sf dash "$nginx/bin/sh"
mkdir -p "$nginx"/var/{log,lib}/nginx "$nginx/usr/share/nginx/html"
cat >"$nginx/etc/nginx/nginx.conf" <<'N'
worker_processes 1;
pid /run/nginx.pid;
error_log /dev/stderr notice;
events { worker_connections 1024; }
http {
    include mime.types;
    access_log /dev/stdout;
    server { listen 80; root /usr/share/nginx/html; index index.html; }
}
N
rm -rf "$nginx"/usr/share/{doc,man,locale,info} "$nginx"/usr/lib/x86_64-linux-gnu/gconv
for v in 1.15-4 1.27-0; do
    build "$nginx" "$registry/nginx:$v" --entrypoint nginx --cmd=-g --cmd="daemon off;"
done
