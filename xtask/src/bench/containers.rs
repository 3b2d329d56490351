//! One container's life in a sandbox that is there: create, start, wait for its end, remove; beside the command lines of OCI runtimes,
//! which do the same in one `run`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use orlop_proto::cri;
use orlop_test_vms::root;
use serde_json::json;

use super::node::{Network, Node, run as command};
use super::table::{Goal, Table, Times};
use super::{Options, Result, block_on, text};

const IMAGE: &str = "orlop.local/demo-web:latest";
/// Ends the demo's program at once: without a port there is no name to look up.
const NO_ADDRESS: &str = "none";

pub fn run(options: &Options) -> Result<Vec<Table>> {
    let ours = block_on(over_cri(options.containers))?;
    let mut tables = Vec::new();
    for (name, goal) in [("runc", Some(Goal::Times(1.0))), ("crun", None)] {
        let theirs = oci_cycles(name, options.containers)?;
        let title = format!("one container's life, {} times", options.containers);
        let mut table = Table::new(title, theirs.as_ref().map(|_| format!("{name} run")).as_deref());
        table.times("create, start, end, remove", &ours, theirs.as_ref(), [goal, None]);
        tables.push(table);
    }
    Ok(tables)
}

async fn over_cri(count: usize) -> Result<Times> {
    let archive = root().join("target/demo/demo-web.tar");
    let node = Node::orlop(&[&archive]).await?;
    let times = cycles(&node, count).await;
    node.end().await?;
    times
}

async fn cycles(node: &Node, count: usize) -> Result<Times> {
    let pod = node.pod("bench", Network::Host);
    let request = cri::RunPodSandboxRequest { config: Some(pod.clone()), runtime_handler: String::new() };
    let id = node.runtime().run_pod_sandbox(request).await.map_err(text)?.into_inner().pod_sandbox_id;
    let mut times = Times::default();
    for i in 0..count {
        times.add(one_container(node, &id, &pod, i as u32).await?);
    }
    Ok(times)
}

async fn one_container(
    node: &Node,
    sandbox_id: &str,
    sandbox: &cri::PodSandboxConfig,
    attempt: u32,
) -> Result<Duration> {
    let config = cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: "c".into(), attempt }),
        image: Some(cri::ImageSpec { image: IMAGE.into(), ..Default::default() }),
        args: vec![NO_ADDRESS.into()],
        ..Default::default()
    };
    let mut client = node.runtime();
    let start = Instant::now();
    let created = client
        .create_container(cri::CreateContainerRequest {
            pod_sandbox_id: sandbox_id.into(),
            config: Some(config),
            sandbox_config: Some(sandbox.clone()),
        })
        .await
        .map_err(text)?;
    let container_id = created.into_inner().container_id;
    client
        .start_container(cri::StartContainerRequest { container_id: container_id.clone() })
        .await
        .map_err(text)?;
    loop {
        let request = cri::ContainerStatusRequest { container_id: container_id.clone(), verbose: false };
        let status = client.container_status(request).await.map_err(text)?.into_inner().status;
        if status.is_some_and(|s| s.state == cri::ContainerState::ContainerExited as i32) {
            break;
        }
        tokio::time::sleep(Duration::from_micros(500)).await;
    }
    client.remove_container(cri::RemoveContainerRequest { container_id }).await.map_err(text)?;
    Ok(start.elapsed())
}

/// Times of a runtime's `run`; none when it is not installed or does not run here.
fn oci_cycles(runtime: &str, count: usize) -> Result<Option<Times>> {
    if Command::new(runtime).arg("--version").output().is_err() {
        return Ok(None);
    }
    let bundle = tempfile::tempdir().map_err(text)?;
    let rootfs = bundle.path().join("rootfs");
    std::fs::create_dir_all(&rootfs).map_err(text)?;
    let web = find_web().ok_or("the demo's program is not built; run scripts/demo-image.sh")?;
    std::fs::copy(web, rootfs.join("web")).map_err(text)?;
    command(Command::new(runtime).arg("spec").current_dir(bundle.path()))?;
    let config = bundle.path().join("config.json");
    let spec = std::fs::read_to_string(&config).map_err(text)?;
    let mut spec: serde_json::Value = serde_json::from_str(&spec).map_err(text)?;
    spec["process"]["args"] = json!(["/web", NO_ADDRESS]);
    spec["process"]["terminal"] = json!(false);
    std::fs::write(&config, spec.to_string()).map_err(text)?;
    let mut times = Times::default();
    for i in 0..count {
        let start = Instant::now();
        let name = format!("orlop-bench-{}-{i}", std::process::id());
        let out =
            Command::new(runtime).args(["run", &name]).current_dir(bundle.path()).output().map_err(text)?;
        times.add(start.elapsed());
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        // A runtime's own failure has the same exit code.
        if !said.contains("invalid socket address") {
            eprintln!("{runtime} does not run here: {}", said.trim());
            return Ok(None);
        }
    }
    Ok(Some(times))
}

fn find_web() -> Option<PathBuf> {
    let target = root().join("target");
    let hosts = std::fs::read_dir(&target).ok()?.flatten().map(|e| e.path());
    hosts.map(|h| h.join("release/orlop-demo-web")).find(|p: &PathBuf| Path::exists(p))
}
