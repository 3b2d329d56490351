//! Containers by the OCI runtime spec: the only crate that names libcontainer.
//!
//! What touches the container's processes runs in a short-lived fork of the caller (no `exec`): see [`helper`]. It changes the
//! process that does it, leaks descriptors and memory when it fails, and may wait without end on a broken file system. Of
//! libcontainer, limits, hooks and the check of specs are used; containers are set up here. The caller must be single-threaded, must be a sub-reaper (the container's process becomes its child) and stays free
//! to serve others meanwhile.

mod adapt;
pub mod cgroup;
mod console;
mod convert;
mod create;
mod devices;
mod exec;
mod executor;
mod external;
#[cfg(test)]
mod headers;
pub mod helper;
mod hooks;
mod identity;
mod init;
mod keeper;
mod kept;
mod limits;
mod lsm;
mod notify;
mod ops;
mod rlimits;
mod schedule;
mod seccomp;
mod sys;
mod sysctl;

pub use adapt::Adaptation;
pub use create::{Context, CreateSpec, Created, create};
pub use exec::{ExecSpec, exec};
pub use executor::read_report;
pub use external::{External, Runtime};
pub use helper::{Helper, Reply};
pub use hooks::poststart;
pub use ops::{
    Outcome, Stdio, delete, delete_in_place, delete_now, end_groups, own_cgroups, start, start_channel,
    update,
};
pub use sysctl::sysctl_file;

use serde::{Deserialize, Serialize};

/// Who is at fault when an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// The request or the bundle makes no sense.
    Invalid,
    /// The container is in a state in which the operation is not legal.
    WrongState,
    /// The kernel refused.
    Runtime,
}

/// What failed: `stage` names the step ("spec", "cgroup", "rootfs", "exec", ...), `errno` is 0 when none is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{stage}: {message}")]
pub struct Error {
    pub kind: Kind,
    pub stage: String,
    pub message: String,
    pub errno: i32,
}

impl Error {
    pub(crate) fn new(kind: Kind, stage: &str, message: impl Into<String>, errno: i32) -> Error {
        Error { kind, stage: stage.to_owned(), message: message.into(), errno }
    }

    pub(crate) fn io(stage: &str, what: &str, e: &std::io::Error) -> Error {
        Error::new(Kind::Runtime, stage, format!("{what}: {e}"), e.raw_os_error().unwrap_or(0))
    }
}
