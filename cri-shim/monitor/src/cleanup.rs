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

/// Containers first, then the sandbox, then `groups`: cgroups that the caller knows of, below each hierarchy's mount. What
/// stands in the way of one thing is reported after all the rest has been cleaned.
pub fn run(dir: &Path, groups: &[String]) -> Result<(), CleanupError> {
    let mut first = None;
    let mut keep = |done: Result<(), CleanupError>| {
        if let Err(e) = done {
            first.get_or_insert(e);
        }
    };
    if dir.exists() {
        from_journal(dir, &mut keep)?;
    }
    for group in groups {
        keep(orlop_oci::end_groups(&cgroup::existing(group)).map_err(Into::into));
    }
    first.map_or(Ok(()), Err)
}

fn from_journal(dir: &Path, keep: &mut impl FnMut(Result<(), CleanupError>)) -> Result<(), CleanupError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| CleanupError::Io { path, source }
    };
    std::env::set_current_dir(dir).map_err(at(dir))?;
    if UnixStream::connect("monitor.sock").is_ok() {
        return Err(CleanupError::Alive { path: dir.to_owned() });
    }
    let (records, errors) = journal::load_containers(dir);
    let mut stays = false;
    for r in records {
        let done = container(dir, &r).and_then(|()| journal::forget_container(dir, &r.id).map_err(at(dir)));
        stays |= done.is_err();
        keep(done);
    }
    match journal::load_sandbox(dir) {
        Ok(Some(s)) => keep(sandbox::destroy(dir, &s).map_err(at(dir))),
        Ok(None) => {}
        Err(e) => keep(Err(e.into())),
    }
    if !stays {
        for folder in [dir.join("oci"), journal::external_root(dir)] {
            let _ = fs::remove_dir_all(folder);
        }
    }
    setup::leave(dir);
    errors.into_iter().for_each(|e| keep(Err(e.into())));
    Ok(())
}

fn container(dir: &Path, r: &journal::Record) -> Result<(), CleanupError> {
    if r.phase != Phase::Exited && r.pid > 1 && journal::start_ticks(r.pid) == r.pid_start {
        let _ = cgroup::signal_pid(Pid::from_raw(r.pid), libc::SIGKILL);
    }
    match r.external(&journal::external_root(dir)) {
        Some(external) => external.delete_here(&r.cgroups)?,
        None => {
            for warning in orlop_oci::delete_in_place(&dir.join("oci"), &r.id, &r.cgroups)? {
                eprintln!("container {}: {warning}", r.id);
            }
        }
    }
    Ok(())
}
