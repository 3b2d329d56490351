//! What needs address translation: ports of the node that lead to a pod (capability `portMappings`), and pods that talk to
//! the world, which does not know their addresses (`masquerade`).
//!
//! One nf_tables table for each network and family, made with its first pod that needs it and deleted with its last.
//! Which pod a host port leads to is an entry of a map, so the rules never change. Services have no rules here: they are
//! the service proxy's.

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use orlop_cni_types::{PortMapping, stable_hash};
use serde::Deserialize;

use crate::conf::Conf;
use crate::conntrack;
use crate::error::Error;
use crate::netfilter::Family;
use crate::nft::{Batch, Element, Expr, Hook, Nftables, REGISTER, Typed};

/// Host ports of one address of the node: address, protocol, port.
const BY_ADDRESS: &str = "host-address-ports";
/// Host ports of all addresses: protocol, port.
const BY_PORT: &str = "host-ports";
/// Pods that may reach themselves by a host port: the address twice.
const HAIRPINS: &str = "hairpins";
const MAPS: [&str; 3] = [BY_ADDRESS, BY_PORT, HAIRPINS];
const LOOKUP: &str = "to-pods";

/// Hooks as in NF_INET_*; priorities as in NF_IP_PRI_*.
const PREROUTING: Hook = Hook { kind: "nat", number: 0, priority: -100 };
const OUTPUT: Hook = Hook { kind: "nat", number: 3, priority: -100 };
const POSTROUTING: Hook = Hook { kind: "nat", number: 4, priority: 100 };
const BEFORE_ROUTING: Hook = Hook { kind: "filter", number: 0, priority: -150 };

const RTN_LOCAL: u32 = 2;
const CONNTRACK_DNAT: u32 = 1 << 5;

/// Changes with the shape of the table.
const VERSION: u32 = 1;

/// Pods' traffic to other places than these gets the node's address as its source.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Masquerade {
    #[serde(default)]
    pub except: Vec<IpNet>,
}

/// Where the parts of a packet's header are.
struct Layout {
    source: u32,
    destination: u32,
    len: u32,
    /// As libnftables numbers the type of an address.
    address_type: u32,
    multicast: &'static str,
    link_local: &'static str,
}

impl Family {
    fn of(ip: &IpAddr) -> Family {
        if ip.is_ipv4() { Family::V4 } else { Family::V6 }
    }

    fn layout(self) -> Layout {
        match self {
            Family::V4 => Layout {
                source: 12,
                destination: 16,
                len: 4,
                address_type: 7,
                multicast: "224.0.0.0/4",
                link_local: "169.254.0.0/16",
            },
            Family::V6 => Layout {
                source: 8,
                destination: 24,
                len: 16,
                address_type: 8,
                multicast: "ff00::/8",
                link_local: "fe80::/10",
            },
        }
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// A number in network order in a register of its own.
fn padded(bytes: &[u8]) -> [u8; 4] {
    let mut register = [0; 4];
    for (to, from) in register.iter_mut().zip(bytes) {
        *to = *from;
    }
    register
}

/// The entries that lead mapped ports to a pod with these addresses: map and element, by family.
fn entries(ips: &[IpAddr], mappings: &[PortMapping]) -> Result<Vec<(Family, &'static str, Element)>, Error> {
    let mut all = Vec::new();
    for m in mappings.iter().filter(|m| m.host_port != 0) {
        let wrong = |what: &str, value: &str| Error::Field {
            field: "runtimeConfig.portMappings",
            problem: format!("{value:?} is not {what}"),
        };
        let protocol = match m.protocol.to_ascii_lowercase().as_str() {
            "tcp" | "" => 6,
            "udp" => 17,
            "sctp" => 132,
            _ => return Err(wrong("tcp, udp or sctp", &m.protocol)),
        };
        let host = match m.host_ip.as_str() {
            "" => None,
            text => Some(text.parse::<IpAddr>().map_err(|_| wrong("an IP address", text))?),
        };
        let any = host.is_none_or(|h| h.is_unspecified());
        for ip in ips {
            // An unspecified address means all addresses of its family, no address those of both.
            if host.is_some_and(|h| Family::of(&h) != Family::of(ip)) {
                continue;
            }
            let mut key = if any { Vec::new() } else { host.map(octets).unwrap_or_default() };
            key.extend(padded(&[protocol]));
            key.extend(padded(&m.host_port.to_be_bytes()));
            let mut data = octets(*ip);
            data.extend(padded(&m.container_port.to_be_bytes()));
            all.push((Family::of(ip), if any { BY_PORT } else { BY_ADDRESS }, (key, data)));
        }
    }
    for ip in ips {
        if all.iter().any(|(family, ..)| *family == Family::of(ip)) {
            let twice = [octets(*ip), octets(*ip)].concat();
            all.push((Family::of(ip), HAIRPINS, (twice, Vec::new())));
        }
    }
    Ok(all)
}

/// Whether an entry leads to one of these addresses.
fn leads_to(ips: &[IpAddr], (key, data): &Element) -> bool {
    let target = if data.is_empty() { key } else { data };
    ips.iter().any(|ip| target.starts_with(&octets(*ip)) && target.len() > octets(*ip).len())
}

fn is_udp(mapping: &PortMapping) -> bool {
    mapping.protocol.eq_ignore_ascii_case("udp")
}

/// A host port that answers on the node's loopback address.
pub fn on_loopback(mappings: &[PortMapping]) -> bool {
    mappings.iter().any(|m| matches!(m.host_ip.as_str(), "" | "0.0.0.0") || m.host_ip.starts_with("127."))
}

/// The network's tables.
pub struct Nat {
    nft: Nftables,
    table: String,
}

impl Nat {
    pub fn open(conf: &Conf) -> Result<Nat, Error> {
        let nft = Nftables::open().map_err(|e| match is_unsupported(&e) {
            true => Error::NoNftables(e),
            false => failed("open a netlink socket for nf_tables")(e),
        })?;
        Ok(Nat { nft, table: conf.table() })
    }

    /// For taking back: `None` where the kernel has no nf_tables, so that nothing can be there.
    pub fn open_existing(conf: &Conf) -> Result<Option<Nat>, Error> {
        match Nat::open(conf) {
            Err(Error::NoNftables(_)) => Ok(None),
            other => other.map(Some),
        }
    }

    /// Enters the mapped ports of a pod, and makes the rules when they are not there.
    pub fn publish(&mut self, conf: &Conf, ips: &[IpAddr]) -> Result<(), Error> {
        let entries = entries(ips, &conf.port_mappings)?;
        for family in Family::BOTH.into_iter().filter(|f| ips.iter().any(|ip| Family::of(ip) == *f)) {
            let own: Vec<_> = entries.iter().filter(|(f, ..)| *f == family).collect();
            let pods: Vec<IpNet> = conf.pod_nets().filter(|n| Family::of(&n.addr()) == family).collect();
            if own.is_empty() && conf.masquerade.is_none() {
                continue;
            }
            self.ensure(family, conf.masquerade.as_ref(), &pods)?;
            for map in MAPS {
                let new: Vec<Element> =
                    own.iter().filter(|(_, m, _)| *m == map).map(|(.., e)| e.clone()).collect();
                let mut batch = Batch::new(family, &self.table);
                batch.add_elements(map, &new);
                self.nft.commit(batch).map_err(|e| match e.kind() {
                    io::ErrorKind::ResourceBusy | io::ErrorKind::AlreadyExists => Error::HostPort,
                    _ => failed("enter the pod's host ports into nf_tables")(e),
                })?;
            }
            for m in conf.port_mappings.iter().filter(|m| is_udp(m) && !own.is_empty()) {
                conntrack::forget_udp(family, m.host_port)
                    .map_err(failed("make the kernel forget earlier flows to the pod's host port"))?;
            }
        }
        Ok(())
    }

    /// Whether all mapped ports of the pod are entered.
    pub fn check(&mut self, conf: &Conf, ips: &[IpAddr]) -> Result<bool, Error> {
        for (family, map, element) in entries(ips, &conf.port_mappings)? {
            let found = self.nft.elements(family, &self.table, map);
            if !found.map_err(failed("read host ports from nf_tables"))?.contains(&element) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes back what leads to these addresses.
    pub fn withdraw(&mut self, ips: &[IpAddr]) -> Result<(), Error> {
        for family in Family::BOTH {
            if self.comment(family)?.is_none() {
                continue;
            }
            for map in MAPS {
                let all = self.elements(family, map)?;
                let own: Vec<Element> = all.into_iter().filter(|e| leads_to(ips, e)).collect();
                let mut batch = Batch::new(family, &self.table);
                batch.delete_elements(map, &own);
                self.nft.commit(batch).map_err(failed("take the pod's host ports out of nf_tables"))?;
            }
        }
        Ok(())
    }

    /// Deletes the rules: the network has no pod any more.
    pub fn remove(&mut self) -> Result<(), Error> {
        for family in Family::BOTH {
            if self.comment(family)?.is_some() {
                let mut batch = Batch::new(family, &self.table);
                batch.delete_table();
                self.nft.commit(batch).map_err(failed("delete the table of nf_tables"))?;
            }
        }
        Ok(())
    }

    /// `None` without a table, also where the kernel has no nf_tables.
    fn comment(&mut self, family: Family) -> Result<Option<String>, Error> {
        match self.nft.comment(family, &self.table) {
            // EINVAL is how a kernel without nf_tables answers a single question.
            Err(e) if is_unsupported(&e) || e.kind() == io::ErrorKind::InvalidInput => Ok(None),
            other => other.map_err(failed("look for the table of nf_tables")),
        }
    }

    fn elements(&mut self, family: Family, map: &str) -> Result<Vec<Element>, Error> {
        self.nft.elements(family, &self.table, map).map_err(failed("read host ports from nf_tables"))
    }

    /// Makes the table as it is to be; entries of an earlier shape are kept.
    fn ensure(
        &mut self,
        family: Family,
        masquerade: Option<&Masquerade>,
        pods: &[IpNet],
    ) -> Result<(), Error> {
        let wanted = describe(masquerade, pods);
        let found = self.comment(family)?;
        if found.as_ref() == Some(&wanted) {
            return Ok(());
        }
        let mut kept = Vec::new();
        if found.is_some() {
            for map in MAPS {
                kept.push((map, self.elements(family, map)?));
            }
        }
        let mut batch = Batch::new(family, &self.table);
        if found.is_some() {
            batch.delete_table();
        }
        batch.new_table(&wanted);
        table(&mut batch, family, masquerade, pods);
        for (map, elements) in &kept {
            batch.add_elements(map, elements);
        }
        self.nft.commit(batch).map_err(|e| match is_unsupported(&e) {
            true => Error::NoNftables(e),
            false => failed("make the rules of nf_tables")(e),
        })
    }
}

/// Without the module the kernel knows neither the protocol nor the chain type.
fn is_unsupported(e: &io::Error) -> bool {
    const ENOENT: i32 = 2;
    const EPROTONOSUPPORT: i32 = 93;
    const EOPNOTSUPP: i32 = 95;
    const EAFNOSUPPORT: i32 = 97;
    matches!(e.raw_os_error(), Some(ENOENT | EPROTONOSUPPORT | EOPNOTSUPP | EAFNOSUPPORT))
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Netlink { what: what.to_owned(), source }
}

/// Says all that the rules depend on; the comment of the table.
fn describe(masquerade: Option<&Masquerade>, pods: &[IpNet]) -> String {
    // A comment holds little, and a difference is all that matters.
    let hash = stable_hash(0, &[format!("{masquerade:?} {pods:?}").as_bytes()]);
    format!("orlop-cni {VERSION} {hash:016x}")
}

fn table(batch: &mut Batch, family: Family, masquerade: Option<&Masquerade>, pods: &[IpNet]) {
    let layout = family.layout();
    let (address, protocol, port) = (layout.address_type, 12, 13);
    let to_pod = Some(Typed { number: address << 6 | port, bytes: layout.len + 4 });
    let by_address = Typed { number: (address << 6 | protocol) << 6 | port, bytes: layout.len + 8 };
    batch.new_set(1, BY_ADDRESS, by_address, to_pod);
    batch.new_set(2, BY_PORT, Typed { number: protocol << 6 | port, bytes: 8 }, to_pod);
    let pair = Typed { number: address << 6 | address, bytes: 2 * layout.len };
    batch.new_set(3, HAIRPINS, pair, None);

    batch.new_chain(LOOKUP, None);
    let after = REGISTER + layout.len / 4;
    let translate = Expr::DestinationNat { family, address: REGISTER, port: after };
    batch.new_rule(
        LOOKUP,
        &[
            Expr::Network { to: REGISTER, offset: layout.destination, len: layout.len },
            Expr::Protocol { to: after },
            Expr::DestinationPort { to: after + 1 },
            Expr::Map { map: BY_ADDRESS, register: REGISTER, to: REGISTER },
            translate.clone(),
        ],
    );
    batch.new_rule(
        LOOKUP,
        &[
            Expr::Protocol { to: REGISTER },
            Expr::DestinationPort { to: REGISTER + 1 },
            Expr::Map { map: BY_PORT, register: REGISTER, to: REGISTER },
            translate,
        ],
    );
    for (name, hook) in [("prerouting", PREROUTING), ("output", OUTPUT)] {
        batch.new_chain(name, Some(hook));
        let to_node = [
            Expr::DestinationType { to: REGISTER },
            Expr::Equal { register: REGISTER, value: &RTN_LOCAL.to_ne_bytes() },
            Expr::Jump(LOOKUP),
        ];
        batch.new_rule(name, &to_node);
    }
    if family == Family::V4 {
        protect_loopback(batch);
    }
    postrouting(batch, family, masquerade, pods);
}

/// A host port of 127.0.0.1 needs `route_localnet` on the pod's link, which must not open the node's loopback addresses
/// to the pod (CVE-2020-8558). Answers have the node's own address here, so nothing from outside names a loopback address.
fn protect_loopback(batch: &mut Batch) {
    let mut loopback = [0; 16];
    for (to, from) in loopback.iter_mut().zip(b"lo") {
        *to = *from;
    }
    batch.new_chain("loopback", Some(BEFORE_ROUTING));
    batch.new_rule(
        "loopback",
        &[
            Expr::InputName { to: REGISTER },
            Expr::NotEqual { register: REGISTER, value: &loopback },
            Expr::Network { to: REGISTER, offset: Family::V4.layout().destination, len: 1 },
            Expr::Equal { register: REGISTER, value: &[127] },
            Expr::Drop,
        ],
    );
}

fn postrouting(batch: &mut Batch, family: Family, masquerade: Option<&Masquerade>, pods: &[IpNet]) {
    const CHAIN: &str = "postrouting";
    let layout = family.layout();
    batch.new_chain(CHAIN, Some(POSTROUTING));
    // A pod that reached itself by the node would answer itself directly.
    batch.new_rule(
        CHAIN,
        &[
            Expr::Network { to: REGISTER, offset: layout.source, len: layout.len },
            Expr::Network { to: REGISTER + layout.len / 4, offset: layout.destination, len: layout.len },
            Expr::InSet { set: HAIRPINS, register: REGISTER },
            Expr::Masquerade,
        ],
    );
    if family == Family::V4 {
        // From the node's loopback address to a pod: the pod could not answer.
        let dnat = CONNTRACK_DNAT.to_ne_bytes();
        batch.new_rule(
            CHAIN,
            &[
                Expr::Network { to: REGISTER, offset: layout.source, len: 1 },
                Expr::Equal { register: REGISTER, value: &[127] },
                Expr::ConntrackStatus { to: REGISTER },
                Expr::And { register: REGISTER, mask: &dnat },
                Expr::Equal { register: REGISTER, value: &dnat },
                Expr::Masquerade,
            ],
        );
    }
    let Some(masquerade) = masquerade else { return };
    let fixed = [layout.multicast, layout.link_local].into_iter().filter_map(|n| n.parse().ok());
    let except = masquerade.except.iter().chain(pods).copied().chain(fixed);
    let except: Vec<IpNet> = except.filter(|n| Family::of(&n.addr()) == family).collect();
    for net in pods {
        let mut parts = Matches::default();
        parts.add(layout.source, net);
        for other in &except {
            parts.add(layout.destination, other);
        }
        let mut exprs = Vec::new();
        for (n, (offset, mask, value)) in parts.0.iter().enumerate() {
            exprs.push(Expr::Network { to: REGISTER, offset: *offset, len: layout.len });
            exprs.push(Expr::And { register: REGISTER, mask });
            exprs.push(match n {
                0 => Expr::Equal { register: REGISTER, value },
                _ => Expr::NotEqual { register: REGISTER, value },
            });
        }
        exprs.push(Expr::Masquerade);
        batch.new_rule(CHAIN, &exprs);
    }
}

/// Offsets, masks and values of the networks that a rule compares with.
#[derive(Default)]
struct Matches(Vec<(u32, Vec<u8>, Vec<u8>)>);

impl Matches {
    fn add(&mut self, offset: u32, net: &IpNet) {
        self.0.push((offset, octets(net.netmask()), octets(net.network())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(host_ip: &str, host_port: u16, protocol: &str) -> PortMapping {
        PortMapping { host_port, container_port: 80, protocol: protocol.into(), host_ip: host_ip.into() }
    }

    #[test]
    fn entries_of_mappings() {
        let ips: [IpAddr; 2] = ["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        let of = |m| entries(&ips, &[m]).unwrap();
        let maps = |m| of(m).iter().map(|(f, map, _)| (*f, *map)).collect::<Vec<_>>();
        let (v4, v6) = (Family::V4, Family::V6);
        assert_eq!(
            maps(mapping("", 8080, "tcp")),
            [(v4, BY_PORT), (v6, BY_PORT), (v4, HAIRPINS), (v6, HAIRPINS)]
        );
        assert_eq!(maps(mapping("0.0.0.0", 8080, "UDP")), [(v4, BY_PORT), (v4, HAIRPINS)]);
        assert_eq!(maps(mapping("::1", 8080, "sctp")), [(v6, BY_ADDRESS), (v6, HAIRPINS)]);
        assert!(of(mapping("", 0, "tcp")).is_empty());
        assert_eq!(
            of(mapping("127.0.0.1", 8080, "udp"))[0].2,
            (vec![127, 0, 0, 1, 17, 0, 0, 0, 0x1f, 0x90, 0, 0], vec![10, 0, 0, 2, 0, 80, 0, 0])
        );
        for bad in [mapping("", 1, "icmp"), mapping("localhost", 1, "tcp")] {
            let e = entries(&ips, &[bad]).unwrap_err();
            assert!(e.to_string().starts_with("runtimeConfig.portMappings"), "{e}");
        }
    }

    #[test]
    fn what_leads_to_a_pod() {
        let pod: [IpAddr; 1] = ["10.0.0.2".parse().unwrap()];
        let all = entries(&pod, &[mapping("", 1, "tcp"), mapping("127.0.0.1", 2, "tcp")]).unwrap();
        assert!(all.iter().all(|(.., e)| leads_to(&pod, e)));
        let other: [IpAddr; 1] = ["10.0.0.3".parse().unwrap()];
        assert!(!all.iter().any(|(.., e)| leads_to(&other, e)));
    }

    #[test]
    fn a_changed_configuration_shows() {
        let net = |n: &str| n.parse::<IpNet>().unwrap();
        let some = Masquerade { except: vec![net("10.0.0.0/8")] };
        let all = [
            describe(None, &[]),
            describe(None, &[net("10.1.0.0/24")]),
            describe(Some(&some), &[net("10.1.0.0/24")]),
            describe(Some(&Masquerade::default()), &[net("10.1.0.0/24")]),
        ];
        let different: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(different.len(), 4);
    }
}
