//! ListMetricDescriptors and ListPodSandboxMetrics: cAdvisor's names and labels, so that the kubelet's /metrics/cadvisor keeps its
//! contents (KEP-2371). A value of the CRI is a whole number, so seconds are whole seconds.

use std::path::Path;

use orlop_proto::cri;

use super::cgroup::Usage;
use super::{cgroup, network};
use crate::runtime::{Runtime, now_ns};
use crate::store::{Container, ContainerPhase, Sandbox, SandboxPhase};

/// Labels of every metric, in this order; a metric's own come after them.
const LABELS: [&str; 6] = ["id", "name", "image", "container", "pod", "namespace"];

struct Described {
    name: &'static str,
    kind: cri::MetricType,
    /// Labels beside [`LABELS`].
    own: &'static [&'static str],
    help: &'static str,
}

const fn counter(name: &'static str, own: &'static [&'static str], help: &'static str) -> Described {
    Described { name, kind: cri::MetricType::Counter, own, help }
}

const fn gauge(name: &'static str, own: &'static [&'static str], help: &'static str) -> Described {
    Described { name, kind: cri::MetricType::Gauge, own, help }
}

const DEVICE: &[&str] = &["device"];
const INTERFACE: &[&str] = &["interface"];

/// What ListPodSandboxMetrics may return.
const METRICS: &[Described] = &[
    counter(
        "container_blkio_device_usage_total",
        &["device", "major", "minor", "operation"],
        "Bytes by disk and operation.",
    ),
    counter("container_cpu_cfs_periods_total", &[], "Periods of the CPU quota that have passed."),
    counter("container_cpu_cfs_throttled_periods_total", &[], "Periods in which the CPU quota was used up."),
    counter("container_cpu_cfs_throttled_seconds_total", &[], "Time held back by the CPU quota."),
    counter("container_cpu_system_seconds_total", &[], "CPU time in the kernel."),
    counter("container_cpu_usage_seconds_total", &["cpu"], "CPU time."),
    counter("container_cpu_user_seconds_total", &[], "CPU time in user space."),
    gauge("container_file_descriptors", &[], "Open file descriptors of all processes."),
    counter("container_fs_reads_bytes_total", DEVICE, "Bytes read from a disk."),
    counter("container_fs_reads_total", DEVICE, "Reads from a disk."),
    gauge("container_fs_usage_bytes", DEVICE, "Bytes of the writable layer."),
    counter("container_fs_writes_bytes_total", DEVICE, "Bytes written to a disk."),
    counter("container_fs_writes_total", DEVICE, "Writes to a disk."),
    gauge("container_last_seen", &[], "When the container was last seen, in seconds since 1970."),
    gauge("container_memory_cache", &[], "File pages in memory, in bytes."),
    counter("container_memory_failcnt", &[], "How often the memory limit was met."),
    counter("container_memory_failures_total", &["failure_type", "scope"], "Page faults."),
    gauge("container_memory_mapped_file", &[], "Mapped file pages, in bytes."),
    gauge("container_memory_max_usage_bytes", &[], "The most memory used so far."),
    gauge("container_memory_rss", &[], "Anonymous memory, in bytes."),
    gauge("container_memory_swap", &[], "Swap in use, in bytes."),
    gauge("container_memory_total_active_file_bytes", &[], "File pages used lately, in bytes."),
    gauge("container_memory_total_inactive_file_bytes", &[], "File pages not used lately, in bytes."),
    gauge("container_memory_usage_bytes", &[], "Memory in use, file pages included."),
    gauge("container_memory_working_set_bytes", &[], "Memory in use that cannot be freed at once."),
    counter("container_network_receive_bytes_total", INTERFACE, "Bytes received."),
    counter("container_network_receive_errors_total", INTERFACE, "Errors while receiving."),
    counter("container_network_receive_packets_dropped_total", INTERFACE, "Packets dropped while receiving."),
    counter("container_network_receive_packets_total", INTERFACE, "Packets received."),
    counter("container_network_transmit_bytes_total", INTERFACE, "Bytes sent."),
    counter("container_network_transmit_errors_total", INTERFACE, "Errors while sending."),
    counter("container_network_transmit_packets_dropped_total", INTERFACE, "Packets dropped while sending."),
    counter("container_network_transmit_packets_total", INTERFACE, "Packets sent."),
    counter("container_oom_events_total", &[], "Processes killed for want of memory."),
    counter("container_pressure_cpu_stalled_seconds_total", &[], "Time in which no task had the CPU."),
    counter("container_pressure_cpu_waiting_seconds_total", &[], "Time in which tasks waited for the CPU."),
    counter("container_pressure_io_stalled_seconds_total", &[], "Time in which no task went on for I/O."),
    counter("container_pressure_io_waiting_seconds_total", &[], "Time in which tasks waited for I/O."),
    counter(
        "container_pressure_memory_stalled_seconds_total",
        &[],
        "Time in which no task went on for memory.",
    ),
    counter("container_pressure_memory_waiting_seconds_total", &[], "Time in which tasks waited for memory."),
    gauge("container_processes", &[], "Processes."),
    gauge("container_sockets", &[], "Open sockets of all processes."),
    gauge("container_spec_cpu_period", &[], "Period of the CPU quota, in microseconds."),
    gauge("container_spec_cpu_quota", &[], "CPU quota per period, in microseconds."),
    gauge("container_spec_cpu_shares", &[], "CPU share."),
    gauge("container_spec_memory_limit_bytes", &[], "Memory limit; 0 is none."),
    gauge("container_spec_memory_reservation_limit_bytes", &[], "Memory reservation; 0 is none."),
    gauge("container_spec_memory_swap_limit_bytes", &[], "Limit of memory and swap; 0 is none."),
    gauge("container_start_time_seconds", &[], "When the container started, in seconds since 1970."),
    gauge("container_threads", &[], "Threads."),
    gauge("container_threads_max", &[], "Limit of threads; 0 is none."),
    gauge("container_ulimits_soft", &["ulimit"], "Soft limits of the first process."),
];

pub(crate) fn descriptors() -> Vec<cri::MetricDescriptor> {
    let labels = |own: &[&str]| LABELS.iter().chain(own).map(|l| (*l).to_owned()).collect();
    METRICS
        .iter()
        .map(|d| cri::MetricDescriptor {
            name: d.name.to_owned(),
            help: d.help.to_owned(),
            label_keys: labels(d.own),
        })
        .collect()
}

/// Metrics of one group of processes.
struct Rows<'a> {
    labels: &'a [String],
    now: i64,
    out: Vec<cri::Metric>,
}

impl Rows<'_> {
    fn put_with(&mut self, name: &str, own: &[&str], value: u64) {
        let Some(described) = METRICS.iter().find(|d| d.name == name) else { return };
        debug_assert_eq!(described.own.len(), own.len(), "{name}");
        self.out.push(cri::Metric {
            name: name.to_owned(),
            timestamp: self.now,
            metric_type: described.kind as i32,
            label_values: self.labels.iter().cloned().chain(own.iter().map(|l| (*l).to_owned())).collect(),
            value: super::value(value),
        });
    }

    fn put(&mut self, name: &str, value: u64) {
        self.put_with(name, &[], value);
    }

    fn usage(&mut self, u: &Usage) {
        const SECOND: u64 = 1_000_000_000;
        self.put_with("container_cpu_usage_seconds_total", &["total"], u.cpu_ns / SECOND);
        for (name, value) in [
            ("container_cpu_user_seconds_total", u.cpu_user_ns / SECOND),
            ("container_cpu_system_seconds_total", u.cpu_system_ns / SECOND),
            ("container_cpu_cfs_periods_total", u.periods),
            ("container_cpu_cfs_throttled_periods_total", u.throttled_periods),
            ("container_cpu_cfs_throttled_seconds_total", u.throttled_ns / SECOND),
            ("container_memory_usage_bytes", u.memory),
            ("container_memory_working_set_bytes", u.working_set),
            ("container_memory_rss", u.rss),
            ("container_memory_cache", u.cache),
            ("container_memory_mapped_file", u.mapped_file),
            ("container_memory_total_active_file_bytes", u.active_file),
            ("container_memory_total_inactive_file_bytes", u.inactive_file),
            ("container_memory_swap", u.swap.unwrap_or(0)),
            ("container_memory_max_usage_bytes", u.memory_peak.unwrap_or(u.memory)),
            ("container_memory_failcnt", u.memory_failures),
            ("container_oom_events_total", u.oom_kills),
            ("container_spec_memory_limit_bytes", u.memory_limit.unwrap_or(0)),
            ("container_threads", u.processes),
            ("container_threads_max", u.processes_limit.unwrap_or(0)),
            ("container_last_seen", self.now.unsigned_abs() / SECOND),
        ] {
            self.put(name, value);
        }
        for scope in ["container", "hierarchy"] {
            self.put_with("container_memory_failures_total", &["pgfault", scope], u.page_faults);
            self.put_with("container_memory_failures_total", &["pgmajfault", scope], u.major_page_faults);
        }
        for (of, stats) in [("cpu", &u.psi_cpu), ("memory", &u.psi_memory), ("io", &u.psi_io)] {
            let Some(stats) = stats else { continue };
            for (what, data) in [("waiting", &stats.some), ("stalled", &stats.full)] {
                let Some(data) = data else { continue };
                self.put(&format!("container_pressure_{of}_{what}_seconds_total"), data.total / SECOND);
            }
        }
        self.disks(&u.disks);
    }

    fn disks(&mut self, disks: &[cgroup::Disk]) {
        for d in disks {
            let device = device_name(d.major, d.minor);
            for (name, value) in [
                ("container_fs_reads_bytes_total", d.read_bytes),
                ("container_fs_writes_bytes_total", d.written_bytes),
                ("container_fs_reads_total", d.reads),
                ("container_fs_writes_total", d.writes),
            ] {
                self.put_with(name, &[&device], value);
            }
            let (major, minor) = (d.major.to_string(), d.minor.to_string());
            for (operation, value) in [("Read", d.read_bytes), ("Write", d.written_bytes)] {
                let own = [device.as_str(), &major, &minor, operation];
                self.put_with("container_blkio_device_usage_total", &own, value);
            }
        }
    }

    fn processes(&mut self, p: &Processes) {
        self.put("container_processes", p.count);
        self.put("container_file_descriptors", p.descriptors);
        self.put("container_sockets", p.sockets);
    }

    fn limits(&mut self, r: &cri::LinuxContainerResources) {
        let number = |v: i64| u64::try_from(v).unwrap_or(0);
        if r.cpu_quota > 0 {
            self.put("container_spec_cpu_quota", number(r.cpu_quota));
        }
        self.put("container_spec_cpu_period", if r.cpu_period > 0 { number(r.cpu_period) } else { 100_000 });
        self.put("container_spec_cpu_shares", if r.cpu_shares > 0 { number(r.cpu_shares) } else { 1024 });
        self.put("container_spec_memory_reservation_limit_bytes", 0);
        self.put("container_spec_memory_swap_limit_bytes", number(r.memory_swap_limit_in_bytes));
    }

    fn network(&mut self, interfaces: &[network::Counters]) {
        for i in interfaces {
            for (what, values) in [("receive", &i.received), ("transmit", &i.sent)] {
                for (suffix, value) in [
                    ("bytes", values.bytes),
                    ("packets", values.packets),
                    ("errors", values.errors),
                    ("packets_dropped", values.dropped),
                ] {
                    self.put_with(&format!("container_network_{what}_{suffix}_total"), &[&i.name], value);
                }
            }
        }
    }
}

/// `/dev/sda`, as the kernel names the disk; its numbers where it has no name.
fn device_name(major: u32, minor: u32) -> String {
    let numbers = format!("{major}:{minor}");
    let link = std::fs::read_link(Path::new("/sys/dev/block").join(&numbers)).ok();
    let name = link.and_then(|l| Some(l.file_name()?.to_string_lossy().into_owned()));
    name.map_or(numbers, |n| format!("/dev/{n}"))
}

/// What the processes of a group hold.
#[derive(Debug, Default, PartialEq, Eq)]
struct Processes {
    count: u64,
    descriptors: u64,
    sockets: u64,
}

/// Processes may end while they are looked at; then they hold nothing.
fn processes(pids: &[u32]) -> Processes {
    let mut out = Processes { count: pids.len() as u64, ..Default::default() };
    for pid in pids {
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            out.descriptors += 1;
            if std::fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:")) {
                out.sockets += 1;
            }
        }
    }
    out
}

/// The soft limit of open files from `/proc/<pid>/limits`; "unlimited" is none.
fn open_files_limit(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|l| l.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

impl Runtime {
    pub async fn pod_sandbox_metrics(&self) -> Vec<cri::PodSandboxMetrics> {
        let mut out = Vec::new();
        for s in self.store.sandboxes() {
            if s.record().phase == SandboxPhase::Ready {
                out.push(self.metrics_of(&s).await);
            }
        }
        out
    }

    async fn metrics_of(&self, s: &Sandbox) -> cri::PodSandboxMetrics {
        let now = now_ns();
        let record = s.record();
        let meta = record.metadata();
        let path = self.pod_cgroup(s);
        let labels = |id: &str, name: &str, image: &str, container: &str| {
            [id, name, image, container, &meta.name, &meta.namespace].map(str::to_owned)
        };
        let mut pod = cri::PodSandboxMetrics { pod_sandbox_id: s.id.clone(), ..Default::default() };
        if let Some(path) = &path
            && let Some(u) = cgroup::read(self.facts.cgroup_v2, path)
        {
            let own = labels(path, "", "", "");
            let mut rows = Rows { labels: &own, now, out: Vec::new() };
            rows.usage(&u);
            rows.put("container_start_time_seconds", seconds(record.created_at_ns));
            pod.metrics = rows.out;
        }
        if record.namespaces().network() != cri::NamespaceMode::Node
            && let Some(interfaces) = self.network_counters(s).await
        {
            let own = labels(path.as_deref().unwrap_or(&s.id), &s.id, "", "POD");
            let mut rows = Rows { labels: &own, now, out: Vec::new() };
            rows.network(&interfaces);
            pod.metrics.extend(rows.out);
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
            let mut rows = Rows { labels: &own, now, out: Vec::new() };
            rows.usage(&u);
            self.of_container(&c, &path, &mut rows).await;
            let metrics = rows.out;
            pod.container_metrics.push(cri::ContainerMetrics { container_id: r.id.clone(), metrics });
        }
        pod
    }

    async fn of_container(&self, c: &Container, path: &str, rows: &mut Rows<'_>) {
        let r = c.record();
        rows.processes(&processes(&cgroup::pids(self.facts.cgroup_v2, path)));
        rows.limits(&r.resources);
        rows.put("container_start_time_seconds", seconds(r.started_at_ns));
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", r.pid)).unwrap_or_default();
        if let Some(limit) = open_files_limit(&limits) {
            rows.put_with("container_ulimits_soft", &["max_open_files"], limit);
        }
        // A container that is being removed has no layer any more.
        if let Some(layer) = self.layer(&c.id).await {
            rows.put_with("container_fs_usage_bytes", &["overlay"], layer.usage.bytes);
        }
    }
}

fn seconds(ns: i64) -> u64 {
    ns.unsigned_abs() / 1_000_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What upstream's node test (`container_metrics_test.go`) asks of a kubelet, without those below.
    const UPSTREAM: &str = "container_blkio_device_usage_total container_cpu_system_seconds_total \
        container_cpu_usage_seconds_total container_cpu_user_seconds_total container_file_descriptors \
        container_fs_reads_bytes_total container_fs_reads_total container_fs_usage_bytes \
        container_fs_writes_bytes_total container_fs_writes_total container_last_seen container_memory_cache \
        container_memory_failcnt container_memory_failures_total container_memory_mapped_file \
        container_memory_max_usage_bytes container_memory_rss container_memory_swap container_memory_usage_bytes \
        container_memory_working_set_bytes container_network_receive_bytes_total \
        container_network_receive_errors_total container_network_receive_packets_dropped_total \
        container_network_receive_packets_total container_network_transmit_bytes_total \
        container_network_transmit_errors_total container_network_transmit_packets_dropped_total \
        container_network_transmit_packets_total container_oom_events_total container_processes container_sockets \
        container_spec_cpu_period container_spec_cpu_shares container_spec_memory_limit_bytes \
        container_spec_memory_reservation_limit_bytes container_spec_memory_swap_limit_bytes \
        container_start_time_seconds container_threads container_threads_max container_ulimits_soft";

    #[test]
    fn upstreams_names_are_described_once() {
        let names: Vec<&str> = METRICS.iter().map(|d| d.name).collect();
        for name in UPSTREAM.split_whitespace() {
            assert!(names.contains(&name), "{name}");
        }
        let mut sorted = names.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted, names, "in order, and no name twice");
        // Of a cgroup today's kernels know no queue times, merges or sectors; cAdvisor reports zeros.
        assert!(!names.iter().any(|n| n.contains("merged") || n.contains("sector")));
    }

    #[test]
    fn every_metric_is_described_with_its_labels() {
        let described = descriptors();
        let psi = Some(cri::PsiStats {
            full: Some(cri::PsiData { total: 3_000_000_000, ..Default::default() }),
            some: Some(cri::PsiData::default()),
        });
        let disk = cgroup::Disk { major: 999, minor: 1, read_bytes: 5, ..Default::default() };
        let usage =
            Usage { psi_cpu: psi, psi_io: psi, psi_memory: psi, disks: vec![disk], ..Default::default() };
        let labels: Vec<String> = LABELS.map(str::to_owned).to_vec();
        let mut rows = Rows { labels: &labels, now: 1, out: Vec::new() };
        rows.usage(&usage);
        rows.processes(&Processes::default());
        rows.limits(&cri::LinuxContainerResources { cpu_quota: 1, ..Default::default() });
        rows.network(&[network::Counters { name: "eth0".into(), ..Default::default() }]);
        assert!(rows.out.len() > 50);
        for m in &rows.out {
            let d = described.iter().find(|d| d.name == m.name).unwrap();
            assert_eq!(d.label_keys.len(), m.label_values.len(), "{}", m.name);
        }
        let stalled =
            rows.out.iter().find(|m| m.name == "container_pressure_io_stalled_seconds_total").unwrap();
        assert_eq!(stalled.value.unwrap().value, 3);
        let read = rows.out.iter().find(|m| m.name == "container_fs_reads_bytes_total").unwrap();
        assert_eq!((read.label_values[6].as_str(), read.value.unwrap().value), ("999:1", 5));
    }

    #[test]
    fn limits_and_processes() {
        let text = "Limit   Soft Limit  Hard Limit  Units\nMax open files            1024  4096  files\n";
        assert_eq!(open_files_limit(text), Some(1024));
        assert_eq!(open_files_limit("Max open files  unlimited unlimited files\n"), None);
        let _socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let own = processes(&[std::process::id(), 0]);
        assert!(own.count == 2 && own.descriptors > 0 && own.sockets > 0);
    }
}
