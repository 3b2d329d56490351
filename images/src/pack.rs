//! From a folder to a layer's tar stream, the same bytes for the same files.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

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
}

/// Writes everything below `dir` as tar: names sorted, with the files' own owners and times. Blocking.
///
/// # Errors
/// When a file cannot be read or `out` fails.
pub fn pack_folder<W: Write>(dir: &Path, out: W) -> Result<W> {
    pack(dir, out, Style { mtime: None, root_owned: false, deletions: Deletions::None })
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
    let mut header = Header::new_gnu();
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
    let kept = attributes.iter().filter(|(k, _)| !k.starts_with("trusted.overlay."));
    let records: Vec<(String, &[u8])> =
        kept.map(|(k, v)| (format!("SCHILY.xattr.{k}"), v.as_slice())).collect();
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
