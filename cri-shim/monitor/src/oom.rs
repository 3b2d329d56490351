//! Wakes the loop when the kernel may have killed a process of a container's cgroup; the counter tells whether it did.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use orlop_oci::cgroup;

/// A kill is counted within this after its notice, also on a busy machine.
pub const COUNTED_WITHIN: Duration = Duration::from_secs(2);
/// Pause between looks at the counter meanwhile.
pub const CHECK_AGAIN: Duration = Duration::from_millis(20);

/// Holds what keeps the notification alive. Poll `fd`.
#[derive(Debug)]
pub struct OomWatch {
    pub fd: OwnedFd,
    _control: Option<File>,
}

/// `None` when the container has no memory cgroup of its own.
pub fn watch(cgroups: &[PathBuf]) -> io::Result<Option<OomWatch>> {
    let Some(folder) = cgroup::memory_folder(cgroups) else { return Ok(None) };
    if cgroup::is_unified() {
        use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
        let fd = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        add_watch(&fd, folder.join("memory.events"), WatchFlags::MODIFY)?;
        return Ok(Some(OomWatch { fd, _control: None }));
    }
    let fd = rustix::event::eventfd(
        0,
        rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK,
    )?;
    let control = File::open(folder.join("memory.oom_control"))?;
    fs::write(folder.join("cgroup.event_control"), format!("{} {}", fd.as_raw_fd(), control.as_raw_fd()))?;
    Ok(Some(OomWatch { fd, _control: Some(control) }))
}

/// Takes the pending notifications.
pub fn drain(w: &OomWatch) {
    let mut buf = [0u8; 512];
    while rustix::io::read(&w.fd, &mut buf).is_ok_and(|n| n > 0) {}
}
