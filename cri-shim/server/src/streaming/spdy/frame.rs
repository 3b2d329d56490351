//! Frames on the wire (SPDY/3, 2.2).

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::headers::{Deflater, Headers, Inflater};

/// What ends a connection.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum Error {
    #[error("SPDY headers: {0}")]
    Headers(&'static str),
    #[error("SPDY version {0} is not 3")]
    Version(u16),
    #[error("a SPDY frame of {0} bytes is too large")]
    TooLarge(usize),
    #[error("a SPDY frame of type {0} has the wrong size")]
    Size(u16),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::streaming) enum Frame {
    SynStream {
        id: u32,
        fin: bool,
        headers: Headers,
    },
    SynReply {
        id: u32,
        fin: bool,
        headers: Headers,
    },
    RstStream {
        id: u32,
        status: u32,
    },
    Ping(u32),
    GoAway {
        last: u32,
        status: u32,
    },
    Data {
        id: u32,
        fin: bool,
        data: Bytes,
    },
    /// Of no meaning here: settings, headers, window updates, types nobody knows.
    Other(u16),
}

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;

const VERSION: u16 = 3;
const FIN: u8 = 1;
const ID: u32 = 0x7fff_ffff;

const MAX_CONTROL: usize = 64 << 10;
/// The most data of one frame handed over at once. Today's clients write no more; those before client-go 0.31 write whatever they were
/// given, up to 16 MiB, which nobody has to hold in memory.
const PIECE: usize = 32 << 10;

/// What is still to come of a frame with data.
struct Rest {
    id: u32,
    fin: bool,
    left: usize,
}

/// Turns bytes into frames, one with much data into several.
#[derive(Default)]
pub(in crate::streaming) struct Decoder {
    inflater: Inflater,
    rest: Option<Rest>,
}

impl Decoder {
    /// The next frame of `buffer`, if it is there.
    pub fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Frame>, Error> {
        if let Some(rest) = self.rest.take() {
            return Ok(self.piece(rest, buffer));
        }
        let Some(head) = buffer.first_chunk::<8>() else { return Ok(None) };
        let first = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
        let flags = head[4];
        let length = u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize;
        let fin = flags & FIN != 0;
        if first & !ID == 0 {
            buffer.advance(8);
            return Ok(self.piece(Rest { id: first, fin, left: length }, buffer));
        }
        if length > MAX_CONTROL {
            return Err(Error::TooLarge(length));
        }
        if buffer.len() < 8 + length {
            buffer.reserve(8 + length - buffer.len());
            return Ok(None);
        }
        buffer.advance(8);
        let body = buffer.split_to(length).freeze();
        let version = ((first >> 16) & 0x7fff) as u16;
        if version != VERSION {
            return Err(Error::Version(version));
        }
        self.control((first & 0xffff) as u16, fin, body).map(Some)
    }

    /// As much of a frame with data as there is room for.
    fn piece(&mut self, rest: Rest, buffer: &mut BytesMut) -> Option<Frame> {
        let now = rest.left.min(PIECE);
        if buffer.len() < now {
            buffer.reserve(now - buffer.len());
            self.rest = Some(rest);
            return None;
        }
        let left = rest.left - now;
        let frame =
            Frame::Data { id: rest.id, fin: rest.fin && left == 0, data: buffer.split_to(now).freeze() };
        self.rest = (left > 0).then_some(Rest { left, ..rest });
        Some(frame)
    }

    fn control(&mut self, kind: u16, fin: bool, mut body: Bytes) -> Result<Frame, Error> {
        let least = match kind {
            SYN_STREAM => 10,
            SYN_REPLY | HEADERS | PING => 4,
            RST_STREAM | GOAWAY => 8,
            other => return Ok(Frame::Other(other)),
        };
        if body.len() < least {
            return Err(Error::Size(kind));
        }
        let first = body.get_u32() & ID;
        Ok(match kind {
            SYN_STREAM => {
                // The associated stream, the priority and the slot say nothing here.
                body.advance(6);
                Frame::SynStream { id: first, fin, headers: self.inflater.block(&body)? }
            }
            SYN_REPLY => Frame::SynReply { id: first, fin, headers: self.inflater.block(&body)? },
            HEADERS => {
                // Its block must pass through the one stream of compression all the same.
                self.inflater.block(&body)?;
                Frame::Other(HEADERS)
            }
            RST_STREAM => Frame::RstStream { id: first, status: body.get_u32() },
            PING => Frame::Ping(first),
            _ => Frame::GoAway { last: first, status: body.get_u32() },
        })
    }
}

/// Turns frames into bytes.
pub(in crate::streaming) struct Encoder {
    deflater: Deflater,
}

impl Encoder {
    pub fn new() -> Result<Encoder, Error> {
        Ok(Encoder { deflater: Deflater::new()? })
    }

    /// Frames with headers must be sent in the order in which they were encoded.
    pub fn encode(&mut self, frame: &Frame) -> Result<Bytes, Error> {
        Ok(match frame {
            Frame::SynStream { id, fin, headers } => {
                let block = self.deflater.block(headers)?;
                let mut out = control(SYN_STREAM, *fin, 10 + block.len());
                out.put_u32(*id);
                out.put_bytes(0, 6);
                out.put_slice(&block);
                out.freeze()
            }
            Frame::SynReply { id, fin, headers } => {
                let block = self.deflater.block(headers)?;
                let mut out = control(SYN_REPLY, *fin, 4 + block.len());
                out.put_u32(*id);
                out.put_slice(&block);
                out.freeze()
            }
            other => plain(other),
        })
    }
}

fn control(kind: u16, fin: bool, length: usize) -> BytesMut {
    let mut out = BytesMut::with_capacity(8 + length);
    out.put_u16(0x8000 | VERSION);
    out.put_u16(kind);
    out.put_u32((u32::from(u8::from(fin) * FIN) << 24) | length as u32);
    out
}

/// The bytes of a frame without headers.
pub(in crate::streaming) fn plain(frame: &Frame) -> Bytes {
    match frame {
        Frame::Data { id, fin, data } => {
            let mut out = BytesMut::with_capacity(8 + data.len());
            out.put_u32(*id & ID);
            out.put_u32((u32::from(u8::from(*fin) * FIN) << 24) | data.len() as u32);
            out.put_slice(data);
            out.freeze()
        }
        Frame::RstStream { id, status } => two(RST_STREAM, *id, *status),
        Frame::GoAway { last, status } => two(GOAWAY, *last, *status),
        Frame::Ping(id) => {
            let mut out = control(PING, false, 4);
            out.put_u32(*id);
            out.freeze()
        }
        // Never sent.
        Frame::SynStream { .. } | Frame::SynReply { .. } | Frame::Other(_) => Bytes::new(),
    }
}

fn two(kind: u16, a: u32, b: u32) -> Bytes {
    let mut out = control(kind, false, 8);
    out.put_u32(a);
    out.put_u32(b);
    out.freeze()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode_all(bytes: &[u8], step: usize) -> Result<Vec<Frame>, Error> {
        let (mut decoder, mut buffer, mut out) = (Decoder::default(), BytesMut::new(), Vec::new());
        for part in bytes.chunks(step.max(1)) {
            buffer.extend_from_slice(part);
            while let Some(f) = decoder.next(&mut buffer)? {
                out.push(f);
            }
        }
        Ok(out)
    }

    fn any_frame() -> impl Strategy<Value = Frame> {
        let id = 1u32..=ID;
        let pair = ("[a-z-]{1,20}", "[ -~]{0,40}");
        let headers = proptest::collection::vec(pair, 0..6);
        let data = proptest::collection::vec(any::<u8>(), 0..3000);
        prop_oneof![
            (id.clone(), any::<bool>(), headers.clone()).prop_map(|(id, fin, headers)| Frame::SynStream {
                id,
                fin,
                headers
            }),
            (id.clone(), any::<bool>(), headers).prop_map(|(id, fin, headers)| Frame::SynReply {
                id,
                fin,
                headers
            }),
            (id.clone(), any::<u32>()).prop_map(|(id, status)| Frame::RstStream { id, status }),
            id.clone().prop_map(Frame::Ping),
            (id.clone(), any::<u32>()).prop_map(|(last, status)| Frame::GoAway { last, status }),
            (id, any::<bool>(), data).prop_map(|(id, fin, data)| Frame::Data { id, fin, data: data.into() }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_is_encoded_is_decoded(frames in proptest::collection::vec(any_frame(), 1..8), step in 1usize..200) {
            let mut encoder = Encoder::new().unwrap();
            let bytes: Vec<u8> = frames.iter().flat_map(|f| encoder.encode(f).unwrap()).collect();
            prop_assert_eq!(decode_all(&bytes, step).unwrap(), frames);
        }

        #[test]
        fn garbage_is_an_error_or_nothing(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = decode_all(&bytes, 7);
        }
    }

    #[test]
    fn the_dictionary_is_the_published_one() {
        // The zlib header of a stream with a preset dictionary is followed by the dictionary's Adler-32; that of SPDY/3 is known.
        let block = Deflater::new().unwrap().block(&[]).unwrap();
        assert_eq!(block[1] & 0x20, 0x20);
        assert_eq!(block[2..6], [0xe3, 0xc6, 0xa7, 0xc2]);
    }

    /// The largest there can be.
    #[test]
    fn much_data_comes_in_pieces() {
        let data: Bytes = (0..0xff_ffffu32).map(|n| (n / 1000) as u8).collect::<Vec<_>>().into();
        let mut bytes = plain(&Frame::Data { id: 3, fin: true, data: data.clone() }).to_vec();
        bytes.extend_from_slice(&plain(&Frame::Ping(1)));
        let mut frames = decode_all(&bytes, 10_000).unwrap();
        assert_eq!(frames.pop(), Some(Frame::Ping(1)));
        let count = frames.len();
        let mut whole = BytesMut::new();
        for (i, frame) in frames.into_iter().enumerate() {
            let Frame::Data { id: 3, fin, data } = frame else { panic!("{frame:?}") };
            assert!(data.len() <= PIECE && fin == (i + 1 == count));
            whole.put(data);
        }
        assert!(whole == data);
    }

    #[test]
    fn limits_and_versions() {
        assert_eq!(decode_all(&[0x80, 2, 0, 1, 0, 0, 0, 0], 8), Err(Error::Version(2)));
        assert_eq!(decode_all(&[0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff], 8), Err(Error::TooLarge(0xff_ffff)));
        assert_eq!(decode_all(&[0x80, 3, 0, 6, 0, 0, 0, 0], 8), Err(Error::Size(PING)));
        assert_eq!(decode_all(&[0x80, 3, 0, 4, 0, 0, 0, 0], 8), Ok(vec![Frame::Other(4)]));
    }
}
