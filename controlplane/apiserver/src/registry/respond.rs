//! Answers: objects and lists in the shape and encoding that the client accepts.

use std::{collections::VecDeque, io::Write as _, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use orlop_store::Revision;
use serde_json::{Value, json};

use super::{Body, object::Object};
use crate::{
    codec::{Encoding, Shape},
    protobuf,
    resources::Resource,
    status::Status,
    table, value,
};

/// Answers larger than this are compressed for clients that accept it, as upstream does.
const COMPRESS_FROM: u64 = 128 << 10;

/// What the client accepts.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Objects, table or metadata only.
    pub shape: Shape,
    /// How bytes are written.
    pub encoding: Encoding,
    /// Whether gzip is accepted.
    pub gzip: bool,
    /// What a table's rows carry: `None`, `Metadata` or `Object`.
    pub include: table::Include,
}

/// The serialised object as the version and shape that is wanted.
pub fn served(resource: &Resource, object: &Object, wanted: &Wanted) -> Result<Bytes, Status> {
    if wanted.shape == Shape::Objects && resource.conversion.is_none() {
        return Ok(object.bytes());
    }
    let mut v = object.value()?;
    if let Some(conversion) = &resource.conversion {
        (conversion.serve)(&mut v);
    }
    let v = match wanted.shape {
        Shape::Objects => v,
        Shape::Partial => partial(&v),
        Shape::Table => {
            let mut table = table::table(resource, &[v], wanted.include);
            value::set(&mut table, "metadata.resourceVersion", object.revision.to_string());
            table
        }
    };
    to_json(&v)
}

/// `PartialObjectMetadata` of an object.
pub fn partial(v: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": v.get("metadata").cloned().unwrap_or_default()})
}

pub(super) fn to_json(v: &Value) -> Result<Bytes, Status> {
    serde_json::to_vec(v).map(Bytes::from).map_err(Status::internal)
}

/// An answer with one object.
pub fn object(
    resource: &Resource,
    object: &Object,
    code: StatusCode,
    wanted: &Wanted,
) -> Result<Response<Body>, Status> {
    let bytes = served(resource, object, wanted)?;
    finish(Body::from(bytes), code, wanted)
}

/// An answer with a value that is not stored in this form.
pub fn plain(v: &Value, code: StatusCode, wanted: &Wanted) -> Result<Response<Body>, Status> {
    finish(Body::from(to_json(v)?), code, wanted)
}

/// The metadata of a list.
#[derive(Clone, Debug, Default)]
pub struct ListMeta {
    /// State shown.
    pub revision: Revision,
    /// Token for the rest.
    pub next: String,
    /// How many objects the rest has, when that is known.
    pub remaining: Option<u64>,
}

/// An answer with a list.
pub fn list(
    resource: &Resource,
    objects: &[Arc<Object>],
    meta: &ListMeta,
    wanted: &Wanted,
) -> Result<Response<Body>, Status> {
    let mut list_meta = json!({"resourceVersion": meta.revision.to_string()});
    if !meta.next.is_empty() {
        list_meta["continue"] = json!(meta.next);
    }
    if let Some(n) = meta.remaining {
        list_meta["remainingItemCount"] = json!(n);
    }
    if wanted.shape == Shape::Table {
        let mut values = Vec::with_capacity(objects.len());
        for object in objects {
            let mut v = object.value()?;
            if let Some(conversion) = &resource.conversion {
                (conversion.serve)(&mut v);
            }
            values.push(v);
        }
        let mut table = table::table(resource, &values, wanted.include);
        value::set(&mut table, "metadata", list_meta);
        return plain(&table, StatusCode::OK, wanted);
    }
    let (kind, version) = match wanted.shape {
        Shape::Partial => ("PartialObjectMetadataList".to_owned(), "meta.k8s.io/v1".to_owned()),
        _ => (resource.list_kind.to_string(), resource.api_version()),
    };
    if wanted.encoding == Encoding::Protobuf
        && let Some(chunks) = binary_list(resource, objects, (&version, &kind), &list_meta, wanted)?
    {
        return send(Body::Chunks(chunks), StatusCode::OK, wanted);
    }
    // A list is in one encoding: what could not be written as protobuf is JSON as a whole.
    let encoding = if wanted.encoding == Encoding::Protobuf { Encoding::Json } else { wanted.encoding };
    let wanted = &Wanted { encoding, ..*wanted };
    let head = format!(
        "{{\"kind\":{},\"apiVersion\":{},\"metadata\":{list_meta},\"items\":[",
        Value::from(kind),
        Value::from(version)
    );
    let mut chunks = VecDeque::with_capacity(2 * objects.len() + 2);
    chunks.push_back(Bytes::from(head));
    for (i, object) in objects.iter().enumerate() {
        if i > 0 {
            chunks.push_back(Bytes::from_static(b","));
        }
        chunks.push_back(served(resource, object, wanted)?);
    }
    chunks.push_back(Bytes::from_static(b"]}\n"));
    finish(Body::Chunks(chunks), StatusCode::OK, wanted)
}

/// A list in protobuf; `None` when something of it has no such form.
fn binary_list(
    resource: &Resource,
    objects: &[Arc<Object>],
    (version, kind): (&str, &str),
    metadata: &Value,
    wanted: &Wanted,
) -> Result<Option<VecDeque<Bytes>>, Status> {
    let item_kind = kind.strip_suffix("List").unwrap_or(kind);
    let Ok(mut list) = protobuf::List::new(version, kind, item_kind, metadata) else { return Ok(None) };
    for object in objects {
        let v: Value =
            serde_json::from_slice(&served(resource, object, wanted)?).map_err(Status::internal)?;
        if let Err(error) = list.push(&v) {
            tracing::warn!(%error, kind = %resource.kind, "a stored object has no protobuf form");
            return Ok(None);
        }
    }
    Ok(Some(list.finish().into_iter().map(Bytes::from).collect()))
}

/// An object's JSON as protobuf.
pub(super) fn to_protobuf(json: &[u8]) -> Result<Result<Vec<u8>, protobuf::Error>, Status> {
    let v: Value = serde_json::from_slice(json).map_err(Status::internal)?;
    Ok(protobuf::encode(&v))
}

/// An answer with JSON, in the wanted encoding.
fn finish(body: Body, code: StatusCode, wanted: &Wanted) -> Result<Response<Body>, Status> {
    let (Body::Chunks(chunks), Encoding::Yaml | Encoding::Protobuf) = (&body, wanted.encoding) else {
        return send(body, code, wanted);
    };
    let json = chunks.iter().map(|b| &b[..]).collect::<Vec<_>>().concat();
    if wanted.encoding == Encoding::Protobuf {
        return match to_protobuf(&json)? {
            Ok(bytes) => send(Body::from(bytes), code, wanted),
            Err(_) => send(body, code, &Wanted { encoding: Encoding::Json, ..*wanted }),
        };
    }
    let v: Value = serde_json::from_slice(&json).map_err(Status::internal)?;
    send(Body::from(crate::codec::to_yaml(&v)?), code, wanted)
}

/// An answer with a body that is in the wanted encoding.
fn send(body: Body, code: StatusCode, wanted: &Wanted) -> Result<Response<Body>, Status> {
    let mut body = body;
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(wanted.encoding.media_type()));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    let size = http_body::Body::size_hint(&body).exact().unwrap_or(0);
    if wanted.gzip && size > COMPRESS_FROM {
        body = compress(body)?;
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        headers.insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
    }
    let mut response = Response::new(body);
    *response.status_mut() = code;
    *response.headers_mut() = headers;
    Ok(response)
}

fn compress(body: Body) -> Result<Body, Status> {
    let Body::Chunks(chunks) = body else { return Ok(body) };
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    for chunk in chunks {
        encoder.write_all(&chunk).map_err(Status::internal)?;
    }
    Ok(Body::from(encoder.finish().map_err(Status::internal)?))
}

/// Adds `Warning` headers.
pub fn warn(response: &mut Response<Body>, warnings: &[String]) {
    for text in warnings {
        let clean: String = text
            .chars()
            .filter(|c| !c.is_control())
            .collect::<String>()
            .replace('\\', "\\\\")
            .replace('"', "\\\"");
        if let Ok(v) = HeaderValue::from_str(&format!("299 - \"{clean}\"")) {
            response.headers_mut().append(header::WARNING, v);
        }
    }
}
