//! `POST /checkpoint/NAMESPACE/POD/CONTAINER` (KEP-2008): the runtime writes an archive of the running container into the node's
//! checkpoint folder.

use std::os::unix::fs::DirBuilderExt;

use http::Response;
use jiff::Timestamp;
use orlop_proto::cri::CheckpointContainerRequest;
use serde_json::json;

use super::{Body, Refusal, containers, json};
use crate::context::Context;

/// Pure: seconds, from the last `timeout` of the query; zero leaves it to the runtime.
fn timeout(query: &str) -> Result<i64, Refusal> {
    let given = url::form_urlencoded::parse(query.as_bytes()).filter(|(k, _)| k == "timeout").last();
    let parsed = given.map_or(Ok(0), |(_, v)| v.parse::<i64>().map_err(|_| v.into_owned()));
    // Upstream answers 404.
    parsed.map_err(|v| Refusal::not_found(format!("cannot parse value of timeout parameter: {v:?}")))
}

/// Pure: upstream's name of the archive.
fn file_name(namespace: &str, pod: &str, container: &str, now: Timestamp) -> String {
    let now = now.strftime("%Y-%m-%dT%H:%M:%SZ");
    format!("checkpoint-{pod}_{namespace}-{container}-{now}.tar")
}

pub async fn make(
    ctx: &Context,
    query: &str,
    namespace: &str,
    pod: &str,
    name: &str,
) -> Result<Response<Body>, Refusal> {
    let timeout = timeout(query)?;
    let found = containers::pod(ctx, namespace, pod)?;
    let container = containers::running(ctx, &found, name)?;
    let dir = ctx.config.root_dir.join("checkpoints");
    // What a process keeps in memory is for root alone.
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
    made.map_err(|e| Refusal::internal(&e))?;
    let location = dir.join(file_name(namespace, pod, name, Timestamp::now()));
    let location = location.to_string_lossy().into_owned();
    let request =
        CheckpointContainerRequest { container_id: container.id, location: location.clone(), timeout };
    let done = ctx.cri.checkpoint_container(request).await;
    done.map_err(|e| {
        let refusal = Refusal::from(e);
        let text = format!("checkpointing of {namespace}/{pod}/{name} failed ({})", refusal.text);
        Refusal::new(refusal.code, text)
    })?;
    json(&json!({"items": [location]}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_upstream_has_them() {
        assert_eq!(timeout("").ok(), Some(0));
        assert_eq!(timeout("timeout=5&timeout=9").ok(), Some(9));
        assert!(timeout("timeout=soon").is_err());
        let name = file_name("default", "web-1", "web", Timestamp::UNIX_EPOCH);
        assert_eq!(name, "checkpoint-web-1_default-web-1970-01-01T00:00:00Z.tar");
    }
}
