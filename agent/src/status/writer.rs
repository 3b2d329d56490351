//! Writes one pod's status to the API: the latest value only, at once when readiness changes, and the final deletion.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Client};
use tokio::sync::watch;

use super::patch::diff;
use crate::context::Context;
use crate::pods::is_static;
use crate::sources::mirror;

/// How long a change that is not urgent waits for others to go with it.
const COALESCE: Duration = Duration::from_millis(120);
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(10);

/// What is to be in the API.
#[derive(Clone)]
pub struct Wanted {
    /// The pod as the source has it; for a static pod its manifest.
    pub pod: Arc<Pod>,
    /// The object in the API as last seen: the pod itself, or the mirror of a static pod.
    pub api: Option<Arc<Pod>>,
    pub status: PodStatus,
    /// Do not wait for further changes.
    pub urgent: bool,
    /// Everything of it has ended: delete the object when it is marked for deletion.
    pub delete: bool,
}

fn version(p: &Pod) -> u64 {
    p.metadata.resource_version.as_deref().and_then(|v| v.parse().ok()).unwrap_or(0)
}

enum Outcome {
    Done(Option<Arc<Pod>>),
    /// The object is not there any more.
    Gone,
    Retry(String),
}

/// Runs until the sender goes away.
pub async fn run(ctx: Context, client: Client, mut wanted: watch::Receiver<Option<Wanted>>) {
    let mut last: Option<Arc<Pod>> = None;
    let mut retry = FIRST_RETRY;
    while wanted.changed().await.is_ok() {
        loop {
            let urgent = wanted.borrow().as_ref().is_some_and(|w| w.urgent || w.delete);
            if !urgent {
                // An urgent change ends the wait; the value is read afterwards in any case.
                let hurry = wanted.wait_for(|w| w.as_ref().is_some_and(|w| w.urgent || w.delete));
                let _ = tokio::time::timeout(COALESCE, hurry).await.map(|r| r.map(drop));
            }
            let Some(w) = wanted.borrow_and_update().clone() else { break };
            match write(&ctx, &client, &w, last.as_ref()).await {
                Outcome::Done(p) => {
                    last = p.or(last);
                    retry = FIRST_RETRY;
                    break;
                }
                Outcome::Gone => {
                    last = None;
                    break;
                }
                Outcome::Retry(error) => {
                    tracing::warn!(pod = w.pod.metadata.name.as_deref(), %error, "pod status not written, trying again");
                    tokio::select! {
                        () = tokio::time::sleep(retry) => {}
                        c = wanted.changed() => if c.is_err() { return },
                    }
                    retry = (retry * 2).min(LAST_RETRY);
                }
            }
        }
    }
}

fn code(e: &kube::Error) -> u16 {
    if let kube::Error::Api(s) = e { s.code } else { 0 }
}

async fn write(ctx: &Context, client: &Client, w: &Wanted, last: Option<&Arc<Pod>>) -> Outcome {
    let namespace = w.pod.metadata.namespace.clone().unwrap_or_default();
    let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let mut base = w.api.clone();
    if is_static(&w.pod) {
        if w.delete {
            return Outcome::Gone;
        }
        match mirror::ensure(ctx, &api, &w.pod, base).await {
            Ok(m) => base = Some(m),
            Err(e) => return Outcome::Retry(e),
        }
    }
    let Some(base) = base else { return Outcome::Gone };
    // Our own last answer may be newer than what the watch has brought.
    let base = match last {
        Some(l) if l.metadata.uid == base.metadata.uid && version(l) > version(&base) => l.clone(),
        _ => base,
    };
    let (name, uid) =
        (base.metadata.name.clone().unwrap_or_default(), base.metadata.uid.clone().unwrap_or_default());
    let old = base.status.clone().unwrap_or_default();
    let mut written = None;
    if let Some(patch) = diff(&uid, &old, &w.status) {
        match api.patch_status(&name, &PatchParams::default(), &Patch::Strategic(patch)).await {
            Ok(p) => written = Some(Arc::new(p)),
            Err(e) if matches!(code(&e), 404 | 409) => return Outcome::Gone,
            Err(e) if code(&e) == 422 => {
                tracing::error!(pod = %name, error = %e, "the API server refuses the pod's status");
            }
            Err(e) => return Outcome::Retry(orlop_base::telemetry::chain(&e)),
        }
    }
    if w.delete && base.metadata.deletion_timestamp.is_some() {
        let only = Preconditions { uid: Some(uid), resource_version: None };
        let params =
            DeleteParams { grace_period_seconds: Some(0), preconditions: Some(only), ..Default::default() };
        match api.delete(&name, &params).await {
            Ok(_) => return Outcome::Gone,
            Err(e) if matches!(code(&e), 404 | 409) => return Outcome::Gone,
            Err(e) => return Outcome::Retry(orlop_base::telemetry::chain(&e)),
        }
    }
    Outcome::Done(written.or(Some(base)))
}
