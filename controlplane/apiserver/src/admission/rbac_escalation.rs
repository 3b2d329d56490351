//! Nobody hands out rights that they lack: writing a role needs its rules or the verb `escalate`, writing a binding the role's
//! rules or the verb `bind`.

use serde_json::Value;

use super::{Context, forbidden, text};
use crate::authz::rbac::{Rule, uncovered};
use crate::authz::{Attributes as Question, Authorizer};
use crate::registry::{Attributes, Operation};
use crate::request_info::UserInfo;
use crate::status::Status;

const GROUP: &str = "rbac.authorization.k8s.io";

pub(super) fn validate(c: &Context, a: &Attributes) -> Result<(), Status> {
    let watched = a.info.api_group == GROUP
        && a.info.subresource.is_empty()
        && matches!(a.operation, Operation::Create | Operation::Update);
    if !watched || a.user.in_group("system:masters") {
        return Ok(());
    }
    let Some(object) = &a.object else { return Ok(()) };
    let faults = match a.info.resource.as_str() {
        "roles" | "clusterroles" => role_faults(&c.authorizer, a, object),
        "rolebindings" | "clusterrolebindings" => binding_faults(&c.authorizer, a, object),
        _ => return Ok(()),
    };
    faults.map_err(|why| forbidden(a, why))
}

fn may(
    authorizer: &Authorizer,
    user: &UserInfo,
    verb: &str,
    resource: &str,
    namespace: &str,
    name: &str,
) -> bool {
    authorizer.authorize(&Question::resource(user, verb, GROUP, resource, namespace, name)).allowed()
}

fn covered(authorizer: &Authorizer, user: &UserInfo, namespace: &str, wanted: &[Rule]) -> Result<(), String> {
    let missing = uncovered(&authorizer.rules_for(user, namespace), wanted);
    if missing.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = missing.iter().take(20).filter_map(|r| serde_json::to_string(r).ok()).collect();
    Err(format!(
        "user {:?} (groups={:?}) is attempting to grant RBAC permissions not currently held:\n{}",
        user.name,
        user.groups,
        list.join("\n")
    ))
}

fn role_faults(authorizer: &Authorizer, a: &Attributes, object: &Value) -> Result<(), String> {
    let field = |o: &Value, key: &str| o.get(key).cloned().unwrap_or(Value::Null);
    if let Some(old) = &a.old_object
        && field(old, "rules") == field(object, "rules")
        && field(old, "aggregationRule") == field(object, "aggregationRule")
    {
        return Ok(());
    }
    let (namespace, name) = (a.info.namespace.as_str(), text(object, "/metadata/name"));
    if may(authorizer, &a.user, "escalate", &a.info.resource, namespace, name) {
        return Ok(());
    }
    covered(authorizer, &a.user, namespace, &Rule::list_from(&object["rules"]))?;
    if field(object, "aggregationRule").is_object() {
        // Whatever carries the label later becomes part of the role.
        let everything = |urls: bool| Rule {
            verbs: vec!["*".into()],
            api_groups: if urls { vec![] } else { vec!["*".into()] },
            resources: if urls { vec![] } else { vec!["*".into()] },
            non_resource_urls: if urls { vec!["*".into()] } else { vec![] },
            ..Rule::default()
        };
        covered(authorizer, &a.user, namespace, &[everything(false), everything(true)])
            .map_err(|_| "must have cluster-admin privileges to use an aggregationRule".to_owned())?;
    }
    Ok(())
}

fn binding_faults(authorizer: &Authorizer, a: &Attributes, object: &Value) -> Result<(), String> {
    if let Some(old) = &a.old_object
        && old.get("subjects") == object.get("subjects")
        && old.get("roleRef") == object.get("roleRef")
    {
        return Ok(());
    }
    let namespace = a.info.namespace.as_str();
    let (kind, name) = (text(object, "/roleRef/kind"), text(object, "/roleRef/name"));
    let resource = if kind == "ClusterRole" { "clusterroles" } else { "roles" };
    if may(authorizer, &a.user, "bind", resource, namespace, name) {
        return Ok(());
    }
    let rules = authorizer
        .rules_of_role(kind, namespace, name)
        .ok_or_else(|| format!("{resource} {name:?} not found"))?;
    covered(authorizer, &a.user, namespace, &rules)
}

#[cfg(test)]
mod tests {
    use super::super::testing::attributes;
    use super::*;
    use serde_json::json;

    fn authorizer() -> Authorizer {
        let authorizer = Authorizer::default();
        let mut p = authorizer.rbac.write();
        for (name, verbs, group, resource) in [
            ("reader", "get", "", "pods"),
            ("binder", "bind", GROUP, "clusterroles"),
            ("escalator", "escalate", GROUP, "roles"),
        ] {
            p.put("clusterroles", &json!({"metadata": {"name": name}, "rules": [{"verbs": [verbs], "apiGroups": [group], "resources": [resource]}]}));
            p.put("clusterrolebindings", &json!({"metadata": {"name": name}, "roleRef": {"kind": "ClusterRole", "name": name}, "subjects": [{"kind": "User", "name": name}]}));
        }
        drop(p);
        authorizer
    }

    #[test]
    fn granting_needs_having() {
        let z = authorizer();
        let role = |resource: &str| json!({"metadata": {"name": "r", "namespace": "d"}, "rules": [{"verbs": ["get"], "apiGroups": [""], "resources": [resource]}]});
        let ask = |user: &str, object: Value| {
            role_faults(&z, &attributes(Operation::Create, "roles", object.clone(), user), &object).is_ok()
        };
        assert!(ask("reader", role("pods")));
        assert!(!ask("reader", role("secrets")));
        assert!(ask("escalator", role("secrets")));
        let mut aggregated = role("pods");
        aggregated["aggregationRule"] = json!({});
        assert!(!ask("reader", aggregated));

        let binding = |name: &str| json!({"metadata": {"name": "b", "namespace": "d"}, "roleRef": {"kind": "ClusterRole", "name": name}, "subjects": []});
        let ask = |user: &str, object: Value| {
            binding_faults(&z, &attributes(Operation::Create, "rolebindings", object.clone(), user), &object)
                .is_ok()
        };
        assert!(ask("reader", binding("reader")));
        assert!(!ask("reader", binding("escalator")));
        assert!(ask("binder", binding("escalator")));
        assert!(!ask("reader", binding("nothing")));
    }
}
