//! The programs in this kernel: attached to a cgroup of the test's own, with maps written by hand.

mod place;

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use orlop_ebpf_common::*;
use orlop_ebpf_loader::{Datapath, Maps, Op, purge};
use place::Place;

/// For what must come; a loaded machine takes its time.
const PATIENCE: Duration = Duration::from_secs(30);

fn service(dp: &mut Datapath, vip: SocketAddr, proto: u8, set: u32, backends: &[SocketAddr]) {
    let id = |i: usize| set * 100 + i as u32 + 1;
    for (i, b) in backends.iter().enumerate() {
        let backend = Backend { addr: addr_from(b.ip()), port: b.port(), proto, flags: backend_flags::LOCAL };
        dp.maps.apply(&Op::PutBackend(id(i), backend)).unwrap();
        dp.maps.apply(&Op::PutSlot(SlotKey { set, slot: i as u32 }, id(i))).unwrap();
        dp.maps.apply(&Op::PutMember(SlotKey { set, slot: id(i) })).unwrap();
    }
    let key = FrontendKey { addr: addr_from(vip.ip()), port: vip.port(), proto, scope: SCOPE_INTERNAL };
    let value = FrontendValue {
        set,
        count: backends.len() as u32,
        service: set,
        affinity_seconds: 0,
        flags: frontend_flags::MEMBERS,
    };
    dp.maps.apply(&Op::PutFrontend(key, value)).unwrap();
}

fn tcp_server(name: &'static str) -> SocketAddr {
    let l = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = l.local_addr().unwrap();
    std::thread::spawn(move || {
        for s in l.incoming().flatten() {
            let mut s = s;
            let _ = s.write_all(name.as_bytes());
        }
    });
    at
}

fn ask(vip: SocketAddr) -> io::Result<String> {
    let mut s = TcpStream::connect_timeout(&vip, PATIENCE)?;
    assert_eq!(s.peer_addr()?, vip, "the peer keeps the name that was asked for");
    let mut text = String::new();
    s.read_to_string(&mut text)?;
    Ok(text)
}

#[test]
fn tcp_is_spread_refused_and_survives_the_daemon() {
    let place = Place::new("lt");
    let config = place.config();
    let vip: SocketAddr = "127.201.7.1:80".parse().unwrap();
    let empty: SocketAddr = "127.201.7.2:80".parse().unwrap();
    let (a, b) = (tcp_server("a"), tcp_server("b"));
    let mut dp = Datapath::open(&config).unwrap();
    service(&mut dp, vip, TCP, 1, &[a, b]);
    service(&mut dp, empty, TCP, 2, &[]);
    let answers: std::collections::BTreeSet<_> = (0..40).map(|_| ask(vip).unwrap()).collect();
    assert_eq!(answers.len(), 2, "both backends answer");
    assert_eq!(ask(empty).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);

    // Without the daemon, and while a new one replaces the programs.
    drop(dp);
    ask(vip).unwrap();
    let dp = Datapath::open(&config).unwrap();
    assert_eq!(dp.maps.dump().unwrap().backends.len(), 2, "maps are adopted");
    ask(vip).unwrap();
    drop(dp);
    purge(&config).unwrap();
    // At once: purging does not wait for the kernel to let go of unpinned links.
    assert!(
        TcpStream::connect_timeout(&vip, Duration::from_millis(200)).is_err(),
        "nothing translates any more"
    );
    assert!(!config.pins.join("links").exists());
}

#[test]
fn udp_answers_carry_the_service_address() {
    let place = Place::new("lu");
    let config = place.config();
    let vip: SocketAddr = "127.201.8.1:53".parse().unwrap();
    let mut dp = Datapath::open(&config).unwrap();
    let mut backends = Vec::new();
    for _ in 0..3 {
        let s = UdpSocket::bind("127.0.0.1:0").unwrap();
        backends.push(s.local_addr().unwrap());
        std::thread::spawn(move || {
            let mut buf = [0; 64];
            while let Ok((n, from)) = s.recv_from(&mut buf) {
                let port = s.local_addr().unwrap().port().to_string();
                assert!(n > 0);
                let _ = s.send_to(port.as_bytes(), from);
            }
        });
    }
    service(&mut dp, vip, UDP, 3, &backends);

    let client = UdpSocket::bind("0.0.0.0:0").unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..20 {
        client.send_to(b"x", vip).unwrap();
        let mut buf = [0; 64];
        let (n, from) = client.recv_from(&mut buf).unwrap();
        assert_eq!(from, vip);
        seen.insert(buf[..n].to_vec());
    }
    assert_eq!(seen.len(), 1, "one socket stays with one backend");

    let connected = UdpSocket::bind("0.0.0.0:0").unwrap();
    connected.connect(vip).unwrap();
    assert_eq!(connected.peer_addr().unwrap(), vip);
    connected.set_read_timeout(Some(PATIENCE)).unwrap();
    connected.send(b"x").unwrap();
    let mut buf = [0; 64];
    connected.recv(&mut buf).unwrap();
    purge(&config).unwrap();
}

#[test]
fn node_ports_answer_on_loopback_and_node_addresses_only() {
    let place = Place::new("ln");
    let config = place.config();
    let mut dp = Datapath::open(&config).unwrap();
    dp.maps.set_flags(config_flags::LOOPBACK4).unwrap();
    // Multicast: without a translation connecting fails at once and no packet leaves the machine.
    let node: IpAddr = "224.0.201.9".parse().unwrap();
    let port = 31_907;
    service(&mut dp, SocketAddr::new("0.0.0.0".parse().unwrap(), port), TCP, 4, &[tcp_server("np")]);
    dp.maps.apply(&Op::PutLocal(addr_from(node), local_flags::NODE_PORT)).unwrap();
    assert_eq!(ask(SocketAddr::new(node, port)).unwrap(), "np");
    assert_eq!(ask(SocketAddr::new("127.0.0.1".parse().unwrap(), port)).unwrap(), "np");
    let other = SocketAddr::new("224.0.201.10".parse().unwrap(), port);
    assert!(TcpStream::connect_timeout(&other, Duration::from_millis(200)).is_err());
    purge(&config).unwrap();
}

#[test]
fn dual_stack_sockets_reach_ipv4_services() {
    let place = Place::new("l6");
    let config = place.config();
    let mut dp = Datapath::open(&config).unwrap();
    let vip: SocketAddr = "127.201.10.1:80".parse().unwrap();
    service(&mut dp, vip, TCP, 5, &[tcp_server("six")]);
    let mapped: SocketAddr = "[::ffff:127.201.10.1]:80".parse().unwrap();
    assert_eq!(ask(mapped).unwrap(), "six");
    purge(&config).unwrap();
}

#[test]
fn a_pods_loopback_is_its_own() {
    let place = Place::new("lp");
    let config = place.config();
    let mut dp = Datapath::open(&config).unwrap();
    dp.maps.set_flags(config_flags::LOOPBACK4).unwrap();
    let port = 31_908;
    service(&mut dp, SocketAddr::new("0.0.0.0".parse().unwrap(), port), TCP, 6, &[tcp_server("np")]);
    assert_eq!(ask(SocketAddr::new("127.0.0.1".parse().unwrap(), port)).unwrap(), "np");
    let inside = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("run as root");
        TcpStream::connect(("127.0.0.1", port)).map(drop)
    });
    assert!(inside.join().unwrap().is_err(), "the node's ports are not on the loopback of another namespace");
    purge(&config).unwrap();
}

/// As an upgrade or a downgrade finds them: maps in a folder of another layout's name.
#[test]
fn maps_of_an_older_layout_are_taken_over_and_those_of_a_newer_one_refused() {
    let place = Place::new("ly");
    let config = place.config();
    let folder = |layout: u32| config.pins.join(format!("v{layout}"));
    let vip: SocketAddr = "127.201.11.1:80".parse().unwrap();
    let mut dp = Datapath::open(&config).unwrap();
    service(&mut dp, vip, TCP, 7, &[tcp_server("a")]);
    drop(dp);
    assert_eq!(ask(vip).unwrap(), "a");

    std::fs::rename(folder(LAYOUT), folder(LAYOUT - 1)).unwrap();
    assert_eq!(ask(vip).unwrap(), "a", "the older programs run on");
    let dp = Datapath::open(&config).unwrap();
    assert_eq!(dp.maps.dump().unwrap().frontends.len(), 1, "adopted");
    assert_eq!(ask(vip).unwrap(), "a");
    assert!(folder(LAYOUT).exists() && !folder(LAYOUT - 1).exists());
    drop(dp);

    // One that has another shape under the same name is not taken for what it is not.
    std::fs::rename(folder(LAYOUT), folder(LAYOUT - 1)).unwrap();
    std::fs::remove_file(folder(LAYOUT - 1).join("BACKENDS")).unwrap();
    std::fs::rename(folder(LAYOUT - 1).join("NAMES"), folder(LAYOUT - 1).join("BACKENDS")).unwrap();
    let dp = Datapath::open(&config).unwrap();
    let dump = dp.maps.dump().unwrap();
    assert_eq!((dump.frontends.len(), dump.backends.len()), (1, 0), "the proxy fills in what is missing");
    drop(dp);

    // The same within this layout is nothing that an upgrade makes: refused, with what to do.
    std::fs::remove_file(folder(LAYOUT).join("BACKENDS")).unwrap();
    std::fs::rename(folder(LAYOUT).join("NAMES"), folder(LAYOUT).join("BACKENDS")).unwrap();
    let refused = Datapath::prepare(&config).map(drop).unwrap_err().to_string();
    assert!(refused.contains("BACKENDS") && refused.contains("orlop proxy cleanup"), "{refused}");

    std::fs::rename(folder(LAYOUT), folder(LAYOUT + 1)).unwrap();
    let refused = Datapath::prepare(&config).map(drop).unwrap_err().to_string();
    assert!(refused.contains("newer version") && refused.contains("orlop proxy cleanup"), "{refused}");
    purge(&config).unwrap();
    assert!(!folder(LAYOUT + 1).exists());
    Datapath::prepare(&config).unwrap();
    purge(&config).unwrap();
}

#[test]
fn this_kernel_accepts_all_programs() {
    let found = orlop_ebpf_loader::verify_programs();
    assert_eq!(found.level, orlop_ebpf_loader::Level::Ok, "{}", found.detail);
}

/// Sockets of one network namespace stay with a backend until they have been silent for long enough.
#[test]
fn affinity_of_sockets_ends_after_its_time() {
    let place = Place::new("la");
    let config = place.config();
    let vip: SocketAddr = "127.201.12.1:80".parse().unwrap();
    let mut dp = Datapath::open(&config).unwrap();
    service(&mut dp, vip, TCP, 8, &[tcp_server("a"), tcp_server("b")]);
    let key = FrontendKey { addr: addr_from(vip.ip()), port: 80, proto: TCP, scope: SCOPE_INTERNAL };
    let flags = frontend_flags::MEMBERS | frontend_flags::AFFINITY;
    let value = FrontendValue { set: 8, count: 2, service: 8, affinity_seconds: 1, flags };
    dp.maps.apply(&Op::PutFrontend(key, value)).unwrap();
    let mut last = ask(vip).unwrap();
    for i in 0..40 {
        let begin = std::time::Instant::now();
        let now = ask(vip).unwrap();
        if begin.elapsed() < Duration::from_millis(500) {
            assert_eq!(now, last, "connection {i}");
        }
        last = now;
    }
    let moved = (0..20).any(|_| {
        std::thread::sleep(Duration::from_millis(1100));
        ask(vip).unwrap() != last
    });
    assert!(moved, "always {last}");
    purge(&config).unwrap();
}

/// The table of sockets holds those that live, however many came and went.
#[test]
fn closed_sockets_are_forgotten() {
    let place = Place::new("lr");
    let config = place.config();
    let vip: SocketAddr = "127.201.13.1:80".parse().unwrap();
    let mut dp = Datapath::open(&config).unwrap();
    service(&mut dp, vip, TCP, 9, &[tcp_server("a")]);
    let kept = TcpStream::connect(vip).unwrap();
    // More than the table holds.
    for _ in 0..3000 {
        TcpStream::connect(vip).unwrap();
    }
    let at = |a: SocketAddr| (addr_from(a.ip()), a.port());
    let known = dp.maps.sockets().unwrap();
    let ours: Vec<_> = known.iter().filter(|(_, r)| (r.addr, r.port) == at(vip)).collect();
    assert_eq!(ours.len(), 1, "{ours:?}");
    assert_eq!(kept.peer_addr().unwrap(), vip, "its name is still known");
    drop(kept);
    assert!(dp.maps.sockets().unwrap().iter().all(|(_, r)| (r.addr, r.port) != at(vip)));
    purge(&config).unwrap();
}

/// Nor does it hold those whose connecting has failed, of which the kernel forgets whom they asked, nor more than one name of a
/// socket that asks one after the other.
#[test]
fn sockets_that_were_refused_are_forgotten() {
    let place = Place::new("lf");
    let config = place.config();
    let mut dp = Datapath::open(&config).unwrap();
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let vip: SocketAddr = "127.201.17.1:80".parse().unwrap();
    service(&mut dp, vip, TCP, 40, &[nobody]);
    let names: Vec<SocketAddr> = (1..=3).map(|n| SocketAddr::from(([127, 201, 18, n], 53))).collect();
    for (set, name) in (41..).zip(&names) {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        service(&mut dp, *name, UDP, set, &[server]);
    }
    let asks = UdpSocket::bind("127.0.0.1:0").unwrap();
    for name in names.iter().cycle().take(7) {
        asks.connect(name).unwrap();
        assert_eq!(asks.peer_addr().unwrap(), *name);
    }
    for _ in 0..20 {
        assert_eq!(TcpStream::connect(vip).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
    let ours = |dp: &Datapath, all: &[SocketAddr]| {
        let is_ours = |r: &SockReverse| all.iter().any(|a| (r.addr, r.port) == (addr_from(a.ip()), a.port()));
        dp.maps.connected().unwrap().iter().filter(|(_, r)| is_ours(r)).count()
    };
    assert_eq!((ours(&dp, &[vip]), ours(&dp, &names)), (0, 1));
    drop(asks);
    assert_eq!(ours(&dp, &names), 0);
    purge(&config).unwrap();
}

/// As the layout before this one had them: connected sockets by cookie and peer, flows of datagrams among the connections.
#[test]
fn connected_sockets_of_an_older_layout_keep_their_names() {
    let place = Place::new("lk");
    let config = place.config();
    let mut dp = Datapath::open(&config).unwrap();
    let vip: SocketAddr = "127.201.19.1:80".parse().unwrap();
    service(&mut dp, vip, TCP, 45, &[tcp_server("a")]);
    let kept = TcpStream::connect(vip).unwrap();
    let known = dp.maps.connected().unwrap();
    drop(dp);
    let folder = |layout: u32| config.pins.join(format!("v{layout}"));
    std::fs::rename(folder(LAYOUT), folder(LAYOUT - 1)).unwrap();
    let old = folder(LAYOUT - 1).join("SOCK_REVERSE");
    std::fs::remove_file(&old).unwrap();
    let shape = aya::maps::MapData::from_pin(folder(LAYOUT - 1).join("SOCK_SENT")).unwrap();
    std::fs::remove_file(folder(LAYOUT - 1).join("SOCK_SENT")).unwrap();
    shape.pin(&old).unwrap();
    let mut table: aya::maps::HashMap<_, SockKey, SockReverse> =
        aya::maps::HashMap::try_from(aya::maps::Map::LruHashMap(shape)).unwrap();
    for (k, name) in known {
        table.insert(k, name, 0).unwrap();
    }
    std::fs::remove_file(folder(LAYOUT - 1).join("DATAGRAMS")).unwrap();
    let mixed = aya::maps::MapData::from_pin(folder(LAYOUT - 1).join("CONNECTIONS")).unwrap();
    let mut mixed: aya::maps::HashMap<_, CtKey, CtValue> =
        aya::maps::HashMap::try_from(aya::maps::Map::LruHashMap(mixed)).unwrap();
    let flow = (CtKey { proto: UDP, sport: 53, ..CtKey::default() }, CtValue::default());
    mixed.insert(flow.0, flow.1, 0).unwrap();
    let dp = Datapath::open(&config).unwrap();
    assert_eq!(kept.peer_addr().unwrap(), vip);
    assert_eq!(dp.maps.connections().unwrap(), [flow]);
    drop(dp);
    purge(&config).unwrap();
}

/// Sockets that send without connecting, as resolvers do, do not push connections out.
#[test]
fn datagrams_do_not_take_the_place_of_connections() {
    let place = Place::new("ld");
    let config = place.config();
    let mut dp = Datapath::open(&config).unwrap();
    let (vip, names) = ("127.201.14.1:80".parse().unwrap(), "127.201.14.1:53".parse().unwrap());
    service(&mut dp, vip, TCP, 10, &[tcp_server("a")]);
    let (deaf, server) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    service(&mut dp, names, UDP, 11, &[deaf.local_addr().unwrap()]);
    let kept = TcpStream::connect(vip).unwrap();
    // More than the table holds.
    for _ in 0..3000 {
        UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"?", names).unwrap();
    }
    assert_eq!(kept.peer_addr().unwrap(), vip);
    // And an answer comes from the address that was asked.
    let other = "127.201.14.2:53".parse().unwrap();
    service(&mut dp, other, UDP, 12, &[server.local_addr().unwrap()]);
    let asks = UdpSocket::bind("127.0.0.1:0").unwrap();
    for socket in [&asks, &server] {
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    }
    asks.send_to(b"ask", other).unwrap();
    let mut buffer = [0; 8];
    let (_, peer) = server.recv_from(&mut buffer).unwrap();
    server.send_to(b"answer", peer).unwrap();
    assert_eq!(asks.recv_from(&mut buffer).unwrap().1, other);
    purge(&config).unwrap();
}

/// Connected sockets that reach one backend by several names at the same time: each knows its peer by the name that it asked.
#[test]
fn two_names_of_one_backend_do_not_meet() {
    let place = Place::new("tn");
    let config = place.config();
    let mut dp = Datapath::open(&config).unwrap();
    let web = tcp_server("one");
    let names: Vec<SocketAddr> = (1..=3).map(|n| SocketAddr::from(([127, 201, 16, n], 80))).collect();
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let own = server.local_addr().unwrap();
    std::thread::spawn(move || {
        while let Ok((_, from)) = server.recv_from(&mut [0; 8]) {
            let _ = server.send_to(b"answer", from);
        }
    });
    for (set, vip) in (20..).zip(&names) {
        service(&mut dp, *vip, TCP, set, &[web]);
        service(&mut dp, *vip, UDP, set + 10, &[own]);
    }
    let connected: Vec<_> = (0..12)
        .map(|i| {
            let vip = names[i % names.len()];
            let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
            datagrams.set_read_timeout(Some(PATIENCE)).unwrap();
            datagrams.connect(vip).unwrap();
            (vip, TcpStream::connect(vip).unwrap(), datagrams)
        })
        .collect();
    for (vip, mut tcp, udp) in connected {
        assert_eq!((tcp.peer_addr().unwrap(), udp.peer_addr().unwrap()), (vip, vip));
        let mut text = String::new();
        tcp.read_to_string(&mut text).unwrap();
        assert_eq!(text, "one");
        udp.send(b"?").unwrap();
        assert_eq!(udp.recv_from(&mut [0; 8]).unwrap().1, vip);
    }
    purge(&config).unwrap();
}

/// A socket that has reached a backend by a Service's name and then asks it by its own hears its own name.
#[test]
fn peers_have_the_name_that_was_asked_last() {
    let place = Place::new("lo");
    let config = place.config();
    let mut dp = Datapath::open(&config).unwrap();
    let (vip, names) = ("127.201.15.1:80".parse().unwrap(), "127.201.15.1:53".parse().unwrap());
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let own = server.local_addr().unwrap();
    std::thread::spawn(move || {
        while let Ok((_, from)) = server.recv_from(&mut [0; 8]) {
            let _ = server.send_to(b"answer", from);
        }
    });
    let web = tcp_server("a");
    service(&mut dp, names, UDP, 13, &[own]);
    service(&mut dp, vip, TCP, 14, &[web]);

    // Never connected.
    let asks = UdpSocket::bind("127.0.0.1:0").unwrap();
    asks.set_read_timeout(Some(PATIENCE)).unwrap();
    for round in 0..3 {
        for to in [names, own, own, names] {
            asks.send_to(b"?", to).unwrap();
            assert_eq!(asks.recv_from(&mut [0; 8]).unwrap().1, to, "round {round}");
        }
    }
    // Connected to one after the other.
    for to in [names, own, names, own] {
        asks.connect(to).unwrap();
        assert_eq!(asks.peer_addr().unwrap(), to);
        asks.send(b"?").unwrap();
        assert_eq!(asks.recv_from(&mut [0; 8]).unwrap().1, to);
    }
    // Others are not disturbed.
    let other = TcpStream::connect(vip).unwrap();
    assert_eq!(TcpStream::connect(web).unwrap().peer_addr().unwrap(), web);
    assert_eq!(other.peer_addr().unwrap(), vip);
    purge(&config).unwrap();
}

/// Ids of this load balancer's maps, and of programs that use one of them.
fn in_kernel(maps: &[u32]) -> (usize, usize) {
    let programs = aya::programs::loaded_programs()
        .filter_map(Result::ok)
        .filter(|p| matches!(p.map_ids(), Ok(Some(ids)) if ids.iter().any(|i| maps.contains(i))))
        .count();
    (maps.iter().filter(|id| aya::maps::MapData::from_id(**id).is_ok()).count(), programs)
}

#[test]
fn purge_leaves_no_program_and_no_map() {
    let place = Place::new("lg");
    let config = place.config();
    let dp = Datapath::open(&config).unwrap();
    let pinned = std::fs::read_dir(config.pins.join(format!("v{LAYOUT}"))).unwrap();
    let ids: Vec<u32> = pinned
        .map(|e| aya::maps::MapData::from_pin(e.unwrap().path()).unwrap().info().unwrap().id())
        .collect();
    drop(dp);
    let (maps, programs) = in_kernel(&ids);
    assert_eq!(maps, ids.len(), "pins keep the maps");
    assert!(programs >= 9, "links keep the socket programs: {programs}");
    let _somebody_looks = std::fs::File::open(&config.pins).unwrap();
    purge(&config).unwrap();
    // Programs and maps go after a grace period of the kernel.
    let start = std::time::Instant::now();
    while in_kernel(&ids) != (0, 0) {
        assert!(start.elapsed() < Duration::from_secs(60), "left: {:?}", in_kernel(&ids));
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(!std::fs::read_to_string("/proc/mounts").unwrap().contains(config.pins.to_str().unwrap()));
}
