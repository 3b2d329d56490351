//! The service load balancer's user space: watches Services and EndpointSlices and keeps the BPF maps in step.
//!
//! `model` (what the cluster says) -> `desired` (entries of one Service) -> `tables` (difference to the maps) are pure;
//! this module drives them.

mod addresses;
mod closer;
mod config_file;
mod convert;
pub mod desired;
mod gather;
mod health;
mod inspect;
pub mod leftovers;
mod metrics;
pub mod model;
mod objects;
mod proxy;
mod ranges;
pub mod tables;
mod watches;

use std::net::SocketAddr;
use std::path::PathBuf;

use orlop_base::supervise::Ready;
use tokio_util::sync::CancellationToken;

pub use addresses::NodePortAddress;
pub use config_file::ConfigFile;
pub use desired::Selection;
pub use inspect::{Question, inspect};
pub use orlop_ebpf_loader::{Config as DatapathConfig, Finding, Level, Sizes, check, verify_programs};

/// Everything that the proxy is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Needs the rights of the system:node-proxier role.
    pub kubeconfig: PathBuf,
    /// This node's name: endpoints on it are local.
    pub node_name: String,
    /// Pins, cgroup and map sizes.
    pub datapath: DatapathConfig,
    /// Interfaces that clients outside of the node come in by; empty: found by their addresses.
    pub uplinks: Vec<String>,
    /// Translate also packets that enter the node from pods' veth pairs untranslated: of virtual machines, of the kernel's
    /// own sockets, of processes outside of the cgroup. Source ranges hold for pods only with it.
    pub pod_packets: bool,
    /// /healthz and /livez. Upstream: 0.0.0.0:10256.
    pub health_address: Option<SocketAddr>,
    /// /metrics. Upstream: 127.0.0.1:10249.
    pub metrics_address: Option<SocketAddr>,
    /// Where node ports answer; empty: on all of the node's addresses.
    pub node_port_addresses: Vec<NodePortAddress>,
    /// How backends are chosen, where a Service does not say (annotation `orlop.dev/selection`).
    pub selection: Selection,
    /// TCP clients outside of the node are answered by the backend's node itself. Every node must run this proxy with the
    /// same setting, and the network between them must let IP options pass.
    pub direct_return: bool,
    /// Established connections between clients outside of the node and pods on it go past the stack's forwarding.
    pub host_routing: bool,
}

impl Config {
    /// The defaults of a node.
    pub fn new(kubeconfig: PathBuf, node_name: String) -> Config {
        Config {
            kubeconfig,
            node_name,
            datapath: DatapathConfig::default(),
            uplinks: Vec::new(),
            pod_packets: true,
            health_address: Some(SocketAddr::from(([0, 0, 0, 0], 10256))),
            metrics_address: Some(SocketAddr::from(([127, 0, 0, 1], 10249))),
            node_port_addresses: Vec::new(),
            selection: Selection::default(),
            direct_return: false,
            host_routing: false,
        }
    }
}

/// Why the proxy cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Connect(#[from] orlop_client::ConnectError),
    #[error("cannot use the configuration file {path}: {message}", path = path.display())]
    ConfigFile { path: PathBuf, message: String },
    #[error("cannot set up the BPF datapath")]
    Datapath(#[from] orlop_ebpf_loader::Error),
    #[error("loading the BPF programs broke off")]
    Verifying { source: tokio::task::JoinError },
    #[error("reading Services and EndpointSlices from the API server broke off")]
    Watching,
    #[error("cannot listen on {address}; is another proxy running on this node?")]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error("cannot follow the node's addresses by netlink")]
    Netlink { source: std::io::Error },
    #[error("cannot read the node's addresses by netlink")]
    Addresses { source: rtnetlink::Error },
    #[error("cannot read the BPF maps of an earlier run; `orlop proxy cleanup` removes them")]
    Adopt { source: orlop_ebpf_loader::MapFailure },
    #[error("cannot tell the BPF programs the node's addresses")]
    Locals { source: orlop_ebpf_loader::MapFailure },
    #[error("cannot remove what kube-proxy left by means of {tool}; what is left can be removed by hand")]
    Leftovers { tool: String, source: std::io::Error },
    #[error("cannot read the BPF maps; are you root?")]
    Inspect { source: orlop_ebpf_loader::MapFailure },
    #[error(transparent)]
    Task(#[from] orlop_base::supervise::Failure),
}

/// Runs until `stop`. `ready` is set once the maps hold what the API server said. Stopping leaves programs and maps in
/// place: Services keep answering; [`purge`] removes them.
pub async fn run(config: Config, ready: Ready, stop: CancellationToken) -> Result<(), Error> {
    let client = orlop_client::client_from_kubeconfig(&config.kubeconfig).await?;
    run_with_client(config, client, ready, stop).await
}

/// [`run`] with a client that is there already.
pub async fn run_with_client(
    config: Config,
    client: kube::Client,
    ready: Ready,
    stop: CancellationToken,
) -> Result<(), Error> {
    proxy::run(config, client, ready, stop).await
}

/// Removes everything that the proxy left in the kernel. The proxy must not run.
pub fn purge(config: &Config) -> Result<(), Error> {
    Ok(orlop_ebpf_loader::purge(&config.datapath)?)
}
