//! The generic registry: every REST verb for every resource of the table, over one store.

use std::{net::Ipv4Addr, ops::RangeInclusive, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Response, Uri, header};
use ipnet::Ipv4Net;
use orlop_base::supervise::TaskGroup;
use orlop_store::{Revision, Store};
use parking_lot::RwLock;
use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    request_info::{RequestInfo, UserInfo},
    resources::{Resource, ResourceTable},
    status::Status,
    watch_cache::{Hub, Selection, store_status},
};

pub mod admission;
mod body;
mod context;
mod delete;
mod metadata;
pub mod object;
pub mod options;
mod read;
pub mod respond;
pub mod services;
mod subresources;
mod write;

pub use admission::{Admission, AdmitAll, Attributes, Operation};
pub use body::Body;
pub(crate) use metadata::now;

use context::Context;
use options::{DeleteOptions, ListOptions, Query};
use services::Services;
use write::Endpoint;

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
    hub: Arc<Hub>,
    table: RwLock<Arc<ResourceTable>>,
    admission: RwLock<Arc<dyn Admission>>,
    services: Services,
    options: Options,
    stop: CancellationToken,
}

impl Registry {
    /// Opens the registry over a store and repairs what depends on stored objects (Service addresses and ports).
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn new(store: Arc<dyn Store>, options: Options) -> Result<Registry, Status> {
        let hub = Hub::start(store.clone(), &options.tasks).await?;
        let services = Services::new(options.service_cidr, options.node_ports.clone());
        let inner = Inner {
            store,
            hub,
            table: RwLock::new(Arc::new(ResourceTable::builtin())),
            admission: RwLock::new(Arc::new(AdmitAll)),
            services,
            stop: options.tasks.stop_token(),
            options,
        };
        let registry = Registry { inner: Arc::new(inner) };
        for service in registry.list("", "services", "").await? {
            registry.inner.services.occupy(&service);
        }
        Ok(registry)
    }

    /// Replaces admission control; requests that run already keep the one they began with.
    pub fn set_admission(&self, admission: Arc<dyn Admission>) {
        *self.inner.admission.write() = admission;
    }

    /// The resources served now.
    pub fn table(&self) -> Arc<ResourceTable> {
        self.inner.table.read().clone()
    }

    /// Changes the resources served: how custom resources come and go.
    pub fn change_table(&self, change: impl FnOnce(&mut ResourceTable)) {
        let mut slot = self.inner.table.write();
        let mut table = (**slot).clone();
        change(&mut table);
        *slot = Arc::new(table);
    }

    /// Answers a resource, discovery or OpenAPI request. `info.is_resource_request` decides which it is.
    pub async fn handle(&self, request: ApiRequest) -> Response<Body> {
        let answer = if request.info.is_resource_request {
            self.resource_request(request).await
        } else {
            self.other_request(&request)
        };
        answer.unwrap_or_else(Status::into_response)
    }

    fn other_request(&self, request: &ApiRequest) -> Result<Response<Body>, Status> {
        let table = self.table();
        let path = request.info.path.trim_end_matches('/');
        if let Some(answer) = crate::discovery::answer(&table, path, &request.headers)? {
            return Ok(answer);
        }
        match crate::openapi::answer(&table, path, &request.uri, &request.headers)? {
            Some(answer) => Ok(answer),
            None => Err(Status::no_such_path()),
        }
    }

    async fn resource_request(&self, request: ApiRequest) -> Result<Response<Body>, Status> {
        let info = &request.info;
        let table = self.table();
        let resource =
            table.get(&info.api_group, &info.api_version, &info.resource).ok_or_else(Status::no_such_path)?;
        let stored = table.by_storage(&resource.storage).unwrap_or(resource).clone();
        let query = Query::of(&request.uri);
        let wanted = context::wanted(&request.headers, &query)?;
        let ctx =
            Context { resource: resource.clone(), stored, query, wanted, warnings: Vec::new(), request };
        self.route(ctx).await
    }

    async fn route(&self, ctx: Context) -> Result<Response<Body>, Status> {
        let info = &ctx.request.info;
        if !info.subresource.is_empty() {
            return self.subresource_request(ctx).await;
        }
        if ctx.resource.review {
            return Err(Status::no_such_path());
        }
        let verb = info.verb.clone();
        if !ctx.resource.serves(&verb) {
            return Err(Status::method_not_allowed(&ctx.resource.group, &ctx.resource.plural, &verb));
        }
        if ctx.resource.plural == "bindings" {
            return self.bind_by_body(ctx).await;
        }
        match verb.as_str() {
            "get" => self.get_request(&ctx).await,
            "list" => self.list_request(&ctx).await,
            "watch" => self.watch_request(&ctx).await,
            "create" => self.create_request(ctx).await,
            "update" => self.update_request(ctx, Endpoint::Main).await,
            "patch" => self.patch_request(ctx, Endpoint::Main).await,
            "delete" => self.delete_request(ctx).await,
            "deletecollection" => self.delete_collection_request(ctx).await,
            _ => Err(Status::method_not_allowed(&ctx.resource.group, &ctx.resource.plural, &verb)),
        }
    }

    /// POST on `bindings` names the pod in its body.
    async fn bind_by_body(&self, ctx: Context) -> Result<Response<Body>, Status> {
        let body = crate::codec::decode(&ctx.request.headers, &ctx.request.body)?.value;
        let name = crate::value::text(&body, "metadata.name").to_owned();
        let mut sub = self.context_for("", "pods", ctx.namespace(), &name, "create")?;
        sub.request.info.subresource = "binding".into();
        sub.request.user = ctx.request.user;
        sub.request.headers = ctx.request.headers;
        sub.request.body = ctx.request.body;
        sub.query = ctx.query;
        self.subresource_request(sub).await
    }

    /// A context for a request that the server makes itself.
    fn context_for(
        &self,
        group: &str,
        resource: &str,
        namespace: &str,
        name: &str,
        verb: &str,
    ) -> Result<Context, Status> {
        let table = self.table();
        let row =
            table.any_version(group, resource).ok_or_else(|| Status::not_found(group, resource, name))?;
        let stored = table.by_storage(&row.storage).unwrap_or(row).clone();
        let mut headers = HeaderMap::new();
        headers.insert(header::USER_AGENT, HeaderValue::from_static("apiserver"));
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let info = RequestInfo {
            is_resource_request: true,
            verb: verb.into(),
            api_prefix: if group.is_empty() { "api".into() } else { "apis".into() },
            api_group: group.into(),
            api_version: row.version.to_string(),
            namespace: namespace.into(),
            resource: resource.into(),
            name: name.into(),
            ..RequestInfo::default()
        };
        let request = ApiRequest {
            method: Method::GET,
            uri: Uri::default(),
            headers,
            body: Bytes::new(),
            info,
            user: UserInfo::apiserver(),
        };
        Ok(Context {
            resource: row.clone(),
            stored,
            query: Query::default(),
            wanted: context::JSON,
            warnings: Vec::new(),
            request,
        })
    }

    /// One object, as `system:apiserver`. `namespace` is empty for cluster-scoped resources.
    ///
    /// # Errors
    /// 404 and what the store says.
    pub async fn get(
        &self,
        group: &str,
        resource: &str,
        namespace: &str,
        name: &str,
    ) -> Result<Value, Status> {
        let ctx = self.context_for(group, resource, namespace, name, "get")?;
        self.load(&ctx.resource, namespace, name).await?.value()
    }

    /// All objects of a namespace, or of all namespaces when it is empty.
    ///
    /// # Errors
    /// What the store says.
    pub async fn list(&self, group: &str, resource: &str, namespace: &str) -> Result<Vec<Value>, Status> {
        let ctx = self.context_for(group, resource, namespace, "", "list")?;
        let selection = Selection::parse(&ctx.resource, namespace, "", "")?;
        let all = ListOptions::parse(&Query::default(), false)?;
        let (objects, _) = self.select(&ctx.resource, &selection, &all).await?;
        objects.iter().map(|o| o.value()).collect()
    }

    /// Creates an object through admission and validation.
    ///
    /// # Errors
    /// As the API answers.
    pub async fn create(
        &self,
        group: &str,
        resource: &str,
        namespace: &str,
        object: Value,
    ) -> Result<Value, Status> {
        let mut ctx = self.context_for(group, resource, namespace, "", "create")?;
        let options = ctx.write_options()?;
        let mut object = object;
        let kind = ctx.resource.clone();
        context::check_kind(&mut object, &kind.api_version(), &kind.kind)?;
        self.create_object(&mut ctx, object, &options).await?.value()
    }

    /// Replaces an object; optimistic when `metadata.resourceVersion` is set.
    ///
    /// # Errors
    /// As the API answers.
    pub async fn update(
        &self,
        group: &str,
        resource: &str,
        namespace: &str,
        name: &str,
        object: Value,
    ) -> Result<Value, Status> {
        self.update_endpoint(group, resource, namespace, name, object, Endpoint::Main).await
    }

    /// Replaces the status of an object; optimistic when `metadata.resourceVersion` is set.
    ///
    /// # Errors
    /// As the API answers.
    pub async fn update_status(
        &self,
        group: &str,
        resource: &str,
        namespace: &str,
        name: &str,
        object: Value,
    ) -> Result<Value, Status> {
        self.update_endpoint(group, resource, namespace, name, object, Endpoint::Status).await
    }

    async fn update_endpoint(
        &self,
        group: &str,
        resource: &str,
        namespace: &str,
        name: &str,
        mut object: Value,
        endpoint: Endpoint,
    ) -> Result<Value, Status> {
        let mut ctx = self.context_for(group, resource, namespace, name, "update")?;
        let options = ctx.write_options()?;
        let kind = ctx.resource.clone();
        context::check_kind(&mut object, &kind.api_version(), &kind.kind)?;
        self.change(&mut ctx, endpoint, &options, move |_, _| Ok(object.clone())).await?.object.value()
    }

    /// Deletes an object with default options.
    ///
    /// # Errors
    /// As the API answers.
    pub async fn delete(
        &self,
        group: &str,
        resource: &str,
        namespace: &str,
        name: &str,
    ) -> Result<(), Status> {
        let mut ctx = self.context_for(group, resource, namespace, name, "delete")?;
        self.delete_object(&mut ctx, namespace, name, &DeleteOptions::default()).await.map(|_| ())
    }

    /// Tells of changes of a resource: the value is the revision of its latest change seen. Level-triggered; read the
    /// objects again when it changes. The channel closes when the cache has to be rebuilt: subscribe again then.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn subscribe(&self, group: &str, resource: &str) -> Result<watch::Receiver<Revision>, Status> {
        let ctx = self.context_for(group, resource, "", "", "watch")?;
        Ok(self.inner.hub.activate(&ctx.stored, None).await?.changes())
    }

    /// The store's revision, which proves that the store answers (readiness).
    ///
    /// # Errors
    /// What the store says.
    pub async fn revision(&self) -> Result<Revision, Status> {
        self.inner.store.current_revision().await.map_err(store_status)
    }

    /// The resource at a path, for those who need its names.
    pub fn resource(&self, group: &str, version: &str, plural: &str) -> Option<Arc<Resource>> {
        self.table().get(group, version, plural).cloned()
    }
}
