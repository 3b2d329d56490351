//! What can go wrong, and which gRPC status it becomes.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use orlop_base::telemetry::chain;
use tonic::{Code, Status};

use crate::monitor;

/// An operation's failure: what, where, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{what} {id:?} is not known")]
    NotFound { what: &'static str, id: String },
    #[error("{what} id {id:?} fits several; give more of it")]
    Ambiguous { what: &'static str, id: String },
    #[error("{0}")]
    Invalid(String),
    #[error("the name {name:?} is taken by {id}; remove that first or use another attempt number")]
    NameTaken { name: String, id: String },
    #[error("{what} {id} is {state}, which does not allow to {wanted}")]
    WrongState { what: &'static str, id: String, state: &'static str, wanted: &'static str },
    #[error("{0}")]
    Unimplemented(&'static str),
    #[error("{0}")]
    TooMany(String),
    #[error(
        "this server keeps its images in {}, not in {}; name its own folder or another socket", .here.display(), .meant.display()
    )]
    Store { meant: PathBuf, here: PathBuf },
    #[error("image {0:?} is not on this node; pull it first")]
    NoImage(String),
    #[error("cannot {what} {path}", path = path.display())]
    Io { what: &'static str, path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Monitor(#[from] monitor::Error),
    #[error(transparent)]
    Durable(#[from] orlop_base::durable::Error),
    #[error(transparent)]
    Failpoint(#[from] orlop_base::failpoint::Failed),
    #[error(transparent)]
    Image(#[from] orlop_images::Error),
    #[error("cannot set up the pod's network: {}", chain(.0))]
    Cni(#[from] orlop_cni_invoke::Error),
    #[error("exec in {id} did not end within {seconds} s")]
    ExecTimeout { id: String, seconds: i64 },
    #[error("cannot listen on {at}; is another server using it?")]
    Listen { at: String, source: std::io::Error },
    #[error("{0}")]
    Internal(String),
    #[error("the server stopped")]
    Stopped(#[from] orlop_base::supervise::Failure),
}

impl Error {
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { what, path, source }
    }

    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Error::NotFound { .. })
    }
}

/// Whether the disk or a quota on it was full.
fn is_full(e: &(dyn std::error::Error + 'static)) -> bool {
    let io = |e: &(dyn std::error::Error + 'static)| {
        e.downcast_ref::<std::io::Error>()
            .is_some_and(|e| matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded))
    };
    std::iter::successors(Some(e), |e| e.source()).any(io)
}

impl From<Error> for Status {
    fn from(e: Error) -> Status {
        use monitor::Kind;
        let code = match &e {
            // The caller can make room.
            full if is_full(full) => Code::ResourceExhausted,
            Error::NotFound { .. } | Error::NoImage(_) => Code::NotFound,
            Error::Ambiguous { .. } | Error::Invalid(_) => Code::InvalidArgument,
            Error::NameTaken { .. } => Code::AlreadyExists,
            Error::WrongState { .. } | Error::Store { .. } => Code::FailedPrecondition,
            Error::Unimplemented(_) => Code::Unimplemented,
            Error::TooMany(_) => Code::ResourceExhausted,
            Error::ExecTimeout { .. } => Code::DeadlineExceeded,
            Error::Monitor(m) => match m.kind() {
                Some(Kind::NotFound) => Code::NotFound,
                Some(Kind::AlreadyExists) => Code::AlreadyExists,
                Some(Kind::WrongState) => Code::FailedPrecondition,
                Some(Kind::Invalid) => Code::InvalidArgument,
                Some(Kind::TimedOut) => Code::DeadlineExceeded,
                Some(Kind::Runtime | Kind::Internal) => Code::Unknown,
                None => Code::Unavailable,
            },
            Error::Io { .. }
            | Error::Durable(_)
            | Error::Failpoint(_)
            | Error::Image(_)
            | Error::Cni(_)
            | Error::Listen { .. }
            | Error::Internal(_)
            | Error::Stopped(_) => Code::Unknown,
        };
        Status::new(code, chain(&e))
    }
}

/// Shorthand of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
