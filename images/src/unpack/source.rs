//! From transferred bytes to tar bytes: hash, detect the compression, decompress on a second thread, hash again.

use std::io::{self, BufRead, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::{Buf, Bytes};
use tokio::sync::mpsc;

use super::slot::Slot;
use super::zstd_frames::Frames;
use crate::reference::Hasher;
use crate::{Algorithm, Digest};

/// Bytes per decompressed buffer.
const BUFFER: usize = 256 << 10;
/// Decompressed buffers per layer: one being filled, one queued, one being unpacked.
const BUFFERS: usize = 3;

/// A layer's transferred bytes, sent by the download task or by a file reader.
pub(crate) struct Stream {
    chunks: mpsc::Receiver<crate::Result<Bytes>>,
    current: Bytes,
    done: bool,
    /// Returned again by every later read, as the channel gives it once.
    failed: Option<crate::Error>,
}

impl Stream {
    /// A stream that fails unless the sender closes it by sending an empty chunk: a sender that vanishes was cancelled.
    pub fn new(chunks: mpsc::Receiver<crate::Result<Bytes>>) -> Stream {
        Stream { chunks, current: Bytes::new(), done: false, failed: None }
    }
}

impl Read for Stream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = self.fill_buf()?.len().min(out.len());
        self.current.copy_to_slice(&mut out[..n]);
        Ok(n)
    }
}

impl BufRead for Stream {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.current.is_empty() && !self.done {
            if self.failed.is_none() {
                match self.chunks.blocking_recv() {
                    Some(Ok(chunk)) => {
                        self.done = chunk.is_empty();
                        self.current = chunk;
                    }
                    Some(Err(e)) => self.failed = Some(e),
                    None => self.failed = Some(crate::Error::Cancelled),
                }
            }
            if let Some(e) = &self.failed {
                return Err(io::Error::other(e.clone()));
            }
        }
        Ok(&self.current)
    }

    fn consume(&mut self, n: usize) {
        self.current.advance(n);
    }
}

/// Hashes and counts what is read through it.
pub(crate) struct Hashed<R> {
    inner: R,
    hasher: Hasher,
    count: u64,
    copy: Option<std::fs::File>,
}

impl<R: BufRead> Hashed<R> {
    /// `copy` receives every byte as well.
    pub fn new(inner: R, algorithm: Algorithm, copy: Option<std::fs::File>) -> Self {
        Hashed { inner, hasher: algorithm.hasher(), count: 0, copy }
    }

    /// Reads what is left, unless `abandoned`, and gives the digest and length of everything.
    pub fn finish(mut self, abandoned: &AtomicBool) -> io::Result<(Digest, u64)> {
        loop {
            if abandoned.load(Ordering::Relaxed) {
                return Err(io::Error::other(crate::Error::Cancelled));
            }
            let n = self.fill_buf()?.len();
            if n == 0 {
                return Ok((self.hasher.finish(), self.count));
            }
            self.consume(n);
        }
    }
}

impl<R: BufRead> Read for Hashed<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let buf = self.fill_buf()?;
        let n = buf.len().min(out.len());
        out[..n].copy_from_slice(&buf[..n]);
        self.consume(n);
        Ok(n)
    }
}

impl<R: BufRead> BufRead for Hashed<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.inner.fill_buf()
    }

    fn consume(&mut self, n: usize) {
        // The reader returns the same bytes again until they are consumed, so this cannot fail or block.
        if let Ok(buf) = self.inner.fill_buf() {
            self.hasher.update(&buf[..n]);
            if let Some(copy) = &mut self.copy
                && io::Write::write_all(copy, &buf[..n]).is_err()
            {
                // A blob that could not be kept is dropped, the layer itself is not harmed: its length tells.
                self.copy = None;
            }
        }
        self.count += n as u64;
        self.inner.consume(n);
    }
}

/// Decompressed bytes from another thread.
pub(crate) struct Buffers {
    full: Receiver<io::Result<Vec<u8>>>,
    empty: SyncSender<Vec<u8>>,
    current: Vec<u8>,
    position: usize,
    done: bool,
}

impl Read for Buffers {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let buf = self.fill_buf()?;
        let n = buf.len().min(out.len());
        out[..n].copy_from_slice(&buf[..n]);
        self.consume(n);
        Ok(n)
    }
}

impl BufRead for Buffers {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.position == self.current.len() && !self.done {
            let old = std::mem::take(&mut self.current);
            if !old.is_empty() {
                // Full only when the other side is gone, which the next receive reports.
                let _ = self.empty.try_send(old);
            }
            self.position = 0;
            match self.full.recv() {
                Ok(Ok(buf)) => {
                    self.done = buf.is_empty();
                    self.current = buf;
                }
                Ok(Err(e)) => return Err(e),
                Err(_) => return Err(io::Error::other("the decompressor stopped")),
            }
        }
        Ok(&self.current[self.position..])
    }

    fn consume(&mut self, n: usize) {
        self.position += n;
    }
}

/// Decompresses `input` on a second thread while `use_it` reads the result on this one. Returns what `use_it` returned,
/// and digest and length of the whole input, also when decompressing or `use_it` failed, because a wrong digest explains
/// such failures better; unless `give_up` says of the result that the rest is not worth reading. Detects gzip and zstd by
/// their first bytes, as media types are often wrong. `algorithms` are for the input and for what is decompressed. `slot` is
/// given back while the stream waits for another.
pub(crate) fn decompress_while<R, T>(
    input: R,
    copy: Option<std::fs::File>,
    algorithms: (Algorithm, Algorithm),
    slot: Option<&mut Slot>,
    use_it: impl FnOnce(Hashed<Buffers>) -> T,
    give_up: impl FnOnce(&T) -> bool,
) -> (T, io::Result<(Digest, u64)>)
where
    R: BufRead + Send,
{
    let (full_tx, full) = sync_channel::<io::Result<Vec<u8>>>(1);
    let (empty, empty_rx) = sync_channel::<Vec<u8>>(BUFFERS);
    for _ in 0..BUFFERS {
        // The channel has room for all of them.
        let _ = empty.try_send(Vec::with_capacity(BUFFER));
    }
    let abandoned = AtomicBool::new(false);
    let flag = &abandoned;
    std::thread::scope(|scope| {
        let worker = scope.spawn(move || {
            let mut input = Hashed::new(input, algorithms.0, copy);
            if let Err(e) = pump(&mut input, slot, &full_tx, &empty_rx) {
                // The reader may have given up before.
                let _ = full_tx.send(Err(e));
            }
            drop(full_tx);
            input.finish(flag)
        });
        let buffers = Buffers { full, empty, current: Vec::new(), position: 0, done: false };
        let used = use_it(Hashed::new(buffers, algorithms.1, None));
        flag.store(give_up(&used), Ordering::Relaxed);
        let read = worker.join().unwrap_or_else(|_| Err(io::Error::other("the decompressor panicked")));
        (used, read)
    })
}

/// True when everything was passed on, false when the reader went away.
fn pump<R: BufRead>(
    input: &mut Hashed<R>,
    slot: Option<&mut Slot>,
    full: &SyncSender<io::Result<Vec<u8>>>,
    empty: &Receiver<Vec<u8>>,
) -> io::Result<bool> {
    let head = first_bytes(input)?;
    let chained = Read::chain(io::Cursor::new(head.clone()), &mut *input);
    if head.starts_with(&[0x1f, 0x8b]) {
        copy_out(flate2::bufread::MultiGzDecoder::new(chained), full, empty)
    } else if is_zstd(&head) {
        copy_out(Frames::new(chained, slot)?, full, empty)
    } else {
        copy_out(chained, full, empty)
    }
}

/// Up to four bytes; they are consumed from `input`.
fn first_bytes(input: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut head = Vec::with_capacity(4);
    input.take(4).read_to_end(&mut head)?;
    Ok(head)
}

/// A zstd frame, or a skippable frame, which estargz-like writers put first.
fn is_zstd(head: &[u8]) -> bool {
    head == [0x28, 0xb5, 0x2f, 0xfd]
        || (head.len() == 4 && head[0] & 0xf0 == 0x50 && head[1..] == [0x2a, 0x4d, 0x18])
}

fn copy_out(
    mut from: impl Read,
    full: &SyncSender<io::Result<Vec<u8>>>,
    empty: &Receiver<Vec<u8>>,
) -> io::Result<bool> {
    loop {
        let Ok(mut buf) = empty.recv() else { return Ok(false) };
        buf.resize(BUFFER, 0);
        let mut n = 0;
        while n < BUFFER {
            match from.read(&mut buf[n..]) {
                Ok(0) => break,
                Ok(got) => n += got,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            }
        }
        buf.truncate(n);
        if full.send(Ok(buf)).is_err() {
            return Ok(false);
        }
        if n == 0 {
            return Ok(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const BOTH: (Algorithm, Algorithm) = (Algorithm::Sha256, Algorithm::Sha256);

    fn through(input: &[u8]) -> (Vec<u8>, Digest, Digest) {
        let ((data, diff), read) = decompress_while(
            input,
            None,
            BOTH,
            None,
            |mut r| {
                let mut data = Vec::new();
                r.read_to_end(&mut data).unwrap();
                (data, r.finish(&AtomicBool::new(false)).unwrap().0)
            },
            |_| false,
        );
        (data, read.unwrap().0, diff)
    }

    #[test]
    fn every_compression_is_detected_and_both_digests_are_right() {
        let plain: Vec<u8> = (0..900_000u32).flat_map(|i| (i / 7).to_le_bytes()).collect();
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&plain).unwrap();
        let gz = gz.finish().unwrap();
        // Two members, as parallel compressors write them.
        let twice = [&gz[..], &gz[..]].concat();
        let zst = zstd::encode_all(&plain[..], 1).unwrap();
        // As zstd:chunked writes it: frames, with a table of contents and a footer in skippable ones.
        let skippable =
            |data: &[u8]| [&0x184d_2a50u32.to_le_bytes(), &(data.len() as u32).to_le_bytes(), data].concat();
        let chunked = [&zst[..], &zst, &skippable(b"table of contents"), &skippable(&[7; 64])].concat();
        for (input, want) in [
            (&plain[..], &plain[..]),
            (&gz, &plain),
            (&zst, &plain),
            (&twice, &[&plain[..], &plain].concat()),
            (&chunked, &[&plain[..], &plain].concat()),
        ] {
            let (data, outer, inner) = through(input);
            assert!(data == want);
            assert_eq!((outer, inner), (Digest::of(input), Digest::of(want)));
        }
        assert_eq!(through(b"").0, b"");
        assert_eq!(through(b"ab").0, b"ab");
    }

    #[test]
    fn a_reader_that_stops_early_does_not_hang() {
        let big = vec![7u8; 5 << 20];
        let ((), read) = decompress_while(&big[..], None, BOTH, None, drop, |_| true);
        // Whether the worker had read everything when it was told does not matter.
        drop(read);
    }

    #[test]
    fn damaged_gzip_is_an_error_and_the_input_still_has_its_digest() {
        let input = &b"\x1f\x8b\x08garbage"[..];
        let (used, read) = decompress_while(
            input,
            None,
            BOTH,
            None,
            |mut r| r.read_to_end(&mut Vec::new()).map(|_| ()),
            |_| false,
        );
        assert!(used.is_err());
        assert_eq!(read.unwrap().0, Digest::of(input));
    }
}
