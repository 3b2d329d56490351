//! The wire framing: a 4-byte big-endian length, then one message. Pure.

use prost::Message;

/// Longest frame a client may send (proto/monitor.proto).
pub const MAX_FRAME: usize = 4 << 20;

/// Why a connection is ended.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("a frame of {0} bytes exceeds the limit of {MAX_FRAME}")]
    TooLong(usize),
    #[error("a frame does not parse")]
    Malformed,
}

/// Collects bytes and cuts them into messages.
#[derive(Debug, Default)]
pub struct Decoder {
    buf: Vec<u8>,
    start: usize,
}

impl Decoder {
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.start > 0 && self.start == self.buf.len() {
            self.buf.clear();
            self.start = 0;
        }
        self.buf.extend_from_slice(bytes);
    }

    /// The next whole message; `None` until more bytes come.
    pub fn next<M: Message + Default>(&mut self) -> Result<Option<M>, FrameError> {
        let rest = &self.buf[self.start..];
        let Some((head, body)) = rest.split_first_chunk::<4>() else { return Ok(None) };
        let len = u32::from_be_bytes(*head) as usize;
        if len > MAX_FRAME {
            return Err(FrameError::TooLong(len));
        }
        if body.len() < len {
            return Ok(None);
        }
        let message = M::decode(&body[..len]).map_err(|_| FrameError::Malformed)?;
        self.start += 4 + len;
        if self.start == self.buf.len() {
            self.start = 0;
            // An idle connection keeps no buffer.
            self.buf = Vec::new();
        } else if self.start > 64 * 1024 {
            self.buf.drain(..self.start);
            self.start = 0;
        }
        Ok(Some(message))
    }

    #[cfg(test)]
    /// Bytes held that have not become a message yet.
    pub fn held(&self) -> usize {
        self.buf.len() - self.start
    }
}

/// Appends one frame to `out`.
pub fn encode<M: Message>(message: &M, out: &mut Vec<u8>) {
    let len = message.encoded_len();
    out.reserve(4 + len);
    out.extend_from_slice(&(len as u32).to_be_bytes());
    // A Vec grows as needed, so encoding into it cannot fail.
    let _ = message.encode(out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use orlop_proto::monitor::{ClientFrame, Hello, client_frame::Body};
    use proptest::prelude::*;

    fn frame(id: u64, body: Body) -> ClientFrame {
        ClientFrame { id, body: Some(body) }
    }

    #[test]
    fn too_long_and_malformed() {
        let mut d = Decoder::default();
        d.feed(&[0xff; 4]);
        assert!(matches!(d.next::<ClientFrame>(), Err(FrameError::TooLong(_))));
        let mut d = Decoder::default();
        d.feed(&[0, 0, 0, 1, 0xff]);
        assert_eq!(d.next::<ClientFrame>(), Err(FrameError::Malformed));
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_messages(
            bodies in prop::collection::vec(prop_oneof![
                any::<u32>().prop_map(|v| Body::Hello(Hello { version: v })),
                prop::collection::vec(any::<u8>(), 0..300).prop_map(Body::Stdin),
            ], 0..20),
            cuts in prop::collection::vec(1usize..64, 1..50),
        ) {
            let frames: Vec<_> = bodies.into_iter().enumerate().map(|(i, b)| frame(i as u64, b)).collect();
            let mut bytes = Vec::new();
            for f in &frames {
                encode(f, &mut bytes);
            }
            let mut d = Decoder::default();
            let mut got = Vec::new();
            let mut at = 0;
            let mut cuts = cuts.into_iter().cycle();
            while at < bytes.len() {
                let end = (at + cuts.next().unwrap()).min(bytes.len());
                d.feed(&bytes[at..end]);
                at = end;
                while let Some(f) = d.next::<ClientFrame>().unwrap() {
                    got.push(f);
                }
            }
            prop_assert_eq!(got, frames);
            prop_assert_eq!(d.held(), 0);
        }

        #[test]
        fn garbage_never_panics_nor_grows(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..20)) {
            let mut d = Decoder::default();
            'all: for c in chunks {
                d.feed(&c);
                loop {
                    match d.next::<ClientFrame>() {
                        Ok(Some(_)) => {}
                        Ok(None) => break,
                        Err(_) => break 'all,
                    }
                }
            }
            prop_assert!(d.held() <= MAX_FRAME + 4 + 200);
        }
    }
}
