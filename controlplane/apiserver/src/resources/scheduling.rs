//! scheduling.k8s.io/v1: PriorityClasses.

use serde_json::Value;

use super::{Column, Resource, Strategy, col, num};
use crate::{validation::Errors, value};

/// Highest value of a class that is not the system's.
const HIGHEST_USER_PRIORITY: i64 = 1_000_000_000;

pub(super) fn resources() -> Vec<Resource> {
    vec![
        Resource::new("scheduling.k8s.io", "v1", "PriorityClass", "priorityclasses", Class)
            .cluster()
            .short(&["pc"])
            .generation(),
    ]
}

struct Class;

impl Strategy for Class {
    fn defaults(&self, object: &mut Value) {
        value::default_text(object, "preemptionPolicy", "PreemptLowerPriority");
    }

    fn validate(&self, object: &Value, errors: &mut Errors) {
        let name = value::text(object, "metadata.name");
        let n = value::int(object, "value").unwrap_or(0);
        let system = matches!(name, "system-cluster-critical" | "system-node-critical");
        if name.starts_with("system-") && !system {
            errors.forbidden(
                "metadata.name",
                "priority class names with 'system-' prefix are reserved for system use only",
            );
        } else if n > HIGHEST_USER_PRIORITY && !system {
            errors.forbidden(
                "value",
                &format!("maximum allowed value of a user defined priority is {HIGHEST_USER_PRIORITY}"),
            );
        }
        errors.one_of(object, "preemptionPolicy", &["Never", "PreemptLowerPriority"]);
    }

    fn validate_update(&self, new: &Value, old: &Value, errors: &mut Errors) {
        self.validate(new, errors);
        if value::int(new, "value") != value::int(old, "value") {
            errors.forbidden("value", "may not be changed in an update.");
        }
        errors.immutable(new, old, "preemptionPolicy");
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[num("Value"), col("Global-Default"), col("Age"), col("PreemptionPolicy")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        vec![
            value::int(object, "value").unwrap_or(0).into(),
            value::flag(object, "globalDefault").to_string().into(),
            value::text(object, "preemptionPolicy").into(),
        ]
    }
}
