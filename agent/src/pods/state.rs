//! What a pod's worker remembers between passes, besides what the runtime tells.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::resize::Sizes;

/// One thing at a time per key; a key in flight is not planned again.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum OpKey {
    Volumes,
    Sandbox,
    StopSandbox(String),
    Image(String),
    /// Containers start one after another, so that a postStart hook holds back the next one.
    Start,
    Kill(String),
    Remove(String),
    TearDown,
    Resize,
}

/// The pod is to end.
#[derive(Clone, Debug, PartialEq)]
pub struct Terminating {
    pub since: Timestamp,
    /// Seconds between SIGTERM and SIGKILL, counted from `since`.
    pub grace: i64,
    /// Why, when it is not the user's deletion: becomes the pod's reason and message and fails it.
    pub failure: Option<(String, String)>,
}

/// How far a step is that can fail and be tried again.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Step {
    #[default]
    Wanted,
    Done,
    Failed {
        retry_at: Timestamp,
        failures: u32,
    },
}

impl Step {
    /// Failures in a row so far.
    pub fn failures(&self) -> u32 {
        match self {
            Step::Failed { failures, .. } => *failures,
            _ => 0,
        }
    }

    /// Whether it may be done now, and when otherwise.
    pub fn due(&self, now: Timestamp) -> Result<(), Option<Timestamp>> {
        match self {
            Step::Wanted => Ok(()),
            Step::Done => Err(None),
            Step::Failed { retry_at, .. } if *retry_at <= now => Ok(()),
            Step::Failed { retry_at, .. } => Err(Some(*retry_at)),
        }
    }
}

/// Why a container waits, as its status says it.
#[derive(Clone, Debug, PartialEq)]
pub struct Waiting {
    pub reason: String,
    pub message: String,
}

/// An image that is there for the next start, or why not.
#[derive(Clone, Debug, PartialEq)]
pub enum ImageState {
    Present(String),
    Failed { why: Waiting, retry_at: Timestamp, failures: u32 },
}

/// A container that could not be created or started.
#[derive(Clone, Debug, PartialEq)]
pub struct StartFailure {
    pub why: Waiting,
    pub retry_at: Timestamp,
    pub failures: u32,
}

/// Back-off between restarts of one container: the first restart is immediate, then 10 s doubling to the maximum, and
/// from the start again once a run lasted longer than twice the maximum (10 minutes).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restart {
    pub delay_ms: u64,
    pub last_start: Timestamp,
}

const FIRST_DELAY: Duration = Duration::from_secs(10);

impl Restart {
    fn expired(&self, finished: Timestamp, max: Duration) -> bool {
        finished.duration_since(self.last_start) > SignedDuration::from_secs(2 * max.as_secs() as i64)
    }

    /// When a container that ended at `finished` may start again.
    pub fn due(entry: Option<&Restart>, finished: Timestamp, max: Duration) -> Timestamp {
        match entry {
            Some(r) if !r.expired(finished, max) => {
                finished + SignedDuration::from_millis((r.delay_ms.min(max.as_millis() as u64)) as i64)
            }
            _ => finished,
        }
    }

    /// The entry after a restart at `now` of a container that ended at `finished`.
    pub fn next(entry: Option<&Restart>, finished: Timestamp, now: Timestamp, max: Duration) -> Restart {
        let max_ms = max.as_millis() as u64;
        let first = (FIRST_DELAY.as_millis() as u64).min(max_ms);
        let delay_ms = match entry {
            Some(r) if !r.expired(finished, max) => (r.delay_ms.saturating_mul(2)).min(max_ms),
            _ => first,
        };
        Restart { delay_ms, last_start: now }
    }
}

/// What probes say of one container; `None` where no probe is declared or none has answered yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeView {
    pub started: Option<bool>,
    pub ready: Option<bool>,
    #[serde(skip)]
    pub live: Option<bool>,
}

/// All a worker keeps in memory.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    pub terminating: Option<Terminating>,
    /// All containers have ended for good; sticky, so that the phase cannot go back.
    pub finished: bool,
    /// Every container, sandbox and volume is gone or stopped.
    pub terminated: bool,
    pub volumes: Step,
    pub sandbox: Step,
    pub images: HashMap<String, ImageState>,
    pub start_failures: HashMap<String, StartFailure>,
    pub restarts: BTreeMap<String, Restart>,
    /// The restart count that follows the one last reported, for containers that the runtime has forgotten.
    pub next_attempts: BTreeMap<String, u32>,
    /// Containers stopped by the agent so that they start again, whatever the restart policy says of their exit code.
    pub restart_regardless: HashSet<String>,
    /// By container id.
    pub probes: HashMap<String, ProbeView>,
    /// The container (by name) whose postStart hook may still run: it does not count as started.
    pub hook_pending: Option<String>,
    pub in_flight: HashSet<OpKey>,
    pub start_time: Option<Timestamp>,
    pub sizes: Sizes,
    /// Set when the node refuses the pod: reason and message.
    pub rejected: Option<(String, String)>,
}

impl Memory {
    pub fn is_ending(&self) -> bool {
        self.terminating.is_some() || self.finished || self.rejected.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn t(s: i64) -> Timestamp {
        Timestamp::from_second(1_000_000 + s).unwrap()
    }

    #[test]
    fn restarts_back_off_and_start_again_after_a_long_run() {
        let max = Duration::from_secs(300);
        assert_eq!(Restart::due(None, t(0), max), t(0));
        let mut entry = None;
        let mut waits = Vec::new();
        let mut now = 0;
        for _ in 0..7 {
            let due = Restart::due(entry.as_ref(), t(now), max);
            waits.push(due.as_second() - t(now).as_second());
            now = due.as_second() - 1_000_000;
            entry = Some(Restart::next(entry.as_ref(), due, t(now), max));
        }
        assert_eq!(waits, [0, 10, 20, 40, 80, 160, 300]);
        let late = t(now + 601);
        assert_eq!(Restart::due(entry.as_ref(), late, max), late);
        assert_eq!(Restart::next(entry.as_ref(), late, late, max).delay_ms, 10_000);
    }

    #[test]
    fn the_maximum_can_be_below_the_first_delay() {
        let max = Duration::from_secs(2);
        let e = Restart::next(None, t(0), t(0), max);
        assert_eq!(Restart::due(Some(&e), t(1), max), t(3));
    }
}
