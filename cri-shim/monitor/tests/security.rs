//! What a container must not reach: system calls that its profile denies, and the published escapes, each tried.

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use common::*;
use orlop_proto::monitor::{client_frame::Body as Ask, server_frame::Body, *};
use serde_json::{Value, json};

/// Allows everything but making folders, which gets EACCES, and one call that ends the process.
fn no_folders() -> Value {
    json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}]})
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

const MAKE: &[&str] =
    &["sh", "-c", "busybox mkdir /tmp/d$$ 2>&1; grep -E 'Seccomp:|NoNewPrivs:' /proc/self/status"];

#[test]
fn seccomp_denies_in_start_and_in_exec() {
    let pod = Pod::new("seccomp");
    let mut c = pod.client();
    for (id, nnp, user) in
        [("plain", false, 0), ("nnp", true, 0), ("user", false, 1000), ("both", true, 1000)]
    {
        let process = json!({"noNewPrivileges": nnp, "user": {"uid": user, "gid": user}});
        let extra = json!({"process": process, "linux": {"seccomp": no_folders()}});
        let then_sleep = format!("{}; exec sleep 100", MAKE[2]);
        pod.create(&mut c, id, &["sh", "-c", &then_sleep], extra);
        c.start(id);
        wait_until(|| pod.log(id).len() == 3);
        let lines: Vec<String> = pod.log(id).into_iter().map(|l| l.2).collect();
        let flag = format!("NoNewPrivs:\t{}", u8::from(nnp));
        assert!(lines[0].contains("Permission denied"), "{id}: {lines:?}");
        assert_eq!(lines[1..], [flag.clone(), "Seccomp:\t2".into()], "{id}");
        let done = c.exec_with(Exec {
            container_id: id.into(),
            process: common::process(MAKE, process),
            ..Default::default()
        });
        let out = text(&done.stdout);
        assert!(
            out.contains("Permission denied") && out.contains("Seccomp:\t2") && out.contains(&flag),
            "{id}: {out}"
        );
        c.delete(id);
        assert!(fs::read_dir(pod.dir.join("oci")).unwrap().next().is_none(), "state of {id} is left");
    }
    // Without a profile nothing is denied.
    pod.create_started(&mut c, "free", &["sleep", "100"]);
    let out = text(&c.exec_sync("free", MAKE).stdout);
    assert!(out.contains("Seccomp:\t0") && !out.contains("denied"), "{out}");
    pod.finish();
}

/// A program that makes system call 9999 and exits with the error number.
#[cfg(target_arch = "x86_64")]
fn unknown_call() -> Vec<u8> {
    let code = [
        0xb8, 0x0f, 0x27, 0, 0, 0x0f, 0x05, // eax = 9999; syscall
        0xf7, 0xd8, 0x89, 0xc7, // edi = -eax
        0xb8, 0x3c, 0, 0, 0, 0x0f, 0x05, // eax = exit; syscall
    ];
    orlop_base::testkit::elf_program(&code)
}

/// Programs take ENOSYS as "not there" and use something older; EPERM would end them.
#[cfg(target_arch = "x86_64")]
#[test]
fn calls_newer_than_the_profile_are_unknown() {
    let pod = Pod::new("enosys");
    let mut c = pod.client();
    let program = pod.dir.join("rootfs/bin/unknown");
    fs::write(&program, unknown_call()).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let list = json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "syscalls": [
        {"names": ["execve", "exit", "exit_group", "write", "read"], "action": "SCMP_ACT_ALLOW"}]});
    // Without no_new_privs a profile must let the runtime finish, as with runc.
    let nnp = json!({"noNewPrivileges": true});
    pod.create(&mut c, "a", &["/bin/unknown"], json!({"process": nnp, "linux": {"seccomp": list}}));
    c.start("a");
    assert_eq!(c.wait_exit("a").exit_code, libc::ENOSYS);
    let bad = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]});
    let f = c.failure(Ask::CreateContainer(pod.bundle("b", &["true"], json!({"linux": {"seccomp": bad}}))));
    assert_eq!((f.stage.as_str(), f.kind), ("seccomp", FailureKind::Invalid as i32));
    pod.finish();
}

/// CVE-2019-5736: a container that is executed as the monitor's own program finds that file on a read-only mount which is in no
/// mount namespace, so neither it nor a handle that it keeps can ever be written.
#[test]
fn cve_2019_5736_the_monitors_program_cannot_be_written() {
    let pod = Pod::new("selfexe");
    let mut c = pod.client();
    let exe = format!("/proc/{}/exe", pod.monitor_pid());
    let flags = rustix::fs::statvfs(exe.as_str()).unwrap().f_flag;
    assert!(flags.contains(rustix::fs::StatVfsMountFlags::RDONLY), "{flags:?}");
    assert_eq!(fs::read_to_string(format!("/proc/{}/comm", pod.monitor_pid())).unwrap(), "orlop-monitor\n");
    let environment = fs::read(format!("/proc/{}/environ", pod.monitor_pid())).unwrap();
    assert!(environment.is_empty(), "{}", text(&environment));
    symlink("/proc/self/exe", pod.dir.join("rootfs/bin/evil")).unwrap();
    pod.create_started(&mut c, "a", &["sleep", "100"]);
    // The link leads to the monitor itself, which refuses to be called so; one that is not linked statically lacks its loader.
    let request =
        Exec { container_id: "a".into(), process: process(&["/bin/evil"], json!({})), ..Default::default() };
    match c.call(Ask::Exec(request)) {
        Body::ExecDone(d) => assert!(d.exit_code != 0 && text(&d.stderr).contains("orlop-monitor"), "{d:?}"),
        Body::Failure(f) => assert_eq!(f.errno, libc::ENOENT, "{f:?}"),
        other => panic!("{other:?}"),
    }
    pod.finish();
}

/// CVE-2024-21626: no descriptor of the runtime is open in a container, and none can be its working directory.
#[test]
fn cve_2024_21626_no_descriptor_leaks() {
    let pod = Pod::new("fds");
    let mut c = pod.client();
    pod.create_started(&mut c, "a", &["sleep", "100"]);
    assert_eq!(text(&c.exec_sync("a", &["ls", "/proc/1/fd"]).stdout), "0\n1\n2\n");
    // The last is the folder that it reads.
    assert_eq!(text(&c.exec_sync("a", &["ls", "/proc/self/fd"]).stdout), "0\n1\n2\n3\n");
    for fd in 3..24 {
        let cwd = json!({"cwd": format!("/proc/self/fd/{fd}")});
        let request =
            Exec { container_id: "a".into(), process: process(&["pwd"], cwd.clone()), ..Default::default() };
        let f = c.failure(Ask::Exec(request));
        assert_eq!(f.kind, FailureKind::Runtime as i32, "exec in fd {fd}: {f:?}");
        let bundle = pod.bundle("b", &["pwd"], json!({"process": cwd}));
        let f = c.failure(Ask::CreateContainer(bundle));
        assert_eq!(f.kind, FailureKind::Runtime as i32, "start in fd {fd}: {f:?}");
    }
    pod.finish();
}

/// Without hooks and with some.
fn both_ways(name: &str, try_in: impl Fn(&Pod)) {
    for hooked in [false, true] {
        let mut pod = Pod::new(name);
        pod.hooked = hooked;
        try_in(&pod);
        pod.finish();
    }
}

fn without_dev(id: &str, pod: &Pod, tty: bool) -> CreateContainer {
    let extra = json!({
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"maskedPaths": ["/proc/kcore"]},
    });
    CreateContainer { tty, ..pod.bundle(id, &["sleep", "100"], extra) }
}

/// CVE-2025-31133: what covers masked paths is checked to be the null device, whatever the image has at /dev/null.
#[test]
fn cve_2025_31133_masked_paths_are_covered_by_the_null_device() {
    both_ways("mask", |pod| {
        let mut c = pod.client();
        symlink("/proc/sys/kernel/core_pattern", pod.dir.join("rootfs/dev/null")).unwrap();
        c.failure(Ask::CreateContainer(without_dev("a", pod, false)));
        // With a /dev of its own, as every container of the server has, the path is empty.
        let masked = json!({"linux": {"maskedPaths": ["/proc/kcore", "/proc/keys"]}});
        pod.create(&mut c, "b", &["sleep", "100"], masked);
        c.start("b");
        assert_eq!(text(&c.exec_sync("b", &["cat", "/proc/keys"]).stdout), "");
    });
}

/// CVE-2025-52565: the terminal is not mounted over what an image's /dev/console leads to, and an exec does not take what lies
/// at /dev/ptmx for a terminal.
#[test]
fn cve_2025_52565_consoles_are_checked() {
    let pod = Pod::new("console");
    let mut c = pod.client();
    symlink("/etc/target", pod.dir.join("rootfs/dev/console")).unwrap();
    fs::write(pod.dir.join("rootfs/etc/target"), "mine").unwrap();
    c.failure(Ask::CreateContainer(without_dev("a", &pod, true)));
    assert_eq!(fs::read_to_string(pod.dir.join("rootfs/etc/target")).unwrap(), "mine");
    // A container that puts files in the places of its terminals.
    let fake = json!({"mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/dev/pts", "type": "tmpfs", "source": "tmpfs"}]});
    pod.create(&mut c, "b", &["sh", "-c", "echo > /dev/pts/ptmx; echo ready; exec sleep 100"], fake);
    c.start("b");
    wait_until(|| pod.log("b").iter().any(|l| l.2 == "ready"));
    let exec = Exec {
        container_id: "b".into(),
        process: process(&["sh"], json!({})),
        tty: true,
        ..Default::default()
    };
    let f = c.failure(Ask::Exec(exec));
    assert!(f.message.contains("multiplexer") || f.message.contains("console"), "{f:?}");
    pod.finish();
}

/// CVE-2025-52881 and CVE-2019-19921: /proc is only mounted on a folder of the image itself, so what is written to it later
/// reaches the kernel and not a file of the image's choice.
#[test]
fn cve_2025_52881_proc_is_a_real_one() {
    both_ways("proclink", |pod| {
        let mut c = pod.client();
        let proc = pod.dir.join("rootfs/proc");
        fs::remove_dir(&proc).unwrap();
        fs::create_dir(pod.dir.join("rootfs/fake")).unwrap();
        symlink("/fake", &proc).unwrap();
        let f = c.failure(Ask::CreateContainer(pod.bundle("a", &["true"], json!({}))));
        assert!(f.message.contains("proc"), "{f:?}");
    });
}

/// Links in an image cannot lead a mount out of it.
#[test]
fn mount_destinations_stay_inside() {
    both_ways("dest", |pod| {
        let mut c = pod.client();
        let outside = pod.dir.join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(pod.dir.join("given"), "given").unwrap();
        symlink(&outside, pod.dir.join("rootfs/absolute")).unwrap();
        symlink(
            "../../../../../../../../../..".to_owned() + outside.to_str().unwrap(),
            pod.dir.join("rootfs/relative"),
        )
        .unwrap();
        for (id, link) in [("a", "absolute"), ("r", "relative")] {
            let mut request = pod.bundle(id, &["sleep", "100"], json!({}));
            let file = Path::new(&request.bundle).join("config.json");
            let mut spec: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
            spec["mounts"]
                .as_array_mut()
                .unwrap()
                .push(json!({"destination": format!("/{link}/file"), "type": "bind",
            "source": pod.dir.join("given"), "options": ["bind"]}));
            fs::write(&file, spec.to_string()).unwrap();
            request.bundle = file.parent().unwrap().to_str().unwrap().into();
            // Refused, or kept inside: both are safe.
            if let Body::ContainerCreated(_) = c.call(Ask::CreateContainer(request)) {
                c.start(id);
                assert_eq!(text(&c.exec_sync(id, &["cat", &format!("/{link}/file")]).stdout), "given");
            }
            assert!(fs::read_dir(&outside).unwrap().next().is_none(), "{link} led outside");
        }
    });
}

/// A container in the pod's user namespace: root inside, nobody outside, in the start and in an exec.
#[test]
fn user_namespaces_hold_containers() {
    let pod = Pod::new("usernsc");
    let mut c = pod.client();
    let map = || vec![IdMap { container_id: 0, host_id: 700_000, size: 65536 }];
    let request = CreateSandbox {
        sandbox_id: "s".into(),
        new_net: true,
        new_ipc: true,
        new_uts: true,
        uid_map: map(),
        gid_map: map(),
        ..Default::default()
    };
    assert!(matches!(c.call(Ask::CreateSandbox(request)), Body::SandboxCreated(_)));
    let ns = |n: &str| pod.dir.join("ns").join(n);
    let ids = json!([{"containerID": 0, "hostID": 700_000, "size": 65536}]);
    let extra = json!({"linux": {
        "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "user", "path": ns("user")},
            {"type": "ipc", "path": ns("ipc")}, {"type": "uts", "path": ns("uts")}, {"type": "network", "path": ns("net")}],
        "uidMappings": ids, "gidMappings": ids, "seccomp": no_folders(),
    }});
    // The host's device of that name is shown, which must be the one that is meant.
    let mut other = extra.clone();
    other["linux"]["devices"] = json!([{"path": "/dev/zero", "type": "c", "major": 1, "minor": 3}]);
    let f = c.failure(Ask::CreateContainer(pod.bundle("d", &["true"], other)));
    assert_eq!(f.errno, libc::ENODEV, "{f:?}");
    let init = pod.create(&mut c, "a", &["sh", "-c", "id -u; exec sleep 100"], extra);
    c.start("a");
    wait_until(|| !pod.log("a").is_empty());
    assert_eq!(pod.log("a")[0].2, "0");
    let uid = |pid: u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        status.lines().find(|l| l.starts_with("Uid:")).unwrap().split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!(uid(init), "700000");
    let d = c.exec_sync("a", &["sh", "-c", "cat /proc/self/uid_map; id -u; busybox mkdir /tmp/x 2>&1"]);
    let out = text(&d.stdout);
    assert!(out.contains("700000") && out.contains("\n0\n") && out.contains("denied"), "{d:?}");
    let other = Exec {
        container_id: "a".into(),
        process: process(&["id", "-u"], json!({"user": {"uid": 1000, "gid": 1000}})),
        ..Default::default()
    };
    assert_eq!(text(&c.exec_with(other).stdout), "1000\n");
    pod.finish();
}

/// Limits that this process may not raise are cut to what it has, and the container runs.
#[test]
fn limits_are_set_and_clamped() {
    let pod = Pod::new("rlimit");
    let mut c = pod.client();
    let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    let limits = json!([{"type": "RLIMIT_NOFILE", "soft": u64::MAX, "hard": u64::MAX}, {"type": "RLIMIT_CORE", "soft": 5, "hard": 7}]);
    let extra = json!({"process": {"rlimits": limits}});
    let init = pod.create(&mut c, "a", &["sleep", "100"], extra);
    let text = fs::read_to_string(format!("/proc/{init}/limits")).unwrap();
    let line = |name: &str| {
        text.lines().find(|l| l.starts_with(name)).unwrap().split_whitespace().collect::<Vec<_>>()
    };
    assert_eq!(line("Max core file size")[4..6], ["5", "7"]);
    let hard = line("Max open files")[4].to_owned();
    let own = most.map_or("unlimited".to_owned(), |m| m.to_string());
    assert!(hard == "unlimited" || hard == own, "{hard} of {own}");
    c.start("a");
    pod.finish();
}
