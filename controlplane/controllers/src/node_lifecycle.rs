//! Notices nodes that have gone silent and keeps each node's condition taints in step with its conditions.

use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, NodeCondition, Pod, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use kube::Api;
use kube::api::{Patch, PatchParams};
use orlop_api::meta::Key;
use orlop_api::{pod, taints};
use orlop_client::{Change, Outcome, Queue};
use parking_lot::Mutex;
use std::sync::Arc;
use tokio::time::Instant;

use crate::runtime::{BY_NODE, Builders, Context, Result, unless_gone};

/// A node is unknown when it has not renewed its Lease for this long (--node-monitor-grace-period).
const GRACE: Duration = Duration::from_secs(50);
/// How often each node is looked at (--node-monitor-period).
const PERIOD: Duration = Duration::from_secs(5);

/// The taints that mirror conditions: (condition, its bad status, taint key).
const CONDITION_TAINTS: [(&str, &str, &str); 6] = [
    ("Ready", "False", taints::NOT_READY),
    ("Ready", "Unknown", taints::UNREACHABLE),
    ("MemoryPressure", "True", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "True", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "True", "node.kubernetes.io/pid-pressure"),
    ("NetworkUnavailable", "True", "node.kubernetes.io/network-unavailable"),
];

/// When we last saw a node's Lease or status move, by our own clock: nodes' clocks are not trusted.
#[derive(Default)]
struct Heard {
    last: HashMap<String, (String, Instant)>,
}

impl Heard {
    /// How long the node has been silent, given what identifies its latest sign of life.
    fn silence(&mut self, node: &str, sign: String, now: Instant) -> Duration {
        match self.last.get(node) {
            Some((seen, at)) if *seen == sign => now - *at,
            _ => {
                self.last.insert(node.to_owned(), (sign, now));
                Duration::ZERO
            }
        }
    }
}

pub(crate) struct Controller {
    queue: Queue<String>,
}

impl Controller {
    pub fn new(b: &mut Builders) -> Controller {
        let queue = Queue::default();
        let q = queue.clone();
        b.nodes
            .add_handler(move |c: &Change<Node>| q.add(c.object().metadata.name.clone().unwrap_or_default()));
        Controller { queue }
    }

    pub fn start(self, context: &Context) {
        let (ctx, heard) = (context.clone(), Arc::new(Mutex::new(Heard::default())));
        self.queue
            .run(&context.tasks, "node-lifecycle", 4, move |n| reconcile(ctx.clone(), heard.clone(), n));
    }
}

fn condition<'a>(node: &'a Node, kind: &str) -> Option<&'a NodeCondition> {
    node.status.as_ref()?.conditions.as_ref()?.iter().find(|c| c.type_ == kind)
}

/// The taints that the node should have, or `None` when it has them. Taints of other making stay.
fn wanted_taints(node: &Node, now: Timestamp) -> Option<Vec<Taint>> {
    let spec = node.spec.as_ref();
    let current = spec.and_then(|s| s.taints.clone()).unwrap_or_default();
    let mut wanted: Vec<(&str, &str)> = Vec::new();
    for (kind, bad, key) in CONDITION_TAINTS {
        // A node without a Ready condition has not reported yet: not ready.
        let status =
            condition(node, kind).map(|c| c.status.as_str()).or((kind == "Ready").then_some("False"));
        if status == Some(bad) {
            wanted.push((key, "NoSchedule"));
            if kind == "Ready" {
                wanted.push((key, "NoExecute"));
            }
        }
    }
    if spec.and_then(|s| s.unschedulable) == Some(true) {
        wanted.push((taints::UNSCHEDULABLE, "NoSchedule"));
    }
    let ours = |t: &Taint| {
        t.key == taints::UNSCHEDULABLE || CONDITION_TAINTS.iter().any(|(_, _, key)| *key == t.key)
    };
    let is_wanted = |t: &Taint| wanted.contains(&(t.key.as_str(), t.effect.as_str()));
    let mut next: Vec<Taint> = current.iter().filter(|t| !ours(t) || is_wanted(t)).cloned().collect();
    for (key, effect) in wanted {
        if !next.iter().any(|t| t.key == key && t.effect == effect) {
            let time_added = (effect == "NoExecute").then_some(Time(now));
            next.push(Taint { key: key.into(), effect: effect.into(), value: None, time_added });
        }
    }
    let same = |a: &Taint, b: &Taint| (&a.key, &a.effect, &a.value) == (&b.key, &b.effect, &b.value);
    let unchanged = next.len() == current.len() && next.iter().zip(&current).all(|(a, b)| same(a, b));
    (!unchanged).then_some(next)
}

async fn reconcile(ctx: Context, heard: Arc<Mutex<Heard>>, name: String) -> Result {
    let Some(node) = ctx.informers.nodes.get(&Key::new("", &*name)) else {
        heard.lock().last.remove(&name);
        return Ok(Outcome::Done);
    };
    let api: Api<Node> = Api::all(ctx.client.clone());
    let leases: Api<Lease> = Api::namespaced(ctx.client.clone(), "kube-node-lease");
    let renewed: Option<MicroTime> =
        leases.get_opt(&name).await?.and_then(|l| l.spec).and_then(|s| s.renew_time);
    let heartbeat = condition(&node, "Ready").and_then(|c| c.last_heartbeat_time.clone());
    let sign = format!("{:?}/{:?}", renewed.map(|t| t.0), heartbeat.map(|t| t.0));
    let silence = heard.lock().silence(&name, sign, Instant::now());
    if silence > GRACE && condition(&node, "Ready").is_none_or(|c| c.status != "Unknown") {
        tracing::warn!(node = %name, ?silence, "node has gone silent");
        mark_unknown(&ctx, &api, &name).await?;
        ctx.recorder.normal(
            orlop_client::events::reference(&*node),
            "NodeNotReady",
            format!("Node {name} status is now: NodeNotReady"),
        );
        return Ok(Outcome::After(PERIOD));
    }
    if let Some(taints) = wanted_taints(&node, Timestamp::now()) {
        // Taints are a list without merge keys: refuse to overwrite what somebody else has just added.
        let patch = serde_json::json!({"metadata": {"resourceVersion": node.metadata.resource_version},
                                       "spec": {"taints": taints}});
        unless_gone(api.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await)?;
    }
    if condition(&node, "Ready").is_some_and(|c| c.status != "True") {
        mark_pods_not_ready(&ctx, &name).await?;
    }
    Ok(Outcome::After(PERIOD))
}

async fn mark_unknown(ctx: &Context, api: &Api<Node>, name: &str) -> Result<()> {
    let now = Timestamp::now();
    let conditions: Vec<_> = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"]
        .iter()
        .map(|kind| {
            serde_json::json!({"type": kind, "status": "Unknown", "reason": "NodeStatusUnknown",
                "message": "Kubelet stopped posting node status.", "lastTransitionTime": now})
        })
        .collect();
    let patch = serde_json::json!({"status": {"conditions": conditions}});
    unless_gone(api.patch_status(name, &PatchParams::default(), &Patch::Strategic(&patch)).await)?;
    mark_pods_not_ready(ctx, name).await
}

/// Pods of a node that does not answer must leave their Services.
async fn mark_pods_not_ready(ctx: &Context, node: &str) -> Result<()> {
    for p in ctx.informers.pods.by_index(BY_NODE, node).iter().filter(|p| pod::is_ready(p)) {
        let key = Key::of(&p.metadata);
        let api: Api<Pod> = Api::namespaced(ctx.client.clone(), &key.namespace);
        let patch = serde_json::json!({"metadata": {"uid": p.metadata.uid}, "status": {"conditions": [
            {"type": "Ready", "status": "False", "lastTransitionTime": Timestamp::now()}]}});
        unless_gone(api.patch_status(&key.name, &PatchParams::default(), &Patch::Strategic(&patch)).await)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(v: serde_json::Value) -> Node {
        serde_json::from_value(v).unwrap()
    }

    fn keys(t: Option<Vec<Taint>>) -> Option<Vec<String>> {
        t.map(|t| {
            t.iter()
                .map(|t| format!("{}:{}", t.key.rsplit('/').next().unwrap_or_default(), t.effect))
                .collect()
        })
    }

    #[test]
    fn taints_follow_conditions() {
        let now = Timestamp::now();
        let ready = serde_json::json!({"conditions": [{"type": "Ready", "status": "True"}]});
        let new = node(serde_json::json!({"metadata": {"name": "a"}}));
        assert_eq!(
            keys(wanted_taints(&new, now)),
            Some(vec!["not-ready:NoSchedule".into(), "not-ready:NoExecute".into()])
        );
        let own = serde_json::json!({"key": "mine", "effect": "NoSchedule"});
        let recovered = node(
            serde_json::json!({"spec": {"taints": [own, {"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}]}, "status": ready}),
        );
        assert_eq!(keys(wanted_taints(&recovered, now)), Some(vec!["mine:NoSchedule".into()]));
        let settled = node(serde_json::json!({"spec": {"taints": [own]}, "status": ready}));
        assert_eq!(wanted_taints(&settled, now), None);
        let pressed = node(serde_json::json!({"spec": {"unschedulable": true}, "status": {"conditions": [
            {"type": "Ready", "status": "Unknown"}, {"type": "MemoryPressure", "status": "True"}]}}));
        assert_eq!(keys(wanted_taints(&pressed, now)).unwrap().len(), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_measured_by_our_own_clock() {
        let mut h = Heard::default();
        let t = Instant::now();
        assert_eq!(h.silence("n", "1".into(), t), Duration::ZERO);
        assert_eq!(h.silence("n", "1".into(), t + GRACE), GRACE);
        assert_eq!(h.silence("n", "2".into(), t + GRACE), Duration::ZERO);
    }
}
