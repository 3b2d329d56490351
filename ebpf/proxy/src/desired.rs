//! From the model to the entries that maps should hold for one Service. Pure.

use orlop_ebpf_common::{
    Backend, FrontendKey, RangeKey, SCOPE_EXTERNAL, SCOPE_INTERNAL, addr_from, any_addr, backend_flags,
    maglev,
};

use ipnet::IpNet;
use orlop_ebpf_loader::Range;

use crate::model::{Endpoint, Hint, Model, Port, Service};

/// Identifies a set of backends within a Service, over restarts and updates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SetKey {
    pub port: u16,
    pub proto: u8,
    pub v4: bool,
    /// Only endpoints on this node (traffic policy Local).
    pub local: bool,
    /// Nobody, for the ports of a ClusterIP that are no Service's: who asks there is refused. Counted with `port`.
    pub rest: bool,
}

/// A set and its backends, in a stable order.
#[derive(Clone, Debug, PartialEq)]
pub struct Set {
    pub key: SetKey,
    pub backends: Vec<Backend>,
    /// Wanted: a Maglev table, for packets from outside.
    pub maglev: bool,
}

/// A frontend and the index of its set.
#[derive(Clone, Debug, PartialEq)]
pub struct Frontend {
    pub key: FrontendKey,
    pub set: usize,
    /// There are endpoints, but policy Local hides them all: drop in place of refuse.
    pub hidden: bool,
    /// Only sources in the service's ranges are served.
    pub ranged: bool,
}

/// All entries of one Service.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Desired {
    pub affinity_seconds: u32,
    /// Names of ports, by port and protocol.
    pub names: Vec<((u16, u8), Box<str>)>,
    /// Sources that ranged frontends serve.
    pub ranges: Vec<Range>,
    /// This node is among them, by IPv4 and by IPv6.
    pub node_admitted: [bool; 2],
    pub sets: Vec<Set>,
    pub frontends: Vec<Frontend>,
}

/// How backends are chosen for packets from outside. Sockets choose at random.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Selection {
    /// By consistent hashing: every node chooses the same, so a client keeps its backend when packets come through
    /// another node.
    #[default]
    Maglev,
    Random,
}

impl Selection {
    /// By the name that flags and annotations have for it.
    pub fn named(name: &str) -> Option<Selection> {
        match name {
            "maglev" => Some(Selection::Maglev),
            "random" => Some(Selection::Random),
            _ => None,
        }
    }
}

/// The entries of a Service; none when the model does not have it.
pub fn desired(model: &Model, name: &str, selection: Selection) -> Desired {
    let Some(service) = model.service(name) else { return Desired::default() };
    let admitted = |v4: bool| {
        let ranges = service.source_ranges.iter();
        let mut own = model.node_ips().iter().filter(|ip| ip.is_ipv4() == v4);
        own.any(|ip| ranges.clone().any(|r| r.contains(ip)))
    };
    let mut d = Desired {
        affinity_seconds: service.affinity_seconds,
        ranges: service.source_ranges.iter().map(range).collect(),
        node_admitted: if service.source_ranges.is_empty() {
            [false; 2]
        } else {
            [admitted(true), admitted(false)]
        },
        ..Desired::default()
    };
    let selection = service.selection.unwrap_or(selection);
    for port in &service.ports {
        for v4 in [true, false] {
            add_port(&mut d, model, name, service, port, v4, selection);
        }
    }
    add_rest(&mut d, service);
    d
}

/// Refusals at ClusterIPs, of what is not for a port of theirs.
fn add_rest(d: &mut Desired, service: &Service) {
    let Some(first) = service.ports.first() else { return };
    for ip in &service.cluster_ips {
        let key = SetKey { port: first.port, proto: first.proto, v4: ip.is_ipv4(), local: false, rest: true };
        let set = d.sets.iter().position(|s| s.key == key).unwrap_or_else(|| {
            d.sets.push(Set { key, backends: Vec::new(), maglev: false });
            d.sets.len() - 1
        });
        d.frontends.push(Frontend {
            key: FrontendKey::rest(addr_from(*ip)),
            set,
            hidden: false,
            ranged: false,
        });
    }
}

/// The service's number is filled in when it has one.
pub fn range(net: &IpNet) -> Range {
    let before = if net.addr().is_ipv4() { 96 } else { 0 };
    (RangeKey { service: 0, addr: addr_from(net.network()) }, before + net.prefix_len())
}

fn add_port(
    d: &mut Desired,
    model: &Model,
    name: &str,
    service: &Service,
    port: &Port,
    v4: bool,
    selection: Selection,
) {
    if !service.cluster_ips.iter().any(|a| a.is_ipv4() == v4) {
        return;
    }
    let number = (port.port, port.proto);
    if !d.names.iter().any(|(n, _)| *n == number) {
        d.names.push((number, port.name.clone()));
    }
    let mut addresses = Vec::new();
    for ip in service.cluster_ips.iter().filter(|a| a.is_ipv4() == v4) {
        addresses.push((addr_from(*ip), port.port, SCOPE_INTERNAL, service.internal_local, false));
    }
    let ranged = service.source_ranges.iter().any(|r| r.addr().is_ipv4() == v4);
    // Traffic from within the cluster takes the short cut to all endpoints; only what comes from outside is bound to
    // this node by externalTrafficPolicy.
    let mut external = |addr, number, ranged| {
        addresses.push((addr, number, SCOPE_INTERNAL, false, ranged));
        addresses.push((addr, number, SCOPE_EXTERNAL, service.external_local, ranged));
    };
    for ip in service.external_ips.iter().filter(|a| a.is_ipv4() == v4) {
        external(addr_from(*ip), port.port, false);
    }
    for ip in service.load_balancer_ips.iter().filter(|a| a.is_ipv4() == v4) {
        external(addr_from(*ip), port.port, ranged);
    }
    if port.node_port != 0 {
        external(any_addr(v4), port.node_port, false);
    }

    let (cluster, local) = endpoints(model, name, port, v4);
    let hidden = local.is_empty() && !cluster.is_empty();
    let first = d.sets.len();
    for (addr, number, scope, only_local, ranged) in addresses {
        let key = SetKey { port: port.port, proto: port.proto, v4, local: only_local, rest: false };
        let set = match d.sets[first..].iter().position(|s| s.key == key) {
            Some(i) => first + i,
            None => {
                let backends = if only_local { &local } else { &cluster };
                d.sets.push(Set { key, backends: backends.clone(), maglev: false });
                d.sets.len() - 1
            }
        };
        let count = d.sets[set].backends.len();
        if scope == SCOPE_EXTERNAL
            && selection == Selection::Maglev
            && (2..=maglev::MAX_BACKENDS).contains(&count)
        {
            d.sets[set].maglev = true;
        }
        let key = FrontendKey { addr, port: number, proto: port.proto, scope };
        d.frontends.push(Frontend { key, set, hidden: only_local && hidden, ranged });
    }
}

/// The backends of a port: all usable ones, and those on this node. Where none is ready, terminating ones that still
/// serve are used (KEP-1669), for each of the two by itself.
fn endpoints(model: &Model, name: &str, port: &Port, v4: bool) -> (Vec<Backend>, Vec<Backend>) {
    let mut all: Vec<(Backend, Endpoint)> = Vec::new();
    for slice in model.slices_of(name).filter(|s| s.v4 == v4) {
        let Some(number) =
            slice.ports.iter().find(|p| p.name == port.name && p.proto == port.proto).map(|p| p.port)
        else {
            continue;
        };
        all.extend(slice.endpoints.iter().map(|e| {
            let flags = if e.local { backend_flags::LOCAL } else { 0 };
            (Backend { addr: addr_from(e.ip), port: number, proto: port.proto, flags }, *e)
        }));
    }
    // An endpoint may be in two slices for a moment while it moves; the ready one counts.
    all.sort_by_key(|(b, e)| (b.addr, b.port, !e.ready));
    all.dedup_by_key(|(b, _)| (b.addr, b.port));
    let pick = |usable: &dyn Fn(&Endpoint) -> bool| -> Vec<Backend> {
        all.iter().filter(|(_, e)| usable(e)).map(|(b, _)| *b).collect()
    };
    let or_terminating = |ready: Vec<Backend>, place: &dyn Fn(&Endpoint) -> bool| {
        if ready.is_empty() { pick(&|e| place(e) && e.serving && e.terminating) } else { ready }
    };
    let prefers = preference(all.iter().map(|(_, e)| e));
    (
        or_terminating(pick(&|e| e.ready && prefers(e)), &|_| true),
        or_terminating(pick(&|e| e.ready && e.local), &|e| e.local),
    )
}

/// Which endpoints traffic policy Cluster takes (KEP-3015, KEP-2433): those meant for this node when every ready one
/// says for which nodes it is and one of them is for this; else the same by zones; else all.
fn preference<'a>(all: impl Iterator<Item = &'a Endpoint> + Clone) -> fn(&Endpoint) -> bool {
    let ready = all.filter(|e| e.ready);
    let decides = |hint: fn(&Endpoint) -> Hint| {
        ready.clone().all(|e| hint(e) != Hint::None) && ready.clone().any(|e| hint(e) == Hint::Ours)
    };
    if decides(|e| e.hints.node) {
        |e| e.hints.node == Hint::Ours
    } else if decides(|e| e.hints.zone) {
        |e| e.hints.zone == Hint::Ours
    } else {
        |_| true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Hints, Slice, SlicePort};
    use orlop_ebpf_common::{TCP, addr_to};

    fn endpoint(ip: &str, state: &str) -> Endpoint {
        Endpoint {
            ip: ip.parse().unwrap(),
            ready: state.contains('r'),
            serving: state.contains('s'),
            terminating: state.contains('t'),
            local: state.contains('l'),
            hints: Hints { node: hint(state, "nN"), zone: hint(state, "zZ") },
        }
    }

    /// `letters`: for others, for us.
    fn hint(state: &str, letters: &str) -> Hint {
        match state.find(|c| letters.contains(c)).map(|i| &state[i..=i]) {
            None => Hint::None,
            Some(c) if letters.ends_with(c) => Hint::Ours,
            Some(_) => Hint::Others,
        }
    }

    fn model(service: Service, endpoints: &[(&str, &str)]) -> Model {
        let mut m = Model::default();
        m.set_service("n/s", Some(service));
        m.set_slice(
            "n/s-1",
            Some(Slice {
                service: "n/s".into(),
                v4: true,
                ports: vec![SlicePort { name: "http".into(), proto: TCP, port: 8080 }],
                endpoints: endpoints.iter().map(|(ip, s)| endpoint(ip, s)).collect(),
            }),
        );
        m
    }

    fn service() -> Service {
        Service {
            cluster_ips: vec!["10.96.0.10".parse().unwrap()],
            ports: vec![Port { name: "http".into(), proto: TCP, port: 80, node_port: 30080 }],
            ..Service::default()
        }
    }

    /// `address:port/scope -> backend,backend`, sorted.
    fn show(d: &Desired) -> Vec<String> {
        let mut lines: Vec<String> = d
            .frontends
            .iter()
            .filter(|f| !f.key.is_rest())
            .map(|f| {
                let set = &d.sets[f.set];
                let to: Vec<String> = set.backends.iter().map(|b| addr_to(&b.addr).to_string()).collect();
                let scope = if f.key.scope == SCOPE_EXTERNAL { "out" } else { "in" };
                let hidden = if f.hidden { " hidden" } else { "" };
                format!("{}:{}/{scope} -> {}{hidden}", addr_to(&f.key.addr), f.key.port, to.join(","))
            })
            .collect();
        lines.sort();
        lines
    }

    #[test]
    fn traffic_policies() {
        let eps = [("10.1.0.1", "rsl"), ("10.1.0.2", "rs")];
        let m = model(service(), &eps);
        assert_eq!(
            show(&desired(&m, "n/s", Selection::Maglev)),
            [
                "0.0.0.0:30080/in -> 10.1.0.1,10.1.0.2",
                "0.0.0.0:30080/out -> 10.1.0.1,10.1.0.2",
                "10.96.0.10:80/in -> 10.1.0.1,10.1.0.2",
            ]
        );
        let local = Service { external_local: true, internal_local: true, ..service() };
        assert_eq!(
            show(&desired(&model(local.clone(), &eps), "n/s", Selection::Maglev)),
            [
                "0.0.0.0:30080/in -> 10.1.0.1,10.1.0.2",
                "0.0.0.0:30080/out -> 10.1.0.1",
                "10.96.0.10:80/in -> 10.1.0.1",
            ]
        );
        assert_eq!(
            show(&desired(&model(local, &eps[1..]), "n/s", Selection::Maglev)),
            ["0.0.0.0:30080/in -> 10.1.0.2", "0.0.0.0:30080/out ->  hidden", "10.96.0.10:80/in ->  hidden"]
        );
    }

    #[test]
    fn terminating_endpoints_serve_when_nothing_is_ready() {
        let cases: [(&[(&str, &str)], &str); 4] = [
            (&[("10.1.0.1", "st"), ("10.1.0.2", "rs")], "10.1.0.2"),
            (&[("10.1.0.1", "st"), ("10.1.0.2", "")], "10.1.0.1"),
            (&[("10.1.0.1", "t"), ("10.1.0.2", "s")], ""),
            (&[], ""),
        ];
        for (eps, expected) in cases {
            let d = desired(&model(service(), eps), "n/s", Selection::Random);
            assert_eq!(show(&d)[2], format!("10.96.0.10:80/in -> {expected}"), "{eps:?}");
        }
    }

    #[test]
    fn hints_choose_among_ready_endpoints() {
        let cases: [(&[&str], &str); 9] = [
            (&["rsZ", "rsz"], "10.1.0.1"),
            (&["rsZ", "rs"], "10.1.0.1,10.1.0.2"),
            (&["rsz", "rsz"], "10.1.0.1,10.1.0.2"),
            (&["sZ", "rsz"], "10.1.0.2"),
            (&["rsZN", "rsZn"], "10.1.0.1"),
            (&["rsZ", "rszN"], "10.1.0.1"),
            (&["rsZn", "rszn"], "10.1.0.1"),
            (&["rsN", "s"], "10.1.0.1"),
            (&["stZ", "stz"], "10.1.0.1,10.1.0.2"),
        ];
        for (states, expected) in cases {
            let eps: Vec<(&str, &str)> =
                ["10.1.0.1", "10.1.0.2"].into_iter().zip(states.iter().copied()).collect();
            let d = desired(&model(service(), &eps), "n/s", Selection::Random);
            assert_eq!(show(&d)[2], format!("10.96.0.10:80/in -> {expected}"), "{states:?}");
        }
    }

    #[test]
    fn source_ranges_hold_for_load_balancer_addresses_only() {
        let s = Service {
            load_balancer_ips: vec!["192.0.2.9".parse().unwrap()],
            external_ips: vec!["192.0.2.8".parse().unwrap()],
            source_ranges: vec!["10.0.0.0/8".parse().unwrap()],
            ..service()
        };
        let mut m = model(s, &[("10.1.0.1", "rs")]);
        let ranged = |m: &Model| {
            let d = desired(m, "n/s", Selection::Random);
            let ips = d.frontends.iter().filter(|f| f.ranged).map(|f| addr_to(&f.key.addr).to_string());
            (ips.collect::<Vec<_>>(), d.node_admitted)
        };
        assert_eq!(ranged(&m), (vec!["192.0.2.9".to_owned(); 2], [false, false]));
        m.take_dirty();
        m.set_node_ips(vec!["10.3.0.1".parse().unwrap()]);
        assert_eq!(m.take_dirty().len(), 1, "the node's addresses matter");
        assert_eq!(ranged(&m).1, [true, false]);
        let d = desired(&m, "n/s", Selection::Random);
        assert_eq!(d.ranges, [(RangeKey { service: 0, addr: addr_from("10.0.0.0".parse().unwrap()) }, 104)]);
    }

    #[test]
    fn a_service_may_say_how_its_backends_are_chosen() {
        let eps = [("10.1.0.1", "rs"), ("10.1.0.2", "rs")];
        let cases = [
            (None, Selection::Maglev, true),
            (None, Selection::Random, false),
            (Some(Selection::Random), Selection::Maglev, false),
            (Some(Selection::Maglev), Selection::Random, true),
        ];
        for (own, general, expected) in cases {
            let m = model(Service { selection: own, ..service() }, &eps);
            let d = desired(&m, "n/s", general);
            assert_eq!(d.sets.iter().any(|s| s.maglev), expected, "{own:?} {general:?}");
        }
    }

    #[test]
    fn only_families_of_the_service_and_matching_ports_count() {
        let mut m = model(service(), &[("10.1.0.1", "rs")]);
        m.set_slice(
            "n/s-2",
            Some(Slice {
                service: "n/s".into(),
                v4: false,
                ports: vec![SlicePort { name: "http".into(), proto: TCP, port: 8080 }],
                endpoints: vec![endpoint("fd00::1", "rs")],
            }),
        );
        m.set_slice(
            "n/s-3",
            Some(Slice {
                service: "n/s".into(),
                v4: true,
                ports: vec![SlicePort { name: "other".into(), proto: TCP, port: 9090 }],
                endpoints: vec![endpoint("10.1.0.9", "rs")],
            }),
        );
        let d = desired(&m, "n/s", Selection::Random);
        assert_eq!(show(&d).len(), 3);
        assert_eq!(show(&d)[2], "10.96.0.10:80/in -> 10.1.0.1");
        assert_eq!(desired(&m, "n/none", Selection::Random), Desired::default());
    }
}
