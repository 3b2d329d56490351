//! UpdatePodSandboxResources (KEP-1287): the kubelet sets the pod's cgroup itself; what the runtime keeps of the pod's resources
//! follows.

use orlop_nri::api::Event;
use orlop_proto::cri;

use crate::container::spec::resources::merge;
use crate::error::Result;
use crate::runtime::Runtime;

impl Runtime {
    pub async fn update_pod_sandbox_resources(
        &self,
        request: cri::UpdatePodSandboxResourcesRequest,
    ) -> Result<cri::UpdatePodSandboxResourcesResponse> {
        let sandbox = self.store.sandbox(&request.pod_sandbox_id)?;
        self.plugins_see_pod_update(&sandbox, &request).await?;
        sandbox.update(|r| {
            let linux = r.config.0.linux.get_or_insert_default();
            if let Some(new) = &request.resources {
                linux.resources = Some(merge(&linux.resources.take().unwrap_or_default(), new));
            }
            if let Some(new) = &request.overhead {
                linux.overhead = Some(merge(&linux.overhead.take().unwrap_or_default(), new));
            }
        })?;
        sandbox.keep_copy()?;
        self.plugins_see_pod(&sandbox, Event::PostUpdatePodSandbox).await;
        Ok(cri::UpdatePodSandboxResourcesResponse {})
    }
}
