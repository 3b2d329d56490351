//! Impersonation headers: acting as another user, group, UID or extra, each of which must be allowed by the verb `impersonate`.

use http::HeaderMap;

use crate::authz::{Attributes, Authorizer};
use crate::request_info::UserInfo;
use crate::status::Status;

const USER: &str = "impersonate-user";
const GROUP: &str = "impersonate-group";
const UID: &str = "impersonate-uid";
const EXTRA: &str = "impersonate-extra-";

/// The user to act as, read from the headers; `None` when nobody is to be impersonated.
///
/// # Errors
/// A message for a 400 when groups, UID or extras come without a user.
pub fn requested(headers: &HeaderMap) -> Result<Option<UserInfo>, String> {
    let one = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    let mut user = UserInfo { name: one(USER), uid: one(UID), ..UserInfo::default() };
    user.groups = headers.get_all(GROUP).iter().filter_map(|v| v.to_str().ok()).map(str::to_owned).collect();
    for (name, value) in headers {
        if let (Some(key), Ok(value)) = (name.as_str().strip_prefix(EXTRA), value.to_str()) {
            user.extra.entry(unescape(key)).or_default().push(value.to_owned());
        }
    }
    if user.name.is_empty() {
        return if user.groups.is_empty() && user.uid.is_empty() && user.extra.is_empty() {
            Ok(None)
        } else {
            Err("requested to impersonate groups, a uid or extras without impersonating a user".to_owned())
        };
    }
    Ok(Some(user))
}

fn unescape(key: &str) -> String {
    let pairs = url::form_urlencoded::parse(key.as_bytes()).next().map(|(k, _)| k.into_owned());
    pairs.unwrap_or_else(|| key.to_owned()).to_lowercase()
}

/// Exchanges the requester for whom they may act as, and takes the headers out.
///
/// # Errors
/// 400 for a malformed request, 403 for a part that the requester may not impersonate.
pub fn apply(
    authorizer: &Authorizer,
    requester: UserInfo,
    headers: &mut HeaderMap,
) -> Result<UserInfo, Status> {
    let wanted = match requested(headers) {
        Ok(None) => return Ok(requester),
        Ok(Some(wanted)) => wanted,
        Err(message) => return Err(Status::failure(400, "BadRequest", message)),
    };
    let names: Vec<_> = headers.keys().filter(|k| k.as_str().starts_with("impersonate-")).cloned().collect();
    for name in names {
        headers.remove(name);
    }
    const GROUP_NAME: &str = "authentication.k8s.io";
    let allowed = |group: &str, resource: &str, namespace: &str, name: &str| {
        let attributes = Attributes::resource(&requester, "impersonate", group, resource, namespace, name);
        if authorizer.authorize(&attributes).allowed() {
            Ok(())
        } else {
            let what = if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") };
            Err(Status::failure(
                403,
                "Forbidden",
                format!("{what} {name:?} is forbidden: {}", attributes.denial()),
            ))
        }
    };
    let account = wanted.name.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
    match account {
        Some((namespace, name)) => allowed("", "serviceaccounts", namespace, name)?,
        None => allowed("", "users", "", &wanted.name)?,
    }
    for group in &wanted.groups {
        allowed("", "groups", "", group)?;
    }
    if !wanted.uid.is_empty() {
        allowed(GROUP_NAME, "uids", "", &wanted.uid)?;
    }
    for (key, values) in &wanted.extra {
        for value in values {
            allowed(GROUP_NAME, &format!("userextras/{key}"), "", value)?;
        }
    }
    Ok(complete(wanted))
}

/// Adds the groups that authentication would have added.
fn complete(mut user: UserInfo) -> UserInfo {
    let account = user.name.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
    if user.groups.is_empty()
        && let Some((namespace, _)) = account
    {
        user.groups = vec!["system:serviceaccounts".into(), format!("system:serviceaccounts:{namespace}")];
    }
    let own = if user.name == "system:anonymous" { "system:unauthenticated" } else { "system:authenticated" };
    if !user.in_group("system:authenticated") && !user.in_group("system:unauthenticated") {
        user.groups.push(own.into());
    }
    user
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn headers(list: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut h = HeaderMap::new();
        for (k, v) in list {
            h.append(*k, v.parse().unwrap());
        }
        h
    }

    #[test]
    fn masters_become_anyone_and_others_need_the_verb() {
        let authorizer = Authorizer::default();
        let root =
            UserInfo { name: "admin".into(), groups: vec!["system:masters".into()], ..UserInfo::default() };
        let mut h = headers(&[
            (USER, "system:serviceaccount:a:b"),
            ("accept", "x"),
            ("impersonate-extra-Scopes", "v"),
        ]);
        let user = apply(&authorizer, root, &mut h).unwrap();
        assert_eq!(
            user.groups,
            ["system:serviceaccounts", "system:serviceaccounts:a", "system:authenticated"]
        );
        assert_eq!(user.extra["scopes"], ["v"]);
        assert_eq!(h.len(), 1);

        let jane = UserInfo { name: "jane".into(), ..UserInfo::default() };
        authorizer.rbac.write().put(
            "clusterroles",
            &json!({"metadata": {"name": "i"}, "rules": [{"verbs": ["impersonate"], "apiGroups": [""], "resources": ["users"], "resourceNames": ["bob"]}]}),
        );
        authorizer.rbac.write().put(
            "clusterrolebindings",
            &json!({"metadata": {"name": "i"}, "roleRef": {"kind": "ClusterRole", "name": "i"}, "subjects": [{"kind": "User", "name": "jane"}]}),
        );
        assert_eq!(apply(&authorizer, jane.clone(), &mut headers(&[(USER, "bob")])).unwrap().name, "bob");
        for bad in [
            headers(&[(USER, "eve")]),
            headers(&[(USER, "bob"), (GROUP, "system:masters")]),
            headers(&[(USER, "bob"), (UID, "1")]),
        ] {
            let mut bad = bad;
            assert_eq!(apply(&authorizer, jane.clone(), &mut bad).unwrap_err().code, 403);
        }
        assert_eq!(apply(&authorizer, jane, &mut headers(&[(GROUP, "g")])).unwrap_err().code, 400);
    }
}
