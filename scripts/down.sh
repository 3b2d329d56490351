#!/usr/bin/env bash
# Stops the cluster of `make up` and takes back all of it but the data folder.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" -eq 0 ] || { echo "down: not root; run make as root" >&2; exit 1; }
if [ ! -x target/release/orlop ]; then
    [ ! -e /run/orlop ] || { echo "down: /run/orlop is there, but no target/release/orlop to stop it with; run make build" >&2; exit 1; }
    echo "down: nothing runs"
    exit 0
fi
said="stopped; /var/lib/orlop is kept"
[ -e /run/orlop ] || said="nothing ran; looked for leftovers all the same"
target/release/orlop down --data-dir /var/lib/orlop
echo "down: $said"
