//! The only writer of the embedded engine: one thread that puts all waiting writes into one transaction, so that they
//! share one flush to disk. Nobody is answered before the flush.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use redb::{Database, Durability, ReadableDatabase, ReadableTable, Table, WriteTransaction};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    Error, Expect, Outcome, Revision, Write,
    embedded_db::{EXPIRY, LOG, META, META_REVISION, VERSIONS, Version, compact, record, storage},
};

/// Most writes in one transaction: bounds the memory of a transaction and the wait of its first writer.
pub(crate) const MAX_BATCH: usize = 256;
/// Log entries that one transaction of a compaction removes, so that writers wait only shortly.
const COMPACT_STEP: usize = 2000;

pub(crate) enum Job {
    Write { key: String, expect: Expect, write: Write, reply: oneshot::Sender<Result<Outcome, Error>> },
    Compact { to: Revision, reply: oneshot::Sender<Result<(), Error>> },
    Expire,
}

/// Why the writer has ended, for those who ask it for something after that.
#[derive(Clone, Default)]
pub(crate) struct Failure(Arc<OnceLock<Error>>);

impl Failure {
    pub(crate) fn why(&self) -> Error {
        self.0.get().cloned().unwrap_or(Error::Stopped)
    }
}

pub(crate) struct Writer {
    pub(crate) db: Arc<Database>,
    pub(crate) jobs: mpsc::Receiver<Job>,
    pub(crate) current: watch::Sender<Revision>,
    pub(crate) compacted: watch::Sender<Revision>,
    pub(crate) failure: Failure,
}

type Pending = ((String, Expect, Write), oneshot::Sender<Result<Outcome, Error>>);

impl Writer {
    /// Runs until every sender is gone or the database fails.
    pub(crate) fn run(mut self) {
        let mut batch = Vec::with_capacity(MAX_BATCH);
        while self.jobs.blocking_recv_many(&mut batch, MAX_BATCH) > 0 {
            if let Err(e) = self.work(&mut batch) {
                tracing::error!(error = %e, "the store cannot write and stops");
                // Set before the queue and the watches' channel close.
                let _ = self.failure.0.set(e);
                return;
            }
        }
    }

    fn work(&mut self, batch: &mut Vec<Job>) -> Result<(), Error> {
        let mut writes = Vec::with_capacity(batch.len());
        let mut rest = Vec::new();
        for job in batch.drain(..) {
            match job {
                Job::Write { key, expect, write, reply } => writes.push(((key, expect, write), reply)),
                other => rest.push(other),
            }
        }
        if !writes.is_empty() {
            self.commit(writes)?;
        }
        for job in rest {
            match job {
                Job::Compact { to, reply } => {
                    let done = self.compact(to);
                    let failed = done.is_err();
                    let _ = reply.send(done.clone());
                    if failed {
                        return done;
                    }
                }
                Job::Expire => self.expire()?,
                Job::Write { .. } => {}
            }
        }
        Ok(())
    }

    fn begin(&self) -> Result<WriteTransaction, Error> {
        let mut tx = self.db.begin_write().map_err(storage("begin a write"))?;
        tx.set_durability(Durability::Immediate).map_err(storage("begin a durable write"))?;
        Ok(tx)
    }

    fn commit(&mut self, writes: Vec<Pending>) -> Result<(), Error> {
        let (writes, replies): (Vec<_>, Vec<_>) = writes.into_iter().unzip();
        // A caller may have given up waiting; what happened to its write stands all the same.
        match self.transact(writes) {
            Ok(outcomes) => {
                for (reply, outcome) in replies.into_iter().zip(outcomes) {
                    let _ = reply.send(Ok(outcome));
                }
                Ok(())
            }
            Err(e) => {
                for reply in replies {
                    let _ = reply.send(Err(e.clone()));
                }
                Err(e)
            }
        }
    }

    /// Carries out writes in one transaction; gives the outcome of each once they are on disk.
    fn transact(&mut self, writes: Vec<(String, Expect, Write)>) -> Result<Vec<Outcome>, Error> {
        let tx = self.begin()?;
        let before = *self.current.borrow();
        let mut revision = before;
        let mut outcomes = Vec::with_capacity(writes.len());
        {
            let mut tables = Tables::open(&tx)?;
            for (key, expect, write) in writes {
                outcomes.push(tables.apply(&key, expect, write, &mut revision)?);
            }
            if revision != before {
                tables.meta.insert(META_REVISION, revision).map_err(storage("store the revision"))?;
            }
        }
        if revision != before {
            tx.commit().map_err(storage("commit"))?;
            self.current.send_replace(revision);
        } else {
            tx.abort().map_err(storage("abandon a write"))?;
        }
        Ok(outcomes)
    }

    fn compact(&mut self, to: Revision) -> Result<(), Error> {
        let to = to.min(*self.current.borrow());
        if to <= *self.compacted.borrow() {
            return Ok(());
        }
        // Readers are refused before anything goes, so none sees half of a compacted revision.
        self.compacted.send_replace(to);
        loop {
            let tx = self.begin()?;
            let done = compact(&tx, to, COMPACT_STEP)?;
            tx.commit().map_err(storage("commit a compaction"))?;
            if done {
                return Ok(());
            }
        }
    }

    fn expire(&mut self) -> Result<(), Error> {
        let now = unix_seconds(SystemTime::now());
        loop {
            let due: Vec<(u64, String, Revision)> = {
                let read = self.db.begin_read().map_err(storage("begin a read"))?;
                let table = read.open_table(EXPIRY).map_err(storage("open the deadlines"))?;
                table
                    .range(..(now, ""))
                    .map_err(storage("search the deadlines"))?
                    .take(MAX_BATCH)
                    .map(|e| e.map(|(k, v)| (k.value().0, k.value().1.to_owned(), v.value())))
                    .collect::<Result<_, _>>()
                    .map_err(storage("read the deadlines"))?
            };
            if due.is_empty() {
                return Ok(());
            }
            let tx = self.begin()?;
            let mut revision = *self.current.borrow();
            {
                let mut tables = Tables::open(&tx)?;
                for (deadline, key, written) in due {
                    tables.expiry.remove((deadline, key.as_str())).map_err(storage("remove a deadline"))?;
                    // A later write of the key brought its own deadline; then the expectation fails, as it should.
                    tables.apply(&key, Expect::Revision(written), Write::Delete, &mut revision)?;
                }
                tables.meta.insert(META_REVISION, revision).map_err(storage("store the revision"))?;
            }
            tx.commit().map_err(storage("commit"))?;
            self.current.send_replace(revision);
        }
    }
}

struct Tables<'tx> {
    versions: Table<'tx, (&'static str, u64), &'static [u8]>,
    log: Table<'tx, u64, &'static str>,
    expiry: Table<'tx, (u64, &'static str), u64>,
    meta: Table<'tx, &'static str, u64>,
}

impl<'tx> Tables<'tx> {
    fn open(tx: &'tx WriteTransaction) -> Result<Tables<'tx>, Error> {
        Ok(Tables {
            versions: tx.open_table(VERSIONS).map_err(storage("open the versions"))?,
            log: tx.open_table(LOG).map_err(storage("open the log"))?,
            expiry: tx.open_table(EXPIRY).map_err(storage("open the deadlines"))?,
            meta: tx.open_table(META).map_err(storage("open the meta table"))?,
        })
    }

    fn apply(
        &mut self,
        key: &str,
        expect: Expect,
        write: Write,
        revision: &mut Revision,
    ) -> Result<Outcome, Error> {
        let present = record(&self.versions, key)?;
        let holds = match (&expect, &present) {
            (Expect::Absent, None) => true,
            (Expect::Revision(wanted), Some(p)) => *wanted == p.revision,
            _ => false,
        };
        if !holds {
            return Ok(Outcome::Conflict(present));
        }
        let next = *revision + 1;
        let (version, ttl) = match write {
            Write::Put { value, ttl } => {
                (Version::Live { created: present.map_or(next, |p| p.created), value }, ttl)
            }
            Write::Delete => (Version::Deleted, None),
        };
        self.versions.insert((key, next), version.encode().as_slice()).map_err(storage("write a version"))?;
        self.log.insert(next, key).map_err(storage("write the log"))?;
        if let Some(ttl) = ttl {
            let deadline = unix_seconds(SystemTime::now() + ttl);
            self.expiry.insert((deadline, key), next).map_err(storage("write a deadline"))?;
        }
        *revision = next;
        Ok(Outcome::Committed(next))
    }
}

fn unix_seconds(t: SystemTime) -> u64 {
    t.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}

/// Makes all tables exist, and returns current and compacted revision.
pub(crate) fn prepare(db: &Database) -> Result<(Revision, Revision), Error> {
    let tx = db.begin_write().map_err(storage("begin a write"))?;
    let found;
    {
        let mut tables = Tables::open(&tx)?;
        let current =
            tables.meta.get(META_REVISION).map_err(storage("read the revision"))?.map(|v| v.value());
        let compacted = tables
            .meta
            .get(crate::embedded_db::META_COMPACTED)
            .map_err(storage("read the revision"))?
            .map(|v| v.value());
        if current.is_none() {
            tables.meta.insert(META_REVISION, 1).map_err(storage("store the revision"))?;
        }
        found = (current.unwrap_or(1), compacted.unwrap_or(0));
    }
    tx.commit().map_err(storage("commit"))?;
    Ok(found)
}
