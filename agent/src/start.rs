//! Wiring: makes the parts of one agent and runs them.

use std::net::{IpAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use orlop_base::supervise::{Ready, TaskGroup};
use orlop_base::telemetry::Metrics;
use orlop_client::Recorder;
use orlop_proto::cri::{CgroupDriver, RuntimeConfigRequest, VersionRequest, VersionResponse};
use tokio_util::sync::CancellationToken;

use crate::cgroups::Cgroups;
use crate::config::Config;
use crate::context::Context;
use crate::credentials::CredentialProviders;
use crate::cri::Cri;
use crate::error::Error;
use crate::events::Events;
use crate::images::Images;
use crate::metrics::AgentMetrics;
use crate::node::NodeState;
use crate::pods::manager::Pods;
use crate::services::Services;
use crate::userns::UserNamespaces;
use crate::volumes::Volumes;
use crate::{gc, logs, node, pleg, server, sources};

/// How long the parts get to end when the agent stops. Containers go on without it.
const DRAIN: Duration = Duration::from_secs(3);
/// How long to wait between looks for a runtime that is not there yet.
const RUNTIME_RETRY: Duration = Duration::from_millis(100);

/// Runs the agent until `stop`. `ready` is set once the runtime answers and the node is registered.
pub async fn run(config: Config, ready: Ready, stop: CancellationToken) -> Result<(), Error> {
    let tasks = TaskGroup::new(&stop);
    let client = match &config.kubeconfig {
        Some(path) => Some(orlop_client::client_from_kubeconfig(path).await?),
        None => None,
    };
    crate::purge::claim(&config)?;
    let unread = config.kubelet.without_effect();
    if !unread.is_empty() {
        tracing::warn!(fields = ?unread, "fields of the KubeletConfiguration that have no effect here");
    }
    let cri = Cri::new(&config.cri_socket)?;
    let version = tokio::select! {
        () = stop.cancelled() => return Ok(()),
        v = wait_for_runtime(&cri) => v,
    };
    let ctx = context(config, client.clone(), cri, version, tasks.clone()).await?;
    let (listener, acceptor) = server::bind(&ctx).await?;
    tasks.spawn_essential("node server", server::run(ctx.clone(), listener, acceptor));
    node::status::look_at_runtime(&ctx).await;
    if let Some(dir) = ctx.config.static_pod_dir.clone() {
        tasks.spawn_essential("static pods", sources::file::run(ctx.clone(), dir));
    } else {
        ctx.pods.statics_are_read();
    }
    tasks.spawn_essential("container events", pleg::run(ctx.clone()));
    tasks.spawn_essential("log rotation", {
        let (ctx, stop) = (ctx.clone(), tasks.stop_token());
        async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = logs::rotate(ctx) => {}
            }
            Ok::<(), Error>(())
        }
    });
    match client {
        Some(client) => tasks.spawn(with_api(ctx.clone(), client, ready)),
        None => {
            tasks.spawn_essential("garbage collection", {
                let pods = ctx.pods.clone();
                gc::run(ctx.clone(), async move { pods.statics_read().await })
            });
            tasks.spawn_essential("runtime status", look_at_runtime(ctx.clone()));
            ready.set();
        }
    }
    tasks.run_until_stopped(DRAIN).await?;
    Ok(())
}

async fn wait_for_runtime(cri: &Cri) -> VersionResponse {
    let mut told = false;
    loop {
        match cri.version(VersionRequest { version: "v1".into() }).await {
            Ok(v) => return v,
            Err(e) if !told => {
                told = true;
                tracing::info!(error = %e, "waiting for the container runtime");
            }
            Err(_) => {}
        }
        tokio::time::sleep(RUNTIME_RETRY).await;
    }
}

/// Without an API server nothing else asks the runtime how it is.
async fn look_at_runtime(ctx: Context) -> Result<(), Error> {
    let stop = ctx.tasks.stop_token();
    loop {
        node::status::look_at_runtime(&ctx).await;
        let period =
            if ctx.node.network_ready() { Duration::from_secs(10) } else { Duration::from_millis(250) };
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(period) => {}
        }
    }
}

async fn context(
    config: Config,
    client: Option<Client>,
    cri: Cri,
    version: VersionResponse,
    tasks: TaskGroup,
) -> Result<Context, Error> {
    let config = Arc::new(config);
    let registry = Arc::new(Metrics::default());
    let recorder = client.clone().map(|c| Recorder::start(c, "kubelet", &config.node_name, &tasks));
    let systemd = match cri.runtime_config(RuntimeConfigRequest {}).await {
        Ok(r) => r.linux.is_some_and(|l| l.cgroup_driver == CgroupDriver::Systemd as i32),
        // Older runtimes do not say.
        Err(_) => config.kubelet.cgroup_driver == "systemd",
    };
    let node_ips = match config.node_ips.is_empty() {
        false => config.node_ips.clone(),
        true => vec![default_address().ok_or(Error::NoNodeIp)?],
    };
    let pods = Pods::default();
    let on_change = {
        let pods = pods.clone();
        move |uid: &str| pods.volumes_changed(uid)
    };
    let node = NodeState::new(&config, node_ips, Cgroups::detect(&config, systemd));
    node.limit_pods(&config).await?;
    Ok(Context {
        events: Events::new(recorder, &config.node_name),
        metrics: AgentMetrics::register(&registry),
        images: Images::new(config.kubelet.max_parallel_image_pulls, CredentialProviders::read(&config)?),
        volumes: Volumes::new(client.clone(), &tasks, on_change),
        services: Services::start(client.clone(), &tasks),
        users: UserNamespaces::open(&config)?,
        node,
        runtime_name: version.runtime_name,
        runtime_version: version.runtime_version,
        cri,
        client,
        pods,
        registry,
        tasks,
        config,
    })
}

/// The address this machine would use towards the outside. No packet is sent.
fn default_address() -> Option<IpAddr> {
    let via = |bind: &str, to: &str| {
        let s = UdpSocket::bind(bind).ok()?;
        s.connect(to).ok()?;
        s.local_addr().ok().map(|a| a.ip()).filter(|ip| !ip.is_unspecified())
    };
    via("0.0.0.0:0", "192.0.2.1:9").or_else(|| via("[::]:0", "[2001:db8::1]:9"))
}

/// What needs the API server. Pods of manifests run meanwhile.
async fn with_api(ctx: Context, client: Client, ready: Ready) {
    let stop = ctx.tasks.stop_token();
    // The watch does not wait for the registration: after a restart pods are there already.
    let pods = sources::apiserver::start(&ctx, client.clone());
    if ctx.config.kubelet.register_node {
        let node = tokio::select! {
            () = stop.cancelled() => return,
            n = node::register::run(&ctx, client.clone()) => n,
        };
        node::status::follow_pod_cidrs(&ctx, client.clone());
        ctx.tasks.spawn_essential("node lease", node::lease::run(ctx.clone(), client.clone()));
        ctx.tasks.spawn_essential("node status", node::status::run(ctx.clone(), client, node));
        ctx.events.node("Starting", "Starting kubelet.");
        if ctx.config.kubelet.enforces_allocatable() {
            ctx.events.node("NodeAllocatableEnforced", "Updated Node Allocatable limit across pods");
        }
    }
    let all = ctx.pods.clone();
    ctx.tasks.spawn_essential(
        "garbage collection",
        gc::run(ctx.clone(), async move {
            all.statics_read().await;
            pods.synced().await;
        }),
    );
    ready.set();
}
