//! Mount points below a folder, and deleting folders without ever deleting through a mount.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

use super::Error;

/// Whether another file system is mounted right at `path`.
pub fn is_mount_point(path: &Path) -> Result<bool, Error> {
    let own = fs::metadata(path).map_err(Error::io("look at", path))?;
    let parent = fs::metadata(path.join("..")).map_err(Error::io("look at", path))?;
    Ok(own.dev() != parent.dev())
}

/// mountinfo(5) writes space, tab, newline and backslash in octal.
fn unescape(text: &str) -> PathBuf {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let code = rest.get(at + 1..at + 4).and_then(|c| u8::from_str_radix(c, 8).ok());
        match code {
            Some(c) => {
                out.push(c as char);
                rest = &rest[at + 4..];
            }
            None => {
                out.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    out.push_str(rest);
    PathBuf::from(out)
}

/// Mount points at or below `dir`, deepest and latest first.
pub fn below(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let info = Path::new("/proc/self/mountinfo");
    let text = fs::read_to_string(info).map_err(Error::io("read", info))?;
    let dir = fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
    let points = text.lines().filter_map(|l| l.split(' ').nth(4)).map(unescape);
    let mut found: Vec<PathBuf> = points.filter(|p| p.starts_with(&dir)).collect();
    found.reverse();
    Ok(found)
}

/// Unmounts all below `dir`; what is busy is detached and goes when its last user does.
pub fn unmount_below(dir: &Path) -> Result<(), Error> {
    if !dir.exists() {
        return Ok(());
    }
    for point in below(dir)? {
        match umount2(&point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
            Err(e) => return Err(Error::io("unmount", &point)(e.into())),
        }
    }
    Ok(())
}

/// Deletes a folder unless something is still mounted in it.
pub fn remove_tree(dir: &Path) -> Result<(), Error> {
    if !dir.exists() {
        return Ok(());
    }
    if let Some(point) = below(dir)?.into_iter().next() {
        return Err(Error::io("delete, because it is still mounted,", &point)(
            io::ErrorKind::ResourceBusy.into(),
        ));
    }
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("delete", dir)(e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_codes() {
        assert_eq!(unescape(r"/a\040b\134c"), PathBuf::from(r"/a b\c"));
        assert_eq!(unescape(r"/a\"), PathBuf::from(r"/a\"));
    }
}
