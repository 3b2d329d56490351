//! What all RPCs share.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use orlop_base::supervise::TaskGroup;
use orlop_images::ImageStore;
use tokio::sync::oneshot;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::events::Events;
use crate::facts::Facts;
use crate::monitor::Starter;
use crate::network::Network;
use crate::nri::Plugins;
use crate::stats::layers::Layers;
use crate::store::{Folders, Store};
use crate::streaming::Sessions;

/// The server behind both services.
pub(crate) struct Runtime {
    pub config: Config,
    pub images: ImageStore,
    pub network: Network,
    pub monitors: Starter,
    pub store: Store,
    pub sandbox_folders: Folders,
    pub container_folders: Folders,
    pub events: Events,
    pub sessions: Sessions,
    pub facts: Facts,
    /// Whether this run has loaded the default AppArmor profile; an earlier release's may differ.
    pub apparmor: tokio::sync::Mutex<bool>,
    pub plugins: Plugins,
    pub layers: Layers,
    pub tasks: TaskGroup,
}

impl Runtime {
    /// Runs `work` to its end even when the caller's connection goes away: nothing half-made stays behind.
    pub async fn detached<T, F>(self: &Arc<Self>, work: F) -> Result<T>
    where
        F: Future<Output = Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        let (tell, told) = oneshot::channel();
        self.tasks.spawn(async move {
            // Nobody listening is fine: the work is done.
            let _ = tell.send(work.await);
        });
        told.await.map_err(|_| Error::Internal("the operation ended without a result".into()))?
    }

    /// Keeps writing what a full disk did not take, as long as the server runs.
    pub fn keep_writing(self: &Arc<Self>) {
        let (this, stop) = (self.clone(), self.tasks.stop_token());
        self.tasks.spawn(async move {
            let forever = async {
                loop {
                    this.store.write_facts().await;
                }
            };
            tokio::select! {
                // What is missing then, the monitors tell the next server.
                () = stop.cancelled() => {}
                () = forever => {}
            }
        });
    }

    /// Keeps ready what the next pod's start would have to wait for, as long as the server runs.
    pub fn keep_spares(self: &Arc<Self>) {
        let (this, stop) = (self.clone(), self.tasks.stop_token());
        self.tasks.spawn(async move {
            loop {
                tokio::select! {
                    () = stop.cancelled() => break,
                    () = this.monitors.spare_wanted() => {}
                }
                tokio::time::sleep(SPARE_PAUSE).await;
                this.monitors.make_spare();
                let made = async {
                    this.sandbox_folders.make_spare()?;
                    this.container_folders.make_spare()?;
                    Ok::<_, Error>(this.images.make_spare().await?)
                };
                // A full disk is for those to tell who need the folders.
                if let Err(e) = made.await {
                    tracing::debug!(error = %orlop_base::telemetry::chain(&e), "no spare folders");
                }
            }
            this.monitors.end().await;
            this.sandbox_folders.drop_spare();
            this.container_folders.drop_spare();
        });
    }
}

/// Between a container's start and the making of spares: the answer is on its way, and its caller at work.
const SPARE_PAUSE: Duration = Duration::from_millis(5);
/// What takes longer than this is told of by [`noticed`].
const LONG: Duration = Duration::from_millis(500);

/// Does `work`, and says so if it took long: for steps that take milliseconds unless something else is wrong.
pub(crate) async fn noticed<T>(what: &str, id: &str, work: impl Future<Output = T>) -> T {
    let begun = Instant::now();
    let done = work.await;
    let took = begun.elapsed();
    if took > LONG {
        tracing::info!(id, took_ms = took.as_millis(), "{what} took long");
    }
    done
}

/// Nanoseconds since 1970, as the CRI counts.
pub(crate) fn now_ns() -> i64 {
    jiff::Timestamp::now().as_nanosecond().try_into().unwrap_or(i64::MAX)
}

/// 64 hexadecimal digits: log collectors expect this form.
pub(crate) fn new_id() -> String {
    let bytes: [u8; 32] = rand::random();
    let mut id = String::with_capacity(64);
    for b in bytes {
        use std::fmt::Write;
        // Writing to a String cannot fail.
        let _ = write!(id, "{b:02x}");
    }
    id
}
