//! Published holes of container runtimes, as far as they concern a CRI server. Those of the OCI runtime are in the monitor's tests,
//! those of archives and registries in the images'.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::node::{Node, container_config, exec, sandbox_config, shell, wait_for, with_user_namespace};
use orlop_proto::cri;
use tonic::Code;

fn of_image(name: &str, image: &str) -> cri::ContainerConfig {
    let mut c = container_config(name, &["sleep", "1000"]);
    c.image = Some(cri::ImageSpec { image: image.into(), ..Default::default() });
    c
}

/// CVE-2022-23648: an image's volumes are no way to a file of the host. CVE-2019-19921: nor is its own /proc.
#[tokio::test]
async fn image_volumes_bring_nothing_from_the_host() {
    let node = Node::start("volumes", &[]).await;
    let secret = node.dir.join("secret");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("key"), "host's").unwrap();
    let outside = format!("/../../../../../../../../..{}", secret.display());
    node.add_image("localhost/volumes:1", |root, config| {
        symlink(format!("../../../../../../../../..{}", secret.display()), root.join("linked")).unwrap();
        config.volumes(vec![outside.clone(), "/linked".to_owned()])
    })
    .await;
    let config = sandbox_config(&node, "volumes", true);
    let pod = node.run_pod(&config).await.unwrap();
    let id = node.run_container(&pod, of_image("main", "localhost/volumes:1"), &config).await;
    let script =
        format!("cat /linked/key {outside}/key {}/key 2>/dev/null; find / -name key -xdev", secret.display());
    assert_eq!(shell(&node, &id, &format!("{script}; true")).await, "");
    // Links of an image used as a volume.
    for sub in ["linked", "../../..", "/etc"] {
        let mut c = container_config("sub", &["sleep", "1000"]);
        c.mounts = vec![cri::Mount {
            container_path: "/v".into(),
            image: Some(cri::ImageSpec { image: "localhost/volumes:1".into(), ..Default::default() }),
            image_sub_path: sub.into(),
            ..Default::default()
        }];
        let e = node.create(&pod, c, &config).await.unwrap_err();
        assert!(e.message().starts_with("ImageVolumeMountFailed: "), "{e}");
    }
    node.purge_and_check();
}

/// CVE-2024-40635: a user number that does not fit is refused and never becomes root. CVE-2023-25173: an image's user has the groups
/// that the image gives it. CVE-2022-29162: no capability is inheritable.
#[tokio::test]
async fn image_users_are_who_they_say() {
    let node = Node::start("users", &[]).await;
    let config = sandbox_config(&node, "users", true);
    let pod = node.run_pod(&config).await.unwrap();
    for (i, user) in
        ["4294967296", "2147483648", "-1", "0:4294967296", "4294967295:0", "www:nogroup", "big", "same"]
            .iter()
            .enumerate()
    {
        let image = format!("localhost/user{i}:1");
        node.add_image(&image, |root, config| {
            fs::write(
                root.join("etc/passwd"),
                "root:x:0:0::/:\nwww:x:33:33::/:\nbig:x:4294967295:0::/:\nsame:x:7:4294967295::/:\n",
            )
            .unwrap();
            config.user((*user).to_owned())
        })
        .await;
        let e = node.create(&pod, of_image("bad", &image), &config).await.unwrap_err();
        assert_eq!(e.code(), Code::InvalidArgument, "{user}: {e}");
    }
    node.add_image("localhost/grouped:1", |root, config| {
        fs::write(root.join("etc/group"), "root:x:0:\nwww:x:33:\nextra:x:77:www\nother:x:78:root\n").unwrap();
        config.user("www".to_owned())
    })
    .await;
    let id = node.run_container(&pod, of_image("grouped", "localhost/grouped:1"), &config).await;
    assert_eq!(
        shell(&node, &id, "id -u; id -G; grep CapInh /proc/self/status").await,
        "33\n33 77\nCapInh:\t0000000000000000"
    );
    let mut strict = of_image("strict", "localhost/grouped:1");
    strict
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
        .supplemental_groups_policy = cri::SupplementalGroupsPolicy::Strict as i32;
    let id = node.run_container(&pod, strict, &config).await;
    assert_eq!(shell(&node, &id, "id -G").await, "33");
    // An account file that leads out of the image is not read.
    node.add_image("localhost/linked:1", |root, config| {
        fs::remove_file(root.join("etc/passwd")).unwrap();
        symlink("/proc/1/root/etc/passwd", root.join("etc/passwd")).unwrap();
        config.user("daemon".to_owned())
    })
    .await;
    let e = node.create(&pod, of_image("linked", "localhost/linked:1"), &config).await.unwrap_err();
    assert_eq!(e.code(), Code::InvalidArgument, "{e}");
    node.purge_and_check();
}

/// CVE-2022-31030, CVE-2022-1708: what an exec prints is bounded.
#[tokio::test]
async fn an_exec_that_floods_is_cut() {
    let node = Node::start("flood", &[]).await;
    let config = sandbox_config(&node, "flood", true);
    let pod = node.run_pod(&config).await.unwrap();
    let id = node.run_container(&pod, container_config("main", &["sleep", "1000"]), &config).await;
    let mut client = node.client().await.max_decoding_message_size(64 << 20);
    let script = ["sh", "-c", "yes | head -c 20000000; yes | head -c 20000000 >&2; exit 3"];
    let done = exec(&mut client, &id, &script, 60).await.unwrap();
    // The kubelet takes no larger message.
    let (out, err) = (done.stdout.len(), done.stderr.len());
    assert!(out > 8 << 20 && err >= (4 << 20) - 1024 && out + err < 16 << 20, "{out} {err}");
    assert_eq!(done.exit_code, 3);
    node.purge_and_check();
}

/// CVE-2025-0750 and its kind: a container that has the pod's logs as a volume leads nobody to another file.
#[tokio::test]
async fn logs_follow_no_link() {
    let node = Node::start("logs", &[]).await;
    let config = sandbox_config(&node, "logs", true);
    let pod = node.run_pod(&config).await.unwrap();
    let (logs, elsewhere) = (node.dir.join("logs"), node.dir.join("elsewhere"));
    fs::create_dir(&elsewhere).unwrap();
    fs::write(elsewhere.join("file"), "untouched").unwrap();
    symlink(elsewhere.join("file"), logs.join("file.log")).unwrap();
    symlink(&elsewhere, logs.join("folder")).unwrap();
    for (i, path) in ["file.log", "folder/new.log", "../elsewhere/file", "/etc/x"].iter().enumerate() {
        let mut c = container_config(&format!("c{i}"), &["echo", "x"]);
        c.log_path = (*path).to_owned();
        let e = node.create(&pod, c, &config).await.unwrap_err();
        assert_eq!(e.code(), Code::InvalidArgument, "{path}: {e}");
    }
    // Neither after a rotation, nor when the folder above has become a link.
    let mut c = container_config("rotated", &["sh", "-c", "while :; do echo x; sleep 0.02; done"]);
    c.log_path = "good/0.log".into();
    let id = node.run_container(&pod, c, &config).await;
    wait_for("the first line", || fs::metadata(logs.join("good/0.log")).is_ok_and(|m| m.len() > 0)).await;
    fs::rename(logs.join("good"), logs.join("moved")).unwrap();
    symlink(&elsewhere, logs.join("good")).unwrap();
    let reopen = cri::ReopenContainerLogRequest { container_id: id.clone() };
    node.client().await.reopen_container_log(reopen).await.unwrap_err();
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 1);
    assert_eq!(fs::read_to_string(elsewhere.join("file")).unwrap(), "untouched");
    node.purge_and_check();
}

/// CVE-2022-0811: a sysctl's value sets nothing else, and its name reaches only what is the pod's own.
#[tokio::test]
async fn sysctls_stay_in_the_pod() {
    let node = Node::start("sysctl", &[]).await;
    node.network(false);
    let core_pattern = || fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    let before = core_pattern();
    for (name, value) in [
        ("kernel.shm_rmid_forced", "1+kernel.core_pattern=|/evil"),
        ("kernel.shm_rmid_forced", "1\nkernel.core_pattern=|/evil"),
        ("kernel.core_pattern", "|/evil"),
        ("kernel/core_pattern", "|/evil"),
        ("kernel.shm_rmid_forced+kernel.core_pattern", "|/evil"),
        ("net.ipv4/../../kernel/core_pattern", "|/evil"),
        ("vm.swappiness", "1"),
        ("fs.file-max", "1"),
    ] {
        let mut config = sandbox_config(&node, "sysctl", false);
        config.linux.get_or_insert_default().sysctls.insert(name.into(), value.into());
        let made = node.run_pod(&config).await;
        assert!(made.is_err(), "{name}={value:?}");
        assert_eq!(core_pattern(), before);
    }
    node.stop_and_check();
}

/// CVE-2020-15257: a container on the host's network finds no socket of ours. CVE-2021-41103, CVE-2024-25621: other users of the host
/// neither see pods nor their files.
#[tokio::test]
async fn others_on_the_machine_reach_nothing() {
    let node = Node::start("others", &[]).await;
    node.network(false);
    let plain = sandbox_config(&node, "plain", true);
    let mut mapped = sandbox_config(&node, "mapped", false);
    with_user_namespace(&mut mapped, 400_000);
    for config in [&plain, &mapped] {
        let pod = node.run_pod(config).await.unwrap();
        let mut c = container_config("main", &["sleep", "1000"]);
        c.envs.push(cri::KeyValue { key: "PASSWORD".into(), value: b"secret".to_vec() });
        let id = node.run_container(&pod, c, config).await;
        let run = node.dir.join("run/s");
        let inside = [
            run.clone(),
            run.join(&pod),
            run.join(&pod).join("monitor.sock"),
            run.join(&pod).join("bundles").join(&id).join("config.json"),
            run.join(&pod).join("bundles").join(&id).join("rootfs/bin/busybox"),
            node.dir.join("state/containers"),
            node.dir.join("state/containers").join(&id).join("container.json"),
            node.dir.join("state/sandboxes"),
            node.dir.join("state/sandboxes").join(&pod).join("sandbox.json"),
        ];
        for path in &inside {
            assert!(path.exists(), "{}", path.display());
            let read = Command::new("setpriv")
                .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "ls", "-ld"])
                .arg(if path.is_dir() { path.join(".") } else { path.clone() })
                .output()
                .unwrap();
            let list = Command::new("setpriv")
                .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "ls"])
                .arg(path)
                .output()
                .unwrap();
            // A folder may be passed through, never listed; a file is not even found.
            assert!(!list.status.success(), "{} can be listed or read", path.display());
            assert!(path.is_dir() || !read.status.success(), "{} can be found", path.display());
        }
        let socket = fs::metadata(run.join(&pod).join("monitor.sock")).unwrap();
        assert_eq!(socket.mode() & 0o077, 0);
    }
    assert_eq!(fs::metadata(node.dir.join("cri.sock")).unwrap().mode() & 0o007, 0);
    let unix = fs::read_to_string("/proc/net/unix").unwrap();
    let own = node.dir.file_name().unwrap().to_string_lossy().into_owned();
    let named: Vec<&str> = unix.lines().filter(|l| l.contains(&own)).collect();
    assert!(!named.is_empty() && !named.iter().any(|l| l.contains('@')), "{named:#?}");
    node.purge_and_check();
}

fn count(pid: u32, what: &str) -> usize {
    fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count()
}

/// CVE-2025-64329, CVE-2022-23471: attaching, or an exec that cannot start, leaves nothing behind when the client goes.
#[tokio::test]
async fn clients_that_vanish_leave_nothing_open() {
    let node = Node::start("leak", &[]).await;
    let config = sandbox_config(&node, "leak", true);
    let pod = node.run_pod(&config).await.unwrap();
    let mut c = container_config("main", &["sleep", "1000"]);
    (c.stdin, c.tty) = (true, true);
    let id = node.run_container(&pod, c, &config).await;
    let monitor = fs::read_to_string(node.dir.join("run/s").join(&pod).join("monitor.pid")).unwrap();
    let monitor: u32 = monitor.trim().parse().unwrap();
    let runs = || node.crictl(&["exec", "-s", &id, "ps"], "").contains("4322");
    let round = async || {
        // Nothing shows that a client is attached; one that goes too early makes this test weaker, and never fail.
        for client in [&["attach", id.as_str()][..], &["exec", "-i", "-t", &id, "sleep", "4322"]] {
            let begun = Instant::now();
            node.vanish(client, || begun.elapsed() > Duration::from_millis(500)).await;
        }
        assert!(!node.try_crictl(&["exec", "-t", &id, "/no/such/program"], "").0);
    };
    round().await;
    let settled = || (count(node.pid(), "fd"), count(monitor, "fd"));
    wait_for("the first clients' commands to end", || !runs()).await;
    let before = settled();
    for _ in 0..4 {
        round().await;
    }
    wait_for("descriptors to be closed", || {
        let now = settled();
        now.0 <= before.0 && now.1 <= before.1
    })
    .await;
    assert!(!runs());
    node.purge_and_check();
}

/// CVE-2019-16884: a volume does not stand in for the /proc through which a container is confined.
#[tokio::test]
async fn volumes_do_not_replace_proc() {
    let node = Node::start("proc", &[]).await;
    let config = sandbox_config(&node, "proc", true);
    let pod = node.run_pod(&config).await.unwrap();
    let fake = node.dir.join("fake");
    fs::create_dir_all(fake.join("self/attr")).unwrap();
    fs::write(node.dir.join("meminfo"), "MemTotal: 1 kB\n").unwrap();
    let with = |name: &str, host: &Path, at: &str| {
        let mut c = container_config(name, &["sleep", "1000"]);
        c.mounts = vec![cri::Mount {
            host_path: host.display().to_string(),
            container_path: at.into(),
            ..Default::default()
        }];
        c
    };
    for at in ["/proc", "/proc/", "//proc/./self", "/proc/self/attr", "/proc/sys/kernel"] {
        let e = node.create(&pod, with("bad", &fake, at), &config).await.unwrap_err();
        assert_eq!(e.code(), Code::InvalidArgument, "{at}: {e}");
    }
    let id =
        node.run_container(&pod, with("good", &node.dir.join("meminfo"), "/proc/meminfo"), &config).await;
    assert_eq!(shell(&node, &id, "cat /proc/meminfo").await, "MemTotal: 1 kB");
    node.purge_and_check();
}

/// What is too large for the kernel or for a message is refused, and the next call works.
#[tokio::test]
async fn what_is_too_large_is_refused() {
    let node = Node::start("large", &[]).await;
    let config = sandbox_config(&node, "large", true);
    let pod = node.run_pod(&config).await.unwrap();
    let mut c = container_config("env", &["sleep", "1000"]);
    // One variable may have 32 pages.
    c.envs.push(cri::KeyValue { key: "LARGE".into(), value: vec![b'x'; 200 << 10] });
    let id = node.create(&pod, c, &config).await.unwrap();
    let e = node.start_container(&id).await.unwrap_err();
    assert!(e.message().to_lowercase().contains("argument list too long"), "{e}");
    let mut c = container_config("labels", &["sleep", "1000"]);
    c.annotations.insert("large".into(), "x".repeat(17 << 20));
    let e = node.create(&pod, c, &config).await.unwrap_err();
    assert!(matches!(e.code(), Code::OutOfRange | Code::ResourceExhausted), "{e}");
    let mut c = container_config("fits", &["sleep", "1000"]);
    c.annotations.insert("large".into(), "x".repeat(1 << 20));
    let id = node.run_container(&pod, c, &config).await;
    assert_eq!(node.status(&id).await.annotations["large"].len(), 1 << 20);
    node.purge_and_check();
}
