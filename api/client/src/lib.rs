//! How Orlop's daemons talk to the Kubernetes API: connection, informers, work queues, leader election and events,
//! thin over kube-rs.

pub mod connect;
pub mod election;
pub mod events;
pub mod informer;
pub mod refusal;
pub mod workqueue;

pub use connect::{ConnectError, client_from_kubeconfig};
pub use election::{Election, ElectionConfig, LostLeadership, lead};
pub use events::Recorder;
pub use informer::{Change, Informer};
pub use refusal::Refusal;
pub use workqueue::{Failure, Outcome, Queue};
