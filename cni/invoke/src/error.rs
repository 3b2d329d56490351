use std::io;
use std::path::PathBuf;
use std::time::Duration;

use orlop_cni_types::{Command, ConfError, ErrorResult, ResultError, code};

/// Why a network operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no network configuration in {dir}; put a .conflist there", dir = dir.display())]
    NoConfig { dir: PathBuf },
    #[error("cannot read network configuration {path}", path = path.display())]
    ReadConfig { path: PathBuf, source: io::Error },
    #[error("network configuration {path} is broken", path = path.display())]
    BrokenConfig { path: PathBuf, source: ConfError },
    #[error("CNI plugin {plugin} is in none of {dirs:?}; install it or correct the configuration")]
    PluginNotFound { plugin: String, dirs: Vec<PathBuf> },
    #[error("cannot run CNI plugin {plugin}")]
    Start { plugin: PathBuf, source: io::Error },
    #[error("CNI plugin {plugin} did not end {command} within {limit:?} and was killed")]
    Timeout { plugin: String, command: Command, limit: Duration },
    #[error("CNI plugin {plugin} was killed by signal {signal} during {command}{stderr}")]
    Killed { plugin: String, command: Command, signal: i32, stderr: Stderr },
    #[error("CNI plugin {plugin} panicked during {command}; this is a bug, please report it")]
    Panicked { plugin: String, command: Command },
    #[error("CNI plugin {plugin} failed {command}")]
    Plugin { plugin: String, command: Command, source: ErrorResult },
    #[error(
        "CNI plugin {plugin} ended {command} with exit code {exit} and no readable error: {output:?}{stderr}"
    )]
    Garbage { plugin: String, command: Command, exit: i32, output: String, stderr: Stderr },
    #[error("CNI plugin {plugin} gave a result of {command} that is not JSON: {output:?}{stderr}")]
    NotJson { plugin: String, command: Command, output: String, stderr: Stderr },
    #[error("CNI plugin {plugin} gave a wrong result of {command}")]
    BadResult { plugin: String, command: Command, source: ResultError },
    #[error("CNI plugin {plugin} printed more than {limit} bytes during {command}")]
    TooMuchOutput { plugin: String, command: Command, limit: usize },
    #[error("{what} {value:?} is not allowed")]
    InvalidName { what: &'static str, value: String },
    #[error("cannot tell what other runtimes have attached to network {network}; nothing of it is collected")]
    Neighbours { network: String, source: io::Error },
    #[error("no result of an ADD of {container_id} is known")]
    NotAttached { container_id: String },
    #[error("a later release attached {container_id}; go on with that one")]
    Later { container_id: String, source: orlop_base::durable::Error },
    #[error("cannot keep the result of {container_id}")]
    Cache { container_id: String, source: orlop_base::durable::Error },
}

impl Error {
    /// Whether the same call may succeed later without anybody changing the configuration.
    pub fn is_retryable(&self) -> bool {
        match self {
            Error::Plugin { source, .. } => {
                matches!(
                    source.code,
                    code::TRY_AGAIN_LATER | code::NOT_AVAILABLE | code::NOT_AVAILABLE_LIMITED
                )
            }
            Error::Timeout { .. } | Error::Killed { .. } | Error::Start { .. } => true,
            _ => false,
        }
    }
}

/// What a plugin wrote to standard error, shown only when there is something.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stderr(pub String);

impl std::fmt::Display for Stderr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, "; it wrote: {}", self.0) }
    }
}
