//! Lists and watches of two kinds, enough for the proxy.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use futures::StreamExt;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Bytes, Frame};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::broadcast;

struct State {
    revision: u64,
    objects: BTreeMap<(String, String), Value>,
    /// Resource, revision and event.
    log: Vec<(String, u64, Value)>,
}

#[derive(Clone)]
pub struct FakeApi {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
    wake: broadcast::Sender<()>,
}

type Body = BoxBody<Bytes, Infallible>;

impl FakeApi {
    pub async fn start() -> FakeApi {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let state = State { revision: 1, objects: BTreeMap::new(), log: Vec::new() };
        let api = FakeApi {
            address: listener.local_addr().unwrap(),
            state: Arc::new(Mutex::new(state)),
            wake: broadcast::channel(1024).0,
        };
        let shared = api.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let api = shared.clone();
                let service = service_fn(move |r| {
                    let response = api.answer(&r);
                    async move { Ok::<_, Infallible>(response) }
                });
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        api
    }

    pub fn put(&self, resource: &str, mut object: Value) {
        let mut s = self.state.lock().unwrap();
        s.revision += 1;
        object["metadata"]["resourceVersion"] = json!(s.revision.to_string());
        let (api_version, kind) = kind(resource);
        object["apiVersion"] = json!(api_version);
        object["kind"] = json!(kind);
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        let old = s.objects.insert((resource.to_owned(), name), object.clone());
        let event = json!({"type": if old.is_some() { "MODIFIED" } else { "ADDED" }, "object": object});
        let revision = s.revision;
        s.log.push((resource.to_owned(), revision, event));
        let _ = self.wake.send(());
    }

    pub fn delete(&self, resource: &str, name: &str) {
        let mut s = self.state.lock().unwrap();
        s.revision += 1;
        let mut object = s.objects.remove(&(resource.to_owned(), name.to_owned())).unwrap();
        object["metadata"]["resourceVersion"] = json!(s.revision.to_string());
        let revision = s.revision;
        s.log.push((resource.to_owned(), revision, json!({"type": "DELETED", "object": object})));
        let _ = self.wake.send(());
    }

    fn answer(&self, r: &Request<hyper::body::Incoming>) -> Response<Body> {
        let resource = r.uri().path().rsplit('/').next().unwrap().to_owned();
        let query = r.uri().query().unwrap_or_default();
        let value = |name: &str| query.split('&').find_map(|p| p.strip_prefix(name)?.strip_prefix('='));
        if value("watch").is_some() {
            let from = value("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0);
            return Response::new(self.watch(resource, from));
        }
        let s = self.state.lock().unwrap();
        let (api_version, kind) = kind(&resource);
        let items: Vec<&Value> =
            s.objects.iter().filter(|((r, _), _)| *r == resource).map(|(_, o)| o).collect();
        let list = json!({
            "apiVersion": api_version, "kind": format!("{kind}List"),
            "metadata": {"resourceVersion": s.revision.to_string()}, "items": items,
        });
        Response::new(Full::new(Bytes::from(list.to_string())).boxed())
    }

    fn watch(&self, resource: String, from: u64) -> Body {
        let api = self.clone();
        let wake = self.wake.subscribe();
        let stream = futures::stream::unfold((from, wake), move |(from, mut wake)| {
            let (api, resource) = (api.clone(), resource.clone());
            async move {
                loop {
                    let next = {
                        let s = api.state.lock().unwrap();
                        s.log
                            .iter()
                            .find(|(r, rv, _)| *r == resource && *rv > from)
                            .map(|(_, rv, e)| (*rv, e.to_string()))
                    };
                    if let Some((rv, event)) = next {
                        return Some((Ok(Frame::data(Bytes::from(event + "\n"))), (rv, wake)));
                    }
                    let _ = wake.recv().await;
                }
            }
        });
        // hyper polls bodies of one connection on one task; boxed streams need Sync, which this gives.
        StreamBody::new(stream.boxed()).boxed_sync()
    }
}

fn kind(resource: &str) -> (&'static str, &'static str) {
    match resource {
        "services" => ("v1", "Service"),
        "nodes" => ("v1", "Node"),
        _ => ("discovery.k8s.io/v1", "EndpointSlice"),
    }
}

trait BoxedSync {
    fn boxed_sync(self) -> Body;
}

impl<S> BoxedSync for StreamBody<S>
where
    S: futures::Stream<Item = Result<Frame<Bytes>, Infallible>> + Send + Unpin + 'static,
{
    fn boxed_sync(self) -> Body {
        BoxBody::new(sync_wrapper::Shared(parking_lot::Mutex::new(self)))
    }
}

mod sync_wrapper {
    use hyper::body::{Body, Frame};
    use std::pin::Pin;
    use std::task::{Context, Poll};

    /// A body behind a lock, and so `Sync`.
    pub struct Shared<B>(pub parking_lot::Mutex<B>);

    impl<B: Body + Unpin> Body for Shared<B> {
        type Data = B::Data;
        type Error = B::Error;
        fn poll_frame(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
            Pin::new(&mut *self.0.lock()).poll_frame(cx)
        }
    }
}
