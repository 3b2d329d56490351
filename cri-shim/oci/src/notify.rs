//! A seccomp profile with SCMP_ACT_NOTIFY: the descriptor by which the kernel asks about calls goes to the listener that the profile
//! names (OCI runtime spec, "The Container Process State").
//!
//! The helper connects by the host's path before it enters anything of the container. The process loads its filter as its last
//! step, when it is its user already, and hands the descriptor to the helper over a socket pair. The helper passes it on.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};

use libcontainer::container::State;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, setsockopt,
    socket, socketpair, sockopt::SendTimeout,
};
use nix::sys::time::{TimeVal, TimeValLike};
use oci_spec::runtime::{ContainerProcessState, SECCOMP_FD_NAME, State as OciState};

use crate::kept::Listener;
use crate::{Error, Kind, helper};

/// How long a listener may leave a connection or the state unread, in seconds.
const PATIENCE: i64 = 10;

/// A connection to a listener, and the way of the descriptor to it.
pub(crate) struct Notify {
    to: Listener,
    listener: OwnedFd,
    ours: OwnedFd,
    theirs: OwnedFd,
}

impl Notify {
    /// As the caller, who must have the host's rights and see its files.
    pub(crate) fn connect(to: Listener) -> Result<Notify, Error> {
        let failed = |e: nix::Error| {
            let text = format!("cannot reach the profile's seccomp listener {}", to.path.display());
            Error::io("seccomp", &text, &e.into())
        };
        let listener = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
        let listener = listener.map_err(failed)?;
        setsockopt(&listener, SendTimeout, &TimeVal::seconds(PATIENCE)).map_err(failed)?;
        let address = UnixAddr::new(&to.path).map_err(failed)?;
        connect(listener.as_raw_fd(), &address).map_err(failed)?;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(|e| Error::io("seccomp", "cannot make a socket pair", &e.into()))?;
        Ok(Notify { to, listener, ours, theirs })
    }

    /// Where the process puts the descriptor; for a fork.
    pub(crate) fn courier(&self) -> RawFd {
        self.theirs.as_raw_fd()
    }

    /// Keeps the courier alone, in the process itself: the connection must end when the state has been sent.
    pub(crate) fn in_process(self) {
        // Until execve.
        let _ = self.theirs.into_raw_fd();
    }

    /// Waits for the descriptor and passes it on. A process that ended without one is not an error here: it has told why elsewhere.
    /// `pid`: the process; `state`: of its container.
    pub(crate) fn deliver(self, pid: i32, state: &State) -> Result<(), Error> {
        let failed = |e: io::Error| {
            let text = format!("cannot give the seccomp listener {} its state", self.to.path.display());
            Error::io("seccomp", &text, &e)
        };
        drop(self.theirs);
        let Some(descriptor) = helper::receive_descriptor(&self.ours).map_err(|e| failed(e.into()))? else {
            return Ok(());
        };
        let state = OciState::try_from(state)
            .map_err(|e| Error::new(Kind::Runtime, "seccomp", format!("the container's state: {e}"), 0))?;
        let mut message = ContainerProcessState::default();
        message
            .set_version(state.version().clone())
            .set_fds(vec![SECCOMP_FD_NAME.to_owned()])
            .set_pid(pid)
            .set_metadata(self.to.metadata.clone())
            .set_state(state);
        let bytes = serde_json::to_vec(&message).map_err(|e| failed(e.into()))?;
        let descriptors = [descriptor.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            // With the first bytes only.
            let with = if rest.len() == bytes.len() { &rights[..] } else { &[] };
            let part = [IoSlice::new(rest)];
            let sent = sendmsg::<()>(self.listener.as_raw_fd(), &part, with, MsgFlags::MSG_NOSIGNAL, None);
            rest = &rest[sent.map_err(|e| failed(e.into()))?..];
        }
        Ok(())
    }
}
