//! StopContainer: the stop signal, the grace period, SIGKILL.

use std::sync::Arc;
use std::time::Duration;

use orlop_proto::cri;
use tokio::time::timeout;

use crate::error::{Error, Result};
use crate::monitor::Kind;
use crate::runtime::{Runtime, noticed};
use crate::store::Container;

/// How long a killed container may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(60);

impl Runtime {
    /// Takes no lock while it waits, so that a second call with a shorter timeout can cut the first one's wait short.
    pub async fn stop_container(
        self: &Arc<Self>,
        request: cri::StopContainerRequest,
    ) -> Result<cri::StopContainerResponse> {
        let container = match self.store.container(&request.container_id) {
            // Stopping what is gone succeeds.
            Err(e) if e.is_not_found() => return Ok(cri::StopContainerResponse {}),
            other => other?,
        };
        if !container.record().may_run() {
            return Ok(cri::StopContainerResponse {});
        }
        if request.timeout > 0 {
            self.signal(&container, container.record().stop_signal, false).await?;
            let grace = Duration::from_secs(request.timeout.unsigned_abs());
            if timeout(grace, container.ended()).await.is_ok() {
                self.tell_end(&container).await;
                return Ok(cri::StopContainerResponse {});
            }
        }
        self.signal(&container, libc::SIGKILL, true).await?;
        timeout(KILL_LIMIT, container.ended()).await.map_err(|_| {
            Error::Internal(format!(
                "container {} did not end within {KILL_LIMIT:?} of SIGKILL; it may hang in the kernel",
                container.id
            ))
        })?;
        self.tell_end(&container).await;
        Ok(cri::StopContainerResponse {})
    }

    async fn tell_end(&self, container: &Container) {
        noticed("telling plugins of the end", &container.id, self.plugins_see_end(container)).await;
    }

    /// A container that has ended meanwhile is as good as signalled.
    async fn signal(&self, container: &Container, signal: i32, all: bool) -> Result<()> {
        let sandbox = self.store.sandbox(&container.sandbox_id)?;
        let sent = sandbox.monitor.signal(&container.id, signal, all);
        match noticed("the monitor's answer to a signal", &container.id, sent).await {
            Ok(()) => Ok(()),
            Err(e) if matches!(e.kind(), Some(Kind::NotFound | Kind::WrongState)) => Ok(()),
            // The watcher is about to notice that the monitor is dead, which ends the container too.
            Err(_) if container.record().phase.has_ended() => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}
