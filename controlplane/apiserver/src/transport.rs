//! Connections: TLS, HTTP/1.1 and HTTP/2, upgrades, and their graceful end.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use orlop_base::supervise::TaskGroup;
use rustls::pki_types::CertificateDer;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::authn::certificate::{ClientIdentity, LateVerifier};
use crate::nodeproxy::rewrite::Rewritten;
use crate::pki::Pair;
use crate::registry;

const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// A peer that vanished without a FIN is noticed after this plus [`PING_LIMIT`].
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_LIMIT: Duration = Duration::from_secs(15);
const HEADER_LIMIT: Duration = Duration::from_secs(30);
/// As upstream: one client-go process multiplexes its watches over one connection.
const MAX_STREAMS: u32 = 250;
const MAX_HEADER_BYTES: u32 = 64 * 1024;

/// Why the server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "cannot listen on {address}: the port is taken; stop the other server (`ss -ltnp` names it) or choose another port"
    )]
    PortTaken { address: SocketAddr },
    #[error("cannot listen on {address}: {source}")]
    Bind { address: SocketAddr, source: io::Error },
    #[error("cannot use the serving certificate: {0}")]
    Tls(String),
}

/// Answers requests. `peer` is who the connection's client certificate stands for.
pub trait Handler: Send + Sync + 'static {
    fn handle(
        self: Arc<Self>,
        request: Request<Incoming>,
        peer: Option<Arc<ClientIdentity>>,
    ) -> impl Future<Output = Response<Body>> + Send;
}

/// A response's body as the transport sends it.
pub enum Body {
    /// From the registry. A watch ends when the token is cancelled, so that clients reconnect elsewhere at once.
    Registry(registry::Body, Option<Pin<Box<WaitForCancellationFutureOwned>>>),
    /// Passed through from a kubelet or a pod.
    Proxied(Incoming),
    /// The same with its links rewritten.
    Rewritten(Box<Rewritten>),
}

impl Body {
    /// Sends what the registry answered; `stop` ends streams.
    pub fn registry(body: registry::Body, stop: &CancellationToken) -> Body {
        let end = body.is_stream().then(|| Box::pin(stop.clone().cancelled_owned()));
        Body::Registry(body, end)
    }
}

impl From<registry::Body> for Body {
    fn from(body: registry::Body) -> Self {
        Body::Registry(body, None)
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            Body::Registry(body, end) => {
                if let Some(end) = end
                    && end.as_mut().poll(cx).is_ready()
                {
                    return Poll::Ready(None);
                }
                Pin::new(body).poll_frame(cx).map_err(|never| match never {})
            }
            Body::Proxied(body) => Pin::new(body).poll_frame(cx),
            Body::Rewritten(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Body::Registry(body, _) => body.is_end_stream(),
            Body::Proxied(body) => body.is_end_stream(),
            Body::Rewritten(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Registry(body, _) => body.size_hint(),
            Body::Proxied(body) => body.size_hint(),
            Body::Rewritten(body) => body.size_hint(),
        }
    }
}

/// Binds `address`.
///
/// # Errors
/// [`Error::PortTaken`] with the remedy, or [`Error::Bind`].
pub async fn bind(address: SocketAddr) -> Result<TcpListener, Error> {
    TcpListener::bind(address).await.map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => Error::PortTaken { address },
        _ => Error::Bind { address, source },
    })
}

/// TLS settings for the serving certificate, asking clients for certificates signed by the cluster CA.
///
/// # Errors
/// [`Error::Tls`] when certificate or key do not fit.
pub fn tls(serving: &Pair, ca: &Pair) -> Result<(Arc<rustls::ServerConfig>, Arc<LateVerifier>), Error> {
    let (chain, key) = serving.to_rustls().map_err(Error::Tls)?;
    let (anchors, _): (Vec<CertificateDer<'static>>, _) = ca.to_rustls().map_err(Error::Tls)?;
    let verifier = Arc::new(LateVerifier::new(anchors).map_err(Error::Tls)?);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| Error::Tls(e.to_string()))?
        .with_client_cert_verifier(verifier.clone())
        .with_single_cert(chain, key)
        .map_err(|e| Error::Tls(e.to_string()))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok((Arc::new(config), verifier))
}

/// Accepts connections until the group stops; each connection is then shut down gracefully.
pub async fn serve<H: Handler>(
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    verifier: Arc<LateVerifier>,
    handler: Arc<H>,
    tasks: TaskGroup,
) -> Result<(), io::Error> {
    let acceptor = TlsAcceptor::from(tls);
    let stop = tasks.stop_token();
    loop {
        let stream = tokio::select! {
            // Cancel-safe: nothing has been accepted yet.
            () = stop.cancelled() => return Ok(()),
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(e) => {
                    // Out of file descriptors or a connection gone already: neither is a reason to stop serving.
                    tracing::warn!(error = %e, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        let (acceptor, verifier, handler, stop) =
            (acceptor.clone(), verifier.clone(), handler.clone(), stop.clone());
        tasks.spawn(async move {
            if let Err(e) = connection(stream, acceptor, verifier, handler, stop).await {
                tracing::debug!(error = %e, "connection ended");
            }
        });
    }
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

async fn connection<H: Handler>(
    stream: TcpStream,
    acceptor: TlsAcceptor,
    verifier: Arc<LateVerifier>,
    handler: Arc<H>,
    stop: CancellationToken,
) -> Result<(), BoxError> {
    // Small answers must not wait for a delayed acknowledgement.
    stream.set_nodelay(true)?;
    keep_alive(&stream);
    let stream = tokio::time::timeout(HANDSHAKE_LIMIT, acceptor.accept(stream)).await??;
    let peer = verifier.identify(stream.get_ref().1.peer_certificates()).map(Arc::new);
    let service = service_fn(move |request| {
        let (handler, peer) = (handler.clone(), peer.clone());
        async move { Ok::<_, std::convert::Infallible>(handler.handle(request, peer).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_LIMIT).half_close(true);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADER_BYTES)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_LIMIT);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        // Dropping neither future loses anything: the connection is polled again below.
        result = connection.as_mut() => return result,
        () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    connection.await
}

/// Has the kernel find out within about a minute that the other side is gone, also on streams that are silent for hours.
pub fn keep_alive(stream: &TcpStream) {
    use rustix::net::sockopt;
    // A socket that refuses an option still works; it only holds its stream longer than it should.
    let _ = sockopt::set_socket_keepalive(stream, true);
    let _ = sockopt::set_tcp_keepidle(stream, Duration::from_secs(30));
    let _ = sockopt::set_tcp_keepintvl(stream, Duration::from_secs(10));
    let _ = sockopt::set_tcp_keepcnt(stream, 3);
}
