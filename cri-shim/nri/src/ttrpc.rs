//! ttrpc's messages: a header of ten bytes, then a protobuf message (github.com/containerd/ttrpc, PROTOCOL.md). Pure.

use prost::Message as _;

use crate::mux::Garbage;

/// What goes over the wire inside a message.
pub(crate) mod wire {
    include!(concat!(env!("OUT_DIR"), "/ttrpc.rs"));
}

/// Length, stream id, kind, flags.
pub(crate) const HEADER: usize = 10;
/// The longest message that upstream's side sends or takes.
pub(crate) const MAX_MESSAGE: usize = 4 << 20;

/// Kinds of messages that unary calls need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Request = 1,
    Response = 2,
}

/// gRPC's status codes, as far as they mean something here.
pub(crate) mod code {
    pub const OK: i32 = 0;
    pub const INVALID_ARGUMENT: i32 = 3;
    pub const RESOURCE_EXHAUSTED: i32 = 8;
    pub const FAILED_PRECONDITION: i32 = 9;
    pub const UNIMPLEMENTED: i32 = 12;
}

/// One message. Flags, which only streams need, are not kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    /// The call that it belongs to.
    pub id: u32,
    pub kind: u8,
    pub payload: Vec<u8>,
}

impl Message {
    pub fn request(id: u32, request: &wire::Request) -> Message {
        Message { id, kind: Kind::Request as u8, payload: request.encode_to_vec() }
    }

    pub fn response(id: u32, answer: Result<Vec<u8>, (i32, String)>) -> Message {
        let (status, payload) = match answer {
            Ok(payload) => (wire::Status { code: code::OK, message: String::new() }, payload),
            Err((code, message)) => (wire::Status { code, message }, Vec::new()),
        };
        let response = wire::Response { status: Some(status), payload };
        Message { id, kind: Kind::Response as u8, payload: response.encode_to_vec() }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + self.payload.len());
        // Callers send no more than MAX_MESSAGE.
        out.extend_from_slice(&(self.payload.len() as u32).to_be_bytes());
        out.extend_from_slice(&self.id.to_be_bytes());
        out.extend_from_slice(&[self.kind, 0]);
        out.extend_from_slice(&self.payload);
        out
    }
}

/// Takes a stream's bytes as they come.
#[derive(Default)]
pub(crate) struct Decoder {
    header: [u8; HEADER],
    have: usize,
    /// Of the message whose header is there.
    length: usize,
    payload: Vec<u8>,
}

impl Decoder {
    /// Hands each message that ends in `bytes` to `each`.
    pub fn feed(&mut self, mut bytes: &[u8], mut each: impl FnMut(Message)) -> Result<(), Garbage> {
        loop {
            if self.have < HEADER {
                let take = (HEADER - self.have).min(bytes.len());
                self.header[self.have..self.have + take].copy_from_slice(&bytes[..take]);
                self.have += take;
                bytes = &bytes[take..];
                if self.have < HEADER {
                    return Ok(());
                }
                let [a, b, c, d, ..] = self.header;
                let length = u32::from_be_bytes([a, b, c, d]);
                if length as usize > MAX_MESSAGE {
                    return Err(Garbage::Message(length));
                }
                self.length = length as usize;
            }
            // Grows with what comes, not with what is claimed to come.
            let (now, later) = bytes.split_at((self.length - self.payload.len()).min(bytes.len()));
            self.payload.extend_from_slice(now);
            bytes = later;
            if self.payload.len() < self.length {
                return Ok(());
            }
            let [.., e, f, g, h, kind, _flags] = self.header;
            self.have = 0;
            each(Message {
                id: u32::from_be_bytes([e, f, g, h]),
                kind,
                payload: std::mem::take(&mut self.payload),
            });
        }
    }

    #[cfg(test)]
    pub fn held(&self) -> usize {
        self.payload.len()
    }
}
