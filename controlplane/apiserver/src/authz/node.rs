//! What a kubelet may do: its own Node, lease and CSINode, the pods bound to it, and what those pods refer to.
//!
//! A graph from (kind, namespace, name) to the nodes whose pods refer to it is kept from pods, claims and attachments; a node may
//! read an object exactly while one of its pods needs it. Writes that admission narrows further (NodeRestriction) pass here.

use std::collections::{HashMap, HashSet};
use std::sync::OnceLock;

use serde_json::Value;

use super::bootstrap_roles::CLUSTER_ROLES;
use super::rbac::Rule;
use super::{Attributes, Decision};
use crate::request_info::UserInfo;

/// The node's name when the user is a kubelet.
pub fn identity(user: &UserInfo) -> Option<&str> {
    let name = user.name.strip_prefix("system:node:")?;
    (!name.is_empty() && user.in_group("system:nodes")).then_some(name)
}

/// What a pod can refer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    Secret,
    ConfigMap,
    Claim,
    ServiceAccount,
    ResourceClaim,
}

type Reference = (Kind, String);

/// What a pod refers to, names only: they are all in the pod's namespace.
pub fn references(pod: &Value) -> HashSet<Reference> {
    let mut out = HashSet::new();
    let mut add = |kind: Kind, name: Option<&Value>| {
        if let Some(name) = name.and_then(Value::as_str).filter(|n| !n.is_empty()) {
            out.insert((kind, name.to_owned()));
        }
    };
    let spec = &pod["spec"];
    add(Kind::ServiceAccount, spec.get("serviceAccountName"));
    let items = |v: &'_ Value| v.as_array().cloned().unwrap_or_default();
    for s in items(&spec["imagePullSecrets"]) {
        add(Kind::Secret, s.get("name"));
    }
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        for c in items(&spec[list]) {
            for e in items(&c["env"]) {
                add(Kind::Secret, e.pointer("/valueFrom/secretKeyRef/name"));
                add(Kind::ConfigMap, e.pointer("/valueFrom/configMapKeyRef/name"));
            }
            for e in items(&c["envFrom"]) {
                add(Kind::Secret, e.pointer("/secretRef/name"));
                add(Kind::ConfigMap, e.pointer("/configMapRef/name"));
            }
        }
    }
    let pod_name = pod.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
    for v in items(&spec["volumes"]) {
        add(Kind::Secret, v.pointer("/secret/secretName"));
        add(Kind::ConfigMap, v.pointer("/configMap/name"));
        add(Kind::Claim, v.pointer("/persistentVolumeClaim/claimName"));
        if v.get("ephemeral").is_some_and(Value::is_object) {
            let claim = format!("{pod_name}-{}", v["name"].as_str().unwrap_or_default());
            add(Kind::Claim, Some(&Value::String(claim)));
        }
        for source in [
            "csi/nodePublishSecretRef",
            "cephfs/secretRef",
            "rbd/secretRef",
            "iscsi/secretRef",
            "flexVolume/secretRef",
        ] {
            add(Kind::Secret, v.pointer(&format!("/{source}/name")));
        }
        for s in items(&v["projected"]["sources"]) {
            add(Kind::Secret, s.pointer("/secret/name"));
            add(Kind::ConfigMap, s.pointer("/configMap/name"));
        }
    }
    for c in items(&spec["resourceClaims"]) {
        add(Kind::ResourceClaim, c.get("resourceClaimName"));
    }
    for c in items(&pod["status"]["resourceClaimStatuses"]) {
        add(Kind::ResourceClaim, c.get("resourceClaimName"));
    }
    out
}

#[derive(Debug)]
struct PodEntry {
    node: String,
    references: HashSet<Reference>,
}

/// Which node needs which object.
#[derive(Debug, Default)]
pub struct Graph {
    pods: HashMap<(String, String), PodEntry>,
    /// (namespace, reference) to the nodes with a pod that refers to it, counted.
    needed: HashMap<(String, Reference), HashMap<String, usize>>,
    /// Volume to the claim that it is bound to.
    volumes: HashMap<String, (String, String)>,
    claims: HashMap<(String, String), String>,
    attachments: HashMap<String, String>,
}

impl Graph {
    /// Takes in a pod's present state. A finished or unassigned pod gives nobody access.
    pub fn put_pod(&mut self, pod: &Value) {
        let text = |p: &str| pod.pointer(p).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (namespace, name, node) =
            (text("/metadata/namespace"), text("/metadata/name"), text("/spec/nodeName"));
        let finished = matches!(text("/status/phase").as_str(), "Succeeded" | "Failed");
        let mut wanted = if node.is_empty() || finished { HashSet::new() } else { references(pod) };
        // A mirror pod is made by the node itself: it must not open anything to it.
        if pod.pointer("/metadata/annotations/kubernetes.io~1config.mirror").is_some() {
            wanted.clear();
        }
        if let Some(old) = self.pods.get(&(namespace.clone(), name.clone()))
            && old.node == node
            && old.references == wanted
        {
            return;
        }
        self.remove_pod(&namespace, &name);
        if node.is_empty() {
            return;
        }
        for reference in &wanted {
            *self
                .needed
                .entry((namespace.clone(), reference.clone()))
                .or_default()
                .entry(node.clone())
                .or_default() += 1;
        }
        self.pods.insert((namespace, name), PodEntry { node, references: wanted });
    }

    /// Forgets all that was learnt from a resource, before it is listed anew.
    pub fn forget(&mut self, resource: &str) {
        match resource {
            "pods" => {
                self.pods.clear();
                self.needed.clear();
            }
            "persistentvolumeclaims" => {
                self.claims.clear();
                self.volumes.clear();
            }
            _ => self.attachments.clear(),
        }
    }

    /// Forgets a pod.
    pub fn remove_pod(&mut self, namespace: &str, name: &str) {
        let Some(entry) = self.pods.remove(&(namespace.to_owned(), name.to_owned())) else { return };
        for reference in entry.references {
            let key = (namespace.to_owned(), reference);
            let Some(nodes) = self.needed.get_mut(&key) else { continue };
            if let Some(count) = nodes.get_mut(&entry.node) {
                *count -= 1;
                if *count == 0 {
                    nodes.remove(&entry.node);
                }
            }
            if nodes.is_empty() {
                self.needed.remove(&key);
            }
        }
    }

    /// Takes in a claim: the volume that it is bound to becomes readable where the claim is.
    pub fn put_claim(&mut self, namespace: &str, name: &str, volume: Option<&str>) {
        let key = (namespace.to_owned(), name.to_owned());
        if let Some(old) = self.claims.remove(&key) {
            self.volumes.remove(&old);
        }
        if let Some(volume) = volume.filter(|v| !v.is_empty()) {
            self.claims.insert(key.clone(), volume.to_owned());
            self.volumes.insert(volume.to_owned(), key);
        }
    }

    /// Takes in a volume attachment, or forgets it when `node` is `None`.
    pub fn put_attachment(&mut self, name: &str, node: Option<&str>) {
        match node {
            Some(node) => self.attachments.insert(name.to_owned(), node.to_owned()),
            None => self.attachments.remove(name),
        };
    }

    fn needs(&self, node: &str, kind: Kind, namespace: &str, name: &str) -> bool {
        self.needed
            .get(&(namespace.to_owned(), (kind, name.to_owned())))
            .is_some_and(|n| n.contains_key(node))
    }

    fn has_pod(&self, node: &str, namespace: &str, name: &str) -> bool {
        self.pods.get(&(namespace.to_owned(), name.to_owned())).is_some_and(|p| p.node == node)
    }

    /// Whether the node authorizer allows what `node` asks.
    pub fn authorize(&self, node: &str, a: &Attributes<'_>) -> Decision {
        let no = |reason: &str| Decision::NoOpinion(format!("node '{node}' {reason}"));
        let verdict = |ok: bool| {
            if ok {
                Decision::Allow(String::new())
            } else {
                no(&format!("has no relationship to this {}", a.resource))
            }
        };
        if !a.is_resource {
            return by_rules(a);
        }
        let read = matches!(a.verb, "get" | "list" | "watch");
        let (ns, name) = (a.namespace, a.name);
        match (a.group, a.resource, a.subresource) {
            ("", "secrets" | "configmaps", "") => {
                if !read || ns.is_empty() || name.is_empty() {
                    return no("can only read single objects that its pods refer to");
                }
                let kind = if a.resource == "secrets" { Kind::Secret } else { Kind::ConfigMap };
                verdict(self.needs(node, kind, ns, name))
            }
            ("", "persistentvolumeclaims", "") => {
                verdict(a.verb == "get" && self.needs(node, Kind::Claim, ns, name))
            }
            ("", "persistentvolumeclaims", "status") => verdict(
                matches!(a.verb, "get" | "update" | "patch") && self.needs(node, Kind::Claim, ns, name),
            ),
            ("", "persistentvolumes", "") => verdict(
                a.verb == "get"
                    && self.volumes.get(name).is_some_and(|(cns, c)| self.needs(node, Kind::Claim, cns, c)),
            ),
            ("storage.k8s.io", "volumeattachments", "") => {
                verdict(a.verb == "get" && self.attachments.get(name).is_some_and(|n| n == node))
            }
            ("resource.k8s.io", "resourceclaims", "") => {
                verdict(a.verb == "get" && self.needs(node, Kind::ResourceClaim, ns, name))
            }
            ("", "serviceaccounts", "token") => {
                verdict(a.verb == "create" && self.needs(node, Kind::ServiceAccount, ns, name))
            }
            ("", "serviceaccounts", "") => {
                verdict(a.verb == "get" && self.needs(node, Kind::ServiceAccount, ns, name))
            }
            ("coordination.k8s.io", "leases", "") => {
                let own = name == node || (name.is_empty() && a.verb == "create");
                let verb = matches!(a.verb, "get" | "create" | "update" | "patch" | "delete");
                verdict(ns == "kube-node-lease" && verb && own)
            }
            ("storage.k8s.io", "csinodes", "") => {
                let own = name == node || (name.is_empty() && a.verb == "create");
                verdict(own && matches!(a.verb, "get" | "create" | "update" | "patch" | "delete"))
            }
            ("", "nodes", "") if read => {
                if name == node {
                    by_rules(a)
                } else {
                    no("can only read its own Node object")
                }
            }
            ("", "pods", "") if a.verb == "get" => {
                if self.has_pod(node, ns, name) {
                    Decision::Allow(String::new())
                } else {
                    no("can only get pods that are bound to it")
                }
            }
            ("", "pods", "") if read => {
                if selects(a.field_selector, "spec.nodeName", node) {
                    by_rules(a)
                } else {
                    no("can only list/watch pods with spec.nodeName field selector")
                }
            }
            _ => by_rules(a),
        }
    }
}

/// Whether a field selector narrows `field` to `value`.
fn selects(selector: &str, field: &str, value: &str) -> bool {
    selector.split(',').any(|term| {
        term.split_once('=').is_some_and(|(f, v)| f == field && v.strip_prefix('=').unwrap_or(v) == value)
    })
}

fn by_rules(a: &Attributes<'_>) -> Decision {
    static RULES: OnceLock<Vec<Rule>> = OnceLock::new();
    let rules = RULES.get_or_init(|| {
        CLUSTER_ROLES
            .iter()
            .filter(|r| r.name == "system:node")
            .flat_map(|r| Rule::list_from(&r.to_value()["rules"]))
            .collect()
    });
    if rules.iter().any(|r| r.allows(a)) {
        Decision::Allow(String::new())
    } else {
        Decision::NoOpinion(String::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn graph() -> Graph {
        let mut g = Graph::default();
        g.put_pod(&json!({"metadata": {"namespace": "d", "name": "p"}, "spec": {"nodeName": "n1", "serviceAccountName": "sa",
            "imagePullSecrets": [{"name": "pull"}],
            "containers": [{"envFrom": [{"configMapRef": {"name": "cm"}}], "env": [{"valueFrom": {"secretKeyRef": {"name": "s"}}}]}],
            "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}, {"name": "e", "ephemeral": {}},
                {"projected": {"sources": [{"configMap": {"name": "kube-root-ca.crt"}}]}}]}}));
        g.put_claim("d", "c", Some("pv1"));
        g.put_attachment("va", Some("n1"));
        g
    }

    #[test]
    fn decisions() {
        let g = graph();
        // verb, group, resource, namespace, name, field selector -> n1 allowed, n2 allowed
        let table = [
            ("get", "", "secrets", "d", "s", "", true, false),
            ("get", "", "secrets", "d", "pull", "", true, false),
            ("list", "", "secrets", "d", "", "", false, false),
            ("watch", "", "configmaps", "d", "cm", "", true, false),
            ("get", "", "configmaps", "d", "kube-root-ca.crt", "", true, false),
            ("get", "", "configmaps", "other", "cm", "", false, false),
            ("update", "", "configmaps", "d", "cm", "", false, false),
            ("get", "", "persistentvolumeclaims", "d", "c", "", true, false),
            ("get", "", "persistentvolumeclaims", "d", "p-e", "", true, false),
            ("patch", "", "persistentvolumeclaims/status", "d", "c", "", true, false),
            ("get", "", "persistentvolumes", "", "pv1", "", true, false),
            ("get", "storage.k8s.io", "volumeattachments", "", "va", "", true, false),
            ("create", "", "serviceaccounts/token", "d", "sa", "", true, false),
            ("create", "", "serviceaccounts/token", "d", "default", "", false, false),
            ("get", "", "nodes", "", "n1", "", true, false),
            ("list", "", "nodes", "", "", "", false, false),
            ("patch", "", "nodes/status", "", "n1", "", true, true),
            ("get", "", "pods", "d", "p", "", true, false),
            ("list", "", "pods", "", "", "spec.nodeName=n1", true, false),
            ("list", "", "pods", "", "", "", false, false),
            ("update", "coordination.k8s.io", "leases", "kube-node-lease", "n1", "", true, false),
            ("update", "coordination.k8s.io", "leases", "default", "n1", "", false, false),
            ("create", "coordination.k8s.io", "leases", "kube-node-lease", "", "", true, true),
            ("list", "", "services", "", "", "", true, true),
            ("delete", "apps", "deployments", "d", "x", "", false, false),
        ];
        for (verb, group, resource, namespace, name, selector, one, two) in table {
            for (node, want) in [("n1", one), ("n2", two)] {
                let user = UserInfo {
                    name: format!("system:node:{node}"),
                    groups: vec!["system:nodes".into()],
                    ..UserInfo::default()
                };
                let mut a = Attributes::resource(&user, verb, group, resource, namespace, name);
                a.field_selector = selector;
                assert_eq!(g.authorize(identity(&user).unwrap(), &a).allowed(), want, "{node} {a:?}");
            }
        }
    }

    #[test]
    fn a_pods_end_closes_the_door() {
        let mut g = graph();
        assert!(g.needs("n1", Kind::Secret, "d", "s"));
        g.put_pod(&json!({"metadata": {"namespace": "d", "name": "p"}, "spec": {"nodeName": "n1"}, "status": {"phase": "Failed"}}));
        assert!(!g.needs("n1", Kind::Secret, "d", "s"));
        assert!(g.has_pod("n1", "d", "p"));
        g.remove_pod("d", "p");
        assert!(g.needed.is_empty() && g.pods.is_empty());
    }
}
