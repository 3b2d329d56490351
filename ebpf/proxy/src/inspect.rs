//! What `orlop proxy status|services|backends|flows|trace` say, read from the kernel's maps alone: it is true whether or
//! not a proxy runs.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use ipnet::IpNet;
use nix::time::{ClockId, clock_gettime};
use orlop_ebpf_common::{
    FrontendKey, FrontendValue, LAYOUT, SCOPE_EXTERNAL, SCOPE_INTERNAL, SERVICE_RANGE, SlotKey, TCP, UDP,
    addr_from, addr_to, any_addr, backend_flags, config_flags, counters, ct_dir, ct_flags, frontend_flags,
    is_v4, local_flags, uplink_flags,
};
use orlop_ebpf_loader::{Dump, MapFailure, Maps, Range, RealMaps, SOCKET_PROGRAMS};

use crate::Error;

/// A question to the maps.
#[derive(Clone, Debug)]
pub enum Question {
    Status,
    Services,
    Backends,
    /// Connections and sockets, of one service (part of its name) or all.
    Flows {
        service: Option<String>,
    },
    /// What would happen to a new connection.
    Trace {
        to: SocketAddr,
        udp: bool,
        /// Asked by a client outside of the node.
        outside: bool,
    },
}

/// The answer as text, a line for each thing.
pub fn inspect(pins: &Path, question: &Question) -> Result<String, Error> {
    let maps = RealMaps::open(pins)?;
    let dump = maps.dump().map_err(read)?;
    let view = View { maps, dump };
    match question {
        Question::Status => view.status(pins),
        Question::Services => view.services(),
        Question::Backends => Ok(view.backends()),
        Question::Flows { service } => view.flows(service.as_deref()),
        Question::Trace { to, udp, outside } => view.trace(*to, *udp, *outside),
    }
}

fn read(source: MapFailure) -> Error {
    Error::Inspect { source }
}

fn protocol(proto: u8) -> &'static str {
    match proto {
        TCP => "TCP",
        UDP => "UDP",
        _ => "other",
    }
}

fn at(addr: &orlop_ebpf_common::Addr, port: u16) -> SocketAddr {
    SocketAddr::new(addr_to(addr), port)
}

fn net((r, bits): &Range) -> Option<IpNet> {
    let bits = if is_v4(&r.addr) { bits.saturating_sub(96) } else { *bits };
    IpNet::new(addr_to(&r.addr), bits).ok()
}

fn frontend_name(k: &FrontendKey) -> String {
    if k.is_rest() {
        return format!("all else at {}", addr_to(&k.addr));
    }
    let place = if k.addr == any_addr(is_v4(&k.addr)) {
        let family = if is_v4(&k.addr) { "IPv4" } else { "IPv6" };
        format!("node port {} ({family})", k.port)
    } else {
        at(&k.addr, k.port).to_string()
    };
    let scope = if k.scope == SCOPE_EXTERNAL { "from outside" } else { "from inside" };
    format!("{place}/{} {scope}", protocol(k.proto))
}

fn flag_names(v: &FrontendValue) -> String {
    let mut names = Vec::new();
    if v.flags & frontend_flags::AFFINITY != 0 {
        names.push(format!("ClientIP affinity {} s", v.affinity_seconds));
    }
    for (flag, name) in [
        (frontend_flags::MAGLEV, "maglev"),
        (frontend_flags::DROP_WHEN_EMPTY, "no endpoint on this node"),
        (frontend_flags::RANGES, "source ranges"),
    ] {
        if v.flags & flag != 0 {
            names.push(name.to_owned());
        }
    }
    if names.is_empty() { String::new() } else { format!(" [{}]", names.join(", ")) }
}

struct View {
    maps: RealMaps,
    dump: Dump,
}

impl View {
    fn service(&self, number: u32) -> String {
        self.dump.services.get(&number).cloned().unwrap_or_else(|| format!("#{number}"))
    }

    fn set(&self, v: &FrontendValue) -> Vec<u32> {
        (0..v.count).filter_map(|slot| self.dump.slots.get(&SlotKey { set: v.set, slot }).copied()).collect()
    }

    fn backend(&self, id: u32) -> String {
        match self.dump.backends.get(&id) {
            Some(b) => {
                let here = if b.flags & backend_flags::LOCAL != 0 { " (this node)" } else { "" };
                format!("{}/{}{here}", at(&b.addr, b.port), protocol(b.proto))
            }
            None => format!("backend {id}, which is gone"),
        }
    }

    /// Addresses that are Services' alone.
    fn service_ranges(&self) -> Vec<IpNet> {
        let ranges = self.dump.ranges.iter().filter(|(r, _)| r.service == SERVICE_RANGE);
        let mut nets: Vec<IpNet> = ranges.filter_map(net).collect();
        nets.sort();
        nets
    }

    fn status(&self, pins: &Path) -> Result<String, Error> {
        let mut out = String::new();
        let config = self.maps.config().map_err(read)?;
        let links = std::fs::read_dir(pins.join("links")).into_iter().flatten().flatten();
        let links: BTreeSet<String> = links.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        let sockets = links.iter().filter(|l| l.starts_with("lb_")).count();
        line(&mut out, "pins", &format!("{} (layout {LAYOUT})", pins.display()));
        line(&mut out, "socket programs attached", &format!("{sockets} of {SOCKET_PROGRAMS}"));
        for (index, u) in self.maps.uplinks() {
            let name = nix::net::if_::if_indextoname(index);
            let name =
                name.ok().and_then(|n| n.into_string().ok()).unwrap_or_else(|| format!("#{index}, gone"));
            let how = if links.contains(&format!("clsact_{index}")) { "clsact" } else { "tcx" };
            let how = if u.flags & uplink_flags::XDP != 0 { format!("{how}, XDP") } else { how.to_owned() };
            let what = if u.flags & uplink_flags::POD != 0 { "pod" } else { "uplink" };
            let own: Vec<String> =
                [u.addr4, u.addr6].iter().filter(|a| **a != [0; 4]).map(|a| addr_to(a).to_string()).collect();
            line(&mut out, "interface", &format!("{name} ({what}, {how}) {}", own.join(" ")));
        }
        let serving = self.dump.locals.iter().filter(|(_, f)| **f & local_flags::NODE_PORT != 0);
        let mut serving: Vec<IpAddr> = serving.map(|(a, _)| addr_to(a)).collect();
        serving.sort();
        let serving: Vec<String> = serving.iter().map(IpAddr::to_string).collect();
        line(&mut out, "node ports answer on", &serving.join(" "));
        let loopback = config.flags & (config_flags::LOOPBACK4 | config_flags::LOOPBACK6) != 0;
        line(&mut out, "node ports on loopback", if loopback { "yes" } else { "no" });
        let ranges: Vec<String> = self.service_ranges().iter().map(IpNet::to_string).collect();
        line(&mut out, "addresses of Services alone", &ranges.join(" "));
        line(&mut out, "translated source ports", &format!("{}-{}", config.snat_first, config.snat_last));
        let connections = self.maps.connections().map_err(read)?;
        let forward = connections.iter().filter(|(k, _)| k.dir == ct_dir::FORWARD).count();
        for (what, n) in [
            ("service ports", self.dump.services.len()),
            ("service addresses", self.dump.frontends.keys().filter(|k| !k.is_rest()).count()),
            ("endpoints", self.dump.backends.len()),
            ("connections through interfaces", forward),
            ("sockets remembered", self.maps.sockets().map_err(read)?.len()),
            ("clients with affinity", self.maps.affinity().map_err(read)?.len()),
        ] {
            line(&mut out, what, &n.to_string());
        }
        for (what, index) in COUNTERS {
            line(&mut out, what, &self.maps.counter(index).to_string());
        }
        Ok(out)
    }

    fn services(&self) -> Result<String, Error> {
        let stats = self.maps.stats().map_err(read)?;
        let stats: HashMap<u32, orlop_ebpf_common::Stats> = stats.into_iter().collect();
        let mut by_service: BTreeMap<String, Vec<(&FrontendKey, &FrontendValue)>> = BTreeMap::new();
        for (k, v) in &self.dump.frontends {
            by_service.entry(self.service(v.service)).or_default().push((k, v));
        }
        let mut out = String::new();
        for (name, mut fronts) in by_service {
            fronts.sort_by_key(|(k, _)| (k.is_rest(), k.scope, k.port, k.addr));
            let s = fronts.first().and_then(|(_, v)| stats.get(&v.service)).copied().unwrap_or_default();
            push(&mut out, &format!("{name}  connections={} refused={}", s.connections, s.refused));
            for (k, v) in fronts {
                if k.is_rest() {
                    push(&mut out, &format!("  {} -> refused", frontend_name(k)));
                    continue;
                }
                let to = format!("{} endpoints", self.set(v).len());
                push(&mut out, &format!("  {} -> {to}{}", frontend_name(k), flag_names(v)));
            }
        }
        Ok(out)
    }

    fn backends(&self) -> String {
        let mut used_by: HashMap<u32, BTreeSet<String>> = HashMap::new();
        for v in self.dump.frontends.values() {
            for id in self.set(v) {
                used_by.entry(id).or_default().insert(self.service(v.service));
            }
        }
        let mut ids: Vec<u32> = self.dump.backends.keys().copied().collect();
        ids.sort_unstable();
        let mut out = String::new();
        for id in ids {
            let users: Vec<String> = used_by.remove(&id).unwrap_or_default().into_iter().collect();
            push(&mut out, &format!("{id}  {}  {}", self.backend(id), users.join(" ")));
        }
        out
    }

    fn flows(&self, service: Option<&str>) -> Result<String, Error> {
        let wanted = |number: u32| service.is_none_or(|s| self.service(number).contains(s));
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC)
            .map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64);
        let mut out = String::new();
        for (k, v) in self.maps.connections().map_err(read)? {
            if k.dir != ct_dir::FORWARD || !wanted(v.service) {
                continue;
            }
            let via = if v.flags & ct_flags::DIRECT != 0 {
                " answered from there".to_owned()
            } else if v.flags & ct_flags::SRC != 0 {
                format!(" from {}", at(&v.src, v.sport))
            } else {
                String::new()
            };
            let end = if v.flags & ct_flags::CLOSING != 0 { ", closing" } else { "" };
            let to = if v.backend == 0 { "refused".to_owned() } else { at(&v.dst, v.dport).to_string() };
            let idle = now.saturating_sub(v.last_seen_ns) / 1_000_000_000;
            push(
                &mut out,
                &format!(
                    "packets {} {} -> {} => {to}{via}  {}  idle {idle} s{end}",
                    protocol(k.proto),
                    at(&k.src, k.sport),
                    at(&k.dst, k.dport),
                    self.service(v.service),
                ),
            );
        }
        for (k, r) in self.maps.sockets().map_err(read)? {
            if wanted(r.service) {
                let (asked, got) = (at(&r.addr, r.port), at(&k.addr, k.port));
                let (proto, name) = (protocol(k.proto), self.service(r.service));
                push(&mut out, &format!("socket {:#x} {proto} {asked} => {got}  {name}", k.cookie));
            }
        }
        Ok(out)
    }

    fn trace(&self, to: SocketAddr, udp: bool, outside: bool) -> Result<String, Error> {
        let proto = if udp { UDP } else { TCP };
        let scope = if outside { SCOPE_EXTERNAL } else { SCOPE_INTERNAL };
        let addr = addr_from(to.ip());
        let mut key = FrontendKey { addr, port: to.port(), proto, scope };
        let mut out = String::new();
        let mut found = self.dump.frontends.get(&key);
        if found.is_none() && outside {
            // A ClusterIP that is routed to this node.
            key.scope = SCOPE_INTERNAL;
            found = self.dump.frontends.get(&key);
        }
        if found.is_none() {
            let rest = FrontendKey::rest(addr);
            found = self.dump.frontends.get(&rest);
            key = if found.is_some() { rest } else { key };
        }
        if found.is_none() {
            key.scope = scope;
            key.addr = any_addr(to.is_ipv4());
            found = self.dump.frontends.get(&key);
            let serves = self.dump.locals.get(&addr).is_some_and(|f| f & local_flags::NODE_PORT != 0)
                || (to.ip().is_loopback() && !outside);
            if found.is_some() && !serves {
                push(
                    &mut out,
                    &format!("{} is a node port, but node ports do not answer on {}", to.port(), to.ip()),
                );
                found = None;
            }
        }
        let Some(v) = found else {
            let end = if self.service_ranges().iter().any(|n| n.contains(&to.ip())) {
                "no Service's address, but one of their range: dropped where it leaves the node"
            } else {
                "no Service: the packet goes on as it is"
            };
            push(&mut out, &format!("{to}/{} is {end}", protocol(proto)));
            return Ok(out);
        };
        push(&mut out, &format!("{} of {}{}", frontend_name(&key), self.service(v.service), flag_names(v)));
        for admitted in self.dump.ranges.iter().filter(|(r, _)| r.service == v.service).filter_map(net) {
            push(&mut out, &format!("  admits {admitted}"));
        }
        let ids = self.set(v);
        if ids.is_empty() {
            let how = if v.flags & frontend_flags::DROP_WHEN_EMPTY != 0 { "dropped" } else { "refused" };
            push(&mut out, &format!("  no endpoint: {how}"));
        }
        for id in ids {
            push(&mut out, &format!("  -> {}", self.backend(id)));
        }
        Ok(out)
    }
}

const COUNTERS: [(&str, u32); 15] = [
    ("socket translations", counters::SOCK_TRANSLATED),
    ("socket refusals", counters::SOCK_REFUSED),
    ("packet connections", counters::PACKET_CONNECTIONS),
    ("packet refusals", counters::PACKET_REFUSED),
    ("packets dropped", counters::PACKET_DROPPED),
    ("fragments not translated", counters::FRAGMENTS),
    ("source ports exhausted", counters::SNAT_EXHAUSTED),
    ("connections resumed", counters::RESUMED),
    ("ICMP errors translated", counters::ICMP_ERRORS),
    ("sources not admitted", counters::NOT_ADMITTED),
    ("packets too big for their way", counters::TOO_BIG),
    ("connections handed over to us", counters::DIRECT),
    ("packets sent on by XDP", counters::XDP),
    ("packets past the stack", counters::SHORT),
    ("packets for no Service", counters::UNALLOCATED),
];

fn line(out: &mut String, what: &str, value: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "{what:<32}{value}");
}

fn push(out: &mut String, text: &str) {
    out.push_str(text);
    out.push('\n');
}
