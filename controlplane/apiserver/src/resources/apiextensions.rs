//! apiextensions.k8s.io/v1 CustomResourceDefinitions and apiregistration.k8s.io/v1 APIServices.

use serde_json::{Value, json};

use super::{Column, Resource, Strategy, col};
use crate::{table::human, validation::Errors, value};

pub(super) fn resources() -> Vec<Resource> {
    vec![
        Resource::new(
            "apiextensions.k8s.io",
            "v1",
            "CustomResourceDefinition",
            "customresourcedefinitions",
            Definition,
        )
        .cluster()
        .short(&["crd", "crds"])
        .category(&["api-extensions"])
        .with_status()
        .generation(),
        Resource::new("apiregistration.k8s.io", "v1", "APIService", "apiservices", ApiService)
            .cluster()
            .category(&["api-extensions"])
            .with_status(),
    ]
}

struct Definition;

impl Strategy for Definition {
    fn defaults(&self, object: &mut Value) {
        let kind = value::text(object, "spec.names.kind").to_owned();
        if !kind.is_empty() {
            value::default_text(object, "spec.names.singular", &kind.to_lowercase());
            value::default_text(object, "spec.names.listKind", &format!("{kind}List"));
        }
        value::default_text(object, "spec.conversion.strategy", "None");
    }

    fn prepare_create(&self, object: &mut Value) {
        let stored: Vec<Value> = value::list(object, "spec.versions")
            .iter()
            .filter(|v| value::flag(v, "storage"))
            .map(|v| v["name"].clone())
            .collect();
        value::set(
            object,
            "status",
            json!({"conditions": [], "acceptedNames": {"plural": "", "kind": ""}, "storedVersions": stored}),
        );
    }

    fn validate(&self, object: &Value, errors: &mut Errors) {
        let (group, plural) = (value::text(object, "spec.group"), value::text(object, "spec.names.plural"));
        for (path, text) in [
            ("spec.group", group),
            ("spec.names.plural", plural),
            ("spec.names.kind", value::text(object, "spec.names.kind")),
        ] {
            if text.is_empty() {
                errors.required(path, "");
            }
        }
        let name = value::text(object, "metadata.name");
        if name != format!("{plural}.{group}") {
            errors.invalid("metadata.name", &name.into(), "must be spec.names.plural+\".\"+spec.group");
        }
        errors.one_of(object, "spec.scope", &["Cluster", "Namespaced"]);
        let storage =
            value::list(object, "spec.versions").iter().filter(|v| value::flag(v, "storage")).count();
        if storage != 1 {
            errors.invalid(
                "spec.versions",
                &Value::Null,
                "must have exactly one version marked as storage version",
            );
        }
        for (i, v) in value::list(object, "spec.versions").iter().enumerate() {
            if !value::has(v, "schema.openAPIV3Schema") {
                errors
                    .required(&format!("spec.versions[{i}].schema.openAPIV3Schema"), "schemas are required");
            }
        }
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

struct ApiService;

impl Strategy for ApiService {
    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[col("Service"), col("Available")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let service = match value::text(object, "spec.service.name") {
            "" => "Local".to_owned(),
            name => format!("{}/{name}", value::text(object, "spec.service.namespace")),
        };
        let condition =
            value::list(object, "status.conditions").iter().find(|c| value::text(c, "type") == "Available");
        let available = match condition {
            Some(c) if value::text(c, "status") == "True" => "True".to_owned(),
            Some(c) => format!("{} ({})", value::text(c, "status"), value::text(c, "reason")),
            None => "Unknown".into(),
        };
        vec![human::or_none(&service), available.into()]
    }
}
