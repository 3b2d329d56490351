//! What ADD did, on disk, so that DEL and CHECK work after a restart and after the configuration changed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use orlop_base::durable;
use orlop_cni_types::NetworkConfig;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Error, PodNetwork};

const VERSION: u32 = 1;

/// One attachment. `result` is missing from the beginning of ADD until it succeeded.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub pod: PodNetwork,
    /// The network as it was when the pod was added.
    pub network: Value,
    pub result: Option<Value>,
}

impl Entry {
    pub(crate) fn network(&self) -> Option<NetworkConfig> {
        NetworkConfig::parse_list(self.network.to_string().as_bytes()).ok()
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Cache {
    dir: PathBuf,
}

impl Cache {
    pub(crate) fn new(dir: &Path) -> Cache {
        Cache { dir: dir.to_owned() }
    }

    /// Ids and interface names have no '/', and ids no ':', so that names cannot meet.
    fn path(&self, container_id: &str, ifname: &str) -> PathBuf {
        self.dir.join(format!("{container_id}:{ifname}.json"))
    }

    /// Not synced to disk: a network namespace does not outlive the kernel that a power cut ends.
    pub(crate) fn put(&self, entry: &Entry) -> Result<(), Error> {
        let failed = |source| Error::Cache { container_id: entry.pod.container_id.clone(), source };
        let path = self.path(&entry.pod.container_id, &entry.pod.ifname);
        match durable::append_json(&path, VERSION, entry) {
            Err(durable::Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(&self.dir).map_err(|source| {
                    failed(durable::Error::Io { what: "create", path: self.dir.clone(), source })
                })?;
                durable::append_json(&path, VERSION, entry).map_err(failed)
            }
            other => other.map_err(failed),
        }
    }

    /// A file that cannot be read counts as none: the plugins' DEL works without it.
    pub(crate) fn get(&self, container_id: &str, ifname: &str) -> Option<Entry> {
        let path = self.path(container_id, ifname);
        match durable::read_json(&path, VERSION) {
            Ok(entry) => entry,
            Err(e) => {
                tracing::warn!(path = %path.display(), "ignoring a network result: {e}");
                None
            }
        }
    }

    pub(crate) fn remove(&self, container_id: &str, ifname: &str) -> Result<(), Error> {
        let path = self.path(container_id, ifname);
        match fs::remove_file(&path).or_else(|e| match e.kind() {
            // Nothing of ours, and in the way of the next one.
            io::ErrorKind::IsADirectory => fs::remove_dir_all(&path),
            _ => Err(e),
        }) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Cache {
                container_id: container_id.to_owned(),
                source: durable::Error::Io { what: "remove", path, source },
            }),
            _ => Ok(()),
        }
    }

    /// Container and interface of all files.
    fn names(&self) -> Vec<(String, String)> {
        let Ok(entries) = fs::read_dir(&self.dir) else { return Vec::new() };
        entries
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .filter_map(|name| {
                let (id, ifname) = name.strip_suffix(".json")?.split_once(':')?;
                Some((id.to_owned(), ifname.to_owned()))
            })
            .collect()
    }

    /// All attachments on record.
    pub(crate) fn all(&self) -> Vec<Entry> {
        self.names().iter().filter_map(|(id, ifname)| self.get(id, ifname)).collect()
    }

    /// Fails when a later release wrote one of the files: what it says would be lost on DEL.
    pub(crate) fn check_version(&self) -> Result<(), Error> {
        for (container_id, ifname) in self.names() {
            let read = durable::read_json::<Entry>(&self.path(&container_id, &ifname), VERSION);
            if let Err(source @ durable::Error::Version { .. }) = read {
                return Err(Error::Later { container_id, source });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pods outlive the server that attached them, so nothing may become necessary that was not there then.
    #[test]
    fn what_the_first_release_wrote_is_read() {
        let entry: Entry = serde_json::from_str(
            r#"{"pod":{"container_id":"c","netns":"/n","ifname":"eth0","pod_name":"p","pod_namespace":"ns","pod_uid":"u"},
            "network":{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"one"}]},"result":null}"#,
        )
        .unwrap();
        assert_eq!((entry.pod.ifname.as_str(), entry.network().unwrap().name.as_str()), ("eth0", "net"));
    }
}
