//! policy/v1: PodDisruptionBudgets.

use serde_json::Value;

use super::{Column, Resource, Strategy, col, num};
use crate::{
    validation::{Errors, label_selector},
    value,
};

pub(super) fn resources() -> Vec<Resource> {
    vec![
        Resource::new("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets", Budget)
            .short(&["pdb"])
            .with_status()
            .generation(),
    ]
}

struct Budget;

impl Strategy for Budget {
    fn validate(&self, object: &Value, errors: &mut Errors) {
        if value::has(object, "spec.minAvailable") && value::has(object, "spec.maxUnavailable") {
            errors.invalid("spec", &Value::Null, "minAvailable and maxUnavailable cannot be both set");
        }
        label_selector(object, "spec.selector", errors);
    }

    fn unconditional_update(&self) -> bool {
        false
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("Min Available"), col("Max Unavailable"), num("Allowed Disruptions")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let shown = |path| match value::at(object, path) {
            Some(Value::String(s)) => s.clone(),
            Some(Value::Number(n)) => n.to_string(),
            _ => "N/A".to_owned(),
        };
        vec![
            shown("spec.minAvailable").into(),
            shown("spec.maxUnavailable").into(),
            value::int(object, "status.disruptionsAllowed").unwrap_or(0).into(),
        ]
    }
}
