//! What a container changed in its root file system, for checkpoints. Blocking code.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::layout::{Layout, RootfsRecord};
use crate::pack::{Deletions, Style, pack};
use crate::unpack::OPAQUE_XATTR;
use crate::{Error, Result};

/// Writes what is in the writable layer as tar and returns what the container deleted, sorted: paths relative to the root. Some of
/// them may not have been there.
pub(crate) fn write<W: Write>(
    layout: &Layout,
    key: &str,
    record: &RootfsRecord,
    out: W,
) -> Result<(W, Vec<PathBuf>)> {
    if record.owners_changed {
        let detail = "every file is in the writable layer here, since the layers could not be mounted with \
                      translated owners: what the container changed cannot be told"
            .to_owned();
        return Err(Error::Mount { key: key.to_owned(), target: record.target.clone(), detail });
    }
    let upper = layout.rootfs(key).join("upper");
    let layers: Vec<PathBuf> = record.chain.iter().map(|c| layout.layer_fs(c)).collect();
    let deleted = deleted(&upper, &layers)?;
    let out = pack(
        &upper,
        out,
        Style { mtime: None, root_owned: false, deletions: Deletions::LeftOut, holes: true },
    )?;
    Ok((out, deleted))
}

fn names(dir: &Path) -> Result<Vec<fs::DirEntry>> {
    let list = || fs::read_dir(dir)?.collect::<io::Result<Vec<_>>>();
    match list() {
        // A layer need not have the folder.
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(Vec::new())
        }
        other => other.map_err(Error::io("list", dir)),
    }
}

/// A link on the way would lead out of the layer.
fn is_folder_of(layer: &Path, relative: &Path) -> bool {
    relative.ancestors().all(|a| fs::symlink_metadata(layer.join(a)).is_ok_and(|m| m.is_dir()))
}

fn is_opaque(dir: &Path) -> bool {
    let mut value = [0u8; 2];
    rustix::fs::lgetxattr(dir, OPAQUE_XATTR, &mut value[..]).is_ok_and(|n| &value[..n] == b"y")
}

fn deleted(upper: &Path, layers: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut gone = BTreeSet::new();
    let mut stack = vec![PathBuf::new()];
    while let Some(relative) = stack.pop() {
        let dir = upper.join(&relative);
        let mut here = BTreeSet::new();
        for entry in names(&dir)? {
            let meta = entry.metadata().map_err(Error::io("read", &entry.path()))?;
            let path = relative.join(entry.file_name());
            if meta.file_type().is_char_device() && meta.rdev() == 0 {
                gone.insert(path);
            } else {
                if meta.is_dir() {
                    stack.push(path);
                }
                here.insert(entry.file_name());
            }
        }
        // It was made anew: nothing of the layers shows through.
        if is_opaque(&dir) {
            for layer in layers {
                if !is_folder_of(layer, &relative) {
                    continue;
                }
                let below = names(&layer.join(&relative))?.into_iter().map(|e| e.file_name());
                gone.extend(below.filter(|n| !here.contains(n)).map(|n| relative.join(n)));
            }
        }
    }
    Ok(gone.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deletions_are_told_one_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let (upper, layer) = (dir.path().join("upper"), dir.path().join("layer"));
        for d in ["upper/etc", "upper/made", "layer/etc", "layer/made", "layer/untouched"] {
            fs::create_dir_all(dir.path().join(d)).unwrap();
        }
        for f in ["layer/made/old", "layer/made/both", "layer/etc/gone", "upper/made/both", "upper/new"] {
            fs::write(dir.path().join(f), "x").unwrap();
        }
        let whiteout = rustix::fs::makedev(0, 0);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            upper.join("etc/gone"),
            rustix::fs::FileType::CharacterDevice,
            rustix::fs::Mode::empty(),
            whiteout,
        )
        .unwrap();
        rustix::fs::lsetxattr(upper.join("made"), OPAQUE_XATTR, b"y", rustix::fs::XattrFlags::empty())
            .unwrap();
        let gone = deleted(&upper, &[layer]).unwrap();
        assert_eq!(gone, [PathBuf::from("etc/gone"), "made/old".into()]);
        let style = Style { mtime: None, root_owned: false, deletions: Deletions::LeftOut, holes: true };
        let packed = pack(&upper, Vec::new(), style).unwrap();
        let mut names: Vec<String> = tar::Archive::new(&packed[..])
            .entries()
            .unwrap()
            .map(|e| e.unwrap().path().unwrap().to_string_lossy().into_owned())
            .collect();
        names.sort();
        assert_eq!(names, ["./", "etc/", "made/", "made/both", "new"]);
    }
}
