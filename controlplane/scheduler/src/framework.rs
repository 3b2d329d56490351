//! What a plugin sees and says. Names and meaning follow upstream's scheduling framework.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod, PodSpec, Taint};
use orlop_api::meta::Key;
use orlop_api::pod::{self, Resources};
use orlop_api::quantity::{Amount, amount_or_zero};

/// A host port that a pod wants: address ("" and "0.0.0.0" mean all), protocol, port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostPort {
    pub ip: String,
    pub protocol: String,
    pub port: i32,
}

impl HostPort {
    /// Two pods cannot share a port on the same or on overlapping addresses.
    pub fn clashes(&self, other: &HostPort) -> bool {
        let any = |ip: &str| ip.is_empty() || ip == "0.0.0.0" || ip == "::";
        self.port == other.port
            && self.protocol == other.protocol
            && (self.ip == other.ip || any(&self.ip) || any(&other.ip))
    }
}

/// A pod with what the plugins ask of it worked out once.
#[derive(Clone, Debug)]
pub struct PodInfo {
    pub key: Key,
    pub uid: String,
    pub priority: i32,
    pub requests: Resources,
    /// Requests for scoring: a container without one counts as 100m and 200Mi, so that such pods spread too.
    pub nonzero: (Amount, Amount),
    pub ports: Vec<HostPort>,
    pub spec: Arc<PodSpec>,
}

impl PodInfo {
    pub fn of(p: &Pod) -> PodInfo {
        let spec = p.spec.clone().unwrap_or_default();
        let ports = spec
            .containers
            .iter()
            .chain(spec.init_containers.iter().flatten().filter(|c| pod::is_sidecar(c)))
            .flat_map(|c| c.ports.iter().flatten())
            .filter_map(|port| {
                let host_port = port.host_port.filter(|p| *p > 0)?;
                Some(HostPort {
                    ip: port.host_ip.clone().unwrap_or_default(),
                    protocol: port.protocol.clone().unwrap_or_else(|| "TCP".into()),
                    port: host_port,
                })
            })
            .collect();
        PodInfo {
            key: Key::of(&p.metadata),
            uid: p.metadata.uid.clone().unwrap_or_default(),
            priority: spec.priority.unwrap_or(0),
            requests: pod::requests(&spec),
            nonzero: nonzero_requests(&spec),
            ports,
            spec: Arc::new(spec),
        }
    }
}

fn nonzero_requests(spec: &PodSpec) -> (Amount, Amount) {
    let of = |name: &str, default: Amount| -> Amount {
        spec.containers
            .iter()
            .map(|c| {
                let requests = c.resources.as_ref().and_then(|r| r.requests.as_ref());
                requests.and_then(|r| r.get(name)).map(amount_or_zero).unwrap_or(default)
            })
            .sum()
    };
    (of("cpu", Amount::from_milli(100)), of("memory", Amount::from_units(200 << 20)))
}

/// A node with what is booked on it.
#[derive(Clone, Debug, Default)]
pub struct NodeInfo {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub taints: Vec<Taint>,
    pub unschedulable: bool,
    pub allocatable: Resources,
    pub requested: Resources,
    pub nonzero: (Amount, Amount),
    pub pods: usize,
    pub ports: Vec<HostPort>,
    /// Image names with their sizes in bytes.
    pub images: BTreeMap<String, i64>,
}

impl NodeInfo {
    /// Takes over what the Node object says; bookings stay.
    pub fn set_node(&mut self, n: &Node) {
        let spec = n.spec.clone().unwrap_or_default();
        let status = n.status.as_ref();
        self.name = n.metadata.name.clone().unwrap_or_default();
        self.labels = n.metadata.labels.clone().unwrap_or_default();
        self.taints = spec.taints.unwrap_or_default();
        self.unschedulable = spec.unschedulable.unwrap_or(false);
        let allocatable = status.and_then(|s| s.allocatable.as_ref());
        self.allocatable =
            allocatable.into_iter().flatten().map(|(k, v)| (k.clone(), amount_or_zero(v))).collect();
        self.images = status
            .and_then(|s| s.images.as_ref())
            .into_iter()
            .flatten()
            .flat_map(|i| {
                let size = i.size_bytes.unwrap_or(0);
                i.names.iter().flatten().map(move |n| (n.clone(), size))
            })
            .collect();
    }

    pub fn book(&mut self, p: &PodInfo) {
        for (k, v) in &p.requests {
            *self.requested.entry(k.clone()).or_default() += *v;
        }
        self.nonzero = (self.nonzero.0 + p.nonzero.0, self.nonzero.1 + p.nonzero.1);
        self.pods += 1;
        self.ports.extend(p.ports.iter().cloned());
    }

    pub fn unbook(&mut self, p: &PodInfo) {
        for (k, v) in &p.requests {
            if let Some(booked) = self.requested.get_mut(k) {
                *booked = *booked - *v;
            }
        }
        self.nonzero = (self.nonzero.0 - p.nonzero.0, self.nonzero.1 - p.nonzero.1);
        self.pods = self.pods.saturating_sub(1);
        for port in &p.ports {
            if let Some(i) = self.ports.iter().position(|x| x == port) {
                self.ports.swap_remove(i);
            }
        }
    }
}

/// Why a node does not take a pod, in the words that the FailedScheduling event counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfit {
    pub reasons: BTreeSet<String>,
    /// Nothing that happens to other pods can change it.
    pub unresolvable: bool,
}

impl Unfit {
    pub fn new(reason: impl Into<String>) -> Unfit {
        Unfit { reasons: BTreeSet::from([reason.into()]), unresolvable: false }
    }

    pub fn unresolvable(reason: impl Into<String>) -> Unfit {
        Unfit { unresolvable: true, ..Unfit::new(reason) }
    }
}

/// Says whether a node can take a pod.
pub trait Filter: Send + Sync {
    fn name(&self) -> &'static str;
    fn filter(&self, pod: &PodInfo, node: &NodeInfo) -> Result<(), Unfit>;
}

/// The highest score that a plugin gives.
pub const MAX_SCORE: i64 = 100;

/// Says how well a node suits a pod.
pub trait Score: Send + Sync {
    fn name(&self) -> &'static str;
    fn weight(&self) -> i64;
    /// The raw scores of all feasible nodes at once, each brought into 0..=[`MAX_SCORE`].
    fn score(&self, pod: &PodInfo, nodes: &[&NodeInfo]) -> Vec<i64>;
}

/// Stretches scores so that the highest becomes [`MAX_SCORE`]; `reverse` turns a count of drawbacks into a score.
pub fn normalize(mut scores: Vec<i64>, reverse: bool) -> Vec<i64> {
    let max = scores.iter().copied().max().unwrap_or(0);
    for s in &mut scores {
        let scaled = if max == 0 { 0 } else { *s * MAX_SCORE / max };
        *s = if reverse { MAX_SCORE - scaled } else { scaled };
    }
    scores
}
