//! RuntimeClass: the class must exist; its overhead and scheduling constraints become the pod's.

use serde_json::{Value, json};

use super::{Context, forbidden, items, list_mut, text};
use crate::registry::Attributes;
use crate::status::Status;

pub(super) async fn admit(c: &Context, a: &mut Attributes) -> Result<(), Status> {
    let Some(pod) = &a.object else { return Ok(()) };
    let name = text(pod, "/spec/runtimeClassName").to_owned();
    if name.is_empty() {
        let overhead =
            pod.pointer("/spec/overhead").and_then(Value::as_object).is_some_and(|o| !o.is_empty());
        return match overhead {
            true => Err(forbidden(
                a,
                "pod rejected: Pod Overhead set without corresponding RuntimeClass defined Overhead",
            )),
            false => Ok(()),
        };
    }
    let class = match c.registry.get("node.k8s.io", "runtimeclasses", "", &name).await {
        Ok(class) => class,
        Err(e) if e.is_not_found() => {
            return Err(forbidden(a, format!("pod rejected: RuntimeClass {name:?} not found")));
        }
        Err(e) => return Err(e),
    };
    let Some(pod) = &mut a.object else { return Ok(()) };
    merge(pod, &class).map_err(|why| forbidden(a, why))
}

fn merge(pod: &mut Value, class: &Value) -> Result<(), &'static str> {
    let spec = &mut pod["spec"];
    let claimed = spec.get("overhead").filter(|o| o.as_object().is_some_and(|o| !o.is_empty())).cloned();
    match (class.pointer("/overhead/podFixed"), claimed) {
        (Some(fixed), Some(claimed)) if *fixed != claimed => {
            return Err("pod rejected: Pod's Overhead doesn't match RuntimeClass's defined Overhead");
        }
        (Some(fixed), _) => spec["overhead"] = fixed.clone(),
        (None, Some(_)) => {
            return Err("pod rejected: Pod Overhead set without corresponding RuntimeClass defined Overhead");
        }
        (None, None) => {}
    }
    for (key, value) in
        class.pointer("/scheduling/nodeSelector").and_then(Value::as_object).into_iter().flatten()
    {
        if !spec["nodeSelector"].is_object() {
            spec["nodeSelector"] = json!({});
        }
        match spec["nodeSelector"].get(key) {
            Some(own) if own != value => {
                return Err(
                    "conflict: runtimeClass.scheduling.nodeSelector and pod.spec.nodeSelector differ",
                );
            }
            _ => spec["nodeSelector"][key] = value.clone(),
        }
    }
    let tolerations: Vec<Value> = items(class, "/scheduling/tolerations").cloned().collect();
    if !tolerations.is_empty() {
        let list = list_mut(spec, "tolerations");
        for toleration in tolerations {
            if !list.contains(&toleration) {
                list.push(toleration);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging() {
        let class = json!({"overhead": {"podFixed": {"cpu": "10m"}}, "scheduling": {"nodeSelector": {"a": "b"}, "tolerations": [{"key": "k"}]}});
        let mut pod = json!({"spec": {}});
        merge(&mut pod, &class).unwrap();
        assert_eq!(pod["spec"]["overhead"]["cpu"], "10m");
        assert_eq!(pod["spec"]["nodeSelector"]["a"], "b");
        assert_eq!(pod["spec"]["tolerations"][0]["key"], "k");
        assert!(merge(&mut json!({"spec": {"overhead": {"cpu": "1"}}}), &class).is_err());
        assert!(merge(&mut json!({"spec": {"nodeSelector": {"a": "c"}}}), &class).is_err());
    }
}
