//! Empties namespaces that are being deleted, then lets them go. Pods go first, so that nothing they use disappears under
//! them (KEP-5080).

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, NamespaceCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::core::PartialObjectMeta;
use kube::discovery::{Discovery, Scope, verbs};
use kube::{Api, Client};
use orlop_api::meta::{Key, is_terminating};
use orlop_client::{Change, Outcome, Queue};

use crate::runtime::{Builders, Context, ReconcileError, Result, has_code, unless_gone};

const FINALIZER: &str = "kubernetes";
/// Objects with finalizers or grace periods take their time.
const RETRY: Duration = Duration::from_secs(1);

pub(crate) struct Controller {
    queue: Queue<String>,
}

impl Controller {
    pub fn new(b: &mut Builders) -> Controller {
        let queue = Queue::default();
        let q = queue.clone();
        b.namespaces.add_handler(move |c: &Change<Namespace>| {
            if is_terminating(&c.object().metadata) && !matches!(c, Change::Deleted(_)) {
                q.add(c.object().metadata.name.clone().unwrap_or_default());
            }
        });
        Controller { queue }
    }

    pub fn start(self, context: &Context) {
        let ctx = context.clone();
        self.queue.run(&context.tasks, "namespace", 4, move |name| reconcile(ctx.clone(), name));
    }
}

async fn namespaced_kinds(client: &Client) -> Result<Vec<ApiResource>> {
    let discovery = Discovery::new(client.clone()).run_aggregated().await?;
    let mut kinds = Vec::new();
    for group in discovery.groups() {
        for (resource, caps) in group.recommended_resources() {
            let wanted = caps.supports_operation(verbs::LIST) && caps.supports_operation(verbs::DELETE);
            if caps.scope == Scope::Namespaced && wanted {
                kinds.push(resource);
            }
        }
    }
    Ok(kinds)
}

/// What a pass over a namespace found.
#[derive(Default)]
struct Found {
    /// Objects that are still there, by `plural.group`.
    left: BTreeMap<String, usize>,
    /// How many of them wait for a finalizer.
    finalizers: BTreeMap<String, usize>,
    failures: Vec<String>,
}

impl Found {
    fn add(&mut self, kind: &ApiResource, objects: &[PartialObjectMeta<DynamicObject>]) {
        if objects.is_empty() {
            return;
        }
        self.left.insert(format!("{}.{}", kind.plural, kind.group), objects.len());
        for f in objects.iter().flat_map(|o| o.metadata.finalizers.iter().flatten()) {
            *self.finalizers.entry(f.clone()).or_default() += 1;
        }
    }
}

/// Deletes what is left of one kind. Returns the objects that are still there.
async fn empty(
    client: &Client,
    namespace: &str,
    kind: &ApiResource,
) -> std::result::Result<Vec<PartialObjectMeta<DynamicObject>>, kube::Error> {
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), namespace, kind);
    let left = match api.list_metadata(&ListParams::default()).await {
        Ok(l) => l.items,
        // The kind has gone, or does not allow it: nothing to wait for.
        Err(e) if has_code(&e, 404) || has_code(&e, 405) => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    for o in &left {
        if !is_terminating(&o.metadata)
            && let Some(name) = &o.metadata.name
            && let Err(e) = api.delete(name, &DeleteParams::background()).await
            && !has_code(&e, 404)
        {
            return Err(e);
        }
    }
    Ok(left)
}

/// Deletes pods, and the rest once there are none any more.
async fn empty_all(client: &Client, namespace: &str) -> Result<Found> {
    let mut kinds = namespaced_kinds(client).await?;
    kinds.sort_by_key(|k| k.plural != "pods");
    let mut found = Found::default();
    for kind in &kinds {
        // Events go last: they tell what happened to the rest.
        if kind.plural == "events" && !found.left.is_empty() {
            continue;
        }
        match empty(client, namespace, kind).await {
            Ok(left) => found.add(kind, &left),
            // The other kinds need not wait for this one.
            Err(e) => found.failures.push(format!("{}.{}: {e}", kind.plural, kind.group)),
        }
        if kind.plural == "pods" && !(found.left.is_empty() && found.failures.is_empty()) {
            break;
        }
    }
    Ok(found)
}

/// The conditions that a namespace should show, in upstream's words; `None` when it shows them. The time of one whose status
/// does not change stays.
fn conditions(old: &[NamespaceCondition], found: &Found, now: Time) -> Option<Vec<NamespaceCondition>> {
    let list = |all: &BTreeMap<String, usize>, verb: &str| {
        all.iter().map(|(k, n)| format!("{k} {verb} {n} resource instances")).collect::<Vec<_>>().join(", ")
    };
    let failed = format!(
        "Failed to delete all resource types, {} remaining: {}",
        found.failures.len(),
        found.failures.join(", ")
    );
    let left = format!("Some resources are remaining: {}", list(&found.left, "has"));
    let held =
        format!("Some content in the namespace has finalizers remaining: {}", list(&found.finalizers, "in"));
    let rows = [
        (
            "NamespaceDeletionDiscoveryFailure",
            None,
            ("ResourcesDiscovered", "All resources successfully discovered"),
        ),
        (
            "NamespaceDeletionGroupVersionParsingFailure",
            None,
            ("ParsedGroupVersions", "All legacy kube types successfully parsed"),
        ),
        (
            "NamespaceDeletionContentFailure",
            (!found.failures.is_empty()).then_some(("ContentDeletionFailed", failed)),
            ("ContentDeleted", "All content successfully deleted, may be waiting on finalization"),
        ),
        (
            "NamespaceContentRemaining",
            (!found.left.is_empty()).then_some(("SomeResourcesRemain", left)),
            ("ContentRemoved", "All content successfully removed"),
        ),
        (
            "NamespaceFinalizersRemaining",
            (!found.finalizers.is_empty()).then_some(("SomeFinalizersRemain", held)),
            ("ContentHasNoFinalizers", "All content-preserving finalizers finished"),
        ),
    ];
    let mut changed = false;
    let all = rows.into_iter().map(|(type_, trouble, fine)| {
        let status = if trouble.is_some() { "True" } else { "False" };
        let (reason, message) = trouble.unwrap_or_else(|| (fine.0, fine.1.to_owned()));
        let before = old.iter().find(|c| c.type_ == type_);
        let same_status = before.filter(|c| c.status == status);
        changed |= same_status.is_none_or(|c| {
            c.reason.as_deref() != Some(reason) || c.message.as_deref() != Some(message.as_str())
        });
        NamespaceCondition {
            type_: type_.into(),
            status: status.into(),
            reason: Some(reason.into()),
            message: Some(message),
            last_transition_time: same_status
                .and_then(|c| c.last_transition_time.clone())
                .or_else(|| Some(now.clone())),
        }
    });
    let all: Vec<_> = all.collect();
    changed.then_some(all)
}

async fn reconcile(ctx: Context, name: String) -> Result {
    let Some(ns) = ctx.informers.namespaces.get(&Key::new("", &*name)) else { return Ok(Outcome::Done) };
    let finalizers = ns.spec.as_ref().and_then(|s| s.finalizers.clone()).unwrap_or_default();
    if !is_terminating(&ns.metadata) || !finalizers.iter().any(|f| f == FINALIZER) {
        return Ok(Outcome::Done);
    }
    let found = empty_all(&ctx.client, &name).await?;
    if !found.left.is_empty() || !found.failures.is_empty() {
        let old = ns.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
        if let Some(all) = conditions(old, &found, Time(jiff::Timestamp::now())) {
            let api: Api<Namespace> = Api::all(ctx.client.clone());
            let patch = serde_json::json!({"status": {"conditions": all}});
            unless_gone(api.patch_status(&name, &PatchParams::default(), &Patch::Strategic(&patch)).await)?;
        }
        return match found.failures.is_empty() {
            true => Ok(Outcome::After(RETRY)),
            false => Err(ReconcileError::Invalid(found.failures.join(", "))),
        };
    }
    let mut done = (*ns).clone();
    if let Some(spec) = &mut done.spec {
        spec.finalizers = Some(finalizers.into_iter().filter(|f| f != FINALIZER).collect());
    }
    let request = http::Request::put(format!("/api/v1/namespaces/{name}/finalize"))
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(serde_json::to_vec(&done).map_err(kube::Error::SerdeError)?)
        .map_err(kube::Error::HttpError)?;
    match ctx.client.request::<serde_json::Value>(request).await {
        Err(e) if has_code(&e, 409) => Ok(Outcome::After(RETRY)),
        Err(e) if !has_code(&e, 404) => Err(ReconcileError::Api(e)),
        _ => Ok(Outcome::Done),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_say_what_is_left_and_are_written_once() {
        let (first, later) = (Time(jiff::Timestamp::UNIX_EPOCH), Time(jiff::Timestamp::MAX));
        let mut found = Found::default();
        found.left.insert("pods.".into(), 2);
        found.finalizers.insert("example.com/f".into(), 1);
        let all = conditions(&[], &found, first.clone()).unwrap();
        let seen: Vec<_> = all.iter().map(|c| (c.status.as_str(), c.reason.as_deref().unwrap())).collect();
        assert_eq!(
            seen,
            [
                ("False", "ResourcesDiscovered"),
                ("False", "ParsedGroupVersions"),
                ("False", "ContentDeleted"),
                ("True", "SomeResourcesRemain"),
                ("True", "SomeFinalizersRemain")
            ]
        );
        assert_eq!(
            all[3].message.as_deref(),
            Some("Some resources are remaining: pods. has 2 resource instances")
        );
        assert!(conditions(&all, &found, later.clone()).is_none(), "nothing new");

        found.left.insert("pods.".into(), 1);
        found.finalizers.clear();
        found.failures.push("secrets.: no".into());
        let next = conditions(&all, &found, later.clone()).unwrap();
        let times: Vec<_> = next.iter().map(|c| c.last_transition_time.as_ref() == Some(&first)).collect();
        assert_eq!(times, [true, true, false, true, false], "only changed statuses get a new time");
        assert!(next[2].message.as_deref().unwrap().ends_with("1 remaining: secrets.: no"));
    }
}
