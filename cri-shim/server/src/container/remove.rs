//! RemoveContainer: kills it if needed, takes its files away.

use std::sync::Arc;

use orlop_nri::api::Event;
use orlop_proto::cri;

use crate::error::Result;
use crate::mounts;
use crate::runtime::{Runtime, noticed, now_ns};
use crate::store::{Container, Sandbox};

impl Runtime {
    pub async fn remove_container(
        self: &Arc<Self>,
        request: cri::RemoveContainerRequest,
    ) -> Result<cri::RemoveContainerResponse> {
        let container = match self.store.container(&request.container_id) {
            // Removing what is gone succeeds.
            Err(e) if e.is_not_found() => return Ok(cri::RemoveContainerResponse {}),
            other => other?,
        };
        let this = self.clone();
        self.detached(async move {
            this.remove_one(&container).await?;
            Ok(cri::RemoveContainerResponse {})
        })
        .await
    }

    /// Idempotent, and repeatable after any failure.
    pub async fn remove_one(&self, container: &Arc<Container>) -> Result<()> {
        let id = container.id.as_str();
        let _held = noticed("waiting for the container's other operation", id, container.op.lock()).await;
        if self.store.container(id).is_err() {
            return Ok(());
        }
        let sandbox = self.store.sandbox(&container.sandbox_id).ok();
        let alive = sandbox.filter(|s| !s.record().stopped);
        if let Some(sandbox) = &alive {
            noticed("the monitor's deletion", id, sandbox.monitor.delete_container(id)).await?;
        }
        if !container.record().phase.has_ended() {
            self.store.note_container(container, |r| r.exited(137, false, now_ns()));
            self.emit(container, cri::ContainerEventType::ContainerStoppedEvent);
        }
        let _told = noticed("waiting for a new plugin", id, self.plugins.hold()).await;
        noticed("telling plugins of the end", id, self.plugins_see_end(container)).await;
        noticed("telling plugins of the removal", id, self.plugins_see(container, Event::RemoveContainer))
            .await;
        noticed("removing the files", id, self.remove_files(container)).await?;
        self.store.drop_container(id);
        self.store.names.release(id);
        self.emit(container, cri::ContainerEventType::ContainerDeletedEvent);
        Ok(())
    }

    /// Takes back a container that was never announced. The monitor is asked only where there is one.
    pub async fn take_back(&self, container: &Container, sandbox: Option<&Arc<Sandbox>>) -> Result<()> {
        if let Some(sandbox) = sandbox {
            match sandbox.monitor.delete_container(&container.id).await {
                // What a dead monitor ran ends with the sandbox; only the files are left.
                Err(e) if e.is_silence() && matches!(sandbox.monitor.process(), Ok(None)) => {}
                other => other?,
            }
        }
        self.store.drop_container(&container.id);
        self.remove_files(container).await
    }

    /// Root file system, image volumes, bundle, record; the record last, so that a crash in between is made good later.
    async fn remove_files(&self, container: &Container) -> Result<()> {
        for key in &container.record().image_volumes {
            self.images.remove_rootfs(key).await?;
        }
        self.images.remove_rootfs(&container.id).await?;
        mounts::remove_tree(&self.config.bundle_dir(&container.sandbox_id, &container.id))?;
        mounts::remove_tree(&self.config.container_state_dir(&container.id))
    }
}
