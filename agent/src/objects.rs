//! ConfigMaps and Secrets that pods of this node refer to: watched one by one, only as long as a pod needs them.

use std::collections::{HashMap, HashSet};
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::NamespaceResourceScope;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource};
use orlop_api::meta::Key;
use orlop_base::supervise::TaskGroup;
use orlop_client::Refusal;
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How long a pod waits for the first answer about an object.
const FIRST_ANSWER: Duration = Duration::from_secs(10);

/// The API server has not answered (or not allowed the watch) in time.
#[derive(Debug, Clone, thiserror::Error)]
#[error("failed to sync {kind} {key}: timed out waiting for the API server")]
pub struct NotSynced {
    kind: String,
    key: Key,
}

/// `None` before the first answer, `Some(None)` for an object that does not exist.
type Slot<K> = Option<Option<Arc<K>>>;

struct Entry<K> {
    value: watch::Receiver<Slot<K>>,
    users: HashSet<String>,
    stop: CancellationToken,
}

struct Shared<K> {
    client: Client,
    tasks: TaskGroup,
    entries: Mutex<HashMap<Key, Entry<K>>>,
    /// Called with the uid of each pod that uses a changed object.
    on_change: Box<dyn Fn(&str) + Send + Sync>,
}

/// Watched objects of one kind; cloning gives another handle.
pub struct Objects<K> {
    shared: Arc<Shared<K>>,
}

impl<K> Clone for Objects<K> {
    fn clone(&self) -> Self {
        Objects { shared: self.shared.clone() }
    }
}

impl<K> Objects<K>
where
    K: Resource<Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    K::DynamicType: Default + Eq + Hash + Clone,
{
    pub fn new(client: Client, tasks: TaskGroup, on_change: impl Fn(&str) + Send + Sync + 'static) -> Self {
        let on_change = Box::new(on_change);
        Objects { shared: Arc::new(Shared { client, tasks, entries: Mutex::default(), on_change }) }
    }

    /// The object, `None` if it does not exist; watched for the pod `uid` from now on.
    pub async fn get(&self, uid: &str, key: &Key) -> Result<Option<Arc<K>>, NotSynced> {
        let mut value = self.enter(uid, key);
        let found = tokio::time::timeout(FIRST_ANSWER, value.wait_for(Option::is_some)).await;
        let not_synced =
            || NotSynced { kind: K::kind(&K::DynamicType::default()).into_owned(), key: key.clone() };
        match found {
            Ok(Ok(v)) => Ok(v.clone().flatten()),
            _ => Err(not_synced()),
        }
    }

    fn enter(&self, uid: &str, key: &Key) -> watch::Receiver<Slot<K>> {
        let mut entries = self.shared.entries.lock();
        if let Some(e) = entries.get_mut(key) {
            e.users.insert(uid.to_owned());
            return e.value.clone();
        }
        let (send, value) = watch::channel(None);
        let stop = self.shared.tasks.stop_token().child_token();
        let entry =
            Entry { value: value.clone(), users: HashSet::from([uid.to_owned()]), stop: stop.clone() };
        entries.insert(key.clone(), entry);
        drop(entries);
        let (this, key) = (self.clone(), key.clone());
        self.shared.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = this.follow(key, send) => {}
            }
        });
        value
    }

    async fn follow(&self, key: Key, send: watch::Sender<Slot<K>>) {
        let api: Api<K> = Api::namespaced(self.shared.client.clone(), &key.namespace);
        let config = watcher::Config::default().fields(&format!("metadata.name={}", key.name));
        let mut stream = std::pin::pin!(watcher(api, config).default_backoff());
        let (mut listed, mut refusal) = (None, Refusal::default());
        while let Some(event) = stream.next().await {
            let new = match event {
                Ok(watcher::Event::Init) => {
                    listed = None;
                    continue;
                }
                Ok(watcher::Event::InitApply(o)) => {
                    listed = Some(Arc::new(o));
                    continue;
                }
                Ok(watcher::Event::InitDone) => {
                    refusal.answered();
                    listed.take()
                }
                Ok(watcher::Event::Apply(o)) => Some(Arc::new(o)),
                Ok(watcher::Event::Delete(_)) => None,
                Err(e) => {
                    if let Some(message) = refusal.begins(&e) {
                        tracing::warn!(
                            %key,
                            "the API server refuses the agent's user: {message}; pods that use the object wait"
                        );
                    }
                    tracing::debug!(%key, error = %orlop_base::telemetry::chain(&e), "watch broke, trying again");
                    continue;
                }
            };
            let first = send.borrow().is_none();
            let version = |o: &Option<Arc<K>>| o.as_ref().map(|o| o.meta().resource_version.clone());
            let same = send.borrow().as_ref().is_some_and(|old| version(old) == version(&new));
            send.send_replace(Some(new));
            if !first && !same {
                let users: Vec<String> =
                    self.shared.entries.lock().get(&key).into_iter().flat_map(|e| e.users.clone()).collect();
                users.iter().for_each(|u| (self.shared.on_change)(u));
            }
        }
    }

    /// The pod needs its objects no longer; watches without users end.
    pub fn leave(&self, uid: &str) {
        self.shared.entries.lock().retain(|_, e| {
            e.users.remove(uid);
            if e.users.is_empty() {
                e.stop.cancel();
            }
            !e.users.is_empty()
        });
    }
}
