//! The one task that owns model, tables and datapath.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use futures::StreamExt;
use kube::Api;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch};
use nix::net::if_::if_nametoindex;
use orlop_base::supervise::{Ready, TaskGroup};
use orlop_base::telemetry::{Metrics, chain};
use orlop_client::{Refusal, refusal};
use orlop_ebpf_common::{SockKey, TCP, Uplink, config_flags, counters};
use orlop_ebpf_loader::diag::{self, Closed};
use orlop_ebpf_loader::{Datapath, MapFailure, Maps, Object, Programs, RealMaps};
use parking_lot::Mutex;
use tokio::sync::watch as latest;
use tokio::task::{JoinError, JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::addresses::{self, Watch, sleep_until};
use crate::desired::desired;
use crate::gather::Gather;
use crate::health::{self, Health, NodePortChecks, Pages};
use crate::metrics::{Policy, ProxyMetrics, ServicePort};
use crate::model::{Model, Name, Service, Slice};
use crate::objects::{Node, ServiceCIDR, keys};
use crate::ranges::ServiceRanges;
use crate::tables::Tables;
use crate::{Config, Error, NodePortAddress, closer, convert, watches};

/// First pause after a failed write; doubled up to [`MAX_RETRY`].
const RETRY: Duration = Duration::from_millis(500);
const MAX_RETRY: Duration = Duration::from_secs(30);
/// How long to wait for the node's zone before endpoints are chosen without it.
const NODE_PATIENCE: Duration = Duration::from_secs(2);
/// Changes of endpoints come in groups; sockets are looked through once for each.
const CLOSE_AFTER: Duration = Duration::from_millis(50);
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
    let proxy_metrics = ProxyMetrics::register(&metrics);
    let pages = Pages {
        health: Arc::new(Health::default()),
        metrics: metrics.clone(),
        proxy: proxy_metrics.clone(),
        refresh: Arc::default(),
    };
    for address in [config.health_address, config.metrics_address].into_iter().flatten() {
        let listener = health::bind(address)?;
        tasks.spawn_essential("proxy-pages", health::serve(listener, pages.clone(), tasks.clone()));
    }
    let (netlink, connection) = Watch::open().map_err(|source| Error::Netlink { source })?;
    tasks.spawn(stoppable(tasks.stop_token(), connection));

    let (datapath, object) = Datapath::prepare(&config.datapath)?;
    let tables = adopt(&datapath.maps).map_err(|source| Error::Adopt { source })?;
    let datapath = Arc::new(Mutex::new(datapath));
    // Handles of its own: who reads counters keeps nobody from writing maps.
    let counters = RealMaps::open(&config.datapath.pins)?;
    *pages.refresh.lock() = Some(counter_refresh(counters, proxy_metrics.clone()));

    let mut proxy = Proxy {
        config,
        datapath,
        tables,
        model: Model::default(),
        ranges: ServiceRanges::default(),
        metrics: proxy_metrics,
        checks: NodePortChecks::new(tasks.clone(), pages.health.clone()),
        health: pages.health,
        uplinks: HashMap::new(),
        unserved: HashSet::new(),
        triggers: Vec::new(),
        failed: HashSet::new(),
        range_failed: false,
        unread: false,
        retry: None,
        pause: RETRY,
        writes_seen: 0,
        zone: latest::Sender::new(None),
        primary: None,
        programs: None,
        closing: None,
        closer: None,
        unseen: HashSet::new(),
    };
    proxy.follow_node(&netlink).await?;
    let result_tasks = tasks.clone();
    tasks.spawn_essential("proxy", async move {
        proxy.main(client, object, netlink, ready, result_tasks.stop_token()).await
    });
    tasks.run_until_stopped(DRAIN).await?;
    Ok(())
}

fn adopt(maps: &RealMaps) -> Result<Tables, MapFailure> {
    let mut tables = Tables::adopt(maps.dump()?);
    let (backend, number) = maps.remembered()?;
    tables.keep_clear_of(backend, number);
    Ok(tables)
}

async fn stoppable(stop: CancellationToken, work: impl Future<Output = ()>) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = work => {}
    }
}

fn counter_refresh(maps: RealMaps, m: ProxyMetrics) -> health::Refresh {
    Box::new(move || {
        for (gauge, index) in [
            (&m.sock_translated, counters::SOCK_TRANSLATED),
            (&m.sock_refused, counters::SOCK_REFUSED),
            (&m.packet_connections, counters::PACKET_CONNECTIONS),
            (&m.packet_dropped, counters::PACKET_DROPPED),
            (&m.unallocated, counters::UNALLOCATED),
            (&m.fragments, counters::FRAGMENTS),
            (&m.resumed, counters::RESUMED),
            (&m.short, counters::SHORT),
            (&m.snat_exhausted, counters::SNAT_EXHAUSTED),
        ] {
            gauge.set(maps.counter(index) as i64);
        }
        let names = maps.service_names().unwrap_or_default();
        let stats = maps.stats().unwrap_or_default();
        // Service ports that are gone go from the page too.
        m.service_connections.clear();
        m.service_refusals.clear();
        for (number, s) in stats {
            let Some(service) = names.get(&number).cloned() else { continue };
            let port = ServicePort { service };
            m.service_connections.get_or_create(&port).set(s.connections as i64);
            m.service_refusals.get_or_create(&port).set(s.refused as i64);
        }
        let hidden = maps.hidden().unwrap_or_default();
        for (policy, count) in [("internal", hidden.0), ("external", hidden.1)] {
            m.no_local_endpoints.get_or_create(&Policy { traffic_policy: policy }).set(count as i64);
        }
    })
}

/// The sockets that were to be closed, and what came of it.
type Closing = (Vec<SockKey>, std::io::Result<Closed>);

struct Proxy {
    config: Config,
    datapath: Arc<Mutex<Datapath>>,
    tables: Tables,
    model: Model,
    /// Addresses that are Services' alone.
    ranges: ServiceRanges,
    metrics: ProxyMetrics,
    health: Arc<Health>,
    checks: NodePortChecks,
    /// Interfaces that are served, as last told to the datapath.
    uplinks: HashMap<u32, Uplink>,
    /// Interfaces that could not be served, which has been said.
    unserved: HashSet<u32>,
    /// When the endpoint changes that wait for a sync happened.
    triggers: Vec<SystemTime>,
    /// Services that could not be written, which has been said. They wait until it is time, or until they change.
    failed: HashSet<Name>,
    /// The Service range could not be written.
    range_failed: bool,
    /// What the maps hold is not known after a failed write.
    unread: bool,
    /// When to try again what failed.
    retry: Option<tokio::time::Instant>,
    pause: Duration,
    writes_seen: u64,
    /// This node's zone, as slices are read with it in mind.
    zone: latest::Sender<Option<String>>,
    /// The addresses by which the cluster knows this node; `None` until it has said so.
    primary: Option<Vec<IpAddr>>,
    /// Programs that wait for the maps to be full. Until they are, those of an earlier process go on.
    programs: Option<Programs>,
    /// When to look for sockets whose backend is gone.
    closing: Option<tokio::time::Instant>,
    /// Closes such sockets, beside everything else: all sockets of all network namespaces are looked through.
    closer: Option<JoinHandle<Closing>>,
    /// Protocols whose sockets the kernel does not list, which has been said.
    unseen: HashSet<u8>,
}

/// One watched kind: names seen during a list, and whether a list has ever been complete.
#[derive(Default)]
struct Listing {
    seen: Option<HashSet<String>>,
    complete: bool,
    refusal: Refusal,
}

impl Listing {
    /// Says what went wrong, and a missing right once, as only somebody else can give it.
    fn failed(&mut self, e: &watcher::Error) {
        if let Some(message) = self.refusal.begins(e) {
            tracing::error!(
                "the API server refuses the proxy's user: {message}; bind it to the ClusterRole system:node-proxier"
            );
        } else if refusal::message(e).is_none() {
            tracing::warn!(error = %chain(e), "watch broke, trying again");
        }
    }
}

impl Proxy {
    async fn main(
        &mut self,
        client: kube::Client,
        object: Object,
        mut netlink: Watch,
        ready: Ready,
        stop: CancellationToken,
    ) -> Result<(), Error> {
        // The kernel looks at the programs while the lists come in.
        let mut verifying = tokio::task::spawn_blocking(|| object.load());
        let mut verified = false;
        // Stopped when this returns.
        let mut reading = JoinSet::new();
        let mut services = watches::services(&client, &mut reading);
        let mut slices =
            watches::slices(&client, self.config.node_name.clone(), self.zone.subscribe(), &mut reading);
        let own = watcher::Config::default().fields(&format!("metadata.name={}", self.config.node_name));
        let mut node = std::pin::pin!(watch(Api::<Node>::all(client.clone()), own).default_backoff());
        let mut ranges = std::pin::pin!(
            watch(Api::<ServiceCIDR>::all(client.clone()), watcher::Config::default()).default_backoff()
        );
        let (mut service_list, mut slice_list) = <(Listing, Listing)>::default();
        let (mut node_list, mut range_list) = <(Listing, Listing)>::default();
        let (mut initial, mut filling) = (true, false);
        // Slices are read with the node's zone in mind, so they wait for it; not for ever.
        let patience = tokio::time::Instant::now() + NODE_PATIENCE;
        loop {
            let (retry, closing, checks) = (self.retry, self.closing, self.checks.retry());
            // All arms are cancel-safe: pinned streams and the watch of the node's interfaces keep their state.
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                loaded = &mut verifying, if !verified => {
                    self.programs = Some(loaded.map_err(|source| Error::Verifying { source })??);
                    verified = true;
                }
                batch = services.recv() => {
                    let batch = batch.ok_or(Error::Watching)?;
                    batch.into_iter().for_each(|e| self.service_event(Some(e), &mut service_list));
                }
                batch = slices.recv() => {
                    let batch = batch.ok_or(Error::Watching)?;
                    batch.into_iter().for_each(|e| self.slice_event(Some(e), &mut slice_list));
                }
                e = node.next() => {
                    let told = !matches!(e, Some(Ok(Event::Init)));
                    if self.node_event(e, &mut node_list) && self.knows_primary() {
                        self.follow_or_retry(&netlink).await;
                    }
                    if told {
                        self.settle_zone();
                    }
                }
                e = ranges.next() => self.range_event(e, &mut range_list),
                () = tokio::time::sleep_until(patience), if self.zone.borrow().is_none() => self.settle_zone(),
                () = netlink.changed() => self.follow_or_retry(&netlink).await,
                () = sleep_until(retry) => {
                    self.retry = None;
                    self.failed.iter().for_each(|n| self.model.mark(n.clone()));
                    self.range_failed = false;
                    self.follow_or_retry(&netlink).await;
                }
                () = sleep_until(closing), if self.closer.is_none() => self.close_sockets(),
                closed = join(&mut self.closer) => self.sockets_closed(closed),
                () = sleep_until(checks) => self.checks.settle(),
            }
            // Until both lists are in, the maps of an earlier run know better than a half-filled model.
            if !(service_list.complete && slice_list.complete) {
                continue;
            }
            if !filling {
                let (names, _) = self.model.names();
                names.into_iter().for_each(|n| self.model.mark(n));
                filling = true;
            }
            let clean = self.sync();
            // Services that could not be written are no reason to keep the others waiting.
            if initial && verified && !self.unread {
                if let Err(e) = self.take_over(&netlink).await {
                    tracing::warn!(error = %chain(&e), "cannot take over from an earlier run, trying again");
                    self.try_later();
                    continue;
                }
                initial = false;
                self.closing = Some(tokio::time::Instant::now());
                let (frontends, backends) = self.tables.sizes();
                let left_out = self.failed.len();
                tracing::info!(frontends, backends, left_out, "the maps hold the Services");
            }
            if clean && !initial {
                self.health.in_step();
                if !ready.is_set() {
                    ready.set();
                    orlop_base::memory::give_back();
                }
            }
        }
    }

    async fn follow_or_retry(&mut self, netlink: &Watch) {
        if let Err(e) = self.follow_node(netlink).await {
            tracing::warn!(error = %chain(&e), "trying again");
            self.try_later();
        }
    }

    /// The maps say what the API server says: from now on our programs run on them.
    async fn take_over(&mut self, netlink: &Watch) -> Result<(), Error> {
        {
            let mut datapath = self.datapath.lock();
            self.tables.drop_orphans(&mut datapath.maps).map_err(|source| Error::Adopt { source })?;
            datapath.attach(&mut self.programs)?;
        }
        self.follow_node(netlink).await
    }

    /// Whether node ports answer on what the cluster knows this node by.
    fn knows_primary(&self) -> bool {
        self.config.node_port_addresses.contains(&NodePortAddress::Primary)
    }

    /// Takes note of the node's zone and addresses; says whether the addresses changed.
    fn node_event(&mut self, event: Watched<Node>, list: &mut Listing) -> bool {
        let node = match event {
            Some(Ok(Event::InitApply(n) | Event::Apply(n))) => n,
            Some(Ok(Event::Delete(n))) if n.metadata.name.as_deref() == Some(&self.config.node_name) => {
                self.health.node_goes(true);
                return false;
            }
            Some(Ok(Event::InitDone)) => {
                list.refusal.answered();
                return false;
            }
            Some(Err(e)) => {
                list.failed(&e);
                return false;
            }
            _ => return false,
        };
        if node.metadata.name.as_deref() != Some(&self.config.node_name) {
            return false;
        }
        self.health.node_goes(convert::node_goes(&node));
        let primary = convert::primary_ips(&node);
        let zone = node.metadata.labels.unwrap_or_default().remove(keys::ZONE).unwrap_or_default();
        self.zone.send_replace(Some(zone));
        let changed = self.primary.as_ref() != Some(&primary);
        self.primary = Some(primary);
        changed
    }

    /// Goes without a zone when the node has not said any.
    fn settle_zone(&mut self) {
        if self.zone.borrow().is_none() {
            self.zone.send_replace(Some(String::new()));
        }
    }

    /// Closes connected sockets that talk to backends which are gone, and forgets whom others have sent to: these may have sent to
    /// many, and their next datagram goes elsewhere.
    fn close_sockets(&mut self) {
        self.closing = None;
        let read = |maps: &RealMaps| Ok::<_, MapFailure>((maps.connected()?, maps.sent()?));
        let (connected, sent) = match read(&self.datapath.lock().maps) {
            Ok(s) => s,
            Err(e) => {
                tracing::warn!(error = %chain(&e), "sockets of backends that are gone stay open");
                return;
            }
        };
        let stale = closer::stale(&connected, &self.tables, &self.model);
        self.forget_sockets(&closer::stale(&sent, &self.tables, &self.model));
        if stale.is_empty() {
            return;
        }
        let close = move || {
            let closed = diag::close_sockets(&stale);
            (stale, closed)
        };
        self.closer = Some(tokio::task::spawn_blocking(close));
    }

    fn forget_sockets(&self, sockets: &[SockKey]) {
        for key in sockets {
            // It is looked at again when it stays.
            let _ = self.datapath.lock().maps.del_socket(key);
        }
    }

    fn sockets_closed(&mut self, closed: Result<Closing, JoinError>) {
        match closed {
            Ok((sockets, Ok(Closed { count, unseen }))) => {
                // Not before: a proxy that is killed meanwhile leaves the rest to the next one.
                self.forget_sockets(&sockets);
                self.metrics.closed_sockets.inc_by(count as u64);
                tracing::debug!(closed = count, "closed sockets of backends that are gone");
                for protocol in unseen {
                    let name = if protocol == TCP { "tcp" } else { "udp" };
                    if self.unseen.insert(protocol) {
                        tracing::warn!(
                            "the kernel does not list {name} sockets, so that those of backends that are gone stay open; load the \
                             modules inet_diag and {name}_diag"
                        );
                    }
                }
            }
            Ok((_, Err(e))) => tracing::warn!(error = %e, "sockets of backends that are gone stay open"),
            Err(e) => tracing::warn!(error = %e, "sockets of backends that are gone stay open"),
        }
    }

    fn service_event(&mut self, event: Watched<watches::Object<Service>>, list: &mut Listing) {
        let gone = take_event(event, list, |o, present| {
            self.metrics.service_changes.inc();
            self.metrics.services_pending.inc();
            self.metrics.queued();
            self.model.set_service(&o.name, if present { o.value } else { None });
            o.name
        });
        if let Some(seen) = gone {
            let (names, _) = self.model.names();
            for n in names.iter().filter(|n| !seen.contains(&***n)) {
                self.model.set_service(n, None);
            }
        }
    }

    fn slice_event(&mut self, event: Watched<watches::Object<Slice>>, list: &mut Listing) {
        let gone = take_event(event, list, |o, present| {
            self.metrics.slice_changes.inc();
            self.metrics.slices_pending.inc();
            self.metrics.queued();
            self.model.set_slice(&o.name, if present { o.value } else { None });
            if !self.model.is_clean() && self.health.is_healthy() {
                self.triggers.extend(o.trigger);
            }
            o.name
        });
        if let Some(seen) = gone {
            let (_, names) = self.model.names();
            for n in names.iter().filter(|n| !seen.contains(&***n)) {
                self.model.set_slice(n, None);
            }
        }
    }

    /// What cannot be watched switches the rule off: everything else goes on.
    fn range_event(&mut self, event: Watched<ServiceCIDR>, list: &mut Listing) {
        // What was listed stays: a watch that goes on where it was would not bring it back.
        if let Some(Err(e @ watcher::Error::InitialListFailed(kube::Error::Api(status)))) = &event
            && [403, 404].contains(&status.code)
        {
            let lasts = status.code == 404 || list.refusal.begins(e).is_some();
            if lasts && self.ranges.forget() {
                tracing::warn!(
                    "the API server does not say which addresses are Services' alone: {}; packets to those that no Service has \
                     are not dropped. Kubernetes has ServiceCIDRs (networking.k8s.io/v1) from 1.33 on, and the ClusterRole \
                     system:node-proxier the right to watch them",
                    status.message
                );
            }
            return;
        }
        let gone = take_event(event, list, |o, present| {
            let cidrs = if present { convert::cidrs(&o) } else { Vec::new() };
            let name = o.metadata.name.unwrap_or_default();
            self.ranges.set(&name, cidrs);
            name
        });
        if let Some(seen) = gone {
            self.ranges.keep(&seen);
        }
    }

    /// Writes what changed. Returns whether nothing is left to do.
    fn sync(&mut self) -> bool {
        if self.model.is_clean() && (self.range_failed || !self.ranges.changed()) {
            return self.failed.is_empty() && !self.range_failed;
        }
        let start = Instant::now();
        let shared = self.datapath.clone();
        let mut datapath = shared.lock();
        let failed = if datapath.is_attached() {
            self.write(&mut datapath.maps)
        } else {
            self.write_at_once(&mut datapath.maps)
        };
        if !self.range_failed {
            self.range_failed = !self.write_ranges(&mut datapath.maps);
        }
        drop(datapath);
        // One that was in no set any more may still have connections.
        let lost = self.tables.take_lost() | self.model.take_gone();
        if lost && self.closing.is_none() {
            self.closing = Some(tokio::time::Instant::now() + CLOSE_AFTER);
        }
        for (name, e) in failed {
            self.metrics.failures.inc();
            if self.failed.insert(name.clone()) {
                tracing::warn!(service = %name, error = %chain(&e), "cannot write maps, trying again");
            }
        }
        let clean = self.failed.is_empty() && !self.range_failed;
        if clean {
            self.pause = RETRY;
            self.metrics.synced(start.elapsed(), &self.triggers);
            self.metrics.services_pending.set(0);
            self.metrics.slices_pending.set(0);
            self.triggers.clear();
        } else {
            self.try_later();
        }
        let (frontends, backends) = self.tables.sizes();
        self.metrics.frontends.set(frontends as i64);
        self.metrics.backends.set(backends as i64);
        self.metrics.map_writes.inc_by(self.tables.writes() - self.writes_seen);
        self.writes_seen = self.tables.writes();
        clean
    }

    /// The first time, in few system calls. When one fails, what has been carried out is read back, and the rest is
    /// written change by change, so that what fails is known.
    fn write_at_once(&mut self, maps: &mut RealMaps) -> Vec<(Name, MapFailure)> {
        if self.unread && !self.read_back(maps) {
            return Vec::new();
        }
        let mut all = Gather::new(maps);
        let failed = self.write(&mut all);
        let error = match all.finish() {
            Ok(()) if failed.is_empty() => return failed,
            Ok(()) => None,
            Err(e) => Some(e),
        };
        if let Some(e) = error {
            tracing::warn!(error = %chain(&e), "cannot write maps, trying one by one");
        }
        if !self.read_back(maps) {
            return Vec::new();
        }
        self.model.names().0.into_iter().for_each(|n| self.model.mark(n));
        self.write(maps)
    }

    /// Takes for true what the maps hold; without that, all Services wait for the next try.
    fn read_back(&mut self, maps: &RealMaps) -> bool {
        let read = adopt(maps);
        self.unread = read.is_err();
        match read {
            Ok(tables) => (self.tables, self.writes_seen) = (tables, 0),
            Err(e) => {
                tracing::warn!(error = %chain(&e), "cannot read maps back, trying again");
                self.failed.extend(self.model.names().0);
            }
        }
        !self.unread
    }

    /// Brings the maps to what changed services want; returns those that failed.
    fn write(&mut self, maps: &mut dyn Maps) -> Vec<(Name, MapFailure)> {
        let mut failed = Vec::new();
        // Each round may free frontends that others wait for; services are finite, so rounds end.
        while !self.model.is_clean() {
            for name in self.model.take_dirty() {
                let wanted = desired(&self.model, &name, self.config.selection);
                let port = self.model.service(&name).map_or(0, |s| s.health_check_node_port);
                self.checks.set(&name, port, if port == 0 { 0 } else { self.model.ready_here(&name) });
                match self.tables.sync(maps, &name, &wanted) {
                    Ok(outcome) => {
                        self.failed.remove(&name);
                        outcome.retry.into_iter().for_each(|n| self.model.mark(n));
                    }
                    Err(e) => failed.push((name, e)),
                }
            }
        }
        self.checks.settle();
        failed
    }

    /// Says whether nothing is left to do.
    fn write_ranges(&mut self, maps: &mut dyn Maps) -> bool {
        let Some((wanted, left_out)) = self.ranges.wanted(self.model.node_ips()) else { return true };
        match self.tables.sync_service_range(maps, &wanted) {
            Ok(()) => {
                self.ranges.written();
                for net in left_out {
                    tracing::warn!(
                        %net,
                        "this node has an address of the Service range; packets to addresses there that no Service has are not \
                         dropped. Give the cluster another Service range, or the network another one"
                    );
                }
                true
            }
            Err(e) => {
                self.metrics.failures.inc();
                tracing::warn!(error = %chain(&e), "cannot write the Service range, trying again");
                false
            }
        }
    }

    fn try_later(&mut self) {
        self.health.behind();
        self.retry_soon();
    }

    /// What is to be tried again does not keep Services from being up to date.
    fn retry_soon(&mut self) {
        if self.retry.is_none() {
            self.retry = Some(tokio::time::Instant::now() + self.pause);
            self.pause = (self.pause * 2).min(MAX_RETRY);
        }
    }

    /// Tells the datapath the node's addresses and uplinks.
    async fn follow_node(&mut self, netlink: &Watch) -> Result<(), Error> {
        let interfaces = netlink.read().await.map_err(|source| Error::Addresses { source })?;
        let c = &self.config;
        // Until the cluster says it, what an earlier process knew.
        let primary = self.primary.clone().unwrap_or_else(|| self.tables.node_port_ips());
        let listed = addresses::listed(&c.node_port_addresses, &primary);
        let node = addresses::decide(&interfaces, listed.as_deref(), &c.uplinks, c.pod_packets);
        self.checks.listen_on(listed.map(|_| node.node_port_ips()));
        if self.model.node_ips() != node.ips {
            self.ranges.look_again();
        }
        self.model.set_node_ips(node.ips);
        let mut datapath = self.datapath.lock();
        let wanted = [(c.direct_return, config_flags::DIRECT), (c.host_routing, config_flags::HOST_ROUTING)];
        let flags = wanted.iter().filter(|(on, _)| *on).fold(node.flags, |all, (_, flag)| all | flag);
        datapath.maps.set_flags(flags).map_err(|source| Error::Adopt { source })?;
        self.tables
            .sync_locals(&mut datapath.maps, &node.locals)
            .map_err(|source| Error::Locals { source })?;
        if !datapath.is_attached() {
            return Ok(());
        }
        let mut wanted = Vec::with_capacity(node.uplinks.len());
        let mut unserved = HashSet::new();
        for (index, name, uplink) in node.uplinks {
            wanted.push(index);
            if self.uplinks.get(&index) == Some(&uplink) {
                continue;
            }
            match datapath.attach_uplink(index, &name, uplink) {
                Ok(()) => {
                    tracing::debug!(interface = %name, "serving");
                    self.uplinks.insert(index, uplink);
                }
                // It may go while we look at it, as pods' do; the event of its going comes next.
                Err(_) if if_nametoindex(name.as_str()) != Ok(index) => {
                    tracing::debug!(interface = %name, "gone before it was served");
                }
                Err(e) => {
                    unserved.insert(index);
                    if !self.unserved.contains(&index) {
                        tracing::warn!(interface = %name, error = %chain(&e), "Services do not answer there, trying again");
                    }
                }
            }
        }
        wanted.extend(node.down);
        self.uplinks.retain(|i, _| wanted.contains(i));
        datapath.keep_uplinks(&wanted)?;
        drop(datapath);
        self.unserved = unserved;
        if !self.unserved.is_empty() {
            self.retry_soon();
        }
        Ok(())
    }
}

type Watched<K> = Option<Result<Event<K>, watcher::Error>>;

/// Passes an event on; at the end of a list returns the names in it.
fn take_event<K>(
    event: Watched<K>,
    list: &mut Listing,
    mut apply: impl FnMut(K, bool) -> String,
) -> Option<HashSet<String>> {
    match event? {
        Ok(Event::Init) => list.seen = Some(HashSet::new()),
        Ok(Event::InitApply(o) | Event::Apply(o)) => {
            let name = apply(o, true);
            if let Some(seen) = &mut list.seen {
                seen.insert(name);
            }
        }
        Ok(Event::Delete(o)) => drop(apply(o, false)),
        Ok(Event::InitDone) => {
            list.complete = true;
            list.refusal.answered();
            return list.seen.take();
        }
        Err(e) => list.failed(&e),
    }
    None
}

/// The end of a task, which is taken away with it; for ever without one. Cancel-safe.
async fn join<T>(task: &mut Option<JoinHandle<T>>) -> Result<T, JoinError> {
    match task {
        Some(running) => {
            let end = running.await;
            *task = None;
            end
        }
        None => std::future::pending().await,
    }
}
