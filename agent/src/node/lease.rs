//! The node's Lease: renewed often and cheaply, so that the control plane sees that the node lives.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};

use crate::context::Context;

const NAMESPACE: &str = "kube-node-lease";

/// Renews until the agent stops: every quarter of the lease's duration.
pub async fn run(ctx: Context, client: Client) -> Result<(), crate::Error> {
    let api: Api<Lease> = Api::namespaced(client, NAMESPACE);
    let seconds = ctx.config.kubelet.node_lease_duration_seconds.max(4);
    let period = Duration::from_secs(seconds as u64 / 4);
    let stop = ctx.tasks.stop_token();
    let mut failed = false;
    loop {
        let renewed = tokio::time::timeout(period, renew(&ctx, &api, seconds)).await;
        let error = match renewed {
            Ok(Ok(())) => None,
            Ok(Err(e)) => Some(orlop_base::telemetry::chain(&e)),
            Err(_) => Some("no answer".to_owned()),
        };
        if let (Some(error), false) = (&error, failed) {
            tracing::warn!(%error, "node lease not renewed");
        }
        failed = error.is_some();
        let pause = if failed { Duration::from_secs(1) } else { period };
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(pause) => {}
        }
    }
}

async fn renew(ctx: &Context, api: &Api<Lease>, seconds: i32) -> Result<(), kube::Error> {
    let name = &ctx.config.node_name;
    let now = MicroTime(Timestamp::now());
    let patch = serde_json::json!({"spec": {"renewTime": now, "holderIdentity": name, "leaseDurationSeconds": seconds}});
    match api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(s)) if s.code == 404 => {
            let owner = ctx.node.uid().map(|uid| OwnerReference {
                api_version: "v1".into(),
                kind: "Node".into(),
                name: name.clone(),
                uid,
                ..Default::default()
            });
            let lease = Lease {
                metadata: ObjectMeta {
                    name: Some(name.clone()),
                    owner_references: owner.map(|o| vec![o]),
                    ..Default::default()
                },
                spec: Some(LeaseSpec {
                    holder_identity: Some(name.clone()),
                    lease_duration_seconds: Some(seconds),
                    renew_time: Some(now),
                    ..Default::default()
                }),
            };
            api.create(&PostParams::default(), &lease).await.map(drop)
        }
        Err(e) => Err(e),
    }
}
