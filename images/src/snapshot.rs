//! Root file systems of containers and mounts of image volumes.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use orlop_base::durable::{self, Sync};

use crate::layout::{Layout, RootfsRecord, VERSION};
use crate::overlay::{self, Overlay};
use crate::store::{Inner, blocking};
use crate::{Digest, Error, Image, Result, RootfsOptions, unpack};

fn check_key(key: &str) -> Result<()> {
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    if key.is_empty() || key.len() > 128 || !key.bytes().all(good) || matches!(key, "." | "..") {
        return Err(Error::Key { key: key.to_owned() });
    }
    Ok(())
}

pub(crate) async fn prepare(
    inner: &Arc<Inner>,
    key: &str,
    image: &Image,
    target: &Path,
    options: &RootfsOptions,
) -> Result<()> {
    check_key(key)?;
    let _lock = inner.rootfs_locks.lock(key.to_owned()).await;
    let target = std::path::absolute(target).map_err(Error::io("find", target))?;
    let record = RootfsRecord {
        image: image.id.clone(),
        chain: image.chain.clone(),
        target,
        readonly: options.readonly,
        extra: options.extra.clone(),
    };
    let old = {
        let mut state = inner.state.write();
        if image.chain.iter().any(|c| !state.layers.contains_key(c)) {
            return Err(Error::NoImage(image.id.clone()));
        }
        match state.rootfs.get(key) {
            Some(old) if old.image != record.image || old.readonly != record.readonly => {
                return Err(Error::RootfsExists { key: key.to_owned(), image: old.image.clone() });
            }
            old => {
                let old = old.cloned();
                // From here on the layers are in use.
                state.rootfs.insert(key.to_owned(), record.clone());
                old
            }
        }
    };
    let known = old.is_some();
    let (layout, key2) = (inner.layout.clone(), key.to_owned());
    let result = blocking(move || make(&layout, &key2, &record, old.as_ref())).await;
    if result.is_err() && !known {
        let (layout, key2) = (inner.layout.clone(), key.to_owned());
        // The first error is the one to report; a folder that stays has no record and goes at the next open.
        let _ = blocking(move || layout.discard(&layout.rootfs(&key2))).await;
        inner.state.write().rootfs.remove(key);
    }
    result
}

fn make(layout: &Layout, key: &str, record: &RootfsRecord, old: Option<&RootfsRecord>) -> Result<()> {
    let dir = layout.rootfs(key);
    match old {
        Some(old) if old.target == record.target && overlay::is_mounted(&record.target) => return Ok(()),
        Some(old) => {
            overlay::unmount_all(&old.target).map_err(Error::sys("unmount", &old.target))?;
            // Left by a mount that a crash of the machine ended; the layer is a container's scratch space.
            let mark = dir.join("work/work/incompat");
            if mark.exists() {
                fs::remove_dir_all(&mark).map_err(Error::io("remove", &mark))?;
            }
            durable::write_json(&dir.join("rootfs.json"), VERSION, record, Sync::PageCache)?;
        }
        None => create_dirs(layout, &dir, record)?,
    }
    fs::create_dir_all(&record.target).map_err(Error::io("create", &record.target))?;
    let mount = Overlay {
        layers: &layout.layers(),
        lower: lower(&record.chain, record.readonly),
        upper: (!record.readonly).then(|| {
            let base = PathBuf::from("../rootfs").join(key);
            (base.join("upper"), base.join("work"))
        }),
        extra: &record.extra,
        target: &record.target,
    };
    overlay::mount(&mount).map_err(|detail| Error::Mount {
        key: key.to_owned(),
        target: record.target.clone(),
        detail,
    })
}

/// Appears in one step, with its record inside.
fn create_dirs(layout: &Layout, dir: &Path, record: &RootfsRecord) -> Result<()> {
    let made = layout.ingest();
    let mkdir =
        |path: &Path, mode| fs::DirBuilder::new().mode(mode).create(path).map_err(Error::io("create", path));
    mkdir(&made.path, 0o700)?;
    if !record.readonly {
        let upper = made.path.join("upper");
        mkdir(&upper, 0o755)?;
        mkdir(&made.path.join("work"), 0o700)?;
        // The root folder of the mount is that of the writable layer.
        if let Some(top) = record.chain.last() {
            let from_path = layout.layer_fs(top);
            let from = unpack::open_folder(&from_path).map_err(Error::sys("open", &from_path))?;
            let to = unpack::open_folder(&upper).map_err(Error::sys("open", &upper))?;
            unpack::copy_metadata(from.as_fd(), to.as_fd()).map_err(Error::sys("set metadata of", &upper))?;
        }
    }
    durable::write_json(&made.path.join("rootfs.json"), VERSION, record, Sync::PageCache)?;
    fs::rename(&made.path, dir).map_err(Error::io("create", dir))
}

/// Topmost first, relative to the layers' folder. A mount without a writable layer needs two.
fn lower(chain: &[Digest], readonly: bool) -> Vec<PathBuf> {
    let mut lower: Vec<PathBuf> =
        chain.iter().rev().map(|c| PathBuf::from(Layout::layer_name(c)).join("fs")).collect();
    let wanted = if readonly { 2 } else { 1 };
    for spare in ["empty/a", "empty/b"] {
        if lower.len() < wanted {
            lower.push(spare.into());
        }
    }
    lower
}

/// True when an image that is gone had left layers for this key alone, so that they can go now.
pub(crate) async fn remove(inner: &Arc<Inner>, key: &str) -> Result<bool> {
    check_key(key)?;
    let _lock = inner.rootfs_locks.lock(key.to_owned()).await;
    let Some(record) = inner.state.read().rootfs.get(key).cloned() else { return Ok(false) };
    let (layout, key2, target) = (inner.layout.clone(), key.to_owned(), record.target.clone());
    blocking(move || {
        overlay::unmount_all(&target).map_err(Error::sys("unmount", &target))?;
        layout.discard(&layout.rootfs(&key2))
    })
    .await?;
    let mut state = inner.state.write();
    state.rootfs.remove(key);
    let used = state.used_layers();
    Ok(record.chain.iter().any(|c| !used.contains(c)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_stay_inside_their_folder() {
        for good in ["a", "0f3c_X.y-z", &"a".repeat(128)] {
            check_key(good).unwrap();
        }
        for bad in ["", ".", "..", "a/b", "a b", "ä", &"a".repeat(129)] {
            assert!(matches!(check_key(bad), Err(Error::Key { .. })), "{bad:?}");
        }
    }

    #[test]
    fn a_read_only_mount_has_two_layers_at_least() {
        let one = [Digest::of(b"1")];
        assert_eq!(lower(&one, false).len(), 1);
        assert_eq!(lower(&one, true)[1], Path::new("empty/a"));
        assert_eq!(lower(&[], true), [PathBuf::from("empty/a"), PathBuf::from("empty/b")]);
        assert_eq!(lower(&[], false), [PathBuf::from("empty/a")]);
    }
}
