use orlop_api::taints;

use crate::framework::{Filter, NodeInfo, PodInfo, Score, Unfit, normalize};

/// NoSchedule and NoExecute taints keep pods away; PreferNoSchedule taints count against a node.
pub struct TaintToleration;

impl Filter for TaintToleration {
    fn name(&self) -> &'static str {
        "TaintToleration"
    }

    fn filter(&self, pod: &PodInfo, node: &NodeInfo) -> Result<(), Unfit> {
        let tolerations = pod.spec.tolerations.as_deref().unwrap_or_default();
        match taints::untolerated(&node.taints, tolerations, &["NoSchedule", "NoExecute"]) {
            None => Ok(()),
            Some(t) => Err(Unfit::unresolvable(format!(
                "node(s) had untolerated taint {{{}: {}}}",
                t.key,
                t.value.as_deref().unwrap_or_default()
            ))),
        }
    }
}

impl Score for TaintToleration {
    fn name(&self) -> &'static str {
        "TaintToleration"
    }

    fn weight(&self) -> i64 {
        3
    }

    fn score(&self, pod: &PodInfo, nodes: &[&NodeInfo]) -> Vec<i64> {
        let tolerations = pod.spec.tolerations.as_deref().unwrap_or_default();
        let count = |n: &&NodeInfo| {
            let soft = n.taints.iter().filter(|t| t.effect == "PreferNoSchedule");
            soft.filter(|t| !tolerations.iter().any(|o| taints::tolerates(o, t))).count() as i64
        };
        normalize(nodes.iter().map(count).collect(), true)
    }
}
