//! One task per sandbox listens to its monitor. Events and a first look at the monitor's state do the same thing: bring the
//! records in line.

use std::sync::Arc;
use std::time::Duration;

use orlop_proto::cri::ContainerEventType;
use orlop_proto::monitor::{self as proto, ContainerPhase as MonitorPhase};

use crate::error::Result;
use crate::monitor::{self, Connection, Reply};
use crate::runtime::{Runtime, now_ns};
use crate::store::{Container, ContainerPhase, Sandbox, SandboxPhase};

const LOST: &str = "the pod's monitor ended; nobody saw how the container did";

impl Runtime {
    /// Follows the sandbox until it is stopped, its monitor is gone, or the server stops.
    pub fn watch(self: &Arc<Self>, sandbox: Arc<Sandbox>) {
        let this = self.clone();
        let stop = self.tasks.stop_token();
        self.tasks.spawn(async move {
            tokio::select! {
                // Nothing is lost when this is dropped: the next start looks at the monitor's state.
                () = this.follow(&sandbox) => {}
                () = stop.cancelled() => {}
            }
        });
    }

    async fn follow(self: &Arc<Self>, sandbox: &Arc<Sandbox>) {
        let mut refused = 0u32;
        while sandbox.record().phase == SandboxPhase::Ready {
            match self.follow_once(sandbox).await {
                // The connection ended; whether the monitor did shows when connecting again.
                Ok(()) => refused = 0,
                Err(e) if !e.is_death() => {
                    // It lives; only this server cannot follow it.
                    tracing::error!(sandbox = %sandbox.id, error = %e, "cannot follow the pod's containers");
                    return;
                }
                Err(e) => {
                    refused += 1;
                    tracing::debug!(sandbox = %sandbox.id, error = %e, "lost the monitor's events");
                    // A full backlog refuses for a moment; a dead monitor for good.
                    if refused >= 3 {
                        break;
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if sandbox.record().phase == SandboxPhase::Ready {
            let _held = sandbox.op.lock().await;
            if sandbox.record().phase == SandboxPhase::Ready {
                tracing::error!(sandbox = %sandbox.id, "the pod's monitor is dead; its containers count as lost");
                if let Err(e) = self.bury(sandbox).await {
                    tracing::error!(sandbox = %sandbox.id, error = %e, "could not clean up after a dead monitor");
                }
            }
        } else {
            // While it is being stopped the exits of its containers still count.
            let _ = self.follow_once(sandbox).await;
        }
    }

    async fn follow_once(&self, sandbox: &Arc<Sandbox>) -> std::result::Result<(), monitor::Error> {
        let mut events: Connection = sandbox.monitor.subscribe().await?;
        // Subscribed first, so that nothing falls between.
        let state = sandbox.monitor.state().await?;
        self.align(sandbox, &state, false);
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

    /// Takes over what the monitor knows. With `adopt`, a container that the monitor does not know is lost; otherwise it may be
    /// just about to be made.
    pub fn align(&self, sandbox: &Sandbox, state: &proto::State, adopt: bool) {
        for seen in &state.containers {
            self.observe(sandbox, seen);
        }
        if !adopt {
            return;
        }
        for c in self.store.containers_of(&sandbox.id) {
            let known = state.containers.iter().any(|s| s.container_id == c.id);
            let record = c.record();
            if !known && matches!(record.phase, ContainerPhase::Created | ContainerPhase::Running) {
                self.note(&c, |r| r.lost(now_ns(), "the pod's monitor does not know this container"));
            }
        }
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
                self.note(&container, |r| {
                    if seen.started_at_ns > 0 {
                        r.started_at_ns = seen.started_at_ns;
                    }
                    r.exited(seen.exit_code, seen.oom_killed, finished);
                });
                tracing::info!(container = %container.id, exit_code = seen.exit_code, oom = seen.oom_killed, "container ended");
                self.emit(&container, ContainerEventType::ContainerStoppedEvent);
            }
            // Started by an RPC that was cut short by our own death.
            (MonitorPhase::Running, ContainerPhase::Created) => {
                self.note(&container, |r| {
                    r.phase = ContainerPhase::Running;
                    r.pid = seen.pid;
                    r.started_at_ns = seen.started_at_ns;
                });
                self.emit(&container, ContainerEventType::ContainerStartedEvent);
            }
            _ => {}
        }
    }

    /// Journals; a full disk leaves memory as it was, and the next look at the monitor's state tries again.
    fn note(&self, container: &Container, change: impl FnOnce(&mut crate::store::ContainerRecord)) {
        if let Err(e) = container.update(change) {
            tracing::error!(container = %container.id, error = %e, "could not write the container's record");
        }
    }

    /// Cleans up after a monitor that died: its containers are lost, the sandbox is not ready any more.
    pub async fn bury(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<()> {
        sandbox.update(|r| r.phase = SandboxPhase::NotReady)?;
        for c in self.store.containers_of(&sandbox.id) {
            if matches!(c.record().phase, ContainerPhase::Created | ContainerPhase::Running) {
                c.update(|r| r.lost(now_ns(), LOST))?;
                self.emit(&c, ContainerEventType::ContainerStoppedEvent);
            }
        }
        self.tear_down(sandbox).await?;
        sandbox.update(|r| r.stopped = true)?;
        self.emit_sandbox(sandbox, ContainerEventType::ContainerStoppedEvent);
        Ok(())
    }
}
