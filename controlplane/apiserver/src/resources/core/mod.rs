//! The core group.

use serde_json::{Value, json};

use super::{Column, Plain, Resource, Strategy, col, num};
use crate::{
    table::human,
    validation::{Errors, names},
    value,
};

mod event;
mod namespace;
mod node;
mod pod;
mod service;
mod volume;

pub(super) use event::{EVENTS_CONVERSION, Event};

const STREAM: &[&str] = &["create", "get"];
const PROXY: &[&str] = &["create", "delete", "get", "patch", "update"];
const EDIT: &[&str] = &["get", "patch", "update"];
const CREATE: &[&str] = &["create"];

/// The events resource as it is stored.
pub(super) fn events() -> Resource {
    let mut r = Resource::new("", "v1", "Event", "events", Event).short(&["ev"]);
    r.expires = true;
    r
}

pub(super) fn resources() -> Vec<Resource> {
    vec![
        Resource::new("", "v1", "Binding", "bindings", Plain).verbs(CREATE),
        Resource::new("", "v1", "ComponentStatus", "componentstatuses", Plain)
            .cluster()
            .short(&["cs"])
            .verbs(&["get", "list"]),
        Resource::new("", "v1", "ConfigMap", "configmaps", ConfigMap).short(&["cm"]),
        Resource::new("", "v1", "Endpoints", "endpoints", Endpoints).short(&["ep"]),
        events(),
        Resource::new("", "v1", "LimitRange", "limitranges", LimitRange).short(&["limits"]),
        Resource::new("", "v1", "Namespace", "namespaces", namespace::Namespace)
            .cluster()
            .short(&["ns"])
            .with_status()
            .named(names::dns_label)
            .verbs(&["create", "delete", "get", "list", "patch", "update", "watch"])
            .extra("finalize", ("", "", "Namespace"), &["update"]),
        Resource::new("", "v1", "Node", "nodes", node::Node).cluster().short(&["no"]).with_status().extra(
            "proxy",
            ("", "", "NodeProxyOptions"),
            PROXY,
        ),
        Resource::new("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims", volume::Claim)
            .short(&["pvc"])
            .with_status(),
        Resource::new("", "v1", "PersistentVolume", "persistentvolumes", volume::Volume)
            .cluster()
            .short(&["pv"])
            .with_status(),
        pods(),
        Resource::new("", "v1", "PodTemplate", "podtemplates", PodTemplate),
        Resource::new(
            "",
            "v1",
            "ReplicationController",
            "replicationcontrollers",
            super::apps::ReplicationController,
        )
        .short(&["rc"])
        .category(&["all"])
        .with_status()
        .generation()
        .scaled("spec.selector"),
        Resource::new("", "v1", "ResourceQuota", "resourcequotas", Quota).short(&["quota"]).with_status(),
        Resource::new("", "v1", "Secret", "secrets", Secret),
        Resource::new("", "v1", "ServiceAccount", "serviceaccounts", ServiceAccount).short(&["sa"]).extra(
            "token",
            ("authentication.k8s.io", "v1", "TokenRequest"),
            CREATE,
        ),
        Resource::new("", "v1", "Service", "services", service::Service)
            .short(&["svc"])
            .category(&["all"])
            .with_status()
            .named(names::dns1035_label)
            .extra("proxy", ("", "", "ServiceProxyOptions"), PROXY),
    ]
}

fn pods() -> Resource {
    Resource::new("", "v1", "Pod", "pods", pod::Pod)
        .short(&["po"])
        .category(&["all"])
        .with_status()
        .generation()
        .extra("attach", ("", "", "PodAttachOptions"), STREAM)
        .extra("binding", ("", "", "Binding"), CREATE)
        .extra("ephemeralcontainers", ("", "", "Pod"), EDIT)
        .extra("eviction", ("policy", "v1", "Eviction"), CREATE)
        .extra("exec", ("", "", "PodExecOptions"), STREAM)
        .extra("log", ("", "", "Pod"), &["get"])
        .extra("portforward", ("", "", "PodPortForwardOptions"), STREAM)
        .extra("proxy", ("", "", "PodProxyOptions"), PROXY)
        .extra("resize", ("", "", "Pod"), EDIT)
}

/// Keys of `data` and `binaryData`.
fn config_keys(object: &Value, errors: &mut Errors) {
    for part in ["data", "binaryData"] {
        for key in value::map(object, part).into_iter().flatten().map(|(k, _)| k) {
            errors.check(&format!("{part}[{key}]"), key, names::config_key(key));
        }
    }
    let size: usize = ["data", "binaryData"]
        .iter()
        .flat_map(|p| value::map(object, p).into_iter().flatten())
        .map(|(_, v)| v.as_str().map_or(0, str::len))
        .sum();
    if size > 1 << 20 {
        errors.too_long("", 1 << 20);
    }
}

/// An immutable ConfigMap or Secret stays as it is, and stays immutable.
fn frozen(new: &Value, old: &Value, errors: &mut Errors) {
    if !value::flag(old, "immutable") {
        return;
    }
    if !value::flag(new, "immutable") {
        errors.forbidden("immutable", "field is immutable when `immutable` is set");
    }
    for part in ["data", "binaryData"] {
        if value::at(new, part) != value::at(old, part) {
            errors.forbidden(part, "field is immutable when `immutable` is set");
        }
    }
}

fn count(object: &Value, part: &str) -> i64 {
    value::map(object, part).map_or(0, |m| m.len() as i64)
}

struct ConfigMap;

impl Strategy for ConfigMap {
    fn validate(&self, object: &Value, errors: &mut Errors) {
        config_keys(object, errors);
    }

    fn validate_update(&self, new: &Value, old: &Value, errors: &mut Errors) {
        config_keys(new, errors);
        frozen(new, old, errors);
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[num("Data")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        vec![(count(object, "data") + count(object, "binaryData")).into()]
    }
}

struct Secret;

impl Strategy for Secret {
    fn defaults(&self, object: &mut Value) {
        value::default_text(object, "type", "Opaque");
    }

    fn prepare_create(&self, object: &mut Value) {
        merge_string_data(object);
    }

    fn prepare_update(&self, new: &mut Value, old: &Value) {
        merge_string_data(new);
        if value::text(new, "type").is_empty() {
            value::carry(new, old, "type");
        }
    }

    fn validate(&self, object: &Value, errors: &mut Errors) {
        config_keys(object, errors);
        use base64::Engine;
        for (k, v) in value::map(object, "data").into_iter().flatten() {
            if base64::engine::general_purpose::STANDARD.decode(v.as_str().unwrap_or("")).is_err() {
                errors.invalid(&format!("data[{k}]"), &"<redacted>".into(), "illegal base64 data");
            }
        }
        let needed = match value::text(object, "type") {
            "kubernetes.io/tls" => &["tls.crt", "tls.key"][..],
            "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"][..],
            "kubernetes.io/dockercfg" => &[".dockercfg"][..],
            "kubernetes.io/ssh-auth" => &["ssh-privatekey"][..],
            _ => &[],
        };
        for key in needed {
            if value::map(object, "data").is_none_or(|d| !d.contains_key(*key)) {
                errors.required(&format!("data[{key}]"), "");
            }
        }
    }

    fn validate_update(&self, new: &Value, old: &Value, errors: &mut Errors) {
        self.validate(new, errors);
        errors.immutable(new, old, "type");
        frozen(new, old, errors);
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("Type"), num("Data")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        vec![value::text(object, "type").into(), count(object, "data").into()]
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["type"]
    }
}

/// `stringData` is write-only: it ends up in `data`.
fn merge_string_data(object: &mut Value) {
    use base64::Engine;
    let Some(Value::Object(strings)) = value::remove(object, "stringData") else { return };
    for (k, v) in strings {
        let encoded = base64::engine::general_purpose::STANDARD.encode(v.as_str().unwrap_or(""));
        value::ensure_map(object, "data").insert(k, encoded.into());
    }
}

struct ServiceAccount;

impl Strategy for ServiceAccount {
    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[num("Secrets")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        vec![value::list(object, "secrets").len().into()]
    }
}

struct Endpoints;

impl Strategy for Endpoints {
    fn defaults(&self, object: &mut Value) {
        for subset in value::list_mut(object, "subsets") {
            for port in value::list_mut(subset, "ports") {
                value::default_text(port, "protocol", "TCP");
            }
        }
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("Endpoints")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let mut all = Vec::new();
        for subset in value::list(object, "subsets") {
            for address in value::list(subset, "addresses") {
                let ip = value::text(address, "ip");
                for port in value::list(subset, "ports") {
                    all.push(format!("{ip}:{}", value::int(port, "port").unwrap_or(0)));
                }
            }
        }
        let more = all.len().saturating_sub(3);
        all.truncate(3);
        let mut text = all.join(",");
        if more > 0 {
            text.push_str(&format!(" + {more} more..."));
        }
        vec![human::or_none(&text)]
    }
}

struct LimitRange;

impl Strategy for LimitRange {
    fn defaults(&self, object: &mut Value) {
        for limit in value::list_mut(object, "spec.limits") {
            if value::text(limit, "type") != "Container" {
                continue;
            }
            let max = value::map(limit, "max").cloned().unwrap_or_default();
            for (name, amount) in max {
                value::ensure_map(limit, "default").entry(name).or_insert(amount);
            }
            let limits = value::map(limit, "default").cloned().unwrap_or_default();
            let min = value::map(limit, "min").cloned().unwrap_or_default();
            for (name, amount) in limits.into_iter().chain(min) {
                value::ensure_map(limit, "defaultRequest").entry(name).or_insert(amount);
            }
        }
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("Created At")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        vec![value::text(object, "metadata.creationTimestamp").into()]
    }

    fn shows_age(&self) -> bool {
        false
    }
}

struct PodTemplate;

impl Strategy for PodTemplate {
    fn defaults(&self, object: &mut Value) {
        super::pod_template::default_template(object, "template");
    }

    fn validate(&self, object: &Value, errors: &mut Errors) {
        super::pod_template::validate_template(object, "template", &[], errors);
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("Containers"), col("Images"), col("Pod Labels")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let (n, i) = human::containers(object, "template.spec.containers");
        vec![n, i, human::labels(object, "template.metadata.labels")]
    }
}

struct Quota;

impl Strategy for Quota {
    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("Request"), col("Limit")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let (mut requests, mut limits) = (Vec::new(), Vec::new());
        for (name, hard) in value::map(object, "status.hard").into_iter().flatten() {
            let used = value::map(object, "status.used")
                .and_then(|m| m.get(name))
                .and_then(Value::as_str)
                .unwrap_or("0");
            let text = format!("{name}: {used}/{}", hard.as_str().unwrap_or(""));
            if name.starts_with("limits.") { limits.push(text) } else { requests.push(text) }
        }
        vec![requests.join(", ").into(), limits.join(", ").into()]
    }
}

/// Access modes as kubectl shortens them.
fn access_modes(object: &Value, path: &str) -> Value {
    let short = |m: &str| match m {
        "ReadWriteOnce" => "RWO",
        "ReadOnlyMany" => "ROX",
        "ReadWriteMany" => "RWX",
        "ReadWriteOncePod" => "RWOP",
        _ => "",
    };
    let all: Vec<&str> = value::list(object, path).iter().filter_map(Value::as_str).map(short).collect();
    json!(all.join(","))
}
