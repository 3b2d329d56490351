//! Maps that are too small.

use orlop_ebpf_loader::{Maps, RealMaps};

use super::*;

/// Of two frontends each, its port and the rest of its address.
const ROOM: u32 = 4;
const CHANGES: u32 = 40;

/// A place with little room, and Services at these addresses, with one server for all.
async fn begin_in_small(addresses: &[&str]) -> (MutexGuard<'static, ()>, FakeApi, Place, SocketAddr) {
    let (alone, api, mut place) = begin().await;
    place.config.datapath.sizes.frontends = ROOM;
    let a = server("a", SocketAddr::from(([127, 0, 0, 1], 0)));
    for (name, ip) in ["one", "two", "three"].into_iter().zip(addresses) {
        api.put("services", service(name, ip, json!({})));
        api.put("endpointslices", slice(name, a.port()));
    }
    (alone, api, place, a)
}

async fn failures(at: SocketAddr) -> u32 {
    let page = health(at, "/metrics").await;
    let line = page.lines().find_map(|l| l.strip_prefix("orlop_proxy_sync_failures_total "));
    line.unwrap_or_else(|| panic!("{page}")).parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_does_not_fit_is_not_tried_at_every_event() {
    let (_alone, api, place, a) = begin_in_small(&["127.96.40.1", "127.96.40.2"]).await;
    let proxy = start(&place.config).await;
    let page = place.config.health_address.unwrap();
    api.put("endpointslices", slice("three", a.port()));
    api.put("services", service("three", "127.96.40.3", json!({})));
    wait_until("there is no room", PATIENCE, || async { (failures(page).await > 0).then_some(()) }).await;

    // Changes of another, each of which is waited for.
    let maps = RealMaps::open(&place.config.datapath.pins).unwrap();
    for i in 1..=CHANGES {
        let seconds = json!({"clientIP": {"timeoutSeconds": i}});
        let affinity = json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": seconds});
        api.put("services", service("one", "127.96.40.1", affinity));
        wait_until("the change is there", PATIENCE, || async {
            maps.dump().unwrap().frontends.values().any(|v| v.affinity_seconds == i).then_some(())
        })
        .await;
    }
    // Pauses are doubled up to half a minute, so that it was tried a few times at most.
    let tried = failures(page).await;
    assert!(tried < CHANGES / 2, "tried {tried} times");

    api.delete("services", "two");
    wait_until("there is room", PATIENCE, || async { ask("127.96.40.3:80").ok() }).await;
    end(proxy).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_that_fit_are_served_from_the_start() {
    let addresses = ["127.96.41.1", "127.96.41.2", "127.96.41.3"];
    let (_alone, api, place, _) = begin_in_small(&addresses).await;
    let (stop, ready) = (CancellationToken::new(), Ready::default());
    let task = tokio::spawn(run(place.config.clone(), ready.clone(), stop.clone()));
    wait_until("two of three answer", PATIENCE, || async {
        let answer = addresses.iter().filter(|ip| ask(&format!("{ip}:80")).is_ok());
        (answer.count() == 2).then_some(())
    })
    .await;
    assert!(!ready.is_set(), "one is missing");
    assert!(health_of(place.config.health_address.unwrap()).await.starts_with("HTTP/1.1 503"));

    api.delete("services", "one");
    api.delete("services", "two");
    wait_until("the third answers", PATIENCE, || async { ask("127.96.41.3:80").ok() }).await;
    ready.wait().await;
    end((stop, task)).await;
}
