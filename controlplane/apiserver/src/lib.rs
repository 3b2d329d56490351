//! The Kubernetes API server: TLS, authentication, authorization and admission around a generic registry.

pub mod authn;
pub mod authz;
pub mod pki;
pub mod registry;
pub mod request_info;
pub mod status;
