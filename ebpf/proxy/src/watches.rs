//! Services and EndpointSlices as the API server sends them, read and brought into the model's form beside the task that owns the
//! model: there are ten thousands of them.

use std::time::SystemTime;

use futures::{Stream, StreamExt};
use kube::Api;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch};
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::sync::watch as latest;
use tokio::task::JoinSet;

use crate::convert;
use crate::model::{Service, Slice};
use crate::objects;

/// Events that are handed over at once, and how many such hands may wait: enough to read on while the last ones are applied.
const BATCH: usize = 256;
const WAITING: usize = 4;

/// An object in the model's form.
pub struct Object<T> {
    /// `namespace/name`.
    pub name: String,
    /// `None`: none of our business.
    pub value: Option<T>,
    /// When endpoints changed, as their controller noted it.
    pub trigger: Option<SystemTime>,
}

/// Some events, as the watcher gave them.
pub type Batch<T> = Vec<Result<Event<Object<T>>, watcher::Error>>;

/// This node's topology.kubernetes.io/zone (empty for none), which endpoints are read with in mind; `None` until it is known.
pub type Zone = latest::Receiver<Option<String>>;

fn filter() -> watcher::Config {
    watcher::Config::default().labels(convert::SELECTOR)
}

/// Ends with `tasks`.
pub fn services(client: &kube::Client, tasks: &mut JoinSet<()>) -> Receiver<Batch<Service>> {
    let (to, batches) = mpsc::channel(WAITING);
    let events = watch(Api::all(client.clone()), filter()).default_backoff();
    tasks.spawn(async move {
        let read = |s: objects::Service| Object {
            name: convert::name(&s.metadata),
            value: convert::service(&s),
            trigger: None,
        };
        let mut events = std::pin::pin!(events.ready_chunks(BATCH));
        while let Some(batch) = events.next().await {
            if to.send(batch.into_iter().map(|e| e.map(|e| converted(e, read))).collect()).await.is_err() {
                return;
            }
        }
    });
    batches
}

/// Ends with `tasks`.
pub fn slices(
    client: &kube::Client,
    node: String,
    zone: Zone,
    tasks: &mut JoinSet<()>,
) -> Receiver<Batch<Slice>> {
    let (to, batches) = mpsc::channel(WAITING);
    let client = client.clone();
    let events = move || watch(Api::all(client.clone()), filter()).default_backoff();
    tasks.spawn(async move { follow_slices(events, &node, zone, to).await.unwrap_or_default() });
    batches
}

/// Reads all anew when the zone changes; `None` when nobody listens any more.
async fn follow_slices<S>(
    watch: impl Fn() -> S,
    node: &str,
    mut zone: Zone,
    to: Sender<Batch<Slice>>,
) -> Option<()>
where
    S: Stream<Item = Result<Event<objects::EndpointSlice>, watcher::Error>>,
{
    loop {
        let mut events = std::pin::pin!(watch().ready_chunks(BATCH));
        // A part of the list may come before the zone is known.
        let mut early = Vec::new();
        let here = loop {
            tokio::select! {
                biased;
                known = another(&mut zone, None) => break known?,
                batch = events.next(), if early.len() < WAITING => early.push(batch?),
            }
        };
        let read = |s: objects::EndpointSlice| Object {
            name: convert::name(&s.metadata),
            value: convert::slice(&s, node, &here),
            trigger: convert::trigger_time(&s),
        };
        let read = |batch: Vec<Result<_, _>>| {
            batch.into_iter().map(|e| e.map(|e| converted(e, read))).collect::<Batch<Slice>>()
        };
        for batch in early {
            to.send(read(batch)).await.ok()?;
        }
        loop {
            tokio::select! {
                batch = events.next() => to.send(read(batch?)).await.ok()?,
                other = another(&mut zone, Some(&here)) => {
                    other?;
                    break;
                }
            }
        }
    }
}

/// The zone as soon as it is known and not `this` one. Cancel-safe.
async fn another(zone: &mut Zone, this: Option<&str>) -> Option<String> {
    zone.wait_for(|z| z.is_some() && z.as_deref() != this).await.ok()?.clone()
}

fn converted<K, T>(event: Event<K>, read: impl FnOnce(K) -> Object<T>) -> Event<Object<T>> {
    match event {
        Event::Init => Event::Init,
        Event::InitApply(o) => Event::InitApply(read(o)),
        Event::InitDone => Event::InitDone,
        Event::Apply(o) => Event::Apply(read(o)),
        Event::Delete(o) => Event::Delete(read(o)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Hint;
    use serde_json::json;

    fn slice() -> objects::EndpointSlice {
        serde_json::from_value(json!({
            "metadata": {"name": "s-1", "namespace": "n", "labels": {"kubernetes.io/service-name": "s"}},
            "addressType": "IPv4", "ports": [{"port": 80}],
            "endpoints": [{"addresses": ["10.0.0.1"], "hints": {"forZones": [{"name": "b"}]}}],
        }))
        .unwrap()
    }

    /// What a batch says: beginnings of lists, and the zone hint of each slice.
    fn said(batch: Batch<Slice>) -> Vec<String> {
        let one = |e: Result<Event<Object<Slice>>, _>| match e {
            Ok(Event::Init) => "list".to_owned(),
            Ok(Event::InitApply(o)) => format!("{:?}", o.value.unwrap().endpoints[0].hints.zone),
            Ok(Event::InitDone) => "done".to_owned(),
            other => panic!("{:?}", other.map(|_| ()).map_err(|e: watcher::Error| e.to_string())),
        };
        batch.into_iter().map(one).collect()
    }

    #[tokio::test]
    async fn slices_wait_for_the_zone_and_are_read_again_with_another() {
        let watch = || {
            let list = [Event::Init, Event::InitApply(slice()), Event::InitDone].map(Ok);
            futures::stream::iter(list).chain(futures::stream::pending())
        };
        let (tell, zone) = latest::channel(None);
        let (to, mut batches) = mpsc::channel(WAITING);
        let task = tokio::spawn(async move { follow_slices(watch, "me", zone, to).await });
        tokio::task::yield_now().await;
        assert!(batches.try_recv().is_err(), "nobody knows yet whom endpoints are meant for");
        for (zone, hint) in [("a", Hint::Others), ("b", Hint::Ours), ("", Hint::Others)] {
            tell.send_replace(Some(zone.to_owned()));
            let batch = said(batches.recv().await.unwrap());
            assert_eq!(batch, ["list".to_owned(), format!("{hint:?}"), "done".to_owned()]);
        }
        drop((tell, batches));
        assert!(task.await.unwrap().is_none());
    }
}
