//! What the cluster says: Services and endpoints, reduced to what the datapath needs. Pure.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

/// `namespace/name`.
pub type Name = Arc<str>;

/// A Service, without what packets never see.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Service {
    /// One per family at most.
    pub cluster_ips: Vec<IpAddr>,
    pub external_ips: Vec<IpAddr>,
    /// Load balancer IPs whose ipMode is VIP.
    pub load_balancer_ips: Vec<IpAddr>,
    /// loadBalancerSourceRanges: who may come by load balancer IPs; empty for all.
    pub source_ranges: Vec<IpNet>,
    pub ports: Vec<Port>,
    /// internalTrafficPolicy: Local.
    pub internal_local: bool,
    /// externalTrafficPolicy: Local.
    pub external_local: bool,
    /// Seconds of ClientIP affinity; 0 for none.
    pub affinity_seconds: u32,
    /// 0 for none.
    pub health_check_node_port: u16,
    /// How its backends are chosen; `None`: as the proxy is set.
    pub selection: Option<crate::Selection>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Port {
    pub name: Box<str>,
    /// IP protocol number.
    pub proto: u8,
    pub port: u16,
    /// 0 for none.
    pub node_port: u16,
}

/// An EndpointSlice.
#[derive(Clone, Debug, PartialEq)]
pub struct Slice {
    pub service: Name,
    pub v4: bool,
    pub ports: Vec<SlicePort>,
    pub endpoints: Vec<Endpoint>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct SlicePort {
    pub name: Box<str>,
    pub proto: u8,
    pub port: u16,
}

/// One endpoint: all of its addresses are interchangeable, so the first stands for it (as upstream does).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Endpoint {
    pub ip: IpAddr,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    /// On this node.
    pub local: bool,
    pub hints: Hints,
}

/// Whom an endpoint is meant for (topology hints, trafficDistribution), as seen from this node.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Hints {
    pub node: Hint,
    pub zone: Hint,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Hint {
    /// For anyone.
    #[default]
    None,
    /// For this node or zone.
    Ours,
    Others,
}

/// Everything known, and which services changed since they were last taken.
#[derive(Default)]
pub struct Model {
    services: HashMap<Name, Service>,
    slices: HashMap<Name, Slice>,
    /// Slices by service. Few each, so a list.
    of_service: HashMap<Name, Vec<Name>>,
    dirty: HashSet<Name>,
    /// Endpoints left slices since this was last asked.
    gone: bool,
    /// This node's addresses.
    node_ips: Vec<IpAddr>,
}

impl Model {
    /// Notes a Service's present state; `None` when it is gone or none of our business.
    pub fn set_service(&mut self, name: &str, service: Option<Service>) {
        match service {
            Some(s) if self.services.get(name) == Some(&s) => {}
            Some(s) => {
                let name = self.shared_name(name);
                self.dirty.insert(name.clone());
                self.services.insert(name, s);
            }
            None => self.dirty.extend(self.services.remove_entry(name).map(|(name, _)| name)),
        }
    }

    /// The name as it is kept already, so that there is one copy of each.
    fn shared_name(&self, name: &str) -> Name {
        let of_service = || self.of_service.get_key_value(name).map(|(n, _)| n.clone());
        self.services
            .get_key_value(name)
            .map(|(n, _)| n.clone())
            .or_else(of_service)
            .unwrap_or_else(|| name.into())
    }

    /// Notes an EndpointSlice's present state under its `namespace/name`.
    pub fn set_slice(&mut self, name: &str, slice: Option<Slice>) {
        if slice.is_some() && self.slices.get(name) == slice.as_ref() {
            return;
        }
        if let Some((key, old)) = self.slices.remove_entry(name) {
            self.gone |= slice.as_ref().is_none_or(|new| lacks(new, &old));
            if let Some(list) = self.of_service.get_mut(&old.service) {
                list.retain(|s| *s != key);
                if list.is_empty() {
                    self.of_service.remove(&old.service);
                }
            }
            self.dirty.insert(old.service);
        }
        if let Some(mut slice) = slice {
            slice.service = self.shared_name(&slice.service);
            let key: Name = name.into();
            self.of_service.entry(slice.service.clone()).or_default().push(key.clone());
            self.dirty.insert(slice.service.clone());
            self.slices.insert(key, slice);
        }
    }

    /// Whether endpoints left slices since this was last asked.
    pub fn take_gone(&mut self) -> bool {
        std::mem::take(&mut self.gone)
    }

    /// Notes this node's addresses, on which source ranges depend.
    pub fn set_node_ips(&mut self, ips: Vec<IpAddr>) {
        if self.node_ips != ips {
            self.node_ips = ips;
            let ranged = self.services.iter().filter(|(_, s)| !s.source_ranges.is_empty());
            self.dirty.extend(ranged.map(|(n, _)| n.clone()));
        }
    }

    pub fn node_ips(&self) -> &[IpAddr] {
        &self.node_ips
    }

    /// Whether an address is among a service's endpoints, in whatever state.
    pub fn has_endpoint(&self, service: &str, ip: IpAddr) -> bool {
        self.slices_of(service).flat_map(|s| &s.endpoints).any(|e| e.ip == ip)
    }

    pub fn service(&self, name: &str) -> Option<&Service> {
        self.services.get(name)
    }

    pub fn services(&self) -> impl Iterator<Item = (&Name, &Service)> {
        self.services.iter()
    }

    pub fn slices_of(&self, service: &str) -> impl Iterator<Item = &Slice> {
        self.of_service.get(service).into_iter().flatten().filter_map(|k| self.slices.get(k))
    }

    /// How many ready endpoints a service has on this node.
    pub fn ready_here(&self, service: &str) -> usize {
        let here = self.slices_of(service).flat_map(|s| &s.endpoints).filter(|e| e.local && e.ready);
        here.map(|e| e.ip).collect::<HashSet<_>>().len()
    }

    /// Names of all services, and of slices.
    pub fn names(&self) -> (Vec<Name>, Vec<Name>) {
        (self.services.keys().cloned().collect(), self.slices.keys().cloned().collect())
    }

    /// Takes the names of services that changed.
    pub fn take_dirty(&mut self) -> Vec<Name> {
        self.dirty.drain().collect()
    }

    /// Puts a service back among the changed ones.
    pub fn mark(&mut self, name: Name) {
        self.dirty.insert(name);
    }

    pub fn is_clean(&self) -> bool {
        self.dirty.is_empty()
    }
}

/// Whether an endpoint of the one is not in the other any more, in whatever state.
fn lacks(new: &Slice, old: &Slice) -> bool {
    // Most changes are of conditions, and those that add put it at the end.
    let same = old.endpoints.iter().zip(&new.endpoints).take_while(|(o, n)| o.ip == n.ip).count();
    let rest: HashSet<IpAddr> = new.endpoints[same..].iter().map(|e| e.ip).collect();
    old.endpoints[same..].iter().any(|e| !rest.contains(&e.ip))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_that_leave_are_noticed_whatever_their_state() {
        let slice = |ips: &[u8]| Slice {
            service: "n/s".into(),
            v4: true,
            ports: Vec::new(),
            endpoints: ips
                .iter()
                .map(|n| Endpoint {
                    ip: IpAddr::from([10, 0, 0, *n]),
                    ready: false,
                    serving: n.is_multiple_of(2),
                    terminating: true,
                    local: false,
                    hints: Hints::default(),
                })
                .collect(),
        };
        let mut m = Model::default();
        for (now, gone) in [
            (Some(slice(&[1, 2, 3])), false),
            (Some(slice(&[1, 2, 3, 4])), false),
            (Some(slice(&[4, 3, 2, 1])), false),
            (Some(slice(&[4, 2, 1])), true),
            (Some(slice(&[4, 2, 1])), false),
            (Some(slice(&[4, 2])), true),
            (Some(slice(&[4, 5])), true),
            (None, true),
            (None, false),
        ] {
            m.set_slice("n/s-1", now.clone());
            assert_eq!(m.take_gone(), gone, "{now:?}");
        }
    }
}
