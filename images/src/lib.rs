//! Container images on one node: a content store, pulls from registries, layers as overlay file systems, and garbage
//! collection. See `docs/ARCHITECTURE.md` for how the CRI server uses it.
//!
//! What a crash may leave, and who repairs it: everything unfinished lies in `ingest/`, `writable/` or `trash/`, which
//! [`ImageStore::open`] empties; a layer that the disk may not hold yet after a power cut says so in its own record
//! and is dropped, with its images, by the next open.

mod build;
mod changes;
mod error;
mod export;
#[cfg(test)]
mod fuzz;
mod idmap;
mod image;
mod import;
mod ingest;
mod layout;
mod manifest;
mod mount_setattr;
mod mounts;
mod needs;
mod options;
mod overlay;
mod pack;
mod pull;
mod reference;
mod registry;
mod snapshot;
mod state;
mod store;
mod tree;
mod unpack;
mod unshare;
mod user_namespace;
mod verify;

pub use build::{Build, build};
pub use error::{Error, Kind, Result};
pub use image::{GcReport, Image, Usage};
pub use options::{Auth, IdMapping, Options, Proxies, RootfsOptions, UserNamespace};
pub use pack::pack_folder;
pub use reference::{Algorithm, Digest, Reference};
pub use store::ImageStore;
pub use unpack::Error as UnpackError;
