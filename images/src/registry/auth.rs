//! Credentials, and what a `WWW-Authenticate` header asks for.

use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use crate::{Auth, Error, Result};

/// A challenge of RFC 7235, as far as registries use it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

/// The strongest challenge in a header that this client can answer.
pub(crate) fn parse_challenge(header: &str) -> Option<Challenge> {
    let lower = header.to_ascii_lowercase();
    if let Some(at) = find_scheme(&lower, "bearer") {
        let (mut realm, mut service, mut scope) = (None, None, None);
        for (key, value) in parameters(&header[at + "bearer".len()..]) {
            match key.to_ascii_lowercase().as_str() {
                "realm" => realm = realm.or(Some(value)),
                "service" => service = service.or(Some(value)),
                "scope" => scope = scope.or(Some(value)),
                _ => {}
            }
        }
        if let Some(realm) = realm {
            return Some(Challenge::Bearer { realm, service, scope });
        }
    }
    find_scheme(&lower, "basic").map(|_| Challenge::Basic)
}

fn find_scheme(lower: &str, scheme: &str) -> Option<usize> {
    let at = lower.find(scheme)?;
    let before = lower[..at].trim_end();
    let after = &lower[at + scheme.len()..];
    ((before.is_empty() || before.ends_with(',')) && (after.is_empty() || after.starts_with(' ')))
        .then_some(at)
}

/// `key="value"` or `key=value`, separated by commas; quoted values may hold commas and escaped quotes.
fn parameters(mut text: &str) -> Vec<(String, String)> {
    let mut out = Vec::new();
    loop {
        text = text.trim_start_matches([' ', ',', '\t']);
        let Some((key, rest)) = text.split_once('=') else { return out };
        if key.contains(' ') {
            return out; // The next scheme starts here.
        }
        let mut value = String::new();
        if let Some(quoted) = rest.strip_prefix('"') {
            let mut chars = quoted.char_indices();
            let mut end = quoted.len();
            while let Some((i, c)) = chars.next() {
                match c {
                    '"' => {
                        end = i + 1;
                        break;
                    }
                    '\\' => value.extend(chars.next().map(|(_, c)| c)),
                    c => value.push(c),
                }
            }
            text = &quoted[end..];
        } else {
            let end = rest.find(',').unwrap_or(rest.len());
            value.push_str(rest[..end].trim());
            text = &rest[end..];
        }
        out.push((key.to_owned(), value));
    }
}

pub(crate) fn basic(auth: &Auth) -> String {
    format!("Basic {}", STANDARD.encode(format!("{}:{}", auth.username, auth.password)))
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct DockerConfig {
    auths: std::collections::BTreeMap<String, DockerAuth>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct DockerAuth {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

/// The credentials of `authority` in a docker `config.json`; `None` when it or the file does not exist.
pub(crate) fn from_docker_config(path: &Path, authority: &str) -> Result<Option<Auth>> {
    let bytes = match std::fs::read(path) {
        Ok(b) => b,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io("read", path)(e)),
    };
    let bad = |why: String| Error::Config { path: path.to_owned(), why };
    let config: DockerConfig =
        serde_json::from_slice(&bytes).map_err(|e| bad(format!("not a docker config.json: {e}")))?;
    let Some((_, found)) = config.auths.into_iter().find(|(k, _)| same_server(k, authority)) else {
        return Ok(None);
    };
    let (mut username, mut password) = (found.username, found.password);
    if !found.auth.is_empty() {
        let text = STANDARD
            .decode(found.auth.trim_end_matches('\0'))
            .ok()
            .and_then(|b| String::from_utf8(b).ok())
            .ok_or_else(|| bad(format!("the auth of {authority} is not base64")))?;
        let (u, p) = text
            .split_once(':')
            .ok_or_else(|| bad(format!("the auth of {authority} is not user:password")))?;
        (username, password) = (u.to_owned(), p.trim_end_matches('\0').to_owned());
    }
    Ok(Some(Auth {
        username,
        password,
        identity_token: found.identitytoken,
        registry_token: found.registrytoken,
        server_address: authority.to_owned(),
    }))
}

/// Whether `address`, as people and docker write it (`https://index.docker.io/v1/`), means the host `authority`.
pub(crate) fn same_server(address: &str, authority: &str) -> bool {
    let host = address.split_once("://").map_or(address, |(_, rest)| rest);
    let host = host.split('/').next().unwrap_or_default();
    let canonical = |h: &str| match h {
        "docker.io" | "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
        h => h.to_ascii_lowercase(),
    };
    canonical(host) == canonical(authority)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges() {
        let bearer = |realm: &str, service: Option<&str>, scope: Option<&str>| {
            Some(Challenge::Bearer {
                realm: realm.into(),
                service: service.map(Into::into),
                scope: scope.map(Into::into),
            })
        };
        for (header, want) in [
            ("Basic realm=\"x\"", Some(Challenge::Basic)),
            ("basic", Some(Challenge::Basic)),
            (
                "Bearer realm=\"https://a/t\",service=\"r.io\",scope=\"repository:a/b:pull,push\"",
                bearer("https://a/t", Some("r.io"), Some("repository:a/b:pull,push")),
            ),
            ("Bearer realm=https://a/t, service=\"x\\\"y\"", bearer("https://a/t", Some("x\"y"), None)),
            ("Basic realm=\"r\", Bearer realm=\"https://a\"", bearer("https://a", None, None)),
            ("Bearer realm=\"https://a\", Basic realm=\"b\"", bearer("https://a", None, None)),
            ("Bearer", None),
            ("Negotiate", None),
            ("", None),
            ("Bearer realm=\"unfinished", bearer("unfinished", None, None)),
        ] {
            assert_eq!(parse_challenge(header), want, "{header}");
        }
    }

    #[test]
    fn docker_config() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        assert!(from_docker_config(&path, "quay.io").unwrap().is_none());
        std::fs::write(
            &path,
            r#"{"auths":{"https://index.docker.io/v1/":{"auth":"dTpwOnE="},"quay.io":{"username":"a","password":"b"}}}"#,
        )
        .unwrap();
        let hub = from_docker_config(&path, "registry-1.docker.io").unwrap().unwrap();
        assert_eq!((hub.username.as_str(), hub.password.as_str()), ("u", "p:q"));
        assert_eq!(from_docker_config(&path, "quay.io").unwrap().unwrap().username, "a");
        assert!(from_docker_config(&path, "gcr.io").unwrap().is_none());
        std::fs::write(&path, "{").unwrap();
        assert!(matches!(from_docker_config(&path, "quay.io"), Err(Error::Config { .. })));
    }
}
