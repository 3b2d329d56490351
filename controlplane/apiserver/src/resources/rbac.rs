//! rbac.authorization.k8s.io/v1. Whether a user may grant what a role grants is for authorization to say.

use serde_json::Value;

use super::{Column, Resource, Strategy, col, wide};
use crate::{
    validation::{Errors, names},
    value,
};

const GROUP: &str = "rbac.authorization.k8s.io";

pub(super) fn resources() -> Vec<Resource> {
    vec![
        Resource::new(GROUP, "v1", "ClusterRoleBinding", "clusterrolebindings", Binding)
            .cluster()
            .named(names::path_segment),
        Resource::new(GROUP, "v1", "ClusterRole", "clusterroles", Role).cluster().named(names::path_segment),
        Resource::new(GROUP, "v1", "RoleBinding", "rolebindings", Binding).named(names::path_segment),
        Resource::new(GROUP, "v1", "Role", "roles", Role).named(names::path_segment),
    ]
}

struct Role;

impl Strategy for Role {
    fn validate(&self, object: &Value, errors: &mut Errors) {
        for (i, rule) in value::list(object, "rules").iter().enumerate() {
            let at = format!("rules[{i}]");
            let empty = |field| value::list(rule, field).is_empty();
            if empty("verbs") {
                errors.required(&format!("{at}.verbs"), "verbs must contain at least one value");
            }
            if !empty("nonResourceURLs") {
                if !value::text(object, "metadata.namespace").is_empty() {
                    errors.invalid(
                        &format!("{at}.nonResourceURLs"),
                        &rule["nonResourceURLs"],
                        "namespaced rules cannot apply to non-resource URLs",
                    );
                }
                if !empty("apiGroups") || !empty("resources") || !empty("resourceNames") {
                    errors.invalid(
                        &format!("{at}.nonResourceURLs"),
                        &rule["nonResourceURLs"],
                        "rules cannot apply to both regular resources and non-resource URLs",
                    );
                }
                continue;
            }
            if empty("apiGroups") {
                errors.required(
                    &format!("{at}.apiGroups"),
                    "resource rules must supply at least one api group",
                );
            }
            if empty("resources") {
                errors
                    .required(&format!("{at}.resources"), "resource rules must supply at least one resource");
            }
        }
    }

    fn create_on_update(&self) -> bool {
        true
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("Created At")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        vec![value::text(object, "metadata.creationTimestamp").into()]
    }

    fn shows_age(&self) -> bool {
        false
    }
}

struct Binding;

impl Strategy for Binding {
    fn defaults(&self, object: &mut Value) {
        value::default_text(object, "roleRef.apiGroup", GROUP);
        for subject in value::list_mut(object, "subjects") {
            match value::text(subject, "kind") {
                "User" | "Group" => value::default_text(subject, "apiGroup", GROUP),
                _ => {}
            }
        }
    }

    fn validate(&self, object: &Value, errors: &mut Errors) {
        if value::text(object, "roleRef.name").is_empty() {
            errors.required("roleRef.name", "");
        }
        let allowed: &[&str] = if value::text(object, "metadata.namespace").is_empty() {
            &["ClusterRole"]
        } else {
            &["ClusterRole", "Role"]
        };
        let kind = value::text(object, "roleRef.kind");
        if !allowed.contains(&kind) {
            errors.not_supported("roleRef.kind", &kind.into(), allowed);
        }
        for (i, s) in value::list(object, "subjects").iter().enumerate() {
            let at = format!("subjects[{i}]");
            if value::text(s, "name").is_empty() {
                errors.required(&format!("{at}.name"), "");
            }
            match value::text(s, "kind") {
                "ServiceAccount" if value::text(s, "namespace").is_empty() => {
                    errors.required(&format!("{at}.namespace"), "")
                }
                "ServiceAccount" | "User" | "Group" => {}
                other => errors.not_supported(
                    &format!("{at}.kind"),
                    &other.into(),
                    &["ServiceAccount", "User", "Group"],
                ),
            }
        }
    }

    fn validate_update(&self, new: &Value, old: &Value, errors: &mut Errors) {
        self.validate(new, errors);
        if new.get("roleRef") != old.get("roleRef") {
            errors.invalid("roleRef", new.get("roleRef").unwrap_or(&Value::Null), "cannot change roleRef");
        }
    }

    fn create_on_update(&self) -> bool {
        true
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] =
            &[col("Role"), col("Age"), wide("Users"), wide("Groups"), wide("ServiceAccounts")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let of = |kind: &str| -> Value {
            let names: Vec<String> = value::list(object, "subjects")
                .iter()
                .filter(|s| value::text(s, "kind") == kind)
                .map(|s| match value::text(s, "namespace") {
                    "" => value::text(s, "name").to_owned(),
                    namespace => format!("{namespace}/{}", value::text(s, "name")),
                })
                .collect();
            names.join(", ").into()
        };
        let role = format!("{}/{}", value::text(object, "roleRef.kind"), value::text(object, "roleRef.name"));
        vec![role.into(), of("User"), of("Group"), of("ServiceAccount")]
    }
}
