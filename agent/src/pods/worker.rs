//! One pod's task: looks at what is wanted and what runs, plans, carries out, reports. Everything it does follows from
//! the present state, so it may be ended at any moment and started again.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use orlop_api::pod::condition;
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, Id, JoinSet};

use super::checkpoint::Checkpoint;
use super::exec::{self, Done, Job};
use super::manager::{Desired, Signals};
use super::plan::{self, Action, KillReason, Plan};
use super::resize::{self, Allocation, Sizes};
use super::state::{ImageState, Memory, OpKey, Restart, StartFailure, Step, Terminating, Waiting};
use crate::context::Context;
use crate::probes::Probes;
use crate::runtime::{self, ObservedPod, State};
use crate::status::generate;
use crate::status::writer::{self, Wanted};
use crate::volumes::PodVolumes;

type Labels = Option<BTreeMap<String, String>>;

/// Even when nothing happens a pod is looked at this often.
const RESYNC: Duration = Duration::from_secs(60);
/// How long to wait before asking a runtime that did not answer.
const RUNTIME_RETRY: Duration = Duration::from_secs(1);
/// Probe results waiting for the worker: a few per container.
const PROBE_QUEUE: usize = 64;

struct Worker {
    ctx: Context,
    uid: String,
    signals: Arc<Signals>,
    desired: watch::Receiver<Desired>,
    memory: Memory,
    observed: Arc<ObservedPod>,
    volumes: PodVolumes,
    /// Labels and annotations that the volumes were made with: downward API volumes show them.
    shown: Option<(Labels, Labels)>,
    jobs: JoinSet<Done>,
    keys: HashMap<Id, (OpKey, AbortHandle)>,
    probes: Probes,
    status: PodStatus,
    /// Whether `status` is still what the API said before this worker started.
    inherited: bool,
    wanted: watch::Sender<Option<Wanted>>,
    saved: Checkpoint,
    first_seen: Timestamp,
    reported_start: bool,
    /// The sizes that the resize under way puts in force.
    resizing: Allocation,
}

/// Runs a pod from its first sight until nothing of it is left or the agent stops.
pub async fn run(ctx: Context, uid: String, desired: watch::Receiver<Desired>, signals: Arc<Signals>) {
    let stop = ctx.tasks.stop_token();
    let pod = desired.borrow().pod.clone();
    let (wanted, receive) = watch::channel(None);
    let (send_probe, mut probe_results) = mpsc::channel(PROBE_QUEUE);
    let mut w = Worker::new(ctx.clone(), uid, desired, signals, wanted, send_probe);
    let work = async {
        if super::is_static(&pod) {
            w.ctx.pods.name_is_free(&w.uid).await;
        }
        w.run(&mut probe_results).await;
        w.ctx.pods.forget(&w.uid);
        drop(w);
    };
    let write = async {
        match ctx.client.clone() {
            Some(client) => writer::run(ctx.clone(), client, receive).await,
            // Keeps the channel open.
            None => {
                let mut receive = receive;
                while receive.changed().await.is_ok() {}
            }
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        _ = async { tokio::join!(work, write) } => {}
    }
}

/// What has run before by the status that the API has. The runtime may have lost it (a reboot, `orlop down`), but a count
/// that was told never goes down.
fn next_attempts(status: &PodStatus) -> BTreeMap<String, u32> {
    let all = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
    let ran = all.filter(|s| s.container_id.is_some());
    ran.map(|s| (s.name.clone(), u32::try_from(s.restart_count).map_or(0, |n| n + 1))).collect()
}

impl Worker {
    fn new(
        ctx: Context,
        uid: String,
        desired: watch::Receiver<Desired>,
        signals: Arc<Signals>,
        wanted: watch::Sender<Option<Wanted>>,
        probe_results: mpsc::Sender<crate::probes::Outcome>,
    ) -> Worker {
        let (pod, mirror) = {
            let d = desired.borrow();
            (d.pod.clone(), d.mirror.clone())
        };
        let saved = Checkpoint::read(&ctx.config.pod_dir(&uid));
        let status = mirror.as_ref().unwrap_or(&pod).status.clone().unwrap_or_default();
        let start_time = saved.start_time.or_else(|| status.start_time.as_ref().map(|t| t.0));
        let phase = status.phase.as_deref();
        let granted = saved.granted.clone();
        let granted = granted.or_else(|| pod.spec.as_ref().map(Allocation::of)).unwrap_or_default();
        let memory = Memory {
            start_time: Some(start_time.unwrap_or_else(Timestamp::now)),
            finished: saved.finished || matches!(phase, Some("Succeeded" | "Failed")),
            restarts: saved.restarts.clone(),
            next_attempts: next_attempts(&status),
            restart_regardless: saved.restart_regardless.iter().cloned().collect(),
            probes: saved.probes.clone().into_iter().collect(),
            sizes: Sizes {
                of_run: saved.of_run.clone(),
                of_cgroup: saved.of_cgroup.clone().or(Some(granted.clone())),
                granted,
                ..Default::default()
            },
            ..Default::default()
        };
        ctx.pods.set_granted(&uid, memory.sizes.granted.clone());
        Worker {
            probes: Probes::new(ctx.clone(), probe_results),
            first_seen: Timestamp::now(),
            observed: Arc::new(ObservedPod { uid: uid.clone(), ..Default::default() }),
            volumes: PodVolumes::default(),
            shown: None,
            jobs: JoinSet::new(),
            keys: HashMap::new(),
            inherited: true,
            resizing: Allocation::default(),
            reported_start: phase.is_some_and(|p| p != "Pending"),
            ctx,
            uid,
            signals,
            desired,
            memory,
            status,
            wanted,
            saved,
        }
    }

    async fn run(&mut self, probe_results: &mut mpsc::Receiver<crate::probes::Outcome>) {
        self.signals.runtime.store(true, Ordering::Release);
        if let Some(refusal) = crate::node::admit::check(&self.ctx, &self.pod())
            && self.status.phase.as_deref().unwrap_or("Pending") == "Pending"
            && self.status.start_time.is_none()
        {
            self.ctx.events.pod_warning(&self.pod(), &refusal.0, refusal.1.clone());
            self.memory.rejected = Some(refusal);
        }
        let mut removals = 0;
        loop {
            let began = std::time::Instant::now();
            let mut retry = None;
            if self.signals.runtime.swap(false, Ordering::AcqRel) {
                match runtime::observe(&self.ctx.cri, &self.uid, &self.observed).await {
                    Ok(o) => self.observed = Arc::new(o),
                    Err(e) => {
                        tracing::debug!(pod = %self.uid, error = %e, "runtime not asked");
                        self.signals.runtime.store(true, Ordering::Release);
                        retry = Some(RUNTIME_RETRY);
                    }
                }
            }
            let mut wake = Timestamp::now() + SignedDuration::try_from(RESYNC).unwrap_or_default();
            if retry.is_none() {
                if let Some(at) = self.pass() {
                    wake = wake.min(at);
                }
                self.ctx.metrics.pod_worker_duration.observe(began.elapsed().as_secs_f64());
            }
            let over = self.memory.terminated && self.desired.borrow().gone;
            if over && self.jobs.is_empty() {
                if self.clean_up().await {
                    return;
                }
                retry = Some(RUNTIME_RETRY * (1 << removals.min(4)));
                removals += 1;
            }
            let sleep = retry.unwrap_or_else(|| {
                let left = wake.duration_since(Timestamp::now());
                Duration::try_from(left).unwrap_or(Duration::ZERO)
            });
            // Every arm only takes what is ready: results that are not taken now are taken with the next pass.
            tokio::select! {
                () = self.signals.wake.notified() => {}
                c = self.desired.changed() => if c.is_err() { return },
                Some(done) = self.jobs.join_next_with_id() => self.finished(done),
                Some(result) = probe_results.recv() => self.probed(result),
                () = tokio::time::sleep(sleep) => {
                    if retry.is_none() && sleep >= RESYNC {
                        self.signals.runtime.store(true, Ordering::Release);
                    }
                }
            }
            while let Some(done) = self.jobs.try_join_next_with_id() {
                self.finished(done);
            }
            while let Ok(result) = probe_results.try_recv() {
                self.probed(result);
            }
        }
    }

    /// The pod with the sizes that the node has granted.
    fn pod(&self) -> Arc<Pod> {
        let pod = self.desired.borrow().pod.clone();
        self.memory.sizes.granted.applied(&pod)
    }

    /// Grants the pod another size when its spec asks for one and there is room.
    fn grant(&mut self, pod: &Arc<Pod>) -> Arc<Pod> {
        let wanted = pod.spec.as_ref().map(Allocation::of).unwrap_or_default();
        let sizes = &mut self.memory.sizes;
        if wanted.same(&sizes.granted) || self.memory.terminating.is_some() || self.memory.finished {
            sizes.pending = None;
            return sizes.granted.applied(pod);
        }
        let (what, generation) = (&self.ctx.events, pod.metadata.generation);
        match self.ctx.pods.grant(pod, &wanted, &self.ctx.node.allocatable()) {
            Ok(()) => {
                what.pod(
                    pod,
                    "ResizeStarted",
                    resize::event_message("Pod resize started", pod, generation, ""),
                );
                sizes.granted = wanted;
                (sizes.pending, sizes.failure, sizes.step) = (None, None, Step::Wanted);
                sizes.in_progress = Some(generation);
            }
            Err(pending) => {
                if sizes
                    .pending
                    .as_ref()
                    .is_none_or(|p| (p.reason, p.generation) != (pending.reason, generation))
                {
                    let prefix = format!("Pod resize {}", pending.reason);
                    let message = resize::event_message(&prefix, pod, generation, &pending.message);
                    what.pod_warning(pod, &format!("Resize{}", pending.reason), message);
                }
                sizes.pending = Some(pending);
            }
        }
        sizes.granted.applied(pod)
    }

    /// Ends a resize that has come into force.
    fn note_resized(&mut self, pod: &Pod) {
        let memory = &mut self.memory;
        let Some(generation) = memory.sizes.in_progress else { return };
        let regardless = |id: &str| memory.restart_regardless.contains(id);
        if memory.sizes.in_force(pod, &self.observed, regardless) {
            memory.sizes.in_progress = None;
            let message = resize::event_message("Pod resize completed", pod, generation, "");
            self.ctx.events.pod(pod, "ResizeCompleted", message);
        }
    }

    /// One look at everything. Gives when to look again at the latest.
    fn pass(&mut self) -> Option<Timestamp> {
        let now = Timestamp::now();
        let desired = self.desired.borrow_and_update().clone();
        self.note_termination(&desired, now);
        self.forget_old_containers();
        self.memory.sizes.note_runs(&self.observed);
        let pod = self.grant(&desired.pod);
        self.refresh_volumes(now);
        let plan = loop {
            let input = plan::Input {
                pod: &pod,
                observed: &self.observed,
                memory: &self.memory,
                now,
                max_restart_delay: self.ctx.config.kubelet.max_restart_delay(),
            };
            let plan = plan::plan(&input);
            let mut again = false;
            for action in &plan.actions {
                again |= self.carry_out(&pod, action.clone(), now);
            }
            if !again {
                break plan;
            }
        };
        self.note_resized(&pod);
        self.probes.follow(&pod, &self.observed, &self.memory);
        self.report(&desired, &pod, &plan, now);
        self.save();
        let refresh = self.volumes.refresh_at.filter(|_| !self.memory.is_ending());
        match (plan.wake_at, refresh) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    fn note_termination(&mut self, desired: &Desired, now: Timestamp) {
        let m = &desired.pod.metadata;
        let spec_grace =
            desired.pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds).unwrap_or(30);
        let deleted = m.deletion_timestamp.is_some();
        if !deleted && !desired.gone {
            return;
        }
        let grace = match (deleted, m.deletion_grace_period_seconds) {
            (true, Some(g)) => g,
            _ => spec_grace,
        }
        .max(0);
        match &mut self.memory.terminating {
            None => {
                self.memory.terminating = Some(Terminating { since: now, grace, failure: None });
            }
            Some(t) if t.grace > grace => {
                // A second deletion with less patience: stops under way begin again with the shorter time.
                t.grace = grace;
                t.since = now;
                for (key, handle) in self.keys.values() {
                    if matches!(key, OpKey::Kill(_)) {
                        handle.abort();
                        self.memory.in_flight.remove(key);
                    }
                }
            }
            Some(_) => {}
        }
    }

    fn forget_old_containers(&mut self) {
        let observed = &self.observed;
        let alive = |id: &String| observed.containers.iter().any(|c| c.id == *id && c.state != State::Exited);
        self.memory.probes.retain(|id, _| alive(id));
        self.memory.restart_regardless.retain(|id| observed.containers.iter().any(|c| c.id == *id));
    }

    fn refresh_volumes(&mut self, now: Timestamp) {
        let changed = self.signals.volumes.swap(false, Ordering::AcqRel) | self.metadata_changed();
        let due = self.volumes.refresh_at.is_some_and(|t| t <= now);
        if (changed || due) && !self.memory.is_ending() {
            self.volumes.refresh_at = None;
            // Containers that could not be started may be able to now.
            self.memory.start_failures.retain(|_, f| f.why.reason != "CreateContainerConfigError");
            if self.memory.in_flight.contains(&OpKey::Volumes) {
                self.signals.volumes.store(true, Ordering::Release);
            } else {
                self.memory.volumes = match self.memory.volumes {
                    // What runs keeps its volumes; they are refreshed beside it.
                    Step::Done => {
                        let pod = self.pod();
                        self.launch(OpKey::Volumes, exec::set_up_volumes(self.job(pod)));
                        return;
                    }
                    _ => Step::Wanted,
                };
            }
        }
    }

    /// Whether labels or annotations differ from those of the last look.
    fn metadata_changed(&mut self) -> bool {
        let pod = self.pod();
        let m = &pod.metadata;
        if self.shown.as_ref().is_some_and(|(l, a)| *l == m.labels && *a == m.annotations) {
            return false;
        }
        self.shown.replace((m.labels.clone(), m.annotations.clone())).is_some()
    }

    fn job(&self, pod: Arc<Pod>) -> Job {
        Job {
            ctx: self.ctx.clone(),
            uid: self.uid.clone(),
            pod,
            observed: self.observed.clone(),
            volumes: self.volumes.clone(),
        }
    }

    fn launch(&mut self, key: OpKey, work: impl Future<Output = Done> + Send + 'static) {
        let handle = self.jobs.spawn(work);
        self.memory.in_flight.insert(key.clone());
        self.keys.insert(handle.id(), (key, handle));
    }

    /// Starts an action. True when memory has changed so that the plan has to be made again.
    fn carry_out(&mut self, pod: &Arc<Pod>, action: Action, now: Timestamp) -> bool {
        let job = self.job(pod.clone());
        match action {
            Action::SetUpVolumes => self.launch(OpKey::Volumes, exec::set_up_volumes(job)),
            Action::CreateSandbox { attempt } => {
                // The cgroup is made with it.
                self.memory.sizes.of_cgroup = Some(self.memory.sizes.granted.clone());
                self.launch(OpKey::Sandbox, exec::create_sandbox(job, attempt))
            }
            Action::StopSandbox { id } => {
                self.launch(OpKey::StopSandbox(id.clone()), exec::stop_sandbox(job, id))
            }
            Action::RemoveSandbox { id } => {
                self.launch(OpKey::Remove(id.clone()), exec::remove_sandbox(job, id))
            }
            Action::EnsureImage { container } => {
                self.launch(OpKey::Image(container.clone()), exec::ensure_image(job, container));
            }
            Action::StartContainer { container, attempt, image_ref, ended } => {
                if let Some(ended) = ended {
                    let max = self.ctx.config.kubelet.max_restart_delay();
                    let next = Restart::next(self.memory.restarts.get(&container), ended, now, max);
                    self.memory.restarts.insert(container.clone(), next);
                }
                let hook = super::find_container(pod, &container)
                    .is_some_and(|(c, _)| c.lifecycle.is_some_and(|l| l.post_start.is_some()));
                self.memory.hook_pending = hook.then(|| container.clone());
                let size = super::find_container(pod, &container).and_then(|(c, _)| c.resources);
                self.memory.sizes.starting.insert(container.clone(), size.unwrap_or_default());
                self.launch(OpKey::Start, exec::start_container(job, container, attempt, image_ref));
            }
            Action::KillContainer { id, name, grace, reason } => {
                if !matches!(reason, KillReason::PodEnds) {
                    self.memory.restart_regardless.insert(id.clone());
                }
                self.launch(OpKey::Kill(id.clone()), exec::kill_container(job, id, name, grace, reason));
            }
            Action::RemoveContainer { id } => {
                self.launch(OpKey::Remove(id.clone()), exec::remove_container(job, id));
            }
            Action::Finish => {
                self.memory.finished = true;
                return true;
            }
            Action::Deadline => {
                let message = "Pod was active on the node longer than the specified deadline".to_owned();
                self.ctx.events.pod(pod, "DeadlineExceeded", message.clone());
                let grace = pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds).unwrap_or(30);
                let failure = Some(("DeadlineExceeded".to_owned(), message));
                self.memory.terminating = Some(Terminating { since: now, grace: grace.max(0), failure });
                return true;
            }
            Action::TearDown => self.launch(OpKey::TearDown, exec::tear_down(job)),
            Action::Resize { containers } => {
                let sizes = &self.memory.sizes;
                let old = sizes.of_cgroup.as_ref().map_or(pod.clone(), |a| a.applied(pod));
                self.resizing = sizes.granted.clone();
                self.launch(OpKey::Resize, exec::resize(job, containers, old));
            }
        }
        false
    }

    fn finished(&mut self, done: Result<(Id, Done), tokio::task::JoinError>) {
        let (id, done) = match done {
            Ok((id, done)) => (id, Some(done)),
            Err(e) => {
                if e.is_panic() {
                    tracing::error!(pod = %self.uid, error = %e, "a step of the pod panicked");
                }
                (e.id(), None)
            }
        };
        if let Some((key, _)) = self.keys.remove(&id) {
            // An aborted stop may have been replaced by another under the same key.
            if !self.keys.values().any(|(k, _)| *k == key) {
                self.memory.in_flight.remove(&key);
            }
            if !matches!(key, OpKey::Image(_) | OpKey::Volumes) {
                self.signals.runtime.store(true, Ordering::Release);
            }
            if key == OpKey::Start {
                self.memory.hook_pending = None;
            }
        }
        if let Some(done) = done {
            self.apply(done);
        }
    }

    fn apply(&mut self, done: Done) {
        let now = Timestamp::now();
        let after = |failures: u32| {
            let secs = 1i64 << failures.min(4);
            now + SignedDuration::from_secs(secs.min(10))
        };
        match done {
            Done::Volumes(Ok(v)) => {
                self.volumes = v;
                self.memory.volumes = Step::Done;
            }
            Done::Volumes(Err((name, e))) => {
                let message = format!(
                    "MountVolume.SetUp failed for volume {name:?} : {}",
                    orlop_base::telemetry::chain(&e)
                );
                self.ctx.events.pod_warning(&self.pod(), "FailedMount", message);
                if self.memory.volumes == Step::Done {
                    self.volumes.refresh_at = Some(after(3));
                } else {
                    let failures = self.memory.volumes.failures() + 1;
                    self.memory.volumes = Step::Failed { retry_at: after(failures), failures };
                }
            }
            Done::Sandbox(Ok(())) => {
                self.memory.sandbox = Step::Done;
                self.ctx.metrics.started_pods.inc();
            }
            Done::Sandbox(Err(message)) => {
                self.ctx.events.pod_warning(
                    &self.pod(),
                    "FailedCreatePodSandBox",
                    format!("Failed to create pod sandbox: {message}"),
                );
                let failures = self.memory.sandbox.failures() + 1;
                self.memory.sandbox = Step::Failed { retry_at: after(failures), failures };
            }
            Done::Image { container, result } => {
                let state = match result {
                    Ok(reference) => ImageState::Present(reference),
                    Err((why, wait)) => {
                        let retry_at = now + SignedDuration::try_from(wait).unwrap_or_default();
                        ImageState::Failed { why, retry_at, failures: 1 }
                    }
                };
                self.memory.images.insert(container, state);
            }
            Done::Start { container, result } => {
                self.memory.images.remove(&container);
                match result {
                    Ok(()) => {
                        self.memory.start_failures.remove(&container);
                        self.ctx.metrics.started_containers.inc();
                    }
                    Err((reason, message)) => {
                        let failures =
                            self.memory.start_failures.get(&container).map_or(0, |f| f.failures) + 1;
                        let why = Waiting { reason: reason.to_owned(), message };
                        let retry_at = now + SignedDuration::from_secs((5i64 << failures.min(6)).min(300));
                        self.memory
                            .start_failures
                            .insert(container, StartFailure { why, retry_at, failures });
                    }
                }
            }
            Done::Resized(Ok(sizes)) => {
                let s = &mut self.memory.sizes;
                s.of_run.extend(sizes);
                s.of_cgroup = Some(std::mem::take(&mut self.resizing));
                (s.step, s.failure) = (Step::Wanted, None);
            }
            Done::Resized(Err(message)) => {
                let pod = self.pod();
                let generation = self.memory.sizes.in_progress.flatten();
                let text = resize::event_message("Pod resize error", &pod, generation, &message);
                self.ctx.events.pod_warning(&pod, "ResizeError", text);
                let s = &mut self.memory.sizes;
                let failures = s.step.failures() + 1;
                s.step = Step::Failed { retry_at: after(failures), failures };
                s.failure = Some(message);
            }
            Done::TornDown(Ok(())) => self.memory.terminated = true,
            Done::TornDown(Err(e)) => {
                tracing::warn!(pod = %self.uid, error = %e, "pod not torn down, trying again");
                // The next pass after the resync plans it again; a busy mount is often free soon.
                let signals = self.signals.clone();
                self.ctx.tasks.spawn(async move {
                    tokio::time::sleep(Duration::from_secs(2)).await;
                    signals.wake.notify_one();
                });
            }
            Done::Nothing => {}
        }
    }

    fn probed(&mut self, outcome: crate::probes::Outcome) {
        let view = self.memory.probes.entry(outcome.container_id).or_default();
        match outcome.kind {
            crate::probes::Kind::Startup if outcome.success => view.started = Some(true),
            crate::probes::Kind::Startup => {
                view.started = Some(false);
                view.live = Some(false);
            }
            crate::probes::Kind::Readiness => view.ready = Some(outcome.success),
            crate::probes::Kind::Liveness => view.live = Some(outcome.success),
        }
    }

    fn report(&mut self, desired: &Desired, pod: &Pod, plan: &Plan, now: Timestamp) {
        let api = match super::is_static(&desired.pod) {
            true => desired.mirror.clone(),
            false => Some(desired.pod.clone()),
        };
        let host_ips = self.ctx.node.host_ips();
        let status = generate::status(&generate::Input {
            pod,
            observed: &self.observed,
            memory: &self.memory,
            plan,
            previous: &self.status,
            host_ips: &host_ips,
            runtime: &self.ctx.runtime_name,
            now,
        });
        let delete = self.memory.terminated && desired.pod.metadata.deletion_timestamp.is_some();
        let changed = status != self.status || std::mem::take(&mut self.inherited);
        let object = |s: &PodStatus| Pod { status: Some(s.clone()), ..Default::default() };
        let (old, new) = (object(&self.status), object(&status));
        let of = |p: &Pod| {
            (condition(p, "Ready").map(str::to_owned), p.status.as_ref().and_then(|s| s.phase.clone()))
        };
        let urgent = of(&old) != of(&new) && of(&old).0.is_some();
        if !self.reported_start && self.observed.running().next().is_some() {
            self.reported_start = true;
            let took = now.duration_since(self.first_seen).as_secs_f64();
            self.ctx.metrics.pod_start_duration.observe(took);
            tracing::debug!(pod = %self.uid, seconds = took, "first container runs");
        }
        self.ctx.pods.publish(&self.uid, status.clone(), self.observed.clone());
        let before = self.wanted.borrow().as_ref().map(|w| (w.api.clone(), w.delete, w.urgent));
        let same_api = before.as_ref().is_some_and(|(a, d, _)| {
            let version = |p: &Option<Arc<Pod>>| p.as_ref().map(|p| p.metadata.resource_version.clone());
            version(a) == version(&api) && *d == delete
        });
        if changed || !same_api {
            let urgent = urgent || (!changed && before.is_some_and(|b| b.2));
            self.status = status.clone();
            let wanted = Wanted { pod: desired.pod.clone(), api, status, urgent, delete };
            self.wanted.send_replace(Some(wanted));
        }
    }

    fn save(&mut self) {
        let now = Checkpoint::of(&self.memory, &self.observed);
        if now != self.saved && !self.memory.terminated {
            now.write(&self.ctx.config.pod_dir(&self.uid));
            self.saved = now;
        }
    }

    /// Removes what is left of a pod that nobody wants any more; false to try again.
    async fn clean_up(&mut self) -> bool {
        let job = self.job(self.pod());
        match exec::remove_all(job).await {
            Ok(()) => true,
            Err(e) => {
                tracing::warn!(pod = %self.uid, error = %e, "pod not removed, trying again");
                false
            }
        }
    }
}
