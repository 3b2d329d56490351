//! The whole server in a network namespace of its own, asked by `dig`, with an API and an upstream resolver that the test
//! plays.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hickory_proto::op::{Message, MessageType, ResponseCode};
use hickory_proto::rr::rdata::{A, TXT};
use hickory_proto::rr::{RData, Record, RecordType};
use http_body_util::StreamBody;
use http_body_util::combinators::BoxBody;
use orlop_base::supervise::Ready;
use orlop_base::testkit::wait_until;
use orlop_dns::Config;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

const SERVER: &str = "169.254.20.10";

fn run(line: &str) -> String {
    let mut words = line.split_whitespace();
    let out = std::process::Command::new(words.next().unwrap()).args(words).output();
    let out = out.unwrap_or_else(|e| panic!("cannot run {line:?}: {e}; apt-get install iproute2"));
    assert!(out.status.success(), "{line}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

async fn dig(line: &str) -> String {
    let out =
        tokio::process::Command::new("dig").arg(format!("@{SERVER}")).args(line.split_whitespace()).output();
    let out = out.await.unwrap_or_else(|e| panic!("cannot run dig: {e}; apt-get install dnsutils"));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

async fn short(line: &str) -> Vec<String> {
    let mut lines: Vec<String> = dig(&format!("+short {line}"))
        .await
        .lines()
        .map(str::to_owned)
        .filter(|l| !l.starts_with(';'))
        .collect();
    lines.sort();
    lines
}

/// Lists and watches of three kinds.
#[derive(Clone)]
struct FakeApi {
    objects: Arc<Mutex<Vec<Value>>>,
    events: broadcast::Sender<(String, Value)>,
}

type Body = BoxBody<Bytes, std::convert::Infallible>;

impl FakeApi {
    fn new(objects: Vec<Value>) -> FakeApi {
        FakeApi { objects: Arc::new(Mutex::new(objects)), events: broadcast::channel(64).0 }
    }

    fn client(&self) -> kube::Client {
        let api = self.clone();
        let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
            let response = api.answer(request.uri());
            async move { Ok::<_, std::convert::Infallible>(response) }
        });
        kube::Client::new(service, "default")
    }

    fn answer(&self, uri: &http::Uri) -> http::Response<Body> {
        let (kind, version) = match uri.path().rsplit('/').next().unwrap() {
            "namespaces" => ("Namespace", "v1"),
            "services" => ("Service", "v1"),
            "endpointslices" => ("EndpointSlice", "discovery.k8s.io/v1"),
            other => panic!("unexpected request for {other}"),
        };
        if uri.query().unwrap_or_default().contains("watch=true") {
            let events = self.events.subscribe();
            let stream = futures::stream::unfold(events, move |mut events| async move {
                loop {
                    let (event, object) = events.recv().await.ok()?;
                    if object["kind"] == kind {
                        let line = format!("{}\n", json!({"type": event, "object": object}));
                        let frame = http_body::Frame::data(Bytes::from(line));
                        return Some((Ok(frame), events));
                    }
                }
            });
            return http::Response::new(BoxBody::new(StreamBody::new(SyncStream(Box::pin(stream)))));
        }
        let objects = self.objects.lock().unwrap();
        let items: Vec<_> = objects.iter().filter(|o| o["kind"] == kind).cloned().collect();
        let list = json!({"kind": format!("{kind}List"), "apiVersion": version,
            "metadata": {"resourceVersion": "1"}, "items": items});
        let body = http_body_util::Full::new(Bytes::from(list.to_string()));
        http::Response::new(BoxBody::new(body))
    }

    fn send(&self, event: &str, object: Value) {
        self.events.send((event.to_owned(), object)).unwrap();
    }
}

/// The body must be Sync; nobody polls it from two threads.
struct SyncStream<S>(std::pin::Pin<Box<S>>);

impl<S: futures::Stream + Send> futures::Stream for SyncStream<S> {
    type Item = S::Item;
    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<S::Item>> {
        self.0.as_mut().poll_next(cx)
    }
}

fn object(kind: &str, version: &str, name: &str, more: Value) -> Value {
    let mut o = json!({"kind": kind, "apiVersion": version,
        "metadata": {"name": name, "namespace": "default", "resourceVersion": "1"}});
    for (k, v) in more.as_object().unwrap() {
        if k == "labels" { o["metadata"]["labels"] = v.clone() } else { o[k] = v.clone() }
    }
    o
}

fn service(name: &str, spec: Value) -> Value {
    object("Service", "v1", name, json!({"spec": spec}))
}

fn slice(name: &str, service: &str, ips: &[String]) -> Value {
    let endpoints: Vec<_> =
        ips.iter().map(|ip| json!({"addresses": [ip], "conditions": {"ready": true}})).collect();
    object(
        "EndpointSlice",
        "discovery.k8s.io/v1",
        name,
        json!({"labels": {"kubernetes.io/service-name": service}, "addressType": "IPv4", "endpoints": endpoints,
            "ports": [{"name": "peer", "port": 7000, "protocol": "TCP"}]}),
    )
}

fn objects() -> Vec<Value> {
    let many: Vec<String> = (1..=80).map(|n| format!("10.244.1.{n}")).collect();
    let mut namespace = object("Namespace", "v1", "default", json!({}));
    namespace["metadata"].as_object_mut().unwrap().remove("namespace");
    vec![
        namespace,
        service(
            "kubernetes",
            json!({"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"],
                "ports": [{"name": "https", "port": 443, "protocol": "TCP"}]}),
        ),
        service("many", json!({"clusterIP": "None", "ports": [{"name": "peer", "port": 7000}]})),
        slice("many-1", "many", &many),
        service("out", json!({"type": "ExternalName", "externalName": "www.example.com"})),
        service(
            "in",
            json!({"type": "ExternalName", "externalName": "kubernetes.default.svc.cluster.local"}),
        ),
        service("loop", json!({"type": "ExternalName", "externalName": "loop.default.svc.cluster.local"})),
    ]
}

/// Answers A with 192.0.2.7 and TXT with 100 texts; counts what it is asked. Names that begin with `slow` take a while.
async fn upstream(address: SocketAddr, asked: Arc<Mutex<Vec<String>>>) {
    let udp = tokio::net::UdpSocket::bind(address).await.unwrap();
    let tcp = tokio::net::TcpListener::bind(address).await.unwrap();
    let log = |transport: &str, m: &Message| {
        asked.lock().unwrap().push(format!("{transport} {}", m.queries[0].name().to_string().to_lowercase()));
    };
    let answer = |m: &Message, cut: bool| {
        let query = &m.queries[0];
        let mut a = Message::new(m.metadata.id, MessageType::Response, m.metadata.op_code);
        a.metadata.recursion_available = true;
        a.add_query(query.clone());
        let data: Vec<RData> = match query.query_type() {
            RecordType::A => vec![RData::A(A("192.0.2.7".parse().unwrap()))],
            RecordType::TXT if cut => {
                a.metadata.truncation = true;
                vec![]
            }
            RecordType::TXT => (0..100).map(|n| RData::TXT(TXT::new(vec![format!("text {n}")]))).collect(),
            _ => {
                a.metadata.response_code = ResponseCode::NXDomain;
                vec![]
            }
        };
        a.add_answers(data.into_iter().map(|d| Record::from_rdata(query.name().clone(), 60, d)));
        a.to_vec().unwrap()
    };
    let mut buffer = [0; 4096];
    loop {
        tokio::select! {
            r = udp.recv_from(&mut buffer) => {
                let (n, peer) = r.unwrap();
                let m = Message::from_vec(&buffer[..n]).unwrap();
                log("udp", &m);
                if m.queries[0].name().to_string().to_lowercase().starts_with("slow") {
                    tokio::time::sleep(Duration::from_millis(300)).await;
                }
                udp.send_to(&answer(&m, true), peer).await.unwrap();
            }
            r = tcp.accept() => {
                let (mut stream, _) = r.unwrap();
                let length = stream.read_u16().await.unwrap();
                let mut question = vec![0; usize::from(length)];
                stream.read_exact(&mut question).await.unwrap();
                let m = Message::from_vec(&question).unwrap();
                log("tcp", &m);
                let bytes = answer(&m, false);
                stream.write_u16(bytes.len() as u16).await.unwrap();
                stream.write_all(&bytes).await.unwrap();
            }
        }
    }
}

fn own_netns() {
    // SAFETY: only this thread's network namespace changes.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
        .expect("cannot make a network namespace: run the tests as root");
    run("ip link set lo up");
}

fn config(api: &FakeApi, resolv_conf: &Path) -> Config {
    Config {
        resolv_conf: resolv_conf.to_owned(),
        http: Some("127.0.0.1:9153".parse().unwrap()),
        ..Config::new(api.client())
    }
}

#[tokio::test]
async fn answers_like_a_cluster_dns() {
    own_netns();
    let dir = tempfile::tempdir().unwrap();
    let resolv_conf = dir.path().join("resolv.conf");
    // Ourselves are left out, and one that is dead does not matter.
    std::fs::write(
        &resolv_conf,
        format!("nameserver {SERVER}\nnameserver 127.9.9.9\nnameserver 127.0.0.1\n"),
    )
    .unwrap();
    let api = FakeApi::new(objects());
    let (ready, stop) = (Ready::default(), CancellationToken::new());
    let asked = Arc::new(Mutex::new(Vec::new()));

    let test = async {
        tokio::time::timeout(Duration::from_secs(60), ready.wait()).await.expect("not ready");

        // By UDP and TCP, in any case.
        for options in ["+notcp", "+tcp"] {
            assert_eq!(
                short(&format!("{options} KUBERNETES.default.svc.cluster.local")).await,
                ["10.96.0.1"]
            );
        }
        let full = dig("kubernetes.default.svc.cluster.local AAAA").await;
        assert!(
            full.contains("NOERROR") && full.contains("flags: qr aa rd ra") && full.contains("SOA"),
            "{full}"
        );
        assert!(full.contains("udp: 1232"), "EDNS is answered: {full}");
        let full = dig("nothing.default.svc.cluster.local").await;
        assert!(full.contains("NXDOMAIN") && full.contains("cluster.local.\t\t5\tIN\tSOA"), "{full}");
        let full = dig("_https._tcp.kubernetes.default.svc.cluster.local SRV").await;
        assert!(full.contains("0 100 443 kubernetes.default.svc.cluster.local."), "{full}");
        assert!(full.contains("10.96.0.1"), "the target's address comes along: {full}");
        assert_eq!(short("-x 10.96.0.1").await, ["kubernetes.default.svc.cluster.local."]);
        assert_eq!(short("10-9-8-7.default.pod.cluster.local").await, ["10.9.8.7"]);

        // Too many for a datagram: cut, and whole by TCP; with EDNS more fits.
        let full = dig("+notcp +noedns +ignore many.default.svc.cluster.local").await;
        assert!(full.contains("flags: qr aa tc"), "{full}");
        assert_eq!(short("+noedns many.default.svc.cluster.local").await.len(), 80, "dig comes again by TCP");
        assert_eq!(short("+notcp +bufsize=4096 many.default.svc.cluster.local").await.len(), 80);

        // Aliases.
        let out = ["192.0.2.7", "www.example.com."];
        assert_eq!(short("out.default.svc.cluster.local").await, out);
        assert_eq!(
            short("in.default.svc.cluster.local").await,
            ["10.96.0.1", "kubernetes.default.svc.cluster.local."]
        );
        assert!(dig("loop.default.svc.cluster.local").await.contains("SERVFAIL"));

        // Others go upstream; what a search path makes of them does not.
        assert_eq!(short("Www.Example.org").await, ["192.0.2.7"]);
        assert_eq!(short("www.example.org TXT").await.len(), 100, "a cut answer is asked for again by TCP");
        assert!(dig("www.example.org MX").await.contains("NXDOMAIN"));
        asked.lock().unwrap().clear();
        for search in ["default.svc.cluster.local", "svc.cluster.local", "cluster.local"] {
            assert!(dig(&format!("www.example.org.{search}")).await.contains("NXDOMAIN"));
        }
        assert!(asked.lock().unwrap().is_empty());
        // Equal questions share one exchange.
        tokio::join!(short("+nocookie slow.org"), short("+nocookie SLOW.org"), short("+nocookie slow.org"));
        assert_eq!(*asked.lock().unwrap(), ["udp slow.org."]);

        // Refused: what nobody may ask here.
        assert!(dig("cluster.local AXFR").await.contains("Transfer failed"));
        assert!(dig("+opcode=status cluster.local").await.contains("NOTIMP"));
        assert!(dig("-c CH version.bind TXT").await.contains("REFUSED"));
        assert!(dig("+edns=1 +noednsneg kubernetes.default.svc.cluster.local").await.contains("BADVERS"));

        // Changes.
        api.send("ADDED", service("new", json!({"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9"]})));
        api.send("MODIFIED", slice("many-1", "many", &["10.244.1.200".to_owned()]));
        api.send(
            "DELETED",
            service("kubernetes", json!({"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"]})),
        );
        wait_until("the changes are served", Duration::from_secs(60), || async {
            let new = short("new.default.svc.cluster.local").await == ["10.96.0.9"];
            let many = short("many.default.svc.cluster.local").await == ["10.244.1.200"];
            let gone = dig("kubernetes.default.svc.cluster.local").await.contains("NXDOMAIN");
            (new && many && gone).then_some(())
        })
        .await;

        // No resolver can be reached: told at once, and not after the time that a silent one is given.
        std::fs::write(&resolv_conf, "nameserver 127.9.9.8\nnameserver 192.0.2.53\n").unwrap();
        let start = Instant::now();
        assert!(dig("+tries=1 +timeout=5 www.example.net").await.contains("SERVFAIL"));
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());

        let figures = get("/metrics").await;
        assert!(figures.contains("coredns_dns_responses_total{rcode=\"NXDOMAIN\"}"), "{figures}");
        assert!(get("/health").await.contains("200 OK") && get("/ready").await.contains("200 OK"));
        fuzz().await;
        stop.cancel();
    };
    let server = orlop_dns::run(config(&api, &resolv_conf), ready.clone(), stop.clone());
    let upstream = upstream("127.0.0.1:53".parse().unwrap(), asked.clone());
    tokio::select! {
        (served, ()) = async { tokio::join!(server, test) } => served.unwrap(),
        () = upstream => unreachable!(),
    }
    // The link stays for the next start, until it is purged.
    assert!(run("ip addr show orlop-dns").contains(SERVER));
    orlop_dns::purge("orlop-dns").await.unwrap();
    orlop_dns::purge("orlop-dns").await.unwrap();
    assert!(!run("ip link").contains("orlop-dns"));
}

async fn get(path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect("127.0.0.1:9153").await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// Broken questions get an error or nothing, and the server goes on.
async fn fuzz() {
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect((SERVER, 53)).await.unwrap();
    let good = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03new\x07default\x03svc\x07cluster\x05local\x00\x00\x01\x00\x01";
    let mut random = 0x1234_5678_9abc_def1_u64;
    for n in 0..300 {
        let mut bytes = good.to_vec();
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let at = (random >> 8) as usize % bytes.len();
        if n % 3 == 0 {
            bytes.truncate(at)
        } else {
            bytes[at] = random as u8
        }
        socket.send(&bytes).await.unwrap();
    }
    let mut answer = [0; 512];
    while tokio::time::timeout(Duration::from_millis(50), socket.recv(&mut answer)).await.is_ok() {}
    assert_eq!(short("new.default.svc.cluster.local").await, ["10.96.0.9"]);
}

#[tokio::test]
async fn a_taken_address_and_a_bad_domain_are_told() {
    own_netns();
    let api = FakeApi::new(objects());
    let _taken = tokio::net::UdpSocket::bind("127.0.0.1:53").await.unwrap();
    let base = config(&api, Path::new("/none"));
    let taken = Config { listen: vec!["127.0.0.1:53".parse().unwrap()], link: None, ..base.clone() };
    let e = orlop_dns::run(taken, Ready::default(), CancellationToken::new()).await.unwrap_err();
    assert!(e.to_string().contains("127.0.0.1:53"), "{e}");
    let bad = Config { cluster_domain: "..".into(), ..base };
    let e = orlop_dns::run(bad, Ready::default(), CancellationToken::new()).await.unwrap_err();
    assert!(matches!(e, orlop_dns::Error::Domain(_)), "{e}");
}
