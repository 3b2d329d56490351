//! Container lifecycle hooks.

pub mod hooks;
