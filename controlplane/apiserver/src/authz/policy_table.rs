//! The words in which the bootstrap tables are written, and their translation into API objects.

use serde_json::{Value, json};

/// Verbs that change nothing.
pub const READ: &str = "get list watch";
/// Verbs that change objects.
pub const WRITE: &str = "create delete deletecollection patch update";
/// Both.
pub const READ_WRITE: &str = "create delete deletecollection get list patch update watch";

/// One policy rule; lists are separated by spaces, the core group is spelt "core".
#[derive(Debug)]
pub enum Rule {
    Resources { verbs: &'static str, groups: &'static str, resources: &'static str, names: &'static str },
    Urls { verbs: &'static str, urls: &'static str },
}

/// A rule on resources.
pub const fn r(verbs: &'static str, groups: &'static str, resources: &'static str) -> Rule {
    Rule::Resources { verbs, groups, resources, names: "" }
}

/// A rule on resources with certain names.
pub const fn n(
    verbs: &'static str,
    groups: &'static str,
    resources: &'static str,
    names: &'static str,
) -> Rule {
    Rule::Resources { verbs, groups, resources, names }
}

/// A rule on non-resource paths.
pub const fn u(verbs: &'static str, urls: &'static str) -> Rule {
    Rule::Urls { verbs, urls }
}

/// A Role (when it has a namespace) or ClusterRole.
#[derive(Debug)]
pub struct Role {
    pub name: &'static str,
    pub namespace: &'static str,
    /// Names of aggregating roles that take these rules in.
    pub aggregate_to: &'static str,
    /// The aggregation label whose bearers this role takes in; such a role has no rules of its own.
    pub aggregates: &'static str,
    pub rules: &'static [Rule],
}

/// A RoleBinding (when it has a namespace) or ClusterRoleBinding. Subjects read `user:NAME`, `group:NAME` or `sa:NAMESPACE/NAME`.
#[derive(Debug)]
pub struct Binding {
    pub name: &'static str,
    pub namespace: &'static str,
    /// `ClusterRole/NAME` or `Role/NAME`.
    pub role: &'static str,
    pub subjects: &'static str,
}

fn words(list: &str) -> Vec<&str> {
    list.split(' ').filter(|w| !w.is_empty()).collect()
}

impl Rule {
    /// The rule as the API spells it.
    pub fn to_value(&self) -> Value {
        match self {
            Rule::Urls { verbs, urls } => json!({"verbs": words(verbs), "nonResourceURLs": words(urls)}),
            Rule::Resources { verbs, groups, resources, names } => {
                let groups: Vec<&str> =
                    words(groups).into_iter().map(|g| if g == "core" { "" } else { g }).collect();
                let mut rule =
                    json!({"verbs": words(verbs), "apiGroups": groups, "resources": words(resources)});
                if !names.is_empty() {
                    rule["resourceNames"] = json!(words(names));
                }
                rule
            }
        }
    }
}

fn metadata(name: &str, namespace: &str) -> Value {
    let mut meta = json!({
        "name": name,
        "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"},
        "annotations": {"rbac.authorization.kubernetes.io/autoupdate": "true"},
    });
    if !namespace.is_empty() {
        meta["namespace"] = json!(namespace);
    }
    meta
}

impl Role {
    /// The role as an API object.
    pub fn to_value(&self) -> Value {
        let kind = if self.namespace.is_empty() { "ClusterRole" } else { "Role" };
        let mut meta = metadata(self.name, self.namespace);
        for target in words(self.aggregate_to) {
            meta["labels"][format!("rbac.authorization.k8s.io/aggregate-to-{target}")] = json!("true");
        }
        let mut role = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": meta});
        if self.aggregates.is_empty() {
            role["rules"] = self.rules.iter().map(Rule::to_value).collect();
        } else {
            let label = format!("rbac.authorization.k8s.io/aggregate-to-{}", self.aggregates);
            role["aggregationRule"] = json!({"clusterRoleSelectors": [{"matchLabels": {label: "true"}}]});
        }
        role
    }
}

/// A subject as the API spells it.
pub fn subject(text: &str) -> Value {
    const GROUP: &str = "rbac.authorization.k8s.io";
    if let Some((namespace, name)) = text.strip_prefix("sa:").and_then(|t| t.split_once('/')) {
        json!({"kind": "ServiceAccount", "namespace": namespace, "name": name})
    } else if let Some(name) = text.strip_prefix("group:") {
        json!({"kind": "Group", "apiGroup": GROUP, "name": name})
    } else {
        json!({"kind": "User", "apiGroup": GROUP, "name": text.strip_prefix("user:").unwrap_or(text)})
    }
}

impl Binding {
    /// The binding as an API object.
    pub fn to_value(&self) -> Value {
        binding(self.name, self.namespace, self.role, &words(self.subjects))
    }
}

/// A binding of `role` (`ClusterRole/NAME` or `Role/NAME`) to subjects.
pub fn binding(name: &str, namespace: &str, role: &str, subjects: &[&str]) -> Value {
    let kind = if namespace.is_empty() { "ClusterRoleBinding" } else { "RoleBinding" };
    let (role_kind, role_name) = role.split_once('/').unwrap_or(("ClusterRole", role));
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": kind,
        "metadata": metadata(name, namespace),
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": role_kind, "name": role_name},
        "subjects": subjects.iter().map(|s| subject(s)).collect::<Vec<_>>(),
    })
}
