//! The sockets: UDP and TCP for questions, HTTP for health and figures.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use axum::routing::get;
use orlop_base::supervise::TaskGroup;
use orlop_base::telemetry::Metrics;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::forward::Transport;
use crate::handler::{Handler, Step};

/// Questions that wait for other resolvers at a time: 4 s each at most, some 10 KiB each.
const MAX_WAITING: usize = 512;
/// TCP connections at a time; a stub resolver needs one for a moment after a cut answer.
const MAX_CONNECTIONS: usize = 256;
/// RFC 7766 asks for some seconds.
const TCP_IDLE: Duration = Duration::from_secs(8);
/// Larger questions do not exist; the rest of a larger datagram is cut off and refused as malformed.
const MAX_QUESTION: usize = 4096;

/// The sockets of one address, bound.
pub struct Bound {
    udp: UdpSocket,
    tcp: TcpListener,
}

impl Bound {
    pub async fn bind(address: SocketAddr) -> io::Result<Bound> {
        let udp = UdpSocket::bind(address).await?;
        // With port 0 both get the same.
        let tcp = TcpListener::bind(udp.local_addr()?).await?;
        Ok(Bound { udp, tcp })
    }

    /// Serves until the group stops.
    pub fn serve(self, handler: &Arc<Handler>, tasks: &TaskGroup) {
        let waiting = Arc::new(Semaphore::new(MAX_WAITING));
        let udp = serve_udp(Arc::new(self.udp), handler.clone(), waiting.clone(), tasks.clone());
        tasks.spawn_essential("dns over UDP", udp);
        tasks.spawn_essential("dns over TCP", serve_tcp(self.tcp, handler.clone(), waiting, tasks.clone()));
    }
}

async fn serve_udp(
    socket: Arc<UdpSocket>,
    handler: Arc<Handler>,
    waiting: Arc<Semaphore>,
    tasks: TaskGroup,
) -> io::Result<()> {
    let stop = tasks.stop_token();
    let mut buffer = vec![0; MAX_QUESTION];
    loop {
        // Cancel-safe: a datagram is either received or still in the socket.
        let received = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            r = socket.recv_from(&mut buffer) => r,
        };
        let (n, peer) = match received {
            Ok(r) => r,
            // An asker that is gone (ICMP) says so here; that is no fault of the socket.
            Err(e) => {
                tracing::debug!(error = %e, "receiving a question failed");
                tokio::time::sleep(Duration::from_millis(1)).await;
                continue;
            }
        };
        let question = buffer.get(..n).unwrap_or_default();
        let reply = match handler.handle(question, Transport::Udp) {
            Step::Ignore => continue,
            Step::Reply(bytes) => bytes,
            Step::Wait(answer) => match waiting.clone().try_acquire_owned() {
                Ok(permit) => {
                    let (socket, stop) = (socket.clone(), stop.clone());
                    tasks.spawn(async move {
                        tokio::select! {
                            () = stop.cancelled() => {}
                            bytes = answer => { let _ = socket.send_to(&bytes, peer).await; }
                        }
                        drop(permit);
                    });
                    continue;
                }
                Err(_) => handler.overloaded(question),
            },
        };
        // The asker asks again when this one is lost.
        let _ = socket.send_to(&reply, peer).await;
    }
}

async fn serve_tcp(
    listener: TcpListener,
    handler: Arc<Handler>,
    waiting: Arc<Semaphore>,
    tasks: TaskGroup,
) -> io::Result<()> {
    let stop = tasks.stop_token();
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else { return Ok(()) };
        // Cancel-safe: a connection is either accepted or still queued.
        let accepted = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            r = listener.accept() => r,
        };
        match accepted {
            Ok((stream, _)) => {
                let (handler, waiting, stop) = (handler.clone(), waiting.clone(), stop.clone());
                tasks.spawn(async move {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        // A broken or idle connection is the asker's affair.
                        _ = connection(stream, &handler, &waiting) => {}
                    }
                    drop(permit);
                });
            }
            // Out of file descriptors, or the asker is gone already.
            Err(e) => {
                tracing::debug!(error = %e, "accepting a connection failed");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

async fn connection(mut stream: TcpStream, handler: &Arc<Handler>, waiting: &Semaphore) -> io::Result<()> {
    stream.set_nodelay(true)?;
    loop {
        let question = tokio::time::timeout(TCP_IDLE, async {
            let length = stream.read_u16().await?;
            let mut question = vec![0; usize::from(length)];
            stream.read_exact(&mut question).await?;
            io::Result::Ok(question)
        });
        let question = question.await??;
        let reply = match handler.handle(&question, Transport::Tcp) {
            Step::Ignore => return Ok(()),
            Step::Reply(bytes) => bytes,
            Step::Wait(answer) => match waiting.try_acquire() {
                Ok(_permit) => answer.await,
                Err(_) => handler.overloaded(&question),
            },
        };
        let length = u16::try_from(reply.len()).map_err(|_| io::ErrorKind::InvalidData)?;
        let mut framed = Vec::with_capacity(reply.len() + 2);
        framed.extend_from_slice(&length.to_be_bytes());
        framed.extend_from_slice(&reply);
        tokio::time::timeout(TCP_IDLE, stream.write_all(&framed)).await??;
    }
}

/// `/health` (alive), `/ready` (the tables are complete) and `/metrics`.
pub async fn serve_http(
    listener: TcpListener,
    handler: Arc<Handler>,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) -> io::Result<()> {
    let ready = move || async move {
        match handler.synced.is_set() {
            true => (StatusCode::OK, "OK"),
            false => (StatusCode::SERVICE_UNAVAILABLE, "kubernetes"),
        }
    };
    let text = [("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")];
    let router = axum::Router::new()
        .route("/health", get(|| async { "OK" }))
        .route("/ready", get(ready))
        .route("/metrics", get(move || async move { (text, metrics.encode()) }));
    axum::serve(listener, router).with_graceful_shutdown(async move { stop.cancelled().await }).await
}
