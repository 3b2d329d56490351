//! Where things lie below the store's folder.
//!
//! ```text
//! lock                         held while a process has the store open
//! images.json                  the images and their names
//! images.copy.json             the same, for when that is damaged
//! content/<hex digits>         manifests, configs, and layers as transferred where they are kept
//! layers/<id>/fs, layer.json   one unpacked layer; the id is the first 24 digits of its chain id
//! layers/empty/{a,b}           a second lower layer for read-only mounts of one layer
//! layers/empty/points          what containers mount over, as the lowest layer
//! rootfs/<key>/upper, work, rootfs.json
//! ….damaged                    a file that could not be read, kept for whoever wants to look at it
//! mapped/                      mounts of the layers with translated owners, while an overlay is made
//! ingest/                      what is being made
//! writable/                    writable layers that are being made, or made ahead of time
//! trash/                       what is being deleted
//! ```

use std::fs;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use orlop_base::durable::{self, Sync};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::is_full;
use crate::{Digest, Error, Result, Usage, UserNamespace, tree};

/// Version of the files below.
pub(crate) const VERSION: u32 = 1;

#[derive(Debug)]
pub(crate) struct Layout {
    pub root: PathBuf,
    /// Tells names of this start from those that an earlier one left.
    start: u128,
    next: AtomicU64,
}

/// `layers/<id>/layer.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub chain: Digest,
    pub diff: Digest,
    pub parent: Option<Digest>,
    pub usage: Usage,
    /// The boot in which it was unpacked, while its data may not be on disk; `None` once it is.
    pub unsynced_since: Option<String>,
}

/// Of a container's root file system, in its folder `rootfs/<key>`.
pub(crate) const ROOTFS_RECORD: &str = "rootfs.json";

/// What [`ROOTFS_RECORD`] holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RootfsRecord {
    pub image: String,
    pub chain: Vec<Digest>,
    pub target: PathBuf,
    /// Without a writable layer.
    pub readonly: bool,
    #[serde(default)]
    pub mount_points: bool,
    #[serde(default)]
    pub extra: Vec<(String, String)>,
    #[serde(default)]
    pub user_namespace: Option<UserNamespace>,
    /// The writable layer holds every file with its owner outside: the layers could not be mounted with translated
    /// owners.
    #[serde(default)]
    pub owners_changed: bool,
}

/// One image in `images.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ImageRecord {
    /// Digest of the config.
    pub id: Digest,
    pub tags: Vec<String>,
    pub digests: Vec<String>,
    pub manifest: Digest,
    pub layers: Vec<LayerBlob>,
    pub chain: Vec<Digest>,
}

/// A layer as the manifest describes it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct LayerBlob {
    pub digest: Digest,
    pub size: u64,
    pub media_type: String,
}

/// Asks the file system to keep the folders that will be made in `dir` apart from each other: ext4 then puts them into block groups
/// where little was deleted of late, which without a journal makes their files cheaper to create. Others do not know the wish.
fn spread(dir: &Path) {
    use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
    if let Ok(dir) = fs::File::open(dir)
        && let Ok(flags) = ioctl_getflags(&dir)
    {
        let _ = ioctl_setflags(&dir, flags | IFlags::TOPDIR);
    }
}

/// A new file or folder that vanishes unless it is moved to its place.
#[derive(Debug)]
pub(crate) struct Ingest {
    pub path: PathBuf,
}

impl Drop for Ingest {
    fn drop(&mut self) {
        // The next open empties the folder anyway.
        let _ = delete(&self.path);
    }
}

impl Layout {
    /// Makes the folders that are missing.
    pub fn create(root: &Path) -> Result<Layout> {
        // Mounts and records keep the path, so it must not depend on the working directory.
        fs::create_dir_all(root).map_err(Error::io("create", root))?;
        let root = fs::canonicalize(root).map_err(Error::io("find", root))?;
        // A container's files are nobody else's business, and some are set-uid.
        for name in ["content", "layers", "rootfs", "ingest", "writable", "trash", "mapped"] {
            create_folder(&root.join(name), 0o700)?;
        }
        spread(&root.join("writable"));
        for name in ["a", "b", "points/dev", "points/proc", "points/sys", "points/etc"] {
            create_folder(&root.join("layers/empty").join(name), 0o755)?;
        }
        for name in ["hostname", "hosts", "resolv.conf"] {
            create_empty(&root.join("layers/empty/points/etc").join(name))?;
        }
        // A clock that stands before 1970 has no earlier start to tell from.
        let start = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        Ok(Layout { root, start, next: AtomicU64::new(0) })
    }

    pub fn images_file(&self) -> PathBuf {
        self.root.join("images.json")
    }

    pub fn images_copy(&self) -> PathBuf {
        self.root.join("images.copy.json")
    }

    /// Writes down which images there are. Blocking code.
    pub fn write_images(&self, records: &[impl Serialize]) -> Result<()> {
        let write = || durable::write_json(&self.images_file(), VERSION, &records, Sync::Disk);
        match write() {
            // The copy takes the room that is missing: images can be removed from a full disk only if that can be written down.
            Err(durable::Error::Io { source, .. })
                if is_full(&source) && fs::remove_file(self.images_copy()).is_ok() =>
            {
                write()?;
            }
            written => written?,
        }
        // For when the file is damaged, not for a power cut, which it outlives. The change has been made, whatever becomes of this.
        if let Err(e) = durable::write_json(&self.images_copy(), VERSION, &records, Sync::PageCache) {
            tracing::warn!(error = %e, "the list of images has no copy until it changes again");
        }
        Ok(())
    }

    pub fn content(&self, digest: &Digest) -> PathBuf {
        self.root.join("content").join(digest.hex())
    }

    pub fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    /// Short, because all layers of a mount must fit into one page on kernels before 6.5. A name stands for one
    /// chain id, which is checked when the layer is used.
    pub fn layer_name(chain: &Digest) -> String {
        let mut name = chain.hex();
        name.truncate(24);
        name
    }

    pub fn layer(&self, chain: &Digest) -> PathBuf {
        self.layers().join(Self::layer_name(chain))
    }

    pub fn layer_fs(&self, chain: &Digest) -> PathBuf {
        self.layer(chain).join("fs")
    }

    /// The lowest layer of `chain` whose files are gone as a whole.
    pub fn lost(&self, chain: &[Digest]) -> Option<Digest> {
        chain.iter().find(|c| !self.layer_fs(c).is_dir()).copied()
    }

    pub fn rootfs(&self, key: &str) -> PathBuf {
        self.root.join("rootfs").join(key)
    }

    /// A name in `ingest/` that nothing has yet.
    pub fn ingest(&self) -> Ingest {
        Ingest { path: self.root.join("ingest").join(self.unique()) }
    }

    /// The same for a container's writable layer, which has nothing to do with the others.
    pub fn writable(&self) -> Ingest {
        Ingest { path: self.root.join("writable").join(self.unique()) }
    }

    /// A name that nothing has yet, for mounts of the layers with translated owners.
    pub fn mapped(&self) -> PathBuf {
        self.root.join("mapped").join(self.unique())
    }

    fn unique(&self) -> String {
        format!("{:x}-{}", self.start, self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// A small blob; why not when it is not there as it was written.
    pub fn read_content(&self, digest: &Digest) -> Result<Vec<u8>, String> {
        let bytes = fs::read(self.content(digest)).map_err(|e| format!("{digest}: {e}"))?;
        if digest.same_of(&bytes) != *digest {
            return Err(format!("{digest} is damaged"));
        }
        Ok(bytes)
    }

    /// Keeps a small blob. Not synced: the next open verifies it by its digest. One that is damaged is replaced.
    pub fn write_content(&self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        let path = self.content(digest);
        if self.read_content(digest).is_ok() {
            return Ok(());
        }
        let temporary = self.ingest();
        fs::write(&temporary.path, bytes).map_err(Error::io("write", &temporary.path))?;
        if path.is_dir() {
            // Nothing of ours, and in the way.
            self.discard(&path)?;
        }
        fs::rename(&temporary.path, &path).map_err(Error::io("create", &path))
    }

    /// Takes `path` away in one step. Returns where it is now, for [`delete`]; a crash in between leaves it in `trash/`.
    pub fn set_aside(&self, path: &Path) -> Result<Option<PathBuf>> {
        let to = self.root.join("trash").join(self.unique());
        match fs::rename(path, &to) {
            Ok(()) => Ok(Some(to)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io("remove", path)(e)),
        }
    }

    /// Deletes a file or folder, whatever it holds.
    pub fn discard(&self, path: &Path) -> Result<()> {
        self.set_aside(path)?.map_or(Ok(()), |p| delete(&p))
    }

    /// Empties `ingest/`, `writable/` and `trash/`, and unmounts what is in `mapped/`. What cannot be deleted stays: it is in nobody's way.
    pub fn clean(&self) -> Result<()> {
        let mapped = self.root.join("mapped");
        for item in fs::read_dir(&mapped).map_err(Error::io("list", &mapped))? {
            crate::idmap::take_away(&item.map_err(Error::io("list", &mapped))?.path());
        }
        for name in ["ingest", "writable", "trash"] {
            let path = self.root.join(name);
            for item in fs::read_dir(&path).map_err(Error::io("list", &path))? {
                let item = item.map_err(Error::io("list", &path))?.path();
                if let Err(e) = delete(&item) {
                    let error = orlop_base::telemetry::chain(&e);
                    tracing::warn!(path = %item.display(), error, "a leftover stays until the next start");
                }
            }
        }
        Ok(())
    }
}

/// Takes a file that cannot be read out of the way of its successor. Returns where it is now; `None` when there is none.
pub(crate) fn keep_damaged(path: &Path) -> Result<Option<PathBuf>> {
    if fs::symlink_metadata(path).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound) {
        return Ok(None);
    }
    let mut to = path.as_os_str().to_owned();
    to.push(".damaged");
    let to = PathBuf::from(to);
    // The newest is kept.
    if fs::symlink_metadata(&to).is_ok() {
        delete(&to)?;
    }
    fs::rename(path, &to).map_err(Error::io("rename", path))?;
    Ok(Some(to))
}

/// With those above it. One that is there stays as it is.
fn create_folder(path: &Path, mode: u32) -> Result<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(mode).create(path);
    made.map_err(Error::io("create", path))
}

/// A file that everybody may read. One that is there stays.
fn create_empty(path: &Path) -> Result<()> {
    let made = fs::File::options().write(true).create(true).truncate(false).mode(0o644).open(path);
    made.map(drop).map_err(Error::io("create", path))
}

/// Deletes what [`Layout::set_aside`] gave.
pub(crate) fn delete(path: &Path) -> Result<()> {
    match tree::open(path) {
        Ok(dir) => {
            tree::empty(&dir).map_err(Error::sys("delete", path))?;
            fs::remove_dir(path).map_err(Error::io("delete", path))
        }
        Err(Errno::NOTDIR | Errno::LOOP) => fs::remove_file(path).map_err(Error::io("delete", path)),
        Err(e) => Err(Error::sys("delete", path)(e)),
    }
}

/// Tells this boot from others.
pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|s| s.trim().to_owned()).unwrap_or_default()
}

/// Bytes and inodes below `dir`, each hard-linked file once. Goes on where files vanish meanwhile.
pub(crate) fn measure(dir: &Path) -> Result<Usage> {
    match tree::open(dir).and_then(|d| tree::measure(&d)) {
        Err(Errno::NOENT) => Ok(Usage::default()),
        usage => usage.map_err(Error::sys("measure", dir)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Images and what runs outlive the release that wrote them down, so nothing may become necessary that was not there then.
    #[test]
    fn what_the_first_release_wrote_is_read() {
        let digest = Digest::of(b"").to_string();
        let with = |text: &str| text.replace("DIGEST", &digest);
        let image: ImageRecord = serde_json::from_str(&with(
            r#"{"id":"DIGEST","tags":["a:1"],"digests":["a@DIGEST"],"manifest":"DIGEST",
            "layers":[{"digest":"DIGEST","size":1,"media_type":"m"}],"chain":["DIGEST"]}"#,
        ))
        .unwrap();
        let layer: LayerRecord = serde_json::from_str(&with(
            r#"{"chain":"DIGEST","diff":"DIGEST","parent":null,"usage":{"bytes":1,"inodes":2},"unsynced_since":null}"#,
        ))
        .unwrap();
        let rootfs: RootfsRecord = serde_json::from_str(&with(
            r#"{"image":"DIGEST","chain":["DIGEST"],"target":"/t","readonly":false}"#,
        ))
        .unwrap();
        assert_eq!((image.id, layer.chain), (rootfs.chain[0], image.chain[0]));
    }
}
