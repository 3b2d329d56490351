//! Port-forward: connections to the pod's loopback, made inside its network namespace.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream as StdStream};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use orlop_proto::cri;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::netns;
use super::spdy::{Event, Writer, connection};
use super::websocket::{self, Codec, Socket};
use crate::network::netns_path;
use crate::runtime::Runtime;

/// Data waiting for one forwarded connection, in frames.
const QUEUE: usize = 16;
/// How long connecting inside the pod may take. Its own loopback answers at once or never.
const CONNECT: Duration = Duration::from_secs(10);
/// Streams whose pair is still missing.
const MAX_HALVES: usize = 64;

/// A connection to `port` on the pod's loopback, IPv4 first.
async fn dial(runtime: &Runtime, sandbox_id: &str, port: u16) -> io::Result<TcpStream> {
    let sandbox = runtime.store.sandbox(sandbox_id).map_err(io::Error::other)?;
    let record = sandbox.record();
    let connect = move || {
        let four = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let six = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
        StdStream::connect_timeout(&four, CONNECT)
            .or_else(|e| StdStream::connect_timeout(&six, CONNECT).map_err(|_| e))
    };
    let stream = if record.namespaces().network() == cri::NamespaceMode::Node {
        tokio::task::spawn_blocking(connect).await.map_err(io::Error::other)??
    } else {
        netns::inside(netns_path(&runtime.config.sandbox_run_dir(&sandbox.id)), connect).await?
    };
    stream.set_nonblocking(true)?;
    let stream = TcpStream::from_std(stream)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn refusal(port: u16, e: &io::Error) -> Bytes {
    Bytes::from(format!("failed to connect to localhost:{port} inside the pod: {e}"))
}

/// Copies between the pod's connection and the client's queue until both directions have ended, one has failed, or nothing moves
/// for `idle`. `send` puts data on the client's side.
async fn copy<F, Fut>(
    stream: TcpStream,
    mut from_client: mpsc::Receiver<Bytes>,
    mut send: F,
    idle: Duration,
) -> io::Result<()>
where
    F: FnMut(Bytes) -> Fut,
    Fut: Future<Output = io::Result<()>>,
{
    let (mut from_pod, mut to_pod) = stream.into_split();
    let moved = tokio::sync::Notify::new();
    let inwards = async {
        while let Some(data) = from_client.recv().await {
            moved.notify_one();
            to_pod.write_all(&data).await?;
        }
        // The client has half-closed.
        to_pod.shutdown().await
    };
    let outwards = async {
        let mut buffer = BytesMut::with_capacity(16 << 10);
        while from_pod.read_buf(&mut buffer).await? > 0 {
            moved.notify_one();
            send(buffer.split().freeze()).await?;
            buffer.reserve(16 << 10);
        }
        Ok::<_, io::Error>(())
    };
    let quiet = async { while tokio::time::timeout(idle, moved.notified()).await.is_ok() {} };
    tokio::select! {
        // Once the pod has closed, nobody reads what the client still sends.
        out = async {
            tokio::pin!(inwards);
            tokio::pin!(outwards);
            tokio::select! {
                out = &mut outwards => out,
                written = &mut inwards => { written?; outwards.await }
            }
        } => out,
        () = quiet => Ok(()),
    }
}

/// The two streams of one forwarded connection.
#[derive(Default)]
struct Pair {
    port: u16,
    data: Option<u32>,
    error: Option<u32>,
}

/// Port-forward over SPDY: a pair of streams, data and error, per connection (`portforward.k8s.io`).
pub(super) async fn spdy<I>(runtime: &Arc<Runtime>, request: &cri::PortForwardRequest, io: I)
where
    I: AsyncRead + AsyncWrite + Send + 'static,
{
    let (mut reader, writer, writing) = match connection(io) {
        Ok(c) => c,
        Err(e) => return tracing::warn!(error = %e, "could not set up a SPDY connection"),
    };
    let idle = runtime.config.streaming_idle_timeout;
    let serve = async move {
        let mut halves: HashMap<String, Pair> = HashMap::new();
        let mut inputs: HashMap<u32, mpsc::Sender<Bytes>> = HashMap::new();
        let mut waiting: HashMap<u32, mpsc::Receiver<Bytes>> = HashMap::new();
        let mut forwards = JoinSet::new();
        while let Ok(Some(event)) = tokio::time::timeout(idle, reader.next()).await {
            // Take ended ones off the set.
            while forwards.try_join_next().is_some() {}
            match event {
                Event::Open { id, headers } => {
                    let header =
                        |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
                    let port = header("port").and_then(|p| p.parse::<u16>().ok()).filter(|p| *p > 0);
                    let kind = header("streamtype").unwrap_or_default().to_owned();
                    let (Some(port), true) = (port, matches!(kind.as_str(), "data" | "error")) else {
                        let _ = writer.reset(id).await;
                        continue;
                    };
                    // Clients before request ids number a pair's streams one after the other.
                    let key = header("requestid").map_or_else(
                        || if kind == "error" { id.to_string() } else { id.saturating_sub(2).to_string() },
                        str::to_owned,
                    );
                    if halves.len() >= MAX_HALVES && !halves.contains_key(&key) {
                        let _ = writer.reset(id).await;
                        continue;
                    }
                    let pair = halves.entry(key.clone()).or_default();
                    pair.port = port;
                    if kind == "data" {
                        pair.data = Some(id);
                        // Data may come before the pair is complete.
                        let (tx, rx) = mpsc::channel(QUEUE);
                        inputs.insert(id, tx);
                        waiting.insert(id, rx);
                    } else {
                        pair.error = Some(id);
                    }
                    if let (Some(data), Some(error)) = (pair.data, pair.error) {
                        halves.remove(&key);
                        if let Some(rx) = waiting.remove(&data) {
                            let (runtime, writer) = (runtime.clone(), writer.clone());
                            let sandbox = request.pod_sandbox_id.clone();
                            forwards.spawn(async move {
                                forward(&runtime, &sandbox, port, data, error, rx, writer, idle).await;
                            });
                        }
                    }
                }
                Event::Data { id, data } => {
                    if let Some(tx) = inputs.get(&id) {
                        // Dropping what a finished connection no longer reads; waiting is the flow control.
                        let _ = tx.send(data).await;
                    }
                }
                Event::End { id } | Event::Reset { id } => {
                    inputs.remove(&id);
                }
            }
        }
        // Dropping the set ends what is still forwarded.
        drop(forwards);
        let _ = writer.go_away(reader.last_stream()).await;
    };
    tokio::join!(writing, serve);
}

#[allow(clippy::too_many_arguments)] // The ends of one connection, which nothing else holds together.
async fn forward(
    runtime: &Runtime,
    sandbox: &str,
    port: u16,
    data: u32,
    error: u32,
    from_client: mpsc::Receiver<Bytes>,
    writer: Writer,
    idle: Duration,
) {
    let done = match dial(runtime, sandbox, port).await {
        Ok(stream) => {
            let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
            let send = |bytes| {
                let writer = writer.clone();
                async move { writer.data(data, bytes).await.map_err(|_| gone()) }
            };
            copy(stream, from_client, send, idle).await.map_err(|e| Bytes::from(e.to_string()))
        }
        Err(e) => Err(refusal(port, &e)),
    };
    // From here on the client may be gone; nothing more is to be done for it.
    if let Err(text) = done {
        let _ = writer.data(error, text).await;
    }
    let _ = writer.end(data).await;
    let _ = writer.end(error).await;
}

/// Which of `count` ports a client's data is for: even channels carry data, odd ones errors.
pub(super) fn input_of(channel: u8, count: usize) -> Option<usize> {
    let at = usize::from(channel / 2);
    (channel.is_multiple_of(2) && at < count).then_some(at)
}

/// Port-forward over WebSocket channels: for the i-th port, data on channel 2i and errors on 2i+1, each opened by the port's number
/// in two little-endian bytes.
pub(super) async fn websocket(
    runtime: &Arc<Runtime>,
    request: &cri::PortForwardRequest,
    socket: Socket,
    codec: Codec,
) {
    let ports: Vec<u16> =
        request.port.iter().filter_map(|p| u16::try_from(*p).ok()).filter(|p| *p > 0).take(100).collect();
    let (mut sink, mut stream) = socket.split();
    let (out_tx, mut out_rx) = mpsc::channel(QUEUE);
    let mut inputs = Vec::new();
    let mut forwards = JoinSet::new();
    let idle = runtime.config.streaming_idle_timeout;
    for (i, port) in ports.iter().copied().enumerate() {
        let (data, error) = (2 * i as u8, 2 * i as u8 + 1);
        for channel in [data, error] {
            if sink.send(codec.encode(channel, &port.to_le_bytes())).await.is_err() {
                return;
            }
        }
        let (tx, rx) = mpsc::channel(QUEUE);
        inputs.push(tx);
        let (runtime, sandbox, out) = (runtime.clone(), request.pod_sandbox_id.clone(), out_tx.clone());
        forwards.spawn(async move {
            let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
            let done = match dial(&runtime, &sandbox, port).await {
                Ok(stream) => {
                    let send = |bytes: Bytes| {
                        let out = out.clone();
                        async move { out.send(codec.encode(data, &bytes)).await.map_err(|_| gone()) }
                    };
                    copy(stream, rx, send, idle).await.map_err(|e| Bytes::from(e.to_string()))
                }
                Err(e) => Err(refusal(port, &e)),
            };
            if let Err(text) = done {
                // A client that is gone needs no error.
                let _ = out.send(codec.encode(error, &text)).await;
            }
        });
    }
    drop(out_tx);
    let outwards = async {
        while let Some(message) = out_rx.recv().await {
            if sink.send(message).await.is_err() {
                return;
            }
        }
        // Every forwarded connection has ended.
        websocket::close(&mut sink).await;
    };
    let inwards = async {
        while let Some(Ok(message)) = stream.next().await {
            if message.is_close() {
                return;
            }
            if let Some((channel, data)) = codec.decode(message)
                && let Some(at) = input_of(channel, inputs.len())
                && let Some(tx) = inputs.get(at)
            {
                let _ = tx.send(data).await;
            }
        }
    };
    tokio::select! {
        () = outwards => {}
        // Dropping the set ends what is still forwarded.
        () = inwards => {}
    }
}
