//! `make bench` in small: what it promises is printed, with figures that can be.

use std::process::Command;

/// The lines of a table whose row begins with `what`, as (our figure, the counterpart's or "-").
fn rows<'a>(printed: &'a str, what: &str) -> Vec<(f64, &'a str)> {
    let columns = |l: &'a str| l.split("  ").map(str::trim).filter(|c| !c.is_empty()).collect::<Vec<_>>();
    let found =
        printed.lines().map(columns).filter(|c| c.first().is_some_and(|first| first.starts_with(what)));
    let figure = |text: &str| text.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(f64::NAN);
    found.map(|c| (figure(c[1]), c[2])).collect()
}

fn is_installed(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok_and(|o| o.status.success())
}

#[test]
fn every_section_prints_figures() {
    let sizes = ["--pods", "2", "--containers", "3", "--settle", "1"];
    let mut bench = Command::new(env!("CARGO_BIN_EXE_xtask"));
    let out = bench.args(["bench", "--only", "pods,memory,containers"]).args(sizes).output().unwrap();
    let printed = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{printed}{}", String::from_utf8_lossy(&out.stderr));
    for (what, most) in [
        ("POST pod -> Running, p50", 60e3),
        ("POST pod -> Running, p99", 60e3),
        ("POST pod -> Ready, p50", 60e3),
        ("POST pod -> Ready, p99", 60e3),
        ("orlop up, no pods", 1e3),
        ("orlop up, with the demo (2 pods)", 1e3),
        ("one monitor", 100.0),
        ("all of it with the demo", 1e3),
        ("create, start, end, remove, p50", 10e3),
        ("create, start, end, remove, p99", 10e3),
    ] {
        let found = rows(&printed, what);
        assert!(!found.is_empty(), "no {what:?} in:\n{printed}");
        for (figure, _) in found {
            assert!(figure > 0.0 && figure < most, "{what}: {figure} in:\n{printed}");
        }
    }
    // A pod's part of the daemon is within the noise of so small a run, so only that it is told.
    assert_eq!(rows(&printed, "one pod: its monitor").len(), 1, "{printed}");
    // A runtime that refuses this machine's cgroups is named with its reason instead.
    let told = String::from_utf8_lossy(&out.stderr);
    let runs = |r: &&str| is_installed(r) && !told.contains(&format!("{r} does not run here: "));
    let beside: Vec<&str> = ["runc", "crun"].into_iter().filter(runs).collect();
    for runtime in &beside {
        assert!(printed.contains(&format!("{runtime} run")), "{runtime} has no column in:\n{printed}{told}");
    }
    let columns =
        rows(&printed, "create, start").iter().filter(|(_, theirs)| theirs.ends_with(" ms")).count();
    assert_eq!(columns, 2 * beside.len(), "{printed}{told}");
}

#[test]
fn an_unknown_section_is_refused() {
    let out = Command::new(env!("CARGO_BIN_EXE_xtask")).args(["bench", "--only", "none"]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains("none") && said.contains("memory"), "{said}");
}
