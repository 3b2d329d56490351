//! What keeps a cluster from starting is said in one line, with a non-zero exit code, and leaves nothing half-made.

use std::net::TcpListener;
use std::process::Command;
use std::time::Duration;

use orlop_test_vms::{Cluster, program, refusal, root, run, wait_for};

#[test]
fn a_taken_port() {
    let c = Cluster::prepare(11);
    let taken = TcpListener::bind("0.0.0.0:17011").unwrap();
    let line = refusal(&mut c.command("up"));
    assert!(line.contains("17011"), "{line}");
    drop(taken);
}

#[test]
fn a_demo_that_cannot_start() {
    let c = Cluster::prepare(18);
    let manifests = c.path("data/server/manifests");
    std::fs::create_dir_all(&manifests).unwrap();
    let deployment = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web, namespace: default}\n\
        spec:\n  selector: {matchLabels: {app: web}}\n  template:\n    metadata: {labels: {app: web}}\n    \
        spec: {containers: [{name: web, image: orlop.local/none:1, imagePullPolicy: Never}]}\n";
    std::fs::write(manifests.join("web.yaml"), deployment).unwrap();
    // Long enough for a node to be Ready; what is waited for never comes.
    let line = refusal(c.command("up").args(["--detach", "--wait", "15"]));
    for words in ["not ready after 15 s", "web 0/1", "pod default/web-", "orlop.local/none:1", "orlop down"] {
        assert!(line.contains(words), "{words:?}: {line}");
    }
    assert!(line.contains(&*c.log().to_string_lossy()), "{line}");
}

#[test]
fn a_disk_too_full_for_pods() {
    let c = Cluster::prepare(19);
    let manifests = c.path("data/server/manifests");
    std::fs::create_dir_all(&manifests).unwrap();
    std::fs::copy(root().join("deploy/demo/demo.yaml"), manifests.join("demo.yaml")).unwrap();
    let config = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
        evictionHard: {nodefs.available: 100%}\nimageGCHighThresholdPercent: 100\n";
    std::fs::write(c.path("kubelet.yaml"), config).unwrap();
    let line = refusal(c.command("up").args(["--detach", "--wait", "15"]));
    let dir = c.path("kubelet");
    for words in ["web 0/2", "insufficient disk space", dir.to_str().unwrap(), "nodefs.available wants 100%"]
    {
        assert!(line.contains(words), "{words:?}: {line}");
    }
}

#[test]
fn a_data_folder_of_another_version() {
    let c = Cluster::prepare(12);
    let pki = c.path("data/server/pki");
    std::fs::create_dir_all(&pki).unwrap();
    std::fs::write(pki.join("version.json"), r#"{"version":99,"data":null}"#).unwrap();
    let line = refusal(&mut c.command("up"));
    assert!(line.contains("version 99") && line.contains("version.json"), "{line}");
}

#[test]
fn without_root() {
    let c = Cluster::prepare(13);
    let up = c.command("up");
    let mut unprivileged = Command::new("setpriv");
    unprivileged
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(up.get_program())
        .args(up.get_args());
    let line = refusal(&mut unprivileged);
    assert!(line.contains("root"), "{line}");
}

#[test]
fn a_broken_image_archive() {
    let dir = tempfile::tempdir().unwrap();
    let broken = dir.path().join("x.tar");
    std::fs::write(&broken, b"not an archive").unwrap();
    let line = refusal(
        Command::new(program("orlop"))
            .args(["image", "import"])
            .arg(&broken)
            .arg("--images-dir")
            .arg(dir.path().join("images")),
    );
    assert!(line.contains("x.tar"), "{line}");
}

#[test]
fn no_cri_server() {
    let line =
        refusal(Command::new(program("orlop")).args(["image", "ls", "--endpoint", "unix:///nowhere.sock"]));
    assert!(line.contains("/nowhere.sock"), "{line}");
}

#[test]
fn a_kernel_without_overlayfs() {
    let c = Cluster::prepare(14);
    // The kernel's list of file systems as another kernel would show it, for these processes alone.
    let hidden = |program: &Command| {
        let list = c.path("filesystems");
        let known = std::fs::read_to_string("/proc/filesystems").unwrap();
        let rest: Vec<&str> = known.lines().filter(|l| !l.ends_with("overlay")).collect();
        std::fs::write(&list, rest.join("\n")).unwrap();
        let mut there = Command::new("unshare");
        let script = "mount --bind \"$0\" /proc/filesystems && exec \"$@\"";
        there
            .args(["--mount", "sh", "-c", script])
            .arg(&list)
            .arg(program.get_program())
            .args(program.get_args());
        there
    };
    let mut check = Command::new(program("orlop"));
    check.arg("check");
    let out = hidden(&check).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("MISSING  file system: overlay is not there"), "{said}");
    assert!(said.contains("remedy: modprobe overlay, or use a kernel that has it"), "{said}");
    let line = refusal(&mut hidden(&c.command("up")));
    assert!(line.contains("overlay is not there") && line.contains("modprobe overlay"), "{line}");
    assert!(["data/server", "kubelet", "run"].iter().all(|f| !c.path(f).exists()), "half-made");
}

#[test]
fn a_wrong_kubelet_configuration() {
    let c = Cluster::prepare(15);
    for (text, says) in [
        ("maxPods: many", "maxPods: invalid type"),
        ("apiVersion: v1\nkind: Pod", "it must be kubelet.config.k8s.io/v1beta1"),
        ("evictionHard: {memory.available: lots}", "evictionHard.memory.available"),
        ("maxPods: [", "line 1"),
    ] {
        std::fs::write(c.path("kubelet.yaml"), text).unwrap();
        let line = refusal(&mut c.command("up"));
        assert!(line.contains("kubelet.yaml") && line.contains(says), "{line}");
        assert!(["data/server", "kubelet", "run"].iter().all(|f| !c.path(f).exists()), "half-made");
    }
}

#[test]
fn a_wrong_kubeconfig() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let broken = at("broken");
    std::fs::write(&broken, "clusters: [").unwrap();
    for file in [broken, at("absent")] {
        let mut agent = Command::new(program("orlop"));
        agent.arg("agent").arg("--kubeconfig").arg(&file);
        for (flag, name) in [
            ("--data-dir", "data"),
            ("--run-dir", "run"),
            ("--kubelet-dir", "kubelet"),
            ("--cni-conf-dir", "cni"),
        ] {
            agent.arg(flag).arg(at(name));
        }
        let line = refusal(&mut agent);
        assert!(line.contains(&*file.to_string_lossy()) && line.contains("kubeconfig"), "{line}");
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.file_name()).collect();
        assert_eq!(left, ["broken"], "half-made");
    }
}

/// A file system of its own for a data folder; goes with the value.
struct Disk(tempfile::TempDir);

impl Disk {
    fn new(options: &str) -> Disk {
        let dir = tempfile::tempdir().unwrap();
        run(Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(dir.path()));
        Disk(dir)
    }

    fn server(&self, port: u16) -> Command {
        let mut c = Command::new(program("orlop"));
        c.arg("server").arg("--data-dir").arg(self.0.path().join("data"));
        c.arg("--write-kubeconfig").arg(self.0.path().join("kubeconfig"));
        c.arg("--listen").arg(format!("127.0.0.1:{port}"));
        c
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

#[test]
fn a_data_folder_that_cannot_be_written() {
    let disk = Disk::new("ro");
    let line = refusal(&mut disk.server(17016));
    assert!(
        line.contains(&*disk.0.path().to_string_lossy()) && line.contains("Read-only file system"),
        "{line}"
    );
}

#[test]
fn a_full_disk() {
    let disk = Disk::new("size=300k");
    let line = refusal(&mut disk.server(17017));
    assert!(line.contains("No space left on device"), "{line}");
    // With room again, what the failed start left is good to go on with.
    run(Command::new("mount").args(["-o", "remount,size=64m"]).arg(disk.0.path()));
    let mut server = disk.server(17017).stderr(std::process::Stdio::null()).spawn().unwrap();
    let config = disk.0.path().join("kubeconfig");
    let answered = std::panic::catch_unwind(|| {
        wait_for("the API server answers", Duration::from_secs(20), || {
            let out = Command::new("kubectl")
                .arg("--kubeconfig")
                .arg(&config)
                .args(["get", "ns", "default", "-o", "name"])
                .output();
            out.is_ok_and(|o| o.stdout == b"namespace/default\n").then_some(())
        });
    });
    server.kill().unwrap();
    server.wait().unwrap();
    assert!(answered.is_ok(), "no server after the disk had room again");
}
