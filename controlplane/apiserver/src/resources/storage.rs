//! storage.k8s.io/v1.

use serde_json::{Value, json};

use super::{Column, Plain, Resource, Strategy, col, num};
use crate::{validation::Errors, value};

const GROUP: &str = "storage.k8s.io";

pub(super) fn resources() -> Vec<Resource> {
    vec![
        Resource::new(GROUP, "v1", "CSIDriver", "csidrivers", Driver).cluster(),
        Resource::new(GROUP, "v1", "CSINode", "csinodes", Node).cluster(),
        Resource::new(GROUP, "v1", "CSIStorageCapacity", "csistoragecapacities", Plain),
        Resource::new(GROUP, "v1", "StorageClass", "storageclasses", Class).cluster().short(&["sc"]),
        Resource::new(GROUP, "v1", "VolumeAttachment", "volumeattachments", Attachment)
            .cluster()
            .with_status(),
        Resource::new(GROUP, "v1", "VolumeAttributesClass", "volumeattributesclasses", Plain)
            .cluster()
            .short(&["vac"]),
    ]
}

struct Class;

impl Strategy for Class {
    fn defaults(&self, object: &mut Value) {
        value::default_text(object, "reclaimPolicy", "Delete");
        value::default_text(object, "volumeBindingMode", "Immediate");
    }

    fn validate(&self, object: &Value, errors: &mut Errors) {
        if value::text(object, "provisioner").is_empty() {
            errors.required("provisioner", "");
        }
        errors.one_of(object, "volumeBindingMode", &["Immediate", "WaitForFirstConsumer"]);
    }

    fn validate_update(&self, new: &Value, old: &Value, errors: &mut Errors) {
        self.validate(new, errors);
        for field in ["parameters", "provisioner", "reclaimPolicy", "volumeBindingMode"] {
            if new.get(field) != old.get(field) {
                errors.forbidden(field, &format!("updates to {field} are forbidden."));
            }
        }
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[
            col("Provisioner"),
            col("ReclaimPolicy"),
            col("VolumeBindingMode"),
            col("AllowVolumeExpansion"),
        ];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        vec![
            value::text(object, "provisioner").into(),
            value::text(object, "reclaimPolicy").into(),
            value::text(object, "volumeBindingMode").into(),
            value::flag(object, "allowVolumeExpansion").to_string().into(),
        ]
    }
}

struct Driver;

impl Strategy for Driver {
    fn defaults(&self, object: &mut Value) {
        value::default(object, "spec.attachRequired", true);
        value::default(object, "spec.podInfoOnMount", false);
        value::default(object, "spec.storageCapacity", false);
        value::default_text(object, "spec.fsGroupPolicy", "ReadWriteOnceWithFSType");
        value::default(object, "spec.volumeLifecycleModes", json!(["Persistent"]));
        value::default(object, "spec.requiresRepublish", false);
        value::default(object, "spec.seLinuxMount", false);
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[
            col("AttachRequired"),
            col("PodInfoOnMount"),
            col("StorageCapacity"),
            col("TokenRequests"),
            col("RequiresRepublish"),
            col("Modes"),
        ];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let flag = |p: &str| Value::from(value::flag(object, p).to_string());
        let join = |items: Vec<&str>| {
            Value::from(if items.is_empty() { "<unset>".to_owned() } else { items.join(",") })
        };
        vec![
            flag("spec.attachRequired"),
            flag("spec.podInfoOnMount"),
            flag("spec.storageCapacity"),
            join(
                value::list(object, "spec.tokenRequests")
                    .iter()
                    .map(|t| value::text(t, "audience"))
                    .collect(),
            ),
            flag("spec.requiresRepublish"),
            join(value::list(object, "spec.volumeLifecycleModes").iter().filter_map(Value::as_str).collect()),
        ]
    }
}

struct Node;

impl Strategy for Node {
    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[num("Drivers")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        vec![value::list(object, "spec.drivers").len().into()]
    }
}

struct Attachment;

impl Strategy for Attachment {
    fn validate_update(&self, new: &Value, old: &Value, errors: &mut Errors) {
        errors.immutable(new, old, "spec");
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("Attacher"), col("PV"), col("Node"), col("Attached")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        vec![
            value::text(object, "spec.attacher").into(),
            value::text(object, "spec.source.persistentVolumeName").into(),
            value::text(object, "spec.nodeName").into(),
            value::flag(object, "status.attached").to_string().into(),
        ]
    }
}
