//! Deletes pods that nobody will: those of nodes that are gone, those that were deleted before they had a node, and the
//! oldest ended ones beyond a limit.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use orlop_api::meta::{Key, is_terminating};
use orlop_api::pod::is_finished;
use orlop_client::{Change, Outcome, Queue};

use crate::runtime::{BY_NODE, Builders, Context, ReconcileError, Result, unless_gone};

/// Upstream's --terminated-pod-gc-threshold.
const ENDED_PODS: usize = 12_500;
/// A node that has just gone may be coming back under the same name.
const QUARANTINE: Duration = Duration::from_secs(40);
const PERIOD: Duration = Duration::from_secs(20);

pub(crate) struct Controller {
    nodes: Queue<String>,
    sweep: Queue<()>,
}

impl Controller {
    pub fn new(b: &mut Builders) -> Controller {
        let nodes = Queue::default();
        let q = nodes.clone();
        b.nodes.add_handler(move |c: &Change<Node>| {
            if let Change::Deleted(n) = c {
                q.add_after(n.metadata.name.clone().unwrap_or_default(), QUARANTINE);
            }
        });
        Controller { nodes, sweep: Queue::default() }
    }

    pub fn start(self, context: &Context) {
        // Pods of nodes that went while nobody looked.
        for pod in context.informers.pods.list() {
            if let Some(node) = pod.spec.as_ref().and_then(|s| s.node_name.clone())
                && context.informers.nodes.get(&Key::new("", &*node)).is_none()
            {
                self.nodes.add_after(node, QUARANTINE);
            }
        }
        let ctx = context.clone();
        self.nodes.run(&context.tasks, "pod-garbage-collector", 1, move |n| orphaned(ctx.clone(), n));
        let ctx = context.clone();
        self.sweep.run(&context.tasks, "pod-garbage-collector sweep", 1, move |()| sweep(ctx.clone()));
        self.sweep.add_after((), PERIOD);
    }
}

async fn delete(ctx: &Context, pod: &Pod, fail: bool) -> Result<()> {
    let key = Key::of(&pod.metadata);
    let api: Api<Pod> = Api::namespaced(ctx.client.clone(), &key.namespace);
    if fail && !is_finished(pod) {
        let patch = serde_json::json!({"metadata": {"uid": pod.metadata.uid}, "status": {"phase": "Failed", "conditions": [{
            "type": "DisruptionTarget", "status": "True", "reason": "DeletionByPodGC",
            "message": "PodGC: node no longer exists", "lastTransitionTime": jiff::Timestamp::now()}]}});
        unless_gone(api.patch_status(&key.name, &PatchParams::default(), &Patch::Strategic(&patch)).await)?;
    }
    unless_gone(api.delete(&key.name, &DeleteParams::default().grace_period(0)).await)?;
    Ok(())
}

async fn orphaned(ctx: Context, node: String) -> Result {
    let nodes: Api<Node> = Api::all(ctx.client.clone());
    if nodes.get_opt(&node).await?.is_some() {
        return Ok(Outcome::Done);
    }
    for pod in ctx.informers.pods.by_index(BY_NODE, &node) {
        delete(&ctx, &pod, true).await?;
    }
    // Static pods' mirrors and late arrivals.
    let left = !ctx.informers.pods.by_index(BY_NODE, &node).is_empty();
    Ok(if left { Outcome::After(PERIOD) } else { Outcome::Done })
}

async fn sweep(ctx: Context) -> Result {
    let pods = ctx.informers.pods.list();
    let unscheduled = |p: &Pod| p.spec.as_ref().is_none_or(|s| s.node_name.is_none());
    for pod in pods.iter().filter(|p| is_terminating(&p.metadata) && unscheduled(p)) {
        delete(&ctx, pod, false).await?;
    }
    let mut ended: Vec<_> = pods.iter().filter(|p| is_finished(p) && !is_terminating(&p.metadata)).collect();
    if ended.len() > ENDED_PODS {
        ended.sort_by_key(|p| p.metadata.creation_timestamp.as_ref().map(|t| t.0));
        for pod in &ended[..ended.len() - ENDED_PODS] {
            delete(&ctx, pod, false).await?;
        }
    }
    Ok::<_, ReconcileError>(Outcome::After(PERIOD))
}
