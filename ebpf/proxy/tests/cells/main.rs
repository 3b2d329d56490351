//! Every kind of Service x traffic policy x state of endpoints x protocol x family x place of the client, for real: the
//! maps are made from a model by the proxy's own code, the packets and sockets are the kernel's, and what must come out
//! is said here by other means.

mod ask;
mod beside;
mod evicted;
mod fuzz;
mod nobody;
mod ports;
mod says;
mod short;
mod tunnel;
mod vlan;
mod ways;
mod wire;
#[path = "../world/mod.rs"]
mod world;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use ask::serve;
use orlop_base::testkit::unique_name;
use orlop_ebpf_common::{TCP, UDP, Uplink, addr_from, config_flags, counters, local_flags, uplink_flags};
use orlop_ebpf_loader::{Config, Datapath, Maps, Op, Range, Sizes, probe, purge};
use orlop_proxy::desired::{Selection, desired};
use orlop_proxy::model::{Endpoint, Hints, Model, Port, Service, Slice, SlicePort};
use orlop_proxy::tables::Tables;
use world::*;

/// Where a client is. `Covered`: its processes are in the cgroup of the socket programs.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Pod {
        covered: bool,
    },
    /// The pod that is a backend itself.
    Backend {
        covered: bool,
    },
    Host,
    Other,
    Outside,
}
use Place::*;

const PLACES: [Place; 7] = [
    Pod { covered: true },
    Pod { covered: false },
    Backend { covered: true },
    Backend { covered: false },
    Host,
    Other,
    Outside,
];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    ClusterIp,
    /// A ClusterIP at a port that is no Service's.
    UnusedPort,
    /// No port: a ping.
    Ping,
    /// An address of the Service range that no Service has, and that somebody outside of the node has.
    NobodysIp,
    NodePort,
    Loopback,
    ExternalIp,
    LoadBalancer,
}
use Kind::*;

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Both,
    RemoteOnly,
    LocalOnly,
    Nobody,
    /// The local one is terminating and serves, the remote one does not.
    Terminating,
    HostNetwork,
}

/// Whom the load balancer addresses admit.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ranges {
    All,
    OutsideOnly,
    ClusterOnly,
}

#[derive(Clone, Copy, Debug)]
struct Spec {
    number: u8,
    state: State,
    internal_local: bool,
    external_local: bool,
    ranges: Ranges,
}

fn specs() -> Vec<Spec> {
    use State::*;
    let mut all = Vec::new();
    let mut add = |state, internal_local, external_local, ranges| {
        all.push(Spec { number: all.len() as u8 + 1, state, internal_local, external_local, ranges });
    };
    for state in [Both, RemoteOnly, LocalOnly, Nobody, Terminating, HostNetwork] {
        add(state, false, false, Ranges::All);
        add(state, true, true, Ranges::All);
    }
    add(Both, false, true, Ranges::All);
    add(Both, true, false, Ranges::All);
    for ranges in [Ranges::OutsideOnly, Ranges::ClusterOnly] {
        add(Both, false, false, ranges);
    }
    all
}

impl Spec {
    fn ip(&self, kind: Kind, v4: bool) -> IpAddr {
        let n = self.number;
        let (a, b) = match kind {
            NobodysIp => return NOBODYS[usize::from(!v4)].parse().unwrap(),
            ClusterIp | UnusedPort | Ping => (96, "96"),
            ExternalIp => (201, "201"),
            _ => (202, "202"),
        };
        if v4 { IpAddr::from([10, 71, a, n]) } else { format!("fd71:{b}::{n:x}").parse().unwrap() }
    }

    fn node_port(&self, udp: bool) -> u16 {
        30_000 + u16::from(self.number) * 2 + u16::from(udp)
    }

    fn name(&self) -> String {
        format!("cells/s{}", self.number)
    }

    fn service(&self) -> Service {
        let both = |kind| [true, false].map(|v4| self.ip(kind, v4)).to_vec();
        let port = |name: &str, proto| Port {
            name: name.into(),
            proto,
            port: 80,
            node_port: self.node_port(proto == UDP),
        };
        let ranges: &[&str] = match self.ranges {
            Ranges::All => &[],
            Ranges::OutsideOnly => &["10.71.1.2/32", "fd71:1::2/128"],
            Ranges::ClusterOnly => &["10.71.128.0/24", "fd71:128::/64", "10.71.1.1/32", "fd71:1::1/128"],
        };
        Service {
            cluster_ips: both(ClusterIp),
            external_ips: both(ExternalIp),
            load_balancer_ips: both(LoadBalancer),
            source_ranges: ranges.iter().map(|r| r.parse().unwrap()).collect(),
            ports: vec![port("t", TCP), port("u", UDP)],
            internal_local: self.internal_local,
            external_local: self.external_local,
            selection: self.number.is_multiple_of(2).then_some(Selection::Random),
            ..Service::default()
        }
    }

    fn slice(&self, v4: bool) -> Slice {
        let endpoint = |both: Both, local, ready, serving, terminating| Endpoint {
            ip: both[usize::from(!v4)].parse().unwrap(),
            ready,
            serving,
            terminating,
            local,
            hints: Hints::default(),
        };
        let (here, there) =
            (endpoint(POD, true, true, true, false), endpoint(REMOTE_POD, false, true, true, false));
        let endpoints = match self.state {
            State::Both => vec![here, there],
            State::RemoteOnly => vec![there],
            State::LocalOnly => vec![here],
            State::Nobody => vec![],
            State::Terminating => {
                vec![endpoint(POD, true, false, true, true), endpoint(REMOTE_POD, false, false, false, true)]
            }
            State::HostNetwork => vec![endpoint(NODE, true, true, true, false)],
        };
        let port = |name: &str, proto| SlicePort { name: name.into(), proto, port: BACKEND_PORT };
        Slice {
            service: self.name().as_str().into(),
            v4,
            ports: vec![port("t", TCP), port("u", UDP)],
            endpoints,
        }
    }

    /// Backends for anyone, and those that policy Local leaves.
    fn backends(&self) -> (&'static [&'static str], &'static [&'static str]) {
        match self.state {
            State::Both => (&["pod", "remote"], &["pod"]),
            State::RemoteOnly => (&["remote"], &[]),
            State::LocalOnly | State::Terminating => (&["pod"], &["pod"]),
            State::Nobody => (&[], &[]),
            State::HostNetwork => (&["host"], &["host"]),
        }
    }
}

#[derive(Clone, Debug)]
struct Cell {
    place: Place,
    udp: bool,
    to: SocketAddr,
    /// Names of backends with the sources that they see, or `refused` or `dropped`.
    expected: Vec<String>,
    what: String,
}

impl Cell {
    /// How many different answers must come.
    fn want(&self) -> usize {
        if self.expected == ["dropped"] { 0 } else { self.expected.len() }
    }
}

/// Who the backend sees: the client itself, unless its answer would not come back through this node.
fn source(place: Place, backend: &str, v: usize) -> String {
    match (place, backend) {
        (Pod { .. }, _) => CLIENT_POD[v],
        // By its own address; by packets it could not tell the answer from one of its own.
        (Backend { covered: false }, "pod") => "node",
        (Backend { .. }, _) => POD[v],
        (Host, _) | (Other | Outside, "remote") => "node",
        (Other, _) => OTHER[v],
        (Outside, _) => OUTSIDE[v],
    }
    .to_owned()
}

fn cells() -> Vec<Cell> {
    let mut out = Vec::new();
    for spec in specs() {
        for kind in [ClusterIp, UnusedPort, Ping, NobodysIp, NodePort, Loopback, ExternalIp, LoadBalancer] {
            for place in PLACES {
                for (udp, v) in [(false, 0), (false, 1), (true, 0), (true, 1)] {
                    out.extend(cell(&spec, kind, place, udp, v));
                }
            }
        }
    }
    out
}

fn cell(spec: &Spec, kind: Kind, place: Place, udp: bool, v: usize) -> Option<Cell> {
    let external = matches!(place, Other | Outside);
    let to = match kind {
        Loopback if place != Host => return None,
        UnusedPort | Ping if spec.number > 3 => return None,
        Ping if udp => return None,
        // Who has the address himself asks nobody.
        NobodysIp if spec.number > 1 || place == Outside => return None,
        NobodysIp => SocketAddr::new(spec.ip(kind, v == 0), BACKEND_PORT),
        Ping => SocketAddr::new(spec.ip(kind, v == 0), 0),
        UnusedPort => SocketAddr::new(spec.ip(kind, v == 0), 81),
        NodePort => {
            let own = if place == Other { NODE_TO_OTHER } else { NODE };
            SocketAddr::new(own[v].parse().unwrap(), spec.node_port(udp))
        }
        Loopback => SocketAddr::new(["127.0.0.1", "::1"][v].parse().unwrap(), spec.node_port(udp)),
        _ => SocketAddr::new(spec.ip(kind, v == 0), 80),
    };
    let admitted = match spec.ranges {
        _ if kind != LoadBalancer => true,
        Ranges::All => true,
        Ranges::OutsideOnly => place == Outside,
        Ranges::ClusterOnly => !external,
    };
    let (all, local) = spec.backends();
    let bound = match kind {
        ClusterIp => spec.internal_local,
        _ => spec.external_local && external,
    };
    let chosen = if bound { local } else { all };
    // Where source ranges hold, pods are looked at by their packets.
    let seen_as = match place {
        Backend { .. } if kind == LoadBalancer && spec.ranges != Ranges::All => Backend { covered: false },
        p => p,
    };
    let expected = match (admitted, chosen.is_empty(), all.is_empty()) {
        _ if kind == UnusedPort || kind == Ping => vec!["refused".to_owned()],
        _ if kind == NobodysIp => vec!["dropped".to_owned()],
        (false, ..) | (_, true, false) => vec!["dropped".to_owned()],
        (_, true, true) => vec!["refused".to_owned()],
        _ => chosen.iter().map(|b| format!("{b} {}", source(seen_as, b, v))).collect(),
    };
    let proto = if udp { "UDP" } else { "TCP" };
    let proto = if kind == Ping { "ICMP" } else { proto };
    let what = format!("{spec:?} {kind:?} {proto} {to} from {place:?}");
    Some(Cell { place, udp, to, expected, what })
}

/// Sources of the node itself go by one name.
fn normal(answer: &str) -> Vec<String> {
    let own =
        |ip: &str| NODE.contains(&ip) || NODE_TO_OTHER.contains(&ip) || ip == "127.0.0.1" || ip == "::1";
    let mut all: Vec<String> = answer
        .split(", ")
        .map(|a| match a.split_once(' ') {
            Some((name, ip)) if own(ip) => format!("{name} node"),
            _ => a.to_owned(),
        })
        .collect();
    all.sort();
    all.dedup();
    all
}

/// A process in the cgroup that asks for us: `netns udp want address` in, the answer out.
struct Helper(Child);

const HELPER: &str = "ORLOP_CELLS_HELPER";

impl Helper {
    fn start(cgroup: &std::path::Path) -> Helper {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "asks_for_the_other", "--nocapture", "--test-threads=1"])
            .env(HELPER, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        std::fs::write(cgroup.join("cgroup.procs"), child.id().to_string()).expect("run as root");
        Helper(child)
    }

    /// All answers, by the index of the cell.
    fn ask(&mut self, w: &World, cells: Vec<(usize, Cell)>) -> BTreeMap<usize, String> {
        let mut input = self.0.stdin.take().unwrap();
        let mut text = String::new();
        for (i, c) in &cells {
            let want = c.want();
            text.push_str(&format!("{i} {} {} {want} {}\n", netns(w, c.place).0, u8::from(c.udp), c.to));
        }
        let writer = thread::spawn(move || drop(input.write_all(text.as_bytes())));
        let output = BufReader::new(self.0.stdout.take().unwrap());
        let answers = output.lines().map_while(Result::ok);
        let answers = answers.filter_map(|l| {
            // The test harness begins a line of its own before the first.
            let (i, answer) = l.split_once("@ ")?.1.split_once(' ')?;
            Some((i.parse().ok()?, answer.to_owned()))
        });
        // To the end, so that it can say what a test harness says.
        let answers = answers.collect();
        writer.join().unwrap();
        answers
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Not a test of its own: the helper's part when it is started as such.
#[test]
fn asks_for_the_other() {
    if std::env::var_os(HELPER).is_none() {
        return;
    }
    let mut by_netns: BTreeMap<String, Vec<(String, bool, usize, SocketAddr)>> = BTreeMap::new();
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let f: Vec<&str> = line.split(' ').collect();
        let question = (f[0].to_owned(), f[2] == "1", f[3].parse().unwrap(), f[4].parse().unwrap());
        by_netns.entry(f[1].to_owned()).or_default().push(question);
    }
    let mut threads = Vec::new();
    for (netns, questions) in by_netns {
        threads.extend(spread(netns, questions, |(i, udp, want, to)| {
            println!("@ {i} {}", ask::probe(udp, to, want));
        }));
    }
    threads.into_iter().for_each(|t| t.join().unwrap());
}

/// Works on a list by several threads in a namespace.
fn spread<T: Send + 'static>(
    netns: String,
    list: Vec<T>,
    work: impl Fn(T) + Clone + Send + 'static,
) -> Vec<thread::JoinHandle<()>> {
    let list = Arc::new(Mutex::new(list));
    let worker = || {
        let (list, work) = (list.clone(), work.clone());
        run_in(netns.clone(), move || {
            loop {
                let Some(next) = list.lock().unwrap().pop() else { return };
                work(next);
            }
        })
    };
    (0..8).map(|_| worker()).collect()
}

fn netns(w: &World, place: Place) -> &Net {
    match place {
        Pod { .. } => &w.client_pod,
        Backend { .. } => &w.pod,
        Host => &w.node,
        Other => &w.other,
        Outside => &w.outside,
    }
}

fn covered(place: Place) -> bool {
    matches!(place, Pod { covered: true } | Backend { covered: true } | Host)
}

/// A cgroup and pins of the test's own.
struct Home {
    config: Config,
    cgroup: PathBuf,
    dir: PathBuf,
}

impl Home {
    fn new(force_clsact: bool) -> Home {
        let name = unique_name("pxcells");
        let cgroup = probe::cgroup2().expect("cgroup v2 is not mounted").join(&name);
        std::fs::create_dir_all(&cgroup).expect("run as root");
        let dir = std::env::temp_dir().join(&name);
        let sizes = Sizes {
            frontends: 4096,
            slots: 4096,
            backends: 1024,
            connections: 65_536,
            sockets: 65_536,
            ..Sizes::default()
        };
        let pins = dir.join("bpf");
        let config = Config { pins, cgroup: Some(cgroup.clone()), force_clsact, sizes, ..Config::default() };
        Home { config, cgroup, dir }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = purge(&self.config);
        let _ = std::fs::remove_dir_all(&self.dir);
        let _ = std::fs::remove_dir(&self.cgroup);
    }
}

fn program(w: &World, config: &Config) -> Datapath {
    program_with(w, config, |model| {
        for spec in specs() {
            model.set_service(&spec.name(), Some(spec.service()));
            for v4 in [true, false] {
                model.set_slice(&format!("{}-{v4}", spec.name()), Some(spec.slice(v4)));
            }
        }
    })
}

/// The programs on the node's interfaces, and maps for what `fill` puts into the model.
fn program_with(w: &World, config: &Config, fill: impl FnOnce(&mut Model) + Send + 'static) -> Datapath {
    let config = config.clone();
    w.node
        .run(move || {
            let mut dp = Datapath::open(&config).unwrap();
            dp.maps.set_flags(LOOPBACK).unwrap();
            let own = |both: Both| both.map(|a| addr_from(a.parse().unwrap()));
            for (name, both, flags) in [
                ("up0", NODE, 0),
                ("up1", NODE_TO_OTHER, 0),
                ("pod0", NODE, uplink_flags::POD | uplink_flags::PEER),
                ("pod1", NODE, uplink_flags::POD | uplink_flags::PEER),
            ] {
                let [addr4, addr6] = own(both);
                let index = nix::net::if_::if_nametoindex(name).unwrap();
                dp.attach_uplink(index, name, Uplink { addr4, addr6, l3_offset: 14, flags }).unwrap();
                for addr in own(both) {
                    dp.maps.apply(&Op::PutLocal(addr, local_flags::NODE_PORT)).unwrap();
                }
            }
            let (mut tables, mut model) = (Tables::default(), Model::default());
            tables.sync_service_range(&mut dp.maps, &service_ranges()).unwrap();
            model.set_node_ips(NODE.map(|a| a.parse().unwrap()).to_vec());
            fill(&mut model);
            for name in model.take_dirty() {
                let wanted = desired(&model, &name, Selection::Maglev);
                tables.sync(&mut dp.maps, &name, &wanted).unwrap();
            }
            dp
        })
        .join()
        .unwrap()
}

fn service_ranges() -> Vec<Range> {
    SERVICE_RANGES.map(|n| orlop_proxy::desired::range(&n.parse().unwrap())).to_vec()
}

const LOOPBACK: u32 = config_flags::LOOPBACK4 | config_flags::LOOPBACK6;

fn check(force_clsact: bool, host_routing: bool) {
    let w = World::new();
    let home = Home::new(force_clsact);
    serve(&w.pod, "pod", POD);
    serve(&w.other, "remote", REMOTE_POD);
    serve(&w.node, "host", NODE);
    serve(&w.outside, "nobody", NOBODYS);
    let mut datapath = program(&w, &home.config);
    if host_routing {
        datapath.maps.set_flags(LOOPBACK | config_flags::HOST_ROUTING).unwrap();
    }
    let all = cells();
    let (inside, others): (Vec<_>, Vec<_>) =
        all.iter().cloned().enumerate().partition(|(_, c)| covered(c.place));

    let answers = Arc::new(Mutex::new(BTreeMap::new()));
    let mut threads = Vec::new();
    for place in PLACES.into_iter().filter(|p| !covered(*p)) {
        let list: Vec<(usize, Cell)> = others.iter().filter(|(_, c)| c.place == place).cloned().collect();
        let answers = answers.clone();
        threads.extend(spread(netns(&w, place).0.clone(), list, move |(i, c)| {
            let answer = ask::probe(c.udp, c.to, c.want());
            answers.lock().unwrap().insert(i, answer);
        }));
    }
    let mut helper = Helper::start(&home.cgroup);
    let covered_answers = helper.ask(&w, inside);
    threads.into_iter().for_each(|t| t.join().unwrap());
    drop(helper);
    let mut answers = std::mem::take(&mut *answers.lock().unwrap());
    answers.extend(covered_answers);

    let mut wrong = Vec::new();
    for (i, c) in all.iter().enumerate() {
        let mut expected = c.expected.clone();
        expected.sort();
        let got = answers.get(&i).map_or(vec!["no answer".into()], |a| normal(a));
        if got != expected {
            wrong.push(format!("{}\n    expected {expected:?}, got {got:?}", c.what));
        }
    }
    println!("{} cells", all.len());
    assert_eq!(datapath.maps.counter(counters::SHORT) > 0, host_routing);
    assert!(
        wrong.is_empty(),
        "{} of {} cells:\n{}",
        wrong.len(),
        all.len(),
        wrong[..wrong.len().min(60)].join("\n")
    );
}

#[test]
fn every_cell_by_the_hooks_of_this_kernel() {
    check(false, false);
}

#[test]
fn every_cell_with_host_routing() {
    check(false, true);
}

/// As on kernels before 6.6.
#[test]
fn every_cell_by_clsact() {
    check(true, false);
}

#[test]
fn every_cell_by_clsact_with_host_routing() {
    check(true, true);
}
