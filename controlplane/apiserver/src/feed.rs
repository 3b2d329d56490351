//! Following one resource inside the process: a list, then its changes, and again from a list when that breaks.
//!
//! It goes through the registry's own list and watch, so the server sees exactly what its clients see.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method, Uri};
use http_body_util::BodyExt;
use serde::Deserialize;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::registry::{ApiRequest, Body, Registry};
use crate::request_info::{RequestInfo, UserInfo};
use crate::status::Status;

/// Between a broken watch and the next list.
const PAUSE: Duration = Duration::from_millis(200);

/// One step in following a resource.
#[derive(Debug)]
pub enum Change {
    /// All objects, replacing what was known.
    All(Vec<Value>),
    Put(Value),
    Gone(Value),
}

#[derive(Deserialize)]
struct List {
    metadata: ListMeta,
    #[serde(default)]
    items: Vec<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMeta {
    #[serde(default)]
    resource_version: String,
}

#[derive(Deserialize)]
struct Event {
    #[serde(rename = "type")]
    kind: String,
    object: Value,
}

/// Follows the collection at one path, such as `/api/v1/pods`.
pub struct Feed {
    registry: Registry,
    path: &'static str,
    version: String,
}

impl Feed {
    pub fn new(registry: Registry, path: &'static str) -> Feed {
        Feed { registry, path, version: String::new() }
    }

    async fn ask(&self, query: &str) -> Result<Body, Status> {
        let uri: Uri = format!("{}{query}", self.path).parse().map_err(Status::internal)?;
        let info = RequestInfo::parse(&Method::GET, &uri).map_err(Status::bad_request)?;
        let request = ApiRequest {
            method: Method::GET,
            uri,
            headers: HeaderMap::new(),
            body: Bytes::new(),
            info,
            user: UserInfo::apiserver(),
        };
        let response = self.registry.handle(request).await;
        if response.status().is_success() {
            return Ok(response.into_body());
        }
        let body = response.into_body().collect().await;
        Err(serde_json::from_slice(&body)
            .unwrap_or_else(|_| Status::internal(String::from_utf8_lossy(&body))))
    }

    /// All objects now; [`Feed::run`] goes on from here.
    ///
    /// # Errors
    /// The registry's.
    pub async fn list(&mut self) -> Result<Vec<Value>, Status> {
        let body = self.ask("").await?.collect().await;
        let list: List = serde_json::from_slice(&body).map_err(Status::internal)?;
        self.version = list.metadata.resource_version;
        Ok(list.items)
    }

    /// Passes changes to `apply` until `stop`. After a break everything is listed again.
    pub async fn run(mut self, stop: CancellationToken, mut apply: impl FnMut(Change) + Send) {
        loop {
            tokio::select! {
                // Dropping a watch loses only what the next list brings again.
                () = stop.cancelled() => return,
                () = self.watch(&mut apply) => {}
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(PAUSE) => {}
            }
            if self.version.is_empty()
                && let Ok(items) = self.list().await
            {
                apply(Change::All(items));
            }
        }
    }

    /// Watches from the last version seen until the watch ends; forgets the version when it is too old.
    async fn watch(&mut self, apply: &mut (impl FnMut(Change) + Send)) {
        if self.version.is_empty() {
            return;
        }
        let query = format!("?watch=true&allowWatchBookmarks=true&resourceVersion={}", self.version);
        let mut body = match self.ask(&query).await {
            Ok(body) => body,
            Err(_) => {
                self.version.clear();
                return;
            }
        };
        let mut buffer = BytesMut::new();
        while let Some(Ok(frame)) = body.frame().await {
            let Ok(data) = frame.into_data() else { continue };
            buffer.extend_from_slice(&data);
            while let Some(end) = buffer.iter().position(|b| *b == b'\n') {
                let line = buffer.split_to(end + 1);
                let Ok(event) = serde_json::from_slice::<Event>(&line) else { continue };
                if event.kind == "ERROR" {
                    self.version.clear();
                    return;
                }
                if let Some(v) = event.object.pointer("/metadata/resourceVersion").and_then(Value::as_str) {
                    self.version = v.to_owned();
                }
                match event.kind.as_str() {
                    "ADDED" | "MODIFIED" => apply(Change::Put(event.object)),
                    "DELETED" => apply(Change::Gone(event.object)),
                    _ => {}
                }
            }
        }
    }
}
