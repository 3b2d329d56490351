//! Mirror pods: what the API shows of static pods.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::Api;
use kube::api::{DeleteParams, PostParams, Preconditions};
use orlop_api::meta::annotation;

use crate::context::Context;

/// Set on mirrors: the manifest's hash.
pub const MIRROR: &str = "kubernetes.io/config.mirror";
/// Set on static pods: the manifest's hash, which is also the pod's uid.
pub const HASH: &str = "kubernetes.io/config.hash";

/// Makes sure of an up-to-date mirror. `seen` is the one the watch knows.
pub async fn ensure(
    ctx: &Context,
    api: &Api<Pod>,
    pod: &Pod,
    seen: Option<Arc<Pod>>,
) -> Result<Arc<Pod>, String> {
    let hash = annotation(&pod.metadata, HASH).unwrap_or_default();
    let text = |e: kube::Error| orlop_base::telemetry::chain(&e);
    if let Some(m) = seen {
        let fits = annotation(&m.metadata, MIRROR) == Some(hash) && m.metadata.deletion_timestamp.is_none();
        if fits {
            return Ok(m);
        }
        remove(api, &m).await.map_err(text)?;
    }
    let mut annotations = pod.metadata.annotations.clone().unwrap_or_default();
    annotations.insert(MIRROR.into(), hash.into());
    let owner = ctx.node.uid().map(|uid| OwnerReference {
        api_version: "v1".into(),
        kind: "Node".into(),
        name: ctx.config.node_name.clone(),
        uid,
        controller: Some(true),
        block_owner_deletion: None,
    });
    let mirror = Pod {
        metadata: ObjectMeta {
            name: pod.metadata.name.clone(),
            namespace: pod.metadata.namespace.clone(),
            labels: pod.metadata.labels.clone(),
            annotations: Some(annotations),
            owner_references: owner.map(|o| vec![o]),
            ..Default::default()
        },
        spec: pod.spec.clone(),
        status: None,
    };
    match api.create(&PostParams::default(), &mirror).await {
        Ok(m) => Ok(Arc::new(m)),
        Err(kube::Error::Api(s)) if s.code == 409 => {
            let name = pod.metadata.name.as_deref().unwrap_or_default();
            let there = api.get(name).await.map_err(text)?;
            if annotation(&there.metadata, MIRROR) == Some(hash) {
                return Ok(Arc::new(there));
            }
            if annotation(&there.metadata, MIRROR).is_some() {
                remove(api, &there).await.map_err(text)?;
            }
            Err("a pod of the mirror's name exists".into())
        }
        Err(e) => Err(text(e)),
    }
}

/// Deletes a mirror at once.
pub async fn remove(api: &Api<Pod>, mirror: &Pod) -> Result<(), kube::Error> {
    let name = mirror.metadata.name.as_deref().unwrap_or_default();
    let only = Preconditions { uid: mirror.metadata.uid.clone(), resource_version: None };
    let params =
        DeleteParams { grace_period_seconds: Some(0), preconditions: Some(only), ..Default::default() };
    match api.delete(name, &params).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(s)) if s.code == 404 || s.code == 409 => Ok(()),
        Err(e) => Err(e),
    }
}
