//! Which Services have to be looked at again when Services or pods change; the controllers of both kinds of endpoints ask so.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Pod, Service};
use orlop_api::meta::{Key, is_terminating};
use orlop_api::pod::{condition, is_finished};
use orlop_api::selector::Selector;
use orlop_client::{Change, Outcome, Queue};

use crate::runtime::{Builders, Context, ReconcileError, Result};

/// Keys of Services to reconcile. Pods are queued apart, by namespace and labels: which Services select them is looked up
/// once for a burst of changes, outside of the informer's handler.
pub(crate) struct ServiceQueue {
    services: Queue<Key>,
    pods: Queue<(String, BTreeMap<String, String>)>,
}

impl ServiceQueue {
    pub fn new(b: &mut Builders) -> ServiceQueue {
        let (services, pods) = (Queue::default(), Queue::default());
        let q = services.clone();
        b.services.add_handler(move |c: &Change<Service>| q.add(Key::of(&c.object().metadata)));
        let q = pods.clone();
        b.pods.add_handler(move |c: &Change<Pod>| {
            let tell = |p: &Pod| {
                let m = &p.metadata;
                q.add((m.namespace.clone().unwrap_or_default(), m.labels.clone().unwrap_or_default()));
            };
            match c {
                Change::Updated { old, new } if relevant(old) == relevant(new) => {}
                Change::Updated { old, new } => {
                    if old.metadata.labels != new.metadata.labels {
                        tell(old);
                    }
                    tell(new);
                }
                Change::Added(p) | Change::Deleted(p) => tell(p),
            }
        });
        ServiceQueue { services, pods }
    }

    /// For handlers of what else concerns a Service.
    pub fn services(&self) -> Queue<Key> {
        self.services.clone()
    }

    /// Starts the workers, named `name` and, for pods, `pods_name`.
    pub fn start<F, Fut>(self, context: &Context, name: &'static str, pods_name: &'static str, reconcile: F)
    where
        F: Fn(Context, Key) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = Result> + Send,
    {
        let ctx = context.clone();
        self.services.run(&context.tasks, name, 4, move |k| reconcile(ctx.clone(), k));
        let (informers, services) = (context.informers.clone(), self.services);
        self.pods.run(&context.tasks, pods_name, 1, move |(namespace, labels)| {
            for s in informers.services.list_namespace(&namespace) {
                if selector_of(&s).is_some_and(|sel| sel.matches(&labels)) {
                    services.add(Key::of(&s.metadata));
                }
            }
            async { Ok::<_, ReconcileError>(Outcome::Done) }
        });
    }
}

/// What of a pod can change its endpoints.
#[derive(PartialEq)]
struct Relevant<'a> {
    labels: Option<&'a BTreeMap<String, String>>,
    ips: Vec<&'a str>,
    ready: bool,
    terminating: bool,
    finished: bool,
    node: Option<&'a str>,
    hostname: Option<&'a str>,
}

fn relevant(p: &Pod) -> Relevant<'_> {
    let spec = p.spec.as_ref();
    Relevant {
        labels: p.metadata.labels.as_ref(),
        ips: p.status.iter().flat_map(|s| s.pod_ips.iter().flatten()).map(|ip| ip.ip.as_str()).collect(),
        ready: condition(p, "Ready") == Some("True"),
        terminating: is_terminating(&p.metadata),
        finished: is_finished(p),
        node: spec.and_then(|s| s.node_name.as_deref()),
        hostname: spec.and_then(|s| s.hostname.as_deref()),
    }
}

/// `None` for Services whose endpoints are somebody else's business.
pub(crate) fn selector_of(s: &Service) -> Option<Selector> {
    let spec = s.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    spec.selector.as_ref().filter(|m| !m.is_empty()).map(Selector::from_map)
}
