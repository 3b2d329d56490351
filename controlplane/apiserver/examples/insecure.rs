//! The registry behind plain HTTP, without authentication: `insecure DIR PORT`, then `kubectl --server=http://127.0.0.1:PORT`.
//! For trying the registry alone; the real server is `orlop server`.

use std::{convert::Infallible, path::Path, sync::Arc};

use http_body_util::BodyExt;
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use orlop_apiserver::{
    registry::{ApiRequest, Body, Options, Registry},
    request_info::{RequestInfo, UserInfo},
    status::Status,
};
use orlop_base::supervise::TaskGroup;
use orlop_store::embedded::{self, Embedded};
use tokio_util::sync::CancellationToken;

async fn answer(registry: Registry, request: Request<Incoming>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let info = match RequestInfo::parse(&parts.method, &parts.uri) {
        Ok(info) => info,
        Err(e) => return Status::bad_request(e).into_response(),
    };
    if info.path == "/version" {
        return Response::new(Body::from(r#"{"major":"1","minor":"36","gitVersion":"v1.36.0"}"#.to_owned()));
    }
    let body = match body.collect().await {
        Ok(body) => body.to_bytes(),
        Err(e) => return Status::bad_request(e.to_string()).into_response(),
    };
    let user = UserInfo::apiserver();
    registry
        .handle(ApiRequest { method: parts.method, uri: parts.uri, headers: parts.headers, body, info, user })
        .await
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(dir), Some(port)) = (args.next(), args.next()) else {
        return Err("usage: insecure DIR PORT".into());
    };
    let stop = CancellationToken::new();
    let tasks = TaskGroup::new(&stop);
    let store = Embedded::open(Path::new(&dir), embedded::Options::default(), &tasks).await?;
    let registry = Registry::new(Arc::new(store), Options::new(tasks.clone())).await?;
    for name in ["default", "kube-system"] {
        let object = serde_json::json!({"metadata": {"name": name}});
        match registry.create("", "namespaces", "", object).await {
            Err(e) if !e.is_already_exists() => return Err(e.into()),
            _ => {}
        }
    }
    let listener = tokio::net::TcpListener::bind(format!("127.0.0.1:{port}")).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        let registry = registry.clone();
        tasks.spawn(async move {
            let service = service_fn(move |request| {
                let registry = registry.clone();
                async move { Ok::<_, Infallible>(answer(registry, request).await) }
            });
            let connection = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            // A client that goes away is no error.
            let _ = connection.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}
