//! OpenAPI documents, made from the schema when they are asked for and forgotten after that.
//!
//! Version 3 has one document for each group and version, found through an index with hashes; version 2 is one document.
//! What clients need of them: kubectl looks for `fieldValidation` and patch keys, and prints schemas for `explain`.

mod descriptions;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::OnceLock,
};

use http::{HeaderMap, HeaderValue, Response, Uri, header};
use serde::Serialize;
use serde_json::{
    Map, Value, json,
    value::{RawValue, to_raw_value},
};
use sha2::{Digest, Sha256};

use self::descriptions::{Words, unescape};
use crate::{
    codec,
    registry::Body,
    resources::{Resource, ResourceTable},
    schema::{self, Field, ListKind, Type, TypeDef},
    status::Status,
};

/// Its beginning: older clients write `@v1.0` after it.
const V2_PROTOBUF: &str = "application/com.github.proto-openapi.spec.v2";
const V2_PROTOBUF_FULL: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1";

/// The parts of a document by name, each written out as soon as it is made: as values they would be many times as large.
type Parts = BTreeMap<String, Box<RawValue>>;

fn part(value: Value) -> Result<Box<RawValue>, Status> {
    to_raw_value(&value).map_err(Status::internal)
}

#[derive(Serialize)]
struct Version2 {
    swagger: &'static str,
    info: Value,
    paths: Parts,
    definitions: Parts,
}

#[derive(Serialize)]
struct Version3 {
    openapi: &'static str,
    info: Value,
    paths: Parts,
    components: BTreeMap<&'static str, Parts>,
}

/// The two forms of documents.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    V2,
    V3,
}

impl Form {
    fn reference(self, name: &str) -> String {
        match self {
            Form::V2 => format!("#/definitions/{name}"),
            Form::V3 => format!("#/components/schemas/{name}"),
        }
    }
}

/// Answers `/openapi/…`.
///
/// # Errors
/// 404 for groups that are not served.
pub fn answer(
    table: &ResourceTable,
    path: &str,
    uri: &Uri,
    headers: &HeaderMap,
) -> Result<Option<Response<Body>>, Status> {
    let Some(rest) = path.strip_prefix("/openapi/") else { return Ok(None) };
    match rest {
        "v2" => {
            let accepted = codec::accepted(headers);
            if !accepted.is_empty() && accepted.iter().all(|r| r.media.starts_with(V2_PROTOBUF)) {
                return answer_bytes(v2_without_definitions(), V2_PROTOBUF_FULL, headers, false).map(Some);
            }
            respond(&v2(table)?, headers, false).map(Some)
        }
        "v3" => respond(&index(table), headers, false).map(Some),
        _ => {
            let Some(group_version) = rest.strip_prefix("v3/") else { return Err(Status::no_such_path()) };
            let (group, version) = match group_version.split('/').collect::<Vec<_>>()[..] {
                ["api", version] => ("", version),
                ["apis", group, version] => (group, version),
                _ => return Err(Status::no_such_path()),
            };
            let rows = rows(table, group, version);
            if rows.is_empty() {
                return Err(Status::no_such_path());
            }
            let hashed = uri.query().is_some_and(|q| q.contains(&format!("hash={}", hash(&rows))));
            respond(&v3(&rows, group_version)?, headers, hashed).map(Some)
        }
    }
}

/// `eternal`: the address holds the content's hash, so the answer never changes.
fn respond(document: &impl Serialize, headers: &HeaderMap, eternal: bool) -> Result<Response<Body>, Status> {
    let bytes = serde_json::to_vec(document).map_err(Status::internal)?;
    answer_bytes(bytes, "application/json", headers, eternal)
}

fn answer_bytes(
    bytes: Vec<u8>,
    media: &'static str,
    headers: &HeaderMap,
    eternal: bool,
) -> Result<Response<Body>, Status> {
    let etag = format!("\"{}\"", hex(&Sha256::digest(&bytes)));
    let known =
        headers.get(header::IF_NONE_MATCH).and_then(|v| v.to_str().ok()).is_some_and(|v| v.contains(&etag));
    let mut response = Response::new(if known { Body::empty() } else { Body::from(bytes) });
    if known {
        *response.status_mut() = http::StatusCode::NOT_MODIFIED;
    }
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media));
    if let Ok(etag) = HeaderValue::from_str(&etag) {
        headers.insert(header::ETAG, etag);
    }
    let caching = if eternal { "public, immutable" } else { "no-cache, private" };
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(caching));
    Ok(response)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02X}")).collect()
}

fn rows<'a>(table: &'a ResourceTable, group: &str, version: &str) -> Vec<&'a Resource> {
    table.rows().iter().map(|r| &**r).filter(|r| r.group == group && r.version == version).collect()
}

/// Stands for the schema and the words, which change only with the program.
fn schema_hash() -> &'static [u8] {
    static HASH: OnceLock<Vec<u8>> = OnceLock::new();
    HASH.get_or_init(|| {
        Sha256::new().chain_update(schema::TYPES).chain_update(descriptions::PACKED).finalize().to_vec()
    })
}

/// Changes when the resources of a group version or the schema change.
fn hash(rows: &[&Resource]) -> String {
    let mut digest = Sha256::new();
    digest.update(schema_hash());
    for r in rows {
        digest.update(format!("{}/{}/{};{:?};", r.plural, r.kind, r.namespaced, r.type_name));
    }
    hex(&digest.finalize()[..16])
}

fn index(table: &ResourceTable) -> Value {
    let mut paths = Map::new();
    for r in table.rows() {
        let path = if r.group.is_empty() {
            format!("api/{}", r.version)
        } else {
            format!("apis/{}/{}", r.group, r.version)
        };
        if !paths.contains_key(&path) {
            let url = format!("/openapi/v3/{path}?hash={}", hash(&rows(table, &r.group, &r.version)));
            paths.insert(path, json!({"serverRelativeURL": url}));
        }
    }
    json!({"paths": paths})
}

/// An `openapi.v2.Document` with `swagger`, `info` and no definitions. kubectl asks for this form only for a kind that version 3
/// does not have, finds that this one has it neither, and says that there is no such kind.
fn v2_without_definitions() -> Vec<u8> {
    let text = |number: u8, text: &str| {
        let mut field = vec![number << 3 | 2, text.len() as u8];
        field.extend_from_slice(text.as_bytes());
        field
    };
    let info = [text(1, "Kubernetes"), text(2, LEVEL)].concat();
    let mut document = text(1, "2.0");
    document.extend([2 << 3 | 2, info.len() as u8]);
    document.extend(info);
    document
}

/// The API level.
const LEVEL: &str = "v1.36.0";

fn info() -> Value {
    json!({"title": "Kubernetes", "version": LEVEL})
}

fn v3(rows: &[&Resource], group_version: &str) -> Result<Version3, Status> {
    let root = format!("/{group_version}");
    let mut paths = Parts::new();
    for r in rows {
        resource_paths(r, &root, Form::V3, &mut paths)?;
    }
    let components = BTreeMap::from([("schemas", definitions(rows, Form::V3)?)]);
    Ok(Version3 { openapi: "3.0.0", info: info(), paths, components })
}

fn v2(table: &ResourceTable) -> Result<Version2, Status> {
    let rows: Vec<&Resource> = table.rows().iter().map(|r| &**r).collect();
    let mut paths = Parts::new();
    for r in &rows {
        let root = if r.group.is_empty() {
            format!("/api/{}", r.version)
        } else {
            format!("/apis/{}/{}", r.group, r.version)
        };
        resource_paths(r, &root, Form::V2, &mut paths)?;
    }
    let definitions = definitions(&rows, Form::V2)?;
    Ok(Version2 { swagger: "2.0", info: info(), paths, definitions })
}

/// All types that the kinds reach.
fn definitions(rows: &[&Resource], form: Form) -> Result<Parts, Status> {
    let mut queue: Vec<&'static str> = rows.iter().filter_map(|r| r.type_name).collect();
    queue.extend(rows.iter().filter_map(|r| schema::type_of(&r.group, &r.version, &r.list_kind)));
    queue.extend([
        schema::lookup(&format!("{META}.DeleteOptions")).map_or("", |d| d.name),
        schema::lookup(&format!("{META}.Status")).map_or("", |d| d.name),
    ]);
    for r in rows {
        for e in r.subresources() {
            queue.extend(schema::type_of(
                if e.version.is_empty() { &r.group } else { e.group },
                if e.version.is_empty() { &r.version } else { e.version },
                e.kind,
            ));
        }
    }
    let mut seen = BTreeSet::new();
    let mut out = Parts::new();
    let text = descriptions::unpack();
    let words = descriptions::index(&text);
    while let Some(name) = queue.pop() {
        if name.is_empty() || !seen.insert(name) {
            continue;
        }
        let Some(def) = schema::lookup(name) else { continue };
        for field in &def.fields {
            if let Some(other) = reference(&field.ty) {
                queue.push(other);
            }
        }
        out.insert(name.to_owned(), part(definition(&def, words.get(name), form))?);
    }
    Ok(out)
}

fn reference(ty: &Type) -> Option<&'static str> {
    match ty {
        Type::List(t) | Type::Map(t) => reference(t),
        Type::Ref(name) => Some(name),
        _ => None,
    }
}

fn definition(def: &TypeDef, words: Option<&Words<'_>>, form: Form) -> Value {
    let mut out = match &def.alias {
        Some(alias) => type_schema(alias, form),
        None => {
            let mut properties = Map::new();
            for field in &def.fields {
                let mut property = property(field, form);
                if let Some(text) = words.and_then(|w| w.fields.get(field.name)) {
                    property["description"] = unescape(text).into();
                }
                properties.insert(field.name.to_owned(), property);
            }
            let required: Vec<&str> = def.fields.iter().filter(|f| f.required).map(|f| f.name).collect();
            let mut out = json!({"type": "object", "properties": properties});
            if !required.is_empty() {
                out["required"] = json!(required);
            }
            out
        }
    };
    if let Some(text) = words.map(|w| w.own).filter(|t| !t.is_empty()) {
        out["description"] = unescape(text).into();
    }
    if def.atomic {
        out["x-kubernetes-map-type"] = "atomic".into();
    }
    if let Some((group, version, kind)) = def.gvk {
        out["x-kubernetes-group-version-kind"] = json!([{"group": group, "version": version, "kind": kind}]);
    }
    out
}

fn property(field: &Field, form: Form) -> Value {
    let mut out = match (&field.ty, form) {
        // A bare reference could not carry the extensions below.
        (Type::Ref(name), Form::V3) => json!({"allOf": [{"$ref": form.reference(name)}]}),
        (ty, _) => type_schema(ty, form),
    };
    if matches!(field.ty, Type::List(_)) {
        match field.list {
            ListKind::Map(keys) => {
                out["x-kubernetes-list-type"] = "map".into();
                out["x-kubernetes-list-map-keys"] = json!(keys.split(',').collect::<Vec<_>>());
            }
            ListKind::Set => out["x-kubernetes-list-type"] = "set".into(),
            ListKind::Atomic => out["x-kubernetes-list-type"] = "atomic".into(),
        }
    } else if field.atomic {
        out["x-kubernetes-map-type"] = "atomic".into();
    }
    if !field.patch_strategy.is_empty() {
        out["x-kubernetes-patch-strategy"] = field.patch_strategy.into();
    }
    if !field.merge_key.is_empty() {
        out["x-kubernetes-patch-merge-key"] = field.merge_key.into();
    }
    out
}

fn type_schema(ty: &Type, form: Form) -> Value {
    match ty {
        Type::String => json!({"type": "string"}),
        Type::Int32 => json!({"type": "integer", "format": "int32"}),
        Type::Int64 => json!({"type": "integer", "format": "int64"}),
        Type::Number => json!({"type": "number", "format": "double"}),
        Type::Bool => json!({"type": "boolean"}),
        Type::Bytes => json!({"type": "string", "format": "byte"}),
        Type::Time => json!({"type": "string", "format": "date-time"}),
        Type::IntOrString if form == Form::V3 => {
            json!({"format": "int-or-string", "oneOf": [{"type": "integer"}, {"type": "string"}]})
        }
        Type::IntOrString => json!({"type": "string", "format": "int-or-string"}),
        Type::Quantity if form == Form::V3 => json!({"oneOf": [{"type": "string"}, {"type": "number"}]}),
        Type::Quantity => json!({"type": "string"}),
        Type::Object => json!({"type": "object"}),
        Type::Any => json!({}),
        Type::List(item) => json!({"type": "array", "items": type_schema(item, form)}),
        Type::Map(item) => json!({"type": "object", "additionalProperties": type_schema(item, form)}),
        Type::Ref(name) => json!({"$ref": form.reference(name)}),
    }
}

fn resource_paths(r: &Resource, root: &str, form: Form, paths: &mut Parts) -> Result<(), Status> {
    let all = format!("{root}/{}", r.plural);
    let scoped =
        if r.namespaced { format!("{root}/namespaces/{{namespace}}/{}", r.plural) } else { all.clone() };
    let gvk = json!({"group": r.group, "version": r.version, "kind": r.kind});
    let mut add = |path: &str, verbs: &[(&str, &str, &str)], suffix: &str| -> Result<(), Status> {
        let mut item = Map::new();
        for (verb, method, action) in verbs {
            if r.serves(verb) {
                item.insert((*method).to_owned(), operation(r, &gvk, verb, action, suffix, form));
            }
        }
        if !item.is_empty() {
            paths.insert(path.to_owned(), part(Value::Object(item))?);
        }
        Ok(())
    };
    if r.namespaced && r.serves("list") {
        add(&all, &[("list", "get", "list")], "ForAllNamespaces")?;
    }
    add(
        &scoped,
        &[
            ("list", "get", "list"),
            ("create", "post", "post"),
            ("deletecollection", "delete", "deletecollection"),
        ],
        "",
    )?;
    let one = format!("{scoped}/{{name}}");
    let verbs = [
        ("get", "get", "get"),
        ("update", "put", "put"),
        ("patch", "patch", "patch"),
        ("delete", "delete", "delete"),
    ];
    add(&one, &verbs, "One")?;
    if r.status {
        add(&format!("{one}/status"), &verbs[..3], "Status")?;
    }
    Ok(())
}

fn operation(r: &Resource, gvk: &Value, verb: &str, action: &str, suffix: &str, form: Form) -> Value {
    let parameter = |name: &str, ty: &str| match form {
        Form::V2 => json!({"name": name, "in": "query", "type": ty, "uniqueItems": true}),
        Form::V3 => json!({"name": name, "in": "query", "schema": {"type": ty, "uniqueItems": true}}),
    };
    let mut parameters = Vec::new();
    if matches!(verb, "create" | "update" | "patch") {
        parameters.extend([
            parameter("dryRun", "string"),
            parameter("fieldManager", "string"),
            parameter("fieldValidation", "string"),
        ]);
    }
    if verb == "patch" {
        parameters.push(parameter("force", "boolean"));
    }
    if verb == "list" {
        for name in ["continue", "fieldSelector", "labelSelector", "resourceVersion", "resourceVersionMatch"]
        {
            parameters.push(parameter(name, "string"));
        }
        parameters.extend([
            parameter("limit", "integer"),
            parameter("timeoutSeconds", "integer"),
            parameter("watch", "boolean"),
        ]);
    }
    let answer = match (verb, r.type_name) {
        ("list", _) => schema::type_of(&r.group, &r.version, &r.list_kind),
        ("delete" | "deletecollection", _) => schema::lookup(&format!("{META}.Status")).map(|d| d.name),
        (_, own) => own,
    };
    let reference =
        answer.map(|name| json!({"$ref": form.reference(name)})).unwrap_or_else(|| json!({"type": "object"}));
    let ok = match form {
        Form::V2 => json!({"description": "OK", "schema": reference}),
        Form::V3 => json!({"description": "OK", "content": {"application/json": {"schema": reference}}}),
    };
    json!({
        "operationId": format!("{action}{}{}{}{suffix}", r.group.replace('.', ""), r.version, r.kind),
        "parameters": parameters,
        "responses": {"200": ok},
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": gvk,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(path: &str) -> Value {
        let table = ResourceTable::builtin();
        let answer =
            answer(&table, path, &Uri::default(), &HeaderMap::new()).expect("served").expect("openapi");
        let Body::Chunks(chunks) = answer.into_body() else { panic!("a document is no stream") };
        serde_json::from_slice(&chunks.into_iter().collect::<Vec<_>>().concat()).expect("json")
    }

    #[test]
    fn every_reference_of_a_document_resolves() {
        fn check(v: &Value, definitions: &Map<String, Value>) {
            match v {
                Value::Object(map) => {
                    if let Some(name) =
                        map.get("$ref").and_then(Value::as_str).and_then(|r| r.rsplit('/').next())
                    {
                        assert!(definitions.contains_key(name), "{name}");
                    }
                    map.values().for_each(|v| check(v, definitions));
                }
                Value::Array(items) => items.iter().for_each(|v| check(v, definitions)),
                _ => {}
            }
        }
        let index = ask("/openapi/v3");
        for (path, _) in index["paths"].as_object().expect("paths") {
            let document = ask(&format!("/openapi/v3/{path}"));
            check(&document, document["components"]["schemas"].as_object().expect("schemas"));
        }
        let document = ask("/openapi/v2");
        check(&document, document["definitions"].as_object().expect("definitions"));
    }

    #[test]
    fn kubectl_finds_field_validation_and_patch_keys() {
        let document = ask("/openapi/v3/api/v1");
        let patch = &document["paths"]["/api/v1/namespaces/{namespace}/pods/{name}"]["patch"];
        assert_eq!(patch["x-kubernetes-group-version-kind"]["kind"], "Pod");
        assert!(
            patch["parameters"]
                .as_array()
                .expect("parameters")
                .iter()
                .any(|p| p["name"] == "fieldValidation")
        );
        let containers =
            &document["components"]["schemas"]["io.k8s.api.core.v1.PodSpec"]["properties"]["containers"];
        assert_eq!(containers["x-kubernetes-patch-merge-key"], "name");
    }

    #[test]
    fn version_2_in_protobuf_knows_no_kind() {
        let table = ResourceTable::builtin();
        let headers = HeaderMap::from_iter([(header::ACCEPT, HeaderValue::from_static(V2_PROTOBUF_FULL))]);
        let answer =
            answer(&table, "/openapi/v2", &Uri::default(), &headers).expect("served").expect("openapi");
        assert_eq!(answer.headers()[header::CONTENT_TYPE], V2_PROTOBUF_FULL);
        let Body::Chunks(chunks) = answer.into_body() else { panic!("a document is no stream") };
        let bytes = chunks.into_iter().collect::<Vec<_>>().concat();
        assert_eq!(bytes, b"\n\x032.0\x12\x15\n\nKubernetes\x12\x07v1.36.0");
    }

    #[test]
    fn fields_are_described_in_upstreams_words() {
        let document = ask("/openapi/v3/api/v1");
        let schemas = &document["components"]["schemas"];
        let probe = &schemas["io.k8s.api.core.v1.Probe"];
        assert_eq!(
            probe["properties"]["periodSeconds"]["description"],
            "How often (in seconds) to perform the probe. Default to 10 seconds. Minimum value is 1."
        );
        assert!(probe["description"].as_str().expect("words").starts_with("Probe describes a health check"));
        let pod = &schemas["io.k8s.api.core.v1.Pod"]["properties"];
        assert!(pod["kind"]["description"].as_str().expect("words").starts_with("Kind is a string value"));
        // Nearly nothing is left without words: items of lists, and types that are no part of upstream's documents.
        let (mut with, mut without) = (0, Vec::new());
        for (name, schema) in schemas.as_object().expect("schemas") {
            for (field, property) in schema["properties"].as_object().into_iter().flatten() {
                match property["description"] {
                    Value::String(_) => with += 1,
                    _ if field != "items" && field != "metadata" => without.push(format!("{name}.{field}")),
                    _ => {}
                }
            }
        }
        assert!(with > 1000 && without.len() * 50 < with, "{with} with, without: {without:?}");
    }
}
