//! A user namespace by its mappings, for idmapped mounts. Unsafe: a process must be cloned, because a thread of a busy
//! process cannot enter a user namespace.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;

use crate::options::IdMapping;

/// Makes a user namespace with these mappings. It lives as long as the descriptor.
pub(crate) fn create(uids: &[IdMapping], gids: &[IdMapping]) -> io::Result<OwnedFd> {
    let child = Sleeper::start()?;
    let write = |name: &str, maps: &[IdMapping]| {
        let text: String =
            maps.iter().map(|m| format!("{} {} {}\n", m.container, m.host, m.length)).collect();
        fs::write(format!("/proc/{}/{name}", child.0), text)
    };
    write("uid_map", uids)?;
    write("gid_map", gids)?;
    Ok(File::open(format!("/proc/{}/ns/user", child.0))?.into())
}

/// A process in a new user namespace that does nothing and goes with this value.
struct Sleeper(libc::pid_t);

impl Sleeper {
    fn start() -> io::Result<Sleeper> {
        let parent = std::process::id() as libc::pid_t;
        // SAFETY: like fork without a signal at its end (so that nobody's handler of SIGCHLD sees it); the child has a
        // copy of the memory and makes plain system calls only, without touching the allocator or any lock.
        unsafe {
            match libc::syscall(libc::SYS_clone, libc::CLONE_NEWUSER, 0, 0, 0, 0) {
                0 => {
                    libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
                    // The parent may have ended before.
                    while libc::syscall(libc::SYS_getppid) == libc::c_long::from(parent) {
                        let none: *const libc::c_void = std::ptr::null();
                        // Sleeps until a signal comes; the one that does is SIGKILL.
                        libc::syscall(libc::SYS_ppoll, none, 0, none, none, 0);
                    }
                    libc::syscall(libc::SYS_exit_group, 0);
                    // Not reached: exit_group does not return.
                    std::hint::unreachable_unchecked()
                }
                -1 => Err(io::Error::last_os_error()),
                pid => Ok(Sleeper(pid as libc::pid_t)),
            }
        }
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        // SAFETY: the process is a child of ours that nobody else waits for, so its number is still its own.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            while libc::waitpid(self.0, std::ptr::null_mut(), libc::__WALL) == -1
                && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
            {}
        }
    }
}
