//! resource.k8s.io/v1: dynamic resource allocation.

use serde_json::Value;

use super::{Column, Plain, Resource, Strategy, col};
use crate::{validation::Errors, value};

const GROUP: &str = "resource.k8s.io";

pub(super) fn resources() -> Vec<Resource> {
    vec![
        Resource::new(GROUP, "v1", "DeviceClass", "deviceclasses", Plain).cluster().generation(),
        Resource::new(GROUP, "v1", "ResourceClaim", "resourceclaims", Claim).with_status(),
        Resource::new(GROUP, "v1", "ResourceClaimTemplate", "resourceclaimtemplates", Plain),
        Resource::new(GROUP, "v1", "ResourceSlice", "resourceslices", Slice).cluster().generation(),
    ]
}

struct Claim;

impl Strategy for Claim {
    fn validate_update(&self, new: &Value, old: &Value, errors: &mut Errors) {
        errors.immutable(new, old, "spec");
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("State")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let mut states = Vec::new();
        if value::has(object, "metadata.deletionTimestamp") {
            states.push("deleted");
        }
        if value::has(object, "status.allocation") {
            states.push("allocated");
        }
        if !value::list(object, "status.reservedFor").is_empty() {
            states.push("reserved");
        }
        if states.is_empty() {
            states.push("pending");
        }
        vec![states.join(",").into()]
    }
}

struct Slice;

impl Strategy for Slice {
    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("Node"), col("Driver"), col("Pool")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let unset = |t: &str| Value::from(if t.is_empty() { "<unset>" } else { t });
        vec![
            unset(value::text(object, "spec.nodeName")),
            value::text(object, "spec.driver").into(),
            value::text(object, "spec.pool.name").into(),
        ]
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["spec.nodeName", "spec.driver"]
    }
}
