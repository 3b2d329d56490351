//! Kubernetes' protobuf encoding: `k8s\0`, then `runtime.Unknown` around an object. Typed clients (kubectl's create commands, client-go of
//! the kubelet and of controllers) prefer it. One table tells numbers and JSON names, so every kind is read and written by the same code.

mod decode;
mod encode;
mod table;

#[cfg(test)]
mod tests;

use serde_json::Value;

use table::Table;

/// The content type of the envelope.
pub const MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf";
/// The content type of watches: events with their length before them.
pub const WATCH_MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf;stream=watch";
const MAGIC: &[u8] = b"k8s\0";
/// Only schemas nest without end; each of their levels takes two of these.
const MAX_DEPTH: usize = 96;

/// Why something is not read or written in this form.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Other bytes.
    #[error("the protobuf envelope's magic bytes are missing")]
    Magic,
    /// A kind that has no protobuf form, such as a custom resource.
    #[error("kind {kind:?} of {version:?} has no protobuf form here; send JSON")]
    Kind {
        /// Its apiVersion.
        version: String,
        /// Its kind.
        kind: String,
    },
    /// It ends within a field.
    #[error("the message is truncated")]
    Truncated,
    /// Groups or reserved types.
    #[error("unknown wire type {0}")]
    WireType(u64),
    /// Not a number, or too many bytes of one.
    #[error("a number is out of range")]
    Number,
    /// Not UTF-8.
    #[error("a text is not UTF-8")]
    Text,
    /// Not in years 1 to 9999.
    #[error("a time is out of range")]
    Time,
    /// Embedded JSON.
    #[error("embedded JSON cannot be read")]
    Json,
    /// Value and field do not fit.
    #[error("field {0:?} has a value of another type")]
    Field(&'static str),
    /// Messages in messages.
    #[error("nested too deeply")]
    Depth,
}

/// Reads an enveloped object.
///
/// # Errors
/// What is wrong with the bytes.
pub fn decode(body: &[u8]) -> Result<Value, Error> {
    decode::envelope(body, 0)
}

/// Whether objects of a kind can be written in this form.
pub fn knows(api_version: &str, kind: &str) -> bool {
    Table::get().kind(api_version, kind).is_some()
}

/// Writes an object, enveloped.
///
/// # Errors
/// For a kind without this form and for values that are not of their fields' types.
pub fn encode(object: &Value) -> Result<Vec<u8>, Error> {
    encode::object(object)
}

/// A list that is put together item by item, so that only its bytes are held as a whole.
#[derive(Debug)]
pub struct List {
    version: String,
    kind: String,
    item: u16,
    raw: Vec<u8>,
}

impl List {
    /// A list of objects of `item_kind`.
    ///
    /// # Errors
    /// As [`encode`].
    pub fn new(version: &str, kind: &str, item_kind: &str, metadata: &Value) -> Result<List, Error> {
        let find = |kind: &str| {
            Table::get()
                .kind(version, kind)
                .ok_or_else(|| Error::Kind { version: version.to_owned(), kind: kind.to_owned() })
        };
        let (list, item) = (find(kind)?, find(item_kind)?);
        let mut raw = Vec::new();
        let head = serde_json::Map::from_iter([("metadata".to_owned(), metadata.clone())]);
        encode::fields(&mut raw, list, &head, 0)?;
        Ok(List { version: version.to_owned(), kind: kind.to_owned(), item, raw })
    }

    /// Adds an object.
    ///
    /// # Errors
    /// As [`encode`].
    pub fn push(&mut self, object: &Value) -> Result<(), Error> {
        let mut item = Vec::new();
        encode::fields(&mut item, self.item, encode::map_of(object, "items")?, 0)?;
        // Items are field 2 of every list.
        encode::bytes(&mut self.raw, 2, &item);
        Ok(())
    }

    /// The envelope's start, its content and its end.
    pub fn finish(self) -> [Vec<u8>; 3] {
        let mut tail = Vec::new();
        encode::close(&mut tail);
        [encode::open(&self.version, &self.kind, self.raw.len()), self.raw, tail]
    }
}

/// A `WatchEvent` with its length before it, around an enveloped object.
pub fn frame(event: &str, object: &[u8]) -> Vec<u8> {
    let mut extension = Vec::with_capacity(object.len() + 8);
    encode::bytes(&mut extension, 1, object);
    let mut message = Vec::with_capacity(extension.len() + event.len() + 24);
    message.extend_from_slice(&[0; 4]);
    encode::bytes(&mut message, 1, event.as_bytes());
    encode::bytes(&mut message, 2, &extension);
    // Objects are limited to a few MiB by the store, far below what four bytes can tell.
    let length = u32::try_from(message.len() - 4).unwrap_or(u32::MAX);
    message[..4].copy_from_slice(&length.to_be_bytes());
    message
}
