//! The handle that the CRI server and the command line hold.

use std::collections::HashMap;
use std::hash::Hash;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use orlop_base::durable::DirLock;
use orlop_base::supervise::TaskGroup;
use parking_lot::{Mutex, RwLock};
use tokio_util::sync::CancellationToken;

use crate::layout::{ImageRecord, LayerRecord, Layout, measure};
use crate::pull::Pulls;
use crate::state::{self, Entry, State};
use crate::{Auth, Digest, Error, GcReport, Image, Options, Reference, Result, RootfsOptions, Usage};

/// All images and root file systems below one folder. A cheap handle: clones share the store.
#[derive(Clone)]
pub struct ImageStore {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub layout: Arc<Layout>,
    pub options: Options,
    pub state: RwLock<State>,
    /// Held while `images.json` is written, so that writes happen in the order of the changes.
    pub writer: tokio::sync::Mutex<()>,
    pub layer_locks: KeyedLocks<Digest>,
    pub rootfs_locks: KeyedLocks<String>,
    /// One permit per layer that is transferred and unpacked.
    pub slots: Arc<tokio::sync::Semaphore>,
    pub pulls: Pulls,
    pub tasks: TaskGroup,
    _lock: DirLock,
}

/// One lock per key, for as long as somebody holds or awaits it.
pub(crate) struct KeyedLocks<K>(Mutex<HashMap<K, Weak<tokio::sync::Mutex<()>>>>);

impl<K: Hash + Eq> Default for KeyedLocks<K> {
    fn default() -> Self {
        KeyedLocks(Mutex::default())
    }
}

impl<K: Hash + Eq> KeyedLocks<K> {
    pub async fn lock(&self, key: K) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut map = self.0.lock();
            map.retain(|_, l| l.strong_count() > 0);
            match map.get(&key).and_then(Weak::upgrade) {
                Some(l) => l,
                None => {
                    let l = Arc::new(tokio::sync::Mutex::new(()));
                    map.insert(key, Arc::downgrade(&l));
                    l
                }
            }
        };
        lock.lock_owned().await
    }
}

/// Runs blocking code where it may block.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    joined(tokio::task::spawn_blocking(work)).await
}

/// The result of blocking code; its panic goes on here.
pub(crate) async fn joined<T>(task: tokio::task::JoinHandle<Result<T>>) -> Result<T> {
    match task.await {
        Ok(result) => result,
        Err(e) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
        Err(_) => Err(Error::Cancelled),
    }
}

/// Keeps layers from being collected while a pull or import needs them.
pub(crate) struct Pins {
    inner: Arc<Inner>,
    chain: Vec<Digest>,
}

impl Drop for Pins {
    fn drop(&mut self) {
        let mut state = self.inner.state.write();
        for c in &self.chain {
            if let Some(n) = state.pins.get_mut(c) {
                *n -= 1;
                if *n == 0 {
                    state.pins.remove(c);
                }
            }
        }
    }
}

impl ImageStore {
    /// Opens the store at `root`, making it when missing, and repairs what a crash left. Fails when another process
    /// has it open.
    pub async fn open(root: &Path, mut options: Options) -> Result<ImageStore> {
        let root = root.to_owned();
        for name in &mut options.pinned {
            if let Ok(r) = Reference::parse(name) {
                *name = r.to_string();
            }
        }
        blocking(move || {
            let layout = Arc::new(Layout::create(&root)?);
            let lock = DirLock::try_take(&layout.root)?;
            let state = state::load(&layout, &options.pinned)?;
            let slots = Arc::new(tokio::sync::Semaphore::new(options.parallel_layers.max(1)));
            let unsynced: Vec<LayerRecord> =
                state.layers.values().filter(|l| l.unsynced_since.is_some()).cloned().collect();
            let inner = Arc::new(Inner {
                layout,
                options,
                state: RwLock::new(state),
                writer: Default::default(),
                layer_locks: Default::default(),
                rootfs_locks: Default::default(),
                slots,
                pulls: Pulls::default(),
                tasks: TaskGroup::new(&CancellationToken::new()),
                _lock: lock,
            });
            Ok((inner, unsynced))
        })
        .await
        .map(|(inner, unsynced)| {
            if !unsynced.is_empty() {
                inner.settle_later(unsynced);
            }
            ImageStore { inner }
        })
    }

    /// Makes the image of `reference` available and returns it. Asks the registry unless the reference has a digest
    /// that is here already. Concurrent pulls of the same reference with the same credentials share one transfer,
    /// which ends early only when all of them are dropped.
    pub async fn pull(&self, reference: &str, auth: Option<&Auth>) -> Result<Arc<Image>> {
        crate::pull::shared(&self.inner, reference, auth).await
    }

    /// Finds an image by tag, by name and digest, by id (with or without `sha256:`) or by a unique id prefix.
    pub fn get(&self, reference_or_id: &str) -> Option<Arc<Image>> {
        self.inner.state.read().find(reference_or_id).map(|e| e.image.clone())
    }

    /// All images, sorted by id.
    pub fn list(&self) -> Vec<Arc<Image>> {
        self.inner.state.read().images.values().map(|e| e.image.clone()).collect()
    }

    /// Removes an image: an id or a digest takes all its names, a tag only that tag, and the image goes with its last
    /// tag. False when there is no such image. Layers that a root file system uses stay until that is removed.
    pub async fn remove(&self, reference_or_id: &str) -> Result<bool> {
        let tag =
            Reference::parse(reference_or_id).ok().filter(|r| r.digest.is_none()).and_then(|r| r.tagged());
        let found = self
            .inner
            .change(|state| {
                let Some(entry) = state.find(reference_or_id).cloned() else { return false };
                let mut record = entry.record.clone();
                let by_tag = tag.as_ref().is_some_and(|t| record.tags.contains(t));
                record.tags.retain(|t| by_tag && Some(t) != tag.as_ref());
                if record.tags.is_empty() {
                    state.images.remove(&record.id);
                } else {
                    let entry = entry.renamed(record, &self.inner.options.pinned);
                    state.images.insert(entry.record.id, entry);
                }
                true
            })
            .await?;
        if found {
            self.gc().await?;
        }
        Ok(found)
    }

    /// Imports an OCI layout (folder or tar) or a docker archive, plain or compressed. `name` names an image that
    /// the archive leaves nameless.
    pub async fn import(&self, archive: &Path, name: Option<&str>) -> Result<Vec<Arc<Image>>> {
        match crate::import::import(&self.inner, archive, name).await {
            Err(e) => Err(crate::pull::after_failure(&self.inner, e).await),
            images => images,
        }
    }

    /// Writes images as a tar that is an OCI layout and a docker archive at once. A layer whose blob was not kept is
    /// packed anew from its files, and when that does not give the same bytes, the exported image has another id.
    pub async fn export(&self, references: &[&str], archive: &Path) -> Result<()> {
        let entries = {
            let state = self.inner.state.read();
            let find = |r: &&str| state.find(r).cloned().ok_or_else(|| Error::NoImage((*r).to_owned()));
            references.iter().map(find).collect::<Result<Vec<_>>>()?
        };
        let pins = entries.iter().map(|e| self.inner.pin(&e.record.chain)).collect::<Vec<_>>();
        let (layout, archive) = (self.inner.layout.clone(), archive.to_owned());
        let result = blocking(move || crate::export::export(&layout, &entries, &archive)).await;
        drop(pins);
        result
    }

    /// Deletes layers and blobs that no image and no root file system uses.
    pub async fn gc(&self) -> Result<GcReport> {
        self.inner.collect_unused().await
    }

    /// Mounts the image at `target` with a writable layer of its own, named `key` (1 to 128 of `[A-Za-z0-9_.-]`).
    /// Repeating it with the same key and image restores the mount and keeps the writable layer.
    pub async fn prepare_rootfs(
        &self,
        key: &str,
        image: &Image,
        target: &Path,
        options: &RootfsOptions,
    ) -> Result<()> {
        crate::snapshot::prepare(&self.inner, key, image, target, options).await
    }

    /// Unmounts what [`prepare_rootfs`](Self::prepare_rootfs) or [`mount_image`](Self::mount_image) made and deletes
    /// the writable layer. Succeeds when there is nothing of that name.
    pub async fn remove_rootfs(&self, key: &str) -> Result<()> {
        if crate::snapshot::remove(&self.inner, key).await? {
            self.gc().await?;
        }
        Ok(())
    }

    /// Mounts the image's files read-only at `target`, for image volumes, with the owners as the container sees them, whatever
    /// `options` says of writing. Taken away by [`remove_rootfs`](Self::remove_rootfs).
    pub async fn mount_image(
        &self,
        key: &str,
        image: &Image,
        target: &Path,
        options: &RootfsOptions,
    ) -> Result<()> {
        let options = RootfsOptions { readonly: true, mount_points: false, ..options.clone() };
        crate::snapshot::prepare(&self.inner, key, image, target, &options).await
    }

    /// Keys of all root file systems and image mounts, sorted; also those that an earlier process made.
    pub fn rootfs_keys(&self) -> Vec<String> {
        self.inner.state.read().rootfs.keys().cloned().collect()
    }

    /// What the writable layer of `key` holds.
    pub async fn rootfs_usage(&self, key: &str) -> Result<Usage> {
        if !self.inner.state.read().rootfs.contains_key(key) {
            return Err(Error::NoRootfs(key.to_owned()));
        }
        let upper = self.inner.layout.rootfs(key).join("upper");
        blocking(move || measure(&upper)).await
    }

    /// Writes what is in the writable layer of `key` to `out` as tar, and returns what was deleted from the image's files, sorted:
    /// paths relative to the root, some of which may not have been there. Nothing may change files meanwhile.
    ///
    /// # Errors
    /// Also when the layer holds every file because its owners had to be changed.
    pub async fn rootfs_changes<W>(&self, key: &str, out: W) -> Result<(W, Vec<PathBuf>)>
    where
        W: std::io::Write + Send + 'static,
    {
        let record = self.inner.state.read().rootfs.get(key).cloned();
        let record = record.ok_or_else(|| Error::NoRootfs(key.to_owned()))?;
        let (layout, key) = (self.inner.layout.clone(), key.to_owned());
        blocking(move || crate::changes::write(&layout, &key, &record, out)).await
    }

    /// What the images (layers and blobs, not writable layers) hold.
    pub async fn usage(&self) -> Result<Usage> {
        let mut total = {
            let state = self.inner.state.read();
            state.layers.values().fold(Usage::default(), |t, l| Usage {
                bytes: t.bytes + l.usage.bytes,
                inodes: t.inodes + l.usage.inodes,
            })
        };
        let content = self.inner.layout.root.join("content");
        let blobs = blocking(move || measure(&content)).await?;
        total.bytes += blobs.bytes;
        total.inodes += blobs.inodes;
        Ok(total)
    }

    /// The folder that holds everything; for `ImageFsInfo`.
    pub fn root(&self) -> &Path {
        &self.inner.layout.root
    }
}

impl Inner {
    /// Changes the images and writes them down before anybody sees the change.
    pub async fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> Result<T> {
        let _writer = self.writer.lock().await;
        let mut next = State { images: self.state.read().images.clone(), ..State::default() };
        let result = change(&mut next);
        let records: Vec<ImageRecord> = next.images.values().map(|e| e.record.clone()).collect();
        let layout = self.layout.clone();
        blocking(move || layout.write_images(&records)).await?;
        self.state.write().images = next.images;
        Ok(result)
    }

    /// Adds an image, or names to one that is here. A tag that another image has moves.
    pub async fn register(
        &self,
        record: ImageRecord,
        config: oci_spec::image::ImageConfiguration,
        meta_size: u64,
    ) -> Result<Arc<Image>> {
        let pinned = &self.options.pinned;
        self.change(|state| {
            let mut record = record;
            for entry in state.images.values_mut() {
                if entry.record.id != record.id && entry.record.tags.iter().any(|t| record.tags.contains(t)) {
                    let mut other = entry.record.clone();
                    other.tags.retain(|t| !record.tags.contains(t));
                    *entry = entry.renamed(other, pinned);
                }
            }
            if let Some(old) = state.images.get(&record.id) {
                record.tags.extend(old.record.tags.iter().cloned());
                record.digests.extend(old.record.digests.iter().cloned());
            }
            for names in [&mut record.tags, &mut record.digests] {
                names.sort();
                names.dedup();
            }
            let entry = Entry::new(record, config, meta_size, pinned);
            let image = entry.image.clone();
            state.images.insert(entry.record.id, entry);
            image
        })
        .await
    }

    /// Forgets a layer that [`Layout::lost`] names. The caller holds its lock.
    pub fn lose_layer(&self, chain: &Digest) -> Result<()> {
        // Its name must be free for the next one.
        self.layout.discard(&self.layout.layer(chain))?;
        self.state.write().layers.remove(chain);
        Ok(())
    }

    /// Why `image` cannot be mounted, if that is because a layer is not on disk any more. All images with that layer are dropped, as
    /// the next open would do: whoever looks for one must not find it, but pull it again.
    pub async fn lost_layer(&self, image: &Image) -> Result<Option<Error>> {
        let known = |c: &Digest| self.state.read().layers.contains_key(c);
        let lost = self.layout.lost(&image.chain);
        let Some(chain) = lost.or_else(|| image.chain.iter().find(|c| !known(c)).copied()) else {
            return Ok(None);
        };
        let _lock = self.layer_locks.lock(chain).await;
        if known(&chain) {
            if self.layout.lost(&[chain]).is_none() {
                // A pull was faster.
                return Ok(None);
            }
            self.lose_layer(&chain)?;
        }
        let dropped = self
            .change(|state| {
                let before = state.images.len();
                state.images.retain(|_, e| !e.record.chain.contains(&chain));
                before > state.images.len()
            })
            .await?;
        // Otherwise it was removed, which is no loss.
        Ok(dropped.then(|| {
            let (image, layer) = (image.id.clone(), chain.to_string());
            Error::LayerLost { image, layer, path: self.layout.layer_fs(&chain) }
        }))
    }

    pub fn pin(self: &Arc<Self>, chain: &[Digest]) -> Pins {
        let mut state = self.state.write();
        for c in chain {
            *state.pins.entry(*c).or_default() += 1;
        }
        Pins { inner: self.clone(), chain: chain.to_vec() }
    }

    /// Puts new layers on disk without making anybody wait.
    pub fn settle_later(&self, records: Vec<LayerRecord>) {
        let layout = self.layout.clone();
        self.tasks.spawn(async move {
            if let Err(e) = blocking(move || crate::ingest::settle(&layout, &records)).await {
                tracing::warn!(error = %e, "layers may not be on disk yet; a power cut now makes them be pulled again");
            }
        });
    }

    /// Deletes what nothing uses.
    pub async fn collect_unused(self: &Arc<Self>) -> Result<GcReport> {
        let inner = self.clone();
        blocking(move || inner.collect()).await
    }

    /// Deletes what nothing uses. Blocking code.
    fn collect(&self) -> Result<GcReport> {
        let mut report = GcReport::default();
        let mut gone = Vec::new();
        {
            // Under the lock, so that no pull finds a layer that is about to go, or a name that is still taken.
            let mut state = self.state.write();
            let used = state.used_layers();
            let unused: Vec<Digest> = state.layers.keys().filter(|c| !used.contains(c)).copied().collect();
            for chain in unused {
                gone.push(self.layout.set_aside(&self.layout.layer(&chain))?);
                if let Some(layer) = state.layers.remove(&chain) {
                    report.layers += 1;
                    report.bytes += layer.usage.bytes;
                }
            }
            // A pull in progress has blobs that no image names yet.
            if state.pins.is_empty() {
                let used = state.used_blobs();
                let content = self.layout.root.join("content");
                for item in std::fs::read_dir(&content).map_err(Error::io("list", &content))? {
                    let item = item.map_err(Error::io("list", &content))?;
                    let digest = item.file_name().to_str().and_then(Digest::from_hex);
                    if !digest.is_some_and(|d| used.contains(&d)) {
                        report.blobs += 1;
                        report.bytes += item.metadata().map(|m| m.len()).unwrap_or_default();
                        gone.push(self.layout.set_aside(&item.path())?);
                    }
                }
            }
        }
        for path in gone.into_iter().flatten() {
            crate::layout::delete(&path)?;
        }
        Ok(report)
    }
}
