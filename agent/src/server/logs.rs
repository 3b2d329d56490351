//! `/containerLogs`: reads CRI log files, follows them over rotations, and ends when the container has.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use jiff::Timestamp;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use super::{Body, Refusal, containers};
use crate::context::Context;
use crate::error::Error;
use crate::runtime::State;

/// How long a follower waits at the end of a file before it looks again.
const IDLE: Duration = Duration::from_millis(100);
/// Output is sent in pieces of about this size.
const CHUNK: usize = 32 * 1024;
/// Chunks on their way to a slow client: it holds the reader back, not the memory.
const QUEUE: usize = 4;

/// What the query asks for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    follow: bool,
    previous: bool,
    timestamps: bool,
    since: Option<Timestamp>,
    tail: Option<usize>,
    limit: Option<u64>,
    /// "Stdout" or "Stderr"; both when `None`.
    stream: Option<&'static str>,
}

impl Options {
    fn parse(query: &str, now: Timestamp) -> Result<Options, Refusal> {
        let mut o = Options::default();
        let truthy = |v: &str| matches!(v, "true" | "1" | "True");
        for (k, v) in url::form_urlencoded::parse(query.as_bytes()) {
            let bad = || Refusal::bad_request(format!("{k}: {v:?} is not valid"));
            match &*k {
                "follow" => o.follow = truthy(&v),
                "previous" => o.previous = truthy(&v),
                "timestamps" => o.timestamps = truthy(&v),
                "sinceSeconds" => {
                    let seconds: i64 = v.parse().map_err(|_| bad())?;
                    let since = now.checked_sub(jiff::SignedDuration::from_secs(seconds));
                    o.since = Some(since.map_err(|_| bad())?);
                }
                "sinceTime" => o.since = Some(v.parse().map_err(|_| bad())?),
                "tailLines" => o.tail = v.parse::<i64>().map_err(|_| bad())?.try_into().ok(),
                "limitBytes" => o.limit = Some(v.parse().map_err(|_| bad())?),
                "stream" => {
                    o.stream = match &*v {
                        "Stdout" => Some("stdout"),
                        "Stderr" => Some("stderr"),
                        "All" => None,
                        _ => return Err(bad()),
                    }
                }
                _ => {}
            }
        }
        Ok(o)
    }
}

/// One line of a CRI log: time, stream, whether the text goes on in the next line, text.
fn parse_line(line: &[u8]) -> Option<(&str, &str, bool, &[u8])> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let mut fields = line.splitn(4, |b| *b == b' ');
    let time = std::str::from_utf8(fields.next()?).ok()?;
    let stream = std::str::from_utf8(fields.next()?).ok()?;
    let tags = fields.next()?;
    let text = fields.next()?;
    Some((time, stream, tags.split(|b| *b == b':').next() == Some(b"P"), text))
}

/// Renders lines for the client.
struct Render {
    options: Options,
    /// The next text begins a line.
    at_start: bool,
    left: u64,
}

impl Render {
    fn new(options: Options) -> Render {
        let left = options.limit.unwrap_or(u64::MAX);
        Render { options, at_start: true, left }
    }

    /// Appends a line's text; false when the byte limit is reached.
    fn line(&mut self, line: &[u8], out: &mut BytesMut) -> bool {
        let Some((time, stream, partial, text)) = parse_line(line) else { return true };
        if self.options.stream.is_some_and(|s| s != stream) {
            return true;
        }
        if self.options.since.is_some_and(|since| time.parse::<Timestamp>().is_ok_and(|t| t < since)) {
            return true;
        }
        let mut put = |bytes: &[u8]| {
            let n = (bytes.len() as u64).min(self.left) as usize;
            out.extend_from_slice(&bytes[..n]);
            self.left -= n as u64;
        };
        if self.options.timestamps && self.at_start {
            put(time.as_bytes());
            put(b" ");
        }
        put(text);
        if !partial {
            put(b"\n");
        }
        self.at_start = !partial;
        self.left > 0
    }
}

/// The offset at which the last `lines` full lines begin.
fn tail_offset(file: &mut File, lines: usize) -> std::io::Result<u64> {
    let end = file.seek(SeekFrom::End(0))?;
    if lines == 0 {
        return Ok(end);
    }
    let mut block = vec![0u8; 64 * 1024];
    let (mut at, mut seen) = (end, 0usize);
    // The partial lines of one long line count as one, so full lines are looked for by their tag.
    let mut carry: Vec<u8> = Vec::new();
    let mut starts: Vec<u64> = Vec::new();
    while at > 0 {
        let n = (block.len() as u64).min(at);
        at -= n;
        file.seek(SeekFrom::Start(at))?;
        let piece = &mut block[..n as usize];
        file.read_exact(piece)?;
        let mut joined = piece.to_vec();
        joined.extend_from_slice(&carry);
        // Lines that begin in this block (but for the first, whose start may lie before it).
        starts.clear();
        starts.extend(joined.iter().enumerate().filter(|(_, b)| **b == b'\n').map(|(i, _)| i as u64 + 1));
        if at == 0 {
            starts.insert(0, 0);
        }
        for (i, start) in starts.iter().enumerate().rev() {
            let stop = starts.get(i + 1).copied().unwrap_or(joined.len() as u64);
            let line = &joined[*start as usize..stop as usize];
            if line.is_empty() {
                continue;
            }
            // A line ends where a full tag is: the one after it is the beginning of the next.
            if parse_line(line).is_none_or(|(_, _, partial, _)| !partial) {
                seen += 1;
                if seen > lines {
                    return Ok(at + stop);
                }
            }
        }
        let first = starts.first().copied().unwrap_or(joined.len() as u64);
        carry = joined[..first as usize].to_vec();
        if carry.len() > (1 << 20) {
            carry.clear();
        }
    }
    Ok(0)
}

/// Sends text on; the error is that the client has gone.
struct Out {
    send: tokio::sync::mpsc::Sender<Bytes>,
    buffer: BytesMut,
}

struct Gone;

impl Out {
    fn flush(&mut self) -> Result<(), Gone> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        self.send.blocking_send(self.buffer.split().freeze()).map_err(|_| Gone)
    }
}

/// Reads on a blocking thread: file reads would otherwise hold up other work.
fn read(
    path: &Path,
    mut file: File,
    options: Options,
    ended: impl Fn() -> bool,
    mut out: Out,
) -> Result<(), Gone> {
    let follow = options.follow;
    let mut render = Render::new(options);
    let mut reader = BufReader::with_capacity(CHUNK, file.try_clone().map_err(|_| Gone)?);
    let mut line = Vec::new();
    // Whether an end of file was seen after the container had ended: nothing can come any more.
    let mut last_look = false;
    loop {
        match reader.read_until(b'\n', &mut line) {
            Ok(0) => {}
            Ok(_) if line.ends_with(b"\n") => {
                let more = render.line(&line, &mut out.buffer);
                line.clear();
                if out.buffer.len() >= CHUNK {
                    out.flush()?;
                }
                if !more {
                    return out.flush();
                }
                continue;
            }
            // The writer is in the middle of a line: keep what is there, the rest follows.
            Ok(_) => {}
            Err(e) => {
                tracing::warn!(path = %path.display(), error = %e, "log cannot be read");
                return out.flush();
            }
        }
        out.flush()?;
        if !follow || out.send.is_closed() {
            return Ok(());
        }
        // At the end: a rotation moves the file away and a new one takes its name.
        let inode = |m: std::fs::Metadata| (m.dev(), m.ino());
        let here = file.metadata().map(inode).ok();
        if let Ok(current) = std::fs::metadata(path).map(inode)
            && here != Some(current)
            && line.is_empty()
            && let Ok(next) = File::open(path)
        {
            // What was written to the old file between our read and its renaming comes first.
            let mut rest = Vec::new();
            while reader.read_until(b'\n', &mut rest).is_ok_and(|n| n > 0) {
                render.line(&rest, &mut out.buffer);
                rest.clear();
            }
            file = next;
            let Ok(clone) = file.try_clone() else { return Err(Gone) };
            reader = BufReader::with_capacity(CHUNK, clone);
            continue;
        }
        if last_look {
            return Ok(());
        }
        if ended() {
            last_look = true;
            continue;
        }
        std::thread::sleep(IDLE);
    }
}

/// Answers a request for a container's log.
pub async fn serve(
    ctx: &Context,
    namespace: &str,
    pod_name: &str,
    name: &str,
    query: &str,
) -> Result<Response<Body>, Refusal> {
    let options = Options::parse(query, Timestamp::now())?;
    let pod = containers::pod(ctx, namespace, pod_name)?;
    let container = containers::container(ctx, &pod, name, options.previous)?;
    let path = PathBuf::from(&container.log_path);
    let mut file = File::open(&path).map_err(|e| {
        Refusal::not_found(format!(
            "the log of container \"{name}\" cannot be opened ({}): {e}",
            path.display()
        ))
    })?;
    let start = match options.tail {
        Some(n) => tail_offset(&mut file, n).map_err(|e| Refusal::internal(&e))?,
        None => 0,
    };
    file.seek(SeekFrom::Start(start)).map_err(|e| Refusal::internal(&e))?;
    let (send, receive) = tokio::sync::mpsc::channel(QUEUE);
    let (pods, uid) = (ctx.pods.clone(), pod.metadata.uid.clone().unwrap_or_default());
    let stop = ctx.tasks.stop_token();
    let ended = move || {
        let running = pods
            .observed(&uid)
            .is_some_and(|o| o.containers.iter().any(|c| c.id == container.id && c.state == State::Running));
        !running || stop.is_cancelled()
    };
    let out = Out { send, buffer: BytesMut::with_capacity(CHUNK) };
    let reading = tokio::task::spawn_blocking(move || drop(read(&path, file, options, ended, out)));
    ctx.tasks.spawn(async move {
        if let Err(e) = reading.await {
            tracing::warn!(error = %e, "log reader failed");
        }
    });
    let frames = ReceiverStream::new(receive).map(|b| Ok::<_, Error>(Frame::data(b)));
    let mut response = Response::new(BodyExt::boxed(StreamBody::new(frames)));
    *response.status_mut() = StatusCode::OK;
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("text/plain"));
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const LOG: &str = "2026-01-01T00:00:00.000000000Z stdout F one\n2026-01-01T00:00:01.000000000Z stderr P tw\n2026-01-01T00:00:01.500000000Z stderr F o\n2026-01-01T00:00:02.000000000Z stdout F three\n";

    fn show(query: &str) -> String {
        let o = Options::parse(query, "2026-01-01T00:00:03Z".parse().unwrap()).ok().unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(LOG.as_bytes()).unwrap();
        let path = file.path().to_owned();
        let mut f = File::open(&path).unwrap();
        let at = o.tail.map(|n| tail_offset(&mut f, n).unwrap()).unwrap_or(0);
        f.seek(SeekFrom::Start(at)).unwrap();
        let (send, mut receive) = tokio::sync::mpsc::channel(64);
        let out = Out { send, buffer: BytesMut::new() };
        read(&path, f, o, || true, out).ok().unwrap();
        let mut all = Vec::new();
        while let Ok(b) = receive.try_recv() {
            all.extend_from_slice(&b);
        }
        String::from_utf8(all).unwrap()
    }

    #[test]
    fn options_shape_the_text() {
        for (query, want) in [
            ("", "one\ntwo\nthree\n"),
            ("tailLines=1", "three\n"),
            ("tailLines=2", "two\nthree\n"),
            ("tailLines=0", ""),
            ("tailLines=9", "one\ntwo\nthree\n"),
            ("sinceSeconds=2", "two\nthree\n"),
            ("sinceTime=2026-01-01T00:00:02Z", "three\n"),
            ("limitBytes=5", "one\nt"),
            ("stream=Stderr", "two\n"),
            ("follow=true", "one\ntwo\nthree\n"),
            ("timestamps=true&tailLines=1", "2026-01-01T00:00:02.000000000Z three\n"),
        ] {
            assert_eq!(show(query), want, "{query}");
        }
    }

    #[test]
    fn a_follower_goes_on_in_the_new_file_after_a_rotation() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let line = |n: usize| format!("2026-01-01T00:00:00Z stdout F {n}\n");
        std::fs::write(&path, line(0)).unwrap();
        let (send, mut receive) = tokio::sync::mpsc::channel(64);
        let out = Out { send, buffer: BytesMut::new() };
        let options = Options { follow: true, ..Default::default() };
        let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (flag, p) = (done.clone(), path.clone());
        let reader = std::thread::spawn(move || {
            let ended = || flag.load(std::sync::atomic::Ordering::SeqCst);
            read(&p, File::open(&p).unwrap(), options, ended, out).is_ok()
        });
        assert_eq!(receive.blocking_recv().unwrap(), "0\n");
        let mut old = File::options().append(true).open(&path).unwrap();
        std::fs::rename(&path, dir.path().join("0.log.1")).unwrap();
        old.write_all(line(1).as_bytes()).unwrap();
        std::fs::write(&path, line(2)).unwrap();
        let mut rest = String::new();
        while rest.len() < 4 {
            rest.push_str(std::str::from_utf8(&receive.blocking_recv().unwrap()).unwrap());
        }
        assert_eq!(rest, "1\n2\n");
        done.store(true, std::sync::atomic::Ordering::SeqCst);
        assert!(reader.join().unwrap());
    }

    proptest::proptest! {
        #[test]
        fn any_line_is_read_without_a_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let mut out = BytesMut::new();
            Render::new(Options::default()).line(&bytes, &mut out);
        }
    }
}
