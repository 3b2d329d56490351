//! The way of a request: parse, limit, authenticate, impersonate, authorize, then to whoever answers it.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::authn::certificate::ClientIdentity;
use crate::authn::{self, Authenticator, impersonation};
use crate::authz::{Attributes, Authorizer, Decision, node};
use crate::health::{Health, text};
use crate::metrics::{AuthnResult, ServerMetrics};
use crate::nodeproxy::NodeProxy;
use crate::registry::{self, ApiRequest, Registry};
use crate::request_info::{RequestInfo, UserInfo};
use crate::reviews;
use crate::schema::{self, Extent};
use crate::status::Status;
use crate::transport::{self, Body};
use crate::{token_request, version};

/// Largest request body, as upstream's etcd-derived limit.
pub const BODY_LIMIT: usize = 3 * 1024 * 1024;
/// For everything but watches and streams.
const REQUEST_LIMIT: Duration = Duration::from_secs(60);
/// Requests at once, upstream's defaults; watches and streams do not count once they run.
pub const READ_ONLY_LIMIT: usize = 400;
pub const MUTATING_LIMIT: usize = 200;

/// Everything behind the transport.
pub struct Server {
    pub registry: Registry,
    pub authenticator: Authenticator,
    pub authorizer: Arc<Authorizer>,
    pub admission: Arc<dyn registry::Admission>,
    pub health: Arc<Health>,
    pub metrics: ServerMetrics,
    pub node_proxy: NodeProxy,
    pub read_only: Semaphore,
    pub mutating: Semaphore,
    /// `https://ADDRESS:PORT` under which clients reach this server.
    pub url: String,
    pub stop: CancellationToken,
}

impl transport::Handler for Server {
    async fn handle(
        self: Arc<Self>,
        request: Request<Incoming>,
        peer: Option<Arc<ClientIdentity>>,
    ) -> Response<Body> {
        let start = Instant::now();
        let info = match RequestInfo::parse(request.method(), request.uri()) {
            Ok(info) => info,
            Err(message) => return Status::bad_request(message).into_response().map(Body::from),
        };
        let dry_run = request.uri().query().is_some_and(|q| q.contains("dryRun=All"));
        let connect = crate::nodeproxy::is_connect(&info);
        let long_running = info.is_long_running();
        let work = AssertUnwindSafe(self.clone().answer(request, info.clone(), peer)).catch_unwind();
        let limited = async {
            if long_running { Ok(work.await) } else { tokio::time::timeout(REQUEST_LIMIT, work).await }
        };
        let mut response = match limited.await {
            Ok(Ok(response)) => response,
            Ok(Err(_)) => {
                tracing::error!(path = %info.path, verb = %info.verb, "a request's handler panicked");
                Status::internal("the server failed on this request").into_response().map(Body::from)
            }
            Err(_) => {
                let message =
                    format!("request did not complete within requested timeout - {REQUEST_LIMIT:?}");
                Status::timeout(message, 1).into_response().map(Body::from)
            }
        };
        response.headers_mut().entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-cache, private"));
        let elapsed = (!long_running).then(|| start.elapsed());
        self.metrics.observe(&info, connect, response.status().as_u16(), dry_run, elapsed);
        response
    }
}

impl Server {
    async fn answer(
        self: Arc<Self>,
        mut request: Request<Incoming>,
        info: RequestInfo,
        peer: Option<Arc<ClientIdentity>>,
    ) -> Response<Body> {
        let user = match self.identify(&mut request, &info, peer.as_deref()).await {
            Ok(user) => user,
            Err(status) => return status.into_response().map(Body::from),
        };
        // Health must be answered under load, and administrators must be able to end the load.
        let exempt = !info.is_resource_request || info.is_long_running() || user.in_group("system:masters");
        let read_only = info.is_read_only();
        let permit = if exempt {
            None
        } else {
            let limit = if read_only { &self.read_only } else { &self.mutating };
            match limit.try_acquire() {
                Ok(permit) => Some(permit),
                Err(_) => {
                    self.metrics.reject(read_only);
                    let status = Status::too_many_requests("Too many requests, please try again later.", 1);
                    return status.into_response().map(Body::from);
                }
            }
        };
        // Both end with the request, however it ends: its time may be over, or its client gone.
        let _serving = (permit, self.metrics.inflight(read_only));
        self.clone().authorized(request, info, user).await
    }

    async fn identify(
        &self,
        request: &mut Request<Incoming>,
        info: &RequestInfo,
        peer: Option<&ClientIdentity>,
    ) -> Result<UserInfo, Status> {
        let user = match self.authenticator.authenticate(request.headers(), peer).await {
            Ok(Some(user)) => {
                self.metrics.authenticated(AuthnResult::Success);
                user
            }
            Ok(None) if authn::anonymous_may_ask(&info.path) && request.method() == Method::GET => {
                authn::anonymous()
            }
            Ok(None) => {
                self.metrics.authenticated(AuthnResult::Failure);
                return Err(Status::unauthorized());
            }
            Err(reason) => {
                self.metrics.authenticated(AuthnResult::Error);
                tracing::info!(path = %info.path, %reason, "credentials refused");
                return Err(Status::unauthorized());
            }
        };
        authn::strip_credentials(request.headers_mut());
        impersonation::apply(&self.authorizer, user, request.headers_mut())
    }

    async fn authorized(
        self: Arc<Self>,
        request: Request<Incoming>,
        info: RequestInfo,
        user: UserInfo,
    ) -> Response<Body> {
        let selector = field_selector(request.uri().query().unwrap_or_default());
        if let Err(status) = self.authorize(&Attributes::of_request(&user, &info, &selector)).await {
            return status.into_response().map(Body::from);
        }
        if crate::nodeproxy::is_connect(&info) {
            return match crate::nodeproxy::serve(self.clone(), request, info, user).await {
                Ok(response) => response,
                Err(status) => status.into_response().map(Body::from),
            };
        }
        if !info.is_resource_request
            && let Some(response) =
                self.own_paths(&info.path, request.uri().query().unwrap_or_default()).await
        {
            return response.map(Body::from);
        }
        let (parts, body) = request.into_parts();
        let body = match read_body(body).await {
            Ok(body) => body,
            Err(status) => return status.into_response().map(Body::from),
        };
        let request =
            ApiRequest { method: parts.method, uri: parts.uri, headers: parts.headers, body, info, user };
        if request.method == Method::POST {
            let own = match (request.info.api_group.as_str(), request.info.resource.as_str()) {
                ("authentication.k8s.io" | "authorization.k8s.io", _) => {
                    Some(reviews::create(&self, &request).await)
                }
                ("", "serviceaccounts") if request.info.subresource == "token" => {
                    Some(token_request::create(&self, &request).await)
                }
                _ => None,
            };
            if let Some(result) = own {
                return result.unwrap_or_else(Status::into_response).map(Body::from);
            }
        }
        let response = self.registry.handle(request).await;
        response.map(|body| Body::registry(body, &self.stop))
    }

    /// Asks the authorizers.
    ///
    /// # Errors
    /// 403 with what was asked and why it was refused.
    pub async fn authorize(&self, attributes: &Attributes<'_>) -> Result<(), Status> {
        // The graph of what a node's pods refer to follows the registry by a watch. A kubelet can be a moment faster: it then gets
        // what it needs a few milliseconds later instead of a refusal that it retries after half a second.
        let patience: &[u64] = if node::identity(attributes.user).is_some() { &[2, 10, 30] } else { &[] };
        for pause in patience {
            if self.authorizer.authorize(attributes).allowed() {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(*pause)).await;
        }
        match self.authorizer.authorize(attributes) {
            Decision::Allow(_) => Ok(()),
            Decision::NoOpinion(reason) => {
                let mut why = attributes.denial();
                if !reason.is_empty() {
                    why = format!("{why}: {reason}");
                }
                if attributes.is_resource {
                    Err(Status::forbidden(attributes.group, attributes.resource, attributes.name, &why))
                } else {
                    Err(Status::failure(403, "Forbidden", format!("forbidden: {why}")))
                }
            }
        }
    }

    /// Paths that are answered here rather than by the registry.
    async fn own_paths(&self, path: &str, query: &str) -> Option<Response<registry::Body>> {
        match path {
            "/metrics" => {
                let mut response = text(StatusCode::OK, self.metrics.encode());
                response.headers_mut().insert(
                    CONTENT_TYPE,
                    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8"),
                );
                Some(response)
            }
            "/version" | "/version/" => Some(json_response(StatusCode::OK, &version::info())),
            "/.well-known/openid-configuration" => {
                let uri = format!("{}/openid/v1/jwks", self.url);
                Some(json_response(StatusCode::OK, &self.authenticator.service_accounts.discovery(&uri)))
            }
            "/openid/v1/jwks" => {
                let mut response = json_response(StatusCode::OK, self.authenticator.service_accounts.jwks());
                response
                    .headers_mut()
                    .insert(CONTENT_TYPE, HeaderValue::from_static("application/jwk-set+json"));
                Some(response)
            }
            "/" => Some(json_response(
                StatusCode::OK,
                &json!({"paths": ["/.well-known/openid-configuration", "/api", "/api/v1", "/apis", "/healthz", "/livez", "/metrics",
                    "/openid/v1/jwks", "/openapi/v2", "/openapi/v3", "/readyz", "/version"]}),
            )),
            _ => self.health.answer(path, query).await,
        }
    }
}

fn field_selector(query: &str) -> String {
    if !query.contains("fieldSelector") {
        return String::new();
    }
    url::form_urlencoded::parse(query.as_bytes())
        .find(|(k, _)| k == "fieldSelector")
        .map(|(_, v)| v.into_owned())
        .unwrap_or_default()
}

/// The whole body, at most [`BODY_LIMIT`].
async fn read_body(body: Incoming) -> Result<Bytes, Status> {
    // Announced too large: refused before the client has sent it.
    if http_body::Body::size_hint(&body).lower() > BODY_LIMIT as u64 {
        return Err(Status::too_large(BODY_LIMIT));
    }
    match Limited::new(body, BODY_LIMIT).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(e) if e.is::<LengthLimitError>() => Err(Status::too_large(BODY_LIMIT)),
        Err(e) => Err(Status::bad_request(format!("cannot read the request's body: {e}"))),
    }
}

/// An object as a JSON response.
pub fn json_response(code: StatusCode, value: &Value) -> Response<registry::Body> {
    let mut response = Response::new(registry::Body::from(value.to_string()));
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// A request's object of a kind that is answered and not stored: JSON, YAML or protobuf.
///
/// # Errors
/// 400 when it is none of them, 415 for another content type.
pub fn parse_object(request: &ApiRequest, group: &str, kind: &str) -> Result<Value, Status> {
    let content_type =
        request.headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("application/json");
    let media = content_type.split(';').next().unwrap_or_default().trim();
    let parsed: Result<Value, String> = match media {
        "application/json" | "" => serde_json::from_slice(&request.body).map_err(|e| e.to_string()),
        crate::protobuf::MEDIA_TYPE => crate::protobuf::decode(&request.body).map_err(|e| e.to_string()),
        "application/yaml" => serde_saphyr::from_slice(&request.body).map_err(|e| e.to_string()),
        other => {
            let message = format!(
                "the body of the request was in an unknown format - accepted media types include: application/json, application/yaml (got {other})"
            );
            return Err(Status::unsupported_media_type(message));
        }
    };
    match parsed {
        Ok(mut value @ Value::Object(_)) => {
            let type_name = schema::type_of(group, "v1", kind).unwrap_or_default();
            schema::conform(&mut value, type_name, Extent::Part)
                .map_err(|e| Status::unreadable("v1", kind, e.got, &e.path, e.expected))?;
            Ok(value)
        }
        Ok(_) => Err(Status::bad_request("the body of the request is no object")),
        Err(e) => Err(Status::bad_request(format!("cannot read the request's object: {e}"))),
    }
}
