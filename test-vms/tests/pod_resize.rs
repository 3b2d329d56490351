//! A running pod gets another size without a restart, or with one where its policy says so; one that does not fit waits.

use std::time::Duration;

use orlop_test_vms::{Cluster, wait_for};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);

fn pod(c: &Cluster, name: &str) -> Value {
    serde_json::from_str(&c.kubectl(&["get", "pod", name, "-o", "json"])).expect("a pod as JSON")
}

fn condition<'a>(p: &'a Value, kind: &str) -> Option<&'a Value> {
    p["status"]["conditions"].as_array()?.iter().find(|c| c["type"] == kind)
}

fn resize(c: &Cluster, name: &str, resources: &Value) {
    let patch = json!({"spec": {"containers": [{"name": "c", "resources": resources}]}}).to_string();
    c.kubectl(&["patch", "pod", name, "--subresource", "resize", "-p", &patch]);
}

/// Waits until all of what was asked for is in force; gives the container's status.
fn settled(c: &Cluster, name: &str, resources: &Value) -> Value {
    wait_for("the new size in the status", LIMIT, || {
        let p = pod(c, name);
        let s = p["status"]["containerStatuses"][0].clone();
        let over = ["PodResizePending", "PodResizeInProgress"].iter().all(|k| condition(&p, k).is_none());
        (over && s["resources"] == *resources && s["ready"] == true).then_some(s)
    })
}

/// What a cgroup's file says, on whichever version this machine has: of the container, seen from within, or of the pod.
fn memory_limit(c: &Cluster, uid: &str, container: Option<&str>) -> String {
    let root = std::path::Path::new("/sys/fs/cgroup");
    let v2 = root.join("cgroup.controllers").exists();
    let (tree, file) =
        if v2 { (root.to_owned(), "memory.max") } else { (root.join("memory"), "memory.limit_in_bytes") };
    let pod = tree.join(format!("{}/kubepods/burstable/pod{uid}", &c.cgroup()[1..]));
    let dir = container.map_or(pod.clone(), |id| pod.join(id));
    std::fs::read_to_string(dir.join(file)).expect("the cgroup's limit").trim().to_owned()
}

fn size(cpu: &str, memory: &str) -> Value {
    json!({"requests": {"cpu": cpu, "memory": "16Mi"}, "limits": {"cpu": "500m", "memory": memory}})
}

#[test]
fn running_pods_are_resized() {
    let mut c = Cluster::start(45);
    for (name, policy) in [("in-place", "NotRequired"), ("restarted", "RestartContainer")] {
        let manifest = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
            "spec": {"terminationGracePeriodSeconds": 1, "containers": [{
                "name": "c", "image": "orlop.local/demo-web:latest", "imagePullPolicy": "Never",
                "resources": size("10m", "32Mi"),
                "resizePolicy": [{"resourceName": "memory", "restartPolicy": policy}],
            }]},
        });
        c.apply(&manifest.to_string());
    }
    c.kubectl(&["wait", "--for=condition=Ready", "pod/in-place", "pod/restarted", "--timeout=60s"]);
    let before = settled(&c, "in-place", &size("10m", "32Mi"));
    let uid = pod(&c, "in-place")["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
    assert_eq!(memory_limit(&c, &uid, None), (32 << 20).to_string());

    for limit in [64u64, 48] {
        let wanted = size("20m", &format!("{limit}Mi"));
        resize(&c, "in-place", &wanted);
        let after = settled(&c, "in-place", &wanted);
        assert_eq!(after["containerID"], before["containerID"], "the same container runs");
        assert_eq!(after["restartCount"], 0);
        assert_eq!(after["allocatedResources"]["cpu"], "20m");
        let id = after["containerID"].as_str().and_then(|i| i.rsplit('/').next()).unwrap_or_default();
        assert_eq!(memory_limit(&c, &uid, None), (limit << 20).to_string());
        assert_eq!(memory_limit(&c, &uid, Some(id)), (limit << 20).to_string());
    }

    resize(&c, "restarted", &size("10m", "64Mi"));
    assert_eq!(settled(&c, "restarted", &size("10m", "64Mi"))["restartCount"], 1);

    // No node has so many CPUs; what runs stays as it is.
    let too_much =
        json!({"requests": {"cpu": "5000", "memory": "16Mi"}, "limits": {"cpu": "5000", "memory": "48Mi"}});
    resize(&c, "in-place", &too_much);
    wait_for("the resize to be refused", LIMIT, || {
        let p = pod(&c, "in-place");
        condition(&p, "PodResizePending").filter(|c| c["reason"] == "Infeasible").cloned()
    });
    let still = &pod(&c, "in-place")["status"]["containerStatuses"][0];
    assert_eq!(still["resources"]["requests"]["cpu"], "20m");

    // The granted size outlives the agent.
    c.kill();
    c.up();
    c.wait_ready();
    wait_for("the refusal after a restart", LIMIT, || {
        let p = pod(&c, "in-place");
        condition(&p, "PodResizePending").filter(|c| c["reason"] == "Infeasible").cloned()
    });
    assert_eq!(pod(&c, "in-place")["status"]["containerStatuses"][0]["resources"]["requests"]["cpu"], "20m");
    resize(&c, "in-place", &size("20m", "48Mi"));
    assert_eq!(settled(&c, "in-place", &size("20m", "48Mi"))["containerID"], before["containerID"]);
    c.take_down();
}
