//! Who else attaches pods to this machine's networks. GC tells a plugin which attachments are valid and thereby to tear down all
//! others, so those of another runtime that uses the same network must be among the valid ones: a plugin keeps them
//! all in one place, and the specification leaves it to runtimes not to hurt each other.

use std::collections::BTreeSet;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};

use orlop_base::durable;
use orlop_cni_types::Attachment;
use serde::Deserialize;

use crate::cache::Cache;

/// Where traces of other runtimes are.
#[derive(Clone, Debug, Default)]
pub struct Neighbours {
    /// A folder of the whole machine in which each server writes down where its cache is, once per network:
    /// `<registry>/<network>/<hash>`. Should not outlive a reboot.
    pub registry: Option<PathBuf>,
    /// Folder of runtimes built on libcni, which keep `results/<network>-<container>-<interface>` in it: `/var/lib/cni`.
    pub libcni: Option<PathBuf>,
}

/// What matters of a result that libcni keeps.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LibcniResult {
    container_id: String,
    if_name: String,
    network_name: String,
}

/// A folder's files; a missing folder has none.
fn files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|e| e.map(|e| e.path())).collect(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

impl Neighbours {
    fn own(&self, network: &str, cache: &Path) -> Option<PathBuf> {
        let mut hash = DefaultHasher::new();
        cache.hash(&mut hash);
        Some(self.registry.as_ref()?.join(network).join(format!("{:016x}", hash.finish())))
    }

    /// Says that the attachments in `cache` may use `network`. Before the first of them is made.
    pub(crate) fn join(&self, network: &str, cache: &Path) -> Result<(), durable::Error> {
        let Some(file) = self.own(network, cache).filter(|f| !f.exists()) else { return Ok(()) };
        if let Some(dir) = file.parent() {
            let failed = |source| durable::Error::Io { what: "create", path: dir.to_owned(), source };
            fs::create_dir_all(dir).map_err(failed)?;
        }
        let text = cache.to_string_lossy();
        durable::write_atomic(&file, text.as_bytes(), 0o644, durable::Sync::PageCache)
    }

    /// Takes back every [`Neighbours::join`] of `cache`, and of caches that were deleted without saying so. What cannot be removed
    /// is found stale later.
    pub(crate) fn leave(&self, cache: &Path) {
        let Some(registry) = &self.registry else { return };
        for dir in files(registry).unwrap_or_default() {
            let network = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let own = self.own(&network, cache);
            for file in files(&dir).unwrap_or_default() {
                let gone = || fs::read_to_string(&file).is_ok_and(|theirs| !Path::new(&theirs).exists());
                if Some(&file) == own.as_ref() || gone() {
                    let _ = fs::remove_file(&file);
                }
            }
            // Fails while another is in it.
            let _ = fs::remove_dir(&dir);
        }
        let _ = fs::remove_dir(registry);
    }

    /// What others than `cache` have attached to `network`.
    ///
    /// # Errors
    /// When a record cannot be read: then nobody knows what must be kept.
    pub(crate) fn attachments(&self, network: &str, cache: &Path) -> io::Result<BTreeSet<Attachment>> {
        let mut out = BTreeSet::new();
        if let Some(registry) = &self.registry {
            for file in files(&registry.join(network))? {
                let theirs = PathBuf::from(fs::read_to_string(&file)?);
                if theirs == cache {
                    continue;
                }
                if !theirs.exists() {
                    // Removed with all that it was about.
                    let _ = fs::remove_file(&file);
                    continue;
                }
                for entry in Cache::new(&theirs).all() {
                    if entry.network.get("name").and_then(|n| n.as_str()) == Some(network) {
                        out.insert(Attachment {
                            container_id: entry.pod.container_id,
                            ifname: entry.pod.ifname,
                        });
                    }
                }
            }
        }
        if let Some(libcni) = &self.libcni {
            let begin = format!("{network}-");
            for file in files(&libcni.join("results"))? {
                if !file.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&begin)) {
                    continue;
                }
                let result: LibcniResult = serde_json::from_slice(&fs::read(&file)?)
                    .map_err(|e| io::Error::other(format!("{}: {e}", file.display())))?;
                if result.network_name == network {
                    out.insert(Attachment { container_id: result.container_id, ifname: result.if_name });
                }
            }
        }
        Ok(out)
    }
}
