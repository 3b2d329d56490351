//! Empties namespaces that are being deleted, then lets them go. Pods go first, so that nothing they use disappears under
//! them (KEP-5080).

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::Namespace;
use kube::api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
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

/// Deletes what is left of one kind. Returns how many objects are still there.
async fn empty(client: &Client, namespace: &str, kind: &ApiResource) -> Result<usize> {
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), namespace, kind);
    let left = match api.list_metadata(&ListParams::default()).await {
        Ok(l) => l.items,
        // The kind has gone, or does not allow it: nothing to wait for.
        Err(e) if has_code(&e, 404) || has_code(&e, 405) => return Ok(0),
        Err(e) => return Err(e.into()),
    };
    for o in &left {
        if !is_terminating(&o.metadata)
            && let Some(name) = &o.metadata.name
        {
            unless_gone(api.delete(name, &DeleteParams::background()).await)?;
        }
    }
    Ok(left.len())
}

async fn reconcile(ctx: Context, name: String) -> Result {
    let Some(ns) = ctx.informers.namespaces.get(&Key::new("", &*name)) else { return Ok(Outcome::Done) };
    let finalizers = ns.spec.as_ref().and_then(|s| s.finalizers.clone()).unwrap_or_default();
    if !is_terminating(&ns.metadata) || !finalizers.iter().any(|f| f == FINALIZER) {
        return Ok(Outcome::Done);
    }
    let mut kinds = namespaced_kinds(&ctx.client).await?;
    kinds.sort_by_key(|k| k.plural != "pods");
    let mut left = BTreeMap::new();
    for kind in &kinds {
        // Events go last: they tell what happened to the rest.
        if kind.plural == "events" && !left.is_empty() {
            continue;
        }
        let n = empty(&ctx.client, &name, kind).await?;
        if n > 0 {
            left.insert(format!("{}.{}", kind.plural, kind.group), n);
            if kind.plural == "pods" {
                break;
            }
        }
    }
    let api: Api<Namespace> = Api::all(ctx.client.clone());
    if !left.is_empty() {
        let text: Vec<String> = left.iter().map(|(k, n)| format!("{k} has {n} resource instances")).collect();
        let patch = serde_json::json!({"status": {"conditions": [{
            "type": "NamespaceContentRemaining", "status": "True", "reason": "SomeResourcesRemain",
            "message": format!("Some resources are remaining: {}", text.join(", ")),
            "lastTransitionTime": jiff::Timestamp::now()}]}});
        unless_gone(api.patch_status(&name, &PatchParams::default(), &Patch::Strategic(&patch)).await)?;
        return Ok(Outcome::After(RETRY));
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
