//! Gives every Node its share of the cluster's pod addresses (spec.podCIDRs).

use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{Patch, PatchParams};
use orlop_api::meta::Key;
use orlop_client::{Change, Outcome, Queue};

use crate::runtime::{Builders, Config, Context, Result, unless_gone};

pub(crate) struct Controller {
    queue: Queue<String>,
    pools: Vec<(IpNet, u8)>,
}

impl Controller {
    pub fn new(b: &mut Builders, config: &Config) -> Controller {
        let queue = Queue::default();
        let q = queue.clone();
        b.nodes.add_handler(move |c: &Change<Node>| {
            if let Change::Added(n) | Change::Updated { new: n, .. } = c
                && n.spec.as_ref().is_none_or(|s| s.pod_cidr.is_none())
            {
                q.add(n.metadata.name.clone().unwrap_or_default());
            }
        });
        let prefix = |net: &IpNet| match net {
            IpNet::V4(_) => config.node_prefix.0,
            IpNet::V6(_) => config.node_prefix.1,
        };
        Controller { queue, pools: config.cluster_cidrs.iter().map(|n| (*n, prefix(n))).collect() }
    }

    pub fn start(self, context: &Context) {
        if self.pools.is_empty() {
            return;
        }
        let (ctx, pools) = (context.clone(), Arc::new(self.pools));
        // One worker: two would hand out the same network.
        self.queue
            .run(&context.tasks, "node-ipam", 1, move |name| reconcile(ctx.clone(), pools.clone(), name));
    }
}

/// The first network of the pool that nobody has.
fn first_free(pool: &IpNet, prefix: u8, taken: &[IpNet]) -> Option<IpNet> {
    let overlaps = |a: &IpNet, b: &IpNet| a.contains(b) || b.contains(a);
    pool.subnets(prefix).ok()?.find(|n| !taken.iter().any(|t| overlaps(n, t)))
}

fn cidrs_of(node: &Node) -> Vec<IpNet> {
    let spec = node.spec.as_ref();
    let all = spec.and_then(|s| s.pod_cidrs.clone()).or_else(|| Some(vec![spec?.pod_cidr.clone()?]));
    all.into_iter().flatten().filter_map(|c| c.parse().ok()).collect()
}

async fn reconcile(ctx: Context, pools: Arc<Vec<(IpNet, u8)>>, name: String) -> Result {
    let api: Api<Node> = Api::all(ctx.client.clone());
    // The server's list, not the local copy: what this very loop handed out a moment ago must count.
    let nodes = api.list(&Default::default()).await?;
    let Some(node) = nodes.items.iter().find(|n| n.metadata.name.as_deref() == Some(&name)) else {
        return Ok(Outcome::Done);
    };
    if !cidrs_of(node).is_empty() {
        return Ok(Outcome::Done);
    }
    let taken: Vec<IpNet> = nodes.items.iter().flat_map(cidrs_of).collect();
    let mut own = Vec::new();
    for (pool, prefix) in pools.iter() {
        match first_free(pool, *prefix, &taken) {
            Some(net) => own.push(net.to_string()),
            None => {
                let about = orlop_client::events::reference(node);
                let text = format!("no /{prefix} network is left in {pool}; widen the cluster CIDR");
                ctx.recorder.warning(about, "CIDRNotAvailable", text.clone());
                return Err(crate::runtime::ReconcileError::Invalid(text));
            }
        }
    }
    let patch = serde_json::json!({"spec": {"podCIDR": own.first(), "podCIDRs": own}});
    unless_gone(api.patch(&name, &PatchParams::default(), &Patch::Strategic(&patch)).await)?;
    tracing::info!(node = %Key::new("", name), cidrs = ?own, "assigned pod networks");
    Ok(Outcome::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_first_gap() {
        let net = |s: &str| s.parse::<IpNet>().unwrap();
        let pool = net("10.244.0.0/16");
        assert_eq!(first_free(&pool, 24, &[]), Some(net("10.244.0.0/24")));
        assert_eq!(
            first_free(&pool, 24, &[net("10.244.0.0/24"), net("10.244.2.0/24")]),
            Some(net("10.244.1.0/24"))
        );
        assert_eq!(first_free(&net("10.0.0.0/24"), 24, &[net("10.0.0.0/16")]), None);
    }
}
