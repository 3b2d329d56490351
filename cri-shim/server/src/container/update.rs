//! UpdateContainerResources.

use std::sync::Arc;

use orlop_nri::api::Event;
use orlop_proto::cri;

use super::spec::resources::merge;
use crate::error::Result;
use crate::runtime::Runtime;
use crate::store::ContainerPhase;

impl Runtime {
    pub async fn update_container_resources(
        self: &Arc<Self>,
        request: cri::UpdateContainerResourcesRequest,
    ) -> Result<cri::UpdateContainerResourcesResponse> {
        let container = self.store.container(&request.container_id)?;
        let update = request.linux.unwrap_or_default();
        let annotations = request.annotations;
        let this = self.clone();
        self.detached(async move {
            let _held = container.op.lock().await;
            let alive = [ContainerPhase::Created, ContainerPhase::Running];
            let record = container.in_phase(&alive, "change its resources")?;
            let merged = merge(&record.resources, &update);
            let (merged, given) = this.plugins_see_update(&container, &update, merged).await?;
            this.put_resources(&container, merged, given.as_ref(), annotations).await?;
            this.plugins_see(&container, Event::PostUpdateContainer).await;
            Ok(cri::UpdateContainerResourcesResponse {})
        })
        .await
    }
}
