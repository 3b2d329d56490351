//! Tasks that somebody owns: each belongs to a [`TaskGroup`], an essential task's death stops the group, and stopping
//! drains with a deadline.

use std::error::Error;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Owns tasks. Cloning gives another handle to the same group.
#[derive(Clone)]
pub struct TaskGroup {
    stop: CancellationToken,
    tracker: TaskTracker,
    failure: Arc<Mutex<Option<Failure>>>,
}

/// Why a group stopped by itself.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{task}: {message}")]
pub struct Failure {
    pub task: String,
    pub message: String,
}

impl TaskGroup {
    /// A group that also stops when `parent` is cancelled.
    pub fn new(parent: &CancellationToken) -> Self {
        TaskGroup { stop: parent.child_token(), tracker: TaskTracker::new(), failure: Arc::default() }
    }

    /// Cancelled when the group is to stop; hand it to what the tasks call.
    pub fn stop_token(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Runs a task whose end is nobody's concern, such as one connection. It must watch the stop token itself.
    pub fn spawn<F>(&self, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.tracker.spawn(task);
    }

    /// Runs a task that the group cannot do without: when it fails, panics or returns before the group stops, the group stops.
    pub fn spawn_essential<F, E>(&self, name: &str, task: F)
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: Into<Box<dyn Error + Send + Sync>> + Send + 'static,
    {
        let name = name.to_owned();
        let group = self.clone();
        let inner = self.tracker.spawn(task);
        self.tracker.spawn(async move {
            let message = match inner.await {
                Ok(Ok(())) if group.stop.is_cancelled() => return,
                Ok(Ok(())) => "ended unexpectedly".to_owned(),
                Ok(Err(e)) => crate::telemetry::chain(&*e.into()),
                Err(e) => format!("panicked: {e}"),
            };
            tracing::error!(task = %name, error = %message, "essential task ended");
            group
                .failure
                .lock()
                .unwrap_or_else(|e| e.into_inner())
                .get_or_insert(Failure { task: name, message });
            group.stop.cancel();
        });
    }

    /// Waits until the group is told to stop, then up to `drain` for its tasks. The error is the first essential task's.
    pub async fn run_until_stopped(self, drain: Duration) -> Result<(), Failure> {
        self.stop.cancelled().await;
        self.tracker.close();
        if tokio::time::timeout(drain, self.tracker.wait()).await.is_err() {
            tracing::warn!(left = self.tracker.len(), "tasks did not end within {drain:?}");
        }
        match self.failure.lock().unwrap_or_else(|e| e.into_inner()).take() {
            Some(f) => Err(f),
            None => Ok(()),
        }
    }
}

/// Tells whoever waits that a daemon serves.
#[derive(Clone, Debug)]
pub struct Ready(Arc<watch::Sender<bool>>);

impl Default for Ready {
    fn default() -> Self {
        Ready(Arc::new(watch::channel(false).0))
    }
}

impl Ready {
    pub fn set(&self) {
        self.0.send_replace(true);
    }

    pub fn is_set(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns once [`Ready::set`] has been called, at once if it was before.
    pub async fn wait(&self) {
        // The sender lives in self, so the channel cannot close while this waits.
        let _ = self.0.subscribe().wait_for(|r| *r).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_essential_tasks_error_stops_the_group() {
        let root = CancellationToken::new();
        let g = TaskGroup::new(&root);
        g.spawn_essential("a", async { Err::<(), _>("broke") });
        let e = g.run_until_stopped(Duration::from_secs(1)).await.unwrap_err();
        assert_eq!(e.to_string(), "a: broke");
    }

    #[tokio::test]
    async fn cancelling_the_parent_drains() {
        let root = CancellationToken::new();
        let g = TaskGroup::new(&root);
        let stop = g.stop_token();
        g.spawn_essential("a", async move {
            stop.cancelled().await;
            Ok::<(), String>(())
        });
        root.cancel();
        g.run_until_stopped(Duration::from_secs(1)).await.unwrap();
    }
}
