//! Role-based access control: rules compiled from roles, found by subject through an index of bindings.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use super::{Attributes, Decision};
use crate::request_info::UserInfo;

/// A policy rule as in rbac.authorization.k8s.io/v1.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Rule {
    #[serde(deserialize_with = "null_is_empty")]
    pub verbs: Vec<String>,
    #[serde(deserialize_with = "null_is_empty", skip_serializing_if = "Vec::is_empty")]
    pub api_groups: Vec<String>,
    #[serde(deserialize_with = "null_is_empty", skip_serializing_if = "Vec::is_empty")]
    pub resources: Vec<String>,
    #[serde(deserialize_with = "null_is_empty", skip_serializing_if = "Vec::is_empty")]
    pub resource_names: Vec<String>,
    #[serde(
        rename = "nonResourceURLs",
        deserialize_with = "null_is_empty",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub non_resource_urls: Vec<String>,
}

fn null_is_empty<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
    Ok(Option::<Vec<String>>::deserialize(d)?.unwrap_or_default())
}

fn has(list: &[String], wanted: &str) -> bool {
    list.iter().any(|x| x == "*" || x == wanted)
}

fn url_matches(pattern: &str, path: &str) -> bool {
    pattern == "*"
        || pattern == path
        || pattern.strip_suffix('*').is_some_and(|prefix| path.starts_with(prefix))
}

fn resource_matches(pattern: &str, combined: &str) -> bool {
    if pattern == "*" || pattern == combined {
        return true;
    }
    match (pattern.strip_prefix("*/"), combined.split_once('/')) {
        (Some(wanted), Some((_, sub))) => wanted == sub,
        _ => false,
    }
}

impl Rule {
    /// Reads the `rules` of a role.
    pub fn list_from(rules: &Value) -> Vec<Rule> {
        match rules {
            Value::Array(items) => items.iter().filter_map(|r| Rule::deserialize(r).ok()).collect(),
            _ => Vec::new(),
        }
    }

    /// Whether this rule grants what is asked.
    pub fn allows(&self, a: &Attributes<'_>) -> bool {
        if !has(&self.verbs, a.verb) {
            return false;
        }
        if !a.is_resource {
            return self.non_resource_urls.iter().any(|p| url_matches(p, a.path));
        }
        has(&self.api_groups, a.group)
            && (self.resource_names.is_empty() || self.resource_names.iter().any(|x| x == a.name))
            && {
                let combined = a.combined_resource();
                self.resources.iter().any(|p| resource_matches(p, &combined))
            }
    }

    /// Whether this rule alone grants all that `other`, a rule with one element per list, grants.
    fn covers(&self, other: &Rule) -> bool {
        let all = |mine: &[String], theirs: &[String]| theirs.iter().all(|t| has(mine, t));
        if !all(&self.verbs, &other.verbs) {
            return false;
        }
        if !other.non_resource_urls.is_empty() {
            return other
                .non_resource_urls
                .iter()
                .all(|u| self.non_resource_urls.iter().any(|p| url_matches(p, u)));
        }
        let names = self.resource_names.is_empty()
            || (!other.resource_names.is_empty()
                && other.resource_names.iter().all(|n| self.resource_names.contains(n)));
        names
            && all(&self.api_groups, &other.api_groups)
            && other.resources.iter().all(|r| self.resources.iter().any(|p| resource_matches(p, r)))
    }

    /// Splits into rules with one element per list, so that several rules together can cover one.
    fn break_down(&self) -> Vec<Rule> {
        let mut out = Vec::new();
        let one = |s: &String| vec![s.clone()];
        for verb in &self.verbs {
            for url in &self.non_resource_urls {
                out.push(Rule { verbs: one(verb), non_resource_urls: one(url), ..Rule::default() });
            }
            for group in &self.api_groups {
                for resource in &self.resources {
                    let base = Rule {
                        verbs: one(verb),
                        api_groups: one(group),
                        resources: one(resource),
                        ..Rule::default()
                    };
                    if self.resource_names.is_empty() {
                        out.push(base);
                    } else {
                        out.extend(
                            self.resource_names
                                .iter()
                                .map(|n| Rule { resource_names: one(n), ..base.clone() }),
                        );
                    }
                }
            }
        }
        out
    }
}

/// What `wanted` grants and `owned` does not: empty when the owner may hand out `wanted`.
pub fn uncovered(owned: &[Rule], wanted: &[Rule]) -> Vec<Rule> {
    wanted.iter().flat_map(Rule::break_down).filter(|w| !owned.iter().any(|o| o.covers(w))).collect()
}

#[derive(Debug)]
struct ClusterRole {
    labels: BTreeMap<String, String>,
    rules: Arc<[Rule]>,
    /// Label sets (match labels and expressions) whose bearers' rules this role takes in.
    selectors: Vec<Value>,
}

#[derive(Debug)]
struct BoundRole {
    binding: String,
    /// Empty for cluster role bindings.
    namespace: String,
    role_is_cluster: bool,
    role: String,
}

/// The compiled policy. Roles and bindings are put in and taken out one by one as they change.
#[derive(Debug, Default)]
pub struct Policy {
    cluster_roles: HashMap<String, ClusterRole>,
    /// Aggregated rules by role, emptied whenever a cluster role changes.
    aggregated: HashMap<String, Arc<[Rule]>>,
    roles: HashMap<(String, String), Arc<[Rule]>>,
    bindings: HashMap<(String, String), (Arc<BoundRole>, Vec<String>)>,
    /// "u:NAME" or "g:NAME" to what is bound to it.
    by_subject: HashMap<String, Vec<Arc<BoundRole>>>,
}

fn text<'a>(v: &'a Value, pointer: &str) -> &'a str {
    v.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn string_map(v: Option<&Value>) -> BTreeMap<String, String> {
    v.and_then(Value::as_object)
        .map(|m| m.iter().filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned()))).collect())
        .unwrap_or_default()
}

/// A label selector (matchLabels and matchExpressions) against labels. An empty selector matches everything.
pub fn selector_matches(selector: &Value, labels: &BTreeMap<String, String>) -> bool {
    let equal = string_map(selector.get("matchLabels")).iter().all(|(k, v)| labels.get(k) == Some(v));
    let expressions = selector.get("matchExpressions").and_then(Value::as_array);
    equal
        && expressions.into_iter().flatten().all(|e| {
            let have = labels.get(text(e, "/key"));
            let listed = |v: &String| {
                e.get("values").and_then(Value::as_array).into_iter().flatten().any(|x| x.as_str() == Some(v))
            };
            match text(e, "/operator") {
                "In" => have.is_some_and(listed),
                "NotIn" => !have.is_some_and(listed),
                "Exists" => have.is_some(),
                "DoesNotExist" => have.is_none(),
                _ => false,
            }
        })
}

impl Policy {
    /// Makes `items` all that there is of `resource`.
    pub fn replace(&mut self, resource: &str, items: &[Value]) {
        match resource {
            "clusterroles" => self.cluster_roles.clear(),
            "roles" => self.roles.clear(),
            "clusterrolebindings" | "rolebindings" => {
                let cluster = resource == "clusterrolebindings";
                let old: Vec<_> =
                    self.bindings.keys().filter(|(ns, _)| ns.is_empty() == cluster).cloned().collect();
                for (namespace, name) in old {
                    self.remove(resource, &namespace, &name);
                }
            }
            _ => {}
        }
        for item in items {
            self.put_one(resource, item);
        }
        self.aggregate();
    }

    /// Takes in an object of kind ClusterRole, Role, ClusterRoleBinding or RoleBinding, replacing its former version.
    pub fn put(&mut self, resource: &str, object: &Value) {
        self.put_one(resource, object);
        if resource == "clusterroles" {
            self.aggregate();
        }
    }

    fn put_one(&mut self, resource: &str, object: &Value) {
        let namespace = text(object, "/metadata/namespace").to_owned();
        let name = text(object, "/metadata/name").to_owned();
        let rules = || Rule::list_from(object.get("rules").unwrap_or(&Value::Null)).into();
        match resource {
            "clusterroles" => {
                let selectors =
                    object.pointer("/aggregationRule/clusterRoleSelectors").and_then(Value::as_array);
                let role = ClusterRole {
                    labels: string_map(object.pointer("/metadata/labels")),
                    rules: rules(),
                    selectors: selectors.cloned().unwrap_or_default(),
                };
                self.cluster_roles.insert(name, role);
            }
            "roles" => {
                self.roles.insert((namespace, name), rules());
            }
            "clusterrolebindings" | "rolebindings" => {
                self.remove(resource, &namespace, &name);
                self.put_binding(namespace, name, object);
            }
            _ => {}
        }
    }

    fn put_binding(&mut self, namespace: String, name: String, object: &Value) {
        let bound = Arc::new(BoundRole {
            binding: name.clone(),
            namespace: namespace.clone(),
            role_is_cluster: text(object, "/roleRef/kind") == "ClusterRole",
            role: text(object, "/roleRef/name").to_owned(),
        });
        let mut keys = Vec::new();
        for subject in object.get("subjects").and_then(Value::as_array).into_iter().flatten() {
            let subject_name = text(subject, "/name");
            keys.push(match text(subject, "/kind") {
                "User" => format!("u:{subject_name}"),
                "Group" => format!("g:{subject_name}"),
                "ServiceAccount" => {
                    let own = text(subject, "/namespace");
                    let ns = if own.is_empty() { namespace.as_str() } else { own };
                    format!("u:system:serviceaccount:{ns}:{subject_name}")
                }
                _ => continue,
            });
        }
        keys.sort();
        keys.dedup();
        for key in &keys {
            self.by_subject.entry(key.clone()).or_default().push(bound.clone());
        }
        self.bindings.insert((namespace, name), (bound, keys));
    }

    /// Forgets an object.
    pub fn remove(&mut self, resource: &str, namespace: &str, name: &str) {
        match resource {
            "clusterroles" => {
                self.cluster_roles.remove(name);
                self.aggregate();
            }
            "roles" => {
                self.roles.remove(&(namespace.to_owned(), name.to_owned()));
            }
            "clusterrolebindings" | "rolebindings" => {
                let Some((bound, keys)) = self.bindings.remove(&(namespace.to_owned(), name.to_owned()))
                else {
                    return;
                };
                for key in keys {
                    if let Some(list) = self.by_subject.get_mut(&key) {
                        list.retain(|b| !Arc::ptr_eq(b, &bound));
                        if list.is_empty() {
                            self.by_subject.remove(&key);
                        }
                    }
                }
            }
            _ => {}
        }
    }

    /// Recomputes what aggregating roles contain. There are few, and cluster roles change rarely.
    fn aggregate(&mut self) {
        let names: Vec<String> = self
            .cluster_roles
            .iter()
            .filter(|(_, r)| !r.selectors.is_empty())
            .map(|(n, _)| n.clone())
            .collect();
        self.aggregated = names
            .into_iter()
            .map(|name| {
                let mut rules = Vec::new();
                self.collect(&name, &mut Vec::new(), &mut rules);
                (name, rules.into())
            })
            .collect();
    }

    fn collect(&self, name: &str, seen: &mut Vec<String>, out: &mut Vec<Rule>) {
        if seen.iter().any(|s| s == name) {
            return;
        }
        seen.push(name.to_owned());
        let Some(role) = self.cluster_roles.get(name) else { return };
        for rule in role.rules.iter() {
            if !out.contains(rule) {
                out.push(rule.clone());
            }
        }
        if role.selectors.is_empty() {
            return;
        }
        let mut members: Vec<&String> = self
            .cluster_roles
            .iter()
            .filter(|(_, r)| role.selectors.iter().any(|s| selector_matches(s, &r.labels)))
            .map(|(n, _)| n)
            .collect();
        members.sort();
        for member in members {
            self.collect(member, seen, out);
        }
    }

    fn resolve(&self, is_cluster: bool, namespace: &str, name: &str) -> Option<&Arc<[Rule]>> {
        if is_cluster {
            self.aggregated.get(name).or_else(|| self.cluster_roles.get(name).map(|r| &r.rules))
        } else {
            self.roles.get(&(namespace.to_owned(), name.to_owned()))
        }
    }

    fn bound_to<'p>(&'p self, user: &UserInfo) -> impl Iterator<Item = &'p Arc<BoundRole>> {
        let keys: Vec<String> = std::iter::once(format!("u:{}", user.name))
            .chain(user.groups.iter().map(|g| format!("g:{g}")))
            .collect();
        keys.into_iter().filter_map(|k| self.by_subject.get(&k)).flatten()
    }

    /// Whether a binding grants what is asked.
    pub fn authorize(&self, a: &Attributes<'_>) -> Decision {
        for bound in self.bound_to(a.user) {
            let in_scope = bound.namespace.is_empty() || (a.is_resource && bound.namespace == a.namespace);
            if !in_scope {
                continue;
            }
            let Some(rules) = self.resolve(bound.role_is_cluster, &bound.namespace, &bound.role) else {
                continue;
            };
            if rules.iter().any(|r| r.allows(a)) {
                let kind = if bound.role_is_cluster { "ClusterRole" } else { "Role" };
                let (binding_kind, place) = if bound.namespace.is_empty() {
                    ("ClusterRoleBinding", String::new())
                } else {
                    ("RoleBinding", format!("/{}", bound.namespace))
                };
                return Decision::Allow(format!(
                    "RBAC: allowed by {binding_kind} \"{}{place}\" of {kind} \"{}\" to the user or its groups",
                    bound.binding, bound.role
                ));
            }
        }
        Decision::NoOpinion(String::new())
    }

    /// See [`super::Authorizer::rules_for`].
    pub fn rules_for(&self, user: &UserInfo, namespace: &str) -> Vec<Rule> {
        self.bound_to(user)
            .filter(|b| b.namespace.is_empty() || b.namespace == namespace)
            .filter_map(|b| self.resolve(b.role_is_cluster, &b.namespace, &b.role))
            .flat_map(|rules| rules.iter().cloned())
            .collect()
    }

    /// See [`super::Authorizer::rules_of_role`].
    pub fn rules_of_role(&self, kind: &str, namespace: &str, name: &str) -> Option<Vec<Rule>> {
        self.resolve(kind == "ClusterRole", namespace, name).map(|r| r.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::super::bootstrap_roles::{CLUSTER_ROLE_BINDINGS, CLUSTER_ROLES};
    use super::*;
    use serde_json::json;

    fn policy() -> Policy {
        let mut p = Policy::default();
        for role in CLUSTER_ROLES {
            p.put("clusterroles", &role.to_value());
        }
        for binding in CLUSTER_ROLE_BINDINGS {
            p.put("clusterrolebindings", &binding.to_value());
        }
        p.put(
            "rolebindings",
            &json!({"metadata": {"name": "b", "namespace": "dev"}, "roleRef": {"kind": "ClusterRole", "name": "edit"},
                "subjects": [{"kind": "User", "name": "jane"}, {"kind": "ServiceAccount", "name": "bot"}]}),
        );
        p.put(
            "roles",
            &json!({"metadata": {"name": "one", "namespace": "dev"}, "rules": [
                {"verbs": ["get"], "apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["a"]},
                {"verbs": ["*"], "apiGroups": ["apps"], "resources": ["*/scale"]}]}),
        );
        p.put(
            "rolebindings",
            &json!({"metadata": {"name": "c", "namespace": "dev"}, "roleRef": {"kind": "Role", "name": "one"},
                "subjects": [{"kind": "Group", "name": "ops"}]}),
        );
        p
    }

    fn user(name: &str, groups: &[&str]) -> UserInfo {
        UserInfo {
            name: name.into(),
            groups: groups.iter().map(|g| (*g).to_owned()).collect(),
            ..UserInfo::default()
        }
    }

    #[test]
    fn decisions() {
        let p = policy();
        let jane = user("jane", &["system:authenticated"]);
        let bot = user("system:serviceaccount:dev:bot", &[]);
        let ops = user("o", &["ops"]);
        // user, verb, group, resource, namespace, name -> allowed
        let table = [
            (&jane, "create", "apps", "deployments", "dev", "", true),
            (&jane, "create", "apps", "deployments", "prod", "", false),
            (&jane, "create", "rbac.authorization.k8s.io", "roles", "dev", "", false),
            (&jane, "get", "", "pods/log", "dev", "x", true),
            (&jane, "get", "", "nodes", "", "n", false),
            (&jane, "create", "authorization.k8s.io", "selfsubjectaccessreviews", "", "", true),
            (&bot, "delete", "", "secrets", "dev", "s", true),
            (&ops, "get", "", "configmaps", "dev", "a", true),
            (&ops, "get", "", "configmaps", "dev", "b", false),
            (&ops, "list", "", "configmaps", "dev", "", false),
            (&ops, "patch", "apps", "deployments/scale", "dev", "d", true),
            (&ops, "patch", "apps", "deployments", "dev", "d", false),
        ];
        for (user, verb, group, resource, namespace, name, want) in table {
            let a = Attributes::resource(user, verb, group, resource, namespace, name);
            assert_eq!(p.authorize(&a).allowed(), want, "{a:?}");
        }
    }

    #[test]
    fn non_resource_urls() {
        let p = policy();
        let jane = user("jane", &["system:authenticated"]);
        let ask = |path: &str, user: &UserInfo| {
            let a =
                Attributes { path, is_resource: false, ..Attributes::resource(user, "get", "", "", "", "") };
            p.authorize(&a).allowed()
        };
        assert!(ask("/api/v1", &jane));
        assert!(ask("/version", &user("system:anonymous", &["system:unauthenticated"])));
        assert!(!ask("/api", &user("system:anonymous", &["system:unauthenticated"])));
        assert!(!ask("/metrics", &jane));
        assert!(ask("/metrics", &user("m", &["system:monitoring"])));
    }

    #[test]
    fn aggregation_follows_label_changes() {
        let mut p = policy();
        let jane = user("jane", &[]);
        let a = Attributes::resource(&jane, "get", "example.com", "widgets", "dev", "");
        assert!(!p.authorize(&a).allowed());
        let mut role = json!({"metadata": {"name": "w", "labels": {"rbac.authorization.k8s.io/aggregate-to-view": "true"}},
            "rules": [{"verbs": ["get"], "apiGroups": ["example.com"], "resources": ["widgets"]}]});
        p.put("clusterroles", &role);
        assert!(p.authorize(&a).allowed());
        role["metadata"]["labels"] = json!({});
        p.put("clusterroles", &role);
        assert!(!p.authorize(&a).allowed());
    }

    #[test]
    fn removing_a_binding_takes_the_right_away() {
        let mut p = policy();
        let jane = user("jane", &[]);
        p.remove("rolebindings", "dev", "b");
        assert!(!p.authorize(&Attributes::resource(&jane, "get", "", "pods", "dev", "")).allowed());
        assert!(p.rules_for(&jane, "dev").is_empty());
    }

    #[test]
    fn escalation_is_found() {
        let rule = |verbs: &[&str], groups: &[&str], resources: &[&str]| Rule {
            verbs: verbs.iter().map(|s| (*s).into()).collect(),
            api_groups: groups.iter().map(|s| (*s).into()).collect(),
            resources: resources.iter().map(|s| (*s).into()).collect(),
            ..Rule::default()
        };
        let owned = [rule(&["get"], &[""], &["pods"]), rule(&["list"], &["*"], &["pods", "secrets"])];
        assert!(uncovered(&owned, &[rule(&["get", "list"], &[""], &["pods"])]).is_empty());
        assert_eq!(uncovered(&owned, &[rule(&["get", "list"], &[""], &["pods", "secrets"])]).len(), 1);
        assert_eq!(uncovered(&owned, &[rule(&["*"], &[""], &["pods"])]).len(), 1);
    }
}
