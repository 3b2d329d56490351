//! Creates a layer's files. Metadata of folders is set at the end, because creating files inside changes it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use super::Error;
use super::reader::{Entry, Kind, TarReader};
use crate::{Usage, tree};

/// Names that mark deletions in OCI layers (OCI image spec, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// How overlayfs marks a folder that hides the lower ones.
pub(crate) const OPAQUE_XATTR: &str = "trusted.overlay.opaque";
/// Descriptors of recently used folders. Archives list a folder's files together, so a few are enough.
const CACHED_DIRS: usize = 16;
/// Links that one path may go through, as in the kernel.
const MAX_LINKS: u32 = 40;
/// The longest path, as in the kernel.
const MAX_PATH: usize = 4096;

/// So many zeros in a row are not written. Fewer would be more calls than they save.
const HOLE: usize = 32 << 10;

/// What of one layer may be kept in memory until its end: the records of 800,000 folders with paths of usual length.
const MEMORY: usize = 128 << 20;
/// What a record takes beside its bytes.
const RECORD: usize = 96;

/// What a layer holds, and what it needs from the layers below it.
#[derive(Debug, Default)]
pub(crate) struct Unpacked {
    pub usage: Usage,
    /// Folders without an entry of their own: their metadata comes from the lower layers. Parents come first.
    pub inherit: Vec<Vec<u8>>,
    /// Hard links (path, target) whose target this layer does not have.
    pub borrow: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A folder's metadata, by its path.
struct Folder {
    /// Its place in the archive: by another path, through a link, it may have been given before.
    number: u64,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, u32),
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Folder {
    fn size(&self, path: &[u8]) -> usize {
        let xattrs: usize = self.xattrs.iter().map(|(n, v)| n.len() + v.len() + RECORD / 2).sum();
        RECORD + path.len() + xattrs
    }
}

struct Unpacker<'a> {
    root: BorrowedFd<'a>,
    cache: Vec<(Vec<u8>, Rc<OwnedFd>)>,
    next_slot: usize,
    folders: BTreeMap<Vec<u8>, Folder>,
    inherit: BTreeSet<Vec<u8>>,
    /// Bytes that `folders`, `inherit` and `out.borrow` take.
    held: usize,
    /// Entries of folders so far.
    remembered: u64,
    out: Unpacked,
}

/// Unpacks a whole tar stream into the empty folder `root`. The returned reader stands behind the archive's end mark.
pub(crate) fn unpack<R: BufRead>(stream: R, root: BorrowedFd<'_>) -> Result<(Unpacked, R), Error> {
    let mut u = Unpacker {
        root,
        cache: Vec::new(),
        next_slot: 0,
        folders: BTreeMap::new(),
        inherit: BTreeSet::from([Vec::new()]),
        held: RECORD,
        remembered: 0,
        out: Unpacked { usage: Usage { bytes: 0, inodes: 1 }, ..Unpacked::default() },
    };
    let mut tar = TarReader::new(stream);
    while let Some(entry) = tar.next()? {
        u.entry(entry, &mut tar)?;
    }
    u.finish_folders()?;
    // A set of byte strings is sorted, and a parent sorts before its children.
    u.out.inherit = u.inherit.into_iter().collect();
    Ok((u.out, tar.into_inner()))
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&b| b == b'/') {
        Some(n) => (&path[..n], &path[n + 1..]),
        None => (&[], path),
    }
}

/// Takes `.`, empty parts and leading slashes out and resolves `..` by text. `None` when it leads above the root.
fn normalise(path: &[u8]) -> Option<Vec<u8>> {
    let mut out: Vec<u8> = Vec::with_capacity(path.len());
    for part in path.split(|&b| b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                if out.is_empty() {
                    return None;
                }
                out.truncate(split(&out).0.len());
            }
            _ => {
                if !out.is_empty() {
                    out.push(b'/');
                }
                out.extend_from_slice(part);
            }
        }
    }
    Some(out)
}

fn timestamps((secs, nanos): (i64, u32)) -> Timestamps {
    let t = Timespec { tv_sec: secs, tv_nsec: nanos.into() };
    Timestamps { last_access: t, last_modification: t }
}

/// `openat2` inside `root`, following links as if `root` were `/`.
fn open_in(root: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let path = if path.is_empty() { b"." } else { path };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    for _ in 0..16 {
        match rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            // The kernel could not prove that a `..` stayed inside while something was renamed elsewhere.
            Err(Errno::AGAIN | Errno::INTR) => continue,
            result => return result,
        }
    }
    Err(Errno::AGAIN)
}

const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY);

fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

impl Unpacker<'_> {
    fn entry<R: BufRead>(&mut self, mut entry: Entry, tar: &mut TarReader<R>) -> Result<(), Error> {
        if entry.kind == Kind::Other {
            return Ok(());
        }
        let escape = |p: &[u8]| Error::Escape { path: String::from_utf8_lossy(p).into_owned() };
        entry.path = normalise(&entry.path).ok_or_else(|| escape(&entry.path))?;
        if entry.path.len() >= MAX_PATH {
            return Err(Error::io("create", &entry.path[..200])(Errno::NAMETOOLONG));
        }
        entry.xattrs.retain(|(n, _)| !is_of_the_node(n));
        let (dir, base) = split(&entry.path);
        if entry.path.is_empty() {
            if entry.kind == Kind::Dir {
                self.told(&entry.path);
                self.remember_folder(entry)?;
            }
            return Ok(());
        }
        let parent = self.folder(dir, 0)?;
        if base == OPAQUE {
            return set_opaque(parent.as_fd(), dir);
        }
        if base.starts_with(b".wh..wh.") {
            return Ok(()); // Book-keeping of aufs.
        }
        if let Some(name) = base.strip_prefix(WHITEOUT) {
            if matches!(name, b"" | b"." | b"..") {
                return Err(escape(&entry.path));
            }
            return self.whiteout(&parent, name, &entry.path);
        }
        self.create(entry, &parent, tar)
    }

    /// The folder at `path`, created with its parents when missing. `links` counts the symbolic links gone through.
    fn folder(&mut self, path: &[u8], links: u32) -> Result<Rc<OwnedFd>, Error> {
        if let Some((_, fd)) = self.cache.iter().find(|(p, _)| p == path) {
            return Ok(fd.clone());
        }
        let fd = match open_in(self.root, path, FOLDER) {
            Ok(fd) => Rc::new(fd),
            Err(Errno::NOENT | Errno::NOTDIR) if !path.is_empty() => {
                let (mut fd, from) = self.nearest(path)?;
                let ends = (from..path.len()).filter(|&i| path[i] == b'/' && i > 0).chain([path.len()]);
                for end in ends {
                    fd = self.make_folder(&path[..end], &fd, links)?;
                }
                fd
            }
            Err(e) => return Err(Error::io("open", path)(e)),
        };
        let slot = (path.to_vec(), fd.clone());
        if self.cache.len() < CACHED_DIRS {
            self.cache.push(slot);
        } else {
            self.cache[self.next_slot] = slot;
            self.next_slot = (self.next_slot + 1) % CACHED_DIRS;
        }
        Ok(fd)
    }

    /// The nearest folder above `path` that is there, and where in `path` the rest begins. A path has up to two thousand parts, and
    /// looking each up takes as many steps: neither recursion nor one look per part will do.
    fn nearest(&self, path: &[u8]) -> Result<(Rc<OwnedFd>, usize), Error> {
        let ends: Vec<usize> = (0..path.len()).filter(|&i| path[i] == b'/').collect();
        let look = |n: usize| {
            let above = &path[..if n == 0 { 0 } else { ends[n - 1] }];
            if let Some((_, fd)) = self.cache.iter().find(|(p, _)| p == above) {
                return Ok(Some(fd.clone()));
            }
            match open_in(self.root, above, FOLDER) {
                Ok(fd) => Ok(Some(Rc::new(fd))),
                Err(Errno::NOENT | Errno::NOTDIR) if n > 0 => Ok(None),
                Err(e) => Err(Error::io("open", above)(e)),
            }
        };
        // Usually that is the parent.
        let (mut there, mut missing) = (0, ends.len());
        let mut best = look(missing)?;
        if best.is_some() {
            there = missing;
        }
        while missing > there + 1 {
            let middle = there.midpoint(missing);
            match look(middle)? {
                Some(fd) => (best, there) = (Some(fd), middle),
                None => missing = middle,
            }
        }
        let best = match best {
            Some(fd) => fd,
            None => look(0)?.ok_or_else(|| Error::io("open", path)(Errno::NOENT))?,
        };
        Ok((best, if there == 0 { 0 } else { ends[there - 1] + 1 }))
    }

    fn make_folder(&mut self, path: &[u8], parent: &Rc<OwnedFd>, links: u32) -> Result<Rc<OwnedFd>, Error> {
        let (dir, base) = split(path);
        let open = |parent: &OwnedFd| {
            rustix::fs::openat(parent, base, FOLDER | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
                .map(Rc::new)
                .map_err(Error::io("open", path))
        };
        // The umask does not count.
        let open_new = |parent: &OwnedFd| {
            let fd = open(parent)?;
            rustix::fs::fchmod(&*fd, Mode::from(0o755)).map_err(Error::io("set mode of", path))?;
            Ok(fd)
        };
        match rustix::fs::mkdirat(&**parent, base, Mode::from(0o755)) {
            Ok(()) => {
                self.out.usage.inodes += 1;
                self.untold(path)?;
                return open_new(parent);
            }
            Err(Errno::EXIST) => {}
            Err(e) => return Err(Error::io("create folder", path)(e)),
        }
        let stat = rustix::fs::statat(&**parent, base, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(Error::io("look at", path))?;
        match FileType::from_raw_mode(stat.st_mode) {
            // The parent went through a link, so the first attempt by the full path failed and this one does not.
            FileType::Directory => open(parent),
            // Its target is in a lower layer: the files belong there.
            FileType::Symlink if links < MAX_LINKS => {
                let target = rustix::fs::readlinkat(&**parent, base, Vec::new())
                    .map_err(Error::io("read link", path))?;
                let target = target.as_bytes();
                let full =
                    if target.starts_with(b"/") { target.to_vec() } else { [dir, b"/", target].concat() };
                // Links above the root end at the root, as the kernel sees it inside a container.
                let inside = normalise_clamped(&full);
                self.folder(&inside, links + 1)
            }
            _ if is_whiteout(&stat) => {
                self.clear(parent, base, path)?;
                rustix::fs::mkdirat(&**parent, base, Mode::from(0o755))
                    .map_err(Error::io("create folder", path))?;
                self.out.usage.inodes += 1;
                self.untold(path)?;
                let fd = open_new(parent)?;
                set_opaque(fd.as_fd(), path)?;
                Ok(fd)
            }
            _ => Err(Error::NotAFolder { path: String::from_utf8_lossy(path).into_owned() }),
        }
    }

    /// Removes what is in an entry's way. Returns whether it was a whiteout.
    fn clear(&mut self, parent: &OwnedFd, base: &[u8], path: &[u8]) -> Result<bool, Error> {
        self.cache.clear();
        self.next_slot = 0;
        let stat = rustix::fs::statat(parent, base, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(Error::io("look at", path))?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            let fd =
                rustix::fs::openat(parent, base, FOLDER | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
                    .map_err(Error::io("open", path))?;
            tree::empty(&fd).map_err(Error::io("empty", path))?;
            rustix::fs::unlinkat(parent, base, AtFlags::REMOVEDIR).map_err(Error::io("replace", path))?;
        } else {
            rustix::fs::unlinkat(parent, base, AtFlags::empty()).map_err(Error::io("replace", path))?;
        }
        Ok(is_whiteout(&stat))
    }

    /// A whiteout applies to lower layers only, whatever its place in the archive.
    fn whiteout(&mut self, parent: &OwnedFd, name: &[u8], path: &[u8]) -> Result<(), Error> {
        match rustix::fs::mknodat(parent, name, FileType::CharacterDevice, Mode::empty(), 0) {
            Ok(()) => {
                self.out.usage.inodes += 1;
                Ok(())
            }
            Err(Errno::EXIST) => {
                // This layer has the name itself: a folder must hide the lower one, a file does so anyway.
                let flags = FOLDER | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                match rustix::fs::openat(parent, name, flags, Mode::empty()) {
                    Ok(fd) => set_opaque(fd.as_fd(), path),
                    Err(Errno::NOTDIR | Errno::LOOP) => Ok(()),
                    Err(e) => Err(Error::io("open", path)(e)),
                }
            }
            Err(e) => Err(Error::io("create whiteout", path)(e)),
        }
    }

    fn create<R: BufRead>(
        &mut self,
        entry: Entry,
        parent: &OwnedFd,
        tar: &mut TarReader<R>,
    ) -> Result<(), Error> {
        let path = entry.path.clone();
        let base = split(&path).1;
        self.told(&path);
        let mut made = self.make(&entry, parent, base)?;
        if let Made::InTheWay = made {
            let hid = self.clear(parent, base, &path)?;
            made = self.make(&entry, parent, base)?;
            if hid && let Made::Folder = made {
                let flags = FOLDER | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(parent, base, flags, Mode::empty())
                    .map_err(Error::io("open", &path))?;
                set_opaque(fd.as_fd(), &path)?;
            }
        }
        match made {
            Made::InTheWay => Err(Error::io("create", &path)(Errno::EXIST)),
            Made::Link => Ok(()),
            Made::Folder => {
                self.remember_folder(entry)?;
                Ok(())
            }
            Made::File(fd) => {
                self.out.usage.inodes += 1;
                self.out.usage.bytes += write_data(&entry, fd.as_fd(), tar)?;
                file_metadata(&entry, fd.as_fd())
            }
            Made::Special => {
                self.out.usage.inodes += 1;
                special_metadata(&entry, parent, base)
            }
        }
    }

    fn make(&mut self, entry: &Entry, parent: &OwnedFd, base: &[u8]) -> Result<Made, Error> {
        let exclusive = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let device = |kind| {
            let (major, minor) = entry.device;
            rustix::fs::mknodat(parent, base, kind, Mode::from(0o600), rustix::fs::makedev(major, minor))
                .map(|()| Made::Special)
        };
        let result = match entry.kind {
            Kind::File => rustix::fs::openat(parent, base, exclusive, Mode::from(0o600)).map(Made::File),
            Kind::Dir => match rustix::fs::mkdirat(parent, base, Mode::from(0o755)) {
                Ok(()) => {
                    self.out.usage.inodes += 1;
                    Ok(Made::Folder)
                }
                Err(Errno::EXIST) => {
                    let stat = rustix::fs::statat(parent, base, AtFlags::SYMLINK_NOFOLLOW);
                    Ok(match stat.map(|s| FileType::from_raw_mode(s.st_mode)) {
                        Ok(FileType::Directory) => Made::Folder,
                        _ => Made::InTheWay,
                    })
                }
                Err(e) => Err(e),
            },
            Kind::Symlink => rustix::fs::symlinkat(&*entry.link, parent, base).map(|()| Made::Special),
            Kind::HardLink => return self.hard_link(entry, parent, base),
            Kind::Char => device(FileType::CharacterDevice),
            Kind::Block => device(FileType::BlockDevice),
            Kind::Fifo => device(FileType::Fifo),
            Kind::Other => Ok(Made::Link),
        };
        match result {
            Err(Errno::EXIST) => Ok(Made::InTheWay),
            other => other.map_err(Error::io("create", &entry.path)),
        }
    }

    fn hard_link(&mut self, entry: &Entry, parent: &OwnedFd, base: &[u8]) -> Result<Made, Error> {
        let target = normalise(&entry.link)
            .filter(|t| !t.is_empty())
            .ok_or_else(|| Error::Escape { path: String::from_utf8_lossy(&entry.link).into_owned() })?;
        if target == entry.path {
            return Ok(Made::Link);
        }
        let (dir, name) = split(&target);
        let linked = open_in(self.root, dir, FOLDER)
            .and_then(|from| rustix::fs::linkat(&from, name, parent, base, AtFlags::empty()));
        match linked {
            Ok(()) => Ok(Made::Link),
            Err(Errno::EXIST) => Ok(Made::InTheWay),
            Err(Errno::NOENT | Errno::NOTDIR) => {
                self.hold(RECORD + entry.path.len() + target.len())?;
                self.out.borrow.push((entry.path.clone(), target));
                Ok(Made::Link)
            }
            Err(e) => Err(Error::io("link", &entry.path)(e)),
        }
    }

    /// Counts what stays in memory until the end.
    fn hold(&mut self, bytes: usize) -> Result<(), Error> {
        self.held += bytes;
        if self.held > MEMORY { Err(Error::TooMuch { limit: MEMORY }) } else { Ok(()) }
    }

    /// A folder that was made for what is in it, without an entry of its own so far.
    fn untold(&mut self, path: &[u8]) -> Result<(), Error> {
        if self.inherit.insert(path.to_vec()) {
            self.hold(RECORD + path.len())?;
        }
        Ok(())
    }

    fn told(&mut self, path: &[u8]) {
        if self.inherit.remove(path) {
            self.held -= RECORD + path.len();
        }
    }

    /// The last entry of a path counts.
    fn remember_folder(&mut self, entry: Entry) -> Result<(), Error> {
        self.remembered += 1;
        let folder = Folder {
            number: self.remembered,
            mode: entry.mode,
            owner: (entry.uid, entry.gid),
            mtime: entry.mtime,
            xattrs: entry.xattrs,
        };
        if let Some(earlier) = self.folders.remove(&entry.path) {
            self.held -= earlier.size(&entry.path);
        }
        self.hold(folder.size(&entry.path))?;
        self.folders.insert(entry.path, folder);
        Ok(())
    }

    /// In the archive's order, so that the last entry of a folder wins.
    fn finish_folders(&mut self) -> Result<(), Error> {
        let mut folders: Vec<(Vec<u8>, Folder)> = std::mem::take(&mut self.folders).into_iter().collect();
        folders.sort_unstable_by_key(|(_, f)| f.number);
        for (path, folder) in folders {
            let fd = match open_in(self.root, &path, FOLDER | OFlags::NOFOLLOW) {
                Ok(fd) => fd,
                // A later entry replaced it.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                Err(e) => return Err(Error::io("open", &path)(e)),
            };
            own(fd.as_fd(), folder.owner).map_err(Error::io("set owner of", &path))?;
            for (name, value) in &folder.xattrs {
                xattr(rustix::fs::fsetxattr(&fd, &**name, value, XattrFlags::empty()), fd.as_fd(), &path)?;
            }
            rustix::fs::fchmod(&fd, Mode::from(folder.mode)).map_err(Error::io("set mode of", &path))?;
            rustix::fs::futimens(&fd, &timestamps(folder.mtime)).map_err(Error::io("set times of", &path))?;
        }
        Ok(())
    }
}

enum Made {
    File(OwnedFd),
    Folder,
    Special,
    Link,
    InTheWay,
}

fn normalise_clamped(path: &[u8]) -> Vec<u8> {
    let mut out: Vec<&[u8]> = Vec::new();
    for part in path.split(|&b| b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                out.pop();
            }
            _ => out.push(part),
        }
    }
    out.join(&b'/')
}

fn set_opaque(fd: BorrowedFd<'_>, path: &[u8]) -> Result<(), Error> {
    rustix::fs::fsetxattr(fd, OPAQUE_XATTR, b"y", XattrFlags::empty())
        .map_err(Error::io("mark as opaque", path))
}

/// File systems without extended attributes lose them, as with every other runtime; all else is an error.
fn xattr(result: rustix::io::Result<()>, at: BorrowedFd<'_>, path: &[u8]) -> Result<(), Error> {
    let e = match result {
        Ok(()) | Err(Errno::OPNOTSUPP) => return Ok(()),
        // ext4 says so of more attributes than its inodes have room for.
        Err(Errno::NOSPC) if has_room(at) => Errno::TOOBIG,
        Err(e) => e,
    };
    Err(Error::io("set an extended attribute of", path)(e))
}

/// Whether the file system could take more than an attribute is.
fn has_room(at: BorrowedFd<'_>) -> bool {
    rustix::fs::fstatvfs(at).is_ok_and(|s| s.f_bavail.saturating_mul(s.f_frsize) > 1 << 20)
}

/// New files belong to root, and folders get their set-gid bit last, so that the usual owner costs no call.
fn own(fd: BorrowedFd<'_>, (uid, gid): (u32, u32)) -> rustix::io::Result<()> {
    if (uid, gid) == (0, 0) {
        return Ok(());
    }
    rustix::fs::fchown(fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
}

/// Compares a block with itself, which is fast.
fn is_hole(block: &[u8]) -> bool {
    block.len() == HOLE && block[0] == 0 && block[1..] == block[..HOLE - 1]
}

/// Writes what is not zeros and passes over what is. Returns the bytes written.
fn write_filled(file: &mut Descriptor<'_>, piece: &[u8]) -> std::io::Result<u64> {
    let run = |of: &[u8], hole: bool| -> usize {
        of.chunks(HOLE).take_while(|b| is_hole(b) == hole).map(<[u8]>::len).sum()
    };
    let (mut rest, mut written) = (piece, 0);
    while !rest.is_empty() {
        let (data, after) = rest.split_at(run(rest, false));
        file.write_all(data)?;
        written += data.len() as u64;
        let zeros = run(after, true);
        if zeros > 0 {
            rustix::fs::seek(file.0, rustix::fs::SeekFrom::Current(zeros as i64))?;
        }
        rest = &after[zeros..];
    }
    Ok(written)
}

/// Returns the bytes written: long runs of zeros become holes.
fn write_data<R: BufRead>(entry: &Entry, fd: BorrowedFd<'_>, tar: &mut TarReader<R>) -> Result<u64, Error> {
    let io = |e: std::io::Error| Error::Io {
        what: "write",
        path: String::from_utf8_lossy(&entry.path).into_owned(),
        source: e,
    };
    let whole = [(0, entry.size)];
    let pieces = entry.pieces.as_deref().unwrap_or(&whole);
    let (mut written, mut holes) = (0, entry.pieces.is_some());
    for &(offset, len) in pieces {
        let mut file = Descriptor(fd);
        if entry.pieces.is_some() {
            rustix::fs::seek(fd, rustix::fs::SeekFrom::Start(offset))
                .map_err(Error::io("write", &entry.path))?;
        }
        let mut left = len;
        while left > 0 {
            let piece = tar.data(left)?;
            let n = piece.len();
            let filled = write_filled(&mut file, piece).map_err(io)?;
            holes |= filled < n as u64;
            written += filled;
            tar.consume(n);
            left -= n as u64;
        }
    }
    if holes {
        rustix::fs::ftruncate(fd, entry.size).map_err(Error::io("set the size of", &entry.path))?;
    }
    Ok(written)
}

struct Descriptor<'a>(BorrowedFd<'a>);

impl Write for Descriptor<'_> {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        Ok(rustix::io::write(self.0, buf)?)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Owner first: changing it clears capabilities and the set-id bits.
fn file_metadata(entry: &Entry, fd: BorrowedFd<'_>) -> Result<(), Error> {
    own(fd, (entry.uid, entry.gid)).map_err(Error::io("set owner of", &entry.path))?;
    for (name, value) in &entry.xattrs {
        xattr(rustix::fs::fsetxattr(fd, &**name, value, XattrFlags::empty()), fd, &entry.path)?;
    }
    rustix::fs::fchmod(fd, Mode::from(entry.mode)).map_err(Error::io("set mode of", &entry.path))?;
    rustix::fs::futimens(fd, &timestamps(entry.mtime)).map_err(Error::io("set times of", &entry.path))
}

fn special_metadata(entry: &Entry, parent: &OwnedFd, base: &[u8]) -> Result<(), Error> {
    let path = &entry.path;
    if (entry.uid, entry.gid) != (0, 0) {
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        rustix::fs::chownat(parent, base, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(Error::io("set owner of", path))?;
    }
    // There is no call that takes a folder's descriptor, a name and an attribute.
    let through_proc = || [format!("/proc/self/fd/{}/", parent.as_raw_fd()).as_bytes(), base].concat();
    for (name, value) in &entry.xattrs {
        xattr(
            rustix::fs::lsetxattr(through_proc(), &**name, value, XattrFlags::empty()),
            parent.as_fd(),
            path,
        )?;
    }
    if entry.kind != Kind::Symlink {
        // The name was made just now, and this process alone has the folder: it cannot be a link.
        rustix::fs::chmodat(parent, base, Mode::from(entry.mode), AtFlags::empty())
            .map_err(Error::io("set mode of", path))?;
    }
    rustix::fs::utimensat(parent, base, &timestamps(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(Error::io("set times of", path))
}

/// Attributes that are none of an image's: overlayfs' own would let a layer redirect names and see what it hid, and which SELinux
/// label a file has is for the node's policy and its mount to say.
pub(crate) fn is_of_the_node(attribute: &[u8]) -> bool {
    attribute.starts_with(b"trusted.overlay.")
        || attribute.starts_with(b"user.overlay.")
        || attribute == b"security.selinux"
}

/// Gives `to` owner, mode, times and extended attributes of `from`, both folders or both files.
pub(crate) fn copy_metadata(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let stat = rustix::fs::fstat(from)?;
    own(to, (stat.st_uid, stat.st_gid))?;
    let mut names = vec![0u8; rustix::fs::flistxattr_query(from)?];
    let n = rustix::fs::flistxattr(from, &mut names[..])?;
    for name in names[..n].split(|&b| b == 0).filter(|n| !n.is_empty()) {
        if is_of_the_node(name) {
            continue;
        }
        let mut value = vec![0u8; rustix::fs::fgetxattr_query(from, name)?];
        let n = rustix::fs::fgetxattr(from, name, &mut value[..])?;
        match rustix::fs::fsetxattr(to, name, &value[..n], XattrFlags::empty()) {
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(e) => return Err(e),
        }
    }
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode))?;
    rustix::fs::futimens(to, &timestamps((stat.st_mtime as i64, stat.st_mtime_nsec as u32)))
}

/// Copies a file's data and leaves its holes.
fn copy_data(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> std::io::Result<()> {
    use rustix::fs::{SeekFrom, seek};
    let size = u64::try_from(rustix::fs::fstat(from)?.st_size).unwrap_or(0);
    let source = std::fs::File::from(from.try_clone_to_owned()?);
    let mut at = 0;
    while at < size {
        let data = match seek(from, SeekFrom::Data(at)) {
            Ok(n) => n,
            // Nothing but a hole is left.
            Err(Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        at = seek(from, SeekFrom::Hole(data))?;
        seek(from, SeekFrom::Start(data))?;
        seek(to, SeekFrom::Start(data))?;
        std::io::copy(&mut std::io::Read::take(&source, at - data), &mut Descriptor(to))?;
    }
    Ok(rustix::fs::ftruncate(to, size)?)
}

/// Completes a layer from those below it, topmost first: metadata of folders without an entry, and copies of hard-link
/// targets.
pub(crate) fn borrow_from_lower(
    root: BorrowedFd<'_>,
    lower: &[OwnedFd],
    unpacked: &Unpacked,
) -> Result<(), Error> {
    for (path, target) in &unpacked.borrow {
        let missing = || Error::LinkTarget {
            path: String::from_utf8_lossy(path).into_owned(),
            target: String::from_utf8_lossy(target).into_owned(),
        };
        let (dir, base) = split(target);
        let mut found = None;
        for layer in lower {
            // Only plain files: opening a device or a pipe has effects.
            let stat = open_in(layer.as_fd(), dir, FOLDER)
                .and_then(|d| rustix::fs::statat(&d, base, AtFlags::SYMLINK_NOFOLLOW));
            match stat.map(|s| FileType::from_raw_mode(s.st_mode)) {
                Ok(FileType::RegularFile) => {
                    found = open_in(layer.as_fd(), target, OFlags::RDONLY | OFlags::NOFOLLOW).ok();
                    break;
                }
                Ok(_) => break,
                Err(_) => continue,
            }
        }
        let from = found.ok_or_else(missing)?;
        let (dir, base) = split(path);
        let parent = open_in(root, dir, FOLDER).map_err(Error::io("open", dir))?;
        let before = rustix::fs::fstat(&parent).map_err(Error::io("look at", dir))?;
        let exclusive = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::unlinkat(&parent, base, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => return Err(Error::io("replace", path)(e)),
        }
        let to = rustix::fs::openat(&parent, base, exclusive, Mode::from(0o600))
            .map_err(Error::io("create", path))?;
        copy_data(from.as_fd(), to.as_fd()).map_err(|source| Error::Io {
            what: "copy",
            path: String::from_utf8_lossy(path).into_owned(),
            source,
        })?;
        copy_metadata(from.as_fd(), to.as_fd()).map_err(Error::io("set metadata of", path))?;
        let times = timestamps((before.st_mtime as i64, before.st_mtime_nsec as u32));
        rustix::fs::futimens(&parent, &times).map_err(Error::io("set times of", dir))?;
    }
    for path in &unpacked.inherit {
        let Ok(to) = open_in(root, path, FOLDER | OFlags::NOFOLLOW) else { continue };
        for layer in lower {
            if let Ok(from) = open_in(layer.as_fd(), path, FOLDER | OFlags::NOFOLLOW) {
                copy_metadata(from.as_fd(), to.as_fd()).map_err(Error::io("set metadata of", path))?;
                break;
            }
        }
    }
    Ok(())
}
