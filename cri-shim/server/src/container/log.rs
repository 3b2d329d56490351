//! ReopenContainerLog: the kubelet has renamed the file.

use orlop_proto::cri;

use crate::error::{Error, Result};
use crate::runtime::Runtime;
use crate::store::ContainerPhase;

impl Runtime {
    pub async fn reopen_container_log(
        &self,
        request: cri::ReopenContainerLogRequest,
    ) -> Result<cri::ReopenContainerLogResponse> {
        let container = self.store.container(&request.container_id)?;
        let phase = container.record().phase;
        if phase != ContainerPhase::Running {
            return Err(Error::WrongState {
                what: "container",
                id: container.id.clone(),
                state: phase.name(),
                wanted: "reopen its log",
            });
        }
        self.store.sandbox(&container.sandbox_id)?.monitor.reopen_log(&container.id).await?;
        Ok(cri::ReopenContainerLogResponse {})
    }
}
