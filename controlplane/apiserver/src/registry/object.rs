//! One version of one object, serialised once and shared by everyone who reads it.
//!
//! Stored bytes carry no resource version and begin with `{"kind":…,"apiVersion":…,"metadata":{`. When a version is
//! read, its revision is spliced in behind that, inside a frame that is a complete watch event; the object alone is a slice of it.

use std::{collections::BTreeMap, sync::OnceLock};

use bytes::{BufMut, Bytes, BytesMut};
use orlop_store::Revision;
use serde::Deserialize;
use serde_json::Value;

use crate::{resources::Resource, status::Status};

const METADATA: &[u8] = b"\"metadata\":{";

/// The kind of a watch event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventType {
    /// The object came into view.
    Added,
    /// It changed.
    Modified,
    /// It went out of view.
    Deleted,
    /// Only tells a resource version.
    Bookmark,
    /// A Status; the watch ends.
    Error,
}

impl EventType {
    /// The name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            EventType::Added => "ADDED",
            EventType::Modified => "MODIFIED",
            EventType::Deleted => "DELETED",
            EventType::Bookmark => "BOOKMARK",
            EventType::Error => "ERROR",
        }
    }

    fn head(self) -> &'static [u8] {
        match self {
            EventType::Added => b"{\"type\":\"ADDED\",\"object\":",
            EventType::Modified => b"{\"type\":\"MODIFIED\",\"object\":",
            EventType::Deleted => b"{\"type\":\"DELETED\",\"object\":",
            EventType::Bookmark => b"{\"type\":\"BOOKMARK\",\"object\":",
            EventType::Error => b"{\"type\":\"ERROR\",\"object\":",
        }
    }
}

/// A watch event around any serialised object.
pub fn frame(event: EventType, object: &[u8]) -> Bytes {
    let head = event.head();
    let mut out = BytesMut::with_capacity(head.len() + object.len() + 2);
    out.put_slice(head);
    out.put_slice(object);
    out.put_slice(b"}\n");
    out.freeze()
}

/// One version of one object.
#[derive(Debug)]
pub struct Object {
    /// The revision that made it (or deleted it).
    pub revision: Revision,
    event: EventType,
    frame: Bytes,
    head: OnceLock<Head>,
    fields: OnceLock<Box<[String]>>,
}

/// What selectors look at.
#[derive(Debug, Default, Deserialize)]
struct Head {
    metadata: HeadMeta,
}

#[derive(Debug, Default, Deserialize)]
struct HeadMeta {
    #[serde(default)]
    name: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

impl Object {
    /// From stored bytes.
    ///
    /// # Errors
    /// 500 when the bytes are not what this module stores.
    pub fn from_stored(stored: &[u8], revision: Revision, event: EventType) -> Result<Object, Status> {
        let at = stored
            .windows(METADATA.len())
            .position(|w| w == METADATA)
            .ok_or_else(|| Status::internal("a stored object has no metadata"))?;
        let (before, after) = stored.split_at(at + METADATA.len());
        let head = event.head();
        let mut digits = [0u8; 20];
        let number = decimal(revision, &mut digits);
        let mut out = BytesMut::with_capacity(head.len() + stored.len() + 48);
        out.put_slice(head);
        out.put_slice(before);
        out.put_slice(b"\"resourceVersion\":\"");
        out.put_slice(number);
        out.put_slice(if after.first() == Some(&b'}') { b"\"" } else { b"\"," });
        out.put_slice(after);
        out.put_slice(b"}\n");
        Ok(Object { revision, event, frame: out.freeze(), head: OnceLock::new(), fields: OnceLock::new() })
    }

    /// The same object as of another revision: what a deletion shows.
    pub fn at_revision(&self, revision: Revision, event: EventType) -> Result<Object, Status> {
        let mut value = self.value()?;
        let stored = to_stored(&mut value);
        Object::from_stored(&stored, revision, event)
    }

    /// The serialised object.
    pub fn bytes(&self) -> Bytes {
        self.frame.slice(self.event.head().len()..self.frame.len() - 2)
    }

    /// The object as a watch event of the given kind.
    pub fn event(&self, event: EventType) -> Bytes {
        if event == self.event { self.frame.clone() } else { frame(event, &self.bytes()) }
    }

    /// The parsed object.
    ///
    /// # Errors
    /// 500 when it is damaged.
    pub fn value(&self) -> Result<Value, Status> {
        serde_json::from_slice(&self.bytes())
            .map_err(|e| Status::internal(format!("a stored object is damaged: {e}")))
    }

    fn head(&self) -> &HeadMeta {
        &self.head.get_or_init(|| serde_json::from_slice(&self.bytes()).unwrap_or_default()).metadata
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.head().name
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        &self.head().namespace
    }

    /// Its labels.
    pub fn labels(&self) -> &BTreeMap<String, String> {
        &self.head().labels
    }

    /// The value of the kind's selectable field number `index`; all are read at once and kept.
    pub fn field(&self, resource: &Resource, index: usize) -> &str {
        let fields = self.fields.get_or_init(|| {
            let value = self.value().unwrap_or_default();
            resource.strategy.selectable().iter().map(|path| resource.strategy.select(&value, path)).collect()
        });
        fields.get(index).map_or("", String::as_str)
    }

    /// Bytes of memory it takes, roughly.
    pub fn weight(&self) -> usize {
        self.frame.len() + 128
    }
}

fn decimal(mut n: u64, digits: &mut [u8; 20]) -> &[u8] {
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (n % 10) as u8;
        n /= 10;
        if n == 0 {
            return &digits[at..];
        }
    }
}

/// Serialises an object for the store: kind, version and metadata first, no resource version.
pub fn to_stored(object: &mut Value) -> Vec<u8> {
    crate::value::remove(object, "metadata.resourceVersion");
    let mut out = Vec::with_capacity(1024);
    out.push(b'{');
    let mut first = true;
    let Some(map) = object.as_object() else { return b"{}".to_vec() };
    let order = ["kind", "apiVersion", "metadata"];
    let rest = map.keys().map(String::as_str).filter(|k| !order.contains(k));
    for key in order.into_iter().chain(rest) {
        let Some(value) = map.get(key) else { continue };
        if !first {
            out.push(b',');
        }
        first = false;
        // Writing into a Vec cannot fail, and Value has only string keys.
        let _ = serde_json::to_writer(&mut out, key);
        out.push(b':');
        let _ = serde_json::to_writer(&mut out, value);
    }
    out.push(b'}');
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_revision_is_spliced_in_and_taken_out() {
        let mut v = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "resourceVersion": "3", "labels": {"x": "y"}}, "spec": {}});
        let stored = to_stored(&mut v);
        assert_eq!(
            std::str::from_utf8(&stored).expect("text"),
            r#"{"kind":"Pod","apiVersion":"v1","metadata":{"labels":{"x":"y"},"name":"a"},"spec":{}}"#
        );
        let o = Object::from_stored(&stored, 17, EventType::Modified).expect("object");
        assert_eq!(o.value().expect("json")["metadata"]["resourceVersion"], "17");
        assert_eq!((o.name(), o.labels()["x"].as_str()), ("a", "y"));
        let event: Value = serde_json::from_slice(&o.event(EventType::Added)).expect("json");
        assert_eq!(event["type"], "ADDED");
        assert_eq!(event["object"]["metadata"]["resourceVersion"], "17");
        let gone = o.at_revision(20, EventType::Deleted).expect("object");
        assert_eq!(gone.value().expect("json")["metadata"]["resourceVersion"], "20");
        let bare = Object::from_stored(br#"{"metadata":{}}"#, 5, EventType::Added).expect("object");
        assert_eq!(&bare.bytes()[..], br#"{"metadata":{"resourceVersion":"5"}}"#);
    }
}
