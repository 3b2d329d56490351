#!/usr/bin/env bash
# Latency and memory of a cluster of its own, beside runc and crun where installed.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" -eq 0 ] || { echo "bench: not root; run make as root" >&2; exit 1; }
# crictl, where the tests have put it.
export PATH="$PATH:${ORLOP_TOOLS:-/var/cache/orlop-tools}"
scripts/demo-image.sh target/demo/demo-web.tar
cargo run --quiet --release -p xtask -- bench
if command -v containerd >/dev/null && command -v crictl >/dev/null; then
  cargo bench --quiet -p orlop-images --bench pull
else
  echo "bench: pulls are compared only where containerd and crictl are installed" >&2
fi
