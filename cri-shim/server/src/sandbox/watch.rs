//! One task per sandbox listens to its monitor. Events and a first look at the monitor's state do the same thing: bring the
//! records in line.

use std::sync::Arc;
use std::time::Duration;

use orlop_nri::api::Event;
use orlop_proto::cri::ContainerEventType;
use orlop_proto::monitor::{self as proto, ContainerPhase as MonitorPhase};

use crate::error::Result;
use crate::monitor::{self, Connection, Reply};
use crate::runtime::{Runtime, now_ns};
use crate::store::{ContainerPhase, Sandbox, SandboxPhase};

const LOST: &str = "the pod's monitor ended; nobody saw how the container did";

/// Between two tries to reach a monitor that is silent and lives; twice as long each time.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LAST_PAUSE: Duration = Duration::from_secs(5);

/// Containers that were recorded when this server started and of which the monitor has not been asked yet.
pub(crate) type Unasked = Vec<String>;

impl Runtime {
    /// Follows the sandbox until it is stopped, its monitor is gone, or the server stops. `unasked`: the monitor was silent when the
    /// server started; these are brought in line once it answers.
    pub fn watch(self: &Arc<Self>, sandbox: Arc<Sandbox>, unasked: Option<Unasked>) {
        let this = self.clone();
        let stop = self.tasks.stop_token();
        self.tasks.spawn(async move {
            tokio::select! {
                // Nothing is lost when this is dropped: the next start looks at the monitor's state.
                () = this.follow(&sandbox, unasked) => {}
                () = stop.cancelled() => {}
            }
        });
    }

    async fn follow(self: &Arc<Self>, sandbox: &Arc<Sandbox>, mut unasked: Option<Unasked>) {
        let mut pause = FIRST_PAUSE;
        while sandbox.record().phase == SandboxPhase::Ready {
            match self.follow_once(sandbox, &mut unasked).await {
                // The connection ended; whether the monitor did shows when connecting again.
                Ok(()) => pause = FIRST_PAUSE,
                Err(e) if e.is_shortage() => {
                    tracing::warn!(sandbox = %sandbox.id, error = %orlop_base::telemetry::chain(&e), "cannot follow the pod's containers just now");
                    pause = (pause * 2).min(LAST_PAUSE);
                }
                Err(e) if !e.is_silence() => {
                    // It lives; only this server cannot follow it.
                    tracing::error!(sandbox = %sandbox.id, error = %e, "cannot follow the pod's containers");
                    return;
                }
                Err(e) => match sandbox.monitor.process() {
                    Ok(None) => break,
                    Err(unseen) => {
                        tracing::warn!(sandbox = %sandbox.id, error = %orlop_base::telemetry::chain(&unseen), "the pod's monitor does not answer");
                        pause = (pause * 2).min(LAST_PAUSE);
                    }
                    Ok(Some(process)) => {
                        if pause >= Duration::from_secs(1) {
                            tracing::warn!(sandbox = %sandbox.id, error = %e, "the pod's monitor lives but does not answer");
                        }
                        tokio::select! {
                            // Dropping either loses nothing: both are looked at again.
                            () = process.ended() => {}
                            () = tokio::time::sleep(pause) => {}
                        }
                        pause = (pause * 2).min(LAST_PAUSE);
                        continue;
                    }
                },
            }
            tokio::time::sleep(pause).await;
        }
        if sandbox.record().phase == SandboxPhase::Ready {
            let _held = sandbox.op.lock().await;
            if sandbox.record().phase == SandboxPhase::Ready {
                tracing::error!(sandbox = %sandbox.id, "the pod's monitor is dead; its containers count as lost");
                if let Err(e) = self.bury(sandbox).await {
                    tracing::error!(sandbox = %sandbox.id, error = %orlop_base::telemetry::chain(&e), "could not clean up after a dead monitor; stopping the pod tries again");
                }
            }
        } else {
            // While it is being stopped the exits of its containers still count.
            let _ = self.follow_once(sandbox, &mut unasked).await;
        }
    }

    async fn follow_once(
        &self,
        sandbox: &Arc<Sandbox>,
        unasked: &mut Option<Unasked>,
    ) -> std::result::Result<(), monitor::Error> {
        let mut events: Connection = sandbox.monitor.subscribe().await?;
        // Subscribed first, so that nothing falls between.
        if let Some(known) = unasked {
            // No container is being made meanwhile.
            let _held = sandbox.op.lock().await;
            let state = sandbox.monitor.state().await?;
            self.adopt_state(sandbox, &state, known).await?;
            *unasked = None;
        } else {
            let state = sandbox.monitor.state().await?;
            self.align(sandbox, &state);
        }
        while let Some(frame) = events.reader.next().await? {
            match frame.body {
                Some(Reply::ContainerExited(proto::ContainerExited { container: Some(c) })) => {
                    self.observe(sandbox, &c)
                }
                Some(Reply::ContainerStarted(proto::ContainerStarted { container: Some(c) })) => {
                    self.observe(sandbox, &c)
                }
                Some(Reply::ContainerOom(o)) => {
                    tracing::info!(container = %o.container_id, "ran out of memory")
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Takes over what the monitor knows. A container that it does not know may be just about to be made.
    fn align(&self, sandbox: &Sandbox, state: &proto::State) {
        for seen in &state.containers {
            self.observe(sandbox, seen);
        }
    }

    /// The first look at a monitor that an earlier server started. Of `known`, what the monitor does not know is lost; what only the
    /// monitor knows was never answered and is deleted.
    pub async fn adopt_state(
        &self,
        sandbox: &Sandbox,
        state: &proto::State,
        known: &[String],
    ) -> std::result::Result<(), monitor::Error> {
        self.align(sandbox, state);
        for c in known.iter().filter_map(|id| self.store.container(id).ok()) {
            let seen = state.containers.iter().any(|s| s.container_id == c.id);
            let live = matches!(c.record().phase, ContainerPhase::Created | ContainerPhase::Running);
            if !seen && live {
                self.store.note_container(&c, |r| {
                    r.lost(now_ns(), "the pod's monitor does not know this container")
                });
            }
        }
        for seen in &state.containers {
            if self.store.container(&seen.container_id).is_err() {
                sandbox.monitor.delete_container(&seen.container_id).await?;
            }
        }
        Ok(())
    }

    fn observe(&self, sandbox: &Sandbox, seen: &proto::ContainerState) {
        let Ok(container) = self.store.container(&seen.container_id) else { return };
        if container.sandbox_id != sandbox.id {
            return;
        }
        let phase = container.record().phase;
        match (seen.phase(), phase) {
            (MonitorPhase::Exited, ContainerPhase::Created | ContainerPhase::Running) => {
                let finished = if seen.finished_at_ns > 0 { seen.finished_at_ns } else { now_ns() };
                self.store.note_container(&container, |r| {
                    if seen.started_at_ns > 0 {
                        r.started_at_ns = seen.started_at_ns;
                    }
                    r.exited(seen.exit_code, seen.oom_killed, finished);
                });
                tracing::info!(container = %container.id, exit_code = seen.exit_code, oom = seen.oom_killed, "container ended");
                self.emit(&container, ContainerEventType::ContainerStoppedEvent);
            }
            // Started by an RPC that was cut short by our own death, or whose answer did not come.
            (MonitorPhase::Running, ContainerPhase::Created) => {
                self.store.note_container(&container, |r| {
                    r.phase = ContainerPhase::Running;
                    r.pid = seen.pid;
                    r.started_at_ns = seen.started_at_ns;
                    r.message.clear();
                });
                self.emit(&container, ContainerEventType::ContainerStartedEvent);
            }
            _ => {}
        }
    }

    /// Cleans up after a monitor that died: its containers are lost, the sandbox is not ready any more.
    pub async fn bury(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<()> {
        self.store.note_sandbox(sandbox, |r| r.phase = SandboxPhase::NotReady);
        // What still runs is not reported as ended.
        self.end_leftovers(sandbox).await?;
        for c in self.store.containers_of(&sandbox.id) {
            if matches!(c.record().phase, ContainerPhase::Created | ContainerPhase::Running) {
                self.store.note_container(&c, |r| r.lost(now_ns(), LOST));
                self.emit(&c, ContainerEventType::ContainerStoppedEvent);
            }
        }
        self.plugins_see_pod(sandbox, Event::StopPodSandbox).await;
        self.tear_down(sandbox).await?;
        self.store.note_sandbox(sandbox, |r| r.stopped = true);
        self.emit_sandbox(sandbox, ContainerEventType::ContainerStoppedEvent);
        Ok(())
    }
}
