//! ListMetricDescriptors and ListPodSandboxMetrics: cAdvisor's names, so that the kubelet's /metrics/cadvisor keeps its contents
//! (KEP-2371).

use orlop_proto::cri;

use super::cgroup;
use crate::runtime::{Runtime, now_ns};
use crate::store::{ContainerPhase, SandboxPhase};

/// Labels of every metric, in this order; those of the network have `interface` after them.
const LABELS: [&str; 6] = ["id", "name", "image", "container", "pod", "namespace"];

type Read = fn(&cgroup::Usage) -> Option<u64>;

struct Described {
    name: &'static str,
    help: &'static str,
    kind: cri::MetricType,
    read: Read,
}

const COUNTER: cri::MetricType = cri::MetricType::Counter;
const GAUGE: cri::MetricType = cri::MetricType::Gauge;

const fn metric(name: &'static str, help: &'static str, kind: cri::MetricType, read: Read) -> Described {
    Described { name, help, kind, read }
}

fn psi_total(stats: &Option<cri::PsiStats>, full: bool) -> Option<u64> {
    let stats = stats.as_ref()?;
    let data = if full { stats.full.as_ref() } else { stats.some.as_ref() };
    data.map(|d| d.total / 1_000_000_000)
}

const CONTAINER: &[Described] = &[
    metric("container_cpu_usage_seconds_total", "Cumulative cpu time consumed in seconds.", COUNTER, |u| {
        Some(u.cpu_ns / 1_000_000_000)
    }),
    metric(
        "container_memory_usage_bytes",
        "Current memory usage in bytes, including all memory.",
        GAUGE,
        |u| Some(u.memory),
    ),
    metric("container_memory_working_set_bytes", "Current working set in bytes.", GAUGE, |u| {
        Some(u.working_set)
    }),
    metric("container_memory_rss", "Size of RSS in bytes.", GAUGE, |u| Some(u.rss)),
    metric("container_memory_swap", "Container swap usage in bytes.", GAUGE, |u| u.swap),
    metric("container_spec_memory_limit_bytes", "Memory limit for the container.", GAUGE, |u| {
        Some(u.memory_limit.unwrap_or(0))
    }),
    metric("container_memory_page_faults_total", "Cumulative count of page faults.", COUNTER, |u| {
        Some(u.page_faults)
    }),
    metric(
        "container_memory_major_page_faults_total",
        "Cumulative count of major page faults.",
        COUNTER,
        |u| Some(u.major_page_faults),
    ),
    metric("container_processes", "Number of processes running inside the container.", GAUGE, |u| {
        Some(u.processes)
    }),
    metric(
        "container_pressure_cpu_waiting_seconds_total",
        "Total time tasks waited for CPU.",
        COUNTER,
        |u| psi_total(&u.psi_cpu, false),
    ),
    metric(
        "container_pressure_cpu_stalled_seconds_total",
        "Total time no task could use the CPU.",
        COUNTER,
        |u| psi_total(&u.psi_cpu, true),
    ),
    metric(
        "container_pressure_memory_waiting_seconds_total",
        "Total time tasks waited for memory.",
        COUNTER,
        |u| psi_total(&u.psi_memory, false),
    ),
    metric(
        "container_pressure_memory_stalled_seconds_total",
        "Total time no task made progress for memory.",
        COUNTER,
        |u| psi_total(&u.psi_memory, true),
    ),
    metric("container_pressure_io_waiting_seconds_total", "Total time tasks waited for I/O.", COUNTER, |u| {
        psi_total(&u.psi_io, false)
    }),
    metric(
        "container_pressure_io_stalled_seconds_total",
        "Total time no task made progress for I/O.",
        COUNTER,
        |u| psi_total(&u.psi_io, true),
    ),
];

const NETWORK: [(&str, &str); 4] = [
    ("container_network_receive_bytes_total", "Cumulative count of bytes received."),
    ("container_network_receive_errors_total", "Cumulative count of errors encountered while receiving."),
    ("container_network_transmit_bytes_total", "Cumulative count of bytes transmitted."),
    ("container_network_transmit_errors_total", "Cumulative count of errors encountered while transmitting."),
];

/// What ListPodSandboxMetrics may return.
pub(crate) fn descriptors() -> Vec<cri::MetricDescriptor> {
    let labels = || LABELS.map(str::to_owned).to_vec();
    let of_container = CONTAINER.iter().map(|d| cri::MetricDescriptor {
        name: d.name.to_owned(),
        help: d.help.to_owned(),
        label_keys: labels(),
    });
    let of_network = NETWORK.iter().map(|(name, help)| {
        let mut label_keys = labels();
        label_keys.push("interface".to_owned());
        cri::MetricDescriptor { name: (*name).to_owned(), help: (*help).to_owned(), label_keys }
    });
    of_container.chain(of_network).collect()
}

fn metrics(usage: &cgroup::Usage, now: i64, labels: &[String]) -> Vec<cri::Metric> {
    CONTAINER
        .iter()
        .filter_map(|d| {
            Some(cri::Metric {
                name: d.name.to_owned(),
                timestamp: now,
                metric_type: d.kind as i32,
                label_values: labels.to_vec(),
                value: super::value((d.read)(usage)?),
            })
        })
        .collect()
}

fn network_metrics(usage: &cri::NetworkUsage, now: i64, labels: &[String]) -> Vec<cri::Metric> {
    let mut out = Vec::new();
    for i in usage.default_interface.iter().chain(&usage.interfaces) {
        let values = [&i.rx_bytes, &i.rx_errors, &i.tx_bytes, &i.tx_errors];
        for ((name, _), value) in NETWORK.iter().zip(values) {
            let mut label_values = labels.to_vec();
            label_values.push(i.name.clone());
            out.push(cri::Metric {
                name: (*name).to_owned(),
                timestamp: now,
                metric_type: COUNTER as i32,
                label_values,
                value: *value,
            });
        }
    }
    out
}

impl Runtime {
    pub async fn pod_sandbox_metrics(&self) -> Vec<cri::PodSandboxMetrics> {
        let mut out = Vec::new();
        for s in self.store.sandboxes() {
            let record = s.record();
            if record.phase != SandboxPhase::Ready {
                continue;
            }
            let now = now_ns();
            let meta = record.metadata();
            let pod_path = self.pod_cgroup(&s);
            let labels = |id: &str, name: &str, image: &str, container: &str| {
                [id, name, image, container, &meta.name, &meta.namespace].map(str::to_owned)
            };
            let mut pod = cri::PodSandboxMetrics { pod_sandbox_id: s.id.clone(), ..Default::default() };
            if let Some(path) = &pod_path
                && let Some(u) = cgroup::read(self.facts.cgroup_v2, path)
            {
                pod.metrics = metrics(&u, now, &labels(path, "", "", ""));
            }
            if record.namespaces().network() != cri::NamespaceMode::Node
                && let Some(n) = self.network_usage(&s, now).await
            {
                let own = labels(pod_path.as_deref().unwrap_or(&s.id), &s.id, "", "POD");
                pod.metrics.extend(network_metrics(&n, now, &own));
            }
            for c in self.store.containers_of(&s.id) {
                let r = c.record();
                if r.phase != ContainerPhase::Running {
                    continue;
                }
                let path = cgroup::host_path(&r.cgroups_path);
                let Some(u) = cgroup::read(self.facts.cgroup_v2, &path) else { continue };
                let image = r.config.image.as_ref().map(|i| i.image.as_str()).unwrap_or_default();
                let own = labels(&path, &r.id, image, &r.metadata().name);
                pod.container_metrics.push(cri::ContainerMetrics {
                    container_id: r.id.clone(),
                    metrics: metrics(&u, now, &own),
                });
            }
            out.push(pod);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_described_with_its_labels() {
        let described = descriptors();
        let usage = cgroup::Usage { swap: Some(1), ..Default::default() };
        let labels: Vec<String> = LABELS.map(str::to_owned).to_vec();
        for m in metrics(&usage, 1, &labels) {
            let d = described.iter().find(|d| d.name == m.name).unwrap();
            assert_eq!(d.label_keys.len(), m.label_values.len());
        }
    }
}
