use orlop_api::selector::{node_selector_matches, node_selector_term_matches};

use crate::framework::{Filter, NodeInfo, PodInfo, Score, Unfit, normalize};

/// nodeSelector and required node affinity decide; preferred terms add their weights.
pub struct NodeAffinity;

impl Filter for NodeAffinity {
    fn name(&self) -> &'static str {
        "NodeAffinity"
    }

    fn filter(&self, pod: &PodInfo, node: &NodeInfo) -> Result<(), Unfit> {
        let selected = pod.spec.node_selector.iter().flatten().all(|(k, v)| node.labels.get(k) == Some(v));
        let affinity = pod.spec.affinity.as_ref().and_then(|a| a.node_affinity.as_ref());
        let required = affinity.and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
        if selected && required.is_none_or(|r| node_selector_matches(r, &node.name, &node.labels)) {
            return Ok(());
        }
        Err(Unfit::unresolvable("node(s) didn't match Pod's node affinity/selector"))
    }
}

impl Score for NodeAffinity {
    fn name(&self) -> &'static str {
        "NodeAffinity"
    }

    fn weight(&self) -> i64 {
        2
    }

    fn score(&self, pod: &PodInfo, nodes: &[&NodeInfo]) -> Vec<i64> {
        let affinity = pod.spec.affinity.as_ref().and_then(|a| a.node_affinity.as_ref());
        let preferred =
            affinity.and_then(|a| a.preferred_during_scheduling_ignored_during_execution.as_deref());
        let sum = |n: &&NodeInfo| {
            let matching = preferred
                .unwrap_or_default()
                .iter()
                .filter(|p| node_selector_term_matches(&p.preference, &n.name, &n.labels));
            matching.map(|p| p.weight as i64).sum()
        };
        normalize(nodes.iter().map(sum).collect(), false)
    }
}
