//! Discovery: which groups, versions and resources there are, in the legacy form and in the aggregated one.

use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use serde_json::{Value, json};

use crate::{
    codec,
    registry::Body,
    resources::{Resource, ResourceTable},
    status::Status,
};

/// Answers `/api`, `/apis` and what is below them without naming a resource.
///
/// # Errors
/// 404 for groups and versions that are not served, 406.
pub fn answer(
    table: &ResourceTable,
    path: &str,
    headers: &HeaderMap,
) -> Result<Option<Response<Body>>, Status> {
    let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
    let aggregated =
        codec::accepted(headers).iter().find(|r| r.media == "application/json").is_some_and(|r| {
            r.param("g") == "apidiscovery.k8s.io"
                && r.param("as") == "APIGroupDiscoveryList"
                && r.param("v") == "v2"
        });
    let value = match parts.as_slice() {
        ["api"] if aggregated => return aggregate(table, true).map(Some),
        ["apis"] if aggregated => return aggregate(table, false).map(Some),
        ["api"] => json!({
            "kind": "APIVersions", "versions": ["v1"],
            "serverAddressByClientCIDRs": [],
        }),
        ["apis"] => {
            let groups: Vec<Value> =
                groups(table).iter().filter(|g| !g.is_empty()).map(|g| group(table, g, false)).collect();
            json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        }
        ["api", version] => resource_list(table, "", version)?,
        ["apis", name] => {
            if !groups(table).iter().any(|g| g == name) {
                return Err(Status::no_such_path());
            }
            group(table, name, true)
        }
        ["apis", name, version] => resource_list(table, name, version)?,
        _ => return Ok(None),
    };
    respond(&value, "application/json").map(Some)
}

fn respond(value: &Value, media: &'static str) -> Result<Response<Body>, Status> {
    let bytes = serde_json::to_vec(value).map_err(Status::internal)?;
    let mut response = Response::new(Body::from(bytes));
    *response.status_mut() = StatusCode::OK;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media));
    headers.insert(header::VARY, HeaderValue::from_static("Accept"));
    Ok(response)
}

/// Group names in the order of the table.
fn groups(table: &ResourceTable) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for r in table.rows() {
        if !all.iter().any(|g| *g == r.group) {
            all.push(r.group.to_string());
        }
    }
    all
}

fn versions(table: &ResourceTable, group: &str) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for r in table.rows().iter().filter(|r| r.group == group) {
        if !all.iter().any(|v| *v == r.version) {
            all.push(r.version.to_string());
        }
    }
    all
}

fn group(table: &ResourceTable, name: &str, top: bool) -> Value {
    let versions: Vec<Value> = versions(table, name)
        .iter()
        .map(|v| json!({"groupVersion": format!("{name}/{v}"), "version": v}))
        .collect();
    let mut out = json!({"name": name, "preferredVersion": versions.first(), "versions": versions});
    if top {
        out["kind"] = "APIGroup".into();
        out["apiVersion"] = "v1".into();
    }
    out
}

fn rows<'a>(
    table: &'a ResourceTable,
    group: &'a str,
    version: &'a str,
) -> impl Iterator<Item = &'a Resource> {
    table.rows().iter().map(|r| &**r).filter(move |r| r.group == group && r.version == version)
}

/// A number that changes when stored objects of a resource change their form; clients use it to tell versions apart.
fn storage_hash(r: &Resource) -> String {
    use base64::Engine;
    use sha2::{Digest, Sha256};
    let digest = Sha256::digest(format!("{}|{}|{}", r.storage, r.stored_as.0, r.stored_as.1));
    base64::engine::general_purpose::STANDARD.encode(&digest[..8])
}

fn resource_list(table: &ResourceTable, group: &str, version: &str) -> Result<Value, Status> {
    let mut resources = Vec::new();
    for r in rows(table, group, version) {
        let mut entry = json!({
            "name": r.plural, "singularName": r.singular, "namespaced": r.namespaced, "kind": r.kind, "verbs": r.verbs,
        });
        if !r.short_names.is_empty() {
            entry["shortNames"] = json!(r.short_names);
        }
        if !r.categories.is_empty() {
            entry["categories"] = json!(r.categories);
        }
        if r.serves("list") {
            entry["storageVersionHash"] = storage_hash(r).into();
        }
        resources.push(entry);
        for s in subresources(r) {
            let mut entry = json!({"name": format!("{}/{}", r.plural, s.name), "singularName": "", "namespaced": r.namespaced, "kind": s.kind, "verbs": s.verbs});
            if !s.version.is_empty() {
                entry["group"] = s.group.clone().into();
                entry["version"] = s.version.clone().into();
            }
            resources.push(entry);
        }
    }
    if resources.is_empty() {
        return Err(Status::no_such_path());
    }
    let group_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    Ok(
        json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources}),
    )
}

struct Sub {
    name: String,
    group: String,
    version: String,
    kind: String,
    verbs: Vec<&'static str>,
}

fn subresources(r: &Resource) -> Vec<Sub> {
    let mut all: Vec<Sub> = r
        .subresources()
        .into_iter()
        .map(|e| Sub {
            name: e.name.into(),
            group: e.group.into(),
            version: e.version.into(),
            kind: e.kind.into(),
            verbs: e.verbs.to_vec(),
        })
        .collect();
    if r.status {
        all.push(Sub {
            name: "status".into(),
            group: String::new(),
            version: String::new(),
            kind: r.kind.to_string(),
            verbs: vec!["get", "patch", "update"],
        });
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

/// `apidiscovery.k8s.io/v2`: everything in one answer.
fn aggregate(table: &ResourceTable, core: bool) -> Result<Response<Body>, Status> {
    let items: Vec<Value> = groups(table)
        .iter()
        .filter(|g| g.is_empty() == core)
        .map(|g| {
            let versions: Vec<Value> = versions(table, g)
                .iter()
                .map(|v| {
                    let resources: Vec<Value> = rows(table, g, v).map(aggregated_resource).collect();
                    json!({"version": v, "freshness": "Current", "resources": resources})
                })
                .collect();
            let metadata = if core {
                json!({"creationTimestamp": null})
            } else {
                json!({"name": g, "creationTimestamp": null})
            };
            json!({"metadata": metadata, "versions": versions})
        })
        .collect();
    let list = json!({"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items});
    respond(&list, "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList")
}

fn aggregated_resource(r: &Resource) -> Value {
    let kind =
        |group: &str, version: &str, kind: &str| json!({"group": group, "version": version, "kind": kind});
    let mut out = json!({
        "resource": r.plural,
        "responseKind": kind(&r.group, &r.version, &r.kind),
        "scope": if r.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": r.singular,
        "verbs": r.verbs,
    });
    if !r.short_names.is_empty() {
        out["shortNames"] = json!(r.short_names);
    }
    if !r.categories.is_empty() {
        out["categories"] = json!(r.categories);
    }
    let subs: Vec<Value> = subresources(r)
        .iter()
        .map(|s| {
            let response = if s.version.is_empty() {
                kind(&r.group, &r.version, &s.kind)
            } else {
                kind(&s.group, &s.version, &s.kind)
            };
            json!({"subresource": s.name, "responseKind": response, "verbs": s.verbs})
        })
        .collect();
    if !subs.is_empty() {
        out["subresources"] = subs.into();
    }
    out
}
