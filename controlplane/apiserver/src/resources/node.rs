//! node.k8s.io/v1: RuntimeClasses.

use serde_json::Value;

use super::{Column, Resource, Strategy, col};
use crate::{
    validation::{Errors, names},
    value,
};

pub(super) fn resources() -> Vec<Resource> {
    vec![Resource::new("node.k8s.io", "v1", "RuntimeClass", "runtimeclasses", Class).cluster()]
}

struct Class;

impl Strategy for Class {
    fn validate(&self, object: &Value, errors: &mut Errors) {
        let handler = value::text(object, "handler");
        errors.check("handler", handler, names::dns_label(handler));
    }

    fn validate_update(&self, new: &Value, old: &Value, errors: &mut Errors) {
        errors.immutable(new, old, "handler");
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("Handler")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        vec![value::text(object, "handler").into()]
    }
}
