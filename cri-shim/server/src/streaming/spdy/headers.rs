//! Header blocks: name-value pairs through one zlib stream per direction, primed with SPDY's dictionary (SPDY/3, 2.6.10).

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};

use super::frame::Error;

/// Published with the specification.
const DICTIONARY: &[u8] = include_bytes!("dictionary.bin");
/// Most bytes of one inflated block: a few short headers are all there ever is.
const MAX_BLOCK: usize = 64 << 10;
/// Most pairs of one block.
const MAX_PAIRS: u32 = 128;

/// Name-value pairs in the order sent. Names are lower case.
pub(crate) type Headers = Vec<(String, String)>;

pub(super) struct Inflater(Decompress);

impl Default for Inflater {
    fn default() -> Self {
        Inflater(Decompress::new(true))
    }
}

impl Inflater {
    /// Blocks must be given in the order in which they arrived.
    pub fn block(&mut self, mut input: &[u8]) -> Result<Headers, Error> {
        let mut plain = Vec::new();
        let mut chunk = [0u8; 4096];
        loop {
            let (before_in, before_out) = (self.0.total_in(), self.0.total_out());
            let status = self.0.decompress(input, &mut chunk, FlushDecompress::Sync);
            let taken = (self.0.total_in() - before_in) as usize;
            let made = (self.0.total_out() - before_out) as usize;
            input = input.get(taken..).unwrap_or_default();
            plain.extend_from_slice(chunk.get(..made).unwrap_or_default());
            if plain.len() > MAX_BLOCK {
                return Err(Error::Headers("the block is too large"));
            }
            match status {
                Ok(_) if made == chunk.len() => {}
                Ok(_) if input.is_empty() => break,
                Ok(_) if taken == 0 && made == 0 => return Err(Error::Headers("the block does not inflate")),
                Ok(_) => {}
                Err(e) if e.needs_dictionary().is_some() => {
                    self.0
                        .set_dictionary(DICTIONARY)
                        .map_err(|_| Error::Headers("another dictionary is wanted"))?;
                }
                Err(_) => return Err(Error::Headers("the block does not inflate")),
            }
        }
        parse(&plain)
    }
}

fn take<'a>(from: &mut &'a [u8], n: usize) -> Result<&'a [u8], Error> {
    let (head, rest) = from.split_at_checked(n).ok_or(Error::Headers("the block is cut short"))?;
    *from = rest;
    Ok(head)
}

fn number(from: &mut &[u8]) -> Result<u32, Error> {
    let (head, rest) = from.split_first_chunk::<4>().ok_or(Error::Headers("the block is cut short"))?;
    *from = rest;
    Ok(u32::from_be_bytes(*head))
}

fn text(from: &mut &[u8]) -> Result<String, Error> {
    let n = number(from)? as usize;
    String::from_utf8(take(from, n)?.to_vec()).map_err(|_| Error::Headers("a header is not UTF-8"))
}

fn parse(mut plain: &[u8]) -> Result<Headers, Error> {
    let pairs = number(&mut plain)?;
    if pairs > MAX_PAIRS {
        return Err(Error::Headers("too many headers"));
    }
    let mut out = Headers::new();
    for _ in 0..pairs {
        let name = text(&mut plain)?.to_ascii_lowercase();
        out.push((name, text(&mut plain)?));
    }
    Ok(out)
}

pub(super) struct Deflater(Compress);

impl Deflater {
    pub fn new() -> Result<Deflater, Error> {
        let mut c = Compress::new(Compression::fast(), true);
        c.set_dictionary(DICTIONARY).map_err(|_| Error::Headers("the dictionary was refused"))?;
        Ok(Deflater(c))
    }

    pub fn block(&mut self, headers: &[(String, String)]) -> Result<Vec<u8>, Error> {
        let mut plain = Vec::new();
        let put = |plain: &mut Vec<u8>, text: &str| {
            plain.extend_from_slice(&(text.len() as u32).to_be_bytes());
            plain.extend_from_slice(text.as_bytes());
        };
        plain.extend_from_slice(&(headers.len() as u32).to_be_bytes());
        for (name, value) in headers {
            put(&mut plain, name);
            put(&mut plain, value);
        }
        let mut out = Vec::with_capacity(plain.len() + 64);
        let mut input = plain.as_slice();
        loop {
            let before = self.0.total_in();
            out.reserve(256);
            self.0
                .compress_vec(input, &mut out, FlushCompress::Sync)
                .map_err(|_| Error::Headers("the block does not deflate"))?;
            input = &input[(self.0.total_in() - before) as usize..];
            // With room left in the output, all there was to flush is flushed.
            if input.is_empty() && out.len() < out.capacity() {
                return Ok(out);
            }
        }
    }
}
