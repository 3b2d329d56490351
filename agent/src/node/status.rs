//! The Node's status: looked at every 10 s, written when it changes, else every 5 minutes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeFeatures,
    NodeRuntimeHandler, NodeRuntimeHandlerFeatures, NodeStatus, NodeSystemInfo,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use orlop_api::quantity::Amount;
use orlop_proto::cri::{ListImagesRequest, StatusRequest};

use super::RuntimeState;
use crate::context::Context;
use crate::status::generate::time;

/// The largest images are reported, as upstream does.
const MAX_IMAGES: usize = 50;
/// While the runtime or the network is not ready the node is looked at more often, so that it gets Ready at once.
const EAGER: Duration = Duration::from_millis(250);

fn quantities(all: BTreeMap<String, Amount>) -> BTreeMap<String, Quantity> {
    // Upstream writes memory and storage in kibibytes.
    let show = |k: &str, a: Amount| match k {
        "memory" | "ephemeral-storage" => Quantity(format!("{}Ki", a.units() >> 10)),
        _ => a.into(),
    };
    all.into_iter().map(|(k, a)| (k.clone(), show(&k, a))).collect()
}

struct Verdict {
    kind: &'static str,
    status: bool,
    reason: &'static str,
    message: String,
}

fn threshold(ctx: &Context, signal: &str, total: u64) -> u64 {
    let text = ctx.config.kubelet.eviction_hard.get(signal).map(String::as_str).unwrap_or("0");
    match text.strip_suffix('%').and_then(|p| p.parse::<f64>().ok()) {
        Some(p) => (total as f64 * p / 100.0) as u64,
        None => text.parse::<Amount>().map_or(0, |a| a.units().max(0) as u64),
    }
}

/// What the disk of the agent's folder lacks, and what to do.
fn full_disk(ctx: &Context) -> Option<String> {
    let dir = &ctx.config.root_dir;
    let (total, free, inodes, free_inodes) = super::machine::file_system(dir)?;
    let signals =
        [("nodefs.available", "bytes", total, free), ("nodefs.inodesFree", "inodes", inodes, free_inodes)];
    // Some file systems count no inodes.
    let counted = signals.into_iter().filter(|(.., total, _)| *total > 0);
    let mut lacking = counted.filter(|(signal, _, total, free)| *free < threshold(ctx, signal, *total));
    lacking.next().map(|(signal, what, total, free)| {
        // Whole percents, for the status is written whenever it changes.
        format!(
            "agent has insufficient disk space: {}% of the {what} of {}'s file system are free, evictionHard.{signal} wants {}; delete what is not needed or lower the threshold",
            u128::from(free) * 100 / u128::from(total),
            dir.display(),
            ctx.config.kubelet.eviction_hard.get(signal).map_or("0", String::as_str),
        )
    })
}

fn verdicts(ctx: &Context) -> Vec<Verdict> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = super::machine::meminfo(&meminfo, "MemAvailable").unwrap_or(i64::MAX) as u64;
    let memory = available < threshold(ctx, "memory.available", ctx.node.memory_capacity() as u64);
    let disk = full_disk(ctx);
    let number = |p: &str| std::fs::read_to_string(p).ok().and_then(|t| t.trim().parse::<u64>().ok());
    let running = std::fs::read_to_string("/proc/loadavg")
        .ok()
        .and_then(|t| t.split(' ').nth(3)?.split('/').nth(1)?.parse::<u64>().ok());
    let pid = matches!((number("/proc/sys/kernel/pid_max"), running), (Some(max), Some(n)) if max.saturating_sub(n) < 100);
    let pressure = |kind, status, bad, good, what: &str| Verdict {
        kind,
        status,
        reason: if status { bad } else { good },
        message: format!("agent has {} {what}", if status { "insufficient" } else { "sufficient" }),
    };
    let mut disk_pressure = pressure(
        "DiskPressure",
        disk.is_some(),
        "KubeletHasDiskPressure",
        "KubeletHasNoDiskPressure",
        "disk space",
    );
    if let Some(lack) = disk {
        disk_pressure.message = lack;
    }
    let runtime = ctx.node.runtime();
    let silent = ctx.node.runtime_is_silent();
    let ready = runtime.runtime_ready && runtime.network_ready && !silent;
    let message = match (ready, silent) {
        (true, _) => "agent is posting ready status".to_owned(),
        (_, true) => "the container runtime does not answer".to_owned(),
        _ => format!("container runtime not ready: {}", runtime.message),
    };
    vec![
        pressure(
            "MemoryPressure",
            memory,
            "KubeletHasInsufficientMemory",
            "KubeletHasSufficientMemory",
            "memory available",
        ),
        disk_pressure,
        pressure("PIDPressure", pid, "KubeletHasInsufficientPID", "KubeletHasSufficientPID", "PID available"),
        Verdict {
            kind: "Ready",
            status: ready,
            reason: if ready { "KubeletReady" } else { "KubeletNotReady" },
            message,
        },
    ]
}

/// The status as of now; `old` gives the times of transitions.
pub fn generate(
    ctx: &Context,
    old: Option<&NodeStatus>,
    images: Vec<ContainerImage>,
    now: Timestamp,
) -> NodeStatus {
    let m = ctx.node.machine();
    let conditions = verdicts(ctx).into_iter().map(|v| {
        let status = if v.status { "True" } else { "False" };
        let before =
            old.and_then(|o| o.conditions.as_ref()).into_iter().flatten().find(|c| c.type_ == v.kind);
        let since = before.filter(|c| c.status == status).and_then(|c| c.last_transition_time.clone());
        NodeCondition {
            type_: v.kind.to_owned(),
            status: status.to_owned(),
            reason: Some(v.reason.to_owned()),
            message: Some(v.message),
            last_heartbeat_time: Some(time(now)),
            last_transition_time: Some(since.unwrap_or_else(|| time(now))),
        }
    });
    let internal =
        ctx.node.ips().iter().map(|ip| NodeAddress { type_: "InternalIP".into(), address: ip.to_string() });
    let hostname = NodeAddress { type_: "Hostname".into(), address: ctx.config.node_name.clone() };
    let runtime = ctx.node.runtime();
    let handlers: Vec<_> = runtime
        .handlers
        .iter()
        .map(|(name, ro, userns)| NodeRuntimeHandler {
            name: Some(name.clone()),
            features: Some(NodeRuntimeHandlerFeatures {
                recursive_read_only_mounts: Some(*ro),
                user_namespaces: Some(*userns),
            }),
        })
        .collect();
    let version = format!("v1.36.0+orlop-{}", env!("CARGO_PKG_VERSION"));
    NodeStatus {
        capacity: Some(quantities(m.capacity())),
        allocatable: Some(quantities(ctx.node.allocatable())),
        conditions: Some(conditions.collect()),
        addresses: Some(internal.chain([hostname]).collect()),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(ctx.config.listen.port()) }),
        }),
        node_info: Some(NodeSystemInfo {
            machine_id: m.machine_id.clone(),
            system_uuid: m.system_uuid.clone(),
            boot_id: m.boot_id.clone(),
            kernel_version: m.kernel.clone(),
            os_image: m.os_image.clone(),
            container_runtime_version: format!("{}://{}", ctx.runtime_name, ctx.runtime_version),
            kubelet_version: version,
            kube_proxy_version: String::new(),
            operating_system: "linux".into(),
            architecture: m.architecture.to_owned(),
            swap: None,
        }),
        images: (!images.is_empty()).then_some(images),
        runtime_handlers: (!handlers.is_empty()).then_some(handlers),
        features: Some(NodeFeatures { supplemental_groups_policy: Some(runtime.supplemental_groups_policy) }),
        ..Default::default()
    }
}

/// Asks the runtime how it is.
pub async fn look_at_runtime(ctx: &Context) {
    let state = match ctx.cri.status(StatusRequest { verbose: false }).await {
        Err(e) => RuntimeState { message: e.to_string(), ..Default::default() },
        Ok(r) => {
            let conditions = r.status.unwrap_or_default().conditions;
            let of = |kind: &str| conditions.iter().find(|c| c.r#type == kind);
            let is = |kind: &str| of(kind).is_some_and(|c| c.status);
            let bad: Vec<String> = ["RuntimeReady", "NetworkReady"]
                .iter()
                .filter(|k| !is(k))
                .map(|k| match of(k) {
                    Some(c) => format!("{k}=false reason:{} message:{}", c.reason, c.message),
                    None => format!("{k} is not reported"),
                })
                .collect();
            RuntimeState {
                runtime_ready: is("RuntimeReady"),
                network_ready: is("NetworkReady"),
                message: bad.join(", "),
                handlers: r
                    .runtime_handlers
                    .iter()
                    .map(|h| {
                        let f = h.features.unwrap_or_default();
                        (h.name.clone(), f.recursive_read_only_mounts, f.user_namespaces)
                    })
                    .collect(),
                supplemental_groups_policy: r.features.is_some_and(|f| f.supplemental_groups_policy),
            }
        }
    };
    if state.runtime_ready {
        ctx.node.runtime_answered();
    }
    ctx.node.set_runtime(state);
}

async fn images(ctx: &Context) -> Vec<ContainerImage> {
    let Ok(list) = ctx.cri.list_images(ListImagesRequest { filter: None }).await else { return Vec::new() };
    let mut all = list.images;
    all.sort_by_key(|i| std::cmp::Reverse(i.size));
    all.into_iter()
        .take(MAX_IMAGES)
        .map(|i| ContainerImage {
            names: Some(i.repo_digests.into_iter().chain(i.repo_tags).take(5).collect()),
            size_bytes: Some(i.size as i64),
        })
        .collect()
}

/// Equal but for the times of heartbeats.
fn same(a: &NodeStatus, b: &NodeStatus) -> bool {
    let strip = |s: &NodeStatus| {
        let mut s = s.clone();
        s.conditions.iter_mut().flatten().for_each(|c| c.last_heartbeat_time = None);
        s
    };
    strip(a) == strip(b)
}

/// Keeps the status up to date until the agent stops.
pub async fn run(ctx: Context, client: Client, node: Node) -> Result<(), crate::Error> {
    let api: Api<Node> = Api::all(client.clone());
    let k = &ctx.config.kubelet;
    let stop = ctx.tasks.stop_token();
    let mut last: Option<NodeStatus> = node.status.clone();
    let mut written: Option<(NodeStatus, Instant)> = None;
    loop {
        look_at_runtime(&ctx).await;
        let now = generate(&ctx, last.as_ref(), images(&ctx).await, Timestamp::now());
        let due = written
            .as_ref()
            .is_none_or(|(w, at)| !same(w, &now) || at.elapsed() >= k.node_status_report_frequency);
        if due {
            match write(&api, &ctx, &now).await {
                Ok(()) => written = Some((now.clone(), Instant::now())),
                Err(kube::Error::Api(s)) if s.code == 404 => {
                    tracing::warn!("the Node object is gone, registering again");
                    super::register::run(&ctx, client.clone()).await;
                    written = None;
                }
                Err(e) => {
                    tracing::warn!(error = %orlop_base::telemetry::chain(&e), "node status not written")
                }
            }
        }
        last = Some(now);
        let state = ctx.node.runtime();
        let ready = state.runtime_ready && state.network_ready;
        let pause = if ready && written.is_some() { k.node_status_update_frequency } else { EAGER };
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = ctx.node.asked() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Lists that the API merges by key are replaced as a whole, so that what has gone does not stay.
async fn write(api: &Api<Node>, ctx: &Context, status: &NodeStatus) -> Result<(), kube::Error> {
    let mut value = serde_json::to_value(status).map_err(kube::Error::SerdeError)?;
    if let Some(list) = value.get_mut("addresses").and_then(serde_json::Value::as_array_mut) {
        list.push(serde_json::json!({"$patch": "replace"}));
    }
    let patch = serde_json::json!({"status": value});
    api.patch_status(&ctx.config.node_name, &PatchParams::default(), &Patch::Strategic(patch)).await.map(drop)
}

/// Tells the hook of the node's podCIDRs whenever they change.
pub fn follow_pod_cidrs(ctx: &Context, client: Client) {
    let Some(hook) = ctx.config.on_pod_cidr.clone() else { return };
    let told = parking_lot::Mutex::new(Vec::new());
    let look = ctx.node.clone();
    orlop_client::informer::Builder::<Node>::new(Api::all(client))
        .fields(&format!("metadata.name={}", ctx.config.node_name))
        .trim(|n| n.status = None)
        .on_change(move |change| {
            let spec = change.object().spec.as_ref();
            let cidrs =
                spec.and_then(|s| s.pod_cidrs.clone().or_else(|| s.pod_cidr.clone().map(|c| vec![c])));
            let cidrs = cidrs.unwrap_or_default();
            let mut told = told.lock();
            if !cidrs.is_empty() && *told != cidrs {
                (hook.0)(&cidrs);
                *told = cidrs;
                look.look_now();
            }
        })
        .start(&ctx.tasks);
}
