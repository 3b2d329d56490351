# What limits_begin.sh began goes on: limits change while the container runs. `say` prints those that the kernel holds.
# shellcheck shell=sh disable=SC2154
change() {
    name=$1
    shift
    crictl update "$@" "$container" >/dev/null || failed "no update: $name"
    say "$name"
}
say created
change all --cpu-share 256 --cpu-period 50000 --cpu-quota 20000 --cpuset-cpus 0 --cpuset-mems 0 --memory 50331648
change share --cpu-share 1024
change quota --cpu-quota 40000
change period --cpu-period 200000
change cpus --cpuset-cpus 0-1
change less --memory 25165824
change none --cpu-quota=-1
# `huge` maps as many pages as it has words and ends with the error number.
# shellcheck disable=SC2016
crictl exec --sync "$container" sh -c '
    huge; echo "1_page=$?"
    huge second; echo "2_pages=$?"
    huge second third; echo "3_pages=$?"
    fallocate -l 4M /huge/file && echo "file=allocated"
    fallocate -l 6M /huge/larger 2>/dev/null || echo "larger=refused"' || failed "no exec"
rm /run/huge/*
