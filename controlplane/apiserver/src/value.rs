//! Short ways to read and change JSON objects by path. A path is written `spec.template.metadata`; keys that hold dots
//! themselves are not reachable this way.

use serde_json::{Map, Value};

/// The value at a path.
pub fn at<'a>(v: &'a Value, path: &str) -> Option<&'a Value> {
    let mut v = v;
    for key in path.split('.') {
        v = v.get(key)?;
    }
    Some(v)
}

/// The value at a path, for change.
pub fn at_mut<'a>(v: &'a mut Value, path: &str) -> Option<&'a mut Value> {
    let mut v = v;
    for key in path.split('.') {
        v = v.get_mut(key)?;
    }
    Some(v)
}

/// The string at a path; empty when there is none.
pub fn text<'a>(v: &'a Value, path: &str) -> &'a str {
    at(v, path).and_then(Value::as_str).unwrap_or("")
}

/// The number at a path.
pub fn int(v: &Value, path: &str) -> Option<i64> {
    at(v, path).and_then(Value::as_i64)
}

/// The flag at a path; false when there is none.
pub fn flag(v: &Value, path: &str) -> bool {
    at(v, path).and_then(Value::as_bool).unwrap_or(false)
}

/// The list at a path; empty when there is none.
pub fn list<'a>(v: &'a Value, path: &str) -> &'a [Value] {
    at(v, path).and_then(Value::as_array).map(Vec::as_slice).unwrap_or(&[])
}

/// The list at a path, for change.
pub fn list_mut<'a>(v: &'a mut Value, path: &str) -> &'a mut [Value] {
    at_mut(v, path).and_then(Value::as_array_mut).map(Vec::as_mut_slice).unwrap_or(&mut [])
}

/// The object at a path, if there is one.
pub fn map<'a>(v: &'a Value, path: &str) -> Option<&'a Map<String, Value>> {
    at(v, path).and_then(Value::as_object)
}

/// Whether there is something other than null at a path.
pub fn has(v: &Value, path: &str) -> bool {
    at(v, path).is_some_and(|v| !v.is_null())
}

/// The object at a path, made when it is missing. What is there and is no object is replaced: only called on
/// paths that the schema says are objects.
pub fn ensure_map<'a>(v: &'a mut Value, path: &str) -> &'a mut Map<String, Value> {
    let mut v = v;
    for key in path.split('.').filter(|k| !k.is_empty()) {
        v = as_map(v).entry(key).or_insert(Value::Null);
    }
    as_map(v)
}

fn as_map(v: &mut Value) -> &mut Map<String, Value> {
    if !v.is_object() {
        *v = Value::Object(Map::new());
    }
    match v {
        Value::Object(map) => map,
        _ => unreachable!("made an object above"),
    }
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('.').unwrap_or(("", path))
}

/// Sets the value at a path, making the objects on the way.
pub fn set(v: &mut Value, path: &str, new: impl Into<Value>) {
    let (parent, key) = split(path);
    ensure_map(v, parent).insert(key.to_owned(), new.into());
}

/// Sets the value at a path unless there is one.
pub fn default(v: &mut Value, path: &str, new: impl Into<Value>) {
    if !has(v, path) {
        set(v, path, new);
    }
}

/// Sets a string unless there is a non-empty one.
pub fn default_text(v: &mut Value, path: &str, new: &str) {
    if text(v, path).is_empty() {
        set(v, path, new);
    }
}

/// Removes and returns the value at a path.
pub fn remove(v: &mut Value, path: &str) -> Option<Value> {
    let (parent, key) = split(path);
    let parent = if parent.is_empty() { v } else { at_mut(v, parent)? };
    parent.as_object_mut()?.remove(key)
}

/// Makes `to` have at `path` what `from` has there, also when that is nothing.
pub fn carry(to: &mut Value, from: &Value, path: &str) {
    match at(from, path) {
        Some(v) => set(to, path, v.clone()),
        None => {
            remove(to, path);
        }
    }
}

/// Removes nulls of objects, as decoding into upstream's types does; nulls in lists stay.
pub fn drop_nulls(v: &mut Value) {
    match v {
        Value::Object(map) => {
            map.retain(|_, v| !v.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// The labels of an object or pod template at `metadata.labels`.
pub fn labels(v: &Value) -> std::collections::BTreeMap<String, String> {
    string_map(v, "metadata.labels")
}

/// A map of strings at a path.
pub fn string_map(v: &Value, path: &str) -> std::collections::BTreeMap<String, String> {
    map(v, path)
        .map(|m| m.iter().filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned()))).collect())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn paths_read_and_write() {
        let mut v = json!({"spec": {"a": "x", "n": 3, "l": [1]}});
        assert_eq!(text(&v, "spec.a"), "x");
        assert_eq!(text(&v, "spec.none.b"), "");
        assert_eq!(int(&v, "spec.n"), Some(3));
        set(&mut v, "status.conditions.x", 1);
        assert_eq!(v["status"]["conditions"]["x"], 1);
        default(&mut v, "spec.n", 9);
        assert_eq!(v["spec"]["n"], 3);
        assert_eq!(remove(&mut v, "spec.a"), Some(json!("x")));
        let from = json!({"spec": {"b": 1}});
        carry(&mut v, &from, "spec");
        carry(&mut v, &from, "status");
        assert_eq!(v, json!({"spec": {"b": 1}}));
    }
}
