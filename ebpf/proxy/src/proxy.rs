//! The one task that owns model, tables and datapath.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use futures::StreamExt;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch};
use orlop_base::supervise::{Ready, TaskGroup};
use orlop_base::telemetry::{Metrics, chain};
use orlop_ebpf_common::{Uplink, counters};
use orlop_ebpf_loader::{Datapath, MapFailure, Maps};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::addresses::{self, Watch};
use crate::desired::desired;
use crate::health::{self, Health, NodePortChecks, Pages};
use crate::metrics::ProxyMetrics;
use crate::model::{Model, Name};
use crate::tables::Tables;
use crate::{Config, Error, convert};

/// First pause after a failed write; doubled up to [`MAX_RETRY`].
const RETRY: Duration = Duration::from_millis(500);
const MAX_RETRY: Duration = Duration::from_secs(30);
/// How long connections to the health pages may take to end.
const DRAIN: Duration = Duration::from_secs(2);

pub(crate) async fn run(
    config: Config,
    client: kube::Client,
    ready: Ready,
    stop: CancellationToken,
) -> Result<(), Error> {
    let tasks = TaskGroup::new(&stop);
    let metrics = Arc::new(Metrics::default());
    let pages =
        Pages { health: Arc::new(Health::default()), metrics: metrics.clone(), refresh: Arc::default() };
    for address in [config.health_address, config.metrics_address].into_iter().flatten() {
        let listener = health::bind(address).await?;
        tasks.spawn_essential("proxy-pages", health::serve(listener, pages.clone(), tasks.clone()));
    }
    let proxy_metrics = ProxyMetrics::register(&metrics);
    let (netlink, connection) = Watch::open().map_err(|source| Error::Netlink { source })?;
    tasks.spawn(stoppable(tasks.stop_token(), connection));

    let datapath = Datapath::open(&config.datapath)?;
    let tables = Tables::adopt(datapath.maps.dump().map_err(|source| Error::Adopt { source })?);
    let datapath = Arc::new(Mutex::new(datapath));
    *pages.refresh.lock() = Some(counter_refresh(datapath.clone(), proxy_metrics.clone()));

    let mut proxy = Proxy {
        config,
        datapath,
        tables,
        model: Model::default(),
        metrics: proxy_metrics,
        checks: NodePortChecks::new(tasks.clone(), pages.health.clone()),
        health: pages.health,
        uplinks: HashMap::new(),
        triggers: Vec::new(),
        retry: None,
        pause: RETRY,
        writes_seen: 0,
    };
    proxy.follow_node(&netlink).await?;
    let result_tasks = tasks.clone();
    tasks.spawn_essential("proxy", async move {
        proxy.main(client, netlink, ready, result_tasks.stop_token()).await;
        Ok::<(), Error>(())
    });
    tasks.run_until_stopped(DRAIN).await?;
    Ok(())
}

async fn stoppable(stop: CancellationToken, work: impl Future<Output = ()>) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = work => {}
    }
}

fn counter_refresh(datapath: Arc<Mutex<Datapath>>, m: ProxyMetrics) -> health::Refresh {
    Arc::new(move || {
        let d = datapath.lock();
        for (gauge, index) in [
            (&m.sock_translated, counters::SOCK_TRANSLATED),
            (&m.sock_refused, counters::SOCK_REFUSED),
            (&m.packet_connections, counters::PACKET_CONNECTIONS),
            (&m.packet_dropped, counters::PACKET_DROPPED),
            (&m.fragments, counters::FRAGMENTS),
            (&m.snat_exhausted, counters::SNAT_EXHAUSTED),
        ] {
            gauge.set(d.maps.counter(index) as i64);
        }
    })
}

struct Proxy {
    config: Config,
    datapath: Arc<Mutex<Datapath>>,
    tables: Tables,
    model: Model,
    metrics: ProxyMetrics,
    health: Arc<Health>,
    checks: NodePortChecks,
    /// Interfaces that are served, as last told to the datapath.
    uplinks: HashMap<u32, Uplink>,
    /// When the endpoint changes that wait for a sync happened.
    triggers: Vec<SystemTime>,
    /// When to try again what failed.
    retry: Option<tokio::time::Instant>,
    pause: Duration,
    writes_seen: u64,
}

/// One watched kind: names seen during a list, and whether a list has ever been complete.
#[derive(Default)]
struct Listing {
    seen: Option<HashSet<String>>,
    complete: bool,
}

impl Proxy {
    async fn main(
        &mut self,
        client: kube::Client,
        mut netlink: Watch,
        ready: Ready,
        stop: CancellationToken,
    ) {
        let filter = watcher::Config::default().labels(convert::SELECTOR);
        let mut services =
            std::pin::pin!(watch(Api::<Service>::all(client.clone()), filter.clone()).default_backoff());
        let mut slices = std::pin::pin!(watch(Api::<EndpointSlice>::all(client), filter).default_backoff());
        let (mut service_list, mut slice_list) = (Listing::default(), Listing::default());
        let mut initial = true;
        loop {
            let retry = self.retry;
            // All arms are cancel-safe: pinned streams keep their state, and the node's change is looked up anew.
            tokio::select! {
                () = stop.cancelled() => return,
                e = services.next() => self.service_event(e, &mut service_list),
                e = slices.next() => self.slice_event(e, &mut slice_list),
                () = netlink.changed() => {
                    if let Err(e) = self.follow_node(&netlink).await {
                        tracing::warn!(error = %chain(&e), "trying again");
                        self.try_later();
                    }
                }
                () = sleep_until(retry) => {
                    self.retry = None;
                    if let Err(e) = self.follow_node(&netlink).await {
                        tracing::warn!(error = %chain(&e), "trying again");
                        self.try_later();
                    }
                }
            }
            // Until both lists are in, the maps of an earlier run know better than a half-filled model.
            if !(service_list.complete && slice_list.complete) {
                continue;
            }
            if initial {
                let (names, _) = self.model.names();
                names.into_iter().for_each(|n| self.model.mark(n));
            }
            let clean = self.sync();
            if initial && clean {
                if let Err(e) = self.drop_orphans() {
                    tracing::warn!(error = %chain(&e), "cannot remove entries of an earlier run, trying again");
                    self.try_later();
                    continue;
                }
                initial = false;
                let (frontends, _, backends) = self.tables.sizes();
                tracing::info!(frontends, backends, "maps are in step");
            }
            if clean && !initial {
                self.health.in_step();
                ready.set();
            }
        }
    }

    fn service_event(&mut self, event: Watched<Service>, list: &mut Listing) {
        let gone = take_event(event, list, |o, present| {
            self.metrics.service_changes.inc();
            self.metrics.queued();
            let name = convert::name(&o.metadata);
            self.model.set_service(&name, if present { convert::service(o) } else { None });
            name
        });
        if let Some(seen) = gone {
            let (names, _) = self.model.names();
            for n in names.iter().filter(|n| !seen.contains(&***n)) {
                self.model.set_service(n, None);
            }
        }
    }

    fn slice_event(&mut self, event: Watched<EndpointSlice>, list: &mut Listing) {
        let gone = take_event(event, list, |o, present| {
            self.metrics.slice_changes.inc();
            self.metrics.queued();
            let name = convert::name(&o.metadata);
            let slice = if present { convert::slice(o, &self.config.node_name) } else { None };
            self.model.set_slice(&name, slice);
            if !self.model.is_clean() && self.health.is_healthy() {
                self.triggers.extend(convert::trigger_time(o));
            }
            name
        });
        if let Some(seen) = gone {
            let (_, names) = self.model.names();
            for n in names.iter().filter(|n| !seen.contains(&***n)) {
                self.model.set_slice(n, None);
            }
        }
    }

    /// Writes what changed. Returns whether nothing is left to do.
    fn sync(&mut self) -> bool {
        if self.model.is_clean() {
            return true;
        }
        let start = Instant::now();
        let mut failed: Vec<Name> = Vec::new();
        let mut datapath = self.datapath.lock();
        // Each round may free frontends that others wait for; services are finite, so rounds end.
        while !self.model.is_clean() {
            for name in self.model.take_dirty() {
                let wanted = desired(&self.model, &name, self.config.selection);
                let port = self.model.service(&name).map_or(0, |s| s.health_check_node_port);
                self.checks.set(&name, port, self.model.ready_here(&name));
                match self.tables.sync(&mut datapath.maps, &name, &wanted) {
                    Ok(outcome) => outcome.retry.into_iter().for_each(|n| self.model.mark(n)),
                    Err(e) => {
                        self.metrics.failures.inc();
                        tracing::warn!(service = %name, error = %chain(&e), "cannot write maps, trying again");
                        failed.push(name);
                    }
                }
            }
        }
        drop(datapath);
        let clean = failed.is_empty();
        for name in failed {
            self.model.mark(name);
        }
        if clean {
            self.pause = RETRY;
            self.metrics.synced(start.elapsed(), &self.triggers);
            self.triggers.clear();
        } else {
            self.try_later();
        }
        let (frontends, _, backends) = self.tables.sizes();
        self.metrics.frontends.set(frontends as i64);
        self.metrics.backends.set(backends as i64);
        self.metrics.map_writes.inc_by(self.tables.writes() - self.writes_seen);
        self.writes_seen = self.tables.writes();
        clean
    }

    fn drop_orphans(&mut self) -> Result<(), MapFailure> {
        self.tables.drop_orphans(&mut self.datapath.lock().maps)
    }

    fn try_later(&mut self) {
        self.health.behind();
        self.retry = Some(tokio::time::Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(MAX_RETRY);
    }

    /// Tells the datapath the node's addresses and uplinks.
    async fn follow_node(&mut self, netlink: &Watch) -> Result<(), Error> {
        let interfaces = netlink.read().await.map_err(|source| Error::Addresses { source })?;
        let node = addresses::decide(&interfaces, &self.config.node_port_addresses, &self.config.uplinks);
        let mut datapath = self.datapath.lock();
        self.tables
            .sync_locals(&mut datapath.maps, &node.locals)
            .map_err(|source| Error::Adopt { source })?;
        let mut wanted = Vec::with_capacity(node.uplinks.len());
        for (index, name, uplink) in node.uplinks {
            wanted.push(index);
            if self.uplinks.get(&index) == Some(&uplink) {
                continue;
            }
            match datapath.attach_uplink(index, &name, uplink) {
                Ok(()) => {
                    tracing::info!(interface = %name, "serving node ports");
                    self.uplinks.insert(index, uplink);
                }
                // An interface may go while we look at it; the event of its going comes next.
                Err(e) => {
                    tracing::warn!(interface = %name, error = %chain(&e), "node ports do not answer there")
                }
            }
        }
        self.uplinks.retain(|i, _| wanted.contains(i));
        datapath.keep_uplinks(&wanted)?;
        Ok(())
    }
}

type Watched<K> = Option<Result<Event<K>, watcher::Error>>;

/// Passes an event on; at the end of a list returns the names in it.
fn take_event<K: kube::Resource>(
    event: Watched<K>,
    list: &mut Listing,
    mut apply: impl FnMut(&K, bool) -> String,
) -> Option<HashSet<String>> {
    match event? {
        Ok(Event::Init) => list.seen = Some(HashSet::new()),
        Ok(Event::InitApply(o) | Event::Apply(o)) => {
            let name = apply(&o, true);
            if let Some(seen) = &mut list.seen {
                seen.insert(name);
            }
        }
        Ok(Event::Delete(o)) => drop(apply(&o, false)),
        Ok(Event::InitDone) => {
            list.complete = true;
            return list.seen.take();
        }
        Err(e) => tracing::warn!(error = %chain(&e), "watch broke, trying again"),
    }
    None
}

async fn sleep_until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
