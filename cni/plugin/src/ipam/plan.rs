//! Which address a pod gets: values in, values out.

// `core::net` has the address types and no sockets, which a decision module may not name.
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::collections::{BTreeMap, HashSet};

use ipnet::IpNet;
use orlop_cni_types::Attachment;
use serde::{Deserialize, Serialize};

/// Addresses that may be given to pods, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub first: IpAddr,
    pub last: IpAddr,
    /// The network that they are of.
    pub subnet: IpNet,
}

/// Alternatives: a pod gets one address from a set.
pub type RangeSet = Vec<Range>;

/// Why no address can be given.
#[derive(Debug, thiserror::Error)]
pub enum IpamError {
    #[error("all addresses of {ranges} are in use; delete pods or give the node a larger podCIDR")]
    Exhausted { ranges: String },
    #[error("address {ip} is in no range of this network")]
    OutOfRange { ip: IpAddr },
    #[error("address {ip} belongs to container {container_id}")]
    Taken { ip: IpAddr, container_id: String },
    #[error("another process keeps {path}; end it", path = path.display())]
    Held { path: std::path::PathBuf },
    #[error("cannot keep the record of addresses")]
    State(#[source] orlop_base::durable::Error),
}

impl IpamError {
    /// Whether the disk or a quota on it was full.
    pub fn is_full(&self) -> bool {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        match self {
            IpamError::State(orlop_base::durable::Error::Io { source, .. }) => {
                matches!(source.kind(), StorageFull | QuotaExceeded)
            }
            _ => false,
        }
    }
}

fn to_number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(a) => u128::from(u32::from(a)),
        IpAddr::V6(a) => u128::from(a),
    }
}

/// `like` gives the family; a number of IPv4 always fits, as it comes from one.
fn from_number(n: u128, like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::from(n as u32)),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from(n)),
    }
}

impl Range {
    /// A subnet, narrowed by `start` and `end`. Left out are the network's own address, the one after it (the node's own in
    /// its pod network) and, for IPv4, broadcast; tiny subnets (/31, /32, /127, /128) are used whole.
    pub fn new(subnet: IpNet, start: Option<IpAddr>, end: Option<IpAddr>) -> Result<Range, String> {
        let (mut first, mut last) = match subnet.trunc() {
            IpNet::V4(n) => (to_number(n.network().into()), to_number(n.broadcast().into())),
            IpNet::V6(n) => (to_number(n.network().into()), to_number(n.broadcast().into())),
        };
        if last - first >= 3 {
            first += 2;
            if subnet.addr().is_ipv4() {
                last -= 1;
            }
        }
        for (given, end_of) in [(start, &mut first), (end, &mut last)] {
            if let Some(ip) = given {
                if !subnet.contains(&ip) {
                    return Err(format!("{ip} lies outside of {subnet}"));
                }
                *end_of = to_number(ip);
            }
        }
        if first > last {
            return Err(format!("the range in {subnet} ends before it starts"));
        }
        let end = |n| from_number(n, subnet.addr());
        Ok(Range { first: end(first), last: end(last), subnet: subnet.trunc() })
    }

    pub fn contains(&self, ip: IpAddr) -> bool {
        ip.is_ipv4() == self.first.is_ipv4()
            && (to_number(self.first)..=to_number(self.last)).contains(&to_number(ip))
    }

    fn next_free(&self, after: Option<IpAddr>, used: &HashSet<IpAddr>) -> Option<IpAddr> {
        let (first, last) = (to_number(self.first), to_number(self.last));
        let following = |n: u128| if n >= last { first } else { n + 1 };
        let mut n = match after {
            Some(ip) if self.contains(ip) => following(to_number(ip)),
            _ => first,
        };
        // Among one more than are used there is a free one, unless the range is smaller.
        let tries = (used.len() as u128).min(last - first) + 1;
        for _ in 0..tries {
            let ip = from_number(n, self.first);
            if !used.contains(&ip) {
                return Some(ip);
            }
            n = following(n);
        }
        None
    }
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// The host's interface of an owner; see [`State::of_links`].
pub fn link_of(owner: &Attachment) -> String {
    if owner.ifname.is_empty() { owner.container_id.clone() } else { owner.host_interface() }
}

/// One address and who has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allocation {
    pub ip: IpAddr,
    #[serde(flatten)]
    pub owner: Attachment,
}

/// All addresses of a network that are in use on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub allocations: Vec<Allocation>,
    /// The address given last, by the first address of its range: the next one follows it, so that a released address
    /// rests as long as possible.
    pub last: BTreeMap<IpAddr, IpAddr>,
}

impl State {
    /// One address from each set for `owner`, or those that it has already. `wanted` are fixed addresses; each serves the
    /// set that it lies in. On an error nothing is changed.
    pub fn allocate(
        &mut self,
        owner: &Attachment,
        sets: &[RangeSet],
        wanted: &[IpAddr],
    ) -> Result<Vec<IpAddr>, IpamError> {
        let mut used = HashSet::with_capacity(self.allocations.len());
        let mut own = Vec::new();
        for a in &self.allocations {
            if &a.owner == owner {
                own.push(a.ip)
            } else {
                used.insert(a.ip);
            }
        }
        if let Some(&ip) = wanted.iter().find(|ip| !sets.iter().flatten().any(|r| r.contains(**ip))) {
            return Err(IpamError::OutOfRange { ip });
        }
        let (mut given, mut last) = (Vec::new(), Vec::new());
        for set in sets {
            let in_set = |ip: &&IpAddr| set.iter().any(|r| r.contains(**ip)) && !given.contains(*ip);
            let ip = if let Some(&ip) = wanted.iter().find(in_set) {
                if used.contains(&ip) {
                    let holder = self.allocations.iter().find(|a| a.ip == ip);
                    let container_id = holder.map(|a| a.owner.container_id.clone()).unwrap_or_default();
                    return Err(IpamError::Taken { ip, container_id });
                }
                ip
            } else if let Some(&ip) = own.iter().find(in_set) {
                // A former ADD got as far as this and died.
                ip
            } else {
                let free = set
                    .iter()
                    .find_map(|r| Some((r.first, r.next_free(self.last.get(&r.first).copied(), &used)?)));
                let Some((range, ip)) = free else {
                    let ranges = set.iter().map(Range::to_string).collect::<Vec<_>>().join(", ");
                    return Err(IpamError::Exhausted { ranges });
                };
                last.push((range, ip));
                ip
            };
            used.insert(ip);
            given.push(ip);
        }
        self.last.extend(last);
        self.allocations.retain(|a| &a.owner != owner);
        self.allocations.extend(given.iter().map(|&ip| Allocation { ip, owner: owner.clone() }));
        Ok(given)
    }

    /// The state when all that is known are links and the addresses that they lead to. Each belongs to whoever proves to be the link's
    /// ([`State::recognize`]); until then its owner has the link's name and no interface.
    pub fn of_links(links: impl IntoIterator<Item = (IpAddr, String)>) -> State {
        let owner = |link| Attachment { container_id: link, ifname: String::new() };
        let allocations = links.into_iter().map(|(ip, link)| Allocation { ip, owner: owner(link) }).collect();
        State { allocations, last: BTreeMap::new() }
    }

    /// Gives `owner` what is known to be its link's.
    pub fn recognize(&mut self, owner: &Attachment) {
        let link = owner.host_interface();
        for a in &mut self.allocations {
            if a.owner.ifname.is_empty() && a.owner.container_id == link {
                a.owner = owner.clone();
            }
        }
    }

    /// Frees what `owner` has; whether that was anything.
    pub fn release(&mut self, owner: &Attachment) -> bool {
        let before = self.allocations.len();
        self.allocations.retain(|a| &a.owner != owner);
        self.allocations.len() != before
    }

    pub fn ips_of(&self, owner: &Attachment) -> Vec<IpAddr> {
        self.allocations.iter().filter(|a| &a.owner == owner).map(|a| a.ip).collect()
    }

    /// Owners that are not in `valid`, each once.
    pub fn owners_not_in(&self, valid: &[Attachment]) -> Vec<Attachment> {
        let keep: HashSet<&Attachment> = valid.iter().collect();
        let mut gone: Vec<Attachment> =
            self.allocations.iter().map(|a| &a.owner).filter(|o| !keep.contains(o)).cloned().collect();
        gone.sort();
        gone.dedup();
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn owner(n: u32) -> Attachment {
        Attachment { container_id: format!("c{n}"), ifname: "eth0".into() }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn set(nets: &[&str]) -> RangeSet {
        nets.iter().map(|n| Range::new(n.parse().unwrap(), None, None).unwrap()).collect()
    }

    #[test]
    fn what_a_subnet_offers() {
        for (net, first, last) in [
            ("10.0.0.0/24", "10.0.0.2", "10.0.0.254"),
            ("10.0.0.5/24", "10.0.0.2", "10.0.0.254"),
            ("10.0.0.0/30", "10.0.0.2", "10.0.0.2"),
            ("10.0.0.0/31", "10.0.0.0", "10.0.0.1"),
            ("10.0.0.7/32", "10.0.0.7", "10.0.0.7"),
            ("255.255.255.0/24", "255.255.255.2", "255.255.255.254"),
            ("fd00::/64", "fd00::2", "fd00::ffff:ffff:ffff:ffff"),
            ("::/0", "::2", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
        ] {
            let r = Range::new(net.parse().unwrap(), None, None).unwrap();
            assert_eq!((r.first, r.last), (ip(first), ip(last)), "{net}");
        }
        let net = "10.0.0.0/24".parse().unwrap();
        assert!(Range::new(net, Some(ip("10.0.1.1")), None).is_err());
        assert!(Range::new(net, Some(ip("10.0.0.9")), Some(ip("10.0.0.8"))).is_err());
    }

    #[test]
    fn a_released_address_rests_and_exhaustion_is_told() {
        let sets = [set(&["10.0.0.0/29"])];
        let mut s = State::default();
        for n in 0..5 {
            assert_eq!(s.allocate(&owner(n), &sets, &[]).unwrap(), [ip(&format!("10.0.0.{}", n + 2))]);
        }
        assert!(matches!(s.allocate(&owner(9), &sets, &[]), Err(IpamError::Exhausted { .. })));
        assert!(s.release(&owner(1)) && s.release(&owner(3)));
        assert!(!s.release(&owner(1)));
        assert_eq!(s.allocate(&owner(10), &sets, &[]).unwrap(), [ip("10.0.0.3")]);
        s.release(&owner(10));
        assert_eq!(s.allocate(&owner(11), &sets, &[]).unwrap(), [ip("10.0.0.5")]);
        // The same owner again gets what it has.
        assert_eq!(s.allocate(&owner(11), &sets, &[]).unwrap(), [ip("10.0.0.5")]);
    }

    #[test]
    fn dual_stack_and_second_range() {
        let sets = [set(&["10.0.0.0/30", "10.0.1.0/30"]), set(&["fd00::/64"])];
        let mut s = State::default();
        assert_eq!(s.allocate(&owner(0), &sets, &[]).unwrap(), [ip("10.0.0.2"), ip("fd00::2")]);
        assert_eq!(s.allocate(&owner(1), &sets, &[]).unwrap(), [ip("10.0.1.2"), ip("fd00::3")]);
        let before = s.clone();
        assert!(s.allocate(&owner(2), &sets, &[]).is_err());
        assert_eq!(s, before, "an error changes nothing");
    }

    #[test]
    fn what_links_tell_is_in_use_until_its_owner_comes() {
        let sets = [set(&["10.0.0.0/24"])];
        let (known, stranger) = (owner(1), owner(2));
        let of = |o: &Attachment| link_of(o);
        assert_eq!(of(&known), known.host_interface());
        let links = [(ip("10.0.0.2"), known.host_interface()), (ip("10.0.0.3"), stranger.host_interface())];
        let mut s = State::of_links(links);
        assert_eq!(s.allocate(&owner(9), &sets, &[]).unwrap(), [ip("10.0.0.4")]);
        assert!(s.ips_of(&known).is_empty());
        s.recognize(&known);
        assert_eq!(s.ips_of(&known), [ip("10.0.0.2")]);
        let [other] = &s.owners_not_in(&[known, owner(9)])[..] else { panic!("{s:?}") };
        assert_eq!(of(other), stranger.host_interface());
        assert!(s.release(&other.clone()));
    }

    #[test]
    fn fixed_addresses() {
        let sets = [set(&["10.0.0.0/24"])];
        let mut s = State::default();
        assert_eq!(s.allocate(&owner(0), &sets, &[ip("10.0.0.77")]).unwrap(), [ip("10.0.0.77")]);
        assert!(matches!(s.allocate(&owner(1), &sets, &[ip("10.0.0.77")]), Err(IpamError::Taken { .. })));
        assert!(matches!(s.allocate(&owner(1), &sets, &[ip("10.9.0.1")]), Err(IpamError::OutOfRange { .. })));
    }

    proptest! {
        #[test]
        fn never_two_owners_of_one_address(ops in prop::collection::vec((0u32..12, any::<bool>()), 1..200)) {
            let sets = [set(&["10.0.0.0/29", "10.1.0.0/30"]), set(&["fd00::/125"])];
            let mut s = State::default();
            for (n, add) in ops {
                if add {
                    let free = 6 - (s.allocations.len() / 2).min(6);
                    let had = !s.ips_of(&owner(n)).is_empty();
                    match s.allocate(&owner(n), &sets, &[]) {
                        Ok(ips) => prop_assert_eq!(ips, s.ips_of(&owner(n))),
                        Err(_) => prop_assert!(!had && free == 0, "refused with {} free", free),
                    }
                } else {
                    s.release(&owner(n));
                }
                let all: HashSet<_> = s.allocations.iter().map(|a| a.ip).collect();
                prop_assert_eq!(all.len(), s.allocations.len());
            }
        }
    }
}
