//! Pod status: generated from what is observed, written to the API as patches.

pub mod generate;
pub mod patch;
pub mod writer;
