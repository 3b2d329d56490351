//! PersistentVolumes and PersistentVolumeClaims.

use serde_json::{Value, json};

use super::access_modes;
use crate::{
    resources::{Column, Strategy, col, wide},
    table::human,
    validation::Errors,
    value,
};

const MODES: &[&str] = &["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"];

fn check_modes(object: &Value, errors: &mut Errors) {
    let modes = value::list(object, "spec.accessModes");
    if modes.is_empty() {
        errors.required("spec.accessModes", "at least 1 access mode is required");
    }
    for m in modes {
        if !m.as_str().is_some_and(|m| MODES.contains(&m)) {
            errors.not_supported("spec.accessModes", m, MODES);
        }
    }
}

pub(super) struct Volume;

impl Strategy for Volume {
    fn defaults(&self, object: &mut Value) {
        value::default_text(object, "spec.persistentVolumeReclaimPolicy", "Retain");
        value::default_text(object, "spec.volumeMode", "Filesystem");
        if value::has(object, "spec.hostPath") {
            value::default(object, "spec.hostPath.type", "");
        }
    }

    fn prepare_create(&self, object: &mut Value) {
        value::set(object, "status", json!({"phase": "Pending"}));
    }

    fn validate(&self, object: &Value, errors: &mut Errors) {
        check_modes(object, errors);
        if value::text(object, "spec.capacity.storage").is_empty() {
            errors.required("spec.capacity", "");
        }
        errors.one_of(object, "spec.persistentVolumeReclaimPolicy", &["Delete", "Recycle", "Retain"]);
        errors.one_of(object, "spec.volumeMode", &["Block", "Filesystem"]);
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[
            col("Capacity"),
            col("Access Modes"),
            col("Reclaim Policy"),
            col("Status"),
            col("Claim"),
            col("StorageClass"),
            col("VolumeAttributesClass"),
            col("Reason"),
            col("Age"),
            wide("VolumeMode"),
        ];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let claim = match value::text(object, "spec.claimRef.name") {
            "" => String::new(),
            name => format!("{}/{name}", value::text(object, "spec.claimRef.namespace")),
        };
        let phase = if value::has(object, "metadata.deletionTimestamp") {
            "Terminating"
        } else {
            value::text(object, "status.phase")
        };
        let class = value::text(object, "spec.volumeAttributesClassName");
        vec![
            value::text(object, "spec.capacity.storage").into(),
            access_modes(object, "spec.accessModes"),
            value::text(object, "spec.persistentVolumeReclaimPolicy").into(),
            phase.into(),
            claim.into(),
            value::text(object, "spec.storageClassName").into(),
            if class.is_empty() { "<unset>".into() } else { class.into() },
            value::text(object, "status.reason").into(),
            value::text(object, "spec.volumeMode").into(),
        ]
    }
}

pub(super) struct Claim;

impl Strategy for Claim {
    fn defaults(&self, object: &mut Value) {
        value::default_text(object, "spec.volumeMode", "Filesystem");
    }

    fn prepare_create(&self, object: &mut Value) {
        value::set(object, "status", json!({"phase": "Pending"}));
    }

    fn validate(&self, object: &Value, errors: &mut Errors) {
        check_modes(object, errors);
        if value::text(object, "spec.resources.requests.storage").is_empty() {
            errors.required("spec.resources[storage]", "");
        }
        errors.one_of(object, "spec.volumeMode", &["Block", "Filesystem"]);
    }

    fn validate_update(&self, new: &Value, old: &Value, errors: &mut Errors) {
        self.validate(new, errors);
        let bound_by_controller = value::text(old, "spec.volumeName").is_empty();
        let fixed = |v: &Value| {
            let mut s = json!({"spec": v.get("spec").cloned().unwrap_or_default()});
            value::remove(&mut s, "spec.resources");
            value::remove(&mut s, "spec.volumeAttributesClassName");
            if bound_by_controller {
                value::remove(&mut s, "spec.volumeName");
            }
            if !value::has(old, "spec.storageClassName") {
                value::remove(&mut s, "spec.storageClassName");
            }
            s
        };
        if fixed(new) != fixed(old) {
            errors.forbidden(
                "spec",
                "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims",
            );
        }
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[
            col("Status"),
            col("Volume"),
            col("Capacity"),
            col("Access Modes"),
            col("StorageClass"),
            col("VolumeAttributesClass"),
            col("Age"),
            wide("VolumeMode"),
        ];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let phase = if value::has(object, "metadata.deletionTimestamp") {
            "Terminating"
        } else {
            value::text(object, "status.phase")
        };
        let volume = value::text(object, "spec.volumeName");
        let (capacity, modes) = match volume {
            "" => ("".into(), "".into()),
            _ => (
                value::text(object, "status.capacity.storage").into(),
                access_modes(object, "status.accessModes"),
            ),
        };
        let class = value::text(object, "spec.volumeAttributesClassName");
        vec![
            phase.into(),
            volume.into(),
            capacity,
            modes,
            value::text(object, "spec.storageClassName").into(),
            if class.is_empty() { "<unset>".into() } else { class.into() },
            human::or_none(value::text(object, "spec.volumeMode")),
        ]
    }
}
