#!/usr/bin/env bash
# Builds the demo's image archive: one static program and the folders that its pod mounts into. ORLOP_PROGRAMS names another
# folder of programs than target/release.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
export CARGO_TARGET_DIR=$PWD/target
out=$1
host=$(rustc -vV | sed -n 's/^host: //p')
RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static" \
    cargo build --quiet --release --target "$host" -p orlop-demo-web
rootfs=$(mktemp -d)
trap 'rm -rf "$rootfs"' EXIT
mkdir -p "$rootfs/etc/demo" "$rootfs/tmp" "$(dirname "$out")"
install -m 0755 "target/$host/release/orlop-demo-web" "$rootfs/web"
"${ORLOP_PROGRAMS:-target/release}/orlop" image build "$rootfs" --output "$out" --tag orlop.local/demo-web:latest --entrypoint /web >/dev/null
