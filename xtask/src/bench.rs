//! `make bench`: what a pod and a container cost, in time and memory, on a cluster of its own.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, PostParams, WatchEvent, WatchParams};
use orlop_proto::cri;
use orlop_proto::cri::runtime_service_client::RuntimeServiceClient;
use orlop_test_vms::{Cluster, root};
use serde_json::json;
use tonic::transport::{Channel, Endpoint};

type Result<T = ()> = std::result::Result<T, String>;

const IMAGE: &str = "orlop.local/demo-web:latest";
/// Containers that are made to measure one.
const CONTAINERS: usize = 30;

pub fn run(pods: usize) -> Result {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut cluster = Cluster::start(90);
    let runtime = tokio::runtime::Runtime::new().map_err(text)?;
    // What the start itself needed settles first.
    std::thread::sleep(Duration::from_secs(10));
    let daemon = cluster.pid();
    println!("memory (PSS), no pods           {:>8.1} MiB   orlop up", pss(daemon));
    let demo = std::fs::read_to_string(root().join("deploy/demo/demo.yaml")).map_err(text)?;
    cluster.apply(&demo.replace("10.96.0.80", &cluster.service_ip(80)).replace("30080", "30190"));
    cluster.kubectl(&["-n", "demo", "rollout", "status", "deployment/web", "--timeout=60s"]);
    std::thread::sleep(Duration::from_secs(5));
    report_memory("with the demo (2 pods)", daemon, &cluster);

    runtime.block_on(start_pods(&cluster, pods))?;
    report_memory(&format!("after {pods} pods, 2 running"), daemon, &cluster);
    runtime.block_on(container_cycles(&cluster))?;
    for name in ["runc", "crun"] {
        oci_cycles(name)?;
    }
    cluster.take_down();
    Ok(())
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// Proportional set size in MiB.
fn pss(pid: u32) -> f64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let kib = rollup
        .lines()
        .find_map(|l| l.strip_prefix("Pss:")?.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok());
    kib.unwrap_or(0.0) / 1024.0
}

/// The monitors of a cluster, found by its run folder in their command lines.
fn monitors(cluster: &Cluster) -> Vec<u32> {
    let run = cluster.path("run").to_string_lossy().into_owned();
    let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter_map(|e| e.file_name().to_string_lossy().parse().ok())
        .filter(|pid: &u32| {
            let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.contains("orlop-monitor") && line.contains(&run)
        })
        .collect()
}

fn report_memory(what: &str, daemon: u32, cluster: &Cluster) {
    let each: Vec<f64> = monitors(cluster).into_iter().map(pss).collect();
    let sum: f64 = each.iter().sum();
    let one = if each.is_empty() { 0.0 } else { sum / each.len() as f64 };
    println!(
        "memory (PSS), {what:<26}{:>6.1} MiB   orlop up {:.1}, {} monitors of {one:.2} each",
        pss(daemon) + sum,
        pss(daemon),
        each.len()
    );
}

fn percentiles(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |p: f64| times[((times.len() - 1) as f64 * p).round() as usize].as_secs_f64() * 1e3;
    println!("{what:<32}p50 {:>7.1} ms   p99 {:>7.1} ms   of {}", at(0.5), at(0.99), times.len());
}

fn has_condition(p: &Pod, kind: &str) -> bool {
    let conditions = p.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
    conditions.iter().any(|c| c.type_ == kind && c.status == "True")
}

async fn start_pods(cluster: &Cluster, count: usize) -> Result {
    let client = orlop_client::client_from_kubeconfig(&cluster.kubeconfig()).await.map_err(text)?;
    let api: Api<Pod> = Api::namespaced(client, "default");
    let (mut running, mut ready) = (Vec::new(), Vec::new());
    for i in 0..count {
        let name = format!("bench-{i}");
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": name},
            "spec": {"terminationGracePeriodSeconds": 0, "containers": [
                {"name": "c", "image": IMAGE, "imagePullPolicy": "Never"}]},
        }))
        .map_err(text)?;
        let watch = WatchParams::default().fields(&format!("metadata.name={name}")).timeout(60);
        let version = api.list(&Default::default()).await.map_err(text)?.metadata.resource_version;
        let mut events = api.watch(&watch, &version.unwrap_or_default()).await.map_err(text)?.boxed();
        let start = Instant::now();
        api.create(&PostParams::default(), &pod).await.map_err(text)?;
        let mut seen_running = false;
        while let Some(event) = events.try_next().await.map_err(text)? {
            let WatchEvent::Modified(p) = event else { continue };
            let phase = p.status.as_ref().and_then(|s| s.phase.as_deref());
            if phase == Some("Running") && !seen_running {
                seen_running = true;
                running.push(start.elapsed());
            }
            if has_condition(&p, "Ready") {
                ready.push(start.elapsed());
                break;
            }
        }
        api.delete(&name, &DeleteParams::default().grace_period(0)).await.map_err(text)?;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    if ready.len() != count {
        return Err(format!("only {} of {count} pods got ready", ready.len()));
    }
    percentiles("POST pod -> Running", running);
    percentiles("POST pod -> Ready", ready);
    Ok(())
}

/// Create, start, wait for the end and remove a container of one sandbox, over CRI.
async fn container_cycles(cluster: &Cluster) -> Result {
    let path = cluster.cri_endpoint();
    let channel = Endpoint::try_from(path).map_err(text)?.connect().await.map_err(text)?;
    let mut client = RuntimeServiceClient::new(channel);
    let sandbox = cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: "bench".into(),
            uid: "bench".into(),
            namespace: "default".into(),
            attempt: 0,
        }),
        linux: Some(cri::LinuxPodSandboxConfig {
            security_context: Some(cri::LinuxSandboxSecurityContext {
                namespace_options: Some(cri::NamespaceOption {
                    network: cri::NamespaceMode::Node as i32,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let request = cri::RunPodSandboxRequest { config: Some(sandbox.clone()), runtime_handler: String::new() };
    let id = client.run_pod_sandbox(request).await.map_err(text)?.into_inner().pod_sandbox_id;
    let mut times = Vec::new();
    for i in 0..CONTAINERS {
        times.push(one_container(&mut client, &id, &sandbox, i as u32).await?);
    }
    client.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: id }).await.map_err(text)?;
    percentiles("container, orlop over CRI", times);
    Ok(())
}

async fn one_container(
    client: &mut RuntimeServiceClient<Channel>,
    sandbox_id: &str,
    sandbox: &cri::PodSandboxConfig,
    attempt: u32,
) -> Result<Duration> {
    let config = cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: "c".into(), attempt }),
        image: Some(cri::ImageSpec { image: IMAGE.into(), ..Default::default() }),
        // An address that cannot be used ends the program at once.
        args: vec!["256.0.0.1:1".into()],
        ..Default::default()
    };
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

/// The same with an OCI runtime's own command line: create, start, wait, delete in one `run`.
fn oci_cycles(runtime: &str) -> Result {
    if Command::new(runtime).arg("--version").output().is_err() {
        println!("container, {runtime:<21}not installed");
        return Ok(());
    }
    let bundle = tempfile::tempdir().map_err(text)?;
    let rootfs = bundle.path().join("rootfs");
    std::fs::create_dir_all(&rootfs).map_err(text)?;
    let web = find_web().ok_or("the demo's program is not built")?;
    std::fs::copy(web, rootfs.join("web")).map_err(text)?;
    let made = Command::new(runtime).arg("spec").current_dir(bundle.path()).output().map_err(text)?;
    if !made.status.success() {
        return Err(format!("{runtime} spec: {}", String::from_utf8_lossy(&made.stderr)));
    }
    let config = bundle.path().join("config.json");
    let spec = std::fs::read_to_string(&config).map_err(text)?;
    let mut spec: serde_json::Value = serde_json::from_str(&spec).map_err(text)?;
    spec["process"]["args"] = json!(["/web", "256.0.0.1:1"]);
    spec["process"]["terminal"] = json!(false);
    std::fs::write(&config, spec.to_string()).map_err(text)?;
    let mut times = Vec::new();
    for i in 0..CONTAINERS {
        let start = Instant::now();
        let name = format!("orlop-bench-{}-{i}", std::process::id());
        let out =
            Command::new(runtime).args(["run", &name]).current_dir(bundle.path()).output().map_err(text)?;
        times.push(start.elapsed());
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        if !said.contains("256.0.0.1") && !said.contains("invalid") && out.status.code() != Some(1) {
            println!("container, {runtime:<21}does not run here: {}", said.trim());
            return Ok(());
        }
    }
    percentiles(&format!("container, {runtime} run"), times);
    Ok(())
}

fn find_web() -> Option<std::path::PathBuf> {
    let target = root().join("target");
    let hosts = std::fs::read_dir(&target).ok()?.flatten().map(|e| e.path());
    hosts.map(|h| h.join("release/orlop-demo-web")).find(|p: &std::path::PathBuf| Path::exists(p))
}
