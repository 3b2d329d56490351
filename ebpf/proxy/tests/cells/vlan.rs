//! Interfaces of VLANs, towards clients and towards other nodes: served themselves, beside the one that they are on, or not at all.
//! The kernel that runs these tests may not have them; the end-to-end tests run this one on another.

use std::io::Write;
use std::net::TcpListener;

use crate::ask::probe;
use crate::ways::{bulk, echo};
use crate::world::*;
use crate::*;

/// Addresses of the node on the VLAN to the client, and the client's; the same to the other node.
const TO_CLIENT: [Both; 2] = [["10.71.8.1", "fd71:8::1"], ["10.71.8.2", "fd71:8::2"]];
const TO_OTHER: [Both; 2] = [["10.71.9.1", "fd71:9::1"], ["10.71.9.2", "fd71:9::2"]];

/// Whose programs there are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Served {
    Vlans,
    Parents,
    All,
}

fn vlan(ends: [(&Net, &str); 2], name: &str, id: u16, addresses: [Both; 2]) {
    for ((net, parent), own) in ends.into_iter().zip(addresses) {
        net.ip(&format!("link add link {parent} name {name} type vlan id {id}"));
        for (addr, bits) in own.iter().zip([24, 64]) {
            net.ip(&format!("addr add {addr}/{bits} dev {name}"));
        }
        net.ip(&format!("link set {name} up"));
    }
}

/// The node itself, at a node port.
fn own_server(node: &Net, at: SocketAddr) {
    let l = node.run(move || TcpListener::bind(at).unwrap()).join().unwrap();
    thread::spawn(move || {
        for mut s in l.incoming().flatten() {
            let _ = s.write_all(b"its own");
        }
    });
}

fn with(state: State) -> Spec {
    specs().into_iter().find(|s| s.state == state).unwrap()
}

fn by_vlans(served: Served) {
    let w = World::new();
    let home = Home::new(false);
    serve(&w.pod, "pod", POD);
    echo(&w.other, REMOTE_POD);
    vlan([(&w.node, "up0"), (&w.outside, "eth0")], "v8", 8, TO_CLIENT);
    vlan([(&w.node, "up1"), (&w.other, "eth0")], "v9", 9, TO_OTHER);
    if served != Served::Parents {
        for (range, hop) in ["10.71.129.0/24", "fd71:129::/64"].iter().zip(TO_OTHER[1]) {
            w.node.ip(&format!("route replace {range} via {hop}"));
        }
    }
    let mut dp = program(&w, &home.config);
    let dp = w.node.run(move || {
        let index = |name: &str| nix::net::if_::if_nametoindex(name).unwrap();
        for (name, own) in [("v8", TO_CLIENT[0]), ("v9", TO_OTHER[0])] {
            let [addr4, addr6] = own.map(|a| addr_from(a.parse().unwrap()));
            if served != Served::Parents {
                let uplink = Uplink { addr4, addr6, l3_offset: 14, flags: 0 };
                dp.attach_uplink(index(name), name, uplink).unwrap();
            }
            for a in [addr4, addr6] {
                dp.maps.apply(&Op::PutLocal(a, local_flags::NODE_PORT)).unwrap();
            }
        }
        if served == Served::Vlans {
            dp.keep_uplinks(&["v8", "v9", "pod0", "pod1"].map(index)).unwrap();
        }
        dp
    });
    let dp = dp.join().unwrap();
    for own in [TO_CLIENT[0], NODE] {
        own.iter().for_each(|a| {
            own_server(&w.node, SocketAddr::new(a.parse().unwrap(), with(State::LocalOnly).node_port(false)))
        });
    }
    // Tags beside the frames, as drivers have them, and within.
    for within in [false, true] {
        if within {
            for (net, name) in [(&w.node, "up0"), (&w.node, "up1"), (&w.outside, "eth0"), (&w.other, "eth0")]
            {
                net.run(move || crate::wire::tags_in_frames(name)).join().unwrap();
            }
        }
        answers(&w, served, &format!("{served:?}, tags within: {within}"));
    }
    let translated = dp.maps.counter(counters::PACKET_CONNECTIONS);
    assert!(translated > 0);
}

fn answers(w: &World, served: Served, what: &str) {
    let ask = |udp: bool, to: SocketAddr| w.outside.run(move || probe(udp, to, 1)).join().unwrap();
    for v in [0, 1] {
        // By the VLAN and beside it. A pod here sees the client, by whatever name it was asked.
        for (own, client, with_us) in [
            (TO_CLIENT[0], TO_CLIENT[1], served != Served::Parents),
            (NODE, OUTSIDE, served != Served::Vlans),
        ] {
            let at = |state, udp| SocketAddr::new(own[v].parse().unwrap(), with(state).node_port(udp));
            if !with_us {
                assert_eq!(ask(false, at(State::LocalOnly, false)), "its own", "{what}");
                continue;
            }
            for udp in [false, true] {
                let external = SocketAddr::new(with(State::LocalOnly).ip(ExternalIp, v == 0), 80);
                w.outside.ip(&format!("route replace {} via {}", external.ip(), own[v]));
                for to in [at(State::LocalOnly, udp), external] {
                    assert_eq!(ask(udp, to), format!("pod {}", client[v]), "{what}: {to} udp={udp}");
                }
                let to = at(State::Nobody, udp);
                assert_eq!(ask(udp, to), "refused", "{what}: {to} udp={udp}");
            }
            let to = at(State::RemoteOnly, false);
            let all = w.outside.run(move || bulk(to)).join().unwrap();
            all.unwrap_or_else(|e| panic!("{what}: {to}: {e}"));
        }
    }
}

#[test]
#[ignore = "needs the module 8021q; test-vms/tests/qemu_packets.rs runs it on Linux 6.1"]
fn vlans_are_served_themselves() {
    by_vlans(Served::Vlans);
}

#[test]
#[ignore = "needs the module 8021q; test-vms/tests/qemu_packets.rs runs it on Linux 6.1"]
fn vlans_are_served_beside_what_they_are_on() {
    by_vlans(Served::All);
}

#[test]
#[ignore = "needs the module 8021q; test-vms/tests/qemu_packets.rs runs it on Linux 6.1"]
fn vlans_that_are_not_served_are_left_alone() {
    by_vlans(Served::Parents);
}
