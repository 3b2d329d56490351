//! Admission control: upstream's default plugins, one file each, in upstream's order. Decisions are pure functions of the objects
//! involved; what is here reads those objects and calls them.

mod certificates;
mod default_storage_class;
mod default_toleration_seconds;
mod limit_ranger;
mod namespace_lifecycle;
mod node_restriction;
mod pod_security;
mod pod_security_checks;
mod priority;
mod rbac_escalation;
mod runtime_class;
mod service_account;
mod storage_protection;
mod taint_nodes;

use std::sync::Arc;

use async_trait::async_trait;
use serde_json::Value;

use crate::authz::Authorizer;
use crate::registry::{Admission, Attributes, Operation, Registry};
use crate::status::Status;

/// The chain that the registry calls.
pub struct Chain {
    context: Context,
}

/// What plugins may look at.
pub(crate) struct Context {
    pub registry: Registry,
    pub authorizer: Arc<Authorizer>,
}

impl Chain {
    pub fn new(registry: Registry, authorizer: Arc<Authorizer>) -> Chain {
        Chain { context: Context { registry, authorizer } }
    }
}

/// Whether the request is for this resource itself, not for a subresource of it.
fn is(a: &Attributes, group: &str, resource: &str) -> bool {
    a.info.api_group == group && a.info.resource == resource && a.info.subresource.is_empty()
}

fn text<'a>(v: &'a Value, pointer: &str) -> &'a str {
    v.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn items<'a>(v: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    v.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

/// A list inside an object, made when it is missing.
fn list_mut<'a>(object: &'a mut Value, key: &str) -> &'a mut Vec<Value> {
    let slot = &mut object[key];
    if !slot.is_array() {
        *slot = Value::Array(Vec::new());
    }
    match slot {
        Value::Array(list) => list,
        _ => unreachable!("made an array above"),
    }
}

const MIRROR: &str = "/metadata/annotations/kubernetes.io~1config.mirror";

/// Whether a pod stands for a static pod of its node.
fn is_mirror(pod: &Value) -> bool {
    pod.pointer(MIRROR).is_some()
}

/// 403 about the object of the request.
fn forbidden(a: &Attributes, why: impl AsRef<str>) -> Status {
    let name = match a.info.name.as_str() {
        "" => a.object.as_ref().map(|o| text(o, "/metadata/name")).unwrap_or_default(),
        name => name,
    };
    Status::forbidden(&a.info.api_group, &a.info.resource, name, why.as_ref())
}

#[async_trait]
impl Admission for Chain {
    async fn admit(&self, a: &mut Attributes) -> Result<(), Status> {
        let c = &self.context;
        namespace_lifecycle::check(c, a).await?;
        node_restriction::check(c, a).await?;
        certificates::admit(a);
        if a.operation == Operation::Create && is(a, "", "pods") {
            limit_ranger::admit_pod(c, a).await?;
            service_account::admit(c, a).await?;
            priority::admit(c, a).await?;
            default_toleration_seconds::admit(a);
            runtime_class::admit(c, a).await?;
        } else if a.operation == Operation::Update && is(a, "", "pods") {
            default_toleration_seconds::admit(a);
        } else if a.operation == Operation::Create && is(a, "", "nodes") {
            taint_nodes::admit(a);
        } else if a.operation == Operation::Create && is(a, "", "persistentvolumeclaims") {
            default_storage_class::admit(c, a).await?;
            storage_protection::admit(a);
        } else if a.operation == Operation::Create && is(a, "", "persistentvolumes") {
            storage_protection::admit(a);
        } else if a.operation == Operation::Update && is(a, "", "pods") {
            priority::keep(a);
        }
        Ok(())
    }

    async fn validate(&self, a: &mut Attributes) -> Result<(), Status> {
        let c = &self.context;
        if a.operation == Operation::Create && is(a, "", "pods") {
            service_account::validate(c, a).await?;
            limit_ranger::validate_pod(c, a).await?;
        }
        if a.operation == Operation::Create && is(a, "", "persistentvolumeclaims") {
            limit_ranger::validate_claim(c, a).await?;
        }
        pod_security::validate(c, a).await?;
        priority::validate_class(c, a).await?;
        certificates::validate(c, a)?;
        rbac_escalation::validate(c, a)
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use crate::request_info::{RequestInfo, UserInfo};

    /// Attributes of a request on a resource by a user named `user`.
    pub fn attributes(operation: Operation, resource: &str, object: Value, user: &str) -> Attributes {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        let namespace = text(&object, "/metadata/namespace").to_owned();
        let name = text(&object, "/metadata/name").to_owned();
        let groups =
            if user.starts_with("system:node:") { vec!["system:nodes".to_owned()] } else { Vec::new() };
        Attributes {
            operation,
            user: UserInfo { name: user.into(), groups, ..UserInfo::default() },
            info: RequestInfo {
                is_resource_request: true,
                resource: resource.into(),
                subresource: subresource.into(),
                namespace,
                name,
                ..RequestInfo::default()
            },
            kind: String::new(),
            object: Some(object),
            old_object: None,
            dry_run: false,
            options: Value::Null,
            warnings: Vec::new(),
        }
    }
}
