//! Interfaces without a link header, as those of tunnels are: towards clients and towards other nodes.

use std::io::{Read, Write};

use crate::ask::{probe, serve};
use crate::ways::{bulk, echo};
use crate::world::*;
use crate::*;

/// Addresses of the node on the tunnel to the client, and the client's; the same to the other node.
const TO_CLIENT: [Both; 2] = [["10.71.8.1", "fd71:8::1"], ["10.71.8.2", "fd71:8::2"]];
const TO_OTHER: [Both; 2] = [["10.71.9.1", "fd71:9::1"], ["10.71.9.2", "fd71:9::2"]];

/// Two ends, and two threads that carry packets from one to the other. They end with this process.
fn tunnel(node: &Net, far: &Net, name: &'static str, addresses: [Both; 2]) {
    let [here, there] = [(node, addresses[0]), (far, addresses[1])].map(|(net, own)| {
        let file = net.run(move || crate::wire::tun(name)).join().unwrap();
        for (addr, bits) in own.iter().zip([24, 64]) {
            net.ip(&format!("addr add {addr}/{bits} dev {name}"));
        }
        net.ip(&format!("link set {name} up"));
        file
    });
    for (from, to) in [(&here, &there), (&there, &here)] {
        let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        thread::spawn(move || {
            let mut packet = vec![0; 65_536];
            while let Ok(n @ 1..) = from.read(&mut packet) {
                // What the other end does not take is lost, as on any way.
                let _ = to.write(&packet[..n]);
            }
        });
    }
}

fn by_tunnels(force_clsact: bool) {
    let w = World::new();
    let home = Home::new(force_clsact);
    serve(&w.pod, "pod", POD);
    echo(&w.other, REMOTE_POD);
    tunnel(&w.node, &w.outside, "tun0", TO_CLIENT);
    tunnel(&w.node, &w.other, "tun1", TO_OTHER);
    for range in ["10.71.129.0/24", "fd71:129::/64"] {
        w.node.ip(&format!("route replace {range} dev tun1"));
    }
    let mut dp = program(&w, &home.config);
    let dp = w.node.run(move || {
        for (name, own) in [("tun0", TO_CLIENT[0]), ("tun1", TO_OTHER[0])] {
            let [addr4, addr6] = own.map(|a| addr_from(a.parse().unwrap()));
            let index = nix::net::if_::if_nametoindex(name).unwrap();
            dp.attach_uplink(index, name, Uplink { addr4, addr6, l3_offset: 0, flags: 0 }).unwrap();
            for a in [addr4, addr6] {
                dp.maps.apply(&Op::PutLocal(a, local_flags::NODE_PORT)).unwrap();
            }
        }
        dp
    });
    let dp = dp.join().unwrap();
    let with = |state| specs().into_iter().find(|s| s.state == state).unwrap();
    for (v, own) in TO_CLIENT[0].into_iter().enumerate() {
        // A pod here sees the client, by whatever name it was asked.
        for udp in [false, true] {
            let s = with(State::LocalOnly);
            let node_port = SocketAddr::new(own.parse().unwrap(), s.node_port(udp));
            let external = SocketAddr::new(s.ip(ExternalIp, v == 0), 80);
            w.outside.ip(&format!("route replace {} dev tun0", external.ip()));
            for to in [node_port, external] {
                let answer = w.outside.run(move || probe(udp, to, 1)).join().unwrap();
                assert_eq!(answer, format!("pod {}", TO_CLIENT[1][v]), "{to} udp={udp}");
            }
            let s = with(State::Nobody);
            let to = SocketAddr::new(own.parse().unwrap(), s.node_port(udp));
            assert_eq!(w.outside.run(move || probe(udp, to, 1)).join().unwrap(), "refused", "{to} udp={udp}");
        }
        // From tunnel to tunnel, and from a card to a tunnel.
        let port = with(State::RemoteOnly).node_port(false);
        for own in [own, NODE[v]] {
            let to = SocketAddr::new(own.parse().unwrap(), port);
            w.outside.run(move || bulk(to)).join().unwrap().unwrap_or_else(|e| panic!("{to}: {e}"));
        }
        // A ping at a ClusterIP, and an address of no Service, which a tunnel's packets may ask for as well.
        let cluster_ip = with(State::Both).ip(Ping, v == 0);
        for (to, said) in [(cluster_ip, "refused"), (NOBODYS_OTHER[v].parse().unwrap(), "dropped")] {
            w.outside.ip(&format!("route replace {to} dev tun0"));
            let to = SocketAddr::new(to, 0);
            let answer =
                w.outside.run(move || probe(false, to, usize::from(said == "refused"))).join().unwrap();
            assert_eq!(answer, said, "{to}");
        }
    }
    assert!(dp.maps.counter(counters::UNALLOCATED) >= 2);
}

/// Of the Service range, and of nobody at all.
const NOBODYS_OTHER: Both = ["10.71.96.201", "fd71:96::c9"];

#[test]
fn packets_need_no_link_header() {
    by_tunnels(false);
}

#[test]
fn packets_need_no_link_header_by_clsact() {
    by_tunnels(true);
}
