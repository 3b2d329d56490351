//! Why an operation on images failed: what, where, and what to do.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// One failure. Clonable, because callers that share a pull share its failure.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("invalid image reference {text:?}: {why}")]
    Reference { text: String, why: &'static str },
    #[error("invalid name {key:?} for a root file system: use 1 to 128 of letters, digits, '_', '.', '-'")]
    Key { key: String },
    #[error(
        "cannot reach registry {registry} for {reference}: {detail}; check that it runs, the network, DNS and the proxy"
    )]
    Unreachable { reference: String, registry: String, detail: String },
    #[error("registry {registry} refuses access to {reference}: {detail}; check the pull secret or log in")]
    Unauthorized { reference: String, registry: String, detail: String },
    #[error("registry {registry} has no {reference}; check name, tag and platform")]
    NotFound { reference: String, registry: String },
    #[error("registry {registry} limits requests for {reference}; wait, log in, or use a mirror")]
    TooManyRequests { reference: String, registry: String },
    #[error("registry {registry} failed for {reference}: {detail}; try again, then ask its operator")]
    Registry { reference: String, registry: String, detail: String },
    #[error(
        "{what} of {reference} from {origin} has digest {actual}, not {expected}; the source is damaged or tampered with: nothing was kept"
    )]
    DigestMismatch { what: String, reference: String, origin: String, expected: String, actual: String },
    #[error("{reference} has no image for {platform}; it offers {offered}")]
    NoPlatform { reference: String, platform: String, offered: String },
    #[error("{what} of {reference} is not usable: {why}")]
    Malformed { what: String, reference: String, why: String },
    #[error("cannot unpack layer {layer} of {reference}: {source}")]
    Unpack { reference: String, layer: String, source: Arc<crate::unpack::Error> },
    #[error("{archive} is not an OCI layout or docker archive: {why}", archive = archive.display())]
    Archive { archive: PathBuf, why: String },
    #[error("no image {0} in the store; pull or import it first")]
    NoImage(String),
    #[error("no root file system {0} in the store")]
    NoRootfs(String),
    #[error("root file system {key} exists with another image ({image}); remove it first")]
    RootfsExists { key: String, image: String },
    #[error("cannot mount {key} at {target}: {detail}", target = target.display())]
    Mount { key: String, target: PathBuf, detail: String },
    #[error("{path}: {why}", path = path.display())]
    Config { path: PathBuf, why: String },
    #[error("cannot {what} {path}", path = path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: Arc<io::Error>,
    },
    #[error(transparent)]
    State(Arc<orlop_base::durable::Error>),
    #[error("the disk of the image store {root} is full, in bytes or inodes: {detail}; remove images or other files, then try again", root = root.display())]
    Full { root: PathBuf, detail: String },
    #[error("the operation was cut short because the program is ending")]
    Cancelled,
}

impl Error {
    /// Whether the same call may succeed later without anything being changed.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Error::Unreachable { .. }
                | Error::Registry { .. }
                | Error::TooManyRequests { .. }
                | Error::Cancelled
                | Error::Io { .. }
                | Error::Full { .. }
        )
    }

    /// Says so when the disk that holds `root` was full, wherever it showed.
    pub(crate) fn name_full_disk(self, root: &Path) -> Error {
        let full =
            |e: &io::Error| matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        let mut next: Option<&(dyn std::error::Error + 'static)> = Some(&self);
        while let Some(e) = next {
            let found = e.downcast_ref::<io::Error>().is_some_and(full)
                || e.downcast_ref::<Arc<io::Error>>().is_some_and(|e| full(e));
            if found {
                return Error::Full { root: root.to_owned(), detail: orlop_base::telemetry::chain(&self) };
            }
            next = e.source();
        }
        self
    }

    /// For `map_err` on I/O: says what was done to which path.
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { what, path, source: Arc::new(source) }
    }

    /// Like [`Error::io`] for rustix calls.
    pub(crate) fn sys(what: &'static str, path: &Path) -> impl FnOnce(rustix::io::Errno) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { what, path, source: Arc::new(source.into()) }
    }
}

impl From<orlop_base::durable::Error> for Error {
    fn from(e: orlop_base::durable::Error) -> Self {
        Error::State(Arc::new(e))
    }
}
