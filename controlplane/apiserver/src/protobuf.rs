//! Kubernetes' protobuf envelope for the kinds that are answered here: kubectl's and client-go's typed clients send reviews and token
//! requests that way. Field numbers are those of the published `generated.proto` files.

use serde_json::{Map, Value};

/// The content type of the envelope.
pub const MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf";
const MAGIC: &[u8] = b"k8s\0";
/// Messages nest four deep at most.
const MAX_DEPTH: usize = 8;

enum Type {
    Text,
    Texts,
    Int,
    Message(&'static [Field]),
    Messages(&'static [Field]),
    /// A map from text to a message with one repeated text field.
    Extra,
}

type Field = (u64, &'static str, Type);

const META: &[Field] = &[
    (1, "name", Type::Text),
    (2, "generateName", Type::Text),
    (3, "namespace", Type::Text),
    (5, "uid", Type::Text),
];
const REFERENCE: &[Field] = &[
    (1, "kind", Type::Text),
    (2, "apiVersion", Type::Text),
    (3, "name", Type::Text),
    (4, "uid", Type::Text),
];
const REQUIREMENT: &[Field] =
    &[(1, "key", Type::Text), (2, "operator", Type::Text), (3, "values", Type::Texts)];
const SELECTOR: &[Field] =
    &[(1, "rawSelector", Type::Text), (2, "requirements", Type::Messages(REQUIREMENT))];
const RESOURCE: &[Field] = &[
    (1, "namespace", Type::Text),
    (2, "verb", Type::Text),
    (3, "group", Type::Text),
    (4, "version", Type::Text),
    (5, "resource", Type::Text),
    (6, "subresource", Type::Text),
    (7, "name", Type::Text),
    (8, "fieldSelector", Type::Message(SELECTOR)),
    (9, "labelSelector", Type::Message(SELECTOR)),
];
const PATH: &[Field] = &[(1, "path", Type::Text), (2, "verb", Type::Text)];
const ACCESS: &[Field] = &[
    (1, "resourceAttributes", Type::Message(RESOURCE)),
    (2, "nonResourceAttributes", Type::Message(PATH)),
    (3, "user", Type::Text),
    (4, "groups", Type::Texts),
    (5, "extra", Type::Extra),
    (6, "uid", Type::Text),
];
const TOKEN_REQUEST: &[Field] = &[
    (1, "audiences", Type::Texts),
    (3, "boundObjectRef", Type::Message(REFERENCE)),
    (4, "expirationSeconds", Type::Int),
];

const fn object(spec: &'static [Field]) -> [Field; 2] {
    [(1, "metadata", Type::Message(META)), (2, "spec", Type::Message(spec))]
}

static ACCESS_REVIEW: [Field; 2] = object(ACCESS);
static RULES_REVIEW: [Field; 2] = object(&[(1, "namespace", Type::Text)]);
static TOKEN_REVIEW: [Field; 2] = object(&[(1, "token", Type::Text), (2, "audiences", Type::Texts)]);
static TOKEN_REQUEST_OBJECT: [Field; 2] = object(TOKEN_REQUEST);
static ONLY_META: [Field; 1] = [(1, "metadata", Type::Message(META))];

fn fields_of(kind: &str) -> Option<&'static [Field]> {
    Some(match kind {
        "TokenRequest" => &TOKEN_REQUEST_OBJECT,
        "TokenReview" => &TOKEN_REVIEW,
        "SelfSubjectReview" => &ONLY_META,
        "SelfSubjectRulesReview" => &RULES_REVIEW,
        "SubjectAccessReview" | "SelfSubjectAccessReview" | "LocalSubjectAccessReview" => &ACCESS_REVIEW,
        _ => return None,
    })
}

/// Reads an enveloped object.
///
/// # Errors
/// A message when the bytes are no such envelope or hold a kind that is not read in this form.
pub fn decode(body: &[u8]) -> Result<Value, String> {
    const TYPE_META: &[Field] = &[(1, "apiVersion", Type::Text), (2, "kind", Type::Text)];
    let envelope = body.strip_prefix(MAGIC).ok_or("the protobuf envelope's magic bytes are missing")?;
    let (mut meta, mut raw) = (Value::Null, &[][..]);
    let mut rest = envelope;
    while let Some((number, field)) = next(&mut rest)? {
        match (number, field) {
            (1, Wire::Bytes(b)) => meta = message(b, TYPE_META, 0)?,
            (2, Wire::Bytes(b)) => raw = b,
            _ => {}
        }
    }
    let kind = meta["kind"].as_str().unwrap_or_default();
    let fields =
        fields_of(kind).ok_or_else(|| format!("kind {kind:?} is not read as protobuf here; send JSON"))?;
    let mut object = message(raw, fields, 0)?;
    object["kind"] = meta["kind"].clone();
    object["apiVersion"] = meta["apiVersion"].clone();
    Ok(object)
}

enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Other,
}

fn varint(rest: &mut &[u8]) -> Result<u64, String> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (first, tail) = rest.split_first().ok_or("truncated")?;
        *rest = tail;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err("a number of more than ten bytes".to_owned())
}

fn take<'a>(rest: &mut &'a [u8], n: u64) -> Result<&'a [u8], String> {
    let n = usize::try_from(n).ok().filter(|n| *n <= rest.len()).ok_or("truncated")?;
    let (head, tail) = rest.split_at(n);
    *rest = tail;
    Ok(head)
}

fn next<'a>(rest: &mut &'a [u8]) -> Result<Option<(u64, Wire<'a>)>, String> {
    if rest.is_empty() {
        return Ok(None);
    }
    let tag = varint(rest)?;
    let wire = match tag & 7 {
        0 => Wire::Number(varint(rest)?),
        1 => take(rest, 8).map(|_| Wire::Other)?,
        2 => {
            let n = varint(rest)?;
            Wire::Bytes(take(rest, n)?)
        }
        5 => take(rest, 4).map(|_| Wire::Other)?,
        other => return Err(format!("unknown wire type {other}")),
    };
    Ok(Some((tag >> 3, wire)))
}

fn text(bytes: &[u8]) -> Result<Value, String> {
    std::str::from_utf8(bytes).map(|s| Value::String(s.to_owned())).map_err(|e| e.to_string())
}

fn push(object: &mut Map<String, Value>, name: &str, item: Value) {
    match object.entry(name).or_insert_with(|| Value::Array(Vec::new())) {
        Value::Array(list) => list.push(item),
        other => *other = Value::Array(vec![item]),
    }
}

fn message(bytes: &[u8], fields: &[Field], depth: usize) -> Result<Value, String> {
    if depth > MAX_DEPTH {
        return Err("nested too deeply".to_owned());
    }
    let mut object = Map::new();
    let mut rest = bytes;
    while let Some((number, wire)) = next(&mut rest)? {
        let Some((_, name, kind)) = fields.iter().find(|f| f.0 == number) else { continue };
        match (kind, wire) {
            // An empty text stands for a field that was not set.
            (Type::Text, Wire::Bytes([])) => {}
            (Type::Text, Wire::Bytes(b)) => {
                object.insert((*name).to_owned(), text(b)?);
            }
            (Type::Texts, Wire::Bytes(b)) => push(&mut object, name, text(b)?),
            (Type::Int, Wire::Number(n)) => {
                object.insert((*name).to_owned(), Value::from(n.cast_signed()));
            }
            (Type::Message(inner), Wire::Bytes(b)) => {
                object.insert((*name).to_owned(), message(b, inner, depth + 1)?);
            }
            (Type::Messages(inner), Wire::Bytes(b)) => push(&mut object, name, message(b, inner, depth + 1)?),
            (Type::Extra, Wire::Bytes(b)) => {
                const ENTRY: &[Field] =
                    &[(1, "key", Type::Text), (2, "value", Type::Message(&[(1, "items", Type::Texts)]))];
                let entry = message(b, ENTRY, depth + 1)?;
                let key = entry["key"].as_str().unwrap_or_default().to_owned();
                let slot = object.entry(*name).or_insert_with(|| Value::Object(Map::new()));
                slot[key] =
                    entry.pointer("/value/items").cloned().unwrap_or_else(|| Value::Array(Vec::new()));
            }
            _ => return Err(format!("field {name} has an unexpected wire type")),
        }
    }
    Ok(Value::Object(object))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2, bytes.len() as u8];
        out.extend(bytes);
        out
    }

    fn envelope(kind: &str, raw: &[u8]) -> Vec<u8> {
        let meta = [field(1, b"g/v1"), field(2, kind.as_bytes())].concat();
        [MAGIC.to_vec(), field(1, &meta), field(2, raw)].concat()
    }

    #[test]
    fn a_review_and_a_token_request() {
        let attributes = [field(1, b"ns"), field(2, b"get"), field(5, b"pods")].concat();
        let raw = [field(1, &[]), field(2, &field(1, &attributes))].concat();
        let got = decode(&envelope("SelfSubjectAccessReview", &raw)).unwrap();
        assert_eq!(
            got["spec"]["resourceAttributes"],
            json!({"namespace": "ns", "verb": "get", "resource": "pods"})
        );
        assert_eq!(got["kind"], "SelfSubjectAccessReview");
        let mut spec = field(1, b"aud");
        spec.extend([4 << 3, 0xd8, 0x04]);
        let got = decode(&envelope("TokenRequest", &field(2, &spec))).unwrap();
        assert_eq!(got["spec"], json!({"audiences": ["aud"], "expirationSeconds": 600}));
    }

    #[test]
    fn bad_bytes_are_errors() {
        assert!(decode(b"{}").is_err());
        assert!(decode(&envelope("Pod", &[])).is_err());
        let good = envelope("TokenRequest", &field(2, &field(1, b"aud")));
        for end in MAGIC.len()..good.len() {
            let _ = decode(&good[..end]);
        }
        assert!(decode(&good[..good.len() - 1]).is_err());
    }
}
