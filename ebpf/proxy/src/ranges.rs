//! Addresses that ClusterIPs are taken from (ServiceCIDR), and whether the maps have them. Pure.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;
use orlop_ebpf_loader::Range;

use crate::desired::range;

/// Ranges by the name of the object that has them.
#[derive(Default)]
pub struct ServiceRanges {
    by_name: BTreeMap<String, Vec<IpNet>>,
    /// A list was complete, or there is none: until then what an earlier process wrote stays.
    known: bool,
    /// The maps may say something else.
    changed: bool,
    /// The API server would not say; told once until it does.
    unknown: bool,
}

impl ServiceRanges {
    /// An object's ranges; none when it is gone.
    pub fn set(&mut self, name: &str, nets: Vec<IpNet>) {
        self.unknown = false;
        let known = self.by_name.get(name).map_or(&[][..], |n| n);
        self.changed |= known != nets;
        if nets.is_empty() {
            self.by_name.remove(name);
        } else {
            self.by_name.insert(name.to_owned(), nets);
        }
    }

    /// A list is complete: these are all.
    pub fn keep(&mut self, names: &HashSet<String>) {
        self.by_name.retain(|n, _| names.contains(n));
        (self.known, self.changed, self.unknown) = (true, true, false);
    }

    /// Nothing is known; says whether that is new.
    pub fn forget(&mut self) -> bool {
        if std::mem::replace(&mut self.unknown, true) {
            return false;
        }
        self.by_name.clear();
        (self.known, self.changed) = (true, true);
        true
    }

    pub fn changed(&self) -> bool {
        self.known && self.changed
    }

    /// The node's addresses may be others: what the maps must say depends on them.
    pub fn look_again(&mut self) {
        self.changed = true;
    }

    /// What the maps must say, when they may not, each once; and ranges that are left out, as the node itself lives there: what it
    /// sends to its neighbours is not for Services.
    pub fn wanted(&self, node_ips: &[IpAddr]) -> Option<(Vec<Range>, Vec<IpNet>)> {
        if !self.changed() {
            return None;
        }
        let (mut all, mut left_out) = (Vec::new(), Vec::new());
        for net in self.by_name.values().flatten() {
            if node_ips.iter().any(|ip| net.contains(ip)) {
                left_out.push(*net);
            } else if !all.contains(&range(net)) {
                all.push(range(net));
            }
        }
        Some((all, left_out))
    }

    /// The maps say it.
    pub fn written(&mut self) {
        self.changed = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use orlop_ebpf_common::addr_to;

    fn nets(text: &str) -> Vec<IpNet> {
        text.split_whitespace().map(|n| n.parse().unwrap()).collect()
    }

    /// What is to be written now, and then is.
    fn write(r: &mut ServiceRanges) -> Option<Vec<String>> {
        let (wanted, left_out) = r.wanted(&["192.0.2.1".parse().unwrap()])?;
        assert_eq!(left_out, []);
        r.written();
        Some(wanted.iter().map(|(k, bits)| format!("{}/{bits}", addr_to(&k.addr))).collect())
    }

    #[test]
    fn ranges_are_those_of_all_objects() {
        let mut r = ServiceRanges::default();
        r.look_again();
        r.set("kubernetes", nets("10.96.0.0/12 fd00::/112"));
        assert_eq!(write(&mut r), None, "what an earlier process wrote stays until all is known");
        r.set("more", nets("10.112.0.0/16"));
        r.set("again", nets("10.112.0.0/16"));
        r.keep(&["kubernetes", "more", "again"].map(str::to_owned).into());
        assert_eq!(write(&mut r).unwrap(), ["10.112.0.0/112", "10.96.0.0/108", "fd00::/112"]);
        r.set("more", nets("10.112.0.0/16"));
        r.set("none", nets(""));
        assert_eq!(write(&mut r), None, "nothing new");
        r.set("again", nets(""));
        assert_eq!(write(&mut r).unwrap(), ["10.96.0.0/108", "fd00::/112", "10.112.0.0/112"]);
        r.keep(&["more".to_owned()].into());
        assert_eq!(write(&mut r).unwrap(), ["10.112.0.0/112"]);

        assert!(r.forget(), "told once");
        assert!(!r.forget());
        assert_eq!(write(&mut r).unwrap(), [""; 0]);
        assert_eq!(write(&mut r), None);
        r.set("kubernetes", nets("10.96.0.0/12"));
        assert_eq!(write(&mut r).unwrap(), ["10.96.0.0/108"]);
        assert!(r.forget(), "the next time is a new one");
    }
    #[test]
    fn where_the_node_lives_nothing_is_for_services_alone() {
        let mut r = ServiceRanges::default();
        r.set("kubernetes", nets("10.96.0.0/12 fd00::/112"));
        r.keep(&["kubernetes".to_owned()].into());
        let wanted = |r: &ServiceRanges, ip: &str| {
            let (wanted, left_out) = r.wanted(&[ip.parse().unwrap()])?;
            Some((wanted.len(), left_out))
        };
        assert_eq!(wanted(&r, "10.100.1.5"), Some((1, nets("10.96.0.0/12"))));
        r.written();
        assert_eq!(wanted(&r, "10.100.1.5"), None);
        r.look_again();
        assert_eq!(wanted(&r, "10.112.1.5"), Some((2, vec![])));
    }
}
