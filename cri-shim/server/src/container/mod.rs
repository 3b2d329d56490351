//! Containers, one file per RPC.

pub(crate) mod cdi;
pub(crate) mod checkpoint;
pub(crate) mod create;
pub(crate) mod exec_sync;
mod list;
mod log;
mod remove;
pub(crate) mod signal;
pub(crate) mod spec;
mod start;
mod status;
mod stop;
mod update;
