//! Container logs on disk: links in /var/log/containers, rotation, removal. The runtime writes the files.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use orlop_api::quantity::Amount;
use orlop_proto::cri::ReopenContainerLogRequest;

use crate::config::Config;
use crate::context::Context;
use crate::runtime::{Container, ObservedPod};

/// How often sizes are looked at.
const PERIOD: Duration = Duration::from_secs(10);

fn link_path(config: &Config, pod: &Pod, container: &str, id: &str) -> PathBuf {
    let m = &pod.metadata;
    let name = format!(
        "{}_{}_{container}-{id}.log",
        m.name.as_deref().unwrap_or_default(),
        m.namespace.as_deref().unwrap_or_default()
    );
    config.container_logs_dir.join(name)
}

/// Links a container's log under the name that log collectors look for.
pub fn link(config: &Config, pod: &Pod, container: &str, id: &str, log: &Path) {
    let path = link_path(config, pod, container, id);
    let made =
        fs::create_dir_all(&config.container_logs_dir).and_then(|()| std::os::unix::fs::symlink(log, &path));
    if let Err(e) = made
        && e.kind() != std::io::ErrorKind::AlreadyExists
    {
        tracing::warn!(link = %path.display(), error = %e, "log not linked");
    }
}

/// Removes a container's link.
pub fn unlink(config: &Config, pod: &Pod, container: &str, id: &str) {
    // It is only a link; one that stays dangles until the next collection.
    let _ = fs::remove_file(link_path(config, pod, container, id));
}

/// Removes log files and link of a container that the runtime has forgotten.
pub fn remove_of(config: &Config, pod: &ObservedPod, c: &Container) {
    let name = format!("{}_{}_{}-{}.log", pod.name, pod.namespace, c.name, c.id);
    let _ = fs::remove_file(config.container_logs_dir.join(name));
    for f in family(Path::new(&c.log_path)) {
        let _ = fs::remove_file(f);
    }
}

/// A log and what rotation made of it, oldest first; the log itself is last.
fn family(log: &Path) -> Vec<PathBuf> {
    let (Some(dir), Some(name)) = (log.parent(), log.file_name()) else { return Vec::new() };
    let prefix = format!("{}.", name.to_string_lossy());
    let mut rotated: Vec<PathBuf> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with(&prefix))
        .map(|e| e.path())
        .collect();
    // The suffix is a time, so names sort by age.
    rotated.sort();
    rotated.push(log.to_owned());
    rotated
}

/// Links whose log has gone.
pub fn sweep_links(config: &Config) {
    for e in fs::read_dir(&config.container_logs_dir).into_iter().flatten().flatten() {
        let ours = fs::read_link(e.path()).is_ok_and(|t| t.starts_with(&config.pod_logs_dir));
        if ours && !e.path().exists() {
            let _ = fs::remove_file(e.path());
        }
    }
}

/// Rotates logs until the agent stops: past the maximum size a log is renamed and the runtime reopens it, so that no
/// byte is lost.
pub async fn rotate(ctx: Context) {
    let k = &ctx.config.kubelet;
    let max = k.container_log_max_size.parse::<Amount>().map_or(10 << 20, Amount::units).max(1) as u64;
    let files = k.container_log_max_files.max(2) as usize;
    loop {
        tokio::time::sleep(PERIOD).await;
        for pod in ctx.pods.list() {
            let uid = pod.metadata.uid.as_deref().unwrap_or_default();
            let Some(observed) = ctx.pods.observed(uid) else { continue };
            for c in observed.running() {
                let log = Path::new(&c.log_path);
                if fs::metadata(log).is_ok_and(|m| m.len() > max) {
                    rotate_one(&ctx, &c.id, log, files).await;
                }
            }
        }
    }
}

async fn rotate_one(ctx: &Context, id: &str, log: &Path, files: usize) {
    let stamp = Timestamp::now().strftime("%Y%m%d-%H%M%S").to_string();
    let renamed = PathBuf::from(format!("{}.{stamp}", log.display()));
    if let Err(e) = fs::rename(log, &renamed) {
        tracing::warn!(log = %log.display(), error = %e, "log not rotated");
        return;
    }
    let reopened =
        ctx.cri.reopen_container_log(ReopenContainerLogRequest { container_id: id.to_owned() }).await;
    if let Err(e) = reopened {
        // The runtime still writes to the renamed file: take the rotation back so that readers follow on.
        let _ = fs::rename(&renamed, log);
        tracing::warn!(log = %log.display(), error = %e, "log not reopened");
        return;
    }
    let all = family(log);
    for old in all.iter().take(all.len().saturating_sub(files)) {
        let _ = fs::remove_file(old);
    }
}
