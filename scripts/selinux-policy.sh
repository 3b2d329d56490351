#!/usr/bin/env bash
# Compiles Debian's SELinux policy for a virtual machine: `selinux-policy.sh FOLDER` makes FOLDER/{plain,containers}, each with `policy` in the
# kernel's form and `file_contexts`. The first is what the package installs. The second has two modules more, as an administrator
# adds them: `container`, whose source Debian ships without installing it, and ours of deploy/selinux.
set -euo pipefail
[ $# -eq 1 ] || { echo "selinux-policy: which folder?" >&2; exit 1; }
repository=$(cd "$(dirname "$0")/.." && pwd)
unpacked=${ORLOP_TOOLS:-/var/cache/orlop-tools}/selinux-policy
[ -d "$unpacked" ] || { echo "selinux-policy: $unpacked is missing; run scripts/deps.sh test" >&2; exit 1; }
mkdir -p "$1"/{cil,build,plain,containers}
cd "$1"
modules=$unpacked/usr/share/selinux/default
to_cil=/usr/libexec/selinux/hll/pp

# What the package installs switched off.
off=" $(sed -n 's/^notdefault="\(.*\)"$/\1/p' "$unpacked/postinst") "
for module in base $(tr '\n' ' ' <"$modules/.modules"); do
    [[ $off = *" $module "* ]] || bzcat "$modules/$module.pp.bz2" | "$to_cil" >"cil/$module.cil"
done
# The version of Linux 5.15 to 6.6.
compile() { secilc --policyvers=33 --output="$1/policy" --filecontext="$1/file_contexts" cil/*.cil; }
compile plain

tar -xf "$unpacked"/usr/src/selinux-policy-src.tar.* --strip-components=4 -C build --wildcards '*/policy/modules/services/container.[tf][ec]'
cp "$repository"/deploy/selinux/orlop.{te,fc} build/
headers=$unpacked/usr/share/selinux/devel/include
make -s -C build -f "$headers/Makefile" NAME=default SHAREDIR="$unpacked/usr/share/selinux" HEADERDIR="$headers" AWK=awk container.pp orlop.pp >build/log ||
    { tail -5 build/log >&2; exit 1; }
for module in container orlop; do "$to_cil" <"build/$module.pp" >"cil/$module.cil"; done
compile containers
