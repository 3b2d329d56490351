//! Metrics under upstream's names (k8s.io/kubernetes pkg/proxy/metrics), so that dashboards keep working.

use std::time::{Duration, SystemTime};

use orlop_base::telemetry::Metrics;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ServicePort {
    pub service: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Policy {
    /// "internal" or "external".
    pub traffic_policy: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Code {
    pub code: u16,
}

/// The proxy's own measurements.
#[derive(Clone)]
pub struct ProxyMetrics {
    pub sync_seconds: Histogram,
    pub programming_seconds: Histogram,
    pub last_sync: Gauge,
    pub last_queued: Gauge,
    pub service_changes: Counter,
    pub slice_changes: Counter,
    pub failures: Counter,
    pub map_writes: Counter,
    pub closed_sockets: Counter,
    pub services_pending: Gauge,
    pub slices_pending: Gauge,
    pub no_local_endpoints: Family<Policy, Gauge>,
    pub healthz: Family<Code, Counter>,
    pub livez: Family<Code, Counter>,
    /// By service port.
    pub service_connections: Family<ServicePort, Gauge>,
    pub service_refusals: Family<ServicePort, Gauge>,
    pub frontends: Gauge,
    pub backends: Gauge,
    pub sock_translated: Gauge,
    pub sock_refused: Gauge,
    pub packet_connections: Gauge,
    pub packet_dropped: Gauge,
    pub unallocated: Gauge,
    pub fragments: Gauge,
    pub resumed: Gauge,
    pub short: Gauge,
    pub snat_exhausted: Gauge,
}

impl ProxyMetrics {
    pub fn register(metrics: &Metrics) -> ProxyMetrics {
        let k = |n: &str| format!("kubeproxy_{n}");
        let o = |n: &str| format!("orlop_proxy_{n}");
        ProxyMetrics {
            // From 10 µs to about 5 s: a sync of one service is far below upstream's first bucket.
            sync_seconds: metrics.add(
                k("sync_proxy_rules_duration_seconds"),
                "Time of one sync",
                Histogram::new(exponential_buckets(0.000_01, 2.0, 20)),
            ),
            programming_seconds: metrics.add(
                k("network_programming_duration_seconds"),
                "From a change of endpoints to the maps",
                Histogram::new(exponential_buckets(0.001, 2.0, 18)),
            ),
            last_sync: metrics.add(
                k("sync_proxy_rules_last_timestamp_seconds"),
                "When maps were last in step",
                Gauge::default(),
            ),
            last_queued: metrics.add(
                k("sync_proxy_rules_last_queued_timestamp_seconds"),
                "When the last change came",
                Gauge::default(),
            ),
            service_changes: metrics.add(
                k("sync_proxy_rules_service_changes"),
                "Service changes",
                Counter::default(),
            ),
            slice_changes: metrics.add(
                k("sync_proxy_rules_endpoint_changes"),
                "EndpointSlice changes",
                Counter::default(),
            ),
            services_pending: metrics.add(
                k("sync_proxy_rules_service_changes_pending"),
                "Service changes that wait for a sync",
                Gauge::default(),
            ),
            slices_pending: metrics.add(
                k("sync_proxy_rules_endpoint_changes_pending"),
                "EndpointSlice changes that wait for a sync",
                Gauge::default(),
            ),
            // Upstream's name for a gauge.
            no_local_endpoints: metrics.add(
                k("sync_proxy_rules_no_local_endpoints_total"),
                "Service addresses with a Local traffic policy, with endpoints, but none on this node",
                Family::default(),
            ),
            healthz: metrics.add(k("proxy_healthz"), "Answers of /healthz by code", Family::default()),
            livez: metrics.add(k("proxy_livez"), "Answers of /livez by code", Family::default()),
            service_connections: metrics.add(
                o("service_connections"),
                "Connections and datagram flows that got an endpoint, by service port",
                Family::default(),
            ),
            service_refusals: metrics.add(
                o("service_refusals"),
                "Connections without an endpoint, and from sources that are not admitted, by service port",
                Family::default(),
            ),
            failures: metrics.add(o("sync_failures"), "Syncs that failed", Counter::default()),
            map_writes: metrics.add(o("map_writes"), "Changes of BPF maps", Counter::default()),
            closed_sockets: metrics.add(
                o("closed_sockets"),
                "Sockets closed because their backend was gone",
                Counter::default(),
            ),
            frontends: metrics.add(o("frontends"), "Service addresses in the maps", Gauge::default()),
            backends: metrics.add(o("backends"), "Endpoints in the maps", Gauge::default()),
            sock_translated: metrics.add(
                o("socket_translations"),
                "Connects and datagrams translated",
                Gauge::default(),
            ),
            sock_refused: metrics.add(
                o("socket_refusals"),
                "Connects refused for want of an endpoint",
                Gauge::default(),
            ),
            packet_connections: metrics.add(
                o("packet_connections"),
                "Connections from outside",
                Gauge::default(),
            ),
            packet_dropped: metrics.add(o("packets_dropped"), "Packets dropped", Gauge::default()),
            unallocated: metrics.add(
                o("packets_for_no_service"),
                "Packets dropped that were for addresses of the Service range that no Service has",
                Gauge::default(),
            ),
            fragments: metrics.add(o("fragments"), "Fragments that were not translated", Gauge::default()),
            resumed: metrics.add(
                o("connections_resumed"),
                "TCP connections taken up in the middle, as a full table had dropped their entry",
                Gauge::default(),
            ),
            short: metrics.add(
                o("packets_host_routed"),
                "Packets that went past the stack's forwarding",
                Gauge::default(),
            ),
            snat_exhausted: metrics.add(
                o("source_ports_exhausted"),
                "Connections without a free port",
                Gauge::default(),
            ),
        }
    }

    pub fn synced(&self, took: Duration, triggers: &[SystemTime]) {
        self.sync_seconds.observe(took.as_secs_f64());
        let now = SystemTime::now();
        self.last_sync.set(seconds(now));
        for t in triggers {
            if let Ok(d) = now.duration_since(*t) {
                self.programming_seconds.observe(d.as_secs_f64());
            }
        }
    }

    pub fn queued(&self) {
        self.last_queued.set(seconds(SystemTime::now()));
    }
}

fn seconds(t: SystemTime) -> i64 {
    t.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64)
}
