//! Records on disk that do not fit together, and those of a later release.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::node::{Node, container_config, sandbox_config, shell};
use orlop_proto::cri;
use tonic::Code;

fn sandbox_file(node: &Node, id: &str) -> PathBuf {
    node.dir.join("state/sandboxes").join(id).join("sandbox.json")
}

fn container_file(node: &Node, id: &str) -> PathBuf {
    node.dir.join("state/containers").join(id).join("container.json")
}

/// The same record once more, under another id.
fn copy(file: &Path, id: &str, other: &str) {
    let text = fs::read_to_string(file).unwrap().replace(id, other);
    let copy = PathBuf::from(file.to_string_lossy().replace(id, other));
    fs::create_dir(copy.parent().unwrap()).unwrap();
    fs::write(copy, text).unwrap();
}

#[tokio::test]
async fn a_name_that_two_records_claim_is_free_after_both() {
    // Which of the two is looked at first, the file system decides; so it is removed first and last.
    let mut node = Node::start("twice", &[]).await;
    for (round, real_first) in [true, false].into_iter().enumerate() {
        let config = sandbox_config(&node, &format!("twice{round}"), true);
        let pod = node.run_pod(&config).await.unwrap();
        let id = node.run_container(&pod, container_config("main", &["sleep", "1000"]), &config).await;
        let pid = node.pid_of(&id).await;
        node.kill();
        let (other_pod, other) = (format!("{round}").repeat(64), format!("{}", round + 2).repeat(64));
        copy(&sandbox_file(&node, &pod), &pod, &other_pod);
        copy(&container_file(&node, &id), &id, &other);
        node.restart(&[]).await;
        // Nothing of it is touched, and each can be seen.
        let pods: BTreeSet<String> = node.pods().await.into_iter().map(|p| p.id).collect();
        assert_eq!(pods, BTreeSet::from([pod.clone(), other_pod.clone()]));
        assert_eq!(node.pid_of(&id).await, pid);
        assert_eq!(shell(&node, &id, "echo runs").await, "runs");
        assert_eq!(node.status(&other).await.state, cri::ContainerState::ContainerExited as i32);
        assert!(node.log().contains("two records have the same name"), "{}", node.log());
        let mut client = node.client().await;
        let new = || node.create(&pod, container_config("main", &["sleep", "1000"]), &config);
        let containers = if real_first { [&id, &other] } else { [&other, &id] };
        for container in containers {
            assert_eq!(new().await.unwrap_err().code(), Code::AlreadyExists);
            let request = cri::RemoveContainerRequest { container_id: container.clone() };
            client.remove_container(request).await.unwrap();
        }
        new().await.unwrap();
        for pod in if real_first { [&pod, &other_pod] } else { [&other_pod, &pod] } {
            assert_eq!(node.run_pod(&config).await.unwrap_err().code(), Code::AlreadyExists);
            let request = cri::RemovePodSandboxRequest { pod_sandbox_id: pod.clone() };
            client.remove_pod_sandbox(request).await.unwrap();
        }
        let pod = node.run_pod(&config).await.unwrap();
        client.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: pod }).await.unwrap();
    }
    assert!(node.pods().await.is_empty() && node.list(None).await.is_empty());
    node.purge_and_check();
}

#[tokio::test]
async fn a_container_without_its_sandbox_goes() {
    let mut node = Node::start("orphan", &[]).await;
    node.network(false);
    let mut left = Vec::new();
    for name in ["lives", "gone"] {
        let config = sandbox_config(&node, name, false);
        let pod = node.run_pod(&config).await.unwrap();
        let id = node.run_container(&pod, container_config("main", &["sleep", "1000"]), &config).await;
        let pid = node.pid_of(&id).await;
        left.push((pod, id, pid));
    }
    node.kill();
    for (pod, ..) in &left {
        fs::remove_dir_all(node.dir.join("state/sandboxes").join(pod)).unwrap();
    }
    // Of one pod, not even the monitor is there.
    let monitor = fs::read_to_string(node.dir.join("run/s").join(&left[1].0).join("monitor.pid")).unwrap();
    let monitor = nix::unistd::Pid::from_raw(monitor.trim().parse().unwrap());
    nix::sys::signal::kill(monitor, nix::sys::signal::Signal::SIGKILL).unwrap();
    node.restart(&[]).await;
    assert!(node.pods().await.is_empty() && node.list(None).await.is_empty());
    for (pod, id, pid) in &left {
        let lives = fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty());
        assert!(!lives, "{pid} of {pod} runs on");
        for path in [
            node.dir.join("run/s").join(pod),
            node.dir.join("state/containers").join(id),
            node.dir.join("images/rootfs").join(id),
        ] {
            assert!(!path.exists(), "{} is left", path.display());
        }
    }
    // The network was told, and the names are free.
    let calls = fs::read_to_string(node.dir.join("cni.log")).unwrap();
    assert_eq!(calls.matches("DEL").count(), 2, "{calls}");
    for name in ["lives", "gone"] {
        node.run_pod(&sandbox_config(&node, name, false)).await.unwrap();
    }
    node.purge_and_check();
}

#[tokio::test]
async fn state_of_a_later_release_is_left_alone() {
    let mut node = Node::start("later", &[]).await;
    node.network(false);
    let config = sandbox_config(&node, "later", false);
    let pod = node.run_pod(&config).await.unwrap();
    let id = node.run_container(&pod, container_config("main", &["sleep", "1000"]), &config).await;
    let pid = node.pid_of(&id).await;
    node.kill();
    let images = node.dir.join("images");
    let layer = fs::read_dir(images.join("layers")).unwrap().flatten().map(|e| e.path().join("layer.json"));
    let layer = layer.into_iter().find(|f| f.exists()).unwrap();
    for file in [
        sandbox_file(&node, &pod),
        container_file(&node, &id),
        images.join("images.json"),
        layer,
        images.join("rootfs").join(&id).join("rootfs.json"),
        node.dir.join("cni").join(format!("{pod}:eth0.json")),
    ] {
        let text = fs::read_to_string(&file).unwrap();
        let later = text.replace("\"version\":1,", "\"version\":2,");
        assert_ne!(text, later, "{}", file.display());
        fs::write(&file, &later).unwrap();
        let said = node.refusal();
        let clear = format!("{} is of version 2, this program reads version 1", file.display());
        assert!(said.contains(&clear), "{said}");
        assert_eq!(fs::read_to_string(&file).unwrap(), later);
        assert!(Path::new(&format!("/proc/{pid}")).exists(), "{} ended what runs", file.display());
        fs::write(&file, text).unwrap();
    }
    node.restart(&[]).await;
    assert_eq!(node.pid_of(&id).await, pid);
    assert_eq!(shell(&node, &id, "echo runs").await, "runs");
    assert_eq!(fs::read_to_string(node.dir.join("cni.log")).unwrap(), "ADD\n");
    node.purge_and_check();
}
