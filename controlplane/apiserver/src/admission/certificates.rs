//! CertificateApproval, CertificateSigning and CertificateSubjectRestriction: who may approve and sign which requests, that a request
//! tells the truth about who made it, and that nobody asks for `system:masters`.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject;
use serde_json::{Value, json};
use x509_parser::prelude::{FromDer, X509CertificationRequest};

use super::{Context, forbidden, text};
use crate::authz::node::identity;
use crate::authz::{Attributes as Question, Authorizer};
use crate::registry::{Attributes, Operation};
use crate::request_info::UserInfo;
use crate::status::Status;

const GROUP: &str = "certificates.k8s.io";
const CLIENT: &str = "kubernetes.io/kube-apiserver-client";
const KUBELET_CLIENT: &str = "kubernetes.io/kube-apiserver-client-kubelet";
const KUBELET_SERVING: &str = "kubernetes.io/kubelet-serving";

fn concerns(a: &Attributes) -> bool {
    a.info.api_group == GROUP && a.info.resource == "certificatesigningrequests"
}

/// Writes into a new request who made it, whatever the client claims.
pub(super) fn admit(a: &mut Attributes) {
    if !concerns(a) || a.operation != Operation::Create || !a.info.subresource.is_empty() {
        return;
    }
    let Some(spec) = a.object.as_mut().and_then(|o| o.get_mut("spec")).and_then(Value::as_object_mut) else {
        return;
    };
    spec.insert("username".into(), json!(a.user.name));
    spec.insert("groups".into(), json!(a.user.groups));
    for (key, value, empty) in [
        ("uid", json!(a.user.uid), a.user.uid.is_empty()),
        ("extra", json!(a.user.extra), a.user.extra.is_empty()),
    ] {
        if empty {
            spec.remove(key);
        } else {
            spec.insert(key.into(), value);
        }
    }
}

pub(super) fn validate(c: &Context, a: &Attributes) -> Result<(), Status> {
    if !concerns(a) {
        return Ok(());
    }
    let null = Value::Null;
    let (object, old) = (a.object.as_ref().unwrap_or(&null), a.old_object.as_ref().unwrap_or(&null));
    let verdict = match (a.operation, a.info.subresource.as_str()) {
        (Operation::Create, "") => subject_faults(object, identity(&a.user)),
        (Operation::Update, "approval") => signer_right(&c.authorizer, &a.user, "approve", old),
        (Operation::Update, "status")
            if old.pointer("/status/certificate") != object.pointer("/status/certificate") =>
        {
            signer_right(&c.authorizer, &a.user, "sign", old)
        }
        _ => Ok(()),
    };
    verdict.map_err(|why| forbidden(a, why))
}

/// The verb on the signer itself, or on all signers of its domain.
fn signer_right(authorizer: &Authorizer, user: &UserInfo, verb: &str, request: &Value) -> Result<(), String> {
    let signer = text(request, "/spec/signerName");
    let domain = signer.split('/').next().unwrap_or_default();
    let may = |name: &str| {
        authorizer.authorize(&Question::resource(user, verb, GROUP, "signers", "", name)).allowed()
    };
    if may(signer) || may(&format!("{domain}/*")) {
        Ok(())
    } else {
        Err(format!("user not permitted to {verb} requests with signerName {signer:?}"))
    }
}

fn subject_faults(request: &Value, node: Option<&str>) -> Result<(), String> {
    let signer = text(request, "/spec/signerName");
    if ![CLIENT, KUBELET_CLIENT, KUBELET_SERVING].contains(&signer) {
        return Ok(());
    }
    let (name, groups) =
        subject(text(request, "/spec/request")).map_err(|e| format!("failed to parse CSR: {e}"))?;
    if signer == CLIENT {
        return match groups.iter().any(|g| g == "system:masters") {
            true => Err(format!("use of {CLIENT} signer with system:masters group is not allowed")),
            false => Ok(()),
        };
    }
    match node {
        Some(node) if name != format!("system:node:{node}") => {
            Err(format!("can only create a node CSR with CN=system:node:{node}"))
        }
        _ => Ok(()),
    }
}

/// Common name and organisations of a base64-encoded PEM request.
fn subject(encoded: &str) -> Result<(String, Vec<String>), String> {
    let pem = STANDARD.decode(encoded).map_err(|e| e.to_string())?;
    let der = CertificateSigningRequestDer::from_pem_slice(&pem).map_err(|e| e.to_string())?;
    let (_, csr) = X509CertificationRequest::from_der(der.as_ref()).map_err(|e| e.to_string())?;
    let subject = &csr.certification_request_info.subject;
    let name = subject.iter_common_name().find_map(|a| a.as_str().ok()).unwrap_or_default().to_owned();
    Ok((name, subject.iter_organization().filter_map(|a| a.as_str().ok()).map(str::to_owned).collect()))
}

#[cfg(test)]
mod tests {
    use super::super::testing::attributes;
    use super::*;
    use rcgen::{CertificateParams, DnType, KeyPair};

    fn request(signer: &str, name: &str, group: &str) -> Value {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.distinguished_name.push(DnType::OrganizationName, group);
        let pem = params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap();
        json!({"metadata": {"name": "r"}, "spec": {"signerName": signer, "request": STANDARD.encode(pem), "username": "liar"}})
    }

    #[test]
    fn subjects() {
        assert!(subject_faults(&request(CLIENT, "jane", "dev"), None).is_ok());
        assert!(subject_faults(&request(CLIENT, "jane", "system:masters"), None).is_err());
        assert!(
            subject_faults(&request(KUBELET_CLIENT, "system:node:n1", "system:nodes"), Some("n1")).is_ok()
        );
        assert!(
            subject_faults(&request(KUBELET_CLIENT, "system:node:n2", "system:nodes"), Some("n1")).is_err()
        );
        assert!(subject_faults(&json!({"spec": {"signerName": CLIENT, "request": "AAAA"}}), None).is_err());
        assert!(
            subject_faults(&json!({"spec": {"signerName": "example.com/x", "request": "AAAA"}}), None)
                .is_ok()
        );
    }

    #[test]
    fn the_requester_is_written_in() {
        let object = request(CLIENT, "jane", "dev");
        let mut a = attributes(Operation::Create, "certificatesigningrequests", object, "jane");
        a.info.api_group = GROUP.into();
        admit(&mut a);
        assert_eq!(a.object.unwrap()["spec"]["username"], "jane");
    }

    #[test]
    fn approving_needs_the_signer() {
        let authorizer = Authorizer::default();
        let mut policy = authorizer.rbac.write();
        policy.put(
            "clusterroles",
            &json!({"metadata": {"name": "a"}, "rules": [{"verbs": ["approve"], "apiGroups": [GROUP],
            "resources": ["signers"], "resourceNames": ["example.com/*"]}]}),
        );
        policy.put(
            "clusterrolebindings",
            &json!({"metadata": {"name": "a"}, "roleRef": {"kind": "ClusterRole", "name": "a"},
            "subjects": [{"kind": "User", "name": "jane"}]}),
        );
        drop(policy);
        let jane = UserInfo { name: "jane".into(), ..UserInfo::default() };
        let ask = |signer: &str| {
            signer_right(&authorizer, &jane, "approve", &json!({"spec": {"signerName": signer}})).is_ok()
        };
        assert!(ask("example.com/a"));
        assert!(!ask(CLIENT));
    }
}
