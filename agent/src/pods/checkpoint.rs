//! The little that must outlive the agent and cannot be read from the runtime or the API: restart delays and what
//! probes last said, so that a restart of the agent neither hurries a crash loop nor flips readiness.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ResourceRequirements;
use orlop_base::durable::{self, Sync};
use serde::{Deserialize, Serialize};

use super::resize::Allocation;
use super::state::{Memory, ProbeView, Restart};
use crate::runtime::ObservedPod;

const VERSION: u32 = 1;

/// A pod's checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Checkpoint {
    pub start_time: Option<Timestamp>,
    pub finished: bool,
    pub restarts: BTreeMap<String, Restart>,
    /// By container id.
    pub probes: BTreeMap<String, ProbeView>,
    pub restart_regardless: Vec<String>,
    /// CPU and memory that the node has granted.
    pub granted: Option<Allocation>,
    /// Those of running containers, by id, that have another size yet.
    pub of_run: BTreeMap<String, ResourceRequirements>,
    /// What the pod's cgroup has, when that is not what is granted.
    pub of_cgroup: Option<Allocation>,
}

/// Where it lies in the folder of a pod.
pub fn path(dir: &Path) -> PathBuf {
    dir.join("orlop-agent.json")
}

impl Checkpoint {
    pub fn of(memory: &Memory, observed: &ObservedPod) -> Checkpoint {
        let mut regardless: Vec<String> = memory.restart_regardless.iter().cloned().collect();
        regardless.sort();
        Checkpoint {
            start_time: memory.start_time,
            finished: memory.finished,
            restarts: memory.restarts.clone(),
            probes: memory.probes.iter().map(|(k, v)| (k.clone(), ProbeView { live: None, ..*v })).collect(),
            restart_regardless: regardless,
            granted: Some(memory.sizes.granted.clone()),
            of_run: memory.sizes.unlike_granted(observed),
            of_cgroup: memory.sizes.of_cgroup.clone().filter(|_| memory.sizes.cgroup_differs()),
        }
    }

    /// A pod's checkpoint; one that cannot be read is as good as none.
    pub fn read(dir: &Path) -> Checkpoint {
        match durable::read_json(&path(dir), VERSION) {
            Ok(c) => c.unwrap_or_default(),
            Err(e) => {
                tracing::warn!(error = %orlop_base::telemetry::chain(&e), "pod checkpoint not used");
                Checkpoint::default()
            }
        }
    }

    /// Written without a sync: after a power cut no container of the old boot runs any more.
    pub fn write(&self, dir: &Path) {
        let written = std::fs::create_dir_all(dir).map_err(|e| e.to_string()).and_then(|()| {
            durable::write_json(&path(dir), VERSION, self, Sync::PageCache).map_err(|e| e.to_string())
        });
        if let Err(error) = written {
            tracing::warn!(dir = %dir.display(), %error, "pod checkpoint not written");
        }
    }
}
