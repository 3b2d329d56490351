//! admissionregistration.k8s.io/v1: webhooks and policies.

use serde_json::{Value, json};

use super::{Column, Plain, Resource, Strategy, num};
use crate::value;

const GROUP: &str = "admissionregistration.k8s.io";

pub(super) fn resources() -> Vec<Resource> {
    let stored = |kind, plural| {
        Resource::new(GROUP, "v1", kind, plural, Plain).cluster().category(&["api-extensions"]).generation()
    };
    let webhooks = |kind, plural, validating| {
        Resource::new(GROUP, "v1", kind, plural, Webhooks { validating })
            .cluster()
            .category(&["api-extensions"])
            .generation()
    };
    vec![
        stored("MutatingAdmissionPolicy", "mutatingadmissionpolicies"),
        stored("MutatingAdmissionPolicyBinding", "mutatingadmissionpolicybindings"),
        webhooks("MutatingWebhookConfiguration", "mutatingwebhookconfigurations", false),
        stored("ValidatingAdmissionPolicy", "validatingadmissionpolicies").with_status(),
        stored("ValidatingAdmissionPolicyBinding", "validatingadmissionpolicybindings"),
        webhooks("ValidatingWebhookConfiguration", "validatingwebhookconfigurations", true),
    ]
}

struct Webhooks {
    validating: bool,
}

impl Strategy for Webhooks {
    fn defaults(&self, object: &mut Value) {
        for hook in value::list_mut(object, "webhooks") {
            value::default_text(hook, "failurePolicy", "Fail");
            value::default_text(hook, "matchPolicy", "Equivalent");
            value::default(hook, "namespaceSelector", json!({}));
            value::default(hook, "objectSelector", json!({}));
            value::default(hook, "timeoutSeconds", 10);
            if !self.validating {
                value::default_text(hook, "reinvocationPolicy", "Never");
            }
            if value::has(hook, "clientConfig.service") {
                value::default(hook, "clientConfig.service.port", 443);
            }
            for rule in value::list_mut(hook, "rules") {
                value::default_text(rule, "scope", "*");
            }
        }
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] = &[num("Webhooks")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        vec![value::list(object, "webhooks").len().into()]
    }
}
