//! What all operations share, and the short ones: start, update, delete.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxResources, Spec};
use serde::{Deserialize, Serialize};

use crate::create::{Context, Created};
use crate::executor::GO;
use crate::kept::Kept;
use crate::{Error, Helper, Kind, cgroup, helper, hooks, limits};

/// Processes of a cgroup that do not end within this are reported.
const DEATH: Duration = Duration::from_secs(4);

/// The child's ends of its standard streams; all `None` with a terminal. A stream without an end is /dev/null.
#[derive(Debug, Default)]
pub struct Stdio {
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
}

impl Stdio {
    fn ends(&self) -> impl Iterator<Item = &OwnedFd> {
        [&self.stdin, &self.stdout, &self.stderr].into_iter().flatten()
    }

    pub(crate) fn fds(&self) -> Vec<RawFd> {
        self.ends().map(|f| f.as_raw_fd()).collect()
    }

    /// Lets a user of the host reopen /dev/stdout and the like.
    pub(crate) fn give_to(&self, uid: Option<u32>) {
        let Some(uid) = uid.filter(|u| *u != 0) else { return };
        for f in self.ends() {
            // A pipe that keeps its owner still works through the inherited descriptor.
            let _ = rustix::fs::fchown(f, Some(rustix::fs::Uid::from_raw(uid)), None);
        }
    }
}

/// The answer to an operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    Created(Created),
    Executed {
        pid: i32,
    },
    Done,
    /// Done, and what went wrong on the way without standing in it.
    Warned(Vec<String>),
}

pub(crate) fn filter_path(root: &Path, id: &str) -> PathBuf {
    root.join(format!("{id}.seccomp"))
}

pub(crate) fn check_id(id: &str) -> Result<(), Error> {
    let ok = !id.is_empty() && id.len() <= 200 && id != "." && id != "..";
    if ok && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"_+-.".contains(&b)) {
        return Ok(());
    }
    Err(Error::new(
        Kind::Invalid,
        "spec",
        format!("container id {id:?} has characters beyond [A-Za-z0-9_+.-]"),
        0,
    ))
}

pub(crate) fn set_oom_score_adj(value: i32) -> bool {
    fs::write("/proc/self/oom_score_adj", value.to_string()).is_ok()
}

/// The pair that holds a container back until its start: (the caller's end, the container's end).
pub fn start_channel() -> Result<(OwnedFd, OwnedFd), Error> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(|e| Error::io("helper", "cannot make the start channel", &e.into()))
}

/// OCI "start". The answer comes when the user's program runs; a program that cannot be executed is an error of stage "exec".
/// `init` is the container's waiting process.
pub fn start(channel: OwnedFd, init: i32) -> Result<Helper, Error> {
    // Without a reader its process has ended: the end of file says so, and its exit comes as always.
    match send(channel.as_raw_fd(), GO, MsgFlags::MSG_NOSIGNAL) {
        Ok(_) | Err(nix::Error::EPIPE | nix::Error::ECONNRESET) => {}
        Err(e) => return Err(Error::io("exec", "cannot tell the container to start", &e.into())),
    }
    Ok(Helper::of_start(Pid::from_raw(init), channel))
}

/// Applies new limits (OCI LinuxResources as JSON) to a container's cgroup.
pub fn update(
    id: &str,
    context: &Context,
    cgroups: &[PathBuf],
    resources: &[u8],
    systemd_cgroup: bool,
) -> Result<Helper, Error> {
    check_id(id)?;
    let resources: LinuxResources = serde_json::from_slice(resources)
        .map_err(|e| Error::new(Kind::Invalid, "spec", format!("the resources do not parse: {e}"), 0))?;
    helper::run(&[], || {
        let group =
            limits::Group { path: &context.cgroup_path, id, systemd: systemd_cgroup, folders: cgroups };
        (group.apply(&resources, false).map(|()| Outcome::Done), None)
    })
}

/// What is left of a container whose processes have ended, without hooks for its end. `false`: some have not yet; see [`delete`].
pub fn delete_now(root: &Path, id: &str, cgroups: &[PathBuf]) -> Result<bool, Error> {
    check_id(id)?;
    let gone = cgroup::remove(cgroups).map_err(|e| Error::io("cgroup", "cannot remove the cgroup", &e))?;
    if gone {
        forget(root, id)?;
    }
    Ok(gone)
}

/// Kills what is left in the cgroup, removes cgroup and state, and runs the hooks for its end. Idempotent.
pub fn delete(root: &Path, id: &str, cgroups: &[PathBuf]) -> Result<Helper, Error> {
    check_id(id)?;
    helper::run(&[], || {
        let done = delete_in_place(root, id, cgroups);
        (done.map(|w| if w.is_empty() { Outcome::Done } else { Outcome::Warned(w) }), None)
    })
}

/// The same in the calling process, for cleaning up after a monitor that is gone. What hooks failed, for the log.
pub fn delete_in_place(root: &Path, id: &str, cgroups: &[PathBuf]) -> Result<Vec<String>, Error> {
    check_id(id)?;
    end_groups(cgroups)?;
    let warnings = hooks::poststop(root, id);
    forget(root, id)?;
    Ok(warnings)
}

/// Kills what is in a cgroup and below it and removes it. Idempotent; an error when something stays.
pub fn end_groups(cgroups: &[PathBuf]) -> Result<(), Error> {
    cgroup::signal_all(cgroups, Signal::SIGKILL as i32);
    let gone = cgroup::remove_within(cgroups, DEATH)
        .map_err(|e| Error::io("cgroup", "cannot remove the cgroup", &e))?;
    if !gone {
        let left = cgroup::processes(cgroups);
        let message = format!("processes of the cgroup do not end: {left:?} in {cgroups:?}");
        return Err(Error::new(Kind::Runtime, "cgroup", message, libc::EBUSY));
    }
    Ok(())
}

/// The cgroup that the spec in `bundle` has made for this container alone, as far as it is there: one that bears its id. What a creation
/// has made that could not tell.
pub fn own_cgroups(bundle: &Path, id: &str) -> Vec<PathBuf> {
    let Ok(spec) = Spec::load(bundle.join("config.json")) else { return Vec::new() };
    let path = spec.linux().as_ref().and_then(|l| l.cgroups_path().clone());
    let path = path.unwrap_or_else(|| Path::new("/").join(id));
    // Otherwise systemd names it, and takes it away once it is empty.
    let own = path.is_absolute() && path.file_name().is_some_and(|name| name == id);
    if own { cgroup::existing(&path.to_string_lossy()) } else { Vec::new() }
}

pub(crate) fn forget(root: &Path, id: &str) -> Result<(), Error> {
    for file in [filter_path(root, id), Kept::path(root, id)] {
        match fs::remove_file(file) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("state", "cannot remove state", &e));
            }
            _ => {}
        }
    }
    Ok(())
}
