use crate::framework::{Filter, NodeInfo, PodInfo, Unfit};

/// Host ports are given once per node.
pub struct NodePorts;

impl Filter for NodePorts {
    fn name(&self) -> &'static str {
        "NodePorts"
    }

    fn filter(&self, pod: &PodInfo, node: &NodeInfo) -> Result<(), Unfit> {
        if pod.ports.iter().any(|p| node.ports.iter().any(|q| p.clashes(q))) {
            return Err(Unfit::new("node(s) didn't have free ports for the requested pod ports"));
        }
        Ok(())
    }
}
