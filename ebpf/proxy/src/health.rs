//! /healthz and /livez as kube-proxy answers them (load balancers ask for it), /metrics, and the health check node
//! ports of Services with externalTrafficPolicy Local.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use nix::sys::socket::{setsockopt, sockopt};
use orlop_base::supervise::TaskGroup;
use orlop_base::telemetry::Metrics;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpSocket};
use tokio_util::sync::CancellationToken;

use crate::metrics::{Code, ProxyMetrics};
use crate::model::Name;

/// What health checks tell.
#[derive(Default)]
pub struct Health {
    synced: AtomicBool,
    /// Unix seconds of the last time that maps were in step.
    last_sync: AtomicI64,
    /// Since when changes wait to be written; 0 when none do.
    behind_since: AtomicI64,
    /// The node is being removed: no new connections should come to it (KEP-3836).
    going: AtomicBool,
}

/// A proxy that has not caught up for this long is unhealthy: upstream's two sync periods.
const BEHIND_SECONDS: i64 = 60;

fn now() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::SystemTime::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs() as i64)
}

impl Health {
    pub fn in_step(&self) {
        self.last_sync.store(now(), Ordering::Relaxed);
        self.behind_since.store(0, Ordering::Relaxed);
        self.synced.store(true, Ordering::Relaxed);
    }

    pub fn behind(&self) {
        let _ = self.behind_since.compare_exchange(0, now(), Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Tells whether the node is being removed.
    pub fn node_goes(&self, going: bool) {
        self.going.store(going, Ordering::Relaxed);
    }

    pub fn is_healthy(&self) -> bool {
        let behind = self.behind_since.load(Ordering::Relaxed);
        self.synced.load(Ordering::Relaxed) && (behind == 0 || now() - behind < BEHIND_SECONDS)
    }
}

impl Health {
    /// Whether the proxy is well, and (`for_load_balancers`) whether this node should get new connections: one that goes
    /// should not, while its proxy is well and must not be restarted.
    fn answer(&self, for_load_balancers: bool) -> (StatusCode, String) {
        let healthy = self.is_healthy();
        let eligible = !self.going.load(Ordering::Relaxed);
        let ok = healthy && (eligible || !for_load_balancers);
        // Upstream: of an answer that all is well the time of the answer.
        let updated = if ok { now() } else { self.last_sync.load(Ordering::Relaxed) };
        let mut body = serde_json::json!({
            "lastUpdated": timestamp(updated), "currentTime": timestamp(now()), "healthy": healthy,
        });
        if for_load_balancers {
            body["nodeEligible"] = eligible.into();
        }
        (if ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, body.to_string())
    }
}

/// Called before metrics are read, to fetch the kernel's counters.
pub type Refresh = Box<dyn Fn() + Send>;

/// What the listeners share.
#[derive(Clone)]
pub struct Pages {
    pub health: Arc<Health>,
    pub metrics: Arc<Metrics>,
    pub proxy: ProxyMetrics,
    pub refresh: Arc<Mutex<Option<Refresh>>>,
}

impl Pages {
    async fn answer(&self, path: &str) -> Response<Full<Bytes>> {
        let (status, kind, body) = match path {
            "/healthz" | "/livez" => {
                let (status, body) = self.health.answer(path == "/healthz");
                let counter = if path == "/livez" { &self.proxy.livez } else { &self.proxy.healthz };
                counter.get_or_create(&Code { code: status.as_u16() }).inc();
                (status, "application/json", body)
            }
            "/metrics" => {
                let (refresh, metrics) = (self.refresh.clone(), self.metrics.clone());
                // Tens of thousands of entries are read and written down.
                let page = tokio::task::spawn_blocking(move || {
                    // One page at a time, until it is written down: all fill the same metrics.
                    let refresh = refresh.lock();
                    if let Some(refresh) = &*refresh {
                        refresh();
                    }
                    metrics.encode()
                });
                match page.await {
                    Ok(page) => {
                        (StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", page)
                    }
                    Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, "text/plain", format!("{e}\n")),
                }
            }
            "/proxyMode" => (StatusCode::OK, "text/plain", "ebpf".to_owned()),
            _ => (StatusCode::NOT_FOUND, "text/plain", "not found\n".to_owned()),
        };
        response(status, kind, body)
    }
}

fn response(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut r = Response::new(Full::new(Bytes::from(body)));
    *r.status_mut() = status;
    r.headers_mut().insert("content-type", hyper::header::HeaderValue::from_static(kind));
    r.headers_mut().insert("x-content-type-options", hyper::header::HeaderValue::from_static("nosniff"));
    r
}

fn timestamp(seconds: i64) -> String {
    k8s_openapi::jiff::Timestamp::from_second(seconds).map(|t| t.to_string()).unwrap_or_default()
}

/// Serves the pages on a listener until the group stops.
pub async fn serve(listener: TcpListener, pages: Pages, tasks: TaskGroup) -> Result<(), std::io::Error> {
    let answer: Answer = Arc::new(move |path| {
        let pages = pages.clone();
        async move { pages.answer(&path).await }.boxed()
    });
    let stop = tasks.stop_token();
    accept(listener, answer, tasks, stop).await
}

type Answer = Arc<dyn Fn(String) -> BoxFuture<'static, Response<Full<Bytes>>> + Send + Sync>;

/// Connections at a time: health checkers and scrapers are few.
const MAX_CONNECTIONS: usize = 64;
/// Connections that wait to be accepted.
const BACKLOG: u32 = 128;
/// How long a connection may take from its beginning to the end of its only answer.
const CONNECTION: Duration = Duration::from_secs(10);

async fn accept(
    listener: TcpListener,
    answer: Answer,
    tasks: TaskGroup,
    stop: CancellationToken,
) -> Result<(), std::io::Error> {
    // Who asks does so at once, so that the oldest is the last to be missed: silent ones keep nobody out.
    let mut open: VecDeque<CancellationToken> = VecDeque::with_capacity(MAX_CONNECTIONS);
    loop {
        // Cancel-safe: a connection is either accepted or still in the backlog.
        let stream = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            s = listener.accept() => match s {
                Ok((s, _)) => s,
                Err(e) => {
                    tracing::debug!(error = %e, "accept");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        open.retain(|over| !over.is_cancelled());
        if open.len() >= MAX_CONNECTIONS
            && let Some(oldest) = open.pop_front()
        {
            oldest.cancel();
        }
        let over = stop.child_token();
        open.push_back(over.clone());
        let answer = answer.clone();
        tasks.spawn(async move {
            let service = service_fn(move |r: Request<hyper::body::Incoming>| {
                answer(r.uri().path().to_owned()).map(Ok::<_, Infallible>)
            });
            let mut server = hyper::server::conn::http1::Builder::new();
            let connection = server.keep_alive(false).serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                () = over.cancelled() => {}
                r = tokio::time::timeout(CONNECTION, connection) => match r {
                    Ok(Ok(())) => {}
                    Ok(Err(e)) => tracing::debug!(error = %e, "health connection"),
                    Err(_) => tracing::debug!("a health connection took too long"),
                },
            }
            over.cancel();
        });
    }
}

/// Binds a listener; the error names the address.
pub fn bind(address: SocketAddr) -> Result<TcpListener, crate::Error> {
    listen(address).map_err(|source| crate::Error::Listen { address, source })
}

/// 0.0.0.0 and :: are all addresses of both families, as upstream's listeners take them, whatever net.ipv6.bindv6only says.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let open = |at: SocketAddr| {
        let socket = if at.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        if at.is_ipv6() && at.ip().is_unspecified() {
            setsockopt(&socket, sockopt::Ipv6V6Only, &false)?;
        }
        socket.bind(at)?;
        socket.listen(BACKLOG)
    };
    if !address.ip().is_unspecified() {
        return open(address);
    }
    // A kernel without IPv6 has only the other.
    open((Ipv6Addr::UNSPECIFIED, address.port()).into()).or_else(|e| match e.raw_os_error() {
        Some(libc::EAFNOSUPPORT) => open((Ipv4Addr::UNSPECIFIED, address.port()).into()),
        _ => Err(e),
    })
}

/// Pauses before a port that could not be bound is tried again.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(30);
/// A listener of ours that was stopped a moment ago has let go of its port before so many tries.
const WORTH_SAYING: u32 = 3;

/// The health check node ports of Services with externalTrafficPolicy Local: load balancers ask there whether this node
/// has an endpoint. A listener belongs to its port: when one Service's port becomes another's, it answers for that one
/// from then on.
pub struct NodePortChecks {
    tasks: TaskGroup,
    health: Arc<Health>,
    ports: HashMap<Name, u16>,
    /// Who wants a port, with the number of ready endpoints on this node; the first one has it.
    wanted: HashMap<u16, BTreeMap<Name, usize>>,
    served: HashMap<u16, Check>,
    /// Ports to look at.
    changed: HashSet<u16>,
    /// Ports that could not be bound, and how often.
    failing: HashMap<u16, u32>,
    pause: Duration,
    retry: Option<tokio::time::Instant>,
    /// Where to listen; `None`: on all addresses.
    addresses: Option<Vec<IpAddr>>,
}

struct Check {
    /// Whom it answers for.
    told: Arc<Mutex<(Name, usize)>>,
    stop: CancellationToken,
}

impl NodePortChecks {
    pub fn new(tasks: TaskGroup, health: Arc<Health>) -> NodePortChecks {
        NodePortChecks {
            tasks,
            health,
            ports: HashMap::new(),
            wanted: HashMap::new(),
            served: HashMap::new(),
            changed: HashSet::new(),
            failing: HashMap::new(),
            pause: FIRST_PAUSE,
            retry: None,
            addresses: None,
        }
    }

    /// Tells on which of the node's addresses node ports answer, when not on all: there these ports do, as upstream has it.
    pub fn listen_on(&mut self, addresses: Option<Vec<IpAddr>>) {
        if self.addresses == addresses {
            return;
        }
        self.addresses = addresses;
        for (port, check) in self.served.drain() {
            check.stop.cancel();
            self.changed.insert(port);
        }
        self.settle();
    }

    /// Tells a Service's health check port (0 for none) and how many ready endpoints it has on this node. Takes effect
    /// with [`NodePortChecks::settle`].
    pub fn set(&mut self, name: &Name, port: u16, local: usize) {
        if let Some(old) = self.ports.get(name).copied().filter(|old| *old != port) {
            self.ports.remove(name);
            self.changed.insert(old);
            if let Some(others) = self.wanted.get_mut(&old) {
                others.remove(name);
                if others.is_empty() {
                    self.wanted.remove(&old);
                }
            }
        }
        if port == 0 {
            return;
        }
        self.ports.insert(name.clone(), port);
        if self.wanted.entry(port).or_default().insert(name.clone(), local) != Some(local) {
            self.changed.insert(port);
        }
    }

    /// When to call [`NodePortChecks::settle`] again by itself.
    pub fn retry(&self) -> Option<tokio::time::Instant> {
        self.retry
    }

    /// Serves what is wanted since the last time, and no more.
    pub fn settle(&mut self) {
        if self.retry.is_some_and(|at| at <= tokio::time::Instant::now()) {
            self.retry = None;
            self.changed.extend(self.failing.keys());
            self.pause = (self.pause * 2).min(LAST_PAUSE);
        }
        for port in std::mem::take(&mut self.changed) {
            let Some((name, local)) = self.wanted.get(&port).and_then(|w| w.first_key_value()) else {
                self.failing.remove(&port);
                if let Some(check) = self.served.remove(&port) {
                    check.stop.cancel();
                }
                continue;
            };
            let told = (name.clone(), *local);
            if let Some(check) = self.served.get(&port) {
                *check.told.lock() = told;
                continue;
            }
            match self.start(port, told) {
                Ok(check) => {
                    self.served.insert(port, check);
                    if self.failing.remove(&port).is_some_and(|tries| tries >= WORTH_SAYING) {
                        tracing::info!(port, "a health check port is served after all");
                    }
                }
                Err(e) => {
                    let tries = self.failing.entry(port).or_default();
                    *tries += 1;
                    if *tries == WORTH_SAYING {
                        tracing::warn!(service = %name, port, error = %e, "a health check port cannot be served, trying again");
                    }
                }
            }
        }
        if self.failing.is_empty() {
            (self.pause, self.retry) = (FIRST_PAUSE, None);
        } else if self.retry.is_none() {
            self.retry = Some(tokio::time::Instant::now() + self.pause);
        }
    }

    fn start(&self, port: u16, told: (Name, usize)) -> std::io::Result<Check> {
        let all = [IpAddr::from(Ipv4Addr::UNSPECIFIED)];
        let addresses = self.addresses.as_deref().unwrap_or(&all).iter();
        let listeners: Vec<_> = addresses.map(|ip| listen((*ip, port).into())).collect::<Result<_, _>>()?;
        let told = Arc::new(Mutex::new(told));
        let check = Check { told: told.clone(), stop: self.tasks.stop_token().child_token() };
        let health = self.health.clone();
        let answer: Answer = Arc::new(move |_| {
            let (name, local) = told.lock().clone();
            let answer = node_port_answer(&name, local, health.is_healthy());
            std::future::ready(answer).boxed()
        });
        for listener in listeners {
            let (answer, tasks, stop) = (answer.clone(), self.tasks.clone(), check.stop.clone());
            self.tasks.spawn(async move {
                if let Err(e) = accept(listener, answer, tasks, stop).await {
                    tracing::warn!(port, error = %e, "a health check port is no longer served");
                }
            });
        }
        Ok(check)
    }
}

fn node_port_answer(service: &str, local: usize, healthy: bool) -> Response<Full<Bytes>> {
    let (namespace, name) = service.split_once('/').unwrap_or_default();
    let body = serde_json::json!({
        "service": {"namespace": namespace, "name": name},
        "localEndpoints": local, "serviceProxyHealthy": healthy,
    });
    let status = if local > 0 && healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let mut r = response(status, "application/json", body.to_string());
    r.headers_mut().insert("x-load-balancing-endpoint-weight", hyper::header::HeaderValue::from(local));
    r
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a network namespace where IPv6 sockets take no IPv4 by themselves.
    #[test]
    fn all_addresses_are_those_of_both_families() {
        let inside = || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("run as root");
            let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status();
            assert!(up.expect("`ip` is missing: apt-get install iproute2").success());
            std::fs::write("/proc/sys/net/ipv6/bindv6only", "1").unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let _inside = runtime.enter();
            for any in ["0.0.0.0:0", "[::]:0"] {
                let port = listen(any.parse().unwrap()).unwrap();
                let at = port.local_addr().unwrap().port();
                for ip in ["127.0.0.1", "::1"] {
                    std::net::TcpStream::connect((ip, at)).unwrap_or_else(|e| panic!("{any} by {ip}: {e}"));
                }
            }
            let one = listen("127.0.0.1:0".parse().unwrap()).unwrap();
            assert!(std::net::TcpStream::connect(("::1", one.local_addr().unwrap().port())).is_err());
        };
        std::thread::spawn(inside).join().unwrap();
    }
}
