#!/usr/bin/env bash
# Stops the cluster of `make up` and takes back all of it but the data folder.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" -eq 0 ] || { echo "down: not root; run make as root" >&2; exit 1; }
[ -x target/release/orlop ] || { echo "down: nothing was built here, so nothing runs"; exit 0; }
target/release/orlop down --data-dir /var/lib/orlop
echo "down: stopped; /var/lib/orlop is kept"
