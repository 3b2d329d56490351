//! One operation at a time for a container, as the specification asks; different containers in parallel; GC alone.

use std::collections::HashMap;
use std::sync::{Arc, Mutex as SyncMutex, Weak};

use tokio::sync::{Mutex, OwnedMutexGuard, OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

#[derive(Debug, Default)]
pub(crate) struct Locks {
    everything: Arc<RwLock<()>>,
    by_container: SyncMutex<HashMap<String, Weak<Mutex<()>>>>,
}

/// Held during an operation. Whatever cannot be interrupted holds a clone: it may go on when its caller has given up.
#[derive(Clone, Debug, Default)]
pub(crate) struct Held {
    _guards: Option<Arc<Guards>>,
}

#[derive(Debug)]
enum Guards {
    One { _container: OwnedMutexGuard<()>, _everything: OwnedRwLockReadGuard<()> },
    All { _everything: OwnedRwLockWriteGuard<()> },
}

impl From<Guards> for Held {
    fn from(guards: Guards) -> Held {
        Held { _guards: Some(Arc::new(guards)) }
    }
}

impl Locks {
    pub(crate) async fn one(&self, container_id: &str) -> Held {
        let everything = self.everything.clone().read_owned().await;
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
        Guards::One { _container: lock.lock_owned().await, _everything: everything }.into()
    }

    pub(crate) async fn all(&self) -> Held {
        Guards::All { _everything: self.everything.clone().write_owned().await }.into()
    }
}
