use orlop_api::quantity::Amount;

use crate::framework::{MAX_SCORE, NodeInfo, PodInfo, Score};

/// Prefers nodes on which cpu and memory would be used to the same degree.
pub struct NodeResourcesBalancedAllocation;

fn fraction(used: Amount, all: Amount) -> f64 {
    if all.is_zero() { 1.0 } else { (used.milli() as f64 / all.milli() as f64).min(1.0) }
}

impl Score for NodeResourcesBalancedAllocation {
    fn name(&self) -> &'static str {
        "NodeResourcesBalancedAllocation"
    }

    fn weight(&self) -> i64 {
        1
    }

    fn score(&self, pod: &PodInfo, nodes: &[&NodeInfo]) -> Vec<i64> {
        let of = |m: &orlop_api::pod::Resources, name: &str| m.get(name).copied().unwrap_or_default();
        let one = |n: &&NodeInfo| {
            let used = |name| of(&n.requested, name) + of(&pod.requests, name);
            let cpu = fraction(used("cpu"), of(&n.allocatable, "cpu"));
            let memory = fraction(used("memory"), of(&n.allocatable, "memory"));
            // The standard deviation of two fractions is half their distance.
            ((1.0 - (cpu - memory).abs() / 2.0) * MAX_SCORE as f64) as i64
        };
        nodes.iter().map(one).collect()
    }
}
