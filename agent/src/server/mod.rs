//! The node server (:10250): logs, exec, attach and port-forward for the API server, and what monitoring reads.
//!
//! Every request is authenticated (client certificate or token) and authorized against the `nodes` resource as upstream's
//! kubelet does it; errors are plain text, which the API server wraps into a Status.

mod auth;
mod checkpoint;
mod containers;
mod logs;
mod stats;
mod streams;
mod tls;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::{TcpListener, TcpStream};

use crate::context::Context;
use crate::error::Error;
use auth::{Auth, Identity};

pub type Body = BoxBody<Bytes, Error>;

/// How long a client may take for the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// A refusal with the text that the caller reads.
#[derive(Debug)]
pub struct Refusal {
    pub code: StatusCode,
    pub text: String,
}

impl Refusal {
    pub fn new(code: StatusCode, text: impl Into<String>) -> Refusal {
        Refusal { code, text: text.into() }
    }

    pub fn not_found(text: impl Into<String>) -> Refusal {
        Refusal::new(StatusCode::NOT_FOUND, text)
    }

    pub fn bad_request(text: impl Into<String>) -> Refusal {
        Refusal::new(StatusCode::BAD_REQUEST, text)
    }

    pub fn internal(e: &(dyn std::error::Error + 'static)) -> Refusal {
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, orlop_base::telemetry::chain(e))
    }
}

impl From<crate::cri::Error> for Refusal {
    fn from(e: crate::cri::Error) -> Refusal {
        let code = if e.is_not_found() { StatusCode::NOT_FOUND } else { StatusCode::INTERNAL_SERVER_ERROR };
        Refusal::new(code, e.to_string())
    }
}

/// Listens as the configuration says. Fails at once when the address is taken.
pub async fn bind(ctx: &Context) -> Result<(TcpListener, Arc<tls::Acceptor>), Error> {
    let address = ctx.config.listen;
    let listener = TcpListener::bind(address).await.map_err(|source| Error::Listen { address, source })?;
    Ok((listener, Arc::new(tls::Acceptor::new(ctx)?)))
}

/// Serves until the agent stops.
pub async fn run(ctx: Context, listener: TcpListener, acceptor: Arc<tls::Acceptor>) -> Result<(), Error> {
    let stop = ctx.tasks.stop_token();
    let server = Arc::new(Server { auth: Auth::new(&ctx), ctx });
    loop {
        // Cancel-safe: an accept that is dropped leaves the connection in the backlog.
        let accepted = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            a = listener.accept() => a,
        };
        match accepted {
            Ok((stream, _)) => {
                let (server, acceptor, stop) = (server.clone(), acceptor.clone(), stop.clone());
                server.ctx.tasks.clone().spawn(async move {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = connection(server, acceptor, stream) => {}
                    }
                });
            }
            Err(e) => {
                tracing::warn!(error = %e, "node server: accept failed");
                // Out of file descriptors, most likely: give connections time to close.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(server: Arc<Server>, acceptor: Arc<tls::Acceptor>, stream: TcpStream) {
    // Without it small log and exec frames wait for the peer's delayed acknowledgement.
    let _ = stream.set_nodelay(true);
    let handshake = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await;
    let Ok(Ok((stream, identity))) = handshake else { return };
    let identity = Arc::new(identity);
    let service = hyper::service::service_fn(move |request| {
        let (server, identity) = (server.clone(), identity.clone());
        async move { Ok::<_, Infallible>(server.answer(request, identity).await) }
    });
    let io = TokioIo::new(stream);
    let mut builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    builder.http1().half_close(true);
    if let Err(e) = builder.serve_connection_with_upgrades(io, service).await {
        tracing::debug!(error = %e, "node server: connection ended");
    }
}

pub fn text(code: StatusCode, text: impl Into<String>) -> Response<Body> {
    respond(code, "text/plain; charset=utf-8", text.into().into_bytes())
}

pub fn respond(code: StatusCode, content_type: &'static str, bytes: Vec<u8>) -> Response<Body> {
    let body = Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed();
    let mut response = Response::new(body);
    *response.status_mut() = code;
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    response
}

fn json<T: serde::Serialize>(value: &T) -> Result<Response<Body>, Refusal> {
    let bytes = serde_json::to_vec(value).map_err(|e| Refusal::internal(&e))?;
    Ok(respond(StatusCode::OK, "application/json", bytes))
}

struct Server {
    ctx: Context,
    auth: Auth,
}

impl Server {
    async fn answer(&self, request: Request<Incoming>, peer: Arc<Option<Identity>>) -> Response<Body> {
        let result = async {
            self.auth.check(&request, (*peer).as_ref()).await?;
            self.route(request).await
        };
        match result.await {
            Ok(response) => response,
            Err(r) => text(r.code, r.text),
        }
    }

    async fn route(&self, request: Request<Incoming>) -> Result<Response<Body>, Refusal> {
        let ctx = &self.ctx;
        let path = request.uri().path().to_owned();
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let reads = matches!(*request.method(), Method::GET | Method::HEAD);
        match parts.as_slice() {
            ["healthz"] | ["healthz", "ping" | "log" | "syncloop"] | ["livez"] | ["readyz"] if reads => {
                Ok(text(StatusCode::OK, "ok"))
            }
            ["metrics"] if reads => {
                let body = ctx.registry.encode().into_bytes();
                Ok(respond(
                    StatusCode::OK,
                    "application/openmetrics-text; version=1.0.0; charset=utf-8",
                    body,
                ))
            }
            ["metrics", "resource"] if reads => Ok(text(StatusCode::OK, stats::resource_metrics(ctx).await?)),
            ["stats", "summary"] | ["stats"] if reads => json(&stats::summary(ctx).await?),
            ["pods"] | ["runningpods"] if reads => {
                json(&containers::pod_list(ctx, parts[0] == "runningpods"))
            }
            ["configz"] if reads => json(&containers::configz(ctx)),
            ["containerLogs", namespace, pod, container] if reads => {
                logs::serve(ctx, namespace, pod, container, request.uri().query().unwrap_or_default()).await
            }
            ["exec", namespace, pod, container] | ["exec", namespace, pod, _, container] => {
                streams::exec(ctx, request, namespace, pod, container).await
            }
            ["attach", namespace, pod, container] | ["attach", namespace, pod, _, container] => {
                streams::attach(ctx, request, namespace, pod, container).await
            }
            ["portForward", namespace, pod] | ["portForward", namespace, pod, _] => {
                streams::port_forward(ctx, request, namespace, pod).await
            }
            ["run", namespace, pod, container] if request.method() == Method::POST => {
                streams::run(ctx, request.uri().query().unwrap_or_default(), namespace, pod, container).await
            }
            ["checkpoint", namespace, pod, container] if request.method() == Method::POST => {
                let query = request.uri().query().unwrap_or_default();
                checkpoint::make(ctx, query, namespace, pod, container).await
            }
            _ => Err(Refusal::not_found("404 page not found")),
        }
    }
}
