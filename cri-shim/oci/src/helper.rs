//! A fork of the calling (single-threaded) process that runs one operation and reports over a socket. `unsafe` lives here.
//!
//! The reply is one SOCK_SEQPACKET message: JSON, with the pty's master as SCM_RIGHTS where there is one. End of file without
//! a message means that the helper died.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use nix::unistd::{ForkResult, Pid};
use serde::{Deserialize, Serialize};

use crate::cgroup::Entry;
use crate::ops::Outcome;
use crate::{Error, Kind, executor, sys};

/// Replies are cut to this, so that one datagram always holds them.
const MAX_REPLY: usize = 60 * 1024;

/// A running operation. Poll [`Helper::fd`] for reading, then call [`Helper::reply`]. The exit of its process is the caller's
/// to reap.
#[derive(Debug)]
pub struct Helper {
    pub pid: Pid,
    pub fd: OwnedFd,
    answers: Answers,
}

/// Who answers.
#[derive(Debug)]
enum Answers {
    /// A fork made for the operation.
    Fork,
    /// A container's first process, by closing its end or with a report why it could not.
    Program,
}

/// What a helper reported.
#[derive(Debug)]
pub struct Reply {
    pub result: Result<Outcome, Error>,
    /// The pty's master, when a terminal was asked for.
    pub console: Option<OwnedFd>,
}

#[derive(Serialize, Deserialize)]
struct Wire {
    result: Result<Outcome, Error>,
}

impl Helper {
    pub(crate) fn of_start(pid: Pid, fd: OwnedFd) -> Helper {
        Helper { pid, fd, answers: Answers::Program }
    }

    /// The answer. Blocks until it comes.
    pub fn reply(&self) -> Reply {
        match self.answers {
            Answers::Fork => self.reply_of_fork(),
            Answers::Program => Reply {
                result: match executor::read_report(&self.fd) {
                    None => Ok(Outcome::Done),
                    Some(e) => Err(e),
                },
                console: None,
            },
        }
    }

    fn reply_of_fork(&self) -> Reply {
        let mut buf = vec![0u8; 64 * 1024];
        let (received, console) = match receive(&self.fd, &mut buf) {
            Ok((bytes, descriptor)) => (Ok(bytes), descriptor),
            Err(e) => (Err(e), None),
        };
        let result = match received {
            Ok(0) => Err(Error::new(Kind::Runtime, "helper", "the helper process died without an answer", 0)),
            Err(e) => Err(Error::new(
                Kind::Runtime,
                "helper",
                format!("cannot hear the helper process: {e}"),
                e as i32,
            )),
            Ok(n) => match serde_json::from_slice::<Wire>(&buf[..n]) {
                Ok(w) => w.result,
                Err(e) => Err(Error::new(
                    Kind::Runtime,
                    "helper",
                    format!("the helper's answer does not parse: {e}"),
                    0,
                )),
            },
        };
        Reply { result, console }
    }
}

/// One message, with the descriptor that came along.
fn receive(from: &OwnedFd, buf: &mut [u8]) -> nix::Result<(usize, Option<OwnedFd>)> {
    let mut cmsg = nix::cmsg_space!([RawFd; 1]);
    loop {
        let mut iov = [IoSliceMut::new(buf)];
        let m = match recvmsg::<()>(from.as_raw_fd(), &mut iov, Some(&mut cmsg), MsgFlags::MSG_CMSG_CLOEXEC) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => other?,
        };
        let mut descriptor = None;
        for c in m.cmsgs().into_iter().flatten() {
            if let ControlMessageOwned::ScmRights(fds) = c {
                for fd in fds {
                    // SAFETY: the kernel has just installed this descriptor for us and nobody else owns it.
                    descriptor = Some(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
        }
        return Ok((m.bytes, descriptor));
    }
}

/// The descriptor that a socket brings; `None` when its other end has gone without sending one.
pub(crate) fn receive_descriptor(from: &OwnedFd) -> nix::Result<Option<OwnedFd>> {
    receive(from, &mut [0u8; 64]).map(|(_, descriptor)| descriptor)
}

/// Borrows a descriptor number that this process tree is known to hold.
pub(crate) fn borrow(fd: RawFd) -> BorrowedFd<'static> {
    // SAFETY: callers pass descriptors that stay open until this process executes another program or ends.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// Every signal to its default action, also those that the C library reserves and hides (32, 33).
pub(crate) fn default_signals() {
    // The kernel's own struct: handler, flags, restorer, mask; all zero is SIG_DFL.
    let action = [0usize; 4];
    for signal in 1..=64 {
        // SAFETY: `action` outlives the call and is as long as the kernel reads for a mask of 8 bytes; SIGKILL and SIGSTOP are
        // refused, which is fine.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                action.as_ptr(),
                std::ptr::null_mut::<usize>(),
                8usize,
            );
        }
    }
}

/// Forks; the child returns `None` after closing every descriptor but stdio and `keep`, with no signal blocked.
///
/// The caller must be single-threaded, and the child must end by [`leave`] without running destructors of the parent's state.
pub fn fork_clean(keep: &[RawFd]) -> nix::Result<Option<Pid>> {
    // SAFETY: the process is single-threaded (documented above), so no lock is held by a thread that the child lacks.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Some(child)),
        ForkResult::Child => {
            inherit_nothing(keep);
            Ok(None)
        }
    }
}

/// Closes every descriptor but stdio and `keep`, which nobody here may use any more, and lets every signal through.
pub fn inherit_nothing(keep: &[RawFd]) {
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
    close_all_but(keep);
}

/// Forks into a cgroup; the child returns `None` in it, with every descriptor but stdio closed. Terms as for [`fork_clean`].
pub fn fork_into(entry: &Entry) -> std::io::Result<Option<Pid>> {
    let child = sys::fork_child(entry.folder())?;
    if child.is_none() {
        let entered = entry.enter();
        close_all_but(&[]);
        entered?;
    }
    Ok(child)
}

pub(crate) fn close_all_but(keep: &[RawFd]) {
    let mut keep: Vec<u32> = keep.iter().filter(|f| **f > 2).map(|f| *f as u32).collect();
    keep.sort_unstable();
    let mut from = 3u32;
    for k in keep.into_iter().chain(std::iter::once(u32::MAX)) {
        if k > from {
            // SAFETY: closes descriptors that the child's copy of the parent's state never touches again.
            unsafe { libc::close_range(from, k - 1, 0) };
        }
        from = k.saturating_add(1);
    }
}

/// Ends a forked child without running destructors or exit handlers.
pub fn leave(code: i32) -> ! {
    // SAFETY: _exit is always sound.
    unsafe { libc::_exit(code) }
}

/// Runs `work` in a fork. `keep` are the descriptors that `work` uses.
pub(crate) fn run(
    keep: &[RawFd],
    work: impl FnOnce() -> (Result<Outcome, Error>, Option<OwnedFd>),
) -> Result<Helper, Error> {
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|e| Error::new(Kind::Runtime, "helper", format!("socketpair: {e}"), e as i32))?;
    let mut keep = keep.to_vec();
    keep.push(theirs.as_raw_fd());
    match fork_clean(&keep) {
        Err(e) => Err(Error::new(Kind::Runtime, "helper", format!("fork: {e}"), e as i32)),
        Ok(Some(pid)) => Ok(Helper { pid, fd: ours, answers: Answers::Fork }),
        Ok(None) => {
            let (result, console) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                std::panic::set_hook(Box::new(|_| {}));
                work()
            }))
            .unwrap_or_else(|p| {
                let text = p
                    .downcast_ref::<String>()
                    .cloned()
                    .or_else(|| p.downcast_ref::<&str>().map(|s| s.to_string()))
                    .unwrap_or_default();
                (Err(Error::new(Kind::Runtime, "helper", format!("the helper panicked: {text}"), 0)), None)
            });
            send(&theirs, result, console);
            leave(0)
        }
    }
}

fn send(to: &OwnedFd, mut result: Result<Outcome, Error>, console: Option<OwnedFd>) {
    if let Err(e) = &mut result
        && e.message.len() > MAX_REPLY / 8
    {
        e.message.truncate(e.message.floor_char_boundary(MAX_REPLY / 8));
    }
    let bytes = serde_json::to_vec(&Wire { result }).unwrap_or_default();
    let fds: Vec<RawFd> = console.iter().map(|c| c.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let cmsgs: &[ControlMessage] = if fds.is_empty() { &[] } else { &rights };
    let _ = sendmsg::<()>(to.as_raw_fd(), &[IoSlice::new(&bytes)], cmsgs, MsgFlags::MSG_NOSIGNAL, None);
}
