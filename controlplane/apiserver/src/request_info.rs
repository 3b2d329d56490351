//! What a request asks for, read from its method and URI alone: resource or not, which verb, which object.
//!
//! The rules are those of upstream's request-info resolver, because authorization policies are written against them:
//! `GET` without a name is `list`, or `watch` with `?watch=true`; a `metadata.name` field selector counts as the name;
//! `DELETE` without a name is `deletecollection`; `/watch/` and `/proxy/` as first segment are verbs of their own.

use std::collections::BTreeMap;

use http::{Method, Uri};

/// Who asks. The name is never empty: requests without credentials are `system:anonymous`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserInfo {
    pub name: String,
    pub uid: String,
    pub groups: Vec<String>,
    pub extra: BTreeMap<String, Vec<String>>,
}

impl UserInfo {
    /// The server itself, for requests that it makes in-process.
    pub fn apiserver() -> UserInfo {
        UserInfo {
            name: "system:apiserver".into(),
            groups: vec!["system:masters".into()],
            ..UserInfo::default()
        }
    }

    /// Whether the user belongs to `group`.
    pub fn in_group(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }
}

/// What a request asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestInfo {
    /// False for /version, /healthz, discovery and other paths that name no resource.
    pub is_resource_request: bool,
    pub path: String,
    /// get list watch create update patch delete deletecollection proxy; for non-resource requests the lower-case HTTP method.
    pub verb: String,
    /// "api" or "apis".
    pub api_prefix: String,
    /// Empty for the core group.
    pub api_group: String,
    pub api_version: String,
    /// Empty for cluster-scoped resources and for requests over all namespaces.
    pub namespace: String,
    pub resource: String,
    pub subresource: String,
    /// Empty when the request names no single object.
    pub name: String,
    /// The path after namespace resolution: resource, name, subresource and what follows it.
    pub parts: Vec<String>,
}

impl RequestInfo {
    /// Reads method and URI.
    ///
    /// # Errors
    /// A message for a 400 when a `/watch/` or `/proxy/` path names no resource.
    pub fn parse(method: &Method, uri: &Uri) -> Result<RequestInfo, String> {
        let path = uri.path();
        let mut info = RequestInfo {
            path: path.to_owned(),
            verb: method.as_str().to_ascii_lowercase(),
            ..RequestInfo::default()
        };
        let decoded: Vec<String> = path.split('/').filter(|s| !s.is_empty()).map(percent_decode).collect();
        let mut rest: &[String] = &decoded;
        if rest.len() < 3 || (rest[0] != "api" && rest[0] != "apis") {
            return Ok(info);
        }
        let grouped = rest[0] == "apis";
        if grouped && rest.len() < 4 {
            return Ok(info);
        }
        info.api_prefix = rest[0].clone();
        rest = &rest[1..];
        if grouped {
            info.api_group = rest[0].clone();
            rest = &rest[1..];
        }
        info.is_resource_request = true;
        info.api_version = rest[0].clone();
        rest = &rest[1..];

        match rest[0].as_str() {
            special @ ("proxy" | "watch") => {
                if rest.len() < 2 {
                    return Err(format!("unable to determine kind and namespace from url, {path}"));
                }
                info.verb = special.to_owned();
                rest = &rest[1..];
            }
            _ => {
                info.verb = match *method {
                    Method::POST => "create",
                    Method::GET | Method::HEAD => "get",
                    Method::PUT => "update",
                    Method::PATCH => "patch",
                    Method::DELETE => "delete",
                    _ => "",
                }
                .to_owned();
            }
        }
        if rest[0] == "namespaces" && rest.len() > 1 {
            info.namespace = rest[1].clone();
            if rest.len() > 2 && !matches!(rest[2].as_str(), "status" | "finalize") {
                rest = &rest[2..];
            }
        }
        info.parts = rest.to_vec();
        info.resource = rest[0].clone();
        if let Some(name) = rest.get(1) {
            info.name = name.clone();
        }
        // A legacy /proxy/ path has the target's path where others have the subresource.
        if info.verb != "proxy"
            && let Some(sub) = rest.get(2)
        {
            info.subresource = sub.clone();
        }
        if info.name.is_empty() {
            info.resolve_collection_verb(uri.query().unwrap_or_default());
        }
        Ok(info)
    }

    fn resolve_collection_verb(&mut self, query: &str) {
        match self.verb.as_str() {
            "get" => {
                let mut watch = false;
                for (key, value) in url::form_urlencoded::parse(query.as_bytes()) {
                    match key.as_ref() {
                        "watch" => {
                            watch = !matches!(value.as_ref(), "false" | "0" | "f" | "F" | "False" | "FALSE")
                        }
                        "fieldSelector" => {
                            if let Some(name) = exact_name(&value) {
                                self.name = name;
                            }
                        }
                        _ => {}
                    }
                }
                self.verb = if watch { "watch" } else { "list" }.to_owned();
            }
            "delete" => self.verb = "deletecollection".to_owned(),
            _ => {}
        }
    }

    /// Whether the answer may legitimately take longer than the request timeout.
    pub fn is_long_running(&self) -> bool {
        matches!(self.verb.as_str(), "watch" | "proxy")
            || (self.is_resource_request
                && matches!(self.subresource.as_str(), "attach" | "exec" | "proxy" | "log" | "portforward"))
    }

    /// Whether nothing can change by it.
    pub fn is_read_only(&self) -> bool {
        matches!(self.verb.as_str(), "get" | "list" | "watch" | "head" | "options")
    }

    /// "pods" or "pods/log", as RBAC rules spell it.
    pub fn resource_path(&self) -> String {
        if self.subresource.is_empty() {
            self.resource.clone()
        } else {
            format!("{}/{}", self.resource, self.subresource)
        }
    }

    /// The scope label of upstream's metrics: resource (one object), namespace, cluster, or empty.
    pub fn scope(&self) -> &'static str {
        if !self.is_resource_request {
            ""
        } else if !self.name.is_empty() || self.verb == "create" {
            "resource"
        } else if !self.namespace.is_empty() {
            "namespace"
        } else {
            "cluster"
        }
    }
}

/// The value that a field selector demands of metadata.name, when it is one that can be an object's name.
fn exact_name(selector: &str) -> Option<String> {
    selector.split(',').find_map(|term| {
        let (field, value) = term.split_once('=')?;
        if field.ends_with('!') || field.trim() != "metadata.name" {
            return None;
        }
        let value = value.strip_prefix('=').unwrap_or(value).trim();
        let bad = value.is_empty() || value == "." || value == ".." || value.contains(['/', '%']);
        (!bad).then(|| value.to_owned())
    })
}

/// Decodes %XX; bytes that are no UTF-8 become the replacement character, which no object's name contains.
fn percent_decode(segment: &str) -> String {
    if !segment.contains('%') {
        return segment.to_owned();
    }
    let bytes = segment.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let hex = |b: Option<&u8>| b.and_then(|b| (*b as char).to_digit(16));
        match (bytes[i], hex(bytes.get(i + 1)), hex(bytes.get(i + 2))) {
            (b'%', Some(high), Some(low)) => {
                out.push((high * 16 + low) as u8);
                i += 3;
            }
            (other, ..) => {
                out.push(other);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(method: &str, uri: &str) -> RequestInfo {
        RequestInfo::parse(&method.parse().unwrap(), &uri.parse().unwrap()).unwrap()
    }

    #[test]
    fn resource_requests() {
        // method, uri -> verb, group, version, namespace, resource, subresource, name
        let table = [
            ("GET", "/api/v1/namespaces/other/pods", "list", "", "v1", "other", "pods", "", ""),
            ("GET", "/api/v1/namespaces/other/pods?watch=true", "watch", "", "v1", "other", "pods", "", ""),
            ("GET", "/api/v1/namespaces/other/pods?watch=1", "watch", "", "v1", "other", "pods", "", ""),
            ("GET", "/api/v1/namespaces/other/pods?watch=false", "list", "", "v1", "other", "pods", "", ""),
            ("GET", "/api/v1/watch/namespaces/other/pods", "watch", "", "v1", "other", "pods", "", ""),
            (
                "GET",
                "/api/v1/proxy/namespaces/other/pods/foo/bar",
                "proxy",
                "",
                "v1",
                "other",
                "pods",
                "",
                "foo",
            ),
            ("GET", "/api/v1/namespaces/other/pods/foo/log", "get", "", "v1", "other", "pods", "log", "foo"),
            ("GET", "/api/v1/nodes/n1/proxy/stats/summary", "get", "", "v1", "", "nodes", "proxy", "n1"),
            ("GET", "/api/v1/namespaces", "list", "", "v1", "", "namespaces", "", ""),
            ("GET", "/api/v1/namespaces/other", "get", "", "v1", "other", "namespaces", "", "other"),
            (
                "PUT",
                "/api/v1/namespaces/other/finalize",
                "update",
                "",
                "v1",
                "other",
                "namespaces",
                "finalize",
                "other",
            ),
            (
                "PATCH",
                "/api/v1/namespaces/other/status",
                "patch",
                "",
                "v1",
                "other",
                "namespaces",
                "status",
                "other",
            ),
            (
                "DELETE",
                "/apis/apps/v1/namespaces/a/deployments",
                "deletecollection",
                "apps",
                "v1",
                "a",
                "deployments",
                "",
                "",
            ),
            (
                "DELETE",
                "/apis/apps/v1/namespaces/a/deployments/d",
                "delete",
                "apps",
                "v1",
                "a",
                "deployments",
                "",
                "d",
            ),
            (
                "POST",
                "/api/v1/namespaces/a/pods/p/exec?command=ls",
                "create",
                "",
                "v1",
                "a",
                "pods",
                "exec",
                "p",
            ),
            (
                "GET",
                "/api/v1/pods?fieldSelector=metadata.name%3Dfoo",
                "list",
                "",
                "v1",
                "",
                "pods",
                "",
                "foo",
            ),
            (
                "GET",
                "/api/v1/pods?fieldSelector=a%3Db,metadata.name%3D%3Dfoo&watch=true",
                "watch",
                "",
                "v1",
                "",
                "pods",
                "",
                "foo",
            ),
            ("GET", "/api/v1/pods?fieldSelector=metadata.name!%3Dfoo", "list", "", "v1", "", "pods", "", ""),
            ("GET", "/api/v1/pods?fieldSelector=metadata.name%3Da%2Fb", "list", "", "v1", "", "pods", "", ""),
            ("HEAD", "/api/v1/nodes/a%20b", "get", "", "v1", "", "nodes", "", "a b"),
        ];
        for (method, uri, verb, group, version, namespace, resource, sub, name) in table {
            let i = parse(method, uri);
            assert!(i.is_resource_request, "{uri}");
            assert_eq!(
                (i.verb.as_str(), i.api_group.as_str(), i.api_version.as_str(), i.namespace.as_str()),
                (verb, group, version, namespace),
                "{method} {uri}"
            );
            assert_eq!(
                (i.resource.as_str(), i.subresource.as_str(), i.name.as_str()),
                (resource, sub, name),
                "{method} {uri}"
            );
        }
    }

    #[test]
    fn non_resource_requests() {
        for uri in [
            "/",
            "/api",
            "/api/v1",
            "/apis",
            "/apis/apps",
            "/apis/apps/v1",
            "/version",
            "/healthz/ping/x/y",
            "//",
        ] {
            let i = parse("GET", uri);
            assert!(!i.is_resource_request, "{uri}");
            assert_eq!(i.verb, "get");
        }
        assert!(RequestInfo::parse(&Method::GET, &"/api/v1/watch".parse().unwrap()).is_err());
    }

    #[test]
    fn long_running() {
        assert!(parse("GET", "/api/v1/pods?watch=1").is_long_running());
        assert!(parse("GET", "/api/v1/namespaces/a/pods/p/log").is_long_running());
        assert!(!parse("GET", "/api/v1/namespaces/a/pods/p").is_long_running());
    }
}
