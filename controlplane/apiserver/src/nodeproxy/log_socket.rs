//! A container's log as messages of a WebSocket, for clients in browsers. The kubelet knows only plain HTTP for logs.

use base64::Engine;
use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use http::header::{
    CONNECTION, HOST, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, UPGRADE,
};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

use super::locate::Target;
use super::{NodeProxy, error_of, exchange};
use crate::status::Status;
use crate::transport::Body;

/// Most bytes that a client may send at once.
const CLIENT_MESSAGE: usize = 4096;

/// How a piece of the log becomes a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Binary,
    Base64,
}

/// Whether the client wants to switch to a WebSocket.
pub fn is_asked(headers: &HeaderMap) -> bool {
    headers.get(UPGRADE).is_some_and(|u| u.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

/// The protocol to speak and, when the client named some, the name to confirm.
fn choose(headers: &HeaderMap) -> Result<(Protocol, Option<&'static str>), Status> {
    let offered: Vec<&str> = headers
        .get_all(SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(',').map(str::trim))
        .collect();
    if offered.is_empty() {
        return Ok((Protocol::Binary, None));
    }
    offered
        .into_iter()
        .find_map(|p| match p {
            "" => Some((Protocol::Binary, Some(""))),
            "binary.k8s.io" => Some((Protocol::Binary, Some("binary.k8s.io"))),
            "base64.binary.k8s.io" => Some((Protocol::Base64, Some("base64.binary.k8s.io"))),
            _ => None,
        })
        .ok_or_else(|| {
            Status::bad_request(
                "none of the WebSocket protocols is known; use binary.k8s.io or base64.binary.k8s.io",
            )
        })
}

fn message(protocol: Protocol, data: Bytes) -> Message {
    match protocol {
        Protocol::Binary => Message::Binary(data),
        Protocol::Base64 => Message::Text(base64::engine::general_purpose::STANDARD.encode(&data).into()),
    }
}

/// Asks the kubelet for the log and switches the client's connection.
///
/// # Errors
/// 400 for a bad handshake, the kubelet's refusals, 502 when it cannot be reached.
pub async fn serve(
    proxy: &NodeProxy,
    mut request: Request<Incoming>,
    target: Target,
) -> Result<Response<Body>, Status> {
    let (protocol, confirmed) = choose(request.headers())?;
    let key = request.headers().get(SEC_WEBSOCKET_KEY).map(|k| derive_accept_key(k.as_bytes()));
    let accept = key.and_then(|k| HeaderValue::from_str(&k).ok());
    let accept =
        accept.ok_or_else(|| Status::bad_request("a WebSocket handshake needs Sec-WebSocket-Key"))?;
    let outgoing = Request::get(&target.path_and_query)
        .header(HOST, target.host_header())
        .body(Empty::<Bytes>::new())
        .map_err(|e| Status::bad_request(format!("bad path: {e}")))?;
    let response = exchange(proxy, &target, outgoing).await?;
    if !response.status().is_success() {
        return Err(error_of(response).await);
    }
    let client = hyper::upgrade::on(&mut request);
    let mut log = response.into_body().into_data_stream();
    let stop = proxy.tasks.stop_token();
    proxy.tasks.spawn(async move {
        let Ok(client) = client.await else { return };
        // A client has nothing to say but pings and its end.
        let limits = WebSocketConfig::default()
            .max_message_size(Some(CLIENT_MESSAGE))
            .max_frame_size(Some(CLIENT_MESSAGE));
        let socket = WebSocketStream::from_raw_socket(TokioIo::new(client), Role::Server, Some(limits)).await;
        let (mut to, mut from) = socket.split();
        loop {
            // Both sides are streams: a piece that has not arrived stays for the next turn.
            tokio::select! {
                () = stop.cancelled() => break,
                piece = log.next() => match piece {
                    Some(Ok(data)) => if to.send(message(protocol, data)).await.is_err() { return },
                    Some(Err(_)) | None => break,
                },
                // Reading answers pings and sees the client leave.
                said = from.next() => if !matches!(said, Some(Ok(m)) if !m.is_close()) { return },
            }
        }
        let _ = to.send(Message::Close(None)).await;
        let _ = to.close().await;
    });
    let mut answer = Response::new(Body::from(crate::registry::Body::empty()));
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
    if let Some(name) = confirmed {
        headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(name));
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_known_protocol_is_spoken() {
        let of = |list: &[&'static str]| {
            let mut h = HeaderMap::new();
            list.iter().for_each(|p| {
                h.append(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(p));
            });
            choose(&h).map_err(|s| s.code)
        };
        assert_eq!(of(&[]).unwrap(), (Protocol::Binary, None));
        assert_eq!(of(&["x, base64.binary.k8s.io"]).unwrap().0, Protocol::Base64);
        assert_eq!(of(&["binary.k8s.io", "base64.binary.k8s.io"]).unwrap().1, Some("binary.k8s.io"));
        assert!(of(&["v4.channel.k8s.io"]).is_err());
    }

    #[test]
    fn pieces_become_messages() {
        assert_eq!(message(Protocol::Base64, "hi".into()), Message::text("aGk="));
        assert!(message(Protocol::Binary, "hi".into()).is_binary());
    }
}
