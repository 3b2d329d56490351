//! Logs and upgraded streams through the server to a kubelet that the test plays.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use crate::support::{Cluster, err, ok};
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use orlop_apiserver::authn::certificate::ClientIdentity;
use orlop_apiserver::pki::Pki;
use orlop_apiserver::registry;
use orlop_apiserver::transport::{self, Body, Handler};
use orlop_base::supervise::TaskGroup;
use orlop_base::testkit::wait_until;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;

/// Answers logs with what it was asked, refuses container "gone", and echoes upgraded streams.
struct Kubelet {
    tasks: TaskGroup,
}

impl Handler for Kubelet {
    async fn handle(
        self: Arc<Self>,
        mut request: Request<Incoming>,
        peer: Option<Arc<ClientIdentity>>,
    ) -> Response<Body> {
        let user = peer.and_then(|p| p.user().ok()).map(|u| u.name).unwrap_or_default();
        let uri = request.uri().to_string();
        if uri.contains("/gone") {
            let mut refusal =
                Response::new(registry::Body::from("container gone not found".to_owned()).into());
            *refusal.status_mut() = StatusCode::NOT_FOUND;
            return refusal;
        }
        if request.headers().contains_key("upgrade") {
            let upgraded = hyper::upgrade::on(&mut request);
            self.tasks.spawn(async move {
                let (mut read, mut write) = tokio::io::split(TokioIo::new(upgraded.await.expect("upgraded")));
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
            let mut answer = Response::new(registry::Body::empty().into());
            *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            answer.headers_mut().insert("connection", "Upgrade".parse().expect("header"));
            answer.headers_mut().insert("upgrade", "websocket".parse().expect("header"));
            return answer;
        }
        let token = request.headers().contains_key("authorization");
        Response::new(registry::Body::from(format!("{uri} for {user} token={token}\n")).into())
    }
}

struct Fixture {
    cluster: Cluster,
    stop: CancellationToken,
}

async fn fixture() -> Fixture {
    let cluster = Cluster::start().await;
    let pki = Pki::open(&cluster.config.pki_dir(), &cluster.config.server_names()).expect("the server's PKI");
    let listener = transport::bind((Ipv4Addr::LOCALHOST, 0).into()).await.expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    // The server's own certificate is good for 127.0.0.1, where this kubelet listens.
    let (tls, verifier) = transport::tls(&pki.serving, &pki.ca).expect("TLS");
    let stop = CancellationToken::new();
    let tasks = TaskGroup::new(&stop);
    let kubelet = Arc::new(Kubelet { tasks: tasks.clone() });
    tasks.spawn_essential("kubelet", transport::serve(listener, tls, verifier, kubelet, tasks.clone()));

    cluster.create("v1", "ServiceAccount", "default", "").await;
    let node = r#"{"apiVersion":"v1","kind":"Node","metadata":{"name":"n1"}}"#;
    ok(cluster.kubectl_with(&["create", "--validate=false", "-f", "-"], node).await);
    let status = format!(
        r#"{{"status":{{"addresses":[{{"type":"InternalIP","address":"127.0.0.1"}}],"daemonEndpoints":{{"kubeletEndpoint":{{"Port":{port}}}}}}}}}"#
    );
    ok(cluster
        .kubectl(&["patch", "node", "n1", "--subresource=status", "--type=merge", "-p", &status])
        .await);
    for (name, containers) in [("p", vec!["c"]), ("two", vec!["a", "gone"])] {
        let list: Vec<String> =
            containers.iter().map(|c| format!(r#"{{"name":"{c}","image":"i"}}"#)).collect();
        let pod = format!(
            r#"{{"apiVersion":"v1","kind":"Pod","metadata":{{"name":"{name}"}},"spec":{{"nodeName":"n1","containers":[{}]}}}}"#,
            list.join(",")
        );
        ok(cluster.kubectl_with(&["create", "--validate=false", "-f", "-"], &pod).await);
    }
    Fixture { cluster, stop }
}

async fn tls_stream(cluster: &Cluster) -> TlsStream<TcpStream> {
    let pki = Pki::open(&cluster.config.pki_dir(), &cluster.config.server_names()).expect("the server's PKI");
    let mut roots = rustls::RootCertStore::empty();
    for cert in pki.ca.to_rustls().expect("the CA").0 {
        roots.add(cert).expect("an anchor");
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(cluster.config.listen).await.expect("connects");
    let name = ServerName::try_from("localhost").expect("a name");
    TlsConnector::from(Arc::new(config)).connect(name, stream).await.expect("TLS")
}

async fn upgrade(cluster: &Cluster, path: &str) -> (TlsStream<TcpStream>, String) {
    let mut stream = tls_stream(cluster).await;
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer jane-token\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.expect("written");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(b) => head.push(b),
            Err(_) => break,
        }
    }
    (stream, String::from_utf8_lossy(&head).into_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_reach_the_kubelet_and_its_refusals_come_back() {
    let f = fixture().await;
    let c = &f.cluster;
    let logs = ok(c.kubectl(&["logs", "p", "--tail=3", "-f"]).await);
    assert!(logs.starts_with("/containerLogs/default/p/c?follow=true&tailLines=3"), "{logs}");
    assert!(logs.contains("for kube-apiserver-kubelet-client token=false"), "{logs}");
    let gone = c.kubectl(&["logs", "two", "-c", "gone"]).await;
    assert!(err(&gone).contains("container gone not found"), "{}", err(&gone));
    let choice = c.kubectl(&["get", "--raw", "/api/v1/namespaces/default/pods/two/log"]).await;
    assert!(err(&choice).contains("choose one of: [a gone]"), "{}", err(&choice));
    let proxied = ok(c.kubectl(&["get", "--raw", "/api/v1/nodes/n1/proxy/stats/summary?a=b"]).await);
    assert!(proxied.starts_with("/stats/summary?a=b"), "{proxied}");
    f.stop.cancel();
    f.cluster.stop().await;
}

/// Returns when the authorizer has heard of a new binding.
async fn jane_may(c: &Cluster, verb: &str) {
    wait_until(&format!("jane may {verb} exec"), Duration::from_secs(30), async || {
        let asked =
            c.kubectl_token("jane-token", &["auth", "can-i", verb, "pods", "--subresource=exec"]).await;
        asked.status.success().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn upgraded_streams_pass_bytes_both_ways() {
    let f = fixture().await;
    let c = &f.cluster;
    let path = "/api/v1/namespaces/default/pods/p/exec?command=cat&stdin=true&stdout=true";
    let (_, refused) = upgrade(c, path).await;
    assert!(refused.starts_with("HTTP/1.1 403"), "{refused}");
    // Reading alone does not make a shell.
    let rules = r#","rules":[{"verbs":["get"],"apiGroups":[""],"resources":["pods/exec"]}]"#;
    c.create("rbac.authorization.k8s.io/v1", "Role", "reader", rules).await;
    c.bind("reader", "Role", "reader", "User", "jane").await;
    jane_may(c, "get").await;
    let (_, refused) = upgrade(c, path).await;
    assert!(refused.starts_with("HTTP/1.1 403"), "{refused}");
    c.bind("jane", "ClusterRole", "edit", "User", "jane").await;
    jane_may(c, "create").await;

    let (mut stream, head) = upgrade(c, path).await;
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    for round in 0..100u32 {
        let message = vec![round as u8; 4096];
        stream.write_all(&message).await.expect("written");
        let mut back = vec![0; message.len()];
        stream.read_exact(&mut back).await.expect("echoed");
        assert_eq!(back, message);
    }
    stream.shutdown().await.expect("half-closed");
    let mut rest = Vec::new();
    let end = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut rest)).await;
    assert!(end.is_ok(), "the echo's end comes through");
    f.stop.cancel();
    f.cluster.stop().await;
}
