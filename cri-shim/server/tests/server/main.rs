//! The server with the real monitor, a test's own folder each.

mod checkpoint;
mod crictl;
mod devices;
mod full;
mod images;
mod lists;
mod monitors;
mod namespaces;
mod network;
mod node;
mod nri;
mod pods;
mod races;
mod records;
mod resources;
mod rpcs;
mod runtimes;
mod seccomp;
mod security;
mod streams;
mod survival;
mod upgrade;
mod volumes;
