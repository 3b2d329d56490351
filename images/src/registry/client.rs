//! Fetches manifests and blobs of one reference from the hosts that serve its registry.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE, WWW_AUTHENTICATE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use url::Url;

use super::auth::{self, Challenge};
use super::hosts::{self, Host};
use super::transport::{self, Http};
use crate::{Auth, Digest, Error, Reference, Result};

const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";
/// Larger manifests are refused, as the distribution specification advises.
pub(crate) const MAX_MANIFEST: u64 = 4 << 20;
/// From sending a request to its response's headers.
const RESPONSE: Duration = Duration::from_secs(30);
/// Between two pieces of a body.
const STALL: Duration = Duration::from_secs(30);
/// Attempts without any progress before a transfer fails.
const ATTEMPTS: u32 = 5;
const REDIRECTS: usize = 10;

struct Endpoint {
    host: Host,
    http: Http,
    auth: Option<Auth>,
    /// The `Authorization` header that worked last.
    granted: Mutex<Option<HeaderValue>>,
}

/// One pull's conversation with a registry and its mirrors.
pub(crate) struct Session {
    reference: Reference,
    endpoints: Vec<Endpoint>,
}

/// A manifest or config to fetch.
struct Document {
    what: &'static str,
    path: String,
    by_tag: bool,
    expect: Option<Digest>,
    /// Most bytes.
    limit: u64,
}

/// Why one request failed, and whether trying again may help.
struct Failure {
    error: Box<Error>,
    retry: bool,
}

impl Session {
    /// Reads the host configuration and credentials. Blocks on small files.
    pub fn new(
        reference: &Reference,
        certs_dir: Option<&Path>,
        docker_config: Option<&Path>,
        auth: Option<&Auth>,
    ) -> Result<Session> {
        let mut endpoints = Vec::new();
        for host in hosts::hosts_for(certs_dir, &reference.registry)? {
            let given = auth.filter(|a| {
                // Credentials without an address are the registry's own; a mirror does not get to see them.
                if a.server_address.is_empty() {
                    host.upstream
                } else {
                    auth::same_server(&a.server_address, &host.authority)
                        || (host.upstream && auth::same_server(&a.server_address, &reference.registry))
                }
            });
            let auth = match (given, docker_config) {
                (Some(a), _) => Some(a.clone()),
                (None, Some(path)) => auth::from_docker_config(path, &host.authority)?,
                (None, None) => None,
            };
            let http = transport::http_client(&host)?;
            endpoints.push(Endpoint { host, http, auth, granted: Mutex::new(None) });
        }
        Ok(Session { reference: reference.clone(), endpoints })
    }

    /// The manifest or index of the reference, with its media type as the registry gives it.
    pub async fn resolve(&self) -> Result<(Bytes, String)> {
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

    /// The digest that the reference's tag has now, if the registry tells without sending the manifest.
    pub async fn current_digest(&self) -> Option<Digest> {
        let tag = self.reference.tag.as_deref()?;
        for endpoint in &self.endpoints {
            if !endpoint.host.resolve {
                continue;
            }
            let path = format!("/{}/manifests/{tag}", self.reference.repository);
            if let Ok(response) = self.request(endpoint, Method::HEAD, &path, None).await {
                return response.headers().get("docker-content-digest")?.to_str().ok()?.parse().ok();
            }
        }
        None
    }

    async fn manifest(&self, what: &str, by_tag: bool, expect: Option<Digest>) -> Result<(Bytes, String)> {
        let path = format!("/{}/manifests/{what}", self.reference.repository);
        self.document(&Document { what: "the manifest", path, by_tag, expect, limit: MAX_MANIFEST }).await
    }

    /// A small blob, verified.
    pub async fn small_blob(&self, digest: &Digest, limit: u64) -> Result<Bytes> {
        let path = format!("/{}/blobs/{digest}", self.reference.repository);
        let what = "the image config";
        Ok(self.document(&Document { what, path, by_tag: false, expect: Some(*digest), limit }).await?.0)
    }

    /// Tries each suitable host, with retries. The last host's error counts, which is the registry's own.
    async fn document(&self, document: &Document) -> Result<(Bytes, String)> {
        let mut last = None;
        for endpoint in &self.endpoints {
            if !(if document.by_tag { endpoint.host.resolve } else { endpoint.host.pull }) {
                continue;
            }
            // Two quick attempts are enough for a request that has cost nothing yet.
            for attempt in 1..=2 {
                match self.document_from(endpoint, document).await {
                    Ok(v) => return Ok(v),
                    Err(f) => {
                        tracing::debug!(host = endpoint.host.authority, error = %f.error, "request failed");
                        last = Some(*f.error);
                        if !f.retry || attempt == 2 {
                            break;
                        }
                        tokio::time::sleep(Duration::from_millis(200)).await;
                    }
                }
            }
        }
        Err(last.unwrap_or_else(|| self.no_host()))
    }

    async fn document_from(&self, endpoint: &Endpoint, d: &Document) -> Result<(Bytes, String), Failure> {
        let response = self.request(endpoint, Method::GET, &d.path, None).await?;
        let kind = response.headers().get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let kind = kind.to_owned();
        let body = self.collect(endpoint, response, d.limit).await?;
        if let Some(expected) = &d.expect {
            self.verify(d.what, endpoint, expected, &body)?;
        }
        Ok((body, kind))
    }

    /// Sends a blob's bytes into `to`, then an empty chunk; or an error. Resumes where a connection broke off. Ends
    /// early when the receiver is gone.
    pub async fn blob(&self, digest: &Digest, size: u64, to: &mpsc::Sender<Result<Bytes>>) {
        let path = format!("/{}/blobs/{digest}", self.reference.repository);
        let mut sent = 0u64;
        let mut attempt = 0;
        let mut last = None;
        let mut host = 0;
        while let Some(endpoint) = self.endpoints.get(host) {
            if !endpoint.host.pull {
                host += 1;
                continue;
            }
            let before = sent;
            match self.blob_part(endpoint, &path, size, &mut sent, to).await {
                Ok(()) => {
                    // A receiver that is gone has reported its own failure.
                    let _ = to.send(Ok(Bytes::new())).await;
                    return;
                }
                Err(failure) => {
                    if to.is_closed() {
                        return;
                    }
                    attempt = if sent > before { 1 } else { attempt + 1 };
                    tracing::debug!(%digest, sent, attempt, error = %failure.error, "blob transfer broke off");
                    last = Some(*failure.error);
                    if failure.retry && attempt < ATTEMPTS {
                        tokio::time::sleep(Duration::from_millis(100 << attempt)).await;
                    } else {
                        attempt = 0;
                        host += 1;
                    }
                }
            }
        }
        let error = last.unwrap_or_else(|| self.no_host());
        let _ = to.send(Err(error)).await;
    }

    async fn blob_part(
        &self,
        endpoint: &Endpoint,
        path: &str,
        size: u64,
        sent: &mut u64,
        to: &mpsc::Sender<Result<Bytes>>,
    ) -> Result<(), Failure> {
        if *sent == size && size > 0 {
            return Ok(());
        }
        let range = (*sent > 0).then(|| format!("bytes={sent}-"));
        let response = self.request(endpoint, Method::GET, path, range.as_deref()).await?;
        // A server that ignores the range starts over: skip what is known.
        let mut skip = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let start = response
                    .headers()
                    .get(CONTENT_RANGE)
                    .and_then(|v| v.to_str().ok())
                    .and_then(|v| v.strip_prefix("bytes ")?.split('-').next()?.parse::<u64>().ok());
                match start {
                    Some(start) if start <= *sent => *sent - start,
                    _ => {
                        return Err(final_failure(
                            self.registry_error(endpoint, "it sent another range than asked for".into()),
                        ));
                    }
                }
            }
            _ => *sent,
        };
        let mut body = response.into_body();
        loop {
            let frame = match tokio::time::timeout(STALL, body.frame()).await {
                Err(_) => return Err(self.unreachable(endpoint, "the transfer stalled for 30 s".into())),
                Ok(None) if *sent == size => return Ok(()),
                Ok(None) => {
                    let text = format!("the transfer ended after {sent} of {size} bytes");
                    return Err(self.unreachable(endpoint, text));
                }
                Ok(Some(Err(e))) => return Err(self.unreachable(endpoint, chain(&e))),
                Ok(Some(Ok(frame))) => frame,
            };
            let Ok(mut data) = frame.into_data() else { continue };
            let known = skip.min(data.len() as u64);
            skip -= known;
            let _ = data.split_to(known as usize);
            if data.is_empty() {
                continue;
            }
            if data.len() as u64 > size - *sent {
                return Err(Failure {
                    error: Box::new(self.registry_error(
                        endpoint,
                        format!("a blob is larger than its descriptor's {size} bytes"),
                    )),
                    retry: false,
                });
            }
            *sent += data.len() as u64;
            if to.send(Ok(data)).await.is_err() {
                return Ok(());
            }
        }
    }

    /// One request, with credentials when the host asks for them.
    async fn request(
        &self,
        endpoint: &Endpoint,
        method: Method,
        path: &str,
        range: Option<&str>,
    ) -> Result<Response<Incoming>, Failure> {
        let url = Url::parse(&format!("{}{path}", endpoint.host.base))
            .map_err(|e| final_failure(self.registry_error(endpoint, format!("its URL is invalid: {e}"))))?;
        let first = self.send(endpoint, &method, url.clone(), range).await?;
        if first.status() != StatusCode::UNAUTHORIZED {
            return self.check(endpoint, first);
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
        let second = self.send(endpoint, &method, url, range).await?;
        self.check(endpoint, second)
    }

    /// One request with redirects followed. Credentials go to the first host only.
    async fn send(
        &self,
        endpoint: &Endpoint,
        method: &Method,
        url: Url,
        range: Option<&str>,
    ) -> Result<Response<Incoming>, Failure> {
        let origin = url.origin();
        let mut url = url;
        for _ in 0..REDIRECTS {
            let mut request =
                Request::builder().method(method).uri(url.as_str()).header(ACCEPT, MANIFEST_TYPES);
            request = request.header("user-agent", concat!("orlop/", env!("CARGO_PKG_VERSION")));
            if url.origin() == origin {
                for (k, v) in &endpoint.host.headers {
                    request = request.header(k, v);
                }
                let preset = endpoint.auth.as_ref().filter(|a| !a.registry_token.is_empty());
                if let Some(granted) = endpoint.granted.lock().clone() {
                    request = request.header(AUTHORIZATION, granted);
                } else if let Some(a) = preset {
                    request = request.header(AUTHORIZATION, format!("Bearer {}", a.registry_token));
                }
            }
            if let Some(range) = range {
                request = request.header(RANGE, range);
            }
            let request = request
                .body(Full::default())
                .map_err(|e| final_failure(self.registry_error(endpoint, e.to_string())))?;
            let response = match tokio::time::timeout(RESPONSE, endpoint.http.request(request)).await {
                Err(_) => return Err(self.unreachable(endpoint, "no response within 30 s".into())),
                Ok(Err(e)) => return Err(self.unreachable(endpoint, chain(&e))),
                Ok(Ok(r)) => r,
            };
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(response);
            }
            let next = response
                .headers()
                .get(LOCATION)
                .and_then(|v| v.to_str().ok())
                .and_then(|v| url.join(v).ok())
                .filter(|u| matches!(u.scheme(), "http" | "https"));
            url = next.ok_or_else(|| {
                final_failure(self.registry_error(endpoint, "it redirects without a usable address".into()))
            })?;
        }
        Err(final_failure(self.registry_error(endpoint, "it redirects too often".into())))
    }

    fn check(
        &self,
        endpoint: &Endpoint,
        response: Response<Incoming>,
    ) -> Result<Response<Incoming>, Failure> {
        let status = response.status();
        let reference = || self.reference.to_string();
        let registry = || endpoint.host.authority.clone();
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
            },
            s => Failure {
                error: Box::new(self.registry_error(endpoint, format!("HTTP {s}"))),
                retry: s.is_server_error() || s == StatusCode::REQUEST_TIMEOUT,
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
        let response = match tokio::time::timeout(RESPONSE, endpoint.http.request(request)).await {
            Err(_) => {
                return Err(self.unreachable(endpoint, "its token service did not answer within 30 s".into()));
            }
            Ok(Err(e)) => return Err(self.unreachable(endpoint, format!("its token service: {}", chain(&e)))),
            Ok(Ok(r)) => r,
        };
        if !response.status().is_success() {
            let status = response.status();
            let failure = refuse(format!("its token service answers HTTP {status}"));
            return Err(Failure { retry: status.is_server_error(), ..failure });
        }
        #[derive(serde::Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        let body = self.collect(endpoint, response, 1 << 20).await?;
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
        limit: u64,
    ) -> Result<Bytes, Failure> {
        let body = http_body_util::Limited::new(response.into_body(), limit as usize);
        match tokio::time::timeout(STALL * 2, body.collect()).await {
            Err(_) => Err(self.unreachable(endpoint, "the transfer stalled".into())),
            Ok(Ok(all)) => Ok(all.to_bytes()),
            Ok(Err(e)) if e.is::<http_body_util::LengthLimitError>() => Err(final_failure(
                self.registry_error(endpoint, format!("a document is larger than {limit} bytes")),
            )),
            Ok(Err(e)) => Err(self.unreachable(endpoint, chain(&*e))),
        }
    }

    fn verify(&self, what: &str, endpoint: &Endpoint, expected: &Digest, body: &[u8]) -> Result<(), Failure> {
        let actual = Digest::of(body);
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
    Failure { error: Box::new(error), retry: false }
}

fn chain(e: &(dyn std::error::Error + 'static)) -> String {
    orlop_base::telemetry::chain(e)
}
