//! Events as `kubectl describe` shows them: repeated ones counted on one object, floods dropped, never in the way of the work.

use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource};
use orlop_base::supervise::TaskGroup;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Events waiting to be sent. A burst beyond this is dropped: events inform, they do not steer.
const QUEUE: usize = 512;
/// Distinct (object, reason, message) triples whose counts are remembered.
const REMEMBERED: usize = 1024;
/// Per object: upstream's spam filter allows a burst of 25, then one every 5 minutes.
const BURST: f64 = 25.0;
const REFILL: Duration = Duration::from_secs(300);

#[derive(Debug)]
struct Item {
    about: ObjectReference,
    kind: &'static str,
    reason: String,
    message: String,
}

/// Records events for one component; cloning is cheap.
#[derive(Clone)]
pub struct Recorder {
    send: mpsc::Sender<Item>,
}

/// A reference to a typed object.
pub fn reference<K>(object: &K) -> ObjectReference
where
    K: Resource<DynamicType = ()>,
{
    let m = object.meta();
    ObjectReference {
        api_version: Some(K::api_version(&()).into_owned()),
        kind: Some(K::kind(&()).into_owned()),
        namespace: m.namespace.clone(),
        name: m.name.clone(),
        uid: m.uid.clone(),
        resource_version: m.resource_version.clone(),
        ..Default::default()
    }
}

impl Recorder {
    /// Sends as a task of `tasks`. `component` and `host` become the event's source.
    pub fn start(client: Client, component: &str, host: &str, tasks: &TaskGroup) -> Recorder {
        let (send, receive) = mpsc::channel(QUEUE);
        let stop = tasks.stop_token();
        let sender = Sender {
            client,
            component: component.into(),
            host: host.into(),
            known: HashMap::new(),
            budget: HashMap::new(),
        };
        tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = sender.run(receive) => {}
            }
        });
        Recorder { send }
    }

    /// Something that went as it should.
    pub fn normal(&self, about: ObjectReference, reason: &str, message: impl Into<String>) {
        self.record(about, "Normal", reason, message.into());
    }

    /// Something that somebody may have to look at.
    pub fn warning(&self, about: ObjectReference, reason: &str, message: impl Into<String>) {
        self.record(about, "Warning", reason, message.into());
    }

    fn record(&self, about: ObjectReference, kind: &'static str, reason: &str, mut message: String) {
        // The API refuses notes longer than 1,024 bytes.
        if message.len() > 1024 {
            let cut = (0..=1021).rev().find(|i| message.is_char_boundary(*i)).unwrap_or(0);
            message.truncate(cut);
            message.push_str("...");
        }
        if self.send.try_send(Item { about, kind, reason: reason.to_owned(), message }).is_err() {
            tracing::debug!(reason, "event dropped: too many are waiting");
        }
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Same {
    uid: String,
    name: String,
    reason: String,
    message: String,
}

struct Known {
    name: String,
    count: i32,
    last: Instant,
}

struct Sender {
    client: Client,
    component: String,
    host: String,
    known: HashMap<Same, Known>,
    budget: HashMap<String, (f64, Instant)>,
}

fn within_budget(slot: &mut (f64, Instant), now: Instant) -> bool {
    let refill = (now - slot.1).as_secs_f64() / REFILL.as_secs_f64();
    *slot = ((slot.0 + refill).min(BURST), now);
    if slot.0 < 1.0 {
        return false;
    }
    slot.0 -= 1.0;
    true
}

impl Sender {
    async fn run(mut self, mut receive: mpsc::Receiver<Item>) {
        while let Some(item) = receive.recv().await {
            let now = Instant::now();
            let subject = format!(
                "{}/{}",
                item.about.namespace.as_deref().unwrap_or_default(),
                item.about.uid.as_deref().or(item.about.name.as_deref()).unwrap_or_default()
            );
            if !within_budget(self.budget.entry(subject).or_insert((BURST, now)), now) {
                continue;
            }
            self.shrink(now);
            if let Err(e) = self.send(item, now).await {
                tracing::debug!(error = %e, "event not recorded");
            }
        }
    }

    fn shrink(&mut self, now: Instant) {
        if self.known.len() > REMEMBERED {
            self.known.retain(|_, k| now - k.last < Duration::from_secs(600));
            if self.known.len() > REMEMBERED {
                self.known.clear();
            }
        }
        if self.budget.len() > REMEMBERED {
            self.budget.retain(|_, slot| now - slot.1 < REFILL);
        }
    }

    async fn send(&mut self, item: Item, now: Instant) -> Result<(), kube::Error> {
        let namespace = item.about.namespace.clone().unwrap_or_else(|| "default".into());
        let api: Api<Event> = Api::namespaced(self.client.clone(), &namespace);
        let same = Same {
            uid: item.about.uid.clone().unwrap_or_default(),
            name: item.about.name.clone().unwrap_or_default(),
            reason: item.reason.clone(),
            message: item.message.clone(),
        };
        let stamp = Time(Timestamp::now());
        if let Some(k) = self.known.get_mut(&same) {
            k.count += 1;
            k.last = now;
            let patch = serde_json::json!({"count": k.count, "lastTimestamp": stamp});
            match api.patch(&k.name, &PatchParams::default(), &Patch::Merge(&patch)).await {
                Ok(_) => return Ok(()),
                // It has expired meanwhile: record a new one.
                Err(kube::Error::Api(s)) if s.code == 404 => {}
                Err(e) => return Err(e),
            }
        }
        let base = item.about.name.clone().unwrap_or_default();
        let name = format!("{base}.{:x}", Timestamp::now().as_nanosecond());
        let event = Event {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                namespace: Some(namespace),
                ..Default::default()
            },
            involved_object: item.about,
            type_: Some(item.kind.into()),
            reason: Some(item.reason),
            message: Some(item.message),
            source: Some(EventSource {
                component: Some(self.component.clone()),
                host: non_empty(&self.host),
            }),
            reporting_component: Some(self.component.clone()),
            reporting_instance: non_empty(&self.host),
            first_timestamp: Some(stamp.clone()),
            last_timestamp: Some(stamp),
            count: Some(1),
            ..Default::default()
        };
        api.create(&PostParams::default(), &event).await?;
        self.known.insert(same, Known { name, count: 1, last: now });
        Ok(())
    }
}

fn non_empty(s: &str) -> Option<String> {
    (!s.is_empty()).then(|| s.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flood_about_one_object_is_cut() {
        let start = Instant::now();
        let mut slot = (BURST, start);
        assert_eq!((0..100).filter(|_| within_budget(&mut slot, start)).count(), 25);
        assert!(within_budget(&mut slot, start + REFILL));
    }
}
