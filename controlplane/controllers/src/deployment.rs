//! Brings a Deployment's ReplicaSets to its template: rolling update, recreate, scaling, revisions, progress.
//!
//! [`mod@plan`] decides from values; [`reconcile`] carries out.

mod plan;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{
    Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet, ReplicaSetSpec,
};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use orlop_api::meta::{Key, annotation, controller_of, is_terminating};
use orlop_api::pod::is_finished;
use orlop_api::selector::Selector;
use orlop_client::{Change, Outcome, Queue};
use sha2::{Digest, Sha256};

use self::plan::{SetState, Sizes, fenceposts, is_recreate, plan};
use crate::runtime::{
    BY_CONTROLLER, Builders, Context, ReconcileError, Result, has_code, namespace_ends, unless_gone,
};

const REVISION: &str = "deployment.kubernetes.io/revision";
const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
const MAX: &str = "deployment.kubernetes.io/max-replicas";
const HASH: &str = "pod-template-hash";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

pub(crate) struct Controller {
    queue: Queue<Key>,
}

fn owner_key(meta: &ObjectMeta) -> Option<Key> {
    let o = controller_of(meta).filter(|o| o.kind == "Deployment")?;
    Some(Key::new(meta.namespace.clone().unwrap_or_default(), o.name.clone()))
}

impl Controller {
    pub fn new(b: &mut Builders) -> Controller {
        let queue = Queue::default();
        let q = queue.clone();
        b.deployments.add_handler(move |c: &Change<Deployment>| q.add(Key::of(&c.object().metadata)));
        let q = queue.clone();
        b.replicasets.add_handler(move |c: &Change<ReplicaSet>| {
            if let Some(k) = owner_key(&c.object().metadata) {
                q.add(k);
            }
        });
        Controller { queue }
    }

    pub fn start(self, context: &Context) {
        let ctx = context.clone();
        self.queue.run(&context.tasks, "deployment", 5, move |k| reconcile(ctx.clone(), k));
    }
}

/// Whether two templates make the same pods: the hash label is the controller's own.
fn same_template(a: &PodTemplateSpec, b: &PodTemplateSpec) -> bool {
    let plain = |t: &PodTemplateSpec| {
        let mut t = t.clone();
        if let Some(labels) = t.metadata.as_mut().and_then(|m| m.labels.as_mut()) {
            labels.remove(HASH);
        }
        t
    };
    plain(a) == plain(b)
}

/// A short name for a template, of characters that cannot form words; `collisions` makes another one.
fn template_hash(t: &PodTemplateSpec, collisions: i32) -> String {
    const SAFE: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut h = Sha256::new();
    // Serialising a template cannot fail: its maps have string keys.
    h.update(serde_json::to_vec(t).unwrap_or_default());
    h.update(collisions.to_le_bytes());
    h.finalize()[..10].iter().map(|b| SAFE[*b as usize % SAFE.len()] as char).collect()
}

fn set_state(rs: &ReplicaSet) -> SetState {
    let status = rs.status.as_ref();
    SetState {
        name: rs.metadata.name.clone().unwrap_or_default(),
        wanted: rs.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1),
        actual: status.map(|s| s.replicas).unwrap_or(0),
        available: status.and_then(|s| s.available_replicas).unwrap_or(0),
        created: created(&rs.metadata),
    }
}

fn created(m: &ObjectMeta) -> i64 {
    m.creation_timestamp.as_ref().map(|t| t.0.as_second()).unwrap_or(0)
}

fn revision(m: &ObjectMeta) -> i64 {
    annotation(m, REVISION).and_then(|r| r.parse().ok()).unwrap_or(0)
}

fn owner_reference(d: &Deployment) -> OwnerReference {
    OwnerReference {
        api_version: "apps/v1".into(),
        kind: "Deployment".into(),
        name: d.metadata.name.clone().unwrap_or_default(),
        uid: d.metadata.uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// The annotations that a set carries over from its Deployment, with the bookkeeping of sizes.
fn set_annotations(d: &Deployment, current: Option<&ObjectMeta>, revision: i64) -> BTreeMap<String, String> {
    let total = d.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
    let mut a = current.and_then(|m| m.annotations.clone()).unwrap_or_default();
    let copied = d
        .metadata
        .annotations
        .iter()
        .flatten()
        .filter(|(k, _)| k.as_str() != LAST_APPLIED && k.as_str() != REVISION);
    a.extend(copied.map(|(k, v)| (k.clone(), v.clone())));
    a.insert(REVISION.into(), revision.to_string());
    a.insert(DESIRED.into(), total.to_string());
    a.insert(MAX.into(), (total + fenceposts(d).0).to_string());
    a
}

fn new_set(d: &Deployment, hash: &str, revision: i64) -> Option<ReplicaSet> {
    let spec = d.spec.as_ref()?;
    let mut template = spec.template.clone();
    template.metadata.get_or_insert_default().labels.get_or_insert_default().insert(HASH.into(), hash.into());
    let mut selector = spec.selector.clone();
    selector.match_labels.get_or_insert_default().insert(HASH.into(), hash.into());
    let name = d.metadata.name.clone().unwrap_or_default();
    Some(ReplicaSet {
        metadata: ObjectMeta {
            name: Some(format!("{name}-{hash}")),
            namespace: d.metadata.namespace.clone(),
            labels: template.metadata.as_ref().and_then(|m| m.labels.clone()),
            annotations: Some(set_annotations(d, None, revision)),
            owner_references: Some(vec![owner_reference(d)]),
            ..Default::default()
        },
        spec: Some(ReplicaSetSpec {
            replicas: Some(0),
            selector,
            template: Some(template),
            min_ready_seconds: spec.min_ready_seconds,
        }),
        status: None,
    })
}

struct Sets {
    new: Option<Arc<ReplicaSet>>,
    old: Vec<Arc<ReplicaSet>>,
}

/// Sorts the Deployment's sets into the one of the current template (the oldest, should there be two) and the rest.
fn sort_sets(d: &Deployment, mut all: Vec<Arc<ReplicaSet>>) -> Sets {
    all.sort_by_key(|r| (created(&r.metadata), r.metadata.name.clone()));
    let template = d.spec.as_ref().map(|s| &s.template);
    let is_new = |r: &ReplicaSet| {
        let own = r.spec.as_ref().and_then(|s| s.template.as_ref());
        matches!((own, template), (Some(a), Some(b)) if same_template(a, b))
    };
    let at = all.iter().position(|r| is_new(r));
    let new = at.map(|i| all.remove(i));
    Sets { new, old: all }
}

async fn claim(ctx: &Context, d: &Deployment, selector: &Selector) -> Result<Vec<Arc<ReplicaSet>>> {
    let namespace = d.metadata.namespace.as_deref().unwrap_or_default();
    let uid = d.metadata.uid.as_deref().unwrap_or_default();
    let mut own = ctx.informers.replicasets.by_index(BY_CONTROLLER, uid);
    if is_terminating(&d.metadata) {
        return Ok(own);
    }
    let empty = BTreeMap::new();
    let api: Api<ReplicaSet> = Api::namespaced(ctx.client.clone(), namespace);
    for rs in ctx.informers.replicasets.list_namespace(namespace) {
        let matches = selector.matches(rs.metadata.labels.as_ref().unwrap_or(&empty));
        if matches && controller_of(&rs.metadata).is_none() && !is_terminating(&rs.metadata) {
            let patch = serde_json::json!({"metadata": {"uid": rs.metadata.uid, "ownerReferences": [owner_reference(d)]}});
            let name = rs.metadata.name.as_deref().unwrap_or_default();
            if unless_gone(api.patch(name, &PatchParams::default(), &Patch::Strategic(&patch)).await)?
                .is_some()
            {
                own.push(rs);
            }
        }
    }
    own.retain(|rs| selector.matches(rs.metadata.labels.as_ref().unwrap_or(&empty)));
    Ok(own)
}

/// Makes the set of the current template when there is none, or brings its annotations up to date.
async fn ensure_new_set(ctx: &Context, d: &Deployment, sets: &mut Sets) -> Result<bool> {
    let key = Key::of(&d.metadata);
    let api: Api<ReplicaSet> = Api::namespaced(ctx.client.clone(), &key.namespace);
    let last = sets.old.iter().map(|r| revision(&r.metadata)).max().unwrap_or(0);
    if let Some(rs) = &sets.new {
        let rev = revision(&rs.metadata).max(last + 1);
        let wanted = set_annotations(d, Some(&rs.metadata), rev);
        let min_ready = d.spec.as_ref().and_then(|s| s.min_ready_seconds);
        let same_ready =
            rs.spec.as_ref().and_then(|s| s.min_ready_seconds).unwrap_or(0) == min_ready.unwrap_or(0);
        if rs.metadata.annotations.as_ref() != Some(&wanted) || !same_ready {
            let patch = serde_json::json!({"metadata": {"annotations": wanted}, "spec": {"minReadySeconds": min_ready.unwrap_or(0)}});
            unless_gone(api.patch(&rs_name(rs), &PatchParams::default(), &Patch::Merge(&patch)).await)?;
        }
        return set_revision(ctx, d, rev).await;
    }
    if d.spec.as_ref().and_then(|s| s.paused) == Some(true) {
        return Ok(true);
    }
    let collisions = d.status.as_ref().and_then(|s| s.collision_count).unwrap_or(0);
    let Some(template) = d.spec.as_ref().map(|s| &s.template) else { return Ok(true) };
    let hash = template_hash(template, collisions);
    let Some(mut rs) = new_set(d, &hash, last + 1) else { return Ok(true) };
    let total = d.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
    let existing: i32 = sets.old.iter().map(|r| set_state(r).wanted).sum();
    let size = if is_recreate(d) {
        if existing == 0 && !old_pods_running(ctx, &sets.old) { total } else { 0 }
    } else {
        total.min((total + fenceposts(d).0 - existing).max(0))
    };
    if let Some(spec) = &mut rs.spec {
        spec.replicas = Some(size);
    }
    match api.create(&PostParams::default(), &rs).await {
        Ok(made) => {
            let text = format!("Scaled up replica set {} from 0 to {size}", rs_name(&made));
            ctx.recorder.normal(orlop_client::events::reference(d), "ScalingReplicaSet", text);
            sets.new = Some(Arc::new(made));
            set_revision(ctx, d, last + 1).await
        }
        Err(e) if has_code(&e, 409) => {
            // Either ours, made a moment ago and not seen yet, or another template with the same hash.
            let found = api.get_opt(&rs_name(&rs)).await?;
            let ours = found.as_ref().is_some_and(|r| {
                controller_of(&r.metadata).is_some_and(|o| Some(&o.uid) == d.metadata.uid.as_ref())
                    && r.spec
                        .as_ref()
                        .and_then(|s| s.template.as_ref())
                        .is_some_and(|t| same_template(t, template))
            });
            if !ours {
                let deployments: Api<Deployment> = Api::namespaced(ctx.client.clone(), &key.namespace);
                let patch = serde_json::json!({"status": {"collisionCount": collisions + 1}});
                unless_gone(
                    deployments.patch_status(&key.name, &PatchParams::default(), &Patch::Merge(&patch)).await,
                )?;
            }
            Ok(false)
        }
        Err(e) if namespace_ends(&e) => Ok(true),
        Err(e) => Err(e.into()),
    }
}

fn rs_name(rs: &ReplicaSet) -> String {
    rs.metadata.name.clone().unwrap_or_default()
}

async fn set_revision(ctx: &Context, d: &Deployment, rev: i64) -> Result<bool> {
    if revision(&d.metadata) != rev {
        let key = Key::of(&d.metadata);
        let api: Api<Deployment> = Api::namespaced(ctx.client.clone(), &key.namespace);
        let patch = serde_json::json!({"metadata": {"annotations": {REVISION: rev.to_string()}}});
        unless_gone(api.patch(&key.name, &PatchParams::default(), &Patch::Merge(&patch)).await)?;
    }
    Ok(true)
}

fn old_pods_running(ctx: &Context, old: &[Arc<ReplicaSet>]) -> bool {
    old.iter().any(|rs| {
        let uid = rs.metadata.uid.as_deref().unwrap_or_default();
        ctx.informers.pods.by_index(BY_CONTROLLER, uid).iter().any(|p: &Arc<Pod>| !is_finished(p))
    })
}

async fn scale(ctx: &Context, d: &Deployment, sets: &Sets, sizes: &Sizes) -> Result<()> {
    let key = Key::of(&d.metadata);
    let api: Api<ReplicaSet> = Api::namespaced(ctx.client.clone(), &key.namespace);
    for rs in sets.new.iter().chain(&sets.old) {
        let name = rs_name(rs);
        let Some(size) = sizes.get(&name) else { continue };
        let before = set_state(rs).wanted;
        let total = d.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
        let patch = serde_json::json!({"metadata": {"resourceVersion": rs.metadata.resource_version, "annotations": {
            DESIRED: total.to_string(), MAX: (total + fenceposts(d).0).to_string()}}, "spec": {"replicas": size}});
        match api.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await {
            Ok(_) => {
                let way = if *size > before { "up" } else { "down" };
                let text = format!("Scaled {way} replica set {name} from {before} to {size}");
                ctx.recorder.normal(orlop_client::events::reference(d), "ScalingReplicaSet", text);
            }
            Err(e) if has_code(&e, 404) || has_code(&e, 409) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn condition(kind: &str, status: &str, reason: &str, message: String, now: Timestamp) -> DeploymentCondition {
    DeploymentCondition {
        type_: kind.into(),
        status: status.into(),
        reason: Some(reason.into()),
        message: Some(message),
        last_transition_time: Some(Time(now)),
        last_update_time: Some(Time(now)),
    }
}

/// Puts a condition in place of the one of its type. Times move only with what they tell of.
fn set_condition(all: &mut Vec<DeploymentCondition>, mut c: DeploymentCondition) {
    if let Some(old) = all.iter().find(|o| o.type_ == c.type_ && o.status == c.status) {
        c.last_transition_time = old.last_transition_time.clone();
        if old.reason == c.reason && old.message == c.message {
            c.last_update_time = old.last_update_time.clone();
        }
    }
    all.retain(|o| o.type_ != c.type_);
    all.push(c);
}

/// The status that the sets add up to, and how long until a rollout without progress counts as failed.
fn status(d: &Deployment, sets: &Sets, now: Timestamp) -> (DeploymentStatus, Option<Duration>) {
    let spec = d.spec.clone().unwrap_or_default();
    let total = spec.replicas.unwrap_or(1);
    let all = || sets.new.iter().chain(&sets.old);
    let sum = |f: fn(&ReplicaSet) -> i32| all().map(|r| f(r)).sum::<i32>();
    let replicas = sum(|r| r.status.as_ref().map(|s| s.replicas).unwrap_or(0));
    let available = sum(|r| r.status.as_ref().and_then(|s| s.available_replicas).unwrap_or(0));
    let updated = sets.new.as_ref().map(|r| set_state(r).actual).unwrap_or(0);
    let new_ready = sets.new.as_ref().and_then(|r| r.status.as_ref()?.ready_replicas).unwrap_or(0);
    let wanted_all = sum(|r| set_state(r).wanted);
    let before = d.status.clone().unwrap_or_default();
    let mut conditions = before.conditions.clone().unwrap_or_default();
    let min_available = total - fenceposts(d).1;
    set_condition(
        &mut conditions,
        if available >= min_available {
            condition(
                "Available",
                "True",
                "MinimumReplicasAvailable",
                "Deployment has minimum availability.".into(),
                now,
            )
        } else {
            condition(
                "Available",
                "False",
                "MinimumReplicasUnavailable",
                "Deployment does not have minimum availability.".into(),
                now,
            )
        },
    );
    let failure = all()
        .flat_map(|r| r.status.iter().flat_map(|s| s.conditions.iter().flatten()))
        .find(|c| c.type_ == "ReplicaFailure");
    match failure {
        Some(f) => set_condition(
            &mut conditions,
            condition(
                "ReplicaFailure",
                "True",
                f.reason.as_deref().unwrap_or("FailedCreate"),
                f.message.clone().unwrap_or_default(),
                now,
            ),
        ),
        None => conditions.retain(|c| c.type_ != "ReplicaFailure"),
    }
    let complete = updated == total && replicas == total && available == total;
    let progressed = updated > before.updated_replicas.unwrap_or(0)
        || replicas - updated < before.replicas.unwrap_or(0) - before.updated_replicas.unwrap_or(0)
        || new_ready > before.ready_replicas.unwrap_or(0)
        || available > before.available_replicas.unwrap_or(0);
    let mut deadline = None;
    let limit = spec.progress_deadline_seconds.unwrap_or(600);
    if limit != i32::MAX && spec.paused != Some(true) {
        let name = sets.new.as_ref().map(|r| rs_name(r)).unwrap_or_default();
        let last = conditions.iter().find(|c| c.type_ == "Progressing").cloned();
        let done = last.as_ref().is_some_and(|c| c.reason.as_deref() == Some("NewReplicaSetAvailable"));
        let since = last.as_ref().and_then(|c| c.last_update_time.as_ref()).map(|t| t.0.as_second());
        if complete {
            let text = format!("ReplicaSet \"{name}\" has successfully progressed.");
            set_condition(
                &mut conditions,
                condition("Progressing", "True", "NewReplicaSetAvailable", text, now),
            );
        } else if progressed
            || last.is_none()
            || (done && before.observed_generation != d.metadata.generation)
        {
            let text = format!("ReplicaSet \"{name}\" is progressing.");
            conditions.retain(|c| c.type_ != "Progressing");
            let mut c = condition("Progressing", "True", "ReplicaSetUpdated", text, now);
            if let Some(l) = last.filter(|l| l.status == "True") {
                c.last_transition_time = l.last_transition_time;
            }
            conditions.push(c);
            deadline = Some(limit as i64);
        } else if !done {
            let left = since.unwrap_or(now.as_second()) + limit as i64 - now.as_second();
            if left <= 0 {
                let text = format!("ReplicaSet \"{name}\" has timed out progressing.");
                set_condition(
                    &mut conditions,
                    condition("Progressing", "False", "ProgressDeadlineExceeded", text, now),
                );
            } else {
                deadline = Some(left);
            }
        }
    }
    let status = DeploymentStatus {
        observed_generation: d.metadata.generation,
        replicas: Some(replicas),
        updated_replicas: Some(updated),
        ready_replicas: Some(sum(|r| r.status.as_ref().and_then(|s| s.ready_replicas).unwrap_or(0))),
        available_replicas: Some(available),
        unavailable_replicas: Some((wanted_all - available).max(0)),
        terminating_replicas: Some(sum(|r| {
            r.status.as_ref().and_then(|s| s.terminating_replicas).unwrap_or(0)
        })),
        collision_count: before.collision_count,
        conditions: Some(conditions),
    };
    (status, deadline.map(|s| Duration::from_secs(s.max(1) as u64)))
}

/// Deletes the oldest of the sets that are empty and beyond the history limit, once the rollout is complete.
async fn clean_up(ctx: &Context, d: &Deployment, sets: &Sets) -> Result<()> {
    let limit = d.spec.as_ref().and_then(|s| s.revision_history_limit).unwrap_or(10).max(0) as usize;
    let mut idle: Vec<&Arc<ReplicaSet>> = sets
        .old
        .iter()
        .filter(|r| set_state(r).wanted == 0 && set_state(r).actual == 0 && !is_terminating(&r.metadata))
        .filter(|r| r.status.as_ref().and_then(|s| s.observed_generation) >= r.metadata.generation)
        .collect();
    idle.sort_by_key(|r| revision(&r.metadata));
    let api: Api<ReplicaSet> =
        Api::namespaced(ctx.client.clone(), d.metadata.namespace.as_deref().unwrap_or_default());
    for rs in idle.iter().take(idle.len().saturating_sub(limit)) {
        unless_gone(api.delete(&rs_name(rs), &DeleteParams::default()).await)?;
    }
    Ok(())
}

async fn reconcile(ctx: Context, key: Key) -> Result {
    let Some(d) = ctx.informers.deployments.get(&key) else { return Ok(Outcome::Done) };
    let Some(spec) = d.spec.as_ref() else { return Ok(Outcome::Done) };
    let selector =
        Selector::from_label_selector(&spec.selector).map_err(|e| ReconcileError::Invalid(e.to_string()))?;
    if selector.is_empty() {
        return Ok(Outcome::Done);
    }
    let mut sets = sort_sets(&d, claim(&ctx, &d, &selector).await?);
    if is_terminating(&d.metadata) {
        return Ok(Outcome::Done);
    }
    let total = spec.replicas.unwrap_or(1);
    let scaled = sets.new.iter().chain(&sets.old).any(|r| {
        set_state(r).wanted > 0
            && annotation(&r.metadata, DESIRED)
                .and_then(|v| v.parse::<i32>().ok())
                .is_some_and(|v| v != total)
    });
    if !scaled && !ensure_new_set(&ctx, &d, &mut sets).await? {
        return Ok(Outcome::After(Duration::from_millis(100)));
    }
    let old: Vec<SetState> = sets.old.iter().map(|r| set_state(r)).collect();
    let new = sets.new.as_ref().map(|r| set_state(r));
    let running = is_recreate(&d) && old_pods_running(&ctx, &sets.old);
    let sizes = plan(&d, new.as_ref(), &old, scaled, running);
    scale(&ctx, &d, &sets, &sizes).await?;
    if scaled && sizes.is_empty() {
        // Nothing to spread: only the bookkeeping is out of date.
        let all: Sizes = sets
            .new
            .iter()
            .chain(&sets.old)
            .map(|r| set_state(r))
            .filter(|s| s.wanted > 0)
            .map(|s| (s.name, s.wanted))
            .collect();
        scale(&ctx, &d, &sets, &all).await?;
    }
    let (next, deadline) = status(&d, &sets, Timestamp::now());
    let complete = next.updated_replicas == Some(total)
        && next.replicas == Some(total)
        && next.available_replicas == Some(total);
    if d.status.as_ref() != Some(&next) {
        let api: Api<Deployment> = Api::namespaced(ctx.client.clone(), &key.namespace);
        let mut o = (*d).clone();
        o.status = Some(next);
        match api.replace_status(&key.name, &PostParams::default(), &o).await {
            // Our copy was stale; the newer version asks again.
            Err(e) if has_code(&e, 409) || has_code(&e, 404) => {}
            r => drop(r?),
        }
    }
    if complete {
        clean_up(&ctx, &d, &sets).await?;
    }
    if running {
        // Pods of the old template end without a change of their set.
        return Ok(Outcome::After(Duration::from_millis(500)));
    }
    Ok(deadline.map_or(Outcome::Done, Outcome::After))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_hash_changes_with_the_template_and_collisions_only() {
        let t = |image: &str| -> PodTemplateSpec {
            serde_json::from_value(json!({"spec": {"containers": [{"name": "c", "image": image}]}})).unwrap()
        };
        assert_eq!(template_hash(&t("a"), 0), template_hash(&t("a"), 0));
        assert_ne!(template_hash(&t("a"), 0), template_hash(&t("b"), 0));
        assert_ne!(template_hash(&t("a"), 0), template_hash(&t("a"), 1));
    }
}
