//! The on-disk form of sandboxes and containers.

use orlop_proto::cri;
use serde::{Deserialize, Serialize};

use super::Encoded;
use crate::selinux::label::Labels;

/// A sandbox's life:
///
/// ```text
///   Creating ──► Ready ──► NotReady ──► (gone)
///      │                      ▲
///      └── rolled back        └── stopped, or its monitor died
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum SandboxPhase {
    /// Not answered yet: a restart rolls it back.
    Creating,
    Ready,
    NotReady,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SandboxRecord {
    pub id: String,
    pub phase: SandboxPhase,
    pub config: Encoded<cri::PodSandboxConfig>,
    pub runtime_handler: String,
    pub created_at_ns: i64,
    /// The pod's addresses, first the primary one.
    pub ips: Vec<String>,
    /// CNI was asked to attach it and has not been asked to detach it.
    pub network_attached: bool,
    /// The process id of the pod's init, with a shared PID namespace.
    pub init_pid: u32,
    /// Everything that StopPodSandbox does has been done.
    pub stopped: bool,
    /// Records of earlier releases have none.
    #[serde(default)]
    pub selinux: Labels,
}

impl SandboxRecord {
    pub fn metadata(&self) -> cri::PodSandboxMetadata {
        self.config.metadata.clone().unwrap_or_default()
    }

    pub fn namespaces(&self) -> cri::NamespaceOption {
        namespaces(&self.config)
    }
}

/// What a sandbox asks for; absent means all POD, as in the CRI's defaults.
pub(crate) fn namespaces(config: &cri::PodSandboxConfig) -> cri::NamespaceOption {
    config
        .linux
        .as_ref()
        .and_then(|l| l.security_context.as_ref())
        .and_then(|s| s.namespace_options.clone())
        .unwrap_or_default()
}

/// A container's life:
///
/// ```text
///   Creating ──► Created ──► Running ──► Exited ──► (gone)
///      │            │           │
///      │            └───────────┴──────► Unknown: its monitor died; reported as exited with 255
///      └── rolled back
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ContainerPhase {
    /// Not answered yet: a restart rolls it back.
    Creating,
    Created,
    Running,
    Exited,
}

impl ContainerPhase {
    pub fn has_ended(self) -> bool {
        self == ContainerPhase::Exited
    }

    pub fn name(self) -> &'static str {
        match self {
            ContainerPhase::Creating => "being created",
            ContainerPhase::Created => "created",
            ContainerPhase::Running => "running",
            ContainerPhase::Exited => "exited",
        }
    }
}

/// Who the container's first process runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct User {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ContainerRecord {
    pub id: String,
    pub sandbox_id: String,
    pub phase: ContainerPhase,
    pub config: Encoded<cri::ContainerConfig>,
    /// What is in force now: the config's, as changed by UpdateContainerResources.
    pub resources: Encoded<cri::LinuxContainerResources>,
    pub image_id: String,
    /// A digest reference where the image has one, else its id.
    pub image_ref: String,
    /// Absolute; empty when output is discarded.
    pub log_path: String,
    /// As the container's cgroupsPath has it.
    pub cgroups_path: String,
    pub user: User,
    /// A number of this kernel.
    pub stop_signal: i32,
    /// Keys in the image store: the root file system's is the container's id, these are the image volumes'.
    pub image_volumes: Vec<String>,
    /// Records of earlier releases have none.
    #[serde(default)]
    pub selinux: Labels,
    pub pid: u32,
    pub created_at_ns: i64,
    pub started_at_ns: i64,
    pub finished_at_ns: i64,
    pub exit_code: i32,
    pub reason: String,
    pub message: String,
    /// While created: the monitor was asked to start it and has not answered, so that it may run. Records of earlier releases have
    /// none.
    #[serde(default)]
    pub start_unanswered: bool,
}

impl SandboxRecord {
    /// The pod's user namespace, when it has one of its own.
    pub fn user_namespace(&self) -> Option<orlop_images::UserNamespace> {
        let user = self.namespaces().userns_options.filter(|u| u.mode() == cri::NamespaceMode::Pod)?;
        let maps = |list: &[cri::IdMapping]| {
            list.iter()
                .map(|m| orlop_images::IdMapping {
                    container: m.container_id,
                    host: m.host_id,
                    length: m.length,
                })
                .collect()
        };
        Some(orlop_images::UserNamespace { uids: maps(&user.uids), gids: maps(&user.gids) })
    }
}

impl ContainerRecord {
    pub fn metadata(&self) -> cri::ContainerMetadata {
        self.config.metadata.clone().unwrap_or_default()
    }

    /// Whether it runs, as far as anybody knows, or may run.
    pub fn may_run(&self) -> bool {
        self.phase == ContainerPhase::Running
            || self.phase == ContainerPhase::Created && self.start_unanswered
    }

    /// Notes an end that the monitor reported.
    pub fn exited(&mut self, exit_code: i32, oom_killed: bool, finished_at_ns: i64) {
        self.phase = ContainerPhase::Exited;
        self.exit_code = exit_code;
        self.finished_at_ns = finished_at_ns;
        self.pid = 0;
        self.reason = match (oom_killed, exit_code) {
            (true, _) => "OOMKilled",
            (false, 0) => "Completed",
            (false, _) => "Error",
        }
        .to_owned();
    }

    /// Notes that nobody can say how it ended.
    pub fn lost(&mut self, now_ns: i64, message: &str) {
        self.phase = ContainerPhase::Exited;
        self.exit_code = 255;
        self.finished_at_ns = now_ns;
        self.pid = 0;
        self.reason = "Unknown".to_owned();
        self.message = message.to_owned();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pods outlive the server that wrote them down, so nothing may become necessary that was not there then.
    #[test]
    fn what_the_first_release_wrote_is_read() {
        // The configs: metadata with the name "a".
        let sandbox: SandboxRecord = serde_json::from_str(
            r#"{"id":"s","phase":"Ready","config":"CgMKAWE=","runtime_handler":"","created_at_ns":5,"ips":["10.0.0.7"],
            "network_attached":true,"init_pid":0,"stopped":false}"#,
        )
        .unwrap();
        assert_eq!((sandbox.metadata().name.as_str(), sandbox.phase), ("a", SandboxPhase::Ready));
        let container: ContainerRecord = serde_json::from_str(
            r#"{"id":"c","sandbox_id":"s","phase":"Running","config":"CgMKAWE=","resources":"","image_id":"i","image_ref":"r",
            "log_path":"/l","cgroups_path":"/g/c","user":{"uid":1,"gid":2,"groups":[3]},"stop_signal":15,"image_volumes":[],"pid":7,
            "created_at_ns":5,"started_at_ns":6,"finished_at_ns":0,"exit_code":0,"reason":"","message":""}"#,
        )
        .unwrap();
        assert_eq!((container.metadata().name.as_str(), container.may_run()), ("a", true));
    }
}
