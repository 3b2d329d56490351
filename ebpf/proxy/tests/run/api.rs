//! Lists, in pages, and watches of the kinds that the proxy follows, over HTTP.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::ops::Bound;
use std::sync::{Arc, Mutex};

use futures::StreamExt;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Bytes, Frame};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Events that one frame carries at most.
const FRAME: usize = 256;

struct State {
    revision: u64,
    /// By resource and name, as text.
    objects: BTreeMap<(&'static str, String), Arc<str>>,
    /// Revisions and events of each resource, in order.
    log: HashMap<&'static str, Vec<(u64, Bytes)>>,
    /// What is answered in place of a resource.
    refused: HashMap<&'static str, u16>,
    /// How often that was done.
    refusals: usize,
}

#[derive(Clone)]
pub struct FakeApi {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
    revision: watch::Sender<u64>,
}

type Body = BoxBody<Bytes, Infallible>;

impl FakeApi {
    pub async fn start() -> FakeApi {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let state = State {
            revision: 1,
            objects: BTreeMap::new(),
            log: HashMap::new(),
            refused: HashMap::new(),
            refusals: 0,
        };
        let api = FakeApi {
            address: listener.local_addr().unwrap(),
            state: Arc::new(Mutex::new(state)),
            revision: watch::Sender::new(1),
        };
        api.listen(listener);
        api
    }

    /// Answers there too; the listener may be of another network namespace.
    pub fn listen(&self, listener: std::net::TcpListener) {
        listener.set_nonblocking(true).unwrap();
        let listener = TcpListener::from_std(listener).unwrap();
        let shared = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let api = shared.clone();
                let service = service_fn(move |r| {
                    let response = api.answer(&r);
                    async move { Ok::<_, Infallible>(response) }
                });
                let server = hyper::server::conn::http1::Builder::new();
                tokio::spawn(server.serve_connection(TokioIo::new(stream), service));
            }
        });
    }

    pub fn put(&self, resource: &str, mut object: Value) {
        let mut s = self.state.lock().unwrap();
        s.revision += 1;
        let (resource, api_version, kind) = kind(resource);
        object["metadata"]["resourceVersion"] = json!(s.revision.to_string());
        object["apiVersion"] = json!(api_version);
        object["kind"] = json!(kind);
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        let text: Arc<str> = object.to_string().into();
        let old = s.objects.insert((resource, name), text.clone());
        self.log(&mut s, resource, if old.is_some() { "MODIFIED" } else { "ADDED" }, &text);
    }

    /// Deleting what is not there does nothing.
    pub fn delete(&self, resource: &str, name: &str) {
        let mut s = self.state.lock().unwrap();
        let (resource, ..) = kind(resource);
        let Some(old) = s.objects.remove(&(resource, name.to_owned())) else { return };
        s.revision += 1;
        let mut object: Value = serde_json::from_str(&old).unwrap();
        object["metadata"]["resourceVersion"] = json!(s.revision.to_string());
        self.log(&mut s, resource, "DELETED", &object.to_string());
    }

    /// From now on lists and watches of a resource get an error; its watches end.
    pub fn refuse(&self, resource: &str, code: Option<u16>) {
        let mut s = self.state.lock().unwrap();
        let (resource, ..) = kind(resource);
        match code {
            Some(code) => s.refused.insert(resource, code),
            None => s.refused.remove(resource),
        };
        self.revision.send_modify(|_| ());
    }

    pub fn refusals(&self) -> usize {
        self.state.lock().unwrap().refusals
    }

    fn log(&self, s: &mut State, resource: &'static str, event: &str, object: &str) {
        let line = format!("{{\"type\":\"{event}\",\"object\":{object}}}\n");
        let revision = s.revision;
        s.log.entry(resource).or_default().push((revision, line.into()));
        self.revision.send_replace(revision);
    }

    fn answer(&self, r: &Request<hyper::body::Incoming>) -> Response<Body> {
        let (resource, api_version, kind) = kind(r.uri().path().rsplit('/').next().unwrap());
        let refused = {
            let mut s = self.state.lock().unwrap();
            let code = s.refused.get(resource).copied();
            s.refusals += usize::from(code.is_some());
            code
        };
        if let Some(code) = refused {
            let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": "no, for a test"});
            let mut response = Response::new(Full::new(Bytes::from(status.to_string())).boxed());
            *response.status_mut() = hyper::StatusCode::from_u16(code).unwrap();
            return response;
        }
        let query = r.uri().query().unwrap_or_default();
        let value = |name: &str| query.split('&').find_map(|p| p.strip_prefix(name)?.strip_prefix('='));
        if value("watch").is_some() {
            let from = value("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0);
            return Response::new(self.watch(resource, from));
        }
        let s = self.state.lock().unwrap();
        // A page goes on behind the last name of the one before, and has the revision of the first.
        let page = value("continue").and_then(|c| c.split_once('.'));
        let (revision, after) =
            page.map_or((s.revision, ""), |(revision, name)| (revision.parse().unwrap(), name));
        let limit: usize = value("limit").and_then(|v| v.parse().ok()).unwrap_or(usize::MAX);
        let from = Bound::Excluded((resource, after.to_owned()));
        let mut rest = s.objects.range((from, Bound::Unbounded)).take_while(|((r, _), _)| *r == resource);
        let items: Vec<_> = rest.by_ref().take(limit).collect();
        let last = items.last().filter(|_| rest.next().is_some());
        let next = last.map_or(String::new(), |((_, name), _)| format!("{revision}.{name}"));
        let items: Vec<&str> = items.iter().map(|(_, text)| &***text).collect();
        let list = format!(
            r#"{{"apiVersion":"{api_version}","kind":"{kind}List","metadata":{{"resourceVersion":"{revision}","continue":"{next}"}},"items":[{}]}}"#,
            items.join(",")
        );
        Response::new(Full::new(Bytes::from(list)).boxed())
    }

    fn watch(&self, resource: &'static str, from: u64) -> Body {
        let (api, wake) = (self.clone(), self.revision.subscribe());
        let stream = futures::stream::unfold((from, wake), move |(from, mut wake)| {
            let api = api.clone();
            async move {
                loop {
                    wake.borrow_and_update();
                    if let Some((last, events)) = api.events(resource, from) {
                        return Some((Ok(Frame::data(events)), (last, wake)));
                    }
                    wake.changed().await.ok()?;
                    if api.state.lock().unwrap().refused.contains_key(resource) {
                        return None;
                    }
                }
            }
        });
        // hyper polls bodies of one connection on one task; boxed streams need Sync, which this gives.
        BoxBody::new(Shared(Mutex::new(StreamBody::new(stream.boxed()))))
    }

    /// What came after a revision, and the last revision in it.
    fn events(&self, resource: &str, from: u64) -> Option<(u64, Bytes)> {
        let s = self.state.lock().unwrap();
        let log = s.log.get(resource)?;
        let new = &log[log.partition_point(|(revision, _)| *revision <= from)..];
        let new = &new[..new.len().min(FRAME)];
        let (last, _) = new.last()?;
        Some((*last, new.iter().flat_map(|(_, e)| e.iter().copied()).collect()))
    }
}

fn kind(resource: &str) -> (&'static str, &'static str, &'static str) {
    match resource {
        "services" => ("services", "v1", "Service"),
        "nodes" => ("nodes", "v1", "Node"),
        "servicecidrs" => ("servicecidrs", "networking.k8s.io/v1", "ServiceCIDR"),
        _ => ("endpointslices", "discovery.k8s.io/v1", "EndpointSlice"),
    }
}

/// A body behind a lock, and so `Sync`.
struct Shared<B>(Mutex<B>);

impl<B: hyper::body::Body + Unpin> hyper::body::Body for Shared<B> {
    type Data = B::Data;
    type Error = B::Error;
    fn poll_frame(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        std::pin::Pin::new(&mut *self.0.lock().unwrap()).poll_frame(cx)
    }
}
