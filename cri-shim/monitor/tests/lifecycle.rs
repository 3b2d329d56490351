//! Containers from creation to removal.

mod common;

use common::*;
use orlop_proto::monitor::{client_frame::Body as Ask, *};
use serde_json::json;

fn out(text: &str) -> (String, String, String) {
    ("stdout".into(), "F".into(), text.into())
}

#[test]
fn runs_logs_and_ends() {
    let pod = Pod::new("life");
    let mut c = pod.client();
    let pid =
        pod.create(&mut c, "a", &["sh", "-c", "echo one; echo two >&2; printf three; exit 7"], json!({}));
    assert!(pid > 1);
    let s = c.container("a");
    assert_eq!((s.phase, s.pid), (ContainerPhase::Created as i32, pid));
    assert!(pod.log("a").is_empty());
    c.start("a");
    let s = c.wait_exit("a");
    assert_eq!((s.exit_code, s.oom_killed), (7, false));
    assert!(s.created_at_ns <= s.started_at_ns && s.started_at_ns <= s.finished_at_ns, "{s:?}");
    let mut log = pod.log("a");
    log.sort();
    assert_eq!(
        log,
        [
            ("stderr".into(), "F".into(), "two".into()),
            out("one"),
            ("stdout".into(), "P".into(), "three".into())
        ]
    );
    let f = c.failure(Ask::StartContainer(StartContainer { container_id: "a".into() }));
    assert_eq!(f.kind, FailureKind::WrongState as i32);
    c.delete("a");
    c.delete("a");
    assert!(c.state().containers.is_empty());
    pod.finish();
}

#[test]
fn signals_and_codes() {
    let pod = Pod::new("signals");
    let mut c = pod.client();
    for (id, signal, code) in [("kill", 9, 137), ("rt", 40, 168)] {
        pod.create_started(&mut c, id, &["sleep", "100"]);
        if signal == 40 {
            // PID 1 of a namespace ignores what it has no handler for, also from outside unless it is SIGKILL.
            c.signal(id, signal);
            assert_eq!(c.container(id).phase, ContainerPhase::Running as i32);
            c.signal(id, 9);
            assert_eq!(c.wait_exit(id).exit_code, 137);
            continue;
        }
        c.signal(id, signal);
        assert_eq!(c.wait_exit(id).exit_code, code);
    }
    pod.create_started(
        &mut c,
        "trap",
        &["sh", "-c", "trap 'exit 3' TERM; echo ready; while :; do sleep 0.05; done"],
    );
    wait_until(|| pod.log("trap") == [out("ready")]);
    c.signal("trap", 15);
    assert_eq!(c.wait_exit("trap").exit_code, 3);
    let f = c.failure(Ask::SignalContainer(SignalContainer {
        container_id: "trap".into(),
        signal: 15,
        all: false,
    }));
    assert_eq!(f.kind, FailureKind::WrongState as i32);
    let f = c.failure(Ask::SignalContainer(SignalContainer {
        container_id: "trap".into(),
        signal: 99,
        all: false,
    }));
    assert_eq!(f.kind, FailureKind::Invalid as i32);
    pod.finish();
}

#[test]
fn failures_leave_nothing() {
    let pod = Pod::new("fail");
    let mut c = pod.client();
    // Whether there is such a program shows at the start, as with other CRI runtimes.
    for id in ["nocmd", "nocmd-hooks"] {
        let more = if id == "nocmd" { json!({}) } else { with_hooks() };
        pod.create(&mut c, id, &["no-such-program"], more);
        assert_eq!(c.container(id).phase, ContainerPhase::Created as i32);
        let f = c.failure(Ask::StartContainer(StartContainer { container_id: id.into() }));
        assert_eq!((f.kind, f.stage.as_str(), f.errno), (FailureKind::Runtime as i32, "exec", 2), "{f:?}");
        assert!(f.message.contains("executable file not found in $PATH"), "{f:?}");
        assert_eq!(c.wait_exit(id).exit_code, 128);
        c.delete(id);
    }
    let r = pod.bundle("mount", &["true"], json!({"mounts": [{"destination": "/x", "type": "bind", "source": "/nonexistent/y", "options": ["bind"]}]}));
    let f = c.failure(Ask::CreateContainer(r));
    assert_eq!((f.kind, f.errno), (FailureKind::Runtime as i32, 2), "{f:?}");
    for at in ["createRuntime", "createContainer"] {
        let mut hooks = with_hooks();
        hooks["hooks"][at] = json!([{"path": "/bin/busybox", "args": ["false"]}]);
        let f = c.failure(Ask::CreateContainer(pod.bundle(at, &["true"], hooks)));
        assert_eq!((f.kind, f.stage.as_str()), (FailureKind::Runtime as i32, "hook"), "{f:?}");
    }
    let mut r = pod.bundle("json", &["true"], json!({}));
    std::fs::write(format!("{}/config.json", r.bundle), "{").unwrap();
    assert_eq!(c.failure(Ask::CreateContainer(r.clone())).kind, FailureKind::Invalid as i32);
    r.container_id = "../x".into();
    assert_eq!(c.failure(Ask::CreateContainer(r.clone())).kind, FailureKind::Invalid as i32);
    r.container_id = "log".into();
    r.log_path = "/nonexistent/dir/log".into();
    let f = c.failure(Ask::CreateContainer(r));
    assert_eq!((f.stage.as_str(), f.errno), ("log", 2));
    // Found and executable, but not a program.
    std::fs::write(pod.dir.join("rootfs/bin/junk"), [0x7f, b'E', b'L', b'F', 9, 9]).unwrap();
    std::fs::set_permissions(
        pod.dir.join("rootfs/bin/junk"),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    pod.create(&mut c, "junk", &["junk"], json!({}));
    let f = c.failure(Ask::StartContainer(StartContainer { container_id: "junk".into() }));
    assert_eq!((f.stage.as_str(), f.errno), ("exec", libc::ENOEXEC), "{f:?}");
    assert_eq!(c.wait_exit("junk").exit_code, 128);
    c.delete("junk");
    assert!(c.state().containers.is_empty());
    assert_eq!(cgroups_of(&pod.name, false), Vec::<std::path::PathBuf>::new());
    pod.finish();
}
