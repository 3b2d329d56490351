//! zstd (RFC 8878) with its memory in hand: a frame says in its header how much of what it gave it refers back to, and that
//! much is kept.

use std::io::{self, BufRead, Read};

use tokio::sync::{Mutex, MutexGuard};
use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};
use zstd::zstd_safe::DParameter;

use super::Slot;

/// Larger windows are refused: what `zstd --long` makes, and the most that zstd itself reads without being told to.
const MAX_WINDOW_LOG: u32 = 27;
/// Windows up to here are for every reader to support, and what all but `zstd --ultra` and `--long` make.
const COMMON_WINDOW: u64 = 8 << 20;
/// Magic number, descriptor, window, dictionary id, content size.
const LONGEST_HEADER: usize = 18;

/// Held while a frame with a larger window than the common one is read: one stream at a time has that much memory,
/// however many layers are unpacked. Whoever waits here holds nothing that others wait for: a slow layer must not stop
/// those that are compressed in another way.
static LARGE_WINDOW: Mutex<()> = Mutex::const_new(());

/// Decompresses frame after frame.
pub(crate) struct Frames<'s, R> {
    input: Ahead<R>,
    decoder: Decoder<'static>,
    in_frame: bool,
    large: Option<MutexGuard<'static, ()>>,
    slot: Option<&'s mut Slot>,
}

impl<'s, R: BufRead> Frames<'s, R> {
    /// `slot` is what the stream is unpacked with, if anything.
    pub fn new(input: R, slot: Option<&'s mut Slot>) -> io::Result<Frames<'s, R>> {
        Ok(Frames { input: Ahead::new(input), decoder: decoder()?, in_frame: false, large: None, slot })
    }

    /// Looks at the header of the next frame; `false` when there is none.
    fn begin(&mut self) -> io::Result<bool> {
        let head = self.input.peek(LONGEST_HEADER)?;
        if head.is_empty() {
            return Ok(false);
        }
        let window = window(head);
        if window > 1 << MAX_WINDOW_LOG {
            return Err(io::Error::other(format!(
                "it was compressed with a zstd window of {} MiB, {} are taken at most; compress it again without --long, or with --long={MAX_WINDOW_LOG}",
                window.div_ceil(1 << 20),
                1 << (MAX_WINDOW_LOG - 20),
            )));
        }
        if window > COMMON_WINDOW && self.large.is_none() {
            self.large = Some(match &mut self.slot {
                Some(slot) => slot.wait_for(&LARGE_WINDOW)?,
                None => LARGE_WINDOW.blocking_lock(),
            });
        } else if window <= COMMON_WINDOW && self.large.is_some() {
            // The old one has kept its memory.
            self.decoder = decoder()?;
            self.large = None;
        }
        self.in_frame = true;
        Ok(true)
    }
}

fn decoder() -> io::Result<Decoder<'static>> {
    let mut decoder = Decoder::new()?;
    decoder.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG))?;
    Ok(decoder)
}

impl<R: BufRead> Read for Frames<'_, R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        loop {
            if !self.in_frame && !self.begin()? {
                return Ok(0);
            }
            let from = self.input.fill_buf()?;
            let at_end = from.is_empty();
            let (mut input, mut output) = (InBuffer::around(from), OutBuffer::around(&mut *out));
            let wanted = self.decoder.run(&mut input, &mut output)?;
            let (read, written) = (input.pos(), output.pos());
            self.input.consume(read);
            if wanted == 0 {
                self.in_frame = false;
                self.decoder.reinit()?;
            }
            if written > 0 {
                return Ok(written);
            }
            if at_end && self.in_frame {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the zstd stream is cut off"));
            }
        }
    }
}

/// Bytes of output that a frame with this header refers back to; 0 for what is no frame of data. Pure.
fn window(head: &[u8]) -> u64 {
    let Some((&descriptor, rest)) =
        head.strip_prefix(&[0x28, 0xb5, 0x2f, 0xfd]).and_then(<[u8]>::split_first)
    else {
        return 0;
    };
    let single_segment = descriptor & 0x20 != 0;
    if !single_segment {
        let byte = u64::from(rest.first().copied().unwrap_or(0));
        let base = 1u64 << (10 + (byte >> 3));
        return base + base / 8 * (byte & 7);
    }
    // The window is the whole content, whose size comes after the dictionary's id.
    let id = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let length = [1, 2, 4, 8][usize::from(descriptor >> 6)];
    let bytes = rest.get(id..id + length).unwrap_or(&[]);
    let size = bytes.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
    if length == 2 { size + 256 } else { size }
}

/// A reader of which some bytes can be seen before they are read.
struct Ahead<R> {
    seen: Vec<u8>,
    position: usize,
    inner: R,
}

impl<R: BufRead> Ahead<R> {
    fn new(inner: R) -> Ahead<R> {
        Ahead { seen: Vec::with_capacity(LONGEST_HEADER), position: 0, inner }
    }

    /// The next `n` bytes, fewer only at the end.
    fn peek(&mut self, n: usize) -> io::Result<&[u8]> {
        self.seen.drain(..self.position);
        self.position = 0;
        let missing = n.saturating_sub(self.seen.len()) as u64;
        (&mut self.inner).take(missing).read_to_end(&mut self.seen)?;
        Ok(&self.seen)
    }

    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.position < self.seen.len() {
            return Ok(&self.seen[self.position..]);
        }
        self.inner.fill_buf()
    }

    fn consume(&mut self, n: usize) {
        if self.position < self.seen.len() {
            self.position += n;
        } else {
            self.inner.consume(n);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use tokio_util::sync::CancellationToken;
    use zstd::zstd_safe::CParameter;

    use super::*;
    use crate::unpack::Slots;

    fn compress(data: &[u8], window_log: u32, level: i32) -> Vec<u8> {
        let mut out = zstd::Encoder::new(Vec::new(), level).unwrap();
        out.set_parameter(CParameter::WindowLog(window_log)).unwrap();
        out.write_all(data).unwrap();
        out.finish().unwrap()
    }

    fn read(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        // A buffer that is smaller than a header.
        Frames::new(io::BufReader::with_capacity(7, bytes), None)?.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn windows_by_header() {
        let data: Vec<u8> = (0..200_000u32).flat_map(|i| (i / 3).to_le_bytes()).collect();
        for log in [10, 17, 23, 27, 30] {
            assert_eq!(window(&compress(&data, log, 1)), 1 << log);
        }
        // Made in one go these say how long they are instead.
        for len in [0usize, 10, 255, 256, 65_791, 65_792, 300_000] {
            let made = zstd::bulk::compress(&data[..len], 1).unwrap();
            assert!(window(&made) >= len as u64 && window(&made) <= (len as u64).max(1 << 20), "{len}");
        }
        assert_eq!(window(b"\x50\x2a\x4d\x18\x04\x00\x00\x00"), 0);
        assert_eq!(window(b""), 0);
    }

    #[test]
    fn frames_one_after_the_other() {
        let data: Vec<u8> = (0..900_000u32).flat_map(|i| (i / 7).to_le_bytes()).collect();
        let skippable =
            |data: &[u8]| [&0x184d_2a50u32.to_le_bytes(), &(data.len() as u32).to_le_bytes(), data].concat();
        let (small, large) = (compress(&data, 20, 3), compress(&data, 27, 1));
        let all = [&skippable(b"first")[..], &small, &large, &small, &skippable(&[7; 64])].concat();
        assert!(read(&all).unwrap() == data.repeat(3));
        assert_eq!(read(b"").unwrap(), b"");
        let cut = read(&all[..all.len() - 80]).unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
        assert!(read(&[&small[..], b"garbage"].concat()).is_err());
    }

    #[test]
    fn a_window_that_is_too_large_is_named() {
        let said = read(&compress(&[1; 1000], 30, 1)).unwrap_err().to_string();
        assert!(said.contains("a zstd window of 1024 MiB, 128 are taken at most"), "{said}");
    }

    #[test]
    fn one_large_window_at_a_time() {
        let data = vec![5; 300_000];
        let large = compress(&data, 27, 1);
        let mut first = Frames::new(&large[..], None).unwrap();
        first.read_exact(&mut [0; 10]).unwrap();
        assert!(LARGE_WINDOW.try_lock().is_err());
        // One with the common window does not wait.
        assert_eq!(read(&compress(&data, 20, 1)).unwrap(), data);
        std::thread::scope(|scope| {
            let second = scope.spawn(|| read(&large).unwrap());
            drop(first);
            assert_eq!(second.join().unwrap(), data);
        });
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_waits_for_a_large_window_has_no_slot() {
        let data = vec![5; 300_000];
        let large: Arc<[u8]> = compress(&data, 27, 1).into();
        let with_slot = |mut slot: Slot| {
            let large = large.clone();
            tokio::task::spawn_blocking(move || {
                let mut out = Vec::new();
                Frames::new(&large[..], Some(&mut slot))?.read_to_end(&mut out)?;
                Ok::<_, io::Error>((out, slot))
            })
        };
        let slow = {
            let large = large.clone();
            let read = move || {
                let mut slow = Frames::new(std::io::Cursor::new(large), None)?;
                slow.read_exact(&mut [0; 10])?;
                Ok::<_, io::Error>(slow)
            };
            tokio::task::spawn_blocking(read).await.unwrap().unwrap()
        };
        let slots = Slots::new(1);
        let pull = slots.pull();
        let stop = CancellationToken::new();
        let waiting = with_slot(Slot::take(&slots, pull, CancellationToken::new()).await.unwrap());
        // The only slot, which comes back by waiting alone.
        let given_up = with_slot(Slot::take(&slots, pull, stop.clone()).await.unwrap());
        let other = Slot::take(&slots, pull, CancellationToken::new()).await.unwrap();
        stop.cancel();
        assert!(given_up.await.unwrap().is_err());
        drop(slow);
        assert_eq!(slots.taken(), 1);
        drop(other);
        let (out, slot) = waiting.await.unwrap().unwrap();
        assert!(out == data);
        assert_eq!(slots.taken(), 1);
        drop(slot);
        assert_eq!(slots.taken(), 0);
    }
}
