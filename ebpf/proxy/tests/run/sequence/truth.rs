//! What the API server holds, as the test knows it, and what the maps must say then.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use orlop_ebpf_common::{FrontendKey, TCP, UDP, addr_to, frontend_flags};
use orlop_ebpf_loader::{Maps, RealMaps};
use orlop_proxy::Config;
use orlop_proxy::desired::{Selection, desired};
use orlop_proxy::model::{Endpoint, Hint, Hints, Model, Port, Service, Slice, SlicePort};
use serde_json::json;

use crate::api::FakeApi;
use crate::world::*;
use crate::{service, slice};

pub const SERVICES: usize = 4;
pub const SERVERS: usize = 4;
/// In a pod on this node, in one on another, in the pod on this node that clients are in too, on the other node itself.
pub const SERVERS_AT: [Both; SERVERS] = [POD, REMOTE_POD, CLIENT_POD, OTHER];
/// The lower and the upper half of the servers have a slice each, of each family.
pub const HALF: usize = SERVERS / 2;
pub const ZONES: [&str; 2] = ["za", "zb"];
const FAMILIES: [(bool, &str); 2] = [(true, "IPv4"), (false, "IPv6")];
const PORT: u16 = 80;
const AFFINITY_SECONDS: u32 = 10_800;

/// A Service whose object says how much has been said before it, and its endpoints, one for each zone. It is last in lists.
const MARK: &str = "z-mark";
const MARK_IP: &str = "10.71.96.250";
const MARKS: [&str; 2] = ["10.71.160.1", "10.71.160.2"];
const MARK_PORT: u16 = 1000;

/// Which servers are on this node.
pub fn here(server: usize) -> bool {
    server.is_multiple_of(2)
}

pub fn server_at(server: usize, v4: bool) -> SocketAddr {
    SocketAddr::new(SERVERS_AT[server][usize::from(!v4)].parse().unwrap(), BACKEND_PORT)
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Name {
    ClusterIp,
    NodePort,
    ExternalIp,
    LoadBalancer,
}

/// A Service's own address of this kind.
pub fn address(name: Name, service: usize, v4: bool) -> IpAddr {
    let n = service as u8 + 1;
    let (a, b) = match name {
        Name::ClusterIp => (96, "96"),
        Name::ExternalIp => (201, "201"),
        Name::NodePort | Name::LoadBalancer => (202, "202"),
    };
    if v4 { IpAddr::from([10, 71, a, n]) } else { format!("fd71:{b}::{n:x}").parse().unwrap() }
}

pub fn port(name: Name, service: usize, udp: bool) -> u16 {
    if name == Name::NodePort { 30_000 + service as u16 * 2 + u16::from(udp) } else { PORT }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum State {
    Ready,
    Draining,
    Gone,
}

#[derive(Clone)]
pub struct Settings {
    pub present: bool,
    /// It has more than its ClusterIPs: node ports, external and load balancer IPs.
    pub exposed: bool,
    pub affinity: bool,
    pub internal_local: bool,
    pub external_local: bool,
}

/// By server.
#[derive(Clone)]
pub struct Endpoints {
    pub states: [State; SERVERS],
    /// The zone that each is meant for, if any.
    pub hints: [Option<usize>; SERVERS],
}

/// Which traffic policy binds a conversation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    Internal,
    External,
    /// None: the short cut of those within the cluster.
    Free,
}

/// What a watch has said since the proxy was last in step, and before that; the last is how things are. Watches are read beside
/// each other, so that the proxy may have seen any of one with any of another.
pub struct Said<T>(Vec<T>);

impl<T: Clone> Said<T> {
    fn new(first: T) -> Said<T> {
        Said(vec![first])
    }

    pub fn now(&self) -> &T {
        self.0.last().unwrap()
    }

    pub fn say(&mut self, change: impl FnOnce(&mut T)) {
        let mut next = self.now().clone();
        change(&mut next);
        self.0.push(next);
    }

    pub fn is_known(&self) -> bool {
        self.0.len() == 1
    }

    fn becomes_known(&mut self) {
        self.0.drain(..self.0.len() - 1);
    }
}

pub struct Truth {
    pub settings: [Said<Settings>; SERVICES],
    /// How often each Service has been deleted.
    pub deleted: [usize; SERVICES],
    pub endpoints: [Said<Endpoints>; SERVICES],
    /// The node's.
    pub zone: Said<usize>,
    mark: u16,
}

impl Truth {
    pub fn new() -> Truth {
        let settings = Settings {
            present: true,
            exposed: true,
            affinity: false,
            internal_local: false,
            external_local: false,
        };
        let endpoints = Endpoints { states: [State::Ready; SERVERS], hints: [None; SERVERS] };
        Truth {
            settings: std::array::from_fn(|_| Said::new(settings.clone())),
            deleted: [0; SERVICES],
            endpoints: std::array::from_fn(|_| Said::new(endpoints.clone())),
            zone: Said::new(0),
            mark: 0,
        }
    }

    pub fn put_all(&self, api: &FakeApi) {
        self.put_node(api);
        for i in 0..SERVICES {
            self.put_service(api, i);
            (0..SERVERS / HALF).for_each(|half| self.put_slices(api, i, half));
        }
    }

    pub fn put_service(&self, api: &FakeApi, i: usize) {
        let s = self.settings[i].now();
        let ips = |name| FAMILIES.map(|(v4, _)| address(name, i, v4).to_string());
        let policy = |local| if local { "Local" } else { "Cluster" };
        let number = |udp| s.exposed.then(|| port(Name::NodePort, i, udp));
        let spec = json!({
            "type": if s.exposed { "LoadBalancer" } else { "ClusterIP" },
            "clusterIPs": ips(Name::ClusterIp), "externalIPs": s.exposed.then(|| ips(Name::ExternalIp)),
            "ports": [
                {"port": PORT, "protocol": "TCP", "name": "t", "nodePort": number(false)},
                {"port": PORT, "protocol": "UDP", "name": "u", "nodePort": number(true)},
            ],
            "sessionAffinity": if s.affinity { "ClientIP" } else { "None" },
            "internalTrafficPolicy": policy(s.internal_local), "externalTrafficPolicy": policy(s.external_local),
        });
        let mut object = service(&format!("q{i}"), &ips(Name::ClusterIp)[0], spec);
        let ingress = s.exposed.then(|| ips(Name::LoadBalancer).map(|ip| json!({"ip": ip})));
        object["status"] = json!({"loadBalancer": {"ingress": ingress}});
        let selection = if selection(i) == Selection::Random { "random" } else { "maglev" };
        object["metadata"]["annotations"] = json!({"orlop.dev/selection": selection});
        api.put("services", object);
    }

    pub fn put_slices(&self, api: &FakeApi, i: usize, half: usize) {
        let e = self.endpoints[i].now();
        for (v4, family) in FAMILIES {
            let mut s = slice(&format!("q{i}"), 0);
            let name = format!("q{i}-{half}-{}", family.to_lowercase());
            s["metadata"]["name"] = json!(name);
            s["addressType"] = json!(family);
            s["ports"] = json!([
                {"port": BACKEND_PORT, "protocol": "TCP", "name": "t"},
                {"port": BACKEND_PORT, "protocol": "UDP", "name": "u"},
            ]);
            let listed = (half * HALF..(half + 1) * HALF).filter(|n| e.states[*n] != State::Gone);
            let endpoints: Vec<_> = listed
                .map(|n| {
                    let ready = e.states[n] == State::Ready;
                    let zones = e.hints[n].map(|z| json!([{"name": ZONES[z]}]));
                    json!({"addresses": [server_at(n, v4).ip()], "nodeName": if here(n) { "me" } else { "other" },
                        "conditions": {"ready": ready, "serving": true, "terminating": !ready}, "hints": {"forZones": zones}})
                })
                .collect();
            if endpoints.is_empty() {
                api.delete("endpointslices", &name);
            } else {
                s["endpoints"] = json!(endpoints);
                api.put("endpointslices", s);
            }
        }
    }

    pub fn put_node(&self, api: &FakeApi) {
        let labels = json!({"topology.kubernetes.io/zone": ZONES[*self.zone.now()]});
        api.put("nodes", json!({"metadata": {"name": "me", "labels": labels}}));
    }

    /// Says on every watch something that can be seen in the maps: by then all before it has been, too. Of the node's zone two changes
    /// would be too many for that.
    pub fn put_mark(&mut self, api: &FakeApi) {
        self.mark += 1;
        let affinity = json!({"clientIP": {"timeoutSeconds": self.mark}});
        let affinity = json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": affinity});
        api.put("services", service(MARK, MARK_IP, affinity));
        let mut s = slice(MARK, MARK_PORT + self.mark);
        let endpoints = MARKS.iter().zip(ZONES).map(
            |(ip, zone)| json!({"addresses": [ip], "conditions": {}, "hints": {"forZones": [{"name": zone}]}}),
        );
        s["endpoints"] = json!(endpoints.collect::<Vec<_>>());
        api.put("endpointslices", s);
    }

    /// The proxy has seen all that was said.
    pub fn is_known(&mut self) {
        self.settings.iter_mut().for_each(Said::becomes_known);
        self.endpoints.iter_mut().for_each(Said::becomes_known);
        self.zone.becomes_known();
    }

    /// Servers that new conversations go to.
    pub fn usable(&self, i: usize, bound: Bound) -> Vec<usize> {
        let zone = *self.zone.now();
        usable(self.settings[i].now(), bound, self.endpoints[i].now(), [zone; SERVERS / HALF])
    }

    /// Whether new conversations might go to a server whatever the proxy has seen so far.
    pub fn always_usable(&self, i: usize, bound: Bound, server: usize) -> bool {
        // With another zone slices are read again, one after the other.
        let zones = self.zone.0.iter().flat_map(|a| self.zone.0.iter().map(|b| [*a, *b]));
        let mut all = self.settings[i].0.iter().flat_map(|s| self.endpoints[i].0.iter().map(move |e| (s, e)));
        all.all(|(s, e)| zones.clone().all(|z| usable(s, bound, e, z).contains(&server)))
    }

    pub fn was_gone(&self, i: usize, server: usize) -> bool {
        self.endpoints[i].0.iter().any(|e| e.states[server] == State::Gone)
    }

    fn model(&self) -> Model {
        let mut model = Model::default();
        let both = || ["t", "u"].into_iter().zip([TCP, UDP]);
        for (i, (settings, endpoints)) in self.settings.iter().zip(&self.endpoints).enumerate() {
            let (s, e) = (settings.now(), endpoints.now());
            if !s.present {
                continue;
            }
            let name = format!("n/q{i}");
            let ips = |name| FAMILIES.map(|(v4, _)| address(name, i, v4)).to_vec();
            let exposed = |name| if s.exposed { ips(name) } else { Vec::new() };
            let ports = both().map(|(name, proto)| Port {
                name: name.into(),
                proto,
                port: PORT,
                node_port: if s.exposed { port(Name::NodePort, i, proto == UDP) } else { 0 },
            });
            let service = Service {
                cluster_ips: ips(Name::ClusterIp),
                external_ips: exposed(Name::ExternalIp),
                load_balancer_ips: exposed(Name::LoadBalancer),
                ports: ports.collect(),
                affinity_seconds: if s.affinity { AFFINITY_SECONDS } else { 0 },
                internal_local: s.internal_local,
                external_local: s.external_local,
                selection: Some(selection(i)),
                ..Service::default()
            };
            model.set_service(&name, Some(service));
            for (v4, _) in FAMILIES {
                let listed = (0..SERVERS).filter(|n| e.states[*n] != State::Gone);
                let endpoints = listed.map(|n| Endpoint {
                    ip: server_at(n, v4).ip(),
                    ready: e.states[n] == State::Ready,
                    serving: true,
                    terminating: e.states[n] == State::Draining,
                    local: here(n),
                    hints: self.hints(e.hints[n]),
                });
                let ports =
                    both().map(|(name, proto)| SlicePort { name: name.into(), proto, port: BACKEND_PORT });
                let service = name.as_str().into();
                let slice = Slice { service, v4, ports: ports.collect(), endpoints: endpoints.collect() };
                model.set_slice(&format!("{name}-{v4}"), Some(slice));
            }
        }
        let name = format!("n/{MARK}");
        let service = Service {
            cluster_ips: vec![MARK_IP.parse().unwrap()],
            ports: vec![Port { name: "".into(), proto: TCP, port: PORT, node_port: 0 }],
            affinity_seconds: self.mark.into(),
            ..Service::default()
        };
        model.set_service(&name, Some(service));
        let endpoints = MARKS.iter().enumerate().map(|(zone, ip)| Endpoint {
            ip: ip.parse().unwrap(),
            ready: true,
            serving: true,
            terminating: false,
            local: false,
            hints: self.hints(Some(zone)),
        });
        let slice = Slice {
            service: name.as_str().into(),
            v4: true,
            ports: vec![SlicePort { name: "".into(), proto: TCP, port: MARK_PORT + self.mark }],
            endpoints: endpoints.collect(),
        };
        model.set_slice(&name, Some(slice));
        model
    }

    fn hints(&self, zone: Option<usize>) -> Hints {
        let zone = match zone {
            None => Hint::None,
            Some(z) if z == *self.zone.now() => Hint::Ours,
            Some(_) => Hint::Others,
        };
        Hints { node: Hint::None, zone }
    }

    /// What the maps must hold, by the proxy's own rules.
    pub fn expected(&self) -> Leads {
        let model = self.model();
        let names: Vec<_> = model.services().map(|(n, _)| n.clone()).collect();
        let all = names.iter().map(|n| desired(&model, n, Selection::Maglev));
        all.flat_map(|d| {
            let lead = |f: &orlop_proxy::desired::Frontend| {
                let set = &d.sets[f.set];
                let lead = Lead {
                    servers: set.backends.iter().map(|b| SocketAddr::new(addr_to(&b.addr), b.port)).collect(),
                    affinity_seconds: d.affinity_seconds,
                    hidden: f.hidden,
                    maglev: set.maglev,
                };
                (show(&f.key), lead)
            };
            d.frontends.iter().map(lead).collect::<Vec<_>>()
        })
        .collect()
    }
}

/// How backends of a Service are chosen for packets.
fn selection(service: usize) -> Selection {
    if service.is_multiple_of(2) { Selection::Maglev } else { Selection::Random }
}

/// `zones`: the node's, as the slices of each half have been read with it in mind.
fn usable(s: &Settings, bound: Bound, e: &Endpoints, zones: [usize; SERVERS / HALF]) -> Vec<usize> {
    if !s.present || (bound != Bound::Internal && !s.exposed) {
        return Vec::new();
    }
    let only_here = match bound {
        Bound::Internal => s.internal_local,
        Bound::External => s.external_local,
        Bound::Free => false,
    };
    let placed = |n: &usize| !only_here || here(*n);
    let of = |state| (0..SERVERS).filter(move |n| e.states[*n] == state);
    let ours = |n: &usize| e.hints[*n] == Some(zones[*n / HALF]);
    // Policy Local goes before hints.
    let by_zone =
        !only_here && of(State::Ready).all(|n| e.hints[n].is_some()) && of(State::Ready).any(|n| ours(&n));
    let ready: Vec<_> = of(State::Ready).filter(placed).filter(|n| !by_zone || ours(n)).collect();
    if ready.is_empty() { of(State::Draining).filter(placed).collect() } else { ready }
}

/// What an address leads to.
#[derive(Debug, Default, PartialEq)]
pub struct Lead {
    servers: BTreeSet<SocketAddr>,
    affinity_seconds: u32,
    hidden: bool,
    maglev: bool,
}

pub type Leads = BTreeMap<String, Lead>;

fn show(k: &FrontendKey) -> String {
    format!("{}:{}/{}/{}", addr_to(&k.addr), k.port, k.proto, k.scope)
}

/// The maps, read as the programs read them. What leads nowhere, or is led to by nothing, shows as an address that nobody wants.
pub fn programmed(config: &Config) -> Leads {
    let dump = RealMaps::open(&config.datapath.pins).unwrap().dump().unwrap();
    let mut counts = BTreeMap::new();
    let mut with_maglev = BTreeSet::new();
    let mut all = Leads::new();
    for (k, v) in &dump.frontends {
        let slots = dump.slots.iter().filter(|(s, _)| s.set == v.set && s.slot < v.count);
        let backends = slots.filter_map(|(_, id)| dump.backends.get(id));
        let maglev = v.flags & frontend_flags::MAGLEV != 0;
        if maglev {
            with_maglev.insert(v.set);
        }
        counts.insert(v.set, v.count);
        let affinity = v.flags & frontend_flags::AFFINITY != 0;
        let lead = Lead {
            servers: backends.map(|b| SocketAddr::new(addr_to(&b.addr), b.port)).collect(),
            affinity_seconds: if affinity { v.affinity_seconds } else { 0 },
            hidden: v.flags & frontend_flags::DROP_WHEN_EMPTY != 0,
            maglev,
        };
        all.insert(show(k), lead);
    }
    let slots: BTreeSet<(u32, u32)> = dump.slots.iter().map(|(k, id)| (k.set, *id)).collect();
    let members: BTreeSet<(u32, u32)> = dump.members.keys().map(|k| (k.set, k.slot)).collect();
    let used: BTreeSet<u32> = slots.iter().map(|(_, id)| *id).collect();
    let mut strays = Vec::new();
    let beyond = dump.slots.keys().filter(|k| counts.get(&k.set).is_none_or(|count| k.slot >= *count));
    strays.extend(beyond.map(|k| format!("slot {} of set {}", k.slot, k.set)));
    strays.extend(slots.symmetric_difference(&members).map(|(set, id)| format!("member {id} of set {set}")));
    let maglev = dump.maglev.iter().copied().collect();
    strays.extend(with_maglev.symmetric_difference(&maglev).map(|set| format!("table of set {set}")));
    strays.extend(dump.backends.keys().filter(|id| !used.contains(id)).map(|id| format!("backend {id}")));
    all.extend(strays.into_iter().map(|s| (format!("stray {s}"), Lead::default())));
    all
}
