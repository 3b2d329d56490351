//! Field ownership and server-side apply (KEP-555).
//!
//! Ownership is kept from an object's first apply on: what was set before belongs to the manager `before-first-apply`, as
//! upstream treats objects without `managedFields`. Objects that nobody applies stay small.

use serde_json::{Value, json};

use crate::{
    registry::options::WriteOptions,
    resources::Resource,
    schema::Type,
    status::{Cause, Status},
    value,
};

mod fields;

pub use fields::{Fields, fields_of, merge, prune};

const MANAGED: &str = "metadata.managedFields";
const BEFORE: &str = "before-first-apply";

/// What the system sets or identity consists of: never owned.
const NEVER: &[&[&str]] = &[
    &["apiVersion"],
    &["kind"],
    &["metadata", "name"],
    &["metadata", "namespace"],
    &["metadata", "creationTimestamp"],
    &["metadata", "deletionTimestamp"],
    &["metadata", "deletionGracePeriodSeconds"],
    &["metadata", "selfLink"],
    &["metadata", "uid"],
    &["metadata", "generation"],
    &["metadata", "managedFields"],
    &["metadata", "resourceVersion"],
];

/// One entry of `managedFields`.
#[derive(Clone, Debug, PartialEq)]
struct Entry {
    manager: String,
    operation: String,
    subresource: String,
    api_version: String,
    time: Value,
    fields: Fields,
}

impl Entry {
    fn from_json(v: &Value) -> Entry {
        Entry {
            manager: value::text(v, "manager").into(),
            operation: value::text(v, "operation").into(),
            subresource: value::text(v, "subresource").into(),
            api_version: value::text(v, "apiVersion").into(),
            time: v.get("time").cloned().unwrap_or_default(),
            fields: v.get("fieldsV1").map(Fields::from_json).unwrap_or_default(),
        }
    }

    fn to_json(&self) -> Value {
        let mut v = json!({
            "manager": self.manager, "operation": self.operation, "apiVersion": self.api_version,
            "time": self.time, "fieldsType": "FieldsV1", "fieldsV1": self.fields.to_json(),
        });
        if !self.subresource.is_empty() {
            v["subresource"] = self.subresource.clone().into();
        }
        v
    }

    fn is(&self, manager: &str, operation: &str, subresource: &str) -> bool {
        self.manager == manager && self.operation == operation && self.subresource == subresource
    }
}

fn entries(object: &Value) -> Vec<Entry> {
    value::list(object, MANAGED).iter().map(Entry::from_json).collect()
}

fn store(object: &mut Value, entries: &[Entry]) {
    let list: Vec<Value> = entries.iter().filter(|e| !e.fields.is_empty()).map(Entry::to_json).collect();
    if list.is_empty() {
        value::remove(object, MANAGED);
    } else {
        value::set(object, MANAGED, list);
    }
}

fn type_of(resource: &Resource) -> Type {
    resource.type_name.map_or(Type::Any, Type::Ref)
}

fn owned(object: &Value, ty: &Type) -> Fields {
    let mut set = fields_of(object, ty);
    set.strip(NEVER);
    set
}

/// Keeps `metadata.managedFields` of an object that is about to be stored. An apply has set them already.
pub fn track(
    resource: &Resource,
    api_version: String,
    object: &mut Value,
    old: Option<&Value>,
    options: &WriteOptions,
    subresource: &str,
) {
    if options.applying {
        return;
    }
    let Some(old) = old else {
        value::remove(object, MANAGED);
        return;
    };
    // An explicitly empty list resets ownership; anything else that a client sends is ignored.
    if !value::has(old, MANAGED)
        || value::at(object, MANAGED).is_some_and(|l| l.as_array().is_some_and(Vec::is_empty))
    {
        value::remove(object, MANAGED);
        return;
    }
    let ty = type_of(resource);
    let mut all = entries(old);
    let mut changed = fields::changed(Some(old), object, &ty);
    changed.strip(NEVER);
    let mut removed = owned(old, &ty).difference(&owned(object, &ty));
    removed.strip(NEVER);
    if !changed.is_empty() || !removed.is_empty() {
        let lost = changed.union(&removed);
        for e in all.iter_mut().filter(|e| !e.is(&options.manager, "Update", subresource)) {
            e.fields = e.fields.difference(&lost);
        }
        match all.iter_mut().find(|e| e.is(&options.manager, "Update", subresource)) {
            Some(mine) => {
                mine.fields = mine.fields.union(&changed).difference(&removed);
                mine.time = now();
                mine.api_version = api_version;
            }
            None => all.push(Entry {
                manager: options.manager.clone(),
                operation: "Update".into(),
                subresource: subresource.into(),
                api_version,
                time: now(),
                fields: changed,
            }),
        }
    }
    store(object, &all);
}

fn now() -> Value {
    crate::registry::now().into()
}

/// A new object that comes from an apply: all it holds belongs to the manager.
pub fn create(resource: &Resource, object: &mut Value, options: &WriteOptions, subresource: &str) {
    let mine = Entry {
        manager: options.manager.clone(),
        operation: "Apply".into(),
        subresource: subresource.into(),
        api_version: resource.api_version(),
        time: now(),
        fields: owned(object, &type_of(resource)),
    };
    store(object, &[mine]);
}

/// The live object with `applied` laid over it, what the manager no longer sets removed, and ownership brought up to date.
///
/// # Errors
/// 409 naming the fields that other managers own with other values, unless forced.
pub fn apply(
    resource: &Resource,
    live: &Value,
    applied: &Value,
    options: &WriteOptions,
    subresource: &str,
) -> Result<Value, Status> {
    let ty = type_of(resource);
    let mut all = entries(live);
    if all.is_empty() {
        let before = owned(live, &ty);
        if !before.is_empty() {
            all.push(Entry {
                manager: BEFORE.into(),
                operation: "Update".into(),
                subresource: String::new(),
                api_version: resource.api_version(),
                time: now(),
                fields: before,
            });
        }
    }
    let wanted = owned(applied, &ty);
    let mine = all.iter().position(|e| e.is(&options.manager, "Apply", subresource));
    let mut new = live.clone();
    merge(&mut new, applied, &ty);

    let mut changed = fields::changed(Some(live), &new, &ty);
    changed.strip(NEVER);
    let mut causes = Vec::new();
    for (i, e) in all.iter_mut().enumerate() {
        if Some(i) == mine {
            continue;
        }
        let clash = e.fields.intersection(&changed);
        if clash.is_empty() {
            continue;
        }
        if options.force {
            e.fields = e.fields.difference(&clash);
            continue;
        }
        let by = if e.operation == "Update" {
            format!("\"{}\" using {}", e.manager, e.api_version)
        } else {
            format!("\"{}\"", e.manager)
        };
        causes.extend(clash.paths().into_iter().map(|field| Cause {
            reason: "FieldManagerConflict".into(),
            message: format!("conflict with {by}"),
            field,
        }));
    }
    if !causes.is_empty() {
        return Err(conflict(causes));
    }
    let others = all
        .iter()
        .enumerate()
        .filter(|(i, _)| Some(*i) != mine)
        .fold(Fields::default(), |sum, (_, e)| sum.union(&e.fields));
    if let Some(i) = mine {
        let gone = all[i].fields.difference(&wanted).difference(&others);
        prune(&mut new, &gone);
    }
    match mine {
        Some(i) if all[i].fields == wanted => {}
        Some(i) => {
            all[i].fields = wanted;
            all[i].time = now();
            all[i].api_version = resource.api_version();
        }
        None => all.push(Entry {
            manager: options.manager.clone(),
            operation: "Apply".into(),
            subresource: subresource.into(),
            api_version: resource.api_version(),
            time: now(),
            fields: wanted,
        }),
    }
    store(&mut new, &all);
    Ok(new)
}

fn conflict(causes: Vec<Cause>) -> Status {
    let lines: Vec<String> = causes.iter().map(|c| format!("{}: {}", c.message, c.field)).collect();
    let plural = if causes.len() == 1 { "" } else { "s" };
    let count = causes.len();
    Status::apply_conflict(
        format!("Apply failed with {count} conflict{plural}: {}", lines.join("\n")),
        causes,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{registry::options::Query, resources::ResourceTable};

    fn options(manager: &str, force: bool) -> WriteOptions {
        let mut o = WriteOptions::parse(&Query::default(), manager).expect("options");
        o.force = force;
        o
    }

    #[test]
    fn managers_share_an_object_and_clash_over_values() {
        let table = ResourceTable::builtin();
        let maps = table.get("", "v1", "configmaps").expect("configmaps");
        let a = json!({"metadata": {"name": "x"}, "data": {"a": "1", "both": "1"}});
        let mut live = a.clone();
        create(maps, &mut live, &options("one", false), "");

        let same = apply(maps, &live, &a, &options("one", false), "").expect("no change");
        assert_eq!(same, live, "an apply of the same is no write");

        let b = json!({"metadata": {"name": "x"}, "data": {"b": "2"}});
        let live = apply(maps, &live, &b, &options("two", false), "").expect("other fields");
        assert_eq!(live["data"], json!({"a": "1", "both": "1", "b": "2"}));

        let clash = json!({"metadata": {"name": "x"}, "data": {"b": "2", "both": "9"}});
        let refused = apply(maps, &live, &clash, &options("two", false), "").expect_err("owned by one");
        assert_eq!(refused.code, 409);
        assert!(refused.message.contains(".data.both"), "{}", refused.message);
        let live = apply(maps, &live, &clash, &options("two", true), "").expect("forced");
        assert_eq!(live["data"]["both"], "9");

        let less = json!({"metadata": {"name": "x"}, "data": {"both": "9"}});
        let live = apply(maps, &live, &less, &options("one", false), "").expect("gives up a");
        assert_eq!(live["data"], json!({"both": "9", "b": "2"}));
    }

    #[test]
    fn an_update_takes_fields_and_the_next_apply_notices() {
        let table = ResourceTable::builtin();
        let maps = table.get("", "v1", "configmaps").expect("configmaps");
        let a = json!({"metadata": {"name": "x"}, "data": {"a": "1"}});
        let mut live = a.clone();
        create(maps, &mut live, &options("one", false), "");
        let mut edited = live.clone();
        edited["data"]["a"] = "2".into();
        track(maps, "v1".into(), &mut edited, Some(&live), &options("editor", false), "");
        let refused =
            apply(maps, &edited, &a, &options("one", false), "").expect_err("the editor owns it now");
        assert!(
            refused.message.contains("conflict with \"editor\" using v1: .data.a"),
            "{}",
            refused.message
        );
        // Objects that were never applied carry no ownership.
        let mut plain = json!({"metadata": {"name": "x"}, "data": {}});
        track(maps, "v1".into(), &mut plain, None, &options("editor", false), "");
        assert!(!value::has(&plain, MANAGED));
    }
}
