//! The Kubernetes API server: TLS, authentication, authorization and admission around a generic registry.

// Nearly every function here can fail with a Status; failing is rare, and a box would be one more thing in each signature.
#![allow(clippy::result_large_err)]

pub mod admission;
pub mod apply;
pub mod authn;
pub mod authz;
mod bootstrap;
pub mod codec;
pub mod discovery;
mod feed;
mod handler;
mod health;
mod metrics;
mod nodeproxy;
pub mod openapi;
pub mod patch;
pub mod pki;
mod protobuf;
pub mod registry;
pub mod request_info;
pub mod resources;
mod reviews;
mod run;
pub mod schema;
pub mod status;
pub mod table;
mod token_request;
pub mod transport;
pub mod validation;
pub mod value;
mod version;
pub mod watch_cache;

pub use run::{Config, Error, run};
