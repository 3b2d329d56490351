//! Strategic merge patch. Lists with a merge key are merged item by item; directives are `$patch`, `$retainKeys`,
//! `$setElementOrder/<list>` and `$deleteFromPrimitiveList/<list>`.

use serde_json::{Map, Value};

use crate::schema::{self, Field, Type};

const PATCH: &str = "$patch";
const RETAIN: &str = "$retainKeys";
const ORDER: &str = "$setElementOrder/";
const DELETE: &str = "$deleteFromPrimitiveList/";

/// Merges `patch` into `current`, an object of the named type.
///
/// # Errors
/// A message when a directive is malformed or an item lacks its merge key.
pub fn merge(current: &mut Value, patch: &Value, type_name: &'static str) -> Result<(), String> {
    merge_value(current, patch, &Type::Ref(type_name))
}

fn merge_value(current: &mut Value, patch: &Value, ty: &Type) -> Result<(), String> {
    let Value::Object(patch) = patch else {
        *current = patch.clone();
        return Ok(());
    };
    match patch.get(PATCH).and_then(Value::as_str) {
        Some("replace") => {
            let mut new = patch.clone();
            new.remove(PATCH);
            *current = Value::Object(new);
            return Ok(());
        }
        Some("delete") => {
            *current = Value::Object(Map::new());
            return Ok(());
        }
        Some("merge") | None => {}
        Some(other) => return Err(format!("unknown patch type {other:?}")),
    }
    if !current.is_object() {
        *current = Value::Object(Map::new());
    }
    let Value::Object(map) = current else { return Ok(()) };
    if let Some(keys) = patch.get(RETAIN) {
        let keys = keys.as_array().ok_or("$retainKeys must be a list")?;
        map.retain(|k, _| keys.iter().any(|r| r.as_str() == Some(k)));
    }
    let shape = Shape::of(ty);
    for (key, value) in patch {
        if let Some(list) = key.strip_prefix(DELETE) {
            let gone = value.as_array().ok_or("$deleteFromPrimitiveList must be a list")?;
            if let Some(Value::Array(items)) = map.get_mut(list) {
                items.retain(|i| !gone.contains(i));
            }
            continue;
        }
        if key.starts_with('$') {
            continue;
        }
        merge_field(map, key, value, &shape)?;
    }
    // Order is set last, when all items are there.
    for (key, value) in patch {
        if let Some(list) = key.strip_prefix(ORDER) {
            let order = value.as_array().ok_or("$setElementOrder must be a list")?;
            let merge_key = shape.field(list).map_or("", |f| f.merge_key);
            if let Some(Value::Array(items)) = map.get_mut(list) {
                reorder(items, order, merge_key);
            }
        }
    }
    Ok(())
}

/// What is known of an object's fields.
enum Shape {
    Fields(schema::TypeDef),
    Map(Type),
    Unknown,
}

impl Shape {
    fn of(ty: &Type) -> Shape {
        match ty {
            Type::Ref(name) => match schema::lookup(name) {
                Some(def) if def.alias.is_none() => Shape::Fields(def),
                _ => Shape::Unknown,
            },
            Type::Map(item) => Shape::Map((**item).clone()),
            _ => Shape::Unknown,
        }
    }

    fn field(&self, name: &str) -> Option<&Field> {
        match self {
            Shape::Fields(def) => def.field(name),
            _ => None,
        }
    }

    fn type_of(&self, name: &str) -> Type {
        match self {
            Shape::Fields(def) => def.field(name).map_or(Type::Any, |f| f.ty.clone()),
            Shape::Map(item) => item.clone(),
            Shape::Unknown => Type::Any,
        }
    }
}

fn merge_field(map: &mut Map<String, Value>, key: &str, patch: &Value, shape: &Shape) -> Result<(), String> {
    let ty = shape.type_of(key);
    let field = shape.field(key);
    let strategy = field.map_or("", |f| f.patch_strategy);
    match patch {
        Value::Null => {
            map.remove(key);
        }
        Value::Object(_) if strategy.split(',').any(|s| s == "replace") => {
            map.insert(key.to_owned(), clean(patch, &ty)?);
        }
        Value::Object(_) => match map.get_mut(key) {
            Some(current) if current.is_object() => merge_value(current, patch, &ty)?,
            _ => {
                map.insert(key.to_owned(), clean(patch, &ty)?);
            }
        },
        Value::Array(items) => {
            let merges = strategy.split(',').any(|s| s == "merge");
            let merge_key = field.map_or("", |f| f.merge_key);
            let item_type = match &ty {
                Type::List(item) => (**item).clone(),
                _ => Type::Any,
            };
            let current = match map.remove(key) {
                Some(Value::Array(current)) if merges => current,
                _ => Vec::new(),
            };
            let merged = match (merges, merge_key) {
                (true, "") => merge_scalars(current, items),
                (true, merge_key) => merge_items(current, items, merge_key, &item_type)?,
                (false, _) => items.iter().map(|i| clean(i, &item_type)).collect::<Result<_, _>>()?,
            };
            map.insert(key.to_owned(), Value::Array(merged));
        }
        scalar => {
            map.insert(key.to_owned(), scalar.clone());
        }
    }
    Ok(())
}

/// A patch value that has nothing to be merged with: directives and nulls go.
fn clean(patch: &Value, ty: &Type) -> Result<Value, String> {
    match patch {
        Value::Object(_) => {
            let mut new = Value::Object(Map::new());
            merge_value(&mut new, patch, ty)?;
            Ok(new)
        }
        Value::Array(items) => {
            let item = match ty {
                Type::List(item) => (**item).clone(),
                _ => Type::Any,
            };
            items.iter().map(|i| clean(i, &item)).collect::<Result<Vec<_>, _>>().map(Value::Array)
        }
        scalar => Ok(scalar.clone()),
    }
}

fn merge_scalars(mut current: Vec<Value>, patch: &[Value]) -> Vec<Value> {
    for item in patch {
        if !current.contains(item) {
            current.push(item.clone());
        }
    }
    current
}

fn merge_items(
    mut current: Vec<Value>,
    patch: &[Value],
    merge_key: &str,
    ty: &Type,
) -> Result<Vec<Value>, String> {
    let directive = |i: &Value| i.get(PATCH).and_then(Value::as_str).map(str::to_owned);
    // A list that holds {"$patch": "replace"} replaces the whole list by its other items.
    if patch.iter().any(|i| directive(i).as_deref() == Some("replace") && i.get(merge_key).is_none()) {
        return patch.iter().filter(|i| directive(i).is_none()).map(|i| clean(i, ty)).collect();
    }
    for item in patch {
        let Some(key) = item.get(merge_key) else {
            return Err(format!("map: {item} does not contain declared merge key: {merge_key}"));
        };
        let found = current.iter().position(|c| c.get(merge_key) == Some(key));
        match (directive(item).as_deref(), found) {
            (Some("delete"), _) => current.retain(|c| c.get(merge_key) != Some(key)),
            (_, Some(at)) => merge_value(&mut current[at], item, ty)?,
            (_, None) => current.push(clean(item, ty)?),
        }
    }
    Ok(current)
}

/// Puts the items that `order` names into its order; the others keep their place relative to their neighbours.
fn reorder(items: &mut Vec<Value>, order: &[Value], merge_key: &str) {
    let id = |v: &Value| -> Value {
        if merge_key.is_empty() { v.clone() } else { v.get(merge_key).cloned().unwrap_or_default() }
    };
    let wanted: Vec<Value> = order.iter().map(id).collect();
    let mut named: Vec<(usize, usize, Value)> = Vec::new();
    let mut others: Vec<(usize, Value)> = Vec::new();
    for (at, item) in std::mem::take(items).into_iter().enumerate() {
        match wanted.iter().position(|w| *w == id(&item)) {
            Some(rank) => named.push((rank, at, item)),
            None => others.push((at, item)),
        }
    }
    named.sort_by_key(|(rank, _, _)| *rank);
    let mut others = others.into_iter().peekable();
    for (_, at, item) in named {
        while let Some((_, other)) = others.next_if(|(before, _)| *before < at) {
            items.push(other);
        }
        items.push(item);
    }
    items.extend(others.map(|(_, other)| other));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const POD: &str = "io.k8s.api.core.v1.Pod";

    fn merged(mut current: Value, patch: Value) -> Value {
        merge(&mut current, &patch, POD).expect("fits");
        current
    }

    #[test]
    fn lists_merge_by_key() {
        let pod = json!({"spec": {"containers": [{"name": "a", "image": "1"}, {"name": "b", "image": "1"}]}});
        let got = merged(
            pod.clone(),
            json!({"spec": {"containers": [{"name": "b", "image": "2"}, {"name": "c", "image": "3"}]}}),
        );
        assert_eq!(
            got["spec"]["containers"],
            json!([{"name": "a", "image": "1"}, {"name": "b", "image": "2"}, {"name": "c", "image": "3"}])
        );
        let got = merged(pod.clone(), json!({"spec": {"containers": [{"name": "a", "$patch": "delete"}]}}));
        assert_eq!(got["spec"]["containers"], json!([{"name": "b", "image": "1"}]));
        let got =
            merged(pod.clone(), json!({"spec": {"containers": [{"$patch": "replace"}, {"name": "z"}]}}));
        assert_eq!(got["spec"]["containers"], json!([{"name": "z"}]));
        assert!(merge(&mut pod.clone(), &json!({"spec": {"containers": [{"image": "x"}]}}), POD).is_err());
    }

    #[test]
    fn order_and_deletion_directives() {
        let pod = json!({"spec": {"containers": [{"name": "a"}, {"name": "x"}, {"name": "b"}]}, "metadata": {"finalizers": ["p/1", "p/2"]}});
        let got = merged(
            pod,
            json!({
                "spec": {"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}], "containers": [{"name": "a", "image": "2"}]},
                "metadata": {"$deleteFromPrimitiveList/finalizers": ["p/1"], "finalizers": ["p/3"]},
            }),
        );
        // The unnamed item stands before the first named one that followed it.
        assert_eq!(
            got["spec"]["containers"],
            json!([{"name": "x"}, {"name": "b"}, {"name": "a", "image": "2"}])
        );
        assert_eq!(got["metadata"]["finalizers"], json!(["p/2", "p/3"]));
    }

    #[test]
    fn nulls_remove_and_maps_merge() {
        let pod = json!({"metadata": {"labels": {"a": "1", "b": "2"}, "annotations": {"x": "y"}}});
        let got = merged(pod, json!({"metadata": {"labels": {"a": null, "c": "3"}, "annotations": null}}));
        assert_eq!(got, json!({"metadata": {"labels": {"b": "2", "c": "3"}}}));
        let got = merged(
            json!({}),
            json!({"spec": {"volumes": [{"name": "v", "emptyDir": null, "hostPath": {"path": "/"}}]}}),
        );
        assert_eq!(got["spec"]["volumes"], json!([{"name": "v", "hostPath": {"path": "/"}}]));
    }

    #[test]
    fn retain_keys_drops_the_rest() {
        let pod = json!({"spec": {"volumes": [{"name": "v", "emptyDir": {}}]}});
        let got = merged(
            pod,
            json!({"spec": {"volumes": [{"name": "v", "$retainKeys": ["name", "hostPath"], "hostPath": {"path": "/"}}]}}),
        );
        assert_eq!(got["spec"]["volumes"], json!([{"name": "v", "hostPath": {"path": "/"}}]));
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let key = prop_oneof![
            Just("spec".to_owned()),
            Just("containers".to_owned()),
            Just("name".to_owned()),
            Just("metadata".to_owned()),
            Just("labels".to_owned()),
            Just("$patch".to_owned()),
            Just("$retainKeys".to_owned()),
            Just("$setElementOrder/containers".to_owned()),
            "[a-c]",
        ];
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i8>().prop_map(Value::from),
            "[a-c]".prop_map(Value::from),
            Just(json!("delete"))
        ];
        leaf.prop_recursive(4, 24, 4, move |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map(key.clone(), inner, 0..4)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn never_panics_and_is_idempotent_without_lists(mut current in any_json(), patch in any_json()) {
            let _ = merge(&mut current, &patch, POD);
        }

        #[test]
        fn applying_labels_twice_is_applying_them_once(a in proptest::collection::btree_map("[a-d]", "[x-z]", 0..4), b in proptest::collection::btree_map("[a-d]", "[x-z]", 0..4)) {
            let patch = json!({"metadata": {"labels": b}});
            let once = merged(json!({"metadata": {"labels": a}}), patch.clone());
            prop_assert_eq!(merged(once.clone(), patch), once);
        }
    }
}
