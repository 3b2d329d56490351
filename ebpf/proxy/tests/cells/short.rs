//! Host routing: what goes past the stack, and what does not.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use orlop_ebpf_common::{config_flags, counters};
use orlop_ebpf_loader::Datapath;

use crate::ask::probe;
use crate::beside::{output, rules};
use crate::ways::{NARROW, TO_THE_CLIENT, both_families, bulk, echo, spec};
use crate::world::*;
use crate::{Home, LOOPBACK, State, program_with};

fn host_routing(w: &World, home: &Home) -> Datapath {
    echo(&w.pod, POD);
    let mut dp = program_with(w, &home.config, |model| {
        let s = spec(State::LocalOnly);
        model.set_service(&s.name(), Some(s.service()));
        for v4 in [true, false] {
            model.set_slice(&format!("{}-{v4}", s.name()), Some(s.slice(v4)));
        }
    });
    dp.maps.set_flags(LOOPBACK | config_flags::HOST_ROUTING).unwrap();
    dp
}

fn node_ports(udp: bool) -> [SocketAddr; 2] {
    [0, 1].map(|v| SocketAddr::new(NODE[v].parse().unwrap(), spec(State::LocalOnly).node_port(udp)))
}

fn socket(to: SocketAddr) -> UdpSocket {
    let s = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
    s.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    s.connect(to).unwrap();
    s
}

/// A datagram there and back.
fn ask(s: &UdpSocket, size: usize) -> std::io::Result<()> {
    let mut buf = [0; 2048];
    let sent = vec![7; size];
    s.send(&sent)?;
    let n = s.recv(&mut buf)?;
    assert_eq!(buf[..n], sent);
    Ok(())
}

fn refused(s: &UdpSocket) -> bool {
    s.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let got = ask(s, 10);
    s.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    got.is_err()
}

const FILTER: &str = "table inet foreign {
    chain through { type filter hook forward priority filter; policy drop; }
}
";
const MASQUERADE: &str = "table inet foreign {
    chain out { type nat hook postrouting priority srcnat; oifname pod0 masquerade; }
}
";

#[test]
fn established_connections_go_past_the_stack() {
    let w = World::new();
    let home = Home::new(false);
    let dp = host_routing(&w, &home);
    let short = || dp.maps.counter(counters::SHORT);
    both_families(&w, false, bulk);
    let by_tcp = short();
    assert!(by_tcp > 20, "{by_tcp}");
    let flows = node_ports(true).map(|to| w.outside.run(move || socket(to)).join().unwrap());
    for s in &flows {
        (0..50).for_each(|_| ask(s, 700).unwrap());
    }
    // All but the first each way; the first two after the first may be on their way when the flow is noted.
    let by_udp = short() - by_tcp;
    assert!(by_udp >= 190, "{by_udp}");

    // Filters see how a connection begins, and nobody gets past them by asking again.
    rules(&w.node, FILTER);
    let before = short();
    for to in node_ports(true) {
        let s = w.outside.run(move || socket(to)).join().unwrap();
        assert!((0..4).all(|_| refused(&s)), "{to}");
    }
    for to in node_ports(false) {
        assert_eq!(w.outside.run(move || probe(false, to, 0)).join().unwrap(), "dropped", "{to}");
    }
    assert_eq!(short(), before);
    // They do not see what is established.
    flows.iter().for_each(|s| ask(s, 700).unwrap());
    output(&w.node, "nft delete table inet foreign");

    // Who is too old for the way on is told so by the stack.
    for (s, to) in flows.iter().zip(node_ports(true)) {
        let set = if to.is_ipv4() {
            s.set_ttl(1).unwrap();
            setsockopt(s, sockopt::Ipv4RecvErr, &true)
        } else {
            setsockopt(s, sockopt::Ipv6Ttl, &1).unwrap();
            setsockopt(s, sockopt::Ipv6RecvErr, &true)
        };
        set.unwrap();
        let error = ask(s, 10).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(113), "{to}: {error}");
    }
    // Without the setting everything takes the stack's way.
    let mut dp = dp;
    dp.maps.set_flags(LOOPBACK).unwrap();
    let before = dp.maps.counter(counters::SHORT);
    both_families(&w, false, bulk);
    assert_eq!(dp.maps.counter(counters::SHORT), before);
}

#[test]
fn narrow_ways_are_found_out_with_host_routing() {
    let w = World::new();
    let home = Home::new(false);
    let dp = host_routing(&w, &home);
    for route in TO_THE_CLIENT {
        w.node.ip(&format!("route replace {route} mtu lock {NARROW}"));
    }
    both_families(&w, false, bulk);
    assert!(dp.maps.counter(counters::SHORT) > 0);
    // A datagram that has to be cut is, by who sends it or by the node.
    for to in node_ports(true) {
        let s = w.outside.run(move || socket(to)).join().unwrap();
        ask(&s, 10).unwrap();
        let tries = (0..6).take_while(|_| ask(&s, NARROW as usize + 100).is_err()).count();
        assert!(tries < 6, "{to}");
    }
}

/// A connection whose addresses others change too is not ours alone: it goes on by the stack.
#[test]
fn connections_that_others_translate_stay_with_the_stack() {
    let w = World::new();
    let home = Home::new(false);
    let dp = host_routing(&w, &home);
    rules(&w.node, MASQUERADE);
    both_families(&w, false, bulk);
    for to in node_ports(true) {
        let s = w.outside.run(move || socket(to)).join().unwrap();
        (0..5).for_each(|_| ask(&s, 700).unwrap());
    }
    assert_eq!(dp.maps.counter(counters::SHORT), 0);
    output(&w.node, "nft delete table inet foreign");
    both_families(&w, false, bulk);
    assert!(dp.maps.counter(counters::SHORT) > 0);
}
