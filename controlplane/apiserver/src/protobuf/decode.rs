//! Protobuf to the JSON form.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value};

use super::table::{Field, Kind, Shape, Table};
use super::{Error, MAGIC, MAX_DEPTH};

/// A field's value on the wire.
#[derive(Clone, Copy, Debug)]
pub enum Wire<'a> {
    Number(u64),
    Double(u64),
    Bytes(&'a [u8]),
    Other,
}

type Result<T> = std::result::Result<T, Error>;

fn varint(rest: &mut &[u8]) -> Result<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (first, tail) = rest.split_first().ok_or(Error::Truncated)?;
        *rest = tail;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(Error::Number)
}

fn take<'a>(rest: &mut &'a [u8], n: u64) -> Result<&'a [u8]> {
    let n = usize::try_from(n).ok().filter(|n| *n <= rest.len()).ok_or(Error::Truncated)?;
    let (head, tail) = rest.split_at(n);
    *rest = tail;
    Ok(head)
}

/// The next field of a message.
pub fn next<'a>(rest: &mut &'a [u8]) -> Result<Option<(u64, Wire<'a>)>> {
    if rest.is_empty() {
        return Ok(None);
    }
    let tag = varint(rest)?;
    let wire = match tag & 7 {
        0 => Wire::Number(varint(rest)?),
        1 => {
            let bytes = take(rest, 8)?;
            Wire::Double(bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
        }
        2 => {
            let n = varint(rest)?;
            Wire::Bytes(take(rest, n)?)
        }
        5 => take(rest, 4).map(|_| Wire::Other)?,
        other => return Err(Error::WireType(other)),
    };
    Ok(Some((tag >> 3, wire)))
}

/// The last values of a message's fields 1 to 4, by number: all that small fixed messages need.
fn parts(bytes: &[u8]) -> Result<[Option<Wire<'_>>; 5]> {
    let mut out = [None; 5];
    let mut rest = bytes;
    while let Some((number, wire)) = next(&mut rest)? {
        if let Some(slot) = usize::try_from(number).ok().and_then(|n| out.get_mut(n)) {
            *slot = Some(wire);
        }
    }
    Ok(out)
}

pub fn text(bytes: &[u8]) -> Result<String> {
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| Error::Text)
}

fn part_text(wire: Option<Wire<'_>>) -> Result<String> {
    match wire {
        Some(Wire::Bytes(b)) => text(b),
        _ => Ok(String::new()),
    }
}

/// An object in its envelope.
pub fn envelope(body: &[u8], depth: usize) -> Result<Value> {
    let unknown = body.strip_prefix(MAGIC).ok_or(Error::Magic)?;
    let [_, meta, raw, _, content_type] = parts(unknown)?;
    let [_, version, kind, ..] = match meta {
        Some(Wire::Bytes(b)) => parts(b)?,
        _ => [None; 5],
    };
    let (version, kind) = (part_text(version)?, part_text(kind)?);
    let raw = match raw {
        Some(Wire::Bytes(b)) => b,
        _ => &[],
    };
    let mut object = Map::new();
    if part_text(content_type)? == "application/json" {
        object = serde_json::from_slice(raw).map_err(|_| Error::Json)?;
    } else {
        let known = Table::get().kind(&version, &kind);
        let Some(message) = known else { return Err(Error::Kind { version, kind }) };
        fields(raw, message, &mut object, depth)?;
    }
    object.insert("kind".to_owned(), Value::String(kind));
    object.insert("apiVersion".to_owned(), Value::String(version));
    Ok(Value::Object(object))
}

fn message(bytes: &[u8], index: u16, depth: usize) -> Result<Value> {
    let mut object = Map::new();
    fields(bytes, index, &mut object, depth)?;
    Ok(Value::Object(object))
}

fn fields(bytes: &[u8], index: u16, object: &mut Map<String, Value>, depth: usize) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(Error::Depth);
    }
    let Some(message) = Table::get().message(index) else { return Ok(()) };
    let mut rest = bytes;
    while let Some((number, wire)) = next(&mut rest)? {
        // Fields of newer versions are dropped, as upstream does.
        let Some(field) = message.fields.iter().find(|f| u64::from(f.number) == number) else { continue };
        match field.shape {
            Shape::One if field.name.is_empty() => match (field.kind, wire) {
                (Kind::Message(inner), Wire::Bytes(b)) => fields(b, inner, object, depth + 1)?,
                _ => return Err(Error::Field(field.name)),
            },
            Shape::One => {
                if let Some(v) = one(field, wire, depth)?
                    && !(field.omit_zero && is_zero(&v))
                {
                    object.insert(field.name.to_owned(), v);
                }
            }
            Shape::List => list_item(field, wire, object, depth)?,
            Shape::Map => map_entry(field, wire, object, depth)?,
        }
    }
    Ok(())
}

fn is_zero(v: &Value) -> bool {
    match v {
        Value::String(s) => s.is_empty(),
        Value::Bool(b) => !b,
        Value::Number(n) => n.as_f64() == Some(0.0),
        _ => false,
    }
}

fn list_item(field: &Field, wire: Wire<'_>, object: &mut Map<String, Value>, depth: usize) -> Result<()> {
    let slot = object.entry(field.name).or_insert_with(|| Value::Array(Vec::new()));
    let Value::Array(items) = slot else { return Ok(()) };
    if let (Kind::Int32 | Kind::Int64 | Kind::Bool, Wire::Bytes(mut packed)) = (field.kind, wire) {
        while !packed.is_empty() {
            let number = Wire::Number(varint(&mut packed)?);
            items.extend(one(field, number, depth)?);
        }
        return Ok(());
    }
    items.push(one(field, wire, depth)?.unwrap_or_default());
    Ok(())
}

fn map_entry(field: &Field, wire: Wire<'_>, object: &mut Map<String, Value>, depth: usize) -> Result<()> {
    let Wire::Bytes(entry) = wire else { return Err(Error::Field(field.name)) };
    let [_, key, value, ..] = parts(entry)?;
    let key = part_text(key)?;
    let value = match (value, field.kind) {
        (Some(wire), _) => one(field, wire, depth)?,
        (None, Kind::Bool | Kind::Int32 | Kind::Int64) => one(field, Wire::Number(0), depth)?,
        (None, Kind::Double) => one(field, Wire::Double(0), depth)?,
        (None, _) => one(field, Wire::Bytes(&[]), depth)?,
    };
    let slot = object.entry(field.name).or_insert_with(|| Value::Object(Map::new()));
    if let Value::Object(map) = slot {
        map.insert(key, value.unwrap_or_default());
    }
    Ok(())
}

/// One value; `None` for what JSON writes as null.
fn one(field: &Field, wire: Wire<'_>, depth: usize) -> Result<Option<Value>> {
    let bytes = match (field.kind, wire) {
        (Kind::Bool, Wire::Number(n)) => return Ok(Some(Value::Bool(n != 0))),
        // The low 32 bits, as every reader of this type takes them.
        (Kind::Int32, Wire::Number(n)) => return Ok(Some(Value::from(n as u32 as i32))),
        (Kind::Int64, Wire::Number(n)) => return Ok(Some(Value::from(n.cast_signed()))),
        (Kind::Double, Wire::Double(bits)) => {
            let number = serde_json::Number::from_f64(f64::from_bits(bits)).ok_or(Error::Number)?;
            return Ok(Some(Value::Number(number)));
        }
        (_, Wire::Bytes(b)) => b,
        _ => return Err(Error::Field(field.name)),
    };
    Ok(Some(match field.kind {
        Kind::Text => Value::String(text(bytes)?),
        Kind::Bytes => Value::String(BASE64.encode(bytes)),
        Kind::Quantity => match part_text(parts(bytes)?[1])? {
            empty if empty.is_empty() => Value::from("0"),
            quantity => Value::String(quantity),
        },
        Kind::Time | Kind::MicroTime => return time(bytes, field.kind == Kind::MicroTime),
        Kind::IntOrString => int_or_string(bytes)?,
        Kind::Raw => return raw(bytes, depth),
        Kind::Texts => Value::Array(texts(bytes, 1)?),
        Kind::Message(inner) => message(bytes, inner, depth + 1)?,
        Kind::SchemaOrBool(schema) => match parts(bytes)? {
            [_, _, Some(Wire::Bytes(b)), ..] => message(b, schema, depth + 1)?,
            [_, Some(Wire::Number(n)), ..] => Value::Bool(n != 0),
            _ => Value::Bool(false),
        },
        Kind::SchemaOrStrings(schema) => match parts(bytes)? {
            [_, Some(Wire::Bytes(b)), ..] => message(b, schema, depth + 1)?,
            _ => Value::Array(texts(bytes, 2)?),
        },
        Kind::SchemaOrList(schema) => match parts(bytes)? {
            [_, Some(Wire::Bytes(b)), ..] => message(b, schema, depth + 1)?,
            _ => Value::Array(schemas(bytes, schema, depth)?),
        },
        Kind::Bool | Kind::Int32 | Kind::Int64 | Kind::Double => return Err(Error::Field(field.name)),
    }))
}

fn texts(bytes: &[u8], wanted: u64) -> Result<Vec<Value>> {
    let (mut items, mut rest) = (Vec::new(), bytes);
    while let Some((number, wire)) = next(&mut rest)? {
        if let Wire::Bytes(b) = wire
            && number == wanted
        {
            items.push(Value::String(text(b)?));
        }
    }
    Ok(items)
}

fn schemas(bytes: &[u8], schema: u16, depth: usize) -> Result<Vec<Value>> {
    let (mut items, mut rest) = (Vec::new(), bytes);
    while let Some((number, wire)) = next(&mut rest)? {
        if let (2, Wire::Bytes(b)) = (number, wire) {
            items.push(message(b, schema, depth + 1)?);
        }
    }
    Ok(items)
}

fn time(bytes: &[u8], micro: bool) -> Result<Option<Value>> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let [_, seconds, nanos, ..] = parts(bytes)?;
    let number = |wire| match wire {
        Some(Wire::Number(n)) => u64::cast_signed(n),
        _ => 0,
    };
    // Times have whole seconds in JSON, so that a value does not change with the encoding it went through.
    let nanos = if micro { i32::try_from(number(nanos)).map_err(|_| Error::Time)? } else { 0 };
    // Year 1: Go's zero time, which stands for none.
    if number(seconds) == -62_135_596_800 {
        return Ok(None);
    }
    let time = jiff::Timestamp::new(number(seconds), nanos).map_err(|_| Error::Time)?;
    Ok(Some(Value::String(if micro { format!("{time:.6}") } else { time.to_string() })))
}

fn int_or_string(bytes: &[u8]) -> Result<Value> {
    Ok(match parts(bytes)? {
        [_, Some(Wire::Number(1)), _, text, _] => Value::String(part_text(text)?),
        [_, _, Some(Wire::Number(n)), ..] => Value::from(n as u32 as i32),
        _ => Value::from(0),
    })
}

/// JSON in a message, or an object in an envelope of its own.
fn raw(bytes: &[u8], depth: usize) -> Result<Option<Value>> {
    match parts(bytes)?[1] {
        Some(Wire::Bytes([])) | None => Ok(None),
        Some(Wire::Bytes(b)) if b.starts_with(MAGIC) && depth < MAX_DEPTH => envelope(b, depth + 1).map(Some),
        Some(Wire::Bytes(b)) => serde_json::from_slice(b).map(Some).map_err(|_| Error::Json),
        Some(_) => Err(Error::Field("raw")),
    }
}
