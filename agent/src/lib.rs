//! The node agent (kubelet): runs the pods assigned to this node over CRI and reports on them.

pub mod config;
pub mod context;
pub mod cri;
pub mod error;
pub mod events;
pub mod metrics;
pub mod pods;
mod purge;
pub mod runtime;

pub use config::{Config, KubeletConfiguration, PodCidrHook};
pub use error::Error;
pub use purge::purge;

use std::sync::Arc;
use std::time::Duration;

use orlop_base::supervise::{Ready, TaskGroup};
use orlop_base::telemetry::Metrics;
use tokio_util::sync::CancellationToken;

/// How long the parts get to end when the agent stops. Containers go on without it.
const DRAIN: Duration = Duration::from_secs(5);

/// Runs the agent until `stop`. `ready` is set once the runtime answers and the node is registered.
pub async fn run(config: Config, ready: Ready, stop: CancellationToken) -> Result<(), Error> {
    purge::claim(&config)?;
    let config = Arc::new(config);
    let tasks = TaskGroup::new(&stop);
    let registry = Arc::new(Metrics::default());
    let client = match &config.kubeconfig {
        Some(path) => Some(orlop_client::client_from_kubeconfig(path).await?),
        None => None,
    };
    let recorder =
        client.clone().map(|c| orlop_client::Recorder::start(c, "kubelet", &config.node_name, &tasks));
    let ctx = context::Context {
        cri: cri::Cri::new(&config.cri_socket)?,
        events: events::Events::new(recorder, &config.node_name),
        metrics: metrics::AgentMetrics::register(&registry),
        pods: pods::manager::Pods::default(),
        tasks: tasks.clone(),
        client,
        registry,
        config,
    };
    drop(ctx);
    ready.set();
    tasks.run_until_stopped(DRAIN).await?;
    Ok(())
}
