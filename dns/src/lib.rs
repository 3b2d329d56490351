//! The node-local cluster DNS: answers the names of Services and pods from watched objects (Kubernetes DNS specification
//! 1.1.0) and sends every other question to the node's own resolvers.
//!
//! Entry points: [`run`] and [`purge`]. [`answer::decide`] is the pure heart: tables and a question in, records out.

pub mod answer;
mod forward;
mod handler;
mod link;
mod metrics;
mod server;
mod watch;
pub mod zone;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use orlop_base::supervise::{Failure, Ready, TaskGroup};
use orlop_base::telemetry::Metrics;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use answer::Settings;
use forward::Forwarder;
use handler::Handler;
use metrics::DnsMetrics;

/// The usual name of the link that carries the server's address.
pub const LINK: &str = "orlop-dns";

/// How the server runs.
#[derive(Clone)]
pub struct Config {
    pub client: kube::Client,
    /// Addresses for UDP and TCP, each a single address (not 0.0.0.0, from which answers might leave with another source).
    pub listen: Vec<SocketAddr>,
    /// Such as `cluster.local`.
    pub cluster_domain: String,
    /// File with the resolvers of the node; read again when it changes.
    pub resolv_conf: PathBuf,
    /// Make a link of this name with the addresses of `listen` first. It stays until [`purge`], so that a restart of the
    /// server does not change the node's addresses.
    pub link: Option<String>,
    /// Address of `/health`, `/ready` and `/metrics`.
    pub http: Option<SocketAddr>,
    /// How long answers hold. Seconds; 5 to 30 are sensible.
    pub ttl: u32,
}

impl Config {
    /// The usual server of a node: 169.254.20.10:53 on a link of its own.
    pub fn new(client: kube::Client) -> Config {
        Config {
            client,
            listen: vec![SocketAddr::from(([169, 254, 20, 10], 53))],
            cluster_domain: "cluster.local".to_owned(),
            resolv_conf: "/etc/resolv.conf".into(),
            link: Some(LINK.to_owned()),
            http: None,
            ttl: 5,
        }
    }
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config")
            .field("listen", &self.listen)
            .field("cluster_domain", &self.cluster_domain)
            .field("resolv_conf", &self.resolv_conf)
            .field("link", &self.link)
            .field("http", &self.http)
            .field("ttl", &self.ttl)
            .finish_non_exhaustive()
    }
}

/// Why the server cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cluster domain {0:?} is not a domain name")]
    Domain(String),
    #[error("no address to listen on")]
    NoAddress,
    #[error("cannot listen on {address}; stop what uses it or choose another address")]
    Bind { address: SocketAddr, source: io::Error },
    #[error("cannot talk to the kernel about links")]
    Netlink(#[source] io::Error),
    #[error("cannot {what} link {link}")]
    Link { link: String, what: &'static str, source: rtnetlink::Error },
    #[error(transparent)]
    Task(#[from] Failure),
}

/// Serves until `stop`. `ready` is set when the sockets are open and the tables complete; names outside of the cluster are
/// answered before that.
pub async fn run(config: Config, ready: Ready, stop: CancellationToken) -> Result<(), Error> {
    let own: Vec<IpAddr> = config.listen.iter().map(SocketAddr::ip).collect();
    if own.is_empty() {
        return Err(Error::NoAddress);
    }
    let settings = Settings::new(&config.cluster_domain, config.ttl, own.clone())
        .ok_or_else(|| Error::Domain(config.cluster_domain.clone()))?;
    if let Some(name) = &config.link {
        link::ensure(name, &own).await?;
    }
    let metrics = Arc::new(Metrics::default());
    let forwarder = Forwarder::new(config.resolv_conf.clone(), config.listen.clone());
    let handler = Arc::new(Handler::new(settings, forwarder, DnsMetrics::new(&metrics)));

    let mut bound = Vec::new();
    for &address in &config.listen {
        bound.push(server::Bound::bind(address).await.map_err(|source| Error::Bind { address, source })?);
    }
    let http = match config.http {
        Some(address) => {
            let listener = TcpListener::bind(address).await;
            Some(listener.map_err(|source| Error::Bind { address, source })?)
        }
        None => None,
    };

    let tasks = TaskGroup::new(&stop);
    for b in bound {
        b.serve(&handler, &tasks);
    }
    if let Some(listener) = http {
        let served = server::serve_http(listener, handler.clone(), metrics, tasks.stop_token());
        tasks.spawn_essential("dns health", served);
    }
    watch::start(&config.client, &handler, &tasks);
    let (synced, stopped) = (handler.synced.clone(), tasks.stop_token());
    tasks.spawn(async move {
        tokio::select! {
            () = stopped.cancelled() => {}
            () = synced.wait() => {
                tracing::info!("cluster DNS serves");
                ready.set();
            }
        }
    });
    tasks.run_until_stopped(Duration::from_secs(5)).await?;
    Ok(())
}

/// Removes the link that [`run`] made, for the end of a node's life.
pub async fn purge(link: &str) -> Result<(), Error> {
    link::remove(link).await
}
