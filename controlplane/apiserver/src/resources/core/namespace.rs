//! Namespaces.

use serde_json::{Value, json};

use crate::{
    resources::{Column, Strategy, col},
    value,
};

pub(super) struct Namespace;

const FINALIZER: &str = "kubernetes";
const NAME_LABEL: &str = "kubernetes.io/metadata.name";

impl Strategy for Namespace {
    fn defaults(&self, object: &mut Value) {
        let name = value::text(object, "metadata.name").to_owned();
        if !name.is_empty() {
            value::ensure_map(object, "metadata.labels").insert(NAME_LABEL.into(), name.into());
        }
    }

    fn prepare_create(&self, object: &mut Value) {
        // Held until its content is gone.
        value::set(object, "spec.finalizers", json!([FINALIZER]));
        value::set(object, "status", json!({"phase": "Active"}));
    }

    fn prepare_update(&self, new: &mut Value, old: &Value) {
        value::carry(new, old, "spec.finalizers");
    }

    fn prepare_status(&self, new: &mut Value, old: &Value) {
        let deleting = value::has(old, "metadata.deletionTimestamp");
        value::set(new, "status.phase", if deleting { "Terminating" } else { "Active" });
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("Status")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        vec![value::text(object, "status.phase").into()]
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["status.phase"]
    }
}
