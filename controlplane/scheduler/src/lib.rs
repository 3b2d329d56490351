//! The scheduler: finds a node for each pod that has none.
//!
//! Entry points: [`run`]. The decision is [`cycle::schedule`], a pure function of the pod, the [`cache::Cache`] and a
//! random number generator, so that it is deterministic given a seed. [`queue::Queue`] orders what is waiting, also
//! without I/O; `driver` connects them to the API.

pub mod cache;
pub mod cycle;
mod driver;
pub mod framework;
pub mod plugins;
pub mod queue;

pub use driver::{Config, Error, run};
