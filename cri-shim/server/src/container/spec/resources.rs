//! CRI resources in OCI form.

use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources};
use orlop_proto::cri;

use super::invalid;
use crate::error::Result;
use crate::facts::Facts;

/// Zero and empty mean "not given" in the CRI.
pub(crate) fn resources(r: &cri::LinuxContainerResources, facts: &Facts) -> Result<LinuxResources> {
    let mut out = LinuxResources::default();
    out.set_devices(None);
    let some = |v: i64| (v != 0).then_some(v);
    let unsigned = |what: &str, v: i64| {
        some(v).map(|v| u64::try_from(v).map_err(|_| invalid(format!("{what} {v} is negative")))).transpose()
    };
    let text = |s: &String| (!s.is_empty()).then(|| s.clone());
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(unsigned("cpu_shares", r.cpu_shares)?)
        .set_quota(some(r.cpu_quota))
        .set_period(unsigned("cpu_period", r.cpu_period)?)
        .set_cpus(text(&r.cpuset_cpus))
        .set_mems(text(&r.cpuset_mems));
    out.set_cpu(Some(cpu));
    if r.memory_limit_in_bytes != 0 || r.memory_swap_limit_in_bytes != 0 {
        let mut memory = LinuxMemory::default();
        let limit = some(r.memory_limit_in_bytes);
        // Without a limit of its own a container gets no swap beyond its memory.
        let swap = some(r.memory_swap_limit_in_bytes).or(limit).filter(|_| facts.swap_accounting);
        memory.set_limit(limit).set_swap(swap);
        out.set_memory(Some(memory));
    }
    // The kubelet names every page size with a limit of 0, also on machines that cannot limit them; so do upstream runtimes.
    if !r.hugepage_limits.is_empty() && facts.hugetlb {
        let limits = r.hugepage_limits.iter().map(|h| {
            let mut limit = LinuxHugepageLimit::default();
            limit.set_page_size(h.page_size.clone()).set_limit(i64::try_from(h.limit).unwrap_or(i64::MAX));
            limit
        });
        out.set_hugepage_limits(Some(limits.collect()));
    }
    if facts.cgroup_v2 && !r.unified.is_empty() {
        out.set_unified(Some(r.unified.clone()));
    }
    Ok(out)
}

/// `update` over `held`: what is not given stays (KEP-1287).
pub(crate) fn merge(
    held: &cri::LinuxContainerResources,
    update: &cri::LinuxContainerResources,
) -> cri::LinuxContainerResources {
    let pick = |new: i64, old: i64| if new != 0 { new } else { old };
    let text = |new: &String, old: &String| if new.is_empty() { old.clone() } else { new.clone() };
    let mut unified = held.unified.clone();
    unified.extend(update.unified.clone());
    cri::LinuxContainerResources {
        cpu_period: pick(update.cpu_period, held.cpu_period),
        cpu_quota: pick(update.cpu_quota, held.cpu_quota),
        cpu_shares: pick(update.cpu_shares, held.cpu_shares),
        memory_limit_in_bytes: pick(update.memory_limit_in_bytes, held.memory_limit_in_bytes),
        oom_score_adj: pick(update.oom_score_adj, held.oom_score_adj),
        cpuset_cpus: text(&update.cpuset_cpus, &held.cpuset_cpus),
        cpuset_mems: text(&update.cpuset_mems, &held.cpuset_mems),
        hugepage_limits: if update.hugepage_limits.is_empty() {
            held.hugepage_limits.clone()
        } else {
            update.hugepage_limits.clone()
        },
        unified,
        memory_swap_limit_in_bytes: pick(update.memory_swap_limit_in_bytes, held.memory_swap_limit_in_bytes),
    }
}
