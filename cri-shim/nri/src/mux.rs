//! NRI's trunk: several byte streams over one socket, in frames of a stream's number, a length and as many bytes.
//!
//! Pure. Each stream carries ttrpc messages, which need not end where a frame ends.

use crate::ttrpc::{self, Message};

/// Two numbers, big endian.
const HEADER: usize = 8;
/// The most that upstream's side puts into a frame; it drops a connection that sends more.
const MAX_PAYLOAD: usize = ttrpc::HEADER + ttrpc::MAX_MESSAGE;
/// Upstream's reader asks for this much first, and takes a larger frame then for an error.
const FIRST_FRAME: usize = 4096;

/// The two streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    /// The runtime calls the plugin.
    Plugin = 1,
    /// The plugin calls the runtime.
    Runtime = 2,
}

impl Stream {
    fn of(number: u32) -> Option<Stream> {
        [Stream::Plugin, Stream::Runtime].into_iter().find(|s| *s as u32 == number)
    }
}

/// A message in frames that upstream's reader takes: a first one that fits its buffer, then the rest in one, for it queues frames
/// and gives up on a long queue.
pub(crate) fn encode(stream: Stream, message: &Message) -> Vec<u8> {
    let bytes = message.encode();
    let mut out = Vec::with_capacity(bytes.len() + 2 * HEADER);
    let (first, rest) = bytes.split_at(bytes.len().min(FIRST_FRAME));
    for piece in [first, rest] {
        if !piece.is_empty() {
            out.extend_from_slice(&(stream as u32).to_be_bytes());
            // Messages are at most MAX_MESSAGE long.
            out.extend_from_slice(&(piece.len() as u32).to_be_bytes());
            out.extend_from_slice(piece);
        }
    }
    out
}

/// What a peer does that no plugin does.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Garbage {
    #[error("a frame of {0} bytes")]
    Frame(u32),
    #[error("a message of {0} bytes")]
    Message(u32),
}

/// Takes bytes as they come and gives messages. Holds no more than came.
#[derive(Default)]
pub(crate) struct Decoder {
    header: [u8; HEADER],
    have: usize,
    /// Of the frame that is being read; none when its stream is not one of the two.
    stream: Option<Stream>,
    left: usize,
    streams: [ttrpc::Decoder; 2],
}

impl Decoder {
    /// Appends the messages that end in `bytes` to `out`. After an error the connection is of no use.
    pub fn feed(&mut self, mut bytes: &[u8], out: &mut Vec<(Stream, Message)>) -> Result<(), Garbage> {
        while !bytes.is_empty() {
            if self.left == 0 {
                let take = (HEADER - self.have).min(bytes.len());
                self.header[self.have..self.have + take].copy_from_slice(&bytes[..take]);
                self.have += take;
                bytes = &bytes[take..];
                if self.have < HEADER {
                    return Ok(());
                }
                self.have = 0;
                let [a, b, c, d, e, f, g, h] = self.header;
                let length = u32::from_be_bytes([e, f, g, h]);
                if length as usize > MAX_PAYLOAD {
                    return Err(Garbage::Frame(length));
                }
                self.stream = Stream::of(u32::from_be_bytes([a, b, c, d]));
                self.left = length as usize;
                continue;
            }
            let (now, later) = bytes.split_at(self.left.min(bytes.len()));
            self.left -= now.len();
            bytes = later;
            // As upstream: frames of other streams are passed over.
            if let Some(stream) = self.stream {
                self.streams[stream as usize - 1].feed(now, |m| out.push((stream, m)))?;
            }
        }
        Ok(())
    }

    #[cfg(test)]
    pub fn held(&self) -> usize {
        self.streams.iter().map(ttrpc::Decoder::held).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ttrpc::Kind;

    fn message(id: u32, length: usize) -> Message {
        Message { id, kind: Kind::Request as u8, payload: vec![7; length] }
    }

    #[test]
    fn messages_arrive_however_the_bytes_are_cut() {
        let sent = [
            (Stream::Plugin, message(1, 0)),
            (Stream::Runtime, message(3, 5000)),
            (Stream::Plugin, message(5, 4086)),
            (Stream::Plugin, message(7, 4087)),
        ];
        let mut bytes = Vec::new();
        sent.iter().for_each(|(s, m)| bytes.extend(encode(*s, m)));
        for step in [1, 7, 4096, bytes.len()] {
            let (mut decoder, mut got) = (Decoder::default(), Vec::new());
            bytes.chunks(step).for_each(|piece| decoder.feed(piece, &mut got).unwrap());
            assert_eq!(got, sent);
            assert_eq!(decoder.held(), 0);
        }
    }

    #[test]
    fn the_first_frame_fits_upstreams_buffer() {
        let length = |at: usize, bytes: &[u8]| u32::from_be_bytes(bytes[at + 4..at + 8].try_into().unwrap());
        let bytes = encode(Stream::Plugin, &message(1, 1 << 20));
        assert_eq!(length(0, &bytes), 4096);
        assert_eq!(length(8 + 4096, &bytes) as usize, (1 << 20) + ttrpc::HEADER - 4096);
        assert_eq!(encode(Stream::Plugin, &message(1, 4086)).len(), 8 + 4096);
    }

    #[test]
    fn other_streams_are_passed_over_and_garbage_is_an_error() {
        let (mut decoder, mut got) = (Decoder::default(), Vec::new());
        decoder.feed(&[0, 0, 0, 9, 0, 0, 0, 2, 1, 2, 0, 0, 0, 1, 0, 0, 0, 0], &mut got).unwrap();
        assert!(got.is_empty());
        let refused = decoder.feed(b"panic: runtime error", &mut got).unwrap_err();
        assert_eq!(refused, Garbage::Frame(u32::from_be_bytes(*b"c: r")));
        let mut decoder = Decoder::default();
        let long = [0, 0, 0, 1, 0, 0, 0, 10, 0, 0x40, 0, 1, 0, 0, 0, 1, 1, 0];
        assert_eq!(decoder.feed(&long, &mut got), Err(Garbage::Message((4 << 20) + 1)));
    }
}
