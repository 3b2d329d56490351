//! Wires the controllers: what they watch, their queues, their start, and the election that decides who acts.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{
    ConfigMap, Endpoints, Namespace, Node, Pod, ReplicationController, Secret, Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::{Api, Client};
use orlop_api::meta::Key;
use orlop_base::supervise::{Ready, TaskGroup};
use orlop_client::informer::{Builder, Informer};
use orlop_client::{Failure, LostLeadership, Recorder, lead};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::*;

/// How the controllers run.
#[derive(Clone)]
pub struct Config {
    pub client: Client,
    /// The cluster's CA certificate in PEM, published to every namespace.
    pub root_ca: String,
    /// Where nodes' podCIDRs are taken from, one network per address family; empty leaves them alone.
    pub cluster_cidrs: Vec<IpNet>,
    /// Prefix lengths of a node's share: (IPv4, IPv6).
    pub node_prefix: (u8, u8),
    /// A folder of manifests that are applied; `None` for none.
    pub manifests: Option<PathBuf>,
    /// Take part in the election of `kube-system/kube-controller-manager` under this identity; `None`: act at once.
    pub leader_elect: Option<String>,
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config")
            .field("cluster_cidrs", &self.cluster_cidrs)
            .field("node_prefix", &self.node_prefix)
            .field("manifests", &self.manifests)
            .field("leader_elect", &self.leader_elect)
            .finish_non_exhaustive()
    }
}

/// Why the controllers ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("controllers: {0}")]
    LostLeadership(#[from] LostLeadership),
    #[error("controllers: {0}")]
    Task(#[from] orlop_base::supervise::Failure),
}

/// Why one reconcile failed. All are worth another try.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error("{0}")]
    Invalid(String),
}

impl Failure for ReconcileError {
    fn is_conflict(&self) -> bool {
        matches!(self, ReconcileError::Api(e) if e.is_conflict())
    }
}

pub(crate) type Result<T = orlop_client::Outcome> = std::result::Result<T, ReconcileError>;

/// Whether an error is the API server's answer with this code.
pub(crate) fn has_code(e: &kube::Error, code: u16) -> bool {
    matches!(e, kube::Error::Api(s) if s.code == code)
}

/// Whether a creation was refused because its namespace is being deleted: there is nothing left to do there.
pub(crate) fn namespace_ends(e: &kube::Error) -> bool {
    let kube::Error::Api(s) = e else { return false };
    s.details.iter().flat_map(|d| &d.causes).any(|c| c.reason == "NamespaceTerminating")
}

/// Treats "not there (any more)" as done.
pub(crate) fn unless_gone<T>(r: std::result::Result<T, kube::Error>) -> Result<Option<T>> {
    match r {
        Ok(v) => Ok(Some(v)),
        Err(e) if has_code(&e, 404) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// The informers before they start; controllers add their handlers and indexes.
pub(crate) struct Builders {
    pub pods: Builder<Pod>,
    pub replicasets: Builder<ReplicaSet>,
    pub replicationcontrollers: Builder<ReplicationController>,
    pub deployments: Builder<Deployment>,
    pub services: Builder<Service>,
    pub endpoints: Builder<Endpoints>,
    pub endpointslices: Builder<EndpointSlice>,
    pub nodes: Builder<Node>,
    pub namespaces: Builder<Namespace>,
    pub serviceaccounts: Builder<ServiceAccount>,
    pub root_ca: Builder<ConfigMap>,
    pub token_secrets: Builder<Secret>,
}

/// The pods of a node, by name.
pub(crate) const BY_NODE: &str = "node";
/// Objects by the uid of their controller.
pub(crate) const BY_CONTROLLER: &str = "controller";

fn controller_uid(meta: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta) -> Vec<String> {
    orlop_api::meta::controller_of(meta).map(|o| o.uid.clone()).into_iter().collect()
}

impl Builders {
    fn new(client: &Client) -> Builders {
        let c = || client.clone();
        Builders {
            pods: Builder::new(Api::all(c()))
                .trim(trim_pod)
                .index(BY_NODE, |p: &Pod| p.spec.iter().filter_map(|s| s.node_name.clone()).collect())
                .index(BY_CONTROLLER, |p| controller_uid(&p.metadata)),
            replicasets: Builder::new(Api::all(c()))
                .index(BY_CONTROLLER, |r: &ReplicaSet| controller_uid(&r.metadata)),
            replicationcontrollers: Builder::new(Api::all(c())),
            deployments: Builder::new(Api::all(c())),
            services: Builder::new(Api::all(c())),
            endpoints: Builder::new(Api::all(c())),
            endpointslices: Builder::new(Api::all(c())),
            nodes: Builder::new(Api::all(c())).trim(|n: &mut Node| {
                if let Some(s) = &mut n.status {
                    s.images = None;
                }
            }),
            namespaces: Builder::new(Api::all(c())),
            serviceaccounts: Builder::new(Api::all(c())),
            root_ca: Builder::new(Api::all(c()))
                .fields(&format!("metadata.name={}", root_ca_certificate_publisher::NAME)),
            token_secrets: Builder::new(Api::all(c()))
                .fields(&format!("type={}", serviceaccount_token::SECRET_TYPE)),
        }
    }

    fn start(self, tasks: &TaskGroup) -> Informers {
        Informers {
            pods: self.pods.start(tasks),
            replicasets: self.replicasets.start(tasks),
            replicationcontrollers: self.replicationcontrollers.start(tasks),
            deployments: self.deployments.start(tasks),
            services: self.services.start(tasks),
            endpoints: self.endpoints.start(tasks),
            endpointslices: self.endpointslices.start(tasks),
            nodes: self.nodes.start(tasks),
            namespaces: self.namespaces.start(tasks),
            serviceaccounts: self.serviceaccounts.start(tasks),
            root_ca: self.root_ca.start(tasks),
            token_secrets: self.token_secrets.start(tasks),
        }
    }
}

/// What no controller reads of a pod: the containers' innards.
fn trim_pod(p: &mut Pod) {
    if let Some(spec) = &mut p.spec {
        spec.volumes = None;
        for c in spec.containers.iter_mut().chain(spec.init_containers.iter_mut().flatten()) {
            let (name, ports, restart) =
                (std::mem::take(&mut c.name), c.ports.take(), c.restart_policy.take());
            *c = k8s_openapi::api::core::v1::Container {
                name,
                ports,
                restart_policy: restart,
                ..Default::default()
            };
        }
    }
}

/// The shared local copies.
#[derive(Clone)]
pub(crate) struct Informers {
    pub pods: Informer<Pod>,
    pub replicasets: Informer<ReplicaSet>,
    pub replicationcontrollers: Informer<ReplicationController>,
    pub deployments: Informer<Deployment>,
    pub services: Informer<Service>,
    pub endpoints: Informer<Endpoints>,
    pub endpointslices: Informer<EndpointSlice>,
    pub nodes: Informer<Node>,
    pub namespaces: Informer<Namespace>,
    pub serviceaccounts: Informer<ServiceAccount>,
    pub root_ca: Informer<ConfigMap>,
    pub token_secrets: Informer<Secret>,
}

impl Informers {
    async fn synced(&self) {
        self.pods.synced().await;
        self.replicasets.synced().await;
        self.replicationcontrollers.synced().await;
        self.deployments.synced().await;
        self.services.synced().await;
        self.endpoints.synced().await;
        self.endpointslices.synced().await;
        self.nodes.synced().await;
        self.namespaces.synced().await;
        self.serviceaccounts.synced().await;
        self.root_ca.synced().await;
        self.token_secrets.synced().await;
    }
}

/// What every controller gets.
#[derive(Clone)]
pub(crate) struct Context {
    pub client: Client,
    pub informers: Informers,
    pub recorder: Recorder,
    pub tasks: TaskGroup,
}

/// Runs the controllers until `stop`.
pub async fn run(config: Config, ready: Ready, stop: CancellationToken) -> std::result::Result<(), Error> {
    let (client, identity) = (config.client.clone(), config.leader_elect.clone());
    lead(&client, "kube-controller-manager", identity.as_deref(), &stop, |stop| serve(config, ready, stop))
        .await
}

async fn serve(config: Config, ready: Ready, stop: CancellationToken) -> std::result::Result<(), Error> {
    let tasks = TaskGroup::new(&stop);
    let client = config.client.clone();
    let mut b = Builders::new(&client);
    let replicaset = replicaset::Controller::<ReplicaSet>::new(&mut b);
    let replication = replicaset::Controller::<ReplicationController>::new(&mut b);
    let deployment = deployment::Controller::new(&mut b);
    let endpoints = endpoints::Controller::new(&mut b);
    let endpointslice = endpointslice::Controller::new(&mut b);
    let mirroring = endpointslice_mirroring::Controller::new(&mut b);
    let namespace = namespace::Controller::new(&mut b);
    let serviceaccount = serviceaccount::Controller::new(&mut b);
    let token = serviceaccount_token::Controller::new(&mut b);
    let root_ca = root_ca_certificate_publisher::Controller::new(&mut b);
    let ipam = node_ipam::Controller::new(&mut b, &config);
    let lifecycle = node_lifecycle::Controller::new(&mut b);
    let eviction = taint_eviction::Controller::new(&mut b);
    let pod_gc = pod_garbage_collector::Controller::new(&mut b);
    let informers = b.start(&tasks);
    let recorder = Recorder::start(client.clone(), "controller-manager", "", &tasks);
    let context = Context { client, informers: informers.clone(), recorder, tasks: tasks.clone() };
    tokio::select! {
        () = stop.cancelled() => {}
        () = informers.synced() => {
            replicaset.start(&context);
            replication.start(&context);
            deployment.start(&context);
            endpoints.start(&context);
            endpointslice.start(&context);
            mirroring.start(&context);
            namespace.start(&context);
            serviceaccount.start(&context);
            token.start(&context, &config.root_ca);
            root_ca.start(&context, &config.root_ca);
            ipam.start(&context);
            lifecycle.start(&context);
            eviction.start(&context);
            pod_gc.start(&context);
            garbage_collector::start(&context);
            if let Some(dir) = config.manifests {
                manifests::start(&context, dir);
            }
            ready.set();
        }
    }
    Ok(tasks.run_until_stopped(Duration::from_secs(5)).await?)
}

/// Creations and deletions that a controller has asked for and not yet seen, so that a stale local copy does not make it
/// ask again. An expectation that is not met in five minutes is dropped.
#[derive(Default)]
pub(crate) struct Expectations {
    open: Mutex<HashMap<Key, Open>>,
}

struct Open {
    creations: u32,
    deletions: HashSet<String>,
    since: Instant,
}

const EXPECTATION_LIFE: Duration = Duration::from_secs(300);

impl Expectations {
    pub fn met(&self, key: &Key) -> bool {
        let open = self.open.lock();
        open.get(key).is_none_or(|o| {
            (o.creations == 0 && o.deletions.is_empty()) || o.since.elapsed() > EXPECTATION_LIFE
        })
    }

    pub fn expect(&self, key: &Key, creations: u32, deletions: impl IntoIterator<Item = String>) {
        let since = Instant::now();
        let o = Open { creations, deletions: deletions.into_iter().collect(), since };
        self.open.lock().insert(key.clone(), o);
    }

    pub fn created(&self, key: &Key) {
        if let Some(o) = self.open.lock().get_mut(key) {
            o.creations = o.creations.saturating_sub(1);
        }
    }

    pub fn deleted(&self, key: &Key, uid: &str) {
        if let Some(o) = self.open.lock().get_mut(key) {
            o.deletions.remove(uid);
        }
    }

    pub fn forget(&self, key: &Key) {
        self.open.lock().remove(key);
    }
}
