use k8s_openapi::api::core::v1::Taint;
use orlop_api::taints;

use crate::framework::{Filter, NodeInfo, PodInfo, Unfit};

/// Cordoned nodes take no pods but those that tolerate it.
pub struct NodeUnschedulable;

impl Filter for NodeUnschedulable {
    fn name(&self) -> &'static str {
        "NodeUnschedulable"
    }

    fn filter(&self, pod: &PodInfo, node: &NodeInfo) -> Result<(), Unfit> {
        if !node.unschedulable {
            return Ok(());
        }
        let taint =
            Taint { key: taints::UNSCHEDULABLE.into(), effect: "NoSchedule".into(), ..Default::default() };
        let tolerated = pod.spec.tolerations.iter().flatten().any(|t| taints::tolerates(t, &taint));
        if tolerated { Ok(()) } else { Err(Unfit::unresolvable("node(s) were unschedulable")) }
    }
}
