//! networking.k8s.io/v1.

use serde_json::{Value, json};

use super::{Column, Resource, Strategy, col};
use crate::{
    table::human,
    validation::{Errors, label_selector, names},
    value,
};

const GROUP: &str = "networking.k8s.io";

pub(super) fn resources() -> Vec<Resource> {
    vec![
        Resource::new(GROUP, "v1", "IngressClass", "ingressclasses", IngressClass).cluster().generation(),
        Resource::new(GROUP, "v1", "Ingress", "ingresses", Ingress)
            .short(&["ing"])
            .with_status()
            .generation(),
        Resource::new(GROUP, "v1", "IPAddress", "ipaddresses", IpAddress)
            .cluster()
            .named(names::ip_address)
            .short(&["ip"]),
        Resource::new(GROUP, "v1", "NetworkPolicy", "networkpolicies", NetworkPolicy)
            .short(&["netpol"])
            .generation(),
        Resource::new(GROUP, "v1", "ServiceCIDR", "servicecidrs", ServiceCidr).cluster().with_status(),
    ]
}

struct Ingress;

impl Strategy for Ingress {
    fn validate(&self, object: &Value, errors: &mut Errors) {
        if value::list(object, "spec.rules").is_empty() && !value::has(object, "spec.defaultBackend") {
            errors.invalid("spec", &json!({}), "either `defaultBackend` or `rules` must be specified");
        }
        for (i, rule) in value::list(object, "spec.rules").iter().enumerate() {
            for (j, p) in value::list(rule, "http.paths").iter().enumerate() {
                let at = format!("spec.rules[{i}].http.paths[{j}]");
                match value::text(p, "pathType") {
                    "" => errors.required(&format!("{at}.pathType"), "pathType must be specified"),
                    "Exact" | "Prefix" if !value::text(p, "path").starts_with('/') => {
                        errors.invalid(
                            &format!("{at}.path"),
                            &value::text(p, "path").into(),
                            "must be an absolute path",
                        );
                    }
                    "Exact" | "Prefix" | "ImplementationSpecific" => {}
                    other => errors.not_supported(
                        &format!("{at}.pathType"),
                        &other.into(),
                        &["Exact", "ImplementationSpecific", "Prefix"],
                    ),
                }
            }
        }
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("Class"), col("Hosts"), col("Address"), col("Ports")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let hosts: Vec<&str> = value::list(object, "spec.rules")
            .iter()
            .map(|r| value::text(r, "host"))
            .filter(|h| !h.is_empty())
            .collect();
        let hosts = if hosts.is_empty() { "*".to_owned() } else { hosts.join(",") };
        let addresses: Vec<&str> = value::list(object, "status.loadBalancer.ingress")
            .iter()
            .map(|i| {
                if value::text(i, "ip").is_empty() {
                    value::text(i, "hostname")
                } else {
                    value::text(i, "ip")
                }
            })
            .collect();
        let ports = if value::list(object, "spec.tls").is_empty() { "80" } else { "80, 443" };
        vec![
            human::or_none(value::text(object, "spec.ingressClassName")),
            hosts.into(),
            addresses.join(",").into(),
            ports.into(),
        ]
    }
}

struct IngressClass;

impl Strategy for IngressClass {
    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("Controller"), col("Parameters")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let parameters = match value::text(object, "spec.parameters.kind") {
            "" => "<none>".to_owned(),
            kind => {
                let group = value::text(object, "spec.parameters.apiGroup");
                let name = value::text(object, "spec.parameters.name");
                if group.is_empty() { format!("{kind}/{name}") } else { format!("{kind}.{group}/{name}") }
            }
        };
        vec![value::text(object, "spec.controller").into(), parameters.into()]
    }
}

struct NetworkPolicy;

impl Strategy for NetworkPolicy {
    fn defaults(&self, object: &mut Value) {
        value::default(object, "spec.podSelector", json!({}));
        for side in ["ingress", "egress"] {
            for rule in value::list_mut(object, &format!("spec.{side}")) {
                for port in value::list_mut(rule, "ports") {
                    value::default_text(port, "protocol", "TCP");
                }
            }
        }
        if value::list(object, "spec.policyTypes").is_empty() {
            let types = if value::list(object, "spec.egress").is_empty() {
                json!(["Ingress"])
            } else {
                json!(["Ingress", "Egress"])
            };
            value::set(object, "spec.policyTypes", types);
        }
    }

    fn validate(&self, object: &Value, errors: &mut Errors) {
        label_selector(object, "spec.podSelector", errors);
        for (i, t) in value::list(object, "spec.policyTypes").iter().enumerate() {
            if !matches!(t.as_str(), Some("Ingress" | "Egress")) {
                errors.not_supported(&format!("spec.policyTypes[{i}]"), t, &["Egress", "Ingress"]);
            }
        }
        for (side, peers) in [("ingress", "from"), ("egress", "to")] {
            for (i, rule) in value::list(object, &format!("spec.{side}")).iter().enumerate() {
                for (j, peer) in value::list(rule, peers).iter().enumerate() {
                    let at = format!("spec.{side}[{i}].{peers}[{j}]");
                    let block = value::has(peer, "ipBlock");
                    if block && (value::has(peer, "podSelector") || value::has(peer, "namespaceSelector")) {
                        errors.forbidden(&at, "may not specify both ipBlock and another peer");
                    }
                    if block && value::text(peer, "ipBlock.cidr").parse::<ipnet::IpNet>().is_err() {
                        let cidr = value::text(peer, "ipBlock.cidr");
                        errors.invalid(
                            &format!("{at}.ipBlock.cidr"),
                            &cidr.into(),
                            "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
                        );
                    }
                    if peer.as_object().is_some_and(|o| o.is_empty()) {
                        errors.required(&at, "must specify a peer");
                    }
                }
            }
        }
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("Pod-Selector")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        vec![human::selector(object, "spec.podSelector")]
    }
}

struct IpAddress;

impl Strategy for IpAddress {
    fn validate(&self, object: &Value, errors: &mut Errors) {
        if !value::has(object, "spec.parentRef") {
            errors.required("spec.parentRef", "");
            return;
        }
        for field in ["resource", "name"] {
            if value::text(object, &format!("spec.parentRef.{field}")).is_empty() {
                errors.required(&format!("spec.parentRef.{field}"), "");
            }
        }
    }

    fn validate_update(&self, new: &Value, old: &Value, errors: &mut Errors) {
        errors.immutable(new, old, "spec.parentRef");
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("ParentRef")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let part = |p: &str| value::text(object, &format!("spec.parentRef.{p}")).to_owned();
        let parts: Vec<String> = ["group", "resource", "namespace", "name"]
            .map(part)
            .into_iter()
            .filter(|p| !p.is_empty())
            .collect();
        vec![parts.join("/").into()]
    }

    fn selectable(&self) -> &'static [&'static str] {
        &[
            "spec.parentRef.name",
            "spec.parentRef.namespace",
            "spec.parentRef.resource",
            "spec.parentRef.group",
        ]
    }
}

struct ServiceCidr;

impl Strategy for ServiceCidr {
    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("CIDRs")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let all: Vec<&str> = value::list(object, "spec.cidrs").iter().filter_map(Value::as_str).collect();
        vec![all.join(",").into()]
    }
}
