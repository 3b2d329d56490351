//! Namespaces, limits, and what survives whose death.

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use common::*;
use orlop_proto::monitor::{client_frame::Body as Ask, server_frame::Body, *};
use serde_json::{Value, json};

fn create_sandbox(c: &mut Client, r: CreateSandbox) -> u32 {
    match c.call(Ask::CreateSandbox(r)) {
        Body::SandboxCreated(s) => s.init_pid,
        other => panic!("{other:?}"),
    }
}

fn full(pod: &Pod) -> CreateSandbox {
    CreateSandbox {
        sandbox_id: "s".into(),
        hostname: "pod-host".into(),
        new_net: true,
        new_ipc: true,
        new_uts: true,
        shared_pid: true,
        sysctls: [("net.ipv4.ip_unprivileged_port_start".into(), "77".into())].into(),
        cgroup_path: pod.cgroup("init"),
        ..Default::default()
    }
}

fn shared(pod: &Pod) -> Value {
    let ns = |n: &str| pod.dir.join("ns").join(n);
    json!({"linux": {"namespaces": [
        {"type": "mount"}, {"type": "pid", "path": ns("pid")}, {"type": "ipc", "path": ns("ipc")},
        {"type": "uts", "path": ns("uts")}, {"type": "network", "path": ns("net")},
    ]}})
}

fn inode(p: impl AsRef<Path>) -> u64 {
    fs::metadata(p).unwrap().ino()
}

#[test]
fn containers_share_the_namespaces() {
    let pod = Pod::new("ns");
    let mut c = pod.client();
    let init = create_sandbox(&mut c, full(&pod));
    assert!(init > 1);
    for n in ["net", "ipc", "uts", "pid"] {
        assert_ne!(inode(pod.dir.join("ns").join(n)), inode(format!("/proc/self/ns/{n}")), "{n} is new");
        assert_eq!(
            inode(pod.dir.join("ns").join(n)),
            inode(format!("/proc/{init}/ns/{n}")),
            "{n} is the init's"
        );
    }
    assert_eq!(c.failure(Ask::CreateSandbox(full(&pod))).kind, FailureKind::AlreadyExists as i32);
    assert_eq!(c.failure(Ask::Shutdown(Shutdown {})).kind, FailureKind::WrongState as i32);
    pod.create(&mut c, "a", &["sh", "-c", "sleep 500 & sleep 1000"], shared(&pod));
    c.start("a");
    pod.create(&mut c, "b", &["sleep", "2000"], shared(&pod));
    c.start("b");
    let text = |c: &mut Client, args: &[&str]| String::from_utf8(c.exec_sync("b", args).stdout).unwrap();
    wait_until(|| {
        let ps = text(&mut c, &["ps", "-o", "pid,comm,args"]);
        ps.contains("sleep 1000") && ps.contains("sleep 2000") && ps.contains("    1 orlop-init")
    });
    assert_eq!(text(&mut c, &["hostname"]), "pod-host\n");
    assert!(text(&mut c, &["ip", "addr", "show", "lo"]).contains("127.0.0.1/8"));
    assert_eq!(text(&mut c, &["cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start"]), "77\n");
    // Orphans go to the pod's init, which reaps them.
    text(&mut c, &["sh", "-c", "(sleep 0.1 &) ; true"]);
    wait_until(|| !text(&mut c, &["ps", "-o", "stat,comm"]).contains('Z'));
    // The end of a container's first process takes its others along, and only those.
    c.signal("a", 9);
    assert_eq!(c.wait_exit("a").exit_code, 137);
    wait_until(|| !text(&mut c, &["ps", "-o", "args"]).contains("sleep 500"));
    assert_eq!(c.container("b").phase, ContainerPhase::Running as i32);
    pod.finish();
    assert!(!Path::new(&format!("/proc/{init}")).exists());
}

#[test]
fn user_namespace() {
    let pod = Pod::new("userns");
    let mut c = pod.client();
    let map = || vec![IdMap { container_id: 0, host_id: 700_000, size: 65536 }];
    let r = CreateSandbox {
        new_net: true,
        new_uts: true,
        hostname: "u".into(),
        uid_map: map(),
        gid_map: map(),
        sysctls: [("net.ipv4.ip_forward".into(), "1".into())].into(),
        ..Default::default()
    };
    assert_eq!(create_sandbox(&mut c, r), 0);
    assert!(pod.dir.join("ns/user").exists() && !pod.dir.join("ns/ipc").exists());
    c.done(Ask::DestroySandbox(DestroySandbox {}));
    c.done(Ask::DestroySandbox(DestroySandbox {}));
    pod.finish();
}

#[test]
fn refused_sandboxes_leave_nothing() {
    let pod = Pod::new("refuse");
    let mut c = pod.client();
    let with = |k: &str, v: &str| CreateSandbox { sysctls: [(k.into(), v.into())].into(), ..full(&pod) };
    assert_eq!(c.failure(Ask::CreateSandbox(with("kernel.panic", "1"))).kind, FailureKind::Invalid as i32);
    let f = c.failure(Ask::CreateSandbox(with("net.ipv4.ip_forward", "rubbish")));
    assert_eq!((f.stage.as_str(), f.errno), ("sysctl", libc::EINVAL));
    assert!(!pod.dir.join("ns").exists() && !c.state().sandbox_created);
    create_sandbox(&mut c, full(&pod));
    pod.finish();
}

/// What a vendor's device or a plugin may ask for, beyond what the CRI does.
#[test]
fn settings_of_a_single_container() {
    let pod = Pod::new("single");
    let mut c = pod.client();
    let host = || fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
    let before = host();
    fs::create_dir(pod.dir.join("volume")).unwrap();
    let process = json!({
        "scheduler": {"policy": "SCHED_BATCH", "nice": 5},
        "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 6},
    });
    let mut extra = json!({"process": process, "linux": {"sysctl": {"net.core.somaxconn": "1234", "kernel.shmmni": "77"}}});
    let bundle = pod.bundle("a", &["true"], json!({}));
    let spec: Value =
        serde_json::from_slice(&fs::read(Path::new(&bundle.bundle).join("config.json")).unwrap()).unwrap();
    let mut mounts = spec["mounts"].clone();
    let volume = pod.dir.join("volume");
    mounts.as_array_mut().unwrap().extend([
        json!({"destination": "/t", "type": "tmpfs", "source": "tmpfs", "options": ["sync", "lazytime", "noexec"]}),
        json!({"destination": "/v", "type": "bind", "source": volume, "options": ["rbind", "ro", "sync", "rrw"]}),
    ]);
    extra["mounts"] = mounts;
    // Of /proc/PID/stat: nice and policy, counted from behind the name.
    let look = "cat /proc/sys/net/core/somaxconn /proc/sys/kernel/shmmni; busybox ionice -p $$; \
        cut -d' ' -f 19,41 /proc/self/stat";
    let script =
        format!("{look}; grep ' /t ' /proc/self/mountinfo; touch /v/made && echo made; exec sleep 100");
    std::os::unix::fs::symlink("busybox", pod.dir.join("rootfs/bin/cut")).unwrap();
    pod.create(&mut c, "a", &["sh", "-c", &script], extra);
    c.start("a");
    wait_until(|| pod.log("a").len() == 6);
    let lines: Vec<String> = pod.log("a").into_iter().map(|l| l.2).collect();
    assert_eq!(lines[..4], ["1234", "77", "best-effort: prio 6", "5 3"]);
    let (mount, whole) = lines[4].split_once(" - ").unwrap();
    assert!(mount.contains("noexec") && whole.contains("sync") && whole.contains("lazytime"), "{lines:?}");
    assert_eq!(lines[5], "made");
    assert!(volume.join("made").exists() && host() == before);
    // An exec has those of its own process.
    let request = Exec {
        container_id: "a".into(),
        process: common::process(&["sh", "-c", look], process),
        ..Default::default()
    };
    let out = String::from_utf8(c.exec_with(request).stdout).unwrap();
    assert_eq!(out.lines().skip(2).collect::<Vec<_>>(), ["best-effort: prio 6", "5 3"]);
    assert_eq!(
        String::from_utf8(c.exec_sync("a", &["sh", "-c", "cut -d' ' -f 19,41 /proc/self/stat"]).stdout)
            .unwrap(),
        "0 0\n"
    );
    // A path that leads to the host's namespace does not help.
    for (kind, file, name) in [("network", "net", "net.core.somaxconn"), ("ipc", "ipc", "kernel.shmmni")] {
        let hosts = format!("/proc/{}/ns/{file}", std::process::id());
        let bad = json!({"linux": {"sysctl": {name: "1234"},
            "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": kind, "path": hosts}]}});
        let f = c.failure(Ask::CreateContainer(pod.bundle("b", &["true"], bad)));
        assert!(f.message.contains(name) && f.message.contains("host"), "{f:?}");
    }
    assert_eq!(host(), before);
    for (section, value, stage) in [
        // Its number has a name and no code in the kernel.
        ("scheduler", json!({"policy": "SCHED_ISO"}), "scheduler"),
        ("ioPriority", json!({"class": "IOPRIO_CLASS_BE", "priority": 9}), "spec"),
    ] {
        let f =
            c.failure(Ask::CreateContainer(pod.bundle("b", &["true"], json!({"process": {section: value}}))));
        assert_eq!(f.stage, stage, "{f:?}");
    }
    pod.finish();
}

#[test]
fn limits_land_and_change() {
    let pod = Pod::new("limits");
    let mut c = pod.client();
    let nested = format!("/{}/burstable/pod1/ctr", pod.name);
    let extra = json!({"linux": {"cgroupsPath": nested, "resources": {
        "memory": {"limit": 33554432}, "cpu": {"shares": 512, "quota": 50000, "period": 100000}, "pids": {"limit": 20}}}});
    pod.create(&mut c, "a", &["sleep", "100"], extra);
    c.start("a");
    let v1 = !Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let read = |controller: &str, v1_file: &str, v2_file: &str| {
        let p = if v1 {
            format!("/sys/fs/cgroup/{controller}{nested}/{v1_file}")
        } else {
            format!("/sys/fs/cgroup{nested}/{v2_file}")
        };
        fs::read_to_string(&p).unwrap_or_else(|e| panic!("{p}: {e}")).trim().to_owned()
    };
    assert_eq!(read("memory", "memory.limit_in_bytes", "memory.max"), "33554432");
    assert_eq!(read("pids", "pids.max", "pids.max"), "20");
    assert!(read("cpu", "cpu.cfs_quota_us", "cpu.max").starts_with("50000"));
    let update = |json: Value| {
        Ask::UpdateContainer(UpdateContainer {
            container_id: "a".into(),
            linux_resources: serde_json::to_vec(&json).unwrap(),
        })
    };
    c.done(update(json!({"memory": {"limit": 67108864}, "cpu": {"quota": 70000, "period": 100000}})));
    assert_eq!(read("memory", "memory.limit_in_bytes", "memory.max"), "67108864");
    assert!(read("cpu", "cpu.cfs_quota_us", "cpu.max").starts_with("70000"));
    assert_eq!(read("pids", "pids.max", "pids.max"), "20");
    assert_eq!(c.failure(update(json!({"memory": 3}))).kind, FailureKind::Invalid as i32);
    // A fork bomb is bounded, and its container can still be removed.
    let d = c.exec_sync("a", &["sh", "-c", "for i in $(seq 1 40); do sleep 50 & done; true"]);
    assert!(String::from_utf8_lossy(&d.stderr).contains("fork"), "{d:?}");
    c.delete("a");
    for h in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let base = h.path().join(&pod.name);
        assert!(!base.join("burstable/pod1/ctr").exists());
        for p in ["burstable/pod1", "burstable"] {
            let _ = fs::remove_dir(base.join(p));
        }
    }
    pod.finish();
}

#[test]
fn out_of_memory_is_told() {
    let pod = Pod::new("oom");
    let mut c = pod.client();
    let mut events = pod.client();
    events.done(Ask::Subscribe(Subscribe {}));
    let limit = json!({"linux": {"resources": {"memory": {"limit": 16777216, "swap": 16777216}}}});
    // Reads a whole megabyte-sized block into memory again and again.
    pod.create(&mut c, "a", &["dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1"], limit.clone());
    c.start("a");
    let s = c.wait_exit("a");
    assert_eq!((s.exit_code, s.oom_killed), (137, true));
    // A child's end is told too, while the container goes on.
    pod.create(
        &mut c,
        "b",
        &["sh", "-c", "dd if=/dev/zero of=/dev/null bs=100M count=1; echo after; sleep 100"],
        limit,
    );
    c.start("b");
    wait_until(|| pod.log("b").iter().any(|l| l.2 == "after"));
    let mut seen = Vec::new();
    while seen.len() < 5 {
        match events.recv().unwrap().body.unwrap() {
            Body::ContainerStarted(e) => seen.push(format!("start {}", e.container.unwrap().container_id)),
            Body::ContainerOom(e) => seen.push(format!("oom {}", e.container_id)),
            Body::ContainerExited(e) => {
                let e = e.container.unwrap();
                seen.push(format!("exit {} {} {}", e.container_id, e.exit_code, e.oom_killed));
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seen, ["start a", "oom a", "exit a 137 true", "start b", "oom b"]);
    assert!(c.container("b").oom_killed && c.container("b").phase == ContainerPhase::Running as i32);
    assert!(!is_oom_preferred(pod.monitor_pid()));
    pod.finish();
}

/// A container's own score must not have stuck to the monitor.
fn is_oom_preferred(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().parse::<i32>().unwrap() > 0
}

#[test]
fn nothing_of_a_container_sticks_to_the_monitor() {
    let pod = Pod::new("sticky");
    let mut c = pod.client();
    let pid = pod.monitor_pid();
    let seen = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let umask = status.lines().find(|l| l.starts_with("Umask")).unwrap().to_owned();
        (
            fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap(),
            umask,
            fs::read_link(format!("/proc/{pid}/cwd")).unwrap(),
        )
    };
    // What each descriptor is, without the numbers of the sockets: a connection that has just been closed may still be there
    // in a first count, so the count starts when the only client is ours.
    let fds = || {
        let all = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        let target = |e: fs::DirEntry| fs::read_link(e.path()).map(|t| t.to_string_lossy().into_owned());
        let mut kinds: Vec<String> = all
            .filter_map(|e| target(e).ok())
            .map(|t| t.split('[').next().unwrap_or_default().to_owned())
            .collect();
        kinds.sort();
        kinds
    };
    let sockets = |all: &[String]| all.iter().filter(|t| *t == "socket:").count();
    // The listener and our own connection.
    wait_until(|| sockets(&fds()) == 2);
    let (before, fds_before) = (seen(), fds());
    for i in 0..3 {
        let id = format!("a{i}");
        let extra = json!({"process": {"oomScoreAdj": 1000, "user": {"umask": 63}}, "hostname": "h"});
        let init = pod.create(&mut c, &id, &["sh", "-c", "umask; exec sleep 100"], extra);
        c.start(&id);
        wait_until(|| !pod.log(&id).is_empty());
        assert_eq!(pod.log(&id)[0].2, "0077");
        assert_eq!(fs::read_to_string(format!("/proc/{init}/oom_score_adj")).unwrap().trim(), "1000");
        // Signals are as a fresh process expects them; the shell had some of its own.
        let line = || fs::read(format!("/proc/{init}/cmdline")).unwrap();
        wait_until(|| line().starts_with(b"sleep"));
        let status = fs::read_to_string(format!("/proc/{init}/status")).unwrap();
        for mask in ["SigBlk:\t0000000000000000", "SigIgn:\t0000000000000000"] {
            assert!(status.contains(mask), "{status}");
        }
        let bad = pod.bundle("bad", &["true"], json!({"mounts": [{"destination": "/x", "type": "bind", "source": "/nonexistent", "options": ["bind"]}]}));
        c.failure(Ask::CreateContainer(bad));
        c.delete(&id);
    }
    wait_until(|| seen() == before);
    wait_until(|| fds() == fds_before);
    pod.finish();
}

#[test]
fn bad_frames_end_only_their_connection() {
    let pod = Pod::new("frames");
    let mut c = pod.client();
    pod.create_started(&mut c, "a", &["sleep", "100"]);
    let frames: &[&[u8]] = &[
        &[0xff; 8],
        &[0, 0, 0, 2, 0xff, 0xff],
        &[0, 0, 0, 0],
        // No Hello first.
        &[0, 0, 0, 4, 8, 1, 0x72, 0],
        b"GET / HTTP/1.1\r\n\r\n",
    ];
    for f in frames {
        let mut bad = Client::raw(&pod.dir);
        bad.socket.write_all(f).unwrap();
        assert!(bad.recv().is_none(), "{f:?}");
    }
    // Cut at every byte of a request.
    let mut bytes = Vec::new();
    for body in [
        Ask::Hello(Hello { version: 1 }),
        Ask::Exec(Exec {
            container_id: "a".into(),
            process: process(&["sleep", "55"], json!({})),
            ..Default::default()
        }),
    ] {
        let m = prost::Message::encode_to_vec(&ClientFrame { id: 1, body: Some(body) });
        bytes.extend((m.len() as u32).to_be_bytes());
        bytes.extend(m);
    }
    for cut in (0..=bytes.len()).step_by(7) {
        Client::raw(&pod.dir).socket.write_all(&bytes[..cut]).unwrap();
    }
    let mut sub = pod.client();
    sub.done(Ask::Subscribe(Subscribe {}));
    sub.send(Ask::GetState(GetState {}));
    assert!(sub.recv().is_none());
    assert_eq!(c.exec_sync("a", &["echo", "x"]).stdout, b"x\n");
    wait_until(|| {
        !String::from_utf8_lossy(&c.exec_sync("a", &["ps", "-o", "args"]).stdout).contains("sleep 55")
    });
    pod.finish();
}

#[test]
fn clients_may_vanish_at_any_moment() {
    let pod = Pod::new("vanish");
    let mut c = pod.client();
    create_sandbox(&mut c, full(&pod));
    let pin = inode(pod.dir.join("ns/net"));
    for (i, wait) in [0u64, 1, 2, 4, 8, 16].into_iter().enumerate() {
        let id = format!("v{i}");
        let mut gone = pod.client();
        gone.send(Ask::CreateContainer(pod.bundle(&id, &["sleep", "100"], shared(&pod))));
        gone.send(Ask::StartContainer(StartContainer { container_id: id.clone() }));
        std::thread::sleep(Duration::from_millis(wait));
        drop(gone);
    }
    drop(c);
    let mut c = pod.client();
    // Every container is either there, or was never asked for in full.
    wait_until(|| {
        c.state().containers.iter().filter(|s| s.phase == ContainerPhase::Running as i32).count() == 6
    });
    assert_eq!(inode(pod.dir.join("ns/net")), pin);
    pod.finish();
}

#[test]
fn a_killed_monitor_leaves_a_journal_that_can_be_cleaned() {
    let pod = Pod::new("killed");
    let mut c = pod.client();
    let init = create_sandbox(&mut c, full(&pod));
    pod.create(&mut c, "run", &["sleep", "1000"], shared(&pod));
    c.start("run");
    let run = c.container("run").pid;
    let own = pod.create_started(&mut c, "own", &["sleep", "1000"]);
    pod.create_started(&mut c, "gone", &["sh", "-c", "exit 9"]);
    c.wait_exit("gone");
    pod.create(&mut c, "made", &["sleep", "1000"], shared(&pod));
    let monitor = pod.monitor_pid();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(monitor).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    wait_until(|| c.recv().is_none());
    // Containers go on; the files tell what they are.
    for pid in [run, own, init] {
        assert!(Path::new(&format!("/proc/{pid}")).exists());
    }
    // The last line counts.
    let record = |id: &str| -> Value {
        let text = fs::read_to_string(pod.dir.join(format!("containers/{id}.json"))).unwrap();
        serde_json::from_str(text.lines().last().unwrap()).unwrap()
    };
    assert_eq!(record("run")["version"], 1);
    assert_eq!(
        (&record("run")["data"]["phase"], &record("run")["data"]["pid"]),
        (&json!("Running"), &json!(run))
    );
    assert_eq!(
        (&record("gone")["data"]["phase"], &record("gone")["data"]["exit_code"]),
        (&json!("Exited"), &json!(9))
    );
    assert_eq!(record("made")["data"]["phase"], "Created");
    assert!(record("run")["data"]["pid_start"].as_u64().unwrap() > 0);
    // A second monitor does not take the folder over, but says what to do.
    let again = pod.run(&["--dir"]);
    assert!(!again.status.success() && String::from_utf8_lossy(&again.stderr).contains("--cleanup"));
    for _ in 0..2 {
        let out = pod.run(&["--cleanup", "--dir"]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
    wait_until(|| {
        [run, own, init].iter().all(|p| !Path::new(&format!("/proc/{p}")).exists() || is_zombie(*p))
    });
    pod.assert_clean();
    pod.spawn();
    pod.finish();
}

/// Orphans of a killed monitor are reaped by the machine's init, at its leisure.
fn is_zombie(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|s| s.rsplit_once(')').unwrap().1.starts_with(" Z"))
}

/// A process of a starter that goes on, and the starter's socket.
fn attached(flag: &str, value: &Path) -> (std::process::Child, std::os::fd::OwnedFd) {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let mut command = std::process::Command::new(MONITOR);
    command.arg(flag).arg(value).stdin(theirs).stderr(std::process::Stdio::piped());
    (command.spawn().unwrap(), ours)
}

fn word(of: &std::os::fd::OwnedFd) -> String {
    let mut word = [0; 4096];
    let n = rustix::io::read(of, &mut word).unwrap();
    String::from_utf8_lossy(&word[..n]).into_owned()
}

/// What a starter that goes on hears, and the process that it started.
fn start_attached(dir: &Path) -> (std::process::Child, String) {
    let (child, ours) = attached("--dir", dir);
    (child, word(&ours))
}

#[test]
fn a_spare_one_serves_the_folder_that_it_is_told() {
    let pod = Pod::prepare("spare");
    let room = |bytes: usize| std::path::PathBuf::from(" ".repeat(bytes));
    let path = pod.dir.to_str().unwrap().as_bytes();
    let told = |child: &std::process::Child| {
        let line = fs::read(format!("/proc/{}/cmdline", child.id())).unwrap();
        line.windows(path.len() + 8).any(|w| w == [b"\0--dir\0", path, b"\0"].concat())
    };
    let (mut child, ours) = attached("--spare", &room(path.len()));
    assert!(!told(&child));
    rustix::io::write(&ours, path).unwrap();
    assert_eq!(word(&ours), "+");
    drop(ours);
    assert!(told(&child), "others find it by its arguments");
    assert_eq!(pod.monitor_pid(), child.id() as i32);
    let mut c = pod.client();
    pod.create(&mut c, "a", &["true"], json!({}));
    c.start("a");
    assert_eq!(c.wait_exit("a").exit_code, 0);
    // What it cannot be is said, and is its end: a folder that does not fit, one that is none, one that is served.
    for (bytes, dir, why) in [
        (path.len() - 3, path, "room"),
        (99, b"relative".as_slice(), "absolute"),
        (path.len(), path, "already"),
    ] {
        let (mut child, ours) = attached("--spare", &room(bytes));
        rustix::io::write(&ours, dir).unwrap();
        let word = word(&ours);
        assert!(word.starts_with('-') && word.contains(why), "{word}");
        assert!(!child.wait().unwrap().success());
    }
    // Its server is gone; nobody is its server.
    let (mut unneeded, ours) = attached("--spare", &room(9));
    drop(ours);
    assert!(unneeded.wait().unwrap().success());
    let alone = std::process::Command::new(MONITOR).args(["--spare", " "]).output().unwrap();
    let said = String::from_utf8_lossy(&alone.stderr);
    assert!(!alone.status.success() && said.contains("for servers"), "{said}");
    let end = std::thread::spawn(move || child.wait().unwrap());
    pod.finish();
    assert!(end.join().unwrap().success());
}

#[test]
fn a_starter_that_goes_on_is_its_parent() {
    let pod = Pod::prepare("attached");
    let (mut child, word) = start_attached(&pod.dir);
    assert_eq!(word, "+");
    let pid = child.id() as i32;
    assert_eq!(pod.monitor_pid(), pid);
    let of = |pid| rustix::process::getsid(rustix::process::Pid::from_raw(pid)).unwrap();
    assert_eq!(of(pid), rustix::process::Pid::from_raw(pid).unwrap(), "a session of its own");
    for fd in ["0", "1", "2"] {
        assert_eq!(fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap(), Path::new("/dev/null"));
    }
    let (mut second, word) = start_attached(&pod.dir);
    assert!(word.starts_with('-') && word.contains("already"), "{word}");
    assert!(!second.wait().unwrap().success());
    // Gone is only who has been reaped.
    let end = std::thread::spawn(move || child.wait().unwrap());
    pod.finish();
    assert!(end.join().unwrap().success());
}

#[test]
fn starting_fails_clearly() {
    let pod = Pod::new("start");
    let out = pod.run(&["--dir"]);
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("already"));
    let out = pod.run(&["--cleanup", "--dir"]);
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("serves"));
    let out = std::process::Command::new(MONITOR).args(["--dir", "/nonexistent/x"]).output().unwrap();
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("/nonexistent/x"));
    pod.finish();
}
