//! Encodings: which one a request body has and which one the client accepts. JSON, YAML and protobuf come in and go out.

use http::{HeaderMap, header};
use serde_json::Value;

use crate::{protobuf, status::Status};

/// What the client wants objects turned into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// The objects themselves.
    Objects,
    /// `meta.k8s.io/v1 Table`.
    Table,
    /// `meta.k8s.io/v1 PartialObjectMetadata(List)`.
    Partial,
}

/// How bytes are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// application/json
    Json,
    /// application/yaml
    Yaml,
    /// application/vnd.kubernetes.protobuf; JSON for what has no such form.
    Protobuf,
}

impl Encoding {
    /// The media type.
    pub fn media_type(self) -> &'static str {
        match self {
            Encoding::Json => "application/json",
            Encoding::Yaml => "application/yaml",
            Encoding::Protobuf => protobuf::MEDIA_TYPE,
        }
    }
}

/// One entry of an Accept header.
#[derive(Clone, Debug, Default)]
pub struct MediaRange {
    /// `type/subtype` in lower case.
    pub media: String,
    /// Parameters.
    pub params: Vec<(String, String)>,
}

impl MediaRange {
    /// The value of a parameter, empty when absent.
    pub fn param(&self, name: &str) -> &str {
        self.params.iter().find(|(k, _)| k == name).map_or("", |(_, v)| v)
    }
}

/// The entries of a header such as Accept, best first.
pub fn media_ranges(text: &str) -> Vec<MediaRange> {
    let mut ranges: Vec<(u32, MediaRange)> = text
        .split(',')
        .filter(|part| !part.trim().is_empty())
        .map(|part| {
            let mut words = part.split(';').map(str::trim);
            let media = words.next().unwrap_or("").to_ascii_lowercase();
            let params: Vec<(String, String)> = words
                .filter_map(|w| w.split_once('='))
                .map(|(k, v)| (k.trim().into(), v.trim().trim_matches('"').into()))
                .collect();
            let range = MediaRange { media, params };
            let quality = range.param("q").parse::<f32>().unwrap_or(1.0);
            ((quality * 1000.0) as u32, range)
        })
        .collect();
    ranges.sort_by_key(|(quality, _)| std::cmp::Reverse(*quality));
    ranges.into_iter().map(|(_, r)| r).collect()
}

/// The Accept header's entries.
pub fn accepted(headers: &HeaderMap) -> Vec<MediaRange> {
    let all: Vec<&str> = headers.get_all(header::ACCEPT).iter().filter_map(|v| v.to_str().ok()).collect();
    media_ranges(&all.join(","))
}

/// Chooses shape and encoding.
///
/// # Errors
/// 406 when nothing acceptable can be produced.
pub fn negotiate(headers: &HeaderMap) -> Result<(Shape, Encoding), Status> {
    let ranges = accepted(headers);
    if ranges.is_empty() {
        return Ok((Shape::Objects, Encoding::Json));
    }
    for range in &ranges {
        let encoding = match range.media.as_str() {
            "application/json" | "*/*" | "application/*" => Encoding::Json,
            "application/yaml" => Encoding::Yaml,
            protobuf::MEDIA_TYPE => Encoding::Protobuf,
            _ => continue,
        };
        let shape = match (range.param("as"), range.param("g"), range.param("v")) {
            ("", _, _) => Shape::Objects,
            // Cells have no protobuf form.
            ("Table", "meta.k8s.io", "v1") if encoding != Encoding::Protobuf => Shape::Table,
            ("PartialObjectMetadata" | "PartialObjectMetadataList", "meta.k8s.io", "v1") => Shape::Partial,
            _ => continue,
        };
        return Ok((shape, encoding));
    }
    Err(Status::not_acceptable(
        "only the following media types are accepted: application/json, application/yaml, application/vnd.kubernetes.protobuf",
    ))
}

/// The media type of the body, without parameters.
pub fn content_type(headers: &HeaderMap) -> String {
    let text = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("");
    text.split(';').next().unwrap_or("").trim().to_ascii_lowercase()
}

/// A decoded body, with the fields that it holds twice.
#[derive(Debug, Default)]
pub struct Decoded {
    /// The object.
    pub value: Value,
    /// Paths of keys that occur more than once in their object.
    pub duplicates: Vec<String>,
}

/// Decodes a JSON, YAML or protobuf body.
///
/// # Errors
/// 400 for what cannot be parsed, 415 for other encodings.
pub fn decode(headers: &HeaderMap, body: &[u8]) -> Result<Decoded, Status> {
    match content_type(headers).as_str() {
        "" | "application/json" => json(body),
        "application/yaml" | "application/x-yaml" | "text/yaml" => yaml(body),
        protobuf::MEDIA_TYPE => binary(body),
        other => Err(Status::unsupported_media_type(format!(
            "the body of the request was in an unknown format - accepted media types include: application/json, application/yaml, application/vnd.kubernetes.protobuf; got {other}"
        ))),
    }
}

fn binary(body: &[u8]) -> Result<Decoded, Status> {
    let value = protobuf::decode(body).map_err(|e| match e {
        protobuf::Error::Kind { .. } => Status::unsupported_media_type(e.to_string()),
        e => Status::bad_request(format!("couldn't decode the protobuf body: {e}")),
    })?;
    Ok(Decoded { value, duplicates: Vec::new() })
}

fn json(body: &[u8]) -> Result<Decoded, Status> {
    let mut duplicates = Duplicates::default();
    let value = duplicates
        .read(body)
        .map_err(|e| Status::bad_request(format!("couldn't get version/kind; json parse error: {e}")))?;
    Ok(Decoded { value, duplicates: duplicates.found })
}

/// Decodes YAML.
///
/// # Errors
/// 400 for what cannot be parsed.
pub fn yaml(body: &[u8]) -> Result<Decoded, Status> {
    let value: Value = serde_saphyr::from_slice(body)
        .map_err(|e| Status::bad_request(format!("error parsing the body as YAML: {e}")))?;
    Ok(Decoded { value, duplicates: Vec::new() })
}

/// Encodes a value as YAML.
///
/// # Errors
/// 500 when the encoder refuses it.
pub fn to_yaml(value: &Value) -> Result<Vec<u8>, Status> {
    serde_saphyr::to_string(value).map(String::into_bytes).map_err(Status::internal)
}

/// Reads JSON and notes duplicate keys, of which the last one counts.
#[derive(Default)]
struct Duplicates {
    path: String,
    found: Vec<String>,
}

impl Duplicates {
    fn read(&mut self, body: &[u8]) -> Result<Value, serde_json::Error> {
        use serde::de::DeserializeSeed;
        let mut de = serde_json::Deserializer::from_slice(body);
        let value = Seed(self).deserialize(&mut de)?;
        de.end()?;
        Ok(value)
    }
}

struct Seed<'a>(&'a mut Duplicates);

impl<'de> serde::de::DeserializeSeed<'de> for Seed<'_> {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> Result<Value, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> serde::de::Visitor<'de> for Seed<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(Value::from(v))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(Value::from(v))
    }

    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(Value::from(v))
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::from(v))
    }

    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(Value::String(v))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        let depth = self.0.path.len();
        loop {
            self.0.path.push_str(&format!("[{}]", items.len()));
            let item = seq.next_element_seed(Seed(self.0))?;
            self.0.path.truncate(depth);
            match item {
                Some(v) => items.push(v),
                None => return Ok(Value::Array(items)),
            }
        }
    }

    fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut out = serde_json::Map::new();
        let depth = self.0.path.len();
        while let Some(key) = map.next_key::<String>()? {
            if depth > 0 {
                self.0.path.push('.');
            }
            self.0.path.push_str(&key);
            let value = map.next_value_seed(Seed(self.0))?;
            if out.insert(key, value).is_some() {
                let path = self.0.path.clone();
                self.0.found.push(path);
            }
            self.0.path.truncate(depth);
        }
        Ok(Value::Object(out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn negotiation_follows_the_client() {
        let case = |accept: &'static str| {
            let mut h = HeaderMap::new();
            h.insert(header::ACCEPT, HeaderValue::from_static(accept));
            negotiate(&h).map_err(|s| s.code)
        };
        assert_eq!(
            case(
                "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json"
            ),
            Ok((Shape::Table, Encoding::Json))
        );
        assert_eq!(
            case("application/vnd.kubernetes.protobuf, application/json"),
            Ok((Shape::Objects, Encoding::Protobuf))
        );
        assert_eq!(case("application/yaml"), Ok((Shape::Objects, Encoding::Yaml)));
        assert_eq!(case("text/html;q=0.5, */*;q=0.1"), Ok((Shape::Objects, Encoding::Json)));
        assert_eq!(case("application/vnd.kubernetes.protobuf;as=Table;v=v1;g=meta.k8s.io"), Err(406));
        assert_eq!(
            case("application/vnd.kubernetes.protobuf;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"),
            Ok((Shape::Partial, Encoding::Protobuf))
        );
    }

    #[test]
    fn duplicate_keys_are_noted_and_the_last_one_counts() {
        let d = json(br#"{"a": {"b": 1, "b": 2}, "l": [{"x": 1, "x": null}]}"#).expect("json");
        assert_eq!(d.duplicates, ["a.b", "l[0].x"]);
        assert_eq!(d.value["a"]["b"], 2);
        assert!(json(b"{} x").is_err());
        assert!(json(b"{\"a\":").is_err());
    }

    #[test]
    fn yaml_is_read_with_json_types() {
        let d = yaml(b"a: 1\nb: \"1\"\nc: [true, null]\nd: |\n  x\n").expect("yaml");
        assert_eq!(d.value, serde_json::json!({"a": 1, "b": "1", "c": [true, null], "d": "x\n"}));
    }
}
