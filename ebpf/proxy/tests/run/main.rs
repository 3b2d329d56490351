//! The whole proxy against an API server that says what the test tells it to: from watch event to answered connection.

mod api;
mod closing;
mod full;
mod many;
mod node;
mod pages;
mod scale;
mod scrapes;
mod sequence;
mod topology;
#[path = "../world/mod.rs"]
mod world;

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use api::FakeApi;
use orlop_base::supervise::Ready;
use orlop_base::testkit::{free_port, unique_name, wait_until};
use orlop_proxy::{Config, DatapathConfig, Sizes, purge, run};
use serde_json::json;
use tokio::sync::{Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;

/// For what must come; a loaded machine takes its time.
const PATIENCE: Duration = Duration::from_secs(30);

/// For reading ten thousand Services.
const START: Duration = Duration::from_secs(120);

/// No interface of this machine is served where packets are other tests' matter.
const NO_INTERFACE: &str = "ebpf-none";

/// A process is in one cgroup, so the tests take turns.
static ALONE: Mutex<()> = Mutex::const_new(());

/// This process in a cgroup of its own, and the proxy's files; all removed on drop.
struct Place {
    home: PathBuf,
    root: PathBuf,
    cgroup: PathBuf,
    config: Config,
}

impl Place {
    fn new(api: SocketAddr) -> Place {
        let root = orlop_ebpf_loader::probe::cgroup2()
            .expect("cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified");
        let name = unique_name("ebpf-px");
        let cgroup = root.join(&name);
        std::fs::create_dir_all(&cgroup).expect("run as root");
        join(&cgroup).unwrap();
        let home = std::env::temp_dir().join(&name);
        std::fs::create_dir_all(&home).unwrap();
        let kubeconfig = home.join("kubeconfig");
        let content = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "t",
            "clusters": [{"name": "t", "cluster": {"server": format!("http://{api}")}}],
            "contexts": [{"name": "t", "context": {"cluster": "t", "user": "t"}}],
            "users": [{"name": "t", "user": {}}],
        });
        std::fs::write(&kubeconfig, content.to_string()).unwrap();
        let mut config = Config::new(kubeconfig, "me".into());
        config.health_address = Some(free_address());
        config.metrics_address = None;
        config.uplinks = vec![NO_INTERFACE.into()];
        config.pod_packets = false;
        config.datapath = DatapathConfig {
            pins: home.join("bpf"),
            cgroup: Some(cgroup.clone()),
            sizes: Sizes {
                frontends: 4096,
                slots: 4096,
                backends: 4096,
                connections: 256,
                sockets: 4096,
                ..Sizes::default()
            },
            ..DatapathConfig::default()
        };
        Place { home, root, cgroup, config }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = purge(&self.config);
        let _ = std::fs::remove_dir_all(&self.home);
        let _ = join(&self.root);
        let _ = std::fs::remove_dir(&self.cgroup);
    }
}

/// Moves this process into a cgroup.
fn join(cgroup: &Path) -> io::Result<()> {
    std::fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string())
}

/// What every test has for itself: its turn, an API server, and a place for its proxy.
async fn begin() -> (MutexGuard<'static, ()>, FakeApi, Place) {
    let alone = ALONE.lock().await;
    let api = FakeApi::start().await;
    let place = Place::new(api.address);
    (alone, api, place)
}

fn free_address() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, free_port()).into()
}

/// Says its name.
fn server(name: &'static str, at: SocketAddr) -> SocketAddr {
    let l = TcpListener::bind(at).unwrap();
    let at = l.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut s in l.incoming().flatten() {
            let _ = s.write_all(name.as_bytes());
        }
    });
    at
}

fn ask(at: &str) -> io::Result<String> {
    let mut s = TcpStream::connect_timeout(&at.parse().unwrap(), PATIENCE)?;
    let mut text = String::new();
    s.read_to_string(&mut text)?;
    Ok(text)
}

fn service(name: &str, ip: &str, extra: serde_json::Value) -> serde_json::Value {
    let mut spec = json!({"type": "ClusterIP", "clusterIP": ip, "clusterIPs": [ip], "ports": [{"port": 80, "protocol": "TCP"}]});
    if let (Some(spec), Some(extra)) = (spec.as_object_mut(), extra.as_object()) {
        spec.extend(extra.clone());
    }
    json!({"metadata": {"name": name, "namespace": "n"}, "spec": spec})
}

fn slice(service: &str, port: u16) -> serde_json::Value {
    json!({
        "metadata": {"name": format!("{service}-1"), "namespace": "n", "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4", "ports": [{"port": port, "protocol": "TCP", "name": ""}],
        "endpoints": [{"addresses": ["127.0.0.1"], "nodeName": "me", "conditions": {"ready": true}}],
    })
}

/// What stops a proxy of this process, and its end.
type Running = (CancellationToken, tokio::task::JoinHandle<Result<(), orlop_proxy::Error>>);

async fn start(config: &Config) -> Running {
    let stop = CancellationToken::new();
    let ready = Ready::default();
    orlop_base::telemetry::init("warn");
    let mut task = tokio::spawn(run(config.clone(), ready.clone(), stop.clone()));
    tokio::select! {
        r = tokio::time::timeout(START, ready.wait()) => r.expect("ready in time"),
        r = &mut task => panic!("the proxy ended: {r:?}"),
    }
    (stop, task)
}

async fn end((stop, task): Running) {
    stop.cancel();
    task.await.unwrap().unwrap();
}

async fn health(at: SocketAddr, path: &'static str) -> String {
    tokio::task::spawn_blocking(move || ask_health(at, path).unwrap()).await.unwrap()
}

fn ask_health(at: SocketAddr, path: &str) -> io::Result<String> {
    let mut s = TcpStream::connect(at)?;
    write!(s, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    s.read_to_string(&mut text)?;
    Ok(text)
}

// 127.x.y.z as Service addresses: what is not translated is refused at once and leaves no packet on any network.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_follow_the_api_and_outlive_the_proxy() {
    let (_alone, api, place) = begin().await;
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let (a, b) = (server("a", any), server("b", any));
    api.put(
        "services",
        service("web", "127.96.1.1", json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 31873}]})),
    );
    api.put("endpointslices", slice("web", a.port()));
    api.put("services", service("headless", "None", json!({})));

    let proxy = start(&place.config).await;
    assert_eq!(ask("127.96.1.1:80").unwrap(), "a");
    assert_eq!(ask("127.0.0.1:31873").unwrap(), "a");
    let page = health(place.config.health_address.unwrap(), "/healthz").await;
    assert!(page.starts_with("HTTP/1.1 200"), "{page}");
    let page = health(place.config.health_address.unwrap(), "/metrics").await;
    assert!(page.contains("kubeproxy_sync_proxy_rules_duration_seconds_count"), "{page}");

    // Another endpoint takes over; a Service without endpoints refuses; a deleted one is nobody's.
    api.put("endpointslices", slice("web", b.port()));
    wait_until("b answers", PATIENCE, || async { (ask("127.96.1.1:80").ok()? == "b").then_some(()) }).await;
    api.put("services", service("empty", "127.96.1.2", json!({})));
    api.put("services", service("gone", "127.96.1.3", json!({})));
    api.put("endpointslices", slice("gone", a.port()));
    wait_until("gone answers", PATIENCE, || async { ask("127.96.1.3:80").ok() }).await;
    assert_eq!(ask("127.96.1.2:80").unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    api.delete("services", "gone");
    wait_until("gone is gone", PATIENCE, || async { ask("127.96.1.3:80").err() }).await;

    // A load balancer asks whether this node has an endpoint.
    let check = free_address();
    let local = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": check.port()});
    api.put("services", service("lb", "127.96.1.4", local));
    wait_until("the check is served", PATIENCE, || async { TcpStream::connect(check).ok() }).await;
    assert!(health(check, "/").await.starts_with("HTTP/1.1 503"));
    api.put("endpointslices", slice("lb", a.port()));
    wait_until("an endpoint is here", PATIENCE, || async {
        health(check, "/").await.starts_with("HTTP/1.1 200").then_some(())
    })
    .await;

    // New Service to first answer, as a client sees it: watch event, sync, connect.
    let mut times = Vec::new();
    for i in 0..20 {
        let (name, ip) = (format!("t{i}"), format!("127.96.2.{}", i + 1));
        api.put("endpointslices", slice(&name, a.port()));
        let start = Instant::now();
        api.put("services", service(&name, &ip, json!({})));
        loop {
            if ask(&format!("{ip}:80")).is_ok() {
                break;
            }
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        times.push(start.elapsed());
    }
    times.sort();
    println!("new Service reachable: p50 {:?}, worst {:?}", times[10], times[19]);
    assert!(times[10] < Duration::from_millis(100), "p50 {:?}", times[10]);

    // While no proxy runs, Services answer; what changed meanwhile is put right by the next one.
    end(proxy).await;
    assert_eq!(ask("127.96.1.1:80").unwrap(), "b");
    api.delete("services", "t0");
    api.put("endpointslices", slice("web", a.port()));
    let proxy = start(&place.config).await;
    assert_eq!(ask("127.96.1.1:80").unwrap(), "a");
    assert!(ask("127.96.2.1:80").is_err(), "deleted while the proxy was away");
    assert_eq!(ask("127.96.2.2:80").unwrap(), "a");
    end(proxy).await;
    purge(&place.config).unwrap();
    assert!(ask("127.96.1.1:80").is_err());
}

const PROXY: &str = "ORLOP_TEST_PROXY";

/// Not a test of its own: a proxy in a process that can be killed, when it is started as such.
#[tokio::test]
async fn is_a_proxy_for_the_other() {
    let Ok(text) = std::env::var(PROXY) else { return };
    let f: Vec<&str> = text.split(' ').collect();
    let mut config = Config::new(f[0].into(), f[4].into());
    config.health_address = Some(f[1].parse().unwrap());
    config.metrics_address = None;
    config.host_routing = f[5] == "true";
    config.pod_packets = f[6] == "true";
    if !config.pod_packets {
        config.uplinks = vec![NO_INTERFACE.into()];
    }
    config.datapath.pins = f[2].into();
    config.datapath.cgroup = Some(f[3].into());
    // Killed, or asked to stop by the end of its input.
    let stop = CancellationToken::new();
    let asked = stop.clone();
    std::thread::spawn(move || {
        let _ = io::stdin().read_to_end(&mut Vec::new());
        asked.cancel();
    });
    run(config, Ready::default(), stop).await.unwrap();
}

struct Killed(std::process::Child);

impl Killed {
    /// Starts a proxy; `command` runs this program, maybe somewhere else.
    fn spawn(mut command: std::process::Command, c: &Config) -> Killed {
        let text = format!(
            "{} {} {} {} {} {} {}",
            c.kubeconfig.display(),
            c.health_address.unwrap(),
            c.datapath.pins.display(),
            c.datapath.cgroup.as_ref().unwrap().display(),
            c.node_name,
            c.host_routing,
            // With it the proxy serves all interfaces that it finds.
            c.pod_packets
        );
        let command = command.args(["--exact", "is_a_proxy_for_the_other", "--nocapture"]).env(PROXY, text);
        let command = command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::null());
        Killed(command.spawn().unwrap())
    }

    /// Lets it end by itself, as on SIGTERM.
    fn stop(mut self) {
        drop(self.0.stdin.take());
        assert!(self.0.wait().unwrap().success());
    }

    /// Starts a proxy and waits until it says that it is in step.
    async fn start(place: &Place) -> Killed {
        let k = Killed::spawn(std::process::Command::new(std::env::current_exe().unwrap()), &place.config);
        let health = place.config.health_address.unwrap();
        wait_until("the proxy is in step", PATIENCE, || async {
            TcpStream::connect(health).ok()?;
            health_of(health).await.starts_with("HTTP/1.1 200").then_some(())
        })
        .await;
        k
    }
}

async fn health_of(at: SocketAddr) -> String {
    health(at, "/healthz").await
}

impl Drop for Killed {
    fn drop(&mut self) {
        // SIGKILL.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn echo(at: SocketAddr) -> SocketAddr {
    let l = TcpListener::bind(at).unwrap();
    let at = l.local_addr().unwrap();
    let u = std::net::UdpSocket::bind(at).unwrap();
    std::thread::spawn(move || {
        for mut s in l.incoming().flatten() {
            std::thread::spawn(move || {
                let mut buf = [0; 64];
                while let Ok(n @ 1..) = s.read(&mut buf) {
                    let _ = s.write_all(&buf[..n]);
                }
            });
        }
    });
    std::thread::spawn(move || {
        let mut buf = [0; 64];
        while let Ok((n, from)) = u.recv_from(&mut buf) {
            let _ = u.send_to(&buf[..n], from);
        }
    });
    at
}

/// A slice for both protocols with one endpoint in this state.
fn echo_slice(at: SocketAddr, ready: bool, terminating: bool) -> serde_json::Value {
    let mut s = slice("w", at.port());
    s["ports"] = json!([{"port": at.port(), "protocol": "TCP", "name": "t"}, {"port": at.port(), "protocol": "UDP", "name": "u"}]);
    s["endpoints"] = json!([{"addresses": [at.ip().to_string()], "nodeName": "me",
        "conditions": {"ready": ready, "serving": true, "terminating": terminating}}]);
    s
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_outlive_a_killed_proxy_and_end_with_their_backend() {
    let (_alone, api, place) = begin().await;
    let a = echo("127.0.0.1:0".parse().unwrap());
    let b = echo(SocketAddr::new("127.0.0.2".parse().unwrap(), a.port()));
    let ports = json!({"ports": [{"port": 80, "protocol": "TCP", "name": "t"}, {"port": 80, "protocol": "UDP", "name": "u"}]});
    api.put("services", service("w", "127.96.7.1", ports));
    api.put("endpointslices", echo_slice(a, true, false));
    let mut proxy = Killed::start(&place).await;
    let vip: SocketAddr = "127.96.7.1:80".parse().unwrap();
    let mut tcp = TcpStream::connect(vip).unwrap();
    let udp = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    udp.connect(vip).unwrap();
    tcp.set_read_timeout(Some(PATIENCE)).unwrap();
    udp.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut works = |what: &str| {
        let mut buf = [0; 4];
        tcp.write_all(b"ping").unwrap_or_else(|e| panic!("{what}: {e}"));
        tcp.read_exact(&mut buf).unwrap_or_else(|e| panic!("{what}: {e}"));
    };
    works("at first");

    // Killed at any moment, with changes before, meanwhile and after.
    for i in 0..4 {
        let other = format!("x{i}");
        api.put("services", service(&other, &format!("127.96.8.{}", i + 1), json!({})));
        drop(proxy);
        works("while no proxy runs");
        api.put("endpointslices", slice(&other, a.port()));
        ask_new(vip);
        proxy = Killed::start(&place).await;
        works("after a restart");
        udp.send(b"ping").unwrap();
        udp.recv(&mut [0; 8]).unwrap();
        assert!(TcpStream::connect(("127.96.8.1", 80)).is_ok(), "what came meanwhile is there");
    }

    // A backend that is being shut down keeps its connections; when it is gone nobody waits for it.
    api.put("endpointslices", echo_slice(a, false, true));
    tokio::time::sleep(Duration::from_millis(300)).await;
    works("while the backend terminates");
    // Beside another one it gets nothing new any more. Datagrams go to that at once; a connection stays as long as it is there.
    let mut both = echo_slice(b, true, false);
    both["endpoints"]
        .as_array_mut()
        .unwrap()
        .extend(echo_slice(a, false, true)["endpoints"].as_array().cloned().unwrap());
    api.put("endpointslices", both);
    let lost = wait_until("the datagram socket says so", PATIENCE, || async {
        udp.send(b"ping").and_then(|_| udp.recv(&mut [0; 8])).err()
    })
    .await;
    // ECONNABORTED, or EDESTADDRREQ as the kernel has disconnected it.
    assert_ne!(lost.kind(), io::ErrorKind::WouldBlock, "nobody waits: {lost}");
    works("while another one serves");
    api.put("endpointslices", echo_slice(b, true, false));
    wait_until("the connection is closed", PATIENCE, || async { tcp_error(&tcp).then_some(()) }).await;
    ask_new(vip);
    drop(proxy);
}

fn tcp_error(mut s: &TcpStream) -> bool {
    s.set_nonblocking(true).unwrap();
    !matches!(s.read(&mut [0; 1]), Err(e) if e.kind() == io::ErrorKind::WouldBlock)
}

/// A connection made now is answered.
fn ask_new(at: SocketAddr) {
    let mut s = TcpStream::connect_timeout(&at, PATIENCE).unwrap();
    s.write_all(b"ping").unwrap();
    s.read_exact(&mut [0; 4]).unwrap();
}
