//! Hooks after a container's start and after its end, whoever brings that about.

mod common;

use std::fs;
use std::path::PathBuf;

use common::*;
use orlop_proto::monitor::{client_frame::Body as Ask, server_frame::Body, *};
use serde_json::{Value, json};

/// A hook that runs `script` with the host's shell; `$out` is where [`told`] reads.
fn hook(pod: &Pod, script: &str) -> Value {
    let out = format!("out={}", pod.dir.join("out").display());
    json!({"path": "/bin/busybox", "args": ["sh", "-c", script], "env": [out, "PATH=/bin:/usr/bin"]})
}

/// Notes its name, the namespaces in which it runs, and the state.
fn telling(pod: &Pod, name: &str) -> Value {
    let script = format!(
        r#"line="{name} $(readlink /proc/self/ns/mnt) $(readlink /proc/self/ns/pid) $(cat)"; echo "$line" >> "$out""#
    );
    hook(pod, &script)
}

/// Each hook's name and state, in their order.
fn told(pod: &Pod) -> Vec<(String, Value)> {
    let text = fs::read_to_string(pod.dir.join("out")).unwrap_or_default();
    let own = |name| fs::read_link(format!("/proc/self/ns/{name}")).unwrap().display().to_string();
    let (mounts, pids) = (own("mnt"), own("pid"));
    let one = |line: &str| {
        let mut parts = line.splitn(4, ' ');
        let name = parts.next().unwrap().to_owned();
        assert_eq!(
            (parts.next().unwrap(), parts.next().unwrap()),
            (&*mounts, &*pids),
            "the host's namespaces"
        );
        (name, serde_json::from_str(parts.next().unwrap()).unwrap())
    };
    text.lines().map(one).collect()
}

fn names(pod: &Pod) -> Vec<String> {
    told(pod).into_iter().map(|(name, _)| name).collect()
}

/// One that fails and one that tells, after the start and after the end.
fn hooks(pod: &Pod) -> Value {
    json!({"annotations": {"a": "b"}, "hooks": {
        "poststart": [telling(pod, "started")],
        "poststop": [hook(pod, "exit 7"), telling(pod, "stopped")]}})
}

fn monitor_log(pod: &Pod) -> String {
    fs::read_to_string(pod.dir.join("monitor.log")).unwrap()
}

#[test]
fn run_after_start_and_after_removal() {
    let pod = Pod::new("hooks");
    let mut c = pod.client();
    let ended: &[&str] = &["true"];
    for (id, args, force) in [("ended", ended, false), ("running", &["sleep", "100"], true)] {
        let _ = fs::remove_file(pod.dir.join("out"));
        let pid = pod.create(&mut c, id, args, hooks(&pod));
        assert!(told(&pod).is_empty());
        c.start(id);
        let bundle = pod.dir.join("b").join(id);
        let state = |status: &str| {
            json!({"ociVersion": told(&pod)[0].1["ociVersion"], "id": id, "status": status, "bundle": bundle,
                "annotations": {"a": "b"}})
        };
        let mut running = state("running");
        running["pid"] = json!(pid);
        assert_eq!(told(&pod), [("started".into(), running.clone())]);
        if !force {
            c.wait_exit(id);
        }
        c.done(Ask::DeleteContainer(DeleteContainer { container_id: id.into(), force }));
        assert_eq!(told(&pod), [("started".into(), running), ("stopped".into(), state("stopped"))]);
        let warned = format!("container {id}: poststop hook /bin/busybox");
        assert!(monitor_log(&pod).contains(&warned), "{}", monitor_log(&pod));
        c.delete(id);
        assert_eq!(names(&pod).len(), 2, "once");
        assert_eq!(fs::read_dir(pod.dir.join("oci")).unwrap().count(), 0, "state is left");
    }
    // With the pod.
    fs::remove_file(pod.dir.join("out")).unwrap();
    pod.create(&mut c, "never-started", &["true"], hooks(&pod));
    c.done(Ask::DestroySandbox(DestroySandbox {}));
    assert_eq!(names(&pod), ["stopped"]);
    pod.finish();
}

/// As the OCI runtime spec has it since 1.2.1, and runc.
#[test]
fn a_failed_poststart_hook_ends_the_container() {
    let pod = Pod::new("hooks-fail");
    let mut c = pod.client();
    let mut extra = hooks(&pod);
    extra["hooks"]["poststart"] =
        json!([telling(&pod, "first"), hook(&pod, "exit 3"), telling(&pod, "third")]);
    pod.create(&mut c, "a", &["sleep", "100"], extra);
    let f = c.failure(Ask::StartContainer(StartContainer { container_id: "a".into() }));
    assert_eq!((f.kind, f.stage.as_str()), (FailureKind::Runtime as i32, "hook"), "{f:?}");
    assert!(f.message.contains("poststart") && f.message.contains('3'), "{f:?}");
    assert_eq!(c.wait_exit("a").exit_code, 137);
    assert_eq!(names(&pod), ["first"]);
    c.delete("a");
    assert_eq!(names(&pod), ["first", "stopped"]);
    // A creation that fails on the way is an end, too.
    let mut extra = hooks(&pod);
    extra["hooks"]["createRuntime"] = json!([hook(&pod, "exit 3")]);
    let f = c.failure(Ask::CreateContainer(pod.bundle("b", &["true"], extra)));
    assert!(f.stage == "hook" && f.message.contains("poststop hook /bin/busybox"), "{f:?}");
    assert_eq!(names(&pod), ["first", "stopped", "stopped"]);
    assert_eq!(fs::read_dir(pod.dir.join("oci")).unwrap().count(), 0, "state is left");
    pod.finish();
}

/// A hook that takes its time holds up the answer to the start, and nothing else.
#[test]
fn the_end_is_told_while_a_hook_runs() {
    let pod = Pod::new("hooks-slow");
    let mut c = pod.client();
    let mut extra = hooks(&pod);
    let waits = r#"until [ -e "$out.go" ]; do usleep 10000; done"#;
    extra["hooks"]["poststart"] = json!([hook(&pod, waits)]);
    pod.create(&mut c, "a", &["sh", "-c", "exit 5"], extra);
    let request = c.send(Ask::StartContainer(StartContainer { container_id: "a".into() }));
    let mut other = pod.client();
    assert_eq!(other.wait_exit("a").exit_code, 5);
    assert!(c.stray.iter().all(|f| f.id != request));
    fs::write(pod.dir.join("out.go"), "").unwrap();
    match c.wait(request) {
        Body::Done(_) => {}
        other => panic!("{other:?}"),
    }
    c.delete("a");
    pod.finish();
}

/// Those of the runtime have the host's rights, that in the container's namespaces has its root's.
#[test]
fn with_a_user_namespace() {
    let pod = Pod::new("hooks-user");
    let mut c = pod.client();
    let map = || vec![IdMap { container_id: 0, host_id: 700_000, size: 65536 }];
    let sandbox =
        CreateSandbox { new_net: true, new_ipc: true, uid_map: map(), gid_map: map(), ..Default::default() };
    match c.call(Ask::CreateSandbox(sandbox)) {
        Body::SandboxCreated(_) => {}
        other => panic!("{other:?}"),
    }
    let joined = |kind: &str, name: &str| json!({"type": kind, "path": pod.dir.join("ns").join(name)});
    let mapping = json!([{"containerID": 0, "hostID": 700_000, "size": 65536}]);
    let mut extra = hooks(&pod);
    extra["linux"] = json!({"uidMappings": mapping, "gidMappings": mapping, "namespaces": [
        {"type": "mount"}, {"type": "pid"}, {"type": "uts"},
        joined("user", "user"), joined("network", "net"), joined("ipc", "ipc")]});
    extra["hooks"]["createRuntime"] = json!([telling(&pod, "creating")]);
    let inside = r#"cat /proc/self/uid_map > "$out.inside""#;
    extra["hooks"]["createContainer"] = json!([hook(&pod, inside)]);
    // The container's root is nobody in the pod's folder.
    let inside = pod.dir.join("out.inside");
    fs::write(&inside, "").unwrap();
    std::os::unix::fs::chown(&inside, Some(700_000), None).unwrap();
    let pid = pod.create(&mut c, "a", &["sleep", "100"], extra.clone());
    assert_eq!(told(&pod)[0].1["pid"], json!(pid));
    let users = fs::read_to_string(&inside).unwrap();
    assert_eq!(users.split_whitespace().collect::<Vec<_>>(), ["0", "700000", "65536"]);
    c.start("a");
    c.delete("a");
    assert_eq!(names(&pod), ["creating", "started", "stopped"]);
    // One that fails: all is taken back with the host's rights.
    extra["hooks"]["createRuntime"] = json!([hook(&pod, "exit 3")]);
    let f = c.failure(Ask::CreateContainer(pod.bundle("b", &["true"], extra)));
    assert!(f.stage == "hook" && f.message.contains("poststop hook /bin/busybox"), "{f:?}");
    assert_eq!(names(&pod), ["creating", "started", "stopped", "stopped"]);
    assert_eq!(cgroups_of(&pod.name, false), Vec::<PathBuf>::new());
    assert_eq!(fs::read_dir(pod.dir.join("oci")).unwrap().count(), 0, "state is left");
    pod.finish();
}

fn kill_monitor(pod: &Pod) {
    let pid = rustix::process::Pid::from_raw(pod.monitor_pid()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    wait_until(|| rustix::process::test_kill_process(pid).is_err());
}

#[test]
fn after_a_killed_monitor_they_run_once() {
    let pod = Pod::new("hooks-killed");
    let mut c = pod.client();
    for id in ["a", "b"] {
        pod.create(&mut c, id, &["sleep", "100"], hooks(&pod));
    }
    c.start("a");
    kill_monitor(&pod);
    for _ in 0..2 {
        let out = pod.run(&["--cleanup", "--dir"]);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{said}");
        let mut names = names(&pod);
        names.sort();
        assert_eq!(names, ["started", "stopped", "stopped"], "{said}");
    }
    pod.assert_clean();
}

/// What the monitor had begun goes on without it; whoever cleans up waits for that and does not do it again.
#[test]
fn a_monitor_that_is_killed_meanwhile() {
    let pod = Pod::new("hooks-meanwhile");
    let mut c = pod.client();
    let mut extra = hooks(&pod);
    let waits = r#"echo > "$out.begun"; until [ -e "$out.go" ]; do usleep 10000; done"#;
    extra["hooks"]["poststop"] = json!([hook(&pod, waits), telling(&pod, "stopped")]);
    pod.create(&mut c, "a", &["true"], extra);
    c.send(Ask::DeleteContainer(DeleteContainer { container_id: "a".into(), force: true }));
    let file = |name: &str| -> PathBuf { pod.dir.join(name) };
    wait_until(|| file("out.begun").exists());
    kill_monitor(&pod);
    std::thread::scope(|s| {
        let cleanup = s.spawn(|| pod.run(&["--cleanup", "--dir"]));
        // It is there, and waits.
        wait_until(|| !processes_of(&pod.dir).iter().all(|p| !p.1.contains("--cleanup")));
        fs::write(file("out.go"), "").unwrap();
        let out = cleanup.join().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    });
    assert_eq!(names(&pod), ["stopped"]);
    pod.assert_clean();
}

/// As it ends when it takes too long. The helper that made the cgroup can take nothing back.
#[test]
fn a_creation_that_is_killed_leaves_nothing() {
    let pod = Pod::new("hooks-hung");
    let mut c = pod.client();
    let hangs = r#"echo $PPID $$ > "$out.new"; mv "$out.new" "$out.pids"; exec sleep 1000"#;
    let mut extra = hooks(&pod);
    extra["hooks"]["createRuntime"] = json!([hook(&pod, hangs)]);
    let request = c.send(Ask::CreateContainer(pod.bundle("a", &["true"], extra)));
    let told_pids = pod.dir.join("out.pids");
    wait_until(|| told_pids.exists());
    assert_ne!(cgroups_of(&pod.name, false), Vec::<PathBuf>::new(), "it has made them");
    for pid in fs::read_to_string(&told_pids).unwrap().split_whitespace() {
        let pid = rustix::process::Pid::from_raw(pid.parse().unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }
    match c.wait(request) {
        Body::Failure(f) => assert_eq!(f.stage, "helper", "{f:?}"),
        other => panic!("{other:?}"),
    }
    wait_until(|| cgroups_of(&pod.name, false).is_empty());
    // Its end is the container's, too.
    wait_until(|| names(&pod) == ["stopped"]);
    wait_until(|| fs::read_dir(pod.dir.join("containers")).unwrap().count() == 0);
    // The name is free again.
    pod.create(&mut c, "a", &["true"], json!({}));
    pod.finish();
}
