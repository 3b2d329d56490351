//! Response bodies: shared chunks for objects and lists, a bounded channel for watches.

use std::{
    collections::VecDeque,
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::{StreamExt, stream::BoxStream};
use http_body::{Frame, SizeHint};
use tokio::sync::mpsc;

/// A response body. Cloned object bytes are shared, never copied.
pub enum Body {
    /// Known chunks, sent in order.
    Chunks(VecDeque<Bytes>),
    /// A stream that ends when the sender is dropped.
    Stream(mpsc::Receiver<Bytes>),
    /// Chunks made as the connection asks for them.
    Boxed(BoxStream<'static, Bytes>),
}

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.is_stream() { "Body(stream)" } else { "Body(chunks)" })
    }
}

impl Body {
    /// No content.
    pub fn empty() -> Body {
        Body::Chunks(VecDeque::new())
    }

    /// Whether the length is unknown because it is a watch.
    pub fn is_stream(&self) -> bool {
        matches!(self, Body::Stream(_) | Body::Boxed(_))
    }

    /// All bytes of a body; for a stream, everything until it ends.
    pub async fn collect(self) -> Bytes {
        match self {
            Body::Chunks(mut chunks) if chunks.len() == 1 => chunks.pop_front().unwrap_or_default(),
            Body::Chunks(chunks) => chunks.into_iter().collect::<Vec<_>>().concat().into(),
            Body::Stream(mut receiver) => {
                let mut all = Vec::new();
                while let Some(chunk) = receiver.recv().await {
                    all.extend_from_slice(&chunk);
                }
                all.into()
            }
            Body::Boxed(mut stream) => {
                let mut all = Vec::new();
                while let Some(chunk) = stream.next().await {
                    all.extend_from_slice(&chunk);
                }
                all.into()
            }
        }
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Body::Chunks(VecDeque::from([bytes]))
    }
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Self {
        Body::from(Bytes::from(bytes))
    }
}

impl From<String> for Body {
    fn from(text: String) -> Self {
        Body::from(Bytes::from(text))
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Body::Chunks(chunks) => Poll::Ready(chunks.pop_front().map(|c| Ok(Frame::data(c)))),
            Body::Stream(receiver) => receiver.poll_recv(cx).map(|chunk| chunk.map(|c| Ok(Frame::data(c)))),
            Body::Boxed(stream) => {
                stream.as_mut().poll_next(cx).map(|chunk| chunk.map(|c| Ok(Frame::data(c))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Body::Chunks(chunks) => chunks.is_empty(),
            Body::Stream(receiver) => receiver.is_closed() && receiver.is_empty(),
            Body::Boxed(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Chunks(chunks) => SizeHint::with_exact(chunks.iter().map(|c| c.len() as u64).sum()),
            Body::Stream(_) | Body::Boxed(_) => SizeHint::default(),
        }
    }
}
