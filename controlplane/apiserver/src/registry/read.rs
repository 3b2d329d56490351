//! get, list and watch.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use orlop_store::{Range, Revision};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    Body, Registry,
    context::Context,
    object::{EventType, Object, frame},
    options::{ListOptions, ReadAt, encode_continue},
    respond::{self, ListMeta, Wanted, served, to_json},
};
use crate::{
    codec::{Encoding, Shape},
    protobuf,
    resources::Resource,
    status::Status,
    table, value,
    watch_cache::{Seen, Selection, Start, Watching, key_of, prefix_of, store_status},
};

/// How often a watcher that wants bookmarks gets one.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(60);
/// How long a watch lasts when the client says nothing: this plus up to as much again, so that not all end at once.
const WATCH_TIMEOUT: Duration = Duration::from_secs(1800);

impl Registry {
    /// One stored object.
    pub(super) async fn load(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
    ) -> Result<Object, Status> {
        let record =
            self.inner.store.get(&key_of(&resource.storage, namespace, name)).await.map_err(store_status)?;
        let record = record.ok_or_else(|| resource.not_found(name))?;
        Object::from_stored(&record.value, record.revision, EventType::Added)
    }

    pub(super) async fn get_request(&self, ctx: &Context) -> Result<Response<Body>, Status> {
        // Any state that is new enough will do, and the store always gives the newest.
        if let Some(revision) = ctx.query.revision()? {
            self.not_newer(revision).await?;
        }
        let object = self.load(&ctx.resource, ctx.namespace(), ctx.name()).await?;
        respond::object(&ctx.resource, &object, StatusCode::OK, &ctx.wanted)
    }

    async fn not_newer(&self, revision: Revision) -> Result<(), Status> {
        let current = self.inner.store.current_revision().await.map_err(store_status)?;
        if revision > current { Err(Status::too_large_resource_version(revision, current)) } else { Ok(()) }
    }

    pub(super) async fn list_request(&self, ctx: &Context) -> Result<Response<Body>, Status> {
        let options = ListOptions::parse(&ctx.query, false)?;
        let selection = ctx.selection()?;
        let (objects, meta) = self.select(&ctx.resource, &selection, &options).await?;
        respond::list(&ctx.resource, &objects, &meta, &ctx.wanted)
    }

    /// The selected objects, at most `options.limit` of them.
    pub(super) async fn select(
        &self,
        resource: &Arc<Resource>,
        selection: &Selection,
        options: &ListOptions,
    ) -> Result<(Vec<Arc<Object>>, ListMeta), Status> {
        let revision = match options.at {
            ReadAt::Exact(r) => r,
            ReadAt::NotOlderThan(r) => {
                self.not_newer(r).await?;
                0
            }
            ReadAt::Newest | ReadAt::Any => 0,
        };
        if revision == 0
            && options.limit == 0
            && let Some(cache) = self.inner.hub.cache(&resource.storage)
        {
            if options.at != ReadAt::Any {
                let current = self.inner.store.current_revision().await.map_err(store_status)?;
                self.inner.hub.wait_for(current).await?;
            }
            let (objects, revision) = cache.list(resource, selection, self.inner.hub.applied());
            return Ok((objects, ListMeta { revision, ..ListMeta::default() }));
        }
        self.select_stored(resource, selection, options, revision).await
    }

    async fn select_stored(
        &self,
        resource: &Arc<Resource>,
        selection: &Selection,
        options: &ListOptions,
        revision: Revision,
    ) -> Result<(Vec<Arc<Object>>, ListMeta), Status> {
        // With a selector, more records than wanted must be looked at; in pages, so that memory stays bounded.
        let page_size = match options.limit {
            0 => 0,
            n if selection.is_plain() => n,
            n => n.max(500),
        };
        let mut range = Range {
            prefix: prefix_of(&resource.storage, &selection.namespace),
            after: options.after.clone(),
            limit: page_size,
            revision,
        };
        let mut found: Vec<Arc<Object>> = Vec::new();
        loop {
            let page = self.inner.store.list(&range).await.map_err(|e| match store_status(e) {
                gone if gone.code == 410 && options.after.is_some() => Status::expired(
                    "The provided continue parameter is too old to display a consistent list result.",
                ),
                other => other,
            })?;
            range.revision = page.revision;
            let count = page.records.len();
            for (i, record) in page.records.into_iter().enumerate() {
                let object = Object::from_stored(&record.value, record.revision, EventType::Added)?;
                if !selection.matches(resource, &object) {
                    range.after = Some(record.key.to_string());
                    continue;
                }
                found.push(Arc::new(object));
                if options.limit > 0 && found.len() == options.limit {
                    let mut meta = ListMeta { revision: page.revision, ..ListMeta::default() };
                    if page.more || i + 1 < count {
                        meta.next = encode_continue(page.revision, &record.key);
                        // With a selector, nobody knows without looking at all of them.
                        if selection.is_plain() {
                            range.after = Some(record.key.to_string());
                            meta.remaining =
                                Some(self.inner.store.count(&range).await.map_err(store_status)?);
                        }
                    }
                    return Ok((found, meta));
                }
                range.after = Some(record.key.to_string());
            }
            if !page.more {
                return Ok((found, ListMeta { revision: page.revision, ..ListMeta::default() }));
            }
        }
    }

    pub(super) async fn watch_request(&self, ctx: &Context) -> Result<Response<Body>, Status> {
        let options = ListOptions::parse(&ctx.query, true)?;
        let mut selection = ctx.selection()?;
        if !ctx.name().is_empty() {
            selection.name = ctx.name().to_owned();
        }
        let start = match (options.initial_events, options.revision) {
            (Some(true), Some(r)) if r > 0 => {
                self.not_newer(r).await?;
                Start::State
            }
            (Some(true), _) | (None, None | Some(0)) => Start::State,
            (_, Some(r)) if r > 0 => Start::After(r),
            _ => Start::After(self.inner.store.current_revision().await.map_err(store_status)?),
        };
        let encoding = watch_encoding(&ctx.resource, &ctx.wanted);
        let body = match self.inner.hub.watch(&ctx.resource, &ctx.stored, selection, start).await {
            Ok(watching) => self.stream(ctx, watching, &options, encoding),
            // Told inside the stream, as upstream does: clients expect a started watch.
            Err(e) if e.code == 410 => Body::from(framed(EventType::Error, e.to_json(), encoding)),
            Err(e) => return Err(e),
        };
        let mut response = Response::new(body);
        let headers = response.headers_mut();
        let media = match encoding {
            Encoding::Protobuf => protobuf::WATCH_MEDIA_TYPE,
            _ => Encoding::Json.media_type(),
        };
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
        Ok(response)
    }

    fn stream(
        &self,
        ctx: &Context,
        mut watching: Watching,
        options: &ListOptions,
        encoding: Encoding,
    ) -> Body {
        let lasts = options.timeout.unwrap_or_else(|| WATCH_TIMEOUT.mul_f64(1.0 + rand::random::<f64>()));
        let watcher = Watcher {
            resource: ctx.resource.clone(),
            wanted: Wanted { encoding, ..ctx.wanted },
            progress: self.inner.hub.progress(),
            stop: self.inner.stop.clone(),
            revision: watching.revision,
            backlog: std::mem::take(&mut watching.backlog).into_iter(),
            watching,
            deadline: Instant::now() + lasts,
            bookmark: options
                .bookmarks
                .then(|| Instant::now() + BOOKMARK_INTERVAL.mul_f64(0.75 + 0.25 * rand::random::<f64>())),
            end_initial: options.initial_events == Some(true) && options.bookmarks,
            table_begun: false,
        };
        Body::Boxed(Box::pin(futures::stream::unfold(watcher, |mut w| async move {
            w.next().await.map(|b| (b, w))
        })))
    }
}

/// The encoding of a watch, which holds for all of its events: protobuf where the kind has it, else JSON.
fn watch_encoding(resource: &Resource, wanted: &Wanted) -> Encoding {
    let known = match wanted.shape {
        Shape::Objects => protobuf::knows(&resource.api_version(), &resource.kind),
        Shape::Partial => true,
        Shape::Table => false,
    };
    if wanted.encoding == Encoding::Protobuf && known { Encoding::Protobuf } else { Encoding::Json }
}

/// An event around an object's JSON.
fn framed(event: EventType, json: Bytes, encoding: Encoding) -> Bytes {
    if encoding != Encoding::Protobuf {
        return frame(event, &json);
    }
    let encoded = respond::to_protobuf(&json).and_then(|b| b.map_err(Status::internal));
    match encoded {
        Ok(object) => protobuf::frame(event.name(), &object).into(),
        // A Status always has this form; an end of the watch makes the client list again if it should not.
        Err(e) => match respond::to_protobuf(e.to_json().as_ref()) {
            Ok(Ok(status)) => protobuf::frame(EventType::Error.name(), &status).into(),
            _ => Bytes::new(),
        },
    }
}

/// Turns what a watch sees into bytes, one event at a time, as the connection asks for them.
struct Watcher {
    resource: Arc<Resource>,
    wanted: Wanted,
    progress: tokio::sync::watch::Receiver<Revision>,
    stop: tokio_util::sync::CancellationToken,
    revision: Revision,
    backlog: std::vec::IntoIter<Seen>,
    watching: Watching,
    deadline: Instant,
    bookmark: Option<Instant>,
    end_initial: bool,
    table_begun: bool,
}

impl Watcher {
    async fn next(&mut self) -> Option<Bytes> {
        if let Some(seen) = self.backlog.next() {
            return Some(self.encode(&seen));
        }
        if std::mem::take(&mut self.end_initial) {
            return Some(self.bookmark(self.revision, true));
        }
        let far = self.deadline + Duration::from_secs(3600);
        tokio::select! {
            biased;
            // Cancel-safe: a message is taken only when it is returned.
            seen = self.watching.live.recv() => seen.map(|s| {
                self.revision = s.object.revision;
                self.encode(&s)
            }),
            () = self.stop.cancelled() => None,
            () = tokio::time::sleep_until(self.bookmark.unwrap_or(far)) => {
                self.bookmark = Some(Instant::now() + BOOKMARK_INTERVAL);
                // What is reached has been queued before: when the queue is empty after reading this, it has been sent.
                let reached = *self.progress.borrow();
                let reached = if self.watching.live.is_empty() { reached.max(self.revision) } else { self.revision };
                Some(self.bookmark(reached, false))
            }
            () = tokio::time::sleep_until(self.deadline) => None,
        }
    }

    fn encode(&mut self, seen: &Seen) -> Bytes {
        let plain = self.wanted.shape == Shape::Objects && self.wanted.encoding == Encoding::Json;
        if plain && self.resource.conversion.is_none() {
            return seen.object.event(seen.event);
        }
        let object = match self.wanted.shape {
            Shape::Table => self.table_row(seen),
            _ => served(&self.resource, &seen.object, &self.wanted),
        };
        match object {
            Ok(bytes) => framed(seen.event, bytes, self.wanted.encoding),
            Err(e) => framed(EventType::Error, e.to_json(), self.wanted.encoding),
        }
    }

    /// Only the first table of a watch carries the column definitions.
    fn table_row(&mut self, seen: &Seen) -> Result<Bytes, Status> {
        let mut v = seen.object.value()?;
        if let Some(conversion) = &self.resource.conversion {
            (conversion.serve)(&mut v);
        }
        let mut t = table::table(&self.resource, &[v], self.wanted.include);
        value::set(&mut t, "metadata.resourceVersion", seen.object.revision.to_string());
        if std::mem::replace(&mut self.table_begun, true) {
            value::set(&mut t, "columnDefinitions", Value::Null);
        }
        to_json(&t)
    }

    fn bookmark(&mut self, revision: Revision, initial: bool) -> Bytes {
        let (kind, version) = match self.wanted.shape {
            Shape::Objects => (self.resource.kind.to_string(), self.resource.api_version()),
            Shape::Partial => ("PartialObjectMetadata".into(), "meta.k8s.io/v1".into()),
            Shape::Table => ("Table".into(), "meta.k8s.io/v1".into()),
        };
        let mut object = json!({"kind": kind, "apiVersion": version, "metadata": {"resourceVersion": revision.to_string()}});
        if initial {
            object["metadata"]["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        if self.wanted.shape == Shape::Table {
            object["rows"] = json!([{"cells": [], "object": {
                "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"].clone(),
            }}]);
        }
        match to_json(&object) {
            Ok(bytes) => framed(EventType::Bookmark, bytes, self.wanted.encoding),
            Err(e) => framed(EventType::Error, e.to_json(), self.wanted.encoding),
        }
    }
}
