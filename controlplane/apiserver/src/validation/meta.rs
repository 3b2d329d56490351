//! Checks of `metadata`.

use serde_json::Value;

use super::{Errors, names};
use crate::value;

/// Largest total size of annotations, in bytes.
const ANNOTATIONS_LIMIT: usize = 256 << 10;

/// Which names a kind allows.
pub type NameRule = fn(&str) -> Vec<String>;

/// `metadata` of a new or changed object.
pub fn object_meta(object: &Value, name_rule: NameRule, errors: &mut Errors) {
    let name = value::text(object, "metadata.name");
    if name.is_empty() {
        errors.required("metadata.name", "name or generateName is required");
    } else {
        errors.check("metadata.name", name, name_rule(name));
    }
    labels(object, "metadata.labels", errors);
    annotations(object, errors);
    for (i, f) in value::list(object, "metadata.finalizers").iter().enumerate() {
        let f = f.as_str().unwrap_or("");
        errors.check(&format!("metadata.finalizers[{i}]"), f, names::qualified_name(f));
        if !f.contains('/') && !matches!(f, "orphan" | "foregroundDeletion" | "kubernetes") {
            errors.invalid(
                &format!("metadata.finalizers[{i}]"),
                &f.into(),
                "name is neither a standard finalizer name nor is it fully qualified",
            );
        }
    }
    owner_references(object, errors);
}

/// A map of labels at `path`.
pub fn labels(object: &Value, path: &str, errors: &mut Errors) {
    for (k, v) in value::map(object, path).into_iter().flatten() {
        errors.check(path, k, names::qualified_name(k));
        let v = v.as_str().unwrap_or("");
        errors.check(path, v, names::label_value(v));
    }
}

fn annotations(object: &Value, errors: &mut Errors) {
    let mut total = 0;
    for (k, v) in value::map(object, "metadata.annotations").into_iter().flatten() {
        errors.check("metadata.annotations", k, names::qualified_name(&k.to_lowercase()));
        total += k.len() + v.as_str().map_or(0, str::len);
    }
    if total > ANNOTATIONS_LIMIT {
        errors.too_long("metadata.annotations", ANNOTATIONS_LIMIT);
    }
}

fn owner_references(object: &Value, errors: &mut Errors) {
    let mut controllers = 0;
    for (i, owner) in value::list(object, "metadata.ownerReferences").iter().enumerate() {
        let at = format!("metadata.ownerReferences[{i}]");
        for (field, hint) in [
            ("apiVersion", "version must not be empty"),
            ("kind", "must not be empty"),
            ("name", "must not be empty"),
            ("uid", "must not be empty"),
        ] {
            if value::text(owner, field).is_empty() {
                errors.invalid(&format!("{at}.{field}"), &"".into(), hint);
            }
        }
        controllers += usize::from(value::flag(owner, "controller"));
    }
    if controllers > 1 {
        errors.invalid(
            "metadata.ownerReferences",
            &Value::Null,
            "Only one reference can have Controller set to true. Found \"true\" in references more than once",
        );
    }
}

/// What must not change in `metadata`.
pub fn object_meta_update(new: &Value, old: &Value, errors: &mut Errors) {
    for path in ["metadata.name", "metadata.namespace", "metadata.uid", "metadata.creationTimestamp"] {
        errors.immutable(new, old, path);
    }
    if value::has(old, "metadata.deletionTimestamp") {
        for f in value::list(new, "metadata.finalizers") {
            if !value::list(old, "metadata.finalizers").contains(f) {
                errors.forbidden(
                    "metadata.finalizers",
                    &format!("no new finalizers can be added if the object is being deleted, found new finalizers []string{{{f}}}"),
                );
            }
        }
    }
}
