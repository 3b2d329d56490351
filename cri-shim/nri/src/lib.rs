//! The runtime's side of the Node Resource Interface (NRI): plugins connect, or are started, and are asked about pods and containers
//! as these come and go. Plugins written for containerd 2 (API v0.12 of github.com/containerd/nri) work unchanged.
//!
//! What a plugin's answer means for a container is the business of the [`Host`]; this crate knows neither the CRI nor OCI specs. With
//! no plugin connected a request costs a look at an empty list.

mod connection;
mod error;
mod inherit;
mod launch;
mod listen;
mod merge;
mod mux;
mod nri;
mod owners;
mod plugin;
mod ttrpc;

#[cfg(test)]
mod fuzz;

/// The interface's messages.
#[allow(clippy::large_enum_variant, clippy::doc_lazy_continuation)]
pub mod api {
    include!(concat!(env!("OUT_DIR"), "/nri.pkg.api.v1alpha1.rs"));
}

pub use error::Error;
pub use listen::remove_dead_socket;
pub use merge::removal;
pub use nri::{Config, Created, Held, Host, Nri, Updated};
pub use owners::Owners;
