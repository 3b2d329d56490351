//! NodeRestriction: a kubelet writes its own Node, lease, CSINode and the status of its own pods, makes mirror pods and tokens for
//! its pods, and sets no labels, taints or owners that would draw other people's pods to it.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::{Context, forbidden, is_mirror, items, text};
use crate::authz::node::{identity, references};
use crate::registry::{Attributes, Operation};
use crate::status::Status;

const OWN_LABELS: [&str; 11] = [
    "kubernetes.io/hostname",
    "topology.kubernetes.io/zone",
    "topology.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "failure-domain.beta.kubernetes.io/region",
    "beta.kubernetes.io/instance-type",
    "node.kubernetes.io/instance-type",
    "kubernetes.io/os",
    "kubernetes.io/arch",
    "beta.kubernetes.io/os",
    "beta.kubernetes.io/arch",
];

pub(super) async fn check(c: &Context, a: &Attributes) -> Result<(), Status> {
    let Some(node) = identity(&a.user) else { return Ok(()) };
    let node = node.to_owned();
    let null = Value::Null;
    let (object, old) = (a.object.as_ref().unwrap_or(&null), a.old_object.as_ref().unwrap_or(&null));
    let pod = async |name: &str| c.registry.get("", "pods", &a.info.namespace, name).await;
    let verdict = match (a.info.api_group.as_str(), a.info.resource.as_str(), a.info.subresource.as_str()) {
        ("", "pods", "") => match a.operation {
            Operation::Create => {
                let this = c.registry.get("", "nodes", "", &node).await?;
                mirror_pod(&node, text(&this, "/metadata/uid"), object)
            }
            Operation::Delete => {
                let existing = pod(&a.info.name).await?;
                bound(&node, &existing, "delete pods")
            }
            other => Err(format!(
                "unexpected operation {:?}, node {node:?} can only create and delete mirror pods",
                other.as_str()
            )),
        },
        ("", "pods", "status") => pod_status(&node, old, object),
        ("", "pods", "eviction") => {
            let existing = pod(&a.info.name).await?;
            bound(&node, &existing, "evict pods")
        }
        ("", "pods", other) => {
            Err(format!("unexpected pod subresource {other:?}, only 'status' and 'eviction' are allowed"))
        }
        ("", "nodes", _) => own_node(&node, a, old, object),
        ("", "persistentvolumeclaims", "status") => claim_status(&node, old, object),
        ("", "persistentvolumeclaims", _) => Err("may only update PVC status".to_owned()),
        ("", "serviceaccounts", "token") => match token_target(object) {
            Ok((name, uid)) => {
                let existing = pod(name).await?;
                if text(&existing, "/metadata/uid") != uid {
                    Err(format!(
                        "the UID in the bound object reference ({uid}) does not match the UID in record. The object might have been deleted and then recreated"
                    ))
                } else if text(&existing, "/spec/nodeName") != node {
                    Err("node requested token bound to a pod scheduled on a different node".to_owned())
                } else {
                    audience(&existing, object)
                }
            }
            Err(why) => Err(why.to_owned()),
        },
        ("coordination.k8s.io", "leases", _) => {
            named(&node, a, object, "lease").and_then(|()| match a.info.namespace.as_str() {
                "kube-node-lease" => Ok(()),
                other => Err(format!(
                    "can only access leases in the \"kube-node-lease\" system namespace, not {other:?}"
                )),
            })
        }
        ("storage.k8s.io", "csinodes", _) => named(&node, a, object, "CSINode"),
        _ => Ok(()),
    };
    verdict.map_err(|why| forbidden(a, why))
}

fn named(node: &str, a: &Attributes, object: &Value, what: &str) -> Result<(), String> {
    let name = if a.info.name.is_empty() { text(object, "/metadata/name") } else { &a.info.name };
    if name == node {
        Ok(())
    } else {
        Err(format!("can only access {what} with the same name as the requesting node"))
    }
}

fn bound(node: &str, pod: &Value, what: &str) -> Result<(), String> {
    if text(pod, "/spec/nodeName") == node {
        Ok(())
    } else {
        Err(format!("node {node:?} can only {what} with spec.nodeName set to itself"))
    }
}

fn mirror_pod(node: &str, uid: &str, pod: &Value) -> Result<(), String> {
    if !is_mirror(pod) {
        return Err(format!(
            "pod does not have \"kubernetes.io/config.mirror\" annotation, node {node:?} can only create mirror pods"
        ));
    }
    bound(node, pod, "create pods")?;
    let owners: Vec<&Value> = items(pod, "/metadata/ownerReferences").collect();
    let owner = match owners.as_slice() {
        [one]
            if text(one, "/apiVersion") == "v1"
                && text(one, "/kind") == "Node"
                && text(one, "/name") == node =>
        {
            *one
        }
        _ => {
            return Err(format!(
                "node {node:?} can only create pods with a single owner reference set to itself"
            ));
        }
    };
    if owner["controller"] != true {
        return Err(format!(
            "node {node:?} can only create pods with a controller owner reference set to itself"
        ));
    }
    if owner["blockOwnerDeletion"] == true {
        return Err(format!("node {node:?} must not set blockOwnerDeletion on an owner reference"));
    }
    if text(owner, "/uid") != uid {
        return Err(format!("node {node} UID mismatch: expected {} got {uid}", text(owner, "/uid")));
    }
    if !references(pod).is_empty() {
        return Err(format!("node {node:?} can not create pods that reference other API objects"));
    }
    Ok(())
}

fn pod_status(node: &str, old: &Value, new: &Value) -> Result<(), String> {
    bound(node, old, "update pod status for pods")?;
    if labels(old) != labels(new) {
        return Err(format!("node {node:?} cannot update labels through pod status"));
    }
    if old.pointer("/status/resourceClaimStatuses") != new.pointer("/status/resourceClaimStatuses") {
        return Err(format!("node {node:?} cannot update resource claim statuses"));
    }
    Ok(())
}

fn labels(object: &Value) -> Map<String, Value> {
    object.pointer("/metadata/labels").and_then(Value::as_object).cloned().unwrap_or_default()
}

fn own_node(node: &str, a: &Attributes, old: &Value, new: &Value) -> Result<(), String> {
    let name = if a.info.name.is_empty() { text(new, "/metadata/name") } else { &a.info.name };
    if name != node {
        return Err(format!("node {node:?} is not allowed to modify node {name:?}"));
    }
    if !matches!(a.operation, Operation::Create | Operation::Update) {
        return Ok(());
    }
    let bad = forbidden_labels(&labels(old), &labels(new));
    if !bad.is_empty() {
        let list: Vec<String> = bad.into_iter().collect();
        let verb =
            if a.operation == Operation::Create { "set the following labels" } else { "modify labels" };
        return Err(format!("node {node:?} is not allowed to {verb}: {}", list.join(", ")));
    }
    if a.operation == Operation::Update {
        let list = |o: &Value, p: &str| items(o, p).cloned().collect::<Vec<_>>();
        if list(old, "/spec/taints") != list(new, "/spec/taints") {
            return Err(format!("node {node:?} is not allowed to modify taints"));
        }
        if list(old, "/metadata/ownerReferences") != list(new, "/metadata/ownerReferences") {
            return Err(format!("node {node:?} is not allowed to modify ownerReferences"));
        }
    }
    Ok(())
}

fn forbidden_labels(old: &Map<String, Value>, new: &Map<String, Value>) -> BTreeSet<String> {
    let keys: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let changed = keys.into_iter().filter(|k| old.get(*k) != new.get(*k));
    changed.filter(|k| !may_set(k)).cloned().collect()
}

fn may_set(label: &str) -> bool {
    let domain = label.split_once('/').map(|(d, _)| d).unwrap_or_default();
    let within =
        |parent: &str| domain == parent || domain.strip_suffix(parent).is_some_and(|d| d.ends_with('.'));
    if within("node-restriction.kubernetes.io") {
        return false;
    }
    if !within("kubernetes.io") && !within("k8s.io") {
        return true;
    }
    OWN_LABELS.contains(&label) || within("kubelet.kubernetes.io") || within("node.kubernetes.io")
}

fn claim_status(node: &str, old: &Value, new: &Value) -> Result<(), String> {
    let bare = |claim: &Value| {
        let mut claim = claim.clone();
        for (parent, fields) in [
            (
                "/status",
                ["capacity", "conditions", "allocatedResourceStatuses", "allocatedResources"].as_slice(),
            ),
            ("/metadata", ["resourceVersion", "managedFields"].as_slice()),
        ] {
            if let Some(map) = claim.pointer_mut(parent).and_then(Value::as_object_mut) {
                map.retain(|k, _| !fields.contains(&k.as_str()));
            }
        }
        claim
    };
    if bare(old) == bare(new) {
        Ok(())
    } else {
        Err(format!(
            "node {node:?} is not allowed to update fields other than status.quantity and status.conditions"
        ))
    }
}

/// Name and UID of the pod that a token is to be bound to.
fn token_target(request: &Value) -> Result<(&str, &str), &'static str> {
    let reference = request.pointer("/spec/boundObjectRef").unwrap_or(&Value::Null);
    let name = text(reference, "/name");
    if text(reference, "/apiVersion") != "v1" || text(reference, "/kind") != "Pod" || name.is_empty() {
        return Err("node requested token not bound to a pod");
    }
    match text(reference, "/uid") {
        "" => Err("node requested token with a pod binding without a uid"),
        uid => Ok((name, uid)),
    }
}

/// A foreign audience is for pods that mount such a token.
fn audience(pod: &Value, request: &Value) -> Result<(), String> {
    let asked: Vec<&str> = items(request, "/spec/audiences").filter_map(Value::as_str).collect();
    let mut offered: BTreeSet<&str> = BTreeSet::new();
    for volume in items(pod, "/spec/volumes") {
        for source in items(volume, "/projected/sources").filter(|s| s.get("serviceAccountToken").is_some()) {
            offered.insert(text(source, "/serviceAccountToken/audience"));
        }
        if volume.get("csi").is_some()
            || volume.get("persistentVolumeClaim").is_some()
            || volume.get("ephemeral").is_some()
        {
            // A CSI driver names its audiences in the CSIDriver object, which this check does not look up.
            return Ok(());
        }
    }
    // By now an empty list has become the API server's own audience, which a token without an audience stands for.
    let own = |a: &str| a.starts_with("https://kubernetes.default.svc") && offered.contains("");
    match asked.iter().find(|a| !offered.contains(**a) && !own(a)) {
        None => Ok(()),
        Some(a) => Err(format!("audience {a:?} not found in pod spec volume, node may not request it")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::attributes;
    use super::*;
    use serde_json::json;

    #[test]
    fn label_rules() {
        for (label, want) in [
            ("example.com/x", true),
            ("plain", true),
            ("kubernetes.io/hostname", true),
            ("kubernetes.io/role", false),
            ("node-role.kubernetes.io/control-plane", false),
            ("node.kubernetes.io/anything", true),
            ("a.kubelet.kubernetes.io/x", true),
            ("node-restriction.kubernetes.io/x", false),
            ("a.node-restriction.kubernetes.io/x", false),
            ("notkubernetes.io/x", true),
        ] {
            assert_eq!(may_set(label), want, "{label}");
        }
    }

    #[test]
    fn own_node_only() {
        let node = |name: &str, extra: Value| {
            let mut n = json!({"metadata": {"name": name, "labels": {}}, "spec": {}});
            n["metadata"]["labels"] = extra;
            n
        };
        let ask = |op: Operation, old: Value, new: Value| {
            let a = attributes(op, "nodes", new.clone(), "system:node:n1");
            own_node("n1", &a, &old, &new).is_ok()
        };
        assert!(ask(Operation::Create, Value::Null, node("n1", json!({"kubernetes.io/os": "linux"}))));
        assert!(!ask(Operation::Create, Value::Null, node("n2", json!({}))));
        assert!(!ask(Operation::Create, Value::Null, node("n1", json!({"node-role.kubernetes.io/x": ""}))));
        let mut tainted = node("n1", json!({}));
        tainted["spec"]["taints"] = json!([{"key": "a"}]);
        assert!(ask(Operation::Create, Value::Null, tainted.clone()));
        assert!(!ask(Operation::Update, tainted, node("n1", json!({}))));
    }

    #[test]
    fn mirror_pods() {
        let good = json!({"metadata": {"annotations": {"kubernetes.io/config.mirror": "h"},
            "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "u", "controller": true}]}, "spec": {"nodeName": "n1"}});
        assert!(mirror_pod("n1", "u", &good).is_ok());
        assert!(mirror_pod("n1", "other", &good).is_err());
        assert!(mirror_pod("n2", "u", &good).is_err());
        let mut bad = good.clone();
        bad["spec"]["volumes"] = json!([{"configMap": {"name": "c"}}]);
        assert!(mirror_pod("n1", "u", &bad).is_err());
        let mut bad = good;
        bad["metadata"]["annotations"] = json!({});
        assert!(mirror_pod("n1", "u", &bad).is_err());
    }

    #[test]
    fn tokens() {
        let request = |r: Value| json!({"spec": {"boundObjectRef": r, "audiences": ["vault"]}});
        assert!(token_target(&request(Value::Null)).is_err());
        assert!(token_target(&request(json!({"apiVersion": "v1", "kind": "Pod", "name": "p"}))).is_err());
        let good = request(json!({"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "u"}));
        assert_eq!(token_target(&good), Ok(("p", "u")));
        let pod = json!({"spec": {"volumes": [{"projected": {"sources": [{"serviceAccountToken": {"audience": "vault"}}]}}]}});
        assert!(audience(&pod, &good).is_ok());
        assert!(audience(&json!({"spec": {}}), &good).is_err());
    }
}
