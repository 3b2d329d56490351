//! Pods whose RuntimeClass names another OCI runtime.

use std::fs;
use std::path::Path;

use orlop_proto::cri;

use crate::node::{Node, container_config, exec, sandbox_config, shell, wait_for};

fn runc() -> String {
    let program = ["/usr/bin/runc", "/usr/sbin/runc"].into_iter().find(|p| Path::new(p).exists());
    format!("runc={}", program.expect("runc is missing: apt-get install runc"))
}

async fn node_with_runc(name: &str) -> Node {
    let mut node = Node::start(name, &[]).await;
    node.flags = vec!["--runtime-handler".into(), runc()];
    node.kill();
    node.restart(&[]).await;
    node
}

async fn run_pod(
    node: &Node,
    config: &cri::PodSandboxConfig,
    handler: &str,
) -> Result<String, tonic::Status> {
    let request =
        cri::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.to_owned() };
    Ok(node.client().await.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id)
}

#[tokio::test]
async fn handlers_are_told_and_checked() {
    let node = node_with_runc("handlers").await;
    let status = node.client().await.status(cri::StatusRequest::default()).await.unwrap().into_inner();
    let names: Vec<_> = status.runtime_handlers.iter().map(|h| h.name.as_str()).collect();
    assert_eq!(names, ["", "orlop", "runc"]);
    let config = sandbox_config(&node, "handlers", true);
    let refused = run_pod(&node, &config, "kata").await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    assert!(refused.message().contains("kata") && refused.message().contains("runc"), "{refused}");
    assert!(node.pods().await.is_empty());
    node.purge_and_check();
}

/// Beside the usual things: `ps` shows that the program did it, and the death of the server changes nothing.
#[tokio::test]
async fn a_pod_of_runc_lives_like_any_other() {
    let mut node = node_with_runc("runc").await;
    let config = sandbox_config(&node, "runc", true);
    let pod = run_pod(&node, &config, "runc").await.unwrap();
    let script = "trap 'echo bye; exit 7' TERM; echo hello; while :; do sleep 0.05; done";
    let id = node.run_container(&pod, container_config("main", &["sh", "-c", script]), &config).await;
    let own = node.dir.join("run/s").join(&pod).join("external/state").join(&id);
    assert!(own.is_dir(), "runc keeps its state at {}", own.display());
    assert_eq!(shell(&node, &id, "echo $((6 * 7))").await, "42");
    assert_eq!(exec(&mut node.client().await, &id, &["sh", "-c", "exit 3"], 5).await.unwrap().exit_code, 3);
    let brief = container_config("brief", &["sh", "-c", "sleep 0.6; exit 42"]);
    let brief = node.run_container(&pod, brief, &config).await;
    let pid = node.pid_of(&id).await;
    node.kill();
    tokio::time::sleep(std::time::Duration::from_millis(800)).await;
    node.restart(&[]).await;
    assert_eq!(node.pid_of(&id).await, pid);
    assert_eq!(node.ended(&brief).await.exit_code, 42);
    let mut client = node.client().await;
    let stats = cri::ContainerStatsRequest { container_id: id.clone() };
    let stats = client.container_stats(stats).await.unwrap().into_inner().stats.unwrap();
    assert!(stats.memory.unwrap().working_set_bytes.unwrap().value > 0);
    let resources = cri::LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..Default::default() };
    let update = cri::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(resources),
        ..Default::default()
    };
    client.update_container_resources(update).await.unwrap();
    let request = cri::StopContainerRequest { container_id: id.clone(), timeout: 10 };
    client.stop_container(request).await.unwrap();
    assert_eq!(node.ended(&id).await.exit_code, 7);
    let log = node.dir.join("logs/main.log");
    wait_for("the last line", || fs::read_to_string(&log).unwrap_or_default().contains(" bye")).await;
    let lines = fs::read_to_string(&log).unwrap();
    assert_eq!(lines.lines().count(), 2, "{lines}");
    node.purge_and_check();
}
