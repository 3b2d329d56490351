//! The difference between two statuses as a strategic merge patch.

use k8s_openapi::api::core::v1::PodStatus;
use serde_json::{Map, Value, json};

/// Conditions that the node agent owns; others are left to those who set them.
pub const OWN_CONDITIONS: [&str; 7] = [
    "PodReadyToStartContainers",
    "Initialized",
    "Ready",
    "ContainersReady",
    "PodScheduled",
    "PodResizePending",
    "PodResizeInProgress",
];

/// Fields the agent writes; the rest of the status belongs to others (the scheduler, controllers).
const OWN_FIELDS: [&str; 15] = [
    "phase",
    "reason",
    "message",
    "hostIP",
    "hostIPs",
    "podIP",
    "podIPs",
    "startTime",
    "qosClass",
    "initContainerStatuses",
    "containerStatuses",
    "ephemeralContainerStatuses",
    "observedGeneration",
    "conditions",
    "resize",
];

fn keyed(old: Option<&Value>, new: Option<&Value>, key: &str) -> Vec<Value> {
    let list = |v: Option<&Value>| v.and_then(Value::as_array).cloned().unwrap_or_default();
    let (old, new) = (list(old), list(new));
    let has = |l: &[Value], item: &Value| l.iter().any(|i| i.get(key) == item.get(key));
    let mut out: Vec<Value> = new.iter().filter(|n| !old.contains(n)).cloned().collect();
    for gone in old.iter().filter(|o| !has(&new, o)) {
        out.push(json!({"$patch": "delete", key: gone.get(key)}));
    }
    out
}

/// What turns `old` into `new`; `None` when nothing does. Carries the pod's uid, so that a successor of the same name
/// is never written to.
pub fn diff(uid: &str, old: &PodStatus, new: &PodStatus) -> Option<Value> {
    let fields = |s: &PodStatus| match serde_json::to_value(s) {
        Ok(Value::Object(m)) => m,
        _ => Map::new(),
    };
    let (old, new) = (fields(old), fields(new));
    let mut status = Map::new();
    for field in OWN_FIELDS {
        let (was, is) = (old.get(field), new.get(field));
        if was == is {
            continue;
        }
        match field {
            "conditions" => {
                let own = |v: Option<&Value>| {
                    let all = v.and_then(Value::as_array).cloned().unwrap_or_default();
                    let is_own = |c: &Value| {
                        c.get("type").and_then(Value::as_str).is_some_and(|t| OWN_CONDITIONS.contains(&t))
                    };
                    Value::Array(all.into_iter().filter(is_own).collect())
                };
                let (was, is) = (own(was), own(is));
                let mut changed = keyed(Some(&was), Some(&is), "type");
                // A merge keeps fields that the new condition no longer has.
                for c in &mut changed {
                    let Some(c) = c.as_object_mut() else { continue };
                    for f in ["reason", "message"] {
                        if !c.contains_key(f) && !c.contains_key("$patch") {
                            c.insert(f.to_owned(), Value::Null);
                        }
                    }
                }
                if !changed.is_empty() {
                    status.insert(field.to_owned(), Value::Array(changed));
                }
            }
            "podIPs" | "hostIPs" => {
                let changed = keyed(was, is, "ip");
                if !changed.is_empty() {
                    status.insert(field.to_owned(), Value::Array(changed));
                }
            }
            _ => {
                status.insert(field.to_owned(), is.cloned().unwrap_or(Value::Null));
            }
        }
    }
    (!status.is_empty()).then(|| json!({"metadata": {"uid": uid}, "status": status}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(v: Value) -> PodStatus {
        serde_json::from_value(v).unwrap()
    }

    #[test]
    fn only_changes_and_only_own_conditions() {
        let old = status(json!({"phase": "Pending", "message": "m", "podIPs": [{"ip": "10.0.0.1"}],
            "conditions": [{"type": "Ready", "status": "False", "reason": "x"}, {"type": "Mine", "status": "True"}]}));
        assert_eq!(diff("u", &old, &old), None);
        let new = status(json!({"phase": "Running", "podIPs": [{"ip": "10.0.0.2"}],
            "conditions": [{"type": "Ready", "status": "True"}]}));
        assert_eq!(
            diff("u", &old, &new).unwrap(),
            json!({"metadata": {"uid": "u"}, "status": {"phase": "Running", "message": null,
                "podIPs": [{"ip": "10.0.0.2"}, {"$patch": "delete", "ip": "10.0.0.1"}],
                "conditions": [{"type": "Ready", "status": "True", "reason": null, "message": null}]}})
        );
        let other = status(json!({"phase": "Pending", "message": "m", "podIPs": [{"ip": "10.0.0.1"}],
            "conditions": [{"type": "Ready", "status": "False", "reason": "x"}]}));
        assert_eq!(diff("u", &old, &other), None);
    }
}
