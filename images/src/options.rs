//! How a store behaves, and what callers pass per call.

use std::path::PathBuf;
use std::time::Duration;

/// Settings of an [`ImageStore`](crate::ImageStore).
#[derive(Clone, Debug)]
pub struct Options {
    /// containerd's registry configuration layout: `<certs_dir>/<host>/hosts.toml`. Read at each pull.
    pub certs_dir: Option<PathBuf>,
    /// A docker `config.json` with credentials, used when a pull brings none. Read at each pull.
    pub docker_config: Option<PathBuf>,
    /// Programs that are asked before a pull whether the image may be used, as containerd's `bindir` image verifier asks them:
    /// every file of this folder; one that is not executable, or a link to nothing, fails every pull, folders are passed over.
    /// They are looked for at each pull.
    pub verifiers_dir: Option<PathBuf>,
    /// Names of images that garbage collection must keep (the CRI `pinned` flag), such as the sandbox image. Of one with tag and
    /// digest the digest counts.
    pub pinned: Vec<String>,
    /// Keep layers as transferred beside the unpacked ones, so that an export has the original digests. Costs the
    /// compressed size of every image.
    pub keep_layer_blobs: bool,
    /// Layers that are downloaded and unpacked at the same time, over all pulls; up to five more where a pull has none otherwise.
    pub parallel_layers: usize,
    /// Answer a pull only when the disk holds all of it. Without, a power cut within about a second of the answer
    /// makes the next open drop the image, never serve a damaged one.
    pub sync_before_answer: bool,
    /// How long a registry may keep a request waiting, or send next to nothing, before the transfer counts as broken
    /// off. A broken transfer goes on where it was.
    pub patience: Duration,
    /// The first pause before a request is tried again; later ones are up to a hundred times as long.
    pub pause: Duration,
    /// How long a registry that has begun to send a layer may be away.
    pub outage: Duration,
    /// How long the finished layers of a pull that failed are kept for another try.
    pub keep_unfinished: Duration,
    pub proxies: Proxies,
}

/// Proxies between this machine and registries. Loopback addresses are never asked for through one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proxies {
    /// `http://[user:password@]host:port` for registries without TLS.
    pub http: Option<String>,
    /// The same for registries with TLS, which the proxy only connects to.
    pub https: Option<String>,
    /// Hosts that are reached directly, separated by commas: names, `.domain`, addresses, networks, each with an
    /// optional port; `*` means all.
    pub no: String,
}

impl Proxies {
    /// What the usual variables say (`HTTP_PROXY`, `HTTPS_PROXY`, `NO_PROXY`, or in lower case).
    pub fn from_env() -> Proxies {
        let get = |name: &str| {
            let value = std::env::var(name).or_else(|_| std::env::var(name.to_ascii_lowercase()));
            value.ok().filter(|v| !v.is_empty())
        };
        Proxies {
            http: get("HTTP_PROXY"),
            https: get("HTTPS_PROXY"),
            no: get("NO_PROXY").unwrap_or_default(),
        }
    }
}

impl Default for Options {
    fn default() -> Self {
        Options {
            certs_dir: Some(PathBuf::from("/etc/containerd/certs.d")),
            docker_config: None,
            verifiers_dir: None,
            pinned: Vec::new(),
            keep_layer_blobs: false,
            parallel_layers: 3,
            sync_before_answer: false,
            patience: Duration::from_secs(30),
            pause: Duration::from_millis(100),
            outage: Duration::from_secs(300),
            keep_unfinished: Duration::from_secs(600),
            proxies: Proxies::default(),
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
    /// Files and folders that containers mount over (`/proc`, `/etc/hosts`, …) are there, empty, where the image has none: the
    /// runtime need not make them in the writable layer of each container.
    pub mount_points: bool,
    /// More overlayfs options, such as `metacopy=off` or `context=` with an SELinux label.
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
