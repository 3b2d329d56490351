//! What every daemon of Orlop needs: supervised tasks, durable files, telemetry, failpoints, less memory, enough open files, an end to stray programs and a test kit.

pub mod descriptors;
pub mod durable;
pub mod failpoint;
pub mod memory;
pub mod strays;
pub mod supervise;
pub mod telemetry;
pub mod testkit;
#[cfg(feature = "tls")]
pub mod tls;
