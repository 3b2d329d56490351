//! Monitors that are silent or dead, or whose server dies, at an awkward moment.
//! Needs root, `orlop-monitor` (`cargo build -p orlop-monitor`, or ORLOP_MONITOR) and busybox-static.

use std::fs;

use nix::sys::signal::Signal::{SIGCONT, SIGKILL, SIGSTOP};
use orlop_proto::cri;

use crate::node::{Node, container_config, sandbox_config, wait_for};
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
