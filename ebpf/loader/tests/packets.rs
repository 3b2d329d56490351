//! Node ports for clients outside of the node: namespaces stand for the client, the node, a pod on it and another node.

#[allow(dead_code)]
mod place;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::Duration;

use orlop_base::testkit::unique_name;
use orlop_ebpf_common::*;
use orlop_ebpf_loader::{Datapath, Maps, Op, purge};
use place::Place;

const CLIENT: &str = "10.99.1.2";
const NODE: &str = "10.99.1.1";
const POD: &str = "10.99.2.2";
const REMOTE: &str = "10.99.3.2";
const NODE_TO_REMOTE: &str = "10.99.3.1";
const NODE_PORT: u16 = 30_080;
const BACKEND_PORT: u16 = 8080;

struct Net(String);

impl Net {
    fn new(role: &str) -> Net {
        let n = Net(unique_name(&format!("eb{role}")));
        ip(&["netns", "add", &n.0]);
        n.ip(&["link", "set", "lo", "up"]);
        n
    }

    fn ip(&self, args: &[&str]) {
        let mut all = vec!["-n", &self.0];
        all.extend(args);
        ip(&all);
    }

    /// Runs `f` on a thread of its own inside the namespace.
    fn run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
        let path = format!("/run/netns/{}", self.0);
        thread::spawn(move || {
            let ns = File::open(path).unwrap();
            nix::sched::setns(ns, nix::sched::CloneFlags::CLONE_NEWNET).expect("run as root");
            f()
        })
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

fn ip(args: &[&str]) {
    let out = Command::new("ip").args(args).output().expect("`ip` is missing: apt-get install iproute2");
    assert!(out.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// Client, node, pod and another node, wired.
struct World {
    client: Net,
    node: Net,
    pod: Net,
    remote: Net,
}

impl World {
    fn new() -> World {
        let w =
            World { client: Net::new("c"), node: Net::new("n"), pod: Net::new("p"), remote: Net::new("r") };
        for (name, far, net) in [("uplink", &w.client, 1), ("pod", &w.pod, 2), ("peer", &w.remote, 3)] {
            w.node.ip(&["link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", &far.0]);
            w.node.ip(&["addr", "add", &format!("10.99.{net}.1/24"), "dev", name]);
            w.node.ip(&["link", "set", name, "up"]);
            far.ip(&["addr", "add", &format!("10.99.{net}.2/24"), "dev", "eth0"]);
            far.ip(&["link", "set", "eth0", "up"]);
        }
        // The other node has no route to the client: it can only answer the node.
        w.pod.ip(&["route", "add", "default", "via", "10.99.2.1"]);
        w.client.ip(&["route", "add", "default", "via", NODE]);
        w.node.run(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap()).join().unwrap();
        w
    }

    /// The programs on the node's two uplinks, with one node port.
    fn open(&self, place: &Place, clsact: bool, backend: &str, flags: u8) -> Datapath {
        let mut config = place.config();
        config.force_clsact = clsact;
        let id: IpAddr = backend.parse().unwrap();
        self.node
            .run(move || {
                let mut dp = Datapath::open(&config).unwrap();
                for (name, own) in [("uplink", NODE), ("peer", NODE_TO_REMOTE)] {
                    let addr4 = addr_from(own.parse().unwrap());
                    let index = nix::net::if_::if_nametoindex(name).unwrap();
                    let uplink = Uplink { addr4, l3_offset: 14, ..Uplink::default() };
                    dp.attach_uplink(index, name, uplink).unwrap();
                    dp.maps.apply(&Op::PutLocal(addr4, local_flags::NODE_PORT)).unwrap();
                }
                for proto in [TCP, UDP] {
                    let set = u32::from(proto);
                    let b = Backend { addr: addr_from(id), port: BACKEND_PORT, proto, flags };
                    dp.maps.apply(&Op::PutBackend(set, b)).unwrap();
                    dp.maps.apply(&Op::PutSlot(SlotKey { set, slot: 0 }, set)).unwrap();
                    let key =
                        FrontendKey { addr: any_addr(true), port: NODE_PORT, proto, scope: SCOPE_EXTERNAL };
                    let value = FrontendValue { set, count: 1, service: set, ..FrontendValue::default() };
                    dp.maps.apply(&Op::PutFrontend(key, value)).unwrap();
                }
                dp
            })
            .join()
            .unwrap()
    }
}

/// Answers with the address that it sees, by TCP and UDP.
fn serve(net: &Net) {
    let (tell, ready) = std::sync::mpsc::channel();
    let told = tell.clone();
    net.run(move || {
        let l = TcpListener::bind(("0.0.0.0", BACKEND_PORT)).unwrap();
        told.send(()).unwrap();
        for mut s in l.incoming().flatten() {
            thread::spawn(move || {
                let peer = s.peer_addr().unwrap().ip().to_string();
                let mut buf = [0; 65536];
                // Echoes after naming the peer, so that long flows can be tested.
                let _ = s.write_all(format!("{peer:>15}").as_bytes());
                while let Ok(n @ 1..) = s.read(&mut buf) {
                    if s.write_all(&buf[..n]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    net.run(move || {
        let s = UdpSocket::bind(("0.0.0.0", BACKEND_PORT)).unwrap();
        tell.send(()).unwrap();
        let mut buf = [0; 2048];
        while let Ok((_, from)) = s.recv_from(&mut buf) {
            let _ = s.send_to(from.ip().to_string().as_bytes(), from);
        }
    });
    ready.recv().unwrap();
    ready.recv().unwrap();
}

/// For what must come; a loaded machine takes its time.
const PATIENCE: Duration = Duration::from_secs(30);

fn node_port() -> SocketAddr {
    SocketAddr::new(NODE.parse().unwrap(), NODE_PORT)
}

fn connect() -> TcpStream {
    let s = TcpStream::connect_timeout(&node_port(), PATIENCE).unwrap();
    s.set_read_timeout(Some(PATIENCE)).unwrap();
    s
}

/// Asks by TCP and UDP and returns the source that the backend saw. A large echo goes over the TCP connection.
fn ask() -> String {
    let mut s = connect();
    let mut seen = [0; 15];
    s.read_exact(&mut seen).unwrap();
    let sent = vec![7u8; 1 << 20];
    let mut writer = s.try_clone().unwrap();
    let data = sent.clone();
    let w = thread::spawn(move || writer.write_all(&data).unwrap());
    let mut back = vec![0; sent.len()];
    s.read_exact(&mut back).unwrap();
    w.join().unwrap();
    assert!(back == sent);
    let seen = String::from_utf8(seen.to_vec()).unwrap().trim().to_owned();

    let u = UdpSocket::bind("0.0.0.0:0").unwrap();
    u.set_read_timeout(Some(PATIENCE)).unwrap();
    u.send_to(b"x", node_port()).unwrap();
    let mut buf = [0; 64];
    let (n, from) = u.recv_from(&mut buf).unwrap();
    assert_eq!(from, node_port());
    assert_eq!(String::from_utf8_lossy(&buf[..n]), seen, "TCP and UDP see the same source");
    seen
}

fn check(clsact: bool) {
    let place = Place::new("pk");
    let w = World::new();
    serve(&w.pod);
    serve(&w.remote);

    // A pod on this node sees the client.
    let dp = w.open(&place, clsact, POD, backend_flags::LOCAL);
    assert_eq!(w.client.run(ask).join().unwrap(), CLIENT);
    drop(dp);

    // So it does when its endpoint names no node: the route says that it is here.
    let dp = w.open(&place, clsact, POD, 0);
    assert_eq!(w.client.run(ask).join().unwrap(), CLIENT);
    drop(dp);

    // A backend on another node sees this node. The same pins: an upgrade in between, with a connection alive.
    let held = w.client.run(connect).join().unwrap();
    let dp = w.open(&place, clsact, REMOTE, 0);
    assert_eq!(w.client.run(ask).join().unwrap(), NODE_TO_REMOTE);
    let mut held = held;
    let mut buf = [0; 20];
    // (The backend id now stands for the other node; the connection keeps what it was given.)
    held.read_exact(&mut buf[..15]).unwrap();
    held.write_all(b"still").unwrap();
    held.read_exact(&mut buf[..5]).unwrap();
    assert_eq!(&buf[..5], b"still", "a connection outlives the change of programs");
    drop(dp);

    let config = place.config();
    w.node.run(move || purge(&config).unwrap()).join().unwrap();
    let refused = w.client.run(|| TcpStream::connect_timeout(&node_port(), Duration::from_secs(1)).is_err());
    assert!(refused.join().unwrap(), "nothing translates any more");
}

#[test]
fn node_ports_by_tcx() {
    check(false);
}

#[test]
fn node_ports_by_clsact() {
    check(true);
}
