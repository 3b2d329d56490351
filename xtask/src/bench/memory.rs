//! Proportional set size of `orlop up` and of its pods' monitors, on a cluster of its own.

use std::time::Duration;

use orlop_test_vms::{Cluster, root};

use super::table::{Goal, Table, Unit};
use super::{Options, Result, process, text};

pub fn run(options: &Options) -> Result<Vec<Table>> {
    let settle = || std::thread::sleep(Duration::from_secs(options.settle));
    let mut cluster = Cluster::start(91);
    settle();
    let daemon = cluster.pid();
    let idle = process::pss(daemon);
    let demo = std::fs::read_to_string(root().join("deploy/demo/demo.yaml")).map_err(text)?;
    cluster.apply(&demo.replace("10.96.0.80", &cluster.service_ip(80)).replace("30080", "30191"));
    cluster.kubectl(&["-n", "demo", "rollout", "status", "deployment/web", "--timeout=60s"]);
    settle();
    let monitors = process::find("orlop-monitor", &cluster.path("run"));
    let (each, count) = process::mean_pss(&monitors);
    let busy = process::pss(daemon);
    cluster.take_down();
    if count == 0 {
        return Err("the demo's pods have no monitor".into());
    }
    let (pods, all) = (count as f64, busy + each * count as f64);
    let mut table = Table::new("memory of a cluster (PSS)", None);
    let mut row = |what: &str, figure: f64, goal: Option<f64>| {
        table.row(what, Unit::MiB, figure, None, goal.map(Goal::Figure));
    };
    row("orlop up, no pods", idle, None);
    row(&format!("orlop up, with the demo ({count} pods)"), busy, None);
    row("one monitor", each, Some(1.0));
    row("one pod: its monitor and its part of orlop up", (all - idle) / pods, None);
    row("all of it with the demo", all, Some(150.0));
    Ok(vec![table])
}
