//! What pods and everything that holds a pod template share: defaults and validation of a PodSpec.

mod defaults;

use std::collections::BTreeSet;

use serde_json::Value;

use crate::{
    validation::{Errors, meta, names},
    value,
};

pub use defaults::{default_spec, default_template};

/// What the kernel takes as a host name, in bytes.
const HOSTNAME_LIMIT: usize = 64;
const CONTAINER_LISTS: [&str; 3] = ["initContainers", "containers", "ephemeralContainers"];

/// A pod template at `path`: labels and spec. `policies` are the restart policies that the owner allows.
pub fn validate_template(object: &Value, path: &str, policies: &[&str], errors: &mut Errors) {
    meta::labels(object, &format!("{path}.metadata.labels"), errors);
    let at = format!("{path}.spec");
    match value::at(object, &at) {
        Some(spec) => {
            validate_spec(spec, &at, errors);
            let policy = value::text(spec, "restartPolicy");
            if !policies.is_empty() && !policies.contains(&policy) {
                errors.not_supported(&format!("{at}.restartPolicy"), &policy.into(), policies);
            }
        }
        None => errors.required(&format!("{at}.containers"), ""),
    }
}

/// Checks a PodSpec that lies at `path`.
pub fn validate_spec(spec: &Value, path: &str, errors: &mut Errors) {
    if value::list(spec, "containers").is_empty() {
        errors.required(&format!("{path}.containers"), "");
    }
    let volumes = validate_volumes(spec, path, errors);
    let mut seen = BTreeSet::new();
    for list in CONTAINER_LISTS {
        for (i, c) in value::list(spec, list).iter().enumerate() {
            let at = format!("{path}.{list}[{i}]");
            validate_container(c, &at, list, &volumes, errors);
            let name = value::text(c, "name");
            if !name.is_empty() && !seen.insert(name.to_owned()) {
                errors.duplicate(&format!("{at}.name"), &name.into());
            }
        }
    }
    let supported = |field: &str, allowed: &[&str], errors: &mut Errors| {
        if let Some(v) = value::at(spec, field)
            && !v.as_str().is_some_and(|s| allowed.contains(&s))
        {
            errors.not_supported(&format!("{path}.{field}"), v, allowed);
        }
    };
    supported("restartPolicy", &["Always", "OnFailure", "Never"], errors);
    supported("dnsPolicy", &["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"], errors);
    supported("preemptionPolicy", &["PreemptLowerPriority", "Never"], errors);
    if value::text(spec, "dnsPolicy") == "None" && value::list(spec, "dnsConfig.nameservers").is_empty() {
        errors.required(
            &format!("{path}.dnsConfig.nameservers"),
            "must provide at least one DNS nameserver when `dnsPolicy` is None",
        );
    }
    for (field, rule) in [
        ("nodeName", names::dns_subdomain as fn(&str) -> Vec<String>),
        ("serviceAccountName", names::dns_subdomain),
        ("hostname", names::dns_label),
        ("subdomain", names::dns_label),
        ("priorityClassName", names::dns_subdomain),
        ("runtimeClassName", names::dns_subdomain),
    ] {
        let text = value::text(spec, field);
        if !text.is_empty() {
            errors.check(&format!("{path}.{field}"), text, rule(text));
        }
    }
    if let Some(n) = value::int(spec, "terminationGracePeriodSeconds").filter(|n| *n < 0) {
        errors.invalid(
            &format!("{path}.terminationGracePeriodSeconds"),
            &n.into(),
            "must be greater than or equal to 0",
        );
    }
    if let Some(n) = value::int(spec, "activeDeadlineSeconds").filter(|n| *n < 1) {
        errors.invalid(
            &format!("{path}.activeDeadlineSeconds"),
            &n.into(),
            "must be between 1 and 2147483647, inclusive",
        );
    }
    for (k, v) in value::map(spec, "nodeSelector").into_iter().flatten() {
        errors.check(&format!("{path}.nodeSelector"), k, names::qualified_name(k));
        let v = v.as_str().unwrap_or("");
        errors.check(&format!("{path}.nodeSelector"), v, names::label_value(v));
    }
    validate_tolerations(spec, path, errors);
    validate_sysctls(spec, path, errors);
    validate_host_users(spec, path, errors);
    validate_hostname_override(spec, path, errors);
}

/// KEP-4762: a name that the pod's own fields or the node would contradict, or that the kernel does not take.
fn validate_hostname_override(spec: &Value, path: &str, errors: &mut Errors) {
    let Some(name) = value::at(spec, "hostnameOverride").and_then(Value::as_str) else { return };
    let at = format!("{path}.hostnameOverride");
    for field in ["setHostnameAsFQDN", "hostNetwork"] {
        if value::flag(spec, field) {
            errors.forbidden(&at, &format!("may not be specified when {field} is true"));
        }
    }
    if name.len() > HOSTNAME_LIMIT {
        errors.too_long(&at, HOSTNAME_LIMIT);
    }
    errors.check(&at, name, names::dns_subdomain(name));
}

/// What a user namespace of the pod's own excludes, and what needs one (KEP-127, KEP-4265).
fn validate_host_users(spec: &Value, path: &str, errors: &mut Errors) {
    let own = value::at(spec, "hostUsers") == Some(&Value::Bool(false));
    for field in ["hostNetwork", "hostPID", "hostIPC"] {
        if own && value::flag(spec, field) {
            errors.forbidden(&format!("{path}.{field}"), "when `hostUsers` is false");
        }
    }
    for list in CONTAINER_LISTS {
        for (i, c) in value::list(spec, list).iter().enumerate() {
            let at = format!("{path}.{list}[{i}]");
            if own && !value::list(c, "volumeDevices").is_empty() {
                errors.forbidden(&format!("{at}.volumeDevices"), "when `hostUsers` is false");
            }
            let at = format!("{at}.securityContext.procMount");
            match value::at(c, "securityContext.procMount") {
                Some(v) if v == "Unmasked" && !own => {
                    errors.invalid(&at, v, "`hostUsers` must be false to use `Unmasked`");
                }
                Some(v) if v != "Unmasked" && v != "Default" => {
                    errors.not_supported(&at, v, &["Default", "Unmasked"]);
                }
                _ => {}
            }
        }
    }
}

fn validate_sysctls(spec: &Value, path: &str, errors: &mut Errors) {
    let mut seen = Vec::new();
    for (i, s) in value::list(spec, "securityContext.sysctls").iter().enumerate() {
        let at = format!("{path}.securityContext.sysctls[{i}].name");
        let name = value::text(s, "name");
        if name.is_empty() {
            errors.required(&at, "");
        } else if seen.contains(&name) {
            errors.duplicate(&at, &name.into());
        } else {
            errors.check(&at, name, names::sysctl(name));
        }
        seen.push(name);
    }
}

fn validate_tolerations(spec: &Value, path: &str, errors: &mut Errors) {
    for (i, t) in value::list(spec, "tolerations").iter().enumerate() {
        let at = format!("{path}.tolerations[{i}]");
        let key = value::text(t, "key");
        let operator = value::text(t, "operator");
        if !key.is_empty() {
            errors.check(&format!("{at}.key"), key, names::qualified_name(key));
        } else if operator != "Exists" {
            errors.invalid(
                &format!("{at}.operator"),
                &operator.into(),
                "operator must be Exists when `key` is empty, which means \"match all values and all keys\"",
            );
        }
        if !matches!(operator, "" | "Equal" | "Exists" | "Lt" | "Gt") {
            errors.not_supported(&format!("{at}.operator"), &operator.into(), &["Equal", "Exists"]);
        }
        let effect = value::text(t, "effect");
        if !matches!(effect, "" | "NoSchedule" | "PreferNoSchedule" | "NoExecute") {
            errors.not_supported(
                &format!("{at}.effect"),
                &effect.into(),
                &["NoSchedule", "PreferNoSchedule", "NoExecute"],
            );
        }
        if value::has(t, "tolerationSeconds") && effect != "NoExecute" {
            errors.invalid(
                &format!("{at}.effect"),
                &effect.into(),
                "effect must be 'NoExecute' when `tolerationSeconds` is set",
            );
        }
    }
}

fn validate_volumes(spec: &Value, path: &str, errors: &mut Errors) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for (i, v) in value::list(spec, "volumes").iter().enumerate() {
        let at = format!("{path}.volumes[{i}]");
        let name = value::text(v, "name");
        if name.is_empty() {
            errors.required(&format!("{at}.name"), "");
        } else {
            errors.check(&format!("{at}.name"), name, names::dns_label(name));
            if !all.insert(name.to_owned()) {
                errors.duplicate(&format!("{at}.name"), &name.into());
            }
        }
        let sources: Vec<&String> =
            v.as_object().into_iter().flatten().map(|(k, _)| k).filter(|k| *k != "name").collect();
        if sources.len() > 1 {
            errors.forbidden(&format!("{at}.{}", sources[1]), "may not specify more than 1 volume type");
        }
        if value::has(v, "hostPath") && value::text(v, "hostPath.path").is_empty() {
            errors.required(&format!("{at}.hostPath.path"), "");
        }
        if value::has(v, "secret") && value::text(v, "secret.secretName").is_empty() {
            errors.required(&format!("{at}.secret.secretName"), "");
        }
        if value::has(v, "configMap") && value::text(v, "configMap.name").is_empty() {
            errors.required(&format!("{at}.configMap.name"), "");
        }
        if value::has(v, "persistentVolumeClaim")
            && value::text(v, "persistentVolumeClaim.claimName").is_empty()
        {
            errors.required(&format!("{at}.persistentVolumeClaim.claimName"), "");
        }
    }
    all
}

fn validate_container(c: &Value, at: &str, list: &str, volumes: &BTreeSet<String>, errors: &mut Errors) {
    let name = value::text(c, "name");
    if name.is_empty() {
        errors.required(&format!("{at}.name"), "");
    } else {
        errors.check(&format!("{at}.name"), name, names::dns_label(name));
    }
    let image = value::text(c, "image");
    if image.is_empty() {
        errors.required(&format!("{at}.image"), "");
    } else if image.trim() != image {
        errors.invalid(&format!("{at}.image"), &image.into(), "must not have leading or trailing whitespace");
    }
    let supported = |field: &str, allowed: &[&str], errors: &mut Errors| {
        if let Some(v) = value::at(c, field)
            && !v.as_str().is_some_and(|s| allowed.contains(&s))
        {
            errors.not_supported(&format!("{at}.{field}"), v, allowed);
        }
    };
    supported("imagePullPolicy", &["Always", "IfNotPresent", "Never"], errors);
    supported("terminationMessagePolicy", &["File", "FallbackToLogsOnError"], errors);
    if list == "initContainers" {
        supported("restartPolicy", &["Always", "OnFailure", "Never"], errors);
    }
    validate_ports(c, at, errors);
    for (i, e) in value::list(c, "env").iter().enumerate() {
        let name = value::text(e, "name");
        if name.is_empty() {
            errors.required(&format!("{at}.env[{i}].name"), "");
        } else {
            errors.check(&format!("{at}.env[{i}].name"), name, names::env_name(name));
        }
        if value::has(e, "valueFrom") && !value::text(e, "value").is_empty() {
            errors.invalid(
                &format!("{at}.env[{i}].valueFrom"),
                &"".into(),
                "may not be specified when `value` is not empty",
            );
        }
    }
    let mut mounted = BTreeSet::new();
    for (i, m) in value::list(c, "volumeMounts").iter().enumerate() {
        let at = format!("{at}.volumeMounts[{i}]");
        let name = value::text(m, "name");
        if name.is_empty() {
            errors.required(&format!("{at}.name"), "");
        } else if !volumes.contains(name) {
            errors.not_found(&format!("{at}.name"), &name.into());
        }
        let path = value::text(m, "mountPath");
        if path.is_empty() {
            errors.required(&format!("{at}.mountPath"), "");
        } else if !mounted.insert(path.to_owned()) {
            errors.invalid(&format!("{at}.mountPath"), &path.into(), "must be unique");
        }
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(p) = value::at(c, probe) {
            validate_probe(p, &format!("{at}.{probe}"), probe, errors);
        }
    }
    validate_resources(c, at, errors);
}

fn validate_probe(p: &Value, at: &str, kind: &str, errors: &mut Errors) {
    let handlers = ["exec", "httpGet", "tcpSocket", "grpc"].iter().filter(|h| value::has(p, h)).count();
    if handlers == 0 {
        errors.required(at, "must specify a handler type");
    } else if handlers > 1 {
        errors.forbidden(at, "may not specify more than 1 handler type");
    }
    for field in
        ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"]
    {
        if let Some(n) = value::int(p, field).filter(|n| *n < 0) {
            errors.invalid(&format!("{at}.{field}"), &n.into(), "must be greater than or equal to 0");
        }
    }
    if kind != "readinessProbe"
        && let Some(n) = value::int(p, "successThreshold").filter(|n| *n > 1)
    {
        errors.invalid(&format!("{at}.successThreshold"), &n.into(), "must be 1");
    }
    for handler in ["httpGet", "tcpSocket"] {
        if value::has(p, handler) {
            match value::at(p, &format!("{handler}.port")) {
                Some(Value::Number(n)) if !n.as_i64().is_some_and(|n| (1..=65535).contains(&n)) => {
                    errors.invalid(
                        &format!("{at}.{handler}.port"),
                        &Value::Number(n.clone()),
                        "must be between 1 and 65535, inclusive",
                    );
                }
                Some(_) => {}
                None => errors.required(&format!("{at}.{handler}.port"), ""),
            }
        }
    }
}

fn validate_ports(c: &Value, at: &str, errors: &mut Errors) {
    let mut named = BTreeSet::new();
    for (i, p) in value::list(c, "ports").iter().enumerate() {
        let at = format!("{at}.ports[{i}]");
        match value::int(p, "containerPort") {
            None | Some(0) => errors.required(&format!("{at}.containerPort"), ""),
            Some(n) if !(1..=65535).contains(&n) => {
                errors.invalid(
                    &format!("{at}.containerPort"),
                    &n.into(),
                    "must be between 1 and 65535, inclusive",
                );
            }
            Some(_) => {}
        }
        if let Some(n) = value::int(p, "hostPort").filter(|n| *n != 0 && !(1..=65535).contains(n)) {
            errors.invalid(&format!("{at}.hostPort"), &n.into(), "must be between 1 and 65535, inclusive");
        }
        let name = value::text(p, "name");
        if !name.is_empty() {
            errors.check(&format!("{at}.name"), name, names::port_name(name));
            if !named.insert(name.to_owned()) {
                errors.duplicate(&format!("{at}.name"), &name.into());
            }
        }
        let protocol = value::text(p, "protocol");
        if !matches!(protocol, "TCP" | "UDP" | "SCTP") {
            errors.not_supported(&format!("{at}.protocol"), &protocol.into(), &["TCP", "UDP", "SCTP"]);
        }
    }
}

fn validate_resources(c: &Value, at: &str, errors: &mut Errors) {
    let amount = |part: &str, name: &str| -> Option<orlop_api::quantity::Amount> {
        let text = value::map(c, &format!("resources.{part}"))?.get(name)?.as_str()?;
        text.parse().ok()
    };
    for part in ["limits", "requests"] {
        for (name, v) in value::map(c, &format!("resources.{part}")).into_iter().flatten() {
            if v.as_str().is_none_or(|t| t.parse::<orlop_api::quantity::Amount>().is_err()) {
                errors.invalid(
                    &format!("{at}.resources.{part}[{name}]"),
                    v,
                    "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'",
                );
            }
        }
    }
    for (name, v) in value::map(c, "resources.requests").into_iter().flatten() {
        if let (Some(request), Some(limit)) = (amount("requests", name), amount("limits", name))
            && request > limit
        {
            let detail = format!(
                "must be less than or equal to {name} limit of {}",
                value::map(c, "resources.limits")
                    .and_then(|m| m.get(name))
                    .and_then(Value::as_str)
                    .unwrap_or("")
            );
            errors.invalid(&format!("{at}.resources.requests"), v, &detail);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(spec: Value) -> Vec<String> {
        let mut spec = spec;
        default_spec(&mut spec);
        let mut errors = Errors::default();
        validate_spec(&spec, "spec", &mut errors);
        errors.into_causes().into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect()
    }

    #[test]
    fn a_small_spec_is_complete_after_defaults() {
        let mut spec = json!({"containers": [{"name": "a", "image": "x:1", "resources": {"limits": {"cpu": "1"}}, "readinessProbe": {"httpGet": {"port": 80}}}]});
        default_spec(&mut spec);
        let c = &spec["containers"][0];
        assert_eq!(c["imagePullPolicy"], "IfNotPresent");
        assert_eq!(c["resources"]["requests"]["cpu"], "1");
        assert_eq!(c["readinessProbe"]["periodSeconds"], 10);
        assert_eq!(spec["dnsPolicy"], "ClusterFirst");
        assert_eq!(check(spec), Vec::<String>::new());
        let mut latest = json!({"containers": [{"name": "a", "image": "host:5000/x"}]});
        default_spec(&mut latest);
        assert_eq!(latest["containers"][0]["imagePullPolicy"], "Always");
    }

    #[test]
    fn mistakes_are_named_by_path() {
        let ok = json!({"name": "a", "image": "x"});
        for (spec, want) in [
            (json!({"containers": []}), "spec.containers: Required value"),
            (
                json!({"containers": [{"name": "A", "image": "x"}]}),
                "spec.containers[0].name: Invalid value: \"A\"",
            ),
            (
                json!({"containers": [ok], "hostnameOverride": "a.b", "setHostnameAsFQDN": true}),
                "spec.hostnameOverride: Forbidden: may not be specified when setHostnameAsFQDN is true",
            ),
            (
                json!({"containers": [ok], "hostnameOverride": "a.b", "hostNetwork": true}),
                "spec.hostnameOverride: Forbidden: may not be specified when hostNetwork is true",
            ),
            (
                json!({"containers": [ok], "hostnameOverride": "a".repeat(65)}),
                "spec.hostnameOverride: Too long",
            ),
            (json!({"containers": [ok], "hostnameOverride": "A_b"}), "spec.hostnameOverride: Invalid value"),
            (json!({"containers": [ok, ok]}), "spec.containers[1].name: Duplicate value: \"a\""),
            (json!({"containers": [{"name": "a"}]}), "spec.containers[0].image: Required value"),
            (
                json!({"containers": [{"name": "a", "image": "x", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}]}),
                "spec.containers[0].volumeMounts[0].name: Not found: \"v\"",
            ),
            (
                json!({"containers": [{"name": "a", "image": "x", "resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}}]}),
                "spec.containers[0].resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1",
            ),
            (
                json!({"containers": [ok], "restartPolicy": "Sometimes"}),
                "spec.restartPolicy: Unsupported value: \"Sometimes\"",
            ),
            (
                json!({"containers": [ok], "hostUsers": false, "hostPID": true}),
                "spec.hostPID: Forbidden: when `hostUsers` is false",
            ),
            (
                json!({"containers": [{"name": "a", "image": "x", "securityContext": {"procMount": "Unmasked"}}]}),
                "spec.containers[0].securityContext.procMount: Invalid value: \"Unmasked\": `hostUsers` must be false",
            ),
            (
                json!({"containers": [{"name": "a", "image": "x", "ports": [{"containerPort": 70000}]}]}),
                "spec.containers[0].ports[0].containerPort: Invalid value: 70000",
            ),
        ] {
            let got = check(spec);
            assert_eq!(got.len(), 1, "{got:?}");
            assert!(got[0].starts_with(want), "{got:?} does not start with {want}");
        }
    }
}
