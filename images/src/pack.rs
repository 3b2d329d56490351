//! From a folder to a layer's tar stream, the same bytes for the same files.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use tar::{EntryType, Header};

use crate::unpack::OPAQUE_XATTR;
use crate::{Error, Result};

/// What becomes of the deletions that an overlayfs layer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deletions {
    /// The folder is no layer: what looks like one is a device.
    None,
    /// They become whiteouts.
    Whiteouts,
    LeftOut,
}

/// What to write besides names and contents.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Style {
    /// Seconds since the epoch for every file; `None` keeps the files' own.
    pub mtime: Option<u64>,
    /// Every file belongs to root.
    pub root_owned: bool,
    pub deletions: Deletions,
    /// Holes of sparse files are left out. Without, the archive has the same bytes whatever the file system made of the files.
    pub holes: bool,
}

/// Writes everything below `dir` as tar: names sorted, with the files' own owners and times. Blocking.
///
/// # Errors
/// When a file cannot be read or `out` fails.
pub fn pack_folder<W: Write>(dir: &Path, out: W) -> Result<W> {
    pack(dir, out, Style { mtime: None, root_owned: false, deletions: Deletions::None, holes: false })
}

/// Writes everything below `dir`, sorted by name, as tar.
pub(crate) fn pack<W: Write>(dir: &Path, out: W, style: Style) -> Result<W> {
    let mut tar = tar::Builder::new(out);
    let mut links: HashMap<(u64, u64), PathBuf> = HashMap::new();
    let mut stack = vec![PathBuf::new()];
    // Depth first with the names of a folder in order, whatever the file system's own order is.
    while let Some(relative) = stack.pop() {
        let path = dir.join(&relative);
        let meta = fs::symlink_metadata(&path).map_err(Error::io("read", &path))?;
        append(&mut tar, &path, &relative, &meta, style, &mut links).map_err(Error::io("pack", &path))?;
        if meta.is_dir() {
            let mut names = fs::read_dir(&path)
                .and_then(|l| l.map(|e| e.map(|e| e.file_name())).collect::<io::Result<Vec<_>>>())
                .map_err(Error::io("list", &path))?;
            names.sort_by(|a, b| b.cmp(a));
            stack.extend(names.into_iter().map(|n| relative.join(n)));
        }
    }
    tar.into_inner().map_err(Error::io("pack", dir))
}

fn append<W: Write>(
    tar: &mut tar::Builder<W>,
    path: &Path,
    relative: &Path,
    meta: &fs::Metadata,
    style: Style,
    links: &mut HashMap<(u64, u64), PathBuf>,
) -> io::Result<()> {
    let kind = meta.file_type();
    if kind.is_socket() {
        return Ok(()); // Has no meaning in an archive.
    }
    let is_deletion = style.deletions != Deletions::None && kind.is_char_device() && meta.rdev() == 0;
    if is_deletion && style.deletions == Deletions::LeftOut {
        return Ok(());
    }
    let name = if relative.as_os_str().is_empty() { Path::new("./") } else { relative };
    let sparse = if style.holes && kind.is_file() { Sparse::open(path, meta)? } else { None };
    let mut header = if sparse.is_some() { Header::new_ustar() } else { Header::new_gnu() };
    header.set_mode(meta.mode() & 0o7777);
    header.set_mtime(style.mtime.unwrap_or_else(|| u64::try_from(meta.mtime()).unwrap_or(0)));
    if !style.root_owned {
        header.set_uid(meta.uid().into());
        header.set_gid(meta.gid().into());
    } else {
        header.set_uid(0);
        header.set_gid(0);
    }
    header.set_size(0);
    if is_deletion {
        let mut base = b".wh.".to_vec();
        base.extend_from_slice(relative.file_name().unwrap_or_default().as_bytes());
        let name = relative.with_file_name(std::ffi::OsStr::from_bytes(&base));
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0);
        return tar.append_data(&mut header, name, io::empty());
    }
    if !meta.is_dir() && meta.nlink() > 1 {
        if let Some(first) = links.get(&(meta.dev(), meta.ino())) {
            header.set_entry_type(EntryType::Link);
            return tar.append_link(&mut header, name, first);
        }
        links.insert((meta.dev(), meta.ino()), relative.to_owned());
    }
    let attributes = xattrs(path)?;
    let kept = attributes.iter().filter(|(k, _)| !crate::unpack::is_of_the_node(k.as_bytes()));
    let mut records: Vec<(String, &[u8])> =
        kept.map(|(k, v)| (format!("SCHILY.xattr.{k}"), v.as_slice())).collect();
    let length = meta.len().to_string();
    if sparse.is_some() {
        // Format 1.0 of GNU's sparse files: the map of what is there stands before the data.
        let own = [
            ("GNU.sparse.major", &b"1"[..]),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", relative.as_os_str().as_bytes()),
            ("GNU.sparse.realsize", length.as_bytes()),
        ];
        records.extend(own.map(|(k, v)| (k.to_owned(), v)));
    }
    if !records.is_empty() {
        tar.append_pax_extensions(records.iter().map(|(k, v)| (k.as_str(), *v)))?;
    }
    if kind.is_dir() {
        header.set_entry_type(EntryType::Directory);
        tar.append_data(&mut header.clone(), name.join(""), io::empty())?;
        let whiteouts = style.deletions == Deletions::Whiteouts;
        if whiteouts && attributes.iter().any(|(k, v)| k == OPAQUE_XATTR && v == b"y") {
            header.set_entry_type(EntryType::Regular);
            header.set_mode(0);
            tar.append_data(&mut header, relative.join(".wh..wh..opq"), io::empty())?;
        }
        return Ok(());
    }
    if kind.is_symlink() {
        header.set_entry_type(EntryType::Symlink);
        return tar.append_link(&mut header, name, fs::read_link(path)?);
    }
    if let Some(sparse) = sparse {
        header.set_entry_type(EntryType::Regular);
        // Who does not know the format finds the map and the data under another name.
        header.set_path("GNUSparseFile.0")?;
        header.set_size(sparse.size());
        header.set_cksum();
        return tar.append(&header, sparse);
    }
    if kind.is_file() {
        header.set_entry_type(EntryType::Regular);
        header.set_size(meta.len());
        let file = fs::File::open(path)?;
        // A file that grows meanwhile must not break the archive.
        return tar.append_data(&mut header, name, io::Read::take(file, meta.len()));
    }
    header.set_entry_type(if kind.is_fifo() {
        EntryType::Fifo
    } else if kind.is_block_device() {
        EntryType::Block
    } else {
        EntryType::Char
    });
    header.set_device_major(rustix::fs::major(meta.rdev()))?;
    header.set_device_minor(rustix::fs::minor(meta.rdev()))?;
    tar.append_data(&mut header, name, io::empty())
}

/// The most pieces of data of one file that are listed; one with more is written in full.
const MAX_PIECES: usize = 100_000;
const BLOCK: usize = 512;

/// A file with holes, as the archive holds it: the map, then the data without the holes.
struct Sparse {
    file: fs::File,
    map: io::Cursor<Vec<u8>>,
    /// Offset and length of what is left, last first.
    pieces: Vec<(u64, u64)>,
}

impl Sparse {
    /// `None` for a file without holes.
    fn open(path: &Path, meta: &fs::Metadata) -> io::Result<Option<Sparse>> {
        // In units of 512 bytes, whatever the file system's own blocks are (stat(2)).
        if meta.blocks().saturating_mul(512) >= meta.len() {
            return Ok(None);
        }
        let file = fs::File::open(path)?;
        let Some(mut pieces) = pieces(&file, meta.len())? else { return Ok(None) };
        let mut map = format!("{}\n", pieces.len());
        for (offset, len) in &pieces {
            map.push_str(&format!("{offset}\n{len}\n"));
        }
        let mut map = map.into_bytes();
        map.resize(map.len().next_multiple_of(BLOCK), 0);
        pieces.reverse();
        Ok(Some(Sparse { file, map: io::Cursor::new(map), pieces }))
    }

    fn size(&self) -> u64 {
        self.map.get_ref().len() as u64 + self.pieces.iter().map(|(_, len)| len).sum::<u64>()
    }
}

impl io::Read for Sparse {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = self.map.read(out)?;
        if n > 0 || out.is_empty() {
            return Ok(n);
        }
        while let Some((offset, left)) = self.pieces.last_mut() {
            if *left == 0 {
                self.pieces.pop();
                continue;
            }
            let most = out.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
            let n = self.file.read_at(&mut out[..most], *offset)?;
            if n == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter"));
            }
            (*offset, *left) = (*offset + n as u64, *left - n as u64);
            return Ok(n);
        }
        Ok(0)
    }
}

/// Offset and length of the data in a file of `len` bytes, with an empty piece at the end of a file that ends in a hole. `None`
/// when the file system does not tell, or it is not worth it.
fn pieces(file: &fs::File, len: u64) -> io::Result<Option<Vec<(u64, u64)>>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < len {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start.min(len),
            // Nothing but a hole is left.
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let end = match rustix::fs::seek(file, SeekFrom::Hole(start)) {
            Ok(end) => end.min(len),
            Err(Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        if start < end {
            found.push((start, end - start));
        }
        at = end.max(start + 1);
        if found.len() >= MAX_PIECES {
            return Ok(None);
        }
    }
    if found.iter().map(|(_, len)| len).sum::<u64>() == len {
        return Ok(None);
    }
    if found.last().is_none_or(|(start, n)| start + n < len) {
        found.push((len, 0));
    }
    Ok(Some(found))
}

fn xattrs(path: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut names = vec![0u8; rustix::fs::llistxattr_query(path)?];
    let n = rustix::fs::llistxattr(path, &mut names[..])?;
    let mut out = Vec::new();
    for name in names[..n].split(|&b| b == 0).filter(|n| !n.is_empty()) {
        let size = match rustix::fs::lgetxattr_query(path, name) {
            Ok(n) => n,
            Err(Errno::NODATA) => continue,
            Err(e) => return Err(e.into()),
        };
        let mut value = vec![0u8; size];
        let n = rustix::fs::lgetxattr(path, name, &mut value[..])?;
        value.truncate(n);
        out.push((String::from_utf8_lossy(name).into_owned(), value));
    }
    out.sort();
    Ok(out)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    /// Files with holes at the start, in the middle and at the end, with names and attributes that need records of their own.
    #[test]
    fn holes_stay_holes() {
        let place = tempfile::tempdir().unwrap();
        let [from, to, by_tar] = ["from", "to", "tar"].map(|n| place.path().join(n));
        for d in [&from, &to, &by_tar] {
            fs::create_dir(d).unwrap();
        }
        let long = "n".repeat(150);
        let (mib, names) = (1u64 << 20, ["start", "middle", "end", "empty", &long]);
        for (name, data) in names.iter().zip([&[7 * mib][..], &[0, 7 * mib], &[0], &[], &[3 * mib, 5 * mib]])
        {
            let file = fs::File::create(from.join(name)).unwrap();
            file.set_len(8 * mib).unwrap();
            for at in data {
                file.write_all_at(&vec![b'x'; 1 << 20], *at).unwrap();
            }
        }
        fs::write(from.join("whole"), vec![b'w'; 1 << 20]).unwrap();
        let style = Style { mtime: None, root_owned: false, deletions: Deletions::Whiteouts, holes: true };
        let archive = pack(&from, Vec::new(), style).unwrap();
        assert!(archive.len() < 8 << 20, "{} bytes for 7 MiB of data", archive.len());

        crate::unpack::unpack(&archive[..], fs::File::open(&to).unwrap().as_fd()).unwrap();
        let file = place.path().join("archive.tar");
        fs::write(&file, &archive).unwrap();
        let status = std::process::Command::new("tar").arg("-xf").arg(&file).arg("-C").arg(&by_tar).status();
        assert!(status.unwrap().success());
        for name in names.into_iter().chain(["whole"]) {
            let (was, now) = (from.join(name), to.join(name));
            let content = fs::read(&was).unwrap();
            assert!(content == fs::read(&now).unwrap(), "{name}");
            assert!(content == fs::read(by_tar.join(name)).unwrap(), "{name} by tar");
            let blocks = |p: &Path| fs::metadata(p).unwrap().blocks();
            assert!(blocks(&now) <= blocks(&was), "{name}: {} blocks, was {}", blocks(&now), blocks(&was));
        }
        // A built image has the same bytes whether or not the folder has holes.
        let built = pack(&from, Vec::new(), Style { holes: false, ..style }).unwrap();
        assert!(built.len() > 40 << 20);
    }
}
