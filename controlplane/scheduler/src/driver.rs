//! Connects the pure parts to the API: informers in, bindings, conditions and events out.

use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Node, ObjectReference, Pod};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use orlop_api::meta::{Key, is_terminating};
use orlop_api::pod::is_finished;
use orlop_base::supervise::{Ready, TaskGroup};
use orlop_client::informer::Builder;
use orlop_client::{Change, LostLeadership, Recorder, lead};
use parking_lot::Mutex;
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::json;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::cache::Cache;
use crate::cycle::schedule;
use crate::framework::PodInfo;
use crate::plugins::{default_filters, default_scores};
use crate::queue::{Attempt, Queue};

/// Bindings on their way at once; each is one small request.
const BINDINGS: usize = 64;

/// How the scheduler runs.
#[derive(Clone)]
pub struct Config {
    pub client: Client,
    /// Pods whose spec.schedulerName is this are ours.
    pub scheduler_name: String,
    /// Seed of the choice between equal nodes; `None` takes one from the system.
    pub seed: Option<u64>,
    /// Take part in the election of `kube-system/kube-scheduler` under this identity; `None`: act at once.
    pub leader_elect: Option<String>,
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config")
            .field("scheduler_name", &self.scheduler_name)
            .field("seed", &self.seed)
            .field("leader_elect", &self.leader_elect)
            .finish_non_exhaustive()
    }
}

/// Why the scheduler ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("scheduler: {0}")]
    LostLeadership(#[from] LostLeadership),
    #[error("scheduler: {0}")]
    Task(#[from] orlop_base::supervise::Failure),
}

struct State {
    cache: Cache,
    queue: Queue,
}

struct Shared {
    config: Config,
    state: Mutex<State>,
    wake: Notify,
    start: Instant,
    recorder: Recorder,
    bindings: Arc<Semaphore>,
}

/// Schedules pods until `stop`.
pub async fn run(config: Config, ready: Ready, stop: CancellationToken) -> Result<(), Error> {
    let (client, identity) = (config.client.clone(), config.leader_elect.clone());
    lead(&client, "kube-scheduler", identity.as_deref(), &stop, |stop| serve(config, ready, stop)).await
}

async fn serve(config: Config, ready: Ready, stop: CancellationToken) -> Result<(), Error> {
    let tasks = TaskGroup::new(&stop);
    let recorder = Recorder::start(config.client.clone(), &config.scheduler_name, "", &tasks);
    let shared = Arc::new(Shared {
        config,
        state: Mutex::new(State { cache: Cache::default(), queue: Queue::default() }),
        wake: Notify::new(),
        start: Instant::now(),
        recorder,
        bindings: Arc::new(Semaphore::new(BINDINGS)),
    });
    let client = shared.config.client.clone();
    let s = shared.clone();
    let nodes = Builder::new(Api::<Node>::all(client.clone()))
        .on_change(move |c| s.node_changed(c))
        // Everything is copied into the cache; only names are kept here.
        .trim(trim_node)
        .start(&tasks);
    let s = shared.clone();
    let pods = Builder::new(Api::<Pod>::all(client))
        .fields("status.phase!=Succeeded,status.phase!=Failed")
        .on_change(move |c| s.pod_changed(c))
        .trim(trim_pod)
        .start(&tasks);
    tokio::select! {
        () = stop.cancelled() => {}
        () = async { nodes.synced().await; pods.synced().await } => {
            ready.set();
            let s = shared.clone();
            let group = tasks.clone();
            tasks.spawn_essential("scheduling loop", async move { s.run(group).await; Ok::<(), String>(()) });
        }
    }
    Ok(tasks.run_until_stopped(Duration::from_secs(5)).await?)
}

fn trim_node(n: &mut Node) {
    n.metadata.annotations = None;
    if let Some(s) = &mut n.status {
        s.conditions = None;
        s.addresses = None;
        s.node_info = None;
        s.daemon_endpoints = None;
    }
}

fn trim_pod(p: &mut Pod) {
    p.metadata.annotations = None;
    if let Some(s) = &mut p.status {
        s.container_statuses = None;
        s.init_container_statuses = None;
    }
    if let Some(spec) = &mut p.spec {
        spec.volumes = None;
        for c in spec.containers.iter_mut().chain(spec.init_containers.iter_mut().flatten()) {
            c.env = None;
            c.command = None;
            c.args = None;
            c.volume_mounts = None;
            c.liveness_probe = None;
            c.readiness_probe = None;
            c.startup_probe = None;
            c.lifecycle = None;
        }
    }
}

fn reference(p: &PodInfo) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        namespace: Some(p.key.namespace.clone()),
        name: Some(p.key.name.clone()),
        uid: Some(p.uid.clone()),
        ..Default::default()
    }
}

impl Shared {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn node_changed(&self, c: &Change<Node>) {
        let mut s = self.state.lock();
        match c {
            Change::Deleted(n) => s.cache.remove_node(n.metadata.name.as_deref().unwrap_or_default()),
            Change::Added(n) | Change::Updated { new: n, .. } => {
                s.cache.set_node(n);
                s.queue.cluster_changed(self.now());
            }
        }
        drop(s);
        self.wake.notify_one();
    }

    fn pod_changed(&self, c: &Change<Pod>) {
        let pod = c.object();
        let key = Key::of(&pod.metadata);
        let spec = pod.spec.as_ref();
        let node = spec.and_then(|s| s.node_name.as_deref()).filter(|n| !n.is_empty());
        let mut s = self.state.lock();
        let gone = matches!(c, Change::Deleted(_)) || is_finished(pod);
        match node {
            Some(_) if gone => {
                s.cache.remove_pod(&key);
                s.queue.remove(&key);
                s.queue.cluster_changed(self.now());
            }
            Some(n) => {
                s.queue.remove(&key);
                s.cache.place(PodInfo::of(pod), n);
            }
            None => {
                let name = spec.and_then(|s| s.scheduler_name.as_deref()).unwrap_or("default-scheduler");
                let gated = spec.and_then(|s| s.scheduling_gates.as_ref()).is_some_and(|g| !g.is_empty());
                if gone || is_terminating(&pod.metadata) || gated || name != self.config.scheduler_name {
                    s.cache.remove_pod(&key);
                    s.queue.remove(&key);
                } else if worth_another_try(c) {
                    s.queue.set(PodInfo::of(pod));
                }
            }
        }
        drop(s);
        self.wake.notify_one();
    }

    async fn run(self: Arc<Self>, tasks: TaskGroup) {
        let stop = tasks.stop_token();
        let mut rng = match self.config.seed {
            Some(seed) => StdRng::seed_from_u64(seed),
            None => StdRng::from_os_rng(),
        };
        let (filters, scores) = (default_filters(), default_scores());
        let mut start = 0;
        loop {
            let next = {
                let mut s = self.state.lock();
                match s.queue.pop(self.now()) {
                    None => Err(s.queue.next_due()),
                    Some(attempt) => {
                        let (decision, looked_at) =
                            schedule(&attempt.pod, &s.cache, &filters, &scores, start, &mut rng);
                        start = (start + looked_at) % s.cache.len().max(1);
                        match &decision {
                            Ok(node) => s.cache.place(attempt.pod.clone(), node),
                            Err(_) => s.queue.unschedulable(&attempt, self.now()),
                        }
                        Ok((attempt, decision))
                    }
                }
            };
            match next {
                Ok((attempt, Ok(node))) => {
                    let Ok(permit) = self.bindings.clone().acquire_owned().await else { return };
                    let me = self.clone();
                    tasks.spawn(async move {
                        me.bind(attempt, &node).await;
                        drop(permit);
                    });
                }
                Ok((attempt, Err(why))) => {
                    let Ok(permit) = self.bindings.clone().acquire_owned().await else { return };
                    let me = self.clone();
                    tasks.spawn(async move {
                        me.report_unschedulable(&attempt.pod, &why.to_string()).await;
                        drop(permit);
                    });
                }
                Err(due) => {
                    let timer = async {
                        match due {
                            Some(t) => tokio::time::sleep(t.saturating_sub(self.now())).await,
                            None => std::future::pending().await,
                        }
                    };
                    // All arms only wait; Notify keeps a permit, so no wake-up is lost.
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = self.wake.notified() => {}
                        () = timer => {}
                    }
                }
            }
        }
    }

    async fn bind(&self, attempt: Attempt, node: &str) {
        let pod = &attempt.pod;
        let body = json!({
            "apiVersion": "v1", "kind": "Binding",
            "metadata": {"name": pod.key.name, "namespace": pod.key.namespace, "uid": pod.uid},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        });
        let path = format!("/api/v1/namespaces/{}/pods/{}/binding", pod.key.namespace, pod.key.name);
        let result = async {
            let request = http_request(&path, &body)?;
            self.config.client.request::<serde_json::Value>(request).await
        }
        .await;
        match result {
            Ok(_) => {
                let message = format!("Successfully assigned {} to {node}", pod.key);
                self.recorder.normal(reference(pod), "Scheduled", message);
            }
            Err(e) => {
                tracing::warn!(pod = %pod.key, node, error = %e, "binding failed");
                let mut s = self.state.lock();
                s.cache.remove_pod(&pod.key);
                // A pod that is gone or bound by someone else has left the queue by its own watch event.
                let gone = matches!(&e, kube::Error::Api(status) if status.code == 404);
                if gone {
                    s.queue.remove(&pod.key);
                } else {
                    s.queue.failed(&pod.key, self.now());
                }
                drop(s);
                self.wake.notify_one();
            }
        }
    }

    async fn report_unschedulable(&self, pod: &PodInfo, why: &str) {
        self.recorder.warning(reference(pod), "FailedScheduling", why);
        let api: Api<Pod> = Api::namespaced(self.config.client.clone(), &pod.key.namespace);
        let patch = json!({"metadata": {"uid": pod.uid}, "status": {"conditions": [{
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": why,
            "lastTransitionTime": jiff::Timestamp::now(),
        }]}});
        let result =
            api.patch_status(&pod.key.name, &PatchParams::default(), &Patch::Strategic(&patch)).await;
        if let Err(e) = result {
            tracing::debug!(pod = %pod.key, error = %e, "could not record that no node fits");
        }
    }
}

/// Whether a change of a pod without a node can alter the decision: a status written by ourselves cannot.
fn worth_another_try(c: &Change<Pod>) -> bool {
    match c {
        Change::Updated { old, new } => old.spec != new.spec || old.metadata.labels != new.metadata.labels,
        _ => true,
    }
}

fn http_request(path: &str, body: &serde_json::Value) -> Result<http::Request<Vec<u8>>, kube::Error> {
    let bytes = serde_json::to_vec(body).map_err(kube::Error::SerdeError)?;
    http::Request::post(path)
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(bytes)
        .map_err(kube::Error::HttpError)
}
