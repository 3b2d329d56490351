//! The generic registry: every REST verb for every resource of the table, over one store.

use std::{net::Ipv4Addr, ops::RangeInclusive, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Method, Uri};
use ipnet::Ipv4Net;
use orlop_base::supervise::TaskGroup;
use orlop_store::{Revision, Store};
use parking_lot::RwLock;
use serde_json::Value;
use tokio::sync::watch;

use crate::{
    request_info::{RequestInfo, UserInfo},
    status::Status,
};

pub mod admission;
mod body;

pub use admission::{Admission, AdmitAll, Attributes, Operation};
pub use body::Body;

/// One API request after authentication and authorisation.
#[derive(Clone, Debug)]
pub struct ApiRequest {
    /// HTTP method.
    pub method: Method,
    /// Path and query.
    pub uri: Uri,
    /// Accept, Content-Type, Accept-Encoding and User-Agent are looked at.
    pub headers: HeaderMap,
    /// The whole body; the transport limits its size.
    pub body: Bytes,
    /// The parsed path.
    pub info: RequestInfo,
    /// Who asks.
    pub user: UserInfo,
}

/// How the registry behaves.
#[derive(Clone)]
pub struct Options {
    /// Owns the registry's background work.
    pub tasks: TaskGroup,
    /// Where ClusterIPs come from.
    pub service_cidr: Ipv4Net,
    /// Where node ports come from.
    pub node_ports: RangeInclusive<u16>,
    /// How long Events are kept.
    pub event_ttl: Duration,
}

impl Options {
    /// The defaults: 10.96.0.0/12, 30000-32767, events for an hour.
    pub fn new(tasks: TaskGroup) -> Options {
        Options {
            tasks,
            service_cidr: Ipv4Net::new_assert(Ipv4Addr::new(10, 96, 0, 0), 12),
            node_ports: 30000..=32767,
            event_ttl: Duration::from_secs(3600),
        }
    }
}

/// The registry. Cloning gives another handle to the same one.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

struct Inner {
    store: Arc<dyn Store>,
    admission: RwLock<Arc<dyn Admission>>,
    changes: watch::Sender<Revision>,
}

impl Registry {
    /// Opens the registry over a store and repairs what depends on stored objects (Service addresses and ports).
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn new(store: Arc<dyn Store>, _options: Options) -> Result<Registry, Status> {
        let revision = store.current_revision().await.map_err(Status::internal)?;
        let inner =
            Inner { store, admission: RwLock::new(Arc::new(AdmitAll)), changes: watch::channel(revision).0 };
        Ok(Registry { inner: Arc::new(inner) })
    }

    /// Replaces admission control; requests that run already keep the one they began with.
    pub fn set_admission(&self, admission: Arc<dyn Admission>) {
        *self.inner.admission.write() = admission;
    }

    /// Answers a resource, discovery or OpenAPI request. `info.is_resource_request` decides which it is.
    pub async fn handle(&self, _request: ApiRequest) -> http::Response<Body> {
        Status::no_such_path().into_response()
    }

    /// One object, as `system:apiserver`. `namespace` is empty for cluster-scoped resources.
    pub async fn get(
        &self,
        group: &str,
        resource: &str,
        _namespace: &str,
        name: &str,
    ) -> Result<Value, Status> {
        Err(Status::not_found(group, resource, name))
    }

    /// All objects of a namespace, or of all namespaces when it is empty.
    pub async fn list(&self, _group: &str, _resource: &str, _namespace: &str) -> Result<Vec<Value>, Status> {
        Ok(Vec::new())
    }

    /// Creates an object through admission and validation.
    pub async fn create(
        &self,
        group: &str,
        resource: &str,
        _namespace: &str,
        _object: Value,
    ) -> Result<Value, Status> {
        Err(Status::not_found(group, resource, ""))
    }

    /// Replaces an object; optimistic when `metadata.resourceVersion` is set.
    pub async fn update(
        &self,
        group: &str,
        resource: &str,
        _namespace: &str,
        name: &str,
        _object: Value,
    ) -> Result<Value, Status> {
        Err(Status::not_found(group, resource, name))
    }

    /// Deletes an object with default options.
    pub async fn delete(
        &self,
        group: &str,
        resource: &str,
        _namespace: &str,
        name: &str,
    ) -> Result<(), Status> {
        Err(Status::not_found(group, resource, name))
    }

    /// Tells of changes of a resource: the value is the revision of its latest change seen. Level-triggered; read the
    /// objects again when it changes.
    pub async fn subscribe(
        &self,
        _group: &str,
        _resource: &str,
    ) -> Result<watch::Receiver<Revision>, Status> {
        Ok(self.inner.changes.subscribe())
    }

    /// The store's revision, which proves that the store answers (readiness).
    pub async fn revision(&self) -> Result<Revision, Status> {
        self.inner.store.current_revision().await.map_err(Status::internal)
    }
}
