//! The store behind the API server: revisioned keys, lists at a revision, compare-and-swap, watch, compaction.
//!
//! The model is etcd v3's: one revision counter for the whole store, every successful write takes the next revision,
//! and past revisions stay readable until they are compacted. Two engines are meant to stand behind [`Store`]:
//! [`embedded::Embedded`] (one file, no other process) and etcd. [`testsuite`] is what each of them must pass.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;

pub mod embedded;
mod embedded_db;
mod embedded_writer;
pub mod testsuite;

/// A revision of the store. 0 means "none"; the first write makes revision 2, as in etcd.
pub type Revision = u64;

/// One key at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The key.
    pub key: Arc<str>,
    /// The value.
    pub value: Bytes,
    /// Revision of the write that made this value.
    pub revision: Revision,
    /// Revision of the write that created the key.
    pub created: Revision,
}

/// What a write demands of the key's present state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// The key must not exist.
    Absent,
    /// The key's last write must be this revision.
    Revision(Revision),
}

/// What to do when the expectation holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Store a value; with `ttl` the key goes away after that time unless it is written again.
    Put {
        /// The new value.
        value: Bytes,
        /// Time to live; whole seconds count.
        ttl: Option<Duration>,
    },
    /// Remove the key.
    Delete,
}

/// What a compare-and-swap did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Written and durable.
    Committed(Revision),
    /// The expectation did not hold; this is what is there.
    Conflict(Option<Record>),
}

/// A part of a list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// Records in key order.
    pub records: Vec<Record>,
    /// Revision the list shows.
    pub revision: Revision,
    /// Whether there are more records after the last one.
    pub more: bool,
}

/// What to list.
#[derive(Clone, Debug, Default)]
pub struct Range {
    /// Only keys that start with this.
    pub prefix: String,
    /// Only keys greater than this one.
    pub after: Option<String>,
    /// At most this many records; 0 = no limit.
    pub limit: usize,
    /// State as of this revision; 0 = now.
    pub revision: Revision,
}

/// One change, as a watch delivers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The key written or deleted.
    pub key: Arc<str>,
    /// The new value; `None` when the key was deleted.
    pub value: Option<Bytes>,
    /// Revision of the change.
    pub revision: Revision,
    /// Revision at which the key was created; equal to `revision` on creation, 0 on deletion.
    pub created: Revision,
}

/// What a watch delivers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchItem {
    /// Changes in revision order; never empty.
    Events(Vec<Event>),
    /// Everything up to this revision has been delivered. Sent at least once after the history has been replayed,
    /// and whenever the store moved on without a change under the prefix.
    Progress(Revision),
}

/// A running watch. It ends with an error item when its revision has been compacted away or the store stops.
#[derive(Debug)]
pub struct Watch {
    /// Items in order. The channel is bounded: a slow reader slows only its own watch.
    pub items: mpsc::Receiver<Result<WatchItem, Error>>,
}

/// Everything that can go wrong in a store.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The revision asked for has been compacted.
    #[error("revision {requested} has been compacted; the oldest readable one is {oldest}")]
    Compacted {
        /// The revision asked for.
        requested: Revision,
        /// The oldest revision that is still readable.
        oldest: Revision,
    },
    /// The revision asked for lies in the future.
    #[error("revision {requested} is in the future; the store is at {current}")]
    Future {
        /// The revision asked for.
        requested: Revision,
        /// The current revision.
        current: Revision,
    },
    /// Another process has the data directory.
    #[error("the store in {dir} is in use by another process; stop it or choose another --data-dir")]
    InUse {
        /// The data directory.
        dir: String,
    },
    /// The data was written by another version.
    #[error(
        "the store in {dir} has format version {found}, this program reads {wanted}; use the release that wrote it, or an empty --data-dir"
    )]
    Version {
        /// The data directory.
        dir: String,
        /// Version found.
        found: u32,
        /// Version this program reads.
        wanted: u32,
    },
    /// The disk or the database failed.
    #[error("cannot {what}: {why}")]
    Storage {
        /// What was attempted.
        what: &'static str,
        /// What the system said.
        why: String,
    },
    /// The store has been stopped, or its writer died of an earlier storage error.
    #[error("the store is stopped")]
    Stopped,
    /// Key or value breaks a limit.
    #[error("{what} of {bytes} bytes is larger than the limit of {limit}")]
    TooLarge {
        /// Which part.
        what: &'static str,
        /// Its size.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
}

impl Error {
    /// Whether the same request can succeed later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Error::Stopped | Error::Future { .. })
    }
}

/// A store of revisioned keys. All methods are linearizable; [`Store::compare_and_swap`] answers only once the write is durable.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// The newest value of `key`.
    async fn get(&self, key: &str) -> Result<Option<Record>, Error>;

    /// Records of a range in key order.
    ///
    /// # Errors
    /// [`Error::Compacted`] and [`Error::Future`] for revisions that cannot be read.
    async fn list(&self, range: &Range) -> Result<Page, Error>;

    /// How many records a range has; its limit does not count.
    ///
    /// # Errors
    /// As [`Store::list`].
    async fn count(&self, range: &Range) -> Result<u64, Error>;

    /// Writes `key` if `expect` holds; durable before it returns.
    async fn compare_and_swap(&self, key: &str, expect: Expect, write: Write) -> Result<Outcome, Error>;

    /// Changes under `prefix` with a revision greater than `after`; `after` 0 = from now on.
    ///
    /// # Errors
    /// [`Error::Compacted`] when changes after `after` are no longer known.
    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, Error>;

    /// The revision of the last write.
    async fn current_revision(&self) -> Result<Revision, Error>;

    /// Forgets what is needed only for revisions below `revision`.
    async fn compact(&self, revision: Revision) -> Result<(), Error>;

    /// The oldest revision that can still be listed or watched from.
    async fn compacted_revision(&self) -> Result<Revision, Error>;

    /// Bytes on disk, as far as the engine knows.
    async fn size_bytes(&self) -> Result<u64, Error>;
}
