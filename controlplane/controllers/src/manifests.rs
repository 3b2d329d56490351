//! Applies the manifests of a folder, and again when a file changes. A broken file is reported and holds up no other.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::discovery::{Scope, pinned_kind};
use notify::{RecursiveMode, Watcher};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use crate::runtime::Context;

/// How often a folder that is not there is looked for, and a manifest that was not applied is tried again.
const RETRY: Duration = Duration::from_secs(2);
/// How often all is read again, should an event be lost.
const PERIOD: Duration = Duration::from_secs(60);
/// A file is often written in several steps; what follows within this time is read together.
const SETTLE: Duration = Duration::from_millis(50);
const MANAGER: &str = "orlop-manifests";

/// Why a file was not applied.
#[derive(Debug, thiserror::Error)]
enum ManifestError {
    #[error("cannot read {path}", path = path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}, document {document}: {message}", path = path.display())]
    Document { path: PathBuf, document: usize, message: String },
    #[error("{path}: {object}", path = path.display())]
    Apply { path: PathBuf, object: String, source: Box<kube::Error> },
}

pub(crate) fn start(context: &Context, dir: PathBuf) {
    let (ctx, stop) = (context.clone(), context.tasks.stop_token());
    context.tasks.spawn(async move {
        let mut applied: HashMap<PathBuf, [u8; 32]> = HashMap::new();
        let mut reported: HashMap<PathBuf, String> = HashMap::new();
        let mut watch = FolderWatch::new();
        loop {
            let watching = watch.follow(&dir);
            let mut all_applied = true;
            for path in files(&dir) {
                match apply_if_changed(&ctx, &path, &mut applied).await {
                    Ok(()) => drop(reported.remove(&path)),
                    Err(e) => {
                        all_applied = false;
                        let text = orlop_base::telemetry::chain(&e);
                        if reported.get(&path) != Some(&text) {
                            tracing::error!(error = %text, "manifest not applied, trying again");
                            reported.insert(path, text);
                        }
                    }
                }
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(if watching && all_applied { PERIOD } else { RETRY }) => {}
                () = watch.changed() => {}
            }
        }
    });
}

/// Wakes when something changes in a folder, which may appear later.
struct FolderWatch {
    watcher: Option<notify::RecommendedWatcher>,
    following: bool,
    wake: mpsc::Receiver<()>,
}

impl FolderWatch {
    fn new() -> FolderWatch {
        // One pending wake-up stands for any number of events.
        let (send, wake) = mpsc::channel(1);
        let on_event = move |e: notify::Result<notify::Event>| {
            // Reading the files must not wake us to read them again.
            if !e.is_ok_and(|e| e.kind.is_access()) {
                let _ = send.try_send(());
            }
        };
        let watcher = notify::recommended_watcher(on_event)
            .map_err(|e| tracing::warn!(error = %e, "no inotify; manifests are read every now and then"));
        FolderWatch { watcher: watcher.ok(), following: false, wake }
    }

    /// Whether changes will be seen.
    fn follow(&mut self, dir: &Path) -> bool {
        let there = dir.is_dir();
        if let (Some(w), false, true) = (&mut self.watcher, self.following, there) {
            self.following = w.watch(dir, RecursiveMode::NonRecursive).is_ok();
        }
        self.following &= there;
        self.following
    }

    /// Cancel-safe where the folder is read after it, whatever came first.
    async fn changed(&mut self) {
        if self.wake.recv().await.is_none() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(SETTLE).await;
        let _ = self.wake.try_recv();
    }
}

/// The YAML and JSON files of the folder by name; a folder that is not there has none.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|x| x == "yaml" || x == "yml" || x == "json"))
        .collect();
    all.sort();
    all
}

async fn apply_if_changed(
    ctx: &Context,
    path: &Path,
    applied: &mut HashMap<PathBuf, [u8; 32]>,
) -> Result<(), ManifestError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ManifestError::Read { path: path.to_owned(), source })?;
    let hash: [u8; 32] = Sha256::digest(text.as_bytes()).into();
    if applied.get(path) == Some(&hash) {
        return Ok(());
    }
    for object in parse(path, &text)? {
        let name = format!(
            "{} {}",
            object.types.as_ref().map(|t| t.kind.as_str()).unwrap_or_default(),
            object.metadata.name.as_deref().unwrap_or_default()
        );
        apply(ctx, &object).await.map_err(|e| ManifestError::Apply {
            path: path.to_owned(),
            object: name,
            source: Box::new(e),
        })?;
    }
    tracing::info!(path = %path.display(), "manifest applied");
    applied.insert(path.to_owned(), hash);
    Ok(())
}

fn parse(path: &Path, text: &str) -> Result<Vec<DynamicObject>, ManifestError> {
    let bad =
        |document, message: String| ManifestError::Document { path: path.to_owned(), document, message };
    let documents: Vec<serde_json::Value> =
        serde_saphyr::from_multiple(text).map_err(|e| bad(0, e.to_string().replace('\n', " ")))?;
    let mut objects = Vec::new();
    for (i, v) in documents.into_iter().enumerate() {
        if v.is_null() {
            continue;
        }
        let o = DynamicObject::deserialize(v).map_err(|e| bad(i + 1, e.to_string()))?;
        if o.types.is_none() || o.metadata.name.is_none() {
            return Err(bad(i + 1, "apiVersion, kind and metadata.name are needed".into()));
        }
        objects.push(o);
    }
    Ok(objects)
}

async fn apply(ctx: &Context, object: &DynamicObject) -> Result<(), kube::Error> {
    let Some(types) = &object.types else { return Ok(()) };
    let (group, version) = types.api_version.split_once('/').unwrap_or(("", &types.api_version));
    let (resource, caps) =
        pinned_kind(&ctx.client, &GroupVersionKind::gvk(group, version, &types.kind)).await?;
    let namespace = object.metadata.namespace.as_deref().unwrap_or("default");
    let api: Api<DynamicObject> = match caps.scope {
        Scope::Namespaced => Api::namespaced_with(ctx.client.clone(), namespace, &resource),
        Scope::Cluster => Api::all_with(ctx.client.clone(), &resource),
    };
    let name = object.metadata.name.as_deref().unwrap_or_default();
    api.patch(name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(object)).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_folder_that_appears_is_followed() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("manifests");
        let mut watch = FolderWatch::new();
        assert!(!watch.follow(&dir));
        std::fs::create_dir(&dir).unwrap();
        assert!(watch.follow(&dir));
        std::fs::write(dir.join("a.yaml"), "a").unwrap();
        watch.changed().await;
        std::fs::rename(dir.join("a.yaml"), dir.join("b.yaml")).unwrap();
        watch.changed().await;
    }

    #[test]
    fn documents_are_read_one_by_one_and_errors_say_where() {
        let p = Path::new("x.yaml");
        let ok = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: a\n---\napiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: b\n";
        assert_eq!(parse(p, ok).unwrap().len(), 2);
        let e = parse(p, "apiVersion: v1\nkind: Namespace\nmetadata: {}\n").unwrap_err().to_string();
        assert!(e.starts_with("x.yaml, document 1:"), "{e}");
        assert!(parse(p, "a: [").is_err());
    }
}
