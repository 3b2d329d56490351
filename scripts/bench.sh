#!/usr/bin/env bash
# Latency and memory, beside what Orlop replaces where that is installed: `bench.sh [SECTION…] [--pods N …]`; no section means all.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" -eq 0 ] || { echo "bench: not root; run make as root" >&2; exit 1; }
sections=()
while [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; do
    sections+=(--only "$1")
    shift
done
scripts/demo-image.sh target/demo/demo-web.tar
cargo run --quiet --release -p xtask -- bench "${sections[@]}" "$@"
