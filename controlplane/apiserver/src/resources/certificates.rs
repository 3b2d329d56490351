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

/// Gives conditions the times that they lack. One whose status is what it was keeps the time of its transition.
pub fn stamp(new: &mut Value, old: &Value) {
    let now = crate::registry::now();
    for c in value::list_mut(new, "status.conditions") {
        if !value::has(c, "lastUpdateTime") {
            value::set(c, "lastUpdateTime", now.clone());
        }
        if !value::has(c, "lastTransitionTime") {
            let same = |o: &&Value| ["type", "status"].iter().all(|f| value::text(o, f) == value::text(c, f));
            let before = value::list(old, "status.conditions").iter().find(same);
            let at = before.map(|o| value::text(o, "lastTransitionTime")).filter(|t| !t.is_empty());
            let at = at.map_or_else(|| now.clone(), |t| t.into());
            value::set(c, "lastTransitionTime", at);
        }
    }
}

struct Request;

impl Strategy for Request {
    fn prepare_update(&self, new: &mut Value, old: &Value) {
        value::carry(new, old, "spec");
    }

    fn prepare_status(&self, new: &mut Value, old: &Value) {
        // Approval and denial go through their own endpoint: what is stored keeps its place, what is new is dropped.
        let decided = |c: &Value| matches!(value::text(c, "type"), "Approved" | "Denied");
        let mut kept = value::list(old, "status.conditions").iter().filter(|c| decided(c)).cloned();
        let mut conditions: Vec<Value> = Vec::new();
        for c in value::list(new, "status.conditions") {
            conditions.extend(if decided(c) { kept.next() } else { Some(c.clone()) });
        }
        conditions.extend(kept);
        if conditions.is_empty() {
            value::remove(new, "status.conditions");
        } else {
            value::set(new, "status.conditions", conditions);
        }
        stamp(new, old);
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn decisions_keep_their_place_and_every_condition_has_its_times() {
        let approved = json!({"type": "Approved", "status": "True", "lastUpdateTime": "2026-01-01T00:00:00Z",
            "lastTransitionTime": "2026-01-01T00:00:00Z"});
        let old = json!({"status": {"conditions": [{"type": "x", "status": "True"}, approved.clone()]}});
        let forged = json!({"type": "Approved", "status": "False"});
        let mut new = json!({"status": {"conditions": [{"type": "x", "status": "True"}, forged.clone(), {"type": "y"}, forged]}});
        Request.prepare_status(&mut new, &old);
        let all = value::list(&new, "status.conditions");
        assert_eq!(all.iter().map(|c| value::text(c, "type")).collect::<Vec<_>>(), ["x", "Approved", "y"]);
        assert_eq!(all[1], approved);
        assert!(all.iter().all(|c| value::has(c, "lastUpdateTime") && value::has(c, "lastTransitionTime")));
        let mut without = json!({"status": {}});
        Request.prepare_status(&mut without, &old);
        assert_eq!(value::list(&without, "status.conditions"), [approved]);
    }

    #[test]
    fn an_unchanged_status_keeps_the_time_of_its_transition() {
        let old = json!({"status": {"conditions": [{"type": "a", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}});
        for (status, kept) in [("True", true), ("False", false)] {
            let mut new = json!({"status": {"conditions": [{"type": "a", "status": status}]}});
            stamp(&mut new, &old);
            let at = value::text(&value::list(&new, "status.conditions")[0], "lastTransitionTime");
            assert_eq!(at == "2026-01-01T00:00:00Z", kept, "{status}");
        }
    }
}
