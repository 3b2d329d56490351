# The limits of limits_begin.sh's container in the groups of version 1.
# shellcheck shell=sh disable=SC2154
# Of a controller: its folder for the container.
of() { echo "/sys/fs/cgroup/$1$(sed -n "s/^[0-9]*:\([a-z_]*,\)*$1\(,[a-z_]*\)*://p" "/proc/$pid/cgroup")"; }
for controller in cpu cpuacct cpuset memory pids hugetlb blkio devices freezer; do
    case $(of $controller) in
        "/sys/fs/cgroup/$controller/orlop-vm/limits/"*) echo "in:$controller=yes" ;;
        *) echo "in:$controller=$(of $controller)" ;;
    esac
done
say() {
    echo "$1=$(cat "$(of cpu)/cpu.shares") $(cat "$(of cpu)/cpu.cfs_quota_us") $(cat "$(of cpu)/cpu.cfs_period_us") \
$(cat "$(of cpuset)/cpuset.cpus") $(cat "$(of memory)/memory.limit_in_bytes") $(cat "$(of memory)/memory.memsw.limit_in_bytes")"
}
for f in hugetlb.2MB.limit_in_bytes hugetlb.2MB.rsvd.limit_in_bytes hugetlb.1GB.limit_in_bytes; do
    echo "$f=$(cat "$(of hugetlb)/$f")"
done
