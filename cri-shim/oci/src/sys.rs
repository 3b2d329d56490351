//! System calls without a wrapper that fits: processes made like siblings, and the seccomp filter. `unsafe` lives here.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::unistd::Pid;

use crate::seccomp::Filter;

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Forks a sibling: a child of the caller's parent, which reaps it. `into`: the cgroup (v2) in which it begins.
///
/// The caller must be single-threaded, and the child must end by [`crate::helper::leave`] or execve.
pub(crate) fn fork_sibling(into: Option<BorrowedFd<'_>>) -> io::Result<Option<Pid>> {
    // A sibling's end is told as the caller's own.
    fork(libc::CLONE_PARENT as u64, 0, into)
}

/// Forks a child; the rest as for [`fork_sibling`].
pub(crate) fn fork_child(into: Option<BorrowedFd<'_>>) -> io::Result<Option<Pid>> {
    fork(0, libc::SIGCHLD as u64, into)
}

fn fork(flags: u64, signal: u64, into: Option<BorrowedFd<'_>>) -> io::Result<Option<Pid>> {
    // The first fields of struct clone_args; the kernel takes the length along.
    let mut args = [0u64; 11];
    args[0] = flags;
    args[4] = signal;
    if let Some(fd) = into {
        args[0] |= CLONE_INTO_CGROUP;
        args[10] = fd.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM and a stack this is fork; the process is single-threaded (documented above), so no lock is held by
    // a thread that the child lacks. `args` outlives the call and is as long as is said.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, args.as_ptr(), size_of_val(&args)) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        pid => Ok(Some(Pid::from_raw(pid as i32))),
    }
}

/// Installs a filter for the calling process. Needs no_new_privs or CAP_SYS_ADMIN.
pub(crate) fn load_filter(filter: &Filter) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: filter.program.len() as u16,
        // The kernel only reads.
        filter: filter.program.as_ptr().cast_mut(),
    };
    // SAFETY: `program` and what it points to outlive the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            filter.flags,
            &program as *const libc::sock_fprog,
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The caller's controlling terminal becomes the one that is its standard input.
pub(crate) fn take_terminal() -> io::Result<()> {
    // SAFETY: an integer argument.
    if unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Every descriptor from this number on is closed by execve.
pub(crate) fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: changes a flag of descriptors, closes none.
    let done = unsafe { libc::close_range(first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
