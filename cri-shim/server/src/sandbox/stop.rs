//! StopPodSandbox: kills what runs, detaches the network, ends the monitor. The containers' records stay.

use std::sync::Arc;
use std::time::Duration;

use orlop_base::failpoint;
use orlop_nri::api::Event;
use orlop_proto::cri;
use tokio::time::timeout;

use crate::error::Result;
use crate::facts::cgroup_dir;
use crate::runtime::{Runtime, now_ns};
use crate::store::{ContainerPhase, Sandbox, SandboxPhase};

/// How long killed processes may take to be gone. Longer only in uninterruptible sleep.
const KILL_LIMIT: Duration = Duration::from_secs(10);

impl Runtime {
    pub async fn stop_pod_sandbox(
        self: &Arc<Self>,
        request: cri::StopPodSandboxRequest,
    ) -> Result<cri::StopPodSandboxResponse> {
        let sandbox = match self.store.sandbox(&request.pod_sandbox_id) {
            // Stopping what is gone succeeds.
            Err(e) if e.is_not_found() => return Ok(cri::StopPodSandboxResponse {}),
            other => other?,
        };
        let this = self.clone();
        self.detached(async move {
            let _held = sandbox.op.lock().await;
            this.stop_sandbox(&sandbox).await?;
            Ok(cri::StopPodSandboxResponse {})
        })
        .await
    }

    /// The caller holds the sandbox's `op`. Repeatable after any failure.
    pub async fn stop_sandbox(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<()> {
        if sandbox.record().stopped {
            return Ok(());
        }
        let silent = match sandbox.monitor.connect().await {
            Ok(_) => false,
            Err(e) if e.is_silence() => true,
            // A monitor that lives and does not understand this server: the pod is not ours to end.
            Err(e) => return Err(e.into()),
        };
        // From here on no container can be made in it.
        self.store.note_sandbox(sandbox, |r| r.phase = SandboxPhase::NotReady);
        failpoint::pass("stop-sandbox-before-kill")?;
        if silent {
            self.end_silent(sandbox).await?;
        }
        let containers = self.store.containers_of(&sandbox.id);
        for c in containers.iter().filter(|c| c.record().phase == ContainerPhase::Running) {
            match sandbox.monitor.signal(&c.id, libc::SIGKILL, true).await {
                Err(e) if e.is_silence() => {
                    self.end_silent(sandbox).await?;
                    tracing::warn!(container = %c.id, error = %e, "the monitor cannot be asked; the container counts as lost");
                    self.store
                        .note_container(c, |r| r.lost(now_ns(), "the pod's monitor could not be asked"));
                }
                Err(e) => {
                    tracing::debug!(container = %c.id, error = %e, "could not kill before the sandbox's end")
                }
                Ok(()) => {}
            }
        }
        for c in containers.iter().filter(|c| c.record().phase == ContainerPhase::Running) {
            // Its exit arrives as an event; a monitor that is dead is noticed by the watcher too.
            if timeout(KILL_LIMIT, c.ended()).await.is_err() {
                tracing::warn!(container = %c.id, "did not end within {KILL_LIMIT:?} of SIGKILL");
            }
        }
        // While their bundles are there.
        for c in containers.iter().filter(|c| c.record().phase.has_ended()) {
            self.plugins_see_end(c).await;
        }
        self.plugins_see_pod(sandbox, Event::StopPodSandbox).await;
        self.tear_down(sandbox).await?;
        for c in containers.iter().filter(|c| !c.record().phase.has_ended()) {
            self.store.note_container(c, |r| {
                r.exited(137, false, now_ns());
                "the sandbox was stopped".clone_into(&mut r.message);
            });
            self.emit(c, cri::ContainerEventType::ContainerStoppedEvent);
        }
        self.store.note_sandbox(sandbox, |r| r.stopped = true);
        self.emit_sandbox(sandbox, cri::ContainerEventType::ContainerStoppedEvent);
        tracing::info!(sandbox = %sandbox.id, "pod sandbox stopped");
        Ok(())
    }

    /// Ends a monitor that does not answer, if its process still runs, and all that it ran.
    pub async fn end_silent(&self, sandbox: &Sandbox) -> Result<()> {
        sandbox.monitor.end().await?;
        self.end_leftovers(sandbox).await
    }

    /// Ends what is left of a sandbox whose monitor has ended: what its journal names, and the cgroups of our records with those
    /// below them. After an orderly end, the usual case, this costs one look at each. An error when something stays.
    pub async fn end_leftovers(&self, sandbox: &Sandbox) -> Result<()> {
        let record = sandbox.record();
        let parent = record.config.linux.as_ref().map(|l| l.cgroup_parent.as_str()).unwrap_or_default();
        let own = crate::container::spec::cgroups_path(
            self.config.cgroup_driver,
            parent,
            &self.config.default_cgroup_parent,
            &sandbox.id,
        );
        let containers = self.store.containers_of(&sandbox.id);
        let mut groups: Vec<String> = containers.iter().map(|c| c.record().cgroups_path.clone()).collect();
        groups.push(own);
        let mut groups: Vec<String> = groups.iter().map(|g| crate::stats::cgroup::host_path(g)).collect();
        let hierarchies = if self.facts.cgroup_v2 { vec![String::new()] } else { controllers() };
        let exists = |g: &String| hierarchies.iter().any(|h| cgroup_dir(self.facts.cgroup_v2, h, g).exists());
        groups.retain(|g| is_ours(g) && exists(g));
        if groups.is_empty() && !sandbox.monitor.left_anything() {
            return Ok(());
        }
        Ok(sandbox.monitor.clean_up(&self.config.monitor, &groups).await?)
    }
}

/// All hierarchies of a v1 machine.
fn controllers() -> Vec<String> {
    std::fs::read_dir("/sys/fs/cgroup")
        .map(|d| d.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default()
}

/// A group whose last element is no id of ours is never touched.
fn is_ours(path: &str) -> bool {
    path.rsplit('/')
        .next()
        .is_some_and(|last| last.contains(|c: char| c.is_ascii_hexdigit()) && last.len() >= 64)
}
