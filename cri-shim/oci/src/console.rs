//! Terminals: the slave end in the container, the master for the monitor.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};

use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};
use rustix::pty::OpenptFlags;

use crate::{Error, Kind, helper};

const DEVPTS: i64 = 0x1cd1;

fn failed(what: &str, e: &io::Error) -> Error {
    Error::io("tty", what, e)
}

/// A socket over which the process in the container sends its terminal's master.
pub(crate) struct Console {
    ours: OwnedFd,
    theirs: OwnedFd,
}

impl Console {
    pub(crate) fn new(tty: bool) -> Result<Option<Console>, Error> {
        if !tty {
            return Ok(None);
        }
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(|e| failed("cannot make the console socket", &e.into()))?;
        Ok(Some(Console { ours, theirs }))
    }

    pub(crate) fn theirs(&self) -> RawFd {
        self.theirs.as_raw_fd()
    }

    pub(crate) fn send(&self, master: &File) -> io::Result<()> {
        let fds = [master.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(self.theirs(), &[io::IoSlice::new(b"m")], &rights, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }

    /// The master. Ends with an error when the process in the container has gone.
    pub(crate) fn receive(self) -> Result<OwnedFd, Error> {
        drop(self.theirs);
        helper::receive_descriptor(&self.ours)
            .map_err(|e| failed("no console was sent", &e.into()))?
            .ok_or_else(|| Error::new(Kind::Runtime, "tty", "no console was sent", 0))
    }
}

/// A new terminal of the container whose mount namespace the caller has joined: master and slave.
///
/// What lies at /dev/ptmx is the container's to decide, so it is checked (CVE-2025-52565), and the slave is asked of the master
/// rather than looked up.
pub(crate) fn open_in_container() -> io::Result<(File, OwnedFd)> {
    let open = |path| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY | libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(path)
    };
    let master = open("/dev/pts/ptmx").or_else(|_| open("/dev/ptmx"))?;
    let m = master.metadata()?;
    let file_system = rustix::fs::fstatfs(&master)?.f_type;
    if !m.file_type().is_char_device() || m.rdev() != libc::makedev(5, 2) || file_system != DEVPTS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "/dev/ptmx of the container is no terminal multiplexer",
        ));
    }
    rustix::pty::unlockpt(&master)?;
    let slave = slave_of(master.as_fd())?;
    Ok((master, slave))
}

fn slave_of(master: impl AsFd) -> io::Result<OwnedFd> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    Ok(rustix::pty::ioctl_tiocgptpeer(master, flags)?)
}

/// Lets a user reopen the terminal.
pub(crate) fn give_to(master: &OwnedFd, uid: u32) {
    if let Ok(slave) = slave_of(master) {
        // One that keeps its owner still works through the inherited descriptors.
        let _ = rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(uid)), None);
    }
}
