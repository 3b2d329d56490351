//! The Node object: registration, status, lease; and what the rest of the agent knows of the node.

pub mod admit;
pub mod lease;
pub mod machine;
pub mod register;
pub mod status;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use orlop_api::quantity::Amount;
use parking_lot::RwLock;

use crate::cgroups::Cgroups;
use crate::config::Config;
use machine::Machine;

/// The runtime has not answered for this long: the node is not ready.
const RUNTIME_SILENCE: Duration = Duration::from_secs(30);

/// What the runtime says of itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RuntimeState {
    pub runtime_ready: bool,
    pub network_ready: bool,
    /// Why not.
    pub message: String,
    /// Handlers with (recursive read-only mounts, user namespaces).
    pub handlers: Vec<(String, bool, bool)>,
    pub supplemental_groups_policy: bool,
}

struct Inner {
    machine: Machine,
    node_ips: Vec<IpAddr>,
    allocatable: BTreeMap<String, Amount>,
    cgroups: Cgroups,
    changing: RwLock<Changing>,
    /// Somebody has asked for a look at the node now.
    wake: tokio::sync::Notify,
}

struct Changing {
    uid: Option<String>,
    runtime: RuntimeState,
    answered: Instant,
}

/// A handle to what is known of the node; cloning is cheap.
#[derive(Clone)]
pub struct NodeState(Arc<Inner>);

impl NodeState {
    pub fn new(config: &Config, node_ips: Vec<IpAddr>, cgroups: Cgroups) -> NodeState {
        let machine = Machine::read(config);
        let allocatable = machine.allocatable(&config.kubelet);
        let changing =
            RwLock::new(Changing { uid: None, runtime: RuntimeState::default(), answered: Instant::now() });
        NodeState(Arc::new(Inner {
            machine,
            node_ips,
            allocatable,
            cgroups,
            changing,
            wake: Default::default(),
        }))
    }

    pub fn machine(&self) -> &Machine {
        &self.0.machine
    }

    /// All addresses of the node.
    pub fn ips(&self) -> &[IpAddr] {
        &self.0.node_ips
    }

    /// The first address of each family, as pods' hostIPs.
    pub fn host_ips(&self) -> Vec<IpAddr> {
        let mut out: Vec<IpAddr> = Vec::with_capacity(2);
        for ip in &self.0.node_ips {
            if !out.iter().any(|o| o.is_ipv4() == ip.is_ipv4()) {
                out.push(*ip);
            }
        }
        out
    }

    pub fn allocatable(&self) -> BTreeMap<String, Amount> {
        self.0.allocatable.clone()
    }

    /// Bytes.
    pub fn memory_capacity(&self) -> i64 {
        self.0.machine.memory
    }

    pub fn cgroups(&self) -> &Cgroups {
        &self.0.cgroups
    }

    /// Makes and limits the cgroups above pods'.
    pub async fn limit_pods(&self, config: &Config) -> Result<(), crate::Error> {
        let k = &config.kubelet;
        let machine = self.machine();
        let (available, pids) = match k.enforces_allocatable() {
            true => (machine.available(k), machine::process_ids()),
            false => (machine.capacity(), None),
        };
        let cgroups = self.cgroups();
        cgroups.prepare(cgroups.node_limits(&available, pids)).await
    }

    /// The Node object's uid, once registered.
    pub fn uid(&self) -> Option<String> {
        self.0.changing.read().uid.clone()
    }

    pub fn set_uid(&self, uid: Option<String>) {
        self.0.changing.write().uid = uid;
    }

    pub fn runtime(&self) -> RuntimeState {
        self.0.changing.read().runtime.clone()
    }

    pub fn network_ready(&self) -> bool {
        self.0.changing.read().runtime.network_ready
    }

    pub(crate) fn set_runtime(&self, state: RuntimeState) {
        self.0.changing.write().runtime = state;
    }

    /// The runtime has just been listed.
    pub fn runtime_answered(&self) {
        self.0.changing.write().answered = Instant::now();
    }

    pub fn runtime_is_silent(&self) -> bool {
        self.0.changing.read().answered.elapsed() > RUNTIME_SILENCE
    }

    /// Asks for a look at the node now rather than with the next period.
    pub fn look_now(&self) {
        self.0.wake.notify_one();
    }

    pub(crate) async fn asked(&self) {
        self.0.wake.notified().await;
    }
}
