//! Network namespaces that stand for a node with two pods, another node, and a client outside.

use std::fs::File;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use orlop_base::testkit::unique_name;

pub const BACKEND_PORT: u16 = 8080;

pub struct Net(pub String);

impl Net {
    pub fn new(role: &str) -> Net {
        let n = Net(unique_name(&format!("pxc{role}")));
        ip(&format!("netns add {}", n.0));
        // A fresh namespace: nobody answers for duplicate addresses, so nobody has to be waited for.
        n.sysctl("net/ipv6/conf/default/accept_dad", "0");
        n.ip("link set lo up");
        n
    }

    pub fn ip(&self, args: &str) {
        ip(&format!("-n {} {args}", self.0));
    }

    pub fn sysctl(&self, name: &str, value: &str) {
        let (path, value) = (format!("/proc/sys/{name}"), value.to_owned());
        // Not every kernel has each of them.
        self.run(move || drop(std::fs::write(path, value))).join().unwrap();
    }

    /// Runs `f` on a thread of its own inside the namespace.
    pub fn run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
        run_in(self.0.clone(), f)
    }
}

pub fn run_in<T: Send + 'static>(
    netns: String,
    f: impl FnOnce() -> T + Send + 'static,
) -> thread::JoinHandle<T> {
    thread::spawn(move || {
        let ns = File::open(format!("/run/netns/{netns}")).unwrap();
        nix::sched::setns(ns, nix::sched::CloneFlags::CLONE_NEWNET).expect("run as root");
        f()
    })
}

impl Drop for Net {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

pub fn ip(args: &str) {
    let out = Command::new("ip")
        .args(args.split_whitespace())
        .output()
        .expect("`ip` is missing: apt-get install iproute2");
    assert!(out.status.success(), "ip {args}: {}", String::from_utf8_lossy(&out.stderr));
}

/// Addresses, IPv4 and IPv6.
pub type Both = [&'static str; 2];
pub const NODE: Both = ["10.71.1.1", "fd71:1::1"];
pub const NODE_TO_OTHER: Both = ["10.71.2.1", "fd71:2::1"];
pub const OUTSIDE: Both = ["10.71.1.2", "fd71:1::2"];
pub const OTHER: Both = ["10.71.2.2", "fd71:2::2"];
pub const POD: Both = ["10.71.128.2", "fd71:128::2"];
pub const CLIENT_POD: Both = ["10.71.128.3", "fd71:128::3"];
pub const REMOTE_POD: Both = ["10.71.129.2", "fd71:129::2"];

/// The Service range.
pub const SERVICE_RANGES: Both = ["10.71.96.0/24", "fd71:96::/64"];
/// Of that range, and of no Service; the client outside has it.
pub const NOBODYS: Both = ["10.71.96.200", "fd71:96::c8"];

pub struct World {
    pub node: Net,
    pub pod: Net,
    pub client_pod: Net,
    pub other: Net,
    pub outside: Net,
}

impl World {
    pub fn new() -> World {
        let w = World {
            node: Net::new("n"),
            pod: Net::new("p"),
            client_pod: Net::new("q"),
            other: Net::new("m"),
            outside: Net::new("o"),
        };
        for net in [&w.node, &w.other] {
            net.sysctl("net/ipv4/ip_forward", "1");
            net.sysctl("net/ipv6/conf/all/forwarding", "1");
            // Refusals are counted, not rationed.
            for name in ["net/ipv4/icmp_ratelimit", "net/ipv6/icmp/ratelimit"] {
                net.sysctl(name, "0");
            }
            net.sysctl("net/ipv4/icmp_msgs_per_sec", "1000000");
            net.sysctl("net/ipv4/icmp_msgs_burst", "100000");
        }
        for (name, far, own, theirs) in
            [("up0", &w.outside, NODE, OUTSIDE), ("up1", &w.other, NODE_TO_OTHER, OTHER)]
        {
            w.node.ip(&format!("link add {name} type veth peer name eth0 netns {}", far.0));
            for (addr, bits) in own.iter().zip([24, 64]) {
                w.node.ip(&format!("addr add {addr}/{bits} dev {name}"));
            }
            w.node.ip(&format!("link set {name} up"));
            far.ip("link set eth0 up");
            for (addr, bits) in theirs.iter().zip([24, 64]) {
                far.ip(&format!("addr add {addr}/{bits} dev eth0"));
            }
            for gateway in own {
                far.ip(&format!("route add default via {gateway}"));
            }
        }
        for (addr, bits) in REMOTE_POD.iter().zip([32, 128]) {
            w.other.ip(&format!("addr add {addr}/{bits} dev lo"));
        }
        w.node.ip(&format!("route add 10.71.129.0/24 via {}", OTHER[0]));
        w.node.ip(&format!("route add fd71:129::/64 via {}", OTHER[1]));
        // As by a default route.
        for (range, gateway) in SERVICE_RANGES.iter().zip(OUTSIDE) {
            w.node.ip(&format!("route add {range} via {gateway}"));
        }
        for (addr, bits) in NOBODYS.iter().zip([32, 128]) {
            w.outside.ip(&format!("addr add {addr}/{bits} dev lo"));
        }
        w.attach_pod("pod0", &w.pod, POD, 1);
        w.attach_pod("pod1", &w.client_pod, CLIENT_POD, 2);
        w
    }

    /// As our CNI plugin does: host routes and permanent neighbours.
    fn attach_pod(&self, name: &str, pod: &Net, addresses: Both, number: u8) {
        let (own, theirs) = (format!("02:71:00:00:00:{number:02x}"), format!("02:71:00:00:01:{number:02x}"));
        self.node.ip(&format!(
            "link add {name} address {own} type veth peer name eth0 address {theirs} netns {}",
            pod.0
        ));
        self.node.ip(&format!("link set {name} up"));
        pod.ip("link set eth0 up");
        for (addr, (bits, gateway)) in addresses.iter().zip([(32, "169.254.1.1"), (128, "fe80::1")]) {
            pod.ip(&format!("addr add {addr}/{bits} dev eth0"));
            pod.ip(&format!("neigh replace {gateway} lladdr {own} dev eth0 nud permanent"));
            if bits == 32 {
                pod.ip(&format!("route add {gateway} dev eth0 scope link"));
            }
            pod.ip(&format!("route add default via {gateway} dev eth0"));
            self.node.ip(&format!("neigh replace {addr} lladdr {theirs} dev {name} nud permanent"));
            self.node.ip(&format!("route add {addr}/{bits} dev {name}"));
        }
    }
}

pub fn any(to: SocketAddr) -> IpAddr {
    if to.is_ipv4() { "0.0.0.0".parse().unwrap() } else { "::".parse().unwrap() }
}

/// A connection from a port that others of this client may have too.
pub fn from_port(port: u16, to: SocketAddr, patience: Duration) -> std::io::Result<TcpStream> {
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    // It holds for connecting too.
    setsockopt(&fd, sockopt::SendTimeout, &TimeVal::microseconds(patience.as_micros() as i64))?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(any(to), port)))?;
    match connect(fd.as_raw_fd(), &SockaddrStorage::from(to)) {
        Err(Errno::EINPROGRESS) => return Err(Errno::ETIMEDOUT.into()),
        other => other?,
    }
    let s = TcpStream::from(fd);
    s.set_read_timeout(Some(patience))?;
    Ok(s)
}
