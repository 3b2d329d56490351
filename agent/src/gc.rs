//! Collecting what nobody needs: pods that no source wants, their folders and cgroups, dangling links, unused images.

use std::collections::HashSet;
use std::time::Duration;

use orlop_proto::cri::{
    ImageFsInfoRequest, ListPodSandboxRequest, RemovePodSandboxRequest, StopPodSandboxRequest,
};

use crate::context::Context;
use crate::runtime::labels;
use crate::volumes;

const PERIOD: Duration = Duration::from_secs(60);
const IMAGES_EVERY: u32 = 5;

/// Runs until the agent stops. `synced` is when every source has given its pods: before that, nothing is an orphan.
pub async fn run(ctx: Context, synced: impl Future<Output = ()> + Send) -> Result<(), crate::Error> {
    let stop = ctx.tasks.stop_token();
    let work = async {
        synced.await;
        let mut round = 0u32;
        loop {
            orphans(&ctx).await;
            weigh_classes(&ctx).await;
            crate::logs::sweep_links(&ctx.config);
            if round.is_multiple_of(IMAGES_EVERY) {
                images(&ctx).await;
            }
            round = round.wrapping_add(1);
            tokio::time::sleep(PERIOD).await;
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = work => {}
    }
    Ok(())
}

/// Ends and removes sandboxes whose pod is not wanted, then folders and cgroups of pods that are not known at all.
async fn orphans(ctx: &Context) {
    let Ok(list) = ctx.cri.list_pod_sandbox(ListPodSandboxRequest { filter: None }).await else { return };
    let mut in_runtime = HashSet::new();
    for s in list.items {
        // Sandboxes of others (made by hand with crictl) have no such label.
        let Some(uid) = s.labels.get(labels::POD_UID) else { continue };
        in_runtime.insert(uid.clone());
        let by_kubernetes =
            s.annotations.contains_key("kubernetes.io/config.seen") || ctx.config.pod_dir(uid).exists();
        if ctx.pods.contains(uid) || !by_kubernetes {
            continue;
        }
        tracing::info!(%uid, sandbox = %s.id, "removing a sandbox whose pod is not wanted any more");
        stop_containers(ctx, &s.id).await;
        let stopped = ctx.cri.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: s.id.clone() }).await;
        if stopped.is_ok() {
            let _ = ctx.cri.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: s.id }).await;
        }
    }
    let mut leftovers: HashSet<String> = ctx.node.cgroups().pod_uids().into_iter().collect();
    for e in std::fs::read_dir(ctx.config.root_dir.join("pods")).into_iter().flatten().flatten() {
        leftovers.extend(e.file_name().into_string());
    }
    for uid in leftovers {
        if ctx.pods.contains(&uid) || in_runtime.contains(&uid) {
            continue;
        }
        ctx.node.cgroups().remove(&uid).await;
        let dir = ctx.config.pod_dir(&uid);
        ctx.users.release(&uid, &dir);
        let removed = volumes::blocking(move || {
            volumes::mounts::unmount_below(&dir)?;
            volumes::mounts::remove_tree(&dir)
        });
        if let Err(e) = removed.await {
            tracing::warn!(%uid, error = %orlop_base::telemetry::chain(&e), "folder of an orphaned pod not removed");
        }
    }
}

/// The cgroups above pods' weigh what the pods in them ask for; somebody may have changed or removed them.
async fn weigh_classes(ctx: &Context) {
    let pods = ctx.pods.list();
    let specs = pods.iter().filter(|p| !crate::pods::has_ended(p));
    let specs = specs.filter_map(|p| Some((p.metadata.uid.as_deref()?, p.spec.as_ref()?)));
    ctx.node.cgroups().count_all(specs);
    if let Err(e) = ctx.node.limit_pods(&ctx.config).await {
        tracing::warn!(error = %e, "pods' cgroups not limited");
    }
}

async fn stop_containers(ctx: &Context, sandbox: &str) {
    use orlop_proto::cri::{ContainerFilter, ListContainersRequest};
    let filter = ContainerFilter { pod_sandbox_id: sandbox.to_owned(), ..Default::default() };
    let Ok(list) = ctx.cri.list_containers(ListContainersRequest { filter: Some(filter) }).await else {
        return;
    };
    let stops = list.containers.iter().map(|c| {
        let grace = c.annotations.get(labels::POD_GRACE).and_then(|g| g.parse().ok()).unwrap_or(30);
        ctx.cri.stop_container(&c.id, grace)
    });
    futures::future::join_all(stops).await;
}

/// Images that were not used for long go; above the high threshold others, until the low one is reached.
async fn images(ctx: &Context) {
    let k = &ctx.config.kubelet;
    if !k.image_maximum_gc_age.is_zero() {
        ctx.images.collect(ctx, u64::MAX, k.image_maximum_gc_age).await;
    }
    let Ok(info) = ctx.cri.image_fs_info(ImageFsInfoRequest {}).await else { return };
    let Some(point) = info.image_filesystems.first().and_then(|f| f.fs_id.as_ref()) else { return };
    let Some((total, free, ..)) = crate::node::machine::file_system(std::path::Path::new(&point.mountpoint))
    else {
        return;
    };
    // A threshold of 100 % turns the collection off.
    if total == 0 || k.image_gc_high_threshold_percent >= 100 {
        return;
    }
    let used_percent = 100 - (free * 100 / total);
    if used_percent < u64::from(k.image_gc_high_threshold_percent) {
        return;
    }
    let wanted_free = total * u64::from(100 - k.image_gc_low_threshold_percent.min(100)) / 100;
    let want = wanted_free.saturating_sub(free);
    let won = ctx.images.collect(ctx, want, k.image_minimum_gc_age).await;
    if won < want {
        let message = format!(
            "Disk usage on image filesystem is at {used_percent}% which is over the high threshold ({}%). Failed to free sufficient space by deleting unused images (freed {won} bytes).",
            k.image_gc_high_threshold_percent
        );
        ctx.events.node_warning("FreeDiskSpaceFailed", message);
    }
}
