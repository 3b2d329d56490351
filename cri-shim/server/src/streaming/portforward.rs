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
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;

use super::netns;
use super::remote::{Activity, beside};
use super::spdy::{Event, Writer, connection};
use super::websocket::{self, Codec, Socket};
use crate::network::netns_path;
use crate::runtime::Runtime;

/// Data waiting for one forwarded connection, in pieces of 32 KiB.
const QUEUE: usize = 8;
/// How long a full queue may stay full before its connection is given up for the session's others, which wait meanwhile as do new ones
/// and pings: SPDY as Kubernetes speaks it has no flow control of single streams. One that is alone may take its time.
const STALL: Duration = Duration::from_secs(30);
/// How long connecting inside the pod may take. Its own loopback answers at once or never.
const CONNECT: Duration = Duration::from_secs(10);
/// Streams whose pair is still missing.
const MAX_HALVES: usize = 64;
/// Connections of one session at once. A client's streams alone do not bound them: those that it has half-closed are open no more, and
/// what they forward goes on.
const MAX_CONNECTIONS: usize = 512;

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
    session: &Activity,
) -> io::Result<()>
where
    F: FnMut(Bytes) -> Fut,
    Fut: Future<Output = io::Result<()>>,
{
    let (mut from_pod, mut to_pod) = stream.into_split();
    let moved = tokio::sync::Notify::new();
    let inwards = async {
        while let Some(data) = from_client.recv().await {
            to_pod.write_all(&data).await?;
            moved.notify_one();
            session.note();
        }
        // The client has half-closed.
        to_pod.shutdown().await
    };
    let outwards = async {
        let mut buffer = BytesMut::with_capacity(16 << 10);
        while from_pod.read_buf(&mut buffer).await? > 0 {
            send(buffer.split().freeze()).await?;
            moved.notify_one();
            session.note();
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
    data: Option<u32>,
    error: Option<u32>,
}

/// How long a session and each of its connections may be silent, how long a full queue may stay full, and how many connections there
/// may be at once.
#[derive(Clone, Copy)]
struct Limits {
    idle: Duration,
    stall: Duration,
    connections: usize,
}

/// Port-forward over SPDY: a pair of streams, data and error, per connection (`portforward.k8s.io`).
pub(super) async fn spdy<I>(runtime: &Arc<Runtime>, request: &cri::PortForwardRequest, io: I)
where
    I: AsyncRead + AsyncWrite + Send + 'static,
{
    let idle = runtime.config.streaming_idle_timeout;
    let limits = Limits { idle, stall: STALL, connections: MAX_CONNECTIONS };
    let dial = |port| {
        let (runtime, sandbox) = (runtime.clone(), request.pod_sandbox_id.clone());
        async move { dial(&runtime, &sandbox, port).await }
    };
    spdy_session(io, limits, dial).await;
}

/// Connections that are being forwarded, by the number of their data stream.
struct Forwards {
    tasks: JoinSet<u32>,
    inputs: HashMap<u32, mpsc::Sender<Bytes>>,
    running: HashMap<u32, Running>,
}

struct Running {
    error: u32,
    task: AbortHandle,
}

impl Forwards {
    /// Takes ended ones off.
    fn tidy(&mut self) {
        while let Some(ended) = self.tasks.try_join_next() {
            if let Ok(data) = ended {
                self.running.remove(&data);
                self.inputs.remove(&data);
            }
        }
    }

    /// Ends a connection at once; `why` tells the client.
    async fn abort(&mut self, data: u32, why: Option<&str>, writer: &Writer) {
        self.inputs.remove(&data);
        let Some(running) = self.running.remove(&data) else { return };
        running.task.abort();
        farewell(data, running.error, why, writer).await;
    }
}

/// The last there is of a connection; clients wait for the error stream's end. This one may be gone.
async fn farewell(data: u32, error: u32, why: Option<&str>, writer: &Writer) {
    if let Some(text) = why {
        let _ = writer.data(error, Bytes::copy_from_slice(text.as_bytes())).await;
        let _ = writer.reset(data).await;
    }
    let _ = writer.end(error).await;
}

const TOO_MANY: &str = "too many connections are being forwarded in this session";
const UNREAD: &str = "the process in the pod does not read what it is sent";

async fn spdy_session<I, D, F>(io: I, limits: Limits, dial: D)
where
    I: AsyncRead + AsyncWrite + Send + 'static,
    D: Fn(u16) -> F,
    F: Future<Output = io::Result<TcpStream>> + Send + 'static,
{
    let (mut reader, writer, writing) = match connection(io) {
        Ok(c) => c,
        Err(e) => return tracing::warn!(error = %e, "could not set up a SPDY connection"),
    };
    let activity = Arc::new(Activity::new());
    let serve = async move {
        let mut halves: HashMap<String, Pair> = HashMap::new();
        let mut waiting: HashMap<u32, mpsc::Receiver<Bytes>> = HashMap::new();
        let mut forwards =
            Forwards { tasks: JoinSet::new(), inputs: HashMap::new(), running: HashMap::new() };
        loop {
            let event = tokio::select! {
                event = reader.next() => event,
                // The session ends; what the reader was about to say is for nobody.
                () = activity.idle(limits.idle) => None,
            };
            let Some(event) = event else { break };
            activity.note();
            forwards.tidy();
            match event {
                Event::Open { id, headers } => {
                    let Some((key, port, is_data)) = half_of(id, &headers) else {
                        let _ = writer.reset(id).await;
                        continue;
                    };
                    if halves.len() >= MAX_HALVES && !halves.contains_key(&key) {
                        let _ = writer.reset(id).await;
                        continue;
                    }
                    let pair = halves.entry(key.clone()).or_default();
                    if (if is_data { pair.data } else { pair.error }).is_some() {
                        // The first one waits for its other half.
                        let _ = writer.reset(id).await;
                        continue;
                    }
                    if is_data {
                        pair.data = Some(id);
                        // Data may come before the pair is complete.
                        let (tx, rx) = mpsc::channel(QUEUE);
                        forwards.inputs.insert(id, tx);
                        waiting.insert(id, rx);
                    } else {
                        pair.error = Some(id);
                    }
                    let (Some(data), Some(error)) = (pair.data, pair.error) else { continue };
                    halves.remove(&key);
                    let rx = waiting.remove(&data);
                    if forwards.running.len() >= limits.connections {
                        forwards.inputs.remove(&data);
                        farewell(data, error, Some(TOO_MANY), &writer).await;
                        continue;
                    }
                    if let Some(rx) = rx {
                        let (dialled, writer, activity) = (dial(port), writer.clone(), activity.clone());
                        let task = forwards.tasks.spawn(async move {
                            let stream = dialled.await.map_err(|e| refusal(port, &e));
                            forward(stream, data, error, rx, writer, limits.idle, &activity).await;
                            data
                        });
                        forwards.running.insert(data, Running { error, task });
                    }
                }
                Event::Data { id, data } => {
                    let Some(tx) = forwards.inputs.get(&id) else { continue };
                    // Dropping what a finished connection no longer reads; waiting is the flow control.
                    let patience = if forwards.running.len() > 1 { limits.stall } else { limits.idle };
                    if timeout(patience, tx.send(data)).await.is_err() {
                        waiting.remove(&id);
                        forwards.abort(id, Some(UNREAD), &writer).await;
                    }
                }
                Event::End { id } => drop(forwards.inputs.remove(&id)),
                // It wants no more of the answer either.
                Event::Reset { id } => {
                    waiting.remove(&id);
                    halves.retain(|_, p| p.data != Some(id) && p.error != Some(id));
                    forwards.abort(id, None, &writer).await;
                }
            }
        }
        // Dropping the set ends what is still forwarded.
        drop(forwards);
        let _ = timeout(limits.idle, writer.go_away(reader.last_stream())).await;
    };
    beside(serve, writing, limits.idle).await;
}

/// What a new stream is half of, by its headers: the connection's name, its port, and whether this is the half with its data.
fn half_of(id: u32, headers: &[(String, String)]) -> Option<(String, u16, bool)> {
    let header = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
    let port = header("port").and_then(|p| p.parse::<u16>().ok()).filter(|p| *p > 0)?;
    let is_data = match header("streamtype")? {
        "data" => true,
        "error" => false,
        _ => return None,
    };
    // Clients before request ids number a pair's streams one after the other.
    let numbered = || if is_data { id.saturating_sub(2).to_string() } else { id.to_string() };
    Some((header("requestid").map_or_else(numbered, str::to_owned), port, is_data))
}

async fn forward(
    stream: Result<TcpStream, Bytes>,
    data: u32,
    error: u32,
    from_client: mpsc::Receiver<Bytes>,
    writer: Writer,
    idle: Duration,
    session: &Activity,
) {
    let done = match stream {
        Ok(stream) => {
            let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
            let send = |bytes| {
                let writer = writer.clone();
                async move { writer.data(data, bytes).await.map_err(|_| gone()) }
            };
            copy(stream, from_client, send, idle, session).await.map_err(|e| Bytes::from(e.to_string()))
        }
        Err(text) => Err(text),
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
    let activity = Arc::new(Activity::new());
    let idle = runtime.config.streaming_idle_timeout;
    for (i, port) in ports.iter().copied().enumerate() {
        let (data, error) = (2 * i as u8, 2 * i as u8 + 1);
        for channel in [data, error] {
            if sink.send(codec.encode(channel, &port.to_le_bytes())).await.is_err() {
                return;
            }
        }
        let (tx, rx) = mpsc::channel(QUEUE);
        let (runtime, sandbox, out) = (runtime.clone(), request.pod_sandbox_id.clone(), out_tx.clone());
        let activity = activity.clone();
        let task = forwards.spawn(async move {
            let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
            let done = match dial(&runtime, &sandbox, port).await {
                Ok(stream) => {
                    let send = |bytes: Bytes| {
                        let out = out.clone();
                        async move { out.send(codec.encode(data, &bytes)).await.map_err(|_| gone()) }
                    };
                    copy(stream, rx, send, idle, &activity).await.map_err(|e| Bytes::from(e.to_string()))
                }
                Err(e) => Err(refusal(port, &e)),
            };
            if let Err(text) = done {
                // A client that is gone needs no error.
                let _ = out.send(codec.encode(error, &text)).await;
            }
        });
        inputs.push(Some((tx, task)));
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
            let patience = if inputs.iter().flatten().count() > 1 { STALL } else { idle };
            let Some((channel, data)) = codec.decode(message) else { continue };
            let Some(at) = input_of(channel, inputs.len()) else { continue };
            for piece in websocket::pieces(&data) {
                if let Some((tx, task)) = &inputs[at]
                    && timeout(patience, tx.send(piece)).await.is_err()
                {
                    tracing::info!("ended a forwarded connection: {UNREAD}");
                    task.abort();
                    inputs[at] = None;
                }
            }
        }
    };
    tokio::select! {
        () = outwards => {}
        // Dropping the set ends what is still forwarded.
        () = inwards => {}
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::DuplexStream;
    use tokio::net::TcpListener;

    use super::super::spdy::{Decoder, Encoder, Frame, plain};
    use super::*;

    /// A client of a session whose pod is this machine's loopback.
    struct Client {
        io: DuplexStream,
        encoder: Encoder,
        decoder: Decoder,
        buffer: BytesMut,
    }

    impl Client {
        async fn send(&mut self, frame: Frame) {
            let bytes = match &frame {
                Frame::SynStream { .. } => self.encoder.encode(&frame).unwrap(),
                other => plain(other),
            };
            self.io.write_all(&bytes).await.unwrap();
        }

        /// Opens error and data stream, which get the numbers `id` and `id + 2`.
        async fn open(&mut self, id: u32, port: u16) {
            for (id, kind) in [(id, "error"), (id + 2, "data")] {
                self.half(id, kind, port, &[], false).await;
            }
        }

        async fn half(&mut self, id: u32, kind: &str, port: u16, more: &[(&str, &str)], fin: bool) {
            let port = port.to_string();
            let headers = [("streamtype", kind), ("port", &port)];
            let headers =
                headers.iter().chain(more).map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
            self.send(Frame::SynStream { id, fin, headers }).await;
        }

        async fn data(&mut self, id: u32, data: &'static [u8]) {
            self.send(Frame::Data { id, fin: false, data: Bytes::from_static(data) }).await;
        }

        async fn next(&mut self) -> Option<Frame> {
            loop {
                if let Some(frame) = self.decoder.next(&mut self.buffer).unwrap() {
                    return Some(frame);
                }
                if self.io.read_buf(&mut self.buffer).await.unwrap() == 0 {
                    return None;
                }
            }
        }

        async fn until(&mut self, what: impl Fn(&Frame) -> bool) {
            while !what(&self.next().await.expect("the session ended")) {}
        }
    }

    fn session(limits: Limits) -> (Client, impl Future<Output = ()>) {
        let (near, far) = tokio::io::duplex(64 << 10);
        let dial = |port| TcpStream::connect((Ipv4Addr::LOCALHOST, port));
        let client = Client {
            io: far,
            encoder: Encoder::new().unwrap(),
            decoder: Decoder::default(),
            buffer: BytesMut::new(),
        };
        (client, spdy_session(near, limits, dial))
    }

    async fn listen() -> (TcpListener, u16) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        (listener, port)
    }

    const LONG: Duration = Duration::from_secs(60);
    const LIMITS: Limits = Limits { idle: LONG, stall: LONG, connections: MAX_CONNECTIONS };

    async fn within_reason(all: impl Future) {
        timeout(LONG, all).await.expect("it ends");
    }

    #[tokio::test]
    async fn a_download_is_no_silence() {
        let idle = Duration::from_secs(2);
        let (mut client, serve) = session(Limits { idle, ..LIMITS });
        let (listener, port) = listen().await;
        let pod = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            for _ in 0..12 {
                tokio::time::sleep(idle / 8).await;
                stream.write_all(b"x").await.unwrap();
            }
        };
        let talk = async {
            client.open(1, port).await;
            let mut got = 0;
            loop {
                match client.next().await.expect("the session ended") {
                    Frame::Data { id: 3, fin: true, .. } => break,
                    Frame::Data { id: 3, data, .. } => got += data.len(),
                    _ => {}
                }
            }
            assert_eq!(got, 12);
            // And silence is: the session ends by itself.
            while client.next().await.is_some() {}
        };
        within_reason(async { tokio::join!(serve, pod, talk) }).await;
    }

    /// As clients write that hand over all that they have.
    #[tokio::test]
    async fn a_frame_may_be_as_large_as_there_are() {
        static LARGE: [u8; 0xff_ffff] = [7; 0xff_ffff];
        let (mut client, serve) = session(LIMITS);
        let (listener, port) = listen().await;
        let pod = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut got = Vec::new();
            stream.read_to_end(&mut got).await.unwrap();
            assert!(got == LARGE);
        };
        let talk = async {
            client.open(1, port).await;
            client.send(Frame::Data { id: 3, fin: true, data: Bytes::from_static(&LARGE) }).await;
            client.until(|f| matches!(f, Frame::Data { id: 1, fin: true, .. })).await;
            drop(client);
        };
        within_reason(async { tokio::join!(serve, pod, talk) }).await;
    }

    #[tokio::test]
    async fn a_process_that_does_not_read_stops_itself_alone() {
        let (mut client, serve) = session(Limits { stall: Duration::from_millis(200), ..LIMITS });
        let (deaf, deaf_port) = listen().await;
        let (listener, port) = listen().await;
        let pod = async {
            let (_held, _) = deaf.accept().await.unwrap();
            let (_other, _) = listener.accept().await.unwrap();
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut got = [0; 2];
            stream.read_exact(&mut got).await.unwrap();
            stream.write_all(&got).await.unwrap();
            stream.shutdown().await.unwrap();
        };
        let talk = async {
            static CHUNK: [u8; 32 << 10] = [0; 32 << 10];
            client.open(1, deaf_port).await;
            client.open(5, port).await;
            // More than the kernel's buffers take.
            for _ in 0..1000 {
                client.data(3, &CHUNK).await;
            }
            client.until(|f| matches!(f, Frame::RstStream { id: 3, .. })).await;
            client.open(9, port).await;
            client.send(Frame::Ping(1)).await;
            client.data(11, b"hi").await;
            client.until(|f| matches!(f, Frame::Ping(1))).await;
            client.until(|f| matches!(f, Frame::Data { id: 11, data, .. } if data == "hi")).await;
            drop(client);
        };
        within_reason(async { tokio::join!(serve, pod, talk) }).await;
    }

    #[tokio::test]
    async fn a_reset_ends_an_endless_answer() {
        let (mut client, serve) = session(LIMITS);
        let (listener, port) = listen().await;
        let pod = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            while stream.write_all(&[0; 4096]).await.is_ok() {}
        };
        let talk = async {
            client.open(1, port).await;
            client.until(|f| matches!(f, Frame::Data { id: 3, .. })).await;
            client.send(Frame::RstStream { id: 3, status: 5 }).await;
            // Clients wait for it.
            client.until(|f| matches!(f, Frame::Data { id: 1, fin: true, .. })).await;
            client
        };
        let ended = async { tokio::join!(pod, talk) };
        tokio::select! {
            () = serve => panic!("the session goes on"),
            () = within_reason(ended) => {}
        }
    }

    /// Each would keep a queue for ever.
    #[tokio::test]
    async fn a_half_is_opened_once() {
        let (mut client, serve) = session(LIMITS);
        let (listener, port) = listen().await;
        let pod = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut got = Vec::new();
            stream.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, b"first");
        };
        let talk = async {
            let name = [("requestid", "a")];
            client.half(1, "data", port, &name, false).await;
            client.data(1, b"first").await;
            let again = (3..200).step_by(2);
            for id in again.clone() {
                client.half(id, "data", port, &name, true).await;
            }
            let mut refused = Vec::new();
            while refused.len() < again.clone().count() {
                if let Frame::RstStream { id, .. } = client.next().await.expect("the session ended") {
                    refused.push(id);
                }
            }
            assert!(refused.into_iter().eq(again));
            client.half(201, "error", port, &name, true).await;
            client.send(Frame::Data { id: 1, fin: true, data: Bytes::new() }).await;
            client.until(|f| matches!(f, Frame::Data { id: 201, fin: true, .. })).await;
            drop(client);
        };
        within_reason(async { tokio::join!(serve, pod, talk) }).await;
    }

    /// Streams that the client has half-closed are not counted as open, but the connections live.
    #[tokio::test]
    async fn connections_are_bounded_also_when_they_are_half_closed() {
        let (mut client, serve) = session(Limits { connections: 2, ..LIMITS });
        let (listener, port) = listen().await;
        let (free, freed) = tokio::sync::oneshot::channel();
        let pod = async {
            let (first, _) = listener.accept().await.unwrap();
            let (_second, _) = listener.accept().await.unwrap();
            freed.await.unwrap();
            drop(first);
            listener.accept().await.unwrap();
        };
        let talk = async {
            for id in [1, 5, 9] {
                client.half(id, "error", port, &[], true).await;
                client.half(id + 2, "data", port, &[], true).await;
            }
            let told = |f: &Frame| matches!(f, Frame::Data { id: 9, data, .. } if data.ends_with(b"in this session"));
            client.until(told).await;
            client.until(|f| matches!(f, Frame::Data { id: 9, fin: true, .. })).await;
            // One that has ended makes room; the session notes its end with a later frame.
            free.send(()).unwrap();
            client.until(|f| matches!(f, Frame::Data { id: 1, fin: true, .. })).await;
            for id in (13..).step_by(4) {
                client.half(id, "error", port, &[], true).await;
                client.half(id + 2, "data", port, &[], true).await;
                client.send(Frame::Ping(id)).await;
                let mut refused = false;
                loop {
                    match client.next().await.expect("the session ended") {
                        Frame::Ping(n) if n == id => break,
                        Frame::RstStream { id: n, .. } => refused |= n == id + 2,
                        _ => {}
                    }
                }
                if !refused {
                    break;
                }
            }
            client
        };
        let ended = async { tokio::join!(pod, talk) };
        tokio::select! {
            () = serve => panic!("the session goes on"),
            () = within_reason(ended) => {}
        }
    }
}
