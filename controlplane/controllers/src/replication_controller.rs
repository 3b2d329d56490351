//! Keeps as many pods of a ReplicationController as it asks for: the ReplicaSet controller over the older kind.

use k8s_openapi::api::apps::v1::{ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::{
    PodTemplateSpec, ReplicationController, ReplicationControllerCondition, ReplicationControllerStatus,
};
use orlop_api::selector::Selector;
use orlop_client::informer::{Builder, Informer};

use crate::replicaset::Replicas;
use crate::runtime::{Builders, Informers};

impl Replicas for ReplicationController {
    const NAME: &'static str = "replicationcontroller";
    const ORPHANS: &'static str = "replicationcontroller orphans";

    fn builder(b: &mut Builders) -> &mut Builder<Self> {
        &mut b.replicationcontrollers
    }

    fn informer(i: &Informers) -> &Informer<Self> {
        &i.replicationcontrollers
    }

    fn wish(&self) -> (i32, i32) {
        let spec = self.spec.as_ref();
        (spec.and_then(|s| s.replicas).unwrap_or(1), spec.and_then(|s| s.min_ready_seconds).unwrap_or(0))
    }

    fn selector(&self) -> Option<Selector> {
        let labels = self.spec.as_ref()?.selector.as_ref()?;
        (!labels.is_empty()).then(|| Selector::from_map(labels))
    }

    fn template(&self) -> Option<&PodTemplateSpec> {
        self.spec.as_ref()?.template.as_ref()
    }

    fn status(&self) -> Option<ReplicaSetStatus> {
        let s = self.status.clone()?;
        Some(ReplicaSetStatus {
            replicas: s.replicas,
            fully_labeled_replicas: s.fully_labeled_replicas,
            ready_replicas: s.ready_replicas,
            available_replicas: s.available_replicas,
            // This kind does not count them.
            terminating_replicas: None,
            observed_generation: s.observed_generation,
            conditions: s.conditions.map(|all| {
                all.into_iter()
                    .map(|c| ReplicaSetCondition {
                        type_: c.type_,
                        status: c.status,
                        reason: c.reason,
                        message: c.message,
                        last_transition_time: c.last_transition_time,
                    })
                    .collect()
            }),
        })
    }

    fn set_status(&mut self, s: ReplicaSetStatus) {
        self.status = Some(ReplicationControllerStatus {
            replicas: s.replicas,
            fully_labeled_replicas: s.fully_labeled_replicas,
            ready_replicas: s.ready_replicas,
            available_replicas: s.available_replicas,
            observed_generation: s.observed_generation,
            conditions: s.conditions.map(|all| {
                all.into_iter()
                    .map(|c| ReplicationControllerCondition {
                        type_: c.type_,
                        status: c.status,
                        reason: c.reason,
                        message: c.message,
                        last_transition_time: c.last_transition_time,
                    })
                    .collect()
            }),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_written_status_reads_back_so_that_nothing_is_written_twice() {
        let mut rc: ReplicationController = serde_json::from_value(json!({"metadata": {"name": "r"},
            "spec": {"replicas": 3, "minReadySeconds": 5, "selector": {"a": "b"}}}))
        .unwrap();
        assert_eq!(rc.wish(), (3, 5));
        assert!(rc.selector().is_some_and(|s| s.matches(&[("a".into(), "b".into())].into())));
        let status = ReplicaSetStatus {
            replicas: 2,
            ready_replicas: Some(1),
            observed_generation: Some(4),
            conditions: Some(vec![ReplicaSetCondition {
                type_: "ReplicaFailure".into(),
                ..Default::default()
            }]),
            ..Default::default()
        };
        rc.set_status(ReplicaSetStatus { terminating_replicas: Some(1), ..status.clone() });
        assert_eq!(rc.status(), Some(status));
        rc.spec.as_mut().unwrap().selector = Some(Default::default());
        assert!(rc.selector().is_none(), "an empty selector selects nothing");
    }
}
