# Loads the policy, before the CRI server starts, and enforces it.
# shellcheck shell=sh
set -eu
mount -t selinuxfs selinuxfs /sys/fs/selinux
# The kernel takes a policy in one write only.
dd if=/vm/policy of=/sys/fs/selinux/load bs=1M 2>/dev/null
echo 1 >/sys/fs/selinux/enforce
mkdir -p /etc/selinux/vm/contexts
echo 'SELINUXTYPE=vm' >/etc/selinux/config
cat >/etc/selinux/vm/contexts/lxc_contexts <<'TXT'
process = "system_u:system_r:container_t:s0"
file = "system_u:object_r:container_file_t:s0"
ro_file = "system_u:object_r:container_ro_file_t:s0"
TXT
echo "own=$(tr -d '\0' </proc/self/attr/current)"
