//! Kubernetes' protobuf encoding of request bodies: typed clients, such as kubectl's `create` commands and the upstream
//! components, send it. Answers are JSON, which those clients accept too.
//!
//! `schema/protobuf.txt` lists for each type `<number> <json name><flag> <type>`: flag `*` = a pointer (a zero value was set on
//! purpose), `!` = always written, none = left out of JSON when zero; the name `-` = the message's fields belong to its parent.
//! Types: `string int bool double bytes quantity intstr time microtime duration raw items empty orarray orbool orstrings`,
//! `[]T`, `{}T`, and names of messages.

use std::{collections::HashMap, sync::OnceLock};

use base64::Engine;
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::schema;

/// The content type of the envelope.
pub const MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf";
const MAGIC: &[u8] = b"k8s\0";
/// Deeper nesting is refused. The deepest legitimate type, a JSON schema in a CRD, stays below it.
const MAX_DEPTH: usize = 64;
const TYPES: &str = include_str!("../schema/protobuf.txt");
const DELETE_OPTIONS: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions";
const JSON_SCHEMA: &str = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaProps";

/// The object in an envelope, with `kind` and `apiVersion`.
///
/// # Errors
/// A message for a 400.
pub fn decode(body: &[u8]) -> Result<Value, String> {
    let unknown = body.strip_prefix(MAGIC).ok_or("the body does not begin with the protobuf envelope")?;
    let (mut api_version, mut kind, mut raw, mut content_type) =
        (String::new(), String::new(), &[][..], String::new());
    for field in Fields(unknown) {
        match field? {
            (1, Wire::Bytes(meta)) => {
                for field in Fields(meta) {
                    match field? {
                        (1, Wire::Bytes(b)) => api_version = text(b)?,
                        (2, Wire::Bytes(b)) => kind = text(b)?,
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(b)) => raw = b,
            (4, Wire::Bytes(b)) => content_type = text(b)?,
            _ => {}
        }
    }
    let mut value = if content_type == "application/json" {
        serde_json::from_slice(raw).map_err(|e| e.to_string())?
    } else {
        let (group, version) = api_version.split_once('/').unwrap_or(("", &api_version));
        let name = match kind.as_str() {
            "DeleteOptions" => DELETE_OPTIONS,
            _ => schema::type_of(group, version, &kind)
                .ok_or_else(|| format!("no kind {kind:?} is known in version {api_version:?}"))?,
        };
        message(raw, name, MAX_DEPTH)?
    };
    let Value::Object(map) = &mut value else { return Err("the body holds no object".into()) };
    map.insert("kind".into(), kind.into());
    map.insert("apiVersion".into(), api_version.into());
    Ok(value)
}

enum Wire<'a> {
    Varint(u64),
    Fixed64(u64),
    Fixed32(u32),
    Bytes(&'a [u8]),
}

/// The fields of a message, in order.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Result<u64, String> {
        let mut out = 0u64;
        for shift in (0..70).step_by(7) {
            let (byte, rest) = self.0.split_first().ok_or("a number is cut off")?;
            self.0 = rest;
            if shift < 64 {
                out |= u64::from(byte & 0x7f) << shift;
            }
            if byte & 0x80 == 0 {
                return Ok(out);
            }
        }
        Err("a number is too long".into())
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        if n > self.0.len() {
            return Err("a field is cut off".into());
        }
        let (taken, rest) = self.0.split_at(n);
        self.0 = rest;
        Ok(taken)
    }

    fn field(&mut self) -> Result<(u64, Wire<'a>), String> {
        let tag = self.varint()?;
        let wire = match tag & 7 {
            0 => Wire::Varint(self.varint()?),
            1 => {
                Wire::Fixed64(u64::from_le_bytes(self.take(8)?.try_into().map_err(|_| "a field is cut off")?))
            }
            2 => {
                let n = usize::try_from(self.varint()?).map_err(|_| "a field is too long")?;
                Wire::Bytes(self.take(n)?)
            }
            5 => {
                Wire::Fixed32(u32::from_le_bytes(self.take(4)?.try_into().map_err(|_| "a field is cut off")?))
            }
            other => return Err(format!("wire type {other} is not supported")),
        };
        Ok((tag >> 3, wire))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Wire<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.0 = &[];
        }
        Some(field)
    }
}

fn text(bytes: &[u8]) -> Result<String, String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| "a text is not UTF-8".into())
}

/// The lines of a message type.
fn lines(name: &str) -> Option<&'static str> {
    static INDEX: OnceLock<HashMap<&'static str, &'static str>> = OnceLock::new();
    let index = INDEX.get_or_init(|| {
        let mut index = HashMap::new();
        let mut rest = TYPES;
        while let Some((head, after)) = rest.split_once('\n') {
            let mut end = 0;
            for line in after.split_inclusive('\n') {
                if !line.starts_with(' ') {
                    break;
                }
                end += line.len();
            }
            index.insert(head, &after[..end]);
            rest = &after[end..];
        }
        index
    });
    index.get(name).copied()
}

/// One line: (json name, flag, type).
fn describe(lines: &'static str, number: u64) -> Option<(&'static str, char, &'static str)> {
    lines.lines().find_map(|line| {
        let mut words = line.trim_start().split(' ');
        if words.next()?.parse() != Ok(number) {
            return None;
        }
        let (name, ty) = (words.next()?, words.next()?);
        let flag = name.chars().next_back().filter(|c| matches!(c, '*' | '!')).unwrap_or(' ');
        Some((name.trim_end_matches(['*', '!']), flag, ty))
    })
}

fn message(bytes: &[u8], name: &str, depth: usize) -> Result<Value, String> {
    let depth = depth.checked_sub(1).ok_or("the object is nested too deeply")?;
    let lines = lines(name).ok_or_else(|| format!("the protobuf form of {name} is not known"))?;
    let mut out = Map::new();
    for field in Fields(bytes) {
        let (number, wire) = field?;
        // Fields that this version does not know are dropped, as in JSON.
        let Some((name, flag, ty)) = describe(lines, number) else { continue };
        if let Some(item) = ty.strip_prefix("[]") {
            let list = out.entry(name).or_insert_with(|| Value::Array(Vec::new()));
            if let Value::Array(list) = list {
                list.push(value(&wire, item, depth)?);
            }
        } else if let Some(item) = ty.strip_prefix("{}") {
            let (key, v) = entry(&wire, item, depth)?;
            let map = out.entry(name).or_insert_with(|| Value::Object(Map::new()));
            if let Value::Object(map) = map {
                map.insert(key, v);
            }
        } else if name == "-" {
            if let Value::Object(inner) = value(&wire, ty, depth)? {
                out.extend(inner);
            }
        } else {
            let v = value(&wire, ty, depth)?;
            let zero = match &v {
                Value::Null => true,
                Value::String(s) => s.is_empty(),
                Value::Number(n) => n.as_f64() == Some(0.0),
                Value::Bool(b) => !b,
                _ => false,
            };
            if v.is_null() || (zero && flag == ' ') {
                continue;
            }
            out.insert(name.to_owned(), v);
        }
    }
    Ok(Value::Object(out))
}

fn entry(wire: &Wire<'_>, item: &str, depth: usize) -> Result<(String, Value), String> {
    let Wire::Bytes(bytes) = wire else { return Err("a map entry is not a message".into()) };
    let (mut key, mut v) = (String::new(), None);
    for field in Fields(bytes) {
        match field? {
            (1, Wire::Bytes(b)) => key = text(b)?,
            (2, wire) => v = Some(value(&wire, item, depth)?),
            _ => {}
        }
    }
    let v = match v {
        Some(v) => v,
        // A zero value may be left out of an entry.
        None => value(&Wire::Bytes(&[]), item, depth)?,
    };
    Ok((key, v))
}

fn value(wire: &Wire<'_>, ty: &str, depth: usize) -> Result<Value, String> {
    Ok(match (ty, wire) {
        ("bool", Wire::Varint(n)) => Value::Bool(*n != 0),
        ("int", Wire::Varint(n)) => Value::from(*n as i64),
        ("double", Wire::Fixed64(n)) => Value::from(f64::from_bits(*n)),
        ("double", Wire::Fixed32(n)) => Value::from(f64::from(f32::from_bits(*n))),
        ("string", Wire::Bytes(b)) => text(b)?.into(),
        ("bytes", Wire::Bytes(b)) => base64::engine::general_purpose::STANDARD.encode(b).into(),
        (_, Wire::Bytes(b)) => structured(b, ty, depth)?,
        _ => return Err(format!("a field of type {ty} has the wrong wire type")),
    })
}

fn structured(bytes: &[u8], ty: &str, depth: usize) -> Result<Value, String> {
    let mut numbers = [0i64; 4];
    let mut texts: Vec<&[u8]> = Vec::new();
    let scalar = matches!(ty, "quantity" | "intstr" | "time" | "microtime" | "duration" | "raw" | "items");
    if scalar {
        for field in Fields(bytes) {
            match field? {
                (n @ 1..=3, Wire::Varint(v)) => numbers[n as usize] = v as i64,
                (_, Wire::Bytes(b)) => texts.push(b),
                _ => {}
            }
        }
    }
    let first = texts.first().copied().unwrap_or_default();
    Ok(match ty {
        "quantity" if first.is_empty() => "0".into(),
        "quantity" => text(first)?.into(),
        "intstr" if numbers[1] == 0 => Value::from(numbers[2]),
        "intstr" => text(first)?.into(),
        "time" | "microtime" => time(bytes.is_empty(), numbers[1], numbers[2], ty == "microtime")?,
        "duration" => format!("{}s", numbers[1] / 1_000_000_000).into(),
        "raw" if first.is_empty() => Value::Null,
        "raw" => serde_json::from_slice(first).map_err(|e| format!("an embedded object is not JSON: {e}"))?,
        "items" => texts.into_iter().map(text).collect::<Result<Vec<_>, _>>()?.into(),
        "empty" => json!({}),
        "orarray" | "orbool" | "orstrings" => either(bytes, ty, depth)?,
        name => message(bytes, name, depth)?,
    })
}

/// A zero time means that none is set.
fn time(empty: bool, seconds: i64, nanos: i64, micro: bool) -> Result<Value, String> {
    const ZERO: i64 = -62_135_596_800;
    if empty || seconds == ZERO {
        return Ok(Value::Null);
    }
    let nanos = i32::try_from(nanos).map_err(|_| "a time is out of range")?;
    let at = Timestamp::new(seconds, if micro { nanos } else { 0 }).map_err(|e| e.to_string())?;
    Ok(if micro { format!("{at:.6}").into() } else { at.to_string().into() })
}

/// The types of JSON schemas that are one thing or another.
fn either(bytes: &[u8], ty: &str, depth: usize) -> Result<Value, String> {
    let (mut one, mut many, mut allows) = (None, Vec::new(), false);
    for field in Fields(bytes) {
        match (field?, ty) {
            ((1, Wire::Varint(n)), "orbool") => allows = n != 0,
            ((2, Wire::Bytes(b)), "orbool") | ((1, Wire::Bytes(b)), _) => {
                one = Some(message(b, JSON_SCHEMA, depth)?)
            }
            ((2, Wire::Bytes(b)), "orarray") => many.push(message(b, JSON_SCHEMA, depth)?),
            ((2, Wire::Bytes(b)), _) => many.push(text(b)?.into()),
            _ => {}
        }
    }
    Ok(match one {
        Some(v) => v,
        None if ty == "orbool" => allows.into(),
        None => Value::Array(many),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2, bytes.len() as u8];
        out.extend(bytes);
        out
    }

    fn envelope(version: &str, kind: &str, raw: &[u8]) -> Vec<u8> {
        let meta = [field(1, version.as_bytes()), field(2, kind.as_bytes())].concat();
        [MAGIC.to_vec(), field(1, &meta), field(2, raw)].concat()
    }

    #[test]
    fn a_review_and_a_token_request() {
        let attributes = [field(1, b"ns"), field(2, b"get"), field(5, b"pods")].concat();
        let raw = [field(1, &[]), field(2, &field(1, &attributes))].concat();
        let got =
            decode(&envelope("authorization.k8s.io/v1", "SelfSubjectAccessReview", &raw)).expect("review");
        assert_eq!(
            got["spec"]["resourceAttributes"],
            json!({"namespace": "ns", "verb": "get", "resource": "pods"})
        );
        assert_eq!(got["kind"], "SelfSubjectAccessReview");
        let mut spec = field(1, b"aud");
        spec.extend([4 << 3, 0xd8, 0x04]);
        let got =
            decode(&envelope("authentication.k8s.io/v1", "TokenRequest", &field(2, &spec))).expect("request");
        assert_eq!(got["spec"], json!({"audiences": ["aud"], "expirationSeconds": 600}));
    }

    #[test]
    fn pointers_maps_and_inlined_messages() {
        // replicas is a pointer: a zero was meant. minReadySeconds is none: a zero says nothing.
        let spec = [vec![1 << 3, 0], vec![5 << 3, 0]].concat();
        let got = decode(&envelope("apps/v1", "Deployment", &field(2, &spec))).expect("deployment");
        assert_eq!(got["spec"], json!({"replicas": 0}));

        let data = [field(1, b"k"), field(2, b"v")].concat();
        let got =
            decode(&envelope("v1", "ConfigMap", &[field(1, &field(1, b"m")), field(2, &data)].concat()))
                .expect("map");
        assert_eq!((got["metadata"]["name"].as_str(), &got["data"]), (Some("m"), &json!({"k": "v"})));

        let path = field(1, &field(1, b"/x"));
        let volume = [field(1, b"v"), field(2, &path)].concat();
        let got = decode(&envelope("v1", "Pod", &field(2, &field(1, &volume)))).expect("pod");
        assert_eq!(got["spec"]["volumes"], json!([{"name": "v", "hostPath": {"path": "/x"}}]));
    }

    #[test]
    fn bad_bytes_are_errors() {
        assert!(decode(b"{}").is_err());
        assert!(decode(&envelope("v1", "Nothing", &[])).is_err());
        let good = envelope("v1", "Pod", &field(2, &field(10, b"node")));
        assert!(decode(&good).is_ok());
        assert!(decode(&good[..good.len() - 1]).is_err());
    }

    #[test]
    fn every_type_that_is_named_is_described() {
        for line in TYPES.lines().filter(|l| l.starts_with(' ')) {
            let ty = line.rsplit(' ').next().unwrap_or("").trim_start_matches("[]").trim_start_matches("{}");
            assert!(!ty.starts_with("io.") || lines(ty).is_some(), "{ty}");
        }
        assert!(lines(DELETE_OPTIONS).is_some() && lines(JSON_SCHEMA).is_some());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(raw in proptest::collection::vec(any::<u8>(), 0..200)) {
            for (version, kind) in [("v1", "Pod"), ("apiextensions.k8s.io/v1", "CustomResourceDefinition")] {
                let mut bytes = envelope(version, kind, &[]);
                bytes.extend([0x12, raw.len().min(127) as u8]);
                bytes.extend(&raw);
                let _ = decode(&bytes);
            }
        }
    }
}
