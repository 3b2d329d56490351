//! What each cgroup of the tree allows. Pure: values in, limits out.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::PodSpec;
use orlop_api::pod::{QosClass, qos_class, requests};
use orlop_api::quantity::Amount;

use crate::spec::resources;

/// Shares of a cgroup that asked for nothing, the kernel's least.
pub const MIN_SHARES: i64 = 2;
/// Bytes of huge pages where there is no limit; the kernel rounds it down.
const UNBOUNDED: u64 = 1 << 62;

/// Limits of one cgroup. What is `None` is left as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Relative weight in version 1's unit, 2 to 262144.
    pub cpu_shares: Option<i64>,
    /// Microseconds of CPU time (-1 for no limit) in each period of so many microseconds.
    pub cpu_quota: Option<(i64, i64)>,
    /// Bytes.
    pub memory: Option<i64>,
    /// Processes.
    pub pids: Option<i64>,
    /// Bytes by page size as the kernel writes it (`2MB`).
    pub hugepages: BTreeMap<String, u64>,
}

/// The kernel's name of a huge page size: `hugepages-2Mi` is `2MB`.
fn page_size(resource: &str) -> Option<String> {
    resource.strip_prefix("hugepages-").map(|size| size.replace('i', "B"))
}

fn hugepages(amounts: &BTreeMap<String, Amount>, sizes: &[String]) -> BTreeMap<String, u64> {
    let mut all: BTreeMap<String, u64> = sizes.iter().map(|s| (s.clone(), 0)).collect();
    for (name, amount) in amounts {
        if let Some(limit) = page_size(name).and_then(|s| all.get_mut(&s)) {
            *limit = amount.units().max(0) as u64;
        }
    }
    all
}

/// Of a pod's cgroup. `period` is the CFS period, `None` without quotas; `pids` is not positive for no limit;
/// `sizes` are the huge page sizes that can be limited here.
pub fn pod(spec: &PodSpec, period: Option<Duration>, pids: i64, sizes: &[String]) -> Limits {
    let l = resources::pod(spec, period);
    let best_effort = qos_class(spec) == QosClass::BestEffort;
    Limits {
        cpu_shares: Some(if best_effort { MIN_SHARES } else { l.cpu_shares }),
        cpu_quota: l.cpu_quota.map(|q| (q, l.cpu_period)),
        memory: l.memory,
        pids: (pids > 0).then_some(pids),
        hugepages: hugepages(&requests(spec), sizes),
    }
}

/// Of the cgroup of a pod that runs: what has no limit any more loses the one it had.
pub fn pod_in_force(spec: &PodSpec, period: Option<Duration>, pids: i64, sizes: &[String]) -> Limits {
    let mut l = pod(spec, period, pids, sizes);
    l.cpu_quota.get_or_insert((-1, 100_000));
    l.memory.get_or_insert(-1);
    l
}

impl Limits {
    /// What neither of two limits hinders, for the time in which containers change from one to the other.
    pub fn wider(self, other: &Limits) -> Limits {
        let larger = |a: i64, b: i64| if a < 0 || b < 0 { -1 } else { a.max(b) };
        let quota = |(a, period): (i64, i64), (b, _): (i64, i64)| (larger(a, b), period);
        Limits {
            cpu_quota: self.cpu_quota.zip(other.cpu_quota).map(|(a, b)| quota(a, b)),
            memory: self.memory.zip(other.memory).map(|(a, b)| larger(a, b)),
            ..self
        }
    }
}

/// Of the cgroup of all Burstable pods, which asked for so many thousandths of a CPU together, or of all BestEffort ones.
pub fn class(milli: i64, sizes: &[String]) -> Limits {
    Limits {
        cpu_shares: Some(resources::shares(milli)),
        hugepages: sizes.iter().map(|s| (s.clone(), UNBOUNDED)).collect(),
        ..Default::default()
    }
}

/// Of the cgroup of all pods: what the node has, less what is reserved (upstream's node allocatable enforcement).
/// Eviction thresholds are not taken off, so that evictions come before the kernel's OOM killer.
pub fn node(available: &BTreeMap<String, Amount>, pids: Option<i64>, sizes: &[String]) -> Limits {
    Limits {
        cpu_shares: available.get("cpu").map(|a| resources::shares(a.milli())),
        memory: available.get("memory").map(|a| a.units()).filter(|b| *b > 0),
        pids,
        hugepages: hugepages(available, sizes),
        cpu_quota: None,
    }
}

/// cpu.weight of version 2 for cpu.shares of version 1, as upstream's kubelet converts pods' (runtimes have another
/// formula for containers).
pub fn weight(shares: i64) -> u64 {
    (1 + ((shares.clamp(2, 262_144) - 2) * 9999) / 262_142) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(resources: &[serde_json::Value]) -> PodSpec {
        let containers: Vec<_> = resources.iter().map(|r| json!({"name": "c", "resources": r})).collect();
        serde_json::from_value(json!({ "containers": containers })).unwrap()
    }

    fn pages(text: &[(&str, u64)]) -> BTreeMap<String, u64> {
        text.iter().map(|(k, v)| ((*k).to_owned(), *v)).collect()
    }

    #[test]
    fn pods_by_class() {
        let ms100 = Some(Duration::from_millis(100));
        let guaranteed = json!({"limits": {"cpu": "500m", "memory": "64Mi", "hugepages-2Mi": "4Mi"}});
        let burstable = json!({"requests": {"cpu": "100m"}, "limits": {"memory": "1Mi"}});
        let l = |cpu_shares, cpu_quota, memory, huge| Limits {
            cpu_shares: Some(cpu_shares),
            cpu_quota,
            memory,
            pids: Some(9),
            hugepages: pages(&[("2MB", huge)]),
        };
        let table = [
            (vec![guaranteed.clone()], ms100, l(512, Some((50_000, 100_000)), Some(64 << 20), 4 << 20)),
            (vec![guaranteed.clone()], None, l(512, Some((-1, 100_000)), Some(64 << 20), 4 << 20)),
            (vec![burstable.clone()], ms100, l(102, None, Some(1 << 20), 0)),
            (vec![burstable, json!({})], ms100, l(102, None, None, 0)),
            (vec![json!({})], ms100, l(2, None, None, 0)),
        ];
        for (resources, period, wanted) in table {
            let got = pod(&spec(&resources), period, 9, &["2MB".into()]);
            assert_eq!(got, wanted, "{resources:?} {period:?}");
        }
        assert_eq!(pod(&spec(&[guaranteed]), ms100, -1, &[]).pids, None);
    }

    #[test]
    fn between_two_sizes() {
        let of = |limits: serde_json::Value| {
            pod_in_force(&spec(&[json!({ "limits": limits })]), Some(Duration::from_millis(100)), 0, &[])
        };
        let (small, large) =
            (of(json!({"cpu": "1", "memory": "1Mi"})), of(json!({"cpu": "500m", "memory": "2Mi"})));
        let both = small.clone().wider(&large);
        assert_eq!((both.cpu_quota, both.memory), (Some((100_000, 100_000)), Some(2 << 20)));
        let open = small.wider(&of(json!({"memory": "1Mi"})));
        assert_eq!((open.cpu_quota, open.memory), (Some((-1, 100_000)), Some(1 << 20)));
    }

    #[test]
    fn the_tree_above_pods() {
        let sizes = ["1GB".to_owned(), "2MB".to_owned()];
        let c = class(1500, &sizes);
        assert_eq!((c.cpu_shares, c.memory, c.pids), (Some(1536), None, None));
        assert_eq!(c.hugepages, pages(&[("1GB", 1 << 62), ("2MB", 1 << 62)]));
        assert_eq!(class(0, &[]).cpu_shares, Some(2));
        let available = BTreeMap::from([
            ("cpu".to_owned(), Amount::from_units(2)),
            ("memory".to_owned(), Amount::from_units(1 << 30)),
            ("hugepages-2Mi".to_owned(), Amount::from_units(8 << 20)),
        ]);
        let n = node(&available, Some(4096), &sizes);
        assert_eq!(
            (n.cpu_shares, n.cpu_quota, n.memory, n.pids),
            (Some(2048), None, Some(1 << 30), Some(4096))
        );
        assert_eq!(n.hugepages, pages(&[("1GB", 0), ("2MB", 8 << 20)]));
    }

    #[test]
    fn weights() {
        assert_eq!((weight(2), weight(1024), weight(262_144)), (1, 39, 10_000));
    }
}
