# The end after limits_begin.sh.
# shellcheck shell=sh disable=SC2154
crictl stopp "$pod" >/dev/null || failed "no stopp"
crictl rmp "$pod" >/dev/null || failed "no rmp"
# The pod's own group is the caller's.
echo "left=$(find /sys/fs/cgroup/ -type d -path '*/orlop-vm/limits/*' | tr '\n' ' ')"
umount /run/huge
echo "free=$(cat /sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages)"
