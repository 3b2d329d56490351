//! News from the runtime: its event stream where it has one, and a list now and then in any case.

use std::collections::HashMap;
use std::time::Duration;

use orlop_proto::cri::{ListContainersRequest, ListPodSandboxRequest};
use tokio::sync::watch;

use crate::context::Context;
use crate::runtime::labels;

/// With events the list only catches what an event missed.
const SLOW: Duration = Duration::from_secs(10);
const FAST: Duration = Duration::from_secs(1);
/// How long to wait before asking for the stream again.
const RECONNECT: Duration = Duration::from_secs(1);

/// Per pod: a number that changes when any state of it does.
type Digest = HashMap<String, u64>;

/// Runs until the agent stops.
pub async fn run(ctx: Context) -> Result<(), crate::Error> {
    let (streaming, watch_streaming) = watch::channel(false);
    let stop = ctx.tasks.stop_token();
    tokio::select! {
        () = stop.cancelled() => {}
        () = events(&ctx, streaming) => {}
        () = relist(&ctx, watch_streaming) => {}
    }
    Ok(())
}

async fn events(ctx: &Context, streaming: watch::Sender<bool>) {
    let mut warned = false;
    loop {
        match ctx.cri.container_events().await {
            Ok(mut stream) => {
                // What happened between the last list and now is not in the stream.
                streaming.send_replace(true);
                while let Ok(Some(event)) = stream.message().await {
                    ctx.metrics.evented_pleg_events.inc();
                    let meta = event.pod_sandbox_status.and_then(|s| s.metadata);
                    if let Some(m) = meta {
                        ctx.pods.runtime_changed(&m.uid);
                    }
                }
                streaming.send_replace(false);
            }
            Err(e) if e.code() == tonic::Code::Unimplemented => {
                tracing::info!("the runtime has no container events; it is asked every second instead");
                return std::future::pending().await;
            }
            Err(e) if !warned => {
                warned = true;
                tracing::debug!(error = %e, "no container events yet");
            }
            Err(_) => {}
        }
        tokio::time::sleep(RECONNECT).await;
    }
}

async fn relist(ctx: &Context, mut streaming: watch::Receiver<bool>) {
    let mut last = Digest::new();
    loop {
        let began = std::time::Instant::now();
        match digest(ctx).await {
            Ok(now) => {
                ctx.metrics.pleg_relist_duration.observe(began.elapsed().as_secs_f64());
                let changed = now.iter().filter(|(uid, d)| last.get(*uid) != Some(*d)).map(|(uid, _)| uid);
                let gone = last.keys().filter(|uid| !now.contains_key(*uid));
                for uid in changed.chain(gone) {
                    ctx.pods.runtime_changed(uid);
                }
                let (pods, containers) = ctx.pods.running();
                ctx.metrics.running_pods.set(pods as i64);
                ctx.metrics.running_containers.set(containers as i64);
                last = now;
                ctx.node.runtime_answered();
            }
            Err(e) => tracing::warn!(error = %e, "the runtime was not listed"),
        }
        let period = if *streaming.borrow_and_update() { SLOW } else { FAST };
        tokio::select! {
            () = tokio::time::sleep(period) => {}
            // The sender lives as long as the events arm of the caller.
            _ = streaming.changed() => {}
        }
    }
}

async fn digest(ctx: &Context) -> Result<Digest, crate::cri::Error> {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let (sandboxes, containers) = tokio::try_join!(
        ctx.cri.list_pod_sandbox(ListPodSandboxRequest { filter: None }),
        ctx.cri.list_containers(ListContainersRequest { filter: None }),
    )?;
    let mut out = Digest::new();
    // Sums do not depend on the order of the list.
    let mut add = |uid: Option<&String>, id: &str, state: i32| {
        let Some(uid) = uid else { return };
        let mut h = DefaultHasher::new();
        (id, state).hash(&mut h);
        let sum = out.entry(uid.clone()).or_default();
        *sum = sum.wrapping_add(h.finish());
    };
    for s in &sandboxes.items {
        add(s.labels.get(labels::POD_UID), &s.id, s.state);
    }
    for c in &containers.containers {
        add(c.labels.get(labels::POD_UID), &c.id, c.state);
    }
    Ok(out)
}
