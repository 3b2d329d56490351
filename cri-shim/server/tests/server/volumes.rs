//! Volumes: owners in user namespaces, read-only down to the last mount, and who sees whose mounts.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use crate::node::{Node, container_config, sandbox_config, shell, with_user_namespace};
use nix::mount::{MsFlags, mount};
use orlop_proto::cri;
use tonic::Code;

fn volume(host: &Path, at: &str) -> cri::Mount {
    cri::Mount { host_path: host.display().to_string(), container_path: at.into(), ..Default::default() }
}

/// A tmpfs of the test's own, gone with this value.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn at(path: PathBuf) -> Tmpfs {
        fs::create_dir_all(&path).unwrap();
        mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        Tmpfs(path)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

fn privileged(mut c: cri::ContainerConfig) -> cri::ContainerConfig {
    let security = c.linux.get_or_insert_default().security_context.get_or_insert_default();
    security.capabilities =
        Some(cri::Capability { add_capabilities: vec!["SYS_ADMIN".into()], ..Default::default() });
    c
}

#[tokio::test]
async fn volumes_of_a_user_namespace_have_its_owners() {
    let node = Node::start("idmap", &[]).await;
    node.network(false);
    let volume_dir = Tmpfs::at(node.dir.join("volume"));
    mount(None::<&str>, &volume_dir.0, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
    let below = Tmpfs::at(volume_dir.0.join("below"));
    for (name, owner) in [("root", 0), ("user", 33), ("below/deep", 0)] {
        let path = volume_dir.0.join(name);
        fs::write(&path, name).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        chown(&path, Some(owner), Some(owner)).unwrap();
    }
    let single = node.dir.join("single");
    fs::write(&single, "single").unwrap();
    fs::set_permissions(&single, fs::Permissions::from_mode(0o600)).unwrap();
    let mut config = sandbox_config(&node, "idmap", false);
    let map = with_user_namespace(&mut config, 300_000);
    let pod = node.run_pod(&config).await.unwrap();
    let translated = |m: cri::Mount| cri::Mount { uid_mappings: map.clone(), gid_mappings: map.clone(), ..m };
    let mut c = container_config("main", &["sleep", "1000"]);
    c.mounts = vec![
        translated(volume(&volume_dir.0, "/v")),
        translated(volume(&single, "/single")),
        volume(&volume_dir.0, "/plain"),
    ];
    let id = node.run_container(&pod, c, &config).await;
    let script = "cat /v/root /v/below/deep /single; echo; stat -c %u:%g /v/root /v/user /plain/root; touch /v/made; cat /plain/root 2>/dev/null || echo refused";
    assert_eq!(
        shell(&node, &id, script).await.replace('\n', " "),
        "rootbelow/deepsingle 0:0 33:33 65534:65534 refused"
    );
    let made = fs::metadata(volume_dir.0.join("made")).unwrap();
    assert_eq!((made.uid(), made.gid()), (0, 0));

    let other = vec![cri::IdMapping { host_id: 1, container_id: 0, length: 65536 }];
    let mut c = container_config("other", &["sleep", "1000"]);
    c.mounts = vec![cri::Mount { uid_mappings: other.clone(), gid_mappings: other, ..volume(&single, "/s") }];
    assert_eq!(node.create(&pod, c, &config).await.unwrap_err().code(), Code::InvalidArgument);
    // sysfs knows no translated owners.
    let mut c = container_config("sys", &["sleep", "1000"]);
    c.mounts = vec![translated(volume(Path::new("/sys/kernel/mm"), "/mm"))];
    let e = node.create(&pod, c, &config).await.unwrap_err();
    assert_eq!(e.code(), Code::FailedPrecondition, "{e}");
    assert!(e.message().contains("/sys/kernel/mm"), "{e}");
    node.purge_and_check();
    // What the host had mounted below the volume is still there.
    assert_eq!(fs::read_to_string(below.0.join("deep")).unwrap(), "below/deep");
}

#[tokio::test]
async fn read_only_reaches_as_far_as_asked_for() {
    let node = Node::start("rro", &[]).await;
    let dir = Tmpfs::at(node.dir.join("volume"));
    let _below = Tmpfs::at(dir.0.join("below"));
    let config = sandbox_config(&node, "rro", true);
    let pod = node.run_pod(&config).await.unwrap();
    let readonly = |recursive_read_only| cri::Mount {
        readonly: true,
        recursive_read_only,
        ..volume(&dir.0, if recursive_read_only { "/rro" } else { "/ro" })
    };
    let mut c = container_config("main", &["sleep", "1000"]);
    c.mounts = vec![readonly(false), readonly(true)];
    let id = node.run_container(&pod, c, &config).await;
    let script =
        "for d in /ro /ro/below /rro /rro/below; do touch $d/x 2>/dev/null && echo yes || echo no; done";
    assert_eq!(shell(&node, &id, script).await, "no\nyes\nno\nno");
    let mounts = node.status(&id).await.mounts;
    assert_eq!(mounts.iter().map(|m| m.recursive_read_only).collect::<Vec<_>>(), [false, true]);
    node.purge_and_check();
}

#[tokio::test]
async fn mounts_propagate_as_asked_for() {
    let node = Node::start("propagation", &[]).await;
    let dir = Tmpfs::at(node.dir.join("volume"));
    mount(None::<&str>, &dir.0, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
    for name in ["host", "both"] {
        fs::create_dir(dir.0.join(name)).unwrap();
    }
    let config = sandbox_config(&node, "propagation", true);
    let pod = node.run_pod(&config).await.unwrap();
    let mut c = privileged(container_config("main", &["sleep", "1000"]));
    c.mounts = [("/private", 0), ("/slave", 1), ("/shared", 2)]
        .map(|(at, propagation)| cri::Mount { propagation, ..volume(&dir.0, at) })
        .to_vec();
    let id = node.run_container(&pod, c, &config).await;
    let host = Tmpfs::at(dir.0.join("host"));
    fs::write(host.0.join("seen"), "").unwrap();
    let script = "for d in private slave shared; do test -e /$d/host/seen && echo yes || echo no; done; \
        mount -t tmpfs none /shared/both && touch /shared/both/seen; mount -t tmpfs none /slave/host && touch /slave/host/unseen; true";
    assert_eq!(shell(&node, &id, script).await, "no\nyes\nyes");
    assert!(dir.0.join("both/seen").exists() && !dir.0.join("host/unseen").exists());
    nix::mount::umount2(&dir.0.join("both"), nix::mount::MntFlags::MNT_DETACH).unwrap();
    // A mount that cannot pass anything on is refused by name.
    let alone = Tmpfs::at(node.dir.join("alone"));
    mount(None::<&str>, &alone.0, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>).unwrap();
    for propagation in [1, 2] {
        let mut c = container_config("alone", &["sleep", "1000"]);
        c.mounts = vec![cri::Mount { propagation, ..volume(&alone.0, "/a") }];
        let e = node.create(&pod, c, &config).await.unwrap_err();
        assert_eq!(e.code(), Code::InvalidArgument);
        assert!(e.message().contains("make-rshared"), "{e}");
    }
    node.purge_and_check();
}
