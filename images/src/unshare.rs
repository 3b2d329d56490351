//! One unsafe call.

/// Gives the calling thread a working directory of its own. For short-lived threads only: it cannot be taken back.
pub(crate) fn own_working_directory() -> std::io::Result<()> {
    // SAFETY: CLONE_FS unshares working directory, root and umask of this thread; no memory or descriptor is affected.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }.map_err(Into::into)
}
