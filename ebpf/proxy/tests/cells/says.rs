//! What `orlop proxy status|services|backends|flows|trace` say of maps that were made from a model, and of traffic.

use std::io::Read;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use orlop_ebpf_common::{TCP, UDP};
use orlop_proxy::model::{Endpoint, Hints, Model, Port, Service, Slice, SlicePort};
use orlop_proxy::{Question, inspect};

use crate::ask::serve;
use crate::world::*;
use crate::{Home, program_with};

const NODE_PORT: u16 = 30_080;

fn port(name: &str, proto: u8, port: u16, node_port: u16) -> Port {
    Port { name: name.into(), proto, port, node_port }
}

fn slice(service: &str, name: &str, proto: u8, endpoints: &[(&str, bool)]) -> Slice {
    let endpoints = endpoints.iter().map(|(ip, local)| Endpoint {
        ip: ip.parse().unwrap(),
        ready: true,
        serving: true,
        terminating: false,
        local: *local,
        hints: Hints::default(),
    });
    Slice {
        service: service.into(),
        v4: true,
        ports: vec![SlicePort { name: name.into(), proto, port: BACKEND_PORT }],
        endpoints: endpoints.collect(),
    }
}

/// One with affinity and a node port, one whose endpoints are elsewhere, one without any.
fn fill(model: &mut Model) {
    let ip = |a: &str| vec![a.parse().unwrap()];
    let web = Service {
        cluster_ips: ip("10.71.96.9"),
        ports: vec![port("http", TCP, 80, NODE_PORT)],
        affinity_seconds: 600,
        ..Service::default()
    };
    let names = Service {
        cluster_ips: ip("10.71.96.10"),
        load_balancer_ips: ip("10.71.202.10"),
        source_ranges: vec!["10.71.1.2/32".parse().unwrap()],
        external_local: true,
        ports: vec![port("", UDP, 53, 0)],
        ..Service::default()
    };
    let none =
        Service { cluster_ips: ip("10.71.96.11"), ports: vec![port("", TCP, 81, 0)], ..Service::default() };
    model.set_service("shop/web", Some(web));
    model.set_service("shop/names", Some(names));
    model.set_service("shop/none", Some(none));
    model.set_slice("web-1", Some(slice("shop/web", "http", TCP, &[(POD[0], true)])));
    model.set_slice("names-1", Some(slice("shop/names", "", UDP, &[(REMOTE_POD[0], false)])));
}

/// Numbers that no test knows are stars.
fn starred(text: &str, from: &str, to: &str) -> String {
    let line = |l: &str| match l.split_once(from) {
        Some((head, rest)) => match rest.find(to) {
            Some(end) => format!("{head}{from}*{}", &rest[end..]),
            None => format!("{head}{from}*"),
        },
        None => l.to_owned(),
    };
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn what_is_in_the_maps_is_said() {
    let w = World::new();
    let home = Home::new(false);
    serve(&w.pod, "pod", POD);
    serve(&w.other, "remote", REMOTE_POD);
    let _dp = program_with(&w, &home.config, fill);
    let say = |question: Question| {
        let pins = home.config.pins.clone();
        w.node.run(move || inspect(&pins, &question).unwrap()).join().unwrap().trim_end().to_owned()
    };
    let trace =
        |to: &str, udp: bool, outside: bool| say(Question::Trace { to: to.parse().unwrap(), udp, outside });

    assert_eq!(
        say(Question::Services),
        "shop/names  connections=0 refused=0
  10.71.96.10:53/UDP from inside -> 1 endpoints
  10.71.202.10:53/UDP from inside -> 1 endpoints [source ranges]
  10.71.202.10:53/UDP from outside -> 0 endpoints [no endpoint on this node, source ranges]
  all else at 10.71.96.10 -> refused
shop/none  connections=0 refused=0
  10.71.96.11:81/TCP from inside -> 0 endpoints
  all else at 10.71.96.11 -> refused
shop/web:http  connections=0 refused=0
  10.71.96.9:80/TCP from inside -> 1 endpoints [ClientIP affinity 600 s]
  node port 30080 (IPv4)/TCP from inside -> 1 endpoints [ClientIP affinity 600 s]
  node port 30080 (IPv4)/TCP from outside -> 1 endpoints [ClientIP affinity 600 s]
  all else at 10.71.96.9 -> refused"
    );
    let backends = say(Question::Backends);
    let mut backends: Vec<&str> =
        backends.lines().map(|l| l.split_once("  ").expect("the backend's number comes first").1).collect();
    backends.sort_unstable();
    assert_eq!(
        backends,
        ["10.71.128.2:8080/TCP (this node)  shop/web:http", "10.71.129.2:8080/UDP  shop/names"]
    );

    for (to, udp, outside, said) in [
        (
            "10.71.96.9:80",
            false,
            false,
            "10.71.96.9:80/TCP from inside of shop/web:http [ClientIP affinity 600 s]
  -> 10.71.128.2:8080/TCP (this node)",
        ),
        (
            "10.71.96.9:80",
            false,
            true,
            "10.71.96.9:80/TCP from inside of shop/web:http [ClientIP affinity 600 s]
  -> 10.71.128.2:8080/TCP (this node)",
        ),
        (
            "10.71.1.1:30080",
            false,
            true,
            "node port 30080 (IPv4)/TCP from outside of shop/web:http [ClientIP affinity 600 s]
  -> 10.71.128.2:8080/TCP (this node)",
        ),
        (
            "10.71.1.2:30080",
            false,
            true,
            "30080 is a node port, but node ports do not answer on 10.71.1.2
10.71.1.2:30080/TCP is no Service: the packet goes on as it is",
        ),
        (
            "10.71.202.10:53",
            true,
            true,
            "10.71.202.10:53/UDP from outside of shop/names [no endpoint on this node, source ranges]
  admits 10.71.1.2/32
  no endpoint: dropped",
        ),
        (
            "10.71.96.11:81",
            false,
            false,
            "10.71.96.11:81/TCP from inside of shop/none
  no endpoint: refused",
        ),
        (
            "10.71.96.9:81",
            false,
            false,
            "all else at 10.71.96.9 of shop/web:http [ClientIP affinity 600 s]
  no endpoint: refused",
        ),
        ("10.71.97.9:80", false, false, "10.71.97.9:80/TCP is no Service: the packet goes on as it is"),
        (
            "10.71.96.77:80",
            false,
            false,
            "10.71.96.77:80/TCP is no Service's address, but one of their range: dropped where it leaves the node",
        ),
    ] {
        assert_eq!(trace(to, udp, outside), said, "{to} udp={udp} outside={outside}");
    }
    assert_eq!(say(Question::Flows { service: None }), "");

    // Connections from outside, a datagram of a pod that the socket hooks do not see, and one to nobody.
    let ask = |net: &Net, to: &str| {
        let to: SocketAddr = to.parse().unwrap();
        let connect = move || {
            let mut text = String::new();
            let read = TcpStream::connect_timeout(&to, Duration::from_secs(20))
                .and_then(|mut s| s.read_to_string(&mut text));
            read.map(|_| text).map_err(|e| e.kind())
        };
        net.run(connect).join().unwrap()
    };
    for _ in 0..2 {
        assert_eq!(ask(&w.outside, "10.71.1.1:30080"), Ok("pod 10.71.1.2".to_owned()));
    }
    assert!(ask(&w.client_pod, "10.71.96.11:81").is_err());
    let ask = || {
        let s = UdpSocket::bind("0.0.0.0:0").unwrap();
        s.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        s.send_to(b"?", "10.71.96.10:53").unwrap();
        s.recv_from(&mut [0; 64]).unwrap();
    };
    w.client_pod.run(ask).join().unwrap();
    let services = say(Question::Services);
    let heads: Vec<&str> = services.lines().filter(|l| !l.starts_with(' ')).collect();
    assert_eq!(
        heads,
        [
            "shop/names  connections=1 refused=0",
            "shop/none  connections=0 refused=1",
            "shop/web:http  connections=2 refused=0",
        ]
    );
    let flows = |service: Option<&str>| {
        let text = say(Question::Flows { service: service.map(str::to_owned) });
        let text = starred(&text, "10.71.1.2:", " ");
        let text = starred(&starred(&text, "10.71.128.3:", " "), "idle ", " s");
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    let web =
        "packets TCP 10.71.1.2:* -> 10.71.1.1:30080 => 10.71.128.2:8080  shop/web:http  idle * s, closing";
    // The last packets of the connections may still be on their way.
    let start = std::time::Instant::now();
    while flows(Some("web")) != [web, web] {
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", flows(Some("web")));
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(
        flows(None),
        [
            web,
            web,
            "packets TCP 10.71.128.3:* -> 10.71.96.11:81 => refused  shop/none  idle * s",
            "packets UDP 10.71.128.3:* -> 10.71.96.10:53 => 10.71.129.2:8080  shop/names  idle * s",
        ]
    );

    let status = say(Question::Status);
    let value = |what: &str| {
        let line = status.lines().find(|l| l.starts_with(what)).unwrap_or_else(|| panic!("{what}: {status}"));
        line[what.len()..].trim().to_owned()
    };
    let interfaces: Vec<&str> =
        status.lines().filter_map(|l| l.strip_prefix("interface")).map(str::trim).collect();
    let all = ["up0 (uplink", "up1 (uplink", "pod0 (pod", "pod1 (pod"];
    assert!(all.iter().all(|i| interfaces.iter().any(|l| l.starts_with(i))), "{status}");
    assert_eq!(interfaces.len(), 4);
    for (what, expected) in [
        ("socket programs attached", "9 of 9"),
        ("node ports answer on", "10.71.1.1 10.71.2.1 fd71:1::1 fd71:2::1"),
        ("node ports on loopback", "yes"),
        ("addresses of Services alone", "10.71.96.0/24 fd71:96::/64"),
        ("packets for no Service", "0"),
        ("service ports", "3"),
        ("service addresses", "7"),
        ("endpoints", "2"),
        ("connections through interfaces", "4"),
        ("clients with affinity", "1"),
        ("packet connections", "3"),
        ("packet refusals", "1"),
        ("packets dropped", "0"),
        ("source ports exhausted", "0"),
    ] {
        assert_eq!(value(what), expected, "{what}: {status}");
    }
}
