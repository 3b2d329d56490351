//! A container as CRI has it.

use std::collections::HashMap;

use k8s_openapi::api::core::v1::{Container, Pod};
use orlop_proto::cri::{
    ContainerConfig, ContainerMetadata, Device, ImageSpec, KeyValue, LinuxContainerConfig,
    LinuxContainerResources, LinuxContainerSecurityContext, Mount, NamespaceMode, Signal,
};

use super::env::expand;
use super::sandbox::identity;
use crate::pods::ContainerKind;
use crate::runtime::labels;

/// Identifies what a container runs: name and image, nothing else, so that a new version of the agent with more fields
/// in its types never restarts a container. The same number as upstream's kubelet gives, so that either can take over
/// the other's containers: FNV-1a over Go's rendering of the JSON's bytes, in hexadecimal.
pub fn hash(c: &Container) -> String {
    let fields = serde_json::json!({"image": c.image.as_deref().unwrap_or_default(), "name": c.name});
    let bytes: Vec<String> = fields.to_string().bytes().map(|b| b.to_string()).collect();
    let text = format!("([]uint8)[{}]", bytes.join(" "));
    let hash = text.bytes().fold(0x811c_9dc5u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
    format!("{hash:x}")
}

/// What has been prepared for a container.
pub struct Prepared {
    /// Restart count.
    pub attempt: u32,
    /// What the runtime calls the image.
    pub image_ref: String,
    pub env: Vec<(String, String)>,
    pub mounts: Vec<Mount>,
    pub devices: Vec<Device>,
    pub resources: LinuxContainerResources,
    pub security: LinuxContainerSecurityContext,
    /// The container whose PID namespace an ephemeral container joins.
    pub target_id: Option<String>,
}

fn stop_signal(c: &Container) -> i32 {
    let name = c.lifecycle.as_ref().and_then(|l| l.stop_signal.as_deref());
    // CRI writes SIGRTMIN+1 without the sign.
    let name = name.map(|n| n.replace('+', "PLUS").replace("SIGRTMAX-", "SIGRTMAXMINUS"));
    name.and_then(|n| Signal::from_str_name(&n)).unwrap_or(Signal::RuntimeDefault) as i32
}

/// The container's configuration.
pub fn config(pod: &Pod, c: &Container, kind: ContainerKind, p: Prepared) -> ContainerConfig {
    let values: HashMap<String, String> = p.env.iter().cloned().collect();
    let expanded =
        |list: &Option<Vec<String>>| list.iter().flatten().map(|s| expand(s, &values)).collect::<Vec<_>>();
    let mut tags = identity(pod);
    tags.insert(labels::CONTAINER_NAME.into(), c.name.clone());
    let grace = pod
        .metadata
        .deletion_grace_period_seconds
        .or(pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds));
    let annotations = HashMap::from([
        (labels::HASH.to_owned(), hash(c)),
        (labels::RESTART_COUNT.to_owned(), p.attempt.to_string()),
        (labels::TERMINATION_PATH.to_owned(), termination_path(c).to_owned()),
        (
            labels::TERMINATION_POLICY.to_owned(),
            c.termination_message_policy.clone().unwrap_or_else(|| "File".into()),
        ),
        (labels::POD_GRACE.to_owned(), grace.unwrap_or(30).to_string()),
    ]);
    let mut security = p.security;
    if let (ContainerKind::Ephemeral, Some(target), Some(n)) =
        (kind, p.target_id, security.namespace_options.as_mut())
    {
        n.pid = NamespaceMode::Target as i32;
        n.target_id = target;
    }
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: c.name.clone(), attempt: p.attempt }),
        image: Some(ImageSpec {
            image: p.image_ref,
            user_specified_image: c.image.clone().unwrap_or_default(),
            ..Default::default()
        }),
        command: expanded(&c.command),
        args: expanded(&c.args),
        working_dir: c.working_dir.clone().unwrap_or_default(),
        envs: p.env.into_iter().map(|(key, v)| KeyValue { key, value: v.into_bytes() }).collect(),
        mounts: p.mounts,
        devices: p.devices,
        labels: tags,
        annotations,
        log_path: format!("{}/{}.log", c.name, p.attempt),
        stdin: c.stdin == Some(true),
        stdin_once: c.stdin_once == Some(true),
        tty: c.tty == Some(true),
        linux: Some(LinuxContainerConfig { resources: Some(p.resources), security_context: Some(security) }),
        windows: None,
        cdi_devices: Vec::new(),
        stop_signal: stop_signal(c),
    }
}

/// Where the container writes its last words.
pub fn termination_path(c: &Container) -> &str {
    c.termination_message_path.as_deref().filter(|p| !p.is_empty()).unwrap_or("/dev/termination-log")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_depends_on_name_and_image_only() {
        let c = Container { name: "a".into(), image: Some("x:1".into()), ..Default::default() };
        let same = Container { args: Some(vec!["b".into()]), tty: Some(true), ..c.clone() };
        let other = Container { image: Some("x:2".into()), ..c.clone() };
        assert_eq!(hash(&c), hash(&same));
        assert_ne!(hash(&c), hash(&other));
        // Fixed for ever: a change would restart every container at an upgrade of the agent.
        assert_eq!(hash(&c), "b1bfd35");
    }
}
