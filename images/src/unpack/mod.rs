//! A layer's tar stream becomes a folder that overlayfs can use as a lower layer.
//!
//! The stream is hostile until its digest is verified, and that happens only at its end: no name in it may lead outside
//! the folder. Every path is opened by `openat2` with `RESOLVE_IN_ROOT`, and created relative to its parent's descriptor.

mod apply;
mod reader;
mod slot;
mod source;
#[cfg(test)]
mod tests;
mod zstd_frames;

use std::io;

pub(crate) use apply::{OPAQUE_XATTR, Unpacked, borrow_from_lower, copy_metadata, is_of_the_node, unpack};
pub(crate) use reader::{Kind, TarReader};
pub(crate) use slot::{Slot, Slots};
pub(crate) use source::{Stream, decompress_while};
pub(crate) use zstd_frames::Frames;

/// Why a layer could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading or decompressing the stream failed.
    #[error("cannot read the stream: {0}")]
    Read(io::Error),
    #[error("not a valid tar stream at byte {offset}: {why}")]
    Tar { offset: u64, why: &'static str },
    #[error("the entry {path:?} leads outside the layer")]
    Escape { path: String },
    #[error("the hard link {path:?} points at {target:?}, which no layer has")]
    LinkTarget { path: String, target: String },
    #[error("the entry {path:?} is below something that is not a folder")]
    NotAFolder { path: String },
    #[error(
        "the layer's folders and links need more than {} MiB to be remembered until its end; it is made to exhaust memory",
        limit >> 20
    )]
    TooMuch { limit: usize },
    #[error("cannot {what} {path:?}: {source}")]
    Io { what: &'static str, path: String, source: io::Error },
}

impl Error {
    fn io(what: &'static str, path: &[u8]) -> impl FnOnce(rustix::io::Errno) -> Error {
        let path = String::from_utf8_lossy(path).into_owned();
        move |e| Error::Io { what, path, source: e.into() }
    }
}
