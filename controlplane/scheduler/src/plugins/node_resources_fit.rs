use orlop_api::quantity::Amount;

use crate::framework::{Filter, MAX_SCORE, NodeInfo, PodInfo, Score, Unfit};

/// Requests must fit into what is left of the node's allocatable; the emptier node scores higher (LeastAllocated).
pub struct NodeResourcesFit;

impl Filter for NodeResourcesFit {
    fn name(&self) -> &'static str {
        "NodeResourcesFit"
    }

    fn filter(&self, pod: &PodInfo, node: &NodeInfo) -> Result<(), Unfit> {
        let mut unfit: Option<Unfit> = None;
        let mut say = |reason: String, never: bool| {
            let u = unfit.get_or_insert_with(|| Unfit { reasons: Default::default(), unresolvable: false });
            u.reasons.insert(reason);
            u.unresolvable |= never;
        };
        let max_pods = node.allocatable.get("pods").copied().unwrap_or_default().units();
        if node.pods as i64 + 1 > max_pods {
            say("Too many pods".into(), max_pods == 0);
        }
        for (name, wanted) in &pod.requests {
            if wanted.is_zero() {
                continue;
            }
            let all = node.allocatable.get(name).copied().unwrap_or_default();
            let used = node.requested.get(name).copied().unwrap_or_default();
            if *wanted > all - used {
                say(format!("Insufficient {name}"), *wanted > all);
            }
        }
        unfit.map_or(Ok(()), Err)
    }
}

fn left(all: Amount, used: Amount) -> i64 {
    let (all, used) = (all.milli(), used.milli());
    if all == 0 || used > all { 0 } else { ((all - used) as i128 * MAX_SCORE as i128 / all as i128) as i64 }
}

impl Score for NodeResourcesFit {
    fn name(&self) -> &'static str {
        "NodeResourcesFit"
    }

    fn weight(&self) -> i64 {
        1
    }

    fn score(&self, pod: &PodInfo, nodes: &[&NodeInfo]) -> Vec<i64> {
        let one = |n: &&NodeInfo| {
            let of = |name: &str| n.allocatable.get(name).copied().unwrap_or_default();
            let cpu = left(of("cpu"), n.nonzero.0 + pod.nonzero.0);
            let memory = left(of("memory"), n.nonzero.1 + pod.nonzero.1);
            (cpu + memory) / 2
        };
        nodes.iter().map(one).collect()
    }
}
