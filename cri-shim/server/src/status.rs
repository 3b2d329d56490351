//! Version, Status, RuntimeConfig.

use std::collections::HashMap;

use orlop_proto::cri;

use crate::config::CgroupDriver;
use crate::runtime::Runtime;

pub(crate) const RUNTIME: &str = "orlop";

pub(crate) fn version() -> cri::VersionResponse {
    cri::VersionResponse {
        // The kubelet's API version in the request and here; upstream never went beyond this.
        version: "0.1.0".to_owned(),
        runtime_name: RUNTIME.to_owned(),
        runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
        runtime_api_version: "v1".to_owned(),
    }
}

impl Runtime {
    pub async fn status(&self, verbose: bool) -> cri::StatusResponse {
        let condition = |kind: &str, problem: Option<(String, String)>| {
            let status = problem.is_none();
            let (reason, message) = problem.unwrap_or_default();
            cri::RuntimeCondition { r#type: kind.to_owned(), status, reason, message }
        };
        let monitor = (!self.config.monitor.exists()).then(|| {
            let message = format!("{} is missing; install it or name another", self.config.monitor.display());
            ("MonitorMissing".to_owned(), message)
        });
        let network = self.network.problem().await.map(|m| ("NetworkPluginNotReady".to_owned(), m));
        let mut info = HashMap::new();
        if verbose {
            let network = self.network.describe();
            let text = serde_json::json!({
                "stateDir": self.config.state_dir,
                "runDir": self.config.run_dir,
                "monitor": self.config.monitor,
                "cgroupDriver": match self.config.cgroup_driver {
                    CgroupDriver::Cgroupfs => "cgroupfs",
                    CgroupDriver::Systemd => "systemd",
                },
                "cgroupV2": self.facts.cgroup_v2,
                "swapAccounting": self.facts.swap_accounting,
                "appArmor": crate::apparmor::is_on(),
                "seLinux": self.facts.selinux,
                "hugePages": self.facts.hugetlb,
                "cdiSpecDirs": self.config.cdi_spec_dirs,
                "leastOomScoreAdj": self.facts.least_oom_score_adj,
                "streaming": self.sessions.address(),
                "network": network.as_ref().map(|(name, _)| name),
                "networkConfig": network.as_ref().map(|(_, file)| file),
                "sandboxes": self.store.sandboxes().len(),
                "containers": self.store.containers().len(),
            });
            info.insert("config".to_owned(), text.to_string());
        }
        let handler = |name: &str, own: bool| cri::RuntimeHandler {
            name: name.to_owned(),
            // Of other programs nobody has asked.
            features: Some(cri::RuntimeHandlerFeatures {
                recursive_read_only_mounts: own,
                user_namespaces: own,
            }),
        };
        let mut runtime_handlers = vec![handler("", true), handler(RUNTIME, true)];
        runtime_handlers.extend(self.config.runtimes.keys().map(|name| handler(name, false)));
        cri::StatusResponse {
            status: Some(cri::RuntimeStatus {
                conditions: vec![condition("RuntimeReady", monitor), condition("NetworkReady", network)],
            }),
            info,
            runtime_handlers,
            features: Some(cri::RuntimeFeatures {
                supplemental_groups_policy: true,
                user_namespaces_host_network: false,
            }),
        }
    }

    pub fn runtime_config(&self) -> cri::RuntimeConfigResponse {
        let driver = match self.config.cgroup_driver {
            CgroupDriver::Cgroupfs => cri::CgroupDriver::Cgroupfs,
            CgroupDriver::Systemd => cri::CgroupDriver::Systemd,
        };
        cri::RuntimeConfigResponse {
            linux: Some(cri::LinuxRuntimeConfiguration { cgroup_driver: driver as i32 }),
        }
    }
}
