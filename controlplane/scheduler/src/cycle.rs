//! One scheduling decision.

use std::collections::BTreeMap;

use rand::Rng;

use crate::cache::Cache;
use crate::framework::{Filter, NodeInfo, PodInfo, Score};

/// No node takes the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FitError {
    pub nodes: usize,
    /// How many nodes gave each reason.
    pub reasons: BTreeMap<String, usize>,
}

impl std::fmt::Display for FitError {
    /// The form that operators know from FailedScheduling: "0/3 nodes are available: 2 Insufficient cpu, 1 …."
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.nodes == 0 {
            return f.write_str("no nodes available to schedule pods");
        }
        write!(f, "0/{} nodes are available:", self.nodes)?;
        let mut list: Vec<String> = self.reasons.iter().map(|(r, n)| format!("{n} {r}")).collect();
        list.sort();
        write!(f, " {}.", list.join(", "))
    }
}

/// How many feasible nodes are enough before scoring: all of up to 100 nodes, then a share that falls to 5 %.
fn enough(nodes: usize) -> usize {
    if nodes <= 100 {
        return nodes;
    }
    let percent = 50usize.saturating_sub(nodes / 125).max(5);
    (nodes * percent / 100).max(100)
}

/// Picks a node, or says why none fits. `start` is where the search begins, so that successive calls look at
/// different nodes first; the caller advances it by the number of nodes looked at, which is returned.
pub fn schedule<R: Rng>(
    pod: &PodInfo,
    cache: &Cache,
    filters: &[Box<dyn Filter>],
    scores: &[Box<dyn Score>],
    start: usize,
    rng: &mut R,
) -> (Result<String, FitError>, usize) {
    let nodes: Vec<&NodeInfo> = cache.nodes().collect();
    let wanted = enough(nodes.len());
    let mut feasible = Vec::new();
    let mut reasons: BTreeMap<String, usize> = BTreeMap::new();
    let mut looked_at = 0;
    for i in 0..nodes.len() {
        let node = nodes[(start + i) % nodes.len()];
        looked_at += 1;
        match filters.iter().find_map(|f| f.filter(pod, node).err()) {
            None => feasible.push(node),
            Some(unfit) => {
                for r in unfit.reasons {
                    *reasons.entry(r).or_default() += 1;
                }
            }
        }
        if feasible.len() >= wanted {
            break;
        }
    }
    let chosen = match feasible.as_slice() {
        [] => return (Err(FitError { nodes: nodes.len(), reasons }), looked_at),
        [only] => only,
        many => {
            let mut totals = vec![0i64; many.len()];
            for s in scores {
                for (total, score) in totals.iter_mut().zip(s.score(pod, many)) {
                    *total += score * s.weight();
                }
            }
            let best = totals.iter().copied().max().unwrap_or(0);
            let ties: Vec<usize> = (0..many.len()).filter(|i| totals[*i] == best).collect();
            many[ties[rng.random_range(0..ties.len())]]
        }
    };
    (Ok(chosen.name.clone()), looked_at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::{default_filters, default_scores};
    use rand::SeedableRng;
    use serde_json::{Value, json};

    fn node(name: &str, patch: Value) -> k8s_openapi::api::core::v1::Node {
        let mut v = json!({"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}, "spec": {},
            "status": {"allocatable": {"cpu": "2", "memory": "4Gi", "pods": "10"}}});
        json_merge(&mut v, patch);
        serde_json::from_value(v).unwrap()
    }

    fn json_merge(a: &mut Value, b: Value) {
        match (a, b) {
            (Value::Object(a), Value::Object(b)) => {
                b.into_iter().for_each(|(k, v)| json_merge(a.entry(k).or_insert(Value::Null), v))
            }
            (a, b) => *a = b,
        }
    }

    fn pod(spec: Value) -> PodInfo {
        let mut v = json!({"containers": [{"name": "c"}]});
        json_merge(&mut v, spec);
        PodInfo::of(
            &serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n"}, "spec": v})).unwrap(),
        )
    }

    fn decide(
        nodes: Vec<k8s_openapi::api::core::v1::Node>,
        placed: Vec<(PodInfo, &str)>,
        p: PodInfo,
    ) -> Result<String, String> {
        let mut cache = Cache::default();
        nodes.iter().for_each(|n| cache.set_node(n));
        for (i, (mut p, n)) in placed.into_iter().enumerate() {
            p.key.name = format!("placed-{i}");
            cache.place(p, n);
        }
        let mut rng = rand::rngs::StdRng::seed_from_u64(1);
        schedule(&p, &cache, &default_filters(), &default_scores(), 0, &mut rng).0.map_err(|e| e.to_string())
    }

    fn cpu(amount: &str) -> Value {
        json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": amount}}}]})
    }

    #[test]
    fn filters() {
        let plain = || vec![node("a", json!({}))];
        let no = |s: &str| Err(format!("0/1 nodes are available: 1 {s}."));
        let tainted = || {
            vec![node("a", json!({"spec": {"taints": [{"key": "k", "value": "v", "effect": "NoSchedule"}]}}))]
        };
        let host =
            || pod(json!({"containers": [{"name": "c", "ports": [{"containerPort": 1, "hostPort": 80}]}]}));
        for (name, nodes, placed, p, want) in [
            ("fits", plain(), vec![], pod(cpu("2")), Ok("a".into())),
            ("too big", plain(), vec![], pod(cpu("2001m")), no("Insufficient cpu")),
            ("taken", plain(), vec![(pod(cpu("1500m")), "a")], pod(cpu("600m")), no("Insufficient cpu")),
            (
                "cordoned",
                vec![node("a", json!({"spec": {"unschedulable": true}}))],
                vec![],
                pod(json!({})),
                no("node(s) were unschedulable"),
            ),
            ("tainted", tainted(), vec![], pod(json!({})), no("node(s) had untolerated taint {k: v}")),
            (
                "tolerated",
                tainted(),
                vec![],
                pod(json!({"tolerations": [{"operator": "Exists"}]})),
                Ok("a".into()),
            ),
            (
                "selector",
                plain(),
                vec![],
                pod(json!({"nodeSelector": {"x": "y"}})),
                no("node(s) didn't match Pod's node affinity/selector"),
            ),
            (
                "port",
                plain(),
                vec![(host(), "a")],
                host(),
                no("node(s) didn't have free ports for the requested pod ports"),
            ),
            ("no nodes", vec![], vec![], pod(json!({})), Err("no nodes available to schedule pods".into())),
        ] {
            assert_eq!(decide(nodes, placed, p), want, "{name}");
        }
    }

    #[test]
    fn scores() {
        let two = || vec![node("a", json!({})), node("b", json!({}))];
        let emptier = decide(two(), vec![(pod(cpu("1")), "a")], pod(cpu("100m")));
        assert_eq!(emptier.as_deref(), Ok("b"));
        let preferred = json!({"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
            {"weight": 100, "preference": {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["b"]}]}}]}}});
        assert_eq!(decide(two(), vec![], pod(preferred)).as_deref(), Ok("b"));
        let soft = node("a", json!({"spec": {"taints": [{"key": "k", "effect": "PreferNoSchedule"}]}}));
        assert_eq!(decide(vec![soft, node("b", json!({}))], vec![], pod(json!({}))).as_deref(), Ok("b"));
    }

    #[test]
    fn the_search_stops_at_enough_nodes() {
        assert_eq!((enough(10), enough(100), enough(1000), enough(5000)), (10, 100, 420, 500));
    }
}
