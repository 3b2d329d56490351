//! Where pods come from: the API server's watch and manifests on disk.

pub mod apiserver;
pub mod file;
pub mod mirror;
