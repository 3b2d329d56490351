//! What to do next for a pod: a pure function of what is wanted, what runs and what the worker remembers.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use orlop_api::pod::is_sidecar;

use super::ephemeral_as_container;
use super::resize::Change;
use super::state::{ImageState, Memory, OpKey, Restart, Step, Waiting};
use super::termination;
use crate::runtime::{self, ObservedPod, State};
use crate::spec::container::hash;

/// Why a container is stopped; decides the event and whether it comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KillReason {
    /// The pod ends.
    PodEnds,
    LivenessFailed,
    StartupFailed,
    PostStartFailed,
    /// The image or name in the spec changed.
    Changed,
    /// The sandbox it runs in is gone.
    SandboxChanged,
    /// Its resize policy wants a restart for its new size.
    Resized,
    /// The runtime does not know how it is.
    Unknown,
}

/// One step for the executor. A step whose [`OpKey`] is in flight is left out of plans.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    SetUpVolumes,
    CreateSandbox {
        attempt: u32,
    },
    StopSandbox {
        id: String,
    },
    RemoveSandbox {
        id: String,
    },
    EnsureImage {
        container: String,
    },
    StartContainer {
        container: String,
        attempt: u32,
        image_ref: String,
        ended: Option<Timestamp>,
    },
    KillContainer {
        id: String,
        name: String,
        grace: i64,
        reason: KillReason,
    },
    RemoveContainer {
        id: String,
    },
    /// All containers have ended for good.
    Finish,
    /// `activeDeadlineSeconds` is over.
    Deadline,
    TearDown,
    /// Gives the pod's cgroup and these running containers, by name, the sizes that were granted.
    Resize {
        containers: Vec<String>,
    },
}

/// What to do now, when to look again at the latest, and why containers wait.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    pub actions: Vec<Action>,
    pub wake_at: Option<Timestamp>,
    pub waiting: BTreeMap<String, Waiting>,
}

/// Everything a plan depends on.
pub struct Input<'a> {
    pub pod: &'a Pod,
    pub observed: &'a ObservedPod,
    pub memory: &'a Memory,
    pub now: Timestamp,
    /// The longest restart delay.
    pub max_restart_delay: Duration,
}

struct Planner<'a> {
    input: &'a Input<'a>,
    spec: &'a PodSpec,
    plan: Plan,
    /// Running containers that are to be given another size.
    resizes: Vec<String>,
    /// Some container has to end before it can have its new size.
    resize_restarts: bool,
}

/// What a container needs in its present state.
enum Need {
    /// Runs as it should.
    Keep,
    /// Has ended and stays so.
    Done { failed: bool },
    /// To be started, with this restart count, after the run that ended then.
    Start { attempt: u32, ended: Option<Timestamp> },
    /// Something is under way or has to be waited for.
    Wait,
}

/// Plans the next steps. Calling it again with an unchanged input gives the same answer.
pub fn plan(input: &Input<'_>) -> Plan {
    let Some(spec) = &input.pod.spec else { return Plan::default() };
    let mut p = Planner { input, spec, plan: Plan::default(), resizes: Vec::new(), resize_restarts: false };
    if input.memory.is_ending() {
        p.end();
    } else {
        p.run();
    }
    p.plan
}

/// The restart policy in force for a container.
fn policy<'a>(spec: &'a PodSpec, c: &'a Container) -> &'a str {
    c.restart_policy.as_deref().or(spec.restart_policy.as_deref()).unwrap_or("Always")
}

/// Whether a container that ended with this code is to run again (KEP-5307 for the rules).
pub fn restarts(spec: &PodSpec, c: &Container, exit_code: i32) -> bool {
    for rule in c.restart_policy_rules.iter().flatten() {
        let Some(codes) = &rule.exit_codes else { continue };
        let listed = codes.values.iter().flatten().any(|v| *v == exit_code);
        let hit = if codes.operator == "NotIn" { !listed } else { listed };
        if hit && rule.action.starts_with("Restart") {
            return true;
        }
    }
    match policy(spec, c) {
        "Never" => false,
        "OnFailure" => exit_code != 0,
        _ => true,
    }
}

/// Whether a running container counts as started: its startup probe has passed and its postStart hook is done.
pub fn is_started(c: &Container, run: &runtime::Container, memory: &Memory) -> bool {
    if run.state != State::Running || memory.hook_pending.as_deref() == Some(c.name.as_str()) {
        return false;
    }
    c.startup_probe.is_none() || memory.probes.get(&run.id).and_then(|v| v.started) == Some(true)
}

impl<'a> Planner<'a> {
    fn act(&mut self, key: OpKey, action: Action) {
        if !self.input.memory.in_flight.contains(&key) {
            self.plan.actions.push(action);
        }
    }

    fn wake(&mut self, at: Timestamp) {
        self.plan.wake_at = Some(self.plan.wake_at.map_or(at, |w| w.min(at)));
    }

    fn kill(&mut self, run: &runtime::Container, grace: i64, reason: KillReason) {
        let action = Action::KillContainer { id: run.id.clone(), name: run.name.clone(), grace, reason };
        self.act(OpKey::Kill(run.id.clone()), action);
    }

    fn pod_grace(&self) -> i64 {
        self.spec.termination_grace_period_seconds.unwrap_or(30).max(0)
    }

    /// Tries a step that may have to wait after a failure; true when it is done.
    fn step(&mut self, step: &Step, key: OpKey, action: Action) -> bool {
        match step.due(self.input.now) {
            Ok(()) => self.act(key, action),
            Err(None) => return true,
            Err(Some(at)) => self.wake(at),
        }
        false
    }

    fn run(&mut self) {
        let (memory, now) = (self.input.memory, self.input.now);
        if let (Some(limit), Some(start)) = (self.spec.active_deadline_seconds, memory.start_time) {
            let deadline = start + SignedDuration::from_secs(limit);
            if deadline <= now {
                self.plan.actions.push(Action::Deadline);
                return;
            }
            self.wake(deadline);
        }
        let volumes = self.step(&memory.volumes, OpKey::Volumes, Action::SetUpVolumes);
        if self.has_finished() {
            self.plan.actions.push(Action::Finish);
            return;
        }
        let ready = self.sandbox();
        let starts = self.containers();
        let sized = self.resize(ready);
        self.start(starts, ready && volumes && sized);
        self.collect();
    }

    /// Has granted sizes put in force; true when containers may be started in the pod's cgroup as it is.
    fn resize(&mut self, ready: bool) -> bool {
        let sizes = &self.input.memory.sizes;
        let cgroup = sizes.cgroup_differs();
        if !ready || (self.resizes.is_empty() && !cgroup) {
            return !cgroup;
        }
        // What does not fit into a smaller cgroup any more has to have ended.
        if !self.resize_restarts {
            let containers = std::mem::take(&mut self.resizes);
            self.step(&sizes.step, OpKey::Resize, Action::Resize { containers });
        }
        !cgroup
    }

    /// Makes sure of a sandbox; true when there is one that containers can be started in.
    fn sandbox(&mut self) -> bool {
        let observed = self.input.observed;
        let host_network = self.spec.host_network == Some(true);
        let newest = observed.sandbox();
        if let Some(s) = newest
            && s.ready
            && (host_network || !s.ips.is_empty())
        {
            return true;
        }
        // What still runs has lost its network or its sandbox: it ends before the next sandbox is made.
        let running: Vec<_> = observed.containers.iter().filter(|c| c.state == State::Running).collect();
        let grace = self.pod_grace();
        for c in &running {
            self.kill(c, grace, KillReason::SandboxChanged);
        }
        if let Some(s) = newest.filter(|s| s.ready) {
            let id = s.id.clone();
            self.act(OpKey::StopSandbox(id.clone()), Action::StopSandbox { id });
            return false;
        }
        // Sandboxes whose removal fails (the network's DEL may) are waited for: else each try would leave one more behind.
        let unused =
            |s: &&runtime::Sandbox| !s.ready && !observed.containers.iter().any(|c| c.sandbox_id == s.id);
        let left = observed.sandboxes.iter().filter(unused).count();
        if running.is_empty() && left < 2 {
            let attempt = newest.map_or(0, |s| s.attempt + 1);
            let step = &self.input.memory.sandbox;
            // `Done` speaks of a sandbox that has gone meanwhile.
            let step = if *step == Step::Done { &Step::Wanted } else { step };
            self.step(step, OpKey::Sandbox, Action::CreateSandbox { attempt });
        }
        false
    }

    /// Whether a regular container has been made in the present sandbox, so that init containers are over.
    fn initialized(&self) -> bool {
        let observed = self.input.observed;
        let Some(sandbox) = observed.ready_sandbox() else { return false };
        let of_sandbox =
            |name: &str| observed.containers.iter().any(|c| c.name == name && c.sandbox_id == sandbox.id);
        self.spec.containers.iter().any(|c| of_sandbox(&c.name))
    }

    /// Looks at every container in order; gives those that are to be started.
    fn containers(&mut self) -> Vec<(&'a Container, u32, Option<Timestamp>)> {
        let mut starts = Vec::new();
        let spec = self.spec;
        let memory = self.input.memory;
        let initialized = self.initialized();
        for c in spec.init_containers.iter().flatten() {
            let sidecar = is_sidecar(c);
            if initialized && !sidecar {
                continue;
            }
            let blocks = match self.need(c, true) {
                Need::Keep if sidecar => {
                    let run = self.input.observed.container(&c.name);
                    !run.is_some_and(|r| is_started(c, r, memory))
                }
                Need::Keep | Need::Wait => true,
                Need::Done { failed } => failed,
                Need::Start { attempt, ended } => {
                    starts.push((c, attempt, ended));
                    true
                }
            };
            if blocks && !initialized {
                return starts;
            }
        }
        for c in &spec.containers {
            if let Need::Start { attempt, ended } = self.need(c, false) {
                starts.push((c, attempt, ended));
            }
        }
        starts
    }

    /// Judges one container and stops it where that is due.
    fn need(&mut self, c: &Container, this_sandbox_only: bool) -> Need {
        let (observed, memory) = (self.input.observed, self.input.memory);
        let sandbox = observed.ready_sandbox().map(|s| s.id.as_str());
        let Some(run) = observed.container(&c.name) else {
            let attempt = memory.next_attempts.get(&c.name).copied().unwrap_or(0);
            return Need::Start { attempt, ended: None };
        };
        let here = Some(run.sandbox_id.as_str()) == sandbox;
        match run.state {
            State::Created => {
                // Left by an agent that ended between create and start; one of our own is in flight.
                if !memory.in_flight.contains(&OpKey::Start) {
                    let id = run.id.clone();
                    self.act(OpKey::Remove(id.clone()), Action::RemoveContainer { id });
                }
                Need::Wait
            }
            State::Unknown => {
                self.kill(run, self.pod_grace(), KillReason::Unknown);
                Need::Wait
            }
            State::Running if !here => Need::Wait,
            State::Running => self.judge_running(c, run),
            State::Exited if this_sandbox_only && !here => {
                Need::Start { attempt: run.attempt + 1, ended: None }
            }
            State::Exited => {
                let again = memory.restart_regardless.contains(&run.id);
                if again
                    || restarts(self.spec, c, run.exit_code)
                        && !(this_sandbox_only && !is_sidecar(c) && run.exit_code == 0)
                {
                    let ended = run.finished_at.or(run.created_at);
                    return Need::Start { attempt: run.attempt + 1, ended };
                }
                Need::Done { failed: run.exit_code != 0 }
            }
        }
    }

    fn judge_running(&mut self, c: &Container, run: &runtime::Container) -> Need {
        let view = self.input.memory.probes.get(&run.id).copied().unwrap_or_default();
        let probe_grace = |p: &Option<k8s_openapi::api::core::v1::Probe>| {
            p.as_ref().and_then(|p| p.termination_grace_period_seconds)
        };
        let pod_grace = self.pod_grace();
        if !run.hash.is_empty() && run.hash != hash(c) {
            self.kill(run, pod_grace, KillReason::Changed);
            return Need::Wait;
        }
        match self.input.memory.sizes.change(&run.id, c) {
            Change::None => {}
            Change::Update => self.resizes.push(c.name.clone()),
            Change::Restart => {
                self.resize_restarts = true;
                self.kill(run, pod_grace, KillReason::Resized);
                return Need::Wait;
            }
        }
        if c.startup_probe.is_some() && view.started != Some(true) && view.live == Some(false) {
            let grace = probe_grace(&c.startup_probe).unwrap_or(pod_grace);
            self.kill(run, grace, KillReason::StartupFailed);
            return Need::Wait;
        }
        if c.liveness_probe.is_some() && view.live == Some(false) {
            let grace = probe_grace(&c.liveness_probe).unwrap_or(pod_grace);
            self.kill(run, grace, KillReason::LivenessFailed);
            return Need::Wait;
        }
        Need::Keep
    }

    /// Fetches images early and starts the first container that is due.
    fn start(&mut self, starts: Vec<(&'a Container, u32, Option<Timestamp>)>, can_start: bool) {
        let ephemeral: Vec<Container> = self.ephemeral();
        let all = starts.into_iter().chain(ephemeral.iter().map(|c| (c, 0, None)));
        let mut started = false;
        for (c, attempt, ended) in all {
            let Some(image_ref) = self.due(c, ended) else { continue };
            if can_start && !started {
                started = true;
                let action = Action::StartContainer { container: c.name.clone(), attempt, image_ref, ended };
                self.act(OpKey::Start, action);
            }
        }
    }

    /// The image of a container that may start now; else notes what it waits for.
    fn due(&mut self, c: &Container, ended: Option<Timestamp>) -> Option<String> {
        let (memory, now) = (self.input.memory, self.input.now);
        if let Some(ended) = ended {
            let entry = memory.restarts.get(&c.name);
            let at = Restart::due(entry, ended, self.input.max_restart_delay);
            if at > now {
                let delay = at.duration_since(ended).as_secs();
                let reason = "CrashLoopBackOff".to_owned();
                let message = format!(
                    "back-off {} restarting failed container={} pod={}_{}({})",
                    go_seconds(delay),
                    c.name,
                    self.input.pod.metadata.name.as_deref().unwrap_or_default(),
                    self.input.pod.metadata.namespace.as_deref().unwrap_or_default(),
                    self.input.pod.metadata.uid.as_deref().unwrap_or_default()
                );
                self.plan.waiting.insert(c.name.clone(), Waiting { reason, message });
                self.wake(at);
                return None;
            }
        }
        if let Some(f) = memory.start_failures.get(&c.name) {
            self.plan.waiting.insert(c.name.clone(), f.why.clone());
            if f.retry_at > now {
                self.wake(f.retry_at);
                return None;
            }
        }
        match memory.images.get(&c.name) {
            Some(ImageState::Present(r)) => return Some(r.clone()),
            Some(ImageState::Failed { why, retry_at, .. }) => {
                self.plan.waiting.insert(c.name.clone(), why.clone());
                if *retry_at > now {
                    self.wake(*retry_at);
                    return None;
                }
            }
            None => {}
        }
        let container = c.name.clone();
        self.act(OpKey::Image(container.clone()), Action::EnsureImage { container });
        None
    }

    /// Ephemeral containers start once and never again, beside a running pod.
    fn ephemeral(&self) -> Vec<Container> {
        let all = self.spec.ephemeral_containers.iter().flatten();
        all.filter(|e| self.input.observed.container(&e.name).is_none()).map(ephemeral_as_container).collect()
    }

    /// Whether nothing will run any more by the restart policy.
    fn has_finished(&self) -> bool {
        let (spec, observed, memory) = (self.spec, self.input.observed, self.input.memory);
        if memory.in_flight.contains(&OpKey::Start) {
            return false;
        }
        let ended = |c: &Container| {
            let run = observed.container(&c.name)?;
            let over = run.state == State::Exited
                && !memory.restart_regardless.contains(&run.id)
                && !restarts(spec, c, run.exit_code);
            over.then_some(run.exit_code)
        };
        let init_failed = spec
            .init_containers
            .iter()
            .flatten()
            .any(|c| !is_sidecar(c) && ended(c).is_some_and(|code| code != 0));
        let regular_running = observed.running().any(|r| spec.containers.iter().any(|c| c.name == r.name));
        (init_failed && !regular_running && !self.initialized())
            || spec.containers.iter().all(|c| ended(c).is_some())
    }

    /// Dead containers beyond the last two of a name, and sandboxes without containers, are taken away.
    fn collect(&mut self) {
        let observed = self.input.observed;
        let mut seen: BTreeMap<&str, u32> = BTreeMap::new();
        let mut doomed = Vec::new();
        for c in &observed.containers {
            let n = seen.entry(c.name.as_str()).or_default();
            *n += 1;
            if *n > 2 && c.state == State::Exited {
                doomed.push(c.id.clone());
            }
        }
        for id in doomed {
            self.act(OpKey::Remove(id.clone()), Action::RemoveContainer { id });
        }
        for s in observed.sandboxes.iter().skip(1).filter(|s| !s.ready) {
            if !observed.containers.iter().any(|c| c.sandbox_id == s.id) {
                let id = s.id.clone();
                self.act(OpKey::Remove(id.clone()), Action::RemoveSandbox { id });
            }
        }
        for s in observed.sandboxes.iter().skip(1).filter(|s| s.ready) {
            let id = s.id.clone();
            self.act(OpKey::StopSandbox(id.clone()), Action::StopSandbox { id });
        }
    }

    fn end(&mut self) {
        let (observed, memory, now) = (self.input.observed, self.input.memory, self.input.now);
        // A sandbox or container that is being made has to be seen before it can be stopped.
        let making = [OpKey::Sandbox, OpKey::Start].iter().any(|k| memory.in_flight.contains(k));
        let (since, grace) = match &memory.terminating {
            Some(t) => (t.since, t.grace),
            None => (now, self.pod_grace()),
        };
        let stops = termination::next_stops(self.spec, observed, since, grace, now);
        let all_stopped = stops.none_left;
        for (run, grace) in stops.now {
            self.kill(run, grace, KillReason::PodEnds);
        }
        if making || !all_stopped {
            return;
        }
        let mut sandboxes = observed.sandboxes.iter().filter(|s| s.ready).peekable();
        if sandboxes.peek().is_some() {
            for s in sandboxes {
                let id = s.id.clone();
                self.act(OpKey::StopSandbox(id.clone()), Action::StopSandbox { id });
            }
            return;
        }
        if !memory.terminated && !memory.in_flight.contains(&OpKey::Volumes) {
            self.act(OpKey::TearDown, Action::TearDown);
        }
    }
}

/// Go's rendering of whole seconds: `10s`, `1m20s`, `5m0s`.
fn go_seconds(secs: i64) -> String {
    if secs < 60 { format!("{secs}s") } else { format!("{}m{}s", secs / 60, secs % 60) }
}

#[cfg(test)]
mod tests;
