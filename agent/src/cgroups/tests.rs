use std::fs;

use serde_json::json;

use super::*;

fn config(root: &str) -> Config {
    let mut config = Config::new("n", None);
    config.kubelet.cgroup_root = root.to_owned();
    config.kubelet.pod_pids_limit = 99;
    config
}

fn spec(resources: serde_json::Value) -> PodSpec {
    serde_json::from_value(json!({"containers": [{"name": "a", "resources": resources}]})).unwrap()
}

#[test]
fn parents_by_class_and_driver() {
    let mut config = config("/a/b-c");
    config.cgroup_mount = "/nonexistent".into();
    let burstable = spec(json!({"requests": {"cpu": "1"}}));
    let table = [
        (false, PodSpec::default(), "/a/b-c/kubepods/besteffort/podu-1"),
        (false, burstable.clone(), "/a/b-c/kubepods/burstable/podu-1"),
        (false, spec(json!({"limits": {"cpu": "1", "memory": "1"}})), "/a/b-c/kubepods/podu-1"),
        (true, burstable, "a-b_c-kubepods-burstable-podu_1.slice"),
    ];
    for (systemd, spec, wanted) in table {
        assert_eq!(Cgroups::detect(&config, systemd).parent(&spec, "u-1"), wanted);
    }
}

/// On this machine's own cgroups, of whichever version. Removed also when the test fails.
struct Tree(Config);

impl Drop for Tree {
    fn drop(&mut self) {
        Cgroups::purge(&self.0);
    }
}

impl Tree {
    fn read(&self, path: &str, v1: (&str, &str), v2: &str) -> String {
        let root = &self.0.cgroup_mount;
        let below = format!("{}/{path}", self.0.kubelet.cgroup_root);
        let file = match root.join("cgroup.controllers").exists() {
            true => root.join(below).join(v2),
            false => root.join(v1.0).join(below).join(v1.1),
        };
        fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display())).trim().to_owned()
    }

    fn shares(&self, path: &str) -> String {
        self.read(path, ("cpu", "cpu.shares"), "cpu.weight")
    }

    fn memory(&self, path: &str) -> String {
        self.read(path, ("memory", "memory.limit_in_bytes"), "memory.max")
    }
}

#[tokio::test]
async fn the_kernel_has_the_limits() {
    let tree = Tree(config(&orlop_base::testkit::unique_name("agent-cg")));
    let cgroups = Cgroups::detect(&tree.0, false);
    let v2 = tree.0.cgroup_mount.join("cgroup.controllers").exists();
    let weight = |shares: i64| if v2 { limits::weight(shares).to_string() } else { shares.to_string() };
    let period = Some(Duration::from_millis(100));

    let available = BTreeMap::from([
        ("cpu".to_owned(), orlop_api::quantity::Amount::from_units(2)),
        ("memory".to_owned(), orlop_api::quantity::Amount::from_units(512 << 20)),
    ]);
    cgroups.prepare(cgroups.node_limits(&available, Some(5000))).await.unwrap();
    assert_eq!(tree.memory("kubepods"), (512 << 20).to_string());
    assert_eq!(tree.shares("kubepods"), weight(2048));
    assert_eq!(tree.read("kubepods", ("pids", "pids.max"), "pids.max"), "5000");
    assert_eq!(tree.shares("kubepods/besteffort"), weight(2));

    let guaranteed = spec(json!({"limits": {"cpu": "500m", "memory": "64Mi"}}));
    cgroups.create(&guaranteed, "g-1", period).await.unwrap();
    assert_eq!(tree.memory("kubepods/podg-1"), (64 << 20).to_string());
    assert_eq!(tree.shares("kubepods/podg-1"), weight(512));
    assert_eq!(tree.read("kubepods/podg-1", ("pids", "pids.max"), "pids.max"), "99");
    let quota = tree.read("kubepods/podg-1", ("cpu", "cpu.cfs_quota_us"), "cpu.max");
    assert_eq!(quota.split(' ').next(), Some("50000"));
    // Again with more, as a resize does.
    let more = spec(json!({"limits": {"cpu": "1", "memory": "128Mi"}}));
    cgroups.create(&more, "g-1", period).await.unwrap();
    assert_eq!(tree.memory("kubepods/podg-1"), (128 << 20).to_string());

    // The class of burstable pods weighs what its pods ask for together.
    let burstable = spec(json!({"requests": {"cpu": "250m"}}));
    for uid in ["b-1", "b-2"] {
        cgroups.create(&burstable, uid, period).await.unwrap();
    }
    assert_eq!(tree.shares("kubepods/burstable"), weight(512));
    cgroups.create(&PodSpec::default(), "e-1", period).await.unwrap();
    assert_eq!(tree.shares("kubepods/besteffort/pode-1"), weight(2));
    assert_eq!(cgroups.pod_uids(), ["b-1", "b-2", "e-1", "g-1"]);

    cgroups.remove("b-1").await;
    assert_eq!(tree.shares("kubepods/burstable"), weight(256));
    cgroups.count_all([("b-9", &burstable), ("g-1", &more)].into_iter());
    assert_eq!(cgroups.0.burstable.lock().clone(), HashMap::from([("b-9".to_owned(), 250)]));
    assert_eq!(cgroups.pod_uids(), ["b-2", "e-1", "g-1"]);

    // Some runtimes put containers into the version 2 beside version 1 as well.
    let beside = tree.0.cgroup_mount.join("unified");
    if beside.join("cgroup.controllers").exists() {
        let pod = beside.join(format!("{}/kubepods/burstable/podb-3", tree.0.kubelet.cgroup_root));
        fs::create_dir_all(pod.join("container")).unwrap();
        assert!(cgroups.pod_uids().contains(&"b-3".to_owned()));
        cgroups.remove("b-3").await;
        assert!(!pod.exists());
    }
}

/// Nothing answers on the system bus of a machine without systemd: that is said, and no folder is left.
#[tokio::test]
async fn systemd_that_is_not_there() {
    if Path::new("/run/systemd/system").exists() {
        return;
    }
    let tree = Tree(config(&orlop_base::testkit::unique_name("agentsd")));
    let e = Cgroups::detect(&tree.0, true).prepare(Limits::default()).await.unwrap_err();
    let text = e.to_string();
    assert!(text.contains("-kubepods.slice") && text.contains("cgroupfs"), "{text}");
}
