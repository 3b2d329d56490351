//! Keeps the tables in step with the API. Objects are reduced to what answers need and dropped at once.

use std::collections::HashSet;
use std::fmt::Debug;
use std::sync::Arc;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use orlop_base::supervise::{Ready, TaskGroup};
use serde::de::DeserializeOwned;

use crate::handler::Handler;
use crate::zone::{Slice, Spec, Zone};

/// How one kind of object goes into the tables.
trait Table: Resource + Clone + DeserializeOwned + Debug + Send + Sync + 'static {
    fn put(&self, zone: &mut Zone);
    fn remove(&self, zone: &mut Zone);
    /// Removes what is in the tables but not in `seen` (namespace and name).
    fn sweep(zone: &mut Zone, seen: &HashSet<(String, String)>);
}

impl Table for Namespace {
    fn put(&self, zone: &mut Zone) {
        zone.set_namespace(&self.name_any(), true);
    }

    fn remove(&self, zone: &mut Zone) {
        zone.set_namespace(&self.name_any(), false);
    }

    fn sweep(zone: &mut Zone, seen: &HashSet<(String, String)>) {
        for name in zone.namespaces() {
            if !seen.contains(&(String::new(), name.clone())) {
                zone.set_namespace(&name, false);
            }
        }
    }
}

impl Table for Service {
    fn put(&self, zone: &mut Zone) {
        zone.set_service(&self.namespace().unwrap_or_default(), &self.name_any(), Spec::of(self));
    }

    fn remove(&self, zone: &mut Zone) {
        zone.set_service(&self.namespace().unwrap_or_default(), &self.name_any(), None);
    }

    fn sweep(zone: &mut Zone, seen: &HashSet<(String, String)>) {
        for key in zone.services() {
            if !seen.contains(&key) {
                zone.set_service(&key.0, &key.1, None);
            }
        }
    }
}

impl Table for EndpointSlice {
    fn put(&self, zone: &mut Zone) {
        if let Some((service, slice)) = Slice::of(self) {
            let namespace = self.namespace().unwrap_or_default();
            zone.set_slice(&namespace, service, &self.name_any(), Some(slice));
        }
    }

    fn remove(&self, zone: &mut Zone) {
        if let Some((service, _)) = Slice::of(self) {
            zone.set_slice(&self.namespace().unwrap_or_default(), service, &self.name_any(), None);
        }
    }

    fn sweep(zone: &mut Zone, seen: &HashSet<(String, String)>) {
        for (namespace, service, name) in zone.slices() {
            if !seen.contains(&(namespace.clone(), name.clone())) {
                zone.set_slice(&namespace, &service, &name, None);
            }
        }
    }
}

/// Starts to follow all three kinds; `handler.synced` is set when each has been listed once.
pub fn start(client: &Client, handler: &Arc<Handler>, tasks: &TaskGroup) {
    let kinds = [Ready::default(), Ready::default(), Ready::default()];
    follow::<Namespace>(client, handler, kinds[0].clone(), tasks);
    follow::<Service>(client, handler, kinds[1].clone(), tasks);
    follow::<EndpointSlice>(client, handler, kinds[2].clone(), tasks);
    let (synced, stop) = (handler.synced.clone(), tasks.stop_token());
    tasks.spawn(async move {
        for kind in &kinds {
            tokio::select! {
                () = stop.cancelled() => return,
                () = kind.wait() => {}
            }
        }
        synced.set();
    });
}

fn follow<K>(client: &Client, handler: &Arc<Handler>, listed: Ready, tasks: &TaskGroup)
where
    K: Table,
    K::DynamicType: Default + Eq + std::hash::Hash + Clone + Send,
{
    let stream = watcher(Api::<K>::all(client.clone()), watcher::Config::default()).default_backoff();
    let (handler, stop) = (handler.clone(), tasks.stop_token());
    tasks.spawn_essential(&format!("watch of {}", K::kind(&K::DynamicType::default())), async move {
        let mut stream = std::pin::pin!(stream);
        let mut seen = HashSet::new();
        loop {
            // Cancel-safe: the loop ends when stopped.
            let event = tokio::select! {
                () = stop.cancelled() => return Ok::<(), &str>(()),
                e = stream.next() => e,
            };
            match event {
                Some(Ok(event)) => take::<K>(event, &handler, &mut seen, &listed),
                Some(Err(e)) => {
                    let kind = K::kind(&K::DynamicType::default()).into_owned();
                    // The tables stay as they are: old answers are better than none.
                    tracing::warn!(%kind, error = %orlop_base::telemetry::chain(&e), "watch broke, trying again");
                }
                None => return Err("the watch ended"),
            }
        }
    });
}

fn take<K: Table>(
    event: watcher::Event<K>,
    handler: &Handler,
    seen: &mut HashSet<(String, String)>,
    listed: &Ready,
) {
    match event {
        watcher::Event::Init => seen.clear(),
        watcher::Event::InitApply(o) => {
            seen.insert((o.namespace().unwrap_or_default(), o.name_any()));
            o.put(&mut handler.zone.write());
        }
        watcher::Event::Apply(o) => o.put(&mut handler.zone.write()),
        watcher::Event::Delete(o) => o.remove(&mut handler.zone.write()),
        watcher::Event::InitDone => {
            K::sweep(&mut handler.zone.write(), seen);
            // Only the next list needs it again.
            *seen = HashSet::new();
            listed.set();
        }
    }
}
