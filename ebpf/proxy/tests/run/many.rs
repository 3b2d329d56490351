//! A node with more interfaces and addresses than most.

use std::fmt::Write as _;
use std::process::{Command, Stdio};

use orlop_ebpf_loader::RealMaps;

use super::*;
use crate::topology::Node;
use crate::world::Net;

const PAIRS: usize = 160;
const ADDRESSES: u16 = 1_150;
const NODE: &str = "10.74.1.1";
const POD: &str = "10.74.2.2";
const NODE_PORT: u16 = 31_074;

/// Many commands of `ip` in one process.
fn batch(netns: &str, lines: &str) {
    let mut c = Command::new("ip").args(["-n", netns, "-batch", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    c.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    assert!(c.wait().unwrap().success());
}

fn address(i: u16) -> String {
    format!("10.75.{}.{}", i >> 8, i & 255)
}

/// Addresses of virtual services; pods' interfaces; an uplink, and a pod that came last.
fn crowded(node: &Node, outside: &Net, pod: &Net) {
    let n = &node.net;
    let mut lines = String::new();
    for i in 0..ADDRESSES {
        writeln!(lines, "addr add {}/32 dev lo", address(i)).unwrap();
    }
    for i in 0..PAIRS {
        writeln!(lines, "link add a{i} type veth peer name b{i}\nlink set a{i} up\nlink set b{i} up")
            .unwrap();
    }
    batch(&n.0, &lines);
    n.ip(&format!("link add up0 type veth peer name eth0 netns {}", outside.0));
    n.ip(&format!("addr add {NODE}/24 dev up0"));
    n.ip("link set up0 up");
    outside.ip("addr add 10.74.1.2/24 dev eth0");
    outside.ip("link set eth0 up");
    outside.ip(&format!("route add default via {NODE}"));
    let (own, theirs) = ("02:74:00:00:00:01", "02:74:00:00:00:02");
    n.ip(&format!("link add last address {own} type veth peer name eth0 address {theirs} netns {}", pod.0));
    n.ip("link set last up");
    pod.ip("link set eth0 up");
    pod.ip(&format!("addr add {POD}/32 dev eth0"));
    pod.ip(&format!("neigh replace 169.254.1.1 lladdr {own} dev eth0 nud permanent"));
    pod.ip("route add 169.254.1.1 dev eth0 scope link");
    pod.ip("route add default via 169.254.1.1 dev eth0");
    n.ip(&format!("neigh replace {POD} lladdr {theirs} dev last nud permanent"));
    n.ip(&format!("route add {POD}/32 dev last"));
}

/// Asks from in there, outside of every cgroup that is served.
fn ask_from(net: &Net, at: String) -> Result<String, String> {
    net.run(move || ask(&at).map_err(|e| e.to_string())).join().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_interfaces_and_addresses_are_served() {
    let (_alone, api, place) = begin().await;
    let mut node = Node::new("me", &place);
    let (outside, pod) = (Net::new("o"), Net::new("p"));
    crowded(&node, &outside, &pod);
    node.serve_all_interfaces();
    let backend: SocketAddr = format!("{NODE}:8080").parse().unwrap();
    node.run(move || server("a", backend));
    node.reaches(&api);
    let ports =
        json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": NODE_PORT, "protocol": "TCP"}]});
    api.put("services", service("w", "10.74.96.1", ports));
    let mut endpoints = slice("w", backend.port());
    endpoints["endpoints"][0]["addresses"] = json!([NODE]);
    api.put("endpointslices", endpoints);

    // As an earlier version left them: too small, and made anew.
    let mut small = node.config.clone();
    (small.datapath.sizes.addresses, small.datapath.sizes.interfaces) = (256, 16);
    let full = in_node(&node, &small).await.unwrap_err();
    assert!(full.contains("LOCAL_ADDRS is full") && full.contains("--map-size addresses"), "{full}");

    let stop = in_node(&node, &node.config).await.unwrap();
    let served = RealMaps::open(&node.config.datapath.pins).unwrap().uplinks().len();
    assert_eq!(served, 2 * PAIRS + 2);
    for at in [NODE.to_owned(), address(0), address(ADDRESSES - 1)] {
        let at = format!("{at}:{NODE_PORT}");
        assert_eq!(ask_from(&outside, at.clone()), Ok("a".to_owned()), "{at} from outside");
        assert_eq!(ask_from(&pod, at.clone()), Ok("a".to_owned()), "{at} from the last pod");
    }
    stop.cancel();
    let Node { config, .. } = &node;
    let config = config.clone();
    node.run(move || purge(&config)).unwrap();
}

/// Runs the proxy in the node's namespace until it is ready, or says why it ended.
pub async fn in_node(node: &Node, config: &Config) -> Result<CancellationToken, String> {
    let (stop, ready, config) = (CancellationToken::new(), Ready::default(), config.clone());
    let (stopped, is_ready) = (stop.clone(), ready.clone());
    let (tell, end) = tokio::sync::oneshot::channel();
    node.net.run(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let result = runtime.block_on(run(config, is_ready, stopped));
        let _ = tell.send(result.map_err(|e| orlop_base::telemetry::chain(&e).to_string()));
    });
    tokio::select! {
        () = ready.wait() => Ok(stop),
        r = end => Err(r.unwrap().unwrap_err()),
        () = tokio::time::sleep(PATIENCE * 2) => panic!("neither ready nor ended"),
    }
}
