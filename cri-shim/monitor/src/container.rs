//! One container.
//!
//! ```text
//! Creating --create--> Created --start--> Running --exit--> Exited --delete--> (gone)
//!     |                   |                                  ^
//!     +--failed--> (gone) +---- exit or failed start --------+
//! ```

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use orlop_oci::Context;
use orlop_proto::monitor::client_frame::Body;

use crate::io::{Io, Tokens};
use crate::journal::Record;
use crate::log::{LogFile, Stream};
use crate::oom::OomWatch;
use crate::poll::Token;

/// After its process has ended, output that is still under way is waited for so long before the end is announced, so that
/// whoever hears of the end finds the log complete. A process elsewhere may hold the pipe for ever.
pub const DRAIN: Duration = Duration::from_millis(500);

/// Requests that wait for the operation under way on their container; more are refused.
pub const WAITING_LIMIT: usize = 32;

#[derive(Debug)]
pub struct Exit {
    pub code: i32,
    pub at_ns: i64,
}

#[derive(Debug)]
pub struct Container {
    pub record: Record,
    pub io: Io,
    pub tokens: Tokens,
    pub log: Option<LogFile>,
    /// Connections that follow the output.
    pub attached: Vec<Token>,
    pub stdin_once: bool,
    /// Holds the container back until its start.
    pub channel: Option<OwnedFd>,
    pub context: Context,
    pub oom: Option<(Token, OomWatch)>,
    pub oom_seen: u64,
    /// The kernel gives notice before it counts the kill: looked at again until then.
    pub oom_check_until: Option<Instant>,
    /// An operation runs in a helper.
    pub busy: bool,
    pub waiting: VecDeque<(Token, u64, Body)>,
    /// The end of the process, seen while an operation was under way.
    pub early_exit: Option<Exit>,
    /// The end is on disk but not announced yet: output is being drained.
    pub announce_by: Option<Instant>,
    /// The end could not be written to disk; tried again.
    pub unsaved: bool,
}

impl Container {
    pub fn new(record: Record, io: Io, tokens: Tokens, log: Option<LogFile>, stdin_once: bool) -> Container {
        Container {
            record,
            io,
            tokens,
            log,
            attached: Vec::new(),
            stdin_once,
            channel: None,
            context: Context::default(),
            oom: None,
            oom_seen: 0,
            oom_check_until: None,
            busy: true,
            waiting: VecDeque::new(),
            early_exit: None,
            announce_by: None,
            unsaved: false,
        }
    }

    /// Whether output must wait for the log.
    pub fn log_is_full(&self) -> bool {
        self.log.as_ref().is_some_and(LogFile::is_full)
    }

    pub fn end_stream(&mut self, stream: Stream, now: Instant) {
        *self.io.output(stream) = None;
        if let Some(log) = &mut self.log {
            log.end(stream, now);
        }
    }
}
