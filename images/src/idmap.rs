//! Images for containers in user namespaces: their files must belong to the ids that the namespace maps.
//!
//! The layers are mounted a second time with translated owners (an idmapped mount), which costs nothing per file;
//! overlayfs takes such layers since Linux 5.19. Where the kernel or the store's file system refuses, every file changes its
//! owner in the writable layer, which copies metadata only.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Stat, Uid, XattrFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::layout::Layout;
use crate::options::{IdMapping, UserNamespace};
use crate::overlay::unmount_all;
use crate::{mount_setattr, user_namespace};

/// The id outside for `id` inside; `None` when nothing maps it.
fn outside(maps: &[IdMapping], id: u32) -> Option<u32> {
    maps.iter().find_map(|m| {
        let offset = id.checked_sub(m.container).filter(|o| *o < m.length)?;
        m.host.checked_add(offset)
    })
}

impl UserNamespace {
    /// Owner outside of a file that the image gives to `(uid, gid)`. An id that nothing maps belongs to nobody, whom
    /// the container cannot be.
    pub(crate) fn owner(&self, (uid, gid): (u32, u32)) -> (u32, u32) {
        const NOBODY: u32 = 65534;
        (outside(&self.uids, uid).unwrap_or(NOBODY), outside(&self.gids, gid).unwrap_or(NOBODY))
    }
}

/// The folder of layers, mounted again with translated owners while an overlay is made from it; that keeps mounts of its
/// own. Goes with this value.
pub(crate) struct Mapped {
    pub path: PathBuf,
}

impl Mapped {
    pub fn mount(layout: &Layout, ns: &UserNamespace) -> Result<Mapped, String> {
        orlop_base::failpoint::pass("images.idmap").map_err(|e| e.to_string())?;
        let namespace =
            user_namespace::create(&ns.uids, &ns.gids).map_err(|e| format!("user namespace: {e}"))?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(CWD, layout.layers(), flags).map_err(|e| format!("open_tree: {e}"))?;
        mount_setattr::idmap_read_only(tree.as_fd(), namespace.as_fd())
            .map_err(|e| format!("mount_setattr: {e}"))?;
        let mapped = Mapped { path: layout.mapped() };
        fs::create_dir(&mapped.path).map_err(|e| format!("{}: {e}", mapped.path.display()))?;
        move_mount(&tree, "", CWD, &mapped.path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(|e| format!("move_mount: {e}"))?;
        Ok(mapped)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        take_away(&self.path);
    }
}

/// Unmounts and removes one folder of [`Layout::mapped`]. Never deletes below it: that would be the layers.
pub(crate) fn take_away(path: &Path) {
    if let Err(e) = unmount_all(path) {
        tracing::warn!(path = %path.display(), error = %e, "a mount of the layers stays until the next start");
        return;
    }
    let _ = fs::remove_dir(path);
}

/// Gives everything in a mounted overlay to its owner outside. Names of one file become files of their own there, so none
/// is met twice.
pub(crate) fn change_owners(root: &Path, ns: &UserNamespace) -> rustix::io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, root, flags, Mode::empty())?;
    let mut stack = vec![rustix::fs::Dir::read_from(&root)?];
    while let Some(listing) = stack.last_mut() {
        let Some(item) = listing.next().transpose()? else {
            stack.pop();
            continue;
        };
        let name = item.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let here: OwnedFd = listing.fd()?.try_clone_to_owned().map_err(|_| Errno::MFILE)?;
        let stat = rustix::fs::statat(&here, name, AtFlags::SYMLINK_NOFOLLOW)?;
        change_owner(here.as_fd(), name.to_bytes(), &stat, ns)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            let fd = rustix::fs::openat(&here, name, flags, Mode::empty())?;
            stack.push(rustix::fs::Dir::new(fd)?);
        }
    }
    let stat = rustix::fs::fstat(&root)?;
    change_owner(root.as_fd(), b".", &stat, ns)
}

fn change_owner(
    parent: BorrowedFd<'_>,
    name: &[u8],
    stat: &Stat,
    ns: &UserNamespace,
) -> rustix::io::Result<()> {
    let kind = FileType::from_raw_mode(stat.st_mode);
    // There is no call that takes a folder's descriptor, a name and an attribute.
    let path = [format!("/proc/self/fd/{}/", parent.as_raw_fd()).as_bytes(), name].concat();
    let capability = match kind {
        FileType::RegularFile => capability(&path)?,
        _ => None,
    };
    let (uid, gid) = ns.owner((stat.st_uid, stat.st_gid));
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if kind == FileType::RegularFile && stat.st_mode & 0o6000 != 0 {
        // A change of the owner takes these bits. Nobody else has the mount, so the name is no link.
        rustix::fs::chmodat(parent, name, Mode::from_raw_mode(stat.st_mode), AtFlags::empty())?;
    }
    if let Some(value) = capability {
        let root = ns.owner((0, 0)).0;
        rustix::fs::lsetxattr(path, CAPABILITY, &in_namespace(&value, root), XattrFlags::empty())?;
    }
    Ok(())
}

const CAPABILITY: &str = "security.capability";

fn capability(path: &[u8]) -> rustix::io::Result<Option<Vec<u8>>> {
    let mut value = [0u8; 24];
    match rustix::fs::lgetxattr(path, CAPABILITY, &mut value[..]) {
        Ok(n) => Ok(Some(value[..n].to_vec())),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(e) => Err(e),
    }
}

/// File capabilities (`vfs_cap_data`, revision 2) as those of a user namespace whose root is `root` (revision 3).
fn in_namespace(value: &[u8], root: u32) -> Vec<u8> {
    const REVISION: u32 = 0xff00_0000;
    let magic = value.first_chunk::<4>().map_or(0, |b| u32::from_le_bytes(*b));
    if magic & REVISION != 0x0200_0000 || value.len() != 20 {
        return value.to_vec();
    }
    let magic = (magic & !REVISION) | 0x0300_0000;
    [&magic.to_le_bytes()[..], &value[4..], &root.to_le_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_shifted_and_strangers_become_nobody() {
        let map = |container, host, length| IdMapping { container, host, length };
        let ns = UserNamespace {
            uids: vec![map(0, 100_000, 1000), map(1000, 5, 1), map(2000, u32::MAX, 2)],
            gids: vec![map(0, 200_000, 65536)],
        };
        for (inside, want) in [
            ((0, 0), (100_000, 200_000)),
            ((999, 65535), (100_999, 265_535)),
            ((1000, 65536), (5, 65534)),
            ((1001, 1), (65534, 200_001)),
            ((2001, 1), (65534, 200_001)),
        ] {
            assert_eq!(ns.owner(inside), want, "{inside:?}");
        }
    }

    #[test]
    fn capabilities_name_the_root_of_the_namespace() {
        let two = [&0x0200_0001u32.to_le_bytes()[..], &[7; 16]].concat();
        let three = in_namespace(&two, 100_000);
        assert_eq!(three.len(), 24);
        assert_eq!(three[..4], 0x0300_0001u32.to_le_bytes());
        assert_eq!(three[20..], 100_000u32.to_le_bytes());
        assert_eq!(in_namespace(&three, 5), three);
        assert_eq!(in_namespace(b"x", 5), b"x");
    }
}
