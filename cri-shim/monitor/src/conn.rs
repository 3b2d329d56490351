//! One client.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use orlop_proto::monitor::{ServerFrame, server_frame::Body};

use crate::frame::{self, Decoder};
use crate::poll::{EventFlags, Poll, Token};

/// Output queued for a client that does not read. Above it a stream's source is paused, a subscriber is cut off (it
/// reconnects and asks for the state), and no further request is read.
pub const OUT_LIMIT: usize = 1 << 20;
/// A paused source goes on below this.
pub const OUT_LOW: usize = OUT_LIMIT / 4;
/// A client that takes no byte for so long while its queue is full is cut off, so that the container goes on.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// What a connection has become.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    Requests,
    Events,
    Attach { container: String, stdin: bool, stdout: bool, stderr: bool },
    Exec(u64),
}

#[derive(Debug)]
pub struct Conn {
    socket: UnixStream,
    token: Token,
    pub decoder: Decoder,
    out: Vec<u8>,
    sent: usize,
    pub role: Role,
    pub greeted: bool,
    paused: bool,
    interest: EventFlags,
    /// When the queue filled up or last moved.
    pub stuck_since: Option<Instant>,
    pub close_when_sent: bool,
}

/// What a read or write told.
#[derive(Debug, PartialEq, Eq)]
pub enum Health {
    Fine,
    Gone,
}

impl Conn {
    pub fn new(poll: &Poll, socket: UnixStream, token: Token) -> io::Result<Conn> {
        socket.set_nonblocking(true)?;
        let interest = EventFlags::IN | EventFlags::RDHUP;
        poll.add(&socket, token, interest)?;
        Ok(Conn {
            socket,
            token,
            decoder: Decoder::default(),
            out: Vec::new(),
            sent: 0,
            role: Role::Requests,
            greeted: false,
            paused: false,
            interest,
            stuck_since: None,
            close_when_sent: false,
        })
    }

    /// Reads what is there, within a bound that keeps others served.
    pub fn read(&mut self, buf: &mut [u8]) -> Health {
        for _ in 0..8 {
            match self.socket.read(buf) {
                Ok(0) => return Health::Gone,
                Ok(n) => self.decoder.feed(&buf[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Health::Gone,
            }
        }
        Health::Fine
    }

    /// Queues a frame and sends what the socket takes.
    pub fn send(&mut self, poll: &Poll, id: u64, body: Body) -> Health {
        frame::encode(&ServerFrame { id, body: Some(body) }, &mut self.out);
        self.flush(poll)
    }

    pub fn queued(&self) -> usize {
        self.out.len() - self.sent
    }

    pub fn flush(&mut self, poll: &Poll) -> Health {
        while self.sent < self.out.len() {
            match self.socket.write(&self.out[self.sent..]) {
                Ok(0) => return Health::Gone,
                Ok(n) => {
                    self.sent += n;
                    self.stuck_since = None;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Health::Gone,
            }
        }
        if self.sent == self.out.len() {
            // Small buffers are kept for the next answer, large ones given back.
            if self.out.capacity() > 64 * 1024 {
                self.out = Vec::new();
            }
            self.out.clear();
            self.sent = 0;
        } else if self.sent > 256 * 1024 {
            self.out.drain(..self.sent);
            self.sent = 0;
        }
        self.update(poll);
        if self.close_when_sent && self.queued() == 0 { Health::Gone } else { Health::Fine }
    }

    pub fn pause(&mut self, poll: &Poll, paused: bool) {
        self.paused = paused;
        self.update(poll);
    }

    /// No request is taken from a client that does not read its answers.
    pub fn is_paused(&self) -> bool {
        self.paused || self.queued() > OUT_LIMIT
    }

    fn update(&mut self, poll: &Poll) {
        let mut want = EventFlags::RDHUP;
        if !self.is_paused() {
            want |= EventFlags::IN;
        }
        if self.queued() > 0 {
            want |= EventFlags::OUT;
        }
        if want != self.interest {
            self.interest = want;
            poll.modify(&self.socket, self.token, want);
        }
    }

    pub fn unregister(&self, poll: &Poll) {
        poll.remove(&self.socket);
    }
}
