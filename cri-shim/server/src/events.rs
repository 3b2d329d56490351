//! GetContainerEvents, fed by the monitors' events as they happen (KEP-3386).

use std::sync::Arc;

use orlop_proto::cri;
use tokio::sync::broadcast;

use crate::runtime::{Runtime, now_ns};
use crate::store::Container;

/// Events a slow listener may fall behind by: 110 pods of several containers starting at once. A listener that falls behind
/// further is cut off and lists again, as after any lost connection.
const BACKLOG: usize = 1024;

/// Fans events out to the callers of GetContainerEvents.
pub(crate) struct Events(broadcast::Sender<Arc<cri::ContainerEventResponse>>);

impl Default for Events {
    fn default() -> Self {
        Events(broadcast::channel(BACKLOG).0)
    }
}

impl Events {
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<cri::ContainerEventResponse>> {
        self.0.subscribe()
    }

    fn wanted(&self) -> bool {
        self.0.receiver_count() > 0
    }
}

impl Runtime {
    /// Tells listeners what happened to a container, with the whole pod's state as it is now.
    pub fn emit(&self, container: &Container, what: cri::ContainerEventType) {
        if what == cri::ContainerEventType::ContainerStoppedEvent {
            self.plugins.has_ended(container);
        }
        if !self.events.wanted() {
            return;
        }
        let deleted = what == cri::ContainerEventType::ContainerDeletedEvent;
        let sandbox = self.store.sandbox(&container.sandbox_id).ok();
        let event = cri::ContainerEventResponse {
            container_id: container.id.clone(),
            container_event_type: what as i32,
            created_at: now_ns(),
            pod_sandbox_status: sandbox.as_ref().map(|s| self.sandbox_status(s)),
            containers_statuses: self
                .store
                .containers_of(&container.sandbox_id)
                .iter()
                .filter(|c| !(deleted && c.id == container.id))
                .map(|c| self.container_status_of(c))
                .collect(),
        };
        // No listener left is fine.
        let _ = self.events.0.send(Arc::new(event));
    }

    /// The same for a sandbox, which the kubelet knows as the container that has the sandbox's id.
    pub fn emit_sandbox(&self, sandbox: &crate::store::Sandbox, what: cri::ContainerEventType) {
        if !self.events.wanted() {
            return;
        }
        let event = cri::ContainerEventResponse {
            container_id: sandbox.id.clone(),
            container_event_type: what as i32,
            created_at: now_ns(),
            pod_sandbox_status: Some(self.sandbox_status(sandbox)),
            containers_statuses: self
                .store
                .containers_of(&sandbox.id)
                .iter()
                .map(|c| self.container_status_of(c))
                .collect(),
        };
        // No listener left is fine.
        let _ = self.events.0.send(Arc::new(event));
    }
}
