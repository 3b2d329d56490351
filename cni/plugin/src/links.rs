//! The requests that attach and detach a pod, each as one function.

use std::io;
use std::net::IpAddr;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags,
    LinkInfo, LinkMessage, State,
};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};

use crate::Host;
use crate::error::Error;
use crate::netlink::Netlink;
use crate::removal;

type Result<T> = std::result::Result<T, Error>;

/// The kernel may gather such events for a second; a link that needs longer is somebody else's to explain.
const CARRIER_PATIENCE: Duration = Duration::from_secs(3);

const ENODEV: i32 = 19;
const EEXIST: i32 = 17;
const ENETUNREACH: i32 = 101;
const EHOSTUNREACH: i32 = 113;

/// What is known of a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub up: bool,
    /// Set to carry packets (operational state as in RFC 2863), which is a moment later than `up`.
    pub carries: bool,
    pub mtu: u32,
    pub mac: Vec<u8>,
}

/// One side of a new pair.
pub struct Side<'a> {
    pub name: &'a str,
    pub mac: [u8; 6],
}

/// Where packets for an address go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    pub index: u32,
    pub gateway: Option<IpAddr>,
    pub source: Option<IpAddr>,
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let what = what.into();
    move |source| Error::Netlink { what, source }
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn full_prefix(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

pub fn open() -> Result<Netlink> {
    Netlink::open().map_err(failed("open a netlink socket"))
}

/// Makes a pair: `host` here, `pod` in the namespace `netns`.
pub fn create_pair(nl: &mut Netlink, host: &Side, pod: &Side, netns: RawFd, mtu: u32) -> Result<()> {
    let mut peer = LinkMessage::default();
    peer.attributes = vec![
        LinkAttribute::IfName(pod.name.to_owned()),
        LinkAttribute::Address(pod.mac.to_vec()),
        LinkAttribute::Mtu(mtu),
        LinkAttribute::NetNsFd(netns),
    ];
    let mut m = LinkMessage::default();
    m.attributes = vec![
        LinkAttribute::IfName(host.name.to_owned()),
        LinkAttribute::Address(host.mac.to_vec()),
        LinkAttribute::Mtu(mtu),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]),
    ];
    nl.change(Message::NewLink(m), NLM_F_CREATE | NLM_F_EXCL).map_err(|e| match e.raw_os_error() {
        Some(EEXIST) => Error::InterfaceExists(pod.name.to_owned()),
        _ => failed(format!("create the pair {} and {}", host.name, pod.name))(e),
    })
}

/// `None` when there is no such link.
pub fn find(nl: &mut Netlink, name: &str) -> Result<Option<Link>> {
    let mut m = LinkMessage::default();
    m.attributes = vec![LinkAttribute::IfName(name.to_owned())];
    get_link(nl, m, name)
}

pub fn find_index(nl: &mut Netlink, index: u32) -> Result<Option<Link>> {
    let mut m = LinkMessage::default();
    m.header.index = index;
    get_link(nl, m, &index.to_string())
}

fn get_link(nl: &mut Netlink, m: LinkMessage, what: &str) -> Result<Option<Link>> {
    match nl.get(Message::GetLink(m)) {
        Ok(Some(Message::NewLink(m))) => {
            let mut link = Link {
                index: m.header.index,
                name: String::new(),
                up: m.header.flags.contains(LinkFlags::Up),
                carries: false,
                mtu: 0,
                mac: Vec::new(),
            };
            for a in m.attributes {
                match a {
                    LinkAttribute::IfName(name) => link.name = name,
                    LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                    LinkAttribute::OperState(state) => link.carries = state == State::Up,
                    LinkAttribute::Address(mac) => link.mac = mac,
                    _ => {}
                }
            }
            Ok(Some(link))
        }
        Ok(_) => Ok(None),
        Err(e) if e.raw_os_error() == Some(ENODEV) => Ok(None),
        Err(e) => Err(failed(format!("look up link {what}"))(e)),
    }
}

/// [`find`] for a link that must be there.
pub fn expect(nl: &mut Netlink, name: &str) -> Result<Link> {
    find(nl, name)?.ok_or_else(|| failed(format!("find link {name}"))(io::Error::from_raw_os_error(ENODEV)))
}

pub fn set_up(nl: &mut Netlink, index: u32, alias: Option<&str>) -> Result<()> {
    let mut m = LinkMessage::default();
    m.header.index = index;
    m.header.flags = LinkFlags::Up;
    m.header.change_mask = LinkFlags::Up;
    if let Some(alias) = alias {
        // The kernel takes up to 255 bytes.
        m.attributes = vec![LinkAttribute::IfAlias(alias.chars().take(200).collect())];
    }
    nl.change(Message::SetLink(m), 0).map_err(failed("bring a link up"))
}

/// Waits until the first side of a pair that was set up carries packets. The kernel learns in the background that the other
/// side has come, and drops what is sent until then: a first packet that the sender repeats a second later, or never.
pub fn wait_for_carrier(nl: &mut Netlink, index: u32) -> Result<()> {
    let begin = Instant::now();
    while find_index(nl, index)?.is_some_and(|l| !l.carries) && begin.elapsed() < CARRIER_PATIENCE {
        std::thread::sleep(Duration::from_micros(500));
    }
    Ok(())
}

/// Keeps the kernel from giving the link an IPv6 link-local address.
pub fn no_link_local(nl: &mut Netlink, index: u32) -> Result<()> {
    let mut m = LinkMessage::default();
    m.header.index = index;
    m.attributes =
        vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
            In6AddrGenMode::None,
        )])])];
    nl.change(Message::SetLink(m), 0).map_err(failed("turn link-local addresses off"))
}

/// Deletes a link, and with it its other side; whether it was there. Nobody finds it any more when this returns, and nothing
/// leads to it.
pub fn delete(nl: &mut Netlink, name: &str, host: Host) -> Result<bool> {
    delete_by(nl, name, |nl, index| removal::delete(nl, index, host))
}

/// [`delete`] for a thread that has entered another network namespace than that of `nl`. Returns later.
pub fn delete_from_afar(nl: &mut Netlink, name: &str) -> Result<bool> {
    delete_by(nl, name, |nl, index| {
        let mut m = LinkMessage::default();
        m.header.index = index;
        nl.change(Message::DelLink(m), 0)
    })
}

fn delete_by(
    nl: &mut Netlink,
    name: &str,
    way: impl FnOnce(&mut Netlink, u32) -> io::Result<()>,
) -> Result<bool> {
    let Some(link) = find(nl, name)? else { return Ok(false) };
    match way(nl, link.index) {
        Ok(()) => Ok(true),
        // Somebody else was first.
        Err(e) if e.raw_os_error() == Some(ENODEV) => Ok(false),
        Err(e) => Err(failed(format!("delete link {name}"))(e)),
    }
}

/// Gives the link `ip` alone, without a subnet. IPv6 skips duplicate detection: the node hands the address out once.
pub fn add_address(nl: &mut Netlink, index: u32, ip: IpAddr, scope: AddressScope) -> Result<()> {
    let mut m = AddressMessage::default();
    m.header.index = index;
    m.header.family = family(ip);
    m.header.prefix_len = full_prefix(ip);
    m.header.scope = scope;
    m.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
    if ip.is_ipv6() {
        m.header.flags = AddressHeaderFlags::Nodad;
        m.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    nl.change(Message::NewAddress(m), NLM_F_CREATE | NLM_F_EXCL).map_err(failed(format!("add address {ip}")))
}

/// All addresses of the link.
pub fn addresses(nl: &mut Netlink, index: u32) -> Result<Vec<IpAddr>> {
    let found = nl.dump(Message::GetAddress(AddressMessage::default())).map_err(failed("list addresses"))?;
    let mut ips = Vec::new();
    for m in found {
        if let Message::NewAddress(m) = m
            && m.header.index == index
        {
            ips.extend(m.attributes.iter().find_map(|a| match a {
                AddressAttribute::Address(ip) => Some(*ip),
                _ => None,
            }));
        }
    }
    Ok(ips)
}

/// A route to `to`/`prefix` by the link, directly or over `gateway`.
pub fn add_route(
    nl: &mut Netlink,
    index: u32,
    to: IpAddr,
    prefix: u8,
    gateway: Option<IpAddr>,
) -> Result<()> {
    let mut m = RouteMessage::default();
    m.header.address_family = family(to);
    m.header.destination_prefix_length = prefix;
    m.header.table = RouteHeader::RT_TABLE_MAIN;
    m.header.protocol = RouteProtocol::Static;
    m.header.kind = RouteType::Unicast;
    m.header.scope = if gateway.is_none() && to.is_ipv4() { RouteScope::Link } else { RouteScope::Universe };
    m.attributes.push(RouteAttribute::Oif(index));
    if prefix > 0 {
        m.attributes.push(RouteAttribute::Destination(RouteAddress::from(to)));
    }
    if let Some(g) = gateway {
        m.attributes.push(RouteAttribute::Gateway(RouteAddress::from(g)));
    }
    nl.change(Message::NewRoute(m), NLM_F_CREATE | NLM_F_EXCL).map_err(|e| match e.raw_os_error() {
        Some(EEXIST) => Error::AddressInUse { ip: to },
        _ => failed(format!("add the route to {to}/{prefix}"))(e),
    })
}

fn route_ip(a: &RouteAddress) -> Option<IpAddr> {
    match a {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}

/// Single addresses that have a route of the main table by a link, and the link's number.
pub fn routed_addresses(nl: &mut Netlink) -> Result<Vec<(IpAddr, u32)>> {
    let found = nl.dump(Message::GetRoute(RouteMessage::default())).map_err(failed("list routes"))?;
    let mut addresses = Vec::new();
    for m in found {
        let Message::NewRoute(m) = m else { continue };
        let (mut to, mut by) = (None, None);
        for a in &m.attributes {
            match a {
                RouteAttribute::Destination(d) => to = route_ip(d),
                RouteAttribute::Oif(index) => by = Some(*index),
                _ => {}
            }
        }
        if let (Some(to), Some(by)) = (to, by)
            && m.header.table == RouteHeader::RT_TABLE_MAIN
            && m.header.destination_prefix_length == full_prefix(to)
        {
            addresses.push((to, by));
        }
    }
    Ok(addresses)
}

/// Where packets to `to` would go; `None` when nowhere. Sends nothing.
pub fn route_to(nl: &mut Netlink, to: IpAddr) -> Result<Option<Hop>> {
    let mut m = RouteMessage::default();
    m.header.address_family = family(to);
    m.header.destination_prefix_length = full_prefix(to);
    m.attributes = vec![RouteAttribute::Destination(RouteAddress::from(to))];
    let found = match nl.get(Message::GetRoute(m)) {
        Ok(Some(Message::NewRoute(found))) => found,
        Ok(_) => return Ok(None),
        Err(e) if matches!(e.raw_os_error(), Some(ENETUNREACH | EHOSTUNREACH)) => return Ok(None),
        Err(e) => return Err(failed(format!("look up the route to {to}"))(e)),
    };
    let mut hop = Hop { index: 0, gateway: None, source: None };
    for a in &found.attributes {
        match a {
            RouteAttribute::Oif(index) => hop.index = *index,
            RouteAttribute::Gateway(g) => hop.gateway = route_ip(g),
            RouteAttribute::PrefSource(s) => hop.source = route_ip(s),
            _ => {}
        }
    }
    Ok(Some(hop))
}

/// A neighbour whose hardware address is known, so that nobody asks for it.
pub fn add_neighbour(nl: &mut Netlink, index: u32, ip: IpAddr, mac: [u8; 6]) -> Result<()> {
    let mut m = NeighbourMessage::default();
    m.header.family = family(ip);
    m.header.ifindex = index;
    m.header.state = NeighbourState::Permanent;
    m.header.kind = RouteType::Unicast;
    m.attributes =
        vec![NeighbourAttribute::Destination(ip.into()), NeighbourAttribute::LinkLayerAddress(mac.to_vec())];
    nl.change(Message::NewNeighbour(m), NLM_F_CREATE).map_err(failed(format!("add neighbour {ip}")))
}
