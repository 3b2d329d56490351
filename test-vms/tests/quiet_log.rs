//! On the good path nothing is logged as a warning or an error, so that a line of these means something.

use std::time::Duration;

use orlop_test_vms::{Cluster, root, wait_for};

/// What a machine lacks is said once at start, and is no news here.
const OF_THE_MACHINE: &[&str] = &["no CAP_SYS_RESOURCE"];

#[test]
fn a_healthy_cluster_logs_no_warning() {
    let c = Cluster::start(41);
    let demo = std::fs::read_to_string(root().join("deploy/demo/demo.yaml")).unwrap();
    c.apply(&demo.replace("10.96.0.80", &c.service_ip(80)).replace("30080", "31041"));
    let done = ["-n", "demo", "rollout", "status", "deployment/web", "--timeout=60s"];
    c.kubectl(&done);
    for step in [
        &["scale", "deployment/web", "--replicas=5"][..],
        &["rollout", "restart", "deployment/web"],
        &["scale", "deployment/web", "--replicas=1"],
        &["delete", "pods", "-l", "app=web", "--wait=false"],
    ] {
        c.kubectl(&[&["-n", "demo"], step].concat());
        c.kubectl(&done);
    }
    c.kubectl(&["-n", "demo", "delete", "deployment", "web", "--cascade=foreground"]);
    c.apply(&demo.replace("10.96.0.80", &c.service_ip(80)).replace("30080", "31041"));
    c.kubectl(&done);
    c.kubectl(&["drain", "node41", "--ignore-daemonsets"]);
    c.kubectl(&["uncordon", "node41"]);
    c.kubectl(&done);
    c.kubectl(&["delete", "namespace", "demo"]);
    wait_for("all sandboxes are gone", Duration::from_secs(30), || {
        c.crictl(&["pods", "-q"]).is_empty().then_some(())
    });
    let log = std::fs::read_to_string(c.log()).unwrap();
    let loud = |l: &&str| {
        (l.contains(" WARN ") || l.contains("ERROR")) && !OF_THE_MACHINE.iter().any(|known| l.contains(known))
    };
    let lines: Vec<&str> = log.lines().filter(loud).collect();
    assert!(lines.is_empty(), "{}", lines.join("\n"));
}
