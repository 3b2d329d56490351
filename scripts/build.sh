#!/usr/bin/env bash
# Builds the three programs into target/release. The companions are linked statically: they start often, or live in every pod.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
# The other scripts look for the programs here.
export CARGO_TARGET_DIR=$PWD/target
host=$(rustc -vV | sed -n 's/^host: //p')

echo "build: orlop (the first time takes many minutes)"
cargo build --release -p orlop
echo "build: orlop-monitor and orlop-cni"
RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static" \
    cargo build --release --target "$host" -p orlop-monitor -p orlop-cni
for program in orlop-monitor orlop-cni; do
    install -m 0755 "target/$host/release/$program" "target/release/.$program.new"
    mv -f "target/release/.$program.new" "target/release/$program"
done
