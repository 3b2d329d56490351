//! Fetches manifests and blobs of one reference from the hosts that serve its registry.

mod blob;

pub(crate) use blob::Hosts;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    ACCEPT, AUTHORIZATION, CONTENT_TYPE, LOCATION, PROXY_AUTHORIZATION, RANGE, RETRY_AFTER, WWW_AUTHENTICATE,
};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use parking_lot::Mutex;
use tokio::sync::OnceCell;
use url::Url;

use super::auth::{self, Challenge};
use super::hosts::{self, Host};
use super::proxy::Routes;
use super::transport::{self, Http, Trust};
use crate::store::blocking;
use crate::{Algorithm, Auth, Digest, Error, Options, Reference, Result};

const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";
/// Larger manifests are refused, as the distribution specification advises.
pub(crate) const MAX_MANIFEST: u64 = 4 << 20;
const MAX_CONFIG: u64 = 8 << 20;
/// Connections for a request that could not be sent.
const DISPATCH_ATTEMPTS: u32 = 4;
/// Attempts for a document, which has cost nothing yet.
const DOCUMENT_ATTEMPTS: u32 = 3;
const REDIRECTS: usize = 10;

struct Endpoint {
    host: Host,
    http: Http,
    /// For https addresses that a host without TLS names: its token service, and what it redirects to.
    elsewhere: OnceCell<Http>,
    auth: Option<Auth>,
    /// The `Authorization` header that worked last.
    granted: Mutex<Option<HeaderValue>>,
}

/// How the registry names what it sent.
fn content_digest(response: &Response<Incoming>) -> Option<Digest> {
    response.headers().get("docker-content-digest")?.to_str().ok()?.parse().ok()
}

/// One pull's conversation with a registry and its mirrors.
pub(crate) struct Session {
    reference: Reference,
    endpoints: Vec<Endpoint>,
    routes: Arc<Routes>,
    patience: Duration,
    pause: Duration,
    outage: Duration,
}

/// A manifest or config to fetch.
struct Document {
    what: &'static str,
    path: String,
    by_tag: bool,
    expect: Option<Digest>,
    size: Size,
}

#[derive(Clone, Copy)]
enum Size {
    AtMost(u64),
    Exactly(u64),
}

/// Why one request failed, and whether trying again may help.
struct Failure {
    error: Box<Error>,
    retry: bool,
    /// The server said how long to wait.
    after: Option<Duration>,
}

impl Failure {
    /// How long to wait before attempt number `next`; `None` when there is no use in it.
    fn delay(&self, next: u32, session: &Session) -> Option<Duration> {
        let (patience, own) = (session.patience, session.pause * (1 << next.min(7)).min(100));
        let delay = self.after.map_or(own, |a| a.max(own));
        // Whoever waits longer had better be told.
        (self.retry && (delay <= patience || self.after.is_none())).then_some(delay)
    }
}

impl Session {
    /// Reads the host configuration and credentials. Blocks on small files.
    pub fn new(reference: &Reference, options: &Options, auth: Option<&Auth>) -> Result<Session> {
        let mut endpoints = Vec::new();
        let routes = Arc::new(Routes::new(&options.proxies)?);
        for host in hosts::hosts_for(options.certs_dir.as_deref(), &reference.registry)? {
            let given = auth.filter(|a| {
                // Credentials without an address are the registry's own; a mirror does not get to see them.
                if a.server_address.is_empty() {
                    host.upstream
                } else {
                    auth::same_server(&a.server_address, &host.authority)
                        || (host.upstream && auth::same_server(&a.server_address, &reference.registry))
                }
            });
            let auth = match (given, options.docker_config.as_deref()) {
                (Some(a), _) => Some(a.clone()),
                (None, Some(path)) => auth::from_docker_config(path, &host.authority)?,
                (None, None) => None,
            };
            let http = transport::http_client(&host, Trust::of(&host), &routes)?;
            let (elsewhere, granted) = (OnceCell::new(), Mutex::new(None));
            endpoints.push(Endpoint { host, http, elsewhere, auth, granted });
        }
        let (patience, pause, outage) = (options.patience, options.pause, options.outage);
        Ok(Session { reference: reference.clone(), endpoints, routes, patience, pause, outage })
    }

    /// The manifest or index of the reference, and how the registry names it.
    pub async fn resolve(&self) -> Result<(Bytes, Algorithm)> {
        let r = &self.reference;
        let what = match (&r.digest, &r.tag) {
            (Some(d), _) => d.to_string(),
            (None, Some(t)) => t.clone(),
            (None, None) => "latest".to_owned(),
        };
        self.manifest(&what, r.digest.is_none(), r.digest).await
    }

    /// The manifest with `digest`, verified.
    pub async fn manifest_by_digest(&self, digest: &Digest) -> Result<Bytes> {
        Ok(self.manifest(&digest.to_string(), false, Some(*digest)).await?.0)
    }

    /// The digest of what the reference names now, if the registry tells without sending the manifest. For a digest that is whether
    /// it lets the caller have it.
    pub async fn current_digest(&self) -> Option<Digest> {
        let digest = self.reference.digest;
        let what = digest.map(|d| d.to_string()).or_else(|| self.reference.tag.clone())?;
        for endpoint in &self.endpoints {
            if !(if digest.is_some() { endpoint.host.pull } else { endpoint.host.resolve }) {
                continue;
            }
            let path = format!("/{}/manifests/{what}", self.reference.repository);
            if let Ok(response) = self.request(endpoint, Method::HEAD, &path, None).await {
                return content_digest(&response);
            }
        }
        None
    }

    async fn manifest(&self, what: &str, by_tag: bool, expect: Option<Digest>) -> Result<(Bytes, Algorithm)> {
        let path = format!("/{}/manifests/{what}", self.reference.repository);
        self.document(&Document {
            what: "the manifest",
            path,
            by_tag,
            expect,
            size: Size::AtMost(MAX_MANIFEST),
        })
        .await
    }

    /// A small blob of `size` bytes, verified.
    pub async fn small_blob(&self, digest: &Digest, size: u64) -> Result<Bytes> {
        let what = "the image config";
        if size > MAX_CONFIG {
            return Err(Error::Malformed {
                what: what.into(),
                reference: self.reference.to_string(),
                why: format!("its descriptor says {size} bytes, more than {MAX_CONFIG}"),
            });
        }
        let path = format!("/{}/blobs/{digest}", self.reference.repository);
        let size = Size::Exactly(size);
        Ok(self.document(&Document { what, path, by_tag: false, expect: Some(*digest), size }).await?.0)
    }

    /// Tries each suitable host, with retries. The last host's error counts, which is the registry's own.
    async fn document(&self, document: &Document) -> Result<(Bytes, Algorithm)> {
        let mut last = None;
        for endpoint in &self.endpoints {
            if !(if document.by_tag { endpoint.host.resolve } else { endpoint.host.pull }) {
                continue;
            }
            for attempt in 1..=DOCUMENT_ATTEMPTS {
                match self.document_from(endpoint, document).await {
                    Ok(v) => return Ok(v),
                    Err(f) => {
                        tracing::debug!(host = endpoint.host.authority, error = %f.error, "request failed");
                        let delay = f.delay(attempt, self);
                        last = Some(*f.error);
                        match delay {
                            Some(delay) if attempt < DOCUMENT_ATTEMPTS => tokio::time::sleep(delay).await,
                            _ => break,
                        }
                    }
                }
            }
        }
        Err(last.unwrap_or_else(|| self.no_host()))
    }

    async fn document_from(&self, endpoint: &Endpoint, d: &Document) -> Result<(Bytes, Algorithm), Failure> {
        let response = self.request(endpoint, Method::GET, &d.path, None).await?;
        let named = d.expect.or_else(|| content_digest(&response));
        let body = self.collect(endpoint, response, d.size).await?;
        if let Some(expected) = &d.expect {
            self.verify(d.what, endpoint, expected, &body)?;
        }
        Ok((body, named.map_or(Algorithm::Sha256, |n| n.algorithm())))
    }

    /// One request, with credentials when the host asks for them.
    async fn request(
        &self,
        endpoint: &Endpoint,
        method: Method,
        path: &str,
        range: Option<&str>,
    ) -> Result<Response<Incoming>, Failure> {
        let mut url = Url::parse(&format!("{}{path}", endpoint.host.base))
            .map_err(|e| final_failure(self.registry_error(endpoint, format!("its URL is invalid: {e}"))))?;
        // A mirror may stand for several registries; containerd tells it in the same way.
        if endpoint.host.authority != hosts::own_authority(&self.reference.registry) {
            url.query_pairs_mut().append_pair("ns", &self.reference.registry);
        }
        let (first, from) = self.send(endpoint, &method, url.clone(), range).await?;
        // The caller knows what to make of that.
        let as_asked = |r: Response<Incoming>| {
            let unsatisfied = range.is_some() && r.status() == StatusCode::RANGE_NOT_SATISFIABLE;
            if unsatisfied { Ok(r) } else { self.check(endpoint, r) }
        };
        if first.status() != StatusCode::UNAUTHORIZED {
            return as_asked(first);
        }
        // Whoever the registry redirects to must not choose where the credentials go.
        if from.origin() != url.origin() {
            let text = format!("HTTP 401 from {}, to which it redirects", from.authority());
            return Err(final_failure(self.unauthorized(endpoint, text)));
        }
        let challenge = first
            .headers()
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter_map(|v| v.to_str().ok())
            .filter_map(auth::parse_challenge)
            .max_by_key(|c| matches!(c, Challenge::Bearer { .. }));
        let granted = match challenge {
            Some(Challenge::Basic) => match &endpoint.auth {
                Some(a) if !a.username.is_empty() => auth::basic(a),
                _ => return Err(final_failure(self.unauthorized(endpoint, "it wants credentials".into()))),
            },
            Some(Challenge::Bearer { realm, service, scope }) => {
                format!("Bearer {}", self.token(endpoint, &realm, service, scope).await?)
            }
            None => return self.check(endpoint, first),
        };
        let mut header = HeaderValue::from_str(&granted).map_err(|_| {
            final_failure(self.unauthorized(endpoint, "its token is not a header value".into()))
        })?;
        header.set_sensitive(true);
        *endpoint.granted.lock() = Some(header);
        let (second, _) = self.send(endpoint, &method, url, range).await?;
        as_asked(second)
    }

    /// One request with redirects followed, and who answered it. Credentials go to the first host only.
    async fn send(
        &self,
        endpoint: &Endpoint,
        method: &Method,
        url: Url,
        range: Option<&str>,
    ) -> Result<(Response<Incoming>, Url), Failure> {
        let origin = url.origin();
        let mut url = url;
        for _ in 0..REDIRECTS {
            let mut request =
                Request::builder().method(method).uri(url.as_str()).header(ACCEPT, MANIFEST_TYPES);
            request = request.header("user-agent", concat!("orlop/", env!("CARGO_PKG_VERSION")));
            let mut authorization = None;
            if url.origin() == origin {
                for (k, v) in &endpoint.host.headers {
                    request = request.header(k, v);
                }
                let preset = endpoint.auth.as_ref().filter(|a| !a.registry_token.is_empty());
                authorization = endpoint.granted.lock().clone();
                if let (None, Some(a)) = (&authorization, preset) {
                    let text = format!("Bearer {}", a.registry_token);
                    authorization = Some(HeaderValue::from_str(&text).map_err(|_| {
                        final_failure(self.unauthorized(endpoint, "its token cannot be sent".into()))
                    })?);
                }
            }
            if let Some(range) = range {
                request = request.header(RANGE, range);
            }
            if let Some(for_proxy) = self.routes.authorization(&url) {
                request = request.header(PROXY_AUTHORIZATION, for_proxy);
            }
            let mut request = request
                .body(Full::default())
                .map_err(|e| final_failure(self.registry_error(endpoint, e.to_string())))?;
            if let Some(mut value) = authorization {
                value.set_sensitive(true);
                // In place of what hosts.toml says.
                request.headers_mut().insert(AUTHORIZATION, value);
            }
            let response = self.exchange(endpoint, request, "").await?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok((response, url));
            }
            let next = response
                .headers()
                .get(LOCATION)
                .and_then(|v| v.to_str().ok())
                .and_then(|v| url.join(v).ok())
                .filter(|u| matches!(u.scheme(), "http" | "https"));
            let next = next.ok_or_else(|| {
                final_failure(self.registry_error(endpoint, "it redirects without a usable address".into()))
            })?;
            if url.scheme() == "https" && next.scheme() == "http" {
                let text = format!("it redirects from TLS to plain HTTP at {}", next.authority());
                return Err(final_failure(self.registry_error(endpoint, text)));
            }
            url = next;
        }
        Err(final_failure(self.registry_error(endpoint, "it redirects too often".into())))
    }

    /// One request and its response's head. `whose` goes before what failed.
    async fn exchange(
        &self,
        endpoint: &Endpoint,
        request: Request<Full<Bytes>>,
        whose: &str,
    ) -> Result<Response<Incoming>, Failure> {
        let secure = request.uri().scheme_str() == Some("https");
        let http = match Trust::of(&endpoint.host) {
            Trust::Named if secure => {
                let make = || {
                    let (host, routes) = (endpoint.host.clone(), self.routes.clone());
                    blocking(move || transport::http_client(&host, Trust::System, &routes))
                };
                endpoint.elsewhere.get_or_try_init(make).await.map_err(final_failure)?
            }
            _ => &endpoint.http,
        };
        let send = || tokio::time::timeout(self.patience, http.request(request.clone()));
        let mut result = send().await;
        for _ in 1..DISPATCH_ATTEMPTS {
            match &result {
                Ok(Err(e)) if is_unsent(e) => result = send().await,
                _ => break,
            }
        }
        match result {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(e)) if is_no_http(&e) => {
                let text = format!("{whose}its answer is not usable HTTP: {}", chain(&e));
                Err(final_failure(self.registry_error(endpoint, text)))
            }
            Ok(Err(e)) => Err(self.unreachable(endpoint, format!("{whose}{}", chain(&e)))),
            Err(_) => {
                Err(self.unreachable(endpoint, format!("{whose}no response within {:?}", self.patience)))
            }
        }
    }

    fn check(
        &self,
        endpoint: &Endpoint,
        response: Response<Incoming>,
    ) -> Result<Response<Incoming>, Failure> {
        let status = response.status();
        let reference = || self.reference.to_string();
        let registry = || endpoint.host.authority.clone();
        let after = response.headers().get(RETRY_AFTER).and_then(|v| retry_after(v.to_str().ok()?));
        Err(match status {
            s if s.is_success() => return Ok(response),
            StatusCode::NOT_FOUND => {
                final_failure(Error::NotFound { reference: reference(), registry: registry() })
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                final_failure(self.unauthorized(endpoint, format!("HTTP {status}")))
            }
            StatusCode::TOO_MANY_REQUESTS => Failure {
                error: Box::new(Error::TooManyRequests { reference: reference(), registry: registry() }),
                retry: true,
                after,
            },
            s => Failure {
                error: Box::new(self.registry_error(endpoint, format!("HTTP {s}"))),
                retry: s.is_server_error() || s == StatusCode::REQUEST_TIMEOUT,
                after,
            },
        })
    }

    /// Asks a token service (distribution's token authentication specification).
    async fn token(
        &self,
        endpoint: &Endpoint,
        realm: &str,
        service: Option<String>,
        scope: Option<String>,
    ) -> Result<String, Failure> {
        let refuse = |text: String| final_failure(self.unauthorized(endpoint, text));
        let mut url = Url::parse(realm).map_err(|e| refuse(format!("its token address is invalid: {e}")))?;
        if endpoint.host.base.starts_with("https:") && url.scheme() != "https" && endpoint.auth.is_some() {
            return Err(refuse(format!(
                "its token service {} would get the password without TLS",
                url.authority()
            )));
        }
        let scope = scope.unwrap_or_else(|| format!("repository:{}:pull", self.reference.repository));
        let auth = endpoint.auth.as_ref();
        let has_user = auth.is_some_and(|a| !a.username.is_empty());
        let mut request = Request::builder();
        let mut form: Vec<(&str, &str)> = Vec::new();
        if let Some(service) = &service {
            form.push(("service", service));
        }
        form.push(("scope", &scope));
        let refresh = auth.filter(|a| !a.identity_token.is_empty());
        if let Some(a) = refresh {
            form.extend([
                ("grant_type", "refresh_token"),
                ("client_id", "orlop"),
                ("refresh_token", a.identity_token.as_str()),
            ]);
            request = request.method(Method::POST).header(CONTENT_TYPE, "application/x-www-form-urlencoded");
        } else if let Some(a) = auth.filter(|_| has_user) {
            form.push(("account", &a.username));
            let mut header = HeaderValue::from_str(&auth::basic(a))
                .map_err(|_| refuse("the credentials cannot be sent".into()))?;
            header.set_sensitive(true);
            request = request.header(AUTHORIZATION, header);
        }
        let body = if refresh.is_some() {
            Full::from(url::form_urlencoded::Serializer::new(String::new()).extend_pairs(&form).finish())
        } else {
            url.query_pairs_mut().extend_pairs(&form);
            Full::default()
        };
        let request =
            request.uri(url.as_str()).body(body).map_err(|e| refuse(format!("token request: {e}")))?;
        let response = self.exchange(endpoint, request, "its token service: ").await?;
        if !response.status().is_success() {
            let status = response.status();
            let failure = refuse(format!("its token service answers HTTP {status}"));
            let retry = status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
            return Err(Failure { retry, ..failure });
        }
        #[derive(serde::Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        let body = self.collect(endpoint, response, Size::AtMost(1 << 20)).await?;
        let token: Token =
            serde_json::from_slice(&body).map_err(|e| refuse(format!("its token is not readable: {e}")))?;
        token
            .token
            .or(token.access_token)
            .filter(|t| !t.is_empty())
            .ok_or_else(|| refuse("its token service sent no token".into()))
    }

    async fn collect(
        &self,
        endpoint: &Endpoint,
        response: Response<Incoming>,
        size: Size,
    ) -> Result<Bytes, Failure> {
        let (Size::AtMost(limit) | Size::Exactly(limit)) = size;
        let body = http_body_util::Limited::new(response.into_body(), limit as usize);
        match tokio::time::timeout(self.patience * 2, body.collect()).await {
            Err(_) => Err(self.unreachable(endpoint, "the transfer stalled".into())),
            Ok(Ok(all)) => {
                let body = all.to_bytes();
                match size {
                    Size::Exactly(n) if body.len() as u64 != n => {
                        let text = format!("a document has {} bytes, its descriptor says {n}", body.len());
                        Err(final_failure(self.registry_error(endpoint, text)))
                    }
                    _ => Ok(body),
                }
            }
            Ok(Err(e)) if e.is::<http_body_util::LengthLimitError>() => Err(final_failure(
                self.registry_error(endpoint, format!("a document is larger than {limit} bytes")),
            )),
            Ok(Err(e)) => Err(self.unreachable(endpoint, chain(&*e))),
        }
    }

    fn verify(&self, what: &str, endpoint: &Endpoint, expected: &Digest, body: &[u8]) -> Result<(), Failure> {
        let actual = expected.same_of(body);
        if actual == *expected {
            return Ok(());
        }
        Err(final_failure(Error::DigestMismatch {
            what: what.to_owned(),
            reference: self.reference.to_string(),
            origin: endpoint.host.authority.clone(),
            expected: expected.to_string(),
            actual: actual.to_string(),
        }))
    }

    fn unreachable(&self, endpoint: &Endpoint, detail: String) -> Failure {
        Failure {
            error: Box::new(Error::Unreachable {
                reference: self.reference.to_string(),
                registry: endpoint.host.authority.clone(),
                detail,
            }),
            retry: true,
            after: None,
        }
    }

    fn unauthorized(&self, endpoint: &Endpoint, detail: String) -> Error {
        Error::Unauthorized {
            reference: self.reference.to_string(),
            registry: endpoint.host.authority.clone(),
            detail,
        }
    }

    fn registry_error(&self, endpoint: &Endpoint, detail: String) -> Error {
        Error::Registry {
            reference: self.reference.to_string(),
            registry: endpoint.host.authority.clone(),
            detail,
        }
    }

    fn no_host(&self) -> Error {
        Error::Registry {
            reference: self.reference.to_string(),
            registry: self.reference.registry.clone(),
            detail: "hosts.toml gives no host the capability that this needs".into(),
        }
    }

    /// Where blobs come from, for error texts.
    pub fn origin(&self) -> &str {
        &self.reference.registry
    }
}

fn final_failure(error: Error) -> Failure {
    Failure { error: Box::new(error), retry: false, after: None }
}

/// Seconds, or a date (RFC 9110, "Retry-After").
pub(crate) fn retry_after(value: &str) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let at = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(value).ok()?;
    let left = at.as_second().saturating_sub(jiff::Timestamp::now().as_second());
    Some(Duration::from_secs(left.max(0).unsigned_abs()))
}

/// Where the bytes of a 206 response start.
pub(crate) fn range_start(value: &str) -> Option<u64> {
    value.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

/// Whether what came back cannot be read as HTTP, such as a head of endless headers.
fn is_no_http(e: &(dyn std::error::Error + 'static)) -> bool {
    hyper_error(e).is_some_and(hyper::Error::is_parse)
}

/// Whether the server ended the connection before the request was on its way. Its reason, such as the alert that it wants a
/// client certificate, is lost then; with the next connection it may arrive after the request.
fn is_unsent(e: &(dyn std::error::Error + 'static)) -> bool {
    hyper_error(e).is_some_and(hyper::Error::is_canceled)
}

/// The connection's own error among those that led to this one.
fn hyper_error<'a>(e: &'a (dyn std::error::Error + 'static)) -> Option<&'a hyper::Error> {
    std::iter::successors(Some(e), |e| e.source()).find_map(|e| e.downcast_ref())
}

fn chain(e: &(dyn std::error::Error + 'static)) -> String {
    orlop_base::telemetry::chain(e)
}
