//! A local copy of a set of objects, kept in step by list and watch, with handlers that see old and new.

use std::collections::{HashMap, HashSet};
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;

use futures::StreamExt;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Resource};
use orlop_api::meta::Key;
use orlop_base::supervise::{Ready, TaskGroup};
use parking_lot::RwLock;
use serde::de::DeserializeOwned;

/// What happened to one object.
#[derive(Clone, Debug)]
pub enum Change<K> {
    Added(Arc<K>),
    Updated { old: Arc<K>, new: Arc<K> },
    Deleted(Arc<K>),
}

impl<K> Change<K> {
    /// The latest known form of the object.
    pub fn object(&self) -> &Arc<K> {
        match self {
            Change::Added(o) | Change::Updated { new: o, .. } | Change::Deleted(o) => o,
        }
    }
}

type IndexFn<K> = Box<dyn Fn(&K) -> Vec<String> + Send + Sync>;
type Handler<K> = Box<dyn Fn(&Change<K>) + Send + Sync>;
type Trim<K> = Box<dyn Fn(&mut K) + Send + Sync>;

struct Index<K> {
    of: IndexFn<K>,
    keys: HashMap<String, HashSet<Key>>,
}

struct State<K> {
    objects: HashMap<Key, Arc<K>>,
    indexes: HashMap<&'static str, Index<K>>,
}

impl<K> State<K> {
    fn insert(&mut self, key: Key, object: Arc<K>) -> Option<Arc<K>> {
        let old = self.objects.insert(key.clone(), object.clone());
        for index in self.indexes.values_mut() {
            if let Some(old) = &old {
                index.forget(&key, old);
            }
            for v in (index.of)(&object) {
                index.keys.entry(v).or_default().insert(key.clone());
            }
        }
        old
    }

    fn remove(&mut self, key: &Key) -> Option<Arc<K>> {
        let old = self.objects.remove(key)?;
        for index in self.indexes.values_mut() {
            index.forget(key, &old);
        }
        Some(old)
    }
}

impl<K> Index<K> {
    fn forget(&mut self, key: &Key, object: &K) {
        for v in (self.of)(object) {
            if let Some(set) = self.keys.get_mut(&v) {
                set.remove(key);
                if set.is_empty() {
                    self.keys.remove(&v);
                }
            }
        }
    }
}

struct Shared<K> {
    state: RwLock<State<K>>,
    synced: Ready,
}

/// A handle to the local copy; cloning is cheap.
pub struct Informer<K> {
    shared: Arc<Shared<K>>,
}

impl<K> Clone for Informer<K> {
    fn clone(&self) -> Self {
        Informer { shared: self.shared.clone() }
    }
}

/// Sets an informer up: indexes, handlers and a trim function are fixed before it starts.
pub struct Builder<K: Resource> {
    api: Api<K>,
    config: watcher::Config,
    handlers: Vec<Handler<K>>,
    indexes: HashMap<&'static str, Index<K>>,
    trim: Trim<K>,
}

impl<K> Builder<K>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    K::DynamicType: Default + Eq + Hash + Clone,
{
    pub fn new(api: Api<K>) -> Self {
        Builder {
            api,
            config: watcher::Config::default(),
            handlers: Vec::new(),
            indexes: HashMap::new(),
            trim: Box::new(|_| {}),
        }
    }

    /// Restricts the set by label selector, in the query-string form.
    pub fn labels(mut self, selector: &str) -> Self {
        self.config = self.config.labels(selector);
        self
    }

    /// Restricts the set by field selector, in the query-string form.
    pub fn fields(mut self, selector: &str) -> Self {
        self.config = self.config.fields(selector);
        self
    }

    /// Called for each change after the local copy has it, in order, on the informer's task: it must be quick and not
    /// block (put a key into a [`crate::Queue`]).
    pub fn on_change(mut self, handler: impl Fn(&Change<K>) + Send + Sync + 'static) -> Self {
        self.add_handler(handler);
        self
    }

    /// [`Builder::on_change`] for a builder that several parts share.
    pub fn add_handler(&mut self, handler: impl Fn(&Change<K>) + Send + Sync + 'static) {
        self.handlers.push(Box::new(handler));
    }

    /// An index by what `of` says of an object.
    pub fn index(
        mut self,
        name: &'static str,
        of: impl Fn(&K) -> Vec<String> + Send + Sync + 'static,
    ) -> Self {
        self.indexes.insert(name, Index { of: Box::new(of), keys: HashMap::new() });
        self
    }

    /// Drops what nobody reads before an object is kept. managedFields are always dropped.
    pub fn trim(mut self, trim: impl Fn(&mut K) + Send + Sync + 'static) -> Self {
        self.trim = Box::new(trim);
        self
    }

    /// Starts list and watch as a task of `tasks`.
    pub fn start(self, tasks: &TaskGroup) -> Informer<K> {
        let shared = Arc::new(Shared {
            state: RwLock::new(State { objects: HashMap::new(), indexes: self.indexes }),
            synced: Ready::default(),
        });
        let informer = Informer { shared: shared.clone() };
        let stop = tasks.stop_token();
        let stream = watcher(self.api, self.config).default_backoff();
        let (handlers, trim) = (self.handlers, self.trim);
        tasks.spawn(async move {
            let mut sink = Sink { shared, handlers, trim, relist: None };
            let mut stream = std::pin::pin!(stream);
            loop {
                // Cancel-safe: `next` of a pinned stream loses nothing when dropped, and the loop ends anyway.
                let event = tokio::select! {
                    () = stop.cancelled() => return,
                    e = stream.next() => e,
                };
                match event {
                    Some(Ok(e)) => sink.take(e),
                    Some(Err(e)) => {
                        let kind = K::kind(&K::DynamicType::default()).into_owned();
                        tracing::warn!(%kind, error = %orlop_base::telemetry::chain(&e), "watch broke, trying again");
                    }
                    None => return,
                }
            }
        });
        informer
    }
}

struct Sink<K> {
    shared: Arc<Shared<K>>,
    handlers: Vec<Handler<K>>,
    trim: Trim<K>,
    /// Keys seen in the list that is coming in.
    relist: Option<HashSet<Key>>,
}

impl<K> Sink<K>
where
    K: Resource,
{
    fn take(&mut self, event: watcher::Event<K>) {
        match event {
            watcher::Event::Init => self.relist = Some(HashSet::new()),
            watcher::Event::InitApply(o) | watcher::Event::Apply(o) => self.put(o),
            watcher::Event::Delete(o) => self.delete(&Key::of(o.meta())),
            watcher::Event::InitDone => {
                if let Some(seen) = self.relist.take() {
                    let gone: Vec<Key> = {
                        let state = self.shared.state.read();
                        state.objects.keys().filter(|k| !seen.contains(k)).cloned().collect()
                    };
                    gone.iter().for_each(|k| self.delete(k));
                }
                self.shared.synced.set();
            }
        }
    }

    fn put(&mut self, mut object: K) {
        object.meta_mut().managed_fields = None;
        (self.trim)(&mut object);
        let key = Key::of(object.meta());
        if let Some(seen) = &mut self.relist {
            seen.insert(key.clone());
        }
        let new = Arc::new(object);
        let old = self.shared.state.write().insert(key, new.clone());
        let change = match old {
            None => Change::Added(new),
            // A relist brings unchanged objects again.
            Some(old) if old.meta().resource_version == new.meta().resource_version => return,
            Some(old) => Change::Updated { old, new },
        };
        self.handlers.iter().for_each(|h| h(&change));
    }

    fn delete(&mut self, key: &Key) {
        let old = self.shared.state.write().remove(key);
        if let Some(old) = old {
            let change = Change::Deleted(old);
            self.handlers.iter().for_each(|h| h(&change));
        }
    }
}

impl<K> Informer<K> {
    /// Returns once the first list is in.
    pub async fn synced(&self) {
        self.shared.synced.wait().await;
    }

    pub fn is_synced(&self) -> bool {
        self.shared.synced.is_set()
    }

    pub fn get(&self, key: &Key) -> Option<Arc<K>> {
        self.shared.state.read().objects.get(key).cloned()
    }

    /// All objects, in no order.
    pub fn list(&self) -> Vec<Arc<K>> {
        self.shared.state.read().objects.values().cloned().collect()
    }

    /// The objects of one namespace, in no order.
    pub fn list_namespace(&self, namespace: &str) -> Vec<Arc<K>> {
        let state = self.shared.state.read();
        state.objects.iter().filter(|(k, _)| k.namespace == namespace).map(|(_, o)| o.clone()).collect()
    }

    /// The objects that an index files under `value`; none for an index that was not declared.
    pub fn by_index(&self, index: &str, value: &str) -> Vec<Arc<K>> {
        let state = self.shared.state.read();
        let keys = state.indexes.get(index).and_then(|i| i.keys.get(value));
        keys.into_iter().flatten().filter_map(|k| state.objects.get(k).cloned()).collect()
    }

    pub fn len(&self) -> usize {
        self.shared.state.read().objects.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ConfigMap;

    fn cm(name: &str, rv: &str) -> ConfigMap {
        let mut o = ConfigMap::default();
        o.metadata.namespace = Some("n".into());
        o.metadata.name = Some(name.into());
        o.metadata.resource_version = Some(rv.into());
        o
    }

    #[test]
    fn a_relist_deletes_what_is_gone_and_keeps_quiet_about_what_is_unchanged() {
        let mut indexes = HashMap::new();
        let of: IndexFn<ConfigMap> = Box::new(|c| c.metadata.resource_version.clone().into_iter().collect());
        indexes.insert("rv", Index { of, keys: HashMap::new() });
        let shared = Arc::new(Shared {
            state: RwLock::new(State { objects: HashMap::new(), indexes }),
            synced: Ready::default(),
        });
        let log = Arc::new(parking_lot::Mutex::new(Vec::new()));
        let seen = log.clone();
        let handler: Handler<ConfigMap> = Box::new(move |c| {
            let kind = match c {
                Change::Added(_) => "+",
                Change::Updated { .. } => "~",
                Change::Deleted(_) => "-",
            };
            seen.lock().push(format!("{kind}{}", Key::of(&c.object().metadata).name));
        });
        let mut sink =
            Sink { shared: shared.clone(), handlers: vec![handler], trim: Box::new(|_| {}), relist: None };
        use watcher::Event::*;
        for e in [Init, InitApply(cm("a", "1")), InitApply(cm("b", "2")), InitDone] {
            sink.take(e);
        }
        for e in [Init, InitApply(cm("a", "1")), InitDone, Apply(cm("a", "3")), Apply(cm("c", "4"))] {
            sink.take(e);
        }
        assert_eq!(*log.lock(), ["+a", "+b", "-b", "~a", "+c"]);
        let informer = Informer { shared };
        assert!(informer.is_synced());
        assert_eq!(informer.by_index("rv", "3").len(), 1);
        assert!(informer.by_index("rv", "1").is_empty());
        assert_eq!(informer.len(), 2);
    }
}
