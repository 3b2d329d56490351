//! NamespaceLifecycle: objects need a namespace that exists, new ones one that is not being deleted; the system's own stay.

use super::{Context, forbidden, text};
use crate::registry::{Attributes, Operation};
use crate::status::{Cause, Status};

const IMMORTAL: [&str; 3] = ["default", "kube-system", "kube-public"];

pub(super) async fn check(c: &Context, a: &Attributes) -> Result<(), Status> {
    if a.info.api_group.is_empty() && a.info.resource == "namespaces" {
        if a.operation == Operation::Delete && IMMORTAL.contains(&a.info.name.as_str()) {
            return Err(forbidden(a, "this namespace may not be deleted"));
        }
        return Ok(());
    }
    let review = a.info.api_group == "authorization.k8s.io";
    if a.info.namespace.is_empty() || a.operation == Operation::Delete || review {
        return Ok(());
    }
    // The registry answers from the store's own state, so there is no cache that could lag.
    let namespace = c.registry.get("", "namespaces", "", &a.info.namespace).await?;
    if a.operation == Operation::Create && text(&namespace, "/status/phase") == "Terminating" {
        let name = &a.info.namespace;
        let mut status = forbidden(
            a,
            format!("unable to create new content in namespace {name} because it is being terminated"),
        );
        status.details.get_or_insert_with(Default::default).causes.push(Cause {
            reason: "NamespaceTerminating".into(),
            message: format!("namespace {name} is being terminated"),
            field: "metadata.namespace".into(),
        });
        return Err(status);
    }
    Ok(())
}
