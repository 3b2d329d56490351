//! Making the Node object, or making an existing one ours.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, NodeSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};

use crate::context::Context;

/// The labels every node has.
pub fn labels(ctx: &Context) -> BTreeMap<String, String> {
    let arch = ctx.node.machine().architecture;
    let mut all = BTreeMap::from([
        ("kubernetes.io/hostname".to_owned(), ctx.config.node_name.clone()),
        ("kubernetes.io/os".to_owned(), "linux".to_owned()),
        ("kubernetes.io/arch".to_owned(), arch.to_owned()),
        ("beta.kubernetes.io/os".to_owned(), "linux".to_owned()),
        ("beta.kubernetes.io/arch".to_owned(), arch.to_owned()),
    ]);
    all.extend(ctx.config.node_labels.clone());
    all
}

/// Registers, trying until it works.
pub async fn run(ctx: &Context, client: Client) -> Node {
    let api: Api<Node> = Api::all(client);
    let mut pause = Duration::from_millis(200);
    loop {
        match once(ctx, &api).await {
            Ok(node) => {
                ctx.node.set_uid(node.metadata.uid.clone());
                return node;
            }
            Err(e) => {
                tracing::warn!(error = %orlop_base::telemetry::chain(&e), "node not registered, trying again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(7));
            }
        }
    }
}

async fn once(ctx: &Context, api: &Api<Node>) -> Result<Node, kube::Error> {
    let name = &ctx.config.node_name;
    if let Some(there) = api.get_opt(name).await? {
        // What others have put on the node stays; only our labels are brought up to date.
        let has = |k: &String, v: &String| there.metadata.labels.as_ref().and_then(|l| l.get(k)) == Some(v);
        let missing: BTreeMap<_, _> = labels(ctx).into_iter().filter(|(k, v)| !has(k, v)).collect();
        if missing.is_empty() {
            return Ok(there);
        }
        let patch = serde_json::json!({"metadata": {"labels": missing}});
        return api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await;
    }
    let taints = &ctx.config.node_taints;
    let node = Node {
        metadata: ObjectMeta { name: Some(name.clone()), labels: Some(labels(ctx)), ..Default::default() },
        spec: Some(NodeSpec { taints: (!taints.is_empty()).then(|| taints.clone()), ..Default::default() }),
        status: Some(super::status::generate(ctx, None, Vec::new(), jiff::Timestamp::now())),
    };
    match api.create(&PostParams::default(), &node).await {
        Err(kube::Error::Api(s)) if s.code == 409 => api.get(name).await,
        r => r,
    }
}
