//! A program that begins with a descriptor of ours as its number 3. `unsafe` is here only.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use tokio::process::Command;

/// The number that plugins are told of.
pub(crate) const NUMBER: i32 = 3;

/// Hands `socket` to the program as number 3.
pub(crate) fn hand_over(command: &mut Command, socket: OwnedFd) {
    let inherit = move || {
        let had = socket.as_raw_fd();
        // SAFETY: both calls are async-signal-safe and touch nothing but the child's descriptors, of which `had` is one for as long
        // as the closure, which owns it, lives.
        let done = unsafe {
            if had == NUMBER { libc::fcntl(had, libc::F_SETFD, 0) } else { libc::dup2(had, NUMBER) }
        };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: between fork and exec the closure does only what is described above: no allocation, no lock.
    unsafe { command.pre_exec(inherit) };
}
