//! A queue of keys for reconcilers: each key once, one worker per key at a time, failures retried with back-off.

use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};
use std::fmt::{Debug, Display};
use std::future::Future;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use orlop_api::backoff::Backoff;
use orlop_base::supervise::TaskGroup;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// What a reconcile of a key came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// Look again after this time, whatever happens meanwhile.
    After(Duration),
}

/// Why a reconcile failed.
pub trait Failure: Display {
    /// Somebody else changed the object in between: the next try sees the change. Nothing is wrong.
    fn is_conflict(&self) -> bool {
        false
    }
}

impl Failure for kube::Error {
    fn is_conflict(&self) -> bool {
        matches!(self, kube::Error::Api(s) if s.code == 409 && s.reason == "Conflict")
    }
}

/// Conflicts in a row that are no news; more means that two writers fight over a key.
const QUIET_CONFLICTS: u32 = 8;

#[derive(Debug)]
struct Delayed<T> {
    at: Instant,
    key: T,
}

// The heap's top is the earliest.
impl<T> Ord for Delayed<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        other.at.cmp(&self.at)
    }
}
impl<T> PartialOrd for Delayed<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl<T> PartialEq for Delayed<T> {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}
impl<T> Eq for Delayed<T> {}

#[derive(Debug)]
struct State<T> {
    /// Ready keys in order. Bounded by the number of distinct keys: a key is in `dirty` when it is here.
    ready: VecDeque<T>,
    dirty: HashSet<T>,
    running: HashSet<T>,
    delayed: BinaryHeap<Delayed<T>>,
    /// The earliest time for which a key is in `delayed`; later entries of the same key are dropped when they surface.
    due: HashMap<T, Instant>,
    failures: HashMap<T, u32>,
}

/// A handle to the queue; cloning is cheap.
pub struct Queue<T> {
    state: Arc<Mutex<State<T>>>,
    wake: Arc<Notify>,
    backoff: Backoff,
}

impl<T> Clone for Queue<T> {
    fn clone(&self) -> Self {
        Queue { state: self.state.clone(), wake: self.wake.clone(), backoff: self.backoff }
    }
}

impl<T: Clone + Eq + Hash + Debug + Send + Sync + 'static> Default for Queue<T> {
    fn default() -> Self {
        Queue::new(Backoff::QUEUE)
    }
}

impl<T: Clone + Eq + Hash + Debug + Send + Sync + 'static> Queue<T> {
    pub fn new(backoff: Backoff) -> Self {
        Queue {
            state: Arc::new(Mutex::new(State {
                ready: VecDeque::new(),
                dirty: HashSet::new(),
                running: HashSet::new(),
                delayed: BinaryHeap::new(),
                due: HashMap::new(),
                failures: HashMap::new(),
            })),
            wake: Arc::new(Notify::new()),
            backoff,
        }
    }

    /// Asks for a reconcile of `key`; one that is running is followed by another.
    pub fn add(&self, key: T) {
        let mut s = self.state.lock();
        if s.dirty.insert(key.clone()) && !s.running.contains(&key) {
            s.ready.push_back(key);
            drop(s);
            self.wake.notify_one();
        }
    }

    /// Asks for a reconcile after `delay`; an earlier one that is already planned stays.
    pub fn add_after(&self, key: T, delay: Duration) {
        if delay.is_zero() {
            return self.add(key);
        }
        let at = Instant::now() + delay;
        let mut s = self.state.lock();
        if s.due.get(&key).is_some_and(|t| *t <= at) {
            return;
        }
        s.due.insert(key.clone(), at);
        s.delayed.push(Delayed { at, key });
        drop(s);
        self.wake.notify_one();
    }

    /// Keys waiting to be handed out.
    pub fn len(&self) -> usize {
        self.state.lock().ready.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Puts a key back; returns its failures in a row and how long it waits.
    fn add_failed(&self, key: T) -> (u32, Duration) {
        let failures = {
            let mut s = self.state.lock();
            let n = s.failures.entry(key.clone()).or_default();
            *n = n.saturating_add(1);
            *n
        };
        let delay = self.backoff.delay(failures);
        self.add_after(key, delay);
        (failures, delay)
    }

    /// The next key, or when to look again.
    fn take(&self) -> Result<T, Option<Instant>> {
        let mut s = self.state.lock();
        let now = Instant::now();
        while let Some(top) = s.delayed.peek() {
            if top.at > now {
                break;
            }
            let Some(Delayed { at, key }) = s.delayed.pop() else { break };
            if s.due.get(&key) == Some(&at) {
                s.due.remove(&key);
                if s.dirty.insert(key.clone()) && !s.running.contains(&key) {
                    s.ready.push_back(key);
                }
            }
        }
        match s.ready.pop_front() {
            Some(key) => {
                s.dirty.remove(&key);
                s.running.insert(key.clone());
                if !s.ready.is_empty() {
                    self.wake.notify_one();
                }
                Ok(key)
            }
            None => Err(s.delayed.peek().map(|d| d.at)),
        }
    }

    fn done(&self, key: &T) {
        let mut s = self.state.lock();
        s.running.remove(key);
        if s.dirty.contains(key) {
            s.ready.push_back(key.clone());
            drop(s);
            self.wake.notify_one();
        }
    }

    async fn next(&self, stop: &CancellationToken) -> Option<T> {
        loop {
            let until = match self.take() {
                Ok(key) => return Some(key),
                Err(until) => until,
            };
            let timer = async {
                match until {
                    Some(t) => tokio::time::sleep_until(t).await,
                    None => std::future::pending().await,
                }
            };
            // All arms only wait; a lost wake-up cannot happen because Notify keeps one permit.
            tokio::select! {
                () = stop.cancelled() => return None,
                () = self.wake.notified() => {}
                () = timer => {}
            }
        }
    }

    /// Runs `workers` tasks in `tasks` that reconcile keys until the group stops. An error puts the key back with back-off; a
    /// panic stops the group, because the key and the worker would be lost without a word.
    pub fn run<F, Fut, E>(&self, tasks: &TaskGroup, name: &'static str, workers: usize, reconcile: F)
    where
        F: Fn(T) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = Result<Outcome, E>> + Send,
        E: Failure + Send,
    {
        for _ in 0..workers {
            let (queue, reconcile, stop) = (self.clone(), reconcile.clone(), tasks.stop_token());
            tasks.spawn_essential(name, async move {
                while let Some(key) = queue.next(&stop).await {
                    let result = reconcile(key.clone()).await;
                    queue.done(&key);
                    match result {
                        Ok(outcome) => {
                            queue.state.lock().failures.remove(&key);
                            if let Outcome::After(d) = outcome {
                                queue.add_after(key, d);
                            }
                        }
                        Err(e) => {
                            let (failures, delay) = queue.add_failed(key.clone());
                            if e.is_conflict() && failures <= QUIET_CONFLICTS {
                                tracing::debug!(queue = name, ?key, error = %e, ?delay, "lost a race, trying again");
                            } else {
                                tracing::warn!(queue = name, ?key, error = %e, ?delay, "reconcile failed, trying again");
                            }
                        }
                    }
                }
                Ok::<_, std::convert::Infallible>(())
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    impl Failure for &str {}

    #[tokio::test(start_paused = true)]
    async fn a_key_runs_once_at_a_time_and_failures_are_retried() {
        let root = CancellationToken::new();
        let tasks = TaskGroup::new(&root);
        let q: Queue<&'static str> = Queue::default();
        let runs = Arc::new(AtomicU32::new(0));
        let seen = runs.clone();
        q.add("a");
        q.add("a");
        q.run(&tasks, "test", 4, move |_| {
            let seen = seen.clone();
            async move {
                if seen.fetch_add(1, Ordering::SeqCst) == 0 {
                    return Err("once");
                }
                Ok(Outcome::Done)
            }
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(runs.load(Ordering::SeqCst), 2);
        q.add_after("a", Duration::from_secs(5));
        q.add_after("a", Duration::from_secs(2));
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_eq!(runs.load(Ordering::SeqCst), 3);
        root.cancel();
        tasks.run_until_stopped(Duration::from_secs(1)).await.unwrap();
    }

    #[tokio::test]
    async fn a_panic_stops_the_group() {
        let tasks = TaskGroup::new(&CancellationToken::new());
        let q: Queue<&'static str> = Queue::default();
        q.add("a");
        q.run(&tasks, "test", 2, |key| async move { if key == "a" { panic!("bug") } else { Err("other") } });
        let e = tasks.run_until_stopped(Duration::from_secs(30)).await.unwrap_err();
        assert!(e.to_string().contains("test: panicked"), "{e}");
    }

    #[test]
    fn only_a_changed_object_is_a_conflict() {
        let answer = |code, reason: &str| {
            kube::Error::Api(Box::new(kube::core::Status {
                code,
                reason: reason.into(),
                ..Default::default()
            }))
        };
        assert!(answer(409, "Conflict").is_conflict());
        assert!(!answer(409, "AlreadyExists").is_conflict());
        assert!(!answer(500, "InternalError").is_conflict());
    }
}
