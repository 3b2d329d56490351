//! UpdateContainerResources.

use std::sync::Arc;

use orlop_proto::cri;

use super::spec::resources::{merge, resources};
use crate::error::{Error, Result};
use crate::runtime::Runtime;
use crate::store::{ContainerPhase, Encoded};

impl Runtime {
    pub async fn update_container_resources(
        self: &Arc<Self>,
        request: cri::UpdateContainerResourcesRequest,
    ) -> Result<cri::UpdateContainerResourcesResponse> {
        let container = self.store.container(&request.container_id)?;
        let sandbox = self.store.sandbox(&container.sandbox_id)?;
        let update = request.linux.unwrap_or_default();
        let annotations = request.annotations;
        let this = self.clone();
        self.detached(async move {
            let _held = container.op.lock().await;
            let alive = [ContainerPhase::Created, ContainerPhase::Running];
            let record = container.in_phase(&alive, "change its resources")?;
            let merged = merge(&record.resources, &update);
            let oci = resources(&merged, &this.facts)?;
            let json = serde_json::to_vec(&oci)
                .map_err(|e| Error::Internal(format!("cannot write resources: {e}")))?;
            sandbox.monitor.update_container(&container.id, json).await?;
            container.update(|r| {
                r.resources = Encoded(merged);
                r.config.0.annotations.extend(annotations);
            })?;
            container.keep_copy()?;
            Ok(cri::UpdateContainerResourcesResponse {})
        })
        .await
    }
}
