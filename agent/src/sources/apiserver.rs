//! Pods assigned to this node, from the API server's watch.

use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use orlop_api::meta::Key;
use orlop_client::{Change, Informer};

use super::mirror;
use crate::context::Context;
use crate::pods::is_mirror;

/// Starts the watch. Each change reaches the pod's worker from the watch's own task.
pub fn start(ctx: &Context, client: Client) -> Informer<Pod> {
    let api: Api<Pod> = Api::all(client);
    let on = ctx.clone();
    orlop_client::informer::Builder::new(api)
        .fields(&format!("spec.nodeName={}", ctx.config.node_name))
        .on_change(move |change| take(&on, change))
        .start(&ctx.tasks)
}

fn take(ctx: &Context, change: &Change<Pod>) {
    let pod = change.object();
    let key = Key::of(&pod.metadata);
    let gone = matches!(change, Change::Deleted(_));
    if is_mirror(pod) {
        let known = ctx.pods.set_mirror(&key, (!gone).then(|| pod.clone()));
        if !known && !gone {
            orphan_mirror(ctx, pod);
        }
        return;
    }
    // A pod deleted and made again under the same name within one relist.
    if let Change::Updated { old, new } = change
        && old.metadata.uid != new.metadata.uid
        && !is_mirror(old)
    {
        ctx.pods.remove(old.metadata.uid.as_deref().unwrap_or_default());
    }
    if gone {
        ctx.pods.remove(pod.metadata.uid.as_deref().unwrap_or_default());
    } else {
        ctx.pods.apply(ctx, pod.clone());
    }
}

/// The mirror of a manifest that is no longer there, once the manifests have been read.
fn orphan_mirror(ctx: &Context, pod: &std::sync::Arc<Pod>) {
    let (ctx, pod) = (ctx.clone(), pod.clone());
    let Some(client) = ctx.client.clone() else { return };
    let tasks = ctx.tasks.clone();
    tasks.spawn(async move {
        ctx.pods.statics_read().await;
        let key = Key::of(&pod.metadata);
        if ctx.pods.has_static(&key) {
            return;
        }
        let api: Api<Pod> = Api::namespaced(client, &key.namespace);
        if let Err(e) = mirror::remove(&api, &pod).await {
            tracing::warn!(pod = %key, error = %e, "orphaned mirror pod not deleted");
        }
    });
}
