//! The planner by tables: a pod, what runs, what is remembered, and the steps that follow.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::*;
use crate::pods::state::{ProbeView, StartFailure, Terminating};
use crate::runtime::{Container as Run, Sandbox};

fn t(s: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + s).unwrap()
}

fn pod(spec: Value) -> Pod {
    let meta = json!({"name": "p", "namespace": "n", "uid": "u"});
    serde_json::from_value(json!({"metadata": meta, "spec": spec})).unwrap()
}

fn one() -> Pod {
    pod(json!({"containers": [{"name": "a", "image": "i"}]}))
}

fn sandbox(id: &str, ready: bool) -> Sandbox {
    Sandbox {
        id: id.into(),
        attempt: 0,
        ready,
        created_at: Some(t(0)),
        ips: vec!["10.0.0.1".parse().unwrap()],
    }
}

fn run(name: &str, state: State, code: i32, at: i64) -> Run {
    Run {
        id: format!("{name}-{at}"),
        sandbox_id: "s".into(),
        name: name.into(),
        attempt: 0,
        state,
        created_at: Some(t(at)),
        started_at: Some(t(at)),
        finished_at: (state == State::Exited).then(|| t(at + 1)),
        exit_code: code,
        reason: String::new(),
        message: String::new(),
        image: "i".into(),
        image_id: "i".into(),
        log_path: String::new(),
        hash: String::new(),
        termination_log: None,
        log_fallback: false,
        user: None,
    }
}

fn seen(sandboxes: Vec<Sandbox>, mut containers: Vec<Run>) -> ObservedPod {
    containers.sort_by_key(|c| std::cmp::Reverse(c.created_at));
    ObservedPod { uid: "u".into(), name: "p".into(), namespace: "n".into(), sandboxes, containers }
}

fn up(containers: Vec<Run>) -> ObservedPod {
    seen(vec![sandbox("s", true)], containers)
}

fn ready() -> Memory {
    let images =
        ["a", "b", "i", "j", "side", "last"].map(|n| (n.to_owned(), ImageState::Present("img".into())));
    Memory { volumes: Step::Done, sandbox: Step::Done, images: images.into(), ..Default::default() }
}

fn plan_at(pod: &Pod, observed: &ObservedPod, memory: &Memory, now: i64) -> Plan {
    let max_restart_delay = Duration::from_secs(300);
    plan(&Input { pod, observed, memory, now: t(now), max_restart_delay })
}

/// The steps in short: `start a#0`, `kill a-1 30 PodEnds`.
fn steps(p: &Plan) -> Vec<String> {
    let short = |a: &Action| match a {
        Action::StartContainer { container, attempt, .. } => format!("start {container}#{attempt}"),
        Action::KillContainer { id, grace, reason, .. } => format!("kill {id} {grace} {reason:?}"),
        Action::EnsureImage { container } => format!("image {container}"),
        Action::CreateSandbox { attempt } => format!("sandbox#{attempt}"),
        Action::StopSandbox { id } => format!("stop {id}"),
        Action::RemoveSandbox { id } | Action::RemoveContainer { id } => format!("remove {id}"),
        other => format!("{other:?}"),
    };
    p.actions.iter().map(short).collect()
}

fn now_steps(pod: &Pod, observed: &ObservedPod, memory: &Memory) -> Vec<String> {
    steps(&plan_at(pod, observed, memory, 100))
}

#[test]
fn a_new_pod_prepares_everything_at_once() {
    let p = one();
    let m = Memory::default();
    assert_eq!(now_steps(&p, &seen(vec![], vec![]), &m), ["SetUpVolumes", "sandbox#0", "image a"]);
    let busy = Memory { in_flight: [OpKey::Volumes, OpKey::Sandbox, OpKey::Image("a".into())].into(), ..m };
    assert!(now_steps(&p, &seen(vec![], vec![]), &busy).is_empty());
}

#[test]
fn a_container_starts_when_sandbox_volumes_and_image_are_there() {
    let p = one();
    assert_eq!(now_steps(&p, &up(vec![]), &ready()), ["start a#0"]);
    let no_volumes = Memory { volumes: Step::Wanted, in_flight: [OpKey::Volumes].into(), ..ready() };
    assert!(now_steps(&p, &up(vec![]), &no_volumes).is_empty());
    let no_image = Memory { images: Default::default(), ..ready() };
    assert_eq!(now_steps(&p, &up(vec![]), &no_image), ["image a"]);
    assert!(now_steps(&p, &up(vec![run("a", State::Running, 0, 1)]), &ready()).is_empty());
}

#[test]
fn containers_start_in_order_one_at_a_time() {
    let p = pod(json!({"containers": [{"name": "a"}, {"name": "b"}]}));
    assert_eq!(now_steps(&p, &up(vec![]), &ready()), ["start a#0"]);
    assert_eq!(now_steps(&p, &up(vec![run("a", State::Running, 0, 1)]), &ready()), ["start b#0"]);
    let busy = Memory { in_flight: [OpKey::Start].into(), ..ready() };
    assert!(now_steps(&p, &up(vec![]), &busy).is_empty());
}

#[test]
fn init_containers_run_in_order_and_sidecars_stay() {
    let p = pod(
        json!({"initContainers": [{"name": "i"}, {"name": "side", "restartPolicy": "Always", "startupProbe": {}}, {"name": "j"}],
        "containers": [{"name": "a"}]}),
    );
    let m = ready();
    let i = run("i", State::Exited, 0, 1);
    let side = run("side", State::Running, 0, 2);
    let j = run("j", State::Exited, 0, 3);
    assert_eq!(now_steps(&p, &up(vec![]), &m), ["start i#0"]);
    assert!(now_steps(&p, &up(vec![run("i", State::Running, 0, 1)]), &m).is_empty());
    assert_eq!(now_steps(&p, &up(vec![i.clone()]), &m), ["start side#0"]);
    // The startup probe has not passed.
    assert!(now_steps(&p, &up(vec![i.clone(), side.clone()]), &m).is_empty());
    let mut started = ready();
    started.probes.insert(side.id.clone(), ProbeView { started: Some(true), ..Default::default() });
    assert_eq!(now_steps(&p, &up(vec![i.clone(), side.clone()]), &started), ["start j#0"]);
    assert_eq!(now_steps(&p, &up(vec![i.clone(), side.clone(), j.clone()]), &started), ["start a#0"]);
    // Init containers may be collected once the pod runs; a sidecar that ends comes back beside the others.
    let a = run("a", State::Running, 0, 4);
    assert!(now_steps(&p, &up(vec![side, a.clone()]), &started).is_empty());
    let dead = run("side", State::Exited, 0, 2);
    assert_eq!(now_steps(&p, &up(vec![dead, a]), &started), ["start side#1"]);
}

#[test]
fn a_failed_init_container_is_tried_again_or_ends_the_pod() {
    let failed = || up(vec![run("i", State::Exited, 1, 1)]);
    let spec = |policy: &str| {
        pod(
            json!({"restartPolicy": policy, "initContainers": [{"name": "i"}], "containers": [{"name": "a"}]}),
        )
    };
    assert_eq!(now_steps(&spec("Always"), &failed(), &ready()), ["start i#1"]);
    assert_eq!(now_steps(&spec("Never"), &failed(), &ready()), ["Finish"]);
}

#[test]
fn restart_policies() {
    let with = |policy: &str| pod(json!({"restartPolicy": policy, "containers": [{"name": "a"}]}));
    for (policy, code, wanted) in [
        ("Always", 0, "start a#1"),
        ("Always", 1, "start a#1"),
        ("OnFailure", 1, "start a#1"),
        ("OnFailure", 0, "Finish"),
        ("Never", 0, "Finish"),
        ("Never", 1, "Finish"),
    ] {
        let o = up(vec![run("a", State::Exited, code, 1)]);
        assert_eq!(now_steps(&with(policy), &o, &ready()), [wanted], "{policy} {code}");
    }
    let rules = pod(json!({"restartPolicy": "Never", "containers": [{"name": "a", "restartPolicy": "Never",
        "restartPolicyRules": [{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}]}]}));
    assert_eq!(now_steps(&rules, &up(vec![run("a", State::Exited, 42, 1)]), &ready()), ["start a#1"]);
    assert_eq!(now_steps(&rules, &up(vec![run("a", State::Exited, 41, 1)]), &ready()), ["Finish"]);
}

#[test]
fn a_crash_loop_waits_and_says_so() {
    let p = one();
    let o = up(vec![run("a", State::Exited, 1, 94)]);
    let mut m = ready();
    m.restarts.insert("a".into(), Restart { delay_ms: 20_000, last_start: t(93) });
    let waits = plan_at(&p, &o, &m, 100);
    assert!(waits.actions.is_empty());
    assert_eq!(waits.wake_at, Some(t(115)));
    assert_eq!(waits.waiting["a"].reason, "CrashLoopBackOff");
    assert_eq!(waits.waiting["a"].message, "back-off 20s restarting failed container=a pod=p_n(u)");
    assert_eq!(steps(&plan_at(&p, &o, &m, 115)), ["start a#1"]);
}

#[test]
fn a_start_that_failed_waits() {
    let mut m = ready();
    let why = Waiting { reason: "CreateContainerConfigError".into(), message: "x".into() };
    m.start_failures.insert("a".into(), StartFailure { why: why.clone(), retry_at: t(110), failures: 1 });
    let p = plan_at(&one(), &up(vec![]), &m, 100);
    assert!(p.actions.is_empty());
    assert_eq!((p.wake_at, &p.waiting["a"]), (Some(t(110)), &why));
    assert_eq!(steps(&plan_at(&one(), &up(vec![]), &m, 110)), ["start a#0"]);
}

#[test]
fn probes_and_changes_stop_containers() {
    let probe = json!({"terminationGracePeriodSeconds": 7});
    let p = pod(json!({"containers": [{"name": "a", "image": "i", "livenessProbe": probe}]}));
    let a = run("a", State::Running, 0, 1);
    let mut m = ready();
    m.probes.insert(a.id.clone(), ProbeView { live: Some(false), ..Default::default() });
    assert_eq!(now_steps(&p, &up(vec![a.clone()]), &m), ["kill a-1 7 LivenessFailed"]);
    let changed = Run { hash: "other".into(), ..a.clone() };
    assert_eq!(now_steps(&one(), &up(vec![changed]), &ready()), ["kill a-1 30 Changed"]);
    // Stopped by the agent: it comes back whatever its exit code says.
    let on_failure = pod(json!({"restartPolicy": "OnFailure", "containers": [{"name": "a"}]}));
    let mut again = ready();
    again.restart_regardless.insert(a.id.clone());
    let o = up(vec![run("a", State::Exited, 0, 1)]);
    assert_eq!(now_steps(&on_failure, &o, &again), ["start a#1"]);
}

#[test]
fn a_lost_sandbox_is_replaced_after_its_containers_have_ended() {
    let lost = |state| seen(vec![sandbox("s", false)], vec![run("a", state, 0, 1)]);
    assert_eq!(now_steps(&one(), &lost(State::Running), &ready()), ["kill a-1 30 SandboxChanged"]);
    assert_eq!(now_steps(&one(), &lost(State::Exited), &ready()), ["sandbox#1"]);
    let no_ip = seen(vec![Sandbox { ips: vec![], ..sandbox("s", true) }], vec![]);
    assert_eq!(now_steps(&one(), &no_ip, &ready()), ["stop s"]);
}

#[test]
fn a_container_left_between_create_and_start_is_made_again() {
    let o = up(vec![run("a", State::Created, 0, 1)]);
    assert_eq!(now_steps(&one(), &o, &ready()), ["remove a-1"]);
    let own = Memory { in_flight: [OpKey::Start].into(), ..ready() };
    assert!(now_steps(&one(), &o, &own).is_empty());
}

#[test]
fn ephemeral_containers_start_once() {
    let p = pod(json!({"containers": [{"name": "a"}], "ephemeralContainers": [{"name": "last"}]}));
    let a = run("a", State::Running, 0, 1);
    assert_eq!(now_steps(&p, &up(vec![a.clone()]), &ready()), ["start last#0"]);
    assert!(now_steps(&p, &up(vec![a, run("last", State::Exited, 1, 2)]), &ready()).is_empty());
}

#[test]
fn an_ending_pod_stops_sidecars_last_then_its_sandbox_then_tears_down() {
    let p = pod(
        json!({"initContainers": [{"name": "s1", "restartPolicy": "Always"}, {"name": "s2", "restartPolicy": "Always"}],
        "containers": [{"name": "a"}, {"name": "b"}]}),
    );
    let ending =
        Memory { terminating: Some(Terminating { since: t(90), grace: 30, failure: None }), ..ready() };
    let r = |n: &str, at| run(n, State::Running, 0, at);
    let x = |n: &str, at| run(n, State::Exited, 0, at);
    let all = up(vec![r("s1", 1), r("s2", 2), r("a", 3), r("b", 4)]);
    assert_eq!(now_steps(&p, &all, &ending), ["kill b-4 20 PodEnds", "kill a-3 20 PodEnds"]);
    let main_gone = up(vec![r("s1", 1), r("s2", 2), x("a", 3), x("b", 4)]);
    assert_eq!(now_steps(&p, &main_gone, &ending), ["kill s2-2 20 PodEnds"]);
    let one_left = up(vec![r("s1", 1), x("s2", 2), x("a", 3), x("b", 4)]);
    assert_eq!(now_steps(&p, &one_left, &ending), ["kill s1-1 20 PodEnds"]);
    let none = up(vec![x("s1", 1), x("a", 3)]);
    assert_eq!(now_steps(&p, &none, &ending), ["stop s"]);
    let stopped = seen(vec![sandbox("s", false)], vec![x("a", 3)]);
    assert_eq!(now_steps(&p, &stopped, &ending), ["TearDown"]);
    let over = Memory { terminated: true, ..ending.clone() };
    assert!(now_steps(&p, &stopped, &over).is_empty());
    // What is being made is waited for.
    let making = Memory { in_flight: [OpKey::Sandbox].into(), ..ending };
    assert!(now_steps(&p, &seen(vec![], vec![]), &making).is_empty());
}

#[test]
fn grace_runs_out_but_not_below_two_seconds_unless_it_is_zero() {
    let with =
        |grace| Memory { terminating: Some(Terminating { since: t(0), grace, failure: None }), ..ready() };
    let o = up(vec![run("a", State::Running, 0, 1)]);
    assert_eq!(now_steps(&one(), &o, &with(30)), ["kill a-1 2 PodEnds"]);
    assert_eq!(now_steps(&one(), &o, &with(0)), ["kill a-1 0 PodEnds"]);
}

#[test]
fn the_deadline_ends_the_pod() {
    let p = pod(json!({"activeDeadlineSeconds": 50, "containers": [{"name": "a"}]}));
    let m = Memory { start_time: Some(t(60)), ..ready() };
    let running = up(vec![run("a", State::Running, 0, 61)]);
    assert_eq!(plan_at(&p, &running, &m, 100).wake_at, Some(t(110)));
    assert_eq!(steps(&plan_at(&p, &running, &m, 110)), ["Deadline"]);
}

#[test]
fn sandboxes_that_cannot_be_removed_do_not_pile_up() {
    let one_left = seen(vec![sandbox("s0", false)], vec![]);
    assert_eq!(now_steps(&one(), &one_left, &ready()), ["sandbox#1"]);
    let two_left = seen(vec![sandbox("s1", false), sandbox("s0", false)], vec![]);
    assert_eq!(now_steps(&one(), &two_left, &ready()), ["remove s0"]);
}

#[test]
fn dead_containers_beyond_two_are_removed() {
    let runs =
        vec![run("a", State::Running, 0, 9), run("a", State::Exited, 1, 6), run("a", State::Exited, 1, 3)];
    assert_eq!(now_steps(&one(), &up(runs), &ready()), ["remove a-3"]);
    let mut old = sandbox("old", false);
    old.created_at = Some(t(0) - SignedDuration::from_secs(9));
    let two = seen(vec![sandbox("s", true), old], vec![run("a", State::Running, 0, 1)]);
    assert_eq!(now_steps(&one(), &two, &ready()), ["remove old"]);
}

/// A pod of one container with this size, whose run `a-1` has that of `ran_with`, in a cgroup for `cgroup`.
fn resized(size: Value, policy: Value, ran_with: Value, cgroup: &Value) -> (Pod, Memory) {
    use crate::pods::resize::{Allocation, Sizes};
    let of = |size: &Value| {
        pod(json!({"containers": [{"name": "a", "image": "i", "resources": size, "resizePolicy": policy}]}))
    };
    let granted = |p: &Pod| Allocation::of(p.spec.as_ref().unwrap());
    let p = of(&size);
    let memory = Memory {
        volumes: Step::Done,
        sandbox: Step::Done,
        images: [("a".to_owned(), ImageState::Present("i".into()))].into(),
        sizes: Sizes {
            granted: granted(&p),
            of_cgroup: Some(granted(&of(cgroup))),
            of_run: BTreeMap::from([("a-1".to_owned(), serde_json::from_value(ran_with).unwrap())]),
            ..Default::default()
        },
        ..Default::default()
    };
    (p, memory)
}

#[test]
fn a_granted_size_is_put_in_force() {
    let (small, large) = (json!({"limits": {"memory": "1Mi"}}), json!({"limits": {"memory": "2Mi"}}));
    let restart = json!([{"resourceName": "memory", "restartPolicy": "RestartContainer"}]);
    let running = || seen(vec![sandbox("s", true)], vec![run("a", State::Running, 0, 1)]);
    let exited = || seen(vec![sandbox("s", true)], vec![run("a", State::Exited, 137, 1)]);
    let steps = |p: &Pod, o: &ObservedPod, m: &Memory| {
        let max_restart_delay = Duration::from_secs(300);
        plan(&Input { pod: p, observed: o, memory: m, now: t(100), max_restart_delay }).actions
    };
    let update =
        |names: &[&str]| vec![Action::Resize { containers: names.iter().map(|n| (*n).to_owned()).collect() }];

    let (p, m) = resized(large.clone(), json!(null), large.clone(), &large);
    assert_eq!(steps(&p, &running(), &m), [], "all is as granted");
    let (p, m) = resized(large.clone(), json!(null), small.clone(), &small);
    assert_eq!(steps(&p, &running(), &m), update(&["a"]));
    let (p, m) = resized(large.clone(), json!(null), large.clone(), &small);
    assert_eq!(steps(&p, &running(), &m), update(&[]), "only the pod's cgroup is left");

    // One that wants a restart is stopped first, and starts again in a cgroup that fits it.
    let (p, mut m) = resized(large.clone(), restart, small.clone(), &small);
    let kill =
        Action::KillContainer { id: "a-1".into(), name: "a".into(), grace: 30, reason: KillReason::Resized };
    assert_eq!(steps(&p, &running(), &m), [kill]);
    m.restart_regardless.insert("a-1".into());
    assert_eq!(steps(&p, &exited(), &m), update(&[]));
    m.sizes.of_cgroup = Some(m.sizes.granted.clone());
    let next = steps(&p, &exited(), &m);
    assert!(matches!(&next[..], [Action::StartContainer { attempt: 1, .. }]), "{next:?}");

    // A size that could not be put in force is tried again later.
    let (p, mut m) = resized(small.clone(), json!(null), large, &small);
    m.sizes.step = Step::Failed { retry_at: t(105), failures: 1 };
    assert_eq!(steps(&p, &running(), &m), []);
    m.sizes.step = Step::Failed { retry_at: t(100), failures: 1 };
    assert_eq!(steps(&p, &running(), &m), update(&["a"]));
}

#[test]
fn restart_counts_go_on_when_the_runtime_has_forgotten() {
    let memory = Memory {
        volumes: Step::Done,
        sandbox: Step::Done,
        images: [("a".to_owned(), ImageState::Present("i".into()))].into(),
        next_attempts: [("a".to_owned(), 4)].into(),
        ..Default::default()
    };
    let observed = seen(vec![sandbox("s", true)], vec![]);
    let max_restart_delay = Duration::from_secs(300);
    let p = plan(&Input { pod: &one(), observed: &observed, memory: &memory, now: t(1), max_restart_delay });
    assert!(matches!(&p.actions[..], [Action::StartContainer { attempt: 4, .. }]), "{:?}", p.actions);
}
