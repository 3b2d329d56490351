//! Nodes.

use serde_json::Value;

use crate::{
    resources::{Column, Strategy, col, wide},
    table::human,
    validation::{Errors, names},
    value,
};

pub(super) struct Node;

const ROLE: &str = "node-role.kubernetes.io/";

impl Strategy for Node {
    fn validate(&self, object: &Value, errors: &mut Errors) {
        let mut seen = Vec::new();
        for (i, t) in value::list(object, "spec.taints").iter().enumerate() {
            let at = format!("spec.taints[{i}]");
            let (key, effect) = (value::text(t, "key"), value::text(t, "effect"));
            errors.check(&format!("{at}.key"), key, names::qualified_name(key));
            let v = value::text(t, "value");
            errors.check(&format!("{at}.value"), v, names::label_value(v));
            if effect.is_empty() {
                errors.required(&format!("{at}.effect"), "");
            } else if !matches!(effect, "NoSchedule" | "PreferNoSchedule" | "NoExecute") {
                errors.not_supported(
                    &format!("{at}.effect"),
                    &effect.into(),
                    &["NoSchedule", "PreferNoSchedule", "NoExecute"],
                );
            }
            if seen.contains(&(key, effect)) {
                errors.duplicate(&at, t);
            }
            seen.push((key, effect));
        }
    }

    fn validate_update(&self, new: &Value, old: &Value, errors: &mut Errors) {
        self.validate(new, errors);
        for path in ["spec.podCIDR", "spec.providerID"] {
            let before = value::text(old, path);
            if !before.is_empty() && before != value::text(new, path) {
                errors.forbidden(path, "node updates may only change labels, taints, or capacity (or configSource, if the DynamicKubeletConfig feature gate is enabled)");
            }
        }
    }

    fn defaults(&self, object: &mut Value) {
        let cidr = value::text(object, "spec.podCIDR").to_owned();
        if !cidr.is_empty() && value::list(object, "spec.podCIDRs").is_empty() {
            value::set(object, "spec.podCIDRs", vec![Value::from(cidr)]);
        }
        // A node without allocatable resources can use all it has.
        if !value::has(object, "status.allocatable") && value::has(object, "status.capacity") {
            let capacity = value::at(object, "status.capacity").cloned().unwrap_or_default();
            value::set(object, "status.allocatable", capacity);
        }
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[
            col("Status"),
            col("Roles"),
            col("Age"),
            col("Version"),
            wide("Internal-IP"),
            wide("External-IP"),
            wide("OS-Image"),
            wide("Kernel-Version"),
            wide("Container-Runtime"),
        ];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let ready =
            value::list(object, "status.conditions").iter().find(|c| value::text(c, "type") == "Ready");
        let mut status = match ready.map(|c| value::text(c, "status")) {
            Some("True") => "Ready".to_owned(),
            Some(_) => "NotReady".into(),
            None => "Unknown".into(),
        };
        if value::flag(object, "spec.unschedulable") {
            status.push_str(",SchedulingDisabled");
        }
        let mut roles: Vec<&str> = value::map(object, "metadata.labels")
            .into_iter()
            .flatten()
            .filter_map(|(k, v)| match k.strip_prefix(ROLE) {
                Some(role) if !role.is_empty() => Some(role),
                _ if k == "kubernetes.io/role" => v.as_str().filter(|r| !r.is_empty()),
                _ => None,
            })
            .collect();
        roles.sort_unstable();
        roles.dedup();
        let address = |kind: &str| {
            let found =
                value::list(object, "status.addresses").iter().find(|a| value::text(a, "type") == kind);
            human::or_none(found.map_or("", |a| value::text(a, "address")))
        };
        let info = |field: &str| match value::text(object, &format!("status.nodeInfo.{field}")) {
            "" => Value::from("<unknown>"),
            text => text.into(),
        };
        vec![
            status.into(),
            human::or_none(&roles.join(",")),
            value::text(object, "status.nodeInfo.kubeletVersion").into(),
            address("InternalIP"),
            address("ExternalIP"),
            info("osImage"),
            info("kernelVersion"),
            info("containerRuntimeVersion"),
        ]
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["spec.unschedulable"]
    }

    fn select(&self, object: &Value, path: &str) -> String {
        value::flag(object, path).to_string()
    }
}
