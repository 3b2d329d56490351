//! From a pod's spec to CRI's messages: pure mappings.

pub mod apparmor;
pub mod container;
pub mod env;
pub mod field;
pub mod hosts;
pub mod resources;
pub mod sandbox;
pub mod security;

/// Why a container's configuration cannot be made; its status shows reason and message.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SpecError {
    #[error("{kind} {name:?} not found")]
    NotFound { kind: &'static str, name: String },
    #[error("couldn't find key {key} in {kind} {namespace}/{name}")]
    NoKey { kind: &'static str, namespace: String, name: String, key: String },
    #[error(
        "field {0:?} is not known here; use metadata.*, spec.nodeName, spec.serviceAccountName or status.*"
    )]
    UnknownField(String),
    #[error("resource field {0:?} of container {1:?} is not known")]
    UnknownResource(String, String),
    #[error("container has runAsNonRoot and image will run as root (pod: {pod:?}, container: {container})")]
    RunsAsRoot { pod: String, container: String },
    #[error(
        "container has runAsNonRoot and image has non-numeric user ({user}), cannot verify user is non-root (pod: {pod:?}, container: {container})"
    )]
    UserNotNumeric { user: String, pod: String, container: String },
    #[error("{0}")]
    Invalid(String),
}
