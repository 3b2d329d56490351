//! ContainerStatus.

use std::collections::HashMap;

use orlop_proto::cri;

use super::signal;
use crate::error::Result;
use crate::runtime::Runtime;
use crate::store::{Container, ContainerPhase, ContainerRecord};

/// The CRI's state. One that is being made has no state yet and is not shown.
pub(crate) fn state(record: &ContainerRecord) -> cri::ContainerState {
    match record.phase {
        // Of such a container the kubelet kills what may run before it starts another.
        ContainerPhase::Created if record.may_run() => cri::ContainerState::ContainerUnknown,
        ContainerPhase::Creating | ContainerPhase::Created => cri::ContainerState::ContainerCreated,
        ContainerPhase::Running => cri::ContainerState::ContainerRunning,
        ContainerPhase::Exited => cri::ContainerState::ContainerExited,
    }
}

impl Runtime {
    pub fn container_status_of(&self, container: &Container) -> cri::ContainerStatus {
        let r = container.record();
        let linux_user = cri::LinuxContainerUser {
            uid: i64::from(r.user.uid),
            gid: i64::from(r.user.gid),
            supplemental_groups: r.user.groups.iter().map(|g| i64::from(*g)).collect(),
        };
        cri::ContainerStatus {
            id: r.id.clone(),
            metadata: Some(r.metadata()),
            state: state(&r) as i32,
            created_at: r.created_at_ns,
            started_at: r.started_at_ns,
            finished_at: r.finished_at_ns,
            exit_code: r.exit_code,
            image: r.config.image.as_ref().map(|i| self.image_name(i, &r.image_id)),
            image_ref: r.image_ref.clone(),
            reason: r.reason.clone(),
            message: r.message.clone(),
            labels: r.config.labels.clone(),
            annotations: r.config.annotations.clone(),
            mounts: r.config.mounts.clone(),
            log_path: r.log_path.clone(),
            resources: Some(cri::ContainerResources { linux: Some(r.resources.0.clone()), windows: None }),
            image_id: r.image_id.clone(),
            user: Some(cri::ContainerUser { linux: Some(linux_user) }),
            stop_signal: signal::cri_name(r.stop_signal) as i32,
        }
    }

    /// The name people know: what was asked for, or the image's first tag when an id was.
    fn image_name(&self, asked: &cri::ImageSpec, id: &str) -> cri::ImageSpec {
        let mut spec = asked.clone();
        let is_id = id.split_once(':').is_some_and(|(algorithm, hex)| {
            let digits = asked.image.strip_prefix(algorithm).and_then(|d| d.strip_prefix(':'));
            let digits = digits.unwrap_or(&asked.image);
            !digits.is_empty() && hex.starts_with(digits)
        });
        if !spec.user_specified_image.is_empty() {
            spec.image.clone_from(&spec.user_specified_image);
        } else if is_id && let Some(tag) = self.images.get(id).and_then(|i| i.repo_tags.first().cloned()) {
            spec.image = tag;
        }
        spec
    }

    pub fn container_status(
        &self,
        request: cri::ContainerStatusRequest,
    ) -> Result<cri::ContainerStatusResponse> {
        let container = self.store.container(&request.container_id)?;
        let mut info = HashMap::new();
        if request.verbose {
            let record = container.record();
            let bundle = self.config.bundle_dir(&container.sandbox_id, &container.id);
            let spec: Option<serde_json::Value> = std::fs::read(bundle.join("config.json"))
                .ok()
                .and_then(|bytes| serde_json::from_slice(&bytes).ok());
            let text = serde_json::json!({
                "sandboxID": container.sandbox_id,
                "pid": record.pid,
                "bundle": bundle,
                "cgroupsPath": record.cgroups_path,
                "processLabel": record.selinux.process,
                "mountLabel": record.selinux.mount,
                "runtimeSpec": spec,
            });
            info.insert("info".to_owned(), text.to_string());
        }
        Ok(cri::ContainerStatusResponse { status: Some(self.container_status_of(&container)), info })
    }
}
