//! One operation at a time for a container, as the specification asks; different containers in parallel; GC alone.

use std::collections::HashMap;
use std::sync::{Arc, Mutex as SyncMutex, Weak};

use tokio::sync::{Mutex, OwnedMutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

#[derive(Debug, Default)]
pub(crate) struct Locks {
    everything: RwLock<()>,
    by_container: SyncMutex<HashMap<String, Weak<Mutex<()>>>>,
}

/// Held during an operation on one container.
pub(crate) struct One<'a> {
    _container: OwnedMutexGuard<()>,
    _everything: RwLockReadGuard<'a, ()>,
}

impl Locks {
    pub(crate) async fn one(&self, container_id: &str) -> One<'_> {
        let everything = self.everything.read().await;
        let lock = {
            let mut map = self.by_container.lock().unwrap_or_else(|e| e.into_inner());
            map.retain(|_, lock| lock.strong_count() > 0);
            match map.get(container_id).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    let lock = Arc::new(Mutex::new(()));
                    map.insert(container_id.to_owned(), Arc::downgrade(&lock));
                    lock
                }
            }
        };
        One { _container: lock.lock_owned().await, _everything: everything }
    }

    pub(crate) async fn all(&self) -> RwLockWriteGuard<'_, ()> {
        self.everything.write().await
    }
}
