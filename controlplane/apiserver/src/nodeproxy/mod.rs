//! The subresources that reach through to a kubelet, pod or service: log, exec, attach, portforward and proxy.
//!
//! The server opens a connection of its own, passes the request on and, when the other side switches protocols, passes bytes both
//! ways without looking at them: WebSocket and SPDY are between the client and the kubelet.

mod connect;
mod locate;
mod log_socket;
pub(crate) mod rewrite;

use std::sync::Arc;

use http::header::{
    ACCEPT, ACCEPT_ENCODING, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderName,
    LOCATION, UPGRADE,
};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use orlop_base::supervise::TaskGroup;
use serde_json::Value;

use crate::authz::Attributes;
use crate::handler::Server;
use crate::pki::Pki;
use crate::registry::Registry;
use crate::request_info::{RequestInfo, UserInfo};
use crate::status::Status;
use crate::transport::Body;
use locate::Target;
use rewrite::{Links, Rewritten};

/// How much of a kubelet's error text is read.
const ERROR_LIMIT: usize = 64 * 1024;

/// Whether a request is for one of these subresources.
pub fn is_connect(info: &RequestInfo) -> bool {
    info.is_resource_request
        && info.api_group.is_empty()
        && !info.name.is_empty()
        && matches!(
            (info.resource.as_str(), info.subresource.as_str()),
            ("pods", "log" | "exec" | "attach" | "portforward" | "proxy") | ("nodes" | "services", "proxy")
        )
}

/// What proxying needs: the client certificate for kubelets and an owner for the streams.
pub struct NodeProxy {
    connector: connect::Connector,
    tasks: TaskGroup,
}

impl NodeProxy {
    /// # Errors
    /// A message when the key material does not fit.
    pub fn new(pki: &Pki, verify_kubelets: bool, tasks: TaskGroup) -> Result<NodeProxy, String> {
        Ok(NodeProxy { connector: connect::Connector::new(pki, verify_kubelets)?, tasks })
    }
}

/// Answers an authorized request for one of the subresources.
///
/// # Errors
/// 400 and 404 for what cannot be reached by the objects' state, 502/503 when the other side does not answer.
pub async fn serve(
    server: Arc<Server>,
    request: Request<Incoming>,
    info: RequestInfo,
    user: UserInfo,
) -> Result<Response<Body>, Status> {
    if matches!(info.subresource.as_str(), "exec" | "attach" | "portforward")
        && request.method() == Method::GET
    {
        // A WebSocket begins with GET; who may only read must not get a shell by that.
        let question = Attributes { verb: "create", ..Attributes::of_request(&user, &info, "") };
        server.authorize(&question).await?;
    }
    let target = resolve(&server.registry, &info, request.uri()).await?;
    if info.subresource == "log" && log_socket::is_asked(request.headers()) {
        return log_socket::serve(&server.node_proxy, request, target).await;
    }
    if info.subresource != "proxy" {
        return pass_on(&server.node_proxy, request, target, None).await;
    }
    if let Some(answer) = with_slash(&request) {
        return Ok(answer);
    }
    let links = Links {
        prefix: locate::path_of_proxy(request.uri().path()),
        backend: target.host_header(),
        requested: requested_host(&request),
    };
    pass_on(&server.node_proxy, request, target, Some(links)).await
}

/// The host that the client asked, which HTTP/2 has in the URI.
fn requested_host(request: &Request<Incoming>) -> String {
    let header = || request.headers().get(HOST).and_then(|h| h.to_str().ok());
    request.uri().authority().map(|a| a.as_str()).or_else(header).unwrap_or_default().to_owned()
}

/// Sends who reads `…/proxy` to `…/proxy/`, so that relative links of the page lead below it.
fn with_slash<B>(request: &Request<B>) -> Option<Response<Body>> {
    let uri = request.uri();
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    if !reads || request.headers().contains_key(UPGRADE) || uri.path() != locate::path_of_proxy(uri.path()) {
        return None;
    }
    let query = uri.query().map(|q| format!("?{q}")).unwrap_or_default();
    let location = HeaderValue::from_str(&format!("{}/{query}", uri.path())).ok()?;
    let mut answer = Response::new(Body::from(crate::registry::Body::empty()));
    *answer.status_mut() = StatusCode::MOVED_PERMANENTLY;
    answer.headers_mut().insert(LOCATION, location);
    Some(answer)
}

async fn resolve(registry: &Registry, info: &RequestInfo, uri: &Uri) -> Result<Target, Status> {
    let query = uri.query().unwrap_or_default();
    let rest = locate::path_after_proxy(uri.path());
    match (info.resource.as_str(), info.subresource.as_str()) {
        ("nodes", _) => {
            let (_, name, _) = locate::split_name(&info.name);
            let node = registry.get("", "nodes", "", name).await?;
            locate::kubelet(&node, &rest, query)
        }
        ("services", _) => {
            let (scheme, name, port) = locate::split_name(&info.name);
            let service = registry.get("", "services", &info.namespace, name).await?;
            let slices = registry.list("discovery.k8s.io", "endpointslices", &info.namespace).await?;
            let all = locate::endpoints(&service, &slices, port)?;
            let choice = all[rand::random_range(0..all.len())].clone();
            Ok(locate::plain(scheme, &choice.0, choice.1, &rest, query))
        }
        (_, "proxy") => {
            let (scheme, name, port) = locate::split_name(&info.name);
            let pod = registry.get("", "pods", &info.namespace, name).await?;
            let (ip, port) = locate::pod_address(&pod, port)?;
            Ok(locate::plain(scheme, &ip, port, &rest, query))
        }
        (_, subresource) => {
            let pod = registry.get("", "pods", &info.namespace, &info.name).await?;
            let node_name = pod.pointer("/spec/nodeName").and_then(Value::as_str).unwrap_or_default();
            if node_name.is_empty() {
                return Err(Status::bad_request(format!("pod {} does not have a host assigned", info.name)));
            }
            let (path, query) = locate::kubelet_request(&pod, subresource, query)?;
            let node = registry.get("", "nodes", "", node_name).await.map_err(|e| {
                if e.is_not_found() {
                    Status::bad_request(format!("node {node_name} of pod {} is gone", info.name))
                } else {
                    e
                }
            })?;
            locate::kubelet(&node, &path, &query)
        }
    }
}

/// Headers that concern one connection only.
const HOP_BY_HOP: [&str; 8] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

fn forwarded_headers(from: &HeaderMap, host: &str) -> (HeaderMap, bool) {
    let upgrade = from.get(UPGRADE).cloned().filter(|_| {
        let connection = from.get_all(CONNECTION);
        connection.iter().any(|v| v.to_str().is_ok_and(|v| v.to_ascii_lowercase().contains("upgrade")))
    });
    let mut headers = HeaderMap::new();
    for (name, value) in from {
        if !HOP_BY_HOP.contains(&name.as_str()) {
            headers.append(name.clone(), value.clone());
        }
    }
    if let Ok(host) = HeaderValue::from_str(host) {
        headers.insert(HOST, host);
    }
    let is_upgrade = upgrade.is_some();
    if let Some(upgrade) = upgrade {
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, upgrade);
    }
    (headers, is_upgrade)
}

fn unreachable(target: &Target, e: &str) -> Status {
    Status::failure(502, "BadGateway", format!("error dialing {}: {e}", target.what))
}

/// Sends a request over a connection of its own.
async fn exchange<B>(
    proxy: &NodeProxy,
    target: &Target,
    request: Request<B>,
) -> Result<Response<Incoming>, Status>
where
    B: http_body::Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let stream = proxy.connector.open(target).await.map_err(|e| unreachable(target, &e))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| unreachable(target, &e.to_string()))?;
    let stop = proxy.tasks.stop_token();
    proxy.tasks.spawn(async move {
        let connection = connection.with_upgrades();
        tokio::select! {
            // The connection ends by itself when request and response are through or either side is gone.
            _ = connection => {}
            () = stop.cancelled() => {}
        }
    });
    sender.send_request(request).await.map_err(|e| unreachable(target, &e.to_string()))
}

async fn pass_on(
    proxy: &NodeProxy,
    mut request: Request<Incoming>,
    target: Target,
    links: Option<Links>,
) -> Result<Response<Body>, Status> {
    let (mut headers, is_upgrade) = forwarded_headers(request.headers(), &target.host_header());
    let is_head = request.method() == Method::HEAD;
    if let Some(links) = &links {
        announce(&mut headers, links, &target.path_and_query);
    }
    let client_side = is_upgrade.then(|| hyper::upgrade::on(&mut request));
    let (parts, body) = request.into_parts();
    let mut outgoing = Request::new(body);
    *outgoing.method_mut() = parts.method;
    *outgoing.uri_mut() =
        target.path_and_query.parse().map_err(|e| Status::bad_request(format!("bad path: {e}")))?;
    *outgoing.headers_mut() = headers;
    let mut response = exchange(proxy, &target, outgoing).await?;

    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let Some(client_side) = client_side else {
            return Err(unreachable(&target, "switched protocols without having been asked to"));
        };
        let backend_side = hyper::upgrade::on(&mut response);
        let stop = proxy.tasks.stop_token();
        proxy.tasks.spawn(async move {
            let (Ok(client), Ok(backend)) = (client_side.await, backend_side.await) else { return };
            connect::splice(TokioIo::new(client), TokioIo::new(backend), stop).await;
        });
        let mut answer = Response::new(Body::from(crate::registry::Body::empty()));
        *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        // Connection and Upgrade are part of the switch and go through as they are.
        *answer.headers_mut() = response.headers().clone();
        return Ok(answer);
    }
    if links.is_none() && !response.status().is_success() {
        return Err(error_of(response).await);
    }
    let (mut parts, body) = response.into_parts();
    for name in HOP_BY_HOP {
        parts.headers.remove(HeaderName::from_static(name));
    }
    parts.version = http::Version::default();
    let Some(links) = links else { return Ok(Response::from_parts(parts, Body::Proxied(body))) };
    for name in CORS {
        parts.headers.remove(HeaderName::from_static(name));
    }
    if let Some(to) = parts.headers.get(LOCATION).and_then(|l| links.rewrite(l.to_str().ok()?))
        && let Ok(to) = HeaderValue::from_str(&to)
    {
        parts.headers.insert(LOCATION, to);
    }
    if is_head || !is_plain_html(&parts.headers) {
        return Ok(Response::from_parts(parts, Body::Proxied(body)));
    }
    parts.headers.remove(CONTENT_LENGTH);
    Ok(Response::from_parts(parts, Body::Rewritten(Box::new(Rewritten::new(body, links)))))
}

/// What a pod may not say in the name of the API server's origin.
const CORS: [&str; 6] = [
    "access-control-allow-credentials",
    "access-control-allow-headers",
    "access-control-allow-methods",
    "access-control-allow-origin",
    "access-control-expose-headers",
    "access-control-max-age",
];

/// Tells the proxied server its public path, and keeps it from compressing a page whose links are to be rewritten.
fn announce(headers: &mut HeaderMap, links: &Links, path_and_query: &str) {
    let path = path_and_query.split('?').next().unwrap_or_default();
    if let Ok(uri) = HeaderValue::from_str(&format!("{}{path}", links.prefix)) {
        headers.insert(HeaderName::from_static("x-forwarded-uri"), uri);
    }
    if headers.get(ACCEPT).and_then(|a| a.to_str().ok()).is_some_and(|a| a.contains("text/html")) {
        headers.remove(ACCEPT_ENCODING);
    }
}

fn is_plain_html(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    kind == "text/html" && !headers.contains_key(CONTENT_ENCODING)
}

/// A kubelet's refusal as a Status: its own when it sent one, else its text.
async fn error_of(response: Response<Incoming>) -> Status {
    let code = response.status();
    let body = http_body_util::Limited::new(response.into_body(), ERROR_LIMIT).collect().await;
    let body = body.map(|b| b.to_bytes()).unwrap_or_default();
    if let Ok(status) = serde_json::from_slice::<Status>(&body)
        && status.kind == "Status"
    {
        return status;
    }
    let text = String::from_utf8_lossy(&body).trim().to_owned();
    let message = if text.is_empty() { format!("the kubelet answered {code}") } else { text };
    let reason = match code.as_u16() {
        400 => "BadRequest",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "NotFound",
        409 => "Conflict",
        429 => "TooManyRequests",
        503 => "ServiceUnavailable",
        _ => "InternalError",
    };
    // The kubelet refusing this server is no statement about the client.
    let code = if code == StatusCode::UNAUTHORIZED { 500 } else { code.as_u16() };
    Status::failure(code, reason, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_of_the_proxy_itself_are_sent_below_it() {
        let at = |method: Method, path: &str| {
            let request = Request::builder().method(method).uri(path).body(()).unwrap();
            with_slash(&request).map(|a| a.headers()[LOCATION].to_str().unwrap().to_owned())
        };
        let base = "/api/v1/namespaces/n/pods/p/proxy";
        assert_eq!(at(Method::GET, &format!("{base}?a=b")), Some(format!("{base}/?a=b")));
        assert_eq!(at(Method::HEAD, base), Some(format!("{base}/")));
        assert_eq!(at(Method::GET, "/api/v1/nodes/n/proxy").as_deref(), Some("/api/v1/nodes/n/proxy/"));
        assert_eq!(at(Method::POST, base), None);
        assert_eq!(at(Method::GET, &format!("{base}/")), None);
        assert_eq!(at(Method::GET, &format!("{base}/x")), None);
    }

    #[test]
    fn only_html_that_is_not_compressed_is_rewritten() {
        let is = |kind: &'static str, encoding: Option<&'static str>| {
            let mut h = HeaderMap::new();
            h.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
            if let Some(e) = encoding {
                h.insert(CONTENT_ENCODING, HeaderValue::from_static(e));
            }
            is_plain_html(&h)
        };
        assert!(is("text/html; charset=utf-8", None));
        assert!(!is("text/html", Some("gzip")) && !is("text/plain", None));
    }
}
