# A whole cluster: what the agent asks of the CRI server for a pod with a level and volumes of its own.
# shellcheck shell=sh
kill "$(cat /run/cri.pid)" 2>/dev/null
while kill -0 "$(cat /run/cri.pid)" 2>/dev/null; do sleep 0.1; done
set -eu
rm -f /etc/cni/net.d/*
mkdir -p /var/lib/orlop/server/manifests /srv/nodes
echo text >/srv/nodes/file
cat >/var/lib/orlop/server/manifests/labelled.yaml <<'YAML'
apiVersion: v1
kind: ConfigMap
metadata: {name: config, namespace: default}
data: {key: value}
---
apiVersion: v1
kind: Pod
metadata: {name: labelled, namespace: default}
spec:
  securityContext: {seLinuxOptions: {level: "s0:c3,c4"}}
  containers:
  - name: main
    image: localhost/busybox:test
    imagePullPolicy: Never
    command:
    - sh
    - -c
    - |
      echo "label=$(cat /proc/self/attr/current)"
      echo x >/scratch/x && echo "scratch=$(cat /scratch/x)"
      echo "config=$(cat /config/key)"
      cat /var/run/secrets/kubernetes.io/serviceaccount/token >/dev/null && echo token=read
      cat /etc/hosts >/dev/null && echo hosts=read
      echo last >/dev/termination-log && echo termination=written
      echo "nodes=$(cat /nodes/file 2>&1)"
      echo end=reached
      sleep 1000
    volumeMounts:
    - {name: scratch, mountPath: /scratch}
    - {name: config, mountPath: /config}
    - {name: nodes, mountPath: /nodes}
  volumes:
  - {name: scratch, emptyDir: {}}
  - {name: config, configMap: {name: config}}
  - {name: nodes, hostPath: {path: /srv/nodes}}
YAML
orlop up --detach --wait 100 || { tail -n 60 /var/log/orlop.log; exit 1; }
for _ in $(seq 300); do
    cat /var/log/pods/default_labelled_*/main/0.log >/run/said 2>/dev/null && grep -q end=reached /run/said && break
    sleep 0.2
done
tr -d '\0' </run/said | sed 's/^[^ ]* [^ ]* F //'
grep -q end=reached /run/said || { tail -n 60 /var/log/orlop.log; dmesg | grep avc | tail -n 20; exit 1; }
orlop down || { tail -n 30 /var/log/orlop.log; exit 1; }
