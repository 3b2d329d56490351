//! Events about pods and the node, under upstream's reasons.

use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use orlop_client::Recorder;

/// Records events when there is an API server; otherwise logs them.
#[derive(Clone)]
pub struct Events {
    recorder: Option<Recorder>,
    node: ObjectReference,
}

/// The part of a pod an event is about.
pub fn container_path(name: &str, kind: crate::pods::ContainerKind) -> String {
    use crate::pods::ContainerKind::*;
    let list = match kind {
        Init => "initContainers",
        Regular => "containers",
        Ephemeral => "ephemeralContainers",
    };
    format!("spec.{list}{{{name}}}")
}

fn about(pod: &Pod, field_path: Option<String>) -> ObjectReference {
    let m = &pod.metadata;
    // The mirror is what users see of a static pod, and its uid is the manifest's hash there.
    let mirror = m.annotations.as_ref().and_then(|a| a.get("kubernetes.io/config.hash"));
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        namespace: m.namespace.clone(),
        name: m.name.clone(),
        uid: mirror.cloned().or_else(|| m.uid.clone()),
        resource_version: m.resource_version.clone(),
        field_path,
    }
}

impl Events {
    pub fn new(recorder: Option<Recorder>, node_name: &str) -> Events {
        let node = ObjectReference {
            kind: Some("Node".into()),
            name: Some(node_name.to_owned()),
            // Upstream's kubelet uses the node's name as the uid, and kubectl describe looks for it.
            uid: Some(node_name.to_owned()),
            ..Default::default()
        };
        Events { recorder, node }
    }

    fn send(&self, object: ObjectReference, warning: bool, reason: &str, message: String) {
        tracing::debug!(pod = object.name.as_deref(), reason, %message, "event");
        let Some(r) = &self.recorder else { return };
        if warning { r.warning(object, reason, message) } else { r.normal(object, reason, message) }
    }

    pub fn pod(&self, pod: &Pod, reason: &str, message: impl Into<String>) {
        self.send(about(pod, None), false, reason, message.into());
    }

    pub fn pod_warning(&self, pod: &Pod, reason: &str, message: impl Into<String>) {
        self.send(about(pod, None), true, reason, message.into());
    }

    pub fn container(
        &self,
        pod: &Pod,
        container: (&str, crate::pods::ContainerKind),
        reason: &str,
        message: impl Into<String>,
    ) {
        self.send(about(pod, Some(container_path(container.0, container.1))), false, reason, message.into());
    }

    pub fn container_warning(
        &self,
        pod: &Pod,
        container: (&str, crate::pods::ContainerKind),
        reason: &str,
        message: impl Into<String>,
    ) {
        self.send(about(pod, Some(container_path(container.0, container.1))), true, reason, message.into());
    }

    pub fn node(&self, reason: &str, message: impl Into<String>) {
        self.send(self.node.clone(), false, reason, message.into());
    }

    pub fn node_warning(&self, reason: &str, message: impl Into<String>) {
        self.send(self.node.clone(), true, reason, message.into());
    }
}
