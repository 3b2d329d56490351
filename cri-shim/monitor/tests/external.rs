//! Containers by another OCI runtime: everything that clients see is as with the monitor's own.

mod common;

use std::path::Path;

use common::*;
use orlop_proto::monitor::{client_frame::Body as Ask, server_frame::Body, *};
use serde_json::{Value, json};

/// crun of Debian 12 refuses machines with both cgroup versions, so it is tried in the virtual machine.
fn runc() -> OciRuntime {
    let program = ["/usr/bin/runc", "/usr/sbin/runc"].into_iter().find(|p| Path::new(p).exists());
    OciRuntime { program: program.expect("install runc").into(), args: Vec::new() }
}

fn bundle(pod: &Pod, id: &str, args: &[&str], extra: Value) -> CreateContainer {
    let runtime = Some(runc());
    CreateContainer { runtime, ..pod.bundle(id, args, extra) }
}

fn run(pod: &Pod, c: &mut Client, id: &str, args: &[&str]) -> u32 {
    let pid = create(c, bundle(pod, id, args, json!({})));
    c.start(id);
    pid
}

#[test]
fn runs_logs_and_ends() {
    let pod = Pod::new("runc-life");
    let mut c = pod.client();
    let args = ["sh", "-c", "echo one; echo two >&2; exit 7"];
    let pid = create(&mut c, bundle(&pod, "a", &args, json!({})));
    let s = c.container("a");
    assert_eq!((s.phase, s.pid), (ContainerPhase::Created as i32, pid));
    c.start("a");
    assert_eq!(c.wait_exit("a").exit_code, 7);
    let mut log = pod.log("a");
    log.sort();
    let line = |stream: &str, text: &str| (stream.to_owned(), "F".to_owned(), text.to_owned());
    assert_eq!(log, [line("stderr", "two"), line("stdout", "one")]);
    c.delete("a");
    c.delete("a");
    // What the program says when it refuses reaches the client, and nothing is left.
    let r = bundle(&pod, "nocmd", &["no-such-program"], json!({}));
    let f = c.failure(Ask::CreateContainer(r));
    assert_eq!((f.stage.as_str(), f.errno), ("exec", libc::ENOENT), "{f:?}");
    let r = CreateContainer {
        runtime: Some(OciRuntime { program: "/nonexistent/runtime".into(), args: Vec::new() }),
        ..pod.bundle("none", &["true"], json!({}))
    };
    let f = c.failure(Ask::CreateContainer(r));
    assert!(f.message.contains("/nonexistent/runtime") && f.errno == libc::ENOENT, "{f:?}");
    assert!(c.state().containers.is_empty());
    assert_eq!(cgroups_of(&pod.name, false), Vec::<std::path::PathBuf>::new());
    pod.finish();
}

#[test]
fn execs_signals_and_limits() {
    let pod = Pod::new("runc-exec");
    let mut c = pod.client();
    run(&pod, &mut c, "a", &["sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.05; done"]);
    let done = c.exec_sync("a", &["sh", "-c", "echo out; echo err >&2; exit 5"]);
    assert_eq!((done.exit_code, &done.stdout[..], &done.stderr[..]), (5, &b"out\n"[..], &b"err\n"[..]));
    let missing = Exec {
        container_id: "a".into(),
        process: process(&["no-such-program"], json!({})),
        ..Default::default()
    };
    let f = c.failure(Ask::Exec(missing));
    assert_eq!((f.stage.as_str(), f.errno), ("exec", libc::ENOENT), "{f:?}");
    let slow = Exec {
        container_id: "a".into(),
        process: process(&["sleep", "100"], json!({})),
        timeout_ms: 300,
        ..Default::default()
    };
    assert!(c.exec_with(slow).timed_out);
    let resources =
        serde_json::to_vec(&json!({"memory": {"limit": 64 << 20}, "cpu": {"shares": 300}})).unwrap();
    c.done(Ask::UpdateContainer(UpdateContainer { container_id: "a".into(), linux_resources: resources }));
    let folders = cgroups_of(&pod.name, false);
    let limit = folders.iter().find_map(|f| {
        std::fs::read_to_string(f.join("memory.limit_in_bytes"))
            .or_else(|_| std::fs::read_to_string(f.join("memory.max")))
            .ok()
    });
    assert_eq!(limit.as_deref().map(str::trim), Some("67108864"), "{folders:?}");
    // A signal reaches the first process by the program, the end of the connection its execs.
    c.signal("a", 15);
    assert_eq!(c.wait_exit("a").exit_code, 3);
    pod.finish();
}

#[test]
fn terminals_and_streams() {
    let pod = Pod::new("runc-tty");
    let mut c = pod.client();
    let r = bundle(&pod, "t", &["sh"], json!({"process": {"terminal": true}}));
    create(&mut c, CreateContainer { tty: true, stdin: true, ..r });
    let mut a = pod.client();
    let attach = Attach { container_id: "t".into(), stdin: true, stdout: true, stderr: false };
    assert!(matches!(a.call(Ask::Attach(attach)), Body::StreamStarted(_)));
    c.start("t");
    a.send(Ask::Resize(Resize { width: 91, height: 17 }));
    a.send(Ask::Stdin(b"stty size; echo x$((20+3))\n".to_vec()));
    let text = a.stream_until("x23");
    assert!(text.contains("17 91"), "{text:?}");
    let mut e = pod.client();
    e.send(Ask::Exec(Exec {
        container_id: "t".into(),
        process: process(&["sh", "-c", "tty; cat; exit 4"], json!({})),
        tty: true,
        stream: true,
        stdin: true,
        stdout: true,
        ..Default::default()
    }));
    assert!(e.stream_until("/dev/pts/").contains("/dev/pts/"));
    e.send(Ask::Stdin(vec![4]));
    assert_eq!(e.stream_to_end().2, 4);
    pod.finish();
}

#[test]
fn a_killed_monitor_can_be_cleaned_up() {
    let pod = Pod::new("runc-kill");
    let mut c = pod.client();
    let pid = run(&pod, &mut c, "a", &["sleep", "1000"]);
    let monitor = rustix::process::Pid::from_raw(pod.monitor_pid()).unwrap();
    rustix::process::kill_process(monitor, rustix::process::Signal::KILL).unwrap();
    // Gone as a whole: a process that is just ending has no program any more, but may still have its socket.
    wait_until(|| rustix::process::test_kill_process(monitor).is_err());
    let out = pod.run(&["--cleanup", "--dir"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    wait_until(|| std::fs::read_link(format!("/proc/{pid}/exe")).is_err());
    pod.assert_clean();
}
