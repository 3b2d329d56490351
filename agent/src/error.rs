//! Why the agent cannot start or go on.

use std::io;
use std::path::{Path, PathBuf};

/// Errors that end the agent; what goes wrong with one pod becomes an event and a status instead.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {what} {path}", path = path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{path} is no KubeletConfiguration: {message}", path = path.display())]
    ConfigFile { path: PathBuf, message: String },
    #[error("{path} is no CredentialProviderConfig: {message}", path = path.display())]
    CredentialProviders { path: PathBuf, message: String },
    #[error(transparent)]
    Connect(#[from] orlop_client::ConnectError),
    #[error(transparent)]
    Durable(#[from] orlop_base::durable::Error),
    #[error(transparent)]
    Cri(#[from] crate::cri::Error),
    #[error("cannot listen on {address}; is another kubelet running? Choose another port")]
    Listen { address: std::net::SocketAddr, source: io::Error },
    #[error("{path} cannot be used for TLS: {message}", path = path.display())]
    Certificate { path: PathBuf, message: String },
    #[error("a stream broke")]
    Stream(#[source] hyper::Error),
    #[error(
        "the subordinate ids of user {user:?} cannot be pods' user namespaces: {why}; change /etc/subuid and /etc/subgid or remove the user"
    )]
    SubordinateIds { user: &'static str, why: String },
    #[error("the node's address is not known; pass it as the node IP")]
    NoNodeIp,
    #[error("cannot {what} {path}: {message}")]
    Cgroup { what: &'static str, path: String, message: String },
    #[error(
        "systemd does not make the slice {slice} ({message}); the runtime uses the systemd cgroup driver, \
         which needs systemd on the system bus: start it or let the runtime use cgroupfs"
    )]
    Systemd { slice: String, message: String },
    #[error(transparent)]
    Task(#[from] orlop_base::supervise::Failure),
}

impl Error {
    pub fn io(what: &'static str, path: &Path, source: io::Error) -> Error {
        Error::Io { what, path: path.to_owned(), source }
    }
}
