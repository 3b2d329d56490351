//! The store against real registries, real mounts and its own leftovers. Needs root and Debian's docker-registry.

mod archives;
mod damage;
mod digests;
mod extreme;
mod fake;
mod hostile;
mod shared;
mod store;
mod support;
mod trouble;
mod wire;
