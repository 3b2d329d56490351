//! Sets of fields (`FieldsV1`), and the walks over typed objects that make and use them. Pure.
//!
//! A set is a tree. A node's key is `f:<field>`, `k:<keys of a list item>` or `v:<scalar in a set>`; a node that is itself a
//! member and has members below it carries `.` in the JSON form.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::schema::{self, Field, ListKind, Type};

/// A set of fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fields {
    member: bool,
    below: BTreeMap<String, Fields>,
}

impl Fields {
    fn leaf() -> Fields {
        Fields { member: true, below: BTreeMap::new() }
    }

    /// Whether there is no field in it.
    pub fn is_empty(&self) -> bool {
        !self.member && self.below.is_empty()
    }

    /// From `fieldsV1`.
    pub fn from_json(v: &Value) -> Fields {
        let Some(map) = v.as_object() else { return Fields::default() };
        if map.is_empty() {
            return Fields::leaf();
        }
        let below =
            map.iter().filter(|(k, _)| *k != ".").map(|(k, v)| (k.clone(), Fields::from_json(v))).collect();
        Fields { member: map.contains_key("."), below }
    }

    /// To `fieldsV1`.
    pub fn to_json(&self) -> Value {
        let mut map = Map::new();
        if self.member && !self.below.is_empty() {
            map.insert(".".into(), Value::Object(Map::new()));
        }
        map.extend(self.below.iter().map(|(k, v)| (k.clone(), v.to_json())));
        Value::Object(map)
    }

    /// What is in both.
    pub fn intersection(&self, other: &Fields) -> Fields {
        let below = self
            .below
            .iter()
            .filter_map(|(k, a)| {
                let both = a.intersection(other.below.get(k)?);
                (!both.is_empty()).then(|| (k.clone(), both))
            })
            .collect();
        Fields { member: self.member && other.member, below }
    }

    /// What is in this and not in `other`.
    pub fn difference(&self, other: &Fields) -> Fields {
        let below = self
            .below
            .iter()
            .filter_map(|(k, a)| {
                let rest = match other.below.get(k) {
                    Some(b) => a.difference(b),
                    None => a.clone(),
                };
                (!rest.is_empty()).then(|| (k.clone(), rest))
            })
            .collect();
        Fields { member: self.member && !other.member, below }
    }

    /// What is in either.
    pub fn union(&self, other: &Fields) -> Fields {
        let mut out = self.clone();
        out.member |= other.member;
        for (k, b) in &other.below {
            let merged = match out.below.get(k) {
                Some(a) => a.union(b),
                None => b.clone(),
            };
            out.below.insert(k.clone(), merged);
        }
        out
    }

    /// Removes fields that are never owned.
    pub fn strip(&mut self, paths: &[&[&str]]) {
        for path in paths {
            self.strip_one(path);
        }
    }

    fn strip_one(&mut self, path: &[&str]) {
        let Some((first, rest)) = path.split_first() else { return };
        let key = format!("f:{first}");
        if rest.is_empty() {
            self.below.remove(&key);
        } else if let Some(child) = self.below.get_mut(&key) {
            child.strip_one(rest);
            if child.is_empty() {
                self.below.remove(&key);
            }
        }
    }

    /// The members as dotted paths, for messages.
    pub fn paths(&self) -> Vec<String> {
        let mut out = Vec::new();
        self.collect("", &mut out);
        out
    }

    fn collect(&self, prefix: &str, out: &mut Vec<String>) {
        if self.member && !prefix.is_empty() {
            out.push(prefix.to_owned());
        }
        for (k, v) in &self.below {
            let shown = match k.split_once(':') {
                Some(("f", name)) => format!(".{name}"),
                Some(("k", keys)) => {
                    let keys: Map<String, Value> = serde_json::from_str(keys).unwrap_or_default();
                    let parts: Vec<String> = keys.iter().map(|(k, v)| format!("{k}={v}")).collect();
                    format!("[{}]", parts.join(","))
                }
                _ => format!("[={}]", k.trim_start_matches("v:")),
            };
            v.collect(&format!("{prefix}{shown}"), out);
        }
    }
}

/// How apply treats a value.
enum Shape {
    /// As a whole.
    Atomic,
    /// Field by field of a described type.
    Struct(schema::TypeDef),
    /// Key by key.
    Map(Type),
    /// Item by item, told apart by keys.
    Keyed(&'static str, Type),
    /// A set of scalars.
    Set,
}

fn shape(v: &Value, ty: &Type, field: Option<&Field>) -> Shape {
    if field.is_some_and(|f| f.atomic) {
        return Shape::Atomic;
    }
    match (ty, v) {
        (Type::Ref(name), Value::Object(_)) => match schema::lookup(name) {
            Some(def) if def.atomic || def.alias.is_some() => Shape::Atomic,
            Some(def) => Shape::Struct(def),
            None => Shape::Map(Type::Any),
        },
        (Type::Map(item), Value::Object(_)) => Shape::Map((**item).clone()),
        (Type::Any, Value::Object(_)) => Shape::Map(Type::Any),
        (Type::List(item), Value::Array(_)) => match field.map(|f| f.list) {
            Some(ListKind::Map(keys)) => Shape::Keyed(keys, (**item).clone()),
            Some(ListKind::Set) => Shape::Set,
            _ => Shape::Atomic,
        },
        _ => Shape::Atomic,
    }
}

/// The key of a list item. Keys that are left out have the default of their field; the only one in the schema is the protocol.
fn item_key(item: &Value, keys: &str) -> String {
    let mut map = Map::new();
    for key in keys.split(',') {
        match item.get(key) {
            Some(v) => map.insert(key.into(), v.clone()),
            None if key == "protocol" => map.insert(key.into(), "TCP".into()),
            None => None,
        };
    }
    format!("k:{}", Value::Object(map))
}

fn child_type(def: &schema::TypeDef, name: &str) -> (Type, Option<Field>) {
    match def.field(name) {
        Some(f) => (f.ty.clone(), Some(f.clone())),
        None => (Type::Any, None),
    }
}

/// The fields that an object sets.
pub fn fields_of(v: &Value, ty: &Type) -> Fields {
    walk(v, ty, None)
}

fn walk(v: &Value, ty: &Type, field: Option<&Field>) -> Fields {
    let mut out = Fields::default();
    match shape(v, ty, field) {
        Shape::Atomic => return Fields::leaf(),
        Shape::Struct(def) => {
            for (k, v) in v.as_object().into_iter().flatten() {
                let (ty, field) = child_type(&def, k);
                out.below.insert(format!("f:{k}"), walk(v, &ty, field.as_ref()));
            }
        }
        Shape::Map(item) => {
            for (k, v) in v.as_object().into_iter().flatten() {
                out.below.insert(format!("f:{k}"), walk(v, &item, None));
            }
        }
        Shape::Keyed(keys, item) => {
            for v in v.as_array().into_iter().flatten() {
                let mut fields = walk(v, &item, None);
                fields.member = true;
                out.below.insert(item_key(v, keys), fields);
            }
        }
        Shape::Set => {
            for v in v.as_array().into_iter().flatten() {
                out.below.insert(format!("v:{v}"), Fields::leaf());
            }
        }
    }
    if out.below.is_empty() {
        out.member = true;
    }
    out
}

/// Fields of `new` that `old` has not, or has with another value.
pub fn changed(old: Option<&Value>, new: &Value, ty: &Type) -> Fields {
    differ(old, new, ty, None)
}

fn differ(old: Option<&Value>, new: &Value, ty: &Type, field: Option<&Field>) -> Fields {
    let Some(old) = old else { return walk(new, ty, field) };
    if old == new {
        return Fields::default();
    }
    let mut out = Fields::default();
    let mut put = |key: String, fields: Fields| {
        if !fields.is_empty() {
            out.below.insert(key, fields);
        }
    };
    match shape(new, ty, field) {
        Shape::Atomic => return Fields::leaf(),
        Shape::Struct(def) => {
            for (k, v) in new.as_object().into_iter().flatten() {
                let (ty, field) = child_type(&def, k);
                put(format!("f:{k}"), differ(old.get(k), v, &ty, field.as_ref()));
            }
        }
        Shape::Map(item) => {
            for (k, v) in new.as_object().into_iter().flatten() {
                put(format!("f:{k}"), differ(old.get(k), v, &item, None));
            }
        }
        Shape::Keyed(keys, item) => {
            for v in new.as_array().into_iter().flatten() {
                let key = item_key(v, keys);
                let before = old.as_array().into_iter().flatten().find(|o| item_key(o, keys) == key);
                let mut fields = differ(before, v, &item, None);
                fields.member |= before.is_none();
                put(key, fields);
            }
        }
        Shape::Set => {
            for v in new.as_array().into_iter().flatten() {
                if !old.as_array().is_some_and(|o| o.contains(v)) {
                    put(format!("v:{v}"), Fields::leaf());
                }
            }
        }
    }
    out
}

/// Lays `applied` over `live`.
pub fn merge(live: &mut Value, applied: &Value, ty: &Type) {
    lay_over(live, applied, ty, None);
}

fn lay_over(live: &mut Value, applied: &Value, ty: &Type, field: Option<&Field>) {
    match (shape(applied, ty, field), &mut *live) {
        (Shape::Struct(def), Value::Object(map)) => {
            for (k, v) in applied.as_object().into_iter().flatten() {
                let (ty, field) = child_type(&def, k);
                match map.get_mut(k) {
                    Some(l) => lay_over(l, v, &ty, field.as_ref()),
                    None => {
                        map.insert(k.clone(), v.clone());
                    }
                }
            }
        }
        (Shape::Map(item), Value::Object(map)) => {
            for (k, v) in applied.as_object().into_iter().flatten() {
                match map.get_mut(k) {
                    Some(l) => lay_over(l, v, &item, None),
                    None => {
                        map.insert(k.clone(), v.clone());
                    }
                }
            }
        }
        (Shape::Keyed(keys, item), Value::Array(items)) => {
            for v in applied.as_array().into_iter().flatten() {
                let key = item_key(v, keys);
                match items.iter_mut().find(|l| item_key(l, keys) == key) {
                    Some(l) => lay_over(l, v, &item, None),
                    None => items.push(v.clone()),
                }
            }
        }
        (Shape::Set, Value::Array(items)) => {
            for v in applied.as_array().into_iter().flatten() {
                if !items.contains(v) {
                    items.push(v.clone());
                }
            }
        }
        _ => *live = applied.clone(),
    }
}

/// Removes the members of a set from an object, and what becomes empty by it.
pub fn prune(v: &mut Value, gone: &Fields) {
    match v {
        Value::Object(map) => {
            for (key, below) in &gone.below {
                let Some(name) = key.strip_prefix("f:") else { continue };
                let Some(child) = map.get_mut(name) else { continue };
                if below.below.is_empty() {
                    map.remove(name);
                    continue;
                }
                prune(child, below);
                let empty = match child {
                    Value::Object(m) => m.is_empty(),
                    Value::Array(a) => a.is_empty(),
                    _ => false,
                };
                if empty {
                    map.remove(name);
                }
            }
        }
        Value::Array(items) => {
            items.retain_mut(|item| {
                for (key, below) in &gone.below {
                    match key.split_once(':') {
                        Some(("v", text))
                            if serde_json::from_str::<Value>(text).is_ok_and(|v| v == *item) =>
                        {
                            return false;
                        }
                        Some(("k", keys)) if is_item(item, keys) => {
                            if below.member {
                                return false;
                            }
                            prune(item, below);
                        }
                        _ => {}
                    }
                }
                true
            });
        }
        _ => {}
    }
}

fn is_item(item: &Value, keys: &str) -> bool {
    let keys: Map<String, Value> = serde_json::from_str(keys).unwrap_or_default();
    !keys.is_empty()
        && keys
            .iter()
            .all(|(k, v)| item.get(k) == Some(v) || (k == "protocol" && item.get(k).is_none() && v == "TCP"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const DEPLOYMENT: Type = Type::Ref("io.k8s.api.apps.v1.Deployment");

    #[test]
    fn a_set_names_list_items_by_key() {
        let v = json!({"spec": {"replicas": 1, "template": {"spec": {"containers": [{"name": "a", "image": "x", "ports": [{"containerPort": 80}]}]}}}});
        let set = fields_of(&v, &DEPLOYMENT);
        let containers = &set.to_json()["f:spec"]["f:template"]["f:spec"]["f:containers"];
        assert_eq!(
            containers,
            &json!({"k:{\"name\":\"a\"}": {".": {}, "f:name": {}, "f:image": {}, "f:ports": {
                "k:{\"containerPort\":80,\"protocol\":\"TCP\"}": {".": {}, "f:containerPort": {}}}}})
        );
        assert_eq!(Fields::from_json(&set.to_json()), set);
    }

    #[test]
    fn merging_and_pruning_follow_keys() {
        let mut live = json!({"spec": {"template": {"spec": {"containers": [{"name": "a", "image": "1"}, {"name": "b", "image": "1"}]}}}});
        merge(
            &mut live,
            &json!({"spec": {"template": {"spec": {"containers": [{"name": "b", "image": "2"}]}}}}),
            &DEPLOYMENT,
        );
        assert_eq!(live["spec"]["template"]["spec"]["containers"][1]["image"], "2");
        let gone = fields_of(
            &json!({"spec": {"template": {"spec": {"containers": [{"name": "a", "image": "1"}]}}}}),
            &DEPLOYMENT,
        );
        prune(&mut live, &gone);
        assert_eq!(live["spec"]["template"]["spec"]["containers"], json!([{"name": "b", "image": "2"}]));
    }

    fn tree() -> impl Strategy<Value = Fields> {
        let leaf = Just(Fields::leaf());
        leaf.prop_recursive(3, 16, 3, |inner| {
            (any::<bool>(), proptest::collection::btree_map("f:[a-c]", inner, 1..4))
                .prop_map(|(member, below)| Fields { member, below })
        })
    }

    proptest! {
        #[test]
        fn set_algebra(a in tree(), b in tree()) {
            prop_assert_eq!(a.difference(&b).union(&a.intersection(&b)), a.clone());
            prop_assert!(a.difference(&b).intersection(&b).is_empty());
            prop_assert_eq!(Fields::from_json(&a.to_json()), a.clone());
            prop_assert_eq!(a.union(&b), b.union(&a));
        }
    }
}
