# A whole cluster: the limits of a pod as a whole, its huge pages as a volume, and its end.
# shellcheck shell=sh
kill "$(cat /run/cri.pid)" 2>/dev/null
while kill -0 "$(cat /run/cri.pid)" 2>/dev/null; do sleep 0.1; done
set -eu
failed() { echo "up: $*"; tail -n 60 /var/log/orlop.log; exit 1; }
rm -f /etc/cni/net.d/*
printf 'podPidsLimit: 77\n' >/vm/kubelet.yaml
mkdir -p /var/lib/orlop/server/manifests
cat >/var/lib/orlop/server/manifests/huge.yaml <<'YAML'
apiVersion: v1
kind: Pod
metadata: {name: huge, namespace: default}
spec:
  securityContext: {fsGroup: 1234}
  containers:
  - name: main
    image: localhost/busybox:test
    imagePullPolicy: Never
    command:
    - sh
    - -c
    - |
      fallocate -l 4M /pages/file && echo file=allocated
      fallocate -l 6M /pages/larger 2>/dev/null || echo larger=refused
      echo "mounted=$(cat /proc/mounts | while read -r _ at kind options _; do [ "$at" = /pages ] && echo "$kind $options"; done)"
      echo end=reached
      sleep 1000
    resources: {limits: {hugepages-2Mi: 4Mi, memory: 32Mi, cpu: 500m}}
    volumeMounts: [{name: pages, mountPath: /pages}]
  volumes: [{name: pages, emptyDir: {medium: HugePages}}]
YAML
orlop up --config /vm/kubelet.yaml --detach --wait 100 || failed "not up"
for _ in $(seq 300); do
    cat /var/log/pods/default_huge_*/main/0.log >/run/said 2>/dev/null && grep -q end=reached /run/said && break
    sleep 0.2
done
grep -q end=reached /run/said || failed "no end"
sed 's/^[^ ]* [^ ]* F //' /run/said
for limit in memory/memory.limit_in_bytes pids/pids.max cpu/cpu.shares cpu/cpu.cfs_quota_us hugetlb/hugetlb.2MB.limit_in_bytes; do
    # shellcheck disable=SC2086
    echo "pod:$limit=$(cat /sys/fs/cgroup/${limit%/*}/kubepods/pod*/${limit#*/})"
done
echo "volumes=$(grep -c hugetlbfs /proc/mounts)"
orlop down || failed "not down"
echo "volumes_left=$(grep -c hugetlbfs /proc/mounts)"
echo "groups_left=$(find /sys/fs/cgroup/ -type d -path '*kubepods*' | tr '\n' ' ')"
echo "free=$(cat /sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages)"
