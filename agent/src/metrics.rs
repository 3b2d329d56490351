//! The agent's own metrics, under upstream's names.

use orlop_base::telemetry::Metrics;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

use crate::probes::ProbeLabels;

/// Cheap handles; cloning shares the values.
#[derive(Clone)]
pub struct AgentMetrics {
    pub running_pods: Gauge,
    pub running_containers: Gauge,
    /// Seconds from the pod's first sight to its first running container being seen.
    pub pod_start_duration: Histogram,
    /// Seconds for one pass of a pod's worker.
    pub pod_worker_duration: Histogram,
    pub pleg_relist_duration: Histogram,
    pub started_containers: Counter,
    pub started_pods: Counter,
    pub evented_pleg_events: Counter,
    pub probes: Family<ProbeLabels, Counter>,
}

fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 18))
}

impl AgentMetrics {
    pub fn register(registry: &Metrics) -> AgentMetrics {
        let m = AgentMetrics {
            running_pods: Gauge::default(),
            running_containers: Gauge::default(),
            pod_start_duration: seconds(),
            pod_worker_duration: seconds(),
            pleg_relist_duration: seconds(),
            started_containers: Counter::default(),
            started_pods: Counter::default(),
            evented_pleg_events: Counter::default(),
            probes: Family::default(),
        };
        registry.register(|r| {
            r.register("kubelet_running_pods", "Pods with a running sandbox", m.running_pods.clone());
            r.register("kubelet_running_containers", "Containers running", m.running_containers.clone());
            r.register(
                "kubelet_pod_start_duration_seconds",
                "Seconds from seeing a pod to its first running container",
                m.pod_start_duration.clone(),
            );
            r.register(
                "kubelet_pod_worker_duration_seconds",
                "Seconds of one pass over a pod",
                m.pod_worker_duration.clone(),
            );
            r.register(
                "kubelet_pleg_relist_duration_seconds",
                "Seconds of one relist",
                m.pleg_relist_duration.clone(),
            );
            // The encoder appends _total to counters.
            r.register("kubelet_started_containers", "Containers started", m.started_containers.clone());
            r.register("kubelet_started_pods", "Sandboxes started", m.started_pods.clone());
            r.register(
                "kubelet_evented_pleg_events",
                "Container events received",
                m.evented_pleg_events.clone(),
            );
            r.register("prober_probe", "Probe attempts by result", m.probes.clone());
        });
        m
    }
}
