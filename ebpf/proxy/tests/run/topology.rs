//! Nodes with a proxy of their own: which endpoints a client reaches depends on the node that it is on, and how its packets go
//! on the node's interfaces.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};

use super::*;
use crate::world::Net;

const VIP: &str = "10.73.96.1";
/// The only endpoint on each node.
const ENDPOINTS: [&str; 2] = ["10.73.1.1", "10.73.2.1"];
const LINK: [&str; 2] = ["10.73.0.1", "10.73.0.2"];

/// A network namespace and a cgroup that stand for a node. Removed on drop, with the programs.
pub struct Node {
    name: &'static str,
    pub config: Config,
    pub net: Net,
    cgroup: PathBuf,
    /// The cgroup of this process, which is none of the node's.
    own: PathBuf,
    pub proxy: Option<Killed>,
}

impl Node {
    pub fn new(name: &'static str, place: &Place) -> Node {
        Node::within(Net::new("t"), name, place)
    }

    pub fn within(net: Net, name: &'static str, place: &Place) -> Node {
        let cgroup = place.root.join(&net.0);
        std::fs::create_dir_all(&cgroup).expect("run as root");
        let mut config = place.config.clone();
        config.node_name = name.into();
        config.datapath.pins = place.home.join(format!("bpf-{name}"));
        config.datapath.cgroup = Some(cgroup.clone());
        Node { name, config, net, cgroup, own: place.cgroup.clone(), proxy: None }
    }

    /// The proxy is to serve every interface that it finds, pods' too.
    pub fn serve_all_interfaces(&mut self) {
        self.config.uplinks.clear();
        self.config.pod_packets = true;
    }

    /// Runs `f` on a thread of its own inside the namespace.
    pub fn run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> T {
        self.net.run(f).join().unwrap()
    }

    /// The API server answers on this node too.
    pub fn reaches(&self, api: &FakeApi) {
        let address = api.address;
        api.listen(self.run(move || TcpListener::bind(address).unwrap()));
    }

    /// Until this is dropped, sockets that this process makes are of the node's cgroup, and stay so.
    pub fn enter(&self) -> Inside {
        join(&self.cgroup).unwrap();
        Inside(self.own.clone())
    }

    pub fn spawn(&mut self) {
        let mut c = Command::new("nsenter");
        c.arg(format!("--net=/run/netns/{}", self.net.0)).arg(std::env::current_exe().unwrap());
        self.proxy = Some(Killed::spawn(c, &self.config));
    }

    pub fn is_in_step(&self) -> bool {
        let health = self.config.health_address.unwrap();
        let page = self.run(move || ask_health(health, "/healthz"));
        page.is_ok_and(|page| page.starts_with("HTTP/1.1 200"))
    }

    async fn start(&mut self) {
        self.spawn();
        let what = format!("the proxy of node {} is in step", self.name);
        wait_until(&what, PATIENCE, || async { self.is_in_step().then_some(()) }).await;
    }

    /// Who answers a client on this node, of many questions.
    fn answers(&self) -> BTreeSet<String> {
        let script = format!(
            "echo $$ > {}/cgroup.procs; for i in {{1..24}}; do cat < /dev/tcp/{VIP}/80 || echo failed; echo; done",
            self.cgroup.display()
        );
        let out = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", self.net.0))
            .args(["timeout", "10", "bash", "-c", &script])
            .stderr(Stdio::null())
            .output()
            .unwrap();
        String::from_utf8_lossy(&out.stdout).lines().filter(|l| !l.is_empty()).map(str::to_owned).collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.proxy = None;
        let _ = purge(&self.config);
        let _ = std::fs::remove_dir(&self.cgroup);
    }
}

/// The way back into this process's own cgroup.
pub struct Inside(PathBuf);

impl Drop for Inside {
    fn drop(&mut self) {
        let _ = join(&self.0);
    }
}

fn node(name: &str, zone: &str) -> serde_json::Value {
    json!({"metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}}})
}

/// Both endpoints, with hints by field and name.
fn hinted(hints: [serde_json::Value; 2]) -> serde_json::Value {
    let mut s = slice("w", 8080);
    let endpoints = ENDPOINTS.iter().zip(["a", "b"]).zip(hints).map(|((ip, node), hints)| {
        json!({"addresses": [ip], "nodeName": node, "conditions": {"ready": true}, "hints": hints})
    });
    s["endpoints"] = json!(endpoints.collect::<Vec<_>>());
    s
}

fn zones(names: [&str; 2]) -> serde_json::Value {
    hinted(names.map(|n| json!({"forZones": [{"name": n}]})))
}

/// Zones, and nodes before them.
fn nodes(names: [&str; 2]) -> serde_json::Value {
    let hint = |zone, node: &str| json!({"forZones": [{"name": zone}], "forNodes": [{"name": node}]});
    hinted([hint("za", names[0]), hint("zb", names[1])])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hints_decide_by_the_clients_node() {
    let (_alone, api, place) = begin().await;
    let mut all = [Node::new("a", &place), Node::new("b", &place)];
    let [a, b] = &all;
    a.net.ip(&format!("link add peer type veth peer name peer netns {}", b.net.0));
    for i in 0..2 {
        let n = &all[i];
        n.net.ip(&format!("addr add {}/30 dev peer", LINK[i]));
        n.net.ip("link set peer up");
        n.net.ip(&format!("addr add {}/32 dev lo", ENDPOINTS[i]));
        n.net.ip(&format!("route add {}/32 via {}", ENDPOINTS[1 - i], LINK[1 - i]));
        let (name, at) = (n.name, format!("{}:8080", ENDPOINTS[i]));
        n.run(move || server(name, at.parse().unwrap()));
        n.reaches(&api);
        api.put("nodes", node(n.name, ["za", "zb"][i]));
    }
    api.put("services", service("w", VIP, json!({})));
    api.put("endpointslices", hinted([json!({}), json!({})]));
    for n in &mut all {
        n.start().await;
    }
    let expect = async |what: &str, want: [&[&str]; 2]| {
        for (n, want) in all.iter().zip(want) {
            let want: BTreeSet<String> = want.iter().map(|s| (*s).to_owned()).collect();
            wait_until(
                &format!("{what}: node {} reaches {want:?}", n.name),
                Duration::from_secs(10),
                || async { (n.answers() == want).then_some(()) },
            )
            .await;
        }
    };
    expect("no hints", [&["a", "b"], &["a", "b"]]).await;
    api.put("endpointslices", zones(["za", "zb"]));
    expect("each zone has its own", [&["a"], &["b"]]).await;
    api.put("endpointslices", nodes(["b", "a"]));
    expect("nodes go before zones", [&["b"], &["a"]]).await;
    api.put("endpointslices", nodes(["a", "a"]));
    expect("none for node b, so its zone's", [&["a", "b"], &["b"]]).await;
    api.put("endpointslices", zones(["zb", "zb"]));
    expect("none for zone za, so all", [&["a", "b"], &["a", "b"]]).await;
    api.put("endpointslices", hinted([json!({"forZones": [{"name": "za"}]}), json!({})]));
    expect("not all say for whom they are, so all", [&["a", "b"], &["a", "b"]]).await;
    api.put("endpointslices", zones(["za", "zb"]));
    expect("each zone has its own again", [&["a"], &["b"]]).await;
    api.put("nodes", node("a", "zb"));
    expect("the node moved", [&["b"], &["b"]]).await;
}

/// The proxy finds out by itself between which interfaces packets may go past the stack.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn host_routing_is_for_the_interfaces_that_are_there() {
    const POD: &str = "10.73.128.2";
    let (_alone, api, place) = begin().await;
    let [mut a, client, pod] = ["a", "c", "p"].map(|name| Node::new(name, &place));
    a.run(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap());
    a.net.ip(&format!("link add up0 type veth peer name peer netns {}", client.net.0));
    for (n, dev, own) in [(&a, "up0", LINK[0]), (&client, "peer", LINK[1])] {
        n.net.ip(&format!("addr add {own}/30 dev {dev}"));
        n.net.ip(&format!("link set {dev} up"));
    }
    let gateway = "02:73:00:00:00:01";
    a.net.ip(&format!("link add pod0 address {gateway} type veth peer name eth0 netns {}", pod.net.0));
    a.net.ip("link set pod0 up");
    pod.net.ip("link set eth0 up");
    pod.net.ip(&format!("addr add {POD}/32 dev eth0"));
    pod.net.ip("route add 169.254.1.1 dev eth0 scope link");
    pod.net.ip(&format!("neigh replace 169.254.1.1 lladdr {gateway} dev eth0 nud permanent"));
    pod.net.ip("route add default via 169.254.1.1 dev eth0");
    a.net.ip(&format!("route add {POD}/32 dev pod0"));
    pod.run(|| server("pod", format!("{POD}:8080").parse().unwrap()));
    a.reaches(&api);
    api.put("nodes", node("a", "za"));
    let mut s = service("w", VIP, json!({}));
    s["spec"]["type"] = json!("NodePort");
    s["spec"]["ports"][0]["nodePort"] = json!(30_080);
    api.put("services", s);
    let mut s = slice("w", 8080);
    s["endpoints"] = json!([{"addresses": [POD], "nodeName": "a", "conditions": {"ready": true}}]);
    api.put("endpointslices", s);
    a.serve_all_interfaces();
    a.config.host_routing = true;
    a.start().await;
    for _ in 0..5 {
        assert_eq!(client.run(|| ask(&format!("{}:30080", LINK[0])).unwrap()), "pod");
    }
    let status = orlop_proxy::inspect(&a.config.datapath.pins, &orlop_proxy::Question::Status).unwrap();
    let short = status.lines().find_map(|l| l.strip_prefix("packets past the stack")).unwrap();
    assert!(short.trim().parse::<u64>().unwrap() >= 5, "{status}");
}
