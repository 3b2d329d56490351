//! Carries out what the planner asks for, over CRI. Each function is one step that may be tried again.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, ResourceRequirements};
use orlop_api::meta::Key;
use orlop_proto::cri::{
    ContainerStatsRequest, CreateContainerRequest, ImageSpec, ImageStatusRequest, PodSandboxConfig,
    RemoveContainerRequest, RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest,
    StopPodSandboxRequest, UpdateContainerResourcesRequest, UserNamespace,
};

use super::plan::KillReason;
use super::state::Waiting;
use super::{ContainerKind, find_container};
use crate::context::Context;
use crate::cri::Error as CriError;
use crate::lifecycle::hooks;
use crate::runtime::{ObservedPod, State};
use crate::spec::env::{self, Lookups};
use crate::spec::field::NodeFacts;
use crate::spec::sandbox::HostDns;
use crate::spec::security::ImageUser;
use crate::spec::{container as container_spec, resources, sandbox, security};
use crate::userns;
use crate::volumes::{self, PodVolumes};

/// What a step knows: a snapshot of the worker's state.
pub struct Job {
    pub ctx: Context,
    pub uid: String,
    pub pod: Arc<Pod>,
    pub observed: Arc<ObservedPod>,
    pub volumes: PodVolumes,
}

/// How a step ended.
pub enum Done {
    Volumes(Result<PodVolumes, (String, volumes::Error)>),
    Sandbox(Result<(), String>),
    /// What the container is created with, or why it waits and for how long.
    Image {
        container: String,
        result: Result<String, (Waiting, Duration)>,
    },
    /// Reason and message for the container's status.
    Start {
        container: String,
        result: Result<(), (&'static str, String)>,
    },
    TornDown(Result<(), String>),
    /// What now runs with which size, by container id; else why not.
    Resized(Result<Vec<(String, ResourceRequirements)>, String>),
    /// The runtime will show what came of it.
    Nothing,
}

static EMPTY_SPEC: std::sync::LazyLock<PodSpec> = std::sync::LazyLock::new(PodSpec::default);

impl Job {
    fn spec(&self) -> &PodSpec {
        self.pod.spec.as_ref().unwrap_or(&EMPTY_SPEC)
    }

    fn key(&self) -> Key {
        Key::of(&self.pod.metadata)
    }

    fn facts(&self) -> NodeFacts {
        let host_ips = self.ctx.node.host_ips();
        let pod_ips = match (self.spec().host_network, self.observed.sandbox()) {
            (Some(true), _) => host_ips.clone(),
            (_, Some(s)) => s.ips.clone(),
            _ => Vec::new(),
        };
        NodeFacts { pod_ips, host_ips, allocatable: self.ctx.node.allocatable() }
    }

    fn sandbox_config(&self, attempt: u32) -> PodSandboxConfig {
        let path = &self.ctx.config.kubelet.resolv_conf;
        let host = match path.as_str() {
            "" => HostDns::default(),
            p => HostDns::parse(&std::fs::read_to_string(p).unwrap_or_default()),
        };
        let parent = self.ctx.node.cgroups().parent(self.spec(), &self.uid);
        sandbox::config(&self.pod, &self.ctx.config, &host, attempt, parent, self.users())
    }

    /// The ids that the pod has been given for its user namespace.
    fn users(&self) -> Option<UserNamespace> {
        if self.has_own_users() { self.ctx.users.of(&self.uid) } else { None }
    }

    fn has_own_users(&self) -> bool {
        self.spec().host_users == Some(false)
    }

    fn dir(&self) -> PathBuf {
        self.ctx.config.pod_dir(&self.uid)
    }

    fn cfs_period(&self) -> Option<Duration> {
        let k = &self.ctx.config.kubelet;
        k.cpu_cfs_quota.then_some(k.cpu_cfs_quota_period)
    }
}

pub async fn set_up_volumes(job: Job) -> Done {
    Done::Volumes(job.ctx.volumes.set_up(&job.ctx, &job.pod, &job.facts()).await)
}

pub async fn create_sandbox(job: Job, attempt: u32) -> Done {
    Done::Sandbox(sandbox_steps(&job, attempt).await)
}

async fn sandbox_steps(job: &Job, attempt: u32) -> Result<(), String> {
    let spec = job.spec();
    if spec.host_network != Some(true) && !job.ctx.node.network_ready() {
        return Err("container runtime network not ready: see the node's Ready condition".into());
    }
    if let Some(name) = security::forbidden_sysctl(spec, &job.ctx.config.kubelet.allowed_unsafe_sysctls) {
        return Err(format!("forbidden sysctl: {name:?} not allowlisted"));
    }
    let handler = match spec.runtime_class_name.as_deref().filter(|n| !n.is_empty()) {
        Some(name) => runtime_handler(&job.ctx, name).await?,
        None => String::new(),
    };
    if let Some(why) = userns::refused(spec) {
        return Err(why);
    }
    if job.has_own_users() {
        take_users(job, &handler).await?;
    }
    let cgroups = job.ctx.node.cgroups();
    cgroups.create(spec, &job.uid, job.cfs_period()).await.map_err(|e| orlop_base::telemetry::chain(&e))?;
    let config = job.sandbox_config(attempt);
    make_dirs(Path::new(&config.log_directory))
        .map_err(|e| format!("log directory {}: {e}", config.log_directory))?;
    let request = RunPodSandboxRequest { config: Some(config), runtime_handler: handler };
    let run = job.ctx.cri.run_pod_sandbox(request).await.map(|_| ()).map_err(|e| e.message());
    if job.has_own_users() {
        let m = &job.ctx.metrics;
        m.started_user_namespaced_pods.inc();
        m.started_user_namespaced_pods_errors.inc_by(u64::from(run.is_err()));
    }
    run
}

/// Gives the pod the ids of its user namespace.
async fn take_users(job: &Job, handler: &str) -> Result<(), String> {
    if let Some(why) = userns::unsupported(&job.ctx.node.runtime().handlers, handler) {
        return Err(why);
    }
    let (users, uid, dir) = (job.ctx.users.clone(), job.uid.clone(), job.dir());
    let taken = tokio::task::spawn_blocking(move || users.take(&uid, &dir)).await;
    taken.map_err(|e| e.to_string())?.map_err(|e| orlop_base::telemetry::chain(&e))
}

fn make_dirs(path: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(path)
}

async fn runtime_handler(ctx: &Context, name: &str) -> Result<String, String> {
    use k8s_openapi::api::node::v1::RuntimeClass;
    let client = ctx.client.clone().ok_or("runtime classes need an API server")?;
    let found = kube::Api::<RuntimeClass>::all(client).get(name).await;
    found
        .map(|r| r.handler)
        .map_err(|e| format!("RuntimeClass {name:?}: {}", orlop_base::telemetry::chain(&e)))
}

pub async fn stop_sandbox(job: Job, id: String) -> Done {
    let stopped = job.ctx.cri.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: id.clone() }).await;
    if let Err(e) = stopped
        && !e.is_not_found()
    {
        tracing::warn!(pod = %job.key(), sandbox = %id, error = %e, "sandbox not stopped");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    Done::Nothing
}

pub async fn remove_sandbox(job: Job, id: String) -> Done {
    if let Err(e) = remove_one_sandbox(&job.ctx, &id).await {
        tracing::warn!(pod = %job.key(), sandbox = %id, error = %e, "sandbox not removed");
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
    Done::Nothing
}

async fn remove_one_sandbox(ctx: &Context, id: &str) -> Result<(), CriError> {
    match ctx.cri.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() }).await {
        Err(e) if !e.is_not_found() => Err(e),
        _ => Ok(()),
    }
}

pub async fn remove_container(job: Job, id: String) -> Done {
    let gone = job.ctx.cri.remove_container(RemoveContainerRequest { container_id: id.clone() }).await;
    match gone {
        Err(e) if !e.is_not_found() => {
            tracing::warn!(pod = %job.key(), container = %id, error = %e, "container not removed");
            tokio::time::sleep(Duration::from_secs(5)).await;
        }
        _ => {
            if let Some(c) = job.observed.containers.iter().find(|c| c.id == id) {
                crate::logs::remove_of(&job.ctx.config, &job.observed, c);
            }
        }
    }
    Done::Nothing
}

pub async fn ensure_image(job: Job, container: String) -> Done {
    let result = match find_container(&job.pod, &container) {
        None => Err((
            Waiting { reason: "InvalidImageName".into(), message: String::new() },
            Duration::from_secs(60),
        )),
        Some((c, kind)) => {
            let attempt = job.observed.sandbox().map_or(0, |s| s.attempt);
            let sandbox = job.sandbox_config(attempt);
            let images = &job.ctx.images;
            match images.ensure(&job.ctx, &job.pod, (&c, kind), sandbox).await {
                Ok(present) => {
                    images.touch(&present.reference);
                    Ok(present.reference)
                }
                Err(why) => {
                    // The error shows for a moment, then the back-off and how long it takes.
                    let wait = match why.reason.as_str() {
                        "ErrImagePull" | "RegistryUnavailable" | "SignatureValidationFailed" => {
                            Duration::from_secs(1)
                        }
                        _ => images.retry_in(c.image.as_deref().unwrap_or_default()),
                    };
                    Err((why, wait.max(Duration::from_secs(1))))
                }
            }
        }
    };
    Done::Image { container, result }
}

pub async fn start_container(job: Job, container: String, attempt: u32, image_ref: String) -> Done {
    let Some((c, kind)) = find_container(&job.pod, &container) else {
        return Done::Start {
            container,
            result: Err(("CreateContainerConfigError", "no such container".into())),
        };
    };
    let result = start_steps(&job, &c, kind, attempt, image_ref).await;
    if let Err((reason, message)) = &result {
        let what = if *reason == "PostStartHookError" { "FailedPostStartHook" } else { "Failed" };
        let text = if what == "Failed" { format!("Error: {message}") } else { message.clone() };
        job.ctx.events.container_warning(&job.pod, (&c.name, kind), what, text);
    }
    // A failed hook's container has been stopped: its exit decides what comes next.
    let result = result.or_else(|e| if e.0 == "PostStartHookError" { Ok(()) } else { Err(e) });
    Done::Start { container, result }
}

const CONFIG_ERROR: &str = "CreateContainerConfigError";

async fn start_steps(
    job: &Job,
    c: &Container,
    kind: ContainerKind,
    attempt: u32,
    image_ref: String,
) -> Result<(), (&'static str, String)> {
    let config_error = |e: String| (CONFIG_ERROR, e);
    let sandbox = job.observed.ready_sandbox().ok_or_else(|| config_error("the sandbox is gone".into()))?;
    let facts = job.facts();
    let lookups = lookups(job, c).await.map_err(config_error)?;
    let (env, skipped) =
        env::build(&job.pod, c, &lookups, &facts).map_err(|e| config_error(e.to_string()))?;
    if !skipped.is_empty() {
        let message = format!(
            "Keys [{}] were skipped since they are invalid environment variable names",
            skipped.join(", ")
        );
        job.ctx.events.container_warning(
            &job.pod,
            (&c.name, kind),
            "InvalidEnvironmentVariableNames",
            message,
        );
    }
    let image_user = image_user(job, c, &image_ref).await;
    let users = job.users();
    if job.has_own_users() && users.is_none() {
        // In the node's own it would be root of the node.
        return Err(config_error(
            "the ids of the pod's user namespace are not known any more; delete the pod".into(),
        ));
    }
    let k = &job.ctx.config.kubelet;
    let security = security::container(
        &job.pod,
        c,
        &image_user,
        &sandbox::seccomp_root(&job.ctx.config),
        k.seccomp_default,
        users.clone(),
    )
    .map_err(|e| config_error(e.to_string()))?;
    let mut mounts = super::mounts::build(job, c, &env, attempt, &facts).await.map_err(config_error)?;
    if let Some(u) = users {
        for m in &mut mounts {
            (m.uid_mappings, m.gid_mappings) = (u.uids.clone(), u.gids.clone());
        }
    }
    let target_id = job
        .spec()
        .ephemeral_containers
        .iter()
        .flatten()
        .find(|e| e.name == c.name)
        .and_then(|e| e.target_container_name.as_deref())
        .and_then(|n| job.observed.container(n))
        .map(|t| t.id.clone());
    let prepared = container_spec::Prepared {
        attempt,
        image_ref,
        env,
        mounts,
        devices: Vec::new(),
        resources: resources::container(&job.pod, c, job.ctx.node.memory_capacity(), job.cfs_period()),
        security,
        target_id,
    };
    let config = container_spec::config(&job.pod, c, kind, prepared);
    let m = &job.pod.metadata;
    let log_dir = job
        .ctx
        .config
        .pod_log_dir(
            m.namespace.as_deref().unwrap_or_default(),
            m.name.as_deref().unwrap_or_default(),
            &job.uid,
        )
        .join(&c.name);
    make_dirs(&log_dir).map_err(|e| config_error(format!("log directory {}: {e}", log_dir.display())))?;
    let request = CreateContainerRequest {
        pod_sandbox_id: sandbox.id.clone(),
        config: Some(config),
        sandbox_config: Some(job.sandbox_config(sandbox.attempt)),
    };
    let created = job.ctx.cri.create_container(request).await;
    let id = created.map_err(|e| ("CreateContainerError", e.message()))?.container_id;
    job.ctx.events.container(&job.pod, (&c.name, kind), "Created", "Container created");
    if let Err(e) = job.ctx.cri.start_container(StartContainerRequest { container_id: id.clone() }).await {
        return Err(("RunContainerError", e.message()));
    }
    job.ctx.events.container(&job.pod, (&c.name, kind), "Started", "Container started");
    crate::logs::link(&job.ctx.config, &job.pod, &c.name, &id, &log_dir.join(format!("{attempt}.log")));
    if let Some(hook) = c.lifecycle.as_ref().and_then(|l| l.post_start.as_ref())
        && let Err(e) = hooks::run(&job.ctx, hook, &hooks::Target::new(&job.pod, c, &id, &facts)).await
    {
        let grace = job.spec().termination_grace_period_seconds.unwrap_or(30);
        job.ctx.events.container(&job.pod, (&c.name, kind), "Killing", "FailedPostStartHook");
        let _ = job.ctx.cri.stop_container(&id, grace).await;
        return Err(("PostStartHookError", format!("PostStartHook failed: {e}")));
    }
    Ok(())
}

async fn lookups(job: &Job, c: &Container) -> Result<Lookups, String> {
    let namespace = job.key().namespace;
    let (maps, secrets) = env::references(c);
    let mut all = Lookups::default();
    let none =
        || "this node runs without an API server: environment from API objects cannot be used".to_owned();
    for name in maps {
        let objects = job.ctx.volumes.config_maps.as_ref().ok_or_else(none)?;
        let found = objects.get(&job.uid, &Key::new(namespace.clone(), name.clone())).await;
        all.config_maps.insert(name, found.map_err(|e| e.to_string())?);
    }
    for name in secrets {
        let objects = job.ctx.volumes.secrets.as_ref().ok_or_else(none)?;
        let found = objects.get(&job.uid, &Key::new(namespace.clone(), name.clone())).await;
        all.secrets.insert(name, found.map_err(|e| e.to_string())?);
    }
    if !super::is_static(&job.pod) {
        all.services = job.ctx.services.of(&namespace).await?;
    }
    Ok(all)
}

/// Asked only when the answer matters.
async fn image_user(job: &Job, c: &Container, image_ref: &str) -> ImageUser {
    let pod = job.spec().security_context.as_ref();
    let own = c.security_context.as_ref();
    let non_root = own.and_then(|s| s.run_as_non_root).or(pod.and_then(|p| p.run_as_non_root)) == Some(true);
    let group = own.and_then(|s| s.run_as_group).or(pod.and_then(|p| p.run_as_group)).is_some();
    if !non_root && !group {
        return ImageUser::default();
    }
    let image = Some(ImageSpec { image: image_ref.to_owned(), ..Default::default() });
    let status = job.ctx.cri.image_status(ImageStatusRequest { image, verbose: false }).await;
    let found = status.ok().and_then(|r| r.image);
    found.map(|i| ImageUser { uid: i.uid.map(|v| v.value), name: i.username }).unwrap_or_default()
}

pub async fn kill_container(job: Job, id: String, name: String, grace: i64, reason: KillReason) -> Done {
    let found = find_container(&job.pod, &name);
    let kind = found.as_ref().map_or(ContainerKind::Regular, |(_, k)| *k);
    let message = match reason {
        KillReason::PodEnds => format!("Stopping container {name}"),
        KillReason::LivenessFailed => format!("Container {name} failed liveness probe, will be restarted"),
        KillReason::StartupFailed => format!("Container {name} failed startup probe, will be restarted"),
        KillReason::PostStartFailed => format!("Container {name} failed its postStart hook"),
        KillReason::Changed => format!("Container {name} definition changed, will be restarted"),
        KillReason::SandboxChanged => format!("Stopping container {name}: its sandbox has changed"),
        KillReason::Resized => format!("Container {name} resize requires restart"),
        KillReason::Unknown => format!("Container {name} is in an unknown state, will be restarted"),
    };
    job.ctx.events.container(&job.pod, (&name, kind), "Killing", message);
    let began = Instant::now();
    let running = job.observed.containers.iter().any(|c| c.id == id && c.state == State::Running);
    let hook = found.as_ref().and_then(|(c, _)| c.lifecycle.as_ref()?.pre_stop.as_ref().map(|h| (c, h)));
    if let (Some((c, hook)), true, true) = (hook, grace > 0, running) {
        let target = hooks::Target::new(&job.pod, c, &id, &job.facts());
        let limit = Duration::from_secs(grace as u64);
        match tokio::time::timeout(limit, hooks::run(&job.ctx, hook, &target)).await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => {
                job.ctx.events.container_warning(
                    &job.pod,
                    (&name, kind),
                    "FailedPreStopHook",
                    format!("PreStopHook failed: {e}"),
                );
            }
            Err(_) => {
                tracing::warn!(pod = %job.key(), container = %name, "preStop hook did not end within the grace period")
            }
        }
    }
    let left = if grace <= 0 { 0 } else { (grace - began.elapsed().as_secs() as i64).max(2) };
    match job.ctx.cri.stop_container(&id, left).await {
        Err(e) if !e.is_not_found() => {
            job.ctx.events.container_warning(
                &job.pod,
                (&name, kind),
                "FailedKillPod",
                format!("error killing container: {}", e.message()),
            );
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        _ => {}
    }
    Done::Nothing
}

/// Puts the pod's size in force: its cgroup first gets room for the old and the new containers, then theirs change, then it
/// gets its own new limits.
pub async fn resize(job: Job, containers: Vec<String>, old: Arc<Pod>) -> Done {
    Done::Resized(resize_steps(&job, containers, &old).await)
}

async fn resize_steps(
    job: &Job,
    containers: Vec<String>,
    old: &Pod,
) -> Result<Vec<(String, ResourceRequirements)>, String> {
    let chain = |e: crate::Error| orlop_base::telemetry::chain(&e);
    let cgroups = job.ctx.node.cgroups();
    let mut changes = Vec::new();
    for name in containers {
        let (Some((c, _)), Some(run)) = (find_container(&job.pod, &name), job.observed.container(&name))
        else {
            continue;
        };
        let linux =
            resources::running_container(&job.pod, &c, job.ctx.node.memory_capacity(), job.cfs_period());
        fits_what_it_uses(job, &name, &run.id, linux.memory_limit_in_bytes).await?;
        changes.push((run.id.clone(), c.resources.unwrap_or_default(), linux));
    }
    cgroups.resize(old.spec.as_ref(), job.spec(), &job.uid, job.cfs_period()).await.map_err(chain)?;
    let mut done = Vec::new();
    for (id, size, linux) in changes {
        let request = UpdateContainerResourcesRequest {
            container_id: id.clone(),
            linux: Some(linux),
            ..Default::default()
        };
        job.ctx.cri.update_container_resources(request).await.map_err(|e| e.message())?;
        done.push((id, size));
    }
    cgroups.resize(None, job.spec(), &job.uid, job.cfs_period()).await.map_err(chain)?;
    Ok(done)
}

/// A limit below what is used would have the kernel kill something.
async fn fits_what_it_uses(job: &Job, name: &str, id: &str, limit: i64) -> Result<(), String> {
    if limit <= 0 {
        return Ok(());
    }
    let request = ContainerStatsRequest { container_id: id.to_owned() };
    let stats = job.ctx.cri.container_stats(request).await.map_err(|e| e.message())?.stats;
    let used = stats.and_then(|s| s.memory?.working_set_bytes).map_or(0, |v| v.value);
    match i64::try_from(used).is_ok_and(|used| used > limit) {
        false => Ok(()),
        true => Err(format!(
            "attempting to set container {name:?} memory limit ({limit}) below current usage ({used})"
        )),
    }
}

pub async fn tear_down(job: Job) -> Done {
    let result = job.ctx.volumes.tear_down(&job.ctx, &job.uid).await;
    let cgroups = job.ctx.node.cgroups();
    cgroups.remove(&job.uid).await;
    job.ctx.users.release(&job.uid, &job.dir());
    Done::TornDown(result.map_err(|e| orlop_base::telemetry::chain(&e)))
}

/// Everything of a pod that has ended and is not wanted any more: containers, sandboxes, logs, folder.
pub async fn remove_all(job: Job) -> Result<(), String> {
    remove_mirror(&job).await?;
    let last = &job.observed;
    let observed = crate::runtime::observe(&job.ctx.cri, &job.uid, last).await.map_err(|e| e.to_string())?;
    for c in &observed.containers {
        match job.ctx.cri.remove_container(RemoveContainerRequest { container_id: c.id.clone() }).await {
            Err(e) if !e.is_not_found() => return Err(e.to_string()),
            _ => crate::logs::unlink(&job.ctx.config, &job.pod, &c.name, &c.id),
        }
    }
    for s in &observed.sandboxes {
        remove_one_sandbox(&job.ctx, &s.id).await.map_err(|e| e.to_string())?;
    }
    let m = &job.pod.metadata;
    let logs = job.ctx.config.pod_log_dir(
        m.namespace.as_deref().unwrap_or_default(),
        m.name.as_deref().unwrap_or_default(),
        &job.uid,
    );
    let dir = job.dir();
    job.ctx.users.release(&job.uid, &dir);
    let removed = volumes::blocking(move || {
        volumes::mounts::unmount_below(&dir)?;
        volumes::mounts::remove_tree(&dir)?;
        volumes::mounts::remove_tree(&logs)
    });
    removed.await.map_err(|e| orlop_base::telemetry::chain(&e))
}

/// A static pod that has gone takes its mirror with it, unless the mirror is its successor's.
async fn remove_mirror(job: &Job) -> Result<(), String> {
    use crate::sources::mirror;
    let key = job.key();
    let (Some(client), Some(seen)) = (job.ctx.client.clone(), job.ctx.pods.mirror(&key)) else {
        return Ok(());
    };
    let own = orlop_api::meta::annotation(&seen.metadata, mirror::MIRROR) == Some(job.uid.as_str());
    if !super::is_static(&job.pod) || !own {
        return Ok(());
    }
    let api: kube::Api<Pod> = kube::Api::namespaced(client, &key.namespace);
    mirror::remove(&api, &seen).await.map_err(|e| orlop_base::telemetry::chain(&e))
}
