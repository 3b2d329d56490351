//! Any sequence of changes, with the proxy stopped or killed and started again inside it: the maps end up saying what the objects
//! say, no conversation with a living backend breaks, and none goes on with one that is gone. Connected sockets of the node itself are
//! closed then, datagrams of others move. Conversations are of sockets, and of packets that come from outside, from another node and from
//! a pod, by all kinds of addresses; who is asked and whom he sees stays the same through all of each.

mod flow;
mod truth;

use std::net::UdpSocket;

use flow::{Client, Flow, Means, Way, datagrams, serve};
use truth::{HALF, SERVERS, SERVICES, Settings, State, Truth, ZONES, programmed, server_at};

use super::scale::Random;
use super::topology::Node;
use super::*;
use crate::world::{Net, World};

const STEPS: usize = 80;
/// Services that come and go in one burst, so that a kill meets a half-written one.
const BURST: usize = 40;
/// Of flows: below those for translated sources.
const FIRST_PORT: u16 = 33_000;

struct Sequence {
    flows: Vec<Flow>,
    /// Those that have lost their server since the proxy was last in step; of those that move, those that have found no other yet.
    ended: Vec<Flow>,
    /// For datagrams to all Services, by family.
    shared: [UdpSocket; 2],
    last_port: u16,
    node: Node,
    /// Of clients that are not on the node.
    pod: Net,
    outside: Net,
    other: Net,
    api: FakeApi,
    truth: Truth,
    /// Sockets that were closed, and datagrams that went to another server.
    closed: usize,
    moved: usize,
    said: Vec<String>,
}

impl Sequence {
    fn step(&mut self, random: &mut Random) {
        let i = random.below(SERVICES);
        match random.below(15) {
            0..5 => {
                let n = random.below(SERVERS);
                let state = [State::Ready, State::Ready, State::Draining, State::Gone][random.below(4)];
                self.truth.endpoints[i].say(|e| e.states[n] = state);
                self.truth.put_slices(&self.api, i, n / HALF);
                self.said.push(format!("server {n} of q{i} {state:?}"));
            }
            5 if self.truth.settings[i].now().present => {
                self.truth.settings[i].say(|s| s.present = false);
                self.truth.deleted[i] += 1;
                self.api.delete("services", &format!("q{i}"));
                self.said.push(format!("q{i} deleted"));
            }
            5 | 6 => {
                let (affinity, exposed) = (random.below(2) == 0, random.below(4) != 0);
                let present = true;
                self.truth.settings[i].say(|s| *s = Settings { present, affinity, exposed, ..*s });
                self.truth.put_service(&self.api, i);
                self.said.push(format!("q{i} put, affinity: {affinity}, exposed: {exposed}"));
            }
            7..10 => {
                let internal = random.below(2) == 0;
                self.truth.settings[i].say(|s| {
                    let policy = if internal { &mut s.internal_local } else { &mut s.external_local };
                    *policy = !*policy;
                });
                let s = self.truth.settings[i].now();
                self.said.push(format!("q{i} local: {} {}", s.internal_local, s.external_local));
                // Of a Service that is not there it counts when that comes.
                if s.present {
                    self.truth.put_service(&self.api, i);
                }
            }
            10 => {
                for half in 0..SERVERS / HALF {
                    for n in half * HALF..(half + 1) * HALF {
                        let hint = [None, Some(0), Some(1), Some(1)][random.below(4)];
                        self.truth.endpoints[i].say(|e| e.hints[n] = hint);
                    }
                    self.truth.put_slices(&self.api, i, half);
                }
                self.said.push(format!("q{i} hints {:?}", self.truth.endpoints[i].now().hints));
            }
            11 => {
                // The mark tells one change of it.
                if self.truth.zone.is_known() {
                    self.truth.zone.say(|z| *z = 1 - *z);
                    self.truth.put_node(&self.api);
                    self.said.push(format!("node in {}", ZONES[*self.truth.zone.now()]));
                }
            }
            _ => {
                for b in 0..BURST {
                    let name = format!("b{b}");
                    self.api.put("services", service(&name, &format!("10.71.99.{}", b + 1), json!({})));
                    self.api.put("endpointslices", slice(&name, 80));
                }
                std::thread::sleep(Duration::from_micros(random.below(20_000) as u64));
                let stops = random.below(3) == 0;
                if let Some(proxy) = self.node.proxy.take() {
                    self.said.push(if stops { "stopped" } else { "killed" }.into());
                    if stops { proxy.stop() } else { drop(proxy) }
                }
                self.node.config.host_routing = random.below(2) == 0;
                for b in 0..BURST {
                    self.api.delete("services", &format!("b{b}"));
                    self.api.delete("endpointslices", &format!("b{b}-1"));
                }
            }
        }
        let ended = self.flows.extract_if(.., |f| !f.lives(&self.truth));
        self.ended.extend(ended);
    }

    /// With a proxy: the maps say what the objects say, and all conversations go on.
    async fn settle(&mut self) {
        self.truth.put_mark(&self.api);
        if self.node.proxy.is_none() {
            self.said.push(format!("started, host routing: {}", self.node.config.host_routing));
            self.node.spawn();
            let begin = Instant::now();
            while !self.node.is_in_step() {
                assert!(begin.elapsed() < PATIENCE, "the proxy is not in step after {:#?}", self.said);
                self.check_flows("starting");
            }
        }
        let want = self.truth.expected();
        let begin = Instant::now();
        loop {
            let have = programmed(&self.node.config);
            if have == want {
                break;
            }
            assert!(begin.elapsed() < PATIENCE, "{have:#?}\nnot\n{want:#?}\nafter {:#?}", self.said);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.truth.is_known();
        self.check_flows("settled");
        self.check_ended().await;
        self.open_flows();
    }

    fn failed(&self, f: &Flow, why: impl std::fmt::Display) -> ! {
        let Flow { service, way, heard, .. } = f;
        panic!("{way:?} of q{service}, before {heard:?}: {why}, after {:#?}", self.said);
    }

    fn check_flows(&mut self, when: &str) {
        for mut f in std::mem::take(&mut self.flows) {
            match f.ask() {
                Ok(heard) if heard == f.heard => self.flows.push(f),
                Ok(heard) => self.failed(&f, format_args!("{when}: {heard:?}")),
                Err(e) => self.failed(&f, format_args!("{when}: {e}")),
            }
        }
    }

    /// Nobody waits for a server that is gone.
    async fn check_ended(&mut self) {
        for mut f in std::mem::take(&mut self.ended) {
            if f.must_be_closed(&self.truth) {
                let begin = Instant::now();
                while !f.is_closed() {
                    if begin.elapsed() > PATIENCE {
                        self.failed(&f, "not closed");
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                self.closed += 1;
            } else if f.moves() {
                if self.truth.usable(f.service, f.way.bound()).is_empty() {
                    self.ended.push(f);
                    continue;
                }
                let before = f.heard.server;
                if let Err(e) = f.begin(&self.truth) {
                    self.failed(&f, e);
                }
                self.moved += usize::from(f.heard.server != before);
                self.flows.push(f);
            }
        }
    }

    /// As many as are wanted of each kind.
    fn open_flows(&mut self) {
        let mut missing = Vec::new();
        for (service, way) in (0..SERVICES).flat_map(|i| Way::all().into_iter().map(move |w| (i, w))) {
            let held = self.flows.iter().filter(|f| f.service == service && f.way == way).count();
            if held < way.wanted() && !self.truth.usable(service, way.bound()).is_empty() {
                missing.push((service, way));
            }
        }
        let (own, others): (Vec<_>, Vec<_>) =
            missing.into_iter().partition(|(_, w)| w.client == Client::Node);
        self.open(others);
        if !own.is_empty() {
            let _inside = self.node.enter();
            self.open(own);
        }
    }

    fn open(&mut self, all: Vec<(usize, Way)>) {
        for (service, way) in all {
            let net = match way.client {
                Client::Node => &self.node.net,
                Client::Pod => &self.pod,
                Client::Outside => &self.outside,
                Client::Other => &self.other,
            };
            self.last_port += 1;
            let shared = &self.shared[usize::from(!way.v4)];
            let flow = Flow::open(net, shared, self.last_port, &self.truth, service, way);
            let flow = flow.unwrap_or_else(|e| {
                panic!("{way:?} of q{service} does not begin: {e}, after {:#?}", self.said)
            });
            self.flows.push(flow);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn maps_and_connections_survive_any_changes_and_kills() {
    let mut random = Random::new();
    let (_alone, api, place) = begin().await;
    let World { node, pod, client_pod, other, outside } = World::new();
    for (n, net) in [&pod, &other, &client_pod, &other].into_iter().enumerate() {
        [true, false].into_iter().for_each(|v4| serve(net, n, server_at(n, v4)));
    }
    let mut node = Node::within(node, "me", &place);
    node.serve_all_interfaces();
    node.reaches(&api);
    let shared = {
        let _inside = node.enter();
        let of = |means, v4| Way::all().into_iter().find(|w| w.means == means && w.v4 == v4).unwrap().to(0);
        [true, false].map(|v4| node.run(move || datagrams(0, of(Means::Shared, v4), false)).unwrap())
    };
    let truth = Truth::new();
    truth.put_all(&api);
    let mut s = Sequence {
        flows: Vec::new(),
        ended: Vec::new(),
        shared,
        last_port: FIRST_PORT,
        node,
        pod: client_pod,
        outside,
        other,
        api,
        truth,
        closed: 0,
        moved: 0,
        said: Vec::new(),
    };
    s.settle().await;
    let mut kills = 0;
    for _ in 0..STEPS {
        let ran = s.node.proxy.is_some();
        s.step(&mut random);
        kills += usize::from(ran && s.node.proxy.is_none());
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
