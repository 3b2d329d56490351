//! What a cluster has from the start: system namespaces, priority classes, RBAC policy, the `kubernetes` Service and the ConfigMaps
//! by which machines and extension servers find the cluster's certificates. Reconciled at each start.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use futures::StreamExt;
use ipnet::Ipv4Net;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::authz::bootstrap_roles::{CLUSTER_ROLE_BINDINGS, CLUSTER_ROLES, ROLE_BINDINGS, ROLES};
use crate::authz::controller_roles::CONTROLLER_ROLES;
use crate::authz::policy_table::{Binding, Role, binding, n, r};
use crate::authz::rbac::{Rule, uncovered};
use crate::registry::Registry;
use crate::status::Status;

const RBAC: &str = "rbac.authorization.k8s.io";
const NAMESPACES: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];
/// Writes at once: enough to share the store's syncs.
const PARALLEL: usize = 16;
/// How often the `kubernetes` endpoints are put right if somebody changed them.
const ENDPOINTS_PERIOD: Duration = Duration::from_secs(30);

/// What differs between clusters.
#[derive(Clone, Debug)]
pub struct Facts {
    pub advertise_address: IpAddr,
    pub port: u16,
    pub service_cidr: Ipv4Net,
    pub server_url: String,
    pub ca_pem: String,
    pub front_proxy_ca_pem: String,
}

/// Roles that upstream leaves to installers, or that have no counterpart there.
const OWN_ROLES: &[Role] = &[
    Role {
        name: "system:orlop:dns",
        namespace: "",
        aggregate_to: "",
        aggregates: "",
        rules: &[
            r("get list watch", "core", "services pods namespaces nodes endpoints"),
            r("get list watch", "discovery.k8s.io", "endpointslices"),
        ],
    },
    Role {
        name: "orlop:cluster-info",
        namespace: "kube-public",
        aggregate_to: "",
        aggregates: "",
        rules: &[n("get", "core", "configmaps", "cluster-info")],
    },
];

const OWN_BINDINGS: &[Binding] = &[
    Binding {
        name: "system:orlop:dns",
        namespace: "",
        role: "ClusterRole/system:orlop:dns",
        subjects: "user:system:kube-dns",
    },
    Binding {
        name: "orlop:node-proxier",
        namespace: "",
        role: "ClusterRole/system:node-proxier",
        subjects: "group:system:nodes",
    },
    Binding {
        name: "orlop:kubelet-api-admin",
        namespace: "",
        role: "ClusterRole/system:kubelet-api-admin",
        subjects: "user:kube-apiserver-kubelet-client",
    },
    // Our controllers share one identity, which also applies the administrator's manifests folder. Upstream's take the accounts above
    // one by one, by the right to make tokens for them all, which is the same power.
    Binding {
        name: "orlop:controllers",
        namespace: "",
        role: "ClusterRole/cluster-admin",
        subjects: "user:system:kube-controller-manager",
    },
    // What kubeadm sets up for joining: bootstrap tokens may ask for a node's first certificate, which is approved by itself, as are renewals.
    Binding {
        name: "orlop:kubelet-bootstrap",
        namespace: "",
        role: "ClusterRole/system:node-bootstrapper",
        subjects: "group:system:bootstrappers",
    },
    Binding {
        name: "orlop:node-autoapprove-bootstrap",
        namespace: "",
        role: "ClusterRole/system:certificates.k8s.io:certificatesigningrequests:nodeclient",
        subjects: "group:system:bootstrappers",
    },
    Binding {
        name: "orlop:node-autoapprove-certificate-rotation",
        namespace: "",
        role: "ClusterRole/system:certificates.k8s.io:certificatesigningrequests:selfnodeclient",
        subjects: "group:system:nodes",
    },
    Binding {
        name: "orlop:cluster-info",
        namespace: "kube-public",
        role: "Role/orlop:cluster-info",
        subjects: "user:system:anonymous group:system:authenticated",
    },
];

/// Makes what is missing and repairs what policy demands. Things that people may change (everything but RBAC) are left as they are.
///
/// # Errors
/// The registry's, for the first object that could not be written.
pub async fn ensure(registry: &Registry, facts: &Facts) -> Result<(), Status> {
    for name in NAMESPACES {
        ensure_exists(
            registry,
            "",
            "namespaces",
            "",
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}),
        )
        .await?;
    }
    for (name, value) in [("system-node-critical", 2_000_001_000), ("system-cluster-critical", 2_000_000_000)]
    {
        let description = match name {
            "system-node-critical" => {
                "Used for system critical pods that must not be moved from their current node."
            }
            _ => {
                "Used for system critical pods that must run in the cluster, but can be moved to another node if necessary."
            }
        };
        let class = json!({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name},
            "value": value, "description": description, "globalDefault": false, "preemptionPolicy": "PreemptLowerPriority"});
        ensure_exists(registry, "scheduling.k8s.io", "priorityclasses", "", class).await?;
    }
    ensure_rbac(registry).await?;
    ensure_service_cidr(registry, facts).await?;
    ensure_service(registry, facts).await?;
    ensure_config_maps(registry, facts).await
}

fn name_of(object: &Value) -> String {
    object.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default().to_owned()
}

async fn ensure_exists(
    registry: &Registry,
    group: &str,
    resource: &str,
    namespace: &str,
    object: Value,
) -> Result<(), Status> {
    match registry.get(group, resource, namespace, &name_of(&object)).await {
        Ok(_) => return Ok(()),
        Err(e) if !e.is_not_found() => return Err(e),
        Err(_) => {}
    }
    match registry.create(group, resource, namespace, object).await {
        Err(e) if !e.is_already_exists() => Err(e),
        _ => Ok(()),
    }
}

/// Everything that RBAC starts with, by resource.
fn policy() -> [(&'static str, Vec<Value>); 4] {
    let (own_cluster, own_namespaced): (Vec<_>, Vec<_>) =
        OWN_ROLES.iter().partition(|r| r.namespace.is_empty());
    let cluster_roles = CLUSTER_ROLES.iter().chain(CONTROLLER_ROLES).chain(own_cluster).map(Role::to_value);
    let cluster_roles = cluster_roles.collect();
    let roles = ROLES.iter().chain(own_namespaced).map(Role::to_value).collect();

    let (own_cluster, own_namespaced): (Vec<_>, Vec<_>) =
        OWN_BINDINGS.iter().partition(|b| b.namespace.is_empty());
    let mut cluster_bindings: Vec<Value> =
        CLUSTER_ROLE_BINDINGS.iter().chain(own_cluster).map(Binding::to_value).collect();
    for role in CONTROLLER_ROLES {
        let account = role.name.strip_prefix("system:controller:").unwrap_or(role.name);
        let subject = format!("sa:kube-system/{account}");
        cluster_bindings.push(binding(role.name, "", &format!("ClusterRole/{}", role.name), &[&subject]));
    }
    let bindings = ROLE_BINDINGS.iter().chain(own_namespaced).map(Binding::to_value).collect();
    [
        ("clusterroles", cluster_roles),
        ("roles", roles),
        ("clusterrolebindings", cluster_bindings),
        ("rolebindings", bindings),
    ]
}

/// What to write so that an existing object grants at least what it must; `None` when nothing is to be done. Rules and subjects that
/// were added stay, as upstream's reconciliation leaves them.
fn repaired(existing: &Value, wanted: &Value) -> Option<Value> {
    const AUTOUPDATE: &str = "/metadata/annotations/rbac.authorization.kubernetes.io~1autoupdate";
    if existing.pointer(AUTOUPDATE).and_then(Value::as_str) == Some("false") {
        return None;
    }
    let mut next = existing.clone();
    for map in ["labels", "annotations"] {
        for (key, value) in wanted["metadata"][map].as_object().into_iter().flatten() {
            next["metadata"][map][key] = value.clone();
        }
    }
    if let Some(aggregation) = wanted.get("aggregationRule") {
        next["aggregationRule"] = aggregation.clone();
    } else if let Some(rules) = wanted.get("rules") {
        let have = Rule::list_from(&existing["rules"]);
        let missing = uncovered(&have, &Rule::list_from(rules));
        if !missing.is_empty() {
            let mut all = existing["rules"].as_array().cloned().unwrap_or_default();
            let wanted_rules = rules.as_array().into_iter().flatten();
            all.extend(
                wanted_rules.filter(|r| !uncovered(&have, &Rule::list_from(&json!([r]))).is_empty()).cloned(),
            );
            next["rules"] = Value::Array(all);
        }
    }
    if let Some(subjects) = wanted.get("subjects").and_then(Value::as_array) {
        let mut all = existing["subjects"].as_array().cloned().unwrap_or_default();
        for subject in subjects {
            let same = |s: &Value| ["kind", "name", "namespace"].iter().all(|k| s.get(k) == subject.get(k));
            if !all.iter().any(same) {
                all.push(subject.clone());
            }
        }
        next["subjects"] = Value::Array(all);
    }
    (next != *existing).then_some(next)
}

async fn ensure_rbac(registry: &Registry) -> Result<(), Status> {
    for (resource, wanted) in policy() {
        let listed = registry.list(RBAC, resource, "").await?;
        let key = |o: &Value| {
            (
                o.pointer("/metadata/namespace").and_then(Value::as_str).unwrap_or_default().to_owned(),
                name_of(o),
            )
        };
        let existing: HashMap<_, _> = listed.into_iter().map(|o| (key(&o), o)).collect();
        let writes = wanted.into_iter().filter_map(|object| {
            let (namespace, name) = key(&object);
            let next = match existing.get(&(namespace.clone(), name.clone())) {
                None => Some((true, object)),
                Some(old) => repaired(old, &object).map(|o| (false, o)),
            };
            next.map(|(new, object)| async move {
                let written = if new {
                    registry.create(RBAC, resource, &namespace, object).await
                } else {
                    registry.update(RBAC, resource, &namespace, &name, object).await
                };
                match written {
                    // Another server may be doing the same at this moment.
                    Err(e) if e.is_already_exists() || e.is_conflict() => Ok(()),
                    other => other.map(|_| ()),
                }
            })
        });
        let results: Vec<Result<(), Status>> =
            futures::stream::iter(writes).buffer_unordered(PARALLEL).collect().await;
        results.into_iter().collect::<Result<(), Status>>()?;
    }
    Ok(())
}

/// The address of the `kubernetes` Service: the first of the range.
pub fn service_address(cidr: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(cidr.network()) + 1)
}

/// Shows the range of the servers' `--service-cidr` as the object under which clients look for it.
async fn ensure_service_cidr(registry: &Registry, facts: &Facts) -> Result<(), Status> {
    const GROUP: &str = "networking.k8s.io";
    let range = json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": [facts.service_cidr.to_string()]}});
    ensure_exists(registry, GROUP, "servicecidrs", "", range).await?;
    let mut stored = registry.get(GROUP, "servicecidrs", "", "kubernetes").await?;
    if stored.pointer("/status/conditions/0/status") == Some(&json!("True")) {
        return Ok(());
    }
    stored["status"] = json!({"conditions": [{"type": "Ready", "status": "True", "reason": "", "message": "Kubernetes default Service CIDR is ready",
        "lastTransitionTime": crate::registry::now()}]});
    match registry.update_status(GROUP, "servicecidrs", "", "kubernetes", stored).await {
        // Another server was quicker.
        Err(e) if !e.is_conflict() => Err(e),
        _ => Ok(()),
    }
}

async fn ensure_service(registry: &Registry, facts: &Facts) -> Result<(), Status> {
    let address = service_address(facts.service_cidr).to_string();
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "kubernetes", "namespace": "default", "labels": {"component": "apiserver", "provider": "kubernetes"}},
        "spec": {"type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "sessionAffinity": "None",
            "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": facts.port}]},
    });
    let existing = match registry.get("", "services", "default", "kubernetes").await {
        Ok(existing) => Some(existing),
        Err(e) if e.is_not_found() => None,
        Err(e) => return Err(e),
    };
    match existing {
        None => match registry.create("", "services", "default", service).await {
            Err(e) if !e.is_already_exists() => return Err(e),
            _ => {}
        },
        Some(mut old) if old.pointer("/spec/ports/0/targetPort") != Some(&json!(facts.port)) => {
            old["spec"]["ports"] = service["spec"]["ports"].clone();
            registry.update("", "services", "default", "kubernetes", old).await?;
        }
        Some(_) => {}
    }
    ensure_endpoints(registry, facts).await
}

/// Points the `kubernetes` Service at this server.
async fn ensure_endpoints(registry: &Registry, facts: &Facts) -> Result<(), Status> {
    let family = if facts.advertise_address.is_ipv4() { "IPv4" } else { "IPv6" };
    let address = facts.advertise_address.to_string();
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
        "metadata": {"name": "kubernetes", "namespace": "default", "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "endpoints": [{"addresses": [address], "conditions": {"ready": true}}],
        "ports": [{"name": "https", "port": facts.port, "protocol": "TCP"}],
    });
    // No controller may mirror this one into a second slice.
    let endpoints = json!({
        "apiVersion": "v1", "kind": "Endpoints",
        "metadata": {"name": "kubernetes", "namespace": "default", "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}},
        "subsets": [{"addresses": [{"ip": address}], "ports": [{"name": "https", "port": facts.port, "protocol": "TCP"}]}],
    });
    for (group, resource, wanted, fields) in [
        ("discovery.k8s.io", "endpointslices", slice, ["endpoints", "ports"].as_slice()),
        ("", "endpoints", endpoints, ["subsets"].as_slice()),
    ] {
        match registry.get(group, resource, "default", "kubernetes").await {
            Err(e) if e.is_not_found() => match registry.create(group, resource, "default", wanted).await {
                Err(e) if !e.is_already_exists() => return Err(e),
                _ => {}
            },
            Err(e) => return Err(e),
            Ok(mut old) if fields.iter().any(|f| old.get(f) != wanted.get(f)) => {
                for field in fields {
                    old[*field] = wanted[*field].clone();
                }
                match registry.update(group, resource, "default", "kubernetes", old).await {
                    Err(e) if !e.is_conflict() => return Err(e),
                    _ => {}
                }
            }
            Ok(_) => {}
        }
    }
    Ok(())
}

/// Keeps the `kubernetes` endpoints right until `stop`.
pub async fn keep_endpoints(registry: Registry, facts: Facts, stop: CancellationToken) {
    loop {
        tokio::select! {
            // Nothing is lost when a pause is cut short.
            () = stop.cancelled() => return,
            () = tokio::time::sleep(ENDPOINTS_PERIOD) => {}
        }
        if let Err(e) = ensure_endpoints(&registry, &facts).await {
            tracing::warn!(error = %e.message, "cannot update the endpoints of the kubernetes Service");
        }
    }
}

async fn ensure_config_maps(registry: &Registry, facts: &Facts) -> Result<(), Status> {
    use base64::Engine;
    let ca = base64::engine::general_purpose::STANDARD.encode(&facts.ca_pem);
    let kubeconfig = format!(
        "apiVersion: v1\nkind: Config\nclusters:\n- name: \"\"\n  cluster:\n    certificate-authority-data: {ca}\n    server: {}\ncontexts: null\ncurrent-context: \"\"\nusers: null\n",
        facts.server_url
    );
    let names = r#"["X-Remote-User"]"#;
    let maps = [
        ("kube-public", "cluster-info", json!({"kubeconfig": kubeconfig})),
        (
            "kube-system",
            "extension-apiserver-authentication",
            json!({"client-ca-file": facts.ca_pem, "requestheader-client-ca-file": facts.front_proxy_ca_pem,
                "requestheader-allowed-names": "[\"front-proxy-client\"]", "requestheader-username-headers": names,
                "requestheader-group-headers": r#"["X-Remote-Group"]"#, "requestheader-uid-headers": r#"["X-Remote-Uid"]"#,
                "requestheader-extra-headers-prefix": r#"["X-Remote-Extra-"]"#}),
        ),
    ];
    for (namespace, name, data) in maps {
        match registry.get("", "configmaps", namespace, name).await {
            Err(e) if e.is_not_found() => {
                let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": namespace}, "data": data});
                ensure_exists(registry, "", "configmaps", namespace, map).await?;
            }
            Err(e) => return Err(e),
            Ok(mut old) => {
                let mut changed = false;
                for (key, value) in data.as_object().into_iter().flatten() {
                    // Signatures of bootstrap tokens over the kubeconfig live beside it and stay.
                    if old["data"].get(key) != Some(value) {
                        old["data"][key] = value.clone();
                        changed = true;
                    }
                }
                if changed {
                    registry.update("", "configmaps", namespace, name, old).await?;
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_has_every_name_once() {
        for (resource, objects) in policy() {
            let mut names: Vec<String> = objects
                .iter()
                .map(|o| {
                    format!("{}/{}", o["metadata"]["namespace"].as_str().unwrap_or_default(), name_of(o))
                })
                .collect();
            let all = names.len();
            names.sort();
            names.dedup();
            assert_eq!(names.len(), all, "{resource}");
        }
    }

    #[test]
    fn repairs_add_and_never_take() {
        const ROLE: Role = Role {
            name: "x",
            namespace: "",
            aggregate_to: "view",
            aggregates: "",
            rules: &[r("get list", "core", "pods")],
        };
        let wanted = ROLE.to_value();
        assert_eq!(repaired(&wanted, &wanted), None);
        let mut changed = wanted.clone();
        changed["rules"] = json!([{"verbs": ["get"], "apiGroups": [""], "resources": ["secrets"]}]);
        changed["metadata"]["labels"] = json!({"mine": "1"});
        let next = repaired(&changed, &wanted).unwrap();
        assert_eq!(next["rules"].as_array().unwrap().len(), 2);
        assert_eq!(next["metadata"]["labels"]["mine"], "1");
        assert_eq!(next["metadata"]["labels"]["kubernetes.io/bootstrapping"], "rbac-defaults");
        changed["metadata"]["annotations"]["rbac.authorization.kubernetes.io/autoupdate"] = json!("false");
        assert_eq!(repaired(&changed, &wanted), None);
        let b = binding("b", "", "ClusterRole/x", &["user:a"]);
        let mut other = b.clone();
        other["subjects"] = json!([{"kind": "Group", "apiGroup": RBAC, "name": "g"}]);
        assert_eq!(repaired(&other, &b).unwrap()["subjects"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn service_addresses() {
        assert_eq!(service_address("10.96.0.0/12".parse().unwrap()), Ipv4Addr::new(10, 96, 0, 1));
    }
}
