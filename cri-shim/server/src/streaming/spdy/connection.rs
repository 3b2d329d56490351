//! One SPDY connection as the server sees it.

use std::collections::HashSet;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;

use super::frame::{Decoder, Encoder, Error, Frame, plain};
use super::headers::Headers;

/// Streams a client may have open at once: a browser through a port-forward opens dozens.
const MAX_STREAMS: usize = 512;
/// Frames waiting to be written.
const QUEUE: usize = 16;
/// The most data put into one frame.
const CHUNK: usize = 32 << 10;

const PROTOCOL_ERROR: u32 = 1;
const REFUSED_STREAM: u32 = 3;

/// What the client did.
#[derive(Debug)]
pub(crate) enum Event {
    Open {
        id: u32,
        headers: Headers,
    },
    Data {
        id: u32,
        data: Bytes,
    },
    /// It will send no more on this stream.
    End {
        id: u32,
    },
    Reset {
        id: u32,
    },
}

/// The receiving half. Answers pings and stream openings by itself.
pub(crate) struct Reader<I> {
    from: ReadHalf<I>,
    buffer: BytesMut,
    decoder: Decoder,
    encoder: Encoder,
    writer: Writer,
    open: HashSet<u32>,
    last: u32,
    /// An event that came together with the one returned before.
    next: Option<Event>,
}

/// The sending half; clones write to the same connection.
#[derive(Clone)]
pub(crate) struct Writer(mpsc::Sender<Bytes>);

/// Whoever waits for this learns that the client is gone.
#[derive(Debug)]
pub(crate) struct Gone;

impl Writer {
    pub async fn data(&self, id: u32, data: Bytes) -> Result<(), Gone> {
        let mut rest = data;
        while !rest.is_empty() {
            let part = rest.split_to(rest.len().min(CHUNK));
            self.frame(&Frame::Data { id, fin: false, data: part }).await?;
        }
        Ok(())
    }

    /// Half-closes a stream.
    pub async fn end(&self, id: u32) -> Result<(), Gone> {
        self.frame(&Frame::Data { id, fin: true, data: Bytes::new() }).await
    }

    pub async fn reset(&self, id: u32) -> Result<(), Gone> {
        self.frame(&Frame::RstStream { id, status: PROTOCOL_ERROR }).await
    }

    /// Says that the connection is about to close in order.
    pub async fn go_away(&self, last: u32) -> Result<(), Gone> {
        self.frame(&Frame::GoAway { last, status: 0 }).await
    }

    async fn frame(&self, frame: &Frame) -> Result<(), Gone> {
        self.raw(plain(frame)).await
    }

    async fn raw(&self, bytes: Bytes) -> Result<(), Gone> {
        self.0.send(bytes).await.map_err(|_| Gone)
    }
}

/// Splits `io` into its halves and the work of writing, which somebody must await; it ends when all writers are dropped or the
/// client is gone.
pub(crate) fn connection<I>(io: I) -> Result<(Reader<I>, Writer, impl Future<Output = ()> + Send), Error>
where
    I: AsyncRead + AsyncWrite + Send + 'static,
{
    let (from, to) = tokio::io::split(io);
    let (tx, rx) = mpsc::channel(QUEUE);
    let writer = Writer(tx);
    let reader = Reader {
        from,
        buffer: BytesMut::with_capacity(8 << 10),
        decoder: Decoder::default(),
        encoder: Encoder::new()?,
        writer: writer.clone(),
        open: HashSet::new(),
        last: 0,
        next: None,
    };
    Ok((reader, writer, write(rx, to)))
}

async fn write<I: AsyncWrite>(mut from: mpsc::Receiver<Bytes>, mut to: WriteHalf<I>) {
    while let Some(bytes) = from.recv().await {
        if to.write_all(&bytes).await.is_err() || (from.is_empty() && to.flush().await.is_err()) {
            return;
        }
    }
    // A client that is gone needs no end.
    let _ = to.shutdown().await;
}

impl<I: AsyncRead + AsyncWrite> Reader<I> {
    /// What the client does next; `None` when it is gone or breaks the protocol. Not cancel-safe while it answers.
    pub async fn next(&mut self) -> Option<Event> {
        if let Some(event) = self.next.take() {
            return Some(event);
        }
        loop {
            let frame = match self.decoder.next(&mut self.buffer) {
                Ok(Some(frame)) => frame,
                Ok(None) => {
                    self.buffer.reserve(4 << 10);
                    match self.from.read_buf(&mut self.buffer).await {
                        Ok(n) if n > 0 => continue,
                        _ => return None,
                    }
                }
                Err(e) => {
                    tracing::debug!(error = %e, "a SPDY client broke the protocol");
                    return None;
                }
            };
            match self.handle(frame).await {
                Ok(Some(event)) => return Some(event),
                Ok(None) => {}
                Err(Gone) => return None,
            }
        }
    }

    /// The last stream that was opened, for GOAWAY.
    pub fn last_stream(&self) -> u32 {
        self.last
    }

    async fn handle(&mut self, frame: Frame) -> Result<Option<Event>, Gone> {
        Ok(match frame {
            Frame::SynStream { id, fin, headers } => {
                // A client's streams have odd, growing numbers.
                if id % 2 == 0 || id <= self.last {
                    self.writer.frame(&Frame::RstStream { id, status: PROTOCOL_ERROR }).await?;
                    return Ok(None);
                }
                self.last = id;
                if self.open.len() >= MAX_STREAMS {
                    self.writer.frame(&Frame::RstStream { id, status: REFUSED_STREAM }).await?;
                    return Ok(None);
                }
                let reply = Frame::SynReply { id, fin: false, headers: Headers::new() };
                self.writer.raw(self.encoder.encode(&reply).map_err(|_| Gone)?).await?;
                if fin {
                    self.next = Some(Event::End { id });
                } else {
                    self.open.insert(id);
                }
                Some(Event::Open { id, headers })
            }
            Frame::Data { id, fin, data } => {
                if !self.open.contains(&id) {
                    return Ok(None);
                }
                if fin {
                    self.open.remove(&id);
                }
                match (data.is_empty(), fin) {
                    (true, true) => Some(Event::End { id }),
                    (true, false) => None,
                    (false, true) => {
                        self.next = Some(Event::End { id });
                        Some(Event::Data { id, data })
                    }
                    (false, false) => Some(Event::Data { id, data }),
                }
            }
            Frame::RstStream { id, .. } => {
                self.open.remove(&id);
                Some(Event::Reset { id })
            }
            // Even numbers answer pings of ours, which there are none of.
            Frame::Ping(id) if id % 2 == 1 => {
                self.writer.frame(&Frame::Ping(id)).await?;
                None
            }
            // No new streams will come; those that are open go on.
            Frame::GoAway { .. } | Frame::Ping(_) | Frame::SynReply { .. } | Frame::Other(_) => None,
        })
    }
}

/// What good clients send, for fuzzing.
#[cfg(test)]
pub(crate) fn samples() -> Vec<Vec<u8>> {
    let headers = |pairs: &[(&str, &str)]| -> Headers {
        pairs.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect()
    };
    let exec = vec![
        Frame::SynStream { id: 1, fin: false, headers: headers(&[("streamtype", "error")]) },
        Frame::SynStream { id: 3, fin: false, headers: headers(&[("streamtype", "stdin")]) },
        Frame::Data { id: 3, fin: true, data: "typed".into() },
        Frame::Ping(1),
        Frame::RstStream { id: 1, status: 5 },
    ];
    let forward = vec![
        Frame::SynStream {
            id: 1,
            fin: true,
            headers: headers(&[("streamtype", "error"), ("port", "80"), ("requestid", "0")]),
        },
        Frame::SynStream {
            id: 3,
            fin: false,
            headers: headers(&[("streamtype", "data"), ("port", "80"), ("requestid", "0")]),
        },
        Frame::Data { id: 3, fin: false, data: "GET / HTTP/1.0\r\n\r\n".into() },
        Frame::GoAway { last: 0, status: 0 },
    ];
    let bytes = |frames: Vec<Frame>| {
        let mut encoder = Encoder::new().unwrap();
        frames
            .iter()
            .flat_map(|f| match f {
                Frame::SynStream { .. } => encoder.encode(f).unwrap(),
                other => plain(other),
            })
            .collect()
    };
    vec![bytes(exec), bytes(forward)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_client_opens_writes_half_closes_and_pings() {
        let (near, far) = tokio::io::duplex(64 << 10);
        let (mut reader, writer, writing) = connection(near).unwrap();
        let mut encoder = Encoder::new().unwrap();
        let headers: Headers = vec![("streamtype".into(), "stdin".into())];
        let frames = [
            Frame::SynStream { id: 1, fin: false, headers: headers.clone() },
            Frame::Data { id: 1, fin: true, data: "hi".into() },
            Frame::Ping(1),
            Frame::SynStream { id: 2, fin: false, headers: vec![] },
            Frame::SynStream { id: 3, fin: true, headers: vec![] },
        ];
        let (mut from, mut to) = tokio::io::split(far);
        for f in &frames {
            to.write_all(&encoder.encode(f).unwrap()).await.unwrap();
        }
        to.shutdown().await.unwrap();
        let serve = async move {
            assert!(matches!(reader.next().await, Some(Event::Open { id: 1, headers: h }) if h == headers));
            assert!(matches!(reader.next().await, Some(Event::Data { id: 1, data }) if data == "hi"));
            assert!(matches!(reader.next().await, Some(Event::End { id: 1 })));
            assert!(matches!(reader.next().await, Some(Event::Open { id: 3, .. })));
            assert!(matches!(reader.next().await, Some(Event::End { id: 3 })));
            writer.data(1, "yo".into()).await.unwrap();
            writer.end(1).await.unwrap();
            assert!(reader.next().await.is_none());
        };
        tokio::join!(serve, writing);
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).await.unwrap();
        let (mut decoder, mut buffer, mut got) = (Decoder::default(), BytesMut::from(&bytes[..]), Vec::new());
        while let Some(f) = decoder.next(&mut buffer).unwrap() {
            got.push(f);
        }
        assert_eq!(
            got,
            [
                Frame::SynReply { id: 1, fin: false, headers: vec![] },
                Frame::Ping(1),
                Frame::RstStream { id: 2, status: PROTOCOL_ERROR },
                Frame::SynReply { id: 3, fin: false, headers: vec![] },
                Frame::Data { id: 1, fin: false, data: "yo".into() },
                Frame::Data { id: 1, fin: true, data: Bytes::new() },
            ]
        );
    }
}
