//! Who may do what: `system:masters` may everything, then the node authorizer and RBAC, each of which can only allow.

pub mod bootstrap_roles;
pub mod controller_roles;
pub mod node;
pub mod policy_table;
pub mod rbac;
mod sync;

use parking_lot::RwLock;

use crate::request_info::{RequestInfo, UserInfo};

pub use sync::follow;

/// One question: may `user` do this?
#[derive(Clone, Debug)]
pub struct Attributes<'a> {
    pub user: &'a UserInfo,
    pub verb: &'a str,
    pub group: &'a str,
    pub resource: &'a str,
    pub subresource: &'a str,
    pub namespace: &'a str,
    pub name: &'a str,
    /// For non-resource requests; empty otherwise.
    pub path: &'a str,
    pub is_resource: bool,
    /// The request's field selector, for rules that depend on how a list is narrowed.
    pub field_selector: &'a str,
}

impl<'a> Attributes<'a> {
    /// The question that a request raises.
    pub fn of_request(user: &'a UserInfo, info: &'a RequestInfo, field_selector: &'a str) -> Self {
        Attributes {
            user,
            verb: &info.verb,
            group: &info.api_group,
            resource: &info.resource,
            subresource: &info.subresource,
            namespace: &info.namespace,
            name: &info.name,
            path: &info.path,
            is_resource: info.is_resource_request,
            field_selector,
        }
    }

    /// A question about a resource.
    pub fn resource(
        user: &'a UserInfo,
        verb: &'a str,
        group: &'a str,
        resource: &'a str,
        namespace: &'a str,
        name: &'a str,
    ) -> Self {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        Attributes {
            user,
            verb,
            group,
            resource,
            subresource,
            namespace,
            name,
            path: "",
            is_resource: true,
            field_selector: "",
        }
    }

    /// The sentence after "…is forbidden:" that tells the user what was asked.
    pub fn denial(&self) -> String {
        let user = &self.user.name;
        let verb = self.verb;
        if !self.is_resource {
            return format!("User \"{user}\" cannot {verb} path \"{}\"", self.path);
        }
        let resource = self.combined_resource();
        let scope = if self.namespace.is_empty() {
            " at the cluster scope".to_owned()
        } else {
            format!(" in the namespace \"{}\"", self.namespace)
        };
        format!(
            "User \"{user}\" cannot {verb} resource \"{resource}\" in API group \"{}\"{scope}",
            self.group
        )
    }

    /// "pods" or "pods/log".
    pub fn combined_resource(&self) -> String {
        if self.subresource.is_empty() {
            self.resource.to_owned()
        } else {
            format!("{}/{}", self.resource, self.subresource)
        }
    }
}

/// The answer, with the reason that a SubjectAccessReview shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Allow(String),
    NoOpinion(String),
}

impl Decision {
    pub fn allowed(&self) -> bool {
        matches!(self, Decision::Allow(_))
    }
}

/// All authorizers over state that [`follow`] keeps current.
#[derive(Default)]
pub struct Authorizer {
    pub(crate) rbac: RwLock<rbac::Policy>,
    pub(crate) graph: RwLock<node::Graph>,
}

impl Authorizer {
    /// Asks each authorizer in turn; the first that allows wins. Never blocks on I/O.
    pub fn authorize(&self, attributes: &Attributes<'_>) -> Decision {
        if attributes.user.in_group("system:masters") {
            return Decision::Allow(String::new());
        }
        let mut reasons = Vec::new();
        if let Some(node_name) = node::identity(attributes.user) {
            match self.graph.read().authorize(node_name, attributes) {
                Decision::Allow(reason) => return Decision::Allow(reason),
                Decision::NoOpinion(reason) => reasons.push(reason),
            }
        }
        match self.rbac.read().authorize(attributes) {
            Decision::Allow(reason) => return Decision::Allow(reason),
            Decision::NoOpinion(reason) => reasons.push(reason),
        }
        reasons.retain(|r| !r.is_empty());
        Decision::NoOpinion(reasons.join(", "))
    }

    /// The rules that apply to `user` in `namespace`; an empty namespace gives the cluster-wide ones only.
    pub fn rules_for(&self, user: &UserInfo, namespace: &str) -> Vec<rbac::Rule> {
        self.rbac.read().rules_for(user, namespace)
    }

    /// The rules behind a role reference, `None` when there is no such role.
    pub fn rules_of_role(&self, kind: &str, namespace: &str, name: &str) -> Option<Vec<rbac::Rule>> {
        self.rbac.read().rules_of_role(kind, namespace, name)
    }
}
