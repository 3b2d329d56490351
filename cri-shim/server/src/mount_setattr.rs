//! `mount_setattr(2)`, which rustix does not have: one unsafe call.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// What is changed of a detached mount.
#[derive(Clone, Copy)]
pub(crate) enum Change<'a> {
    /// `MS_PRIVATE` or `MS_SLAVE`.
    Propagation(u64),
    /// Owners are translated by this user namespace.
    Idmap(BorrowedFd<'a>),
    ReadOnly,
}

/// With `recursive` also what is mounted below it; then all of them change or none.
pub(crate) fn set(mount: BorrowedFd<'_>, change: Change<'_>, recursive: bool) -> io::Result<()> {
    let mut attributes = libc::mount_attr { attr_set: 0, attr_clr: 0, propagation: 0, userns_fd: 0 };
    match change {
        Change::Propagation(kind) => attributes.propagation = kind,
        Change::Idmap(namespace) => {
            attributes.attr_set = libc::MOUNT_ATTR_IDMAP;
            attributes.userns_fd = namespace.as_raw_fd() as u64;
        }
        Change::ReadOnly => attributes.attr_set = libc::MOUNT_ATTR_RDONLY,
    }
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the kernel reads the path, which is an empty C string, and the structure of the size that is given; both
    // outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
