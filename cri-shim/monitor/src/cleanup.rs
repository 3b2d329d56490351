//! After a monitor that was killed: ends what it ran and takes back what it made, from its journal. Idempotent.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::unistd::Pid;
use orlop_oci::cgroup;

use crate::journal::{self, Phase};
use crate::{sandbox, setup};

/// What stands in the way of cleaning up.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    #[error("a monitor serves {path}; ask it to destroy its sandbox instead", path = path.display())]
    Alive { path: PathBuf },
    #[error("{path}: {source}", path = path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Oci(#[from] orlop_oci::Error),
    #[error(transparent)]
    Journal(#[from] orlop_base::durable::Error),
}

/// Containers first, then the sandbox. What cannot be read is reported after all the rest has been cleaned.
pub fn run(dir: &Path) -> Result<(), CleanupError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| CleanupError::Io { path, source }
    };
    std::env::set_current_dir(dir).map_err(at(dir))?;
    if UnixStream::connect("monitor.sock").is_ok() {
        return Err(CleanupError::Alive { path: dir.to_owned() });
    }
    let (records, errors) = journal::load_containers(dir);
    for r in records {
        if r.phase != Phase::Exited && r.pid > 1 && journal::start_ticks(r.pid) == r.pid_start {
            let _ = cgroup::signal_pid(Pid::from_raw(r.pid), libc::SIGKILL);
        }
        let root = journal::external_root(dir);
        match r.external(&root) {
            Some(external) => external.delete_here(&r.cgroups)?,
            None => orlop_oci::delete_in_place(&dir.join("oci"), &r.id, &r.cgroups)?,
        }
        journal::forget_container(dir, &r.id).map_err(at(dir))?;
    }
    if let Some(s) = journal::load_sandbox(dir)? {
        sandbox::destroy(dir, &s).map_err(at(dir))?;
    }
    for folder in [dir.join("oci"), journal::external_root(dir)] {
        let _ = fs::remove_dir_all(folder);
    }
    setup::leave(dir);
    match errors.into_iter().next() {
        Some(e) => Err(e.into()),
        None => Ok(()),
    }
}
