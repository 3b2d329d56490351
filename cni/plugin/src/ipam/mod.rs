//! Addresses of pods: which are given, to whom.

mod plan;
mod store;

pub use plan::{IpamError, Range, RangeSet, State, link_of};
pub use store::Store;
