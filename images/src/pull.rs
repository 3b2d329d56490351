//! From a reference to an image in the store. Identical pulls share one transfer.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared, WeakShared, try_join_all};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::ingest::{LayerPlan, Origin, commit_layer, unpack_layer};
use crate::layout::{ImageRecord, LayerBlob};
use crate::manifest::{self, Manifest};
use crate::registry::{Hosts, Session};
use crate::store::{Inner, Pins, blocking, joined};
use crate::unpack::{Slot, Stream};
use crate::verify;
use crate::{Auth, Digest, Error, Image, Reference, Result};

type Pulling = Shared<BoxFuture<'static, Result<Arc<Image>>>>;

/// Pulls in progress. The number tells a pull from a later one with the same key.
#[derive(Default)]
pub(crate) struct Pulls(Mutex<(u64, Running)>);

type WeakPull = WeakShared<BoxFuture<'static, Result<Arc<Image>>>>;
type Running = HashMap<PullKey, (u64, WeakPull)>;
type PullKey = (String, Option<Auth>);

/// Chunks between network and unpacking, per layer. A chunk is at most what one read of the connection gives (about
/// 400 KiB), so a layer holds below 4 MiB.
const CHUNKS: usize = 8;

/// Takes a pull off the list when it ends, however it ends.
struct Listed {
    inner: Arc<Inner>,
    key: PullKey,
    number: u64,
}

impl Drop for Listed {
    fn drop(&mut self) {
        let mut pulls = self.inner.pulls.0.lock();
        if pulls.1.get(&self.key).is_some_and(|(n, _)| *n == self.number) {
            pulls.1.remove(&self.key);
        }
    }
}

/// Joins the pull of the same thing that is under way, or starts one.
pub(crate) async fn shared(inner: &Arc<Inner>, reference: &str, auth: Option<&Auth>) -> Result<Arc<Image>> {
    let reference = Reference::parse(reference)?;
    let verifiers = verify::programs(inner.options.verifiers_dir.as_deref())?;
    let key = (reference.to_string(), auth.cloned());
    let pulling: Pulling = {
        let mut pulls = inner.pulls.0.lock();
        match pulls.1.get(&key).and_then(|(_, weak)| weak.upgrade()) {
            Some(running) => running,
            None => {
                pulls.0 += 1;
                let listed = Listed { inner: inner.clone(), key: key.clone(), number: pulls.0 };
                let (auth, number) = (auth.cloned(), pulls.0);
                let future = async move {
                    let result = pull(&listed.inner, &reference, auth.as_ref(), &verifiers).await;
                    let result = match result {
                        Err(e) => Err(after_failure(&listed.inner, e).await),
                        image => image,
                    };
                    drop(listed);
                    result
                };
                let running = future.boxed().shared();
                if let Some(weak) = running.downgrade() {
                    pulls.1.insert(key, (number, weak));
                }
                running
            }
        }
    };
    pulling.await
}

/// Gives a full disk its space back: layers that were finished wait for another try otherwise.
pub(crate) async fn after_failure(inner: &Arc<Inner>, error: Error) -> Error {
    let error = error.name_full_disk(&inner.layout.root);
    if matches!(error, Error::Full { .. })
        && let Err(e) = inner.collect_unused(Duration::ZERO).await
    {
        tracing::warn!(error = %e, "could not free the layers of an image that does not fit");
    }
    error
}

/// The image that the reference names, if it is here with that very name.
fn present(inner: &Inner, reference: &Reference) -> Option<Arc<Image>> {
    let state = inner.state.read();
    let Some(digest) = &reference.digest else {
        return state.find(&reference.to_string()).map(|e| e.image.clone());
    };
    let name = reference.with_digest(digest);
    let found = state.images.values().find(|e| e.record.digests.contains(&name)).map(|e| e.image.clone())?;
    reference.tagged().is_none_or(|t| found.repo_tags.contains(&t)).then_some(found)
}

/// What of an image is not on disk as it should be. Files in its layers are not looked at.
async fn damage(inner: &Inner, image: &Image) -> Result<Option<String>> {
    let record = inner.state.read().find(&image.id).map(|e| e.record.clone());
    // Removed just now, which is no damage.
    let Some(record) = record else { return Ok(None) };
    let layout = inner.layout.clone();
    blocking(move || {
        let small = [record.manifest, record.id].iter().find_map(|d| layout.read_content(d).err());
        Ok(small.or_else(|| layout.lost(&record.chain).map(|c| format!("layer {c} is missing"))))
    })
    .await
}

async fn pull(
    inner: &Arc<Inner>,
    reference: &Reference,
    auth: Option<&Auth>,
    verifiers: &[PathBuf],
) -> Result<Arc<Image>> {
    let session = {
        let (reference, auth) = (reference.clone(), auth.cloned());
        let options = inner.options.clone();
        blocking(move || Session::new(&reference, &options, auth.as_ref())).await?
    };
    // An image that is here is the caller's only if the registry, asked with the caller's credentials, says so; what programs say
    // may have changed since it came. Asking for the digest alone does not count against a registry's limit of pulls.
    if let (Some(image), []) = (present(inner, reference), verifiers)
        && let Some(now) = session.current_digest().await
        && image.repo_digests.contains(&reference.with_digest(&now))
    {
        match damage(inner, &image).await? {
            None => return Ok(image),
            Some(why) => {
                tracing::warn!(image = image.id, why, "the image is damaged on disk; pulling it again");
            }
        }
    }
    let text = reference.to_string();
    let (top, algorithm) = session.resolve().await?;
    let top_digest = algorithm.digest(&top);
    verify::ask(verifiers, &text, &top_digest, &top).await?;
    let (manifest_bytes, config_descriptor, layers) = image_manifest(&session, top, &text).await?;
    let config_bytes = session.small_blob(&config_descriptor.digest, config_descriptor.size).await?;
    let (config, diffs) = manifest::parse_config(&config_bytes, layers.len(), &text)?;
    let chain = manifest::chain_ids(&diffs);
    let pins = inner.pin(&[&chain[..], &[config_descriptor.digest]].concat());
    let plans = manifest::plan(&layers, &diffs, &chain);
    let origin = Origin { reference: text, from: session.origin().to_owned() };
    let mirrored = session.has_mirrors();
    let session = &Arc::new(session);
    let fetch = |plans, hosts| {
        fetch_layers(inner, plans, &origin, move |plan, to| {
            let (session, slots) = (session.clone(), inner.slots.clone());
            async move {
                if let Some(digest) = &plan.digest {
                    session.blob(digest, plan.size, hosts, &to, &slots).await;
                }
            }
        })
    };
    match fetch(plans.clone(), Hosts::All).await {
        // What one host has begun another may have gone on with.
        Err(e @ Error::DigestMismatch { .. }) if mirrored => {
            tracing::warn!(error = %e, "fetching the layers from the registry itself");
            fetch(plans, Hosts::Registry).await?;
        }
        fetched => fetched?,
    }
    let record = ImageRecord {
        id: config_descriptor.digest,
        tags: reference.tagged().into_iter().collect(),
        digests: vec![reference.with_digest(&top_digest)],
        manifest: Digest::of(&manifest_bytes),
        layers,
        chain,
    };
    finish(inner, record, config, &manifest_bytes, &config_bytes, pins).await
}

/// Keeps the small blobs and makes the image visible.
pub(crate) async fn finish(
    inner: &Arc<Inner>,
    record: ImageRecord,
    config: oci_spec::image::ImageConfiguration,
    manifest_bytes: &[u8],
    config_bytes: &[u8],
    pins: Pins,
) -> Result<Arc<Image>> {
    inner.layout.write_content(&record.manifest, manifest_bytes)?;
    inner.layout.write_content(&record.id, config_bytes)?;
    let size = (manifest_bytes.len() + config_bytes.len()) as u64;
    // Those of a pull that failed before as well.
    let unsynced = inner.unsynced(&record.chain);
    if inner.options.sync_before_answer {
        inner.settle(unsynced).await?;
        return inner.register(record, config, size, pins).await;
    }
    let store = inner.clone();
    // Once it has begun it ends, whoever goes away.
    inner
        .finished(async move {
            let image = store.register(record, config, size, pins).await?;
            // Not before: what is written down would wait for all of the layers.
            store.settle_later(unsynced);
            Ok(image)
        })
        .await
}

/// Follows indexes to the manifest for this machine.
async fn image_manifest(
    session: &Session,
    top: bytes::Bytes,
    reference: &str,
) -> Result<(bytes::Bytes, manifest::Descriptor, Vec<LayerBlob>)> {
    let mut bytes = top;
    // An index may hold an index, but there is no use for more.
    for _ in 0..3 {
        match manifest::parse(&bytes, reference)? {
            Manifest::Image { config, layers } => return Ok((bytes, config, layers)),
            Manifest::Index(entries) => {
                let chosen = manifest::select(&entries, reference)?;
                bytes = session.manifest_by_digest(&chosen.digest).await?;
            }
        }
    }
    Err(Error::Malformed {
        what: "the index".into(),
        reference: reference.into(),
        why: "it is nested too deeply".into(),
    })
}

/// Makes all layers available: those that are missing are fetched by `send`, several at a time, and committed in order.
pub(crate) async fn fetch_layers<F>(
    inner: &Arc<Inner>,
    plans: Vec<LayerPlan>,
    origin: &Origin,
    send: impl Fn(LayerPlan, mpsc::Sender<Result<bytes::Bytes>>) -> F,
) -> Result<()>
where
    F: Future<Output = ()> + Send,
{
    let mut below: Option<oneshot::Receiver<()>> = None;
    let mut jobs = Vec::with_capacity(plans.len());
    let unpacking = TaskTracker::new();
    let pull = inner.slots.pull();
    let chain: Arc<[Digest]> = plans.iter().map(|p| p.chain).collect();
    for (i, plan) in plans.into_iter().enumerate() {
        let (done, done_rx) = oneshot::channel();
        let chain = chain.clone();
        let below = below.replace(done_rx);
        let send = |to| send(plan.clone(), to);
        let transfer = {
            let (to, chunks) = mpsc::channel(CHUNKS);
            (send(to), chunks)
        };
        let (inner, origin, unpacking) = (inner.clone(), origin.clone(), unpacking.clone());
        jobs.push(async move {
            let result = layer(&inner, pull, plan, chain, i, origin, below, unpacking, transfer).await;
            if result.is_ok() {
                // Nobody waits for the topmost layer.
                let _ = done.send(());
            }
            result
        });
    }
    if let Err(e) = try_join_all(jobs).await {
        // The other layers' threads end as their transfers are gone; nothing of them is left when this returns.
        unpacking.close();
        unpacking.wait().await;
        return Err(e);
    }
    Ok(())
}

/// A value whose end deletes files: where it is given up it goes to a thread that may block, which `tracker` counts.
struct Unwanted<T: Send + 'static> {
    value: Option<T>,
    tracker: TaskTracker,
    runtime: Handle,
}

impl<T: Send + 'static> Unwanted<T> {
    fn new(value: T, tracker: &TaskTracker, runtime: Handle) -> Self {
        Unwanted { value: Some(value), tracker: tracker.clone(), runtime }
    }

    /// It is wanted after all.
    fn take(mut self) -> Option<T> {
        self.value.take()
    }
}

impl<T: Send + 'static> Drop for Unwanted<T> {
    fn drop(&mut self) {
        if let Some(value) = self.value.take() {
            self.tracker.spawn_blocking_on(move || drop(value), &self.runtime);
        }
    }
}

/// One layer, unless it is here already. Lock, then slot, then transfer; the slot is given back before waiting
/// for the layer below, so that whoever has a slot makes progress.
#[allow(clippy::too_many_arguments)] // One call, a few lines above.
async fn layer<F>(
    inner: &Arc<Inner>,
    pull: u64,
    plan: LayerPlan,
    chain: Arc<[Digest]>,
    position: usize,
    origin: Origin,
    below: Option<oneshot::Receiver<()>>,
    unpacking: TaskTracker,
    (send, chunks): (F, mpsc::Receiver<Result<bytes::Bytes>>),
) -> Result<()>
where
    F: Future<Output = ()> + Send,
{
    let lock = inner.layer_locks.lock(plan.chain).await;
    let here = inner.state.read().layers.get(&plan.chain).cloned();
    let here = match here {
        // Deleted by somebody else, or a part of it.
        Some(_) if inner.layout.lost(&[plan.chain]).is_some() => {
            inner.lose_layer(&plan.chain)?;
            None
        }
        here => here,
    };
    if let Some(record) = here {
        // Names of folders are cut-off digests.
        if record.diff != plan.diff {
            return Err(Error::Malformed {
                what: format!("layer {}", plan.chain),
                reference: origin.reference.clone(),
                why: "another layer has the same short name".into(),
            });
        }
        return Ok(());
    }
    let unfinished = {
        // With this future goes what its thread waits for.
        let stop = CancellationToken::new();
        let _stop = stop.clone().drop_guard();
        let slot = Slot::take(&inner.slots, pull, stop).await?;
        let (layout, plan2, origin2) = (inner.layout.clone(), plan.clone(), origin.clone());
        let keep = inner.options.keep_layer_blobs;
        let (tracker, runtime) = (unpacking.clone(), Handle::current());
        let unpack = answering(&unpacking, move || {
            let unfinished = unpack_layer(&layout, &plan2, &origin2, keep, Stream::new(chunks), slot)?;
            Ok(Unwanted::new(unfinished, &tracker, runtime))
        });
        let ((), unpacked) = tokio::join!(send, unpack);
        unpacked?
    };
    if let Some(below) = below {
        below.await.map_err(|_| Error::Cancelled)?;
    }
    // The lock goes along, and the layer is known as soon as it is there: this future may be dropped any moment, the
    // blocking part goes on.
    let inner2 = inner.clone();
    let commit = answering(&unpacking, move || {
        let unfinished = unfinished.take().ok_or(Error::Cancelled)?;
        let record = commit_layer(&inner2.layout, &plan, &chain[..position], &origin, unfinished)?;
        let wanted = {
            let mut state = inner2.state.write();
            let chain = record.chain;
            state.layers.insert(chain, record);
            state.pins.contains_key(&chain)
        };
        drop(lock);
        if !wanted {
            // Whoever wanted it has gone away.
            inner2.collect_later();
        }
        Ok(())
    });
    commit.await
}

/// Runs blocking code that `tracker` counts until its result is handed over or, when nobody wants it any more, gone: a
/// task's own result outlives the tracked part, and with it files that the result would delete.
fn answering<T: Send + 'static>(
    tracker: &TaskTracker,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> impl Future<Output = Result<T>> {
    let (answer, answered) = oneshot::channel();
    let task = tracker.spawn_blocking(move || {
        // A receiver that is gone leaves the result to be dropped here.
        let _ = answer.send(work());
        Ok(())
    });
    async move {
        match answered.await {
            Ok(result) => result,
            // It panicked.
            Err(_) => joined(task).await.and(Err(Error::Cancelled)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tells which thread it ended on.
    struct Ends(std::sync::mpsc::Sender<std::thread::ThreadId>);

    impl Drop for Ends {
        fn drop(&mut self) {
            self.0.send(std::thread::current().id()).unwrap();
        }
    }

    #[tokio::test]
    async fn files_are_deleted_where_nobody_waits() {
        let (tell, told) = std::sync::mpsc::channel();
        let tracker = TaskTracker::new();
        drop(Unwanted::new(Ends(tell), &tracker, Handle::current()));
        tracker.close();
        tracker.wait().await;
        assert_ne!(told.try_recv().unwrap(), std::thread::current().id());
    }
}
