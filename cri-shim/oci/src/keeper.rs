//! A fork of a creation's helper that keeps the host's rights. The helper gives them up when it joins a user namespace, and without
//! them could neither run hooks in the runtime's namespaces nor take back what it has made.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::Pid;
use serde::de::DeserializeOwned;

use crate::{Error, helper, sys};

/// Talked to by words. The end of the socket says nothing, because the container's process has a copy of that.
pub(crate) struct Keeper {
    pid: Pid,
    ours: OwnedFd,
}

const TAKE_BACK: &[u8] = b"-";
const LEAVE: &[u8] = b"+";
/// Followed by a process id.
const HOOKS: u8 = b'h';

impl Keeper {
    /// What it can be asked for: `hooks` of a container with that first process, and `take_back`, which tells what went wrong.
    pub(crate) fn new(
        hooks: impl Fn(Pid) -> Result<(), Error>,
        take_back: impl FnOnce() -> Vec<String>,
    ) -> io::Result<Keeper> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        if let Some(pid) = sys::fork_child(None)? {
            return Ok(Keeper { pid, ours });
        }
        std::mem::forget(ours);
        // Others wait for the end of what is open here.
        helper::close_all_but(&[theirs.as_raw_fd()]);
        let mut word = [0u8; 32];
        loop {
            let heard = match nix::unistd::read(&theirs, &mut word) {
                Err(Errno::EINTR) => continue,
                Err(_) => helper::leave(1),
                Ok(n) => &word[..n],
            };
            let answer = match heard {
                TAKE_BACK => {
                    let answer = serde_json::to_vec(&take_back());
                    let _ = nix::unistd::write(&theirs, &answer.unwrap_or_default());
                    helper::leave(0)
                }
                [HOOKS, pid @ ..] => {
                    let pid = std::str::from_utf8(pid).ok().and_then(|p| p.parse().ok());
                    pid.map(|p| serde_json::to_vec(&hooks(Pid::from_raw(p))).unwrap_or_default())
                }
                _ => None,
            };
            match answer {
                Some(answer) => drop(nix::unistd::write(&theirs, &answer)),
                None => helper::leave(0),
            }
        }
    }

    fn ask<T: DeserializeOwned>(&self, word: &[u8]) -> io::Result<T> {
        nix::unistd::write(&self.ours, word)?;
        let mut answer = vec![0u8; 64 * 1024];
        loop {
            match nix::unistd::read(&self.ours, &mut answer) {
                Err(Errno::EINTR) => {}
                other => return Ok(serde_json::from_slice(&answer[..other?])?),
            }
        }
    }

    /// Those in the runtime's namespaces.
    pub(crate) fn run_hooks(&self, init: Pid) -> Result<(), Error> {
        let mut word = vec![HOOKS];
        word.extend(init.to_string().bytes());
        let gone = |e: io::Error| Error::io("hook", "no answer of the helper that runs the hooks", &e);
        self.ask::<Result<(), Error>>(&word).map_err(gone)?
    }

    /// What went wrong on the way.
    pub(crate) fn take_back(self) -> Vec<String> {
        let warnings = self.ask(TAKE_BACK).unwrap_or_else(|e| vec![format!("not all is taken back: {e}")]);
        let _ = nix::sys::wait::waitpid(self.pid, None);
        warnings
    }

    /// Its end is waited for.
    pub(crate) fn leave(self) {
        let _ = nix::unistd::write(&self.ours, LEAVE);
        let _ = nix::sys::wait::waitpid(self.pid, None);
    }
}
