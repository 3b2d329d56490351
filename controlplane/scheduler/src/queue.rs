//! Pods waiting for a node: the active ones by priority and age, those in back-off, and those that no node took, which
//! wait for the cluster to change. Pure: the caller brings the time.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use orlop_api::backoff::Backoff;
use orlop_api::meta::Key;

use crate::framework::PodInfo;

/// Upstream's podInitialBackoffSeconds and podMaxBackoffSeconds.
const BACKOFF: Backoff = Backoff { base: Duration::from_secs(1), max: Duration::from_secs(10) };
/// An unschedulable pod is tried again after this long even if nothing seems to have changed.
pub const MAX_UNSCHEDULABLE: Duration = Duration::from_secs(300);

/// Time since an arbitrary start.
pub type Now = Duration;

#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// Higher priority first, then the older.
    Active(Reverse<i32>, u64),
    Backoff(Now),
    Unschedulable(Now),
    /// Handed out by [`Queue::pop`].
    InFlight,
}

#[derive(Debug)]
struct Entry {
    pod: PodInfo,
    attempts: u32,
    order: u64,
    place: Place,
}

/// The scheduling queue.
#[derive(Debug, Default)]
pub struct Queue {
    entries: HashMap<Key, Entry>,
    active: BTreeSet<(Reverse<i32>, u64, Key)>,
    next_order: u64,
    /// Counts changes of the cluster, so that a pod that was being tried when one came is tried again.
    changes: u64,
}

/// A pod handed out for one attempt.
#[derive(Debug)]
pub struct Attempt {
    pub pod: PodInfo,
    changes: u64,
}

impl Queue {
    /// A new pod, or a changed one that still has no node.
    pub fn set(&mut self, pod: PodInfo) {
        let key = pod.key.clone();
        match self.entries.get_mut(&key) {
            None => {
                let order = self.next_order;
                self.next_order += 1;
                let entry = Entry { pod, attempts: 0, order, place: Place::InFlight };
                self.entries.insert(key.clone(), entry);
                self.activate(&key);
            }
            Some(e) => {
                e.pod = pod;
                if e.place != Place::InFlight {
                    self.activate(&key);
                } else {
                    self.changes += 1;
                }
            }
        }
    }

    pub fn remove(&mut self, key: &Key) {
        if let Some(e) = self.entries.remove(key)
            && let Place::Active(p, o) = e.place
        {
            self.active.remove(&(p, o, key.clone()));
        }
    }

    fn activate(&mut self, key: &Key) {
        let Some(e) = self.entries.get_mut(key) else { return };
        if let Place::Active(p, o) = e.place {
            self.active.remove(&(p, o, key.clone()));
        }
        let rank = Reverse(e.pod.priority);
        e.place = Place::Active(rank, e.order);
        self.active.insert((rank, e.order, key.clone()));
    }

    /// The next pod to try.
    pub fn pop(&mut self, now: Now) -> Option<Attempt> {
        self.flush(now);
        let (_, _, key) = self.active.pop_first()?;
        let e = self.entries.get_mut(&key)?;
        e.place = Place::InFlight;
        e.attempts += 1;
        Some(Attempt { pod: e.pod.clone(), changes: self.changes })
    }

    /// When [`Queue::pop`] may have something that it has not now.
    pub fn next_due(&self) -> Option<Now> {
        self.entries
            .values()
            .filter_map(|e| match e.place {
                Place::Backoff(t) => Some(t),
                Place::Unschedulable(since) => Some(since + MAX_UNSCHEDULABLE),
                _ => None,
            })
            .min()
    }

    fn flush(&mut self, now: Now) {
        let due: Vec<Key> = self
            .entries
            .iter()
            .filter(|(_, e)| match e.place {
                Place::Backoff(t) => t <= now,
                Place::Unschedulable(since) => since + MAX_UNSCHEDULABLE <= now,
                _ => false,
            })
            .map(|(k, _)| k.clone())
            .collect();
        due.iter().for_each(|k| self.activate(k));
    }

    /// No node took the pod: wait for a change, or back off when one came during the attempt.
    pub fn unschedulable(&mut self, attempt: &Attempt, now: Now) {
        let changed = attempt.changes != self.changes;
        self.put_back(&attempt.pod.key, now, changed);
    }

    /// The attempt failed for a reason that has nothing to do with the nodes: back off.
    pub fn failed(&mut self, key: &Key, now: Now) {
        self.put_back(key, now, true);
    }

    fn put_back(&mut self, key: &Key, now: Now, backoff: bool) {
        if let Some(e) = self.entries.get_mut(key)
            && e.place == Place::InFlight
        {
            e.place = if backoff {
                Place::Backoff(now + BACKOFF.delay(e.attempts))
            } else {
                Place::Unschedulable(now)
            };
        }
    }

    /// Something happened that may make room: a node came or changed, a pod went.
    pub fn cluster_changed(&mut self, now: Now) {
        self.changes += 1;
        let mut ready = Vec::new();
        for (k, e) in &mut self.entries {
            if let Place::Unschedulable(since) = e.place {
                let until = since + BACKOFF.delay(e.attempts);
                if until <= now {
                    ready.push(k.clone());
                } else {
                    e.place = Place::Backoff(until);
                }
            }
        }
        ready.iter().for_each(|k| self.activate(k));
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, priority: i32) -> PodInfo {
        let v = serde_json::json!({"metadata": {"name": name, "namespace": "n"},
            "spec": {"priority": priority, "containers": []}});
        PodInfo::of(&serde_json::from_value(v).unwrap())
    }

    fn secs(n: u64) -> Now {
        Duration::from_secs(n)
    }

    fn name(a: Option<Attempt>) -> Option<String> {
        a.map(|a| a.pod.key.name)
    }

    #[test]
    fn priority_then_age() {
        let mut q = Queue::default();
        for (n, p) in [("a", 0), ("b", 10), ("c", 0)] {
            q.set(pod(n, p));
        }
        let order: Vec<_> = (0..4).map(|_| name(q.pop(secs(0)))).collect();
        assert_eq!(order, [Some("b".into()), Some("a".into()), Some("c".into()), None]);
    }

    #[test]
    fn an_unschedulable_pod_waits_for_a_change() {
        let mut q = Queue::default();
        q.set(pod("a", 0));
        let a = q.pop(secs(0)).unwrap();
        q.unschedulable(&a, secs(0));
        assert!(q.pop(secs(100)).is_none());
        q.cluster_changed(secs(100));
        assert!(q.pop(secs(100)).is_some());
    }

    #[test]
    fn a_change_during_the_attempt_is_not_missed() {
        let mut q = Queue::default();
        q.set(pod("a", 0));
        let a = q.pop(secs(0)).unwrap();
        q.cluster_changed(secs(0));
        q.unschedulable(&a, secs(0));
        assert!(q.pop(secs(0)).is_none());
        assert_eq!(q.next_due(), Some(secs(1)));
        assert!(q.pop(secs(1)).is_some());
    }

    #[test]
    fn a_pod_deleted_in_flight_does_not_come_back() {
        let mut q = Queue::default();
        q.set(pod("a", 0));
        let a = q.pop(secs(0)).unwrap();
        q.remove(&a.pod.key);
        q.failed(&a.pod.key, secs(0));
        assert!(q.is_empty());
    }
}
