//! Services. Addresses and node ports are given out by `registry::services`.

use serde_json::{Value, json};

use crate::{
    resources::{Column, Strategy, col, wide},
    table::human,
    validation::{Errors, meta, names},
    value,
};

pub(super) struct Service;

impl Strategy for Service {
    fn defaults(&self, object: &mut Value) {
        value::default_text(object, "spec.type", "ClusterIP");
        value::default_text(object, "spec.sessionAffinity", "None");
        match value::text(object, "spec.sessionAffinity") {
            "ClientIP" => value::default(object, "spec.sessionAffinityConfig.clientIP.timeoutSeconds", 10800),
            _ => {
                value::remove(object, "spec.sessionAffinityConfig");
            }
        }
        for port in value::list_mut(object, "spec.ports") {
            value::default_text(port, "protocol", "TCP");
            let number = value::int(port, "port").unwrap_or(0);
            match value::at(port, "targetPort") {
                None => value::set(port, "targetPort", number),
                Some(v) if v == &json!(0) || v == &json!("") => value::set(port, "targetPort", number),
                Some(_) => {}
            }
        }
        let kind = value::text(object, "spec.type").to_owned();
        if kind == "ExternalName" {
            return;
        }
        value::default_text(object, "spec.internalTrafficPolicy", "Cluster");
        let external = kind != "ClusterIP" || !value::list(object, "spec.externalIPs").is_empty();
        if external {
            value::default_text(object, "spec.externalTrafficPolicy", "Cluster");
        }
        if kind == "LoadBalancer" {
            value::default(object, "spec.allocateLoadBalancerNodePorts", true);
        }
        if value::text(object, "spec.clusterIP").is_empty()
            && let Some(first) = value::list(object, "spec.clusterIPs").first().cloned()
        {
            value::set(object, "spec.clusterIP", first);
        }
        if value::text(object, "spec.clusterIP") == "None" {
            value::default(object, "spec.clusterIPs", json!(["None"]));
            value::default(object, "spec.ipFamilies", json!(["IPv4"]));
            value::default_text(object, "spec.ipFamilyPolicy", "SingleStack");
        }
    }

    fn prepare_create(&self, object: &mut Value) {
        value::set(object, "status", json!({"loadBalancer": {}}));
    }

    fn prepare_update(&self, new: &mut Value, old: &Value) {
        let (now, before) =
            (value::text(new, "spec.type").to_owned(), value::text(old, "spec.type").to_owned());
        // What a client that only knows its own fields leaves out stays as it was allocated.
        if now != "ExternalName" && before != "ExternalName" {
            for path in ["spec.clusterIP", "spec.clusterIPs", "spec.ipFamilies", "spec.ipFamilyPolicy"] {
                if !value::has(new, path) || value::text(new, path).is_empty() && path == "spec.clusterIP" {
                    value::carry(new, old, path);
                }
            }
        }
        if now == "ExternalName" {
            for path in [
                "spec.clusterIP",
                "spec.clusterIPs",
                "spec.ipFamilies",
                "spec.ipFamilyPolicy",
                "spec.internalTrafficPolicy",
            ] {
                value::remove(new, path);
            }
        }
        if matches!(now.as_str(), "NodePort" | "LoadBalancer") {
            keep_node_ports(new, old);
        }
        if matches!(before.as_str(), "NodePort" | "LoadBalancer")
            && matches!(now.as_str(), "ClusterIP" | "ExternalName")
        {
            drop_node_ports(new, old);
        }
        if now != "LoadBalancer" {
            value::remove(new, "spec.allocateLoadBalancerNodePorts");
            if before == "LoadBalancer" {
                value::set(new, "status.loadBalancer", json!({}));
            }
        }
        if now == "ExternalName" || now == "ClusterIP" && value::list(new, "spec.externalIPs").is_empty() {
            value::remove(new, "spec.externalTrafficPolicy");
        }
    }

    fn validate(&self, object: &Value, errors: &mut Errors) {
        let kind = value::text(object, "spec.type");
        errors.one_of(object, "spec.type", &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"]);
        errors.one_of(object, "spec.sessionAffinity", &["ClientIP", "None"]);
        errors.one_of(object, "spec.internalTrafficPolicy", &["Cluster", "Local"]);
        errors.one_of(object, "spec.externalTrafficPolicy", &["Cluster", "Local"]);
        let headless = value::text(object, "spec.clusterIP") == "None";
        if kind == "ExternalName" {
            let name = value::text(object, "spec.externalName");
            if name.is_empty() {
                errors.required("spec.externalName", "");
            } else {
                errors.check("spec.externalName", name, names::dns_subdomain(name.trim_end_matches('.')));
            }
        }
        if headless && matches!(kind, "NodePort" | "LoadBalancer") {
            errors.invalid(
                "spec.clusterIPs[0]",
                &"None".into(),
                &format!("may not be set to 'None' for {kind} services"),
            );
        }
        meta::labels(object, "spec.selector", errors);
        validate_ports(object, headless || kind == "ExternalName", errors);
    }

    fn validate_update(&self, new: &Value, old: &Value, errors: &mut Errors) {
        self.validate(new, errors);
        let changes = value::text(new, "spec.type") != "ExternalName"
            && value::text(old, "spec.type") != "ExternalName";
        if changes && !value::text(old, "spec.clusterIP").is_empty() {
            let (n, o) = (value::text(new, "spec.clusterIP"), value::text(old, "spec.clusterIP"));
            if n != o {
                errors.invalid(
                    "spec.clusterIPs[0]",
                    &json!([n]),
                    &format!("may not change once set (was {o})"),
                );
            }
        }
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[
            col("Type"),
            col("Cluster-IP"),
            col("External-IP"),
            col("Port(s)"),
            col("Age"),
            wide("Selector"),
        ];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let ports: Vec<String> = value::list(object, "spec.ports")
            .iter()
            .map(|p| {
                let (n, protocol) = (value::int(p, "port").unwrap_or(0), value::text(p, "protocol"));
                match value::int(p, "nodePort").filter(|n| *n > 0) {
                    Some(node) => format!("{n}:{node}/{protocol}"),
                    None => format!("{n}/{protocol}"),
                }
            })
            .collect();
        vec![
            value::text(object, "spec.type").into(),
            human::or_none(value::text(object, "spec.clusterIP")),
            external(object).into(),
            human::or_none(&ports.join(",")),
            human::labels(object, "spec.selector"),
        ]
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["spec.clusterIP", "spec.type"]
    }
}

fn external(object: &Value) -> String {
    let mut ips: Vec<String> = value::list(object, "spec.externalIPs")
        .iter()
        .filter_map(|v| v.as_str().map(str::to_owned))
        .collect();
    match value::text(object, "spec.type") {
        "ExternalName" => value::text(object, "spec.externalName").to_owned(),
        "LoadBalancer" => {
            for i in value::list(object, "status.loadBalancer.ingress") {
                let ip = value::text(i, "ip");
                ips.push(if ip.is_empty() { value::text(i, "hostname") } else { ip }.to_owned());
            }
            if ips.is_empty() { "<pending>".into() } else { ips.join(",") }
        }
        _ if ips.is_empty() => "<none>".into(),
        _ => ips.join(","),
    }
}

fn same_port(a: &Value, b: &Value) -> bool {
    value::int(a, "port") == value::int(b, "port") && value::text(a, "protocol") == value::text(b, "protocol")
}

fn keep_node_ports(new: &mut Value, old: &Value) {
    if value::at(new, "spec.allocateLoadBalancerNodePorts").and_then(Value::as_bool) == Some(false) {
        return;
    }
    let used: Vec<Option<i64>> =
        value::list(new, "spec.ports").iter().map(|p| value::int(p, "nodePort")).collect();
    for port in value::list_mut(new, "spec.ports") {
        value::default_text(port, "protocol", "TCP");
        if value::int(port, "nodePort").unwrap_or(0) != 0 {
            continue;
        }
        let before = value::list(old, "spec.ports")
            .iter()
            .find(|o| same_port(o, port))
            .and_then(|o| value::int(o, "nodePort"));
        if let Some(n) = before.filter(|n| !used.contains(&Some(*n))) {
            value::set(port, "nodePort", n);
        }
    }
}

/// A Service that stops being a NodePort loses the ports that it did not just ask for.
fn drop_node_ports(new: &mut Value, old: &Value) {
    for port in value::list_mut(new, "spec.ports") {
        let n = value::int(port, "nodePort");
        if value::list(old, "spec.ports").iter().any(|o| value::int(o, "nodePort") == n) {
            value::remove(port, "nodePort");
        }
    }
}

fn validate_ports(object: &Value, may_be_empty: bool, errors: &mut Errors) {
    let ports = value::list(object, "spec.ports");
    if ports.is_empty() && !may_be_empty {
        errors.required("spec.ports", "");
    }
    let mut names_seen = Vec::new();
    for (i, p) in ports.iter().enumerate() {
        let at = format!("spec.ports[{i}]");
        match value::int(p, "port") {
            Some(n) if (1..=65535).contains(&n) => {}
            n => errors.invalid(
                &format!("{at}.port"),
                &n.unwrap_or(0).into(),
                "must be between 1 and 65535, inclusive",
            ),
        }
        let protocol = value::text(p, "protocol");
        if !matches!(protocol, "TCP" | "UDP" | "SCTP") {
            errors.not_supported(&format!("{at}.protocol"), &protocol.into(), &["SCTP", "TCP", "UDP"]);
        }
        let name = value::text(p, "name");
        if name.is_empty() && ports.len() > 1 {
            errors.required(&format!("{at}.name"), "");
        } else if !name.is_empty() {
            errors.check(&format!("{at}.name"), name, names::dns_label(name));
            if names_seen.contains(&name) {
                errors.duplicate(&format!("{at}.name"), &name.into());
            }
            names_seen.push(name);
        }
        match value::at(p, "targetPort") {
            Some(Value::Number(n)) if !n.as_i64().is_some_and(|n| (1..=65535).contains(&n)) => {
                errors.invalid(
                    &format!("{at}.targetPort"),
                    &Value::Number(n.clone()),
                    "must be between 1 and 65535, inclusive",
                );
            }
            Some(Value::String(name)) => {
                errors.check(&format!("{at}.targetPort"), name, names::port_name(name))
            }
            _ => {}
        }
        let same = |o: &&Value| {
            value::int(o, "port") == value::int(p, "port") && value::text(o, "protocol") == protocol
        };
        if ports[..i].iter().any(|o| same(&o)) {
            errors.duplicate(&at, p);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_belongs_to_another_type_goes_with_the_type() {
        let old = json!({"spec": {"type": "NodePort", "clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9"],
            "externalTrafficPolicy": "Cluster", "internalTrafficPolicy": "Cluster",
            "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30080}]}});
        for (kind, address) in [("ExternalName", ""), ("ClusterIP", "10.96.0.9")] {
            let mut new = old.clone();
            new["spec"]["type"] = kind.into();
            Service.prepare_update(&mut new, &old);
            assert_eq!(new["spec"]["ports"], json!([{"port": 80, "protocol": "TCP"}]), "{kind}");
            assert_eq!(value::text(&new, "spec.clusterIP"), address, "{kind}");
            assert!(!value::has(&new, "spec.externalTrafficPolicy"), "{kind}");
        }
        let mut new = old.clone();
        value::remove(&mut new["spec"]["ports"][0], "nodePort");
        Service.prepare_update(&mut new, &old);
        assert_eq!(new["spec"]["ports"][0]["nodePort"], 30080, "an update that leaves it out keeps it");
    }
}
