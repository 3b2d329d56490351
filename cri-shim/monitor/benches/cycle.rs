//! What a container and an exec cost over the monitor protocol, beside runc where it is installed.
//!
//! `cargo bench -p orlop-monitor` (as root); a number as argument changes how many of each are made.

#[path = "../tests/common/mod.rs"]
mod common;

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::*;
use orlop_proto::monitor::{client_frame::Body as Ask, server_frame::Body, *};
use serde_json::json;

fn report(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |p: f64| times[((times.len() - 1) as f64 * p).round() as usize].as_secs_f64() * 1e3;
    println!("{what:<44}p50 {:>7.2} ms   p99 {:>7.2} ms   of {}", at(0.5), at(0.99), times.len());
}

/// Five steps: create, start, the news of the end, delete, and all of it.
fn cycles(count: usize) {
    let pod = Pod::new("bench");
    let mut c = pod.client();
    let sandbox = CreateSandbox {
        sandbox_id: "s".into(),
        new_net: true,
        new_ipc: true,
        new_uts: true,
        ..Default::default()
    };
    assert!(matches!(c.call(Ask::CreateSandbox(sandbox)), Body::SandboxCreated(_)));
    let mut events = pod.client();
    events.done(Ask::Subscribe(Subscribe {}));
    let ns = |n: &str| pod.dir.join("ns").join(n);
    let extra = json!({"linux": {
        "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "ipc", "path": ns("ipc")},
            {"type": "uts", "path": ns("uts")}, {"type": "network", "path": ns("net")}],
        "resources": {"memory": {"limit": 268435456}, "cpu": {"shares": 512, "quota": 50000, "period": 100000}},
        "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/scsi", "/sys/firmware"],
        "readonlyPaths": ["/proc/sys", "/proc/irq"],
    }});
    let mut steps: [Vec<Duration>; 5] = Default::default();
    for i in 0..count {
        let id = format!("c{i}");
        let request = pod.bundle(&id, &["true"], extra.clone());
        let t0 = Instant::now();
        create(&mut c, request);
        let t1 = Instant::now();
        c.start(&id);
        let t2 = Instant::now();
        while !matches!(events.recv().expect("events").body, Some(Body::ContainerExited(_))) {}
        let t3 = Instant::now();
        c.delete(&id);
        let t4 = Instant::now();
        for (to, (from, until)) in steps.iter_mut().zip([(t0, t1), (t1, t2), (t2, t3), (t3, t4), (t0, t4)]) {
            to.push(until - from);
        }
    }
    for (what, times) in
        ["create", "start", "end", "delete", "create + start + end + delete"].iter().zip(steps)
    {
        report(&format!("monitor, {what}"), times);
    }
    pod.create(&mut c, "long", &["sleep", "1000"], extra);
    c.start("long");
    let execs = (0..count).map(|_| {
        let start = Instant::now();
        assert_eq!(c.exec_sync("long", &["true"]).exit_code, 0);
        start.elapsed()
    });
    report("monitor, exec true", execs.collect());
    println!("monitor, PSS with one container: {} kB", pss(pod.monitor_pid()));
    pod.finish();
}

fn pss(pid: i32) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("smaps_rollup");
    text.lines().find_map(|l| l.strip_prefix("Pss:")).unwrap_or_default().replace("kB", "").trim().to_owned()
}

/// The same container by runc's command line.
fn runc(count: usize) {
    if Command::new("runc").arg("--version").output().is_err() {
        return println!("runc is not installed");
    }
    let pod = Pod::prepare("benchrunc");
    let extra = json!({"linux": {
        "resources": {"memory": {"limit": 268435456}, "cpu": {"shares": 512, "quota": 50000, "period": 100000}},
        "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/scsi", "/sys/firmware"],
        "readonlyPaths": ["/proc/sys", "/proc/irq"],
    }});
    let run = |args: &[&str]| {
        let start = Instant::now();
        let out = Command::new("runc")
            .arg("--root")
            .arg(pod.dir.join("runc"))
            .args(args)
            .stdin(Stdio::null())
            .output();
        let out = out.expect("runc runs");
        assert!(out.status.success(), "runc {args:?}: {}", String::from_utf8_lossy(&out.stderr));
        start.elapsed()
    };
    let bundle = pod.bundle("r", &["true"], extra.clone()).bundle;
    report(
        "runc run",
        (0..count).map(|i| run(&["run", "-b", &bundle, &format!("{}-{i}", pod.name)])).collect(),
    );
    let bundle = pod.bundle("l", &["sleep", "1000"], extra).bundle;
    let name = format!("{}-long", pod.name);
    // Detached, it would keep the pipes of `output` open.
    let started = Command::new("runc")
        .arg("--root")
        .arg(pod.dir.join("runc"))
        .args(["run", "-d", "-b", &bundle, &name])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    assert!(started.expect("runc runs").success());
    report("runc exec true", (0..count).map(|_| run(&["exec", &name, "/bin/true"])).collect());
    run(&["delete", "-f", &name]);
}

fn main() {
    let count = std::env::args().skip(1).find_map(|a| a.parse().ok()).unwrap_or(50);
    cycles(count);
    runc(count);
}
