#!/usr/bin/env bash
# Stops the cluster of `make up` and takes back all of it but the data folder. ORLOP_PROGRAMS names another folder of
# programs than target/release.
set -euo pipefail
cd "$(dirname "$0")/.."
programs=${ORLOP_PROGRAMS:-target/release}
data=/var/lib/orlop
run=/run/orlop

die() { echo "down: $*" >&2; exit 1; }
[ "$(id -u)" -eq 0 ] || die "not root; run make as root"
if [ ! -e $run ] && [ ! -e $data ]; then
    echo "down: nothing runs"
    exit 0
fi
if [ ! -x "$programs/orlop" ]; then
    [ ! -e $run ] || die "$run is there, but no $programs/orlop to stop it with; run make build"
    echo "down: nothing runs; $data is kept"
    exit 0
fi
said="stopped; $data is kept"
[ -e $run ] || said="nothing ran; looked for leftovers all the same"
"$programs/orlop" down --data-dir $data
echo "down: $said"
