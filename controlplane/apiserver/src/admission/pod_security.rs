//! PodSecurity: the namespace's `pod-security.kubernetes.io/{enforce,warn}` labels choose the level that its pods must keep.

use serde_json::Value;

use super::pod_security_checks::{Level, violations};
use super::{Context, forbidden, is, text};
use crate::registry::{Attributes, Operation};
use crate::status::Status;

const PREFIX: &str = "/metadata/labels/pod-security.kubernetes.io~1";

/// Where each workload kind keeps its pod template; they are warned about, never refused.
const TEMPLATES: [(&str, &str, &str); 8] = [
    ("apps", "deployments", "/spec/template"),
    ("apps", "replicasets", "/spec/template"),
    ("apps", "statefulsets", "/spec/template"),
    ("apps", "daemonsets", "/spec/template"),
    ("batch", "jobs", "/spec/template"),
    ("batch", "cronjobs", "/spec/jobTemplate/spec/template"),
    ("", "replicationcontrollers", "/spec/template"),
    ("", "podtemplates", "/template"),
];

fn level(namespace: &Value, mode: &str) -> Level {
    match text(namespace, &format!("{PREFIX}{mode}")) {
        "baseline" => Level::Baseline,
        "restricted" => Level::Restricted,
        "privileged" | "" => Level::Privileged,
        // A level that nobody knows must not mean "anything goes".
        _ => Level::Restricted,
    }
}

fn name(level: Level) -> &'static str {
    match level {
        Level::Privileged => "privileged",
        Level::Baseline => "baseline",
        Level::Restricted => "restricted",
    }
}

pub(super) async fn validate(c: &Context, a: &mut Attributes) -> Result<(), Status> {
    if !matches!(a.operation, Operation::Create | Operation::Update) || a.info.namespace.is_empty() {
        return Ok(());
    }
    let is_pod = a.info.api_group.is_empty()
        && a.info.resource == "pods"
        && matches!(a.info.subresource.as_str(), "" | "ephemeralcontainers");
    let template = TEMPLATES.iter().find(|(g, r, _)| is(a, g, r)).map(|(_, _, p)| *p);
    if !is_pod && template.is_none() {
        return Ok(());
    }
    let namespace = c.registry.get("", "namespaces", "", &a.info.namespace).await?;
    let (enforce, warn) = (level(&namespace, "enforce"), level(&namespace, "warn"));
    if enforce == Level::Privileged && warn == Level::Privileged {
        return Ok(());
    }
    let object = a.object.as_ref().unwrap_or(&Value::Null);
    let pod = template.and_then(|p| object.pointer(p)).unwrap_or(object);
    // An update that does not touch what is judged was judged before.
    if let Some(old) = &a.old_object
        && is_pod
        && ["spec", "metadata"].iter().all(|k| relevant(old, k) == relevant(pod, k))
    {
        return Ok(());
    }
    if is_pod {
        let faults = violations(pod, enforce);
        if !faults.is_empty() {
            let why = format!("violates PodSecurity \"{}:latest\": {}", name(enforce), faults.join(", "));
            return Err(forbidden(a, why));
        }
    }
    let faults = violations(pod, warn);
    if !faults.is_empty() {
        let text = format!("would violate PodSecurity \"{}:latest\": {}", name(warn), faults.join(", "));
        a.warnings.push(text);
    }
    Ok(())
}

fn relevant(pod: &Value, part: &str) -> Value {
    match part {
        "metadata" => pod.pointer("/metadata/annotations").cloned().unwrap_or(Value::Null),
        _ => pod[part].clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn levels() {
        let ns = |v: &str| json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": v}}});
        assert_eq!(level(&ns("baseline"), "enforce"), Level::Baseline);
        assert_eq!(level(&ns("baseline"), "warn"), Level::Privileged);
        assert_eq!(level(&ns("typo"), "enforce"), Level::Restricted);
        assert_eq!(level(&json!({}), "enforce"), Level::Privileged);
    }
}
