//! Root file systems of containers and mounts of image volumes.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use orlop_base::durable::{self, Sync};

use crate::idmap::{self, Mapped};
use crate::layout::{Ingest, Layout, ROOTFS_RECORD, RootfsRecord, VERSION};
use crate::overlay::{self, Overlay};
use crate::store::{Inner, blocking};
use crate::{Digest, Error, Image, Result, RootfsOptions, UserNamespace, tree, unpack};

pub(crate) fn check_key(key: &str) -> Result<()> {
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
    let mut record = RootfsRecord {
        image: image.id.clone(),
        chain: image.chain.clone(),
        target,
        readonly: options.readonly,
        mount_points: options.mount_points,
        extra: options.extra.clone(),
        user_namespace: options.user_namespace.clone(),
        owners_changed: false,
    };
    if image.chain.iter().any(|c| !inner.state.read().layers.contains_key(c))
        && let Some(lost) = inner.lost_layer(image).await?
    {
        return Err(lost);
    }
    let old = {
        let mut state = inner.state.write();
        if image.chain.iter().any(|c| !state.layers.contains_key(c)) {
            return Err(Error::NoImage(image.id.clone()));
        }
        match state.rootfs.get(key) {
            Some(old)
                if old.image != record.image
                    || old.readonly != record.readonly
                    || old.user_namespace != record.user_namespace =>
            {
                return Err(Error::RootfsExists { key: key.to_owned(), image: old.image.clone() });
            }
            old => {
                let old = old.cloned();
                record.owners_changed = old.as_ref().is_some_and(|o| o.owners_changed);
                // From here on the layers are in use.
                state.rootfs.insert(key.to_owned(), record.clone());
                old
            }
        }
    };
    let known = old.is_some();
    let (layout, key2) = (inner.layout.clone(), key.to_owned());
    let spare = inner.spare.lock().take_if(|_| !known && !options.readonly);
    let result = blocking(move || make(&layout, &key2, record, old.as_ref(), spare)).await;
    if let Ok(record) = &result {
        inner.state.write().rootfs.insert(key.to_owned(), record.clone());
    } else if !known {
        let (layout, key2) = (inner.layout.clone(), key.to_owned());
        // The first error is the one to report; a folder that stays has no record and goes at the next open.
        let _ = blocking(move || layout.discard(&layout.rootfs(&key2))).await;
        inner.state.write().rootfs.remove(key);
    }
    if result.is_err()
        && let Some(lost) = inner.lost_layer(image).await?
    {
        return Err(lost);
    }
    result.map(drop).map_err(|e| e.name_full_disk(&inner.layout.root))
}

/// Gives the record back as it is on disk.
fn make(
    layout: &Layout,
    key: &str,
    record: RootfsRecord,
    old: Option<&RootfsRecord>,
    spare: Option<Ingest>,
) -> Result<RootfsRecord> {
    let dir = layout.rootfs(key);
    match old {
        Some(old) if old.target == record.target && overlay::is_mounted(&record.target) => return Ok(record),
        Some(old) => {
            overlay::unmount_all(&old.target).map_err(Error::sys("unmount", &old.target))?;
            remove_mark(&dir)?;
            durable::write_json(&dir.join(ROOTFS_RECORD), VERSION, &record, Sync::PageCache)?;
        }
        None => create_dirs(layout, &dir, &record, spare)?,
    }
    fs::create_dir_all(&record.target).map_err(Error::io("create", &record.target))?;
    let target = record.target.clone();
    let failed = |detail| Error::Mount { key: key.to_owned(), target: target.clone(), detail };
    if let (Some(ns), false) = (&record.user_namespace, record.owners_changed) {
        let why = match Mapped::mount(layout, ns).and_then(|m| mount(layout, &m.path, key, &record)) {
            Ok(()) => return Ok(record),
            Err(why) => why,
        };
        // A writable layer in use is not made anew.
        if old.is_some() && !record.readonly {
            return Err(failed(why));
        }
        tracing::warn!(key, why, "no layers with translated owners; every file changes its owner instead");
        let record = RootfsRecord { owners_changed: true, ..record.clone() };
        change_owners(layout, key, &record, ns).map_err(failed)?;
        durable::write_json(&dir.join(ROOTFS_RECORD), VERSION, &record, Sync::PageCache)?;
        mount(layout, &layout.layers(), key, &record).map_err(failed)?;
        return Ok(record);
    }
    mount(layout, &layout.layers(), key, &record).map_err(failed)?;
    Ok(record)
}

/// Left by a mount that a crash of the machine ended; the layer is a container's scratch space.
fn remove_mark(dir: &Path) -> Result<()> {
    let mark = dir.join("work/work/incompat");
    if mark.exists() {
        fs::remove_dir_all(&mark).map_err(Error::io("remove", &mark))?;
    }
    Ok(())
}

/// Mounts by the layers as `layers` shows them.
fn mount(layout: &Layout, layers: &Path, key: &str, record: &RootfsRecord) -> Result<(), String> {
    let dir = layout.rootfs(key);
    let writable = !record.readonly || record.owners_changed;
    let mut extra = record.extra.clone();
    if record.owners_changed {
        // Copies of metadata alone, and no sharing of copies between a file's names.
        extra.extend([("metacopy", "on"), ("index", "off")].map(|(k, v)| (k.to_owned(), v.to_owned())));
    }
    overlay::mount(&Overlay {
        source: &dir,
        layers,
        lower: lower(&record.chain, !writable, record.mount_points),
        upper: writable.then(|| (dir.join("upper"), dir.join("work"))),
        readonly: record.readonly,
        extra: &extra,
        target: &record.target,
    })
}

/// Through a mount of its own, which is not read-only.
fn change_owners(
    layout: &Layout,
    key: &str,
    record: &RootfsRecord,
    ns: &UserNamespace,
) -> Result<(), String> {
    let dir = layout.rootfs(key);
    for name in ["upper", "work"] {
        let path = dir.join(name);
        // What an attempt left that a crash ended.
        layout.discard(&path).map_err(|e| e.to_string())?;
        fs::DirBuilder::new().mode(0o755).create(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    if let Some(top) = record.chain.last() {
        copy_root(layout, top, &dir.join("upper")).map_err(|e| e.to_string())?;
    }
    let passing = RootfsRecord { readonly: false, ..record.clone() };
    mount(layout, &layout.layers(), key, &passing)?;
    let changed = idmap::change_owners(&record.target, ns).map_err(|e| format!("change of owners: {e}"));
    let unmounted = overlay::unmount_all(&record.target).map_err(|e| format!("unmount: {e}"));
    changed.and(unmounted)?;
    remove_mark(&dir).map_err(|e| e.to_string())
}

/// The root folder of the mount is that of the writable layer.
fn copy_root(layout: &Layout, top: &Digest, upper: &Path) -> Result<()> {
    let from_path = layout.layer_fs(top);
    let from = tree::open(&from_path).map_err(Error::sys("open", &from_path))?;
    let to = tree::open(upper).map_err(Error::sys("open", upper))?;
    unpack::copy_metadata(from.as_fd(), to.as_fd()).map_err(Error::sys("set metadata of", upper))
}

fn empty(layout: &Layout, writable: bool) -> Result<Ingest> {
    let made = layout.writable();
    let mkdir =
        |path: &Path, mode| fs::DirBuilder::new().mode(mode).create(path).map_err(Error::io("create", path));
    mkdir(&made.path, 0o700)?;
    if writable {
        mkdir(&made.path.join("upper"), 0o755)?;
        mkdir(&made.path.join("work"), 0o700)?;
    }
    Ok(made)
}

/// Puts an empty writable layer by. File systems without a journal (ext4) look through all inodes that were deleted in the last
/// minutes before they give one out, so that these few take longer than the mount.
pub(crate) fn make_spare(inner: &Inner) -> Result<()> {
    if inner.spare.lock().is_some() {
        return Ok(());
    }
    let made = empty(&inner.layout, true)?;
    // Written in place when it is used.
    let record = made.path.join(ROOTFS_RECORD);
    File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&record)
        .map_err(Error::io("create", &record))?;
    *inner.spare.lock() = Some(made);
    Ok(())
}

/// Appears in one step, with its record inside.
fn create_dirs(layout: &Layout, dir: &Path, record: &RootfsRecord, spare: Option<Ingest>) -> Result<()> {
    // It may have been cleaned up by hand.
    let made = match spare.filter(|s| s.path.join("upper").is_dir()) {
        Some(spare) => spare,
        None => empty(layout, !record.readonly)?,
    };
    if !record.readonly {
        let upper = made.path.join("upper");
        if let Some(top) = record.chain.last() {
            copy_root(layout, top, &upper)?;
        }
        if let Some(ns) = &record.user_namespace {
            let stat = rustix::fs::stat(&upper).map_err(Error::sys("look at", &upper))?;
            let (uid, gid) = ns.owner((stat.st_uid, stat.st_gid));
            std::os::unix::fs::chown(&upper, Some(uid), Some(gid))
                .map_err(Error::io("set owner of", &upper))?;
        }
    }
    durable::append_json(&made.path.join(ROOTFS_RECORD), VERSION, record)?;
    fs::rename(&made.path, dir).map_err(Error::io("create", dir))
}

/// Topmost first, relative to the layers' folder. A mount without a writable layer needs two.
fn lower(chain: &[Digest], readonly: bool, mount_points: bool) -> Vec<PathBuf> {
    let layers = chain.iter().rev().map(|c| PathBuf::from(Layout::layer_name(c)).join("fs"));
    let mut lower: Vec<PathBuf> = layers.chain(mount_points.then(|| "empty/points".into())).collect();
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
        assert_eq!(lower(&one, false, false).len(), 1);
        assert_eq!(lower(&one, true, false)[1], Path::new("empty/a"));
        assert_eq!(lower(&one, true, true)[1], Path::new("empty/points"));
        assert_eq!(lower(&[], true, false), [PathBuf::from("empty/a"), PathBuf::from("empty/b")]);
        assert_eq!(lower(&[], true, true), [PathBuf::from("empty/points"), PathBuf::from("empty/a")]);
        assert_eq!(lower(&[], false, false), [PathBuf::from("empty/a")]);
    }
}
