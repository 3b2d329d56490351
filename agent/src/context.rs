//! What the agent's parts share.

use std::sync::Arc;

use orlop_base::supervise::TaskGroup;
use orlop_base::telemetry::Metrics;

use crate::config::Config;
use crate::cri::Cri;
use crate::events::Events;
use crate::images::Images;
use crate::metrics::AgentMetrics;
use crate::node::NodeState;
use crate::pods::manager::Pods;
use crate::services::Services;
use crate::userns::UserNamespaces;
use crate::volumes::Volumes;

/// Handles for the parts of one agent; everything in it is cheap to clone.
#[derive(Clone)]
pub struct Context {
    pub config: Arc<Config>,
    pub cri: Cri,
    /// `None` when the agent runs without an API server.
    pub client: Option<kube::Client>,
    /// Pods of this node and what runs of them.
    pub pods: Pods,
    pub events: Events,
    /// What /metrics encodes.
    pub registry: Arc<Metrics>,
    pub metrics: AgentMetrics,
    pub tasks: TaskGroup,
    /// The runtime's name, which prefixes container ids in statuses: `containerd://…`.
    pub runtime_name: String,
    pub runtime_version: String,
    pub images: Images,
    pub volumes: Volumes,
    pub services: Services,
    pub node: NodeState,
    /// Ids of pods with `hostUsers: false`.
    pub users: UserNamespaces,
}
