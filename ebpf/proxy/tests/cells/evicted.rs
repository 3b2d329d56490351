//! Tables that are full: what the kernel's LRU really evicts, and what goes on.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use aya::maps::{HashMap, MapData};
use nix::sched::{CpuSet, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;
use orlop_ebpf_common::{CtKey, CtValue, counters, ct_dir};
use orlop_ebpf_loader::Datapath;

use crate::fuzz::{checksum, mac, octets};
use crate::ports::{connections, datagrams, echoes, hold, seen};
use crate::wire::Wire;
use crate::world::*;
use crate::{Home, Ranges, Spec, State, program_with};

const TABLE: u32 = 1024;
/// Connections of each family that are silent while others come, and their ports.
const SILENT: u16 = 8;
const OWN_PORTS: u16 = 20_500;
/// Flows of each family that come at a time, the first one's port, and how often there may be some.
const AT_ONCE: u16 = 128;
const FIRST: u16 = 2_000;
const ROUNDS: usize = 140;
const LONG: Duration = Duration::from_secs(10);

fn spec() -> Spec {
    Spec {
        number: 1,
        state: State::LocalOnly,
        internal_local: false,
        external_local: false,
        ranges: Ranges::All,
    }
}

fn node_port(v: usize, udp: bool) -> SocketAddr {
    SocketAddr::new(NODE[v].parse().unwrap(), spec().node_port(udp))
}

/// A Service with two backends here, in a pod and on the host, and a small table.
fn world() -> (World, Home, Datapath) {
    let w = World::new();
    let mut home = Home::new(false);
    home.config.sizes.connections = TABLE;
    for v in [0, 1] {
        hold(&w.pod, POD[v]);
        hold(&w.node, NODE[v]);
    }
    let dp = program_with(&w, &home.config, |model| {
        let s = spec();
        model.set_service(&s.name(), Some(s.service()));
        for v4 in [true, false] {
            let mut slice = s.slice(v4);
            slice.endpoints.extend(Spec { state: State::HostNetwork, ..s }.slice(v4).endpoints);
            model.set_slice(&format!("{}-{v4}", s.name()), Some(slice));
        }
    });
    (w, home, dp)
}

/// The first packet of a connection, or a datagram, from a port of the client's to the node port.
fn frame(node: [u8; 6], v: usize, udp: bool, sport: u16) -> Vec<u8> {
    let to = node_port(v, udp);
    let (from, dst) = (octets(OUTSIDE[v].parse::<IpAddr>().unwrap()), octets(to.ip()));
    let proto = if udp { 17 } else { 6 };
    let mut body = [sport, to.port()].map(u16::to_be_bytes).concat();
    // Length and checksum; or sequence numbers, SYN, window, checksum and the urgent pointer.
    let rest: &[u8] =
        if udp { &[0, 8, 0, 0] } else { &[0, 0, 0, 7, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0] };
    body.extend(rest);
    let length = (body.len() as u16).to_be_bytes();
    let covered = [&from[..], &dst, &[0, proto], &length, &body].concat();
    let at = if udp { 6 } else { 16 };
    body[at..at + 2].copy_from_slice(&checksum(&covered).to_be_bytes());
    let mut f = node.to_vec();
    f.extend([2, 0, 0, 0, 9, 9]);
    if v == 0 {
        f.extend([0x08, 0x00]);
        let mut ip = vec![0x45, 0];
        ip.extend((20 + body.len() as u16).to_be_bytes());
        ip.extend([0, 0, 0x40, 0, 64, proto, 0, 0]);
        ip.extend([from, dst].concat());
        let sum = checksum(&ip).to_be_bytes();
        ip[10..12].copy_from_slice(&sum);
        f.extend(ip);
    } else {
        f.extend([0x86, 0xdd, 0x60, 0, 0, 0, length[0], length[1], proto, 64]);
        f.extend([from, dst].concat());
    }
    f.extend(body);
    f
}

type Table = HashMap<MapData, CtKey, CtValue>;

/// Entries of flows whose client's port is one of these.
fn entries(table: &Table, ports: std::ops::Range<u16>) -> Vec<CtKey> {
    let is_of = |k: &CtKey| ports.contains(if k.dir == ct_dir::FORWARD { &k.sport } else { &k.dport });
    table.keys().filter_map(Result::ok).filter(is_of).collect()
}

/// How many of these are there still. Looking does not count as a use.
fn left(table: &Table, keys: &[CtKey]) -> usize {
    keys.iter().filter(|k| table.get(k, 0).is_ok()).count()
}

/// New flows until `enough`; returns how many.
fn flood(node: [u8; 6], udp: bool, mut enough: impl FnMut() -> bool) -> u32 {
    let mut wire = Wire::open("eth0");
    let mut ports = FIRST..;
    for round in 0..ROUNDS {
        if enough() {
            return round as u32 * u32::from(AT_ONCE) * 2;
        }
        for port in ports.by_ref().take(usize::from(AT_ONCE)) {
            [0, 1].into_iter().for_each(|v| wire.send(&frame(node, v, udp, port)));
        }
    }
    panic!("the table does not fill");
}

/// A CPU's newest entries are not evicted for the sake of another's.
fn stay_on_this_cpu() {
    let mut only = CpuSet::new();
    only.set(sched_getcpu().unwrap()).unwrap();
    sched_setaffinity(Pid::from_raw(0), &only).unwrap();
}

fn open(port: u16) -> [TcpStream; 2] {
    [0, 1].map(|v| {
        let mut s = from_port(port, node_port(v, false), LONG).unwrap();
        seen(&mut s);
        s
    })
}

/// Silent connections whose entries are evicted for others' sake are taken up again where they were, and counted; those that speak all
/// along go on.
#[test]
fn evicted_connections_go_on() {
    let (w, home, dp) = world();
    let table = connections(&home);
    let node = mac(&w.node, "up0");
    let silent = w.outside.run(move || {
        stay_on_this_cpu();
        let mut silent: Vec<TcpStream> = (OWN_PORTS..OWN_PORTS + SILENT).flat_map(open).collect();
        let mut busy = open(OWN_PORTS + SILENT);
        let own = entries(&table, OWN_PORTS..OWN_PORTS + SILENT);
        assert_eq!(own.len(), 2 * silent.len(), "both directions of each");
        flood(node, false, || {
            busy.iter_mut().for_each(|s| echoes(s, b"busy"));
            left(&table, &own) == 0
        });
        silent.iter_mut().for_each(|s| echoes(s, b"still here"));
        assert_eq!(left(&table, &own), own.len(), "known again");
        silent.len()
    });
    let silent = silent.join().unwrap();
    assert!(dp.maps.counter(counters::RESUMED) >= silent as u64, "{}", dp.maps.counter(counters::RESUMED));
}

/// Flows of datagrams push each other out, and no connection.
#[test]
fn datagrams_push_no_connection_out() {
    let (w, home, dp) = world();
    let (tcp, udp) = (connections(&home), datagrams(&home));
    let node = mac(&w.node, "up0");
    let outside = w.outside.run(move || {
        stay_on_this_cpu();
        let mut silent: Vec<TcpStream> = (OWN_PORTS..OWN_PORTS + SILENT).flat_map(open).collect();
        let own = entries(&tcp, OWN_PORTS..OWN_PORTS + SILENT);
        let (mut first, mut rounds) = (Vec::new(), 0);
        let many = flood(node, true, || {
            rounds += 1;
            let tables = [&udp, &tcp];
            if first.is_empty() {
                first = tables.iter().flat_map(|t| entries(t, FIRST..FIRST + 1)).collect();
            }
            let evicted = !first.is_empty() && tables.iter().all(|t| left(t, &first) == 0);
            evicted && rounds > 4 * TABLE / u32::from(AT_ONCE)
        });
        assert_eq!(left(&tcp, &own), own.len(), "after {many} flows");
        silent.iter_mut().for_each(|s| echoes(s, b"still here"));
    });
    outside.join().unwrap();
    assert_eq!(dp.maps.counter(counters::RESUMED), 0);
}
