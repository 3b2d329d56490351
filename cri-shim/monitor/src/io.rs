//! The monitor's ends of a process's standard streams.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use orlop_oci::Stdio;
use rustix::io::Errno;

use crate::log::Stream;
use crate::poll::{EventFlags, Poll, Token};

/// Input held for a process that does not read: with more, the sender's connection is not read either.
pub const STDIN_LIMIT: usize = 1 << 20;

/// What comes out of a process.
#[derive(Debug)]
pub struct Output {
    fd: OwnedFd,
    pub token: Token,
    paused: bool,
    /// A slave end of our own keeps a terminal from reporting end of file while its process lives.
    peer: Option<OwnedFd>,
}

/// One read's result.
pub enum Chunk {
    Data(usize),
    Nothing,
    End,
}

impl Output {
    pub fn read(&self, buf: &mut [u8]) -> Chunk {
        loop {
            return match rustix::io::read(&self.fd, &mut *buf) {
                Ok(0) => Chunk::End,
                Ok(n) => Chunk::Data(n),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => Chunk::Nothing,
                // A terminal whose last slave was closed.
                Err(_) => Chunk::End,
            };
        }
    }

    pub fn pause(&mut self, poll: &Poll, paused: bool) {
        if self.paused != paused {
            self.paused = paused;
            // Removed rather than masked: a hang-up is reported whatever the mask, and would spin.
            if paused {
                poll.remove(&self.fd);
            } else {
                let _ = poll.add(&self.fd, self.token, EventFlags::IN);
            }
        }
    }

    pub fn is_paused(&self) -> bool {
        self.paused
    }
}

/// What goes into a process.
#[derive(Debug, Default)]
pub struct Input {
    fd: Option<OwnedFd>,
    pub token: Token,
    queue: VecDeque<u8>,
    closing: bool,
    armed: bool,
    tty: bool,
}

impl Input {
    /// Queues and writes; false when the process reads no more input.
    pub fn push(&mut self, poll: &Poll, bytes: &[u8]) -> bool {
        if self.closing {
            return true;
        }
        self.queue.extend(bytes);
        self.flush(poll)
    }

    /// End of input after what is queued. A terminal has no end of its own: the user types ^D.
    pub fn close(&mut self, poll: &Poll) -> bool {
        if self.tty {
            return true;
        }
        self.closing = true;
        self.flush(poll)
    }

    pub fn is_full(&self) -> bool {
        self.queue.len() > STDIN_LIMIT
    }

    /// False when this end is finished and must be dropped.
    pub fn flush(&mut self, poll: &Poll) -> bool {
        let Some(fd) = &self.fd else { return true };
        while !self.queue.is_empty() {
            let (head, _) = self.queue.as_slices();
            match rustix::io::write(fd, head) {
                Ok(n) => drop(self.queue.drain(..n)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !self.armed {
                        self.armed = true;
                        poll.modify(fd, self.token, EventFlags::OUT);
                    }
                    return true;
                }
                Err(_) => return false,
            }
        }
        if self.queue.capacity() > 64 * 1024 {
            self.queue = VecDeque::new();
        }
        if self.armed {
            self.armed = false;
            poll.modify(fd, self.token, EventFlags::empty());
        }
        !self.closing
    }
}

/// All three.
#[derive(Debug, Default)]
pub struct Io {
    pub stdout: Option<Output>,
    pub stderr: Option<Output>,
    pub stdin: Option<Input>,
    pub console: bool,
    /// A size asked for before the terminal existed.
    size: Option<(u16, u16)>,
}

/// Tokens of the three streams, in the order stdin, stdout, stderr.
pub type Tokens = [Token; 3];

impl Io {
    /// Pipes for a process without a terminal; with one, the console comes by [`Io::set_console`].
    pub fn new(
        poll: &mut Poll,
        tty: bool,
        stdin: bool,
        stdout: bool,
        stderr: bool,
    ) -> io::Result<(Io, Stdio, Tokens)> {
        let tokens = [poll.token(), poll.token(), poll.token()];
        let mut io = Io { console: tty, ..Default::default() };
        let mut theirs = Stdio::default();
        if stdin {
            io.stdin = Some(Input { token: tokens[0], tty, ..Default::default() });
        }
        if tty {
            return Ok((io, theirs, tokens));
        }
        if let Some(input) = &mut io.stdin {
            let (r, w) = pipe2(OFlag::O_CLOEXEC)?;
            rustix::io::ioctl_fionbio(&w, true)?;
            poll.add(&w, tokens[0], EventFlags::empty())?;
            input.fd = Some(w);
            theirs.stdin = Some(r);
        }
        if stdout {
            let (ours, end) = output(poll, tokens[1])?;
            io.stdout = Some(ours);
            theirs.stdout = Some(end);
        }
        if stderr {
            let (ours, end) = output(poll, tokens[2])?;
            io.stderr = Some(ours);
            theirs.stderr = Some(end);
        }
        Ok((io, theirs, tokens))
    }

    /// The terminal's master has come.
    pub fn set_console(&mut self, poll: &Poll, tokens: Tokens, master: OwnedFd) -> io::Result<()> {
        use rustix::pty::OpenptFlags;
        rustix::io::ioctl_fionbio(&master, true)?;
        let peer = rustix::pty::ioctl_tiocgptpeer(
            &master,
            OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
        )
        .ok();
        if let Some(input) = &mut self.stdin {
            let fd = master.try_clone()?;
            poll.add(&fd, tokens[0], EventFlags::empty())?;
            input.fd = Some(fd);
        }
        poll.add(&master, tokens[1], EventFlags::IN)?;
        self.stdout = Some(Output { fd: master, token: tokens[1], paused: false, peer });
        if let Some((w, h)) = self.size.take() {
            self.resize(w, h);
        }
        if let Some(input) = &mut self.stdin
            && !input.flush(poll)
        {
            self.stdin = None;
        }
        Ok(())
    }

    pub fn resize(&mut self, width: u16, height: u16) {
        if !self.console {
            return;
        }
        match &self.stdout {
            Some(o) => {
                let size =
                    rustix::termios::Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
                // The terminal may have gone meanwhile.
                let _ = rustix::termios::tcsetwinsize(&o.fd, size);
            }
            None => self.size = Some((width, height)),
        }
    }

    pub fn output(&mut self, stream: Stream) -> &mut Option<Output> {
        match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        }
    }

    /// The process has ended: a terminal may report its end of file from now on.
    pub fn process_ended(&mut self) {
        if let Some(o) = &mut self.stdout {
            o.peer = None;
        }
        self.stdin = None;
    }

    pub fn is_drained(&self) -> bool {
        self.stdout.is_none() && self.stderr.is_none()
    }

    pub fn pause(&mut self, poll: &Poll, paused: bool) {
        for o in [&mut self.stdout, &mut self.stderr].into_iter().flatten() {
            o.pause(poll, paused);
        }
    }
}

fn output(poll: &Poll, token: Token) -> io::Result<(Output, OwnedFd)> {
    let (r, w) = pipe2(OFlag::O_CLOEXEC)?;
    rustix::io::ioctl_fionbio(&r, true)?;
    poll.add(&r, token, EventFlags::IN)?;
    Ok((Output { fd: r, token, paused: false, peer: None }, w))
}
