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
    /// This kernel or file system cannot do what is asked for.
    #[error("{0}")]
    Unsupported(String),
    #[error("{0}")]
    Unimplemented(String),
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
    #[error("{}{}", kubelets_word(.0), chain(.0))]
    Image(orlop_images::Error),
    /// The kubelet knows the message by its first word (`ErrImageVolumeMountFailed` of cri-api).
    #[error("ImageVolumeMountFailed")]
    ImageVolume(#[source] Box<Error>),
    #[error("cannot set up the pod's network: {}", chain(.0))]
    Cni(#[from] orlop_cni_invoke::Error),
    #[error(
        "the pod's network gave no address to its interface {interface}; see the plugins' result and their configuration"
    )]
    NoAddress { interface: &'static str },
    #[error("exec in {id} did not end within {seconds} s")]
    ExecTimeout { id: String, seconds: i64 },
    #[error("{program} could not checkpoint container {id}: {message}", program = program.display())]
    Checkpoint { id: String, program: PathBuf, message: String },
    #[error(transparent)]
    Nri(#[from] orlop_nri::Error),
    #[error("the container cannot be created as NRI plugins have adjusted it ({plugins})")]
    Adjusted { plugins: String, source: Box<Error> },
    #[error("nothing moved on the stream for {seconds} s")]
    StreamIdle { seconds: u64 },
    #[error("the checkpoint of container {id} did not end within {seconds} s; the container goes on")]
    CheckpointTimeout { id: String, seconds: u64 },
    #[error("cannot listen on {at}; is another server using it?")]
    Listen { at: String, source: std::io::Error },
    #[error(
        "the cgroup driver is systemd, and there is no system bus at {at}; install and start dbus, or choose the driver cgroupfs"
    )]
    NoSystemBus { at: &'static str },
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

impl From<orlop_images::Error> for Error {
    fn from(e: orlop_images::Error) -> Error {
        Error::Image(e)
    }
}

/// The prefix by which the kubelet knows whom to blame (`ErrRegistryUnavailable` and `ErrSignatureValidationFailed` of cri-api).
fn kubelets_word(e: &orlop_images::Error) -> &'static str {
    match e.kind() {
        orlop_images::Kind::Unavailable => "RegistryUnavailable: ",
        orlop_images::Kind::Refused => "SignatureValidationFailed: ",
        _ => "",
    }
}

fn image_code(e: &orlop_images::Error) -> Code {
    use orlop_images::Kind;
    match e.kind() {
        Kind::Invalid => Code::InvalidArgument,
        Kind::NotFound => Code::NotFound,
        Kind::AlreadyExists => Code::AlreadyExists,
        Kind::Unauthorized => Code::PermissionDenied,
        // The kubelet takes the code off a failed pull's message only when it is this one, and only then sees the prefix.
        Kind::Unavailable | Kind::Refused => Code::Unknown,
        Kind::Limited | Kind::Full => Code::ResourceExhausted,
        Kind::Corrupt => Code::DataLoss,
        Kind::Misconfigured => Code::FailedPrecondition,
        Kind::Cancelled => Code::Unavailable,
        Kind::Internal => Code::Unknown,
    }
}

impl From<Error> for Status {
    fn from(e: Error) -> Status {
        Status::new(code(&e), chain(&e))
    }
}

fn code(e: &Error) -> Code {
    use monitor::Kind;
    match e {
        // The caller can make room.
        full if is_full(full) => Code::ResourceExhausted,
        Error::NotFound { .. } | Error::NoImage(_) => Code::NotFound,
        Error::Ambiguous { .. } | Error::Invalid(_) => Code::InvalidArgument,
        Error::NameTaken { .. } => Code::AlreadyExists,
        Error::WrongState { .. }
        | Error::Store { .. }
        | Error::Unsupported(_)
        | Error::NoSystemBus { .. } => Code::FailedPrecondition,
        Error::Unimplemented(_) => Code::Unimplemented,
        Error::TooMany(_) => Code::ResourceExhausted,
        Error::ExecTimeout { .. } | Error::StreamIdle { .. } | Error::CheckpointTimeout { .. } => {
            Code::DeadlineExceeded
        }
        Error::Monitor(m) => match m.kind() {
            Some(Kind::NotFound) => Code::NotFound,
            Some(Kind::AlreadyExists) => Code::AlreadyExists,
            Some(Kind::WrongState) => Code::FailedPrecondition,
            Some(Kind::Invalid) => Code::InvalidArgument,
            Some(Kind::TimedOut) => Code::DeadlineExceeded,
            Some(Kind::Runtime | Kind::Internal) => Code::Unknown,
            None => Code::Unavailable,
        },
        Error::Image(e) => image_code(e),
        Error::ImageVolume(e) => code(e),
        Error::Adjusted { source, .. } => code(source),
        Error::Nri(orlop_nri::Error::Conflict { .. } | orlop_nri::Error::Rejected { .. }) => {
            Code::FailedPrecondition
        }
        Error::Io { .. }
        | Error::Durable(_)
        | Error::Failpoint(_)
        | Error::Cni(_)
        | Error::NoAddress { .. }
        | Error::Nri(_)
        | Error::Checkpoint { .. }
        | Error::Listen { .. }
        | Error::Internal(_)
        | Error::Stopped(_) => Code::Unknown,
    }
}

/// Shorthand of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_pulls_as_the_kubelet_reads_them() {
        use orlop_images::Error as E;
        let (reference, registry, detail) = ("r/a:1".to_owned(), "r".to_owned(), "down".to_owned());
        let of = |e: E| {
            let s = Status::from(Error::from(e));
            (s.code(), s.message().split(':').next().unwrap_or_default().to_owned())
        };
        let down = E::Unreachable {
            reference: reference.clone(),
            registry: registry.clone(),
            detail: detail.clone(),
        };
        assert_eq!(of(down), (Code::Unknown, "RegistryUnavailable".to_owned()));
        let failing =
            E::Registry { reference: reference.clone(), registry: registry.clone(), detail: detail.clone() };
        assert_eq!(of(failing), (Code::Unknown, "RegistryUnavailable".to_owned()));
        let refused = E::Refused {
            program: "/v".into(),
            reference: reference.clone(),
            digest: "sha256:0".into(),
            why: "no".into(),
        };
        assert_eq!(of(refused), (Code::Unknown, "SignatureValidationFailed".to_owned()));
        for (e, code) in [
            (E::NotFound { reference: reference.clone(), registry: registry.clone() }, Code::NotFound),
            (
                E::Unauthorized { reference: reference.clone(), registry: registry.clone(), detail },
                Code::PermissionDenied,
            ),
            (E::TooManyRequests { reference, registry }, Code::ResourceExhausted),
            (E::Reference { text: "!".into(), why: "bad" }, Code::InvalidArgument),
        ] {
            assert_eq!(of(e).0, code);
        }
        let volume = Error::ImageVolume(Box::new(Error::NoImage("x".into())));
        let status = Status::from(volume);
        assert!(status.message().starts_with("ImageVolumeMountFailed: "), "{status}");
        assert_eq!(status.code(), Code::NotFound);
    }
}
