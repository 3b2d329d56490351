//! Keeps as many pods of a ReplicaSet as it asks for. A ReplicationController works the same way, by the same code.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use orlop_api::meta::{Key, annotation, controller_of, is_terminating};
use orlop_api::pod::{is_finished, is_ready};
use orlop_api::selector::Selector;
use orlop_client::informer::{Builder, Informer};
use orlop_client::{Change, Outcome, Queue};

use crate::runtime::{
    BY_CONTROLLER, Builders, Context, Expectations, Informers, ReconcileError, Result, has_code,
    namespace_ends, unless_gone,
};

/// Most pods created or deleted in one go (upstream's burstReplicas).
const BURST: usize = 500;
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

/// A kind that keeps a number of equal pods.
pub(crate) trait Replicas:
    kube::Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>
    + Clone
    + std::fmt::Debug
    + serde::Serialize
    + serde::de::DeserializeOwned
    + Send
    + Sync
    + 'static
{
    /// The queues' names.
    const NAME: &'static str;
    const ORPHANS: &'static str;
    fn builder(b: &mut Builders) -> &mut Builder<Self>;
    fn informer(i: &Informers) -> &Informer<Self>;
    /// (replicas, seconds until a ready pod counts as available)
    fn wish(&self) -> (i32, i32);
    /// `None` when it selects nothing or cannot be read.
    fn selector(&self) -> Option<Selector>;
    fn template(&self) -> Option<&PodTemplateSpec>;
    fn status(&self) -> Option<ReplicaSetStatus>;
    fn set_status(&mut self, status: ReplicaSetStatus);
}

impl Replicas for ReplicaSet {
    const NAME: &'static str = "replicaset";
    const ORPHANS: &'static str = "replicaset orphans";

    fn builder(b: &mut Builders) -> &mut Builder<Self> {
        &mut b.replicasets
    }

    fn informer(i: &Informers) -> &Informer<Self> {
        &i.replicasets
    }

    fn wish(&self) -> (i32, i32) {
        let spec = self.spec.as_ref();
        (spec.and_then(|s| s.replicas).unwrap_or(1), spec.and_then(|s| s.min_ready_seconds).unwrap_or(0))
    }

    fn selector(&self) -> Option<Selector> {
        Selector::from_label_selector(&self.spec.as_ref()?.selector).ok().filter(|s| !s.is_empty())
    }

    fn template(&self) -> Option<&PodTemplateSpec> {
        self.spec.as_ref()?.template.as_ref()
    }

    fn status(&self) -> Option<ReplicaSetStatus> {
        self.status.clone()
    }

    fn set_status(&mut self, status: ReplicaSetStatus) {
        self.status = Some(status);
    }
}

pub(crate) struct Controller<T> {
    queue: Queue<Key>,
    orphans: Queue<Key>,
    expectations: Arc<Expectations>,
    kind: PhantomData<T>,
}

fn owner_key<T: Replicas>(meta: &ObjectMeta) -> Option<Key> {
    let o = controller_of(meta).filter(|o| o.kind == T::kind(&()) && o.api_version == T::api_version(&()))?;
    Some(Key::new(meta.namespace.clone().unwrap_or_default(), o.name.clone()))
}

impl<T: Replicas> Controller<T> {
    pub fn new(b: &mut Builders) -> Controller<T> {
        let (queue, orphans) = (Queue::default(), Queue::default());
        let expectations = Arc::new(Expectations::default());
        let (q, ex) = (queue.clone(), expectations.clone());
        T::builder(b).add_handler(move |c: &Change<T>| {
            let key = Key::of(c.object().meta());
            if matches!(c, Change::Deleted(_)) {
                ex.forget(&key);
            }
            q.add(key);
        });
        let (q, lone, ex) = (queue.clone(), orphans.clone(), expectations.clone());
        b.pods.add_handler(move |c: &Change<Pod>| {
            let pod = c.object();
            let uid = pod.metadata.uid.as_deref().unwrap_or_default();
            let Some(key) = owner_key::<T>(&pod.metadata) else {
                if controller_of(&pod.metadata).is_none() && !matches!(c, Change::Deleted(_)) {
                    lone.add(Key::of(&pod.metadata));
                }
                return;
            };
            match c {
                Change::Added(_) => ex.created(&key),
                Change::Deleted(_) => ex.deleted(&key, uid),
                Change::Updated { new, .. } if is_terminating(&new.metadata) => ex.deleted(&key, uid),
                Change::Updated { .. } => {}
            }
            if let Change::Updated { old, .. } = c
                && let Some(former) = owner_key::<T>(&old.metadata).filter(|f| *f != key)
            {
                q.add(former);
            }
            q.add(key);
        });
        Controller { queue, orphans, expectations, kind: PhantomData }
    }

    pub fn start(self, context: &Context) {
        let (ctx, ex) = (context.clone(), self.expectations.clone());
        self.queue.run(&context.tasks, T::NAME, 5, move |k| reconcile::<T>(ctx.clone(), ex.clone(), k));
        // A pod without an owner may be one that should be adopted.
        let (informers, sets) = (context.informers.clone(), self.queue.clone());
        self.orphans.run(&context.tasks, T::ORPHANS, 1, move |key: Key| {
            if let Some(pod) = informers.pods.get(&key) {
                let labels = pod.metadata.labels.clone().unwrap_or_default();
                for rs in T::informer(&informers).list_namespace(&key.namespace) {
                    if rs.selector().is_some_and(|s| s.matches(&labels)) {
                        sets.add(Key::of(rs.meta()));
                    }
                }
            }
            async { Ok::<_, ReconcileError>(Outcome::Done) }
        });
    }
}

/// The pod that a template makes.
pub(crate) fn pod_from_template(template: &PodTemplateSpec, owner: OwnerReference, namespace: &str) -> Pod {
    let meta = template.metadata.clone().unwrap_or_default();
    let prefix: String = format!("{}-", owner.name).chars().take(58).collect();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(prefix),
            namespace: Some(namespace.to_owned()),
            labels: meta.labels,
            annotations: meta.annotations,
            finalizers: meta.finalizers,
            owner_references: Some(vec![owner]),
            ..Default::default()
        },
        spec: template.spec.clone(),
        status: None,
    }
}

fn owner_reference<T: Replicas>(rs: &T) -> OwnerReference {
    OwnerReference {
        api_version: T::api_version(&()).into_owned(),
        kind: T::kind(&()).into_owned(),
        name: rs.meta().name.clone().unwrap_or_default(),
        uid: rs.meta().uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// Which pods go first when there are too many: those that serve least and have run shortest. Smaller goes earlier.
fn victim_rank(pod: &Pod, on_same_node: usize) -> impl Ord + use<> {
    let placed = pod.spec.as_ref().is_some_and(|s| s.node_name.is_some());
    let phase = match pod.status.as_ref().and_then(|s| s.phase.as_deref()) {
        Some("Running") => 2,
        Some("Pending") | None => 0,
        _ => 1,
    };
    let cost: i32 = annotation(&pod.metadata, DELETION_COST).and_then(|c| c.parse().ok()).unwrap_or(0);
    let created = pod.metadata.creation_timestamp.as_ref().map(|t| t.0.as_second()).unwrap_or(i64::MAX);
    (placed, phase, is_ready(pod), cost, std::cmp::Reverse(on_same_node), std::cmp::Reverse(created))
}

fn choose_victims(mut pods: Vec<Arc<Pod>>, count: usize) -> Vec<Arc<Pod>> {
    let node = |p: &Pod| p.spec.as_ref().and_then(|s| s.node_name.clone()).unwrap_or_default();
    let mut per_node: BTreeMap<String, usize> = BTreeMap::new();
    for p in &pods {
        *per_node.entry(node(p)).or_default() += 1;
    }
    pods.sort_by_cached_key(|p| victim_rank(p, per_node.get(&node(p)).copied().unwrap_or(0)));
    pods.truncate(count);
    pods
}

/// Whether the pod has been ready for `min_ready` seconds; when not yet, in how many it will have been.
fn available_in(pod: &Pod, min_ready: i32, now: Timestamp) -> Option<i64> {
    if !is_ready(pod) {
        return None;
    }
    if min_ready == 0 {
        return Some(0);
    }
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let since = conditions.iter().find(|c| c.type_ == "Ready")?.last_transition_time.as_ref()?.0;
    Some((since.as_second() + min_ready as i64 - now.as_second()).max(0))
}

fn status<T: Replicas>(
    rs: &T,
    pods: &[Arc<Pod>],
    terminating: usize,
    failure: Option<&str>,
    now: Timestamp,
) -> ReplicaSetStatus {
    let template = rs.template().and_then(|t| t.metadata.as_ref()).and_then(|m| m.labels.clone());
    let full = Selector::from_map(&template.unwrap_or_default());
    let (_, min_ready) = rs.wish();
    let empty = BTreeMap::new();
    let count = |f: &dyn Fn(&Pod) -> bool| pods.iter().filter(|p| f(p)).count() as i32;
    let mut conditions = rs.status().and_then(|s| s.conditions).unwrap_or_default();
    match failure {
        None => conditions.retain(|c| c.type_ != "ReplicaFailure"),
        Some(message) => {
            if !conditions
                .iter()
                .any(|c| c.type_ == "ReplicaFailure" && c.message.as_deref() == Some(message))
            {
                conditions.retain(|c| c.type_ != "ReplicaFailure");
                conditions.push(ReplicaSetCondition {
                    type_: "ReplicaFailure".into(),
                    status: "True".into(),
                    reason: Some("FailedCreate".into()),
                    message: Some(message.to_owned()),
                    last_transition_time: Some(Time(now)),
                });
            }
        }
    }
    ReplicaSetStatus {
        replicas: pods.len() as i32,
        fully_labeled_replicas: Some(count(&|p| full.matches(p.metadata.labels.as_ref().unwrap_or(&empty)))),
        ready_replicas: Some(count(&is_ready)),
        available_replicas: Some(count(&|p| available_in(p, min_ready, now) == Some(0))),
        terminating_replicas: Some(terminating as i32),
        observed_generation: rs.meta().generation,
        conditions: (!conditions.is_empty()).then_some(conditions),
    }
}

/// The set's pods, after taking in those that match and have no owner and letting go of those that match no longer.
async fn claim<T: Replicas>(ctx: &Context, rs: &T, selector: &Selector) -> Result<Vec<Arc<Pod>>> {
    let namespace = rs.meta().namespace.as_deref().unwrap_or_default();
    let uid = rs.meta().uid.as_deref().unwrap_or_default();
    let api: Api<Pod> = Api::namespaced(ctx.client.clone(), namespace);
    let empty = BTreeMap::new();
    let matches = |p: &Pod| selector.matches(p.metadata.labels.as_ref().unwrap_or(&empty));
    let mut own = Vec::new();
    for p in ctx.informers.pods.by_index(BY_CONTROLLER, uid) {
        if matches(&p) || is_terminating(rs.meta()) {
            own.push(p);
        } else {
            let patch = serde_json::json!({"metadata": {"uid": p.metadata.uid,
                "ownerReferences": [{"$patch": "delete", "uid": uid}]}});
            let name = p.metadata.name.as_deref().unwrap_or_default();
            unless_gone(api.patch(name, &PatchParams::default(), &Patch::Strategic(&patch)).await)?;
        }
    }
    if is_terminating(rs.meta()) {
        return Ok(own);
    }
    for p in ctx.informers.pods.list_namespace(namespace) {
        if controller_of(&p.metadata).is_none()
            && matches(&p)
            && !is_terminating(&p.metadata)
            && !is_finished(&p)
        {
            let patch = serde_json::json!({"metadata": {"uid": p.metadata.uid, "ownerReferences": [owner_reference(rs)]}});
            let name = p.metadata.name.as_deref().unwrap_or_default();
            match api.patch(name, &PatchParams::default(), &Patch::Strategic(&patch)).await {
                Ok(_) => own.push(p),
                Err(e) if has_code(&e, 404) || has_code(&e, 409) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
    Ok(own)
}

async fn create_pods<T: Replicas>(
    ctx: &Context,
    ex: &Expectations,
    rs: &T,
    count: usize,
) -> std::result::Result<(), String> {
    let key = Key::of(rs.meta());
    let Some(template) = rs.template() else { return Ok(()) };
    let api: Api<Pod> = Api::namespaced(ctx.client.clone(), &key.namespace);
    ex.expect(&key, count as u32, []);
    // One, then two, then four …: a template that the API refuses costs one request, not five hundred.
    let (mut left, mut batch) = (count, 1);
    while left > 0 {
        let n = batch.min(left);
        let one = || async {
            let pod = pod_from_template(template, owner_reference(rs), &key.namespace);
            api.create(&PostParams::default(), &pod).await
        };
        let results = futures::future::join_all((0..n).map(|_| one())).await;
        let mut failed = None;
        for r in results {
            match r {
                Ok(p) => ctx.recorder.normal(
                    orlop_client::events::reference(rs),
                    "SuccessfulCreate",
                    format!("Created pod: {}", p.metadata.name.unwrap_or_default()),
                ),
                Err(e) => {
                    ex.created(&key);
                    failed = Some(e);
                }
            }
        }
        left -= n;
        if let Some(e) = failed {
            (0..left).for_each(|_| ex.created(&key));
            if namespace_ends(&e) {
                return Ok(());
            }
            let text = match e {
                kube::Error::Api(s) => s.message.clone(),
                e => e.to_string(),
            };
            ctx.recorder.warning(
                orlop_client::events::reference(rs),
                "FailedCreate",
                format!("Error creating: {text}"),
            );
            return Err(text);
        }
        batch *= 2;
    }
    Ok(())
}

async fn delete_pods<T: Replicas>(
    ctx: &Context,
    ex: &Expectations,
    rs: &T,
    victims: Vec<Arc<Pod>>,
) -> Result<()> {
    let key = Key::of(rs.meta());
    let api: Api<Pod> = Api::namespaced(ctx.client.clone(), &key.namespace);
    ex.expect(&key, 0, victims.iter().filter_map(|p| p.metadata.uid.clone()));
    for p in victims {
        let (name, uid) =
            (p.metadata.name.as_deref().unwrap_or_default(), p.metadata.uid.as_deref().unwrap_or_default());
        match api.delete(name, &DeleteParams::default()).await {
            Ok(_) => ctx.recorder.normal(
                orlop_client::events::reference(rs),
                "SuccessfulDelete",
                format!("Deleted pod: {name}"),
            ),
            Err(e) => {
                ex.deleted(&key, uid);
                if !has_code(&e, 404) {
                    ex.forget(&key);
                    return Err(e.into());
                }
            }
        }
    }
    Ok(())
}

async fn reconcile<T: Replicas>(ctx: Context, ex: Arc<Expectations>, key: Key) -> Result {
    let Some(rs) = T::informer(&ctx.informers).get(&key) else { return Ok(Outcome::Done) };
    let Some(selector) = rs.selector() else { return Ok(Outcome::Done) };
    let in_step = ex.met(&key);
    let all = claim(&ctx, &*rs, &selector).await?;
    let terminating = all.iter().filter(|p| is_terminating(&p.metadata)).count();
    let pods: Vec<Arc<Pod>> =
        all.into_iter().filter(|p| !is_terminating(&p.metadata) && !is_finished(p)).collect();
    let (wanted, min_ready) = rs.wish();
    let wanted = wanted.max(0) as usize;
    let mut failure = None;
    if in_step && !is_terminating(rs.meta()) {
        if pods.len() < wanted {
            failure = create_pods(&ctx, &ex, &*rs, (wanted - pods.len()).min(BURST)).await.err();
        } else if pods.len() > wanted {
            let victims = choose_victims(pods.clone(), (pods.len() - wanted).min(BURST));
            delete_pods(&ctx, &ex, &*rs, victims).await?;
        }
    }
    let now = Timestamp::now();
    let next = status(&*rs, &pods, terminating, failure.as_deref(), now);
    let mut o = (*rs).clone();
    o.set_status(next);
    if o.status() != rs.status() {
        let api: Api<T> = Api::namespaced(ctx.client.clone(), &key.namespace);
        match api.replace_status(&key.name, &PostParams::default(), &o).await {
            // A newer version is on its way to the local copy and asks again.
            Err(e) if has_code(&e, 409) || has_code(&e, 404) => {}
            r => drop(r?),
        }
    }
    if let Some(text) = failure {
        return Err(ReconcileError::Invalid(text));
    }
    let soonest = pods.iter().filter_map(|p| available_in(p, min_ready, now)).filter(|s| *s > 0).min();
    Ok(soonest.map_or(Outcome::Done, |s| Outcome::After(std::time::Duration::from_secs(s as u64))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(name: &str, phase: &str, ready: bool, node: Option<&str>, created: &str, cost: &str) -> Arc<Pod> {
        Arc::new(
            serde_json::from_value(json!({
                "metadata": {"name": name, "creationTimestamp": created, "annotations": {DELETION_COST: cost}},
                "spec": {"nodeName": node, "containers": []},
                "status": {"phase": phase, "conditions": [{"type": "Ready", "status": if ready {"True"} else {"False"},
                    "lastTransitionTime": created}]}
            }))
            .unwrap(),
        )
    }

    #[test]
    fn the_least_useful_pods_go_first() {
        let old = "2026-01-01T00:00:00Z";
        let young = "2026-01-02T00:00:00Z";
        let pods = vec![
            pod("ready-old", "Running", true, Some("a"), old, "0"),
            pod("ready-young", "Running", true, Some("b"), young, "0"),
            pod("cheap", "Running", true, Some("c"), old, "-5"),
            pod("unready", "Running", false, Some("d"), old, "0"),
            pod("pending", "Pending", false, Some("e"), old, "0"),
            pod("unplaced", "Pending", false, None, old, "0"),
        ];
        let order: Vec<_> =
            choose_victims(pods, 6).iter().map(|p| p.metadata.name.clone().unwrap()).collect();
        assert_eq!(order, ["unplaced", "pending", "unready", "cheap", "ready-young", "ready-old"]);
    }

    #[test]
    fn availability_waits_for_min_ready_seconds() {
        let p = pod("a", "Running", true, Some("n"), "2026-01-01T00:00:00Z", "0");
        let at = |s: &str| s.parse::<Timestamp>().unwrap();
        assert_eq!(available_in(&p, 0, at("2026-01-01T00:00:00Z")), Some(0));
        assert_eq!(available_in(&p, 10, at("2026-01-01T00:00:04Z")), Some(6));
        assert_eq!(available_in(&p, 10, at("2026-01-01T00:00:10Z")), Some(0));
    }
}
