//! Keeps the authorizers' state in step with the registry.

use std::sync::Arc;

use orlop_base::supervise::TaskGroup;
use serde_json::Value;

use super::Authorizer;
use super::{node, rbac};
use crate::feed::{Change, Feed};
use crate::registry::Registry;
use crate::status::Status;

const RBAC: [(&str, &str); 4] = [
    ("clusterroles", "/apis/rbac.authorization.k8s.io/v1/clusterroles"),
    ("roles", "/apis/rbac.authorization.k8s.io/v1/roles"),
    ("clusterrolebindings", "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"),
    ("rolebindings", "/apis/rbac.authorization.k8s.io/v1/rolebindings"),
];
const GRAPH: [(&str, &str); 3] = [
    ("pods", "/api/v1/pods"),
    ("persistentvolumeclaims", "/api/v1/persistentvolumeclaims"),
    ("volumeattachments", "/apis/storage.k8s.io/v1/volumeattachments"),
];

fn name_of(object: &Value) -> (&str, &str) {
    let text = |p: &str| object.pointer(p).and_then(Value::as_str).unwrap_or_default();
    (text("/metadata/namespace"), text("/metadata/name"))
}

/// Loads everything, so that the first request is answered by the whole policy, and follows changes from there on.
///
/// # Errors
/// When roles or bindings cannot be listed.
pub async fn follow(
    authorizer: &Arc<Authorizer>,
    registry: &Registry,
    tasks: &TaskGroup,
) -> Result<(), Status> {
    for (resource, path) in RBAC {
        let mut feed = Feed::new(registry.clone(), path);
        apply_rbac(&authorizer.rbac, resource, Change::All(feed.list().await?));
        let (authorizer, stop) = (authorizer.clone(), tasks.stop_token());
        tasks.spawn(async move {
            feed.run(stop, |change| apply_rbac(&authorizer.rbac, resource, change)).await;
        });
    }
    for (resource, path) in GRAPH {
        let mut feed = Feed::new(registry.clone(), path);
        match feed.list().await {
            Ok(items) => apply_graph(&authorizer.graph, resource, Change::All(items)),
            // A resource that this server does not have gives no node any right.
            Err(e) if e.is_not_found() => continue,
            Err(e) => return Err(e),
        }
        let (authorizer, stop) = (authorizer.clone(), tasks.stop_token());
        tasks.spawn(async move {
            feed.run(stop, |change| apply_graph(&authorizer.graph, resource, change)).await;
        });
    }
    Ok(())
}

fn apply_rbac(policy: &parking_lot::RwLock<rbac::Policy>, resource: &str, change: Change) {
    let mut policy = policy.write();
    match change {
        Change::All(items) => policy.replace(resource, &items),
        Change::Put(object) => policy.put(resource, &object),
        Change::Gone(object) => {
            let (namespace, name) = name_of(&object);
            policy.remove(resource, namespace, name);
        }
    }
}

fn apply_graph(graph: &parking_lot::RwLock<node::Graph>, resource: &str, change: Change) {
    let mut graph = graph.write();
    let put = |graph: &mut node::Graph, object: &Value| {
        let (namespace, name) = name_of(object);
        match resource {
            "pods" => graph.put_pod(object),
            "persistentvolumeclaims" => {
                graph.put_claim(namespace, name, object.pointer("/spec/volumeName").and_then(Value::as_str));
            }
            _ => graph.put_attachment(name, object.pointer("/spec/nodeName").and_then(Value::as_str)),
        }
    };
    match change {
        Change::All(items) => {
            graph.forget(resource);
            for item in &items {
                put(&mut graph, item);
            }
        }
        Change::Put(object) => put(&mut graph, &object),
        Change::Gone(object) => {
            let (namespace, name) = name_of(&object);
            match resource {
                "pods" => graph.remove_pod(namespace, name),
                "persistentvolumeclaims" => graph.put_claim(namespace, name, None),
                _ => graph.put_attachment(name, None),
            }
        }
    }
}
