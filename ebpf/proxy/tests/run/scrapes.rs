//! Who reads pages gets them complete, and holds up nothing, however slowly.

use orlop_ebpf_common::addr_to;
use orlop_ebpf_loader::{Maps, RealMaps};

use super::many::in_node;
use super::topology::Node;
use super::*;

/// Services that a page has two lines of each.
const SERVICES: usize = 1_500;

/// A page as it is said to be long, or what there is of it.
fn whole(text: &str) -> bool {
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length =
        head.lines().find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
    length == Some(body.len())
}

fn complete(page: &str) {
    assert!(whole(page), "cut off after {} bytes", page.len());
    for name in ["connections", "refusals"] {
        let lines = page.lines().filter(|l| l.starts_with(&format!("orlop_proxy_service_{name}{{")));
        assert_eq!(lines.count(), SERVICES, "of {name}");
    }
}

/// A proxy with many Services in a network namespace where sockets take little at a time.
async fn talkative(api: &FakeApi, place: &Place) -> (Node, SocketAddr, CancellationToken) {
    for i in 0..SERVICES {
        let name = format!("one-of-many-services-{i}");
        api.put("services", service(&name, &format!("10.77.{}.{}", i / 250, i % 250 + 1), json!({})));
    }
    let node = Node::new("me", place);
    let address = api.address;
    api.listen(node.run(move || TcpListener::bind(address).unwrap()));
    node.run(|| {
        for name in ["tcp_wmem", "tcp_rmem"] {
            std::fs::write(format!("/proc/sys/net/ipv4/{name}"), "4096 16384 32768").unwrap();
        }
    });
    let stop = in_node(&node, &node.config).await.unwrap();
    let pages = node.config.health_address.unwrap();
    (node, pages, stop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_that_are_read_at_a_time_are_each_complete() {
    let _alone = ALONE.lock().await;
    let api = FakeApi::start().await;
    let place = Place::new(api.address);
    let (node, pages, stop) = talkative(&api, &place).await;
    let readers: Vec<_> = (0..6)
        .map(|_| {
            node.net.run(move || {
                (0..15).for_each(|_| complete(&ask_health(pages, "/metrics").unwrap()));
            })
        })
        .collect();
    // Not on the threads that answer.
    tokio::task::spawn_blocking(move || readers.into_iter().for_each(|r| r.join().unwrap())).await.unwrap();
    stop.cancel();
}

/// Readers that stop in the middle of a page.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_readers_hold_up_nothing() {
    const SLOW: usize = 8;
    let _alone = ALONE.lock().await;
    let api = FakeApi::start().await;
    let place = Place::new(api.address);
    let (node, pages, stop) = talkative(&api, &place).await;
    let has = |address: &str| {
        let wanted: std::net::IpAddr = address.parse().unwrap();
        let maps = RealMaps::open(&node.config.datapath.pins).unwrap();
        maps.dump().unwrap().frontends.keys().any(|k| addr_to(&k.addr) == wanted)
    };
    // They are cut off after a time. A machine that takes as long for the others says nothing.
    for round in 1.. {
        assert!(round <= 3, "nobody is answered before the slow ones are done");
        let slow = node.run(move || {
            let begin = || {
                let mut s = TcpStream::connect(pages).unwrap();
                write!(s, "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
                let mut first = [0; 12];
                s.read_exact(&mut first).unwrap();
                assert_eq!(&first, b"HTTP/1.1 200");
                s
            };
            (0..SLOW).map(|_| begin()).collect::<Vec<_>>()
        });
        let address = format!("10.78.0.{round}");
        api.put("services", service("another", &address, json!({})));
        wait_until("it is in the maps", PATIENCE, || async { has(&address).then_some(()) }).await;
        api.delete("services", "another");
        wait_until("it is not any more", PATIENCE, || async { (!has(&address)).then_some(()) }).await;
        node.run(move || {
            for _ in 0..3 {
                assert!(ask_health(pages, "/healthz").unwrap().starts_with("HTTP/1.1 200"));
                complete(&ask_health(pages, "/metrics").unwrap());
            }
        });
        let rest = |mut s: TcpStream| {
            let mut text = String::from("HTTP/1.1 200");
            s.read_to_string(&mut text).map(|_| text).unwrap_or_default()
        };
        if slow.into_iter().map(rest).all(|page| whole(&page)) {
            break;
        }
    }
    stop.cancel();
}
