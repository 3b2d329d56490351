//! Starting and stopping the server.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::Ipv4Net;
use orlop_base::durable;
use orlop_base::supervise::{Failure, Ready, TaskGroup};
use orlop_store::Store;
use orlop_store::embedded::Embedded;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::admission::Chain;
use crate::authn::service_account::Tokens;
use crate::authn::{Authenticator, StaticTokens};
use crate::authz::{self, Authorizer};
use crate::bootstrap::{self, Facts};
use crate::handler::{MUTATING_LIMIT, READ_ONLY_LIMIT, Server};
use crate::health::Health;
use crate::metrics::ServerMetrics;
use crate::nodeproxy::NodeProxy;
use crate::pki::{self, Pki};
use crate::registry::{self, AdmitAll, Registry};
use crate::status::Status;
use crate::transport;

/// How long running requests may take to end once the server is told to stop.
const DRAIN: Duration = Duration::from_secs(5);

/// Everything that the server is told from outside.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Under which address nodes and pods reach the server.
    pub advertise_address: IpAddr,
    /// Holds `server/pki`, `server/store` and the components' kubeconfigs `server/*.kubeconfig`.
    pub data_dir: PathBuf,
    /// Where Service addresses come from; the first is the server's own.
    pub service_cidr: Ipv4Net,
    /// Such as cluster.local; part of the serving certificate and of the token issuer.
    pub cluster_domain: String,
    /// Further DNS names and addresses for the serving certificate.
    pub cert_names: Vec<String>,
    /// Where the administrator's kubeconfig goes, mode 0600.
    pub admin_kubeconfig: PathBuf,
    /// A static token file (`token,user,uid,"groups"`), if any.
    pub token_auth_file: Option<PathBuf>,
    /// Whether a kubelet must show a serving certificate signed by the cluster CA. Upstream's default is not to ask for one; ours is
    /// to ask, because logs and exec would otherwise reach whoever answers at the node's address.
    pub verify_kubelets: bool,
    /// The embedded store's settings.
    pub store: orlop_store::embedded::Options,
    /// How long Events are kept.
    pub event_ttl: Duration,
}

impl Config {
    /// The defaults of a single machine, with everything below `data_dir`.
    pub fn new(data_dir: PathBuf) -> Config {
        Config {
            listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 6443)),
            advertise_address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            admin_kubeconfig: data_dir.join("server/admin.kubeconfig"),
            data_dir,
            service_cidr: Ipv4Net::new_assert(Ipv4Addr::new(10, 96, 0, 0), 12),
            cluster_domain: "cluster.local".to_owned(),
            cert_names: Vec::new(),
            token_auth_file: None,
            verify_kubelets: true,
            store: Default::default(),
            event_ttl: Duration::from_secs(3600),
        }
    }

    /// The folder of the key material; [`Pki::open`] reads it.
    pub fn pki_dir(&self) -> PathBuf {
        self.data_dir.join("server/pki")
    }

    /// The kubeconfig of a component: "controller-manager", "scheduler", "proxy" or "dns".
    pub fn kubeconfig(&self, component: &str) -> PathBuf {
        self.data_dir.join(format!("server/{component}.kubeconfig"))
    }

    /// The serving certificate's names.
    pub fn server_names(&self) -> BTreeSet<String> {
        let mut names: BTreeSet<String> = self.cert_names.iter().cloned().collect();
        for name in
            ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost", "127.0.0.1", "::1"]
        {
            names.insert(name.to_owned());
        }
        names.insert(format!("kubernetes.default.svc.{}", self.cluster_domain));
        names.insert(self.advertise_address.to_string());
        names.insert(bootstrap::service_address(self.service_cidr).to_string());
        if !self.listen.ip().is_unspecified() {
            names.insert(self.listen.ip().to_string());
        }
        if let Ok(host) = std::fs::read_to_string("/proc/sys/kernel/hostname") {
            let host = host.trim().to_ascii_lowercase();
            if !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '.') {
                names.insert(host);
            }
        }
        names
    }
}

/// Why the server cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Pki(#[from] pki::Error),
    #[error(transparent)]
    Data(#[from] durable::Error),
    #[error(transparent)]
    Transport(#[from] transport::Error),
    #[error(transparent)]
    Store(#[from] orlop_store::Error),
    #[error("{0}")]
    Tokens(String),
    #[error("cannot prepare the API: {}", .0.message)]
    Bootstrap(Status),
    #[error(transparent)]
    Failed(#[from] Failure),
}

/// Serves until `stop`. `ready` is set when the system's own objects are in place and requests are answered.
///
/// # Errors
/// One line that says what is wrong and what to do.
pub async fn run(config: Config, ready: Ready, stop: CancellationToken) -> Result<(), Error> {
    // First of all the port: a second server must fail before it touches any data.
    let listener = transport::bind(config.listen).await?;
    let port = listener.local_addr().map(|a| a.port()).unwrap_or(config.listen.port());
    let _lock = durable::DirLock::take(&config.data_dir.join("server")).await?;
    let pki = Pki::open(&config.pki_dir(), &config.server_names())?;
    let url = url(config.advertise_address, port);
    write_kubeconfigs(&config, &pki, &url, port)?;

    let tasks = TaskGroup::new(&stop);
    // The registry outlives the requests that are drained, and the store the registry.
    let (registry_stop, storage_stop) = (CancellationToken::new(), CancellationToken::new());
    let (registry_tasks, storage) = (TaskGroup::new(&registry_stop), TaskGroup::new(&storage_stop));
    let result = serve(&config, &pki, url, port, listener, &tasks, &registry_tasks, &storage, ready).await;
    if result.is_err() {
        tasks.stop_token().cancel();
    }
    let drained = tasks.run_until_stopped(DRAIN).await;
    if let Ok(registry) = &result {
        // The registry and admission refer to each other.
        registry.set_admission(Arc::new(AdmitAll));
    }
    let result = result.map(drop);
    registry_stop.cancel();
    let unregistered = registry_tasks.run_until_stopped(DRAIN).await;
    storage_stop.cancel();
    let stored = storage.run_until_stopped(DRAIN).await;
    result?;
    drained?;
    unregistered?;
    Ok(stored?)
}

fn url(address: IpAddr, port: u16) -> String {
    format!("https://{}", SocketAddr::new(address, port))
}

fn write_kubeconfigs(config: &Config, pki: &Pki, url_for_all: &str, port: u16) -> Result<(), Error> {
    let local = match config.listen.ip() {
        ip if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        ip => ip,
    };
    let local = url(local, port);
    pki.ensure_kubeconfig(&config.admin_kubeconfig, url_for_all, "kubernetes-admin", Some("system:masters"))?;
    for (component, user) in [
        ("controller-manager", "system:kube-controller-manager"),
        ("scheduler", "system:kube-scheduler"),
        ("proxy", "system:kube-proxy"),
        ("dns", "system:kube-dns"),
    ] {
        pki.ensure_kubeconfig(&config.kubeconfig(component), &local, user, None)?;
    }
    Ok(())
}

#[allow(clippy::too_many_arguments)]
async fn serve(
    config: &Config,
    pki: &Pki,
    url: String,
    port: u16,
    listener: tokio::net::TcpListener,
    tasks: &TaskGroup,
    registry_tasks: &TaskGroup,
    storage: &TaskGroup,
    ready: Ready,
) -> Result<Registry, Error> {
    let (tls, verifier) = transport::tls(&pki.serving, &pki.ca)?;
    let issuer = format!("https://kubernetes.default.svc.{}", config.cluster_domain);
    let service_accounts =
        Tokens::new(&pki.service_account_key, &issuer, vec![issuer.clone()]).map_err(Error::Tokens)?;
    let static_tokens = match &config.token_auth_file {
        Some(path) => StaticTokens::read(path).map_err(Error::Tokens)?,
        None => StaticTokens::default(),
    };
    let node_proxy = NodeProxy::new(pki, config.verify_kubelets, tasks.clone())
        .map_err(|e| transport::Error::Tls(e.to_string()))?;

    let store = Embedded::open(&config.data_dir.join("server/store"), config.store.clone(), storage).await?;
    let store: Arc<dyn Store> = Arc::new(store);
    let mut options = registry::Options::new(registry_tasks.clone());
    options.service_cidr = config.service_cidr;
    options.event_ttl = config.event_ttl;
    let registry = Registry::new(store, options).await.map_err(Error::Bootstrap)?;

    let facts = Facts {
        advertise_address: config.advertise_address,
        port,
        service_cidr: config.service_cidr,
        server_url: url.clone(),
        ca_pem: pki.ca.cert_pem.clone(),
        front_proxy_ca_pem: pki.front_proxy_ca.cert_pem.clone(),
    };
    bootstrap::ensure(&registry, &facts).await.map_err(Error::Bootstrap)?;
    let authorizer = Arc::new(Authorizer::default());
    authz::follow(&authorizer, &registry, tasks).await.map_err(Error::Bootstrap)?;
    let admission = Arc::new(Chain::new(registry.clone(), authorizer.clone()));
    registry.set_admission(admission.clone());

    let health = Health::new(registry.clone());
    health.set_bootstrapped();
    let server = Arc::new(Server {
        authenticator: Authenticator { service_accounts, static_tokens, registry: registry.clone() },
        authorizer,
        admission,
        health: health.clone(),
        metrics: ServerMetrics::default(),
        node_proxy,
        read_only: Semaphore::new(READ_ONLY_LIMIT),
        mutating: Semaphore::new(MUTATING_LIMIT),
        url,
        stop: tasks.stop_token(),
        registry: registry.clone(),
    });
    tasks.spawn(bootstrap::keep_endpoints(registry.clone(), facts, tasks.stop_token()));
    tasks.spawn_essential("apiserver", transport::serve(listener, tls, verifier, server, tasks.clone()));
    tracing::info!(address = %config.listen, port, "API server serves");
    ready.set();
    let stopping = tasks.stop_token();
    tasks.spawn(async move {
        stopping.cancelled().await;
        health.set_stopping();
    });
    Ok(registry)
}
