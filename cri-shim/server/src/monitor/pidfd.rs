//! Waits for the end of a process by its descriptor: one unsafe call.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Returns when the process has ended, reaped or not.
pub(super) async fn ended(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: the borrow keeps the descriptor open, and an OwnedFd always names the same one.
    let readable = unsafe { AsyncFd::register_with_interest(fd.as_fd(), Interest::READABLE) };
    readable.map_err(|e| e.into_parts().1)?.readable().await.map(drop)
}
