//! Statuses by example.

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::*;
use crate::pods::state::{ProbeView, Terminating, Waiting};
use crate::runtime::{Container as Run, Sandbox};

fn t(s: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + s).unwrap()
}

fn run(name: &str, state: State, code: i32, attempt: u32) -> Run {
    Run {
        id: format!("{name}{attempt}"),
        sandbox_id: "s".into(),
        name: name.into(),
        attempt,
        state,
        created_at: Some(t(i64::from(attempt))),
        started_at: Some(t(i64::from(attempt))),
        finished_at: (state == State::Exited).then(|| t(50)),
        exit_code: code,
        reason: String::new(),
        message: "words".into(),
        image: "img".into(),
        image_id: "sha256:1".into(),
        log_path: String::new(),
        hash: String::new(),
        termination_log: None,
        log_fallback: false,
        user: None,
    }
}

fn generate(spec: Value, runs: Vec<Run>, memory: Memory, plan: Plan, previous: PodStatus) -> PodStatus {
    let meta = json!({"name": "p", "namespace": "n", "uid": "u", "generation": 3});
    let pod: Pod = serde_json::from_value(json!({"metadata": meta, "spec": spec})).unwrap();
    let sandbox = Sandbox {
        id: "s".into(),
        attempt: 0,
        ready: !memory.terminated,
        created_at: Some(t(0)),
        ips: vec!["10.0.0.1".parse().unwrap()],
    };
    let observed = ObservedPod { sandboxes: vec![sandbox], containers: runs, ..Default::default() };
    status(&Input {
        pod: &pod,
        observed: &observed,
        memory: &memory,
        plan: &plan,
        previous: &previous,
        host_ips: &["192.0.2.1".parse().unwrap()],
        runtime: "orlop",
        now: t(100),
    })
}

fn simple(runs: Vec<Run>, memory: Memory) -> PodStatus {
    generate(json!({"containers": [{"name": "a"}]}), runs, memory, Plan::default(), PodStatus::default())
}

fn condition<'a>(s: &'a PodStatus, kind: &str) -> &'a PodCondition {
    s.conditions.as_ref().unwrap().iter().find(|c| c.type_ == kind).unwrap()
}

fn first(s: &PodStatus) -> &ContainerStatus {
    &s.container_statuses.as_ref().unwrap()[0]
}

#[test]
fn from_creating_to_ready() {
    let s = simple(vec![], Memory::default());
    assert_eq!(s.phase.as_deref(), Some("Pending"));
    assert_eq!(
        first(&s).state.as_ref().unwrap().waiting.as_ref().unwrap().reason.as_deref(),
        Some("ContainerCreating")
    );
    assert_eq!(condition(&s, "Ready").message.as_deref(), Some("containers with unready status: [a]"));
    let s = simple(vec![run("a", State::Running, 0, 0)], Memory::default());
    assert_eq!(s.phase.as_deref(), Some("Running"));
    assert_eq!(condition(&s, "Ready").status, "True");
    assert_eq!((s.pod_ip.as_deref(), s.host_ip.as_deref()), (Some("10.0.0.1"), Some("192.0.2.1")));
    assert_eq!((s.observed_generation, s.qos_class.as_deref()), (Some(3), Some("BestEffort")));
    assert_eq!(first(&s).container_id.as_deref(), Some("orlop://a0"));
}

#[test]
fn readiness_follows_probes_and_gates() {
    let spec = json!({"containers": [{"name": "a", "readinessProbe": {}, "startupProbe": {}}], "readinessGates": [{"conditionType": "g"}]});
    let of = |started, ready| {
        let mut m = Memory::default();
        m.probes.insert("a0".into(), ProbeView { started, ready, live: None });
        generate(spec.clone(), vec![run("a", State::Running, 0, 0)], m, Plan::default(), PodStatus::default())
    };
    assert_eq!((first(&of(None, None)).started, first(&of(None, None)).ready), (Some(false), false));
    assert_eq!(
        (first(&of(Some(true), None)).started, first(&of(Some(true), None)).ready),
        (Some(true), false)
    );
    let s = of(Some(true), Some(true));
    assert!(first(&s).ready);
    assert_eq!(condition(&s, "ContainersReady").status, "True");
    assert_eq!(condition(&s, "Ready").reason.as_deref(), Some("ReadinessGatesNotReady"));
}

#[test]
fn a_crash_loop_shows_the_wait_and_the_last_end() {
    let mut plan = Plan::default();
    plan.waiting.insert("a".into(), Waiting { reason: "CrashLoopBackOff".into(), message: "m".into() });
    let runs = vec![run("a", State::Exited, 3, 2), run("a", State::Exited, 1, 1)];
    let s =
        generate(json!({"containers": [{"name": "a"}]}), runs, Memory::default(), plan, PodStatus::default());
    let c = first(&s);
    assert_eq!(
        c.state.as_ref().unwrap().waiting.as_ref().unwrap().reason.as_deref(),
        Some("CrashLoopBackOff")
    );
    let last = c.last_state.as_ref().unwrap().terminated.as_ref().unwrap();
    assert_eq!(
        (last.exit_code, last.reason.as_deref(), last.message.as_deref()),
        (3, Some("Error"), Some("words"))
    );
    assert_eq!((c.restart_count, s.phase.as_deref()), (2, Some("Running")));
}

#[test]
fn phases_at_the_end() {
    let ended = |code, failure: bool| {
        let failure = failure.then(|| ("DeadlineExceeded".to_owned(), "m".to_owned()));
        let memory = Memory {
            finished: true,
            terminated: true,
            terminating: Some(Terminating { since: t(0), grace: 0, failure }),
            ..Default::default()
        };
        simple(vec![run("a", State::Exited, code, 0)], memory)
    };
    let s = ended(0, false);
    assert_eq!(s.phase.as_deref(), Some("Succeeded"));
    assert_eq!(condition(&s, "Ready").reason.as_deref(), Some("PodCompleted"));
    assert_eq!(ended(1, false).phase.as_deref(), Some("Failed"));
    let s = ended(0, true);
    assert_eq!((s.phase.as_deref(), s.reason.as_deref()), (Some("Failed"), Some("DeadlineExceeded")));
    let refused =
        simple(vec![], Memory { rejected: Some(("OutOfcpu".into(), "m".into())), ..Default::default() });
    assert_eq!((refused.phase.as_deref(), refused.reason.as_deref()), (Some("Failed"), Some("OutOfcpu")));
}

#[test]
fn times_of_transitions_stay_while_nothing_changes() {
    let old = simple(vec![run("a", State::Running, 0, 0)], Memory::default());
    let before = condition(&old, "Ready").last_transition_time.clone();
    let mut previous = old.clone();
    previous.conditions.as_mut().unwrap().iter_mut().for_each(|c| c.last_transition_time = Some(time(t(7))));
    let new = generate(
        json!({"containers": [{"name": "a"}]}),
        vec![run("a", State::Running, 0, 0)],
        Memory::default(),
        Plan::default(),
        previous,
    );
    assert_ne!(condition(&new, "Ready").last_transition_time, before);
    assert_eq!(condition(&new, "Ready").last_transition_time, Some(time(t(7))));
}

#[test]
fn what_the_runtime_has_forgotten_is_kept() {
    let ended = simple(vec![run("a", State::Exited, 5, 4)], Memory::default());
    let spec = json!({"restartPolicy": "Never", "containers": [{"name": "a"}]});
    let kept = generate(spec.clone(), vec![], Memory::default(), Plan::default(), ended);
    let state = first(&kept).state.as_ref().unwrap().terminated.as_ref().unwrap();
    assert_eq!((state.exit_code, first(&kept).restart_count), (5, 4));
    let ran = simple(vec![run("a", State::Running, 0, 1)], Memory::default());
    let lost = generate(spec, vec![], Memory::default(), Plan::default(), ran);
    let state = first(&lost).state.as_ref().unwrap().terminated.as_ref().unwrap();
    assert_eq!(state.reason.as_deref(), Some("ContainerStatusUnknown"));
}

#[test]
fn init_containers_hold_the_phase() {
    let spec = json!({"initContainers": [{"name": "i"}], "containers": [{"name": "a"}]});
    let g = |runs| generate(spec.clone(), runs, Memory::default(), Plan::default(), PodStatus::default());
    let s = g(vec![run("i", State::Running, 0, 0)]);
    assert_eq!(s.phase.as_deref(), Some("Pending"));
    assert_eq!(
        condition(&s, "Initialized").message.as_deref(),
        Some("containers with incomplete status: [i]")
    );
    assert_eq!(
        first(&s).state.as_ref().unwrap().waiting.as_ref().unwrap().reason.as_deref(),
        Some("PodInitializing")
    );
    let s = g(vec![run("a", State::Running, 0, 1), run("i", State::Exited, 0, 0)]);
    assert_eq!((s.phase.as_deref(), condition(&s, "Ready").status.as_str()), (Some("Running"), "True"));
}
