//! Finding the container that a path names, and the lists of pods.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::Refusal;
use crate::context::Context;
use crate::runtime::{Container, State};

/// The pod of a path.
pub fn pod(ctx: &Context, namespace: &str, name: &str) -> Result<Arc<Pod>, Refusal> {
    ctx.pods
        .get(namespace, name)
        .ok_or_else(|| Refusal::not_found(format!("pod \"{name}\" not found in namespace \"{namespace}\"")))
}

fn waiting_reason(pod: &Pod, container: &str) -> String {
    let status = pod.status.as_ref();
    let all = status.into_iter().flat_map(|s| {
        let groups = [&s.container_statuses, &s.init_container_statuses, &s.ephemeral_container_statuses];
        groups.into_iter().flat_map(|g| g.iter().flatten())
    });
    let waiting =
        all.filter(|s| s.name == container).find_map(|s| s.state.as_ref()?.waiting.as_ref()?.reason.clone());
    waiting.unwrap_or_else(|| "ContainerCreating".into())
}

/// The newest container of a name, or the one before it; the error is what `kubectl logs` shows.
pub fn container(ctx: &Context, pod: &Pod, name: &str, previous: bool) -> Result<Container, Refusal> {
    let pod_name = pod.metadata.name.as_deref().unwrap_or_default();
    let spec = pod.spec.as_ref();
    let named = spec.is_some_and(|s| {
        let ephemeral = s.ephemeral_containers.iter().flatten().any(|c| c.name == name);
        s.containers.iter().chain(s.init_containers.iter().flatten()).any(|c| c.name == name) || ephemeral
    });
    if !named {
        return Err(Refusal::not_found(format!("container \"{name}\" not found in pod \"{pod_name}\"")));
    }
    let observed = ctx.pods.observed(pod.metadata.uid.as_deref().unwrap_or_default());
    let found = observed.as_ref().and_then(|o| {
        let newest = o.container(name);
        if !previous {
            return newest.cloned();
        }
        // A container that waits for its restart is itself the previous one.
        match newest {
            Some(c) if c.state == State::Exited && o.previous_container(name).is_none() => Some(c.clone()),
            _ => o.previous_container(name).cloned(),
        }
    });
    found.ok_or_else(|| match previous {
        true => Refusal::bad_request(format!(
            "previous terminated container \"{name}\" in pod \"{pod_name}\" not found"
        )),
        false => Refusal::bad_request(format!(
            "container \"{name}\" in pod \"{pod_name}\" is waiting to start: {}",
            waiting_reason(pod, name)
        )),
    })
}

/// The running container of a name.
pub fn running(ctx: &Context, pod: &Pod, name: &str) -> Result<Container, Refusal> {
    let c = container(ctx, pod, name, false)?;
    if c.state != State::Running {
        let text =
            format!("container \"{name}\" is not running; it has ended with exit code {}", c.exit_code);
        return Err(Refusal::bad_request(text));
    }
    Ok(c)
}

/// `/pods` and `/runningpods`.
pub fn pod_list(ctx: &Context, only_running: bool) -> Value {
    let runs = |p: &Arc<Pod>| {
        let uid = p.metadata.uid.as_deref().unwrap_or_default();
        ctx.pods.observed(uid).is_some_and(|o| o.ready_sandbox().is_some())
    };
    let pods: Vec<_> = ctx.pods.list().into_iter().filter(|p| !only_running || runs(p)).collect();
    let items: Vec<&Pod> = pods.iter().map(|p| &**p).collect();
    json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})
}

/// `/configz`: the settings in use.
pub fn configz(ctx: &Context) -> Value {
    let k = &ctx.config.kubelet;
    json!({"kubeletconfig": {
        "kind": "KubeletConfiguration", "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "maxPods": k.max_pods, "podPidsLimit": k.pod_pids_limit, "clusterDNS": k.cluster_dns,
        "clusterDomain": k.cluster_domain, "cgroupRoot": k.cgroup_root, "cgroupDriver": k.cgroup_driver,
        "imageGCHighThresholdPercent": k.image_gc_high_threshold_percent,
        "imageGCLowThresholdPercent": k.image_gc_low_threshold_percent,
        "containerLogMaxSize": k.container_log_max_size, "containerLogMaxFiles": k.container_log_max_files,
        "nodeLeaseDurationSeconds": k.node_lease_duration_seconds, "registerNode": k.register_node,
        "evictionHard": k.eviction_hard, "systemReserved": k.system_reserved, "kubeReserved": k.kube_reserved,
        "port": ctx.config.listen.port(),
    }})
}
