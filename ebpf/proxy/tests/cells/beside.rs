//! The proxy among what others made: networks of other CNI plugins, packet rules and filters that are not its own.

use std::net::SocketAddr;
use std::process::Command;

use orlop_ebpf_common::{Uplink, addr_from, local_flags, uplink_flags};
use orlop_ebpf_loader::{Maps, Op, purge};
use orlop_proxy::model::{Slice, SlicePort};

use crate::ask::{probe, serve};
use crate::world::*;
use crate::{Home, Kind, Ranges, Spec, State, program_with};

/// In a bridge's subnet on this node, and in one behind a VXLAN device.
const BRIDGED: Both = ["10.71.140.2", "fd71:140::2"];
const TUNNELLED: Both = ["10.71.150.2", "fd71:150::2"];
const NODE_ON_TUNNEL: Both = ["10.71.140.0", "fd71:140::"];
const FOREIGN: &str = "table inet foreign {
    chain out { type nat hook postrouting priority srcnat; ip saddr 10.71.140.0/24 oifname up0 counter masquerade; }
    chain through { type filter hook forward priority filter; policy accept; ct state established counter accept; }
}
table ip kube-proxy {
    chain services { counter; }
}
table ip6 kube-proxy {
    chain services { counter; }
}
";

pub fn output(net: &Net, command: &str) -> String {
    let words: Vec<String> = command.split(' ').map(str::to_owned).collect();
    let run = move || {
        let out =
            Command::new(&words[0]).args(&words[1..]).output().unwrap_or_else(|e| panic!("{words:?}: {e}"));
        assert!(out.status.success(), "{words:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    net.run(run).join().unwrap()
}

pub fn rules(net: &Net, text: &'static str) {
    net.run(move || {
        let file = std::env::temp_dir().join(orlop_base::testkit::unique_name("pxcells-rules"));
        std::fs::write(&file, text).unwrap();
        let out = Command::new("nft").arg("-f").arg(&file).output().expect("apt-get install nftables");
        std::fs::remove_file(&file).unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    })
    .join()
    .unwrap();
}

/// A pod on a bridge, as the reference plugin makes it, and one behind a tunnel, as flannel does.
fn networks(w: &World, pod: &Net) {
    let (node, other) = (&w.node, &w.other);
    node.ip("link add cni0 type bridge");
    node.ip(&format!("link add port0 type veth peer name eth0 netns {}", pod.0));
    node.ip("link set port0 master cni0 up");
    node.ip("link set cni0 up");
    pod.ip("link set eth0 up");
    for (gateway, own, bits) in [("10.71.140.1", BRIDGED[0], 24), ("fd71:140::1", BRIDGED[1], 64)] {
        node.ip(&format!("addr add {gateway}/{bits} dev cni0"));
        pod.ip(&format!("addr add {own}/{bits} dev eth0"));
        pod.ip(&format!("route add default via {gateway}"));
    }
    for (net, far, own, mac) in [
        (node, OTHER[0], NODE_ON_TUNNEL, "02:71:00:00:02:01"),
        (other, NODE_TO_OTHER[0], ["10.71.150.0", "fd71:150::"], "02:71:00:00:02:02"),
    ] {
        let dev = if net.0 == node.0 { "up1" } else { "eth0" };
        net.ip(&format!(
            "link add flannel.1 address {mac} mtu 1450 type vxlan id 1 dstport 8472 nolearning dev {dev}"
        ));
        for (a, bits) in own.iter().zip([32, 128]) {
            net.ip(&format!("addr add {a}/{bits} dev flannel.1"));
        }
        net.ip("link set flannel.1 up");
        let theirs = if mac.ends_with("1") { "02:71:00:00:02:02" } else { "02:71:00:00:02:01" };
        let hop = if net.0 == node.0 { ["10.71.150.0", "fd71:150::"] } else { NODE_ON_TUNNEL };
        for (h, bits) in hop.iter().zip([24, 64]) {
            net.ip(&format!("neigh replace {h} lladdr {theirs} dev flannel.1 nud permanent"));
            net.ip(&format!("route add {h}/{bits} via {h} dev flannel.1 onlink"));
        }
        output(net, &format!("bridge fdb append {theirs} dev flannel.1 dst {far}"));
    }
    for (a, bits) in TUNNELLED.iter().zip([32, 128]) {
        other.ip(&format!("addr add {a}/{bits} dev lo"));
    }
}

fn spec() -> Spec {
    Spec { number: 1, state: State::Both, internal_local: false, external_local: false, ranges: Ranges::All }
}

fn slice(v4: bool) -> Slice {
    let mut s = spec().slice(v4);
    for (e, both) in s.endpoints.iter_mut().zip([BRIDGED, TUNNELLED]) {
        e.ip = both[usize::from(!v4)].parse().unwrap();
    }
    s.ports.iter_mut().for_each(|p: &mut SlicePort| p.port = BACKEND_PORT);
    s
}

/// What is on the node that is not ours. Counters of rules change with traffic, so they are left out.
fn foreign(w: &World) -> String {
    let mut all = output(&w.node, "nft -s list ruleset");
    for hook in ["ingress", "egress"] {
        all.push_str(&output(&w.node, &format!("tc filter show dev up0 {hook}")));
    }
    all + &output(&w.node, "tc qdisc show dev up0")
}

fn beside(force_clsact: bool) {
    let w = World::new();
    let pod = Net::new("b");
    networks(&w, &pod);
    rules(&w.node, FOREIGN);
    output(&w.node, "tc qdisc add dev up0 clsact");
    output(&w.node, "tc filter add dev up0 ingress prio 60 protocol ip u32 match u32 0 0 classid 1:1");
    let before = foreign(&w);
    let mut home = Home::new(force_clsact);
    // A bridge has no driver that takes XDP programs: it is served without.
    home.config.xdp = vec!["cni0".into()];
    serve(&pod, "pod", BRIDGED);
    serve(&w.other, "remote", TUNNELLED);
    serve(&w.outside, "world", OUTSIDE);
    let masqueraded = || {
        let to = SocketAddr::new(OUTSIDE[0].parse().unwrap(), BACKEND_PORT);
        let seen = pod.run(move || [false, true].map(|udp| probe(udp, to, 1))).join().unwrap();
        let expected = format!("world {}", NODE[0]);
        assert_eq!(seen, [expected.clone(), expected], "the others' rule goes on");
    };
    masqueraded();

    let mut dp = program_with(&w, &home.config, |model| {
        model.set_service(&spec().name(), Some(spec().service()));
        for v4 in [true, false] {
            model.set_slice(&format!("{}-{v4}", spec().name()), Some(slice(v4)));
        }
    });
    let mut dp = w
        .node
        .run(move || {
            for (name, own, flags) in [
                ("cni0", ["10.71.140.1", "fd71:140::1"], uplink_flags::ABOVE),
                ("flannel.1", NODE_ON_TUNNEL, 0),
                ("port0", NODE, uplink_flags::POD),
            ] {
                let [addr4, addr6] = own.map(|a| addr_from(a.parse().unwrap()));
                let index = nix::net::if_::if_nametoindex(name).unwrap();
                dp.attach_uplink(index, name, Uplink { addr4, addr6, l3_offset: 14, flags }).unwrap();
                for a in [addr4, addr6] {
                    dp.maps.apply(&Op::PutLocal(a, local_flags::NODE_PORT)).unwrap();
                }
            }
            dp
        })
        .join()
        .unwrap();
    let s = spec();
    for v in [0, 1] {
        for udp in [false, true] {
            for kind in [Kind::NodePort, Kind::LoadBalancer, Kind::ClusterIp] {
                let to = match kind {
                    Kind::NodePort => SocketAddr::new(NODE[v].parse().unwrap(), s.node_port(udp)),
                    _ => SocketAddr::new(s.ip(kind, v == 0), 80),
                };
                let got = w.outside.run(move || probe(udp, to, 2)).join().unwrap();
                let expected = format!("pod {}, remote {}", OUTSIDE[v], NODE_ON_TUNNEL[v]);
                assert_eq!(got, expected, "{to} udp={udp}");
            }
        }
    }
    masqueraded();
    // A pod on the bridge reaches Services by its packets alone, itself among the backends. They pass the port and the bridge.
    for v in [0, 1] {
        let to = SocketAddr::new(s.ip(Kind::ClusterIp, v == 0), 80);
        for udp in [false, true] {
            let got = pod.run(move || probe(udp, to, 2)).join().unwrap();
            assert_eq!(got, format!("pod {}, remote {}", NODE[v], BRIDGED[v]), "{to} udp={udp}");
        }
    }

    if force_clsact {
        assert_ne!(foreign(&w), before, "our filters are among them");
    }
    let index = w.node.run(|| nix::net::if_::if_nametoindex("up0").unwrap()).join().unwrap();
    let config = home.config.clone();
    w.node
        .run(move || {
            // An interface that is served no more is left as it was found; then all of them.
            let others: Vec<u32> =
                dp.maps.uplinks().into_iter().map(|(i, _)| i).filter(|i| *i != index).collect();
            dp.keep_uplinks(&others).unwrap();
            drop(dp);
            config
        })
        .join()
        .unwrap();
    assert_eq!(foreign(&w), before);
    let config = home.config.clone();
    w.node.run(move || purge(&config).unwrap()).join().unwrap();
    assert_eq!(foreign(&w), before);
    assert!(!output(&w.node, "tc qdisc show dev up1").contains("clsact"), "what we made goes");
    masqueraded();

    // On request what kube-proxy left goes as well, and nothing else.
    let removed = w.node.run(|| orlop_proxy::leftovers::remove().unwrap().removed).join().unwrap();
    assert_eq!(removed, ["nftables table ip kube-proxy", "nftables table ip6 kube-proxy"]);
    let left = output(&w.node, "nft list ruleset");
    assert!(left.contains("table inet foreign") && !left.contains("kube-proxy"), "{left}");
    assert!(w.node.run(|| orlop_proxy::leftovers::remove().unwrap().removed).join().unwrap().is_empty());
}

#[test]
fn beside_other_networks_and_rules() {
    beside(false);
}

#[test]
fn beside_other_networks_and_rules_by_clsact() {
    beside(true);
}

/// kube-proxy's chains by iptables of both kinds, with one of the kubelet's and one of somebody else's.
#[test]
fn chains_of_kube_proxy_are_removed_on_request() {
    let w = World::new();
    for tool in ["iptables-nft", "ip6tables-nft", "iptables-legacy"] {
        for chain in ["KUBE-SERVICES", "KUBE-SVC-A", "KUBE-KUBELET-CANARY", "MINE"] {
            output(&w.node, &format!("{tool} -t nat -N {chain}"));
        }
        for rule in [
            "PREROUTING -j KUBE-SERVICES",
            "PREROUTING -j MINE",
            "KUBE-SERVICES -j KUBE-SVC-A",
            "MINE -j RETURN",
        ] {
            output(&w.node, &format!("{tool} -t nat -A {rule}"));
        }
    }
    let removed = w.node.run(|| orlop_proxy::leftovers::remove().unwrap().removed).join().unwrap();
    assert_eq!(
        removed,
        ["chains of iptables (nft)", "chains of iptables (legacy)", "chains of ip6tables (nft)"]
    );
    for tool in ["iptables-nft", "ip6tables-nft", "iptables-legacy"] {
        let left = output(&w.node, &format!("{tool} -t nat -S"));
        let kept: Vec<&str> = left.lines().filter(|l| !l.starts_with("-P")).collect();
        assert_eq!(
            kept,
            ["-N KUBE-KUBELET-CANARY", "-N MINE", "-A PREROUTING -j MINE", "-A MINE -j RETURN"],
            "{tool}"
        );
    }
}
