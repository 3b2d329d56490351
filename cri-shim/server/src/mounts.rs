//! Mounts below our own folders: taking them away for good, and never deleting through one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags};

use crate::error::{Error, Result};

/// Undoes the octal escapes of mountinfo.
pub(crate) fn unescape(field: &str) -> PathBuf {
    let bytes = field.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let octal = bytes.get(i + 1..i + 4).and_then(|d| std::str::from_utf8(d).ok());
        match (bytes[i], octal.and_then(|d| u8::from_str_radix(d, 8).ok())) {
            (b'\\', Some(value)) => {
                out.push(value);
                i += 4;
            }
            (b, _) => {
                out.push(b);
                i += 1;
            }
        }
    }
    PathBuf::from(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(out))
}

/// Mount points at or below `dir`, in mounting order.
fn below(mountinfo: &str, dir: &Path) -> Vec<PathBuf> {
    mountinfo
        .lines()
        .filter_map(|l| l.split(' ').nth(4))
        .map(unescape)
        .filter(|p| p.starts_with(dir))
        .collect()
}

/// How a mount point passes mounts on, from mountinfo's optional fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Propagation {
    Private,
    Slave,
    Shared,
}

/// The propagation of the mount that `path` lies on.
pub(crate) fn propagation_of(path: &Path) -> Propagation {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    propagation(&text, path)
}

fn propagation(mountinfo: &str, path: &Path) -> Propagation {
    let mut best: Option<(usize, Propagation)> = None;
    for line in mountinfo.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let Some(point) = fields.get(4).map(|p| unescape(p)).filter(|p| path.starts_with(p)) else {
            continue;
        };
        let optional = || fields.iter().skip(6).take_while(|f| **f != "-");
        let kind = if optional().any(|f| f.starts_with("shared:")) {
            Propagation::Shared
        } else if optional().any(|f| f.starts_with("master:")) {
            Propagation::Slave
        } else {
            Propagation::Private
        };
        let depth = point.components().count();
        // A later mount on the same point hides the earlier one.
        if best.is_none_or(|(d, _)| depth >= d) {
            best = Some((depth, kind));
        }
    }
    best.map_or(Propagation::Private, |(_, k)| k)
}

/// Unmounts everything at or below `dir`.
pub(crate) fn unmount_below(dir: &Path) -> Result<()> {
    let table = Path::new("/proc/self/mountinfo");
    let text = fs::read_to_string(table).map_err(Error::io("read", table))?;
    for point in below(&text, dir).iter().rev() {
        unmount(point)?;
    }
    Ok(())
}

/// Unmounts `point`; nothing there is fine.
pub(crate) fn unmount(point: &Path) -> Result<()> {
    match rustix::mount::unmount(point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(()),
        Err(e) => Err(Error::io("unmount", point)(e.into())),
    }
}

/// Deletes one of our folders with all that is mounted in it taken off first. Idempotent.
pub(crate) fn remove_tree(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    unmount_below(dir)?;
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", dir)(e)),
        _ => Ok(()),
    }
}

/// The run folder's source as mountinfo has it, by which its mount is known again.
const RUN_SOURCE: &str = "orlop-run";

/// Mounts a tmpfs at the run folder when that lies on a disk, as where `/run` is not a file system of its own: what must not
/// outlive a boot cannot, and pods do not wait for the disk. One in which pods of an earlier server live stays as it is.
pub(crate) fn keep_in_memory(run_dir: &Path) -> Result<()> {
    const TMPFS: rustix::fs::FsWord = 0x0102_1994;
    const RAMFS: rustix::fs::FsWord = 0x8584_58f6;
    let stat = rustix::fs::statfs(run_dir).map_err(|e| Error::io("look at", run_dir)(e.into()))?;
    if [TMPFS, RAMFS].contains(&stat.f_type) || pods_in(run_dir) {
        return Ok(());
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    if let Err(e) = rustix::mount::mount(RUN_SOURCE, run_dir, "tmpfs", flags, c"mode=0711") {
        tracing::warn!(path = %run_dir.display(), error = %e, "no tmpfs for the run folder; it stays on the disk");
    }
    Ok(())
}

fn pods_in(run_dir: &Path) -> bool {
    fs::read_dir(run_dir.join("s")).is_ok_and(|mut pods| pods.next().is_some())
}

/// Takes the mount of [`keep_in_memory`] off when no pod lives in it.
pub(crate) fn let_go_if_unused(run_dir: &Path) {
    let Ok(run_dir) = &fs::canonicalize(run_dir) else { return };
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let ours = text.lines().any(|line| {
        line.split(' ').nth(4).map(unescape).as_ref() == Some(run_dir)
            && line.split_once(" - ").is_some_and(|(_, fs)| fs.split(' ').nth(1) == Some(RUN_SOURCE))
    });
    if ours
        && !pods_in(run_dir)
        && let Err(e) = unmount(run_dir)
    {
        tracing::warn!(path = %run_dir.display(), error = %e, "the run folder stays mounted");
    }
}

/// The pod's own /dev/shm, whose folder belongs to `root`, the pod's root as the host sees it. `label`: the SELinux label of all that
/// lies in it, if there is one.
pub(crate) fn mount_shm(at: &Path, bytes: u64, root: u32, label: &str) -> Result<()> {
    fs::create_dir_all(at).map_err(Error::io("create", at))?;
    let mut options = format!("mode=1777,size={bytes},uid={root},gid={root}");
    if !label.is_empty() {
        options.push_str(&format!(",context=\"{label}\""));
    }
    let options = std::ffi::CString::new(options).unwrap_or_default();
    rustix::mount::mount(
        "shm",
        at,
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
        options.as_c_str(),
    )
    .map_err(|e| Error::io("mount a tmpfs at", at)(e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
21 1 0:20 / / rw shared:1 - ext4 /dev/a rw
22 21 0:21 / /run rw master:5 - tmpfs tmpfs rw
23 22 0:22 / /run/a\\040b rw - tmpfs tmpfs rw
24 22 0:23 / /run/ab rw - tmpfs tmpfs rw
25 23 0:24 / /run/a\\040b/c rw - tmpfs tmpfs rw
";

    #[test]
    fn only_what_lies_below_is_found() {
        assert_eq!(
            below(TABLE, Path::new("/run/a b")),
            [PathBuf::from("/run/a b"), PathBuf::from("/run/a b/c")]
        );
        assert!(below(TABLE, Path::new("/run/a")).is_empty());
    }

    #[test]
    fn propagation_is_that_of_the_deepest_mount() {
        assert_eq!(propagation(TABLE, Path::new("/home")), Propagation::Shared);
        assert_eq!(propagation(TABLE, Path::new("/run/x")), Propagation::Slave);
        assert_eq!(propagation(TABLE, Path::new("/run/ab/x")), Propagation::Private);
    }
}
