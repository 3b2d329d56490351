//! Frames that nobody sends on purpose, at the interfaces of a node: nothing of it goes where it should not, and who asks
//! properly is answered afterwards as before.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::ask::{probe, serve};
use crate::wire::Wire;
use crate::world::*;
use crate::{Home, Kind, Ranges, Spec, State, program_with};

const FRAMES: usize = 25_000;
const PROTOCOLS: [u8; 8] = [6, 17, 6, 17, 1, 58, 132, 44];

/// Flows of those who ask properly must not meet the tails of these.
const STRANGER: Both = ["10.71.1.77", "fd71:1::77"];
const STRANGE_POD: Both = ["10.71.128.77", "fd71:128::77"];

/// xorshift: the same frames in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

fn spec() -> Spec {
    Spec { number: 1, state: State::Both, internal_local: false, external_local: false, ranges: Ranges::All }
}

pub fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

/// The Internet checksum of these bytes.
pub fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A packet of an address family, or an ICMP error about one.
fn packet(r: &mut Random, v: usize, source: IpAddr, depth: usize) -> Vec<u8> {
    let s = spec();
    let proto = if r.one_in(30) { r.next() as u8 } else { PROTOCOLS[r.below(PROTOCOLS.len())] };
    let kinds = [Kind::ClusterIp, Kind::ExternalIp, Kind::LoadBalancer, Kind::NodePort];
    let kind = kinds[r.below(kinds.len())];
    let (to, port) = match kind {
        Kind::NodePort => (NODE[v].parse().unwrap(), s.node_port(proto == 17)),
        _ => (s.ip(kind, v == 0), 80),
    };
    let port = if r.one_in(10) { 61_000 + r.below(4000) as u16 } else { port };
    let mut body = Vec::new();
    if (proto == 1 || proto == 58) && depth == 0 {
        body.extend([[3, 11, 12, 1, 2, 4, 8, 128][r.below(8)], r.below(5) as u8, 0, 0, 0, 0, 5, 0]);
        let quoted = packet(r, v, source, 1);
        body.extend(&quoted[..r.below(quoted.len() + 1)]);
    } else {
        body.extend((1024 + r.below(60_000) as u16).to_be_bytes());
        body.extend(port.to_be_bytes());
        body.extend((0..r.below(60)).map(|_| r.next() as u8));
        if body.len() > 13 {
            body[12] = 0x50 | (r.next() as u8 & 0x0f);
            body[13] = [2, 16, 18, 24, 17, 4, 0, 255][r.below(8)];
        }
    }
    let (from, to) = (octets(source), octets(to));
    let mut p;
    if v == 0 {
        let options = if r.one_in(8) { r.below(11) } else { 0 };
        let total = 20 + options * 4 + body.len();
        p = vec![0x45 + options as u8, 0];
        p.extend((total as u16).to_be_bytes());
        p.extend((r.next() as u16 & 7).to_be_bytes());
        let fragment = if r.one_in(6) { r.next() as u16 & 0x200f } else { 0x4000 };
        p.extend(fragment.to_be_bytes());
        p.extend([[64, 1, 0, 255][r.below(4)], proto, 0, 0]);
        p.extend(&from);
        p.extend(&to);
        p.extend((0..options * 4).map(|i| if i == 0 { 158 } else { r.next() as u8 & 0x1f }));
        let sum = checksum(&p).to_be_bytes();
        p[10..12].copy_from_slice(&sum);
    } else {
        let mut chain = Vec::new();
        let mut next = proto;
        for _ in 0..(if r.one_in(5) { r.below(4) } else { 0 }) {
            let header = [0u8, 60, 44, 43][r.below(4)];
            let mut bytes = vec![next, 0, r.next() as u8 & 0x1f, r.next() as u8 & 0x0f, 0, 0, 0, 1];
            if header != 44 && r.one_in(3) {
                bytes[1] = r.next() as u8 & 3;
            }
            bytes.extend(chain);
            (chain, next) = (bytes, header);
        }
        p = vec![0x60, 0, 0, 0];
        p.extend(((chain.len() + body.len()) as u16).to_be_bytes());
        p.extend([next, [64, 1, 0, 255][r.below(4)]]);
        p.extend(&from);
        p.extend(&to);
        p.extend(chain);
    }
    p.extend(body);
    p
}

/// A frame to the node: as above, with bits changed, and cut off or too long.
fn frame(r: &mut Random, to: [u8; 6], sources: Both) -> Vec<u8> {
    let v = r.below(2);
    let mut f = to.to_vec();
    f.extend([2, 0, 0, 0, 9, 9]);
    let kind: u16 = if r.one_in(50) { r.next() as u16 } else { [0x0800, 0x86dd][v] };
    f.extend(kind.to_be_bytes());
    f.extend(packet(r, v, sources[v].parse().unwrap(), 0));
    for _ in 0..(if r.one_in(2) { r.below(4) } else { 0 }) {
        // Not the destination's network: what it does to others is the stack's.
        let at = 14 + r.below(f.len() - 14);
        let destination = if v == 0 { 30..34 } else { 38..54 };
        if !destination.contains(&at) {
            f[at] ^= 1 << r.below(8);
        }
    }
    if r.one_in(4) {
        f.truncate(14 + r.below(f.len() - 13));
    } else if r.one_in(20) {
        f.resize(f.len() + r.below(200), 0xa5);
    }
    f
}

/// What is wrong with a frame that came out of the node on the way to a backend.
fn wrong(frame: &[u8], backend: Both) -> Option<String> {
    let kind = u16::from_be_bytes([*frame.get(12)?, *frame.get(13)?]);
    let (head, v) = match kind {
        0x0800 => (frame.get(14..34)?, 0),
        0x86dd => (frame.get(14..54)?, 1),
        _ => return None,
    };
    let to = if v == 0 { &head[16..20] } else { &head[24..40] };
    let s = spec();
    for kind in [Kind::ClusterIp, Kind::ExternalIp, Kind::LoadBalancer] {
        if to == octets(s.ip(kind, v == 0)) {
            return Some("it is for the Service still".into());
        }
    }
    let (proto, fragment, l4) = if v == 0 {
        (head[9], u16::from_be_bytes([head[6], head[7]]) & 0x1fff, 14 + usize::from(head[0] & 15) * 4)
    } else {
        (head[6], 0, 54)
    };
    if to != octets(backend[v].parse().unwrap()) || fragment != 0 || !matches!(proto, 6 | 17) {
        return None;
    }
    let port = u16::from_be_bytes([*frame.get(l4 + 2)?, *frame.get(l4 + 3)?]);
    (port != BACKEND_PORT).then(|| format!("it is for port {port}"))
}

pub fn mac(net: &Net, interface: &'static str) -> [u8; 6] {
    let text = net.run(move || {
        let out = std::process::Command::new("ip").args(["-o", "link", "show", interface]).output().unwrap();
        String::from_utf8(out.stdout).unwrap()
    });
    let text = text.join().unwrap();
    let mac = text.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
    let bytes: Vec<u8> = mac.split(':').map(|b| u8::from_str_radix(b, 16).unwrap()).collect();
    bytes.try_into().unwrap()
}

fn answers(net: &Net) {
    for v in [0, 1] {
        for udp in [false, true] {
            let to = SocketAddr::new(NODE[v].parse().unwrap(), spec().node_port(udp));
            let got = net.run(move || probe(udp, to, 2)).join().unwrap();
            assert!(got.contains("pod ") && got.contains("remote "), "{to} udp={udp}: {got}");
        }
    }
}

fn fuzz(force_clsact: bool, seed: u64) {
    let w = World::new();
    let home = Home::new(force_clsact);
    serve(&w.pod, "pod", POD);
    serve(&w.other, "remote", REMOTE_POD);
    let dp = program_with(&w, &home.config, |model| {
        model.set_service(&spec().name(), Some(spec().service()));
        for v4 in [true, false] {
            model.set_slice(&format!("{}-{v4}", spec().name()), Some(spec().slice(v4)));
        }
    });
    answers(&w.outside);
    let stop = Arc::new(AtomicBool::new(false));
    let watchers = [(&w.pod, POD), (&w.other, REMOTE_POD)].map(|(net, backend)| {
        let stop = stop.clone();
        net.run(move || {
            let (mut wire, mut room) = (Wire::open("eth0"), vec![0; 65_536]);
            let mut seen = 0;
            loop {
                match wire.receive(&mut room) {
                    Some(n) => {
                        seen += 1;
                        let bad = wrong(&room[..n], backend);
                        assert!(bad.is_none(), "{}: {:02x?}", bad.unwrap_or_default(), &room[..n.min(100)]);
                    }
                    None if stop.load(Ordering::Relaxed) => return seen,
                    None => {}
                }
            }
        })
    });
    let senders = [(&w.outside, "up0", STRANGER, seed), (&w.client_pod, "pod1", STRANGE_POD, seed + 1)];
    let senders = senders.map(|(net, far, sources, seed)| {
        let to = mac(&w.node, far);
        net.run(move || {
            let (mut wire, mut r) = (Wire::open("eth0"), Random(seed));
            for _ in 0..FRAMES {
                wire.send(&frame(&mut r, to, sources));
            }
        })
    });
    senders.into_iter().for_each(|t| t.join().unwrap());
    stop.store(true, Ordering::Relaxed);
    for watcher in watchers {
        assert!(watcher.join().unwrap() > 100, "some frames are good enough to be sent on");
    }
    answers(&w.outside);
    answers(&w.client_pod);
    drop(dp);
}

#[test]
fn frames_without_sense_do_no_harm() {
    fuzz(false, 0x5eed_0001);
}

#[test]
fn frames_without_sense_do_no_harm_by_clsact() {
    fuzz(true, 0x5eed_0101);
}
