//! Stats and metrics RPCs.

pub(crate) mod cgroup;
pub(crate) mod layers;
pub(crate) mod metrics;
mod network;

use orlop_proto::cri;
use parking_lot::Mutex;

use crate::error::Result;
use crate::filter::labels_fit;
use crate::runtime::{Runtime, now_ns};
use crate::store::{Container, ContainerPhase, Sandbox, SandboxPhase};
use cgroup::Usage;

fn value(v: u64) -> Option<cri::UInt64Value> {
    Some(cri::UInt64Value { value: v })
}

/// Nanoseconds of CPU per second since the last call, when there was one.
fn rate(sample: &Mutex<Option<(i64, u64)>>, now: i64, total: u64) -> Option<cri::UInt64Value> {
    let last = sample.lock().replace((now, total));
    let (then, before) = last?;
    let elapsed = u64::try_from(now - then).ok().filter(|e| *e > 0)?;
    let used = u128::from(total.saturating_sub(before)) * 1_000_000_000 / u128::from(elapsed);
    value(u64::try_from(used).unwrap_or(u64::MAX))
}

fn cpu(usage: &Usage, now: i64, sample: &Mutex<Option<(i64, u64)>>) -> cri::CpuUsage {
    cri::CpuUsage {
        timestamp: now,
        usage_core_nano_seconds: value(usage.cpu_ns),
        usage_nano_cores: rate(sample, now, usage.cpu_ns),
        psi: usage.psi_cpu,
    }
}

fn memory(usage: &Usage, now: i64) -> cri::MemoryUsage {
    cri::MemoryUsage {
        timestamp: now,
        working_set_bytes: value(usage.working_set),
        available_bytes: usage.memory_limit.and_then(|l| value(l.saturating_sub(usage.working_set))),
        usage_bytes: value(usage.memory),
        rss_bytes: value(usage.rss),
        page_faults: value(usage.page_faults),
        major_page_faults: value(usage.major_page_faults),
        psi: usage.psi_memory,
    }
}

impl Runtime {
    async fn stats_of(&self, container: &Container) -> cri::ContainerStats {
        let r = container.record();
        let now = now_ns();
        let mut out = cri::ContainerStats {
            attributes: Some(cri::ContainerAttributes {
                id: r.id.clone(),
                metadata: Some(r.metadata()),
                labels: r.config.labels.clone(),
                annotations: r.config.annotations.clone(),
            }),
            ..Default::default()
        };
        // A container that is being removed has no layer any more.
        if let Some(layer) = self.layer(&container.id).await {
            out.writable_layer = Some(cri::FilesystemUsage {
                timestamp: layer.at_ns,
                fs_id: Some(cri::FilesystemIdentifier {
                    mountpoint: self.images.root().to_string_lossy().into_owned(),
                }),
                used_bytes: value(layer.usage.bytes),
                inodes_used: value(layer.usage.inodes),
            });
        }
        if r.phase == ContainerPhase::Running
            && let Some(usage) = cgroup::read(self.facts.cgroup_v2, &cgroup::host_path(&r.cgroups_path))
        {
            out.cpu = Some(cpu(&usage, now, &container.cpu_sample));
            out.memory = Some(memory(&usage, now));
            out.swap = Some(cri::SwapUsage {
                timestamp: now,
                swap_available_bytes: usage
                    .swap_limit
                    .and_then(|l| value(l.saturating_sub(usage.swap.unwrap_or(0)))),
                swap_usage_bytes: usage.swap.and_then(value),
            });
            out.io = usage.psi_io.map(|psi| cri::IoUsage { timestamp: now, psi: Some(psi) });
        }
        out
    }

    pub async fn container_stats(&self, id: &str) -> Result<cri::ContainerStatsResponse> {
        let container = self.store.container(id)?;
        Ok(cri::ContainerStatsResponse { stats: Some(self.stats_of(&container).await) })
    }

    pub async fn list_container_stats(
        &self,
        filter: Option<cri::ContainerStatsFilter>,
    ) -> Vec<cri::ContainerStats> {
        let filter = filter.unwrap_or_default();
        let mut out = Vec::new();
        for c in self.store.containers() {
            let r = c.record();
            if r.id.starts_with(&filter.id)
                && r.sandbox_id.starts_with(&filter.pod_sandbox_id)
                && labels_fit(&r.config.labels, &filter.label_selector)
                && r.phase == ContainerPhase::Running
            {
                out.push(self.stats_of(&c).await);
            }
        }
        out
    }

    /// The pod's own cgroup, when the kubelet made one.
    pub(crate) fn pod_cgroup(&self, sandbox: &Sandbox) -> Option<String> {
        let parent = sandbox.record().config.linux.as_ref()?.cgroup_parent.clone();
        (!parent.is_empty()).then(|| cgroup::slice_path(&parent))
    }

    async fn sandbox_stats_of(&self, sandbox: &Sandbox) -> cri::PodSandboxStats {
        let r = sandbox.record();
        let now = now_ns();
        let mut linux = cri::LinuxPodSandboxStats::default();
        let mut sum = Usage::default();
        for c in self.store.containers_of(&sandbox.id) {
            let record = c.record();
            if record.phase != ContainerPhase::Running {
                continue;
            }
            linux.containers.push(self.stats_of(&c).await);
            if let Some(u) = cgroup::read(self.facts.cgroup_v2, &cgroup::host_path(&record.cgroups_path)) {
                sum.add(&u);
            }
        }
        let usage =
            self.pod_cgroup(sandbox).and_then(|p| cgroup::read(self.facts.cgroup_v2, &p)).unwrap_or(sum);
        linux.cpu = Some(cpu(&usage, now, &sandbox.cpu_sample));
        linux.memory = Some(memory(&usage, now));
        linux.io = usage.psi_io.map(|psi| cri::IoUsage { timestamp: now, psi: Some(psi) });
        linux.process = Some(cri::ProcessUsage { timestamp: now, process_count: value(usage.processes) });
        if r.phase == SandboxPhase::Ready && r.namespaces().network() != cri::NamespaceMode::Node {
            linux.network = self.network_usage(sandbox, now).await;
        }
        cri::PodSandboxStats {
            attributes: Some(cri::PodSandboxAttributes {
                id: r.id.clone(),
                metadata: Some(r.metadata()),
                labels: r.config.labels.clone(),
                annotations: r.config.annotations.clone(),
            }),
            linux: Some(linux),
            windows: None,
        }
    }

    pub async fn pod_sandbox_stats(&self, id: &str) -> Result<cri::PodSandboxStatsResponse> {
        let sandbox = self.store.sandbox(id)?;
        sandbox.ready("read its stats")?;
        Ok(cri::PodSandboxStatsResponse { stats: Some(self.sandbox_stats_of(&sandbox).await) })
    }

    pub async fn list_pod_sandbox_stats(
        &self,
        filter: Option<cri::PodSandboxStatsFilter>,
    ) -> Vec<cri::PodSandboxStats> {
        let filter = filter.unwrap_or_default();
        let mut out = Vec::new();
        for s in self.store.sandboxes() {
            let r = s.record();
            if r.id.starts_with(&filter.id)
                && labels_fit(&r.config.labels, &filter.label_selector)
                && r.phase == SandboxPhase::Ready
            {
                out.push(self.sandbox_stats_of(&s).await);
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_needs_two_samples() {
        let sample = Mutex::new(None);
        assert_eq!(rate(&sample, 1_000, 5), None);
        let half = rate(&sample, 1_000 + 2_000_000_000, 5 + 1_000_000_000).unwrap();
        assert_eq!(half.value, 500_000_000);
        assert_eq!(rate(&sample, 1_000 + 2_000_000_000, 9), None);
    }
}
