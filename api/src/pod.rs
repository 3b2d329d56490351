//! What a pod asks for and which quality of service that gives it.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::quantity::{Amount, amount_or_zero};

/// Amounts by resource name.
pub type Resources = BTreeMap<String, Amount>;

/// Quality of service classes, as `status.qosClass` spells them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QosClass {
    Guaranteed,
    Burstable,
    BestEffort,
}

impl QosClass {
    pub fn as_str(self) -> &'static str {
        match self {
            QosClass::Guaranteed => "Guaranteed",
            QosClass::Burstable => "Burstable",
            QosClass::BestEffort => "BestEffort",
        }
    }
}

fn amounts(map: Option<&BTreeMap<String, Quantity>>) -> impl Iterator<Item = (&String, Amount)> {
    map.into_iter().flatten().map(|(k, v)| (k, amount_or_zero(v)))
}

fn add(into: &mut Resources, from: &Resources) {
    for (k, v) in from {
        *into.entry(k.clone()).or_default() += *v;
    }
}

fn max(into: &mut Resources, from: &Resources) {
    for (k, v) in from {
        let e = into.entry(k.clone()).or_default();
        *e = (*e).max(*v);
    }
}

/// Whether an init container is a sidecar (KEP-753).
pub fn is_sidecar(c: &Container) -> bool {
    c.restart_policy.as_deref() == Some("Always")
}

fn of(c: &Container, pick: fn(&ResourceRequirements) -> Resources) -> Resources {
    c.resources.as_ref().map(pick).unwrap_or_default()
}

fn requests_of(r: &ResourceRequirements) -> Resources {
    // A limit without a request is its own request; the API server's defaulting says the same.
    let mut all: Resources = amounts(r.limits.as_ref()).map(|(k, v)| (k.clone(), v)).collect();
    all.extend(amounts(r.requests.as_ref()).map(|(k, v)| (k.clone(), v)));
    all
}

fn limits_of(r: &ResourceRequirements) -> Resources {
    amounts(r.limits.as_ref()).map(|(k, v)| (k.clone(), v)).collect()
}

fn total(spec: &PodSpec, pick: fn(&ResourceRequirements) -> Resources, with_overhead: bool) -> Resources {
    let mut sum = Resources::new();
    for c in &spec.containers {
        add(&mut sum, &of(c, pick));
    }
    // Init containers run one after another beside the sidecars started before them; sidecars stay (KEP-753).
    let mut sidecars = Resources::new();
    let mut init_peak = Resources::new();
    for c in spec.init_containers.iter().flatten() {
        let mut needs = of(c, pick);
        if is_sidecar(c) {
            add(&mut sidecars, &needs);
            max(&mut init_peak, &sidecars);
        } else {
            add(&mut needs, &sidecars);
            max(&mut init_peak, &needs);
        }
    }
    add(&mut sum, &sidecars);
    max(&mut sum, &init_peak);
    // Pod-level resources take the place of the containers' sum where they are set (KEP-2837).
    if let Some(r) = &spec.resources {
        for (k, v) in pick(r) {
            sum.insert(k, v);
        }
    }
    if with_overhead {
        let overhead: Resources = amounts(spec.overhead.as_ref()).map(|(k, v)| (k.clone(), v)).collect();
        add(&mut sum, &overhead);
    }
    sum
}

/// The pod's effective requests, overhead included: what the scheduler books.
pub fn requests(spec: &PodSpec) -> Resources {
    total(spec, requests_of, true)
}

/// The pod's effective limits, overhead included for resources that have a limit.
pub fn limits(spec: &PodSpec) -> Resources {
    let mut all = total(spec, limits_of, false);
    for (k, v) in amounts(spec.overhead.as_ref()) {
        if let Some(limit) = all.get_mut(k) {
            *limit += v;
        }
    }
    all
}

/// The class that requests and limits of cpu and memory give (`GetPodQOS`).
pub fn qos_class(spec: &PodSpec) -> QosClass {
    let kinds = ["cpu", "memory"];
    let declared: Vec<&ResourceRequirements> = match &spec.resources {
        Some(r) => vec![r],
        None => spec
            .containers
            .iter()
            .chain(spec.init_containers.iter().flatten())
            .map(|c| c.resources.as_ref().unwrap_or(EMPTY))
            .collect(),
    };
    let nonzero = |m: &Resources| kinds.iter().any(|k| m.get(*k).is_some_and(|a| !a.is_zero()));
    if !declared.iter().any(|r| nonzero(&requests_of(r)) || nonzero(&limits_of(r))) {
        return QosClass::BestEffort;
    }
    let guaranteed = declared.iter().all(|r| {
        let (req, lim) = (requests_of(r), limits_of(r));
        kinds.iter().all(|k| lim.get(*k).is_some_and(|l| !l.is_zero() && req.get(*k) == Some(l)))
    });
    if guaranteed { QosClass::Guaranteed } else { QosClass::Burstable }
}

static EMPTY: &ResourceRequirements = &ResourceRequirements { claims: None, limits: None, requests: None };

/// Whether the pod has ended and will not run again.
pub fn is_finished(pod: &Pod) -> bool {
    matches!(pod.status.as_ref().and_then(|s| s.phase.as_deref()), Some("Succeeded" | "Failed"))
}

/// Whether the Ready condition is true.
pub fn is_ready(pod: &Pod) -> bool {
    condition(pod, "Ready") == Some("True")
}

/// The status ("True", "False", "Unknown") of a condition.
pub fn condition<'a>(pod: &'a Pod, kind: &str) -> Option<&'a str> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|c| c.type_ == kind).map(|c| c.status.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: serde_json::Value) -> PodSpec {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn init_containers_and_sidecars_count_as_kep_753_says() {
        let s = spec(serde_json::json!({
            "containers": [{"name": "a", "resources": {"requests": {"cpu": "100m"}}}],
            "initContainers": [
                {"name": "i", "resources": {"requests": {"cpu": "300m"}}},
                {"name": "s", "restartPolicy": "Always", "resources": {"requests": {"cpu": "150m"}}},
                {"name": "j", "resources": {"requests": {"cpu": "200m"}}}],
            "overhead": {"cpu": "10m"}
        }));
        assert_eq!(requests(&s)["cpu"].milli(), 360);
    }

    #[test]
    fn qos() {
        let c = |r: serde_json::Value| {
            qos_class(&spec(serde_json::json!({"containers": [{"name": "a", "resources": r}]})))
        };
        assert_eq!(c(serde_json::json!({})), QosClass::BestEffort);
        assert_eq!(c(serde_json::json!({"limits": {"cpu": "1", "memory": "1Gi"}})), QosClass::Guaranteed);
        assert_eq!(c(serde_json::json!({"limits": {"cpu": "1"}})), QosClass::Burstable);
        assert_eq!(
            c(serde_json::json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m"}})),
            QosClass::Burstable
        );
    }
}
