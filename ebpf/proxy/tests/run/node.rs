//! What the proxy is told of besides Services: addresses that are Services' alone, and the node's own.

use std::collections::BTreeSet;
use std::net::IpAddr;

use orlop_ebpf_common::{SERVICE_RANGE, addr_to, local_flags};
use orlop_ebpf_loader::{Dump, Maps, RealMaps};
use orlop_proxy::NodePortAddress;

use super::many::in_node;
use super::topology::Node;
use super::*;
use crate::world::ip;

/// A node whose proxy is to serve all interfaces that it finds.
async fn begin_on_node() -> (MutexGuard<'static, ()>, FakeApi, Place, Node) {
    let (alone, api, place) = begin().await;
    let mut node = Node::new("me", &place);
    node.serve_all_interfaces();
    node.reaches(&api);
    (alone, api, place, node)
}

fn dump(place: &Place) -> Dump {
    RealMaps::open(&place.config.datapath.pins).unwrap().dump().unwrap()
}

fn ranges(place: &Place) -> BTreeSet<(String, u8)> {
    let dump = dump(place);
    let reserved = dump.ranges.iter().filter(|(k, _)| k.service == SERVICE_RANGE);
    reserved.map(|(k, bits)| (addr_to(&k.addr).to_string(), *bits)).collect()
}

async fn ranges_become(place: &Place, wanted: &[(&str, u8)]) {
    let wanted: BTreeSet<_> = wanted.iter().map(|(a, bits)| ((*a).to_owned(), *bits)).collect();
    wait_until(&format!("{wanted:?} in the maps"), PATIENCE, || async {
        (ranges(place) == wanted).then_some(())
    })
    .await;
}

fn service_cidr(name: &str, cidrs: &[&str]) -> serde_json::Value {
    json!({"metadata": {"name": name}, "spec": {"cidrs": cidrs}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_service_range_follows_its_objects_and_may_be_unknown() {
    let (_alone, api, place) = begin().await;
    let a = server("a", SocketAddr::from(([127, 0, 0, 1], 0)));
    api.put("services", service("web", "127.96.3.1", json!({})));
    api.put("endpointslices", slice("web", a.port()));
    api.put("servicecidrs", service_cidr("kubernetes", &["10.96.0.0/12", "fd00:96::/112"]));
    let proxy = start(&place.config).await;
    let default = [("10.96.0.0", 96 + 12), ("fd00:96::", 112)];
    ranges_become(&place, &default).await;
    api.put("servicecidrs", service_cidr("more", &["10.112.0.0/16"]));
    ranges_become(&place, &[("10.96.0.0", 96 + 12), ("10.112.0.0", 96 + 16), ("fd00:96::", 112)]).await;
    api.delete("servicecidrs", "more");
    ranges_become(&place, &default).await;

    // One that refuses for a while, as one does that starts: the watch goes on where it was and says nothing.
    api.refuse("servicecidrs", Some(403));
    wait_until("a second try", PATIENCE, || async { (api.refusals() > 1).then_some(()) }).await;
    assert_eq!(ranges(&place).len(), 2, "what is known stays");
    api.refuse("servicecidrs", None);
    api.put("servicecidrs", service_cidr("more", &["10.112.0.0/16"]));
    ranges_become(&place, &[("10.96.0.0", 96 + 12), ("10.112.0.0", 96 + 16), ("fd00:96::", 112)]).await;
    api.delete("servicecidrs", "more");
    ranges_become(&place, &default).await;

    end(proxy).await;
    assert_eq!(ranges(&place).len(), 2, "the rule outlives the proxy");

    // An API server that will not say, or that is too old to know: the rule goes, everything else stays.
    for code in [403, 404] {
        api.refuse("servicecidrs", Some(code));
        let proxy = start(&place.config).await;
        ranges_become(&place, &[]).await;
        assert_eq!(ask("127.96.3.1:80").unwrap(), "a");
        api.refuse("servicecidrs", None);
        ranges_become(&place, &default).await;
        end(proxy).await;
    }
    api.delete("servicecidrs", "kubernetes");
    let proxy = start(&place.config).await;
    ranges_become(&place, &[]).await;
    end(proxy).await;
}

/// Addresses of IPv4 that node ports answer on.
fn serving(place: &Place) -> BTreeSet<IpAddr> {
    let dump = dump(place);
    let serving = dump.locals.iter().filter(|(_, f)| **f & local_flags::NODE_PORT != 0);
    serving.map(|(a, _)| addr_to(a)).filter(IpAddr::is_ipv4).collect()
}

fn node(addresses: &[(&str, &str)]) -> serde_json::Value {
    let addresses: Vec<_> = addresses.iter().map(|(t, a)| json!({"type": t, "address": a})).collect();
    json!({"metadata": {"name": "me"}, "status": {"addresses": addresses}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node_ports_answer_on_the_addresses_of_the_node_object() {
    let (_alone, api, mut place) = begin().await;
    place.config.node_port_addresses = vec![NodePortAddress::Primary];
    let own: BTreeSet<IpAddr> = ["127.0.0.1".parse().unwrap()].into();
    let become_ = |wanted: BTreeSet<IpAddr>| {
        let place = &place;
        async move {
            wait_until(&format!("node ports on {wanted:?}"), PATIENCE, || async {
                (serving(place) == wanted).then_some(())
            })
            .await;
        }
    };
    // The only address that every machine has.
    api.put("nodes", node(&[("Hostname", "me"), ("ExternalIP", "192.0.2.77"), ("InternalIP", "127.0.0.1")]));
    let proxy = start(&place.config).await;
    become_(own.clone()).await;
    api.put("nodes", node(&[("InternalIP", "192.0.2.77")]));
    become_(BTreeSet::new()).await;
    api.put("nodes", node(&[("InternalIP", "127.0.0.1")]));
    become_(own.clone()).await;
    end(proxy).await;

    // Until the cluster says it again, what was known holds.
    api.delete("nodes", "me");
    let proxy = start(&place.config).await;
    assert_eq!(serving(&place), own);
    api.put("nodes", node(&[("InternalIP", "192.0.2.77")]));
    become_(BTreeSet::new()).await;
    end(proxy).await;
}

/// Interfaces and addresses that come while Services, and other addresses, change without a pause.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_interfaces_and_addresses_are_served_however_much_else_changes() {
    let (_alone, api, _place, node) = begin_on_node().await;
    let stop = in_node(&node, &node.config).await.unwrap();
    let maps = || RealMaps::open(&node.config.datapath.pins).unwrap();
    let has = |address: &str| {
        let wanted: IpAddr = address.parse().unwrap();
        maps().dump().unwrap().locals.keys().any(|a| addr_to(a) == wanted)
    };

    let over = CancellationToken::new();
    let (changing, done) = (api.clone(), over.clone());
    let services = tokio::spawn(async move {
        for i in 0u32.. {
            let affinity = ["None", "ClientIP"][i as usize % 2];
            changing.put("services", service("w", "10.74.96.1", json!({"sessionAffinity": affinity})));
            if done.is_cancelled() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    node.net.ip("addr add 10.74.3.1/32 dev lo");
    node.net.ip("link add c0 type veth peer name c1");
    node.net.ip("link set c0 up");
    wait_until("the address is known", PATIENCE, || async { has("10.74.3.1").then_some(()) }).await;
    wait_until("the interface is served", PATIENCE, || async {
        (!maps().uplinks().is_empty()).then_some(())
    })
    .await;

    let (netns, done) = (node.net.0.clone(), over.clone());
    let addresses = std::thread::spawn(move || {
        while !done.is_cancelled() {
            ip(&format!("-n {netns} addr add 10.74.3.9/32 dev lo"));
            ip(&format!("-n {netns} addr del 10.74.3.9/32 dev lo"));
        }
    });
    node.net.ip("addr del 10.74.3.1/32 dev lo");
    node.net.ip("addr add 10.74.3.2/32 dev lo");
    node.net.ip("link del c0");
    wait_until("the new address is known, the old one not", PATIENCE, || async {
        (has("10.74.3.2") && !has("10.74.3.1")).then_some(())
    })
    .await;
    wait_until("the interface is gone", PATIENCE, || async { maps().uplinks().is_empty().then_some(()) })
        .await;
    over.cancel();
    services.await.unwrap();
    addresses.join().unwrap();
    stop.cancel();
}

/// One whose programs cannot be attached at first: something is in the way of a pin.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interface_that_could_not_be_served_is_tried_again() {
    let (_alone, _api, _place, node) = begin_on_node().await;
    let stop = in_node(&node, &node.config).await.unwrap();
    let link = |name: &str| node.config.datapath.pins.join("links").join(name);
    std::fs::create_dir(link("in_770")).unwrap();
    node.net.ip("link add c0 index 770 type veth peer name c1");
    node.net.ip("link set c0 up");
    wait_until("one half is attached", PATIENCE, || async { link("out_770").exists().then_some(()) }).await;
    std::fs::remove_dir(link("in_770")).unwrap();
    wait_until("the other half is, too", PATIENCE, || async { link("in_770").is_file().then_some(()) }).await;
    stop.cancel();
}

/// What serves an interface stays while it is down, and goes with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interface_that_is_down_keeps_its_programs() {
    let (_alone, _api, _place, node) = begin_on_node().await;
    node.net.ip("link add c0 type veth peer name c1");
    node.net.ip("link set c0 up");
    let stop = in_node(&node, &node.config).await.unwrap();
    let maps = || RealMaps::open(&node.config.datapath.pins).unwrap();
    let served = || maps().uplinks().into_iter().map(|(index, _)| index).collect::<Vec<_>>();
    let before = served();
    assert_eq!(before.len(), 1);
    node.net.ip("link set c0 down");
    // The proxy has seen the one when it has seen the other.
    node.net.ip("addr add 10.74.3.1/32 dev lo");
    let wanted: IpAddr = "10.74.3.1".parse().unwrap();
    wait_until("the address is known", PATIENCE, || async {
        maps().dump().unwrap().locals.keys().any(|a| addr_to(a) == wanted).then_some(())
    })
    .await;
    assert_eq!(served(), before);
    for end in ["in", "out"] {
        assert!(node.config.datapath.pins.join(format!("links/{end}_{}", before[0])).exists());
    }
    node.net.ip("link del c0");
    wait_until("it goes with the interface", PATIENCE, || async { served().is_empty().then_some(()) }).await;
    stop.cancel();
}
