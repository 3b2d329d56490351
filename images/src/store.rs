//! The handle that the CRI server and the command line hold.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use orlop_base::durable::DirLock;
use orlop_base::supervise::TaskGroup;
use parking_lot::{Mutex, RwLock};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::layout::{ImageRecord, Ingest, LayerRecord, Layout, measure};
use crate::pull::Pulls;
use crate::state::{self, Entry, State};
use crate::unpack::Slots;
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
    pub writer: Arc<tokio::sync::Mutex<()>>,
    pub layer_locks: KeyedLocks<Digest>,
    pub rootfs_locks: KeyedLocks<String>,
    pub slots: Arc<Slots>,
    pub pulls: Pulls,
    pub tasks: TaskGroup,
    /// An empty writable layer for the next container.
    pub spare: Mutex<Option<Ingest>>,
    /// When the store was opened.
    opened: Instant,
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
        let left = {
            let mut state = self.inner.state.write();
            for c in &self.chain {
                if let Some(n) = state.pins.get_mut(c) {
                    *n -= 1;
                    if *n == 0 {
                        state.pins.remove(c);
                        state.released.insert(*c, Instant::now());
                    }
                }
            }
            let used = state.used_layers();
            self.chain.iter().any(|c| state.layers.contains_key(c) && !used.contains(c))
        };
        if left {
            self.inner.collect_later();
        }
    }
}

/// Does not keep a store open that nobody wants any more.
async fn settle(layout: Arc<Layout>, inner: Weak<Inner>, records: Vec<LayerRecord>) -> Result<()> {
    if records.is_empty() {
        return Ok(());
    }
    blocking(move || {
        crate::ingest::settle(&layout, &records)?;
        if let Some(inner) = inner.upgrade() {
            let mut state = inner.state.write();
            for record in &records {
                if let Some(layer) = state.layers.get_mut(&record.chain) {
                    layer.unsynced_since = None;
                }
            }
        }
        Ok(())
    })
    .await
}

impl ImageStore {
    /// Opens the store at `root`, making it when missing, and repairs what a crash left. Fails when another process
    /// has it open.
    pub async fn open(root: &Path, mut options: Options) -> Result<ImageStore> {
        let root = root.to_owned();
        for name in &mut options.pinned {
            // As images are named in their records: by tag or by digest.
            if let Ok(r) = Reference::parse(name)
                && let Some(full) = r.digest.map(|d| r.with_digest(&d)).or_else(|| r.tagged())
            {
                *name = full;
            }
        }
        blocking(move || {
            let layout = Arc::new(Layout::create(&root)?);
            let lock = DirLock::try_take(&layout.root)?;
            let state = state::load(&layout, &options.pinned)?;
            let slots = Slots::new(options.parallel_layers);
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
                spare: Mutex::default(),
                opened: Instant::now(),
                _lock: lock,
            });
            Ok((inner, unsynced))
        })
        .await
        .map(|(inner, unsynced)| {
            inner.settle_later(unsynced);
            if inner.has_unused() {
                inner.collect_later();
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
        let (inner, text) = (self.inner.clone(), reference_or_id.to_owned());
        // A caller that goes away must not leave the layers behind.
        self.inner
            .finished(async move {
                let found = inner.remove_names(&text).await?;
                if found {
                    inner.collect_unused(Duration::ZERO).await?;
                }
                Ok(found)
            })
            .await
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
        self.inner.collect_unused(Duration::ZERO).await
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

    /// Makes the folders of a writable layer ahead of time, if the next [`prepare_rootfs`](Self::prepare_rootfs) would have to.
    pub async fn make_spare(&self) -> Result<()> {
        let inner = self.inner.clone();
        blocking(move || crate::snapshot::make_spare(&inner)).await
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

    /// Lets go of what was to be done later and waits, `drain` at most, for what has begun. Nobody is to ask for more afterwards.
    pub async fn close(&self, drain: Duration) {
        self.inner.tasks.stop_token().cancel();
        // Only essential tasks can fail a group, and none of these is.
        let _ = self.inner.tasks.clone().run_until_stopped(drain).await;
        drop(self.inner.spare.lock().take());
    }

    /// The folder that holds everything; for `ImageFsInfo`.
    pub fn root(&self) -> &Path {
        &self.inner.layout.root
    }
}

impl Inner {
    /// Does `work` to its end even when nobody waits for it any more, except [`ImageStore::close`].
    pub async fn finished<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let (tell, told) = oneshot::channel();
        self.tasks.spawn(async move {
            // Nobody listening is fine: the work is done.
            let _ = tell.send(work.await);
        });
        told.await.unwrap_or(Err(Error::Cancelled))
    }

    /// Changes the images and writes them down before anybody sees the change. What was begun goes on when nobody waits for it any
    /// more, with `pins` held until it is done.
    pub async fn change<T>(
        self: &Arc<Self>,
        pins: Option<Pins>,
        change: impl FnOnce(&mut State) -> T,
    ) -> Result<T> {
        let writer = self.writer.clone().lock_owned().await;
        let mut next = State { images: self.state.read().images.clone(), ..State::default() };
        let result = change(&mut next);
        let records: Vec<ImageRecord> = next.images.values().map(|e| e.record.clone()).collect();
        let inner = self.clone();
        blocking(move || {
            let written = inner.layout.write_images(&records);
            if written.is_ok() {
                inner.state.write().images = next.images;
            }
            drop((pins, writer));
            written
        })
        .await?;
        Ok(result)
    }

    /// See [`ImageStore::remove`]; the layers stay.
    async fn remove_names(self: &Arc<Self>, reference_or_id: &str) -> Result<bool> {
        let tag =
            Reference::parse(reference_or_id).ok().filter(|r| r.digest.is_none()).and_then(|r| r.tagged());
        self.change(None, |state| {
            let Some(entry) = state.find(reference_or_id).cloned() else { return false };
            let mut record = entry.record.clone();
            let by_tag = tag.as_ref().is_some_and(|t| record.tags.contains(t));
            record.tags.retain(|t| by_tag && Some(t) != tag.as_ref());
            if record.tags.is_empty() {
                state.images.remove(&record.id);
            } else {
                let entry = entry.renamed(record, &self.options.pinned);
                state.images.insert(entry.record.id, entry);
            }
            true
        })
        .await
    }

    /// Adds an image, or names to one that is here. A tag that another image has moves.
    pub async fn register(
        self: &Arc<Self>,
        record: ImageRecord,
        config: oci_spec::image::ImageConfiguration,
        meta_size: u64,
        pins: Pins,
    ) -> Result<Arc<Image>> {
        let pinned = &self.options.pinned;
        self.change(Some(pins), |state| {
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
    pub async fn lost_layer(self: &Arc<Self>, image: &Image) -> Result<Option<Error>> {
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
            .change(None, |state| {
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

    /// Layers of `chain` that the disk may not hold yet.
    pub fn unsynced(&self, chain: &[Digest]) -> Vec<LayerRecord> {
        let state = self.state.read();
        let known = chain.iter().filter_map(|c| state.layers.get(c));
        known.filter(|l| l.unsynced_since.is_some()).cloned().collect()
    }

    /// Puts layers on disk.
    pub async fn settle(self: &Arc<Self>, records: Vec<LayerRecord>) -> Result<()> {
        settle(self.layout.clone(), Arc::downgrade(self), records).await
    }

    /// Puts layers on disk without making anybody wait.
    pub fn settle_later(self: &Arc<Self>, records: Vec<LayerRecord>) {
        let (layout, inner) = (self.layout.clone(), Arc::downgrade(self));
        self.tasks.spawn(async move {
            if let Err(e) = settle(layout, inner, records).await {
                tracing::warn!(error = %e, "layers may not be on disk yet; a power cut now makes them be pulled again");
            }
        });
    }

    fn has_unused(&self) -> bool {
        let state = self.state.read();
        let used = state.used_layers();
        state.layers.keys().any(|c| !used.contains(c))
    }

    /// Deletes what nothing uses once a pull that failed, or that a restart cut short, has had the time to be tried again.
    pub fn collect_later(self: &Arc<Self>) {
        if tokio::runtime::Handle::try_current().is_err() {
            // The program is ending; the next open does it.
            return;
        }
        let (weak, wait) = (Arc::downgrade(self), self.options.keep_unfinished);
        let stop = self.tasks.stop_token();
        self.tasks.spawn(async move {
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                // The next open does it.
                () = stop.cancelled() => return,
            }
            if let Some(inner) = weak.upgrade()
                && let Err(e) = inner.collect_unused(wait).await
            {
                tracing::warn!(error = %e, "could not delete the layers of a pull that failed");
            }
        });
    }

    /// Deletes what nothing uses and no pull has used for `age`.
    pub async fn collect_unused(self: &Arc<Self>, age: Duration) -> Result<GcReport> {
        let inner = self.clone();
        blocking(move || inner.collect(age)).await
    }

    /// Goes on after a failure and returns the first one. Blocking code.
    fn collect(&self, age: Duration) -> Result<GcReport> {
        let mut report = GcReport::default();
        let (mut gone, mut failed) = (Vec::new(), None);
        {
            // Under the lock, so that no pull finds a layer that is about to go, or a name that is still taken.
            let mut state = self.state.write();
            let used = state.used_layers();
            let (unused, young): (Vec<Digest>, Vec<Digest>) = state
                .layers
                .keys()
                .filter(|c| !used.contains(c))
                .partition(|c| state.released.get(c).unwrap_or(&self.opened).elapsed() >= age);
            for chain in unused {
                match self.layout.set_aside(&self.layout.layer(&chain)) {
                    Ok(path) => gone.extend(path),
                    Err(e) => {
                        failed.get_or_insert(e);
                        continue;
                    }
                }
                if let Some(layer) = state.layers.remove(&chain) {
                    report.layers += 1;
                    report.bytes += layer.usage.bytes;
                }
            }
            let State { layers, released, .. } = &mut *state;
            released.retain(|c, _| layers.contains_key(c));
            // A pull in progress has blobs that no image names yet, and one that is tried again wants its own.
            if state.pins.is_empty() && young.is_empty() {
                match self.unused_blobs(&state.used_blobs()) {
                    Ok(unused) => {
                        for (path, bytes) in unused {
                            match self.layout.set_aside(&path) {
                                Ok(path) => gone.extend(path),
                                Err(e) => {
                                    failed.get_or_insert(e);
                                    continue;
                                }
                            }
                            report.blobs += 1;
                            report.bytes += bytes;
                        }
                    }
                    Err(e) => {
                        failed.get_or_insert(e);
                    }
                }
            }
        }
        for path in gone {
            if let Err(e) = crate::layout::delete(&path) {
                failed.get_or_insert(e);
            }
        }
        failed.map_or(Ok(report), Err)
    }

    /// Files in `content/` that are none of `used`, with their sizes.
    fn unused_blobs(&self, used: &HashSet<Digest>) -> Result<Vec<(PathBuf, u64)>> {
        let content = self.layout.root.join("content");
        let mut unused = Vec::new();
        for item in std::fs::read_dir(&content).map_err(Error::io("list", &content))? {
            let item = item.map_err(Error::io("list", &content))?;
            let digest = item.file_name().to_str().and_then(Digest::from_hex);
            if !digest.is_some_and(|d| used.contains(&d)) {
                unused.push((item.path(), item.metadata().map(|m| m.len()).unwrap_or_default()));
            }
        }
        Ok(unused)
    }
}

#[cfg(test)]
mod tests {
    use orlop_base::durable;

    use super::*;
    use crate::layout::VERSION;
    use crate::state::Entry;

    fn add(state: &mut State, name: &str) {
        let id = Digest::of(name.as_bytes());
        let record = ImageRecord {
            id,
            tags: vec![name.to_owned()],
            digests: Vec::new(),
            manifest: id,
            layers: Vec::new(),
            chain: Vec::new(),
        };
        state.images.insert(id, Entry::new(record, Default::default(), 0, &[]));
    }

    /// With one thread for everything that blocks.
    fn runtime() -> tokio::runtime::Runtime {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(1).max_blocking_threads(1).enable_all().build().unwrap()
    }

    /// A caller that goes away while its change is on the way to the disk must not be overtaken by the next one.
    #[test]
    fn a_change_that_nobody_waits_for_comes_before_the_next() {
        let dir = tempfile::tempdir().unwrap();
        runtime().block_on(async {
            let store = ImageStore::open(dir.path(), Options::default()).await.unwrap();
            // The only thread that could write has something else to do.
            let (go, wait) = std::sync::mpsc::channel::<()>();
            let busy = tokio::task::spawn_blocking(move || wait.recv());
            {
                let mut first = std::pin::pin!(store.inner.change(None, |s| add(s, "a")));
                assert!(futures::poll!(&mut first).is_pending());
            }
            let inner = store.inner.clone();
            let second = tokio::spawn(async move { inner.change(None, |s| add(s, "b")).await });
            go.send(()).unwrap();
            busy.await.unwrap().unwrap();
            second.await.unwrap().unwrap();
            assert_eq!(store.list().len(), 2);
            let file = store.inner.layout.images_file();
            let written: Vec<ImageRecord> = durable::read_json(&file, VERSION).unwrap().unwrap();
            assert_eq!(written.len(), 2);
        });
    }

    /// What has begun is done when the store is closed, whoever has gone away, and what was to be done later is not waited for.
    #[test]
    fn closing_waits_for_what_has_begun() {
        let dir = tempfile::tempdir().unwrap();
        runtime().block_on(async {
            let store = ImageStore::open(dir.path(), Options::default()).await.unwrap();
            for name in ["a", "b"] {
                store.inner.change(None, |s| add(s, name)).await.unwrap();
            }
            store.inner.collect_later();
            let mut pulled = State::default();
            add(&mut pulled, "c");
            let record = pulled.images.pop_first().unwrap().1.record;
            let id = Digest::of(b"a").to_string();
            // The only thread that could write has something else to do.
            let (go, wait) = std::sync::mpsc::channel::<()>();
            let busy = tokio::task::spawn_blocking(move || wait.recv());
            {
                let pins = store.inner.pin(&[]);
                let pull = crate::pull::finish(&store.inner, record, Default::default(), b"{}", b"{}", pins);
                let (mut pull, mut removal) = (std::pin::pin!(pull), std::pin::pin!(store.remove(&id)));
                assert!(futures::poll!(&mut pull).is_pending());
                assert!(futures::poll!(&mut removal).is_pending());
            }
            let mut closing = std::pin::pin!(store.close(Duration::from_secs(60)));
            assert!(futures::poll!(&mut closing).is_pending());
            go.send(()).unwrap();
            busy.await.unwrap().unwrap();
            closing.await;
            let file = store.inner.layout.images_file();
            let written: Vec<ImageRecord> = durable::read_json(&file, VERSION).unwrap().unwrap();
            let mut names: Vec<&str> = written.iter().flat_map(|r| &r.tags).map(String::as_str).collect();
            names.sort();
            assert_eq!(names, ["b", "c"]);
        });
    }

    /// One thing that cannot be deleted does not keep the others.
    #[tokio::test]
    async fn collection_goes_on_after_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let store = ImageStore::open(dir.path(), Options::default()).await.unwrap();
        let layout = &store.inner.layout;
        for name in ["a", "b", "c"] {
            std::fs::create_dir(layout.root.join("content").join(name)).unwrap();
        }
        // A mount cannot be taken away by a rename.
        let mount = layout.root.join("content/b");
        rustix::mount::mount("x", &mount, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
        let failed = store.gc().await;
        let left = std::fs::read_dir(layout.root.join("content")).unwrap().count();
        rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::DETACH).unwrap();
        failed.unwrap_err();
        assert_eq!(left, 1);
        assert_eq!(store.gc().await.unwrap().blobs, 1);
    }
}
