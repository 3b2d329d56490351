//! The server with the real monitor, a test's own folder each.

mod checkpoint;
mod devices;
mod node;
mod pods;
mod rpcs;
mod runtimes;
mod security;
mod survival;
mod upgrade;
mod volumes;
