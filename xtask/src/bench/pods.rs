//! From the POST of a pod to Running and Ready, on a cluster of its own.

use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, PostParams, WatchEvent, WatchParams};
use orlop_test_vms::Cluster;
use serde_json::json;

use super::table::{Goal, Table, Times};
use super::{Options, Result, block_on, text};

const IMAGE: &str = "orlop.local/demo-web:latest";

pub fn run(options: &Options) -> Result<Vec<Table>> {
    let mut cluster = Cluster::start(90);
    let [running, ready] = block_on(start_pods(&cluster, options.pods))?;
    cluster.take_down();
    let mut table = Table::new(format!("pods, {} one after another", options.pods), None);
    table.times("POST pod -> Running", &running, None, [None, None]);
    table.times("POST pod -> Ready", &ready, None, [Some(Goal::Figure(150.0)), None]);
    Ok(vec![table])
}

fn has_condition(p: &Pod, kind: &str) -> bool {
    let conditions = p.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
    conditions.iter().any(|c| c.type_ == kind && c.status == "True")
}

/// Times to Running and to Ready.
async fn start_pods(cluster: &Cluster, count: usize) -> Result<[Times; 2]> {
    let client = orlop_client::client_from_kubeconfig(&cluster.kubeconfig()).await.map_err(text)?;
    let api: Api<Pod> = Api::namespaced(client, "default");
    let [mut running, mut ready] = [Times::default(), Times::default()];
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
        let (mut seen_running, mut seen_ready) = (false, false);
        while let Some(event) = events.try_next().await.map_err(text)? {
            let WatchEvent::Modified(p) = event else { continue };
            let phase = p.status.as_ref().and_then(|s| s.phase.as_deref());
            if phase == Some("Running") && !seen_running {
                seen_running = true;
                running.add(start.elapsed());
            }
            if has_condition(&p, "Ready") {
                seen_ready = true;
                ready.add(start.elapsed());
                break;
            }
        }
        if !seen_ready {
            return Err(format!("pod {name} did not get ready within 60 s"));
        }
        api.delete(&name, &DeleteParams::default().grace_period(0)).await.map_err(text)?;
        // The next pod does not meet this one's end.
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok([running, ready])
}
