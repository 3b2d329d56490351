# The limits of limits_begin.sh's container in its group of version 2.
# shellcheck shell=sh disable=SC2154
group=/sys/fs/cgroup$(sed -n 's/^0:://p' "/proc/$pid/cgroup")
say() {
    echo "$1=$(cat "$group/cpu.weight") $(cat "$group/cpu.max") $(cat "$group/cpuset.cpus") $(cat "$group/memory.max") $(cat "$group/memory.swap.max")"
}
for f in hugetlb.2MB.max hugetlb.2MB.rsvd.max hugetlb.1GB.max; do
    echo "$f=$(cat "$group/$f")"
done
