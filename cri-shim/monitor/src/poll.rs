//! epoll, by tokens that are never used twice: an event for something that is gone finds nothing.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{Timespec, epoll};

pub use rustix::event::epoll::EventFlags;

pub type Token = u64;

#[derive(Debug)]
pub struct Poll {
    epoll: OwnedFd,
    next: Token,
}

impl Poll {
    pub fn new() -> io::Result<Poll> {
        Ok(Poll { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?, next: 1 })
    }

    /// A token for something about to be added.
    pub fn token(&mut self) -> Token {
        self.next += 1;
        self.next
    }

    pub fn add(&self, fd: impl AsFd, token: Token, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), flags)?)
    }

    pub fn modify(&self, fd: impl AsFd, token: Token, flags: EventFlags) {
        // Fails only for a descriptor that was never added, which has no events to lose.
        let _ = epoll::modify(&self.epoll, fd, epoll::EventData::new_u64(token), flags);
    }

    /// Takes a descriptor out; closing it does the same unless a fork still holds it.
    pub fn remove(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.epoll, fd);
    }

    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<Vec<(Token, EventFlags)>> {
        // Rounded up, so that a deadline has passed when the wait is over.
        let timeout = timeout.map(|t| Timespec {
            tv_sec: t.as_secs() as i64,
            tv_nsec: (i64::from(t.subsec_nanos()) + 1_000_000).min(999_999_999),
        });
        let mut events =
            [epoll::Event { flags: EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 32];
        match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
            Ok(n) => Ok(events[..n].iter().map(|e| (e.data.u64(), e.flags)).collect()),
            Err(rustix::io::Errno::INTR) => Ok(Vec::new()),
            Err(e) => Err(e.into()),
        }
    }
}
