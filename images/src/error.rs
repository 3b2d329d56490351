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
    #[error("{program} does not admit {reference} ({digest}): {why}", program = program.display())]
    Refused { program: PathBuf, reference: String, digest: String, why: String },
    #[error("{archive} is not an OCI layout or docker archive: {why}", archive = archive.display())]
    Archive { archive: PathBuf, why: String },
    #[error("no image {0} in the store; pull or import it first")]
    NoImage(String),
    #[error(
        "layer {layer} of image {image} is not on disk any more, somebody deleted {path}; the image was dropped: pull it again", path = path.display()
    )]
    LayerLost { image: String, layer: String, path: PathBuf },
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

/// What a failure means for the caller, whatever the details.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The call itself is wrong: a reference or name that no store could take.
    Invalid,
    /// There is no such image, root file system, tag or platform, here or in the registry.
    NotFound,
    /// The name is in use for something else.
    AlreadyExists,
    /// The registry wants other credentials.
    Unauthorized,
    /// The registry does not answer, or fails.
    Unavailable,
    /// The registry wants fewer requests.
    Limited,
    /// What came is not what was promised: a wrong digest, a layer or manifest that cannot be read.
    Corrupt,
    /// A program that this machine asks about images does not admit it.
    Refused,
    /// This machine's configuration does not allow it: `hosts.toml`, certificates, a store that somebody else has open.
    Misconfigured,
    /// No space, inodes or quota left.
    Full,
    /// The program is ending.
    Cancelled,
    /// This machine failed.
    Internal,
}

impl Error {
    /// For callers that act by what happened, such as a server that chooses a status code.
    pub fn kind(&self) -> Kind {
        match self {
            Error::Reference { .. } | Error::Key { .. } => Kind::Invalid,
            Error::NotFound { .. } | Error::NoPlatform { .. } | Error::NoImage(_) | Error::NoRootfs(_) => {
                Kind::NotFound
            }
            Error::RootfsExists { .. } => Kind::AlreadyExists,
            Error::Unauthorized { .. } => Kind::Unauthorized,
            Error::Unreachable { .. } | Error::Registry { .. } => Kind::Unavailable,
            Error::TooManyRequests { .. } => Kind::Limited,
            // The stream is at fault unless writing failed for a reason that is not in it.
            Error::Unpack { source, .. } => match &**source {
                crate::unpack::Error::Io { source, .. } if is_full(source) => Kind::Full,
                crate::unpack::Error::Io { source, .. } if !is_of_the_stream(source) => Kind::Internal,
                _ => Kind::Corrupt,
            },
            Error::DigestMismatch { .. }
            | Error::Malformed { .. }
            | Error::Archive { .. }
            | Error::LayerLost { .. } => Kind::Corrupt,
            Error::Refused { .. } => Kind::Refused,
            Error::Config { .. } => Kind::Misconfigured,
            Error::State(e) if matches!(**e, orlop_base::durable::Error::Locked { .. }) => {
                Kind::Misconfigured
            }
            Error::State(e) if matches!(&**e, orlop_base::durable::Error::Io { source, .. } if is_full(source)) => {
                Kind::Full
            }
            Error::Io { source, .. } if is_full(source) => Kind::Full,
            Error::Full { .. } => Kind::Full,
            Error::Cancelled => Kind::Cancelled,
            Error::Mount { .. } | Error::Io { .. } | Error::State(_) => Kind::Internal,
        }
    }

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
        let mut next: Option<&(dyn std::error::Error + 'static)> = Some(&self);
        while let Some(e) = next {
            let found = e.downcast_ref::<io::Error>().is_some_and(is_full)
                || e.downcast_ref::<Arc<io::Error>>().is_some_and(|e| is_full(e));
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

/// Whether space, inodes or a quota ran out.
pub(crate) fn is_full(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Whether a system call failed because of what it was asked to make: names and links that lead in circles or are too long, more
/// links or attributes than a file can have, numbers that nothing has.
fn is_of_the_stream(e: &io::Error) -> bool {
    use rustix::io::Errno;
    let of_the_stream = [Errno::LOOP, Errno::INVAL, Errno::MLINK, Errno::NAMETOOLONG, Errno::TOOBIG];
    Errno::from_io_error(e).is_some_and(|e| of_the_stream.contains(&e))
}

impl From<orlop_base::durable::Error> for Error {
    fn from(e: orlop_base::durable::Error) -> Self {
        Error::State(Arc::new(e))
    }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    #[test]
    fn kinds_tell_a_bad_stream_from_a_bad_disk() {
        let io = |kind| io::Error::from(kind);
        let unpack =
            |source| Error::Unpack { reference: "r".into(), layer: "l".into(), source: Arc::new(source) };
        let writing = |kind| crate::unpack::Error::Io { what: "write", path: "p".into(), source: io(kind) };
        let failed = |e: Errno| crate::unpack::Error::Io { what: "x", path: "p".into(), source: e.into() };
        for (error, kind) in [
            (unpack(crate::unpack::Error::Tar { offset: 0, why: "x" }), Kind::Corrupt),
            (unpack(crate::unpack::Error::Read(io(io::ErrorKind::InvalidData))), Kind::Corrupt),
            (unpack(writing(io::ErrorKind::StorageFull)), Kind::Full),
            (unpack(writing(io::ErrorKind::PermissionDenied)), Kind::Internal),
            (unpack(failed(Errno::LOOP)), Kind::Corrupt),
            (unpack(failed(Errno::INVAL)), Kind::Corrupt),
            (unpack(failed(Errno::MLINK)), Kind::Corrupt),
            (unpack(failed(Errno::NAMETOOLONG)), Kind::Corrupt),
            (unpack(failed(Errno::TOOBIG)), Kind::Corrupt),
            (unpack(failed(Errno::IO)), Kind::Internal),
            (Error::io("write", Path::new("p"))(io(io::ErrorKind::QuotaExceeded)), Kind::Full),
            (Error::io("write", Path::new("p"))(io(io::ErrorKind::NotFound)), Kind::Internal),
            (Error::NoImage("x".into()), Kind::NotFound),
            (Error::LayerLost { image: "i".into(), layer: "l".into(), path: "p".into() }, Kind::Corrupt),
        ] {
            assert_eq!(error.kind(), kind, "{error}");
        }
    }
}
