//! Static pods: manifests in a folder, watched by inotify and read again now and then.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, Toleration};
use notify::{RecursiveMode, Watcher};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use super::mirror::HASH;
use crate::config_file::one_line;
use crate::context::Context;

/// How often a missing folder is looked for.
const MISSING: Duration = Duration::from_secs(1);
/// A manifest is often written in several steps; what follows within this time is read together.
const SETTLE: Duration = Duration::from_millis(50);

/// A manifest as a pod of this node. The uid is a hash of file and content: a changed manifest is another pod.
pub fn parse(path: &Path, text: &str, node: &str) -> Result<Pod, String> {
    let mut pod: Pod = serde_saphyr::from_str(text).map_err(|e| one_line(&e.to_string()))?;
    let spec = pod.spec.as_mut().ok_or("it has no spec")?;
    if spec.containers.is_empty() {
        return Err("spec.containers is empty".into());
    }
    if let Some(c) =
        spec.containers.iter().find(|c| c.name.is_empty() || c.image.as_deref().unwrap_or("").is_empty())
    {
        return Err(format!("container {:?} needs a name and an image", c.name));
    }
    let refers = spec.volumes.iter().flatten().any(|v| v.config_map.is_some() || v.secret.is_some())
        || spec.service_account_name.is_some();
    if refers {
        return Err("a static pod cannot refer to API objects (ConfigMap, Secret, ServiceAccount)".into());
    }
    let m = &mut pod.metadata;
    let name = m.name.clone().filter(|n| !n.is_empty()).ok_or("metadata.name is missing")?;
    let mut hash = Sha256::new();
    hash.update(path.to_string_lossy().as_bytes());
    hash.update(node.as_bytes());
    hash.update(text.as_bytes());
    let uid: String = hash.finalize()[..16].iter().map(|b| format!("{b:02x}")).collect();
    m.name = Some(format!("{name}-{}", node.to_lowercase()));
    m.namespace.get_or_insert_with(|| "default".into());
    m.uid = Some(uid.clone());
    m.generation = Some(1);
    let notes = m.annotations.get_or_insert_default();
    notes.insert("kubernetes.io/config.source".into(), "file".into());
    notes.insert(HASH.into(), uid);
    spec.node_name = Some(node.to_owned());
    spec.enable_service_links.get_or_insert(true);
    spec.restart_policy.get_or_insert_with(|| "Always".into());
    spec.termination_grace_period_seconds.get_or_insert(30);
    // Static pods stay on their node whatever its taints say.
    let everything = Toleration {
        operator: Some("Exists".into()),
        effect: Some("NoExecute".into()),
        ..Default::default()
    };
    let tolerations = spec.tolerations.get_or_insert_default();
    if !tolerations.contains(&everything) {
        tolerations.push(everything);
    }
    Ok(pod)
}

fn read_all(dir: &Path, node: &str) -> BTreeMap<PathBuf, Result<Pod, String>> {
    let mut all = BTreeMap::new();
    for e in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = e.path();
        let hidden = e.file_name().to_string_lossy().starts_with('.');
        if hidden || !path.is_file() {
            continue;
        }
        let pod = match std::fs::read_to_string(&path) {
            // A file that is being replaced is read with the next event.
            Err(e) => Err(e.to_string()),
            Ok(text) if text.trim().is_empty() => continue,
            Ok(text) => parse(&path, &text, node),
        };
        all.insert(path, pod);
    }
    all
}

/// Follows the folder until the agent stops. The folder may appear later.
pub async fn run(ctx: Context, dir: PathBuf) -> Result<(), crate::Error> {
    // One pending wake-up stands for any number of events.
    let (send, mut wake) = mpsc::channel(1);
    // Without inotify the channel stays open and quiet.
    let _open = send.clone();
    let on_event = move |_: notify::Result<notify::Event>| {
        let _ = send.try_send(());
    };
    let mut watcher = notify::recommended_watcher(on_event)
        .map_err(|e| tracing::warn!(error = %e, "no inotify; manifests are read every now and then"))
        .ok();
    let mut watching = false;
    let mut complaints: BTreeMap<PathBuf, String> = BTreeMap::new();
    let stop = ctx.tasks.stop_token();
    loop {
        if let (Some(w), false) = (&mut watcher, watching) {
            watching = w.watch(&dir, RecursiveMode::NonRecursive).is_ok();
        }
        watching = watching && dir.is_dir();
        let mut pods = Vec::new();
        let mut now_bad = BTreeMap::new();
        let from = dir.clone();
        let node = ctx.config.node_name.clone();
        let all = tokio::task::spawn_blocking(move || read_all(&from, &node)).await.unwrap_or_default();
        for (path, pod) in all {
            match pod {
                Ok(p) => pods.push(Arc::new(p)),
                Err(e) => {
                    if complaints.get(&path) != Some(&e) {
                        tracing::error!(manifest = %path.display(), error = %e, "static pod manifest is not usable; the others run");
                    }
                    now_bad.insert(path, e);
                }
            }
        }
        complaints = now_bad;
        ctx.pods.set_statics(&ctx, pods);
        // A folder that is not there yet cannot be watched.
        let period = if watching { ctx.config.kubelet.file_check_frequency } else { MISSING };
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            _ = wake.recv() => tokio::time::sleep(SETTLE).await,
            () = tokio::time::sleep(period) => {}
        }
        let _ = wake.try_recv();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manifests() {
        let good = "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec:\n  containers:\n  - {name: c, image: 'x:1'}\n";
        let p = parse(Path::new("/m/a.yaml"), good, "Node1").unwrap();
        assert_eq!(p.metadata.name.as_deref(), Some("web-node1"));
        assert_eq!(p.metadata.namespace.as_deref(), Some("default"));
        let again = parse(Path::new("/m/a.yaml"), good, "Node1").unwrap();
        assert_eq!(p.metadata.uid, again.metadata.uid);
        let other = parse(Path::new("/m/a.yaml"), &good.replace("x:1", "x:2"), "Node1").unwrap();
        assert_ne!(p.metadata.uid, other.metadata.uid);
        for bad in [
            "{",
            "kind: Pod\nmetadata: {name: a}\n",
            "metadata: {name: a}\nspec: {containers: []}\n",
            "metadata: {name: a}\nspec: {containers: [{name: c}]}\n",
        ] {
            let e = parse(Path::new("/m/b.yaml"), bad, "n").unwrap_err();
            assert!(!e.contains('\n'), "{e}");
        }
    }
}
