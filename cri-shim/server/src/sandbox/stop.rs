//! StopPodSandbox: kills what runs, detaches the network, ends the monitor. The containers' records stay.

use std::sync::Arc;
use std::time::Duration;

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
        if let Err(e) = sandbox.monitor.connect().await
            && !e.is_death()
        {
            // A monitor that lives and does not understand this server: the pod is not ours to end.
            return Err(e.into());
        }
        // From here on no container can be made in it.
        sandbox.update(|r| r.phase = SandboxPhase::NotReady)?;
        let containers = self.store.containers_of(&sandbox.id);
        for c in containers.iter().filter(|c| c.record().phase == ContainerPhase::Running) {
            match sandbox.monitor.signal(&c.id, libc::SIGKILL, true).await {
                Err(e) if e.is_death() => {
                    tracing::warn!(container = %c.id, error = %e, "the monitor cannot be asked; the container counts as lost");
                    c.update(|r| r.lost(now_ns(), "the pod's monitor could not be asked"))?;
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
        self.tear_down(sandbox).await?;
        for c in containers.iter().filter(|c| !c.record().phase.has_ended()) {
            c.update(|r| {
                r.exited(137, false, now_ns());
                "the sandbox was stopped".clone_into(&mut r.message);
            })?;
            self.emit(c, cri::ContainerEventType::ContainerStoppedEvent);
        }
        sandbox.update(|r| r.stopped = true)?;
        self.emit_sandbox(sandbox, cri::ContainerEventType::ContainerStoppedEvent);
        tracing::info!(sandbox = %sandbox.id, "pod sandbox stopped");
        Ok(())
    }

    /// Ends processes that are left in the cgroups of a sandbox whose monitor is dead, and removes those cgroups.
    pub async fn kill_leftovers(&self, sandbox: &Sandbox) {
        let parent =
            sandbox.record().config.linux.as_ref().map(|l| l.cgroup_parent.clone()).unwrap_or_default();
        let own = crate::container::spec::cgroups_path(
            self.config.cgroup_driver,
            &parent,
            &self.config.default_cgroup_parent,
            &sandbox.id,
        );
        let mut paths: Vec<String> =
            self.store.containers_of(&sandbox.id).iter().map(|c| c.record().cgroups_path.clone()).collect();
        paths.push(own);
        for path in paths {
            let path = crate::stats::cgroup::host_path(&path);
            kill_group(self.facts.cgroup_v2, &path).await;
        }
    }
}

/// All hierarchies of a v1 machine.
fn controllers() -> Vec<String> {
    std::fs::read_dir("/sys/fs/cgroup")
        .map(|d| d.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default()
}

/// Kills what is in the group and removes it. Groups that are gone already, the usual case, cost one look each.
pub(crate) async fn kill_group(v2: bool, path: &str) {
    // A group whose last element is no id of ours is never touched.
    if !path
        .rsplit('/')
        .next()
        .is_some_and(|last| last.contains(|c: char| c.is_ascii_hexdigit()) && last.len() >= 64)
    {
        return;
    }
    let hierarchies = if v2 { vec![String::new()] } else { controllers() };
    let dirs: Vec<_> = hierarchies.iter().map(|c| cgroup_dir(v2, c, path)).filter(|d| d.exists()).collect();
    for dir in dirs {
        for _ in 0..100 {
            let pids = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            let pids: Vec<i32> = pids.lines().filter_map(|l| l.parse().ok()).filter(|p| *p > 1).collect();
            if pids.is_empty() {
                break;
            }
            for pid in pids {
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if let Err(e) = std::fs::remove_dir(&dir) {
            tracing::debug!(dir = %dir.display(), error = %e, "left-over cgroup stays");
        }
    }
}
