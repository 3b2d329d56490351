//! Requests and limits as CRI's Linux resources.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use orlop_api::pod::{QosClass, is_sidecar, limits, qos_class, requests};
use orlop_api::quantity::Amount;
use orlop_proto::cri::{HugepageLimit, LinuxContainerResources};

/// cpu.shares for a number of thousandths of a CPU.
pub fn shares(milli: i64) -> i64 {
    if milli <= 0 { 2 } else { (milli.saturating_mul(1024) / 1000).clamp(2, 262_144) }
}

/// CFS quota in microseconds for a period in microseconds; zero for no limit. At least 1 ms, as the kernel wants.
pub fn quota(milli: i64, period: i64) -> i64 {
    if milli <= 0 { 0 } else { (milli.saturating_mul(period) / 1000).max(1000) }
}

fn amount(
    r: Option<&ResourceRequirements>,
    pick: fn(
        &ResourceRequirements,
    ) -> Option<
        &std::collections::BTreeMap<String, k8s_openapi::apimachinery::pkg::api::resource::Quantity>,
    >,
    name: &str,
) -> Option<Amount> {
    r.and_then(pick).and_then(|m| m.get(name)).and_then(|q| Amount::try_from(q).ok())
}

fn request(c: &Container, name: &str) -> Option<Amount> {
    amount(c.resources.as_ref(), |r| r.requests.as_ref(), name)
        .or_else(|| amount(c.resources.as_ref(), |r| r.limits.as_ref(), name))
}

fn limit(c: &Container, name: &str) -> Option<Amount> {
    amount(c.resources.as_ref(), |r| r.limits.as_ref(), name)
}

const GUARANTEED_OOM: i64 = -997;
const BEST_EFFORT_OOM: i64 = 1000;
/// Priority from which a pod counts as critical.
const CRITICAL: i32 = 2_000_000_000;

/// How soon the kernel should kill this container when memory runs out (upstream's `GetContainerOOMScoreAdjust`).
/// `capacity` is the node's memory in bytes.
pub fn oom_score_adj(pod: &Pod, c: &Container, capacity: i64) -> i64 {
    let Some(spec) = &pod.spec else { return BEST_EFFORT_OOM };
    let node_critical = spec.priority_class_name.as_deref() == Some("system-node-critical")
        || spec.priority.is_some_and(|p| p >= CRITICAL + 1000);
    let class = qos_class(spec);
    if node_critical || class == QosClass::Guaranteed {
        return GUARANTEED_OOM;
    }
    if class == QosClass::BestEffort || capacity <= 0 {
        return BEST_EFFORT_OOM;
    }
    let memory = |c: &Container| request(c, "memory").map_or(0, Amount::units);
    let score = |bytes: i64| 1000 - (1000 * bytes as i128 / capacity as i128) as i64;
    let mut adj = score(memory(c));
    if is_sidecar(c) {
        let least = spec.containers.iter().map(memory).min().unwrap_or(0);
        adj = adj.min(score(least));
    }
    adj.clamp(1000 + GUARANTEED_OOM, BEST_EFFORT_OOM - 1)
}

fn hugepages(c: &Container) -> Vec<HugepageLimit> {
    let all = c.resources.as_ref().and_then(|r| r.limits.as_ref()).into_iter().flatten();
    all.filter_map(|(k, v)| {
        let size = k.strip_prefix("hugepages-")?;
        let limit = Amount::try_from(v).ok()?.units().max(0) as u64;
        // The kernel writes 2MB where Kubernetes writes 2Mi.
        Some(HugepageLimit { page_size: size.replace('i', "B"), limit })
    })
    .collect()
}

/// The CRI resources of a container. `period` is the CFS period, `None` without quotas.
pub fn container(
    pod: &Pod,
    c: &Container,
    capacity: i64,
    period: Option<Duration>,
) -> LinuxContainerResources {
    let cpu_limit = limit(c, "cpu").map_or(0, Amount::milli);
    let period = period.map_or(0, |p| p.as_micros() as i64);
    LinuxContainerResources {
        cpu_period: if cpu_limit > 0 { period } else { 0 },
        cpu_quota: if period > 0 { quota(cpu_limit, period) } else { 0 },
        cpu_shares: shares(request(c, "cpu").map_or(0, Amount::milli)),
        memory_limit_in_bytes: limit(c, "memory").map_or(0, Amount::units),
        oom_score_adj: oom_score_adj(pod, c, capacity),
        hugepage_limits: hugepages(c),
        ..Default::default()
    }
}

/// The same for a container that runs: what has no limit any more loses the one it had.
pub fn running_container(
    pod: &Pod,
    c: &Container,
    capacity: i64,
    period: Option<Duration>,
) -> LinuxContainerResources {
    let mut r = container(pod, c, capacity, period);
    if r.cpu_quota == 0 {
        r.cpu_quota = -1;
    }
    if r.memory_limit_in_bytes == 0 {
        r.memory_limit_in_bytes = -1;
    }
    r
}

/// The limits of the pod's own cgroup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodLimits {
    pub cpu_shares: i64,
    /// Microseconds per period, -1 without quotas; `None` when some container has no cpu limit.
    pub cpu_quota: Option<i64>,
    pub cpu_period: i64,
    /// `None` when some container has no memory limit.
    pub memory: Option<i64>,
}

/// What the pod's cgroup allows: a limit holds for the pod only when every container has one.
pub fn pod(spec: &k8s_openapi::api::core::v1::PodSpec, period: Option<Duration>) -> PodLimits {
    let all = || spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let pod_level = |name: &str| amount(spec.resources.as_ref(), |r| r.limits.as_ref(), name).is_some();
    let every = |name: &str| pod_level(name) || all().all(|c| limit(c, name).is_some_and(|a| !a.is_zero()));
    let (req, lim) = (requests(spec), limits(spec));
    let milli = |m: &orlop_api::pod::Resources, n: &str| m.get(n).map_or(0, |a| a.milli());
    let enforced = period.is_some();
    let period = period.map_or(100_000, |p| p.as_micros() as i64);
    let cpu_quota = |milli: i64| if enforced { quota(milli, period) } else { -1 };
    PodLimits {
        cpu_shares: shares(milli(&req, "cpu")),
        cpu_quota: every("cpu").then(|| cpu_quota(milli(&lim, "cpu"))),
        cpu_period: period,
        memory: every("memory").then(|| lim.get("memory").map_or(0, |a| a.units())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod_of(resources: serde_json::Value) -> Pod {
        serde_json::from_value(
            json!({"metadata": {}, "spec": {"containers": [{"name": "a", "resources": resources}]}}),
        )
        .unwrap()
    }

    #[test]
    fn oom_scores() {
        const GI: i64 = 1 << 30;
        for (r, wanted) in [
            (json!({}), 1000),
            (json!({"limits": {"cpu": "1", "memory": "1Gi"}}), -997),
            (json!({"requests": {"memory": "1Gi"}}), 900),
            (json!({"requests": {"cpu": "1m"}}), 999),
            (json!({"requests": {"memory": "10Gi"}}), 3),
        ] {
            let p = pod_of(r.clone());
            assert_eq!(oom_score_adj(&p, &p.spec.as_ref().unwrap().containers[0], 10 * GI), wanted, "{r}");
        }
    }

    #[test]
    fn linux_resources() {
        let p = pod_of(
            json!({"limits": {"cpu": "500m", "memory": "64Mi", "hugepages-2Mi": "4Mi"}, "requests": {"cpu": "250m"}}),
        );
        let spec = p.spec.as_ref().unwrap();
        let r = container(&p, &spec.containers[0], 1 << 30, Some(Duration::from_millis(100)));
        assert_eq!((r.cpu_shares, r.cpu_quota, r.cpu_period), (256, 50_000, 100_000));
        assert_eq!(r.memory_limit_in_bytes, 64 << 20);
        assert_eq!(r.hugepage_limits[0].page_size, "2MB");
        let l = super::pod(spec, Some(Duration::from_millis(100)));
        assert_eq!((l.cpu_shares, l.cpu_quota, l.memory), (256, Some(50_000), Some(64 << 20)));
        let open = super::pod(pod_of(json!({"requests": {"cpu": "1"}})).spec.as_ref().unwrap(), None);
        assert_eq!((open.cpu_quota, open.memory, open.cpu_shares), (None, None, 1024));
    }
}
