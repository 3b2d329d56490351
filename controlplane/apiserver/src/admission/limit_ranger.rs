//! LimitRanger: a namespace's LimitRanges give containers default requests and limits and bound what they may ask for.

use std::collections::BTreeMap;

use orlop_api::quantity::Amount;
use serde_json::{Map, Value, json};

use super::{Context, forbidden, is_mirror, items, text};
use crate::registry::Attributes;
use crate::status::Status;

async fn ranges(c: &Context, a: &Attributes) -> Result<Vec<Value>, Status> {
    match c.registry.list("", "limitranges", &a.info.namespace).await {
        Err(e) if e.is_not_found() => Ok(Vec::new()),
        other => other,
    }
}

pub(super) async fn admit_pod(c: &Context, a: &mut Attributes) -> Result<(), Status> {
    if a.object.as_ref().is_none_or(is_mirror) {
        return Ok(());
    }
    let ranges = ranges(c, a).await?;
    if let Some(pod) = &mut a.object {
        for range in &ranges {
            default_pod(pod, range);
        }
    }
    Ok(())
}

pub(super) async fn validate_pod(c: &Context, a: &Attributes) -> Result<(), Status> {
    let Some(pod) = a.object.as_ref().filter(|p| !is_mirror(p)) else { return Ok(()) };
    let faults: Vec<String> = ranges(c, a).await?.iter().flat_map(|r| pod_faults(pod, r)).collect();
    refuse(a, &faults)
}

pub(super) async fn validate_claim(c: &Context, a: &Attributes) -> Result<(), Status> {
    let Some(claim) = &a.object else { return Ok(()) };
    let request = amounts(claim.pointer("/spec/resources/requests"));
    let mut faults = Vec::new();
    for range in ranges(c, a).await? {
        for limit in items(&range, "/spec/limits").filter(|l| text(l, "/type") == "PersistentVolumeClaim") {
            // Claims know no limits: only what is requested counts.
            faults.extend(bound_faults("PersistentVolumeClaim", limit, &request, &BTreeMap::new(), false));
        }
    }
    refuse(a, &faults)
}

fn refuse(a: &Attributes, faults: &[String]) -> Result<(), Status> {
    match faults {
        [] => Ok(()),
        [one] => Err(forbidden(a, one)),
        many => Err(forbidden(a, format!("[{}]", many.join(", ")))),
    }
}

type Amounts = BTreeMap<String, (Amount, String)>;

fn amounts(list: Option<&Value>) -> Amounts {
    let list = list.and_then(Value::as_object).into_iter().flatten();
    list.filter_map(|(name, v)| {
        let shown = v.as_str().map(str::to_owned).unwrap_or_else(|| v.to_string());
        Some((name.clone(), (shown.parse::<Amount>().ok()?, shown)))
    })
    .collect()
}

/// Puts the range's defaults into each container that lacks them, and says so in the annotation that upstream uses.
fn default_pod(pod: &mut Value, range: &Value) {
    let mut requests = Map::new();
    let mut limits = Map::new();
    for limit in items(range, "/spec/limits").filter(|l| text(l, "/type") == "Container") {
        for (key, into) in [("defaultRequest", &mut requests), ("default", &mut limits)] {
            into.extend(limit.get(key).and_then(Value::as_object).cloned().unwrap_or_default());
        }
    }
    if requests.is_empty() && limits.is_empty() {
        return;
    }
    let mut notes = Vec::new();
    for (list, label) in [("containers", "container"), ("initContainers", "init container")] {
        let Some(containers) = pod["spec"].get_mut(list).and_then(Value::as_array_mut) else { continue };
        for container in containers {
            let name = text(container, "/name").to_owned();
            for (kind, word, defaults) in [("requests", "request", &requests), ("limits", "limit", &limits)] {
                let set = fill(container, kind, defaults);
                if !set.is_empty() {
                    notes.push(format!("{} {word} for {label} {name}", set.join(", ")));
                }
            }
        }
    }
    if !notes.is_empty() {
        if !pod["metadata"]["annotations"].is_object() {
            pod["metadata"]["annotations"] = json!({});
        }
        pod["metadata"]["annotations"]["kubernetes.io/limit-ranger"] =
            json!(format!("LimitRanger plugin set: {}", notes.join("; ")));
    }
}

fn fill(container: &mut Value, kind: &str, defaults: &Map<String, Value>) -> Vec<String> {
    let mut set = Vec::new();
    for (name, value) in defaults {
        if !container["resources"].is_object() {
            container["resources"] = json!({});
        }
        if !container["resources"][kind].is_object() {
            container["resources"][kind] = json!({});
        }
        if container["resources"][kind].get(name).is_none() {
            container["resources"][kind][name] = value.clone();
            set.push(name.clone());
        }
    }
    set.sort();
    set
}

fn pod_faults(pod: &Value, range: &Value) -> Vec<String> {
    let of = |c: &Value| (amounts(c.pointer("/resources/requests")), amounts(c.pointer("/resources/limits")));
    let containers: Vec<_> = items(pod, "/spec/containers").map(of).collect();
    let init: Vec<_> = items(pod, "/spec/initContainers").map(of).collect();
    let mut faults = Vec::new();
    for limit in items(range, "/spec/limits") {
        match text(limit, "/type") {
            "Container" => {
                for (requests, limits) in containers.iter().chain(&init) {
                    faults.extend(bound_faults("Container", limit, requests, limits, true));
                }
            }
            "Pod" => {
                let total = |pick: fn(&(Amounts, Amounts)) -> &Amounts| pod_total(&containers, &init, pick);
                faults.extend(bound_faults("Pod", limit, &total(|c| &c.0), &total(|c| &c.1), true));
            }
            _ => {}
        }
    }
    faults
}

/// The sum over containers, or one init container's amount where that is more. A resource counts when each container has it.
fn pod_total(
    containers: &[(Amounts, Amounts)],
    init: &[(Amounts, Amounts)],
    pick: fn(&(Amounts, Amounts)) -> &Amounts,
) -> Amounts {
    let mut total = Amounts::new();
    for container in containers {
        for (name, (amount, _)) in pick(container) {
            if containers.iter().all(|c| pick(c).contains_key(name)) {
                let slot = total.entry(name.clone()).or_default();
                slot.0 = slot.0.saturating_add(*amount);
            }
        }
    }
    for container in init {
        for (name, (amount, _)) in pick(container) {
            if let Some(slot) = total.get_mut(name) {
                slot.0 = slot.0.max(*amount);
            }
        }
    }
    for slot in total.values_mut() {
        slot.1 = slot.0.to_string();
    }
    total
}

fn bound_faults(
    kind: &str,
    limit: &Value,
    requests: &Amounts,
    limits: &Amounts,
    with_limits: bool,
) -> Vec<String> {
    let mut faults = Vec::new();
    for (name, (min, shown)) in amounts(limit.get("min")) {
        match requests.get(&name) {
            None => {
                faults.push(format!("minimum {name} usage per {kind} is {shown}.  No request is specified"))
            }
            Some((r, has)) if *r < min => {
                faults.push(format!("minimum {name} usage per {kind} is {shown}, but request is {has}"));
            }
            Some(_) => {}
        }
        if let Some((l, has)) = limits.get(&name)
            && *l < min
        {
            faults.push(format!("minimum {name} usage per {kind} is {shown}, but limit is {has}"));
        }
    }
    for (name, (max, shown)) in amounts(limit.get("max")) {
        if with_limits {
            match limits.get(&name) {
                None => {
                    faults.push(format!("maximum {name} usage per {kind} is {shown}.  No limit is specified"))
                }
                Some((l, has)) if *l > max => {
                    faults.push(format!("maximum {name} usage per {kind} is {shown}, but limit is {has}"));
                }
                Some(_) => {}
            }
        }
        if let Some((r, has)) = requests.get(&name)
            && *r > max
        {
            faults.push(format!("maximum {name} usage per {kind} is {shown}, but request is {has}"));
        }
    }
    for (name, (ratio, shown)) in amounts(limit.get("maxLimitRequestRatio")) {
        let (Some((r, _)), Some((l, _))) = (requests.get(&name), limits.get(&name)) else {
            faults.push(format!("{name} max limit to request ratio per {kind} is {shown}, but no request or limit is specified"));
            continue;
        };
        let provided = l.milli() as f64 / (r.milli() as f64).max(1.0);
        if provided > ratio.milli() as f64 / 1000.0 {
            faults.push(format!(
                "{name} max limit to request ratio per {kind} is {shown}, but provided ratio is {provided:.6}"
            ));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range() -> Value {
        json!({"spec": {"limits": [{"type": "Container", "default": {"cpu": "500m"}, "defaultRequest": {"cpu": "100m", "memory": "64Mi"},
            "min": {"memory": "32Mi"}, "max": {"cpu": "1"}, "maxLimitRequestRatio": {"cpu": "5"}},
            {"type": "Pod", "max": {"cpu": "1200m"}}]}})
    }

    #[test]
    fn defaults_fill_gaps_only() {
        let mut pod = json!({"metadata": {}, "spec": {"containers": [{"name": "a"}, {"name": "b", "resources": {"limits": {"cpu": "1"}, "requests": {"cpu": "1", "memory": "1Gi"}}}]}});
        default_pod(&mut pod, &range());
        assert_eq!(
            pod["spec"]["containers"][0]["resources"],
            json!({"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"cpu": "500m"}})
        );
        assert_eq!(pod["spec"]["containers"][1]["resources"]["limits"], json!({"cpu": "1"}));
        assert_eq!(
            pod["metadata"]["annotations"]["kubernetes.io/limit-ranger"],
            "LimitRanger plugin set: cpu, memory request for container a; cpu limit for container a"
        );
    }

    #[test]
    fn bounds() {
        let pod = |cpu_limit: &str, cpu: &str, memory: &str| json!({"spec": {"containers": [{"resources": {"limits": {"cpu": cpu_limit}, "requests": {"cpu": cpu, "memory": memory}}}]}});
        assert_eq!(pod_faults(&pod("500m", "100m", "64Mi"), &range()), Vec::<String>::new());
        assert!(
            pod_faults(&pod("2", "1", "64Mi"), &range())[0]
                .contains("maximum cpu usage per Container is 1, but limit is 2")
        );
        assert!(pod_faults(&pod("1", "1", "1Mi"), &range())[0].contains("minimum memory usage"));
        assert!(pod_faults(&pod("1", "100m", "64Mi"), &range())[0].contains("max limit to request ratio"));
        let two = json!({"spec": {"containers": [pod("1", "1", "64Mi")["spec"]["containers"][0], pod("1", "1", "64Mi")["spec"]["containers"][0]]}});
        assert!(pod_faults(&two, &range()).iter().any(|f| f.contains("maximum cpu usage per Pod")));
    }
}
