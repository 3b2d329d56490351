//! The embedded engine: one redb file, one writer thread, group commit.
//!
//! A directory holds `version.json`, `lock` and `store.redb`. A write is answered after it was flushed to disk; writers
//! that wait at the same time share one flush. Reads go straight to the database's snapshots. Old revisions are dropped
//! every [`Options::compact_interval`], and earlier when more than [`Options::max_history`] of them have piled up.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use orlop_base::{
    durable::{self, DirLock},
    supervise::TaskGroup,
};
use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTableMetadata};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    Error, Event, Expect, Outcome, Page, Range, Record, Revision, Store, Watch, WatchItem, Write,
    embedded_db::{self, VERSIONS, storage},
    embedded_writer::{Failure, Job, MAX_BATCH, Writer, prepare},
};

/// Version of the on-disk form.
const FORMAT: u32 = 1;
/// Largest value. Upstream's etcd limits a request to 1.5 MiB; Kubernetes objects up to 3 MiB are refused earlier.
const MAX_VALUE: usize = 3 << 20;
const MAX_KEY: usize = 4096;
/// Changes that one watch holds ready; a reader that is further behind re-reads them from disk.
const WATCH_BATCH: usize = 256;

/// How the engine behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long past revisions stay readable.
    pub compact_interval: Duration,
    /// How many past revisions stay readable at most, roughly.
    pub max_history: u64,
    /// Memory that the database may use for pages, in bytes.
    pub cache_bytes: usize,
    /// How often keys with a time to live are looked at.
    pub expiry_interval: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            compact_interval: Duration::from_secs(300),
            max_history: 50_000,
            cache_bytes: 6 << 20,
            expiry_interval: Duration::from_secs(15),
        }
    }
}

/// The embedded engine. Cloning gives another handle.
#[derive(Clone)]
pub struct Embedded {
    inner: Arc<Inner>,
}

struct Inner {
    db: Arc<Database>,
    jobs: mpsc::Sender<Job>,
    current: watch::Receiver<Revision>,
    compacted: watch::Receiver<Revision>,
    failure: Failure,
    tasks: TaskGroup,
    file: PathBuf,
    _lock: DirLock,
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Marker {
    engine: String,
}

impl Embedded {
    /// Opens or creates the store in `dir`. Background work is owned by `tasks`.
    ///
    /// # Errors
    /// [`Error::InUse`] and [`Error::Version`] say what to do; anything else is the disk's fault.
    pub async fn open(dir: &Path, options: Options, tasks: &TaskGroup) -> Result<Embedded, Error> {
        let lock = DirLock::take(dir).await.map_err(|e| durable_error(dir, e))?;
        check_version(dir)?;
        let file = dir.join("store.redb");
        let path = file.clone();
        let (db, (current, compacted)) = blocking(move || {
            let db = Database::builder()
                .set_cache_size(options.cache_bytes)
                .create(&path)
                .map_err(storage("open the database"))?;
            let revisions = prepare(&db)?;
            Ok((Arc::new(db), revisions))
        })
        .await?;
        let (jobs, receiver) = mpsc::channel(2 * MAX_BATCH);
        let (current_tx, current_rx) = watch::channel(current);
        let (compacted_tx, compacted_rx) = watch::channel(compacted);
        let failure = Failure::default();
        let writer = Writer {
            db: db.clone(),
            jobs: receiver,
            current: current_tx,
            compacted: compacted_tx,
            failure: failure.clone(),
        };
        std::thread::Builder::new()
            .name("store-writer".into())
            .stack_size(512 << 10)
            .spawn(move || writer.run())
            .map_err(storage("start the writer thread"))?;
        let inner = Arc::new(Inner {
            db,
            jobs,
            current: current_rx,
            compacted: compacted_rx,
            failure,
            tasks: tasks.clone(),
            file,
            _lock: lock,
        });
        tasks.spawn(maintain(Arc::downgrade(&inner), options, tasks.stop_token()));
        Ok(Embedded { inner })
    }

    fn check_readable(&self, revision: Revision) -> Result<(), Error> {
        let oldest = *self.inner.compacted.borrow();
        if revision < oldest {
            return Err(Error::Compacted { requested: revision, oldest });
        }
        Ok(())
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(Error::Stopped))
}

fn durable_error(dir: &Path, e: durable::Error) -> Error {
    let dir = dir.display().to_string();
    match e {
        durable::Error::Locked { .. } => Error::InUse { dir },
        durable::Error::Version { found, wanted, .. } => Error::Version { dir, found, wanted },
        other => Error::Storage { what: "prepare the data directory", why: other.to_string() },
    }
}

fn check_version(dir: &Path) -> Result<(), Error> {
    let path = dir.join("version.json");
    match durable::read_json::<Marker>(&path, FORMAT) {
        Ok(Some(_)) => Ok(()),
        Ok(None) => {
            if fs::exists(dir.join("store.redb")).unwrap_or(false) {
                return Err(Error::Storage {
                    what: "recognise the store",
                    why: format!(
                        "{} holds a database but no version.json; restore the file or choose another --data-dir",
                        dir.display()
                    ),
                });
            }
            durable::write_json(&path, FORMAT, &Marker { engine: "embedded".into() }, durable::Sync::Disk)
                .map_err(|e| durable_error(dir, e))
        }
        Err(e) => Err(durable_error(dir, e)),
    }
}

/// Compacts and expires until the store is dropped or told to stop.
async fn maintain(
    inner: std::sync::Weak<Inner>,
    options: Options,
    stop: tokio_util::sync::CancellationToken,
) {
    let mut since_compaction = Duration::ZERO;
    // Revision at the previous compaction time: what is older than one whole interval goes.
    let mut mark = 0;
    loop {
        tokio::select! {
            // Both are cancel-safe: a timer and a token.
            () = stop.cancelled() => return,
            () = tokio::time::sleep(options.expiry_interval) => {}
        }
        let Some(inner) = inner.upgrade() else { return };
        since_compaction += options.expiry_interval;
        let (current, compacted) = (*inner.current.borrow(), *inner.compacted.borrow());
        let mut target = 0;
        if since_compaction >= options.compact_interval {
            since_compaction = Duration::ZERO;
            target = mark;
            mark = current;
        }
        if current.saturating_sub(compacted) > options.max_history {
            target = target.max(current - options.max_history / 2);
        }
        let mut sent = inner.jobs.send(Job::Expire).await.is_ok();
        if target > compacted {
            let (reply, _) = oneshot::channel();
            sent &= inner.jobs.send(Job::Compact { to: target, reply }).await.is_ok();
        }
        if !sent {
            return;
        }
    }
}

impl Embedded {
    /// Reads a range at the revision that it names, on a thread that may block.
    async fn read_range<T: Send + 'static>(
        &self,
        range: &Range,
        read_at: fn(&ReadTransaction, &Range, Revision) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let this = self.clone();
        let range = range.clone();
        blocking(move || {
            let read = this.inner.db.begin_read().map_err(storage("begin a read"))?;
            let current = {
                let meta = read.open_table(embedded_db::META).map_err(storage("open the meta table"))?;
                embedded_db::meta(&meta, embedded_db::META_REVISION)?.unwrap_or(1)
            };
            let at = if range.revision == 0 { current } else { range.revision };
            if at > current {
                return Err(Error::Future { requested: at, current });
            }
            if range.revision != 0 {
                this.check_readable(at)?;
            }
            let found = read_at(&read, &range, at)?;
            if range.revision != 0 {
                // A compaction that began meanwhile may have taken versions from under this snapshot's successor, not from it;
                // but the revision must be refused from then on.
                this.check_readable(at)?;
            }
            Ok(found)
        })
        .await
    }
}

#[async_trait]
impl Store for Embedded {
    async fn get(&self, key: &str) -> Result<Option<Record>, Error> {
        // A few page look-ups in a small cache: shorter than a hop to another thread.
        let read = self.inner.db.begin_read().map_err(storage("begin a read"))?;
        embedded_db::get(&read, key)
    }

    async fn list(&self, range: &Range) -> Result<Page, Error> {
        self.read_range(range, embedded_db::list).await
    }

    async fn count(&self, range: &Range) -> Result<u64, Error> {
        self.read_range(range, embedded_db::count).await
    }

    async fn compare_and_swap(&self, key: &str, expect: Expect, write: Write) -> Result<Outcome, Error> {
        if key.len() > MAX_KEY || key.contains('\0') {
            return Err(Error::TooLarge { what: "a key", bytes: key.len(), limit: MAX_KEY });
        }
        if let Write::Put { value, .. } = &write
            && value.len() > MAX_VALUE
        {
            return Err(Error::TooLarge { what: "a value", bytes: value.len(), limit: MAX_VALUE });
        }
        let (reply, answer) = oneshot::channel();
        self.inner
            .jobs
            .send(Job::Write { key: key.to_owned(), expect, write, reply })
            .await
            .map_err(|_| self.inner.failure.why())?;
        answer.await.unwrap_or_else(|_| Err(self.inner.failure.why()))
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, Error> {
        let after = if after == 0 { *self.inner.current.borrow() } else { after };
        self.check_readable(after)?;
        // Two batches: one being read, one being filled.
        let (sender, items) = mpsc::channel(2);
        let reader = WatchReader {
            db: self.inner.db.clone(),
            current: self.inner.current.clone(),
            compacted: self.inner.compacted.clone(),
            failure: self.inner.failure.clone(),
            prefix: prefix.to_owned(),
            done: after,
            sender,
        };
        let stop = self.inner.tasks.stop_token();
        self.inner.tasks.spawn(reader.run(stop));
        Ok(Watch { items })
    }

    async fn current_revision(&self) -> Result<Revision, Error> {
        Ok(*self.inner.current.borrow())
    }

    async fn compact(&self, revision: Revision) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        let sent = self.inner.jobs.send(Job::Compact { to: revision, reply }).await;
        sent.map_err(|_| self.inner.failure.why())?;
        answer.await.unwrap_or_else(|_| Err(self.inner.failure.why()))
    }

    async fn compacted_revision(&self) -> Result<Revision, Error> {
        Ok(*self.inner.compacted.borrow())
    }

    async fn size_bytes(&self) -> Result<u64, Error> {
        Ok(fs::metadata(&self.inner.file).map(|m| m.len()).unwrap_or(0))
    }
}

impl Embedded {
    /// How many versions are stored, old ones included.
    pub fn versions(&self) -> Result<u64, Error> {
        let read = self.inner.db.begin_read().map_err(storage("begin a read"))?;
        let table = read.open_table(VERSIONS).map_err(storage("open the versions"))?;
        table.len().map_err(storage("count the versions"))
    }
}

/// Follows the log from a revision on. It holds no events of its own: what is not yet delivered lies in the database.
struct WatchReader {
    db: Arc<Database>,
    current: watch::Receiver<Revision>,
    compacted: watch::Receiver<Revision>,
    failure: Failure,
    prefix: String,
    done: Revision,
    sender: mpsc::Sender<Result<WatchItem, Error>>,
}

impl WatchReader {
    async fn run(mut self, stop: tokio_util::sync::CancellationToken) {
        loop {
            let current = *self.current.borrow_and_update();
            match self.step(current) {
                Ok(items) => {
                    for item in items {
                        if self.sender.send(Ok(item)).await.is_err() {
                            return;
                        }
                    }
                }
                Err(e) => {
                    let _ = self.sender.send(Err(e)).await;
                    return;
                }
            }
            if self.done < current {
                continue;
            }
            tokio::select! {
                // All three are cancel-safe: nothing is taken from a queue.
                () = stop.cancelled() => return,
                () = self.sender.closed() => return,
                changed = self.current.changed() => if changed.is_err() {
                    let _ = self.sender.send(Err(self.failure.why())).await;
                    return;
                }
            }
        }
    }

    fn step(&mut self, current: Revision) -> Result<Vec<WatchItem>, Error> {
        let oldest = *self.compacted.borrow();
        if self.done < oldest {
            return Err(Error::Compacted { requested: self.done, oldest });
        }
        if self.done >= current {
            return Ok(vec![WatchItem::Progress(current)]);
        }
        let (events, last): (Vec<Event>, Revision) = {
            let read = self.db.begin_read().map_err(storage("begin a read"))?;
            let found = embedded_db::events(&read, &self.prefix, self.done, WATCH_BATCH);
            // A compaction that began after the check above may have taken log entries that were still to be read.
            let oldest = *self.compacted.borrow();
            if self.done < oldest {
                return Err(Error::Compacted { requested: self.done, oldest });
            }
            found?
        };
        self.done = last.max(if events.len() < WATCH_BATCH { current } else { 0 });
        let mut items = Vec::with_capacity(2);
        if !events.is_empty() {
            items.push(WatchItem::Events(events));
        }
        if self.done >= current {
            items.push(WatchItem::Progress(self.done));
        }
        Ok(items)
    }
}
