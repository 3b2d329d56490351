//! Protects the program file from containers (CVE-2019-5736).
//!
//! A container that makes its own program a link to /proc/self/exe is executed as this program, and may then keep a handle of the
//! file and write to it once no process runs it. So the monitor runs from a read-only view of its file: a bind mount that is in
//! no mount namespace, so that nobody can remount it. It costs no memory, unlike a copy: pages are shared by all monitors.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;

use rustix::fs::StatVfsMountFlags;
use rustix::mount::{OpenTreeFlags, open_tree};

const OWN: &str = "/proc/self/exe";

/// Returns in a process whose program file is on a read-only mount and whose environment is empty (libraries that look for
/// LISTEN_FDS and the like find nothing to pass on to containers).
pub fn run_sealed() -> io::Result<()> {
    let read_only = rustix::fs::statvfs(OWN)?.f_flag.contains(StatVfsMountFlags::RDONLY);
    if read_only && std::env::vars_os().next().is_none() {
        // The kernel named it by the descriptor it was executed from.
        return Ok(nix::sys::prctl::set_name(c"orlop-monitor")?);
    }
    let program =
        open_tree(rustix::fs::CWD, OWN, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    make_read_only(&program)?;
    let args: Vec<CString> = std::env::args_os().filter_map(|a| CString::new(a.into_vec()).ok()).collect();
    let Err(e) = nix::unistd::execveat(
        program.as_fd(),
        c"",
        &args,
        &[] as &[CString],
        nix::fcntl::AtFlags::AT_EMPTY_PATH,
    );
    Err(e.into())
}

fn make_read_only(mount: &OwnedFd) -> io::Result<()> {
    let attributes =
        libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the path and the struct outlive the call and are as long as is said.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &attributes as *const libc::mount_attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
