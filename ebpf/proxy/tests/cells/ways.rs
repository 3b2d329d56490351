//! What happens on the way to an answer: sizes, fragments, and the errors of routers.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use orlop_ebpf_common::counters;

use crate::world::*;
use crate::{Home, Ranges, Spec, State, program_with};

/// Larger than [`NARROW`] lets pass and smaller than what leaves every client.
const DATAGRAM: usize = 1440;
const NARROW: u32 = 1300;

fn spec(state: State) -> Spec {
    Spec { number: 1, state, internal_local: false, external_local: false, ranges: Ranges::All }
}

/// Gives back what comes: a datagram as it is, a connection after its end.
fn echo(net: &Net, addresses: Both) {
    let (tell, ready) = std::sync::mpsc::channel();
    for addr in addresses {
        let at = SocketAddr::new(addr.parse().unwrap(), BACKEND_PORT);
        let told = tell.clone();
        net.run(move || {
            let l = TcpListener::bind(at).unwrap();
            told.send(()).unwrap();
            for mut s in l.incoming().flatten() {
                let mut all = Vec::new();
                if s.read_to_end(&mut all).is_ok() {
                    let _ = s.write_all(&all);
                }
            }
        });
        let told = tell.clone();
        net.run(move || {
            let s = UdpSocket::bind(at).unwrap();
            told.send(()).unwrap();
            let mut buf = [0; 2048];
            while let Ok((n, from)) = s.recv_from(&mut buf) {
                // Refused while the way's size is being learned; the client asks again.
                let _ = s.send_to(&buf[..n], from);
            }
        });
    }
    for _ in 0..4 {
        ready.recv().unwrap();
    }
}

/// Sends much and gets it back.
fn bulk(to: SocketAddr) -> Result<(), String> {
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

fn both_families(w: &World, udp: bool, ask: fn(SocketAddr) -> Result<(), String>) {
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
    let dp = program_with(&w, &home.config, |model| {
        let s = spec(State::RemoteOnly);
        model.set_service(&s.name(), Some(s.service()));
        for v4 in [true, false] {
            model.set_slice(&format!("{}-{v4}", s.name()), Some(s.slice(v4)));
        }
    });
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
const TO_THE_CLIENT: [&str; 2] = ["10.71.1.2/32 dev up0", "fd71:1::2/128 dev up0"];

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
