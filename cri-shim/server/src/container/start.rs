//! StartContainer.

use std::sync::Arc;

use orlop_nri::api::Event;
use orlop_proto::cri;

use crate::error::{Error, Result};
use crate::monitor::Kind;
use crate::runtime::{Runtime, now_ns};
use crate::store::{ContainerPhase, ContainerRecord};

/// Whether the process may run although nobody said that it was started: a monitor that does not answer can have been asked, and one
/// that was asked before may have done it.
fn may_have_started(e: &Error, record: &ContainerRecord) -> bool {
    match e {
        Error::Monitor(e) if e.is_silence() => true,
        Error::Monitor(e) => record.start_unanswered && e.kind() == Some(Kind::WrongState),
        _ => false,
    }
}

impl Runtime {
    pub async fn start_container(
        self: &Arc<Self>,
        request: cri::StartContainerRequest,
    ) -> Result<cri::StartContainerResponse> {
        let container = self.store.container(&request.container_id)?;
        let sandbox = self.store.sandbox(&container.sandbox_id)?;
        let this = self.clone();
        self.detached(async move {
            let _held = container.op.lock().await;
            container.in_phase(&[ContainerPhase::Created], "start it")?;
            let _told = this.plugins.hold().await;
            let started = async {
                this.plugins_see_start(&container).await?;
                Ok::<_, Error>(sandbox.monitor.start_container(&container.id).await?)
            };
            if let Err(e) = started.await {
                let text = orlop_base::telemetry::chain(&e);
                if may_have_started(&e, &container.record()) {
                    // The monitor tells later, by its events.
                    this.store.note_container(&container, |r| {
                        if r.phase == ContainerPhase::Created {
                            r.start_unanswered = true;
                            r.message = text;
                        }
                    });
                    return Err(e);
                }
                this.store.note_container(&container, |r| {
                    if !r.phase.has_ended() {
                        r.exited(128, false, now_ns());
                    }
                    "StartError".clone_into(&mut r.reason);
                    r.message = text;
                });
                this.emit(&container, cri::ContainerEventType::ContainerStoppedEvent);
                return Err(e);
            }
            let mut news = false;
            this.store.note_container(&container, |r| {
                // It may have ended by now, or its event may have been faster than the answer.
                if r.phase == ContainerPhase::Created {
                    r.phase = ContainerPhase::Running;
                    r.started_at_ns = now_ns();
                    r.message.clear();
                    news = true;
                } else if r.started_at_ns == 0 {
                    r.started_at_ns = now_ns();
                }
            });
            if news {
                this.emit(&container, cri::ContainerEventType::ContainerStartedEvent);
            }
            this.plugins_see(&container, Event::PostStartContainer).await;
            // Not in the middle of the pod's start, which it would slow down.
            this.monitors.want_spare();
            Ok(cri::StartContainerResponse {})
        })
        .await
    }
}
