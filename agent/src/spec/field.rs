//! The downward API: fields and resources of a pod as text.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceFieldSelector};
use orlop_api::quantity::Amount;

use super::SpecError;

/// What the node knows that the spec does not say.
#[derive(Clone, Debug, Default)]
pub struct NodeFacts {
    pub pod_ips: Vec<IpAddr>,
    pub host_ips: Vec<IpAddr>,
    /// Allocatable cpu, memory and ephemeral-storage: what a container without limits may use.
    pub allocatable: BTreeMap<String, Amount>,
}

fn join(ips: &[IpAddr]) -> String {
    ips.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(",")
}

fn subscript<'a>(path: &'a str, field: &str) -> Option<&'a str> {
    path.strip_prefix(field)?.strip_prefix("['")?.strip_suffix("']")
}

/// `key="value"` lines with Go's quoting.
fn map_text(map: Option<&BTreeMap<String, String>>) -> String {
    let line = |(k, v): (&String, &String)| format!("{k}={}", go_quote(v));
    map.into_iter().flatten().map(line).collect::<Vec<_>>().join("\n")
}

fn go_quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if (c as u32) < 0x20 || c as u32 == 0x7f => out.push_str(&format!("\\x{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// The value of a `fieldRef`.
pub fn field(pod: &Pod, path: &str, facts: &NodeFacts) -> Result<String, SpecError> {
    let m = &pod.metadata;
    let of = |map: &Option<BTreeMap<String, String>>, k: &str| {
        map.as_ref().and_then(|l| l.get(k)).cloned().unwrap_or_default()
    };
    if let Some(k) = subscript(path, "metadata.labels") {
        return Ok(of(&m.labels, k));
    }
    if let Some(k) = subscript(path, "metadata.annotations") {
        return Ok(of(&m.annotations, k));
    }
    let spec = pod.spec.as_ref();
    Ok(match path {
        "metadata.name" => m.name.clone().unwrap_or_default(),
        "metadata.namespace" => m.namespace.clone().unwrap_or_default(),
        "metadata.uid" => m.uid.clone().unwrap_or_default(),
        "metadata.labels" => map_text(m.labels.as_ref()),
        "metadata.annotations" => map_text(m.annotations.as_ref()),
        "spec.nodeName" => spec.and_then(|s| s.node_name.clone()).unwrap_or_default(),
        "spec.serviceAccountName" => spec.and_then(|s| s.service_account_name.clone()).unwrap_or_default(),
        "status.hostIP" => facts.host_ips.first().map(IpAddr::to_string).unwrap_or_default(),
        "status.hostIPs" => join(&facts.host_ips),
        "status.podIP" => facts.pod_ips.first().map(IpAddr::to_string).unwrap_or_default(),
        "status.podIPs" => join(&facts.pod_ips),
        _ => return Err(SpecError::UnknownField(path.to_owned())),
    })
}

/// The value of a `resourceFieldRef`: the amount divided by the divisor, rounded up.
pub fn resource(
    container: &Container,
    selector: &ResourceFieldSelector,
    facts: &NodeFacts,
) -> Result<String, SpecError> {
    let unknown = || SpecError::UnknownResource(selector.resource.clone(), container.name.clone());
    let (list, name) = selector.resource.split_once('.').ok_or_else(unknown)?;
    let declared = container.resources.as_ref();
    let of = |map: Option<&BTreeMap<String, k8s_openapi::apimachinery::pkg::api::resource::Quantity>>| {
        map.and_then(|m| m.get(name)).and_then(|q| Amount::try_from(q).ok())
    };
    let limit = of(declared.and_then(|r| r.limits.as_ref()));
    let amount = match list {
        // Without a limit the container may use what the node gives to pods.
        "limits" => limit.or_else(|| facts.allocatable.get(name).copied()).unwrap_or_default(),
        "requests" => of(declared.and_then(|r| r.requests.as_ref())).or(limit).unwrap_or_default(),
        _ => return Err(unknown()),
    };
    let divisor = selector.divisor.as_ref().and_then(|q| Amount::try_from(q).ok()).filter(|d| !d.is_zero());
    let milli = divisor.unwrap_or(Amount::from_units(1));
    // In thousandths both cpu divisors (1m, 1) and byte divisors are whole.
    let (a, d) = match name {
        "cpu" => (amount.milli() as i128, milli.milli() as i128),
        _ => (amount.units() as i128, milli.units() as i128),
    };
    if d <= 0 {
        return Err(unknown());
    }
    Ok(((a + d - 1) / d).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn fields_and_resources() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "n", "labels": {"a/b": "c", "q": "x\"y"}},
            "spec": {"nodeName": "node", "containers": [{"name": "c", "resources": {"limits": {"cpu": "1500m", "memory": "64Mi"}, "requests": {"cpu": "250m"}}}]}
        })).unwrap();
        let facts = NodeFacts {
            pod_ips: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            allocatable: BTreeMap::from([("ephemeral-storage".to_owned(), Amount::from_units(2048))]),
            ..Default::default()
        };
        let f = |p: &str| field(&pod, p, &facts);
        assert_eq!(f("metadata.labels['a/b']").unwrap(), "c");
        assert_eq!(f("metadata.labels").unwrap(), "a/b=\"c\"\nq=\"x\\\"y\"");
        assert_eq!(f("status.podIPs").unwrap(), "10.0.0.1,fd00::1");
        assert_eq!(f("spec.nodeName").unwrap(), "node");
        assert!(f("spec.nope").is_err());
        let c = &pod.spec.as_ref().unwrap().containers[0];
        let r = |resource: &str, divisor: &str| {
            let s: ResourceFieldSelector =
                serde_json::from_value(json!({"resource": resource, "divisor": divisor})).unwrap();
            super::resource(c, &s, &facts).unwrap()
        };
        assert_eq!(r("limits.cpu", "0"), "2");
        assert_eq!(r("limits.cpu", "1m"), "1500");
        assert_eq!(r("requests.cpu", "1m"), "250");
        assert_eq!(r("limits.memory", "1Mi"), "64");
        assert_eq!(r("requests.memory", "1"), "67108864");
        assert_eq!(r("limits.ephemeral-storage", "1Ki"), "2");
    }
}
