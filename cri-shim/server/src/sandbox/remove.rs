//! RemovePodSandbox: stops it if needed, removes its containers and its records.

use std::sync::Arc;

use orlop_nri::api::Event;
use orlop_proto::cri;

use crate::error::Result;
use crate::mounts;
use crate::runtime::Runtime;

impl Runtime {
    pub async fn remove_pod_sandbox(
        self: &Arc<Self>,
        request: cri::RemovePodSandboxRequest,
    ) -> Result<cri::RemovePodSandboxResponse> {
        let sandbox = match self.store.sandbox(&request.pod_sandbox_id) {
            // Removing what is gone succeeds.
            Err(e) if e.is_not_found() => return Ok(cri::RemovePodSandboxResponse {}),
            other => other?,
        };
        let this = self.clone();
        self.detached(async move {
            let _held = sandbox.op.lock().await;
            if this.store.sandbox(&sandbox.id).is_err() {
                // Another removal was first.
                return Ok(cri::RemovePodSandboxResponse {});
            }
            this.stop_sandbox(&sandbox).await?;
            for container in this.store.containers_of(&sandbox.id) {
                this.remove_one(&container).await?;
            }
            let _told = this.plugins.hold().await;
            this.plugins_see_pod(&sandbox, Event::RemovePodSandbox).await;
            mounts::remove_tree(&this.config.sandbox_state_dir(&sandbox.id))?;
            this.store.drop_sandbox(&sandbox.id);
            this.store.names.release(&sandbox.id);
            this.emit_sandbox(&sandbox, cri::ContainerEventType::ContainerDeletedEvent);
            tracing::info!(sandbox = %sandbox.id, "pod sandbox removed");
            Ok(cri::RemovePodSandboxResponse {})
        })
        .await
    }
}
