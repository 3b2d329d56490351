//! What a start makes of what an earlier run left. It assumes:
//!
//! * records are replaced in one step, so a record is there in full or not at all; of one that is damaged all the same there is a
//!   copy from the time when the creation was answered, which the pod's monitor brings up to date. Without a copy, its folder's name
//!   is all that is known of it, and it is cleaned up;
//! * a record in phase `Creating` was never answered: it is taken back;
//! * a network plugin that an earlier run was killed over has not ended by itself: it is ended before anything else is done;
//! * a monitor that answers is right about its containers; one whose process has ended is dead, as is a machine that was rebooted; one
//!   that runs and does not answer is waited for, while its containers stay as they are recorded;
//! * anything in the run folder, the image store's mounts or the network's records that belongs to no record is a leak.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use orlop_base::durable;
use tokio::time::timeout;

use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::mounts;
use crate::runtime::Runtime;
use crate::store::names::{container_name, sandbox_name};
use crate::store::{
    CONTAINER_RECORD, Container, ContainerPhase, ContainerRecord, Encoded, SANDBOX_RECORD, Sandbox,
    SandboxPhase, SandboxRecord, read_record,
};

/// How long a monitor may take to tell its state before the start goes on without it.
const ADOPT_LIMIT: Duration = Duration::from_secs(3);
/// Sandboxes brought in order at once.
const ADOPT_AT_ONCE: usize = 8;

/// Names of the folders in `dir`; none when it is missing.
fn folders(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io("list", dir)(e)),
    };
    Ok(entries
        .flatten()
        .filter(|e| e.path().is_dir())
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect())
}

/// All that is known of a sandbox whose record is gone.
fn unknown_sandbox(id: &str) -> SandboxRecord {
    SandboxRecord {
        id: id.to_owned(),
        phase: SandboxPhase::Creating,
        config: Encoded::default(),
        runtime_handler: String::new(),
        created_at_ns: 0,
        ips: Vec::new(),
        // The network is told which attachments are still valid.
        network_attached: false,
        init_pid: 0,
        stopped: false,
        selinux: Default::default(),
    }
}

/// What an earlier run began and never answered.
struct HalfMade {
    sandboxes: Vec<Arc<Sandbox>>,
    containers: Vec<Arc<Container>>,
}

impl Runtime {
    /// See the module. Single failures are logged and do not keep the server from starting: what could not be cleaned up is tried
    /// again at the next start.
    pub async fn recover(self: &Arc<Self>) -> Result<()> {
        self.network.check_version()?;
        self.network.end_strays().await;
        let half_made = self.load()?;
        for container in half_made.containers {
            self.take_back_container(&container).await;
        }
        for sandbox in half_made.sandboxes {
            self.take_back_sandbox(&sandbox).await;
        }
        // Together: one silent monitor must not hold up the others.
        let adopt = async |sandbox: Arc<Sandbox>| {
            if let Err(e) = self.adopt(&sandbox).await {
                tracing::error!(sandbox = %sandbox.id, error = %orlop_base::telemetry::chain(&e), "could not bring the sandbox in order");
            }
        };
        futures::stream::iter(self.store.sandboxes()).for_each_concurrent(ADOPT_AT_ONCE, adopt).await;
        self.reclaim().await;
        Ok(())
    }

    /// Reads all records; returns those that were never answered.
    fn load(&self) -> Result<HalfMade> {
        let (mut sandboxes, mut containers) = (Vec::new(), Vec::new());
        for id in folders(&self.config.state_dir.join("sandboxes"))? {
            let file = self.config.sandbox_state_dir(&id).join(SANDBOX_RECORD);
            let answered = |r: &SandboxRecord| r.id == id && r.phase != SandboxPhase::Creating;
            let record = match read_record(&file, answered) {
                Ok(Some(r)) if r.id == id => r,
                Err(e @ durable::Error::Version { .. }) => return Err(e.into()),
                Ok(_) => unknown_sandbox(&id),
                Err(e) => {
                    tracing::error!(sandbox = %id, error = %e, "unreadable record; the sandbox is cleaned up");
                    unknown_sandbox(&id)
                }
            };
            let half_made = record.phase == SandboxPhase::Creating;
            let name = sandbox_name(&record.metadata());
            let monitor = Monitor::at(self.config.sandbox_run_dir(&id));
            let sandbox = Sandbox::new(record, file, monitor);
            if half_made {
                sandboxes.push(sandbox);
            } else {
                self.reserve_again(&name, &id);
                self.keep_level(&sandbox.record().selinux, &id);
                self.store.add_sandbox(sandbox);
            }
        }
        for id in folders(&self.config.state_dir.join("containers"))? {
            let dir = self.config.container_state_dir(&id);
            let file = dir.join(CONTAINER_RECORD);
            let answered = |r: &ContainerRecord| r.id == id && r.phase != ContainerPhase::Creating;
            let record = match read_record(&file, answered) {
                Ok(Some(r)) if r.id == id => r,
                Err(e @ durable::Error::Version { .. }) => return Err(e.into()),
                other => {
                    if let Err(e) = other {
                        tracing::error!(container = %id, error = %e, "unreadable record; the container is cleaned up");
                    }
                    // What it left is reclaimed as belonging to nobody.
                    if let Err(e) = mounts::remove_tree(&dir) {
                        tracing::error!(container = %id, error = %e, "could not delete an unreadable record");
                    }
                    continue;
                }
            };
            let half_made = record.phase == ContainerPhase::Creating;
            let container = Container::new(record, file);
            match self.store.sandbox(&container.sandbox_id) {
                Ok(sandbox) if !half_made => {
                    let name = container_name(&container.record().metadata(), &sandbox.record().metadata());
                    self.reserve_again(&name, &id);
                    self.store.add_container(container);
                }
                _ => containers.push(container),
            }
        }
        Ok(HalfMade { sandboxes, containers })
    }

    /// A name that two records claim is held by both: each is there under its id, to be removed.
    fn reserve_again(&self, name: &str, id: &str) {
        if let Some(other) = self.store.names.share(name, id) {
            tracing::error!(id, other, name, "two records have the same name; remove one of them");
        }
    }

    async fn take_back_container(&self, container: &Container) {
        let sandbox = self.store.sandbox(&container.sandbox_id).ok();
        let alive = sandbox.filter(|s| s.record().phase == SandboxPhase::Ready);
        let done = match self.take_back(container, alive.as_ref()).await {
            // The next look at its monitor takes away what that has of it.
            Err(Error::Monitor(_)) => self.take_back(container, None).await,
            other => other,
        };
        match done {
            Ok(()) => tracing::info!(container = %container.id, "took back a half-made container"),
            Err(e) => {
                tracing::error!(container = %container.id, error = %e, "could not take back a half-made container")
            }
        }
    }

    async fn take_back_sandbox(&self, sandbox: &Sandbox) {
        let done = async {
            let run_dir = self.config.sandbox_run_dir(&sandbox.id);
            if !run_dir.join("monitor.sock").exists() {
                // An earlier run was just starting it; it does not listen yet.
                sandbox.monitor.end().await?;
            }
            self.tear_down(sandbox).await?;
            mounts::remove_tree(&self.config.sandbox_state_dir(&sandbox.id))
        };
        match done.await {
            Ok(()) => tracing::info!(sandbox = %sandbox.id, "took back a half-made sandbox"),
            Err(e) => {
                tracing::error!(sandbox = %sandbox.id, error = %e, "could not take back a half-made sandbox")
            }
        }
    }

    async fn adopt(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<()> {
        match sandbox.record().phase {
            SandboxPhase::Ready => {
                let known: Vec<String> =
                    self.store.containers_of(&sandbox.id).iter().map(|c| c.id.clone()).collect();
                let adopt = async {
                    let state = sandbox.monitor.state().await?;
                    self.adopt_state(sandbox, &state, &known).await
                };
                let timed_out = Err(crate::monitor::Error::Timeout("the server that started"));
                match timeout(ADOPT_LIMIT, adopt).await.unwrap_or(timed_out) {
                    Ok(()) => {
                        self.watch(sandbox.clone(), None);
                        tracing::info!(sandbox = %sandbox.id, "adopted a running pod");
                    }
                    // One that cannot be seen counts as alive: what follows it looks again.
                    Err(e)
                        if e.is_shortage()
                            || e.is_silence() && !matches!(sandbox.monitor.process(), Ok(None)) =>
                    {
                        tracing::warn!(sandbox = %sandbox.id, error = %e, "the pod's monitor lives but does not answer; waiting for it");
                        self.watch(sandbox.clone(), Some(known));
                    }
                    Err(e) if e.is_silence() => {
                        tracing::warn!(sandbox = %sandbox.id, error = %e, "the pod's monitor is gone");
                        self.bury(sandbox).await?;
                    }
                    Err(e) => return Err(e.into()),
                }
            }
            // A stop was cut short: finish it.
            SandboxPhase::NotReady => {
                if let Ok(Ok(state)) = timeout(ADOPT_LIMIT, sandbox.monitor.state()).await {
                    let known = self
                        .store
                        .containers_of(&sandbox.id)
                        .iter()
                        .map(|c| c.id.clone())
                        .collect::<Vec<_>>();
                    // What the stop cannot ask for, it takes away.
                    let _ = self.adopt_state(sandbox, &state, &known).await;
                }
                // Somebody has to see the ends that the stop waits for.
                self.watch(sandbox.clone(), None);
                let _held = sandbox.op.lock().await;
                self.stop_sandbox(sandbox).await?;
            }
            SandboxPhase::Creating => {}
        }
        Ok(())
    }

    /// Takes away what belongs to no record.
    async fn reclaim(&self) {
        let keys: HashSet<String> = self
            .store
            .containers()
            .iter()
            .flat_map(|c| {
                let mut keys = c.record().image_volumes.clone();
                keys.push(c.id.clone());
                keys
            })
            .collect();
        for key in self.images.rootfs_keys().into_iter().filter(|k| !keys.contains(k)) {
            if let Err(e) = self.images.remove_rootfs(&key).await {
                tracing::error!(key, error = %e, "could not remove a left-over root file system");
            }
        }
        for id in folders(&self.config.run_dir.join("s")).unwrap_or_default() {
            if self.store.sandbox(&id).is_err() {
                let monitor = Monitor::at(self.config.sandbox_run_dir(&id));
                let file = self.config.sandbox_state_dir(&id).join(SANDBOX_RECORD);
                self.take_back_sandbox(&Sandbox::new(unknown_sandbox(&id), file, monitor)).await;
            } else if let Ok(bundles) = folders(&self.config.sandbox_run_dir(&id).join("bundles")) {
                for c in bundles.iter().filter(|c| self.store.container(c).is_err()) {
                    if let Err(e) = mounts::remove_tree(&self.config.bundle_dir(&id, c)) {
                        tracing::error!(container = %c, error = %e, "could not remove a left-over bundle");
                    }
                }
            }
        }
        let attached: Vec<String> = self
            .store
            .sandboxes()
            .iter()
            .filter(|s| s.record().network_attached)
            .map(|s| s.id.clone())
            .collect();
        if let Err(e) = self.network.keep_only(&attached).await {
            tracing::warn!(error = %orlop_base::telemetry::chain(&e), "could not reclaim network attachments; the next start tries again");
        }
    }
}
