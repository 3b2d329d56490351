//! PodSandboxStatus.

use std::collections::HashMap;

use orlop_proto::cri;

use crate::error::Result;
use crate::network::netns_path;
use crate::runtime::{Runtime, now_ns};
use crate::store::{Sandbox, SandboxPhase, SandboxRecord};

/// A sandbox is ready or it is not; the CRI knows no more.
pub(crate) fn state(record: &SandboxRecord) -> cri::PodSandboxState {
    match record.phase {
        SandboxPhase::Ready => cri::PodSandboxState::SandboxReady,
        SandboxPhase::Creating | SandboxPhase::NotReady => cri::PodSandboxState::SandboxNotready,
    }
}

impl Runtime {
    pub fn sandbox_status(&self, sandbox: &Sandbox) -> cri::PodSandboxStatus {
        let r = sandbox.record();
        // Once it is off the network they may be another pod's.
        let mut ips = r.ips.iter().filter(|_| r.network_attached).cloned();
        cri::PodSandboxStatus {
            id: r.id.clone(),
            metadata: Some(r.metadata()),
            state: state(&r) as i32,
            created_at: r.created_at_ns,
            network: Some(cri::PodSandboxNetworkStatus {
                ip: ips.next().unwrap_or_default(),
                additional_ips: ips.map(|ip| cri::PodIp { ip }).collect(),
            }),
            linux: Some(cri::LinuxPodSandboxStatus {
                namespaces: Some(cri::Namespace { options: Some(r.namespaces()) }),
            }),
            labels: r.config.labels.clone(),
            annotations: r.config.annotations.clone(),
            runtime_handler: r.runtime_handler.clone(),
        }
    }

    pub async fn pod_sandbox_status(
        &self,
        request: cri::PodSandboxStatusRequest,
    ) -> Result<cri::PodSandboxStatusResponse> {
        let sandbox = self.store.sandbox(&request.pod_sandbox_id)?;
        let mut info = HashMap::new();
        if request.verbose {
            let run_dir = self.config.sandbox_run_dir(&sandbox.id);
            let record = sandbox.record();
            // In the place of upstream runtimes and under their names, where scripts look for them.
            let own = [("network", "net"), ("ipc", "ipc"), ("uts", "uts"), ("pid", "pid"), ("user", "user")];
            let own = own.map(|(kind, file)| (kind, run_dir.join("ns").join(file)));
            let own = own.iter().filter(|(_, path)| path.exists());
            let namespaces: Vec<serde_json::Value> =
                own.map(|(kind, path)| serde_json::json!({"type": kind, "path": path})).collect();
            let text = serde_json::json!({
                "pid": record.init_pid,
                "monitorDir": run_dir,
                "netNamespace": netns_path(&run_dir),
                "runtimeSpec": {"linux": {"namespaces": namespaces}},
                "phase": record.phase,
                "networkAttached": record.network_attached,
                "runtimeHandler": record.runtime_handler,
                "processLabel": record.selinux.process,
                "mountLabel": record.selinux.mount,
            });
            info.insert("info".to_owned(), text.to_string());
        }
        Ok(cri::PodSandboxStatusResponse {
            status: Some(self.sandbox_status(&sandbox)),
            info,
            containers_statuses: self
                .store
                .containers_of(&sandbox.id)
                .iter()
                .map(|c| self.container_status_of(c))
                .collect(),
            timestamp: now_ns(),
        })
    }
}
