//! Which source a backend sees and for how long a connection keeps it: ports of the node's towards other nodes, and the
//! names of answers where one client reaches one backend by several ways.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use aya::maps::{HashMap, Map, MapData};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket, sockopt,
};
use orlop_ebpf_common::{
    CtKey, CtValue, LAYOUT, TCP, UDP, addr_from, config_flags, counters, ct_dir, ct_flags,
};
use orlop_ebpf_loader::{Datapath, Maps};
use orlop_proxy::desired::{Selection, desired};
use orlop_proxy::model::Model;
use orlop_proxy::tables::Tables;

use crate::ways::two_nodes;
use crate::world::*;
use crate::{Home, Kind, Ranges, Spec, State, program_with};

const PATIENCE: Duration = Duration::from_secs(20);
/// More than there are source ports on a node whose sockets may have most of them.
const MANY: usize = 1_300;

fn spec(state: State) -> Spec {
    Spec { number: 1, state, internal_local: false, external_local: false, ranges: Ranges::All }
}

fn programs(w: &World, home: &Home, state: State) -> Datapath {
    program_with(w, &home.config, move |model| {
        let s = spec(state);
        model.set_service(&s.name(), Some(s.service()));
        for v4 in [true, false] {
            model.set_slice(&format!("{}-{v4}", s.name()), Some(s.slice(v4)));
        }
    })
}

/// The node has about a thousand ports for translated sources.
fn few_ports(w: &World) {
    w.node.sysctl("net/ipv4/ip_local_port_range", "33000 64500");
}

fn node_port(udp: bool) -> SocketAddr {
    SocketAddr::new(NODE[0].parse().unwrap(), spec(State::Both).node_port(udp))
}

/// Says which peer it sees and holds the connection until its end; of datagrams it says the same.
pub fn hold(net: &Net, address: &'static str) {
    let at = SocketAddr::new(address.parse().unwrap(), BACKEND_PORT);
    let (tell, ready) = std::sync::mpsc::channel();
    let told = tell.clone();
    net.run(move || {
        let family = if at.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        setsockopt(&fd, sockopt::ReuseAddr, &true).unwrap();
        bind(fd.as_raw_fd(), &SockaddrStorage::from(at)).unwrap();
        // Many come at once.
        listen(&fd, Backlog::new(4096).unwrap()).unwrap();
        let l = TcpListener::from(fd);
        told.send(()).unwrap();
        for mut s in l.incoming().flatten() {
            let Ok(peer) = s.peer_addr() else { continue };
            std::thread::spawn(move || {
                let _ = writeln!(s, "{peer}");
                let mut buf = [0; 256];
                while let Ok(n @ 1..) = s.read(&mut buf) {
                    if s.write_all(&buf[..n]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    net.run(move || {
        let s = UdpSocket::bind(at).unwrap();
        tell.send(()).unwrap();
        let mut buf = [0; 256];
        while let Ok((_, from)) = s.recv_from(&mut buf) {
            let _ = s.send_to(from.to_string().as_bytes(), from);
        }
    });
    ready.recv().unwrap();
    ready.recv().unwrap();
}

/// The source that the backend sees.
pub fn seen(s: &mut TcpStream) -> SocketAddr {
    let (mut text, mut byte) = (String::new(), [0]);
    while byte != *b"\n" {
        s.read_exact(&mut byte).unwrap();
        text.push(byte[0] as char);
    }
    text.trim().parse().unwrap()
}

pub fn echoes(s: &mut TcpStream, text: &[u8]) {
    let mut back = vec![0; text.len()];
    s.write_all(text).unwrap();
    s.read_exact(&mut back).unwrap();
    assert_eq!(back, text);
}

/// Ends a connection as load balancers' checks do, and at once: closing does nothing as long as a program that another
/// test is starting has a copy of the descriptor.
fn reset(s: TcpStream) {
    let nobody = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    // SAFETY: an address of the size that is given.
    let done = unsafe { libc::connect(s.as_raw_fd(), &nobody, size_of_val(&nobody) as u32) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// The connections' table, as the programs have it.
pub fn connections(home: &Home) -> HashMap<MapData, CtKey, CtValue> {
    table(home, "CONNECTIONS")
}

/// The one of datagrams.
pub fn datagrams(home: &Home) -> HashMap<MapData, CtKey, CtValue> {
    table(home, "DATAGRAMS")
}

fn table(home: &Home, name: &str) -> HashMap<MapData, CtKey, CtValue> {
    let pin = home.config.pins.join(format!("v{LAYOUT}/{name}"));
    HashMap::try_from(Map::LruHashMap(MapData::from_pin(pin).unwrap())).unwrap()
}

/// Changes entries of datagrams: what takes hours otherwise.
fn change(home: &Home, mut by: impl FnMut(&CtKey, &mut CtValue)) -> Vec<(CtKey, CtValue)> {
    let mut table = datagrams(home);
    let mut all: Vec<(CtKey, CtValue)> = table.iter().map(Result::unwrap).collect();
    for (k, v) in &mut all {
        by(k, v);
        table.insert(*k, *v, 0).unwrap();
    }
    all
}

#[test]
fn reset_connections_give_their_source_ports_back() {
    let w = World::new();
    let home = Home::new(false);
    few_ports(&w);
    hold(&w.other, REMOTE_POD[0]);
    let dp = programs(&w, &home, State::RemoteOnly);
    w.outside
        .run(|| {
            for i in 0..MANY {
                let s = TcpStream::connect_timeout(&node_port(false), PATIENCE);
                reset(s.unwrap_or_else(|e| panic!("connection {i}: {e}")));
            }
        })
        .join()
        .unwrap();
    assert_eq!(dp.maps.counter(counters::SNAT_EXHAUSTED), 0);
}

#[test]
fn connections_that_never_began_do_not_keep_source_ports() {
    let w = World::new();
    let home = Home::new(false);
    few_ports(&w);
    hold(&w.other, REMOTE_POD[0]);
    let dp = programs(&w, &home, State::RemoteOnly);
    // Established before, and silent since: not what goes.
    let mut kept =
        w.outside.run(|| TcpStream::connect_timeout(&node_port(false), PATIENCE).unwrap()).join().unwrap();
    let source = seen(&mut kept);
    w.other.ip(&format!("route add blackhole {}/32", NODE_TO_OTHER[0]));
    w.outside
        .run(|| {
            for _ in 0..MANY {
                TcpStream::connect_timeout(&node_port(false), Duration::from_millis(1)).unwrap_err();
            }
        })
        .join()
        .unwrap();
    w.other.ip(&format!("route del blackhole {}/32", NODE_TO_OTHER[0]));
    let mut after =
        w.outside.run(|| TcpStream::connect_timeout(&node_port(false), PATIENCE).unwrap()).join().unwrap();
    after.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_ne!(seen(&mut after), source);
    assert_eq!(dp.maps.counter(counters::SNAT_EXHAUSTED), 0);
    kept.set_read_timeout(Some(PATIENCE)).unwrap();
    echoes(&mut kept, b"still here");
}

/// The known trap: two names of one backend, asked from one port of one client. The backend cannot tell the two by the
/// client's address, so one gets another source; both have their answers by the name that was asked.
#[test]
fn two_names_of_one_backend_do_not_meet() {
    let w = World::new();
    let home = Home::new(false);
    POD.iter().for_each(|a| hold(&w.pod, a));
    let _dp = programs(&w, &home, State::LocalOnly);
    for v in [0, 1] {
        let s = spec(State::LocalOnly);
        let names = [Kind::LoadBalancer, Kind::ExternalIp, Kind::ClusterIp]
            .map(|kind| SocketAddr::new(s.ip(kind, v == 0), 80));
        let client = SocketAddr::new(OUTSIDE[v].parse().unwrap(), 20_001);
        w.outside
            .run(move || {
                let mut all = names.map(|to| from_port(client.port(), to, PATIENCE).unwrap());
                let sources: Vec<SocketAddr> = all.iter_mut().map(seen).collect();
                assert_eq!(sources[0], client);
                let node: IpAddr = NODE[v].parse().unwrap();
                assert!(sources[1].ip() == node && sources[2].ip() == node, "{sources:?}");
                assert_ne!(sources[1], sources[2]);
                for round in 0..20 {
                    for (i, s) in all.iter_mut().enumerate() {
                        echoes(s, format!("{i} in round {round}").as_bytes());
                    }
                }
                // What is reset by its client makes room for the next one at once.
                let [first, ..] = all;
                reset(first);
                let again = SocketAddr::new(node, s.node_port(false));
                let mut next = from_port(client.port(), again, PATIENCE).unwrap();
                assert_eq!(seen(&mut next), client);
                echoes(&mut next, b"from the same port");
            })
            .join()
            .unwrap();
    }
}

/// Datagrams that are never answered (logs, measurements): the flow keeps its source port as long as it goes on, and
/// notices when it has lost it.
#[test]
fn flows_without_answers_keep_their_source_port() {
    let w = World::new();
    let home = Home::new(false);
    let heard = {
        let (tell, heard) = std::sync::mpsc::channel();
        let (said, ready) = std::sync::mpsc::channel();
        w.other.run(move || {
            let s = UdpSocket::bind((REMOTE_POD[0], BACKEND_PORT)).unwrap();
            said.send(()).unwrap();
            while let Ok((_, from)) = s.recv_from(&mut [0; 64]) {
                if tell.send(from).is_err() {
                    return;
                }
            }
        });
        ready.recv().unwrap();
        heard
    };
    let _dp = programs(&w, &home, State::RemoteOnly);
    let sender = w
        .outside
        .run(|| {
            let s = UdpSocket::bind("0.0.0.0:0").unwrap();
            s.connect(node_port(true)).unwrap();
            s
        })
        .join()
        .unwrap();
    let source = || {
        sender.send(b"note").unwrap();
        heard.recv_timeout(PATIENCE).unwrap()
    };
    let first = source();
    const SECOND: u64 = 1_000_000_000;
    // 200 seconds without an answer, in which the client has sent: the last time 10 seconds ago.
    let before = change(&home, |k, v| {
        let ago = if k.dir == ct_dir::FORWARD { 10 } else { 200 };
        v.last_seen_ns = v.last_seen_ns.saturating_sub(ago * SECOND);
    });
    assert_eq!(source(), first);
    let (key, _) = before.iter().find(|(k, _)| k.dir == ct_dir::REPLY && k.proto == UDP).unwrap();
    let now = datagrams(&home).get(key, 0).unwrap();
    let (_, forward) = before.iter().find(|(k, _)| k.dir == ct_dir::FORWARD).unwrap();
    assert!(now.last_seen_ns > forward.last_seen_ns, "the port is in use, whoever looks for one");

    // A long silence, and another client has it now.
    change(&home, |k, v| {
        if k.dir == ct_dir::FORWARD {
            v.last_seen_ns = v.last_seen_ns.saturating_sub(10 * SECOND);
        } else {
            (v.dst, v.dport) = (addr_from("10.71.1.77".parse().unwrap()), 7);
        }
    });
    let second = source();
    assert_ne!(second, first, "its datagrams would pass for the other's");
    assert_eq!(source(), second);
}

/// A client of a pod without the socket hooks asks a backend by a Service's name and by its own, from one port.
#[test]
fn answers_have_the_name_that_was_asked_last() {
    let w = World::new();
    let home = Home::new(false);
    hold(&w.pod, POD[0]);
    let _dp = programs(&w, &home, State::LocalOnly);
    let name = SocketAddr::new(spec(State::LocalOnly).ip(Kind::ClusterIp, true), 80);
    let own = SocketAddr::new(POD[0].parse().unwrap(), BACKEND_PORT);
    w.client_pod
        .run(move || {
            let s = UdpSocket::bind("0.0.0.0:0").unwrap();
            s.set_read_timeout(Some(PATIENCE)).unwrap();
            for round in 0..3 {
                for to in [name, own, own, name] {
                    s.send_to(b"?", to).unwrap();
                    let (_, from) = s.recv_from(&mut [0; 64]).unwrap();
                    assert_eq!(from, to, "round {round}");
                }
            }
        })
        .join()
        .unwrap();
}

/// Brings the Service to these endpoints. Another Service keeps the one in the pod, so that it is still somebody's.
fn now(dp: &mut Datapath, state: State) {
    // As after a restart: from what the maps hold.
    let (mut tables, mut model) = (Tables::adopt(dp.maps.dump().unwrap()), Model::default());
    for s in [spec(state), Spec { number: 2, ..spec(State::LocalOnly) }] {
        model.set_service(&s.name(), Some(s.service()));
        for v4 in [true, false] {
            model.set_slice(&format!("{}-{v4}", s.name()), Some(s.slice(v4)));
        }
    }
    for name in model.take_dirty() {
        tables.sync(&mut dp.maps, &name, &desired(&model, &name, Selection::Maglev)).unwrap();
    }
}

/// A first packet leads to an endpoint that the Service has, whatever another one from the same port led to.
#[test]
fn first_packets_go_to_current_endpoints() {
    let w = World::new();
    let home = Home::new(false);
    for v in [0, 1] {
        hold(&w.pod, POD[v]);
        hold(&w.other, REMOTE_POD[v]);
    }
    let mut dp = program_with(&w, &home.config, |_| ());
    for v in [0, 1] {
        let to = SocketAddr::new(NODE[v].parse().unwrap(), spec(State::Both).node_port(false));
        let client = SocketAddr::new(OUTSIDE[v].parse().unwrap(), 20_003);
        let node: IpAddr = NODE_TO_OTHER[v].parse().unwrap();
        let open = || w.outside.run(move || from_port(client.port(), to, PATIENCE).unwrap());
        let cut = |net: &Net, what: &str, from: &str| {
            net.ip(&format!("route {what} blackhole {from}/{}", [32, 128][v]));
        };

        // Its client loses the connection without a word, as by a crash, and takes the port again.
        now(&mut dp, State::LocalOnly);
        let mut lost = open().join().unwrap();
        assert_eq!(seen(&mut lost), client);
        cut(&w.outside, "add", NODE[v]);
        reset(lost);
        cut(&w.outside, "del", NODE[v]);
        // What it would answer there ends the old connection's entry.
        cut(&w.pod, "add", OUTSIDE[v]);
        now(&mut dp, State::RemoteOnly);
        let mut next = open().join().unwrap();
        assert_eq!(seen(&mut next).ip(), node);
        echoes(&mut next, b"a new one");
        reset(next);

        // The endpoint goes before it has answered, and TCP asks again.
        now(&mut dp, State::LocalOnly);
        let asks = open();
        let to_pod = addr_from(POD[v].parse().unwrap());
        wait_for(|| {
            connections(&home).iter().flatten().any(|(k, c)| {
                k.dir == ct_dir::FORWARD
                    && k.sport == client.port()
                    && c.dst == to_pod
                    && c.flags & ct_flags::NEW != 0
            })
        });
        now(&mut dp, State::RemoteOnly);
        let mut next = asks.join().unwrap();
        assert_eq!(seen(&mut next).ip(), node);
        reset(next);
        cut(&w.pod, "del", OUTSIDE[v]);
    }
}

fn wait_for(mut until: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !until() {
        assert!(begin.elapsed() < PATIENCE, "it does not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// With direct server return the backend's node names the answers: a connection that its client has reset is no other's
/// trouble there, nor here.
#[test]
fn reset_connections_are_forgotten_where_answers_come_from() {
    let w = World::new();
    let (home, elsewhere) = (Home::new(false), Home::new(false));
    hold(&w.other, REMOTE_POD[0]);
    let mut nodes = two_nodes(&w, &home, &elsewhere);
    for dp in &mut nodes {
        dp.maps.set_flags(config_flags::DIRECT).unwrap();
    }
    let names =
        [Kind::LoadBalancer, Kind::ExternalIp].map(|k| SocketAddr::new(spec(State::Both).ip(k, true), 80));
    let client = SocketAddr::new(OUTSIDE[0].parse().unwrap(), 20_002);
    w.outside
        .run(move || {
            for round in 0..3 {
                for to in names {
                    let mut s = from_port(client.port(), to, PATIENCE).unwrap();
                    assert_eq!(seen(&mut s), client, "round {round}: {to}");
                    echoes(&mut s, b"by itself");
                    reset(s);
                }
            }
        })
        .join()
        .unwrap();
    assert!(nodes[1].maps.counter(counters::DIRECT) >= 6);
}

/// A Service that goes takes no connection with it, as long as both ends want it: not what rule-based proxies do, nor what our
/// sockets do.
fn outlive_the_service(by_driver: bool) {
    let w = World::new();
    let mut home = Home::new(false);
    if by_driver {
        home.config.xdp = vec!["up0".into(), "up1".into()];
        for net in [&w.outside, &w.other] {
            net.run(|| crate::wire::like_a_card("eth0")).join().unwrap();
        }
    }
    for v in [0, 1] {
        hold(&w.pod, POD[v]);
        hold(&w.other, REMOTE_POD[v]);
    }
    for state in [State::LocalOnly, State::RemoteOnly] {
        let mut dp = programs(&w, &home, state);
        let names = |v: usize| {
            let s = spec(state);
            [
                SocketAddr::new(NODE[v].parse().unwrap(), s.node_port(false)),
                SocketAddr::new(s.ip(Kind::LoadBalancer, v == 0), 80),
                SocketAddr::new(s.ip(Kind::ClusterIp, v == 0), 80),
            ]
        };
        let all: Vec<SocketAddr> = [0, 1].into_iter().flat_map(names).collect();
        let mut open: Vec<TcpStream> = all
            .iter()
            .map(|to| {
                let to = *to;
                let mut s =
                    w.outside.run(move || TcpStream::connect_timeout(&to, PATIENCE).unwrap()).join().unwrap();
                s.set_read_timeout(Some(PATIENCE)).unwrap();
                seen(&mut s);
                s
            })
            .collect();
        let mut all_echo = |when: &str| {
            for s in &mut open {
                for round in 0..5 {
                    echoes(s, format!("{when} {round}").as_bytes());
                }
            }
        };
        all_echo("before");
        Tables::adopt(dp.maps.dump().unwrap()).drop_orphans(&mut dp.maps).unwrap();
        assert!(dp.maps.dump().unwrap().frontends.is_empty());
        let before = dp.maps.counter(counters::XDP);
        all_echo("without the Service");
        let sent_on = dp.maps.counter(counters::XDP) > before;
        assert_eq!(sent_on, by_driver && state == State::RemoteOnly);
        for to in [all[0], all[3]] {
            let new = w.outside.run(move || TcpStream::connect_timeout(&to, PATIENCE).map(drop));
            let error = new.join().unwrap().unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{to}");
        }
        drop(dp);
        // A new process lists anew what packets may be for.
        let dp = program_with(&w, &home.config, |_| ());
        all_echo("after a restart");
        drop(dp);
    }
}

#[test]
fn connections_outlive_their_service() {
    outlive_the_service(false);
}

#[test]
fn connections_that_drivers_send_on_outlive_their_service() {
    outlive_the_service(true);
}

/// A backend resets a connection, and its client comes again from the same port: what is noted of the first one is not the
/// second one's.
#[test]
fn a_reset_by_the_backend_is_not_the_next_connections() {
    let w = World::new();
    for (state, net, own) in [(State::LocalOnly, &w.pod, POD), (State::RemoteOnly, &w.other, REMOTE_POD)] {
        let home = Home::new(false);
        let _dp = programs(&w, &home, state);
        for v in [0, 1] {
            let at = SocketAddr::new(own[v].parse().unwrap(), BACKEND_PORT);
            let to = SocketAddr::new(NODE[v].parse().unwrap(), spec(state).node_port(false));
            let listener = net.run(move || TcpListener::bind(at).unwrap()).join().unwrap();
            let open = || {
                let client = w.outside.run(move || from_port(20_005, to, PATIENCE).unwrap());
                let (server, _) = listener.accept().unwrap();
                (client.join().unwrap(), server)
            };
            let is_reset = || {
                let table = connections(&home);
                let answers = table
                    .iter()
                    .flatten()
                    .find(|(k, _)| k.dir == ct_dir::REPLY && k.proto == TCP && k.src == addr_from(at.ip()));
                answers.expect("the connection is known").1.flags & ct_flags::RESET != 0
            };
            let (client, server) = open();
            reset(server);
            wait_for(is_reset);
            drop(client);
            let (mut client, mut server) = open();
            client.write_all(b"x").unwrap();
            server.read_exact(&mut [0]).unwrap();
            server.write_all(b"x").unwrap();
            client.read_exact(&mut [0]).unwrap();
            assert!(!is_reset(), "{to}");
        }
    }
}

/// A process of the node's may connect from a port that is a node port too: before it is one, and after.
#[test]
fn the_nodes_own_connections_are_left_alone() {
    let w = World::new();
    let home = Home::new(false);
    for v in [0, 1] {
        hold(&w.outside, OUTSIDE[v]);
        hold(&w.pod, POD[v]);
    }
    let mut dp = program_with(&w, &home.config, |_| ());
    let port = spec(State::LocalOnly).node_port(false);
    let open = || {
        [OUTSIDE, POD].as_flattened().iter().map(|a| SocketAddr::new(a.parse().unwrap(), BACKEND_PORT)).map(
            |to| {
                let mut s = w.node.run(move || from_port(port, to, PATIENCE).unwrap()).join().unwrap();
                seen(&mut s);
                s
            },
        )
    };
    let mut before: Vec<TcpStream> = open().collect();
    now(&mut dp, State::LocalOnly);
    for s in &mut before {
        echoes(s, b"older than the node port");
        reset(s.try_clone().unwrap());
    }
    for mut s in open() {
        echoes(&mut s, b"younger");
    }
    assert_eq!(dp.maps.counter(counters::RESUMED), 0);
    assert_eq!(dp.maps.counter(counters::PACKET_CONNECTIONS), 0);
}

/// A frame with a VLAN's tag is for the VLAN's own interface. One whose tag says no more than how urgent it is, is not.
#[test]
fn frames_of_vlans_are_left_to_their_interfaces() {
    let w = World::new();
    let home = Home::new(false);
    let dp = programs(&w, &home, State::LocalOnly);
    let node = crate::fuzz::mac(&w.node, "up0");
    let frames = [(5u16, 20_006u16), (0x6000, 20_007)].map(|(tag, port)| {
        let mut f = node.to_vec();
        f.extend([2, 0, 0, 0, 9, 9, 0x81, 0x00]);
        f.extend(tag.to_be_bytes());
        f.extend([0x08, 0x00]);
        let mut ip = vec![0x45, 0, 0, 28, 0, 7, 0, 0, 64, UDP, 0, 0];
        for a in [OUTSIDE[0], NODE[0]] {
            ip.extend(a.parse::<std::net::Ipv4Addr>().unwrap().octets());
        }
        let sum = crate::fuzz::checksum(&ip).to_be_bytes();
        ip[10..12].copy_from_slice(&sum);
        f.extend(ip);
        f.extend(port.to_be_bytes());
        f.extend(node_port(true).port().to_be_bytes());
        f.extend([0, 8, 0, 0]);
        f
    });
    w.outside
        .run(move || {
            let mut wire = crate::wire::Wire::open("eth0");
            frames.iter().for_each(|f| wire.send(f));
        })
        .join()
        .unwrap();
    let from = || {
        let forward =
            datagrams(&home).iter().flatten().filter(|(k, _)| k.dir == ct_dir::FORWARD).collect::<Vec<_>>();
        forward.into_iter().map(|(k, _)| k.sport).collect::<Vec<_>>()
    };
    wait_for(|| from().contains(&20_007));
    assert_eq!(from(), [20_007]);
    drop(dp);
}
