//! What goes on while the disk is full: what runs can be stopped and removed, ends are seen, and the records follow when there is room.
//! Needs root, `orlop-monitor` (`cargo build -p orlop-monitor`, or ORLOP_MONITOR) and busybox-static.

use std::fs;
use std::path::PathBuf;

use nix::sys::signal::Signal::{SIGKILL, SIGUSR1};
use orlop_proto::cri;

use crate::node::{Node, container_config, sandbox_config, wait_for};
use crate::pods::{lives, signal_monitor};

const CREATED: i32 = cri::ContainerState::ContainerCreated as i32;
const RUNNING: i32 = cri::ContainerState::ContainerRunning as i32;
const EXITED: i32 = cri::ContainerState::ContainerExited as i32;
const NOT_READY: i32 = cri::PodSandboxState::SandboxNotready as i32;

/// So long that no line of a record fits into what is left of its file's last page.
fn long() -> std::collections::HashMap<String, String> {
    [("long".to_owned(), "x".repeat(8000))].into()
}

fn pod_config(node: &Node, name: &str) -> cri::PodSandboxConfig {
    cri::PodSandboxConfig { annotations: long(), ..sandbox_config(node, name, false) }
}

fn config(name: &str, script: &str) -> cri::ContainerConfig {
    cri::ContainerConfig { annotations: long(), ..container_config(name, &["sh", "-c", script]) }
}

async fn phase_of(node: &Node, pod: &str) -> Option<i32> {
    node.pods().await.into_iter().find(|p| p.id == pod).map(|p| p.state)
}

/// `fill` is what a container does to its root file system, also when there is room again.
async fn ends_while_full(
    name: &str,
    fill: &str,
    is_full: fn(&nix::sys::statvfs::Statvfs) -> bool,
    records_fail: bool,
) {
    let mut node = Node::start_on_disk(name, "size=64m,nr_inodes=3000").await;
    node.network(false);
    let config_of = pod_config(&node, "main");
    let pod = node.run_pod(&config_of).await.unwrap();
    let forever = "exec sleep 1000";
    let ends = "trap 'exit 7' USR1; echo ready; while :; do sleep 0.1; done";
    let ends = node.run_container(&pod, config("ends", ends), &config_of).await;
    let stops = node.run_container(&pod, config("stops", forever), &config_of).await;
    let removed = node.run_container(&pod, config("removed", forever), &config_of).await;
    let starts = node.create(&pod, config("starts", forever), &config_of).await.unwrap();
    let mut others = Vec::new();
    for name in ["dies", "stopped"] {
        let config_of = pod_config(&node, name);
        let pod = node.run_pod(&config_of).await.unwrap();
        let id = node.run_container(&pod, config("main", forever), &config_of).await;
        others.push((pod, node.pid_of(&id).await, id));
    }
    let log = PathBuf::from(node.status(&ends).await.log_path);
    wait_for("the trap", || fs::read_to_string(&log).is_ok_and(|l| l.contains("ready"))).await;
    let fills = node.run_container(&pod, config("fills", fill), &config_of).await;
    let full = || is_full(&nix::sys::statvfs::statvfs(&node.dir).unwrap());
    wait_for("a full disk", full).await;

    let mut client = node.client().await;
    assert_eq!(node.status(&starts).await.state, CREATED);
    node.start_container(&starts).await.unwrap();
    assert_eq!(node.status(&starts).await.state, RUNNING);
    let pid = nix::unistd::Pid::from_raw(node.pid_of(&ends).await as i32);
    nix::sys::signal::kill(pid, SIGUSR1).unwrap();
    assert_eq!(node.ended(&ends).await.exit_code, 7);
    let record = node.dir.join("state/containers").join(&ends).join("container.json");
    let written = || {
        // Of what a failed write has left, the beginning is there.
        let text = fs::read_to_string(&record).unwrap();
        let mut whole = text.lines().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok());
        whole.next_back().is_some_and(|v| v["data"]["phase"] == "Exited")
    };
    assert_eq!(written(), !records_fail);
    for timeout in [1, 0] {
        let container_id = if timeout == 1 { &stops } else { &starts }.clone();
        let pid = node.pid_of(&container_id).await;
        let request = cri::StopContainerRequest { container_id: container_id.clone(), timeout };
        client.stop_container(request).await.unwrap();
        assert_eq!((node.status(&container_id).await.state, lives(pid)), (EXITED, false));
    }
    let request = cri::RemoveContainerRequest { container_id: removed.clone() };
    client.remove_container(request).await.unwrap();
    assert!(node.list(Some(&removed)).await.is_empty());

    let (dies, pid, id) = &others[0];
    signal_monitor(&node, dies, SIGKILL);
    assert_eq!(node.ended(id).await.exit_code, 255);
    assert_eq!((phase_of(&node, dies).await, lives(*pid)), (Some(NOT_READY), false));
    let (stopped, pid, id) = &others[1];
    client.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: stopped.clone() }).await.unwrap();
    assert_eq!(node.status(id).await.state, EXITED);
    assert_eq!((phase_of(&node, stopped).await, lives(*pid)), (Some(NOT_READY), false));
    for (pod, ..) in &others {
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: pod.clone() };
        client.remove_pod_sandbox(request).await.unwrap();
        assert_eq!(phase_of(&node, pod).await, None);
    }
    // What fills it can be removed, and then the record follows.
    client.remove_container(cri::RemoveContainerRequest { container_id: fills }).await.unwrap();
    assert!(!full());
    wait_for("the record", written).await;
    node.kill();
    node.restart(&[]).await;
    let status = node.status(&ends).await;
    assert_eq!((status.state, status.exit_code), (EXITED, 7));
    assert_eq!(node.pods().await.len(), 1);
    node.purge_and_check();
}

#[tokio::test]
async fn a_disk_without_room_keeps_nothing_running() {
    ends_while_full(
        "room",
        "while :; do cat /dev/zero >> /fill; sleep 0.01; done",
        |s| s.blocks_available() == 0,
        true,
    )
    .await;
}

#[tokio::test]
async fn a_disk_without_inodes_keeps_nothing_running() {
    let fill = "i=0; while :; do if true > /fill$i; then i=$((i+1)); else sleep 0.01; fi; done";
    ends_while_full("inodes", fill, |s| s.files_free() == 0, false).await;
}
