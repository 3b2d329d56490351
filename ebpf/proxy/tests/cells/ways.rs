//! What happens on the way to an answer: sizes, fragments, and the errors of routers.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use orlop_ebpf_common::{
    FrontendKey, SCOPE_EXTERNAL, TCP, Uplink, addr_from, config_flags, counters, uplink_flags,
};
use orlop_ebpf_loader::{Datapath, Maps, Op};
use orlop_proxy::desired::{Selection, desired};
use orlop_proxy::model::Model;
use orlop_proxy::tables::Tables;

use crate::ask::{probe, serve, serve_by};
use crate::world::*;
use crate::{Home, Kind, Ranges, Spec, State, program_with};

/// Larger than [`NARROW`] lets pass and smaller than what leaves every client.
const DATAGRAM: usize = 1440;
pub const NARROW: u32 = 1300;
const LONG: Duration = Duration::from_secs(10);

pub fn spec(state: State) -> Spec {
    Spec { number: 1, state, internal_local: false, external_local: false, ranges: Ranges::All }
}

/// Gives back what comes: a datagram as it is, a connection after its end.
pub fn echo(net: &Net, addresses: Both) {
    let connection = |mut s: TcpStream| {
        let mut all = Vec::new();
        if s.read_to_end(&mut all).is_ok() {
            let _ = s.write_all(&all);
        }
    };
    serve_by(net, addresses, connection, |said, _| said.to_vec());
}

/// Sends much and gets it back.
pub fn bulk(to: SocketAddr) -> Result<(), String> {
    let sent: Vec<u8> = (0..400_000u32).map(|i| (i % 251) as u8).collect();
    let go = || {
        let mut s = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
        s.set_read_timeout(Some(Duration::from_secs(10)))?;
        s.set_write_timeout(Some(Duration::from_secs(10)))?;
        s.write_all(&sent)?;
        s.shutdown(Shutdown::Write)?;
        let mut back = Vec::new();
        s.read_to_end(&mut back)?;
        Ok::<bool, std::io::Error>(back == sent)
    };
    match go() {
        Ok(true) => Ok(()),
        Ok(false) => Err("it came back changed".into()),
        Err(e) => Err(e.to_string()),
    }
}

/// Asks with a large datagram until the way's size is known. Returns how often it had to.
fn large_datagram(to: SocketAddr) -> Result<usize, String> {
    let any: IpAddr = if to.is_ipv4() { "0.0.0.0".parse().unwrap() } else { "::".parse().unwrap() };
    let s = UdpSocket::bind((any, 0)).unwrap();
    s.set_read_timeout(Some(Duration::from_millis(400))).unwrap();
    s.connect(to).unwrap();
    let mut last = String::new();
    for i in 1..=12 {
        let mut buf = [0; 2048];
        // EMSGSIZE or an error that came back is what is asked for; then the datagram goes in pieces.
        match s.send(&[i as u8; DATAGRAM]).and_then(|_| s.recv(&mut buf)) {
            Ok(DATAGRAM) => return Ok(i),
            Ok(n) => last = format!("{n} bytes"),
            Err(e) => last = e.to_string(),
        }
    }
    Err(last)
}

pub fn both_families(w: &World, udp: bool, ask: fn(SocketAddr) -> Result<(), String>) {
    for v in [0, 1] {
        let to = SocketAddr::new(NODE[v].parse().unwrap(), spec(State::RemoteOnly).node_port(udp));
        w.outside.run(move || ask(to)).join().unwrap().unwrap_or_else(|e| panic!("{to} udp={udp}: {e}"));
    }
}

/// A node port whose backend is on another node, where the node's routes to some place take less than the client and
/// the backend believe.
fn narrow_way(routes: [&str; 2], force_clsact: bool) {
    let w = World::new();
    let home = Home::new(force_clsact);
    echo(&w.other, REMOTE_POD);
    let dp = remote_only(&w, &home);
    for route in routes {
        w.node.ip(&format!("route replace {route} mtu lock {NARROW}"));
    }
    both_families(&w, false, bulk);
    assert!(dp.maps.counter(counters::TOO_BIG) > 0, "something was too big");
    assert!(dp.maps.counter(counters::ICMP_ERRORS) > 0, "and somebody was told");
    both_families(&w, true, |to| {
        let tries = large_datagram(to)?;
        // The size may be known from before; what had to be learned was learned at once.
        if tries <= 6 { Ok(()) } else { Err(format!("{tries} datagrams were needed")) }
    });
}

const TO_THE_OTHER: [&str; 2] = ["10.71.129.0/24 via 10.71.2.2", "fd71:129::/64 via fd71:2::2"];
pub const TO_THE_CLIENT: [&str; 2] = ["10.71.1.2/32 dev up0", "fd71:1::2/128 dev up0"];

#[test]
fn a_narrow_way_to_another_node_is_found_out() {
    narrow_way(TO_THE_OTHER, false);
}

#[test]
fn a_narrow_way_back_to_the_client_is_found_out() {
    narrow_way(TO_THE_CLIENT, false);
}

#[test]
fn narrow_ways_are_found_out_by_clsact() {
    narrow_way(TO_THE_OTHER, true);
}

/// The programs, and a Service whose only backend is on another node.
fn remote_only(w: &World, home: &Home) -> orlop_ebpf_loader::Datapath {
    program_with(w, &home.config, |model| {
        let s = spec(State::RemoteOnly);
        model.set_service(&s.name(), Some(s.service()));
        for v4 in [true, false] {
            model.set_slice(&format!("{}-{v4}", s.name()), Some(s.slice(v4)));
        }
    })
}

/// Two interfaces whose drivers take XDP programs, with peers that do what a card does.
#[test]
fn drivers_send_known_connections_on() {
    let w = World::new();
    let mut home = Home::new(false);
    home.config.xdp = vec!["up0".into(), "up1".into()];
    echo(&w.other, REMOTE_POD);
    for net in [&w.outside, &w.other] {
        net.run(|| crate::wire::like_a_card("eth0")).join().unwrap();
    }
    let dp = remote_only(&w, &home);
    let served: Vec<_> =
        dp.maps.uplinks().into_iter().filter(|(_, u)| u.flags & uplink_flags::XDP != 0).collect();
    assert_eq!(served.len(), 2, "veth's driver takes the program");
    both_families(&w, false, bulk);
    let by_tcp = dp.maps.counter(counters::XDP);
    assert!(by_tcp > 100, "{by_tcp} packets went the short way");
    both_families(&w, true, |to| {
        let s = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
        s.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        s.connect(to).unwrap();
        for i in 0..50 {
            let mut buf = [0; 2048];
            let n = s.send(&[i; 700]).and_then(|_| s.recv(&mut buf)).map_err(|e| e.to_string())?;
            if buf[..n] != [i; 700] {
                return Err("it came back changed".into());
            }
        }
        Ok(())
    });
    assert!(dp.maps.counter(counters::XDP) >= by_tcp + 150, "datagrams too");

    // Who is larger than the way goes up and is told, as before.
    for route in TO_THE_OTHER {
        w.node.ip(&format!("route replace {route} mtu lock {NARROW}"));
    }
    both_families(&w, false, bulk);
    assert!(dp.maps.counter(counters::TOO_BIG) > 0);
    drop(dp);

    // Without the setting the drivers' programs go.
    home.config.xdp.clear();
    let dp = remote_only(&w, &home);
    assert!(dp.maps.uplinks().iter().all(|(_, u)| u.flags & uplink_flags::XDP == 0));
    let before = dp.maps.counter(counters::XDP);
    both_families(&w, false, bulk);
    assert_eq!(dp.maps.counter(counters::XDP), before);
}

/// The other node runs the programs too, and has a way of its own to the client.
pub fn two_nodes(w: &World, home: &Home, elsewhere: &Home) -> [Datapath; 2] {
    w.other.ip(&format!("link add away type veth peer name eth1 netns {}", w.outside.0));
    for (net, own, dev) in [
        (&w.other, ["10.71.3.1/24", "fd71:3::1/64"], "away"),
        (&w.outside, ["10.71.3.2/24", "fd71:3::2/64"], "eth1"),
    ] {
        for name in ["all", "default", dev, "eth0"] {
            net.sysctl(&format!("net/ipv4/conf/{name}/rp_filter"), "0");
        }
        own.iter().for_each(|a| net.ip(&format!("addr add {a} dev {dev}")));
        net.ip(&format!("link set {dev} up"));
    }
    w.other.ip("route add 10.71.1.2/32 via 10.71.3.2");
    w.other.ip("route add fd71:1::2/128 via fd71:3::2");
    let here = remote_only(w, home);
    let config = elsewhere.config.clone();
    let there = w
        .other
        .run(move || {
            let mut dp = Datapath::open(&config).unwrap();
            for (name, own) in [("eth0", OTHER), ("away", ["10.71.3.1", "fd71:3::1"])] {
                let [addr4, addr6] = own.map(|a| addr_from(a.parse().unwrap()));
                let index = nix::net::if_::if_nametoindex(name).unwrap();
                let uplink = Uplink { addr4, addr6, l3_offset: 14, ..Uplink::default() };
                dp.attach_uplink(index, name, uplink).unwrap();
            }
            let (mut tables, mut model) = (Tables::default(), Model::default());
            let s = spec(State::RemoteOnly);
            model.set_service(&s.name(), Some(s.service()));
            for v4 in [true, false] {
                let mut slice = s.slice(v4);
                slice.endpoints.iter_mut().for_each(|e| e.local = true);
                model.set_slice(&format!("{}-{v4}", s.name()), Some(slice));
            }
            for name in model.take_dirty() {
                tables.sync(&mut dp.maps, &name, &desired(&model, &name, Selection::Maglev)).unwrap();
            }
            dp
        })
        .join()
        .unwrap();
    [here, there]
}

#[test]
fn backends_on_other_nodes_answer_clients_themselves() {
    let w = World::new();
    let (home, elsewhere) = (Home::new(false), Home::new(false));
    serve(&w.other, "remote", REMOTE_POD);
    let [mut dp, mut there] = two_nodes(&w, &home, &elsewhere);
    let s = spec(State::RemoteOnly);
    let ask = |udp: bool| {
        let mut seen = Vec::new();
        for v in [0, 1] {
            for kind in [Kind::NodePort, Kind::LoadBalancer] {
                let to = match kind {
                    Kind::NodePort => SocketAddr::new(NODE[v].parse().unwrap(), s.node_port(udp)),
                    _ => SocketAddr::new(s.ip(kind, v == 0), 80),
                };
                let got = w.outside.run(move || probe(udp, to, 1)).join().unwrap();
                seen.push(got.strip_prefix("remote ").unwrap_or(&got).to_owned());
            }
        }
        seen
    };
    let by_us: Vec<&str> = [0, 1].iter().flat_map(|v| [NODE_TO_OTHER[*v]; 2]).collect();
    let by_itself: Vec<&str> = [0, 1].iter().flat_map(|v| [OUTSIDE[*v]; 2]).collect();
    assert_eq!(ask(false), by_us, "off by default");
    for dp in [&mut dp, &mut there] {
        dp.maps.set_flags(config_flags::DIRECT).unwrap();
    }
    assert_eq!(ask(false), by_itself);
    // A SYN that is sent again is counted again.
    assert!(there.maps.counter(counters::DIRECT) >= 4);
    assert_eq!(ask(true), by_us, "datagrams go by this node");

    // A name that is no Service's is nobody's, whoever says it.
    there
        .maps
        .apply(&Op::DelFrontend(FrontendKey {
            addr: addr_from(s.ip(Kind::LoadBalancer, true)),
            port: 80,
            proto: TCP,
            scope: SCOPE_EXTERNAL,
        }))
        .unwrap();
    let to = SocketAddr::new(s.ip(Kind::LoadBalancer, true), 80);
    assert_eq!(w.outside.run(move || probe(false, to, 0)).join().unwrap(), "dropped");
}

/// Many connections of one client go to one backend, until it has been silent for long enough.
#[test]
fn affinity_ends_after_its_time() {
    let w = World::new();
    let home = Home::new(false);
    serve(&w.pod, "pod", POD);
    serve(&w.other, "remote", REMOTE_POD);
    let _dp = program_with(&w, &home.config, |model| {
        let s = spec(State::Both);
        model
            .set_service(&s.name(), Some(orlop_proxy::model::Service { affinity_seconds: 2, ..s.service() }));
        for v4 in [true, false] {
            model.set_slice(&format!("{}-{v4}", s.name()), Some(s.slice(v4)));
        }
    });
    let watched = [0, 1].map(|v| {
        let to = SocketAddr::new(NODE[v].parse().unwrap(), spec(State::Both).node_port(false));
        w.outside.run(move || {
            let mut last = probe(false, to, 1);
            for i in 0..30 {
                let begin = std::time::Instant::now();
                let now = probe(false, to, 1);
                // A machine that was busy for so long says nothing about affinity.
                if begin.elapsed() < Duration::from_secs(1) {
                    assert_eq!(now, last, "connection {i}");
                }
                last = now;
            }
            for _ in 0..16 {
                std::thread::sleep(Duration::from_millis(2100));
                if probe(false, to, 1) != last {
                    return;
                }
            }
            panic!("{to}: always {last}");
        })
    });
    watched.into_iter().for_each(|t| t.join().unwrap());
}

/// Brings the Service to these endpoints, as after a restart: from what the maps hold.
fn now(dp: &mut Datapath, state: State, affinity_seconds: u32) {
    let mut tables = Tables::adopt(dp.maps.dump().unwrap());
    let (mut model, s) = (Model::default(), spec(state));
    model.set_service(&s.name(), Some(orlop_proxy::model::Service { affinity_seconds, ..s.service() }));
    for v4 in [true, false] {
        model.set_slice(&format!("{}-{v4}", s.name()), Some(s.slice(v4)));
    }
    for name in model.take_dirty() {
        tables.sync(&mut dp.maps, &name, &desired(&model, &name, Selection::Maglev)).unwrap();
    }
}

/// A client whose backend goes is led to another one, and stays with that when the first one comes back.
#[test]
fn affinity_leaves_a_lost_backend() {
    let w = World::new();
    let home = Home::new(false);
    serve(&w.pod, "pod", POD);
    serve(&w.other, "remote", REMOTE_POD);
    let mut dp = program_with(&w, &home.config, |_| ());
    for v in [0, 1] {
        for udp in [false, true] {
            let to = SocketAddr::new(NODE[v].parse().unwrap(), spec(State::Both).node_port(udp));
            let ask = || w.outside.run(move || probe(udp, to, 1)).join().unwrap();
            now(&mut dp, State::Both, 600);
            let first = ask();
            let left = if first.starts_with("pod ") { State::RemoteOnly } else { State::LocalOnly };
            now(&mut dp, left, 600);
            let second = ask();
            assert!(
                second != first && (second.starts_with("pod ") || second.starts_with("remote ")),
                "{second}"
            );
            now(&mut dp, State::Both, 600);
            for _ in 0..10 {
                assert_eq!(ask(), second, "{to} udp={udp}");
            }
        }
    }
}

/// Packets with headers between IPv6's and the transport's are translated like others, and so are errors about them.
#[test]
fn packets_with_extension_headers_are_translated() {
    let w = World::new();
    for (state, net, own) in [(State::LocalOnly, &w.pod, POD), (State::RemoteOnly, &w.other, REMOTE_POD)] {
        let home = Home::new(false);
        let mut dp = program_with(&w, &home.config, |_| ());
        now(&mut dp, state, 0);
        let to = SocketAddr::new(NODE[1].parse().unwrap(), spec(state).node_port(true));
        let ask = |bytes: usize| {
            let asked = w.outside.run(move || {
                let s = UdpSocket::bind("[::]:0").unwrap();
                crate::wire::set_options(s.as_raw_fd(), false, bytes);
                s.set_read_timeout(Some(LONG)).unwrap();
                s.connect(to).unwrap();
                s.send(b"?").and_then(|_| s.recv(&mut [0; 8])).map_err(|e| e.kind())
            });
            asked.join().unwrap()
        };
        for bytes in [0, 8] {
            assert_eq!(ask(bytes), Err(std::io::ErrorKind::ConnectionRefused), "{to} {bytes}");
        }
        echo(net, own);
        for bytes in [0, 8] {
            assert_eq!(ask(bytes), Ok(1), "{to} {bytes}");
        }
        drop(dp);
    }
}

/// One client's datagrams from one port: they move when their backend goes, at once, and only then.
#[test]
fn datagrams_leave_a_lost_backend() {
    let w = World::new();
    let home = Home::new(false);
    serve(&w.pod, "pod", POD);
    serve(&w.other, "remote", REMOTE_POD);
    let mut dp = program_with(&w, &home.config, |_| ());
    let mut now = |state| now(&mut dp, state, 0);
    let sockets = [0, 1].map(|v| {
        let to = SocketAddr::new(NODE[v].parse().unwrap(), spec(State::Both).node_port(true));
        let connect = move || {
            let s = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
            s.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            s.connect(to).unwrap();
            s
        };
        w.outside.run(connect).join().unwrap()
    });
    let ask = |s: &UdpSocket| {
        let mut buf = [0; 64];
        let n = s.send(b"?").and_then(|_| s.recv(&mut buf)).map_err(|e| e.kind())?;
        Ok::<String, std::io::ErrorKind>(String::from_utf8_lossy(&buf[..n]).into_owned())
    };
    let all = |expected: &dyn Fn(usize) -> Result<String, std::io::ErrorKind>, what: &str| {
        for _ in 0..5 {
            for (v, s) in sockets.iter().enumerate() {
                assert_eq!(ask(s), expected(v), "{what}");
            }
        }
    };
    now(State::LocalOnly);
    all(&|v| Ok(format!("pod {}", OUTSIDE[v])), "one backend");
    now(State::Both);
    all(&|v| Ok(format!("pod {}", OUTSIDE[v])), "another one comes");
    now(State::RemoteOnly);
    all(&|v| Ok(format!("remote {}", NODE_TO_OTHER[v])), "the first one is gone");
    now(State::Both);
    all(&|v| Ok(format!("remote {}", NODE_TO_OTHER[v])), "it comes back");
    now(State::Nobody);
    all(&|_| Err(std::io::ErrorKind::ConnectionRefused), "nobody");
    now(State::LocalOnly);
    all(&|v| Ok(format!("pod {}", OUTSIDE[v])), "somebody again");
}

/// What may be cut on its way to another node and does not fit is dropped and counted, as its pieces could not be told apart there; a
/// piece that comes before the first one of its datagram is counted and left as it is.
#[test]
fn pieces_are_dropped_or_counted() {
    let w = World::new();
    let home = Home::new(false);
    echo(&w.other, REMOTE_POD);
    let dp = remote_only(&w, &home);
    w.node.ip(&format!("route replace {} mtu lock {NARROW}", TO_THE_OTHER[0]));
    let to = SocketAddr::new(NODE[0].parse().unwrap(), spec(State::RemoteOnly).node_port(true));
    let before = (dp.maps.counter(counters::TOO_BIG), dp.maps.counter(counters::PACKET_DROPPED));
    let ask = move |size: usize| {
        let s = UdpSocket::bind("0.0.0.0:0").unwrap();
        crate::wire::may_be_cut(s.as_raw_fd());
        s.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        s.connect(to).unwrap();
        s.send(&vec![1; size]).unwrap();
        s.recv(&mut [0; 2048])
    };
    assert!(w.outside.run(move || ask(DATAGRAM)).join().unwrap().is_err());
    assert_eq!(dp.maps.counter(counters::TOO_BIG), before.0 + 1);
    assert_eq!(dp.maps.counter(counters::PACKET_DROPPED), before.1 + 1);

    assert_eq!(dp.maps.counter(counters::FRAGMENTS), 0);
    let node = crate::fuzz::mac(&w.node, "up0");
    for v in [0, 1] {
        let frame = later_piece(node, OUTSIDE[v].parse().unwrap(), NODE[v].parse().unwrap());
        w.outside.run(move || crate::wire::Wire::open("eth0").send(&frame)).join().unwrap();
        let begin = std::time::Instant::now();
        while dp.maps.counter(counters::FRAGMENTS) <= v as u64 {
            assert!(begin.elapsed() < Duration::from_secs(30), "family {v} is not counted");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The second fragment of a datagram, in a frame.
fn later_piece(to: [u8; 6], from: IpAddr, node: IpAddr) -> Vec<u8> {
    const UDP: u8 = 17;
    let mut f = to.to_vec();
    f.extend([2, 0, 0, 0, 9, 9]);
    match (from, node) {
        (IpAddr::V4(from), IpAddr::V4(node)) => {
            f.extend([0x08, 0x00]);
            let mut ip = vec![0x45, 0, 0, 28, 0, 7, 0, 100, 64, UDP, 0, 0];
            ip.extend(from.octets());
            ip.extend(node.octets());
            let sum = crate::fuzz::checksum(&ip).to_be_bytes();
            ip[10..12].copy_from_slice(&sum);
            f.extend(ip);
        }
        (IpAddr::V6(from), IpAddr::V6(node)) => {
            f.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 16, 44, 64]);
            f.extend(from.octets());
            f.extend(node.octets());
            f.extend([UDP, 0, 3, 32, 0, 0, 0, 7]);
        }
        _ => panic!("{from} and {node} are of two families"),
    }
    f.extend([0; 8]);
    f
}
