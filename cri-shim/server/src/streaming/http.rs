//! The HTTP side: finds the session of a token and upgrades the connection.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, UPGRADE};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::net::TcpStream;

use super::{Session, Stranger, portforward, remote, spdy, websocket};
use crate::runtime::Runtime;

/// An upgraded connection.
pub(super) type Upgraded = TokioIo<hyper::upgrade::Upgraded>;

const STREAM_VERSION: &str = "x-stream-protocol-version";
const ACCEPTED_VERSIONS: &str = "x-accepted-stream-protocol-versions";

/// How the upgraded connection is spoken.
enum Speech {
    SpdyRemote(remote::Version),
    SpdyForward,
    WebSocketRemote(websocket::Codec, remote::Version),
    WebSocketForward(websocket::Codec),
    /// SPDY inside WebSocket messages (KEP-4006).
    Tunnel,
}

/// How long a client may take for a request's headers: it has its URL already.
const HEADERS: Duration = Duration::from_secs(10);

type Reply = Response<Full<Bytes>>;

fn plain(status: StatusCode, text: impl Into<String>) -> Reply {
    let mut r = Response::new(Full::new(Bytes::from(text.into())));
    *r.status_mut() = status;
    r
}

pub(super) async fn serve(runtime: Arc<Runtime>, stream: TcpStream, stranger: Stranger) {
    let stop = runtime.tasks.stop_token();
    let sent_away = stranger.sent_away.clone();
    let stranger = Arc::new(Mutex::new(Some(stranger)));
    let service = hyper::service::service_fn(move |request| {
        let (runtime, stranger) = (runtime.clone(), stranger.clone());
        async move {
            Ok::<_, Infallible>(handle(&runtime, request, || {
                stranger.lock().take();
            }))
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::select! {
        // The client's own trouble; the session has its own log line.
        done = connection => if let Err(e) = done { tracing::debug!(error = %e, "streaming connection") },
        () = stop.cancelled() => {}
        () = sent_away.cancelled() => {}
    }
}

/// Answers a request; `known` is called when it names a session.
fn handle(runtime: &Arc<Runtime>, mut request: Request<Incoming>, known: impl FnOnce()) -> Reply {
    let path = request.uri().path().to_owned();
    let (kind, token) = path.trim_start_matches('/').split_once('/').unwrap_or_default();
    let Some(session) = runtime.sessions.redeem(token).filter(|s| s.path() == kind) else {
        return plain(
            StatusCode::NOT_FOUND,
            "no such streaming session: its URL works once and for a minute\n",
        );
    };
    known();
    let (speech, mut reply) = match negotiate(&session, request.headers()) {
        Ok(found) => found,
        Err(refusal) => return refusal,
    };
    *reply.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let upgrade = hyper::upgrade::on(&mut request);
    let (runtime, stop) = (runtime.clone(), runtime.tasks.stop_token());
    runtime.clone().tasks.spawn(async move {
        let io = match upgrade.await {
            Ok(io) => TokioIo::new(io),
            Err(e) => return tracing::debug!(error = %e, "the client did not upgrade"),
        };
        tokio::select! {
            () = talk(&runtime, session, speech, io) => {}
            // The client sees its connection end; the container's own process goes on.
            () = stop.cancelled() => {}
        }
    });
    reply
}

async fn talk(runtime: &Arc<Runtime>, session: Session, speech: Speech, io: Upgraded) {
    match (speech, session) {
        (Speech::SpdyForward, Session::PortForward(r)) => portforward::spdy(runtime, &r, io).await,
        (Speech::Tunnel, Session::PortForward(r)) => {
            let (near, far) = tokio::io::duplex(64 << 10);
            let socket = websocket::open(io).await;
            let limit = runtime.config.streaming_idle_timeout;
            remote::beside(portforward::spdy(runtime, &r, near), websocket::tunnel(socket, far), limit).await;
        }
        (Speech::WebSocketForward(codec), Session::PortForward(r)) => {
            portforward::websocket(runtime, &r, websocket::open(io).await, codec).await;
        }
        (Speech::SpdyRemote(version), session) => spdy::remote::serve(runtime, session, version, io).await,
        (Speech::WebSocketRemote(codec, version), session) => {
            websocket::remote(runtime, session, codec, version, websocket::open(io).await).await;
        }
        // negotiate() does not make these.
        _ => {}
    }
}

/// Values of a header that may be repeated and comma-separated.
fn list<'a>(headers: &'a HeaderMap, name: &str) -> Vec<&'a str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .map(str::trim)
        .filter(|v| !v.is_empty())
        .collect()
}

fn has(headers: &HeaderMap, name: &str, what: &str) -> bool {
    list(headers, name).iter().any(|v| v.eq_ignore_ascii_case(what))
}

/// Chooses the protocol and prepares the answer's headers, or refuses.
#[allow(clippy::result_large_err)] // The refusal is sent as it is, once per connection.
fn negotiate(session: &Session, headers: &HeaderMap) -> Result<(Speech, Reply), Reply> {
    if !has(headers, "connection", "upgrade") {
        return Err(plain(StatusCode::BAD_REQUEST, "this URL needs an upgrade to SPDY/3.1 or WebSocket\n"));
    }
    let mut reply = plain(StatusCode::OK, "");
    let put = |reply: &mut Reply, name: http::HeaderName, value: &str| {
        // All values are ours or came as a header.
        if let Ok(v) = HeaderValue::from_str(value) {
            reply.headers_mut().append(name, v);
        }
    };
    put(&mut reply, CONNECTION, "Upgrade");
    let forward = matches!(session, Session::PortForward(_));
    if has(headers, "upgrade", "websocket") {
        let offered = list(headers, "sec-websocket-protocol");
        let key = headers.get("sec-websocket-key").map(|k| k.as_bytes().to_owned());
        let Some(key) = key.filter(|_| has(headers, "sec-websocket-version", "13")) else {
            return Err(plain(StatusCode::BAD_REQUEST, "not a WebSocket version 13 handshake\n"));
        };
        let (speech, chosen) = websocket_protocol(forward, &offered).ok_or_else(|| {
            plain(StatusCode::FORBIDDEN, format!("none of the subprotocols {offered:?} is known here\n"))
        })?;
        put(&mut reply, UPGRADE, "websocket");
        put(&mut reply, http::header::SEC_WEBSOCKET_ACCEPT, &websocket::accept_key(&key));
        if !chosen.is_empty() {
            put(&mut reply, http::header::SEC_WEBSOCKET_PROTOCOL, chosen);
        }
        return Ok((speech, reply));
    }
    if has(headers, "upgrade", "SPDY/3.1") {
        let offered = list(headers, STREAM_VERSION);
        let known: &[&str] = if forward {
            &["portforward.k8s.io"]
        } else {
            &["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"]
        };
        // Old clients send no version at all: the first there was.
        let chosen =
            if offered.is_empty() { known.last() } else { offered.iter().find(|o| known.contains(o)) };
        let Some(chosen) = chosen else {
            let mut refusal =
                plain(StatusCode::FORBIDDEN, format!("none of the protocols {offered:?} is known here\n"));
            for k in known {
                put(&mut refusal, http::HeaderName::from_static(ACCEPTED_VERSIONS), k);
            }
            return Err(refusal);
        };
        put(&mut reply, UPGRADE, "SPDY/3.1");
        put(&mut reply, http::HeaderName::from_static(STREAM_VERSION), chosen);
        let speech =
            if forward { Speech::SpdyForward } else { Speech::SpdyRemote(remote::Version::of(chosen)) };
        return Ok((speech, reply));
    }
    Err(plain(StatusCode::BAD_REQUEST, "this URL upgrades to SPDY/3.1 or WebSocket, nothing else\n"))
}

/// The first of the client's subprotocols that is known here.
fn websocket_protocol<'a>(forward: bool, offered: &[&'a str]) -> Option<(Speech, &'a str)> {
    use websocket::Codec::{Base64, Binary};
    let known = |name: &str| {
        let version = remote::Version::of(name.replace("base64.", "").as_str());
        let codec = if name.contains("base64.") { Base64 } else { Binary };
        match (forward, name) {
            (true, "SPDY/3.1+portforward.k8s.io") => Some(Speech::Tunnel),
            (
                true,
                ""
                | "v4.channel.k8s.io"
                | "v4.base64.channel.k8s.io"
                | "channel.k8s.io"
                | "base64.channel.k8s.io",
            ) => Some(Speech::WebSocketForward(codec)),
            (
                false,
                ""
                | "channel.k8s.io"
                | "base64.channel.k8s.io"
                | "v4.channel.k8s.io"
                | "v4.base64.channel.k8s.io"
                | "v5.channel.k8s.io",
            ) => Some(Speech::WebSocketRemote(codec, version)),
            _ => None,
        }
    };
    if offered.is_empty() {
        return known("").map(|s| (s, ""));
    }
    offered.iter().find_map(|o| known(o).map(|s| (s, *o)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(k, v)| (http::HeaderName::from_static(k), HeaderValue::from_static(v))).collect()
    }

    fn status(session: &Session, pairs: &[(&'static str, &'static str)]) -> Result<String, u16> {
        match negotiate(session, &headers(pairs)) {
            Ok((_, r)) => Ok(["x-stream-protocol-version", "sec-websocket-protocol"]
                .iter()
                .find_map(|h| r.headers().get(*h))
                .map(|v| v.to_str().unwrap().to_owned())
                .unwrap_or_default()),
            Err(r) => Err(r.status().as_u16()),
        }
    }

    #[test]
    fn protocols_are_negotiated() {
        let exec = Session::Exec(Default::default());
        let forward = Session::PortForward(Default::default());
        let spdy = ("upgrade", "SPDY/3.1");
        let up = ("connection", "Upgrade");
        let ws = [up, ("upgrade", "websocket"), ("sec-websocket-version", "13"), ("sec-websocket-key", "x")];
        let with = |p: &'static str| [ws.as_slice(), &[("sec-websocket-protocol", p)]].concat();
        assert_eq!(status(&exec, &[]), Err(400));
        assert_eq!(status(&exec, &[up]), Err(400));
        assert_eq!(status(&exec, &[up, spdy]), Ok("channel.k8s.io".into()));
        assert_eq!(
            status(&exec, &[up, spdy, (STREAM_VERSION, "v9, v4.channel.k8s.io")]),
            Ok("v4.channel.k8s.io".into())
        );
        assert_eq!(status(&exec, &[up, spdy, (STREAM_VERSION, "v9")]), Err(403));
        assert_eq!(
            status(&forward, &[up, spdy, (STREAM_VERSION, "portforward.k8s.io")]),
            Ok("portforward.k8s.io".into())
        );
        assert_eq!(status(&exec, &ws), Ok(String::new()));
        assert_eq!(
            status(&exec, &with("v5.channel.k8s.io, v4.channel.k8s.io")),
            Ok("v5.channel.k8s.io".into())
        );
        assert_eq!(status(&exec, &with("SPDY/3.1+portforward.k8s.io")), Err(403));
        assert_eq!(
            status(&forward, &with("SPDY/3.1+portforward.k8s.io")),
            Ok("SPDY/3.1+portforward.k8s.io".into())
        );
        assert_eq!(status(&exec, &ws[..3]), Err(400));
    }
}
