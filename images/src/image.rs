//! What the store says about its images.

use oci_spec::image::ImageConfiguration;

/// One image as the CRI sees it: a config, and the names that lead to it.
#[derive(Clone, Debug)]
pub struct Image {
    /// `sha256:…` or `sha512:…` of the config.
    pub id: String,
    /// Names with a tag, such as `docker.io/library/busybox:1.36`.
    pub repo_tags: Vec<String>,
    /// Names with the digest of the manifest or index that was pulled.
    pub repo_digests: Vec<String>,
    /// Bytes of manifest, config and layers as transferred (compressed).
    pub size: u64,
    /// Garbage collection by age or disk pressure must keep it (CRI `Image.pinned`).
    pub pinned: bool,
    /// The parsed config: entrypoint, env, user, …
    pub config: ImageConfiguration,
    /// Chain ids of its layers, bottom first (OCI image spec, "Layer ChainID").
    pub(crate) chain: Vec<crate::Digest>,
}

/// Disk use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Usage {
    pub bytes: u64,
    pub inodes: u64,
}

/// What a garbage collection took away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GcReport {
    pub layers: usize,
    pub blobs: usize,
    pub bytes: u64,
}
