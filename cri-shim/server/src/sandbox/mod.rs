//! Pod sandboxes, one file per RPC.

mod list;
mod remove;
pub(crate) mod run;
mod status;
mod stop;
mod update;
pub(crate) mod watch;
