//! The Kubernetes API server: TLS, authentication, authorization and admission around a generic registry.

// Nearly every function here can fail with a Status; failing is rare, and a box would be one more thing in each signature.
#![allow(clippy::result_large_err)]

pub mod admission;
pub mod authn;
pub mod authz;
mod bootstrap;
mod feed;
mod handler;
mod health;
mod metrics;
mod nodeproxy;
pub mod pki;
pub mod registry;
pub mod request_info;
mod reviews;
mod run;
pub mod status;
mod token_request;
pub mod transport;
mod version;

pub use run::{Config, Error, run};
