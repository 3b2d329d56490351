use crate::framework::{Filter, NodeInfo, PodInfo, Unfit};

/// A pod that names a node goes there or nowhere.
pub struct NodeName;

impl Filter for NodeName {
    fn name(&self) -> &'static str {
        "NodeName"
    }

    fn filter(&self, pod: &PodInfo, node: &NodeInfo) -> Result<(), Unfit> {
        match pod.spec.node_name.as_deref() {
            None | Some("") => Ok(()),
            Some(n) if n == node.name => Ok(()),
            Some(_) => Err(Unfit::unresolvable("node(s) didn't match the requested node name")),
        }
    }
}
