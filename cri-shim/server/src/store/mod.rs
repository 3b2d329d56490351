//! Sandboxes and containers: what is on disk, what is in memory, and how they are found.

mod encoded;
mod folders;
mod journal;
pub(crate) mod names;
pub(crate) mod records;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use orlop_base::durable::{self, Sync};
use parking_lot::{Mutex, RwLock};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, watch};

pub(crate) use encoded::Encoded;
pub(crate) use folders::Folders;
use journal::Journal;
pub(crate) use names::Names;
pub(crate) use records::{ContainerPhase, ContainerRecord, SandboxPhase, SandboxRecord};

use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::nri::Told;

/// Version of both records' on-disk form.
pub(crate) const RECORD_VERSION: u32 = 1;

/// A sandbox's record, in its folder.
pub(crate) const SANDBOX_RECORD: &str = "sandbox.json";
/// A container's.
pub(crate) const CONTAINER_RECORD: &str = "container.json";

/// Beside a record: what it was when the creation was answered, for when the record is damaged. What has happened since, the pod's
/// monitor tells.
const ANSWERED: &str = "answered.json";

/// Between two tries to write what the disk did not take.
const WRITE_AGAIN: Duration = Duration::from_secs(2);

/// Writes the record's copy.
fn keep_copy<T: Serialize>(file: &Path, record: &T) -> Result<()> {
    Ok(durable::append_json(&file.with_file_name(ANSWERED), RECORD_VERSION, record)?)
}

/// A record, or its copy if that is `good` and the record is not: then the copy takes its place.
///
/// # Errors
/// [`durable::Error::Version`] also for the copy: a later release's is not thrown away.
pub(crate) fn read_record<T: DeserializeOwned + Serialize>(
    file: &Path,
    good: impl Fn(&T) -> bool,
) -> Result<Option<T>, durable::Error> {
    let found = durable::read_json::<T>(file, RECORD_VERSION);
    match &found {
        Ok(Some(record)) if good(record) => return found,
        Err(durable::Error::Version { .. }) => return found,
        _ => {}
    }
    let copy = match durable::read_json::<T>(&file.with_file_name(ANSWERED), RECORD_VERSION) {
        Ok(Some(copy)) if good(&copy) => copy,
        Err(e @ durable::Error::Version { .. }) => return Err(e),
        _ => return found,
    };
    let aside = file.with_extension("json.damaged");
    // One of an earlier time is in the way if either is a folder.
    let _ = std::fs::remove_file(&aside).or_else(|_| std::fs::remove_dir_all(&aside));
    match std::fs::rename(file, &aside) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(durable::Error::Io { what: "rename", path: file.to_owned(), source: e });
        }
        _ => {}
    }
    tracing::warn!(file = %file.display(), aside = %aside.display(), "took a damaged record from its copy");
    durable::write_json(file, RECORD_VERSION, &copy, Sync::PageCache)?;
    Ok(Some(copy))
}

/// A sandbox. The record is the truth. What an RPC promises is on disk before it is answered; what has happened already, such as an
/// end, is true whether or not the disk takes it ([`Store::note_sandbox`]).
pub(crate) struct Sandbox {
    pub id: String,
    journal: Journal<SandboxRecord>,
    pub monitor: Monitor,
    /// Held by what changes the sandbox as a whole, so that a stop and a remove do not run into each other.
    pub op: tokio::sync::Mutex<()>,
    /// CPU usage at the last stats call, for the momentary rate.
    pub cpu_sample: Mutex<Option<(i64, u64)>>,
    pub told: Told,
}

impl Sandbox {
    pub fn new(record: SandboxRecord, file: PathBuf, monitor: Monitor) -> Arc<Sandbox> {
        Arc::new(Sandbox {
            id: record.id.clone(),
            told: Told::new(record.stopped),
            journal: Journal::new(record, file),
            monitor,
            op: tokio::sync::Mutex::new(()),
            cpu_sample: Mutex::new(None),
        })
    }

    pub fn record(&self) -> Arc<SandboxRecord> {
        self.journal.record()
    }

    /// The record of a ready sandbox; an error that names what was `wanted` of another.
    pub fn ready(&self, wanted: &'static str) -> Result<Arc<SandboxRecord>> {
        let record = self.record();
        if record.phase != SandboxPhase::Ready {
            let id = self.id.clone();
            return Err(Error::WrongState { what: "sandbox", id, state: "not ready", wanted });
        }
        Ok(record)
    }

    /// Changes the record on disk, then in memory.
    pub fn update(&self, change: impl FnOnce(&mut SandboxRecord)) -> Result<Arc<SandboxRecord>> {
        Ok(self.journal.update(change, |_| {})?)
    }

    /// Keeps a copy of the record: called when something is in it that only a caller knows.
    pub fn keep_copy(&self) -> Result<()> {
        keep_copy(&self.journal.file, &*self.record())
    }
}

/// A container; see [`Sandbox`].
pub(crate) struct Container {
    pub id: String,
    pub sandbox_id: String,
    journal: Journal<ContainerRecord>,
    /// Held by start, stop, update and remove.
    pub op: tokio::sync::Mutex<()>,
    /// The phase as it changes, for those who wait for an exit.
    phase: watch::Sender<ContainerPhase>,
    pub cpu_sample: Mutex<Option<(i64, u64)>>,
    pub told: Told,
}

impl Container {
    pub fn new(record: ContainerRecord, file: PathBuf) -> Arc<Container> {
        Arc::new(Container {
            id: record.id.clone(),
            sandbox_id: record.sandbox_id.clone(),
            phase: watch::channel(record.phase).0,
            told: Told::new(record.phase.has_ended()),
            journal: Journal::new(record, file),
            op: tokio::sync::Mutex::new(()),
            cpu_sample: Mutex::new(None),
        })
    }

    pub fn record(&self) -> Arc<ContainerRecord> {
        self.journal.record()
    }

    /// The record of a container in one of these phases; an error that names what was `wanted` of another.
    pub fn in_phase(&self, phases: &[ContainerPhase], wanted: &'static str) -> Result<Arc<ContainerRecord>> {
        let record = self.record();
        if !phases.contains(&record.phase) {
            let (id, state) = (self.id.clone(), record.phase.name());
            return Err(Error::WrongState { what: "container", id, state, wanted });
        }
        Ok(record)
    }

    /// Changes the record on disk, then in memory, then tells those who wait.
    pub fn update(&self, change: impl FnOnce(&mut ContainerRecord)) -> Result<Arc<ContainerRecord>> {
        Ok(self.journal.update(change, |r| self.tell(r.phase))?)
    }

    fn tell(&self, phase: ContainerPhase) {
        self.phase.send_if_modified(|p| std::mem::replace(p, phase) != phase);
    }

    /// See [`Sandbox::keep_copy`].
    pub fn keep_copy(&self) -> Result<()> {
        keep_copy(&self.journal.file, &*self.record())
    }

    /// Returns when the container runs no process any more.
    pub async fn ended(&self) {
        // The sender lives in self, so this cannot fail while we wait.
        let _ = self.phase.subscribe().wait_for(|p| p.has_ended()).await;
    }
}

/// All of them, by id.
#[derive(Default)]
pub(crate) struct Store {
    sandboxes: RwLock<HashMap<String, Arc<Sandbox>>>,
    containers: RwLock<HashMap<String, Arc<Container>>>,
    pub names: Names,
    /// A fact could not be written.
    unwritten: Notify,
}

fn find<T>(map: &HashMap<String, Arc<T>>, what: &'static str, id: &str) -> Result<Arc<T>> {
    if let Some(found) = map.get(id) {
        return Ok(found.clone());
    }
    if id.is_empty() {
        return Err(Error::Invalid(format!("the {what} id is empty")));
    }
    let mut fits = map.iter().filter(|(k, _)| k.starts_with(id)).map(|(_, v)| v);
    match (fits.next(), fits.next()) {
        (Some(one), None) => Ok(one.clone()),
        (Some(_), Some(_)) => Err(Error::Ambiguous { what, id: id.to_owned() }),
        (None, _) => Err(Error::NotFound { what, id: id.to_owned() }),
    }
}

impl Store {
    /// Changes a sandbox's record by what has happened already: in memory at once, on disk when that takes it.
    pub fn note_sandbox(&self, sandbox: &Sandbox, change: impl FnOnce(&mut SandboxRecord)) {
        if !sandbox.journal.note(change, |_| {}) {
            self.unwritten.notify_one();
        }
    }

    /// See [`Store::note_sandbox`].
    pub fn note_container(&self, container: &Container, change: impl FnOnce(&mut ContainerRecord)) {
        if !container.journal.note(change, |r| container.tell(r.phase)) {
            self.unwritten.notify_one();
        }
    }

    /// Returns when all facts are on disk that could not be written when they happened, having waited for such first.
    pub async fn write_facts(&self) {
        self.unwritten.notified().await;
        loop {
            tokio::time::sleep(WRITE_AGAIN).await;
            if self.write_missing() {
                return;
            }
        }
    }

    /// Whether nothing is missing any more. What is being changed or removed just now has its turn later.
    fn write_missing(&self) -> bool {
        let mut all = true;
        for s in self.sandboxes().iter().filter(|s| s.journal.is_unwritten()) {
            all &= s.op.try_lock().is_ok_and(|_held| s.journal.write_missing());
        }
        for c in self.containers().iter().filter(|c| c.journal.is_unwritten()) {
            all &= c.op.try_lock().is_ok_and(|_held| c.journal.write_missing());
        }
        all
    }

    /// By full id or unique prefix.
    pub fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>> {
        find(&self.sandboxes.read(), "sandbox", id)
    }

    /// By full id or unique prefix.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        find(&self.containers.read(), "container", id)
    }

    pub fn add_sandbox(&self, s: Arc<Sandbox>) {
        self.sandboxes.write().insert(s.id.clone(), s);
    }

    pub fn add_container(&self, c: Arc<Container>) {
        self.containers.write().insert(c.id.clone(), c);
    }

    pub fn drop_sandbox(&self, id: &str) {
        self.sandboxes.write().remove(id);
    }

    pub fn drop_container(&self, id: &str) {
        self.containers.write().remove(id);
    }

    /// Newest first, as crictl shows them.
    pub fn sandboxes(&self) -> Vec<Arc<Sandbox>> {
        let mut all: Vec<_> = self.sandboxes.read().values().cloned().collect();
        all.sort_by_cached_key(|s| std::cmp::Reverse(s.record().created_at_ns));
        all
    }

    /// Newest first.
    pub fn containers(&self) -> Vec<Arc<Container>> {
        let mut all: Vec<_> = self.containers.read().values().cloned().collect();
        all.sort_by_cached_key(|c| std::cmp::Reverse(c.record().created_at_ns));
        all
    }

    pub fn containers_of(&self, sandbox: &str) -> Vec<Arc<Container>> {
        let mut all: Vec<_> =
            self.containers.read().values().filter(|c| c.sandbox_id == sandbox).cloned().collect();
        all.sort_by_cached_key(|c| c.record().created_at_ns);
        all
    }
}
