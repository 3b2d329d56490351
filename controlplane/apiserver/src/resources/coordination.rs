//! coordination.k8s.io/v1: Leases.

use serde_json::Value;

use super::{Column, Resource, Strategy, col};
use crate::{validation::Errors, value};

pub(super) fn resources() -> Vec<Resource> {
    vec![Resource::new("coordination.k8s.io", "v1", "Lease", "leases", Lease)]
}

struct Lease;

impl Strategy for Lease {
    fn validate(&self, object: &Value, errors: &mut Errors) {
        if let Some(n) = value::int(object, "spec.leaseDurationSeconds").filter(|n| *n <= 0) {
            errors.invalid("spec.leaseDurationSeconds", &n.into(), "must be greater than 0");
        }
        errors.not_negative(object, "spec.leaseTransitions");
    }

    fn create_on_update(&self) -> bool {
        true
    }

    fn unconditional_update(&self) -> bool {
        false
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("Holder")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        vec![value::text(object, "spec.holderIdentity").into()]
    }
}
