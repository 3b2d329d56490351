//! Talks to registries: the pull half of the OCI distribution specification.

pub(crate) mod auth;
pub(crate) mod client;
pub(crate) mod hosts;
mod proxy;
mod transport;

pub(crate) use client::{Hosts, Session};
