//! Defaults of a PodSpec.

use serde_json::{Value, json};

use super::CONTAINER_LISTS;
use crate::value;

/// Fills in a PodSpec.
pub fn default_spec(spec: &mut Value) {
    if !spec.is_object() {
        return;
    }
    value::default_text(spec, "restartPolicy", "Always");
    value::default_text(spec, "dnsPolicy", "ClusterFirst");
    value::default_text(spec, "schedulerName", "default-scheduler");
    value::default(spec, "terminationGracePeriodSeconds", 30);
    value::default(spec, "securityContext", json!({}));
    let host_network = value::flag(spec, "hostNetwork");
    for list in CONTAINER_LISTS {
        for container in value::list_mut(spec, list) {
            default_container(container, host_network);
        }
    }
    for volume in value::list_mut(spec, "volumes") {
        default_volume(volume);
    }
    for constraint in value::list_mut(spec, "topologySpreadConstraints") {
        value::default_text(constraint, "nodeAffinityPolicy", "Honor");
        value::default_text(constraint, "nodeTaintsPolicy", "Ignore");
    }
    // The two names of one field.
    let account = value::text(spec, "serviceAccountName").to_owned();
    let old = value::text(spec, "serviceAccount").to_owned();
    if account.is_empty() && !old.is_empty() {
        value::set(spec, "serviceAccountName", old);
    } else if !account.is_empty() {
        value::set(spec, "serviceAccount", account);
    }
}

fn default_container(c: &mut Value, host_network: bool) {
    value::default_text(c, "terminationMessagePath", "/dev/termination-log");
    value::default_text(c, "terminationMessagePolicy", "File");
    let image = value::text(c, "image");
    let name = image.rsplit('/').next().unwrap_or("");
    let latest = !name.contains('@') && (!name.contains(':') || name.ends_with(":latest"));
    value::default_text(c, "imagePullPolicy", if latest { "Always" } else { "IfNotPresent" });
    value::default(c, "resources", json!({}));
    for port in value::list_mut(c, "ports") {
        value::default_text(port, "protocol", "TCP");
        if host_network && !value::has(port, "hostPort") {
            let n = value::int(port, "containerPort").unwrap_or(0);
            value::set(port, "hostPort", n);
        }
    }
    for env in value::list_mut(c, "env") {
        if value::has(env, "valueFrom.fieldRef") {
            value::default_text(env, "valueFrom.fieldRef.apiVersion", "v1");
        }
        if value::has(env, "valueFrom.resourceFieldRef") {
            value::default(env, "valueFrom.resourceFieldRef.divisor", "0");
        }
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(p) = value::at_mut(c, probe).filter(|p| p.is_object()) {
            default_probe(p);
        }
    }
    for hook in ["lifecycle.postStart", "lifecycle.preStop"] {
        if let Some(h) = value::at_mut(c, hook).filter(|p| p.is_object()) {
            default_http_get(h);
        }
    }
    // What is limited and not requested is requested in full.
    let limits = value::map(c, "resources.limits").cloned().unwrap_or_default();
    for (name, amount) in limits {
        let requests = value::ensure_map(c, "resources.requests");
        requests.entry(name).or_insert(amount);
    }
}

fn default_http_get(v: &mut Value) {
    if value::has(v, "httpGet") {
        value::default_text(v, "httpGet.path", "/");
        value::default_text(v, "httpGet.scheme", "HTTP");
    }
}

fn default_probe(p: &mut Value) {
    default_http_get(p);
    if value::has(p, "grpc") {
        value::default(p, "grpc.service", "");
    }
    for (field, n) in
        [("timeoutSeconds", 1), ("periodSeconds", 10), ("successThreshold", 1), ("failureThreshold", 3)]
    {
        if value::int(p, field).unwrap_or(0) == 0 {
            value::set(p, field, n);
        }
    }
}

fn default_volume(v: &mut Value) {
    const SOURCES: [&str; 30] = [
        "awsElasticBlockStore",
        "azureDisk",
        "azureFile",
        "cephfs",
        "cinder",
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "fc",
        "flexVolume",
        "flocker",
        "gcePersistentDisk",
        "gitRepo",
        "glusterfs",
        "hostPath",
        "image",
        "iscsi",
        "nfs",
        "persistentVolumeClaim",
        "photonPersistentDisk",
        "portworxVolume",
        "projected",
        "quobyte",
        "rbd",
        "scaleIO",
        "secret",
        "storageos",
        "vsphereVolume",
    ];
    if !SOURCES.iter().any(|s| value::has(v, s)) {
        value::set(v, "emptyDir", json!({}));
    }
    for source in ["secret", "configMap", "downwardAPI", "projected"] {
        if value::has(v, source) {
            value::default(v, &format!("{source}.defaultMode"), 0o644);
        }
    }
    if value::has(v, "hostPath") {
        value::default(v, "hostPath.type", "");
    }
    if value::has(v, "image") {
        let reference = value::text(v, "image.reference").rsplit('/').next().unwrap_or("").to_owned();
        let latest = !reference.contains('@') && (!reference.contains(':') || reference.ends_with(":latest"));
        value::default_text(v, "image.pullPolicy", if latest { "Always" } else { "IfNotPresent" });
    }
    default_field_refs(value::list_mut(v, "downwardAPI.items"));
    for source in value::list_mut(v, "projected.sources") {
        if value::has(source, "serviceAccountToken") {
            value::default(source, "serviceAccountToken.expirationSeconds", 3600);
        }
        default_field_refs(value::list_mut(source, "downwardAPI.items"));
    }
    if value::has(v, "ephemeral.volumeClaimTemplate.spec") {
        value::default_text(v, "ephemeral.volumeClaimTemplate.spec.volumeMode", "Filesystem");
    }
}

fn default_field_refs(items: &mut [Value]) {
    for item in items {
        if value::has(item, "fieldRef") {
            value::default_text(item, "fieldRef.apiVersion", "v1");
        }
        if value::has(item, "resourceFieldRef") {
            value::default(item, "resourceFieldRef.divisor", "0");
        }
    }
}

/// A pod template at `path`: defaults.
pub fn default_template(object: &mut Value, path: &str) {
    value::remove(object, &format!("{path}.metadata.creationTimestamp"));
    if let Some(spec) = value::at_mut(object, &format!("{path}.spec")) {
        default_spec(spec);
    }
}
