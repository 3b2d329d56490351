//! Host ports and masquerading, in real network namespaces.

mod common;

use std::fs::File;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use common::{NODE_IP, Node, Pod, inside, run, talk, talk_by};
use orlop_cni_invoke::{Error, PortMapping};

const WORLD: &str = "192.168.77.254";

fn conflist(ranges: &[&str], except: &[&str]) -> String {
    serde_json::json!({"cniVersion": "1.1.0", "name": "test", "plugins": [
        {"type": "orlop-cni", "capabilities": {"portMappings": true}, "masquerade": {"except": except},
         "ipam": {"ranges": ranges, "dataDir": "DATA"}}]})
    .to_string()
}

/// The world behind the node's uplink; it has no route to pods.
fn world() -> File {
    let world = std::thread::spawn(common::new_netns).join().unwrap();
    run(&format!("ip link set up1 netns /proc/{}/fd/{}", std::process::id(), world.as_raw_fd()));
    inside(&world, || {
        run("ip link set lo up");
        run(&format!("ip addr add {WORLD}/24 dev up1"));
        run("ip addr add 2001:db8::254/64 dev up1 nodad");
        run("ip link set up1 up");
    });
    world
}

fn mapping(host_ip: &str, host_port: u16, protocol: &str) -> PortMapping {
    PortMapping { host_port, container_port: 80, protocol: protocol.into(), host_ip: host_ip.into() }
}

fn pod_with(id: &str, mappings: &[PortMapping]) -> Pod {
    let mut pod = Pod::new(id);
    pod.network.port_mappings = mappings.to_vec();
    pod
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A program that another test starts has the listener of before for a moment, between its fork and its exec.
fn listen(address: SocketAddr) -> TcpListener {
    let start = Instant::now();
    loop {
        match TcpListener::bind(address) {
            Err(e) if e.kind() == ErrorKind::AddrInUse && start.elapsed() < Duration::from_secs(10) => {
                std::thread::sleep(Duration::from_millis(5));
            }
            other => return other.unwrap(),
        }
    }
}

/// Who the pod sees when `from` asks at `by`.
fn seen(from: &File, pod: &Pod, pod_ip: &str, by: &str) -> IpAddr {
    let listener = inside(&pod.netns, || listen(SocketAddr::new(ip(pod_ip), 80)));
    talk_by(from, listener, addr(by))
}

fn refused(from: &File, by: &str) -> bool {
    let address = addr(by);
    inside(from, || TcpStream::connect_timeout(&address, Duration::from_secs(2)).is_err())
}

fn tables() -> String {
    run("nft list tables")
}

#[tokio::test]
async fn host_ports_lead_to_pods_from_everywhere() {
    host_ports(Node::new(&conflist(&["10.60.0.0/24"], &[]))).await;
}

#[tokio::test]
async fn host_ports_of_a_part_of_the_runtime() {
    host_ports(Node::new(&conflist(&["10.60.0.0/24"], &[])).builtin()).await;
}

async fn host_ports(node: Node) {
    let world = world();
    let a = pod_with("a", &[mapping("", 8080, "tcp"), mapping("", 8080, "udp")]);
    let b = pod_with("b", &[mapping("127.0.0.1", 8081, "tcp"), mapping(NODE_IP, 8082, "TCP")]);
    let c = Pod::new("c");
    for pod in [&a, &b, &c] {
        node.cni.add(&pod.network).await.unwrap();
        node.cni.check(&pod.network).await.unwrap();
    }
    let (ip_a, ip_b, ip_c) = ("10.60.0.2", "10.60.0.3", "10.60.0.4");
    assert_eq!(seen(&world, &a, ip_a, "192.168.77.1:8080"), ip(WORLD), "the client's address is kept");
    assert_eq!(seen(&c.netns, &a, ip_a, "192.168.77.1:8080"), ip(ip_c));
    seen(&node.netns, &a, ip_a, "192.168.77.1:8080");
    seen(&node.netns, &a, ip_a, "127.0.0.1:8080");
    seen(&a.netns, &a, ip_a, "192.168.77.1:8080");

    seen(&node.netns, &b, ip_b, "127.0.0.1:8081");
    assert!(refused(&world, "192.168.77.1:8081"), "the port is the loopback address's alone");
    assert_eq!(seen(&world, &b, ip_b, "192.168.77.1:8082"), ip(WORLD));
    assert!(refused(&node.netns, "127.0.0.1:8082"));

    // UDP has a port of its own. Its flow outlives the pod in the kernel's table as long as the client sends.
    let server = inside(&a.netns, || UdpSocket::bind("10.60.0.2:80").unwrap());
    let client = inside(&world, || UdpSocket::bind("0.0.0.0:0").unwrap());
    client.send_to(b"ping", "192.168.77.1:8080").unwrap();
    server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut buffer = [0; 16];
    let (_, peer) = server.recv_from(&mut buffer).unwrap();
    server.send_to(b"pong", peer).unwrap();
    assert_eq!(client.recv_from(&mut buffer).unwrap(), (4, addr("192.168.77.1:8080")));

    // The node's loopback addresses stay its own.
    let own = TcpListener::bind("127.0.0.1:0").unwrap();
    inside(&a.netns, || {
        run("ip route add 127.0.0.2/32 via 169.254.1.1 dev eth0");
        run("ip addr del 127.0.0.1/8 dev lo");
        run("ip route add 127.0.0.1/32 via 169.254.1.1 dev eth0");
        std::fs::write("/proc/sys/net/ipv4/conf/eth0/route_localnet", "1").unwrap();
    });
    assert!(refused(&a.netns, &own.local_addr().unwrap().to_string()), "CVE-2020-8558");

    node.cni.del(&a.network).await.unwrap();
    assert!(refused(&node.netns, "192.168.77.1:8080"));
    client.send_to(b"ping", "192.168.77.1:8080").unwrap();
    let next = pod_with("next", &[mapping("", 8080, "udp")]);
    let ips = node.cni.add(&next.network).await.unwrap().pod_ips("eth0");
    let server = inside(&next.netns, || UdpSocket::bind((ips[0], 80)).unwrap());
    server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    client.send_to(b"again", "192.168.77.1:8080").unwrap();
    assert_eq!(server.recv_from(&mut buffer).unwrap().0, 5);
    node.cni.del(&next.network).await.unwrap();

    seen(&node.netns, &b, ip_b, "127.0.0.1:8081");
    assert!(tables().contains("orlop-cni-"));
    node.cni.del(&b.network).await.unwrap();
    node.cni.del(&c.network).await.unwrap();
    node.cni.del(&c.network).await.unwrap();
    assert_eq!(tables(), "", "the last pod takes the rules with it");
}

#[tokio::test]
async fn a_taken_host_port_is_refused_and_leaves_nothing() {
    let node = Node::new(&conflist(&["10.61.0.0/24"], &[]));
    let (a, b) = (pod_with("a", &[mapping("", 8080, "tcp")]), pod_with("b", &[mapping("", 8080, "tcp")]));
    node.cni.add(&a.network).await.unwrap();
    let e = node.cni.add(&b.network).await.unwrap_err();
    assert!(
        matches!(&e, Error::Plugin { source, .. } if source.code == 103 && source.msg.contains("another pod")),
        "{e:?}"
    );
    assert_eq!((node.host_links().len(), node.recorded().len()), (1, 1));
    seen(&node.netns, &a, "10.61.0.2", "192.168.77.1:8080");
    node.cni.del(&a.network).await.unwrap();
    node.cni.add(&b.network).await.unwrap();
    seen(&node.netns, &b, "10.61.0.4", "192.168.77.1:8080");
    node.cni.gc(&[]).await.unwrap();
    assert_eq!(tables(), "");

    let bad = pod_with("bad", &[mapping("nowhere", 1, "tcp")]);
    let e = node.cni.add(&bad.network).await.unwrap_err();
    assert!(matches!(&e, Error::Plugin { source, .. } if source.msg.contains("nowhere")), "{e:?}");
    assert!(node.host_links().is_empty() && node.recorded().is_empty() && tables().is_empty());
}

#[tokio::test]
async fn pods_reach_the_world_as_their_node() {
    let node = Node::new(&conflist(&["10.62.0.0/24", "fd62::/64"], &["192.168.78.0/24", "10.62.0.0/16"]));
    run("ip addr add 2001:db8::1/64 dev up0 nodad");
    let world = world();
    inside(&world, || {
        run("ip addr add 192.168.78.1/24 dev up1");
        // Only for the network that is to see pods as they are.
        run("ip route add 10.62.0.0/24 via 192.168.77.1 src 192.168.78.1");
    });
    run("ip route add 192.168.78.0/24 dev up0");
    let (a, b) = (Pod::new("a"), Pod::new("b"));
    node.cni.add(&a.network).await.unwrap();
    node.cni.add(&b.network).await.unwrap();
    assert_eq!(talk(&a.netns, &world, ip(WORLD)), ip(NODE_IP));
    assert_eq!(talk(&a.netns, &world, ip("2001:db8::254")), ip("2001:db8::1"));
    assert_eq!(talk(&a.netns, &world, ip("192.168.78.1")), ip("10.62.0.2"), "excepted");
    assert_eq!(talk(&a.netns, &b.netns, ip("10.62.0.3")), ip("10.62.0.2"));
    assert_eq!(talk(&a.netns, &b.netns, ip("fd62::3")), ip("fd62::2"));
    assert_eq!(talk(&a.netns, &node.netns, ip(NODE_IP)), ip("10.62.0.2"));

    // A changed configuration takes effect with the next pod; what is mapped stays.
    let c = pod_with("c", &[mapping("", 8080, "tcp")]);
    node.cni.add(&c.network).await.unwrap();
    node.configure(&conflist(&["10.62.0.0/24", "fd62::/64"], &[]));
    let d = Pod::new("d");
    node.cni.add(&d.network).await.unwrap();
    assert_eq!(talk(&a.netns, &world, ip("192.168.78.1")), ip(NODE_IP));
    seen(&world, &c, "10.62.0.4", "192.168.77.1:8080");
    for pod in [&a, &b, &c, &d] {
        node.cni.del(&pod.network).await.unwrap();
    }
    assert_eq!(tables(), "");
}
