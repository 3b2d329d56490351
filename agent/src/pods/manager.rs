//! All pods of this node and their workers.

use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use parking_lot::RwLock;

use crate::runtime::SharedPod;

#[derive(Default)]
struct State {
    pods: HashMap<String, Entry>,
}

struct Entry {
    /// With the status the agent last generated.
    pod: Arc<Pod>,
    observed: SharedPod,
}

/// A handle to the table of pods; cloning is cheap.
#[derive(Clone, Default)]
pub struct Pods {
    state: Arc<RwLock<State>>,
}

impl Pods {
    /// All pods with their latest status, in no order.
    pub fn list(&self) -> Vec<Arc<Pod>> {
        self.state.read().pods.values().map(|e| e.pod.clone()).collect()
    }

    /// The pod of this name. Of two with one name (a deleted one and its successor) the younger.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<Pod>> {
        let state = self.state.read();
        let same = state.pods.values().map(|e| &e.pod).filter(|p| {
            p.metadata.name.as_deref() == Some(name) && p.metadata.namespace.as_deref() == Some(namespace)
        });
        same.max_by_key(|p| p.metadata.creation_timestamp.clone()).cloned()
    }

    pub fn by_uid(&self, uid: &str) -> Option<Arc<Pod>> {
        self.state.read().pods.get(uid).map(|e| e.pod.clone())
    }

    /// What the runtime has of a pod.
    pub fn observed(&self, uid: &str) -> Option<SharedPod> {
        self.state.read().pods.get(uid).map(|e| e.observed.clone())
    }
}
