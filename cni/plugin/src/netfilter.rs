//! Netlink to the kernel's netfilter subsystems, encoded by hand: the base of [`crate::nft`] and [`crate::conntrack`].

use std::io;
use std::time::Duration;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

pub const REQUEST: u16 = 0x1;
pub const ACK: u16 = 0x4;
pub const DUMP: u16 = 0x300;
pub const ERROR: u16 = 2;
const DONE: u16 = 3;

const NESTED: u16 = 0x8000;
const MESSAGE_HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;
/// The kernel answers at once; this guards against one that does not.
const PATIENCE: Duration = Duration::from_secs(10);

/// NFPROTO_IPV4 and NFPROTO_IPV6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];

    pub fn number(self) -> u8 {
        match self {
            Family::V4 => 2,
            Family::V6 => 10,
        }
    }
}

/// A list of attributes under construction.
#[derive(Default)]
pub struct Attributes(pub Vec<u8>);

impl Attributes {
    /// `value` is far below 64 KiB.
    pub fn bytes(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let len = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&len.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    pub fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    pub fn number(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Attributes)) -> &mut Self {
        let mut inner = Attributes::default();
        fill(&mut inner);
        self.bytes(kind | NESTED, &inner.0)
    }
}

/// A message; its kind holds the subsystem.
pub fn message(
    kind: u16,
    flags: u16,
    sequence: u32,
    family: u8,
    resource: u16,
    attributes: &[u8],
) -> Vec<u8> {
    let len = MESSAGE_HEADER + FAMILY_HEADER + attributes.len();
    let mut m = Vec::with_capacity(len);
    m.extend_from_slice(&(len as u32).to_ne_bytes());
    m.extend_from_slice(&kind.to_ne_bytes());
    m.extend_from_slice(&flags.to_ne_bytes());
    m.extend_from_slice(&sequence.to_ne_bytes());
    m.extend_from_slice(&0u32.to_ne_bytes());
    m.extend_from_slice(&[family, 0]);
    m.extend_from_slice(&resource.to_be_bytes());
    m.extend_from_slice(attributes);
    m
}

/// One message of an answer.
pub struct Answer<'a> {
    pub kind: u16,
    pub sequence: u32,
    payload: &'a [u8],
}

impl Answer<'_> {
    /// What an [`ERROR`] says; `None` is success.
    pub fn error(&self) -> Option<io::Error> {
        let code = self.payload.get(..4)?.try_into().map(i32::from_ne_bytes).ok()?;
        (code != 0).then(|| io::Error::from_raw_os_error(code.saturating_neg()))
    }
}

/// A conversation about the network namespace in which it was opened.
pub struct Netfilter {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Netfilter {
    pub fn open() -> io::Result<Netfilter> {
        let socket = Socket::new(NETLINK_NETFILTER)?;
        socket.connect(&SocketAddr::new(0, 0))?;
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
        Ok(Netfilter { socket, buffer: Vec::with_capacity(64 << 10) })
    }

    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.send(bytes, 0).map(|_| ())
    }

    /// Sends one request and hands the attributes of each message that comes back to `each`.
    pub fn ask(
        &mut self,
        kind: u16,
        flags: u16,
        family: Family,
        attributes: &Attributes,
        mut each: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        self.send(&message(kind, REQUEST | flags, 1, family.number(), 0, &attributes.0))?;
        let mut failure = None;
        self.receive(|answer| match answer.kind {
            DONE => true,
            ERROR => {
                failure = answer.error();
                true
            }
            _ => {
                each(answer.payload.get(FAMILY_HEADER..).unwrap_or_default());
                false
            }
        })?;
        failure.map_or(Ok(()), Err)
    }

    /// Hands messages over until `over` says that the conversation is.
    pub fn receive(&mut self, mut over: impl FnMut(Answer) -> bool) -> io::Result<()> {
        loop {
            self.buffer.clear();
            let n = match self.socket.recv(&mut self.buffer, 0) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            let mut rest = self.buffer.get(..n).unwrap_or_default();
            while let Some((answer, after)) = split(rest) {
                if over(answer) {
                    return Ok(());
                }
                rest = after;
            }
        }
    }
}

fn split(bytes: &[u8]) -> Option<(Answer<'_>, &[u8])> {
    let long = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let len = long(0)? as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let answer = Answer { kind, sequence: long(8)?, payload: bytes.get(MESSAGE_HEADER..len)? };
    Some((answer, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

/// The attributes in `bytes`, up to the first that is broken.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & 0x3fff;
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

pub fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_read_back() {
        let mut a = Attributes::default();
        a.text(1, "ab").number(2, 7).nested(3, |n| {
            n.bytes(1, &[9]);
        });
        assert_eq!(a.0.len() % 4, 0);
        assert_eq!(attribute(&a.0, 1), Some(&b"ab\0"[..]));
        assert_eq!(attribute(&a.0, 2), Some(&[0, 0, 0, 7][..]));
        assert_eq!(attribute(attribute(&a.0, 3).unwrap(), 1), Some(&[9][..]));
        assert_eq!(attribute(&a.0, 4), None);
    }

    proptest::proptest! {
        #[test]
        fn broken_answers_do_not_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let mut rest = &bytes[..];
            while let Some((answer, after)) = split(rest) {
                let _ = (answer.error(), attributes(answer.payload).count());
                rest = after;
            }
        }
    }
}
