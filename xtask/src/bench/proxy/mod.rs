//! The service proxy, beside straight connections and beside a rule set of kube-proxy's nftables mode. The API server, the
//! proxy and all traffic are in network namespaces; the Services that are measured have one endpoint, the others stand by.

mod load;
mod nft;
mod world;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, PostParams};
use orlop_test_vms::program;
use serde_json::{Value, json};

use self::load::{BULK, PING, at};
use self::world::{Cgroup, Net, POD, World};
use super::process::pss;
use super::table::{Goal, Rates, Table, Times, Unit};
use super::{Options, Result, text};

/// Of each Service.
const ENDPOINTS: usize = 10;
/// The Service that is measured: its address, and its node ports (not of the usual range's beginning, which the API
/// server gives out).
const WEB: Ipv4Addr = Ipv4Addr::new(10, 213, 255, 1);
const NODE_PORTS: [u16; 2] = [32_080, 32_081];
/// Figures are medians of so many rounds, taken in turn with those that they are compared with: many short ones, as a
/// machine's mood lasts for seconds.
const ROUNDS: usize = 40;
const ROUND: Duration = Duration::from_millis(100);
/// New Services of which one is typical.
const SINGLES: usize = 20;
/// Requests that fill the API server at the same time.
const AT_ONCE: usize = 16;
const PATIENCE: Duration = Duration::from_secs(30);
const API: &str = "127.0.0.1:6443";
const HEALTH: &str = "127.0.0.1:10256";

pub fn run(options: &Options) -> Result<Vec<Table>> {
    let bench = Bench::new()?;
    let mut tables = Vec::new();
    let mut filled = 0;
    for (turn, services) in options.services.iter().copied().enumerate() {
        let from = filled;
        bench.api(move |client| Box::pin(fill(client, from, services)))?;
        filled = services;
        tables.push(bench.at_size(turn, services)?);
    }
    Ok(tables)
}

/// The endpoint `e` of Service `i`; nobody is there.
fn endpoint(i: usize, e: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 100 + e as u8, (i / 250) as u8, (i % 250 + 1) as u8)
}

/// Of a Service that stands by. All addresses are given, so that the API server chooses none that is to come.
fn vip(i: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 213, (i / 250 + 1) as u8, (i % 250 + 1) as u8)
}

struct Bench {
    dir: tempfile::TempDir,
    /// The API server and what answers in pods; they end before their namespaces go.
    _servers: Vec<Process>,
    /// Whether iperf3 is there.
    bulk: bool,
    cgroup: Cgroup,
    /// Without any proxy, with ours, and with the rule set when nft is there.
    plain: World,
    ours: World,
    rules: Option<World>,
}

type Load = fn(SocketAddr, Duration) -> Result<f64>;

/// What is measured through a ClusterIP and through a node port.
struct Line {
    what: &'static str,
    load: Load,
    /// Of the Service, and of nodes.
    ports: (u16, u16),
    /// The goal through a ClusterIP.
    times: f64,
}

/// Whether a program is there to run.
fn installed(program: &str) -> bool {
    Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok_and(|s| s.success())
}

/// A child that is killed on drop.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Bench {
    fn new() -> Result<Bench> {
        let dir = tempfile::tempdir().map_err(text)?;
        let (plain, ours) = (World::new("a")?, World::new("b")?);
        let rules = if installed("nft") { Some(World::new("c")?) } else { None };
        let bulk = installed("iperf3");
        let mut servers = Vec::new();
        for w in [&plain, &ours].into_iter().chain(&rules) {
            load::serve(&w.pod)?;
            if bulk {
                servers.push(Process(load::serve_bulk(&w.pod)?));
            }
        }
        let log = std::fs::File::create(dir.path().join("server.log")).map_err(text)?;
        let mut server = ours.node.command(&program("orlop"));
        server.args(["server", "--listen", API, "--advertise-address", "127.0.0.1"]);
        server.args(["--service-cidr", world::SERVICES]);
        for (flag, name) in
            [("--data-dir", "data"), ("--write-kubeconfig", "admin.kubeconfig"), ("--manifests", "manifests")]
        {
            server.arg(flag).arg(dir.path().join(name));
        }
        let server = server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().map_err(text)?;
        servers.push(Process(server));
        let bench = Bench { dir, _servers: servers, bulk, cgroup: Cgroup::new()?, plain, ours, rules };
        let begin = Instant::now();
        while let Err(e) = bench.api(|client| Box::pin(make_web(client))) {
            if begin.elapsed() > PATIENCE {
                return Err(format!("the API server does not answer: {e}"));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(bench)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Talks to the API server, in its namespace.
    fn api<T: Send + 'static>(
        &self,
        work: impl FnOnce(kube::Client) -> futures::future::LocalBoxFuture<'static, Result<T>> + Send + 'static,
    ) -> Result<T> {
        let kubeconfig = self.path("admin.kubeconfig");
        self.ours.node.run(move || with_client(&kubeconfig, work))
    }

    /// A proxy of its own maps, and the time that it took from its start until all Services were in them.
    fn proxy(&self, turn: usize, more: &[&str]) -> Result<(Proxy, Duration)> {
        let pins = PathBuf::from(format!("/sys/fs/bpf/orlop-bench-{}-{turn}", std::process::id()));
        let log = std::fs::File::create(self.path("proxy.log")).map_err(text)?;
        let mut c = self.ours.node.command(&program("orlop"));
        c.args(["proxy", "--node-name", "bench", "--health-address", HEALTH, "--metrics-address", "none"]);
        // The rights of the system:node-proxier role, and no more.
        c.arg("--kubeconfig").arg(self.path("data/server/proxy.kubeconfig"));
        c.arg("--bpf-dir").arg(&pins).arg("--cgroup").arg(&self.cgroup.path).args(more);
        self.cgroup.enter(false)?;
        let begin = Instant::now();
        let child = c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().map_err(text)?;
        let proxy = Proxy { pins, process: Some(Process(child)) };
        self.ours.node.run(move || {
            let health = HEALTH.parse().map_err(text)?;
            while !healthy(health) {
                if begin.elapsed() > PATIENCE {
                    return Err("the proxy does not get healthy".into());
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            Ok(())
        })?;
        Ok((proxy, begin.elapsed()))
    }

    fn at_size(&self, turn: usize, services: usize) -> Result<Table> {
        let mut table =
            Table::new(format!("proxy, {services} services x {ENDPOINTS}"), Some("without / nftables"));
        let (proxy, full) = self.proxy(turn, &[])?;
        let goal = (services == 10_000).then_some(Goal::Figure(2000.0));
        table.row("start until all are in the maps", Unit::Ms, full.as_secs_f64() * 1e3, None, goal);
        // What starting left behind has settled.
        std::thread::sleep(Duration::from_secs(2));
        let goal = (services == 5000).then_some(Goal::Figure(30.0));
        table.row("memory (PSS)", Unit::MiB, proxy.pss(), None, goal);

        let [whole, behind] = self.new_services(turn)?;
        table.times("new Service, POST sent -> reachable", &whole, None, [None, None]);
        table.times(
            "new Service, POST answered -> reachable",
            &behind,
            None,
            [Some(Goal::Figure(5.0)), None],
        );

        let ping = |what, load, times| Line { what, load, ports: (PING, NODE_PORTS[0]), times };
        let mut lines = vec![
            ping("connections", load::connections as Load, 0.97),
            ping("exchanges", load::exchanges as Load, 0.99),
        ];
        if self.bulk {
            let ports = (BULK, NODE_PORTS[1]);
            lines.push(Line {
                what: "iperf3, MiB for a processor's second",
                load: load::bulk,
                ports,
                times: 0.99,
            });
        }
        for l in &lines {
            self.cluster_ip(&mut table, l)?;
        }
        if let Some(rules) = &self.rules {
            nft::load(&rules.node, services)?;
            self.node_ports(&mut table, rules, &lines, services, "")?;
        }
        drop(proxy);
        if let Some(rules) = &self.rules {
            let (_proxy, _) = self.proxy(turn, &["--host-routing"])?;
            self.node_ports(&mut table, rules, &lines, services, ", host routing")?;
        }
        let (_proxy, _) = self.proxy(turn, &["--no-pod-packets"])?;
        for l in &lines {
            let [ours, plain] =
                in_turn([&|| self.measure(true, &self.ours.client, l.load, at(WEB, l.ports.0)), &|| {
                    self.measure(false, &self.plain.client, l.load, at(POD, l.ports.0))
                }])?;
            let what = format!("{} through ClusterIP, no pod packets / straight without a proxy", l.what);
            table.compare(what, &ours, &plain, Some(Goal::Times(l.times)));
        }
        Ok(table)
    }

    fn cluster_ip(&self, table: &mut Table, l: &Line) -> Result {
        let [ours, straight, plain] = in_turn([
            &|| self.measure(true, &self.ours.client, l.load, at(WEB, l.ports.0)),
            &|| self.measure(true, &self.ours.client, l.load, at(POD, l.ports.0)),
            &|| self.measure(false, &self.plain.client, l.load, at(POD, l.ports.0)),
        ])?;
        let goal = Some(Goal::Times(l.times));
        table.compare(format!("{} through ClusterIP / straight", l.what), &ours, &straight, goal);
        table.compare(format!("{} straight / without a proxy", l.what), &straight, &plain, None);
        Ok(())
    }

    fn node_ports(
        &self,
        table: &mut Table,
        rules: &World,
        lines: &[Line],
        services: usize,
        how: &str,
    ) -> Result {
        let goal = Goal::Times(if services >= 5000 { 2.0 } else { 1.0 });
        for (i, l) in lines.iter().enumerate() {
            let to = at(world::NODE, l.ports.1);
            let [ours, theirs] = in_turn([&|| self.measure(false, &self.ours.outside, l.load, to), &|| {
                self.measure(false, &rules.outside, l.load, to)
            }])?;
            let what = format!("{} through NodePort{how} / nftables", l.what);
            table.compare(what, &ours, &theirs, (i == 0).then_some(goal));
        }
        Ok(())
    }

    /// One round in a namespace, in or out of the proxy's cgroup.
    fn measure(&self, covered: bool, from: &Net, load: Load, to: SocketAddr) -> Result<f64> {
        self.cgroup.enter(covered)?;
        from.run(move || load(to, ROUND))
    }

    /// Times from the request, and from its answer, to the first connection.
    fn new_services(&self, turn: usize) -> Result<[Times; 2]> {
        self.cgroup.enter(true)?;
        let [mut whole, mut behind] = [Times::default(), Times::default()];
        for i in 0..SINGLES {
            // Of the part of the range that is given out last (KEP-3070).
            let vip = Ipv4Addr::new(10, 213, 0, (turn * SINGLES + i + 20) as u8);
            let name = format!("new-{turn}-{i}");
            let slice = slice(&name, &[POD], PING);
            self.api(move |client| Box::pin(async move { create::<EndpointSlice>(&client, slice).await }))?;
            let first = self.ours.client.spawn(move || load::first_connection(at(vip, PING)));
            let service = json!({
                "metadata": {"name": name},
                "spec": {"clusterIP": vip.to_string(), "ports": [{"port": PING}]},
            });
            let (sent, answered) = self.api(move |client| {
                Box::pin(async move {
                    // The connection is there before the time counts.
                    client.apiserver_version().await.map_err(text)?;
                    let sent = Instant::now();
                    create::<Service>(&client, service).await?;
                    Ok((sent, Instant::now()))
                })
            })?;
            let reached = first.join().map_err(|_| "a thread of the bench panicked".to_owned())??;
            whole.add(reached.saturating_duration_since(sent));
            behind.add(reached.saturating_duration_since(answered));
        }
        Ok([whole, behind])
    }
}

/// A running proxy; stopped, and its programs and maps removed, on drop.
struct Proxy {
    pins: PathBuf,
    process: Option<Process>,
}

impl Proxy {
    fn pss(&self) -> f64 {
        self.process.as_ref().map_or(0.0, |p| pss(p.0.id()))
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.process = None;
        let mut c = Command::new(program("orlop"));
        let _ = world::run(c.args(["proxy", "cleanup", "--bpf-dir"]).arg(&self.pins));
    }
}

fn healthy(at: SocketAddr) -> bool {
    use std::io::{Read, Write};
    let Ok(mut s) = std::net::TcpStream::connect(at) else { return false };
    let mut answer = String::new();
    s.write_all(b"GET /healthz HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n").is_ok()
        && s.read_to_string(&mut answer).is_ok()
        && answer.starts_with("HTTP/1.1 200")
}

fn with_client<T>(
    kubeconfig: &Path,
    work: impl FnOnce(kube::Client) -> futures::future::LocalBoxFuture<'static, Result<T>>,
) -> Result<T> {
    // On this thread alone, as only it is in the namespace.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(text)?;
    runtime.block_on(async {
        let client = orlop_client::client_from_kubeconfig(kubeconfig).await.map_err(text)?;
        work(client).await
    })
}

async fn create<K>(client: &kube::Client, object: Value) -> Result
where
    K: kube::Resource<Scope = kube::core::NamespaceResourceScope>
        + serde::Serialize
        + serde::de::DeserializeOwned,
    K: Clone + std::fmt::Debug,
    K::DynamicType: Default,
{
    let object: K = serde_json::from_value(object).map_err(text)?;
    let api: Api<K> = Api::namespaced(client.clone(), "default");
    match api.create(&PostParams::default(), &object).await {
        Err(kube::Error::Api(e)) if e.code == 409 => Ok(()),
        r => r.map(drop).map_err(text),
    }
}

fn slice(service: &str, ips: &[Ipv4Addr], port: u16) -> Value {
    let endpoints: Vec<Value> = ips
        .iter()
        .enumerate()
        .map(|(e, ip)| {
            json!({
                "addresses": [ip.to_string()], "nodeName": format!("node-{e}"),
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "targetRef": {"kind": "Pod", "namespace": "default", "name": format!("{service}-7d4b9c6f5-{e:05}"),
                    "uid": "2c6a9dc2-5a4e-4d5c-9e71-0c8b3d3f7a01"},
            })
        })
        .collect();
    json!({
        "metadata": {"name": format!("{service}-{port}"), "labels": {
            "kubernetes.io/service-name": service, "endpointslice.kubernetes.io/managed-by": "bench"}},
        "addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "",
            "protocol": "TCP", "port": port}],
    })
}

/// The Service that is measured.
async fn make_web(client: kube::Client) -> Result {
    let [ping, bulk] = NODE_PORTS;
    let service = json!({
        "metadata": {"name": "web"},
        "spec": {"type": "NodePort", "clusterIP": WEB.to_string(), "ports": [
            {"name": "ping", "port": PING, "nodePort": ping}, {"name": "bulk", "port": BULK, "nodePort": bulk}]},
    });
    create::<Service>(&client, service).await?;
    let mut slice = slice("web", &[POD], PING);
    slice["ports"] = json!([{"name": "ping", "protocol": "TCP", "port": PING}, {"name": "bulk", "protocol": "TCP", "port": BULK}]);
    create::<EndpointSlice>(&client, slice).await
}

/// Services that stand by.
async fn fill(client: kube::Client, from: usize, to: usize) -> Result {
    let one = |i: usize| {
        let client = client.clone();
        async move {
            let name = format!("s{i}");
            let ips: Vec<Ipv4Addr> = (0..ENDPOINTS).map(|e| endpoint(i, e)).collect();
            let mut slice = slice(&name, &ips, 80);
            slice["metadata"]["name"] = json!(name);
            create::<Service>(
                &client,
                json!({"metadata": {"name": name}, "spec": {"clusterIP": vip(i).to_string(), "ports": [{"port": 80}]}}),
            )
            .await?;
            create::<EndpointSlice>(&client, slice).await
        }
    };
    futures::stream::iter(from..to).map(one).buffer_unordered(AT_ONCE).try_collect().await
}

/// Figures that are taken in turn, each of them first once in a while.
fn in_turn<const N: usize>(measure: [&dyn Fn() -> Result<f64>; N]) -> Result<[Rates; N]> {
    let mut all = [const { Vec::new() }; N];
    for round in 0..ROUNDS {
        for i in (0..N).map(|i| (i + round) % N) {
            all[i].push(measure[i]()?);
        }
    }
    Ok(all.map(Rates::new))
}
