//! Walks of folders that a container or a hostile image may have made as deep as it likes: deeper than a path can name, and than a
//! process can have descriptors. Blocking code.

use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};
use rustix::io::{Errno, Result};

use crate::Usage;

/// Folders that are open at the same time. Each costs a descriptor and a buffer.
const OPEN: usize = 64;

const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Opens a folder of ours by its path.
pub(crate) fn open(path: &std::path::Path) -> Result<OwnedFd> {
    rustix::fs::openat(CWD, path, FOLDER, Mode::empty())
}

/// Deletes everything below `dir`, without following links.
pub(crate) fn empty(dir: &OwnedFd) -> Result<()> {
    let mut moved = 0;
    loop {
        let before = moved;
        empty_once(dir, &mut moved)?;
        // What was moved to the top may have come too late for the listing of it.
        if moved == before {
            return Ok(());
        }
    }
}

fn empty_once(dir: &OwnedFd, moved: &mut u64) -> Result<()> {
    let mut stack = vec![(Dir::read_from(dir)?, None::<CString>)];
    loop {
        let full = stack.len() >= OPEN;
        let Some((listing, _)) = stack.last_mut() else { return Ok(()) };
        let next = listing.next().transpose()?;
        let Some(item) = next else {
            let name = stack.pop().and_then(|(_, name)| name);
            if let (Some(name), Some((up, _))) = (name, stack.last()) {
                rustix::fs::unlinkat(up.fd()?, &*name, AtFlags::REMOVEDIR)?;
            }
            continue;
        };
        let name = item.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let here = listing.fd()?;
        match rustix::fs::unlinkat(here, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::ISDIR | Errno::PERM) if !full => {
                let fd = rustix::fs::openat(here, name, FOLDER, Mode::empty())?;
                let name = name.to_owned();
                stack.push((Dir::new(fd)?, Some(name)));
            }
            Err(Errno::ISDIR | Errno::PERM) => move_up(here, name, dir.as_fd(), moved)?,
            Err(e) => return Err(e),
        }
    }
}

/// Moves what is too deep to the top, under a name that nothing has there.
fn move_up(from: BorrowedFd<'_>, name: &CStr, top: BorrowedFd<'_>, moved: &mut u64) -> Result<()> {
    loop {
        *moved += 1;
        match rustix::fs::renameat(from, name, top, format!("deep-{moved}")) {
            Err(Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR | Errno::ISDIR) => {}
            result => return result,
        }
    }
}

/// A folder on the way from the top to where a walk is.
struct Level {
    name: CString,
    id: (u64, u64),
    /// Folders in it that the walk has not been to.
    left: Vec<CString>,
}

/// Bytes and inodes below `dir`, each hard-linked file once. Goes on where files vanish meanwhile.
pub(crate) fn measure(dir: &OwnedFd) -> Result<Usage> {
    let (mut usage, mut linked) = (Usage::default(), HashSet::new());
    let top = rustix::fs::openat(dir, c".", FOLDER, Mode::empty())?;
    let first = look(&top, c"", &mut usage, &mut linked)?;
    let (mut here, mut levels) = (top, vec![first]);
    while let Some(level) = levels.last_mut() {
        if let Some(name) = level.left.pop() {
            match rustix::fs::openat(&here, &*name, FOLDER, Mode::empty()) {
                Ok(fd) => {
                    levels.push(look(&fd, &name, &mut usage, &mut linked)?);
                    here = fd;
                }
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(e) => return Err(e),
            }
            continue;
        }
        levels.pop();
        let Some(above) = levels.last() else { break };
        // A container that runs may move its folders meanwhile.
        here = match rustix::fs::openat(&here, c"..", FOLDER, Mode::empty()) {
            Ok(up) if id_of(&up)? == above.id => up,
            Ok(_) | Err(Errno::NOENT) => descend(dir, &mut levels)?,
            Err(e) => return Err(e),
        };
    }
    Ok(usage)
}

/// Counts what a folder holds and tells which folders are in it.
fn look(dir: &OwnedFd, name: &CStr, usage: &mut Usage, linked: &mut HashSet<(u64, u64)>) -> Result<Level> {
    let mut level = Level { name: name.to_owned(), id: id_of(dir)?, left: Vec::new() };
    for item in Dir::read_from(dir)? {
        let item = item?;
        let name = item.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let Ok(stat) = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
        let is_folder = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if stat.st_nlink > 1 && !is_folder && !linked.insert((stat.st_dev, stat.st_ino)) {
            continue;
        }
        usage.bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
        usage.inodes += 1;
        if is_folder {
            level.left.push(name.to_owned());
        }
    }
    Ok(level)
}

fn id_of(dir: &OwnedFd) -> Result<(u64, u64)> {
    let stat = rustix::fs::fstat(dir)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Opens the last of `levels` by their names, or the last that is still there; the others are dropped.
fn descend(top: &OwnedFd, levels: &mut Vec<Level>) -> Result<OwnedFd> {
    let mut here = rustix::fs::openat(top, c".", FOLDER, Mode::empty())?;
    for n in 1..levels.len() {
        match rustix::fs::openat(&here, &*levels[n].name, FOLDER, Mode::empty()) {
            Ok(next) if id_of(&next)? == levels[n].id => here = next,
            Ok(_) | Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {
                levels.truncate(n);
                break;
            }
            Err(e) => return Err(e),
        }
    }
    Ok(here)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use rustix::process::{Resource, Rlimit, setrlimit};

    use super::*;
    use crate::layout::Layout;

    const DEPTH: u64 = 6000;
    const CHILD: &str = "ORLOP_TEST_FEW_DESCRIPTORS";

    /// So many folders in each other, with a file at every thousandth.
    fn deep(at: &Path) {
        std::fs::create_dir(at).unwrap();
        let mut here = open(at).unwrap();
        for n in 0..DEPTH {
            rustix::fs::mkdirat(&here, c"a", Mode::from(0o755)).unwrap();
            here = rustix::fs::openat(&here, c"a", FOLDER, Mode::empty()).unwrap();
            if n % 1000 == 0 {
                let flags = OFlags::CREATE | OFlags::WRONLY;
                rustix::fs::openat(&here, c"file", flags, Mode::from(0o600)).unwrap();
            }
        }
    }

    fn with_few_descriptors() {
        setrlimit(Resource::Nofile, Rlimit { current: Some(100), maximum: Some(100) }).unwrap();
        let place = tempfile::tempdir().unwrap();
        let layout = Layout::create(&place.path().join("store")).unwrap();
        deep(&layout.root.join("trash/0"));
        deep(&layout.root.join("ingest/0"));
        // In the way of what is moved up.
        std::fs::write(layout.root.join("trash/0/deep-1"), "").unwrap();
        std::fs::create_dir_all(layout.root.join("trash/0/deep-2/x")).unwrap();
        let usage = crate::layout::measure(&layout.root.join("ingest/0")).unwrap();
        assert_eq!(usage.inodes, DEPTH + DEPTH / 1000);
        layout.clean().unwrap();
        for name in ["trash", "ingest"] {
            assert_eq!(std::fs::read_dir(layout.root.join(name)).unwrap().count(), 0, "{name}");
        }
        // A layer that is given up.
        let unfinished = layout.ingest();
        deep(&unfinished.path);
        drop(unfinished);
        assert_eq!(std::fs::read_dir(layout.root.join("ingest")).unwrap().count(), 0);
    }

    #[test]
    fn a_tree_of_any_depth_needs_few_descriptors() {
        if std::env::var_os(CHILD).is_some() {
            return with_few_descriptors();
        }
        let name = "tree::tests::a_tree_of_any_depth_needs_few_descriptors";
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--test-threads=1", "--nocapture"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout) + String::from_utf8_lossy(&child.stderr);
        assert!(child.status.success() && said.contains("1 passed"), "{said}");
    }

    #[test]
    fn a_walk_goes_on_where_a_folder_was_moved() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b/c")).unwrap();
        let top = open(dir.path()).unwrap();
        let level = |path: &str, name: &CStr| Level {
            name: name.to_owned(),
            id: id_of(&open(&dir.path().join(path)).unwrap()).unwrap(),
            left: Vec::new(),
        };
        let mut levels = vec![level("", c""), level("a", c"a"), level("a/b", c"b")];
        let there = descend(&top, &mut levels).unwrap();
        assert_eq!((id_of(&there).unwrap(), levels.len()), (levels[2].id, 3));
        std::fs::rename(dir.path().join("a/b"), dir.path().join("b")).unwrap();
        let there = descend(&top, &mut levels).unwrap();
        assert_eq!((id_of(&there).unwrap(), levels.len()), (levels[1].id, 2));
    }
}
