//! The Kubernetes API server: TLS, authentication, authorization and admission around a generic registry.

pub mod registry;
pub mod request_info;
pub mod status;
