//! Records on disk that do not fit together, and those of a later release.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::node::{Node, container_config, exec, sandbox_config, shell, wait_for};
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

const DAMAGES: [&str; 6] = ["empty", "start", "half", "garbage", "folder", "missing"];

fn damage(file: &Path, how: &str) {
    let bytes = fs::read(file).unwrap();
    match how {
        "empty" => fs::write(file, "").unwrap(),
        "start" => fs::write(file, &bytes[..bytes.len().min(40) - 1]).unwrap(),
        "half" => fs::write(file, &bytes[..bytes.len() / 2]).unwrap(),
        "garbage" => fs::write(file, [0xff; 300]).unwrap(),
        _ => fs::remove_file(file).unwrap(),
    }
    if how == "folder" {
        fs::create_dir(file).unwrap();
        fs::write(file.join("in-the-way"), "").unwrap();
    }
}

/// What runs goes on running, under its name, with its files, whichever file of state is damaged in whichever way.
#[tokio::test]
async fn what_runs_outlives_its_records() {
    let mut node = Node::start("damage", &[]).await;
    node.network(false);
    let config = sandbox_config(&node, "damage", false);
    let pod = node.run_pod(&config).await.unwrap();
    let run = |name: &str| container_config(name, &["sleep", "1000"]);
    let id = node.run_container(&pod, run("runs"), &config).await;
    let pid = node.pid_of(&id).await;
    shell(&node, &id, "echo mine > /file").await;
    let ended = node.run_container(&pod, container_config("ended", &["sh", "-c", "exit 3"]), &config).await;
    assert_eq!(node.ended(&ended).await.exit_code, 3);
    let made = node.create(&pod, run("made"), &config).await.unwrap();
    let images = node.dir.join("images");
    let layers = fs::read_dir(images.join("layers")).unwrap().flatten().map(|e| e.path().join("layer.json"));
    let rootfs = |id: &str| images.join("rootfs").join(id).join("rootfs.json");
    let groups: Vec<(&str, Vec<PathBuf>)> = vec![
        ("sandbox", vec![sandbox_file(&node, &pod)]),
        ("containers", [&id, &ended, &made].map(|c| container_file(&node, c)).to_vec()),
        ("all records", vec![sandbox_file(&node, &pod), container_file(&node, &id)]),
        ("root file systems", [&id, &ended, &made].map(|c| rootfs(c)).to_vec()),
        ("layers", layers.filter(|f| f.exists()).collect()),
        ("images", vec![images.join("images.json")]),
    ];
    for (what, files) in &groups {
        for how in DAMAGES {
            node.kill();
            files.iter().for_each(|f| damage(f, how));
            node.restart(&[]).await;
            let case = format!("{what}, {how}");
            for file in files {
                let aside = PathBuf::from(format!("{}.damaged", file.display()));
                let said = how == "missing" || node.log().contains(aside.to_str().unwrap());
                assert!(said && (how == "missing" || aside.exists()), "{case}: {}", node.log());
                assert!(file.is_file(), "{case}: {}", file.display());
            }
            assert_eq!(node.pods().await.len(), 1, "{case}: {}", node.log());
            let states: Vec<_> =
                node.list(None).await.into_iter().map(|c| (c.id.clone(), c.state())).collect();
            for (c, state) in [
                (&id, cri::ContainerState::ContainerRunning),
                (&ended, cri::ContainerState::ContainerExited),
                (&made, cri::ContainerState::ContainerCreated),
            ] {
                assert!(states.contains(&(c.clone(), state)), "{case}: {states:?}: {}", node.log());
            }
            assert_eq!(node.status(&ended).await.exit_code, 3, "{case}");
            assert_eq!(node.pid_of(&id).await, pid, "{case}");
            assert_eq!(shell(&node, &id, "cat /file").await, "mine", "{case}");
            // Its name is taken, and a new one can be made and goes.
            assert_eq!(node.run_pod(&config).await.unwrap_err().code(), Code::AlreadyExists, "{case}");
            let e = node.create(&pod, run("runs"), &config).await.unwrap_err();
            assert_eq!(e.code(), Code::AlreadyExists, "{case}: {e}");
            let new = node.run_container(&pod, run("new"), &config).await;
            let request = cri::RemoveContainerRequest { container_id: new };
            node.client().await.remove_container(request).await.unwrap();
        }
    }
    node.start_container(&made).await.unwrap();
    assert_eq!(shell(&node, &made, "echo runs").await, "runs");
    node.purge_and_check();
}

#[tokio::test]
async fn a_pod_goes_without_what_the_network_told() {
    let mut node = Node::start("nocache", &[]).await;
    node.network(false);
    let config = sandbox_config(&node, "nocache", false);
    for (n, how) in DAMAGES.into_iter().enumerate() {
        let pod = node.run_pod(&config).await.unwrap();
        let file = node.dir.join("cni").join(format!("{pod}:eth0.json"));
        node.kill();
        damage(&file, how);
        node.restart(&[]).await;
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: pod };
        node.client().await.remove_pod_sandbox(request).await.unwrap_or_else(|e| panic!("{how}: {e}"));
        let calls = fs::read_to_string(node.dir.join("cni.log")).unwrap();
        assert_eq!(calls.matches("DEL").count(), n + 1, "{how}: {calls}");
        assert!(!file.exists(), "{how}");
    }
    node.purge_and_check();
}

/// Files of the run folder: what runs goes on without them, and goes without them. Only a new process in the container needs its
/// specification.
#[tokio::test]
async fn a_pod_goes_on_and_ends_without_its_run_files() {
    let mut node = Node::start("runfiles", &[]).await;
    let config = sandbox_config(&node, "runfiles", true);
    for how in DAMAGES {
        let pod = node.run_pod(&config).await.unwrap();
        let id = node.run_container(&pod, container_config("main", &["sleep", "1000"]), &config).await;
        let run_dir = node.dir.join("run/s").join(&pod);
        let monitor = fs::read_to_string(run_dir.join("monitor.pid")).unwrap();
        let pids = [node.pid_of(&id).await.to_string(), monitor.trim().to_owned()];
        node.kill();
        damage(&run_dir.join("monitor.pid"), how);
        node.restart(&[]).await;
        let state = node.status(&id).await.state;
        assert_eq!(state, cri::ContainerState::ContainerRunning as i32, "{how}: {}", node.log());
        assert_eq!(shell(&node, &id, "echo on").await, "on", "{how}");
        damage(&run_dir.join("bundles").join(&id).join("config.json"), how);
        let e = exec(&mut node.client().await, &id, &["true"], 5).await.unwrap_err();
        assert!(e.message().contains("config.json"), "{how}: {e}");
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: pod.clone() };
        node.client().await.remove_pod_sandbox(request).await.unwrap_or_else(|e| panic!("{how}: {e}"));
        let lives = |pid: &String| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|l| !l.is_empty());
        wait_for("the end of the pod's processes", || !pids.iter().any(lives)).await;
        assert!(!run_dir.exists(), "{how}");
    }
    node.purge_and_check();
}

/// A record that is damaged together with its copy is as good as none: what it was about goes, and nothing of it stays.
#[tokio::test]
async fn what_nothing_is_known_of_goes() {
    let mut node = Node::start("unknown", &[]).await;
    let copy = |file: PathBuf| file.with_file_name("answered.json");
    // In half of a file, an earlier state may be whole.
    for how in DAMAGES.into_iter().filter(|how| *how != "half") {
        let config = sandbox_config(&node, "unknown", true);
        let pod = node.run_pod(&config).await.unwrap();
        let run = |name: &str| container_config(name, &["sleep", "1000"]);
        let id = node.run_container(&pod, run("gone"), &config).await;
        let stays = node.run_container(&pod, run("stays"), &config).await;
        let (pid, other) = (node.pid_of(&id).await, node.pid_of(&stays).await);
        node.kill();
        let file = container_file(&node, &id);
        [file.clone(), copy(file)].iter().for_each(|f| damage(f, how));
        node.restart(&[]).await;
        let left: Vec<String> = node.list(None).await.into_iter().map(|c| c.id).collect();
        assert_eq!(left, std::slice::from_ref(&stays), "{how}");
        assert_eq!(node.pid_of(&stays).await, other);
        // Whoever inherits it may not have waited for it yet.
        let lives = fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty());
        assert!(!lives, "{how}: {pid} runs on");
        assert!(!node.dir.join("images/rootfs").join(&id).exists(), "{how}");
        node.run_container(&pod, run("gone"), &config).await;
        node.kill();
        let file = sandbox_file(&node, &pod);
        [file.clone(), copy(file)].iter().for_each(|f| damage(f, how));
        node.restart(&[]).await;
        assert!(node.pods().await.is_empty() && node.list(None).await.is_empty(), "{how}: {}", node.log());
    }
    node.purge_and_check();
}
