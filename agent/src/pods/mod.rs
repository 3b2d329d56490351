//! One worker per pod, a pure planner that says what to do next, and what they keep.

pub mod checkpoint;
pub mod exec;
pub mod manager;
pub mod mounts;
pub mod plan;
pub mod resize;
pub mod state;
pub mod termination;
pub mod worker;

use k8s_openapi::api::core::v1::{Container, Pod};
use orlop_api::pod::is_sidecar;

/// Which list of the pod's spec a container is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ContainerKind {
    /// Init containers and sidecars.
    Init,
    Regular,
    Ephemeral,
}

/// An ephemeral container's fields are those of a container.
pub fn ephemeral_as_container(e: &k8s_openapi::api::core::v1::EphemeralContainer) -> Container {
    Container {
        args: e.args.clone(),
        command: e.command.clone(),
        env: e.env.clone(),
        env_from: e.env_from.clone(),
        image: e.image.clone(),
        image_pull_policy: e.image_pull_policy.clone(),
        name: e.name.clone(),
        security_context: e.security_context.clone(),
        stdin: e.stdin,
        stdin_once: e.stdin_once,
        termination_message_path: e.termination_message_path.clone(),
        termination_message_policy: e.termination_message_policy.clone(),
        tty: e.tty,
        volume_devices: e.volume_devices.clone(),
        volume_mounts: e.volume_mounts.clone(),
        working_dir: e.working_dir.clone(),
        ..Default::default()
    }
}

/// A container of the pod by name, with its kind.
pub fn find_container(pod: &Pod, name: &str) -> Option<(Container, ContainerKind)> {
    let spec = pod.spec.as_ref()?;
    if let Some(c) = spec.containers.iter().find(|c| c.name == name) {
        return Some((c.clone(), ContainerKind::Regular));
    }
    if let Some(c) = spec.init_containers.iter().flatten().find(|c| c.name == name) {
        return Some((c.clone(), ContainerKind::Init));
    }
    let e = spec.ephemeral_containers.iter().flatten().find(|c| c.name == name)?;
    Some((ephemeral_as_container(e), ContainerKind::Ephemeral))
}

/// Containers that run as long as the pod: the regular ones and sidecars.
pub fn long_running(pod: &Pod) -> impl Iterator<Item = &Container> {
    let spec = pod.spec.as_ref();
    let sidecars =
        spec.into_iter().flat_map(|s| s.init_containers.iter().flatten()).filter(|c| is_sidecar(c));
    sidecars.chain(spec.into_iter().flat_map(|s| s.containers.iter()))
}

/// Whether the pod comes from a manifest on this node.
pub fn is_static(pod: &Pod) -> bool {
    orlop_api::meta::annotation(&pod.metadata, "kubernetes.io/config.source").is_some_and(|s| s != "api")
}

/// Whether the API object only mirrors a static pod.
pub fn is_mirror(pod: &Pod) -> bool {
    orlop_api::meta::annotation(&pod.metadata, "kubernetes.io/config.mirror").is_some()
}

/// Whether the pod runs nothing any more.
pub fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}
