//! The shapes of the API types: which fields there are, of which type, how lists merge.
//!
//! `schema/types.txt` is parsed type by type when one is needed, so nothing of it stays in memory but an index. Its form:
//!
//! ```text
//! io.k8s.api.core.v1.ContainerPort            a type; `atomic` and `gvk=group/version/kind` may follow
//!  containerPort! int32                       a field; `!` = required
//!  ports []some.Type map=a,b patch=merge key=a   list keys (server-side apply) and patch strategy (strategic merge)
//! io.k8s.api.Other = string                   a named scalar
//! ```
//! Scalars: `string int32 int64 number bool bytes time intstr object any`; `[]T` a list, `{}T` a map.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
};

use base64::{Engine, engine::general_purpose::STANDARD};

use serde_json::Value;

pub(crate) const TYPES: &str = include_str!("../schema/types.txt");

/// A type of a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Type {
    /// Text.
    String,
    /// 32-bit number.
    Int32,
    /// 64-bit number.
    Int64,
    /// Floating point number.
    Number,
    /// Boolean.
    Bool,
    /// Base64 text.
    Bytes,
    /// RFC 3339 text.
    Time,
    /// Number or text.
    IntOrString,
    /// A resource quantity: text, numbers accepted.
    Quantity,
    /// An object whose fields are not described.
    Object,
    /// Anything.
    Any,
    /// A list.
    List(Box<Type>),
    /// A map from strings.
    Map(Box<Type>),
    /// A described type, by name.
    Ref(&'static str),
}

/// How server-side apply treats a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListKind {
    /// Replaced as a whole.
    Atomic,
    /// A set of scalars.
    Set,
    /// Items are told apart by these keys, separated by commas.
    Map(&'static str),
}

/// A field of a type.
#[derive(Clone, Debug)]
pub struct Field {
    /// JSON name.
    pub name: &'static str,
    /// Whether it must be there.
    pub required: bool,
    /// Its type.
    pub ty: Type,
    /// How apply treats it, when it is a list.
    pub list: ListKind,
    /// Whether apply treats a map or object as a whole.
    pub atomic: bool,
    /// Strategic merge: `merge`, `replace`, `retainKeys` or combinations.
    pub patch_strategy: &'static str,
    /// Strategic merge: the key that tells list items apart.
    pub merge_key: &'static str,
}

/// A described type.
#[derive(Clone, Debug)]
pub struct TypeDef {
    /// Full name.
    pub name: &'static str,
    /// Whether apply treats it as a whole.
    pub atomic: bool,
    /// Group, version and kind, when it is a top-level kind.
    pub gvk: Option<(&'static str, &'static str, &'static str)>,
    /// Fields in alphabetical order.
    pub fields: Vec<Field>,
    /// Set when the type is only another name of a scalar.
    pub alias: Option<Type>,
}

impl TypeDef {
    /// The field of this name.
    pub fn field(&self, name: &str) -> Option<&Field> {
        self.fields.binary_search_by(|f| f.name.cmp(name)).ok().map(|i| &self.fields[i])
    }
}

fn index() -> &'static HashMap<&'static str, &'static str> {
    static INDEX: OnceLock<HashMap<&'static str, &'static str>> = OnceLock::new();
    INDEX.get_or_init(|| {
        let mut index = HashMap::new();
        let mut start = None;
        let mut offset = 0;
        for line in TYPES.split_inclusive('\n') {
            if !line.starts_with([' ', '#']) {
                if let Some(start) = start {
                    insert(&mut index, &TYPES[start..offset]);
                }
                start = Some(offset);
            }
            offset += line.len();
        }
        if let Some(start) = start {
            insert(&mut index, &TYPES[start..]);
        }
        index
    })
}

fn insert(index: &mut HashMap<&'static str, &'static str>, block: &'static str) {
    if let Some(name) = block.split([' ', '\n']).next() {
        index.insert(name, block);
    }
}

/// Names of all described types, in no order.
pub fn type_names() -> impl Iterator<Item = &'static str> {
    index().keys().copied()
}

/// The type of this name.
pub fn lookup(name: &str) -> Option<TypeDef> {
    index().get(name).map(|block| parse(block))
}

/// Name of the type of a top-level kind.
pub fn type_of(group: &str, version: &str, kind: &str) -> Option<&'static str> {
    static KINDS: OnceLock<HashMap<String, &'static str>> = OnceLock::new();
    let kinds = KINDS.get_or_init(|| {
        let with_gvk = index().iter().filter_map(|(name, block)| {
            let head = block.lines().next()?;
            Some((head.split(' ').find_map(|w| w.strip_prefix("gvk="))?.to_owned(), *name))
        });
        with_gvk.collect()
    });
    kinds.get(&format!("{group}/{version}/{kind}")).copied()
}

fn parse(block: &'static str) -> TypeDef {
    let mut lines = block.lines();
    let head = lines.next().unwrap_or("");
    let mut words = head.split(' ');
    let name = words.next().unwrap_or("");
    let mut def = TypeDef { name, atomic: false, gvk: None, fields: Vec::new(), alias: None };
    while let Some(word) = words.next() {
        match word {
            "=" => {
                let scalar = parse_type(words.next().unwrap_or("any"));
                def.alias = Some(match name.rsplit('.').next() {
                    Some("Quantity") => Type::Quantity,
                    Some("IntOrString") => Type::IntOrString,
                    _ => scalar,
                });
            }
            "atomic" => def.atomic = true,
            other => {
                let mut gvk = other.strip_prefix("gvk=").unwrap_or("").split('/');
                if let (Some(g), Some(v), Some(k)) = (gvk.next(), gvk.next(), gvk.next()) {
                    def.gvk = Some((g, v, k));
                }
            }
        }
    }
    def.fields = lines.filter_map(parse_field).collect();
    def
}

fn parse_field(line: &'static str) -> Option<Field> {
    let mut words = line.trim_start().split(' ');
    let name = words.next()?;
    let ty = parse_type(words.next()?);
    let mut field = Field {
        name: name.trim_end_matches('!'),
        required: name.ends_with('!'),
        ty,
        list: ListKind::Atomic,
        atomic: false,
        patch_strategy: "",
        merge_key: "",
    };
    for word in words {
        match word.split_once('=') {
            Some(("map", keys)) => field.list = ListKind::Map(keys),
            Some(("patch", strategy)) => field.patch_strategy = strategy,
            Some(("key", key)) => field.merge_key = key,
            _ if word == "set" => field.list = ListKind::Set,
            _ if word == "atomic" => field.atomic = true,
            _ => {}
        }
    }
    Some(field)
}

fn parse_type(text: &'static str) -> Type {
    if let Some(item) = text.strip_prefix("[]") {
        return Type::List(Box::new(parse_type(item)));
    }
    if let Some(item) = text.strip_prefix("{}") {
        return Type::Map(Box::new(parse_type(item)));
    }
    match text {
        "string" => Type::String,
        "int32" => Type::Int32,
        "int64" => Type::Int64,
        "number" => Type::Number,
        "bool" => Type::Bool,
        "bytes" => Type::Bytes,
        "time" => Type::Time,
        "intstr" => Type::IntOrString,
        "object" => Type::Object,
        "any" => Type::Any,
        name => Type::Ref(name),
    }
}

/// What decoding an object against its type found.
#[derive(Debug, Default)]
pub struct Findings {
    /// Paths of fields that the type does not have; they have been removed.
    pub unknown: Vec<String>,
}

/// Why an object does not fit its type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: expected {expected}, got {got}")]
pub struct Mismatch {
    /// Where.
    pub path: String,
    /// What the type says.
    pub expected: &'static str,
    /// What was there.
    pub got: &'static str,
}

/// How much of an object there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// All of it.
    Whole,
    /// The fields that somebody applies.
    Part,
}

/// Checks an object against a type: removes unknown fields and nulls, refuses values of the wrong type. What passes can be read
/// by typed clients; one object that cannot would break all their watches of its kind.
pub fn conform(value: &mut Value, type_name: &str, extent: Extent) -> Result<Findings, Mismatch> {
    let mut walk = Walk { extent, findings: Findings::default(), cache: HashMap::new() };
    if let Some(def) = lookup(type_name) {
        conform_object(value, &def, &mut String::new(), &mut walk)?;
    }
    Ok(walk.findings)
}

struct Walk {
    extent: Extent,
    findings: Findings,
    cache: HashMap<&'static str, Arc<TypeDef>>,
}

impl Walk {
    fn lookup(&mut self, name: &'static str) -> Option<Arc<TypeDef>> {
        if let Some(def) = self.cache.get(name) {
            return Some(def.clone());
        }
        let def = Arc::new(lookup(name)?);
        self.cache.insert(name, def.clone());
        Some(def)
    }
}

fn kind_of(v: &Value) -> &'static str {
    match v {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn mismatch(path: &str, expected: &'static str, v: &Value) -> Mismatch {
    Mismatch { path: path.trim_start_matches('.').to_owned(), expected, got: kind_of(v) }
}

/// Stands where a required time is missing: clients in Go read it as their zero value, and others can read it too, which
/// they cannot the null that upstream writes.
const NO_TIME: &str = "0001-01-01T00:00:00Z";

fn is_time(ty: &Type) -> bool {
    matches!(ty, Type::Ref(name) if name.ends_with("meta.v1.Time") || name.ends_with("meta.v1.MicroTime"))
}

fn conform_object(
    value: &mut Value,
    def: &TypeDef,
    path: &mut String,
    walk: &mut Walk,
) -> Result<(), Mismatch> {
    let Value::Object(map) = value else { return Err(mismatch(path, "object", value)) };
    let depth = path.len();
    let mut unknown = Vec::new();
    for (key, item) in map.iter_mut() {
        let Some(field) = def.field(key) else {
            unknown.push(key.clone());
            continue;
        };
        if item.is_null() {
            continue;
        }
        path.push('.');
        path.push_str(key);
        conform_type(item, &field.ty, path, walk)?;
        path.truncate(depth);
    }
    for key in unknown {
        map.remove(&key);
        walk.findings.unknown.push(format!("{path}.{key}").trim_start_matches('.').to_owned());
    }
    map.retain(|_, v| !v.is_null());
    if walk.extent == Extent::Whole {
        // Events of the old form have no eventTime.
        for f in def.fields.iter().filter(|f| f.required && is_time(&f.ty) && f.name != "eventTime") {
            if !map.contains_key(f.name) {
                map.insert(f.name.to_owned(), NO_TIME.into());
            }
        }
    }
    Ok(())
}

fn conform_type(value: &mut Value, ty: &Type, path: &mut String, walk: &mut Walk) -> Result<(), Mismatch> {
    let depth = path.len();
    match ty {
        Type::Any => {}
        Type::Object if value.is_object() => {}
        Type::Object => return Err(mismatch(path, "object", value)),
        Type::String if value.is_string() => {}
        Type::String => return Err(mismatch(path, "string", value)),
        Type::Time => match value.as_str().map(str::parse::<jiff::Timestamp>) {
            Some(Ok(_)) => {}
            _ => return Err(mismatch(path, "time", value)),
        },
        Type::Bytes => match value.as_str().map(|s| STANDARD.decode(s)) {
            Some(Ok(_)) => {}
            _ => return Err(mismatch(path, "base64", value)),
        },
        Type::Bool if value.is_boolean() => {}
        Type::Bool => return Err(mismatch(path, "bool", value)),
        Type::Int32 => match value.as_i64() {
            Some(n) if i32::try_from(n).is_ok() => {}
            _ => whole(value, path, "int32")?,
        },
        Type::Int64 if value.is_i64() => {}
        Type::Int64 => whole(value, path, "int64")?,
        Type::Number if value.is_number() => {}
        Type::Number => return Err(mismatch(path, "number", value)),
        Type::IntOrString if value.is_i64() || value.is_string() => {}
        Type::IntOrString => return Err(mismatch(path, "integer or string", value)),
        Type::Quantity => match value {
            Value::String(_) => {}
            Value::Number(n) => *value = Value::String(n.to_string()),
            _ => return Err(mismatch(path, "quantity", value)),
        },
        Type::List(item) => {
            let Value::Array(items) = value else { return Err(mismatch(path, "array", value)) };
            for (i, v) in items.iter_mut().enumerate() {
                path.push_str(&format!("[{i}]"));
                conform_type(v, item, path, walk)?;
                path.truncate(depth);
            }
        }
        Type::Map(item) => {
            let Value::Object(map) = value else { return Err(mismatch(path, "object", value)) };
            for (k, v) in map.iter_mut() {
                if v.is_null() {
                    // Upstream decodes a null map value into the type's zero value.
                    *v = zero(item);
                    continue;
                }
                path.push('.');
                path.push_str(k);
                conform_type(v, item, path, walk)?;
                path.truncate(depth);
            }
        }
        Type::Ref(name) => {
            let Some(def) = walk.lookup(name) else { return Ok(()) };
            match &def.alias {
                Some(alias) => conform_type(value, alias, path, walk)?,
                None => conform_object(value, &def, path, walk)?,
            }
        }
    }
    Ok(())
}

/// What Go leaves in a map for a null.
fn zero(ty: &Type) -> Value {
    match ty {
        Type::String | Type::Bytes => "".into(),
        Type::Quantity => "0".into(),
        Type::Int32 | Type::Int64 | Type::Number | Type::IntOrString => 0.into(),
        Type::Bool => false.into(),
        Type::List(_) => Value::Array(Vec::new()),
        Type::Object | Type::Map(_) => Value::Object(serde_json::Map::new()),
        Type::Ref(name) => match lookup(name).and_then(|d| d.alias) {
            Some(alias) => zero(&alias),
            None => Value::Object(serde_json::Map::new()),
        },
        Type::Time | Type::Any => Value::Null,
    }
}

/// Accepts a number such as `3.0` where a whole one is wanted.
fn whole(value: &mut Value, path: &str, expected: &'static str) -> Result<(), Mismatch> {
    let limit = if expected == "int32" { f64::from(i32::MAX) } else { 9e15 };
    match value.as_f64() {
        Some(f) if f.fract() == 0.0 && f.abs() <= limit => {
            *value = Value::from(f as i64);
            Ok(())
        }
        _ => Err(mismatch(path, expected, value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_type_parses_and_refers_to_types_that_exist() {
        fn refs(ty: &Type) -> Option<&'static str> {
            match ty {
                Type::List(t) | Type::Map(t) => refs(t),
                Type::Ref(n) => Some(n),
                _ => None,
            }
        }
        let mut count = 0;
        for name in type_names() {
            let def = lookup(name).expect("indexed");
            assert!(def.fields.windows(2).all(|w| w[0].name < w[1].name), "{name} is sorted");
            for field in &def.fields {
                if let Some(other) = refs(&field.ty) {
                    assert!(lookup(other).is_some(), "{name}.{} refers to {other}", field.name);
                }
            }
            count += 1;
        }
        assert!(count > 500, "{count}");
    }

    #[test]
    fn conforming_drops_the_unknown_and_refuses_the_wrong() {
        let pod = type_of("", "v1", "Pod").expect("pod");
        let mut v = json!({"spec": {"containers": [{"name": "a", "imag": "x", "resources": {"limits": {"cpu": 1}}}], "hostname": null}});
        let found = conform(&mut v, pod, Extent::Whole).expect("fits");
        assert_eq!(found.unknown, ["spec.containers[0].imag"]);
        assert_eq!(
            v,
            json!({"spec": {"containers": [{"name": "a", "resources": {"limits": {"cpu": "1"}}}]}})
        );
        let mut v = json!({"spec": {"containers": [{"ports": [{"containerPort": "80"}]}]}});
        let e = conform(&mut v, pod, Extent::Whole).expect_err("wrong type");
        assert_eq!(e.to_string(), "spec.containers[0].ports[0].containerPort: expected int32, got string");
    }

    #[test]
    fn list_keys_and_patch_keys_are_known() {
        let container = lookup("io.k8s.api.core.v1.Container").expect("container");
        let ports = container.field("ports").expect("ports");
        assert_eq!(ports.list, ListKind::Map("containerPort,protocol"));
        assert_eq!((ports.patch_strategy, ports.merge_key), ("merge", "containerPort"));
    }

    #[test]
    fn what_typed_clients_cannot_read_is_refused() {
        let refused = |kind: &str, extent, v: Value| {
            let type_name = type_of("", "v1", kind).expect("a kind");
            conform(&mut v.clone(), type_name, extent).err().map(|e| e.to_string())
        };
        let time = json!({"status": {"startTime": "yesterday"}});
        assert_eq!(
            refused("Pod", Extent::Whole, time).as_deref(),
            Some("status.startTime: expected time, got string")
        );
        let micro = json!({"status": {"startTime": "2026-01-02T03:04:05.678901Z"}});
        assert_eq!(refused("Pod", Extent::Whole, micro), None);
        let data = json!({"data": {"a": "!"}});
        assert_eq!(
            refused("Secret", Extent::Whole, data).as_deref(),
            Some("data.a: expected base64, got string")
        );
    }

    #[test]
    fn a_required_time_that_is_missing_is_the_zero_one() {
        let conformed = |extent, mut v: Value| {
            conform(&mut v, type_of("", "v1", "Service").expect("a kind"), extent).expect("fits");
            v["status"]["conditions"][0].clone()
        };
        let condition = json!({"status": {"conditions": [{"type": "a", "lastTransitionTime": null}]}});
        let zero = json!({"type": "a", "lastTransitionTime": "0001-01-01T00:00:00Z"});
        assert_eq!(conformed(Extent::Whole, condition.clone()), zero);
        assert_eq!(conformed(Extent::Whole, json!({"status": {"conditions": [zero.clone()]}})), zero);
        assert_eq!(
            conformed(Extent::Part, condition),
            json!({"type": "a"}),
            "another owner may hold the time"
        );
    }

    #[test]
    fn nulls_in_maps_become_zero_values() {
        let pod = type_of("", "v1", "Pod").expect("pod");
        let mut v = json!({"metadata": {"labels": {"a": null}}, "spec": {"overhead": {"cpu": null}}});
        conform(&mut v, pod, Extent::Whole).expect("fits");
        assert_eq!(v, json!({"metadata": {"labels": {"a": ""}}, "spec": {"overhead": {"cpu": "0"}}}));
    }
}
