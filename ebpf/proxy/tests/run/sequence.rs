//! Any sequence of changes, with the proxy stopped or killed and started again inside it: the maps end up saying what the objects
//! say, no conversation with a living backend breaks, and none goes on with one that is gone: connected sockets are closed,
//! datagrams of others move.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, UdpSocket};

use orlop_ebpf_common::{FrontendKey, SlotKey, TCP, UDP, addr_to};
use orlop_ebpf_loader::{Maps, RealMaps};
use orlop_proxy::desired::{Selection, desired};
use orlop_proxy::model::{Endpoint, Hint, Hints, Model, Port, Service, Slice, SlicePort};

use super::scale::Random;
use super::*;

const STEPS: usize = 80;
const SERVICES: usize = 4;
const SERVERS: usize = 4;
/// Services that come and go in one burst, so that a kill meets a half-written one.
const BURST: usize = 40;

/// A server of both protocols that begins with its number, and repeats what it hears.
fn numbered_echo(number: u8, at: SocketAddr) -> SocketAddr {
    let l = TcpListener::bind(at).unwrap();
    let at = l.local_addr().unwrap();
    let u = UdpSocket::bind(at).unwrap();
    std::thread::spawn(move || {
        for mut s in l.incoming().flatten() {
            std::thread::spawn(move || {
                let _ = s.write_all(&[number]);
                let mut buf = [0; 64];
                while let Ok(n @ 1..) = s.read(&mut buf) {
                    let _ = s.write_all(&buf[..n]);
                }
            });
        }
    });
    std::thread::spawn(move || {
        let mut buf = [0; 64];
        while let Ok((_, from)) = u.recv_from(&mut buf) {
            let _ = u.send_to(&[number], from);
        }
    });
    at
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Ready,
    Draining,
    Gone,
}

/// What the API server holds, as the test knows it.
struct Truth {
    servers: Vec<SocketAddr>,
    services: [bool; SERVICES],
    /// How often each has been deleted.
    deleted: [usize; SERVICES],
    affinity: [bool; SERVICES],
    /// Internal traffic policy Local.
    local: [bool; SERVICES],
    /// By service and server.
    states: [[State; SERVERS]; SERVICES],
    /// The zone that each is meant for, if any.
    hints: [[Option<usize>; SERVERS]; SERVICES],
    /// The node's.
    zone: usize,
}

const ZONES: [&str; 2] = ["za", "zb"];

impl Truth {
    fn vip(i: usize) -> IpAddr {
        IpAddr::from([127, 98, 0, i as u8 + 1])
    }

    fn put_service(&self, api: &FakeApi, i: usize) {
        let ports = json!([{"port": 80, "protocol": "TCP", "name": "t"}, {"port": 80, "protocol": "UDP", "name": "u"}]);
        let affinity = if self.affinity[i] { "ClientIP" } else { "None" };
        let policy = if self.local[i] { "Local" } else { "Cluster" };
        let extra = json!({"ports": ports, "sessionAffinity": affinity, "internalTrafficPolicy": policy});
        api.put("services", service(&format!("q{i}"), &Truth::vip(i).to_string(), extra));
    }

    /// The lower and the upper half of the servers have a slice each.
    fn put_slice(&self, api: &FakeApi, i: usize, half: usize) {
        let mut s = slice(&format!("q{i}"), 0);
        s["metadata"]["name"] = json!(format!("q{i}-{half}"));
        let port = self.servers[0].port();
        s["ports"] = json!([{"port": port, "protocol": "TCP", "name": "t"}, {"port": port, "protocol": "UDP", "name": "u"}]);
        let of_half = (half * SERVERS / 2)..((half + 1) * SERVERS / 2);
        let listed = of_half.filter(|n| self.states[i][*n] != State::Gone);
        let endpoints = listed.map(|n| {
            let ready = self.states[i][n] == State::Ready;
            let zones = self.hints[i][n].map(|z| json!([{"name": ZONES[z]}]));
            json!({"addresses": [self.servers[n].ip().to_string()], "nodeName": if here(n) { "me" } else { "other" },
                "conditions": {"ready": ready, "serving": true, "terminating": !ready}, "hints": {"forZones": zones}})
        });
        s["endpoints"] = json!(endpoints.collect::<Vec<_>>());
        api.put("endpointslices", s);
    }

    fn put_node(&self, api: &FakeApi) {
        let labels = json!({"topology.kubernetes.io/zone": ZONES[self.zone]});
        api.put("nodes", json!({"metadata": {"name": "me", "labels": labels}}));
    }

    /// Servers that new connections go to. Each is on this node or not, ready or draining, and meant for a zone or for all.
    fn usable(&self, i: usize) -> Vec<usize> {
        let placed = |n: &usize| !self.local[i] || here(*n);
        let of = |state| (0..SERVERS).filter(move |n| self.states[i][*n] == state);
        let hinted = || of(State::Ready).all(|n| self.hints[i][n].is_some());
        let ours = |n: &usize| self.hints[i][*n] == Some(self.zone);
        // Policy Local goes before hints.
        let by_zone = !self.local[i] && hinted() && of(State::Ready).any(|n| ours(&n));
        let ready: Vec<_> = of(State::Ready).filter(placed).filter(|n| !by_zone || ours(n)).collect();
        if ready.is_empty() { of(State::Draining).filter(placed).collect() } else { ready }
    }

    fn hint(&self, i: usize, n: usize) -> Hint {
        match self.hints[i][n] {
            None => Hint::None,
            Some(z) if z == self.zone => Hint::Ours,
            Some(_) => Hint::Others,
        }
    }

    /// What the maps must hold, by the proxy's own rules.
    fn expected(&self) -> BTreeMap<String, BTreeSet<IpAddr>> {
        let mut model = Model::default();
        let ports =
            |number| ["t", "u"].into_iter().zip([TCP, UDP]).map(move |(name, proto)| (name, proto, number));
        for i in (0..SERVICES).filter(|i| self.services[*i]) {
            let name = format!("n/q{i}");
            let service_ports =
                ports(80).map(|(n, proto, port)| Port { name: n.into(), proto, port, node_port: 0 });
            let service = Service {
                cluster_ips: vec![Truth::vip(i)],
                ports: service_ports.collect(),
                affinity_seconds: if self.affinity[i] { 10_800 } else { 0 },
                internal_local: self.local[i],
                ..Service::default()
            };
            model.set_service(&name, Some(service));
            let listed = (0..SERVERS).filter(|n| self.states[i][*n] != State::Gone);
            let endpoints = listed.map(|n| Endpoint {
                ip: self.servers[n].ip(),
                ready: self.states[i][n] == State::Ready,
                serving: true,
                terminating: self.states[i][n] == State::Draining,
                local: here(n),
                hints: Hints { node: Hint::None, zone: self.hint(i, n) },
            });
            let slice_ports = ports(self.servers[0].port()).map(|(n, proto, port)| SlicePort {
                name: n.into(),
                proto,
                port,
            });
            let slice = Slice {
                service: name.as_str().into(),
                v4: true,
                ports: slice_ports.collect(),
                endpoints: endpoints.collect(),
            };
            model.set_slice(&name, Some(slice));
        }
        let names: Vec<_> = model.services().map(|(n, _)| n.clone()).collect();
        let all = names.iter().map(|n| desired(&model, n, Selection::Maglev));
        all.flat_map(|d| {
            let front = |f: &orlop_proxy::desired::Frontend| {
                (show(&f.key), d.sets[f.set].backends.iter().map(|b| addr_to(&b.addr)).collect())
            };
            d.frontends.iter().map(front).collect::<Vec<_>>()
        })
        .collect()
    }
}

/// Which servers are on this node.
fn here(server: usize) -> bool {
    server.is_multiple_of(2)
}

fn show(k: &FrontendKey) -> String {
    format!("{}:{}/{}/{}", addr_to(&k.addr), k.port, k.proto, k.scope)
}

/// The maps, read as the programs read them; fails when anything in them leads nowhere, or nothing leads to it.
fn programmed(place: &Place) -> BTreeMap<String, BTreeSet<IpAddr>> {
    let dump = RealMaps::open(&place.config.datapath.pins).unwrap().dump().unwrap();
    let mut used = BTreeSet::new();
    let mut resolve = |set, count| -> BTreeSet<IpAddr> {
        let slots = (0..count).filter_map(|slot| dump.slots.get(&SlotKey { set, slot }));
        let found = slots.filter_map(|id| {
            used.insert(*id);
            dump.backends.get(id).map(|b| addr_to(&b.addr))
        });
        found.collect()
    };
    let all = dump.frontends.iter().map(|(k, v)| (show(k), resolve(v.set, v.count))).collect();
    // A stray backend shows as a frontend that nobody wants.
    let stray = dump.backends.keys().find(|id| !used.contains(id)).map(|id| format!("stray backend {id}"));
    let counts: usize = dump.frontends.values().map(|v| v.count as usize).sum();
    let slots = (counts < dump.slots.len()).then(|| format!("{counts} of {} slots", dump.slots.len()));
    let mut all: BTreeMap<_, _> = all;
    all.extend(stray.into_iter().chain(slots).map(|s| (s, BTreeSet::new())));
    all
}

/// A conversation with a server, by way of a Service.
struct Flow {
    service: usize,
    server: usize,
    by: Means,
    /// How often the Service had been deleted when this began.
    deleted: usize,
}

enum Means {
    Tcp(TcpStream),
    Udp(UdpSocket),
    /// A socket that is connected to nobody and that others use as well.
    Shared(UdpSocket),
}

impl Flow {
    fn open(service: usize, deleted: usize, shared: Option<&UdpSocket>, udp: bool) -> Flow {
        let vip = SocketAddr::new(Truth::vip(service), 80);
        let patience = Some(Duration::from_secs(5));
        let mut number = [0];
        let by = if let Some(s) = shared {
            let s = s.try_clone().unwrap();
            number[0] = ask_by(&s, vip).unwrap();
            Means::Shared(s)
        } else if udp {
            let s = UdpSocket::bind("0.0.0.0:0").unwrap();
            s.connect(vip).unwrap();
            s.set_read_timeout(patience).unwrap();
            s.send(b"?").unwrap();
            s.recv(&mut number).unwrap();
            Means::Udp(s)
        } else {
            let mut s = TcpStream::connect_timeout(&vip, Duration::from_secs(5)).unwrap();
            s.set_read_timeout(patience).unwrap();
            s.read_exact(&mut number).unwrap();
            Means::Tcp(s)
        };
        Flow { service, server: usize::from(number[0]), by, deleted }
    }

    fn kind(&self) -> &'static str {
        match self.by {
            Means::Tcp(_) => "TCP",
            Means::Udp(_) => "UDP",
            Means::Shared(_) => "UDP by one socket for all",
        }
    }

    /// Nothing has been said that could end it: a connection goes on with a server that drains, and without its Service;
    /// datagrams go where new ones go.
    fn may_live(&self, truth: &Truth) -> bool {
        if matches!(self.by, Means::Tcp(_)) {
            return truth.states[self.service][self.server] != State::Gone;
        }
        truth.services[self.service] && truth.usable(self.service).contains(&self.server)
    }

    /// Of one that has ended: whether the proxy, told of how things are now, must have closed its socket. A server that has come
    /// back meanwhile may never have been gone for the proxy, and nobody knows whose connection it was when the Service is another.
    fn must_be_closed(&self, truth: &Truth) -> bool {
        match self.by {
            Means::Tcp(_) => {
                !self.may_live(truth)
                    && truth.services[self.service]
                    && truth.deleted[self.service] == self.deleted
            }
            Means::Udp(_) => !self.may_live(truth),
            Means::Shared(_) => false,
        }
    }

    fn is_closed(&self) -> bool {
        match &self.by {
            Means::Tcp(s) => tcp_error(s),
            // What is sent to a server that lives is answered.
            Means::Udp(s) => s.send(b"?").is_err(),
            Means::Shared(_) => false,
        }
    }

    fn works(&mut self) -> io::Result<bool> {
        let mut buf = [0; 1];
        match &mut self.by {
            Means::Tcp(s) => {
                s.write_all(b"!")?;
                s.read_exact(&mut buf)?;
                Ok(buf == *b"!")
            }
            Means::Udp(s) => {
                s.send(b"?")?;
                s.recv(&mut buf)?;
                Ok(usize::from(buf[0]) == self.server)
            }
            Means::Shared(s) => {
                let server = ask_by(s, SocketAddr::new(Truth::vip(self.service), 80))?;
                Ok(usize::from(server) == self.server)
            }
        }
    }
}

/// Asks by a socket that is not connected; the answer must have the name that was asked.
fn ask_by(s: &UdpSocket, vip: SocketAddr) -> io::Result<u8> {
    let mut number = [0];
    s.send_to(b"?", vip)?;
    let (_, from) = s.recv_from(&mut number)?;
    if from == vip { Ok(number[0]) } else { Err(io::Error::other(format!("{from} answers for {vip}"))) }
}

struct Sequence {
    api: FakeApi,
    /// Ends before its place is taken back.
    proxy: Option<Killed>,
    place: Place,
    truth: Truth,
    flows: Vec<Flow>,
    /// Those that have lost their server since the proxy was last in step.
    ended: Vec<Flow>,
    /// For datagrams to all Services.
    shared: UdpSocket,
    /// Sockets that were closed, and datagrams that went to another server.
    closed: usize,
    moved: usize,
    said: Vec<String>,
}

impl Sequence {
    fn step(&mut self, random: &mut Random) {
        let i = random.below(SERVICES);
        match random.below(14) {
            0..5 => {
                let n = random.below(SERVERS);
                let state = [State::Ready, State::Ready, State::Draining, State::Gone][random.below(4)];
                self.truth.states[i][n] = state;
                self.truth.put_slice(&self.api, i, n / (SERVERS / 2));
                self.said.push(format!("server {n} of q{i} {state:?}"));
            }
            5 if self.truth.services[i] => {
                self.truth.services[i] = false;
                self.truth.deleted[i] += 1;
                self.api.delete("services", &format!("q{i}"));
                self.said.push(format!("q{i} deleted"));
            }
            5 | 6 => {
                self.truth.services[i] = true;
                self.truth.affinity[i] = random.below(2) == 0;
                self.truth.put_service(&self.api, i);
                self.said.push(format!("q{i} put"));
            }
            7 | 8 => {
                self.truth.local[i] = !self.truth.local[i];
                // Of a Service that is not there it counts when that comes.
                if self.truth.services[i] {
                    self.truth.put_service(&self.api, i);
                }
                self.said.push(format!("q{i} local: {}", self.truth.local[i]));
            }
            9 => {
                self.truth.hints[i] =
                    std::array::from_fn(|_| [None, Some(0), Some(1), Some(1)][random.below(4)]);
                self.truth.put_slice(&self.api, i, 0);
                self.truth.put_slice(&self.api, i, 1);
                self.said.push(format!("q{i} hints {:?}", self.truth.hints[i]));
            }
            10 => {
                self.truth.zone = 1 - self.truth.zone;
                self.truth.put_node(&self.api);
                self.said.push(format!("node in {}", ZONES[self.truth.zone]));
            }
            _ => {
                for b in 0..BURST {
                    let name = format!("b{b}");
                    self.api.put("services", service(&name, &format!("127.99.0.{}", b + 1), json!({})));
                    self.api.put("endpointslices", slice(&name, 80));
                }
                std::thread::sleep(Duration::from_micros(random.below(20_000) as u64));
                if let Some(proxy) = self.proxy.take() {
                    let stops = random.below(3) == 0;
                    self.said.push(if stops { "stopped" } else { "killed" }.into());
                    if stops { proxy.stop() } else { drop(proxy) }
                }
                for b in 0..BURST {
                    self.api.delete("services", &format!("b{b}"));
                    self.api.delete("endpointslices", &format!("b{b}-1"));
                }
            }
        }
        let ended = self.flows.extract_if(.., |f| !f.may_live(&self.truth));
        self.ended.extend(ended);
    }

    /// With a proxy: the maps say what the objects say, and all conversations go on.
    async fn settle(&mut self) {
        if self.proxy.is_none() {
            self.said.push("started".into());
            self.proxy = Some(Killed::start(&self.place).await);
        }
        let want = self.truth.expected();
        let begin = Instant::now();
        loop {
            let have = programmed(&self.place);
            if have == want {
                break;
            }
            assert!(begin.elapsed() < PATIENCE, "{have:?}\nnot\n{want:?}\nafter {:#?}", self.said);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.check_flows("settled");
        self.check_ended().await;
        for i in (0..SERVICES).filter(|i| self.truth.services[*i] && !self.truth.usable(*i).is_empty()) {
            let count = |shared| {
                let all = self.flows.iter().filter(|f| f.service == i);
                all.filter(|f| matches!(f.by, Means::Shared(_)) == shared).count()
            };
            let (own, shared) = (count(false), count(true));
            let deleted = self.truth.deleted[i];
            if own < 4 {
                self.flows.extend([Flow::open(i, deleted, None, false), Flow::open(i, deleted, None, true)]);
            }
            if shared == 0 {
                self.flows.push(Flow::open(i, deleted, Some(&self.shared), true));
            }
        }
        assert!(
            self.flows
                .iter()
                .all(|f| self.truth.usable(f.service).contains(&f.server) || f.may_live(&self.truth))
        );
    }

    /// Nobody waits for a server that is gone.
    async fn check_ended(&mut self) {
        for mut f in std::mem::take(&mut self.ended) {
            let (service, server, kind) = (f.service, f.server, f.kind());
            if f.must_be_closed(&self.truth) {
                let begin = Instant::now();
                while !f.is_closed() {
                    assert!(
                        begin.elapsed() < PATIENCE,
                        "{kind} of q{service} to server {server} is not closed after {:#?}",
                        self.said
                    );
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                self.closed += 1;
            } else if let Means::Shared(s) = &f.by
                && self.truth.services[service]
                && !self.truth.usable(service).is_empty()
            {
                let vip = SocketAddr::new(Truth::vip(service), 80);
                let now = ask_by(s, vip).unwrap_or_else(|e| {
                    panic!("{kind} of q{service} from {server}: {e}, after {:#?}", self.said)
                });
                f.server = usize::from(now);
                assert!(
                    f.may_live(&self.truth),
                    "{kind} of q{service} moved to {now} after {:#?}",
                    self.said
                );
                f.deleted = self.truth.deleted[service];
                self.moved += usize::from(f.server != server);
                self.flows.push(f);
            }
        }
    }

    fn check_flows(&mut self, when: &str) {
        for f in &mut self.flows {
            let works = f.works();
            let kind = f.kind();
            assert!(
                matches!(works, Ok(true)),
                "{when}: {kind} of q{} to server {}: {works:?} after {:#?}",
                f.service,
                f.server,
                self.said
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn maps_and_connections_survive_any_changes_and_kills() {
    let (_alone, api, place) = begin().await;
    let port = numbered_echo(0, SocketAddr::from(([127, 0, 0, 1], 0))).port();
    let mut servers = vec![SocketAddr::from(([127, 0, 0, 1], port))];
    for n in 1..SERVERS as u8 {
        servers.push(numbered_echo(n, SocketAddr::from(([127, 0, 0, n + 1], port))));
    }
    let truth = Truth {
        servers,
        services: [true; SERVICES],
        deleted: [0; SERVICES],
        affinity: [false; SERVICES],
        local: [false; SERVICES],
        states: [[State::Ready; SERVERS]; SERVICES],
        hints: [[None; SERVERS]; SERVICES],
        zone: 0,
    };
    truth.put_node(&api);
    for i in 0..SERVICES {
        truth.put_service(&api, i);
        truth.put_slice(&api, i, 0);
        truth.put_slice(&api, i, 1);
    }
    let shared = UdpSocket::bind("0.0.0.0:0").unwrap();
    shared.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut s = Sequence {
        api,
        place,
        truth,
        proxy: None,
        flows: Vec::new(),
        ended: Vec::new(),
        shared,
        closed: 0,
        moved: 0,
        said: Vec::new(),
    };
    s.settle().await;
    let mut random = Random::new();
    let mut kills = 0;
    for _ in 0..STEPS {
        let ran = s.proxy.is_some();
        s.step(&mut random);
        kills += usize::from(ran && s.proxy.is_none());
        match random.below(3) {
            0 => s.settle().await,
            // Nobody has told the kernel to end any of these.
            _ => s.check_flows("in between"),
        }
    }
    s.settle().await;
    println!(
        "{STEPS} steps, {kills} ends of the proxy, {} sockets closed, {} datagrams moved, {} conversations held at the end",
        s.closed,
        s.moved,
        s.flows.len()
    );
}
