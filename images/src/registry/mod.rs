//! Talks to registries: the pull half of the OCI distribution specification.

mod auth;
mod client;
mod hosts;
mod proxy;
mod transport;

pub(crate) use client::Session;
