//! In-place resize of a pod's CPU and memory (KEP-1287): what the node has granted, what runs with what, and what is to
//! be done about the difference. Pure.
//!
//! ```text
//! spec --judge--> granted (Allocation) --change--> UpdateContainerResources, or a restart --> what runs (Sizes::of_run)
//!        \--> PodResizePending (Deferred: again when there is room; Infeasible: never on this node)
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, ResourceRequirements};
use orlop_api::pod::{Resources, is_sidecar, requests};
use orlop_api::quantity::Amount;
use serde::{Deserialize, Serialize};

use super::state::Step;
use crate::node::admit::lacking;
use crate::runtime::{ObservedPod, State};

/// CPU in thousandths and memory in bytes, asked for and at most; what two sizes are compared by.
type Figures = [Option<i64>; 4];

fn figures(r: Option<&ResourceRequirements>) -> Figures {
    let of = |limits: bool, name: &str| {
        let list = r.and_then(|r| if limits { r.limits.as_ref() } else { r.requests.as_ref() })?;
        let amount = Amount::try_from(list.get(name)?).ok()?;
        Some(if name == "cpu" { amount.milli() } else { amount.units() })
    };
    [of(false, "cpu"), of(true, "cpu"), of(false, "memory"), of(true, "memory")]
}

/// The containers that can be resized.
fn resizable(spec: &PodSpec) -> impl Iterator<Item = &Container> {
    spec.init_containers.iter().flatten().filter(|c| is_sidecar(c)).chain(&spec.containers)
}

/// What a pod is granted: of the pod itself, and of each container.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Allocation {
    pod: Option<ResourceRequirements>,
    containers: BTreeMap<String, ResourceRequirements>,
}

impl Allocation {
    /// All that the spec asks for.
    pub fn of(spec: &PodSpec) -> Allocation {
        let all = resizable(spec).map(|c| (c.name.clone(), c.resources.clone().unwrap_or_default()));
        Allocation { pod: spec.resources.clone(), containers: all.collect() }
    }

    /// Whether it comes to the same CPU and memory.
    pub fn same(&self, other: &Allocation) -> bool {
        let figures_of = |a: &Allocation| -> BTreeMap<String, Figures> {
            a.containers.iter().map(|(k, r)| (k.clone(), figures(Some(r)))).collect()
        };
        figures(self.pod.as_ref()) == figures(other.pod.as_ref()) && figures_of(self) == figures_of(other)
    }

    /// The spec with these resources in it; unchanged when it has them already.
    pub fn applied(&self, pod: &Arc<Pod>) -> Arc<Pod> {
        let Some(spec) = pod.spec.as_ref().filter(|s| !self.same(&Allocation::of(s))) else {
            return pod.clone();
        };
        let mut spec = spec.clone();
        spec.resources = self.pod.clone();
        let all = spec.init_containers.iter_mut().flatten().chain(&mut spec.containers);
        for c in all {
            if let Some(r) = self.containers.get(&c.name) {
                c.resources = Some(r.clone());
            }
        }
        Arc::new(Pod { spec: Some(spec), ..(**pod).clone() })
    }
}

/// Why a resize has not been granted, as the condition PodResizePending says it.
#[derive(Clone, Debug, PartialEq)]
pub struct Pending {
    /// `Deferred` or `Infeasible`.
    pub reason: &'static str,
    pub message: String,
    /// Of the spec that was judged.
    pub generation: Option<i64>,
}

/// Whether the node has room for what the spec asks for, beside what others were granted.
pub fn judge(pod: &Pod, others: &[Resources], allocatable: &BTreeMap<String, Amount>) -> Result<(), Pending> {
    let Some(spec) = &pod.spec else { return Ok(()) };
    let wanted = requests(spec);
    let pending = |reason, message| Err(Pending { reason, message, generation: pod.metadata.generation });
    let show = |name: &str, a: Amount| if name == "cpu" { a.milli() } else { a.units() };
    if let Some((name, asked, _, total)) = lacking(&wanted, &[], allocatable) {
        let (asked, total) = (show(&name, asked), show(&name, total));
        let message =
            format!("Node didn't have enough capacity: {name}, requested: {asked}, capacity: {total}");
        return pending("Infeasible", message);
    }
    if let Some((name, asked, used, total)) = lacking(&wanted, others, allocatable) {
        let (asked, used, total) = (show(&name, asked), show(&name, used), show(&name, total));
        return pending(
            "Deferred",
            format!(
                "Node didn't have enough resource: {name}, requested: {asked}, used: {used}, capacity: {total}"
            ),
        );
    }
    Ok(())
}

/// What a worker remembers of sizes.
#[derive(Clone, Debug, Default)]
pub struct Sizes {
    pub granted: Allocation,
    pub pending: Option<Pending>,
    /// Of the spec that was granted, while not all of it is in force.
    pub in_progress: Option<Option<i64>>,
    /// What the pod's cgroup was last given.
    pub of_cgroup: Option<Allocation>,
    /// By container id, where it differs from what is granted or has not been seen running yet.
    pub of_run: BTreeMap<String, ResourceRequirements>,
    /// What the next container of a name is created with.
    pub starting: BTreeMap<String, ResourceRequirements>,
    /// The last try.
    pub step: Step,
    /// Why the last try failed.
    pub failure: Option<String>,
}

/// What a running container needs to have its granted size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    None,
    Update,
    /// Its resize policy wants a restart for one of the resources that change.
    Restart,
}

impl Sizes {
    /// What the container with this id runs with.
    pub fn of_run<'a>(&'a self, id: &str, c: &'a Container) -> Option<&'a ResourceRequirements> {
        self.of_run.get(id).or(self.granted.containers.get(&c.name)).or(c.resources.as_ref())
    }

    /// Compares a running container with what its spec, as granted, says.
    pub fn change(&self, id: &str, c: &Container) -> Change {
        let Some(now) = self.of_run.get(id) else { return Change::None };
        let (now, wanted) = (figures(Some(now)), figures(c.resources.as_ref()));
        let differs = |at: [usize; 2]| at.iter().any(|i| now[*i] != wanted[*i]);
        let restarts = |name: &str| {
            let policy = c.resize_policy.iter().flatten().find(|p| p.resource_name == name);
            policy.is_some_and(|p| p.restart_policy == "RestartContainer")
        };
        let changed = [("cpu", differs([0, 1])), ("memory", differs([2, 3]))];
        if changed.iter().any(|(name, differs)| *differs && restarts(name)) {
            return Change::Restart;
        }
        if changed.iter().any(|(_, differs)| *differs) { Change::Update } else { Change::None }
    }

    /// Whether the pod's cgroup has other limits than granted.
    pub fn cgroup_differs(&self) -> bool {
        self.of_cgroup.as_ref().is_some_and(|a| !a.same(&self.granted))
    }

    /// Notes what the containers that are seen run with, so that a later grant is seen to differ from it.
    pub fn note_runs(&mut self, observed: &ObservedPod) {
        let running: Vec<_> = observed.running().map(|r| (r.id.clone(), r.name.clone())).collect();
        self.of_run.retain(|id, _| running.iter().any(|(r, _)| r == id));
        for (id, name) in running {
            if self.of_run.contains_key(&id) {
                continue;
            }
            let size = self.starting.remove(&name).or_else(|| self.granted.containers.get(&name).cloned());
            if let Some(size) = size {
                self.of_run.insert(id, size);
            }
        }
    }

    /// Whether all that was granted is in force; `regardless` says which ended containers are about to start again.
    pub fn in_force(&self, pod: &Pod, observed: &ObservedPod, regardless: impl Fn(&str) -> bool) -> bool {
        let Some(spec) = &pod.spec else { return true };
        let settled = |c: &Container| match observed.container(&c.name) {
            Some(run) if run.state == State::Running => self.change(&run.id, c) == Change::None,
            Some(run) => !regardless(&run.id),
            None => true,
        };
        !self.cgroup_differs() && resizable(spec).all(settled)
    }

    /// What has to outlive the agent: sizes that differ from what is granted.
    pub fn unlike_granted(&self, observed: &ObservedPod) -> BTreeMap<String, ResourceRequirements> {
        let name = |id: &str| observed.containers.iter().find(|c| c.id == id).map(|c| c.name.as_str());
        let unlike = |id: &str, r: &ResourceRequirements| {
            let granted = name(id).and_then(|n| self.granted.containers.get(n));
            granted.is_some_and(|g| figures(Some(g)) != figures(Some(r)))
        };
        self.of_run.iter().filter(|(id, r)| unlike(id, r)).map(|(k, v)| (k.clone(), v.clone())).collect()
    }
}

/// The text of upstream's events about resizes.
pub fn event_message(prefix: &str, pod: &Pod, generation: Option<i64>, error: &str) -> String {
    let list = |all: Vec<&Container>| -> Vec<serde_json::Value> {
        let one = |c: &Container| serde_json::json!({"name": c.name, "resources": c.resources.clone().unwrap_or_default()});
        all.into_iter().map(one).collect()
    };
    let spec = pod.spec.as_ref();
    let mut summary = serde_json::Map::new();
    let init = list(spec.into_iter().flat_map(|s| s.init_containers.iter().flatten()).collect());
    if !init.is_empty() {
        summary.insert("initContainers".into(), init.into());
    }
    summary.insert("containers".into(), list(spec.into_iter().flat_map(|s| &s.containers).collect()).into());
    summary.insert("generation".into(), generation.unwrap_or(0).into());
    if !error.is_empty() {
        summary.insert("error".into(), error.into());
    }
    format!("{prefix}: {}", serde_json::Value::Object(summary))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(resources: Value, policy: Value) -> Arc<Pod> {
        let c = json!({"name": "a", "resources": resources, "resizePolicy": policy});
        let p = json!({"metadata": {"generation": 2}, "spec": {"containers": [c]}});
        Arc::new(serde_json::from_value(p).unwrap())
    }

    fn sizes(granted: &Pod, runs_with: Value) -> Sizes {
        Sizes {
            granted: Allocation::of(granted.spec.as_ref().unwrap()),
            of_run: BTreeMap::from([("id".to_owned(), serde_json::from_value(runs_with).unwrap())]),
            ..Default::default()
        }
    }

    #[test]
    fn what_a_running_container_needs() {
        let restart = |r: &str| json!([{"resourceName": r, "restartPolicy": "RestartContainer"}]);
        let now = json!({"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "1Gi"}});
        let table = [
            (now.clone(), json!(null), Change::None),
            (
                json!({"requests": {"cpu": "1000m", "memory": "1024Mi"}, "limits": {"memory": "1Gi"}}),
                json!(null),
                Change::None,
            ),
            (
                json!({"requests": {"cpu": "2", "memory": "1Gi"}, "limits": {"memory": "1Gi"}}),
                json!(null),
                Change::Update,
            ),
            (
                json!({"requests": {"cpu": "2", "memory": "1Gi"}, "limits": {"memory": "1Gi"}}),
                restart("memory"),
                Change::Update,
            ),
            (
                json!({"requests": {"cpu": "2", "memory": "1Gi"}, "limits": {"memory": "1Gi"}}),
                restart("cpu"),
                Change::Restart,
            ),
            (
                json!({"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "2Gi"}}),
                restart("memory"),
                Change::Restart,
            ),
            (json!({"requests": {"cpu": "1", "memory": "1Gi"}}), json!(null), Change::Update),
        ];
        for (wanted, policy, expected) in table {
            let p = pod(wanted.clone(), policy);
            let s = sizes(&p, now.clone());
            assert_eq!(s.change("id", &p.spec.as_ref().unwrap().containers[0]), expected, "{wanted}");
        }
    }

    #[test]
    fn room_decides() {
        let cpu = |milli: i64| Resources::from([("cpu".to_owned(), Amount::from_milli(milli))]);
        let node = BTreeMap::from([("cpu".to_owned(), Amount::from_units(2))]);
        let table = [
            ("500m", vec![cpu(1500)], None),
            (
                "501m",
                vec![cpu(1500)],
                Some((
                    "Deferred",
                    "Node didn't have enough resource: cpu, requested: 501, used: 1500, capacity: 2000",
                )),
            ),
            (
                "3",
                vec![],
                Some((
                    "Infeasible",
                    "Node didn't have enough capacity: cpu, requested: 3000, capacity: 2000",
                )),
            ),
        ];
        for (wanted, others, expected) in table {
            let p = pod(json!({"requests": {"cpu": wanted}}), json!(null));
            let got = judge(&p, &others, &node).err();
            assert_eq!(got.as_ref().map(|p| (p.reason, p.message.as_str())), expected, "{wanted}");
            assert!(got.is_none_or(|p| p.generation == Some(2)));
        }
    }

    #[test]
    fn the_granted_size_stands_in_for_the_one_asked_for() {
        let small = pod(json!({"requests": {"cpu": "1"}}), json!(null));
        let large = pod(json!({"requests": {"cpu": "2"}}), json!(null));
        let granted = Allocation::of(small.spec.as_ref().unwrap());
        assert_eq!(granted.applied(&large).spec, small.spec);
        assert!(Arc::ptr_eq(&granted.applied(&small), &small));
    }

    #[test]
    fn events_say_what_upstreams_do() {
        let p = pod(json!({"requests": {"cpu": "1"}}), json!(null));
        let text = event_message("Pod resize started", &p, Some(2), "");
        assert_eq!(
            text,
            r#"Pod resize started: {"containers":[{"name":"a","resources":{"requests":{"cpu":"1"}}}],"generation":2}"#
        );
    }
}
