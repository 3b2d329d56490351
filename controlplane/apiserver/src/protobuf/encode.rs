//! The JSON form to protobuf.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value};

use super::table::{Field, Kind, Shape, Table};
use super::{Error, MAGIC, MAX_DEPTH};

type Result<T> = std::result::Result<T, Error>;

pub fn varint(out: &mut Vec<u8>, mut n: u64) {
    while n > 0x7f {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

pub fn number(out: &mut Vec<u8>, field: u32, n: u64) {
    varint(out, u64::from(field) << 3);
    varint(out, n);
}

pub fn head(out: &mut Vec<u8>, field: u32, length: usize) {
    varint(out, u64::from(field) << 3 | 2);
    varint(out, length as u64);
}

pub fn bytes(out: &mut Vec<u8>, field: u32, content: &[u8]) {
    head(out, field, content.len());
    out.extend_from_slice(content);
}

/// An object in its envelope.
pub fn object(v: &Value) -> Result<Vec<u8>> {
    let (version, kind) = type_of(v);
    let message = Table::get()
        .kind(version, kind)
        .ok_or_else(|| Error::Kind { version: version.to_owned(), kind: kind.to_owned() })?;
    let mut raw = Vec::new();
    fields(&mut raw, message, map_of(v, "")?, 0)?;
    let mut out = open(version, kind, raw.len());
    out.extend_from_slice(&raw);
    close(&mut out);
    Ok(out)
}

pub fn type_of(v: &Value) -> (&str, &str) {
    let text = |key| v.get(key).and_then(Value::as_str).unwrap_or_default();
    (text("apiVersion"), text("kind"))
}

/// An envelope up to its content of `length` bytes.
pub fn open(version: &str, kind: &str, length: usize) -> Vec<u8> {
    let mut meta = Vec::with_capacity(version.len() + kind.len() + 8);
    bytes(&mut meta, 1, version.as_bytes());
    bytes(&mut meta, 2, kind.as_bytes());
    let mut out = Vec::with_capacity(length + meta.len() + 24);
    out.extend_from_slice(MAGIC);
    bytes(&mut out, 1, &meta);
    head(&mut out, 2, length);
    out
}

/// What follows the content: encoding and type of the content, both empty.
pub fn close(out: &mut Vec<u8>) {
    bytes(out, 3, b"");
    bytes(out, 4, b"");
}

pub fn map_of<'a>(v: &'a Value, name: &'static str) -> Result<&'a Map<String, Value>> {
    v.as_object().ok_or(Error::Field(name))
}

pub fn fields(out: &mut Vec<u8>, index: u16, object: &Map<String, Value>, depth: usize) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(Error::Depth);
    }
    let Some(message) = Table::get().message(index) else { return Ok(()) };
    for field in &message.fields {
        if field.name.is_empty() {
            if let Kind::Message(inner) = field.kind {
                let mut content = Vec::new();
                fields(&mut content, inner, object, depth + 1)?;
                bytes(out, field.number, &content);
            }
            continue;
        }
        let Some(v) = object.get(field.name).filter(|v| !v.is_null()) else { continue };
        match (field.shape, v) {
            (Shape::One, v) => one(out, field, field.number, v, depth)?,
            (Shape::List, Value::Array(items)) => {
                for item in items {
                    one(out, field, field.number, item, depth)?;
                }
            }
            (Shape::Map, Value::Object(entries)) => {
                for (key, v) in entries {
                    let mut entry = Vec::new();
                    bytes(&mut entry, 1, key.as_bytes());
                    if !v.is_null() {
                        one(&mut entry, field, 2, v, depth)?;
                    }
                    bytes(out, field.number, &entry);
                }
            }
            _ => return Err(Error::Field(field.name)),
        }
    }
    Ok(())
}

fn one(out: &mut Vec<u8>, field: &Field, at: u32, v: &Value, depth: usize) -> Result<()> {
    let wrong = || Error::Field(field.name);
    let text = || v.as_str().ok_or_else(wrong);
    let mut inner = Vec::new();
    match field.kind {
        Kind::Text => {
            bytes(out, at, text()?.as_bytes());
            return Ok(());
        }
        Kind::Bool => {
            number(out, at, u64::from(v.as_bool().ok_or_else(wrong)?));
            return Ok(());
        }
        Kind::Int32 | Kind::Int64 => {
            number(out, at, v.as_i64().ok_or_else(wrong)?.cast_unsigned());
            return Ok(());
        }
        Kind::Double => {
            varint(out, u64::from(at) << 3 | 1);
            out.extend_from_slice(&v.as_f64().ok_or_else(wrong)?.to_le_bytes());
            return Ok(());
        }
        Kind::Bytes => inner = BASE64.decode(text()?).map_err(|_| wrong())?,
        Kind::Time | Kind::MicroTime => {
            if !v.is_null() {
                let time: jiff::Timestamp = text()?.parse().map_err(|_| wrong())?;
                let seconds = time.as_nanosecond().div_euclid(1_000_000_000) as i64;
                let nanos = time.as_nanosecond().rem_euclid(1_000_000_000) as u64;
                number(&mut inner, 1, seconds.cast_unsigned());
                number(&mut inner, 2, if field.kind == Kind::MicroTime { nanos / 1000 * 1000 } else { 0 });
            }
        }
        Kind::Quantity => match v {
            Value::Number(n) => bytes(&mut inner, 1, n.to_string().as_bytes()),
            _ => bytes(&mut inner, 1, text()?.as_bytes()),
        },
        Kind::IntOrString => {
            let n = if v.is_string() { 0 } else { v.as_i64().ok_or_else(wrong)? };
            number(&mut inner, 1, u64::from(v.is_string()));
            number(&mut inner, 2, n.cast_unsigned());
            bytes(&mut inner, 3, v.as_str().unwrap_or_default().as_bytes());
        }
        Kind::Raw => bytes(&mut inner, 1, &serde_json::to_vec(v).map_err(|_| Error::Json)?),
        Kind::Texts => texts(&mut inner, 1, v, field.name)?,
        Kind::Message(message) if v.is_null() => {
            fields(&mut inner, message, &Map::new(), depth + 1)?;
        }
        Kind::Message(message) => fields(&mut inner, message, map_of(v, field.name)?, depth + 1)?,
        Kind::SchemaOrBool(schema) => match v {
            Value::Bool(allows) => number(&mut inner, 1, u64::from(*allows)),
            _ => {
                number(&mut inner, 1, 1);
                nested(&mut inner, 2, schema, v, field.name, depth)?;
            }
        },
        Kind::SchemaOrStrings(schema) => match v {
            Value::Array(_) => texts(&mut inner, 2, v, field.name)?,
            _ => nested(&mut inner, 1, schema, v, field.name, depth)?,
        },
        Kind::SchemaOrList(schema) => match v {
            Value::Array(items) => {
                for item in items {
                    nested(&mut inner, 2, schema, item, field.name, depth)?;
                }
            }
            _ => nested(&mut inner, 1, schema, v, field.name, depth)?,
        },
    }
    bytes(out, at, &inner);
    Ok(())
}

fn texts(out: &mut Vec<u8>, at: u32, v: &Value, name: &'static str) -> Result<()> {
    for item in v.as_array().ok_or(Error::Field(name))? {
        bytes(out, at, item.as_str().ok_or(Error::Field(name))?.as_bytes());
    }
    Ok(())
}

fn nested(
    out: &mut Vec<u8>,
    at: u32,
    schema: u16,
    v: &Value,
    name: &'static str,
    depth: usize,
) -> Result<()> {
    let mut inner = Vec::new();
    fields(&mut inner, schema, map_of(v, name)?, depth + 1)?;
    bytes(out, at, &inner);
    Ok(())
}
