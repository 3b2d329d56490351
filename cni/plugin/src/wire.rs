//! Attaching a pod to its node and taking it off: a veth pair with host routes, no bridge.
//!
//! The pod has its address alone (/32, /128) and a default route over a gateway that exists nowhere: a permanent neighbour
//! entry leads to the host's side of the pair. The host has a route for the address and the pod's hardware address, so
//! neither side ever asks by ARP or neighbour discovery.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use netlink_packet_route::address::AddressScope;
use orlop_cni_types::Attachment;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::error::Error;
use crate::links;
use crate::netlink::Netlink;

/// The pods' gateways; link-local, so they meet nobody's addresses.
pub const GATEWAY_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 1, 1));
pub const GATEWAY_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));

/// Addresses that lie behind the default route on any node; only looked up, never sent to.
const FAR_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 88, 99, 1));
const FAR_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 1));

/// The kernel gives the loopback interface this index in every namespace.
const LOOPBACK_INDEX: u32 = 1;
/// Ethernet's, when there is no default route to take it from. Bytes.
const DEFAULT_MTU: u32 = 1500;

pub fn gateway(ip: IpAddr) -> IpAddr {
    if ip.is_ipv4() { GATEWAY_V4 } else { GATEWAY_V6 }
}

/// A network namespace held open.
pub struct Netns {
    path: PathBuf,
    file: File,
}

impl Netns {
    pub fn open(path: &Path) -> Result<Netns, Error> {
        match File::open(path) {
            Ok(file) => Ok(Netns { path: path.to_owned(), file }),
            Err(source) => Err(Error::OpenNetns { path: path.to_owned(), source }),
        }
    }

    /// Moves this thread into the namespace and opens a conversation there. There is no way
    /// back: whatever is to be done on the host needs a socket opened before.
    pub fn enter(&self) -> Result<Netlink, Error> {
        move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|e| Error::EnterNetns { path: self.path.clone(), source: e.into() })?;
        links::open()
    }
}

/// What is to be made.
pub struct Wiring<'a> {
    pub attachment: &'a Attachment,
    pub host_name: String,
    pub ips: &'a [IpAddr],
    /// Bytes; 0: as the interface with the default route.
    pub mtu: u32,
    pub mac: Option<[u8; 6]>,
    pub alias: &'a str,
    /// The node's loopback address reaches the pod, by a host port.
    pub from_loopback: bool,
}

/// What was made.
pub struct Wired {
    pub host_mac: [u8; 6],
    pub pod_mac: [u8; 6],
    pub mtu: u32,
}

impl Wiring<'_> {
    /// Makes everything. On an error the caller deletes the pair, which takes everything else with it.
    pub fn attach(&self, host: &mut Netlink, netns: &Netns) -> Result<Wired, Error> {
        let (host_mac, own_mac) = self.attachment.macs();
        let wired = Wired { host_mac, pod_mac: self.mac.unwrap_or(own_mac), mtu: self.find_mtu(host)? };
        links::create_pair(
            host,
            &links::Side { name: &self.host_name, mac: host_mac },
            &links::Side { name: &self.attachment.ifname, mac: wired.pod_mac },
            netns.file.as_raw_fd(),
            wired.mtu,
        )?;
        let index = self.host_side(host, &wired)?;
        let mut pod = netns.enter()?;
        self.pod_side(&mut pod, &wired)?;
        links::wait_for_carrier(host, index)?;
        Ok(wired)
    }

    fn has_ipv6(&self) -> bool {
        self.ips.iter().any(IpAddr::is_ipv6)
    }

    fn find_mtu(&self, host: &mut Netlink) -> Result<u32, Error> {
        if self.mtu != 0 {
            return Ok(self.mtu);
        }
        let far = if self.ips.iter().any(IpAddr::is_ipv4) { FAR_V4 } else { FAR_V6 };
        let Some(hop) = links::route_to(host, far)? else { return Ok(DEFAULT_MTU) };
        Ok(links::find_index(host, hop.index)?.map(|l| l.mtu).filter(|m| *m != 0).unwrap_or(DEFAULT_MTU))
    }

    /// Returns the link's index.
    fn host_side(&self, host: &mut Netlink, wired: &Wired) -> Result<u32, Error> {
        let index = links::expect(host, &self.host_name)?.index;
        if !self.has_ipv6() {
            // Fails where the kernel has no IPv6, which is as good.
            let _ = links::no_link_local(host, index);
        }
        links::set_up(host, index, Some(self.alias))?;
        if self.ips.iter().any(IpAddr::is_ipv4) {
            sysctl("net/ipv4/ip_forward", "1")?;
            // Loose, as answers of a service may leave a pod with the service's address.
            sysctl(&format!("net/ipv4/conf/{}/rp_filter", self.host_name), "2")?;
            if self.from_loopback {
                sysctl(&format!("net/ipv4/conf/{}/route_localnet", self.host_name), "1")?;
            }
        }
        if self.has_ipv6() {
            forward_ipv6()?;
        }
        for &ip in self.ips {
            links::add_neighbour(host, index, ip, wired.pod_mac)?;
            links::add_route(host, index, ip, if ip.is_ipv4() { 32 } else { 128 }, None)?;
            // A node without any address to send from needs one on this link, else it could not talk to the pod.
            if ip.is_ipv4() && links::route_to(host, ip)?.is_some_and(|h| h.source.is_none()) {
                links::add_address(host, index, GATEWAY_V4, AddressScope::Link)?;
            }
        }
        Ok(index)
    }

    fn pod_side(&self, pod: &mut Netlink, wired: &Wired) -> Result<(), Error> {
        let name = &self.attachment.ifname;
        let index = links::expect(pod, name)?.index;
        if self.has_ipv6() {
            sysctl(&format!("net/ipv6/conf/{name}/disable_ipv6"), "0")?;
            sysctl(&format!("net/ipv6/conf/{name}/accept_dad"), "0")?;
        } else {
            let _ = links::no_link_local(pod, index);
        }
        links::set_up(pod, LOOPBACK_INDEX, None)?;
        links::set_up(pod, index, None)?;
        for &ip in self.ips {
            let gateway = gateway(ip);
            links::add_address(pod, index, ip, AddressScope::Universe)?;
            links::add_neighbour(pod, index, gateway, wired.host_mac)?;
            if ip.is_ipv4() {
                links::add_route(pod, index, gateway, 32, None)?;
            }
        }
        // One default route for each family, however many addresses there are.
        for any in [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)] {
            if self.ips.iter().any(|ip| ip.is_ipv4() == any.is_ipv4()) {
                links::add_route(pod, index, any, 0, Some(gateway(any)))?;
            }
        }
        Ok(())
    }
}

/// Brings the loopback interface of the namespace up.
pub fn loopback_up(netns: &Netns) -> Result<(), Error> {
    links::set_up(&mut netns.enter()?, LOOPBACK_INDEX, None)
}

pub fn loopback_is_up(netns: &Netns) -> Result<bool, Error> {
    Ok(links::find_index(&mut netns.enter()?, LOOPBACK_INDEX)?.is_some_and(|l| l.up))
}

/// Says what differs from what [`Wiring::attach`] makes.
pub fn check(host_name: &str, ifname: &str, ips: &[IpAddr], netns: &Netns) -> Result<(), Error> {
    let wrong = |what: String| Err(Error::Check(what));
    let mut host = links::open()?;
    let Some(link) = links::find(&mut host, host_name)? else {
        return wrong(format!("the node has no interface {host_name}"));
    };
    if !link.up {
        return wrong(format!("interface {host_name} of the node is down"));
    }
    for &ip in ips {
        if links::route_to(&mut host, ip)?.map(|h| h.index) != Some(link.index) {
            return wrong(format!("the node has no route to {ip} by {host_name}"));
        }
    }
    let mut pod = netns.enter()?;
    let Some(link) = links::find(&mut pod, ifname)? else {
        return wrong(format!("the pod has no interface {ifname}"));
    };
    if !link.up {
        return wrong(format!("interface {ifname} of the pod is down"));
    }
    let found = links::addresses(&mut pod, link.index)?;
    for &ip in ips {
        if !found.contains(&ip) {
            return wrong(format!("interface {ifname} of the pod has no address {ip}"));
        }
        let far = if ip.is_ipv4() { FAR_V4 } else { FAR_V6 };
        let hop = links::route_to(&mut pod, far)?;
        if hop.as_ref().map(|h| h.index) != Some(link.index) {
            return wrong(format!("the pod has no default route by {ifname}"));
        }
    }
    Ok(())
}

/// Writes only what differs: a write to a forwarding switch resets other settings.
fn sysctl(name: &str, value: &'static str) -> Result<(), Error> {
    let path = Path::new("/proc/sys").join(name);
    if fs::read_to_string(&path).is_ok_and(|v| v.trim() == value) {
        return Ok(());
    }
    fs::write(&path, value).map_err(|source| Error::Sysctl { path, value, source })
}

/// A router ignores router advertisements unless told otherwise; the node must keep the routes it has from them.
fn forward_ipv6() -> Result<(), Error> {
    let all = Path::new("/proc/sys/net/ipv6/conf/all/forwarding");
    if fs::read_to_string(all).is_ok_and(|v| v.trim() == "1") {
        return Ok(());
    }
    for entry in fs::read_dir("/proc/sys/net/ipv6/conf").into_iter().flatten().flatten() {
        let accept = entry.path().join("accept_ra");
        if fs::read_to_string(&accept).is_ok_and(|v| v.trim() == "1") {
            // An interface may go away meanwhile.
            let _ = fs::write(&accept, "2");
        }
    }
    sysctl("net/ipv6/conf/all/forwarding", "1")
}
