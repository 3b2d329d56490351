//! The seam between the registry and admission control.

use async_trait::async_trait;
use serde_json::Value;

use crate::{
    request_info::{RequestInfo, UserInfo},
    status::Status,
};

/// What is being done to the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// A new object, or a write to a create-only subresource such as `binding`.
    Create,
    /// A change of an existing object or of a subresource.
    Update,
    /// Removal.
    Delete,
    /// A streaming subresource such as `exec`.
    Connect,
}

impl Operation {
    /// The name in AdmissionReview and webhook rules.
    pub fn as_str(self) -> &'static str {
        match self {
            Operation::Create => "CREATE",
            Operation::Update => "UPDATE",
            Operation::Delete => "DELETE",
            Operation::Connect => "CONNECT",
        }
    }
}

/// One request as admission sees it.
#[derive(Clone, Debug)]
pub struct Attributes {
    /// What is being done.
    pub operation: Operation,
    /// Who does it.
    pub user: UserInfo,
    /// Resource, subresource, namespace and name (empty on create with `generateName` until a name is made).
    pub info: RequestInfo,
    /// Kind of `object`, for example `Pod`, or `Scale` for a scale subresource.
    pub kind: String,
    /// The object as it would be stored; mutating admission may change it. `None` on delete.
    pub object: Option<Value>,
    /// The object as it is stored. `None` on create.
    pub old_object: Option<Value>,
    /// Nothing will be stored.
    pub dry_run: bool,
    /// CreateOptions, UpdateOptions or DeleteOptions as JSON.
    pub options: Value,
    /// Texts for the `Warning` header.
    pub warnings: Vec<String>,
}

/// Admission control as the registry calls it: `admit` before validation, `validate` after it.
/// Both may run several times for one request when a write races with another.
#[async_trait]
pub trait Admission: Send + Sync + 'static {
    /// May change `attrs.object`.
    async fn admit(&self, attrs: &mut Attributes) -> Result<(), Status>;
    /// May refuse; must not change `attrs.object`.
    async fn validate(&self, attrs: &mut Attributes) -> Result<(), Status>;
}

/// Admits everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct AdmitAll;

#[async_trait]
impl Admission for AdmitAll {
    async fn admit(&self, _attrs: &mut Attributes) -> Result<(), Status> {
        Ok(())
    }

    async fn validate(&self, _attrs: &mut Attributes) -> Result<(), Status> {
        Ok(())
    }
}
