# Where limits_begin.sh's container is in the groups of version 1, and what is counted there.
# shellcheck shell=sh disable=SC2154
echo "container=$container"
echo "exec_in=$(crictl exec --sync "$container" cat /proc/self/cgroup | sed -n 's/^[0-9]*:[^:]*:\(\/.\)/\1/p' | sort -u | tr '\n' ' ')"

# What is counted lies between two looks at the kernel's own figures; memory of a container that sleeps stays.
usage() { cat "$(of cpuacct)/cpuacct.usage"; }
for _ in $(seq 300); do
    grep -q 'records out' /var/log/pods/limits/limits.log && break
    sleep 0.1
done
echo "cpu_before=$(usage)"
crictl stats -o json "$container" >/run/stats
crictl metricsp -o json >/run/metrics || failed "no metrics"
echo "cpu_after=$(usage)"
echo "memory=$(cat "$(of memory)/memory.usage_in_bytes")"
stat() { echo "stats:$1=$(jq -r ".stats[0].$2.value" /run/stats)"; }
stat cpu cpu.usageCoreNanoSeconds
stat usage memory.usageBytes
stat working_set memory.workingSetBytes
for name in cpu_usage_seconds_total memory_usage_bytes memory_cache processes spec_memory_limit_bytes spec_cpu_shares spec_cpu_period \
    oom_events_total; do
    value=$(jq -r "[.. | objects | select(.name? == \"container_$name\" and (.labelValues | index(\"limits\"))) | .value.value] | last" /run/metrics)
    echo "metrics:$name=$value"
done
echo "cache=$(sed -n 's/^total_cache //p' "$(of memory)/memory.stat")"
echo "processes=$(wc -l <"$(of pids)/cgroup.procs")"
