//! The CRI v1 server: sandboxes and containers over a unix socket, run by one `orlop-monitor` per pod.
//!
//! It knows neither the OCI runtime nor the monitor's code; it starts the monitor program and speaks `monitor.proto` with it.

mod apparmor;
mod config;
mod container;
mod deadline;
mod error;
mod events;
mod facts;
mod filter;
mod idmap;
mod image;
mod image_store;
mod monitor;
mod mount_setattr;
mod mounts;
mod network;
mod nri;
mod recover;
mod runtime;
mod sandbox;
mod selinux;
mod serve;
mod service;
mod stats;
mod status;
mod store;
mod streaming;

pub use config::{CgroupDriver, Config, Handler, OciRuntime, nri_defaults};
pub use error::Error;
pub use monitor::Error as MonitorError;
/// Where NRI plugins are; see [`Config::nri`].
pub use orlop_nri::Config as NriConfig;
pub use serve::{purge, run};

use container::create::image_ref as container_image_ref;
use sandbox::run::hostname as sandbox_hostname;
