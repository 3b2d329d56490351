//! One process run by Exec.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use crate::io::{Io, Tokens};
use crate::poll::Token;

/// Output that comes after the process's end (children that kept its pipes) is waited for so long.
pub const DRAIN: Duration = Duration::from_millis(500);
/// Most bytes kept of each stream of a synchronous exec (CRI: 16 MiB), unless the request asks for less.
pub const OUTPUT_LIMIT: usize = 16 << 20;

#[derive(Debug)]
pub struct Exec {
    /// The container that it runs in.
    pub container: String,
    /// Who waits for it; `None` once that client has gone.
    pub conn: Option<Token>,
    pub request: u64,
    pub stream: bool,
    pub io: Io,
    pub tokens: Tokens,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub limit: usize,
    /// Known once the helper has answered.
    pub pid: Option<i32>,
    /// Tells whether the program could be executed; `None` once it is known that it runs.
    pub report: Option<(Token, OwnedFd)>,
    pub exit: Option<i32>,
    /// Kill at this moment.
    pub deadline: Option<Instant>,
    pub timed_out: bool,
    /// Set by the end of the process.
    pub drain_by: Option<Instant>,
}

impl Exec {
    /// Keeps what fits.
    pub fn keep(buf: &mut Vec<u8>, bytes: &[u8], limit: usize) {
        let room = limit.saturating_sub(buf.len()).min(bytes.len());
        buf.extend_from_slice(&bytes[..room]);
    }
}
