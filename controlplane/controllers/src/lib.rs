//! The controllers: each brings one part of the cluster's state towards what its objects say. One file each, named as
//! upstream names it; every one is a `reconcile(key)` over shared informers and a work queue.

pub mod deployment;
pub mod endpoints;
pub mod endpointslice;
pub mod endpointslice_mirroring;
pub mod garbage_collector;
pub mod manifests;
pub mod namespace;
pub mod node_ipam;
pub mod node_lifecycle;
pub mod pod_garbage_collector;
pub mod replicaset;
pub mod replication_controller;
pub mod root_ca_certificate_publisher;
mod runtime;
mod service_queue;
pub mod serviceaccount;
pub mod serviceaccount_token;
pub mod taint_eviction;

pub use runtime::{Config, Error, run};
