//! Proportional set size of `orlop up` and of its pods' monitors, on a cluster of its own.

use std::time::Duration;

use orlop_test_vms::{Cluster, root};

use super::table::{Goal, Table, Unit};
use super::{Options, Result, process, text};

pub fn run(_: &Options) -> Result<Vec<Table>> {
    let mut cluster = Cluster::start(91);
    // What the start itself needed settles first.
    std::thread::sleep(Duration::from_secs(10));
    let daemon = cluster.pid();
    let mut table = Table::new("memory of a cluster (PSS)", None);
    table.row("orlop up, no pods", Unit::MiB, process::pss(daemon), None, None);
    let demo = std::fs::read_to_string(root().join("deploy/demo/demo.yaml")).map_err(text)?;
    cluster.apply(&demo.replace("10.96.0.80", &cluster.service_ip(80)).replace("30080", "30191"));
    cluster.kubectl(&["-n", "demo", "rollout", "status", "deployment/web", "--timeout=60s"]);
    std::thread::sleep(Duration::from_secs(5));
    let monitors = process::find("orlop-monitor", &cluster.path("run"));
    let (each, count) = process::mean_pss(&monitors);
    let all = process::pss(daemon) + each * count as f64;
    cluster.take_down();
    if count == 0 {
        return Err("the demo's pods have no monitor".into());
    }
    table.row(
        format!("all of it with the demo ({count} pods)"),
        Unit::MiB,
        all,
        None,
        Some(Goal::Figure(150.0)),
    );
    table.row("one monitor", Unit::MiB, each, None, Some(Goal::Figure(1.0)));
    Ok(vec![table])
}
