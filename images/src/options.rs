//! How a store behaves, and what callers pass per call.

use std::path::PathBuf;

/// Settings of an [`ImageStore`](crate::ImageStore).
#[derive(Clone, Debug)]
pub struct Options {
    /// containerd's registry configuration layout: `<certs_dir>/<host>/hosts.toml`. Read at each pull.
    pub certs_dir: Option<PathBuf>,
    /// A docker `config.json` with credentials, used when a pull brings none. Read at each pull.
    pub docker_config: Option<PathBuf>,
    /// Names of images that garbage collection must keep (the CRI `pinned` flag), such as the sandbox image.
    pub pinned: Vec<String>,
    /// Keep layers as transferred beside the unpacked ones, so that an export has the original digests. Costs the
    /// compressed size of every image.
    pub keep_layer_blobs: bool,
    /// Layers that are downloaded and unpacked at the same time, over all pulls.
    pub parallel_layers: usize,
    /// Answer a pull only when the disk holds all of it. Without, a power cut within about a second of the answer
    /// makes the next open drop the image, never serve a damaged one.
    pub sync_before_answer: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            certs_dir: Some(PathBuf::from("/etc/containerd/certs.d")),
            docker_config: None,
            pinned: Vec::new(),
            keep_layer_blobs: false,
            parallel_layers: 3,
            sync_before_answer: false,
        }
    }
}

/// Credentials for one pull (CRI `AuthConfig`).
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Auth {
    pub username: String,
    pub password: String,
    /// An OAuth2 refresh token; exchanged for an access token at the registry's token service.
    pub identity_token: String,
    /// A bearer token that is sent as it is.
    pub registry_token: String,
    /// When set, the credentials are used for this registry only.
    pub server_address: String,
}

/// Leaves the secrets out.
impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auth")
            .field("username", &self.username)
            .field("server_address", &self.server_address)
            .finish_non_exhaustive()
    }
}

/// How a container's root file system is mounted.
#[derive(Clone, Debug, Default)]
pub struct RootfsOptions {
    /// Mount only the image's layers, without a writable one. Mount points inside cannot be created then; a runtime
    /// that must create them wants a writable layer and a read-only remount of its own.
    pub readonly: bool,
    /// More overlayfs options, such as `metacopy=off`.
    pub extra: Vec<(String, String)>,
    /// The container's user namespace: files belong to the ids outside that stand for the image's owners.
    pub user_namespace: Option<UserNamespace>,
}

/// The mappings of a user namespace (`user_namespaces(7)`).
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct UserNamespace {
    pub uids: Vec<IdMapping>,
    pub gids: Vec<IdMapping>,
}

/// `length` ids from `container` inside are those from `host` outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct IdMapping {
    pub container: u32,
    pub host: u32,
    pub length: u32,
}
