//! Bootstrap tokens (`abcdef.0123456789abcdef`): secrets in kube-system with which a machine joins.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::Refused;
use crate::request_info::UserInfo;

/// Token id and secret, when the text has the form of a bootstrap token.
pub fn split(token: &str) -> Option<(&str, &str)> {
    let (id, secret) = token.split_once('.')?;
    let plain = |s: &str| s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    (id.len() == 6 && secret.len() == 16 && plain(id) && plain(secret)).then_some((id, secret))
}

/// Whether the token secret object vouches for the token at `now`, and for whom.
pub fn check(object: &Value, id: &str, secret: &str, now: jiff::Timestamp) -> Result<UserInfo, Refused> {
    let refuse = |why: &str| Err(Refused(format!("bootstrap token {id}: {why}")));
    let data = |key: &str| -> String {
        let raw = object.pointer(&format!("/data/{key}")).and_then(Value::as_str).unwrap_or_default();
        STANDARD.decode(raw).ok().and_then(|b| String::from_utf8(b).ok()).unwrap_or_default()
    };
    if object["type"] != "bootstrap.kubernetes.io/token" {
        return refuse("the secret is of another type");
    }
    if object.pointer("/metadata/deletionTimestamp").is_some() {
        return refuse("being deleted");
    }
    // Digests are compared so that the time taken says nothing about the secret.
    if data("token-id") != id || Sha256::digest(data("token-secret")) != Sha256::digest(secret) {
        return refuse("wrong secret");
    }
    let expiration = data("expiration");
    if !expiration.is_empty() && expiration.parse::<jiff::Timestamp>().map_or(true, |t| t <= now) {
        return refuse("expired");
    }
    if data("usage-bootstrap-authentication") != "true" {
        return refuse("not for authentication");
    }
    let mut groups = vec!["system:bootstrappers".to_owned()];
    for group in data("auth-extra-groups").split(',').map(str::trim).filter(|g| !g.is_empty()) {
        if !group.starts_with("system:bootstrappers:") {
            return refuse("a group outside system:bootstrappers:");
        }
        groups.push(group.to_owned());
    }
    Ok(UserInfo { name: format!("system:bootstrap:{id}"), groups, ..UserInfo::default() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn forms() {
        assert_eq!(split("abcdef.0123456789abcdef"), Some(("abcdef", "0123456789abcdef")));
        for no in [
            "",
            "abcdef",
            "ABCDEF.0123456789abcdef",
            "abcdef.0123456789abcde",
            "a.b.c",
            "abcdeé.0123456789abcdef",
        ] {
            assert_eq!(split(no), None, "{no}");
        }
    }

    #[test]
    fn checks() {
        let b = |s: &str| STANDARD.encode(s);
        let good = json!({"type": "bootstrap.kubernetes.io/token", "data": {"token-id": b("abcdef"), "token-secret": b("0123456789abcdef"),
            "usage-bootstrap-authentication": b("true"), "expiration": b("2030-01-01T00:00:00Z"),
            "auth-extra-groups": b("system:bootstrappers:orlop:default-node-token")}});
        let now: jiff::Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let user = check(&good, "abcdef", "0123456789abcdef", now).unwrap();
        assert_eq!(user.name, "system:bootstrap:abcdef");
        assert_eq!(user.groups.len(), 2);
        assert!(check(&good, "abcdef", "0123456789abcdee", now).is_err());
        assert!(check(&good, "abcdef", "0123456789abcdef", "2031-01-01T00:00:00Z".parse().unwrap()).is_err());
        let mut bad = good.clone();
        bad["data"]["auth-extra-groups"] = json!(b("system:masters"));
        assert!(check(&bad, "abcdef", "0123456789abcdef", now).is_err());
        bad["type"] = json!("Opaque");
        assert!(check(&bad, "abcdef", "0123456789abcdef", now).is_err());
    }
}
