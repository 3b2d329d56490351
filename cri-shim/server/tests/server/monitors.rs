//! Monitors that are silent or dead, or whose server dies, at an awkward moment.
//! Needs root, `orlop-monitor` (`cargo build -p orlop-monitor`, or ORLOP_MONITOR) and busybox-static.

use std::fs;

use nix::sys::signal::Signal::{SIGCONT, SIGKILL, SIGSTOP};
use orlop_proto::cri;

use crate::node::{Node, container_config, sandbox_config, shell, wait_for};
use crate::pods::{lives, signal_monitor};

const UNKNOWN: i32 = cri::ContainerState::ContainerUnknown as i32;
const RUNNING: i32 = cri::ContainerState::ContainerRunning as i32;
const EXITED: i32 = cri::ContainerState::ContainerExited as i32;

#[tokio::test]
async fn a_stop_that_was_cut_short_sees_how_containers_end() {
    let mut node = Node::start("cut", &[("ORLOP_FAILPOINTS", "stop-sandbox-before-kill=kill")]).await;
    let config = sandbox_config(&node, "cut", true);
    let pod = node.run_pod(&config).await.unwrap();
    let id = node.run_container(&pod, container_config("main", &["sleep", "1000"]), &config).await;
    let pid = node.pid_of(&id).await;
    let request = cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() };
    node.client().await.stop_pod_sandbox(request).await.unwrap_err();
    assert!(lives(pid));
    node.kill();
    node.restart(&[]).await;
    assert!(!lives(pid));
    let status = node.status(&id).await;
    // Seen, not concluded from the end of the pod.
    assert_eq!((status.state, status.exit_code, status.message.as_str()), (EXITED, 137, ""));
    node.purge_and_check();
}

#[tokio::test]
async fn a_start_without_an_answer_is_no_end() {
    let node = Node::start("unanswered", &[]).await;
    let config = sandbox_config(&node, "unanswered", true);
    let pod = node.run_pod(&config).await.unwrap();
    let mut ids = Vec::new();
    for name in ["again", "stopped"] {
        ids.push(node.create(&pod, container_config(name, &["sleep", "1000"]), &config).await.unwrap());
    }
    signal_monitor(&node, &pod, SIGSTOP);
    for done in futures::future::join_all(ids.iter().map(|id| node.start_container(id))).await {
        assert_eq!(done.unwrap_err().code(), tonic::Code::Unavailable);
    }
    for id in &ids {
        assert_eq!(node.status(id).await.state, UNKNOWN);
    }
    signal_monitor(&node, &pod, SIGCONT);
    node.start_container(&ids[0]).await.unwrap();
    let status = node.status(&ids[0]).await;
    assert_eq!((status.state, status.message.as_str()), (RUNNING, ""));
    let request = cri::StopContainerRequest { container_id: ids[1].clone(), timeout: 0 };
    node.client().await.stop_container(request).await.unwrap();
    assert_eq!(node.status(&ids[1]).await.state, EXITED);
    node.purge_and_check();
}

#[tokio::test]
async fn a_monitor_that_dies_during_a_creation_leaves_no_files() {
    let node =
        Node::start("dies", &[("ORLOP_FAILPOINTS", "create-container-before-create=sleep(1000)")]).await;
    let config = sandbox_config(&node, "dies", true);
    let pod = node.run_pod(&config).await.unwrap();
    let bundles = node.dir.join("run/s").join(&pod).join("bundles");
    let spec = || {
        fs::read_dir(&bundles).into_iter().flatten().flatten().any(|b| b.path().join("config.json").exists())
    };
    let (created, ()) =
        tokio::join!(node.create(&pod, container_config("main", &["sleep", "1000"]), &config), async {
            wait_for("the bundle", spec).await;
            signal_monitor(&node, &pod, SIGKILL);
        });
    created.unwrap_err();
    assert!(node.list(None).await.is_empty());
    for dir in ["images/rootfs", "state/containers"] {
        let left: Vec<_> = fs::read_dir(node.dir.join(dir)).unwrap().flatten().map(|e| e.path()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
    let request = cri::RemovePodSandboxRequest { pod_sandbox_id: pod };
    node.client().await.remove_pod_sandbox(request).await.unwrap();
    node.stop_and_check();
}

/// The monitor that waits for the server's next pod.
fn spare(node: &Node) -> Option<u32> {
    let children = format!("/proc/{0}/task/{0}/children", node.pid());
    // Any thread of the server may have started it.
    let tasks =
        fs::read_dir(format!("/proc/{}/task", node.pid())).unwrap_or_else(|e| panic!("{children}: {e}"));
    let lists = tasks.flatten().filter_map(|t| fs::read_to_string(t.path().join("children")).ok());
    let pids: Vec<u32> =
        lists.flat_map(|l| l.split(' ').filter_map(|p| p.parse().ok()).collect::<Vec<_>>()).collect();
    let is_spare = |pid: &u32| {
        fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|l| l.windows(9).any(|w| w == b"\0--spare\0"))
    };
    pids.into_iter().find(is_spare)
}

async fn next_spare(node: &Node) -> u32 {
    wait_for("a spare monitor", || spare(node).is_some()).await;
    spare(node).unwrap()
}

#[tokio::test]
async fn the_next_pod_takes_the_spare_monitor() {
    let mut node = Node::start("spare", &[]).await;
    assert_eq!(spare(&node), None, "none before the first pod");
    let monitor = |node: &Node, pod: &str| -> u32 {
        fs::read_to_string(node.dir.join("run/s").join(pod).join("monitor.pid"))
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    };
    let run = async |node: &Node, name: &str| {
        let config = sandbox_config(node, name, true);
        let pod = node.run_pod(&config).await.unwrap();
        let id = node.run_container(&pod, container_config("main", &["sleep", "1000"]), &config).await;
        assert_eq!(shell(node, &id, "echo $((6 * 7))").await, "42");
        pod
    };
    run(&node, "first").await;
    let waiting = next_spare(&node).await;
    let second = run(&node, "second").await;
    assert_eq!(monitor(&node, &second), waiting);
    let waiting = next_spare(&node).await;
    assert_ne!(monitor(&node, &second), waiting);
    // Somebody kills it, or holds it up: before the server looks, and after.
    let kill = |pid: u32| nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), SIGKILL).unwrap();
    kill(waiting);
    let third = run(&node, "third").await;
    assert_ne!(monitor(&node, &third), waiting);
    let waiting = next_spare(&node).await;
    // A stopped one is asked all the same, and dies only then.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(waiting as i32), SIGSTOP).unwrap();
    let fourth = tokio::join!(run(&node, "fourth"), async {
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        kill(waiting);
    });
    assert_ne!(monitor(&node, &fourth.0), waiting);
    // A server that ends, in whatever way, takes it along; one that starts finds the pods' monitors.
    let waiting = next_spare(&node).await;
    let gone = move || {
        !fs::exists(format!("/proc/{waiting}/cwd")).unwrap()
            || fs::read(format!("/proc/{waiting}/cmdline")).is_ok_and(|l| l.is_empty())
    };
    node.kill();
    wait_for("its end", gone).await;
    node.restart(&[]).await;
    assert_eq!(node.pods().await.iter().filter(|p| p.state == 0).count(), 4);
    run(&node, "fifth").await;
    let waiting = next_spare(&node).await;
    node.terminate().await;
    assert!(!fs::exists(format!("/proc/{waiting}")).unwrap(), "a server that is told to end waits for it");
    node.purge_and_check();
}
