//! /dev of a container: nodes, links, and the terminal.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Uid};
use rustix::io::Errno;

use super::Failure;
use super::mount::{Root, attach, copy_of, open_source};
use super::plan::{Node, NodeKind};
use crate::console::{self, Console};
use crate::sys;

const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
];

/// Makes links and nodes. The caller's file mode mask must be empty.
pub(super) fn fill(root: &Root, nodes: &[Node]) -> Result<(), Failure> {
    let failed = |what: &str, e: io::Error| Failure::io("rootfs", format!("cannot make {what}"), &e);
    let dev = root.folder(Path::new("/dev")).map_err(|e| failed("/dev", e.into()))?;
    for (to, name) in LINKS {
        if name == "ptmx" {
            // An image may bring one of its own.
            match rustix::fs::unlinkat(&dev, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(e) => return Err(failed("/dev/ptmx", e.into())),
            }
        }
        match rustix::fs::symlinkat(to, &dev, name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(failed(&format!("/dev/{name}"), e.into())),
        }
    }
    for n in nodes {
        make_node(root, &dev, n).map_err(|e| failed(&n.at.display().to_string(), e))?;
    }
    Ok(())
}

fn make_node(root: &Root, dev: &OwnedFd, n: &Node) -> io::Result<()> {
    let (Some(above), Some(name)) = (n.at.parent(), n.at.file_name()) else {
        return Err(Errno::INVAL.into());
    };
    let other;
    let folder = match above == Path::new("/dev") {
        true => dev.as_fd(),
        false => {
            other = root.folder(above)?;
            other.as_fd()
        }
    };
    let kind = match n.kind {
        NodeKind::Character => FileType::CharacterDevice,
        NodeKind::Block => FileType::BlockDevice,
        NodeKind::Fifo => FileType::Fifo,
    };
    let number = rustix::fs::makedev(n.major, n.minor);
    match rustix::fs::mknodat(folder, name, kind, Mode::from_raw_mode(n.mode), number) {
        Ok(()) => {}
        // In a user namespace nobody makes devices: the host's is shown instead.
        Err(Errno::PERM) => {
            let host = open_source(&n.at, false)?;
            // By its path in the container: what is there on the host may be another device.
            let s = rustix::fs::fstat(&host)?;
            if FileType::from_raw_mode(s.st_mode) != kind || s.st_rdev != number {
                return Err(Errno::NODEV.into());
            }
            return Ok(attach(&host, root.file(&n.at)?)?);
        }
        // The image has one, or a volume lies there.
        Err(Errno::EXIST) => return Ok(()),
        Err(e) => return Err(e.into()),
    }
    if n.owner != (0, 0) {
        let (uid, gid) = (Uid::from_raw(n.owner.0), Gid::from_raw(n.owner.1));
        rustix::fs::chownat(folder, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}

/// The container's null device, checked to be one.
pub(super) fn null() -> io::Result<OwnedFd> {
    let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW | libc::O_NOCTTY | libc::O_CLOEXEC;
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open("/dev/null")?;
    let m = file.metadata()?;
    if !m.file_type().is_char_device() || m.rdev() != libc::makedev(1, 3) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "/dev/null is no null device"));
    }
    Ok(file.into())
}

/// Standard streams on the host's null device move to the container's.
pub(super) fn take_null(null: &OwnedFd) -> io::Result<()> {
    use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};
    let on_null = |fd| {
        let s = rustix::fs::fstat(crate::helper::borrow(fd))?;
        let is_device = FileType::from_raw_mode(s.st_mode) == FileType::CharacterDevice;
        Ok::<_, io::Error>(is_device && s.st_rdev == libc::makedev(1, 3))
    };
    if on_null(0)? {
        dup2_stdin(null)?;
    }
    if on_null(1)? {
        dup2_stdout(null)?;
    }
    if on_null(2)? {
        dup2_stderr(null)?;
    }
    Ok(())
}

/// Gives the process a terminal of the container as its standard streams, and shows it as /dev/console.
pub(super) fn take_console(to: &Console) -> io::Result<()> {
    let (master, slave) = console::open_in_container()?;
    let flags = libc::O_CREAT | libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NOCTTY | libc::O_PATH;
    let at = match OpenOptions::new().read(true).custom_flags(flags & !libc::O_CREAT).open("/dev/console") {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let create = rustix::fs::OFlags::CREATE
                | rustix::fs::OFlags::EXCL
                | rustix::fs::OFlags::NOFOLLOW
                | rustix::fs::OFlags::CLOEXEC;
            rustix::fs::openat(CWD, "/dev/console", create, Mode::from_raw_mode(0o600))?
        }
        other => other?.into(),
    };
    if FileType::from_raw_mode(rustix::fs::fstat(&at)?.st_mode) == FileType::Symlink {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "/dev/console is a link"));
    }
    attach(copy_of(&slave, false)?, &at)?;
    to.send(&master)?;
    nix::unistd::dup2_stdin(&slave)?;
    nix::unistd::dup2_stdout(&slave)?;
    nix::unistd::dup2_stderr(&slave)?;
    sys::take_terminal()
}
