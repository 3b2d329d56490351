//! What can go wrong with plugins, for those whose request it fails.

use std::path::PathBuf;

use crate::api::Event;

/// A request that plugins let fail.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("NRI plugin {plugin} refused {request}: {message}")]
    Refused { plugin: String, request: &'static str, message: String },
    #[error(
        "NRI plugin {plugin} did not handle {request}, which by its failure policy fails the request: {why}"
    )]
    Failed { plugin: String, request: &'static str, why: String },
    #[error(
        "NRI plugins {first} and {second} both set the {field} of container {container}; remove one of them or its part"
    )]
    Conflict { first: String, second: String, field: String, container: String },
    #[error(
        "NRI plugin {plugin} asks to update container {container}, which is just being created; it can adjust it"
    )]
    UpdateOfNew { plugin: String, container: String },
    #[error("NRI plugin {plugin} does not accept the adjustments of the other plugins: {reason}")]
    Rejected { plugin: String, reason: String },
    #[error("NRI socket {}: {why}", .path.display())]
    Socket { path: PathBuf, why: String },
    #[error("another runtime serves the NRI socket {}", .path.display())]
    Taken { path: PathBuf },
}

/// The method of an event.
pub(crate) fn method(event: Event) -> &'static str {
    match event {
        Event::RunPodSandbox => "RunPodSandbox",
        Event::StopPodSandbox => "StopPodSandbox",
        Event::RemovePodSandbox => "RemovePodSandbox",
        Event::CreateContainer => "CreateContainer",
        Event::PostCreateContainer => "PostCreateContainer",
        Event::StartContainer => "StartContainer",
        Event::PostStartContainer => "PostStartContainer",
        Event::UpdateContainer => "UpdateContainer",
        Event::PostUpdateContainer => "PostUpdateContainer",
        Event::StopContainer => "StopContainer",
        Event::RemoveContainer => "RemoveContainer",
        Event::UpdatePodSandbox => "UpdatePodSandbox",
        Event::PostUpdatePodSandbox => "PostUpdatePodSandbox",
        Event::ValidateContainerAdjustment => "ValidateContainerAdjustment",
        Event::Unknown | Event::Last => "StateChange",
    }
}

/// Whether a plugin of an older interface is told of it by StateChange.
pub(crate) fn by_state_change(event: Event) -> bool {
    matches!(
        event,
        Event::RunPodSandbox
            | Event::PostUpdatePodSandbox
            | Event::StopPodSandbox
            | Event::RemovePodSandbox
            | Event::PostCreateContainer
            | Event::StartContainer
            | Event::PostStartContainer
            | Event::PostUpdateContainer
            | Event::RemoveContainer
    )
}
