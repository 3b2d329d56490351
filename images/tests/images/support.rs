//! A registry on loopback, images made by hand, and a client that pushes them.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::Full;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use orlop_base::durable;
use orlop_base::testkit::{DockerRegistry, free_port, wait_until};
use orlop_images::{Digest, Error, ImageStore, Options};
use serde_json::{Value, json};

/// For what must come; a loaded machine takes its time.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Debian's docker-registry with its own folder; ends with the test.
pub struct Registry {
    pub address: String,
    pub dir: tempfile::TempDir,
    _server: DockerRegistry,
    client: Client<HttpConnector, Full<Bytes>>,
}

/// An address where nobody listens until the caller does.
pub fn own_address() -> String {
    format!("127.0.0.1:{}", free_port())
}

impl Registry {
    pub async fn start() -> Registry {
        let dir = tempfile::Builder::new().prefix("images-registry-").tempdir().unwrap();
        let server = DockerRegistry::start(dir.path());
        let client = Client::builder(TokioExecutor::new()).build_http();
        Registry { address: server.address.clone(), dir, _server: server, client }
    }

    async fn try_send(
        &self,
        method: Method,
        path: &str,
        kind: &str,
        body: Bytes,
    ) -> Option<(StatusCode, String)> {
        let uri =
            if path.starts_with('/') { format!("http://{}{path}", self.address) } else { path.to_owned() };
        let request = Request::builder()
            .method(method)
            .uri(uri)
            .header("content-type", kind)
            .body(Full::new(body))
            .unwrap();
        let response = self.client.request(request).await.ok()?;
        let location = response.headers().get("location").map(|l| l.to_str().unwrap().to_owned());
        Some((response.status(), location.unwrap_or_default()))
    }

    async fn send(&self, method: Method, path: &str, kind: &str, body: Bytes) -> String {
        let (status, location) = self.try_send(method, path, kind, body).await.expect("the registry answers");
        assert!(status.is_success(), "{path}: {status}");
        location
    }

    pub async fn push_blob(&self, name: &str, blob: &[u8]) -> Digest {
        let digest = Digest::of(blob);
        let location =
            self.send(Method::POST, &format!("/v2/{name}/blobs/uploads/"), "text/plain", Bytes::new()).await;
        let separator = if location.contains('?') { '&' } else { '?' };
        let to = format!("{location}{separator}digest={digest}");
        self.send(Method::PUT, &to, "application/octet-stream", Bytes::copy_from_slice(blob)).await;
        digest
    }

    pub async fn push_manifest(&self, name: &str, tag: &str, manifest: &Value) -> Digest {
        let bytes = manifest.to_string().into_bytes();
        let kind = manifest["mediaType"].as_str().unwrap();
        let digest = Digest::of(&bytes);
        self.send(Method::PUT, &format!("/v2/{name}/manifests/{tag}"), kind, bytes.into()).await;
        digest
    }

    /// Pushes an image of these layers; gives the manifest's digest.
    pub async fn push(&self, name: &str, tag: &str, layers: &[Blob]) -> Digest {
        let config = config(layers);
        self.push_blob(name, &config).await;
        for layer in layers {
            self.push_blob(name, &layer.bytes).await;
        }
        self.push_manifest(name, tag, &manifest(&config, layers)).await
    }

    /// Where the registry keeps a blob.
    pub fn blob_file(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        self.dir.path().join(format!("registry/docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]))
    }
}

/// A layer as transferred.
#[derive(Clone)]
pub struct Blob {
    pub bytes: Vec<u8>,
    /// Of `bytes`.
    pub digest: Digest,
    pub diff: Digest,
    pub kind: &'static str,
}

impl Blob {
    fn new(bytes: Vec<u8>, tar: &[u8], kind: &'static str) -> Blob {
        Blob { digest: Digest::of(&bytes), diff: Digest::of(tar), bytes, kind }
    }
}

pub fn gzip(tar: Vec<u8>) -> Blob {
    gzip_level(tar, 1)
}

pub fn gzip_level(tar: Vec<u8>, level: u32) -> Blob {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(level));
    out.write_all(&tar).unwrap();
    Blob::new(out.finish().unwrap(), &tar, "application/vnd.oci.image.layer.v1.tar+gzip")
}

pub fn zstd(tar: Vec<u8>) -> Blob {
    Blob::new(zstd::encode_all(&tar[..], 1).unwrap(), &tar, "application/vnd.oci.image.layer.v1.tar+zstd")
}

pub fn plain(tar: Vec<u8>) -> Blob {
    Blob::new(tar.clone(), &tar, "application/vnd.oci.image.layer.v1.tar")
}

/// A tar of files; a name with a slash at the end is a folder.
pub fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = tar::Builder::new(Vec::new());
    for (name, data) in files {
        let mut h = tar::Header::new_gnu();
        h.set_mode(if name.ends_with('/') { 0o755 } else { 0o644 });
        if name.ends_with('/') {
            h.set_entry_type(tar::EntryType::Directory);
        }
        h.set_size(data.len() as u64);
        h.set_mtime(1_000_000_000);
        out.append_data(&mut h, name, *data).unwrap();
    }
    out.into_inner().unwrap()
}

fn arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

pub fn config(layers: &[Blob]) -> Vec<u8> {
    json!({
        "architecture": arch(),
        "os": "linux",
        "config": {"Env": ["A=b"], "Entrypoint": ["/bin/run"]},
        "rootfs": {"type": "layers", "diff_ids": layers.iter().map(|l| l.diff.to_string()).collect::<Vec<_>>()},
    })
    .to_string()
    .into_bytes()
}

pub fn manifest(config: &[u8], layers: &[Blob]) -> Value {
    let layers: Vec<_> = layers
        .iter()
        .map(|l| json!({"mediaType": l.kind, "digest": l.digest, "size": l.bytes.len()}))
        .collect();
    json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": Digest::of(config),
            "size": config.len(),
        },
        "layers": layers,
    })
}

/// An index with an entry for another machine first.
pub fn index(manifest: &Value) -> Value {
    let bytes = manifest.to_string();
    let entry = |arch: &str, digest: Digest| {
        json!({
            "mediaType": manifest["mediaType"],
            "digest": digest,
            "size": bytes.len(),
            "platform": {"os": "linux", "architecture": arch},
        })
    };
    json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry("s390x", Digest::of(bytes.as_bytes())), entry(arch(), Digest::of(bytes.as_bytes()))],
    })
}

/// A store in a folder of its own, and a folder for mounts; what is still mounted goes with it.
pub struct Place {
    pub dir: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Place {
        Place { dir: tempfile::Builder::new().prefix("images-store-").tempdir().unwrap() }
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    pub fn target(&self, name: &str) -> PathBuf {
        self.dir.path().join("mnt").join(name)
    }

    pub async fn open(&self) -> ImageStore {
        self.open_with(Options::default()).await
    }

    pub async fn open_with(&self, options: Options) -> ImageStore {
        let options = Options { certs_dir: None, ..options };
        // A store that was dropped just now may still be putting layers on disk, but it does not hold the lock; a process that
        // another test is just starting may, until its exec.
        wait_until("the store opens", PATIENCE, || async {
            match ImageStore::open(&self.root(), options.clone()).await {
                Err(Error::State(e)) if matches!(*e, durable::Error::Locked { .. }) => None,
                other => Some(other.unwrap()),
            }
        })
        .await
    }

    pub fn count(&self, folder: &str) -> usize {
        std::fs::read_dir(self.root().join(folder)).unwrap().count()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let dir = self.dir.path().to_string_lossy().into_owned();
        for target in mounts.lines().filter_map(|l| l.split(' ').nth(1)).filter(|t| t.starts_with(&dir)) {
            let _ = rustix::mount::unmount(target, rustix::mount::UnmountFlags::DETACH);
        }
        // A store that was dropped just now may still be writing: a file that appears while its folder is emptied keeps the folder.
        for _ in 0..100 {
            match std::fs::remove_dir_all(self.dir.path()) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
                _ => break,
            }
        }
    }
}

pub fn mounted(target: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    mounts.lines().any(|l| l.split(' ').nth(1) == target.to_str())
}
