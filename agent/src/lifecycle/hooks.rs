//! postStart and preStop: exec, httpGet, tcpSocket, sleep.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, LifecycleHandler, Pod};

use crate::context::Context;
use crate::probes::{http, port_of, tcp};
use crate::spec::field::NodeFacts;

/// A hook that hangs for ever would hold the pod: upstream's HTTP and TCP handlers give up as well.
const NETWORK: Duration = Duration::from_secs(30);

/// Where a hook acts.
pub struct Target<'a> {
    pub container: &'a Container,
    pub container_id: &'a str,
    /// Empty when the pod has no address.
    pub host: String,
}

impl<'a> Target<'a> {
    pub fn new(_pod: &Pod, container: &'a Container, container_id: &'a str, facts: &NodeFacts) -> Target<'a> {
        let host = facts.pod_ips.first().map(ToString::to_string).unwrap_or_default();
        Target { container, container_id, host }
    }
}

/// Runs a hook to its end. The error text goes into the event.
pub async fn run(ctx: &Context, hook: &LifecycleHandler, target: &Target<'_>) -> Result<(), String> {
    if let Some(e) = &hook.exec {
        let command = e.command.clone().unwrap_or_default();
        let done = ctx.cri.exec_sync(target.container_id, command.clone(), Duration::ZERO).await;
        let done = done.map_err(|e| e.message())?;
        if done.exit_code == 0 {
            return Ok(());
        }
        let output =
            String::from_utf8_lossy(if done.stderr.is_empty() { &done.stdout } else { &done.stderr })
                .into_owned();
        return Err(format!("command {command:?} exited with {}: {}", done.exit_code, output.trim()));
    }
    if let Some(h) = &hook.http_get {
        let request = http::Request::from_action(h, &target.host, target.container)?;
        return http::get(&request, NETWORK).await.map(|_| ());
    }
    if let Some(t) = &hook.tcp_socket {
        let port = port_of(&t.port, target.container)?;
        let host = t.host.clone().filter(|h| !h.is_empty()).unwrap_or_else(|| target.host.clone());
        return tcp::connect(&host, port, NETWORK).await;
    }
    if let Some(s) = &hook.sleep {
        tokio::time::sleep(Duration::from_secs(s.seconds.max(0) as u64)).await;
    }
    Ok(())
}
