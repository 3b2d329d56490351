//! Which number a field has on the wire and how its JSON form differs.
//!
//! `schema/wire.txt` is written by `schema/wire.py` and read once, when the first protobuf message comes or goes. Its form:
//!
//! ```text
//! @k8s.io.api.core.v1 v1      a package and its apiVersion
//! Volume                      a message; `list` after it = a message that only wraps a list of strings
//!  1 name! string             a field: number, JSON name, type
//!  2 - VolumeSource           a message on the wire whose fields are the outer object's own in JSON
//! ```
//! After the name: `!` = JSON has it even when it is zero, `*` = what is on the wire was set, zero or not; neither = zero means that it
//! was not set. `[]T` is a list, `{}T` a map from strings. `T` is a scalar, a special type or a message, of the same package when it has no dot.

use std::{collections::HashMap, sync::OnceLock};

const WIRE: &str = include_str!("../../schema/wire.txt");
const META: &str = "meta.k8s.io/v1";

/// What a field's value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Text,
    Bool,
    Int32,
    Int64,
    Double,
    /// Base64 in JSON.
    Bytes,
    /// Seconds and nanoseconds; RFC 3339 in JSON.
    Time,
    /// The same with six digits after the second.
    MicroTime,
    Quantity,
    IntOrString,
    /// A message around JSON text.
    Raw,
    /// A schema or a list of schemas; the number is the schema's message.
    SchemaOrList(u16),
    /// A schema or a bool.
    SchemaOrBool(u16),
    /// A schema or a list of strings.
    SchemaOrStrings(u16),
    /// A message around a list of strings.
    Texts,
    /// Another message.
    Message(u16),
}

/// How often a field's value can be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    One,
    List,
    Map,
}

/// A field of a message.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    pub number: u32,
    /// JSON name; empty when the message's fields belong to the outer object.
    pub name: &'static str,
    /// Whether a zero in JSON and on the wire means that the field was not set.
    pub omit_zero: bool,
    /// Whether it is one value, a list or a map.
    pub shape: Shape,
    pub kind: Kind,
}

/// A message.
#[derive(Debug)]
pub struct Message {
    pub fields: Box<[Field]>,
}

/// All messages.
#[derive(Debug)]
pub struct Table {
    messages: Vec<Message>,
    kinds: HashMap<(&'static str, &'static str), u16>,
}

impl Table {
    /// The table, read on first use.
    pub fn get() -> &'static Table {
        static TABLE: OnceLock<Table> = OnceLock::new();
        TABLE.get_or_init(|| Table::parse(WIRE))
    }

    /// A message by its number.
    pub fn message(&self, index: u16) -> Option<&Message> {
        self.messages.get(usize::from(index))
    }

    /// The message of a kind. Options and Status are the same in every group.
    pub fn kind(&self, api_version: &str, kind: &str) -> Option<u16> {
        let found = |version| self.kinds.get(&(version, kind)).copied();
        let everywhere = matches!(
            kind,
            "Status"
                | "DeleteOptions"
                | "CreateOptions"
                | "UpdateOptions"
                | "PatchOptions"
                | "GetOptions"
                | "List"
        );
        found(api_version).or_else(|| if everywhere { found(META) } else { None })
    }

    fn parse(text: &'static str) -> Table {
        // Two passes: references point forward.
        let (mut names, mut kinds) = (HashMap::new(), HashMap::new());
        let (mut package, mut version) = ("", "");
        let (mut count, mut lists) = (0u16, HashMap::new());
        for line in text.lines().filter(|l| !l.starts_with(['#', ' '])) {
            if let Some(head) = line.strip_prefix('@') {
                (package, version) = head.split_once(' ').unwrap_or((head, ""));
            } else if let Some(name) = line.strip_suffix(" list") {
                lists.insert((package, name), ());
            } else {
                names.insert((package, line), count);
                kinds.insert((version, line), count);
                count += 1;
            }
        }
        let resolve = |package: &'static str, ty: &'static str| -> Option<Kind> {
            let schema = || names.get(&(package, "JSONSchemaProps")).copied();
            Some(match ty {
                "string" => Kind::Text,
                "bool" => Kind::Bool,
                "int32" => Kind::Int32,
                "int64" => Kind::Int64,
                "double" => Kind::Double,
                "bytes" => Kind::Bytes,
                "time" => Kind::Time,
                "microtime" => Kind::MicroTime,
                "quantity" => Kind::Quantity,
                "intstr" => Kind::IntOrString,
                "raw" => Kind::Raw,
                "schemaOrList" => Kind::SchemaOrList(schema()?),
                "schemaOrBool" => Kind::SchemaOrBool(schema()?),
                "schemaOrStrings" => Kind::SchemaOrStrings(schema()?),
                other => {
                    let key = other.rsplit_once('.').unwrap_or((package, other));
                    match lists.get(&key) {
                        Some(()) => Kind::Texts,
                        None => Kind::Message(*names.get(&key)?),
                    }
                }
            })
        };
        let mut messages = Vec::with_capacity(usize::from(count));
        let mut fields = None;
        for line in text.lines() {
            if let Some(field) = line.strip_prefix(' ') {
                let parsed = field_of(field, |ty| resolve(package, ty));
                if let (Some(fields), Some(field)) = (&mut fields, parsed) {
                    Vec::push(fields, field);
                }
                continue;
            }
            if let Some(head) = line.strip_prefix('@') {
                package = head.split(' ').next().unwrap_or_default();
            } else if !line.starts_with('#') && !line.ends_with(" list") {
                messages.extend(fields.take().map(message_of));
                fields = Some(Vec::new());
            }
        }
        messages.extend(fields.take().map(message_of));
        Table { messages, kinds }
    }
}

fn message_of(fields: Vec<Field>) -> Message {
    Message { fields: fields.into_boxed_slice() }
}

fn field_of(line: &'static str, resolve: impl Fn(&'static str) -> Option<Kind>) -> Option<Field> {
    let mut words = line.split(' ');
    let number = words.next()?.parse().ok()?;
    let name = words.next()?;
    let ty = words.next()?;
    let bare = name.trim_end_matches(['!', '*']);
    let (shape, ty) = match ty.as_bytes() {
        [b'[', ..] => (Shape::List, &ty[2..]),
        [b'{', ..] => (Shape::Map, &ty[2..]),
        _ => (Shape::One, ty),
    };
    let kind = resolve(ty)?;
    let inline = bare == "-";
    Some(Field {
        number,
        name: if inline { "" } else { bare },
        omit_zero: bare.len() == name.len(),
        shape,
        kind,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_table_is_read() {
        let table = Table::get();
        let fields: usize = table.messages.iter().map(|m| m.fields.len()).sum();
        assert_eq!(fields, WIRE.lines().filter(|l| l.starts_with(' ')).count());
        let messages =
            WIRE.lines().filter(|l| !l.starts_with([' ', '#', '@']) && !l.ends_with(" list")).count();
        assert_eq!(table.messages.len(), messages);
        for message in &table.messages {
            for field in &message.fields {
                assert!(!field.name.is_empty() || matches!(field.kind, Kind::Message(_)), "{field:?}");
            }
        }
    }

    #[test]
    fn kinds_are_found_by_version() {
        let table = Table::get();
        assert!(table.kind("v1", "Pod").is_some());
        assert!(table.kind("apps/v1", "DeploymentList").is_some());
        assert_ne!(table.kind("autoscaling/v1", "Scale"), None);
        assert_ne!(
            table.kind("autoscaling/v1", "HorizontalPodAutoscaler"),
            table.kind("autoscaling/v2", "HorizontalPodAutoscaler")
        );
        assert_eq!(table.kind("policy/v1", "DeleteOptions"), table.kind("v1", "DeleteOptions"));
        assert_eq!(table.kind("example.com/v1", "Pod"), None);
    }
}
