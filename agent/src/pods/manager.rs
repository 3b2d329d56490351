//! All pods of this node and their workers.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use orlop_api::meta::Key;
use orlop_api::quantity::Amount;
use orlop_base::supervise::Ready;
use parking_lot::RwLock;
use tokio::sync::{Notify, watch};

use super::resize::{self, Allocation, Pending};
use super::worker;
use crate::context::Context;
use crate::runtime::SharedPod;

/// What a source wants of a pod.
#[derive(Clone, Debug)]
pub struct Desired {
    pub pod: Arc<Pod>,
    /// A static pod's mirror in the API.
    pub mirror: Option<Arc<Pod>>,
    /// The source has it no longer: it ends and leaves nothing.
    pub gone: bool,
}

/// What may have changed for a worker besides its [`Desired`].
#[derive(Default)]
pub struct Signals {
    /// The runtime has to be asked.
    pub runtime: AtomicBool,
    /// A ConfigMap or Secret has changed.
    pub volumes: AtomicBool,
    pub wake: Notify,
}

impl Signals {
    pub fn runtime_changed(&self) {
        self.runtime.store(true, Ordering::Release);
        self.wake.notify_one();
    }

    pub fn volumes_changed(&self) {
        self.volumes.store(true, Ordering::Release);
        self.wake.notify_one();
    }
}

#[derive(Default)]
struct State {
    pods: HashMap<String, Entry>,
    mirrors: HashMap<Key, Arc<Pod>>,
}

struct Entry {
    desired: watch::Sender<Desired>,
    signals: Arc<Signals>,
    /// With the status the agent last generated.
    status: Option<PodStatus>,
    observed: SharedPod,
    /// What the node has granted; its worker says it before it does anything.
    granted: Option<Allocation>,
    /// A resize waits for room.
    deferred: bool,
}

impl Entry {
    /// With the sizes that are granted.
    fn pod(&self) -> Arc<Pod> {
        let pod = self.desired.borrow().pod.clone();
        let pod = self.granted.as_ref().map_or(pod.clone(), |g| g.applied(&pod));
        match &self.status {
            Some(s) => Arc::new(Pod { status: Some(s.clone()), ..(*pod).clone() }),
            None => pod,
        }
    }

    fn key(&self) -> Key {
        Key::of(&self.desired.borrow().pod.metadata)
    }
}

impl State {
    /// Resizes that wait for room are judged again.
    fn room_is_free(&self) {
        for e in self.pods.values().filter(|e| e.deferred) {
            e.signals.wake.notify_one();
        }
    }
}

/// A handle to the table of pods; cloning is cheap.
#[derive(Clone, Default)]
pub struct Pods {
    state: Arc<RwLock<State>>,
    /// A worker has ended: another pod may have waited for its name.
    ended: Arc<Notify>,
    statics_read: Ready,
}

impl Pods {
    /// All pods with their latest status, in no order.
    pub fn list(&self) -> Vec<Arc<Pod>> {
        self.state.read().pods.values().map(Entry::pod).collect()
    }

    /// The pod of this name. Of two with one name (a deleted one and its successor) the younger.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<Pod>> {
        let key = Key::new(namespace, name);
        let state = self.state.read();
        let same = state.pods.values().filter(|e| e.key() == key).map(Entry::pod);
        same.max_by_key(|p| p.metadata.creation_timestamp.clone())
    }

    pub fn by_uid(&self, uid: &str) -> Option<Arc<Pod>> {
        self.state.read().pods.get(uid).map(Entry::pod)
    }

    pub fn contains(&self, uid: &str) -> bool {
        self.state.read().pods.contains_key(uid)
    }

    /// What the runtime has of a pod.
    pub fn observed(&self, uid: &str) -> Option<SharedPod> {
        self.state.read().pods.get(uid).map(|e| e.observed.clone())
    }

    /// Counts pods and running containers, for metrics.
    pub fn running(&self) -> (usize, usize) {
        let state = self.state.read();
        let pods = state.pods.values().filter(|e| e.observed.ready_sandbox().is_some()).count();
        (pods, state.pods.values().map(|e| e.observed.running().count()).sum())
    }

    /// A new or changed pod. The first time its worker starts.
    pub fn apply(&self, ctx: &Context, pod: Arc<Pod>) {
        let Some(uid) = pod.metadata.uid.clone() else { return };
        let mut state = self.state.write();
        if let Some(e) = state.pods.get(&uid) {
            e.desired.send_modify(|d| d.pod = pod);
            return;
        }
        let mirror = state.mirrors.get(&Key::of(&pod.metadata)).cloned().filter(|_| super::is_static(&pod));
        let (desired, receive) = watch::channel(Desired { pod, mirror, gone: false });
        let signals = Arc::new(Signals::default());
        let entry = Entry {
            desired,
            signals: signals.clone(),
            status: None,
            observed: SharedPod::default(),
            granted: None,
            deferred: false,
        };
        state.pods.insert(uid.clone(), entry);
        drop(state);
        ctx.tasks.spawn(worker::run(ctx.clone(), uid, receive, signals));
    }

    /// The source has the pod no longer.
    pub fn remove(&self, uid: &str) {
        if let Some(e) = self.state.read().pods.get(uid) {
            e.desired.send_modify(|d| d.gone = true);
        }
    }

    /// Notes the mirror of a static pod; false when there is no such static pod.
    pub fn set_mirror(&self, key: &Key, mirror: Option<Arc<Pod>>) -> bool {
        let mut state = self.state.write();
        match &mirror {
            Some(m) => state.mirrors.insert(key.clone(), m.clone()),
            None => state.mirrors.remove(key),
        };
        let mut known = false;
        for e in state.pods.values() {
            let of_static = super::is_static(&e.desired.borrow().pod) && e.key() == *key;
            if of_static {
                e.desired.send_modify(|d| d.mirror = mirror.clone());
                known = true;
            }
        }
        known
    }

    pub fn mirror(&self, key: &Key) -> Option<Arc<Pod>> {
        self.state.read().mirrors.get(key).cloned()
    }

    /// Whether a manifest gives a pod of this name.
    pub fn has_static(&self, key: &Key) -> bool {
        let state = self.state.read();
        state.pods.values().any(|e| {
            let d = e.desired.borrow();
            !d.gone && super::is_static(&d.pod) && Key::of(&d.pod.metadata) == *key
        })
    }

    /// The whole set of static pods.
    pub fn set_statics(&self, ctx: &Context, pods: Vec<Arc<Pod>>) {
        let wanted: HashSet<String> = pods.iter().filter_map(|p| p.metadata.uid.clone()).collect();
        let gone: Vec<String> = {
            let state = self.state.read();
            let statics = state.pods.iter().filter(|(_, e)| super::is_static(&e.desired.borrow().pod));
            statics.filter(|(uid, _)| !wanted.contains(*uid)).map(|(uid, _)| uid.clone()).collect()
        };
        gone.iter().for_each(|uid| self.remove(uid));
        for p in pods {
            if p.metadata.uid.as_ref().is_some_and(|uid| !self.contains(uid)) {
                self.apply(ctx, p);
            }
        }
        self.statics_read.set();
    }

    /// Returns once the manifests have been read the first time.
    pub async fn statics_read(&self) {
        self.statics_read.wait().await;
    }

    pub fn statics_are_read(&self) {
        self.statics_read.set();
    }

    /// The runtime has news of a pod; false when it is not known here.
    pub fn runtime_changed(&self, uid: &str) -> bool {
        let state = self.state.read();
        let e = state.pods.get(uid);
        if let Some(e) = e {
            e.signals.runtime_changed();
        }
        e.is_some()
    }

    pub fn volumes_changed(&self, uid: &str) {
        if let Some(e) = self.state.read().pods.get(uid) {
            e.signals.volumes_changed();
        }
    }

    pub(crate) fn publish(&self, uid: &str, status: PodStatus, observed: SharedPod) {
        let mut state = self.state.write();
        let Some(e) = state.pods.get_mut(uid) else { return };
        let ends = |s: &PodStatus| matches!(s.phase.as_deref(), Some("Succeeded" | "Failed"));
        let ended = ends(&status) && !e.status.as_ref().is_some_and(ends);
        e.status = Some(status);
        e.observed = observed;
        if ended {
            state.room_is_free();
        }
    }

    /// What the pod had been granted before this agent started, or is granted with its admission.
    pub(crate) fn set_granted(&self, uid: &str, granted: Allocation) {
        if let Some(e) = self.state.write().pods.get_mut(uid) {
            e.granted = Some(granted);
        }
    }

    /// Grants the pod what its spec asks for, if there is room beside the others.
    pub(crate) fn grant(
        &self,
        pod: &Pod,
        wanted: &Allocation,
        allocatable: &BTreeMap<String, Amount>,
    ) -> Result<(), Pending> {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        // Locked throughout: of two that grow at once only one may have the last room.
        let mut state = self.state.write();
        let others = state.pods.iter().filter(|(u, _)| u.as_str() != uid).map(|(_, e)| e.pod());
        let others = others.filter(|p| !super::has_ended(p));
        let used: Vec<_> = others.filter_map(|p| p.spec.as_ref().map(orlop_api::pod::requests)).collect();
        let judged = resize::judge(pod, &used, allocatable);
        if let Some(e) = state.pods.get_mut(uid) {
            e.deferred = judged.as_ref().is_err_and(|p| p.reason == "Deferred");
            if judged.is_ok() {
                e.granted = Some(wanted.clone());
                state.room_is_free();
            }
        }
        judged
    }

    pub(crate) fn forget(&self, uid: &str) {
        {
            let mut state = self.state.write();
            state.pods.remove(uid);
            state.room_is_free();
        }
        self.ended.notify_waiters();
    }

    /// Returns once no other static pod of this name is left: a changed manifest replaces its pod.
    pub(crate) async fn name_is_free(&self, uid: &str) {
        loop {
            let ended = self.ended.notified();
            let taken = {
                let state = self.state.read();
                let Some(own) = state.pods.get(uid).map(Entry::key) else { return };
                let others = state.pods.iter().filter(|(u, _)| u.as_str() != uid);
                others.into_iter().any(|(_, e)| {
                    e.key() == own && super::is_static(&e.desired.borrow().pod) && e.desired.borrow().gone
                })
            };
            if !taken {
                return;
            }
            ended.await;
        }
    }
}
