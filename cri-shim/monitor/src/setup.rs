//! From a fresh daemon process to a listening monitor.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use orlop_base::durable::{self, Sync};

use crate::daemon::{self, OwnLog};
use crate::journal;
use crate::monitor::{Monitor, Source};
use crate::poll::{EventFlags, Poll};

/// Why a monitor cannot start.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    #[error("{what} {path}: {source}", path = path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("a monitor serves {path} already", path = path.display())]
    Busy { path: PathBuf },
    #[error("{path} holds the state of a monitor that is gone; run orlop-monitor --cleanup --dir on it first", path = path.display())]
    Leftovers { path: PathBuf },
    #[error(transparent)]
    Durable(#[from] durable::Error),
    #[error("whoever started this monitor is gone: nobody would know of it")]
    Orphan,
    #[error("cannot set up {what}: {source}")]
    Kernel { what: &'static str, source: io::Error },
}

pub fn socket_path(dir: &Path) -> PathBuf {
    dir.join("monitor.sock")
}

fn pid_path(dir: &Path) -> PathBuf {
    dir.join("monitor.pid")
}

/// Binds or connects by a path relative to `dir`: an absolute one may be longer than a socket address.
fn in_dir<T>(dir: &Path, f: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    std::env::set_current_dir(dir)?;
    let result = f(Path::new("monitor.sock"));
    std::env::set_current_dir("/")?;
    result
}

/// Whether this is a pipe whose other end has been closed. Anything else, such as a terminal or a file, is not.
fn has_no_reader(fd: &OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(fd, PollFlags::empty())];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&at_once)).is_ok_and(|n| n > 0) && fds[0].revents().contains(PollFlags::ERR)
}

pub fn start(dir: &Path) -> Result<Monitor, SetupError> {
    let at = |what: &'static str, path: &Path| {
        let path = path.to_owned();
        move |source| SetupError::Io { what, path, source }
    };
    let kernel = |what: &'static str| move |source: io::Error| SetupError::Kernel { what, source };
    fs::read_dir(dir).map_err(at("cannot use", dir))?;
    if in_dir(dir, |p| UnixStream::connect(p)).is_ok() {
        return Err(SetupError::Busy { path: dir.to_owned() });
    }
    let (records, errors) = journal::load_containers(dir);
    if !records.is_empty() || !errors.is_empty() || journal::sandbox_path(dir).exists() {
        return Err(SetupError::Leftovers { path: dir.to_owned() });
    }
    for sub in [journal::containers_dir(dir), dir.join("oci")] {
        fs::create_dir_all(&sub).map_err(at("cannot create", &sub))?;
        fs::set_permissions(&sub, fs::Permissions::from_mode(0o700)).map_err(at("cannot protect", &sub))?;
    }
    let mut own_log = OwnLog::open(dir).map_err(at("cannot open the log in", dir))?;
    // The starter's pipe, for errors.
    let starter = std::io::stderr().as_fd().try_clone_to_owned().map_err(kernel("standard streams"))?;
    daemon::close_stdio().map_err(kernel("standard streams"))?;
    nix::sys::prctl::set_child_subreaper(true).map_err(|e| kernel("a sub-reaper")(e.into()))?;
    if !daemon::protect_from_oom() {
        own_log.line(
            "may not lower oom_score_adj (no CAP_SYS_RESOURCE): this process is as exposed as any other",
        );
    }
    let mut mask = SigSet::empty();
    for s in
        [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2]
    {
        // All but SIGCHLD are read and ignored: the pod ends by DestroySandbox, not by whoever signals a process group.
        mask.add(s);
    }
    mask.thread_block().map_err(|e| kernel("the signal mask")(e.into()))?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(|e| kernel("signalfd")(e.into()))?;
    let socket = socket_path(dir);
    let _ = fs::remove_file(&socket);
    let listener = in_dir(dir, |p| UnixListener::bind(p)).map_err(at("cannot listen on", &socket))?;
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o600)).map_err(at("cannot protect", &socket))?;
    listener.set_nonblocking(true).map_err(at("cannot listen on", &socket))?;
    // In this order: a starter that dies later leaves a socket, by which its successor finds this monitor.
    if has_no_reader(&starter) {
        leave(dir);
        return Err(SetupError::Orphan);
    }
    drop(starter);
    durable::write_atomic(
        &pid_path(dir),
        format!("{}\n", std::process::id()).as_bytes(),
        0o644,
        Sync::PageCache,
    )?;
    let mut poll = Poll::new().map_err(kernel("epoll"))?;
    let mut sources = HashMap::new();
    let token = poll.token();
    poll.add(&listener, token, EventFlags::IN).map_err(kernel("epoll"))?;
    sources.insert(token, Source::Listener);
    let token = poll.token();
    poll.add(&signals, token, EventFlags::IN).map_err(kernel("epoll"))?;
    sources.insert(token, Source::Signals);
    Ok(Monitor {
        dir: dir.to_owned(),
        poll,
        listener,
        signals: signals.into(),
        sources,
        conns: BTreeMap::new(),
        containers: BTreeMap::new(),
        execs: BTreeMap::new(),
        ops: BTreeMap::new(),
        sandbox: None,
        destroying: None,
        unclaimed: HashMap::new(),
        own_log,
        stop: None,
        next_exec: 0,
        buf: vec![0; 64 * 1024].into_boxed_slice(),
    })
}

/// The files that only a living monitor has.
pub fn leave(dir: &Path) {
    let _ = fs::remove_file(socket_path(dir));
    let _ = fs::remove_file(pid_path(dir));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_starter_that_is_gone() {
        let (read, write) = nix::unistd::pipe().unwrap();
        assert!(!has_no_reader(&write));
        drop(read);
        assert!(has_no_reader(&write));
        assert!(!has_no_reader(&fs::File::open("/dev/null").unwrap().into()));
    }
}
