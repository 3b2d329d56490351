//! What the proxy says about itself and the node: health pages, health check ports, metrics.

use std::net::{Ipv6Addr, SocketAddr};

use orlop_base::testkit::{free_port, wait_until};
use serde_json::{Value, json};

use crate::{PATIENCE, ask, ask_health, begin, end, health, server, service, slice, start};

fn node(extra: Value) -> Value {
    let mut node = json!({"metadata": {"name": "me", "uid": "1"}, "spec": {}});
    node["spec"] = extra;
    node
}

/// Status, the header that weighs this node, and what is said.
fn check(port: u16) -> Option<(u16, Option<String>, Value)> {
    let page = ask_health(SocketAddr::from(([127, 0, 0, 1], port)), "/").ok()?;
    let (head, body) = page.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let weight = head.lines().find_map(|l| {
        let (name, value) = l.split_once(": ")?;
        name.eq_ignore_ascii_case("X-Load-Balancing-Endpoint-Weight").then(|| value.to_owned())
    });
    Some((status, weight, serde_json::from_str(body).ok()?))
}

fn local(name: &str, ip: &str, port: u16) -> Value {
    let extra =
        json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": port});
    service(name, ip, extra)
}

async fn answers_for(port: u16, name: &str, endpoints: usize) {
    let expected = json!({
        "service": {"namespace": "n", "name": name}, "localEndpoints": endpoints, "serviceProxyHealthy": true,
    });
    let status = if endpoints > 0 { 200 } else { 503 };
    let last = std::cell::RefCell::new(None);
    let right = tokio::time::timeout(
        PATIENCE,
        wait_until("the check answers", PATIENCE * 2, || async {
            *last.borrow_mut() = tokio::task::block_in_place(|| check(port));
            let all = (status, Some(endpoints.to_string()), expected.clone());
            (last.borrow().as_ref() == Some(&all)).then_some(())
        }),
    );
    assert!(right.await.is_ok(), "port {port} for {name} with {endpoints}: {:?}", last.borrow());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_check_ports_follow_their_services() {
    let (_alone, api, place) = begin().await;
    let at = server("a", SocketAddr::from(([127, 0, 0, 1], 0)));
    let proxy = start(&place.config).await;
    let (one, two) = (free_port(), free_port());

    // A port that somebody else has is served when it is free.
    let taken = std::net::TcpListener::bind((Ipv6Addr::UNSPECIFIED, one)).unwrap();
    api.put("services", local("a", "127.96.20.1", one));
    api.put("endpointslices", slice("a", at.port()));
    wait_until("the Service answers", PATIENCE, || async { ask("127.96.20.1:80").ok() }).await;
    drop(taken);
    answers_for(one, "a", 1).await;

    // Another Service takes its place, and two change ports.
    for round in 0..5 {
        let (old, new) = [("a", "b"), ("b", "a")][round % 2];
        let endpoints = usize::from(new == "a");
        api.delete("services", old);
        api.put("services", local(new, "127.96.20.1", one));
        answers_for(one, new, endpoints).await;
        api.put("services", local("c", "127.96.20.3", two));
        answers_for(two, "c", 0).await;
        api.put("services", local("c", "127.96.20.3", one));
        api.put("services", local(new, "127.96.20.1", two));
        answers_for(two, new, endpoints).await;
        answers_for(one, "c", 0).await;
        api.put("services", local("c", "127.96.20.3", 0));
        api.put("services", local(new, "127.96.20.1", one));
        answers_for(one, new, endpoints).await;
        wait_until("the other is closed", PATIENCE, || async { check(two).is_none().then_some(()) }).await;
    }
    end(proxy).await;
}

/// Connections that say nothing, more than there are places: who asks is answered all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_connections_keep_nobody_from_an_answer() {
    let (_alone, api, place) = begin().await;
    let port = free_port();
    api.put("services", local("a", "127.96.21.1", port));
    let proxy = start(&place.config).await;
    answers_for(port, "a", 0).await;
    let health_address = place.config.health_address.unwrap();
    let silent: Vec<_> = [health_address, SocketAddr::from(([127, 0, 0, 1], port))]
        .into_iter()
        .flat_map(|at| (0..100).map(move |_| std::net::TcpStream::connect(at).unwrap()))
        .collect();
    for _ in 0..3 {
        let page = tokio::time::timeout(PATIENCE, health(health_address, "/healthz")).await.unwrap();
        assert!(page.starts_with("HTTP/1.1 200"), "{page}");
        answers_for(port, "a", 0).await;
    }
    drop(silent);
    end(proxy).await;
}

/// Where node ports answer is where these ports do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_check_ports_answer_on_node_port_addresses_only() {
    let (_alone, api, mut place) = begin().await;
    let port = free_port();
    api.put("services", local("a", "127.96.22.1", port));
    let by_ipv6 = || std::net::TcpStream::connect((Ipv6Addr::LOCALHOST, port));
    for (nets, both) in [(vec!["127.0.0.0/8"], false), (vec![], true), (vec!["127.0.0.0/8", "::1/128"], true)]
    {
        place.config.node_port_addresses = nets.iter().map(|n| n.parse().unwrap()).collect();
        let proxy = start(&place.config).await;
        answers_for(port, "a", 0).await;
        assert_eq!(by_ipv6().is_ok(), both, "{nets:?}");
        end(proxy).await;
    }
}

/// Load balancers are told when the node goes, those who would restart the proxy are not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_goes_says_so() {
    let (_alone, api, place) = begin().await;
    api.put("nodes", node(json!({})));
    let proxy = start(&place.config).await;
    let at = place.config.health_address.unwrap();
    let going =
        json!({"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "value": "1", "effect": "NoSchedule"}]});
    let other = json!({"taints": [{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}]});
    let mut deleted = node(json!({"taints": null}));
    deleted["metadata"]["deletionTimestamp"] = json!("2026-11-21T10:00:00Z");
    for (what, object, eligible) in [
        ("the autoscaler takes the machine away", node(going), false),
        ("it has thought better of it", node(other), true),
        ("deleted", deleted, false),
        ("made anew", node(json!({})), true),
    ] {
        api.put("nodes", object);
        let status = if eligible { "HTTP/1.1 200" } else { "HTTP/1.1 503" };
        let page = wait_until(what, PATIENCE, || async {
            let page = health(at, "/healthz").await;
            page.starts_with(status).then_some(page)
        })
        .await;
        let said: Value = serde_json::from_str(page.split_once("\r\n\r\n").unwrap().1).unwrap();
        assert_eq!((&said["nodeEligible"], &said["healthy"]), (&json!(eligible), &json!(true)), "{what}");
        let page = health(at, "/livez").await;
        assert!(page.starts_with("HTTP/1.1 200") && !page.contains("nodeEligible"), "{what}: {page}");
    }
    api.delete("nodes", "me");
    wait_until("the node is gone", PATIENCE, || async {
        health(at, "/healthz").await.starts_with("HTTP/1.1 503").then_some(())
    })
    .await;
    end(proxy).await;
}

/// Upstream's names (k8s.io/kubernetes pkg/proxy/metrics), as dashboards ask for them.
const UPSTREAM: [&str; 11] = [
    "kubeproxy_sync_proxy_rules_duration_seconds_count",
    "kubeproxy_network_programming_duration_seconds_count",
    "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
    "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
    "kubeproxy_sync_proxy_rules_service_changes_total",
    "kubeproxy_sync_proxy_rules_service_changes_pending",
    "kubeproxy_sync_proxy_rules_endpoint_changes_total",
    "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
    "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
    "kubeproxy_proxy_healthz_total",
    "kubeproxy_proxy_livez_total",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_say_what_happened() {
    let (_alone, api, place) = begin().await;
    let at = server("a", SocketAddr::from(([127, 0, 0, 1], 0)));
    api.put("services", service("web", "127.96.30.1", json!({})));
    api.put("endpointslices", slice("web", at.port()));
    let mut away = slice("away", at.port());
    away["endpoints"][0]["nodeName"] = json!("elsewhere");
    api.put("services", service("away", "127.96.30.2", json!({"internalTrafficPolicy": "Local"})));
    api.put("endpointslices", away);
    api.put("services", service("none", "127.96.30.3", json!({})));
    let proxy = start(&place.config).await;
    let health_address = place.config.health_address.unwrap();
    for _ in 0..3 {
        ask("127.96.30.1:80").unwrap();
    }
    for _ in 0..2 {
        ask("127.96.30.3:80").unwrap_err();
    }
    for path in ["/healthz", "/livez", "/livez"] {
        health(health_address, path).await;
    }
    let page = health(health_address, "/metrics").await;
    let value = |name: &str| {
        let line = page.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name}: {page}")).parse::<f64>().unwrap()
    };
    for name in UPSTREAM {
        assert!(page.lines().any(|l| l.starts_with(name)), "{name}: {page}");
    }
    for (name, expected) in [
        ("orlop_proxy_service_connections{service=\"n/web\"}", 3.0),
        ("orlop_proxy_service_refusals{service=\"n/web\"}", 0.0),
        ("orlop_proxy_service_connections{service=\"n/none\"}", 0.0),
        ("orlop_proxy_service_refusals{service=\"n/none\"}", 2.0),
        ("orlop_proxy_socket_translations", 3.0),
        ("orlop_proxy_socket_refusals", 2.0),
        ("orlop_proxy_frontends", 6.0),
        ("kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"internal\"}", 1.0),
        ("kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"external\"}", 0.0),
        ("kubeproxy_sync_proxy_rules_service_changes_total", 3.0),
        ("kubeproxy_sync_proxy_rules_service_changes_pending", 0.0),
        ("kubeproxy_proxy_healthz_total{code=\"200\"}", 1.0),
        ("kubeproxy_proxy_livez_total{code=\"200\"}", 2.0),
    ] {
        assert_eq!(value(name), expected, "{name}: {page}");
    }
    assert!(value("kubeproxy_sync_proxy_rules_last_timestamp_seconds") > 1e9);

    // A Service that is gone goes from the page.
    api.delete("services", "none");
    wait_until("it is gone", PATIENCE, || async {
        (!health(health_address, "/metrics").await.contains("n/none")).then_some(())
    })
    .await;
    end(proxy).await;
}
