#!/usr/bin/env bash
# Builds the monitor of an earlier release into target/previous/orlop-monitor, for the test that a server adopts its pods.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"

# The last commit whose monitor speaks protocol version 1 only.
commit=751261f65c381925018bc3a0de39eee92b6d0231
place=target/previous
[ "$(cat $place/commit 2>/dev/null)" = $commit ] && [ -x $place/orlop-monitor ] && exit 0

here() { git cat-file -e "$commit^{commit}" 2>/dev/null; }
here || git fetch --quiet --unshallow || true
here || {
    echo "previous-monitor: $commit is not here; fetch the whole history" >&2
    exit 1
}
rm -rf $place
mkdir -p $place/source
git archive $commit | tar -x -C $place/source
# With this tree's compiled dependencies, as far as they are the same, so with its profile; the program is taken out at once, since today's
# has the same name.
target=$PWD/target
profile=$(sed -n '/^\[profile\.dev\]/,/^\[profile\.release\]/{/^\[profile\.release\]/!p}' Cargo.toml)
sed -i '/^\[profile\.dev\]/,/^\[profile\.release\]/{/^\[profile\.release\]/!d}' $place/source/Cargo.toml
echo "$profile" >>$place/source/Cargo.toml
(cd $place/source && CARGO_TARGET_DIR=$target cargo build --quiet --locked --workspace --bin orlop-monitor)
mv -f target/debug/orlop-monitor $place/orlop-monitor
echo $commit >$place/commit
rm -rf $place/source
