//! The node's interfaces and addresses, followed by netlink: where node ports answer, and where packets from outside
//! come in.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv6Addr};

use futures::channel::mpsc::UnboundedReceiver;
use futures::{StreamExt, TryStreamExt};
use ipnet::IpNet;
use netlink_packet_route::address::{AddressAttribute, AddressScope};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType};
use orlop_ebpf_common::{Addr, Uplink, addr_from, addr_to, config_flags, local_flags, uplink_flags};
use rtnetlink::{Handle, MulticastGroup};
use tokio::time::{Duration, Instant};

/// Changes come in groups, as when an interface is set up: they are looked at together.
const TOGETHER: Duration = Duration::from_millis(20);

/// An interface, with its addresses.
#[derive(Clone, Debug, PartialEq)]
pub struct Interface {
    pub index: u32,
    pub name: String,
    pub up: bool,
    pub loopback: bool,
    pub veth: bool,
    /// The other end of its pair is in another network namespace, and it belongs to no bridge or the like.
    pub leads_away: bool,
    /// The bridge or the like that it belongs to.
    pub controller: Option<u32>,
    /// Virtual interfaces that no packet from outside comes through.
    pub internal: bool,
    pub ethernet: bool,
    pub addresses: Vec<(IpNet, bool /* global scope */)>,
}

/// What the datapath is told about the node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Node {
    pub locals: HashMap<Addr, u32>,
    /// Addresses by which others know this node.
    pub ips: Vec<IpAddr>,
    /// [`config_flags`].
    pub flags: u32,
    pub uplinks: Vec<(u32, String, Uplink)>,
    /// Interfaces that are there, but set down: what serves them stays for when they are up again.
    pub down: Vec<u32>,
}

impl Node {
    /// Addresses that node ports answer on and that can be listened on by themselves, sorted.
    pub fn node_port_ips(&self) -> Vec<IpAddr> {
        let serving = self.locals.iter().filter(|(_, f)| **f & local_flags::NODE_PORT != 0);
        let is_link_local = |ip: &IpAddr| matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        let mut ips: Vec<IpAddr> = serving.map(|(a, _)| addr_to(a)).filter(|ip| !is_link_local(ip)).collect();
        ips.sort_unstable();
        ips
    }
}

/// Where node ports answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodePortAddress {
    /// On the node's addresses within.
    Net(IpNet),
    /// On the addresses that the Node object names first, one of each family.
    Primary,
}

impl std::str::FromStr for NodePortAddress {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "primary" {
            return Ok(NodePortAddress::Primary);
        }
        text.parse().map(NodePortAddress::Net).map_err(|_| "write a CIDR or primary")
    }
}

/// The nets that `wanted` stands for on a node with these primary addresses; `None` when nothing is wanted in particular.
pub fn listed(wanted: &[NodePortAddress], primary: &[IpAddr]) -> Option<Vec<IpNet>> {
    let nets = |a: &NodePortAddress| match a {
        NodePortAddress::Net(net) => vec![*net],
        NodePortAddress::Primary => primary.iter().map(|ip| IpNet::from(*ip)).collect(),
    };
    if wanted.is_empty() { None } else { Some(wanted.iter().flat_map(nets).collect()) }
}

/// Decides which addresses are node port addresses and which interfaces are uplinks. Without a list (`None`) node ports answer on
/// all addresses; an empty list of uplinks means every interface that others can reach this node by.
/// `pods`: the node's ends of pods' veth pairs are served too.
pub fn decide(
    interfaces: &[Interface],
    node_port_addresses: Option<&[IpNet]>,
    uplinks: &[String],
    pods: bool,
) -> Node {
    let mut node = Node::default();
    let serves = |ip: &IpAddr| node_port_addresses.is_none_or(|nets| nets.iter().any(|n| n.contains(ip)));
    for (flag, loopback) in [
        (config_flags::LOOPBACK4, IpAddr::from([127, 0, 0, 1])),
        (config_flags::LOOPBACK6, IpAddr::from(Ipv6Addr::LOCALHOST)),
    ] {
        node.flags |= if serves(&loopback) { flag } else { 0 };
    }
    let mut pod_links = Vec::new();
    node.down = interfaces.iter().filter(|i| !i.up).map(|i| i.index).collect();
    for i in interfaces.iter().filter(|i| i.up) {
        for (net, _) in &i.addresses {
            let ip = net.addr();
            let flags = if serves(&ip) { local_flags::NODE_PORT } else { 0 };
            node.locals.insert(addr_from(ip), flags);
        }
        let is_uplink = if uplinks.is_empty() {
            // A pod's veth has no address here, or one for itself alone; a veth into another machine-like namespace
            // has a subnet.
            let reachable = i
                .addresses
                .iter()
                .any(|(n, global)| *global && (!i.veth || n.prefix_len() < n.max_prefix_len()));
            !i.loopback && !i.internal && reachable
        } else {
            uplinks.contains(&i.name)
        };
        if is_uplink {
            let first = |v4: bool| {
                i.addresses
                    .iter()
                    .find(|(n, global)| *global && n.addr().is_ipv4() == v4)
                    .map_or([0; 4], |(n, _)| addr_from(n.addr()))
            };
            let uplink = Uplink {
                addr4: first(true),
                addr6: first(false),
                l3_offset: if i.ethernet { 14 } else { 0 },
                flags: 0,
            };
            node.ips.extend(i.addresses.iter().filter(|(_, global)| *global).map(|(n, _)| n.addr()));
            node.uplinks.push((i.index, i.name.clone(), uplink));
        } else if pods && i.veth && !i.internal {
            pod_links.push(i);
        }
    }
    // Whatever interface it is on, any address of the node will do towards its own pods.
    let own = |v4: bool| {
        let of = |a: &&Uplink| if v4 { a.addr4 } else { a.addr6 };
        node.uplinks.iter().map(|(.., u)| u).find(|u| of(u) != [0; 4]).map_or([0; 4], |u| of(&u))
    };
    let pod = Uplink { addr4: own(true), addr6: own(false), l3_offset: 14, flags: uplink_flags::POD };
    node.uplinks.extend(pod_links.into_iter().map(|i| {
        let peer = if i.leads_away { uplink_flags::PEER } else { 0 };
        (i.index, i.name.clone(), Uplink { flags: pod.flags | peer, ..pod })
    }));
    let served: HashSet<u32> = node.uplinks.iter().map(|(index, ..)| *index).collect();
    let above: HashSet<u32> =
        interfaces.iter().filter(|i| served.contains(&i.index)).filter_map(|i| i.controller).collect();
    for (index, _, uplink) in &mut node.uplinks {
        uplink.flags |= if above.contains(index) { uplink_flags::ABOVE } else { 0 };
    }
    node
}

type Message = (
    rtnetlink::packet_core::NetlinkMessage<netlink_packet_route::RouteNetlinkMessage>,
    rtnetlink::sys::SocketAddr,
);

/// Reads interfaces, and says when they may have changed.
pub struct Watch {
    handle: Handle,
    changes: Changes<Message>,
}

impl Watch {
    /// Must be called in the node's network namespace. The future drives the connection: run it as a task.
    pub fn open() -> std::io::Result<(Watch, impl Future<Output = ()> + Send + 'static)> {
        let (connection, handle, messages) = rtnetlink::new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
        ])?;
        Ok((Watch { handle, changes: Changes { messages, due: None } }, connection))
    }

    /// Returns a moment after something changed. Cancel-safe.
    pub async fn changed(&mut self) {
        self.changes.next().await;
    }

    /// All interfaces.
    pub async fn read(&self) -> Result<Vec<Interface>, rtnetlink::Error> {
        let mut all: Vec<Interface> = Vec::new();
        let mut links = self.handle.link().get().execute();
        while let Some(l) = links.try_next().await? {
            let mut i = Interface {
                index: l.header.index,
                name: String::new(),
                up: l.header.flags.contains(LinkFlags::Up),
                loopback: l.header.flags.contains(LinkFlags::Loopback),
                veth: false,
                leads_away: false,
                controller: None,
                internal: false,
                ethernet: l.header.link_layer_type == LinkLayerType::Ether,
                addresses: Vec::new(),
            };
            for a in l.attributes {
                match a {
                    LinkAttribute::IfName(n) => i.name = n,
                    LinkAttribute::LinkNetNsId(_) => i.leads_away = true,
                    LinkAttribute::Controller(index) => i.controller = Some(index),
                    LinkAttribute::LinkInfo(infos) => {
                        for info in infos {
                            match info {
                                LinkInfo::Kind(InfoKind::Veth) => i.veth = true,
                                LinkInfo::Kind(InfoKind::Dummy | InfoKind::Ifb | InfoKind::Nlmon) => {
                                    i.internal = true
                                }
                                _ => {}
                            }
                        }
                    }
                    _ => {}
                }
            }
            i.leads_away &= i.veth && i.controller.is_none();
            all.push(i);
        }
        let mut addresses = self.handle.address().get().execute();
        while let Some(a) = addresses.try_next().await? {
            let Some(i) = all.iter_mut().find(|i| i.index == a.header.index) else { continue };
            // On point-to-point links `Address` is the peer's and `Local` ours.
            let mut ip: Option<IpAddr> = None;
            for attribute in &a.attributes {
                match attribute {
                    AddressAttribute::Local(l) => ip = Some(*l),
                    AddressAttribute::Address(p) => ip = ip.or(Some(*p)),
                    _ => {}
                }
            }
            if let Some(net) = ip.and_then(|ip| IpNet::new(ip, a.header.prefix_len).ok()) {
                i.addresses.push((net, a.header.scope == AddressScope::Universe));
            }
        }
        Ok(all)
    }
}

/// Messages that something changed, and when to say so.
struct Changes<T> {
    messages: UnboundedReceiver<T>,
    /// Set by the first message since the last time, and not moved by others: they may never end.
    due: Option<Instant>,
}

impl<T> Changes<T> {
    /// Cancel-safe: what was heard stays noted until this returns.
    async fn next(&mut self) {
        loop {
            tokio::select! {
                biased;
                () = sleep_until(self.due) => break,
                Some(_) = self.messages.next() => drop(self.due.get_or_insert_with(|| Instant::now() + TOGETHER)),
            }
        }
        self.due = None;
    }
}

/// For ever without a time.
pub async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(name: &str, addresses: &[&str]) -> Interface {
        Interface {
            index: name.len() as u32,
            name: name.into(),
            up: name != "down",
            loopback: name == "lo",
            veth: name.starts_with("veth"),
            leads_away: name == "veth1",
            controller: None,
            internal: name.starts_with("dummy"),
            ethernet: true,
            addresses: addresses.iter().map(|a| (a.parse().unwrap(), !a.starts_with("127"))).collect(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn changes_are_told_whatever_else_happens() {
        let (tell, messages) = futures::channel::mpsc::unbounded();
        let mut changes = Changes { messages, due: None };
        let told = |c: &mut Changes<()>| {
            futures::FutureExt::now_or_never(tokio::task::unconstrained(c.next())).is_some()
        };
        assert!(!told(&mut changes), "nothing has happened");
        // Messages that never end, and a caller who never waits long.
        let begin = Instant::now();
        let mut times = Vec::new();
        while times.len() < 2 {
            tell.unbounded_send(()).unwrap();
            if told(&mut changes) {
                times.push(begin.elapsed());
            }
            tokio::time::advance(TOGETHER / 4).await;
        }
        // Clocks go by milliseconds.
        assert!(times[0] >= TOGETHER && times[0] < TOGETHER * 2 && times[1] < TOGETHER * 4, "{times:?}");
        // One that was heard by a call that was given up is told by the next one.
        while told(&mut changes) {}
        tokio::time::advance(TOGETHER).await;
        while told(&mut changes) {}
        tell.unbounded_send(()).unwrap();
        assert!(!told(&mut changes));
        changes.next().await;
        assert!(!told(&mut changes), "once");
    }

    fn names(n: &Node) -> Vec<&str> {
        n.uplinks.iter().map(|(_, n, _)| n.as_str()).collect()
    }

    #[test]
    fn uplinks_are_what_others_reach() {
        let all = [
            interface("lo", &["127.0.0.1/8"]),
            interface("eth0", &["192.0.2.5/24", "192.0.2.6/24"]),
            interface("veth1", &[]),
            interface("veth22", &["10.244.0.1/32"]),
            interface("veth333", &["10.9.0.1/24"]),
            interface("dummy0", &["169.254.20.10/32"]),
            interface("down", &["192.0.2.7/24"]),
        ];
        let n = decide(&all, None, &[], false);
        assert_eq!(names(&n), ["eth0", "veth333"]);
        assert_eq!(n.down, [4]);
        assert_eq!(n.uplinks[0].2.addr4, addr_from("192.0.2.5".parse().unwrap()));
        assert!(n.locals.values().all(|f| *f == local_flags::NODE_PORT));
        assert_eq!(n.locals.len(), 6);
        assert_eq!(names(&decide(&all, None, &["veth1".into()], false)), ["veth1"]);

        let n = decide(&all, Some(&["192.0.2.6/32".parse().unwrap()]), &[], true);
        assert_eq!(n.flags, 0, "nor on loopback");
        assert_eq!(names(&n), ["eth0", "veth333", "veth1", "veth22"], "pods' veths come last");
        let pods: Vec<u32> = n.uplinks[2..].iter().map(|(.., u)| u.flags).collect();
        assert_eq!(pods, [uplink_flags::POD | uplink_flags::PEER, uplink_flags::POD]);
        assert!(n.uplinks[2..].iter().all(|(.., u)| u.addr4 == n.uplinks[0].2.addr4));
        let serving: Vec<_> = n.locals.iter().filter(|(_, f)| **f != 0).map(|(a, _)| *a).collect();
        assert_eq!(serving, [addr_from("192.0.2.6".parse().unwrap())]);
    }

    #[test]
    fn bridges_whose_ports_are_served_are_told_apart() {
        let mut all = [
            interface("eth0", &["192.0.2.5/24"]),
            interface("cni00", &["10.244.0.1/24"]),
            interface("br0000", &["10.9.0.1/24"]),
            interface("veth333", &[]),
            interface("vnet5555", &[]),
        ];
        (all[3].controller, all[4].controller) = (Some(all[1].index), Some(all[2].index));
        let above = |pods| {
            let served = decide(&all, None, &[], pods).uplinks.into_iter();
            let above = served.filter(|(.., u)| u.flags & uplink_flags::ABOVE != 0);
            above.map(|(_, name, _)| name).collect::<Vec<_>>()
        };
        assert_eq!(above(true), ["cni00"], "no machine's port is served");
        assert!(above(false).is_empty(), "nor are pods' now");
    }

    #[test]
    fn node_ports_answer_where_they_should() {
        let all = [
            interface("lo", &["127.0.0.1/8"]),
            interface("eth0", &["192.0.2.5/24", "192.0.2.6/24", "fd00::5/64"]),
        ];
        let cases: [(&[&str], &[&str], &[&str]); 6] = [
            (&[], &[], &["127.0.0.1", "192.0.2.5", "192.0.2.6", "fd00::5"]),
            (&["192.0.2.6/32"], &[], &["192.0.2.6"]),
            (&["fd00::/16", "127.0.0.0/8"], &["192.0.2.5"], &["127.0.0.1", "fd00::5"]),
            (&["primary"], &["192.0.2.5", "fd00::5"], &["192.0.2.5", "fd00::5"]),
            (&["primary"], &[], &[]),
            (&["primary", "127.0.0.0/8"], &["192.0.2.6", "fd00::6"], &["127.0.0.1", "192.0.2.6"]),
        ];
        for (wanted, primary, expected) in cases {
            let wanted: Vec<NodePortAddress> = wanted.iter().map(|w| w.parse().unwrap()).collect();
            let primary: Vec<IpAddr> = primary.iter().map(|w| w.parse().unwrap()).collect();
            let n = decide(&all, listed(&wanted, &primary).as_deref(), &[], false);
            let serving = n.locals.iter().filter(|(_, f)| **f != 0);
            let mut serving: Vec<String> = serving.map(|(a, _)| addr_to(a).to_string()).collect();
            serving.sort();
            assert_eq!(serving, expected, "{wanted:?} {primary:?}");
        }
        assert!("10.0.0.1".parse::<NodePortAddress>().is_err());
    }
}
