//! Reads tar streams: ustar, GNU long names and sparse files, PAX with binary extended attributes and all three of its
//! sparse formats. Not the `tar` crate's reader, because that splits PAX records at line feeds, which loses file
//! capabilities and other binary values.

use std::io::BufRead;

use tar::Header;

use super::Error;

const BLOCK: u64 = 512;
/// The most bytes of one long name or PAX header; real ones are below 100 KiB.
const MAX_META: u64 = 1 << 20;
/// The longest target of a link, as in the kernel (PATH_MAX with its end mark).
const MAX_LINK: usize = 4095;
/// The longest value and name of an extended attribute, as in the kernel (XATTR_SIZE_MAX, XATTR_NAME_MAX).
const MAX_XATTR: usize = 1 << 16;
const MAX_XATTR_NAME: usize = 255;
/// The most bytes of one entry's extended attributes. File systems hold less than their names alone may have.
const MAX_XATTRS: usize = 1 << 20;
/// The most extended attributes of one entry. Real ones are below ten.
const MAX_XATTR_COUNT: usize = 1000;
/// The most pieces of a sparse file that are kept in memory (16 bytes each).
const MAX_PIECES: usize = 1 << 16;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Dir,
    Symlink,
    HardLink,
    Char,
    Block,
    Fifo,
    /// Nothing to create (volume labels and the like).
    Other,
}

/// One entry; its data follows in the reader.
#[derive(Debug)]
pub(crate) struct Entry {
    pub kind: Kind,
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds and nanoseconds since the epoch.
    pub mtime: (i64, u32),
    /// Bytes of the file, holes included.
    pub size: u64,
    pub device: (u32, u32),
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Offset and length of the pieces that the stream holds, for sparse files.
    pub pieces: Option<Vec<(u64, u64)>>,
}

/// What PAX records and GNU long-name entries say about the next entry.
#[derive(Default)]
struct Overrides {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse_name: Option<Vec<u8>>,
    sparse_size: Option<u64>,
    sparse_major: Option<u64>,
    sparse_minor: Option<u64>,
    pieces: Vec<(u64, u64)>,
    piece_offset: Option<u64>,
}

/// Walks the entries of a tar stream.
pub(crate) struct TarReader<R> {
    inner: R,
    offset: u64,
    /// Data bytes of the current entry that have not been read.
    left: u64,
    padding: u64,
}

impl<R: BufRead> TarReader<R> {
    pub fn new(inner: R) -> Self {
        TarReader { inner, offset: 0, left: 0, padding: 0 }
    }

    /// Where the current entry's data starts in the stream, and how much of it there is.
    pub fn data_position(&self) -> (u64, u64) {
        (self.offset, self.left)
    }

    /// The stream, for what follows the archive's end mark.
    pub fn into_inner(self) -> R {
        self.inner
    }

    fn bad(&self, why: &'static str) -> Error {
        Error::Tar { offset: self.offset, why }
    }

    /// The next piece of the current entry's data, empty at its end. At most `max` bytes.
    pub fn data(&mut self, max: u64) -> Result<&[u8], Error> {
        if self.left == 0 || max == 0 {
            return Ok(&[]);
        }
        let limit = self.left.min(max);
        let offset = self.offset;
        let buf = fill(&mut self.inner)?;
        if buf.is_empty() {
            return Err(Error::Tar { offset, why: "it ends in the middle of a file" });
        }
        let n = (buf.len() as u64).min(limit) as usize;
        Ok(&buf[..n])
    }

    /// Marks `n` bytes of what [`data`](Self::data) returned as read.
    pub fn consume(&mut self, n: usize) {
        self.inner.consume(n);
        self.left -= n as u64;
        self.offset += n as u64;
    }

    fn skip(&mut self, mut n: u64) -> Result<(), Error> {
        while n > 0 {
            let got = fill(&mut self.inner)?.len() as u64;
            if got == 0 {
                return Err(self.bad("it ends in the middle of a file"));
            }
            let step = got.min(n);
            self.inner.consume(step as usize);
            self.offset += step;
            n -= step;
        }
        Ok(())
    }

    /// False at a clean end of the stream.
    fn read_block(&mut self, block: &mut [u8; BLOCK as usize]) -> Result<bool, Error> {
        let mut filled = 0;
        while filled < block.len() {
            let buf = fill(&mut self.inner)?;
            if buf.is_empty() {
                if filled == 0 {
                    return Ok(false);
                }
                return Err(self.bad("it ends in the middle of a header"));
            }
            let n = buf.len().min(block.len() - filled);
            block[filled..filled + n].copy_from_slice(&buf[..n]);
            self.inner.consume(n);
            filled += n;
        }
        self.offset += BLOCK;
        Ok(true)
    }

    /// Reads the current entry's whole data, which must be small.
    pub fn read_all(&mut self, limit: u64) -> Result<Vec<u8>, Error> {
        if self.left > limit {
            return Err(self.bad("an entry that must be small is too large"));
        }
        let mut out = Vec::with_capacity(self.left as usize);
        while self.left > 0 {
            let piece = self.data(u64::MAX)?;
            let n = piece.len();
            out.extend_from_slice(piece);
            self.consume(n);
        }
        Ok(out)
    }

    /// Goes to the next entry, skipping what was not read of the current one. `None` at the end.
    pub fn next(&mut self) -> Result<Option<Entry>, Error> {
        let mut over = Overrides::default();
        let mut block = [0u8; BLOCK as usize];
        loop {
            let rest = self.left + self.padding;
            self.skip(rest)?;
            (self.left, self.padding) = (0, 0);
            if !self.read_block(&mut block)? {
                return Ok(None);
            }
            if block.iter().all(|&b| b == 0) {
                return Ok(None);
            }
            let header = Header::from_byte_slice(&block);
            self.check_sum(&block)?;
            let size = number(&block[124..136]).ok_or_else(|| self.bad("a size is not a number"))?;
            self.set_data(size)?;
            let kind = header.entry_type();
            if kind.is_gnu_longname() {
                over.path = Some(until_nul(self.read_all(MAX_META)?));
            } else if kind.is_gnu_longlink() {
                over.link = Some(until_nul(self.read_all(MAX_META)?));
            } else if kind.is_pax_local_extensions() {
                let text = self.read_all(MAX_META)?;
                over.parse_pax(&text).map_err(|why| self.bad(why))?;
            } else if kind.is_pax_global_extensions() {
                // Comments such as git's commit id; none of the keys that matter is ever global.
            } else {
                return self.finish(header, over, size).map(Some);
            }
        }
    }

    fn set_data(&mut self, size: u64) -> Result<(), Error> {
        // Leaves room for the padding and for offsets.
        if size > i64::MAX as u64 / 2 {
            return Err(self.bad("a size is out of range"));
        }
        self.left = size;
        self.padding = size.wrapping_neg() % BLOCK;
        Ok(())
    }

    fn check_sum(&self, block: &[u8; BLOCK as usize]) -> Result<(), Error> {
        let want = number(&block[148..156]).ok_or_else(|| self.bad("a header's checksum is not a number"))?;
        let rest = || block[..148].iter().chain(&block[156..]);
        let unsigned = rest().map(|&b| u64::from(b)).sum::<u64>() + 8 * 32;
        // Some old writers summed signed bytes.
        let signed = rest().map(|&b| i64::from(b as i8)).sum::<i64>() + 8 * 32;
        if want == unsigned || i64::try_from(want) == Ok(signed) {
            return Ok(());
        }
        Err(self.bad("a header's checksum is wrong"))
    }

    fn finish(&mut self, header: &Header, mut over: Overrides, size: u64) -> Result<Entry, Error> {
        use tar::EntryType as T;
        let block = header.as_bytes();
        let field = |range: std::ops::Range<usize>| number(&block[range]);
        let mut kind = match header.entry_type() {
            T::Regular | T::Continuous | T::GNUSparse => Kind::File,
            T::Directory => Kind::Dir,
            T::Symlink => Kind::Symlink,
            T::Link => Kind::HardLink,
            T::Char => Kind::Char,
            T::Block => Kind::Block,
            T::Fifo => Kind::Fifo,
            _ => Kind::Other,
        };
        let stored = match over.size {
            // Links and folders have no data whatever the size field says.
            Some(s) => s,
            None => size,
        };
        self.set_data(if matches!(kind, Kind::File | Kind::Other) { stored } else { 0 })?;
        let path = over.path.take().unwrap_or_else(|| header.path_bytes().into_owned());
        // Old writers mark folders by a slash alone.
        if kind == Kind::File && path.ends_with(b"/") && self.left == 0 {
            kind = Kind::Dir;
        }
        let id = |pax: Option<u64>, range, what| {
            // The last one means "leave it" to the kernel.
            let id = pax.or_else(|| field(range)).and_then(|id| u32::try_from(id).ok());
            id.filter(|id| *id != u32::MAX).ok_or_else(|| self.bad(what))
        };
        let mut entry = Entry {
            kind,
            uid: id(over.uid, 108..116, "a uid is out of range")?,
            gid: id(over.gid, 116..124, "a gid is out of range")?,
            mode: (field(100..108).ok_or_else(|| self.bad("a mode is not a number"))? & 0o7777) as u32,
            mtime: over.mtime.unwrap_or_else(|| (signed(&block[136..148]).unwrap_or(0), 0)),
            link: over
                .link
                .take()
                .or_else(|| header.link_name_bytes().map(|l| l.into_owned()))
                .unwrap_or_default(),
            device: match kind {
                Kind::Char | Kind::Block => {
                    let n = |r| {
                        field(r)
                            .and_then(|v| u32::try_from(v).ok())
                            .ok_or_else(|| self.bad("a device number is out of range"))
                    };
                    (n(329..337)?, n(337..345)?)
                }
                _ => (0, 0),
            },
            size: self.left,
            xattrs: std::mem::take(&mut over.xattrs),
            pieces: None,
            path,
        };
        if entry.link.len() > MAX_LINK {
            return Err(self.bad("a link's target is longer than 4095 bytes"));
        }
        if header.entry_type() == T::GNUSparse {
            self.gnu_sparse(header, &mut entry)?;
        } else if kind == Kind::File {
            self.pax_sparse(over, &mut entry)?;
        }
        Ok(entry)
    }

    /// The old GNU format: four pieces in the header, more in blocks that follow it.
    fn gnu_sparse(&mut self, header: &Header, entry: &mut Entry) -> Result<(), Error> {
        let gnu = header.as_gnu().ok_or_else(|| self.bad("a sparse file without a GNU header"))?;
        let mut pieces = Vec::new();
        let mut push = |s: &tar::GnuSparseHeader| -> Option<()> {
            if !s.is_empty() {
                pieces.push((s.offset().ok()?, s.length().ok()?));
            }
            Some(())
        };
        for s in &gnu.sparse {
            push(s).ok_or(Error::Tar { offset: self.offset, why: "a sparse map is not numbers" })?;
        }
        let mut more = gnu.is_extended();
        let mut ext = tar::GnuExtSparseHeader::new();
        let mut blocks = 0;
        while more {
            blocks += 1;
            let mut block = [0u8; BLOCK as usize];
            if blocks > MAX_PIECES / 21 || !self.read_block(&mut block)? {
                return Err(self.bad("a sparse map is cut off or too long"));
            }
            ext.as_mut_bytes().copy_from_slice(&block);
            for s in ext.sparse() {
                push(s).ok_or(Error::Tar { offset: self.offset, why: "a sparse map is not numbers" })?;
            }
            more = ext.is_extended();
        }
        entry.size = gnu.real_size().map_err(|_| self.bad("a sparse file's size is not a number"))?;
        self.set_pieces(entry, pieces)
    }

    /// PAX formats 0.0 and 0.1 (the map in the records) and 1.0 (the map before the data).
    fn pax_sparse(&mut self, over: Overrides, entry: &mut Entry) -> Result<(), Error> {
        let Some(size) = over.sparse_size else { return Ok(()) };
        if let Some(name) = over.sparse_name {
            entry.path = name;
        }
        let pieces = match (over.sparse_major, over.sparse_minor) {
            (Some(1), Some(0)) => {
                let count = self.map_number()?;
                if count > MAX_PIECES as u64 {
                    return Err(self.bad("a sparse map is too long"));
                }
                let mut pieces = Vec::with_capacity(count as usize);
                for _ in 0..count {
                    pieces.push((self.map_number()?, self.map_number()?));
                }
                // The map is padded to a whole block; data is block-aligned, so the rest follows from the offset.
                let pad = self.offset.wrapping_neg() % BLOCK;
                if pad > self.left {
                    return Err(self.bad("a sparse map is cut off"));
                }
                self.left -= pad;
                self.skip(pad)?;
                pieces
            }
            _ => over.pieces,
        };
        entry.size = size;
        self.set_pieces(entry, pieces)
    }

    fn map_number(&mut self) -> Result<u64, Error> {
        let mut value = 0u64;
        for _ in 0..20 {
            let Some(&byte) = self.data(1)?.first() else {
                return Err(self.bad("a sparse map is cut off"));
            };
            self.consume(1);
            match byte {
                b'\n' => return Ok(value),
                b'0'..=b'9' => {
                    value = value
                        .checked_mul(10)
                        .and_then(|v| v.checked_add(u64::from(byte - b'0')))
                        .ok_or_else(|| self.bad("a sparse map's number is out of range"))?;
                }
                _ => break,
            }
        }
        Err(self.bad("a sparse map is not numbers"))
    }

    fn set_pieces(&self, entry: &mut Entry, pieces: Vec<(u64, u64)>) -> Result<(), Error> {
        let mut end = 0u64;
        let mut total = 0u64;
        for &(offset, len) in &pieces {
            let stop = offset.checked_add(len).filter(|&s| offset >= end && s <= entry.size);
            end = stop.ok_or_else(|| self.bad("a sparse map's pieces overlap or leave the file"))?;
            total += len;
        }
        if total != self.left {
            return Err(self.bad("a sparse map does not match the data"));
        }
        entry.pieces = Some(pieces);
        Ok(())
    }
}

fn fill<R: BufRead>(inner: &mut R) -> Result<&[u8], Error> {
    // A second call right after the loop's returns the same buffer without reading.
    loop {
        match inner.fill_buf() {
            Ok(_) => break,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Error::Read(e)),
        }
    }
    inner.fill_buf().map_err(Error::Read)
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(n) = bytes.iter().position(|&b| b == 0) {
        bytes.truncate(n);
    }
    bytes
}

/// An octal or base-256 field; blank is zero.
fn number(field: &[u8]) -> Option<u64> {
    if field[0] & 0x80 != 0 {
        return u64::try_from(signed(field)?).ok();
    }
    let text = field.split(|&b| b == 0).next().unwrap_or_default().trim_ascii();
    if text.is_empty() {
        return Some(0);
    }
    text.iter().try_fold(0u64, |v, &b| match b {
        b'0'..=b'7' => v.checked_mul(8)?.checked_add(u64::from(b - b'0')),
        _ => None,
    })
}

/// Like [`number`], but base-256 may be negative (times before 1970).
fn signed(field: &[u8]) -> Option<i64> {
    if field[0] & 0x80 == 0 {
        return number(field).and_then(|n| i64::try_from(n).ok());
    }
    let negative = field[0] & 0x40 != 0;
    let mut value = if negative { -1i128 } else { 0 };
    for (i, &b) in field.iter().enumerate() {
        let b = if i == 0 && !negative { b & 0x7f } else { b };
        value = (value << 8) | i128::from(b);
        if value > i128::from(i64::MAX) || value < i128::from(i64::MIN) {
            return None;
        }
    }
    i64::try_from(value).ok()
}

fn decimal(value: &[u8]) -> Option<u64> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// `seconds[.fraction]`, possibly negative.
fn time(value: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let secs: i64 = whole.parse().ok()?;
    let mut nanos = 0u32;
    for i in 0..9 {
        let digit = match fraction.as_bytes().get(i) {
            Some(d @ b'0'..=b'9') => u32::from(d - b'0'),
            Some(_) => return None,
            None => 0,
        };
        nanos = nanos * 10 + digit;
    }
    if whole.starts_with('-') && nanos > 0 {
        return Some((secs.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((secs, nanos))
}

impl Overrides {
    /// Records of the form `LENGTH KEY=VALUE\n`, where LENGTH counts the whole record and VALUE may hold any byte.
    fn parse_pax(&mut self, mut text: &[u8]) -> Result<(), &'static str> {
        const BAD: &str = "a PAX record is malformed";
        while !text.is_empty() && text[0] != 0 {
            let space = text.iter().take(20).position(|&b| b == b' ').ok_or(BAD)?;
            let len = decimal(&text[..space]).ok_or(BAD)?;
            let len = usize::try_from(len).ok().filter(|&l| l > space + 2 && l <= text.len()).ok_or(BAD)?;
            let (record, rest) = text.split_at(len);
            text = rest;
            let record = record[space + 1..].strip_suffix(b"\n").ok_or(BAD)?;
            let eq = record.iter().position(|&b| b == b'=').ok_or(BAD)?;
            self.set(&record[..eq], &record[eq + 1..])?;
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        let num = |what: &'static str| decimal(value).ok_or(what);
        match key {
            // An empty value takes an earlier one back.
            b"path" => self.path = (!value.is_empty()).then(|| value.to_vec()),
            b"linkpath" => self.link = (!value.is_empty()).then(|| value.to_vec()),
            b"size" => self.size = Some(num("a PAX size is not a number")?),
            b"uid" => self.uid = Some(num("a PAX uid is not a number")?),
            b"gid" => self.gid = Some(num("a PAX gid is not a number")?),
            b"mtime" => self.mtime = Some(time(value).ok_or("a PAX mtime is not a number")?),
            b"GNU.sparse.name" => self.sparse_name = Some(value.to_vec()),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                self.sparse_size = Some(num("a sparse size is not a number")?);
            }
            b"GNU.sparse.major" => self.sparse_major = Some(num("a sparse version is not a number")?),
            b"GNU.sparse.minor" => self.sparse_minor = Some(num("a sparse version is not a number")?),
            b"GNU.sparse.offset" => self.piece_offset = Some(num("a sparse map is not numbers")?),
            b"GNU.sparse.numbytes" => {
                let offset = self.piece_offset.take().ok_or("a sparse map lacks an offset")?;
                self.push_piece(offset, num("a sparse map is not numbers")?)?;
            }
            b"GNU.sparse.map" => {
                let mut parts = value.split(|&b| b == b',').map(decimal);
                while let Some(offset) = parts.next() {
                    let (Some(offset), Some(Some(len))) = (offset, parts.next()) else {
                        return Err("a sparse map is not numbers");
                    };
                    self.push_piece(offset, len)?;
                }
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.")
                    && !name.is_empty()
                {
                    self.set_xattr(name, value)?;
                }
            }
        }
        Ok(())
    }

    fn set_xattr(&mut self, name: &[u8], value: &[u8]) -> Result<(), &'static str> {
        if name.len() > MAX_XATTR_NAME {
            return Err("an extended attribute's name is longer than 255 bytes");
        }
        if value.len() > MAX_XATTR {
            return Err("an extended attribute is longer than 64 KiB");
        }
        // The last one counts, as with all other records.
        self.xattrs.retain(|(n, _)| n != name);
        let held: usize = self.xattrs.iter().map(|(n, v)| n.len() + v.len()).sum();
        if self.xattrs.len() >= MAX_XATTR_COUNT {
            return Err("an entry has more than 1000 extended attributes");
        }
        if held + name.len() + value.len() > MAX_XATTRS {
            return Err("the extended attributes of an entry are longer than 1 MiB");
        }
        self.xattrs.push((name.to_vec(), value.to_vec()));
        Ok(())
    }

    fn push_piece(&mut self, offset: u64, len: u64) -> Result<(), &'static str> {
        if self.pieces.len() >= MAX_PIECES {
            return Err("a sparse map is too long");
        }
        self.pieces.push((offset, len));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_and_times() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   17 \0 "), Some(0o17));
        assert_eq!(number(b"\0\0\0\0"), Some(0));
        assert_eq!(number(b"9\0"), None);
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 1, 0]), Some(256));
        assert_eq!(signed(&[0xff; 12]), Some(-1));
        assert_eq!(time(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time(b"1.x"), None);
        assert_eq!(time(b"-9223372036854775808"), Some((i64::MIN, 0)));
        assert_eq!(time(b"-9223372036854775808.5"), None);
    }

    #[test]
    fn an_entry_has_a_thousand_attributes_at_most() {
        let record = |n: usize| {
            let text = format!("SCHILY.xattr.user.{n:05}=v\n");
            format!("{} {text}", text.len() + 3)
        };
        let mut o = Overrides::default();
        let most: String = (0..MAX_XATTR_COUNT).map(record).collect();
        o.parse_pax(most.as_bytes()).unwrap();
        // The same ones again are no more.
        o.parse_pax(most.as_bytes()).unwrap();
        assert_eq!(o.xattrs.len(), MAX_XATTR_COUNT);
        assert!(o.parse_pax(record(MAX_XATTR_COUNT).as_bytes()).unwrap_err().contains("1000"));
    }

    #[test]
    fn nobody_is_the_owner_that_the_kernel_does_not_know() {
        for (key, value) in [("uid", "4294967295"), ("gid", "4294967295"), ("uid", "4294967296")] {
            let mut tar = tar::Builder::new(Vec::new());
            tar.append_pax_extensions([(key, value.as_bytes())]).unwrap();
            tar.append_data(&mut Header::new_gnu(), "x", &b""[..]).unwrap();
            let bytes = tar.into_inner().unwrap();
            let e = TarReader::new(&bytes[..]).next().unwrap_err().to_string();
            assert!(e.contains(key) && e.contains("out of range"), "{e}");
        }
        let mut header = Header::new_gnu();
        header.set_uid(u64::from(u32::MAX));
        let mut tar = tar::Builder::new(Vec::new());
        tar.append_data(&mut header, "x", &b""[..]).unwrap();
        let bytes = tar.into_inner().unwrap();
        assert!(TarReader::new(&bytes[..]).next().is_err());
    }

    /// So many zeros, which nobody writes anywhere.
    struct Zeros(u64);

    impl BufRead for Zeros {
        fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
            static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
            Ok(&ZEROS[..self.0.min(1 << 16) as usize])
        }

        fn consume(&mut self, n: usize) {
            self.0 -= n as u64;
        }
    }

    impl std::io::Read for Zeros {
        fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
            let n = self.fill_buf()?.read(buf)?;
            self.consume(n);
            Ok(n)
        }
    }

    /// 12 GiB without a byte of memory: sizes in base 256, and in PAX records.
    #[test]
    fn entries_may_be_larger_than_four_gigabytes() {
        const LARGE: u64 = 12 << 30;
        let mut head = tar::Builder::new(Vec::new());
        let mut h = Header::new_gnu();
        h.set_path("large").unwrap();
        h.set_size(LARGE);
        h.set_cksum();
        head.get_mut().extend_from_slice(h.as_bytes());
        let mut pax = tar::Builder::new(Vec::new());
        pax.append_pax_extensions([("size", LARGE.to_string().as_bytes())]).unwrap();
        h.set_path("by-pax").unwrap();
        h.set_size(7);
        h.set_cksum();
        pax.get_mut().extend_from_slice(h.as_bytes());
        let (head, pax) = (std::mem::take(head.get_mut()), std::mem::take(pax.get_mut()));
        let zeros = || Zeros(LARGE);
        let mut tar = TarReader::new(head.chain(zeros()).chain(&pax[..]).chain(zeros()));
        for name in [&b"large"[..], b"by-pax"] {
            let entry = tar.next().unwrap().unwrap();
            assert_eq!((&entry.path[..], entry.size), (name, LARGE));
        }
        assert!(tar.next().unwrap().is_none());
    }

    #[test]
    fn pax_values_may_hold_line_feeds() {
        let mut o = Overrides::default();
        o.parse_pax(b"31 SCHILY.xattr.user.a=x\ny=\0zw\n9 path=b\n").unwrap();
        assert_eq!(o.xattrs, vec![(b"user.a".to_vec(), b"x\ny=\0zw".to_vec())]);
        assert_eq!(o.path.as_deref(), Some(&b"b"[..]));
        for bad in [&b"99 path=b\n"[..], b"x path=b\n", b"8 path=b\n", b"7 path\n", b"3 \n", b"path"] {
            assert!(Overrides::default().parse_pax(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
            let mut r = TarReader::new(&bytes[..]);
            while let Ok(Some(_)) = r.next() {}
        }

        #[test]
        fn damaged_archives_never_panic(at in 0usize..2048, value in any::<u8>()) {
            let mut b = tar::Builder::new(Vec::new());
            b.append_pax_extensions([("GNU.sparse.major", &b"1"[..]), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"9")]).unwrap();
            let mut h = Header::new_gnu();
            h.set_size(600);
            h.set_cksum();
            b.append_data(&mut h, "x", &[b'0'; 600][..]).unwrap();
            let mut bytes = b.into_inner().unwrap();
            let at = at % bytes.len();
            bytes[at] = value;
            let mut r = TarReader::new(&bytes[..]);
            while let Ok(Some(_)) = r.next() {}
        }
    }
}
