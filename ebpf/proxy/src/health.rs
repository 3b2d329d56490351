//! /healthz and /livez as kube-proxy answers them (load balancers ask for it), /metrics, and the health check node
//! ports of Services with externalTrafficPolicy Local.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use orlop_base::supervise::TaskGroup;
use orlop_base::telemetry::Metrics;
use parking_lot::Mutex;
use tokio::net::TcpListener;

/// What health checks tell.
#[derive(Default)]
pub struct Health {
    synced: AtomicBool,
    /// Unix seconds of the last time that maps were in step.
    last_sync: AtomicI64,
    /// Since when changes wait to be written; 0 when none do.
    behind_since: AtomicI64,
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

    pub fn is_healthy(&self) -> bool {
        let behind = self.behind_since.load(Ordering::Relaxed);
        self.synced.load(Ordering::Relaxed) && (behind == 0 || now() - behind < BEHIND_SECONDS)
    }
}

/// Called before metrics are read, to fetch the kernel's counters.
pub type Refresh = Arc<dyn Fn() + Send + Sync>;

/// What the listeners share.
#[derive(Clone)]
pub struct Pages {
    pub health: Arc<Health>,
    pub metrics: Arc<Metrics>,
    pub refresh: Arc<Mutex<Option<Refresh>>>,
}

impl Pages {
    fn answer(&self, path: &str) -> Response<Full<Bytes>> {
        let (status, kind, body) = match path {
            "/healthz" | "/livez" => {
                let healthy = self.health.is_healthy();
                let at = self.health.last_sync.load(Ordering::Relaxed);
                let body = serde_json::json!({
                    "lastUpdated": timestamp(at), "currentTime": timestamp(now()), "nodeEligible": true,
                });
                let status = if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
                (status, "application/json", body.to_string())
            }
            "/metrics" => {
                if let Some(refresh) = self.refresh.lock().clone() {
                    refresh();
                }
                (
                    StatusCode::OK,
                    "application/openmetrics-text; version=1.0.0; charset=utf-8",
                    self.metrics.encode(),
                )
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
    let pages = Arc::new(move |path: &str| pages.answer(path));
    accept(listener, pages, tasks).await
}

type Answer = Arc<dyn Fn(&str) -> Response<Full<Bytes>> + Send + Sync>;

/// Connections at a time: health checkers and scrapers are few.
const MAX_CONNECTIONS: usize = 64;

async fn accept(listener: TcpListener, answer: Answer, tasks: TaskGroup) -> Result<(), std::io::Error> {
    let stop = tasks.stop_token();
    let places = Arc::new(tokio::sync::Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return Ok(()) };
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
        let (answer, stop) = (answer.clone(), stop.clone());
        tasks.spawn(async move {
            let service = service_fn(move |r: Request<hyper::body::Incoming>| {
                let response = answer(r.uri().path());
                async move { Ok::<_, Infallible>(response) }
            });
            let connection =
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                () = stop.cancelled() => {}
                r = connection => if let Err(e) = r { tracing::debug!(error = %e, "health connection"); },
            }
            drop(place);
        });
    }
}

/// Binds a listener; the error names the address.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, crate::Error> {
    TcpListener::bind(address).await.map_err(|source| crate::Error::Listen { address, source })
}
