//! Deletes pods from nodes whose NoExecute taints they do not tolerate, after the time for which they tolerate them.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod, Taint, Toleration};
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use orlop_api::meta::{Key, is_terminating};
use orlop_api::taints::tolerates;
use orlop_client::{Change, Outcome, Queue};

use crate::runtime::{BY_NODE, Builders, Context, ReconcileError, Result, unless_gone};

pub(crate) struct Controller {
    pods: Queue<Key>,
    nodes: Queue<String>,
}

impl Controller {
    pub fn new(b: &mut Builders) -> Controller {
        let (pods, nodes) = (Queue::default(), Queue::default());
        let q = pods.clone();
        b.pods.add_handler(move |c: &Change<Pod>| {
            let placed = |p: &Pod| p.spec.as_ref().and_then(|s| s.node_name.clone());
            let tolerations = |p: &Pod| p.spec.as_ref().and_then(|s| s.tolerations.clone());
            let matters = match c {
                Change::Added(p) => placed(p).is_some(),
                Change::Updated { old, new } => {
                    placed(old) != placed(new) || tolerations(old) != tolerations(new)
                }
                Change::Deleted(_) => false,
            };
            if matters {
                q.add(Key::of(&c.object().metadata));
            }
        });
        let q = nodes.clone();
        b.nodes.add_handler(move |c: &Change<Node>| {
            let taints = |n: &Node| n.spec.as_ref().and_then(|s| s.taints.clone());
            if !matches!(c, Change::Updated { old, new } if taints(old) == taints(new)) {
                q.add(c.object().metadata.name.clone().unwrap_or_default());
            }
        });
        Controller { pods, nodes }
    }

    pub fn start(self, context: &Context) {
        let ctx = context.clone();
        self.pods.run(&context.tasks, "taint-eviction", 4, move |k| reconcile(ctx.clone(), k));
        let (informers, pods) = (context.informers.clone(), self.pods.clone());
        self.nodes.run(&context.tasks, "taint-eviction nodes", 1, move |node: String| {
            for p in informers.pods.by_index(BY_NODE, &node) {
                pods.add(Key::of(&p.metadata));
            }
            async { Ok::<_, ReconcileError>(Outcome::Done) }
        });
    }
}

/// When a pod has to go.
#[derive(Debug, PartialEq)]
enum Verdict {
    Stays,
    Goes,
    GoesAt(Timestamp),
}

fn verdict(taints: &[Taint], tolerations: &[Toleration], now: Timestamp) -> Verdict {
    let mut earliest: Option<Timestamp> = None;
    for taint in taints.iter().filter(|t| t.effect == "NoExecute") {
        let matching: Vec<&Toleration> = tolerations.iter().filter(|t| tolerates(t, taint)).collect();
        if matching.is_empty() {
            return Verdict::Goes;
        }
        // The shortest of the matching tolerations counts; one without a time lasts for ever.
        if let Some(seconds) = matching.iter().filter_map(|t| t.toleration_seconds).min() {
            let since = taint.time_added.as_ref().map(|t| t.0).unwrap_or(now);
            let at =
                since.checked_add(jiff::SignedDuration::from_secs(seconds.max(0))).unwrap_or(Timestamp::MAX);
            earliest = Some(earliest.map_or(at, |e| e.min(at)));
        }
    }
    match earliest {
        None => Verdict::Stays,
        Some(at) if at <= now => Verdict::Goes,
        Some(at) => Verdict::GoesAt(at),
    }
}

async fn reconcile(ctx: Context, key: Key) -> Result {
    let Some(pod) = ctx.informers.pods.get(&key) else { return Ok(Outcome::Done) };
    let Some(spec) = pod.spec.as_ref() else { return Ok(Outcome::Done) };
    let Some(node) = spec.node_name.as_ref().and_then(|n| ctx.informers.nodes.get(&Key::new("", &**n)))
    else {
        return Ok(Outcome::Done);
    };
    if is_terminating(&pod.metadata) {
        return Ok(Outcome::Done);
    }
    let taints = node.spec.as_ref().and_then(|s| s.taints.as_deref()).unwrap_or_default();
    let now = Timestamp::now();
    match verdict(taints, spec.tolerations.as_deref().unwrap_or_default(), now) {
        Verdict::Stays => return Ok(Outcome::Done),
        Verdict::GoesAt(at) => {
            let wait = Duration::try_from(at.duration_since(now)).unwrap_or(Duration::from_secs(1));
            return Ok(Outcome::After(wait));
        }
        Verdict::Goes => {}
    }
    ctx.recorder.normal(
        orlop_client::events::reference(&*pod),
        "TaintManagerEviction",
        format!("Marking for deletion Pod {key}"),
    );
    let api: Api<Pod> = Api::namespaced(ctx.client.clone(), &key.namespace);
    let patch = serde_json::json!({"metadata": {"uid": pod.metadata.uid}, "status": {"conditions": [{
        "type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager",
        "message": "Taint manager: deleting due to NoExecute taint", "lastTransitionTime": now}]}});
    unless_gone(api.patch_status(&key.name, &PatchParams::default(), &Patch::Strategic(&patch)).await)?;
    let preconditions = Some(Preconditions { uid: pod.metadata.uid.clone(), resource_version: None });
    let dp = DeleteParams { preconditions, ..Default::default() };
    unless_gone(api.delete(&key.name, &dp).await)?;
    Ok(Outcome::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_toleration_counts() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let later: Timestamp = "2026-01-01T00:05:00Z".parse().unwrap();
        let taint = |key: &str| Taint {
            key: key.into(),
            effect: "NoExecute".into(),
            time_added: Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now)),
            value: None,
        };
        let tol = |key: &str, seconds: Option<i64>| Toleration {
            key: Some(key.into()),
            operator: Some("Exists".into()),
            toleration_seconds: seconds,
            ..Default::default()
        };
        assert_eq!(verdict(&[taint("a")], &[], now), Verdict::Goes);
        assert_eq!(verdict(&[taint("a")], &[tol("a", None)], now), Verdict::Stays);
        assert_eq!(verdict(&[taint("a")], &[tol("a", Some(300))], now), Verdict::GoesAt(later));
        assert_eq!(verdict(&[taint("a")], &[tol("a", Some(300))], later), Verdict::Goes);
        assert_eq!(verdict(&[taint("a"), taint("b")], &[tol("a", None)], now), Verdict::Goes);
        assert_eq!(verdict(&[], &[], now), Verdict::Stays);
    }
}
