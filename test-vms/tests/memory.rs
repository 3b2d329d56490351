//! A daemon that rests gives back the memory that only working needed.

use std::time::Duration;

use orlop_test_vms::{Cluster, wait_for};

/// Pages of files that the process has mapped, mostly its own code, in KiB.
fn code_of(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("RssFile:")).unwrap();
    line.trim_end_matches("kB").trim().parse().unwrap()
}

#[test]
fn code_that_only_starting_needed_does_not_stay() {
    let c = Cluster::start(48);
    let started = code_of(c.pid());
    wait_for("less of the program's code is mapped", Duration::from_secs(60), || {
        (code_of(c.pid()) * 4 < started * 3).then_some(())
    });
    // It works on with what comes back from the file.
    c.kubectl(&["get", "nodes"]);
}
