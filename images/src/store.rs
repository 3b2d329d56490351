//! The handle that the CRI server and the command line hold.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::{Auth, GcReport, Image, Options, Result, RootfsOptions, Usage};

/// All images and root file systems below one folder. A cheap handle: clones share the store.
#[derive(Clone)]
pub struct ImageStore {
    inner: Arc<Inner>,
}

struct Inner {
    root: PathBuf,
}

impl ImageStore {
    /// Opens the store at `root`, making it when missing, and repairs what a crash left. Fails when another process
    /// has it open.
    pub async fn open(root: &Path, options: Options) -> Result<ImageStore> {
        let _ = options;
        Ok(ImageStore { inner: Arc::new(Inner { root: root.to_owned() }) })
    }

    /// Makes the image of `reference` available and returns it. Asks the registry unless the reference has a digest
    /// that is here already. Concurrent pulls of the same reference with the same credentials share one transfer,
    /// which ends early only when all of them are dropped.
    pub async fn pull(&self, reference: &str, auth: Option<&Auth>) -> Result<Arc<Image>> {
        let _ = (reference, auth);
        todo!()
    }

    /// Finds an image by tag, by name and digest, by id (with or without `sha256:`) or by a unique id prefix.
    pub fn get(&self, reference_or_id: &str) -> Option<Arc<Image>> {
        let _ = reference_or_id;
        todo!()
    }

    /// All images, sorted by id.
    pub fn list(&self) -> Vec<Arc<Image>> {
        todo!()
    }

    /// Removes an image: an id or a digest takes all its names, a tag only that tag, and the image goes with its last
    /// tag. False when there is no such image. Layers that a root file system uses stay until that is removed.
    pub async fn remove(&self, reference_or_id: &str) -> Result<bool> {
        let _ = reference_or_id;
        todo!()
    }

    /// Imports an OCI layout (folder or tar) or a docker archive, plain or compressed. `name` names an image that
    /// the archive leaves nameless.
    pub async fn import(&self, archive: &Path, name: Option<&str>) -> Result<Vec<Arc<Image>>> {
        let _ = (archive, name);
        todo!()
    }

    /// Writes images as an OCI layout tar. A layer whose blob was not kept is packed anew from its files.
    pub async fn export(&self, references: &[&str], archive: &Path) -> Result<()> {
        let _ = (references, archive);
        todo!()
    }

    /// Deletes layers and blobs that no image and no root file system uses.
    pub async fn gc(&self) -> Result<GcReport> {
        todo!()
    }

    /// Mounts the image at `target` with a writable layer of its own, named `key` (1 to 128 of `[A-Za-z0-9_.-]`).
    /// Repeating it with the same key, image and target restores the mount and keeps the writable layer.
    pub async fn prepare_rootfs(
        &self,
        key: &str,
        image: &Image,
        target: &Path,
        options: &RootfsOptions,
    ) -> Result<()> {
        let _ = (key, image, target, options);
        todo!()
    }

    /// Unmounts what [`prepare_rootfs`](Self::prepare_rootfs) or [`mount_image`](Self::mount_image) made and deletes
    /// the writable layer. Succeeds when there is nothing of that name.
    pub async fn remove_rootfs(&self, key: &str) -> Result<()> {
        let _ = key;
        todo!()
    }

    /// Mounts the image's files read-only at `target`, for image volumes.
    pub async fn mount_image(&self, key: &str, image: &Image, target: &Path) -> Result<()> {
        let _ = (key, image, target);
        todo!()
    }

    /// Keys of all root file systems and image mounts, sorted; also those that an earlier process made.
    pub fn rootfs_keys(&self) -> Vec<String> {
        todo!()
    }

    /// What the writable layer of `key` holds.
    pub async fn rootfs_usage(&self, key: &str) -> Result<Usage> {
        let _ = key;
        todo!()
    }

    /// What the images (layers and blobs, not writable layers) hold.
    pub async fn usage(&self) -> Result<Usage> {
        todo!()
    }

    /// The folder that holds everything; for `ImageFsInfo`.
    pub fn root(&self) -> &Path {
        &self.inner.root
    }
}
