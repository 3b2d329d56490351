#!/usr/bin/env bash
# The whole gate: format, lints, unit, integration and end-to-end tests. Fails when a needed part is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

[ "$(id -u)" -eq 0 ] || { echo "test: not root; the tests make namespaces, mounts and BPF programs" >&2; exit 1; }
start=$SECONDS
step() { echo "== $* ($((SECONDS - start)) s)"; }

step "what the tests need"
scripts/deps.sh test
PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
export PATH="$PATH:${ORLOP_TOOLS:-/var/cache/orlop-tools}"

step "format"
cargo fmt --all --check
step "lints"
shellcheck scripts/*.sh test-vms/guest/*.sh test-vms/guest/*/*.sh
cargo clippy --workspace --all-targets --quiet -- -D warnings
step "release programs"
scripts/build.sh
scripts/demo-image.sh target/demo/demo-web.tar
step "the monitor of an earlier release"
scripts/previous-monitor.sh
step "the tests' programs"
cargo test --workspace --quiet --no-run
step "unit and integration tests"
export ORLOP_MONITOR=$PWD/target/release/orlop-monitor ORLOP_CNI=$PWD/target/release/orlop-cni
scripts/isolated.sh cargo test --offline --workspace --exclude orlop-test-vms --quiet --no-fail-fast
step "end-to-end tests"
# Selected from the whole workspace, so that nothing is built again with other features.
whole=()
for file in test-vms/tests/*.rs; do whole+=(--test "$(basename "$file" .rs)"); done
scripts/isolated.sh cargo test --offline --workspace "${whole[@]}" --no-fail-fast -- --test-threads=1
step "done"
