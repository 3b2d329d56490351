//! The status of a pod as a pure function of its spec, what is observed and what the worker remembers.

use std::net::IpAddr;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
    ContainerStatus, ContainerUser, HostIP, LinuxContainerUser, Pod, PodCondition, PodIP, PodSpec, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use orlop_api::pod::{is_sidecar, qos_class};

use crate::pods::plan::{Plan, is_started};
use crate::pods::state::Memory;
use crate::pods::{ContainerKind, ephemeral_as_container};
use crate::runtime::{self, ObservedPod, State};

/// Everything a status depends on.
pub struct Input<'a> {
    pub pod: &'a Pod,
    pub observed: &'a ObservedPod,
    pub memory: &'a Memory,
    pub plan: &'a Plan,
    /// The status before, for times of transitions and what the runtime has forgotten.
    pub previous: &'a PodStatus,
    pub host_ips: &'a [IpAddr],
    pub runtime: &'a str,
    pub now: Timestamp,
}

/// The API keeps whole seconds.
pub fn time(t: Timestamp) -> Time {
    Time(Timestamp::from_second(t.as_second()).unwrap_or(t))
}

/// Generates the status.
pub fn status(input: &Input<'_>) -> PodStatus {
    let empty = PodSpec::default();
    let spec = input.pod.spec.as_ref().unwrap_or(&empty);
    let memory = input.memory;
    let g = Generator { input, spec };
    let init: Vec<Container> = spec.init_containers.clone().unwrap_or_default();
    let ephemeral: Vec<Container> =
        spec.ephemeral_containers.iter().flatten().map(ephemeral_as_container).collect();
    let old = input.previous;
    let init_status = g.all(&init, ContainerKind::Init, old.init_container_statuses.as_deref());
    let initialized = g.initialized(&init_status);
    let regular = g.all(&spec.containers, ContainerKind::Regular, old.container_statuses.as_deref());
    let ephemeral = g.all(&ephemeral, ContainerKind::Ephemeral, old.ephemeral_container_statuses.as_deref());
    let phase = g.phase(&init_status, &regular, initialized);
    let failure =
        memory.rejected.clone().or_else(|| memory.terminating.as_ref().and_then(|t| t.failure.clone()));
    let (reason, message) = failure.unzip();
    let conditions = g.conditions(&phase, &init_status, &regular, initialized);
    let host_network = spec.host_network == Some(true);
    let ips: Vec<IpAddr> = match input.observed.sandbox() {
        Some(_) if host_network => input.host_ips.to_vec(),
        Some(s) => s.ips.clone(),
        None => Vec::new(),
    };
    let list = |v: Vec<ContainerStatus>| (!v.is_empty()).then_some(v);
    PodStatus {
        phase: Some(phase),
        conditions: Some(conditions),
        reason,
        message,
        host_ip: input.host_ips.first().map(ToString::to_string),
        host_ips: (!input.host_ips.is_empty())
            .then(|| input.host_ips.iter().map(|ip| HostIP { ip: ip.to_string() }).collect()),
        pod_ip: ips.first().map(ToString::to_string),
        pod_ips: (!ips.is_empty()).then(|| ips.iter().map(|ip| PodIP { ip: ip.to_string() }).collect()),
        start_time: memory.start_time.map(time),
        qos_class: Some(qos_class(spec).as_str().to_owned()),
        init_container_statuses: list(init_status),
        container_statuses: list(regular),
        ephemeral_container_statuses: list(ephemeral),
        observed_generation: input.pod.metadata.generation,
        ..Default::default()
    }
}

struct Generator<'a> {
    input: &'a Input<'a>,
    spec: &'a PodSpec,
}

fn terminated(runtime: &str, c: &runtime::Container) -> ContainerState {
    let reason = match (c.reason.as_str(), c.exit_code) {
        ("", 0) => "Completed",
        ("", _) => "Error",
        (r, _) => r,
    };
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            container_id: Some(format!("{runtime}://{}", c.id)),
            exit_code: c.exit_code,
            finished_at: c.finished_at.map(time),
            started_at: c.started_at.map(time),
            reason: Some(reason.to_owned()),
            message: (!c.message.is_empty()).then(|| c.message.clone()),
            signal: None,
        }),
        ..Default::default()
    }
}

fn waiting(reason: &str, message: &str) -> ContainerState {
    ContainerState {
        waiting: Some(ContainerStateWaiting {
            reason: Some(reason.to_owned()),
            message: (!message.is_empty()).then(|| message.to_owned()),
        }),
        ..Default::default()
    }
}

impl Generator<'_> {
    fn all(
        &self,
        list: &[Container],
        kind: ContainerKind,
        old: Option<&[ContainerStatus]>,
    ) -> Vec<ContainerStatus> {
        let old_of = |name: &str| old.into_iter().flatten().find(|s| s.name == name);
        list.iter().map(|c| self.container(c, kind, old_of(&c.name))).collect()
    }

    fn default_waiting(&self, kind: ContainerKind) -> ContainerState {
        let has_init = self.spec.init_containers.as_ref().is_some_and(|i| !i.is_empty());
        let reason = if has_init { "PodInitializing" } else { "ContainerCreating" };
        match kind {
            ContainerKind::Ephemeral => waiting("ContainerCreating", ""),
            _ => waiting(reason, ""),
        }
    }

    fn container(
        &self,
        c: &Container,
        kind: ContainerKind,
        old: Option<&ContainerStatus>,
    ) -> ContainerStatus {
        let Input { observed, memory, plan, runtime, .. } = self.input;
        let waits = plan.waiting.get(&c.name).map(|w| waiting(&w.reason, &w.message));
        let Some(run) = observed.container(&c.name) else { return self.without_run(c, kind, old, waits) };
        let id = format!("{runtime}://{}", run.id);
        let started = is_started(c, run, memory);
        let view = memory.probes.get(&run.id).copied().unwrap_or_default();
        let sidecar = kind == ContainerKind::Init && is_sidecar(c);
        let (state, ready) = match run.state {
            State::Running => {
                let ready = match kind {
                    ContainerKind::Ephemeral => false,
                    ContainerKind::Init if !sidecar => false,
                    _ => started && (c.readiness_probe.is_none() || view.ready == Some(true)),
                };
                let at = run.started_at.map(time);
                let running = Some(ContainerStateRunning { started_at: at });
                (ContainerState { running, ..Default::default() }, ready)
            }
            State::Exited => {
                let done = kind == ContainerKind::Init && !sidecar && run.exit_code == 0;
                (waits.unwrap_or_else(|| terminated(runtime, run)), done)
            }
            State::Created => (self.default_waiting(kind), false),
            State::Unknown => (waiting("ContainerStatusUnknown", ""), false),
        };
        // The run before: from the runtime, from this run when its state shows a wait, or from what was reported.
        let last_state = if run.state == State::Exited && state.waiting.is_some() {
            Some(terminated(runtime, run))
        } else if let Some(p) = observed.previous_container(&c.name) {
            Some(terminated(runtime, p))
        } else {
            old.and_then(|o| {
                if o.container_id.as_deref() == Some(&id) {
                    return o.last_state.clone();
                }
                let ended = o.state.as_ref().filter(|s| s.terminated.is_some()).cloned();
                ended.or_else(|| o.last_state.clone())
            })
        };
        ContainerStatus {
            name: c.name.clone(),
            container_id: Some(id),
            image: if run.image.is_empty() { c.image.clone().unwrap_or_default() } else { run.image.clone() },
            image_id: run.image_id.clone(),
            restart_count: run.attempt as i32,
            ready,
            started: Some(started),
            state: Some(state),
            last_state: last_state.or_else(|| Some(ContainerState::default())),
            user: run.user.as_ref().map(|(uid, gid, groups)| ContainerUser {
                linux: Some(LinuxContainerUser {
                    uid: *uid,
                    gid: *gid,
                    supplemental_groups: (!groups.is_empty()).then(|| groups.clone()),
                }),
            }),
            resources: memory
                .sizes
                .of_run(&run.id, c)
                .cloned()
                .filter(|r| run.state == State::Running && (r.limits.is_some() || r.requests.is_some())),
            allocated_resources: c
                .resources
                .as_ref()
                .and_then(|r| r.requests.clone())
                .filter(|_| run.state == State::Running),
            ..Default::default()
        }
    }

    /// The runtime knows no run of this container.
    fn without_run(
        &self,
        c: &Container,
        kind: ContainerKind,
        old: Option<&ContainerStatus>,
        waits: Option<ContainerState>,
    ) -> ContainerStatus {
        let fresh = ContainerStatus {
            name: c.name.clone(),
            image: c.image.clone().unwrap_or_default(),
            started: Some(false),
            last_state: Some(ContainerState::default()),
            ..Default::default()
        };
        let Some(old) = old.filter(|o| o.container_id.is_some()) else {
            let ended = self.input.memory.terminated;
            let state = waits.unwrap_or_else(|| self.default_waiting(kind));
            return ContainerStatus {
                state: Some(if ended { self.default_waiting(kind) } else { state }),
                ..fresh
            };
        };
        let old_state = old.state.clone().unwrap_or_default();
        let mut kept = ContainerStatus { started: Some(false), ..old.clone() };
        if old_state.terminated.is_some() {
            let init_done = kind == ContainerKind::Init && !is_sidecar(c) && old.ready;
            kept.ready = init_done;
            return kept;
        }
        kept.ready = false;
        if old_state.running.is_some() {
            // It ran and has gone without a trace (a reboot, a wiped runtime).
            kept.state = Some(ContainerState {
                terminated: Some(ContainerStateTerminated {
                    container_id: old.container_id.clone(),
                    exit_code: 137,
                    reason: Some("ContainerStatusUnknown".into()),
                    message: Some("The container could not be located when the pod was terminated".into()),
                    ..Default::default()
                }),
                ..Default::default()
            });
        } else if let Some(w) = waits {
            kept.state = Some(w);
        }
        kept
    }

    fn initialized(&self, statuses: &[ContainerStatus]) -> bool {
        let all = self.spec.init_containers.iter().flatten().zip(statuses);
        let done = all.into_iter().all(|(c, s)| match is_sidecar(c) {
            true => s.started == Some(true),
            false => s.ready,
        });
        // Once a regular container has run in this sandbox, init containers may be collected.
        let sandbox = self.input.observed.ready_sandbox().map(|s| s.id.as_str());
        let observed = &self.input.observed.containers;
        done || observed.iter().any(|r| {
            Some(r.sandbox_id.as_str()) == sandbox && self.spec.containers.iter().any(|c| c.name == r.name)
        })
    }

    fn phase(&self, init: &[ContainerStatus], regular: &[ContainerStatus], initialized: bool) -> String {
        let memory = self.input.memory;
        if memory.rejected.is_some() {
            return "Failed".into();
        }
        let previous = self.input.previous.phase.as_deref();
        if let Some(p @ ("Succeeded" | "Failed")) = previous {
            return p.to_owned();
        }
        let ended =
            |s: &ContainerStatus| s.state.as_ref().and_then(|s| s.terminated.as_ref()).map(|t| t.exit_code);
        if memory.terminated {
            let failed = memory.terminating.as_ref().is_some_and(|t| t.failure.is_some());
            let ok = !failed && regular.iter().all(|s| ended(s) == Some(0));
            let never_ran = regular.iter().all(|s| s.container_id.is_none());
            return match (never_ran && !failed && !memory.finished, ok) {
                (true, _) => "Pending".into(),
                (_, true) => "Succeeded".into(),
                _ => "Failed".into(),
            };
        }
        // A pod that is about to end keeps its phase until its last container has stopped.
        if memory.is_ending() && previous == Some("Running") {
            return "Running".into();
        }
        let init_failed = self
            .spec
            .init_containers
            .iter()
            .flatten()
            .zip(init)
            .any(|(c, s)| !is_sidecar(c) && ended(s).is_some_and(|code| code != 0));
        if !initialized {
            let gone = init_failed && memory.terminated;
            return if gone { "Failed".into() } else { "Pending".into() };
        }
        let fresh = |s: &ContainerStatus| {
            let state = s.state.as_ref();
            state.is_some_and(|s| s.waiting.is_some())
                && s.last_state.as_ref().is_none_or(|l| l.terminated.is_none())
        };
        if regular.iter().any(fresh) { "Pending".into() } else { "Running".into() }
    }

    fn condition(
        &self,
        kind: &str,
        status: bool,
        reason: Option<&str>,
        message: Option<String>,
    ) -> PodCondition {
        let text = if status { "True" } else { "False" };
        let old = self.input.previous.conditions.iter().flatten().find(|c| c.type_ == kind);
        let since = old.filter(|c| c.status == text).and_then(|c| c.last_transition_time.clone());
        PodCondition {
            type_: kind.to_owned(),
            status: text.to_owned(),
            reason: reason.map(str::to_owned),
            message,
            last_transition_time: Some(since.unwrap_or_else(|| time(self.input.now))),
            last_probe_time: None,
            observed_generation: self.input.pod.metadata.generation,
        }
    }

    fn conditions(
        &self,
        phase: &str,
        init: &[ContainerStatus],
        regular: &[ContainerStatus],
        initialized: bool,
    ) -> Vec<PodCondition> {
        let sandbox = self.input.observed.ready_sandbox();
        let host_network = self.spec.host_network == Some(true);
        let network = sandbox.is_some_and(|s| host_network || !s.ips.is_empty());
        let finished = match phase {
            "Succeeded" => Some("PodCompleted"),
            "Failed" => Some("PodFailed"),
            _ => None,
        };
        let names = |list: Vec<&str>| format!("[{}]", list.join(" "));
        let incomplete: Vec<&str> = init.iter().filter(|s| !s.ready).map(|s| s.name.as_str()).collect();
        let init_condition = if initialized || phase == "Succeeded" {
            self.condition("Initialized", true, finished.filter(|_| phase == "Succeeded"), None)
        } else {
            let message = format!("containers with incomplete status: {}", names(incomplete));
            self.condition("Initialized", false, Some("ContainersNotInitialized"), Some(message))
        };
        let sidecars = self.spec.init_containers.iter().flatten().zip(init).filter(|(c, _)| is_sidecar(c));
        let watched = regular.iter().chain(sidecars.map(|(_, s)| s));
        let unready: Vec<&str> = watched.filter(|s| !s.ready).map(|s| s.name.as_str()).collect();
        let (ready, reason, message) = match finished {
            Some(r) => (false, Some(r), None),
            None if unready.is_empty() && initialized => (true, None, None),
            None => {
                let message = format!("containers with unready status: {}", names(unready));
                (false, Some("ContainersNotReady"), Some(message))
            }
        };
        let containers_ready = self.condition("ContainersReady", ready, reason, message.clone());
        let gates: Vec<String> =
            self.spec.readiness_gates.iter().flatten().filter_map(|g| self.gate(&g.condition_type)).collect();
        let ready_condition = if ready && !gates.is_empty() {
            self.condition("Ready", false, Some("ReadinessGatesNotReady"), Some(gates.join("; ")))
        } else {
            self.condition("Ready", ready, reason, message)
        };
        let mut all = vec![
            self.condition("PodReadyToStartContainers", network, None, None),
            init_condition,
            ready_condition,
            containers_ready,
            self.condition("PodScheduled", true, None, None),
        ];
        if finished.is_none() {
            all.extend(self.resize_conditions());
        }
        all
    }

    /// Only there while a resize is not over.
    fn resize_conditions(&self) -> Vec<PodCondition> {
        let sizes = &self.input.memory.sizes;
        let pending = sizes.pending.as_ref().map(|p| {
            let c = self.condition("PodResizePending", true, Some(p.reason), Some(p.message.clone()));
            PodCondition { observed_generation: p.generation, ..c }
        });
        let in_progress = sizes.in_progress.map(|generation| {
            let reason = sizes.failure.as_ref().map(|_| "Error");
            let c = self.condition("PodResizeInProgress", true, reason, sizes.failure.clone());
            PodCondition { observed_generation: generation, ..c }
        });
        pending.into_iter().chain(in_progress).collect()
    }

    /// What keeps a readiness gate shut; others set its condition through the API.
    fn gate(&self, kind: &str) -> Option<String> {
        let conditions = self.input.pod.status.as_ref().and_then(|s| s.conditions.as_ref());
        match conditions.into_iter().flatten().find(|c| c.type_ == kind) {
            Some(c) if c.status == "True" => None,
            Some(c) => {
                Some(format!("the status of pod readiness gate {kind:?} is not \"True\", but {}", c.status))
            }
            None => Some(format!("corresponding condition of pod readiness gate {kind:?} does not exist.")),
        }
    }
}

#[cfg(test)]
mod tests;
