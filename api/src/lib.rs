//! The Kubernetes vocabulary that both sides of the API need: pure functions over k8s-openapi's types, no I/O.

pub mod backoff;
pub mod meta;
pub mod pod;
pub mod quantity;
pub mod selector;
pub mod taints;
