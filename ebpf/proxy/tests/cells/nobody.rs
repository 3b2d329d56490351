//! What is for no Service: addresses of the Service range that none has, and packets that are refused though they are not plain.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use orlop_ebpf_common::counters;
use orlop_proxy::tables::Tables;

use crate::ask::{probe, serve};
use crate::wire::set_options;
use crate::world::*;
use crate::*;

/// Somebody else's translation of [`NOBODYS`] to [`OUTSIDE`].
const OTHERS_RULES: &str = "
table ip other {
    chain pre { type nat hook prerouting priority -100; ip daddr 10.71.96.200 dnat to 10.71.1.2; }
}
table ip6 other {
    chain pre { type nat hook prerouting priority -100; ip6 daddr fd71:96::c8 dnat to fd71:1::2; }
}
";

/// The same question with the rule and without it, and by those who may be asked by it: who answers for himself.
#[test]
fn addresses_of_no_service_are_dropped_where_packets_leave() {
    let w = World::new();
    let home = Home::new(false);
    serve(&w.outside, "nobody", NOBODYS);
    serve(&w.outside, "outside", OUTSIDE);
    let mut dp = program_with(&w, &home.config, |_| ());
    let mut tables = Tables::adopt(dp.maps.dump().unwrap());
    let ask = |addresses: Both, want: usize, port: u16| {
        let mut asked = Vec::new();
        for place in PLACES.into_iter().filter(|p| *p != Outside && !covered(*p) || *p == Host) {
            for (i, address) in addresses.into_iter().enumerate() {
                for udp in [false, true].into_iter().filter(|udp| port != 0 || !udp) {
                    let to = SocketAddr::new(address.parse().unwrap(), port);
                    let source = source(place, "outside", i);
                    asked.push((source, netns(&w, place).run(move || probe(udp, to, want))));
                }
            }
        }
        let answers = asked.into_iter().map(|(source, t)| (source, t.join().unwrap()));
        answers.map(|(source, a)| (source, normal(&a).join(", "))).collect::<Vec<_>>()
    };
    let all_answered = |name: &str, answers: Vec<(String, String)>| {
        for (source, answer) in answers {
            assert_eq!(answer, format!("{name} {source}"));
        }
    };
    let dropped = |dp: &Datapath| dp.maps.counter(counters::UNALLOCATED);
    assert_eq!(dropped(&dp), 0);
    for answer in ask(NOBODYS, 0, BACKEND_PORT).into_iter().chain(ask(NOBODYS, 0, 0)) {
        assert_eq!(answer.1, "dropped");
    }
    assert!(dropped(&dp) >= 24, "{}", dropped(&dp));
    let before = dropped(&dp);
    all_answered("outside", ask(OUTSIDE, 1, BACKEND_PORT));

    tables.sync_service_range(&mut dp.maps, &[]).unwrap();
    all_answered("nobody", ask(NOBODYS, 1, BACKEND_PORT));
    assert_eq!(dropped(&dp), before);

    // A connection that is there goes on when the rule comes, as with kube-proxy's.
    let pairs = NOBODYS.map(|address| {
        let to: SocketAddr = SocketAddr::new(address.parse().unwrap(), 8090);
        let listener = w.outside.run(move || TcpListener::bind(to).unwrap()).join().unwrap();
        let connect = move || TcpStream::connect_timeout(&to, Duration::from_secs(30)).unwrap();
        let client = w.pod.run(connect).join().unwrap();
        (client, listener.accept().unwrap().0)
    });
    tables.sync_service_range(&mut dp.maps, &service_ranges()).unwrap();
    for (mut client, mut server) in pairs {
        client.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        server.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut byte = [0];
        client.write_all(b"a").unwrap();
        server.read_exact(&mut byte).unwrap();
        server.write_all(&byte).unwrap();
        client.read_exact(&mut byte).unwrap();
    }
    assert_eq!(ask(NOBODYS, 0, BACKEND_PORT)[0].1, "dropped");

    // What is translated by other means before it leaves is nobody's business.
    crate::beside::rules(&w.node, OTHERS_RULES);
    for (i, address) in NOBODYS.into_iter().enumerate() {
        for udp in [false, true] {
            let to = SocketAddr::new(address.parse().unwrap(), BACKEND_PORT);
            let answer = w.pod.run(move || probe(udp, to, 1)).join().unwrap();
            assert_eq!(answer, format!("outside {}", POD[i]));
        }
    }
}

/// A datagram of the node's own with IP options, to a port of a ClusterIP that is no Service's.
#[test]
fn packets_with_options_are_refused_too() {
    let w = World::new();
    let home = Home::new(false);
    let dp = program(&w, &home.config);
    for v in [0, 1] {
        let to = SocketAddr::new(specs()[0].ip(UnusedPort, v == 0), 81);
        for bytes in [0, 8, 24, 40].into_iter().filter(|n| v == 0 || *n <= 32) {
            let before = dp.maps.counter(counters::PACKET_REFUSED);
            let refused = w.node.run(move || {
                let s = UdpSocket::bind(if v == 0 { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
                set_options(s.as_fd().as_raw_fd(), v == 0, bytes);
                s.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
                s.connect(to).unwrap();
                s.send(b"?").and_then(|_| s.recv(&mut [0; 8])).unwrap_err().kind()
            });
            assert_eq!(refused.join().unwrap(), std::io::ErrorKind::ConnectionRefused, "{to} {bytes}");
            assert_eq!(dp.maps.counter(counters::PACKET_REFUSED), before + 1);
        }
    }

    // Of one in fragments the first is answered, and it counts once.
    let to = SocketAddr::new(specs()[0].ip(UnusedPort, true), 81);
    let before = (dp.maps.counter(counters::PACKET_REFUSED), dp.maps.counter(counters::PACKET_DROPPED));
    let refused = w.node.run(move || {
        let s = UdpSocket::bind("0.0.0.0:0").unwrap();
        s.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        s.connect(to).unwrap();
        s.send(&[0; 4000]).and_then(|_| s.recv(&mut [0; 8])).unwrap_err().kind()
    });
    assert_eq!(refused.join().unwrap(), std::io::ErrorKind::ConnectionRefused);
    assert_eq!(dp.maps.counter(counters::PACKET_REFUSED), before.0 + 1);
    // Told of the second one, the sender's stack may keep the third.
    assert!(dp.maps.counter(counters::PACKET_DROPPED) > before.1, "later fragments");
}

/// What sockets have sent that no program of theirs has translated: of processes outside of the cgroup, or connected before the
/// Service was known. Its owner is told at once and does not wait for an answer that the default route will never bring.
#[test]
fn what_leaves_the_node_for_a_cluster_ip_is_refused() {
    let w = World::new();
    let home = Home::new(false);
    serve(&w.outside, "nobody", NOBODYS);
    let mut dp = program_with(&w, &home.config, |_| ());
    // While it is nobody's there is a connection, by the default route.
    let mut tables = Tables::adopt(dp.maps.dump().unwrap());
    tables.sync_service_range(&mut dp.maps, &[]).unwrap();
    let sockets = NOBODYS.map(|address| {
        let to: SocketAddr = SocketAddr::new(address.parse().unwrap(), BACKEND_PORT);
        let connect = move || {
            let s = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
            s.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            s.connect(to).unwrap();
            s.send(b"?").and_then(|_| s.recv(&mut [0; 64])).unwrap();
            s
        };
        (to, w.node.run(connect).join().unwrap())
    });
    let mut model = Model::default();
    let mut service = specs()[0].service();
    service.cluster_ips = NOBODYS.map(|a| a.parse().unwrap()).to_vec();
    for port in &mut service.ports {
        port.port = BACKEND_PORT;
    }
    model.set_service("cells/late", Some(service));
    for name in model.take_dirty() {
        tables.sync(&mut dp.maps, &name, &desired(&model, &name, Selection::Maglev)).unwrap();
    }
    for (to, socket) in sockets {
        let lost = socket.send(b"?").and_then(|_| socket.recv(&mut [0; 64])).unwrap_err();
        assert_eq!(lost.kind(), std::io::ErrorKind::ConnectionRefused, "{to}");
        for udp in [false, true] {
            assert_eq!(w.node.run(move || probe(udp, to, 1)).join().unwrap(), "refused", "{to} udp={udp}");
        }
    }
}
