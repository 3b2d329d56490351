//! WebSocket transport: each message starts with a channel's number (`channel.k8s.io` and its versions).

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, Bytes, BytesMut};
use futures::{Sink, SinkExt, Stream, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

use super::Session;
use super::http::Upgraded;
use super::remote::{self, In, Out, QUEUE, Version};
use crate::runtime::Runtime;

/// A server-side socket on an upgraded connection.
pub(super) type Socket = WebSocketStream<Upgraded>;

/// How a channel's bytes are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codec {
    Binary,
    /// Text messages: the channel as a digit, then base64.
    Base64,
}

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
/// v5: what follows is the number of a channel that the client closes.
const CLOSE: u8 = 255;

/// The largest message taken from a client, as upstream's server does: some write all that they have at once.
const MAX_MESSAGE: usize = 32 << 20;
/// The most of one that is handed over at once.
const PIECE: usize = 32 << 10;

/// RFC 6455, 1.3.
pub(super) fn accept_key(key: &[u8]) -> String {
    derive_accept_key(key)
}

pub(super) async fn open(io: Upgraded) -> Socket {
    let config = WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE))
        .read_buffer_size(16 << 10)
        .write_buffer_size(0);
    WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await
}

impl Codec {
    pub fn encode(self, channel: u8, data: &[u8]) -> Message {
        match self {
            Codec::Binary => {
                let mut out = BytesMut::with_capacity(1 + data.len());
                out.put_u8(channel);
                out.put_slice(data);
                Message::Binary(out.freeze())
            }
            Codec::Base64 => Message::Text(format!("{channel}{}", STANDARD.encode(data)).into()),
        }
    }

    /// Channel and data; `None` for what is neither.
    pub fn decode(self, message: Message) -> Option<(u8, Bytes)> {
        let bytes = match message {
            Message::Binary(b) => b,
            Message::Text(t) => Bytes::from(t),
            _ => return None,
        };
        let (first, rest) = (*bytes.first()?, bytes.slice(1..));
        match self {
            Codec::Binary => Some((first, rest)),
            Codec::Base64 => Some((first.checked_sub(b'0')?, STANDARD.decode(rest).ok()?.into())),
        }
    }
}

/// A message's data in pieces of their own: what waits in a queue must not keep the whole message in memory.
pub(super) fn pieces(data: &[u8]) -> impl Iterator<Item = Bytes> {
    data.chunks(PIECE).map(Bytes::copy_from_slice)
}

/// Ends a connection in order.
pub(super) async fn close<S: Sink<Message, Error = WsError> + Unpin>(sink: &mut S) {
    let frame = CloseFrame { code: CloseCode::Normal, reason: "".into() };
    // The client may be gone.
    let _ = sink.send(Message::Close(Some(frame))).await;
    let _ = sink.close().await;
}

/// Serves exec or attach.
pub(super) async fn remote(
    runtime: &Arc<Runtime>,
    session: Session,
    codec: Codec,
    version: Version,
    socket: Socket,
) {
    let (sink, stream) = socket.split();
    let (in_tx, in_rx) = mpsc::channel(QUEUE);
    let (out_tx, out_rx) = mpsc::channel(QUEUE);
    let wants = session.wants();
    let limit = runtime.config.streaming_idle_timeout;
    let session = remote::run(runtime, session, version, in_rx, out_tx);
    tokio::select! {
        () = remote::beside(session, write(codec, wants, out_rx, sink), limit) => {}
        () = async { read(codec, version, stream, in_tx).await; std::future::pending().await } => {}
    }
}

/// Hands what the client sends to the session; returns when the client is gone, which closes `to`.
async fn read(
    codec: Codec,
    version: Version,
    mut from: impl Stream<Item = Result<Message, WsError>> + Unpin,
    to: mpsc::Sender<In>,
) {
    let mut partial = Vec::new();
    while let Some(Ok(message)) = from.next().await {
        if message.is_close() {
            return;
        }
        let Some((channel, data)) = codec.decode(message) else { continue };
        let items = match channel {
            STDIN => {
                for piece in pieces(&data) {
                    if to.send(In::Stdin(piece)).await.is_err() {
                        return;
                    }
                }
                continue;
            }
            RESIZE => {
                partial.extend_from_slice(&data);
                remote::sizes(&mut partial)
            }
            CLOSE if version == Version::StatusAndClose && data[..] == [STDIN] => vec![In::StdinClosed],
            _ => continue,
        };
        for item in items {
            if to.send(item).await.is_err() {
                return;
            }
        }
    }
}

async fn write(
    codec: Codec,
    wants: remote::Wants,
    mut from: mpsc::Receiver<Out>,
    mut to: impl Sink<Message, Error = WsError> + Unpin,
) {
    // An empty message tells the client that the session is set up.
    let hello = if wants.stdout {
        STDOUT
    } else if wants.stderr {
        STDERR
    } else {
        ERROR
    };
    if to.send(codec.encode(hello, &[])).await.is_err() {
        return;
    }
    while let Some(item) = from.recv().await {
        let message = match item {
            Out::Stdout(data) => codec.encode(STDOUT, &data),
            Out::Stderr(data) => codec.encode(STDERR, &data),
            Out::End(Some(verdict)) => codec.encode(ERROR, &verdict),
            Out::End(None) => break,
        };
        if to.send(message).await.is_err() {
            return;
        }
    }
    close(&mut to).await;
}

/// Carries a byte stream inside binary messages, both ways, until either side ends.
pub(super) async fn tunnel(socket: Socket, inner: DuplexStream) {
    let (mut sink, mut stream) = socket.split();
    let (mut from_inner, mut to_inner) = tokio::io::split(inner);
    let inwards = async {
        while let Some(Ok(message)) = stream.next().await {
            match message {
                Message::Binary(data) => match to_inner.write_all(&data).await {
                    Ok(()) => {}
                    Err(_) => break,
                },
                Message::Close(_) => break,
                _ => {}
            }
        }
        // The other end sees the end of its input.
        let _ = to_inner.shutdown().await;
    };
    let outwards = async {
        let mut buffer = BytesMut::with_capacity(16 << 10);
        while from_inner.read_buf(&mut buffer).await.is_ok_and(|n| n > 0) {
            if sink.send(Message::Binary(buffer.split().freeze())).await.is_err() {
                return;
            }
            buffer.reserve(16 << 10);
        }
        close(&mut sink).await;
    };
    tokio::join!(inwards, outwards);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codecs_round_trip() {
        for codec in [Codec::Binary, Codec::Base64] {
            for (channel, data) in [(0u8, &b""[..]), (4, b"abc\0\xff")] {
                assert_eq!(
                    codec.decode(codec.encode(channel, data)),
                    Some((channel, Bytes::copy_from_slice(data)))
                );
            }
            assert_eq!(codec.decode(Message::Binary(Bytes::new())), None);
            assert_eq!(codec.decode(Message::Ping(Bytes::new())), None);
        }
        assert_eq!(Codec::Base64.decode(Message::Text("0%%".into())), None);
    }

    #[test]
    fn pieces_keep_no_message() {
        let data = Bytes::from((0..100_000u32).map(|n| n as u8).collect::<Vec<_>>());
        let all: Vec<Bytes> = pieces(&data).collect();
        assert!(all.concat() == data && all.iter().all(|p| p.len() <= PIECE));
        assert!(!all.iter().any(|p| data.as_ptr_range().contains(&p.as_ptr())));
        assert_eq!(pieces(&[]).count(), 0);
    }

    #[tokio::test]
    async fn a_clients_messages_become_input() {
        let message = |bytes: &[u8]| Ok(Message::Binary(Bytes::copy_from_slice(bytes)));
        let from = futures::stream::iter(vec![
            message(b"\0hi"),
            message(b"\x04{\"Width\":3,\"Height\":4}"),
            message(b"\x09junk"),
            message(b"\xff\0"),
        ]);
        let (tx, mut rx) = mpsc::channel(8);
        read(Codec::Binary, Version::StatusAndClose, from, tx).await;
        assert!(matches!(rx.recv().await, Some(In::Stdin(d)) if d == "hi"));
        assert!(matches!(rx.recv().await, Some(In::Resize { width: 3, height: 4 })));
        assert!(matches!(rx.recv().await, Some(In::StdinClosed)));
        assert!(rx.recv().await.is_none());
    }
}
