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
    pub started_user_namespaced_pods: Counter,
    pub started_user_namespaced_pods_errors: Counter,
    pub evented_pleg_events: Counter,
    pub probes: Family<ProbeLabels, Counter>,
}

fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 18))
}

impl AgentMetrics {
    pub fn register(metrics: &Metrics) -> AgentMetrics {
        AgentMetrics {
            running_pods: metrics.add(
                "kubelet_running_pods",
                "Pods with a running sandbox",
                Gauge::default(),
            ),
            running_containers: metrics.add(
                "kubelet_running_containers",
                "Containers running",
                Gauge::default(),
            ),
            pod_start_duration: metrics.add(
                "kubelet_pod_start_duration_seconds",
                "Seconds from seeing a pod to its first running container",
                seconds(),
            ),
            pod_worker_duration: metrics.add(
                "kubelet_pod_worker_duration_seconds",
                "Seconds of one pass over a pod",
                seconds(),
            ),
            pleg_relist_duration: metrics.add(
                "kubelet_pleg_relist_duration_seconds",
                "Seconds of one relist",
                seconds(),
            ),
            started_containers: metrics.add(
                "kubelet_started_containers",
                "Containers started",
                Counter::default(),
            ),
            started_pods: metrics.add("kubelet_started_pods", "Sandboxes started", Counter::default()),
            started_user_namespaced_pods: metrics.add(
                "kubelet_started_user_namespaced_pods",
                "Sandboxes with a user namespace started",
                Counter::default(),
            ),
            started_user_namespaced_pods_errors: metrics.add(
                "kubelet_started_user_namespaced_pods_errors",
                "Sandboxes with a user namespace that did not start",
                Counter::default(),
            ),
            evented_pleg_events: metrics.add(
                "kubelet_evented_pleg_events",
                "Container events received",
                Counter::default(),
            ),
            probes: metrics.add("prober_probe", "Probe attempts by result", Family::default()),
        }
    }
}
