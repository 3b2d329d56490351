//! certificates.k8s.io: CertificateSigningRequests. Who asked is filled in by admission.

use serde_json::Value;

use super::{Column, Resource, Strategy, col};
use crate::{table::human, validation::Errors, value};

pub(super) fn resources() -> Vec<Resource> {
    let edit: &[&str] = &["get", "patch", "update"];
    vec![
        Resource::new(
            "certificates.k8s.io",
            "v1",
            "CertificateSigningRequest",
            "certificatesigningrequests",
            Request,
        )
        .cluster()
        .short(&["csr"])
        .with_status()
        .extra("approval", ("", "", "CertificateSigningRequest"), edit),
    ]
}

struct Request;

impl Strategy for Request {
    fn prepare_update(&self, new: &mut Value, old: &Value) {
        value::carry(new, old, "spec");
    }

    fn prepare_status(&self, new: &mut Value, old: &Value) {
        // Approval and denial go through their own endpoint.
        let decided = |c: &&Value| matches!(value::text(c, "type"), "Approved" | "Denied");
        let mut conditions: Vec<Value> =
            value::list(old, "status.conditions").iter().filter(decided).cloned().collect();
        conditions.extend(value::list(new, "status.conditions").iter().filter(|c| !decided(c)).cloned());
        if conditions.is_empty() {
            value::remove(new, "status.conditions");
        } else {
            value::set(new, "status.conditions", conditions);
        }
    }

    fn validate(&self, object: &Value, errors: &mut Errors) {
        use base64::Engine;
        let request = value::text(object, "spec.request");
        let pem = base64::engine::general_purpose::STANDARD.decode(request).unwrap_or_default();
        if !pem.starts_with(b"-----BEGIN CERTIFICATE REQUEST-----")
            && !pem.starts_with(b"-----BEGIN NEW CERTIFICATE REQUEST-----")
        {
            errors.invalid("spec.request", &"<request>".into(), "PEM block type must be CERTIFICATE REQUEST");
        }
        let signer = value::text(object, "spec.signerName");
        if signer.is_empty() {
            errors.required("spec.signerName", "");
        } else if !signer.contains('/') || !signer.contains('.') {
            errors.invalid(
                "spec.signerName",
                &signer.into(),
                "must be a fully qualified domain and path of the form 'example.com/signer-name'",
            );
        }
        if value::list(object, "spec.usages").is_empty() {
            errors.required("spec.usages", "");
        }
        if let Some(n) = value::int(object, "spec.expirationSeconds").filter(|n| *n < 600) {
            errors.invalid(
                "spec.expirationSeconds",
                &n.into(),
                "may not specify a duration less than 600 seconds (10 minutes)",
            );
        }
    }

    fn columns(&self) -> &'static [Column] {
        const C: &[Column] =
            &[col("Age"), col("SignerName"), col("Requestor"), col("RequestedDuration"), col("Condition")];
        C
    }

    fn row(&self, object: &Value) -> Vec<Value> {
        let has = |kind: &str| {
            value::list(object, "status.conditions").iter().any(|c| value::text(c, "type") == kind)
        };
        let mut condition = match () {
            () if has("Denied") => "Denied".to_owned(),
            () if has("Approved") => "Approved".into(),
            () => "Pending".into(),
        };
        if has("Failed") {
            condition.push_str(",Failed");
        }
        if !value::text(object, "status.certificate").is_empty() {
            condition.push_str(",Issued");
        }
        let lasts = value::int(object, "spec.expirationSeconds").map_or("<none>".to_owned(), human::duration);
        vec![
            value::text(object, "spec.signerName").into(),
            value::text(object, "spec.username").into(),
            lasts.into(),
            condition.into(),
        ]
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["spec.signerName"]
    }
}
