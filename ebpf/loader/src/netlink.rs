//! Netlink requests that no library at hand has: messages of fixed layout, written and read as bytes.

use std::io;

use netlink_sys::{Socket, SocketAddr};

const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const HEADER: usize = 16;

/// A conversation with a part of the kernel, in the network namespace of the thread that opened it.
pub struct Netlink {
    socket: Socket,
}

impl Netlink {
    pub fn open(protocol: isize) -> io::Result<Netlink> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        Ok(Netlink { socket })
    }

    /// Asks for something to be done and waits for the kernel's verdict.
    pub fn act(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        self.ask(kind, REQUEST | ACK | flags, body, |_| ())
    }

    /// Asks for a list; `each` gets the messages' bodies.
    pub fn dump(&self, kind: u16, body: &[u8], each: impl FnMut(&[u8])) -> io::Result<()> {
        self.ask(kind, REQUEST | DUMP, body, each)
    }

    fn ask(&self, kind: u16, flags: u16, body: &[u8], mut each: impl FnMut(&[u8])) -> io::Result<()> {
        let mut m = Vec::with_capacity(HEADER + body.len());
        m.extend(((HEADER + body.len()) as u32).to_ne_bytes());
        m.extend(kind.to_ne_bytes());
        m.extend(flags.to_ne_bytes());
        m.extend([0; 8]);
        m.extend(body);
        self.socket.send_to(&m, &SocketAddr::new(0, 0), 0)?;
        loop {
            let (answer, _) = self.socket.recv_from_full()?;
            let mut rest = &answer[..];
            while let Some((kind, body, after)) = split(rest) {
                match kind {
                    // The end of a list says, too, whether it could be made.
                    DONE | ERROR => return verdict(body),
                    _ => each(body),
                }
                rest = after;
            }
        }
    }
}

/// The first message's type and body, and what follows it.
fn split(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let body = bytes.get(HEADER..length)?;
    Some((kind, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

fn verdict(body: &[u8]) -> io::Result<()> {
    let code = body.get(..4).and_then(|b| b.try_into().ok()).map_or(0, i32::from_ne_bytes);
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_told_apart() {
        let mut bytes = Vec::new();
        for (kind, body) in [(20u16, vec![7u8; 5]), (DONE, vec![0; 4])] {
            bytes.extend(((HEADER + body.len()) as u32).to_ne_bytes());
            bytes.extend(kind.to_ne_bytes());
            bytes.extend([0; 10]);
            bytes.extend(&body);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        let (kind, body, rest) = split(&bytes).unwrap();
        assert_eq!((kind, body), (20, &[7u8; 5][..]));
        let (kind, body, rest) = split(rest).unwrap();
        assert_eq!((kind, body.len(), rest.len()), (DONE, 4, 0));
        assert!(split(rest).is_none());
        assert!(split(&bytes[..10]).is_none(), "cut off");
        assert_eq!(verdict(&(-2i32).to_ne_bytes()).unwrap_err().raw_os_error(), Some(2));
    }
}
