//! The node agent (kubelet): runs the pods assigned to this node over CRI and reports on them.

pub mod cgroups;
pub mod config;
mod config_file;
pub mod context;
pub mod credentials;
pub mod cri;
pub mod error;
pub mod events;
pub mod gc;
pub mod images;
pub mod lifecycle;
pub mod logs;
pub mod metrics;
pub mod node;
pub mod objects;
pub mod pleg;
pub mod pods;
pub mod probes;
mod purge;
pub mod runtime;
mod server;
pub mod services;
pub mod sources;
pub mod spec;
pub mod start;
pub mod status;
pub mod userns;
pub mod volumes;

pub use config::{Config, KubeletConfiguration, PodCidrHook};
pub use error::Error;
pub use purge::purge;
pub use start::run;
