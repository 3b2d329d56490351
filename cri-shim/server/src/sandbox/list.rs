//! ListPodSandbox and its filter.

use orlop_proto::cri;

use super::status::state;
use crate::filter::labels_fit;
use crate::runtime::Runtime;
use crate::store::SandboxRecord;

fn fits(r: &SandboxRecord, filter: &cri::PodSandboxFilter) -> bool {
    r.id.starts_with(&filter.id)
        && filter.state.as_ref().is_none_or(|s| s.state == state(r) as i32)
        && labels_fit(&r.config.labels, &filter.label_selector)
}

impl Runtime {
    pub fn pod_sandboxes(&self, filter: Option<cri::PodSandboxFilter>) -> Vec<cri::PodSandbox> {
        let filter = filter.unwrap_or_default();
        self.store
            .sandboxes()
            .iter()
            .map(|s| s.record())
            .filter(|r| fits(r, &filter))
            .map(|r| cri::PodSandbox {
                id: r.id.clone(),
                metadata: Some(r.metadata()),
                state: state(&r) as i32,
                created_at: r.created_at_ns,
                labels: r.config.labels.clone(),
                annotations: r.config.annotations.clone(),
                runtime_handler: r.runtime_handler.clone(),
            })
            .collect()
    }
}
