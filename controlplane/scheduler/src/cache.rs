//! Nodes and what is booked on them, kept up to date change by change. A pod that has been given a node counts at once
//! ("assumed"), before the API server confirms it.

use std::collections::HashMap;

use k8s_openapi::api::core::v1::Node;
use orlop_api::meta::Key;

use crate::framework::{NodeInfo, PodInfo};

#[derive(Debug)]
struct Placed {
    node: String,
    info: PodInfo,
}

/// The scheduler's picture of the cluster.
#[derive(Debug, Default)]
pub struct Cache {
    nodes: HashMap<String, NodeInfo>,
    /// Names of nodes whose object exists, sorted: iteration order is the same in each run.
    known: Vec<String>,
    pods: HashMap<Key, Placed>,
}

impl Cache {
    pub fn set_node(&mut self, node: &Node) {
        let name = node.metadata.name.clone().unwrap_or_default();
        self.nodes.entry(name.clone()).or_default().set_node(node);
        if let Err(at) = self.known.binary_search(&name) {
            self.known.insert(at, name);
        }
    }

    pub fn remove_node(&mut self, name: &str) {
        if let Ok(at) = self.known.binary_search_by(|n| n.as_str().cmp(name)) {
            self.known.remove(at);
        }
        // Bookings of pods still on it stay, so that the node's return finds them.
        if self.nodes.get(name).is_some_and(|n| n.pods == 0) {
            self.nodes.remove(name);
        }
    }

    /// Books `pod` on `node`; moves it when it was booked elsewhere.
    pub fn place(&mut self, pod: PodInfo, node: &str) {
        self.remove_pod(&pod.key.clone());
        let info = self.nodes.entry(node.to_owned()).or_default();
        info.name = node.to_owned();
        info.book(&pod);
        self.pods.insert(pod.key.clone(), Placed { node: node.to_owned(), info: pod });
    }

    pub fn remove_pod(&mut self, key: &Key) {
        if let Some(p) = self.pods.remove(key)
            && let Some(n) = self.nodes.get_mut(&p.node)
        {
            n.unbook(&p.info);
            if n.pods == 0 && self.known.binary_search(&p.node).is_err() {
                self.nodes.remove(&p.node);
            }
        }
    }

    /// The nodes that exist, in name order.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeInfo> {
        self.known.iter().filter_map(|n| self.nodes.get(n))
    }

    pub fn len(&self) -> usize {
        self.known.len()
    }

    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::framework::PodInfo;
    use proptest::prelude::*;

    fn pod(name: &str, cpu: u32) -> PodInfo {
        PodInfo::of(
            &serde_json::from_value(serde_json::json!({
                "metadata": {"name": name, "namespace": "n"},
                "spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": format!("{cpu}m")}},
                          "ports": [{"containerPort": 1, "hostPort": cpu + 1}]}]}
            }))
            .unwrap(),
        )
    }

    proptest! {
        /// Whatever comes and goes, each node's bookings are the sum of its pods.
        #[test]
        fn bookings_are_the_sum_of_the_pods(ops in proptest::collection::vec((0u8..3, 0u8..6, 0u8..3, 0u32..500), 0..60)) {
            let mut cache = Cache::default();
            let mut model: HashMap<String, (String, u32)> = HashMap::new();
            for (op, p, n, cpu) in ops {
                let (name, node) = (format!("p{p}"), format!("n{n}"));
                match op {
                    0 => { cache.place(pod(&name, cpu), &node); model.insert(name, (node, cpu)); }
                    1 => { cache.remove_pod(&Key::new("n", &*name)); model.remove(&name); }
                    _ => {
                        let mut o = Node::default();
                        o.metadata.name = Some(node.clone());
                        if cpu % 2 == 0 { cache.set_node(&o) } else { cache.remove_node(&node) }
                    }
                }
                for info in cache.nodes() {
                    let cpu: u32 = model.values().filter(|(n, _)| *n == info.name).map(|(_, c)| c).sum();
                    let pods = model.values().filter(|(n, _)| *n == info.name).count();
                    prop_assert_eq!(info.requested.get("cpu").copied().unwrap_or_default().milli(), cpu as i64);
                    prop_assert_eq!((info.pods, info.ports.len()), (pods, pods));
                }
            }
        }
    }
}
