//! StorageObjectInUseProtection: volumes and claims are born with the finalizer that keeps them while they are used.

use serde_json::json;

use super::list_mut;
use crate::registry::Attributes;

pub(super) fn admit(a: &mut Attributes) {
    let finalizer = match a.info.resource.as_str() {
        "persistentvolumes" => "kubernetes.io/pv-protection",
        _ => "kubernetes.io/pvc-protection",
    };
    if let Some(object) = &mut a.object {
        let list = list_mut(&mut object["metadata"], "finalizers");
        if !list.contains(&json!(finalizer)) {
            list.push(json!(finalizer));
        }
    }
}
