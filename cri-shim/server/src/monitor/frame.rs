//! Frames of the monitor protocol: a 4-byte big-endian length, then one protobuf message.

use std::collections::VecDeque;
use std::io;

use bytes::{Buf, Bytes, BytesMut};
use orlop_proto::monitor::{ClientFrame, ServerFrame, client_frame};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::Error;

/// The largest frame there can be: the answer to a synchronous exec.
const MAX_FRAME: usize = 36 << 20;

/// Reads frames. Cancel-safe: what was read of a frame stays in the buffer.
pub(crate) struct FrameReader {
    from: OwnedReadHalf,
    buffer: BytesMut,
    /// Comes before what is in the buffer.
    early: VecDeque<ServerFrame>,
}

impl FrameReader {
    pub fn new(from: OwnedReadHalf) -> Self {
        FrameReader { from, buffer: BytesMut::new(), early: VecDeque::new() }
    }

    /// Gives back what was read too early, in its order.
    pub fn put_back(&mut self, frames: Vec<ServerFrame>) {
        self.early.extend(frames);
    }

    /// The next frame; `None` at the end of the connection.
    pub async fn next(&mut self) -> Result<Option<ServerFrame>, Error> {
        if let Some(frame) = self.early.pop_front() {
            return Ok(Some(frame));
        }
        loop {
            if let Some(frame) = take_frame(&mut self.buffer)? {
                return Ok(Some(frame));
            }
            if self.from.read_buf(&mut self.buffer).await.map_err(Error::Broken)? == 0 {
                if self.buffer.is_empty() {
                    return Ok(None);
                }
                return Err(Error::Broken(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }
}

fn invalid(what: String) -> Error {
    Error::Broken(io::Error::new(io::ErrorKind::InvalidData, what))
}

/// Takes one whole frame off `buffer`, if it is there.
fn take_frame(buffer: &mut BytesMut) -> Result<Option<ServerFrame>, Error> {
    let Some(head) = buffer.first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_be_bytes(*head) as usize;
    if length > MAX_FRAME {
        return Err(invalid(format!("a frame of {length} bytes is longer than {MAX_FRAME}")));
    }
    if buffer.len() < 4 + length {
        buffer.reserve(4 + length - buffer.len());
        return Ok(None);
    }
    buffer.advance(4);
    let body = buffer.split_to(length).freeze();
    ServerFrame::decode(body).map(Some).map_err(|e| invalid(e.to_string()))
}

/// Writes frames.
pub(crate) struct FrameWriter {
    to: OwnedWriteHalf,
}

impl FrameWriter {
    pub fn new(to: OwnedWriteHalf) -> Self {
        FrameWriter { to }
    }

    /// Sends frames as one piece.
    pub async fn send(
        &mut self,
        frames: impl IntoIterator<Item = (u64, client_frame::Body)>,
    ) -> Result<(), Error> {
        let frames: Vec<_> = frames.into_iter().map(|(id, body)| encode(id, body)).collect();
        self.to.write_all(&frames.concat()).await.map_err(Error::Broken)
    }

    pub async fn stdin(&mut self, data: Bytes) -> Result<(), Error> {
        // Frames towards the monitor stay below 4 MiB.
        for part in data.chunks(1 << 20) {
            self.send([(0, client_frame::Body::Stdin(part.to_vec()))]).await?;
        }
        Ok(())
    }
}

fn encode(id: u64, body: client_frame::Body) -> Vec<u8> {
    let frame = ClientFrame { id, body: Some(body) };
    let length = frame.encoded_len();
    let mut out = Vec::with_capacity(4 + length);
    out.extend_from_slice(&(length as u32).to_be_bytes());
    // A Vec grows, so encoding cannot run out of room.
    let _ = frame.encode(&mut out);
    out
}

#[cfg(test)]
mod tests {
    use orlop_proto::monitor::{Done, Hello, server_frame};

    use super::*;

    fn server_bytes(id: u64) -> Vec<u8> {
        let f = ServerFrame { id, body: Some(server_frame::Body::Done(Done {})) };
        let mut out = (f.encoded_len() as u32).to_be_bytes().to_vec();
        f.encode(&mut out).unwrap();
        out
    }

    #[test]
    fn frames_are_taken_whole_and_in_order() {
        let mut bytes = server_bytes(7);
        bytes.extend(server_bytes(8));
        let mut buffer = BytesMut::new();
        let mut ids = Vec::new();
        for b in bytes {
            buffer.extend_from_slice(&[b]);
            while let Some(f) = take_frame(&mut buffer).unwrap() {
                ids.push(f.id);
            }
        }
        assert_eq!(ids, [7, 8]);
        assert!(buffer.is_empty());
    }

    #[test]
    fn a_frame_that_is_too_long_or_garbled_ends_the_connection() {
        let mut long = BytesMut::from(&[0xff, 0xff, 0xff, 0xff][..]);
        assert!(take_frame(&mut long).is_err());
        let mut garbled = BytesMut::from(&[0, 0, 0, 2, 0xff, 0xff][..]);
        assert!(take_frame(&mut garbled).is_err());
    }

    #[test]
    fn requests_carry_their_length() {
        let bytes = encode(3, client_frame::Body::Hello(Hello { version: 1 }));
        assert_eq!(u32::from_be_bytes(bytes[..4].try_into().unwrap()) as usize, bytes.len() - 4);
    }

    /// Fuzz target: what a monitor sends, which may be of another release or damaged. For longer:
    /// `PROPTEST_CASES=1000000 cargo test --release -p orlop-cri fuzz_server_frames`.
    mod fuzz {
        use orlop_fuzz::{cases, cuts, mutated};
        use orlop_proto::monitor::{
            ContainerExited, ContainerState, ExecDone, Failure, HelloReply, State, StreamEnded,
        };
        use proptest::prelude::*;
        use server_frame::Body;

        use super::*;

        fn seeds() -> Vec<Vec<u8>> {
            let container =
                || ContainerState { container_id: "c".into(), pid: 7, exit_code: -1, ..Default::default() };
            let bodies = vec![
                Body::Hello(HelloReply { version: 2, pid: 7, build: "0.1.0".into() }),
                Body::Failure(Failure { kind: 5, message: "m".into(), stage: "exec".into(), errno: 2 }),
                Body::State(State {
                    sandbox_created: true,
                    init_pid: 9,
                    containers: vec![container(), container()],
                }),
                Body::ContainerExited(ContainerExited { container: Some(container()) }),
                Body::ExecDone(ExecDone {
                    exit_code: 1,
                    stdout: vec![1; 300],
                    stderr: vec![2; 3],
                    timed_out: false,
                }),
                Body::Stdout(vec![0, 255]),
                Body::StreamEnded(StreamEnded { exit_code: 137 }),
            ];
            let one = |(i, body): (usize, Body)| {
                let f = ServerFrame { id: i as u64, body: Some(body) };
                let mut out = (f.encoded_len() as u32).to_be_bytes().to_vec();
                f.encode(&mut out).unwrap();
                out
            };
            let mut out: Vec<Vec<u8>> = bodies.into_iter().enumerate().map(one).collect();
            out.push(out.concat());
            out
        }

        const WORDS: &[&[u8]] = &[
            b"\0\0\0\0",
            b"\0\0\0\x01",
            b"\xff\xff\xff\xff",
            b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
            b"\x0a\x00",
        ];

        proptest! {
            #![proptest_config(cases(2000))]

            #[test]
            fn fuzz_server_frames(bytes in mutated(seeds(), WORDS), cuts in cuts()) {
                let (mut buffer, mut rest) = (BytesMut::new(), &bytes[..]);
                let mut frames = 0;
                'all: for cut in cuts.into_iter().cycle() {
                    if rest.is_empty() {
                        break;
                    }
                    let (piece, later) = rest.split_at(cut.min(rest.len()));
                    rest = later;
                    buffer.extend_from_slice(piece);
                    loop {
                        match take_frame(&mut buffer) {
                            Ok(Some(_)) => frames += 1,
                            Ok(None) => break,
                            Err(_) => break 'all,
                        }
                    }
                }
                prop_assert!(frames <= bytes.len() / 4 && buffer.len() <= bytes.len());
                prop_assert!(buffer.capacity() <= MAX_FRAME + 4 + bytes.len() + 64);
            }
        }
    }
}
