//! The command line. It is a contract: scripts and docs rely on it.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::{IpNet, Ipv4Net};

/// The node side of Kubernetes and a compact control plane, in one program.
#[derive(Debug, Parser)]
#[command(name = "orlop", version, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Control plane only: API server, scheduler, controllers
    Server(ServerArgs),
}

/// Where the cluster's state is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StoreKind {
    /// A database of its own in the data folder
    Embedded,
}

/// What the control plane needs to know.
#[derive(Clone, Debug, Args)]
pub struct ServerArgs {
    #[arg(long, value_enum, default_value = "embedded")]
    pub store: StoreKind,

    /// State of all parts
    #[arg(long, default_value = "/var/lib/orlop")]
    pub data_dir: PathBuf,

    /// Address and port of the API server
    #[arg(long, default_value = "0.0.0.0:6443")]
    pub listen: SocketAddr,

    /// Address under which nodes and pods reach the API server [default: that of the default route]
    #[arg(long)]
    pub advertise_address: Option<IpAddr>,

    /// Addresses of Services
    #[arg(long, default_value = "10.96.0.0/12")]
    pub service_cidr: Ipv4Net,

    /// Addresses of pods; each node gets a /24
    #[arg(long, default_value = "10.244.0.0/16")]
    pub cluster_cidr: IpNet,

    /// DNS domain of the cluster
    #[arg(long, default_value = "cluster.local")]
    pub cluster_domain: String,

    /// Further names and addresses for the serving certificate (repeatable)
    #[arg(long = "tls-san")]
    pub tls_sans: Vec<String>,

    /// Where the administrator's kubeconfig is written
    #[arg(long, default_value = "/etc/orlop/admin.kubeconfig")]
    pub write_kubeconfig: PathBuf,

    /// Apply the manifests of this folder [default: <data-dir>/server/manifests]
    #[arg(long)]
    pub manifests: Option<PathBuf>,
}
