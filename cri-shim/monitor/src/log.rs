//! The CRI log format and its file.
//!
//! Each line is `TIME STREAM TAG TEXT` with TAG `F` for a whole line and `P` for a piece of a longer one. Output that does not end
//! in a newline is written with `P` when its stream ends, as containerd does.
//!
//! A file that cannot be written (disk full) holds its lines back, up to [`HELD_LIMIT`]; the caller then stops reading the container,
//! so the container waits. After [`PATIENCE`] the held lines are dropped and counted, so that it does not wait for ever.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};

/// Lines held back for a file that does not take them: one pipe's worth of output (64 KiB) with its time stamps, four times over.
pub const HELD_LIMIT: usize = 256 * 1024;
/// How long a container waits for its log before lines are dropped.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// Pause between attempts to write.
pub const RETRY: Duration = Duration::from_millis(200);
/// Longest line before it is split, unless the request says otherwise.
pub const DEFAULT_LINE_LIMIT: usize = 16 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    fn name(self) -> &'static str {
        match self {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        }
    }
}

/// Cuts one stream into log lines. Pure.
#[derive(Debug)]
pub struct Splitter {
    stream: Stream,
    limit: usize,
    held: Vec<u8>,
}

impl Splitter {
    pub fn new(stream: Stream, limit: usize) -> Splitter {
        Splitter { stream, limit: limit.max(1), held: Vec::new() }
    }

    /// Appends the log lines that `bytes` complete.
    pub fn push(&mut self, mut bytes: &[u8], time: &str, out: &mut Vec<u8>) {
        while !bytes.is_empty() {
            let room = self.limit - self.held.len();
            let window = &bytes[..bytes.len().min(room + 1)];
            match window.iter().position(|b| *b == b'\n') {
                Some(at) => {
                    self.emit(time, b'F', &bytes[..at], out);
                    bytes = &bytes[at + 1..];
                }
                // More than a full line without its end.
                None if bytes.len() > room => {
                    self.emit(time, b'P', &bytes[..room], out);
                    bytes = &bytes[room..];
                }
                None => {
                    self.held.extend_from_slice(bytes);
                    return;
                }
            }
        }
    }

    /// The stream has ended: what is held becomes a piece.
    pub fn end(&mut self, time: &str, out: &mut Vec<u8>) {
        if !self.held.is_empty() {
            self.emit(time, b'P', &[], out);
        }
        self.held = Vec::new();
    }

    fn emit(&mut self, time: &str, tag: u8, tail: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(time.as_bytes());
        out.push(b' ');
        out.extend_from_slice(self.stream.name().as_bytes());
        out.extend_from_slice(&[b' ', tag, b' ']);
        out.extend_from_slice(&self.held);
        out.extend_from_slice(tail);
        out.push(b'\n');
        self.held.clear();
    }
}

/// The present as RFC 3339 with nanoseconds, in UTC.
pub fn now() -> String {
    format!("{:.9}", jiff::Timestamp::now())
}

/// A container's log.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: File,
    stdout: Splitter,
    stderr: Splitter,
    /// Whole lines that the file has not taken yet.
    held: Vec<u8>,
    stalled_since: Option<Instant>,
    dropped: u64,
}

fn open(path: &Path) -> io::Result<File> {
    // Never through a symbolic link, also not in a folder above: a container that has its pod's logs as a volume may have put one
    // there. Never a FIFO or device.
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = File::from(openat2(CWD, path, flags, Mode::from(0o640), ResolveFlags::NO_SYMLINKS)?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}

impl LogFile {
    pub fn open(path: &Path, line_limit: usize) -> io::Result<LogFile> {
        Ok(LogFile {
            path: path.to_owned(),
            file: open(path)?,
            stdout: Splitter::new(Stream::Stdout, line_limit),
            stderr: Splitter::new(Stream::Stderr, line_limit),
            held: Vec::new(),
            stalled_since: None,
            dropped: 0,
        })
    }

    /// Adds output. Check [`LogFile::stalled`] afterwards.
    pub fn write(&mut self, stream: Stream, bytes: &[u8], at: Instant) {
        let time = now();
        let splitter = match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        };
        splitter.push(bytes, &time, &mut self.held);
        self.flush(at);
    }

    /// A stream has ended.
    pub fn end(&mut self, stream: Stream, at: Instant) {
        let time = now();
        match stream {
            Stream::Stdout => self.stdout.end(&time, &mut self.held),
            Stream::Stderr => self.stderr.end(&time, &mut self.held),
        }
        self.flush(at);
    }

    /// Whether the file refuses data, and since when; with it the caller reads no more output once [`HELD_LIMIT`] is reached.
    pub fn stalled(&self) -> Option<Instant> {
        self.stalled_since
    }

    pub fn is_full(&self) -> bool {
        self.held.len() >= HELD_LIMIT
    }

    /// Bytes of output given up so far.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Writes what is held, whole lines only; gives up after [`PATIENCE`].
    pub fn flush(&mut self, at: Instant) {
        while !self.held.is_empty() {
            match self.file.write(&self.held) {
                Ok(0) => return self.stall(at),
                Ok(n) if n == self.held.len() => self.held.clear(),
                Ok(n) => {
                    // Take back a half line, so that it can be written whole here or in the next file.
                    let whole = self.held[..n].iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
                    if whole < n
                        && let Ok(m) = self.file.metadata()
                    {
                        let _ = self.file.set_len(m.len().saturating_sub((n - whole) as u64));
                    }
                    self.held.drain(..whole);
                    if whole < n {
                        return self.stall(at);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return self.stall(at),
            }
        }
        self.stalled_since = None;
        if self.held.capacity() > 64 * 1024 {
            self.held = Vec::new();
        }
    }

    fn stall(&mut self, at: Instant) {
        let since = *self.stalled_since.get_or_insert(at);
        if at.duration_since(since) >= PATIENCE && self.is_full() {
            self.dropped += self.held.len() as u64;
            self.held = Vec::new();
            // The next patience starts with the next line that does not fit.
            self.stalled_since = None;
        }
    }

    /// Goes on in a new file of the same name after a rotation. Lines that the old file did not take go to the new one.
    pub fn reopen(&mut self, at: Instant) -> io::Result<()> {
        self.flush(at);
        self.file = open(&self.path)?;
        self.flush(at);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(limit: usize, chunks: &[&[u8]], end: bool) -> String {
        let mut s = Splitter::new(Stream::Stdout, limit);
        let mut out = Vec::new();
        for c in chunks {
            s.push(c, "T", &mut out);
        }
        if end {
            s.end("T", &mut out);
        }
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn table() {
        let cases: &[(usize, &[&[u8]], bool, &str)] = &[
            (8, &[b"a\nb\n"], false, "T stdout F a\nT stdout F b\n"),
            (8, &[b"a", b"b\n"], false, "T stdout F ab\n"),
            (8, &[b"\n\n"], false, "T stdout F \nT stdout F \n"),
            (4, &[b"abcd\n"], false, "T stdout F abcd\n"),
            (4, &[b"abcd", b"\n"], false, "T stdout F abcd\n"),
            (4, &[b"abcde\n"], false, "T stdout P abcd\nT stdout F e\n"),
            (4, &[b"abcdefgh\n"], false, "T stdout P abcd\nT stdout F efgh\n"),
            (4, &[b"abcdefghi"], false, "T stdout P abcd\nT stdout P efgh\n"),
            (4, &[b"abcdefghi"], true, "T stdout P abcd\nT stdout P efgh\nT stdout P i\n"),
            (4, &[b"prompt"], true, "T stdout P prom\nT stdout P pt\n"),
            (4, &[b"a\n"], true, "T stdout F a\n"),
        ];
        for (limit, chunks, end, want) in cases {
            assert_eq!(split(*limit, chunks, *end), *want, "{chunks:?}");
        }
    }

    #[test]
    fn time_has_nine_digits() {
        let t = now();
        assert_eq!(t.len(), "2016-10-06T00:17:09.669794202Z".len(), "{t}");
        assert!(t.ends_with('Z'));
    }

    #[test]
    fn links_and_devices_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("l");
        std::os::unix::fs::symlink("/dev/null", &link).unwrap();
        assert!(LogFile::open(&link, 10).is_err());
        assert!(LogFile::open(Path::new("/dev/null"), 10).is_err());
    }

    #[test]
    fn a_full_disk_drops_after_patience_and_never_a_half_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = LogFile::open(&path, 1024).unwrap();
        // /dev/full takes nothing, as a full disk does.
        log.file = File::options().write(true).open("/dev/full").unwrap();
        let t0 = Instant::now();
        log.write(Stream::Stdout, b"one\n", t0);
        assert_eq!(log.stalled(), Some(t0));
        log.reopen(t0).unwrap();
        assert!(log.stalled().is_none());
        assert!(std::fs::read_to_string(&path).unwrap().ends_with("stdout F one\n"));
        log.file = File::options().write(true).open("/dev/full").unwrap();
        while !log.is_full() {
            log.write(Stream::Stdout, &[b"x".repeat(1000), b"\n".to_vec()].concat(), t0);
        }
        log.flush(t0 + PATIENCE / 2);
        assert!(log.is_full());
        log.flush(t0 + PATIENCE * 2);
        assert!(!log.is_full() && log.dropped() > 0);
    }

    proptest! {
        #[test]
        fn nothing_is_lost(data in prop::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..500), limit in 1usize..40, cut in 1usize..50) {
            let mut s = Splitter::new(Stream::Stderr, limit);
            let mut out = Vec::new();
            for c in data.chunks(cut) {
                s.push(c, "T", &mut out);
            }
            s.end("T", &mut out);
            let mut back = Vec::new();
            let mut rest = &out[..];
            let prefix = b"T stderr F ".len();
            while !rest.is_empty() {
                let tag = rest[prefix - 2];
                let end = prefix + rest[prefix..].iter().position(|b| *b == b'\n').unwrap();
                prop_assert!(end - prefix <= limit);
                back.extend_from_slice(&rest[prefix..end]);
                if tag == b'F' {
                    back.push(b'\n');
                }
                rest = &rest[end + 1..];
            }
            prop_assert_eq!(back, data);
        }
    }
}
