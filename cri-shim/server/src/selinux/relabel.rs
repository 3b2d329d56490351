//! Labels on files that are there already.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Dir, FileType, Mode, OFlags, ResolveFlags, XattrFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};

const ATTRIBUTE: &str = "security.selinux";
/// What belongs to the system: a pod's label on it would break the machine. The same as upstream runtimes refuse.
const REFUSED: [&str; 24] = [
    "/",
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/etc/passwd",
    "/etc/pki",
    "/etc/shadow",
    "/home",
    "/lib",
    "/lib64",
    "/media",
    "/opt",
    "/proc",
    "/root",
    "/run",
    "/sbin",
    "/srv",
    "/sys",
    "/tmp",
    "/usr",
    "/var",
    "/var/lib",
    "/var/log",
];

fn is_refused(path: &Path) -> bool {
    // By components, so that slashes and dots at the end do not matter.
    REFUSED.iter().any(|r| Path::new(r) == path)
}

/// Through the descriptor of the folder: `name` is not followed if it is a link, and nobody can exchange what lies above it. What is
/// gone meanwhile, or cannot have a label, is passed over.
fn set(folder: &OwnedFd, name: &Path, label: &str) -> io::Result<()> {
    let path = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name);
    match rustix::fs::lsetxattr(path, ATTRIBUTE, label.as_bytes(), XattrFlags::empty()) {
        Ok(()) | Err(Errno::NOENT | Errno::OPNOTSUPP) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

fn open_folder(at: &OwnedFd, below: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    loop {
        // A rename elsewhere on the machine may disturb the walk.
        match rustix::fs::openat2(at, below, flags, Mode::empty(), within) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
}

fn walk(root: &OwnedFd, label: &str) -> io::Result<()> {
    let mut folders = vec![PathBuf::from(".")];
    while let Some(below) = folders.pop() {
        let folder = match open_folder(root, &below) {
            // Gone, or something else by now.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
            other => other?,
        };
        for entry in Dir::read_from(&folder)? {
            let entry = entry?;
            let name = Path::new(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(
                entry.file_name().to_bytes(),
            ));
            if matches!(name.to_str(), Some("." | "..")) {
                continue;
            }
            set(&folder, name, label)?;
            // A file system may not tell what it is; opening it as a folder does.
            if matches!(entry.file_type(), FileType::Directory | FileType::Unknown) {
                folders.push(below.join(name));
            }
        }
    }
    Ok(())
}

/// The label of a file or folder; `None` where it has none.
pub(super) fn label_of(path: &Path) -> Option<String> {
    // The kernel takes labels of up to a page.
    let mut buf = [0u8; 4096];
    let n = rustix::fs::getxattr(path, ATTRIBUTE, &mut buf).ok()?;
    Some(String::from_utf8_lossy(&buf[..n]).trim_end_matches('\0').to_owned())
}

/// Gives `label` to a file or folder itself.
pub(crate) fn label_file(path: &Path, label: &str) -> Result<()> {
    match rustix::fs::setxattr(path, ATTRIBUTE, label.as_bytes(), XattrFlags::empty()) {
        Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
        Err(e) => Err(Error::io("set the SELinux label of", path)(e.into())),
    }
}

/// Gives `label` to a volume with all that lies in it, the volume's own folder last. `path` is free of links.
pub(crate) fn relabel(path: &Path, label: &str) -> Result<()> {
    if is_refused(path) {
        return Err(Error::Invalid(format!(
            "{} belongs to the system and is not given a container's SELinux label",
            path.display()
        )));
    }
    let failed = || Error::io("set the SELinux label of", path);
    if path.is_dir() {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root =
            rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(io::Error::from).map_err(failed())?;
        walk(&root, label).map_err(failed())?;
    }
    label_file(path, label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_folders_are_refused() {
        for bad in ["/", "/usr", "/etc/", "/var/lib/.", "/etc/passwd"] {
            assert!(is_refused(Path::new(bad)), "{bad}");
            assert!(matches!(relabel(Path::new(bad), "u:r:t"), Err(Error::Invalid(_))), "{bad}");
        }
        for good in ["/var/lib/kubelet/pods/x", "/etcetera", "/srv/data"] {
            assert!(!is_refused(Path::new(good)), "{good}");
        }
    }

    /// Without SELinux the attribute is one like any other.
    #[test]
    fn a_tree_is_labelled_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (volume, outside) = (dir.path().join("volume"), dir.path().join("outside"));
        std::fs::create_dir_all(volume.join("a/b")).unwrap();
        std::fs::write(volume.join("a/b/file"), "x").unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("secret"), "x").unwrap();
        std::os::unix::fs::symlink(&outside, volume.join("link")).unwrap();
        std::os::unix::fs::symlink(outside.join("secret"), volume.join("a/link")).unwrap();
        if rustix::fs::setxattr(dir.path(), ATTRIBUTE, b"u:r:t", XattrFlags::empty()).is_err() {
            // A file system without such attributes: nothing is set, and that is no error.
            return relabel(&volume, "u:r:t").unwrap();
        }
        let before = label_of(&outside);
        relabel(&volume, "u:r:t").unwrap();
        for at in ["", "a", "a/b", "a/b/file"] {
            assert_eq!(label_of(&volume.join(at)).as_deref(), Some("u:r:t"), "{at}");
        }
        assert_eq!((label_of(&outside), label_of(&outside.join("secret"))), (before, None));
        relabel(&volume.join("a/b/file"), "u:r:other").unwrap();
        assert_eq!(label_of(&volume.join("a/b/file")).as_deref(), Some("u:r:other"));
    }
}
