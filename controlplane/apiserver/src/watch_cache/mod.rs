//! Watch caches: the present objects of a resource, a bounded history of its changes, and those who watch it.
//!
//! One task follows the whole store and hands each change to the cache of its resource. A cache exists only for resources
//! that somebody watches; it is made by the first watch, at the revision which that watch asks for, so no change is missed.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use orlop_base::supervise::TaskGroup;
use orlop_store::{Error as StoreError, Event, Range, Revision, Store, WatchItem};
use parking_lot::{Mutex, RwLock};
use tokio::sync::{mpsc, watch};

use crate::{
    registry::object::{EventType, Object},
    resources::Resource,
    status::Status,
};

mod selection;

pub use selection::Selection;

/// Key prefix of everything.
pub const ROOT: &str = "/registry/";
/// Changes that a watcher may be behind before it is cut off; it then watches again from where it was.
const WATCHER_QUEUE: usize = 1024;
/// Bounds of a cache's history.
const HISTORY_CHANGES: usize = 2048;
const HISTORY_BYTES: usize = 2 << 20;
/// How long a request waits for the caches to reach a revision that is committed.
const FRESH_TIMEOUT: Duration = Duration::from_secs(3);

/// The storage key of an object.
pub fn key_of(storage: &str, namespace: &str, name: &str) -> String {
    if namespace.is_empty() {
        format!("{ROOT}{storage}/{name}")
    } else {
        format!("{ROOT}{storage}/{namespace}/{name}")
    }
}

/// The prefix of the keys of a resource, in one namespace or in all.
pub fn prefix_of(storage: &str, namespace: &str) -> String {
    if namespace.is_empty() { format!("{ROOT}{storage}/") } else { format!("{ROOT}{storage}/{namespace}/") }
}

/// The storage name in a key: its first two segments after the root.
fn storage_of(key: &str) -> Option<&str> {
    let rest = key.strip_prefix(ROOT)?;
    let first = rest.find('/')?;
    let second = rest[first + 1..].find('/')?;
    Some(&rest[..first + 1 + second])
}

/// One change of one object.
#[derive(Debug)]
pub struct Change {
    /// Its revision.
    pub revision: Revision,
    /// The object after it; when it was deleted, its last state at the revision of the deletion.
    pub object: Arc<Object>,
    /// The object before it.
    pub previous: Option<Arc<Object>>,
    /// Whether the object was deleted.
    pub deleted: bool,
}

impl Change {
    /// How a watcher with this selection sees the change, if it does.
    pub fn seen_by(&self, resource: &Resource, selection: &Selection) -> Option<EventType> {
        let before = self.previous.as_ref().is_some_and(|o| selection.matches(resource, o));
        let after = !self.deleted && selection.matches(resource, &self.object);
        match (before, after) {
            (false, true) => Some(EventType::Added),
            (true, true) => Some(EventType::Modified),
            (true, false) => Some(EventType::Deleted),
            (false, false) => None,
        }
    }
}

/// What a watcher receives.
#[derive(Clone, Debug)]
pub struct Seen {
    /// How it sees the change.
    pub event: EventType,
    /// The object to show.
    pub object: Arc<Object>,
}

struct Watcher {
    selection: Selection,
    resource: Arc<Resource>,
    queue: mpsc::Sender<Seen>,
}

/// The cache of one stored resource.
pub struct Cache {
    resource: Arc<Resource>,
    state: Mutex<State>,
    /// Revision of the latest change of the resource.
    changed: watch::Sender<Revision>,
}

struct State {
    objects: BTreeMap<Arc<str>, Arc<Object>>,
    /// Changes after this revision are in `history`.
    since: Revision,
    history: VecDeque<Arc<Change>>,
    history_bytes: usize,
    /// Changes up to here have been applied.
    applied: Revision,
    watchers: HashMap<u64, Watcher>,
    next_id: u64,
    closed: bool,
}

/// A running watch on a cache. Dropping it unregisters the watcher.
pub struct Watching {
    /// What is to be sent before anything live.
    pub backlog: Vec<Seen>,
    /// Live changes; closed when the watcher was too slow or the cache was rebuilt.
    pub live: mpsc::Receiver<Seen>,
    /// Everything up to here is in the backlog.
    pub revision: Revision,
    cache: Arc<Cache>,
    id: u64,
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.cache.state.lock().watchers.remove(&self.id);
    }
}

/// Where a watch begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// With the present objects as ADDED events.
    State,
    /// After this revision.
    After(Revision),
}

impl Cache {
    fn new(resource: Arc<Resource>, revision: Revision) -> Cache {
        let state = State {
            objects: BTreeMap::new(),
            since: revision,
            history: VecDeque::new(),
            history_bytes: 0,
            applied: revision,
            watchers: HashMap::new(),
            next_id: 0,
            closed: false,
        };
        Cache { resource, state: Mutex::new(state), changed: watch::channel(revision).0 }
    }

    fn apply(&self, event: &Event) -> Result<(), Status> {
        let mut state = self.state.lock();
        if event.revision <= state.applied {
            return Ok(());
        }
        state.applied = event.revision;
        let previous = state.objects.get(&event.key).cloned();
        let change = match (&event.value, previous) {
            (Some(value), previous) => {
                let kind = if previous.is_some() { EventType::Modified } else { EventType::Added };
                let object = Arc::new(Object::from_stored(value, event.revision, kind)?);
                state.objects.insert(event.key.clone(), object.clone());
                Change { revision: event.revision, object, previous, deleted: false }
            }
            (None, Some(previous)) => {
                state.objects.remove(&event.key);
                let object = Arc::new(previous.at_revision(event.revision, EventType::Deleted)?);
                Change { revision: event.revision, object, previous: Some(previous), deleted: true }
            }
            (None, None) => return Ok(()),
        };
        state.publish(Arc::new(change));
        drop(state);
        self.changed.send_replace(event.revision);
        Ok(())
    }

    /// Registers a watcher. `resource` is the version that the watcher speaks (selectors and conversion).
    /// `floor` is the revision that all caches had reached before this call.
    fn watch(
        self: &Arc<Self>,
        resource: Arc<Resource>,
        selection: Selection,
        start: Start,
        floor: Revision,
    ) -> Result<Watching, Status> {
        let mut state = self.state.lock();
        if state.closed {
            return Err(Status::unavailable("the watch cache is being rebuilt"));
        }
        let backlog = match start {
            Start::State => state
                .objects
                .values()
                .filter(|o| selection.matches(&resource, o))
                .map(|o| Seen { event: EventType::Added, object: o.clone() })
                .collect(),
            Start::After(revision) => {
                if revision < state.since {
                    return Err(too_old(revision, state.since));
                }
                let later = state.history.iter().filter(|c| c.revision > revision);
                later
                    .filter_map(|c| {
                        Some(Seen { event: c.seen_by(&resource, &selection)?, object: c.object.clone() })
                    })
                    .collect()
            }
        };
        let (queue, live) = mpsc::channel(WATCHER_QUEUE);
        let id = state.next_id;
        state.next_id += 1;
        state.watchers.insert(id, Watcher { selection, resource, queue });
        let revision = state.applied.max(floor);
        drop(state);
        Ok(Watching { backlog, live, revision, cache: self.clone(), id })
    }

    /// The selected objects in key order, and the revision that they show. `floor` is the revision that all caches had
    /// reached before this call.
    pub fn list(
        &self,
        resource: &Resource,
        selection: &Selection,
        floor: Revision,
    ) -> (Vec<Arc<Object>>, Revision) {
        let state = self.state.lock();
        let found = if selection.namespace.is_empty() {
            state.objects.values().filter(|o| selection.matches(resource, o)).cloned().collect()
        } else {
            let prefix: Arc<str> = prefix_of(&self.resource.storage, &selection.namespace).into();
            let range = state.objects.range(prefix.clone()..).take_while(|(k, _)| k.starts_with(&*prefix));
            range.map(|(_, o)| o).filter(|o| selection.matches(resource, o)).cloned().collect()
        };
        (found, state.applied.max(floor))
    }

    /// Revision of the latest change.
    pub fn changes(&self) -> watch::Receiver<Revision> {
        self.changed.subscribe()
    }

    fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.watchers.clear();
    }
}

impl State {
    fn publish(&mut self, change: Arc<Change>) {
        self.watchers.retain(|_, watcher| {
            let Some(event) = change.seen_by(&watcher.resource, &watcher.selection) else { return true };
            // A full queue means a client that does not read: it is cut off and resumes from its last revision.
            watcher.queue.try_send(Seen { event, object: change.object.clone() }).is_ok()
        });
        self.history_bytes += change.object.weight();
        self.history.push_back(change);
        while self.history.len() > HISTORY_CHANGES || self.history_bytes > HISTORY_BYTES {
            let Some(old) = self.history.pop_front() else { break };
            self.history_bytes = self.history_bytes.saturating_sub(old.object.weight());
            self.since = old.revision;
        }
    }
}

fn too_old(requested: Revision, oldest: Revision) -> Status {
    Status::expired(format!("too old resource version: {requested} ({oldest})"))
}

/// All caches, and the task that feeds them.
pub struct Hub {
    store: Arc<dyn Store>,
    caches: RwLock<HashMap<Arc<str>, Arc<Cache>>>,
    /// Held while a cache is being made, so that the feeding task and the maker agree on where it begins.
    making: tokio::sync::Mutex<()>,
    applied: watch::Sender<Revision>,
    /// Revision of the change that was dispatched last; written while `caches` is read-locked.
    dispatched: AtomicU64,
}

impl Hub {
    /// Starts following the store.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn start(store: Arc<dyn Store>, tasks: &TaskGroup) -> Result<Arc<Hub>, Status> {
        let revision = store.current_revision().await.map_err(Status::internal)?;
        let hub = Arc::new(Hub {
            store,
            caches: RwLock::default(),
            making: tokio::sync::Mutex::new(()),
            applied: watch::channel(revision).0,
            dispatched: AtomicU64::new(revision),
        });
        let feeder = hub.clone();
        let stop = tasks.stop_token();
        tasks.spawn_essential("watch-cache", async move {
            tokio::select! {
                // Cancelling drops the watch and nothing else.
                () = stop.cancelled() => Ok(()),
                ended = feeder.feed(revision) => ended,
            }
        });
        Ok(hub)
    }

    async fn feed(&self, mut done: Revision) -> Result<(), StoreError> {
        loop {
            match self.follow(&mut done).await {
                Err(StoreError::Compacted { .. }) => {
                    // Fell behind the store's history: everyone starts over from a list.
                    tracing::warn!("the watch caches fell behind the store's history and start over");
                    let all: Vec<Arc<Cache>> = self.caches.write().drain().map(|(_, c)| c).collect();
                    all.iter().for_each(|c| c.close());
                    done = self.store.current_revision().await?;
                    self.applied.send_replace(done);
                }
                Err(e) => return Err(e),
                Ok(()) => return Err(StoreError::Stopped),
            }
        }
    }

    async fn follow(&self, done: &mut Revision) -> Result<(), StoreError> {
        let mut watch = self.store.watch(ROOT, *done).await?;
        while let Some(item) = watch.items.recv().await {
            match item? {
                WatchItem::Events(events) => {
                    for event in &events {
                        self.dispatch(event);
                        *done = event.revision;
                    }
                    self.applied.send_replace(*done);
                }
                WatchItem::Progress(revision) => {
                    *done = revision.max(*done);
                    self.applied.send_replace(*done);
                }
            }
        }
        Ok(())
    }

    fn dispatch(&self, event: &Event) {
        let Some(storage) = storage_of(&event.key) else { return };
        let cache = {
            let caches = self.caches.read();
            self.dispatched.store(event.revision, Ordering::SeqCst);
            caches.get(storage).cloned()
        };
        if let Some(cache) = cache
            && let Err(e) = cache.apply(event)
        {
            tracing::error!(key = %event.key, error = %e, "cannot show a stored object");
        }
    }

    /// The revision that the caches have reached.
    pub fn applied(&self) -> Revision {
        *self.applied.borrow()
    }

    /// Follows the revision that the caches have reached.
    pub fn progress(&self) -> watch::Receiver<Revision> {
        self.applied.subscribe()
    }

    /// Waits until the caches show `revision`.
    ///
    /// # Errors
    /// 504 when that takes too long.
    pub async fn wait_for(&self, revision: Revision) -> Result<(), Status> {
        let mut applied = self.applied.subscribe();
        let reached = tokio::time::timeout(FRESH_TIMEOUT, applied.wait_for(|r| *r >= revision)).await;
        match reached {
            Ok(Ok(_)) => Ok(()),
            _ => Err(Status::too_large_resource_version(revision, self.applied())),
        }
    }

    /// The cache of a resource, if it is being watched.
    pub fn cache(&self, storage: &str) -> Option<Arc<Cache>> {
        self.caches.read().get(storage).cloned()
    }

    /// The cache of a resource, made when there is none. Its history reaches back to `from` when that is possible.
    ///
    /// # Errors
    /// When the store cannot be read; 410 when `from` is compacted.
    pub async fn activate(
        &self,
        resource: &Arc<Resource>,
        from: Option<Revision>,
    ) -> Result<Arc<Cache>, Status> {
        if let Some(cache) = self.cache(&resource.storage) {
            return Ok(cache);
        }
        let _making = self.making.lock().await;
        if let Some(cache) = self.cache(&resource.storage) {
            return Ok(cache);
        }
        let current = self.store.current_revision().await.map_err(Status::internal)?;
        let base = from.filter(|r| *r > 0 && *r < current).unwrap_or(current);
        let prefix = prefix_of(&resource.storage, "");
        let range = Range { prefix: prefix.clone(), revision: base, ..Range::default() };
        let page = self.store.list(&range).await.map_err(store_status)?;
        let cache = Arc::new(Cache::new(resource.clone(), base));
        {
            let mut state = cache.state.lock();
            for record in page.records {
                let object = Object::from_stored(&record.value, record.revision, EventType::Added)?;
                state.objects.insert(record.key, Arc::new(object));
            }
        }
        // Replays until it meets the feeding task; from the moment it is registered, that task feeds it as well, and
        // what both deliver is dropped by revision.
        let mut watch = self.store.watch(&prefix, base).await.map_err(store_status)?;
        let mut reached = base;
        while reached < current {
            reached = advance(&cache, &mut watch, reached).await?;
        }
        self.join(cache, watch, reached).await
    }

    /// Registers a cache that has reached a revision, and closes the gap to the feeding task.
    async fn join(
        &self,
        cache: Arc<Cache>,
        mut watch: orlop_store::Watch,
        mut reached: Revision,
    ) -> Result<Arc<Cache>, Status> {
        loop {
            {
                let mut caches = self.caches.write();
                // The feeding task raises `dispatched` and looks the cache up under one lock: when it has not passed
                // `reached` yet, it will find this cache for everything after it.
                if self.dispatched.load(Ordering::SeqCst) <= reached {
                    caches.insert(cache.resource.storage.clone(), cache.clone());
                    return Ok(cache);
                }
            }
            reached = advance(&cache, &mut watch, reached).await?;
        }
    }

    /// Starts a watch.
    ///
    /// # Errors
    /// 410 when `start` is too old.
    pub async fn watch(
        &self,
        resource: &Arc<Resource>,
        stored: &Arc<Resource>,
        selection: Selection,
        start: Start,
    ) -> Result<Watching, Status> {
        let from = match start {
            Start::After(revision) => Some(revision),
            Start::State => None,
        };
        let cache = self.activate(stored, from).await?;
        if start == Start::State {
            let current = self.store.current_revision().await.map_err(Status::internal)?;
            self.wait_for(current).await?;
        }
        match cache.watch(resource.clone(), selection.clone(), start, self.applied()) {
            // The history in memory is shorter than the store's: a watch that is older resumes from a second look at it.
            Err(e) if e.code == 410 => {
                self.watch_old(resource, &cache, selection, from.unwrap_or(0), e).await
            }
            other => other,
        }
    }

    /// Replays what the cache has forgotten from the store, then joins the cache.
    async fn watch_old(
        &self,
        resource: &Arc<Resource>,
        cache: &Arc<Cache>,
        selection: Selection,
        from: Revision,
        too_old: Status,
    ) -> Result<Watching, Status> {
        if from == 0 || from < self.store.compacted_revision().await.map_err(Status::internal)? {
            return Err(too_old);
        }
        let prefix = prefix_of(&cache.resource.storage, "");
        let range = Range { prefix: prefix.clone(), revision: from, ..Range::default() };
        let page = self.store.list(&range).await.map_err(store_status)?;
        let replay = Arc::new(Cache::new(cache.resource.clone(), from));
        {
            let mut state = replay.state.lock();
            for record in page.records {
                let object = Object::from_stored(&record.value, record.revision, EventType::Added)?;
                state.objects.insert(record.key, Arc::new(object));
            }
        }
        let mut backlog = replay.watch(resource.clone(), selection.clone(), Start::After(from), from)?;
        let mut watch = self.store.watch(&prefix, from).await.map_err(store_status)?;
        let mut old: Vec<Seen> = Vec::new();
        loop {
            match watch.items.recv().await {
                Some(Ok(WatchItem::Events(events))) => {
                    for event in &events {
                        replay.apply(event)?;
                        while let Ok(seen) = backlog.live.try_recv() {
                            old.push(seen);
                        }
                    }
                }
                Some(Ok(WatchItem::Progress(reached))) => {
                    let joined = cache.watch(
                        resource.clone(),
                        selection.clone(),
                        Start::After(reached),
                        self.applied(),
                    );
                    if let Ok(mut joined) = joined {
                        old.append(&mut joined.backlog);
                        joined.backlog = old;
                        return Ok(joined);
                    }
                }
                Some(Err(e)) => return Err(store_status(e)),
                None => return Err(Status::unavailable("the store is stopping")),
            }
        }
    }
}

/// Takes the next item of a watch into a cache; returns the revision that the cache has then reached.
async fn advance(
    cache: &Cache,
    watch: &mut orlop_store::Watch,
    reached: Revision,
) -> Result<Revision, Status> {
    match watch.items.recv().await {
        Some(Ok(WatchItem::Events(events))) => {
            let mut reached = reached;
            for event in &events {
                cache.apply(event)?;
                reached = event.revision;
            }
            Ok(reached)
        }
        Some(Ok(WatchItem::Progress(revision))) => Ok(reached.max(revision)),
        Some(Err(e)) => Err(store_status(e)),
        None => Err(Status::unavailable("the store is stopping")),
    }
}

/// A store error as a client sees it.
pub fn store_status(e: StoreError) -> Status {
    match e {
        StoreError::Compacted { requested, oldest } => too_old(requested, oldest),
        StoreError::Future { requested, current } => Status::too_large_resource_version(requested, current),
        StoreError::TooLarge { limit, .. } => Status::too_large(limit),
        StoreError::Stopped => Status::unavailable("the store is stopping"),
        other => Status::internal(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_name_their_resource() {
        assert_eq!(storage_of("/registry/core/pods/default/a"), Some("core/pods"));
        assert_eq!(storage_of("/registry/core/nodes/a"), Some("core/nodes"));
        assert_eq!(storage_of("/registry/core"), None);
        assert_eq!(key_of("core/pods", "default", "a"), "/registry/core/pods/default/a");
        assert_eq!(prefix_of("core/nodes", ""), "/registry/core/nodes/");
    }
}
