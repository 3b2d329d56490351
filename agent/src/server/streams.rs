//! exec, attach and port-forward: the runtime names a URL, and the upgraded connection is passed through byte for byte.
//! Whether it speaks SPDY or WebSocket is between the client and the runtime.

use bytes::Bytes;
use http::header::{CONNECTION, HOST, UPGRADE};
use http::{HeaderValue, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use orlop_proto::cri::{AttachRequest, ExecRequest, PortForwardRequest};
use tokio::net::TcpStream;

use super::{Body, Refusal, containers, text};
use crate::context::Context;
use crate::error::Error;

/// The query's flags and commands.
struct Query {
    stdin: bool,
    stdout: bool,
    stderr: bool,
    tty: bool,
    command: Vec<String>,
    ports: Vec<i32>,
}

impl Query {
    fn parse(query: &str) -> Result<Query, Refusal> {
        let mut q = Query {
            stdin: false,
            stdout: false,
            stderr: false,
            tty: false,
            command: Vec::new(),
            ports: Vec::new(),
        };
        let truthy = |v: &str| matches!(v, "1" | "true");
        for (k, v) in url::form_urlencoded::parse(query.as_bytes()) {
            match &*k {
                "input" | "stdin" => q.stdin = truthy(&v),
                "output" | "stdout" => q.stdout = truthy(&v),
                "error" | "stderr" => q.stderr = truthy(&v),
                "tty" => q.tty = truthy(&v),
                "command" | "cmd" => q.command.push(v.into_owned()),
                "port" | "ports" => {
                    for p in v.split(',') {
                        let port = p.parse::<u16>().ok().filter(|p| *p > 0);
                        let port = port.ok_or_else(|| Refusal::bad_request(format!("{p:?} is no port")))?;
                        q.ports.push(port as i32);
                    }
                }
                _ => {}
            }
        }
        // A terminal has one output stream.
        q.stderr &= !q.tty;
        Ok(q)
    }

    fn wants_streams(&self) -> Result<(), Refusal> {
        if self.stdin || self.stdout || self.stderr {
            return Ok(());
        }
        Err(Refusal::bad_request("you must specify at least 1 of stdin, stdout, stderr"))
    }
}

pub async fn exec(
    ctx: &Context,
    request: Request<Incoming>,
    namespace: &str,
    pod: &str,
    name: &str,
) -> Result<Response<Body>, Refusal> {
    let q = Query::parse(request.uri().query().unwrap_or_default())?;
    q.wants_streams()?;
    let pod = containers::pod(ctx, namespace, pod)?;
    let container = containers::running(ctx, &pod, name)?;
    let asked = ExecRequest {
        container_id: container.id,
        cmd: q.command,
        tty: q.tty,
        stdin: q.stdin,
        stdout: q.stdout,
        stderr: q.stderr,
    };
    let url = ctx.cri.exec(asked).await?.url;
    pass_through(ctx, request, &url).await
}

pub async fn attach(
    ctx: &Context,
    request: Request<Incoming>,
    namespace: &str,
    pod: &str,
    name: &str,
) -> Result<Response<Body>, Refusal> {
    let q = Query::parse(request.uri().query().unwrap_or_default())?;
    q.wants_streams()?;
    let pod = containers::pod(ctx, namespace, pod)?;
    let container = containers::running(ctx, &pod, name)?;
    // The container was made with or without a terminal; the caller cannot choose.
    let spec = pod.spec.as_ref();
    let tty = spec.is_some_and(|s| s.containers.iter().any(|c| c.name == name && c.tty == Some(true)));
    let asked = AttachRequest {
        container_id: container.id,
        stdin: q.stdin,
        tty,
        stdout: q.stdout,
        stderr: q.stderr && !tty,
    };
    let url = ctx.cri.attach(asked).await?.url;
    pass_through(ctx, request, &url).await
}

pub async fn port_forward(
    ctx: &Context,
    request: Request<Incoming>,
    namespace: &str,
    pod: &str,
) -> Result<Response<Body>, Refusal> {
    let q = Query::parse(request.uri().query().unwrap_or_default())?;
    let pod = containers::pod(ctx, namespace, pod)?;
    let observed = ctx.pods.observed(pod.metadata.uid.as_deref().unwrap_or_default());
    let sandbox = observed.as_ref().and_then(|o| o.ready_sandbox());
    let Some(sandbox) = sandbox else {
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        return Err(Refusal::bad_request(format!("pod \"{name}\" is not running")));
    };
    let asked = PortForwardRequest { pod_sandbox_id: sandbox.id.clone(), port: q.ports };
    let url = ctx.cri.port_forward(asked).await?.url;
    pass_through(ctx, request, &url).await
}

/// `/run`: a command without streams, its output as the answer.
pub async fn run(
    ctx: &Context,
    query: &str,
    namespace: &str,
    pod: &str,
    name: &str,
) -> Result<Response<Body>, Refusal> {
    let mut q = Query::parse(query)?;
    // One `cmd` parameter holds the words of a command line.
    if let [line] = q.command.as_slice() {
        q.command = line.split_whitespace().map(str::to_owned).collect();
    }
    let pod = containers::pod(ctx, namespace, pod)?;
    let container = containers::running(ctx, &pod, name)?;
    let done = ctx.cri.exec_sync(&container.id, q.command, std::time::Duration::from_secs(0)).await?;
    let mut out = done.stdout;
    out.extend_from_slice(&done.stderr);
    Ok(text(StatusCode::OK, String::from_utf8_lossy(&out)))
}

async fn pass_through(
    ctx: &Context,
    mut request: Request<Incoming>,
    url: &str,
) -> Result<Response<Body>, Refusal> {
    let uri: Uri = url.parse().map_err(|e: http::uri::InvalidUri| Refusal::internal(&e))?;
    let host = uri.host().unwrap_or("127.0.0.1").trim_matches(['[', ']']).to_owned();
    let port = uri.port_u16().unwrap_or(80);
    let gateway = |e: &dyn std::fmt::Display| {
        Refusal::new(StatusCode::BAD_GATEWAY, format!("the runtime's streaming server at {host}:{port}: {e}"))
    };
    let stream = TcpStream::connect((host.as_str(), port)).await.map_err(|e| gateway(&e))?;
    let _ = stream.set_nodelay(true);
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| gateway(&e))?;
    ctx.tasks.spawn(async move {
        // Its end is seen by the request's own result.
        let _ = connection.with_upgrades().await;
    });
    let mut onward = Request::new(Full::new(Bytes::new()));
    *onward.method_mut() = request.method().clone();
    *onward.uri_mut() =
        uri.path_and_query().map(|p| p.as_str().parse()).transpose().ok().flatten().unwrap_or_default();
    *onward.headers_mut() = request.headers().clone();
    if let Some(authority) = uri.authority().and_then(|a| HeaderValue::from_str(a.as_str()).ok()) {
        onward.headers_mut().insert(HOST, authority);
    }
    onward.headers_mut().remove(http::header::AUTHORIZATION);
    onward.headers_mut().remove(http::header::CONTENT_LENGTH);
    let client_side = hyper::upgrade::on(&mut request);
    let mut answer = sender.send_request(onward).await.map_err(|e| gateway(&e))?;
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        let (parts, body) = answer.into_parts();
        return Ok(Response::from_parts(parts, body.map_err(Error::Stream).boxed()));
    }
    let runtime_side = hyper::upgrade::on(&mut answer);
    let stop = ctx.tasks.stop_token();
    ctx.tasks.spawn(async move {
        let (Ok(client), Ok(runtime)) = (client_side.await, runtime_side.await) else { return };
        let (mut client, mut runtime) = (TokioIo::new(client), TokioIo::new(runtime));
        // When either side ends both directions are shut down in order, so nothing is left behind.
        tokio::select! {
            () = stop.cancelled() => {}
            r = tokio::io::copy_bidirectional(&mut client, &mut runtime) => {
                if let Err(e) = r {
                    tracing::debug!(error = %e, "stream ended");
                }
            }
        }
    });
    let mut response = Response::new(Full::new(Bytes::new()).map_err(|never| match never {}).boxed());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *response.headers_mut() = answer.headers().clone();
    for required in [CONNECTION, UPGRADE] {
        if let Some(v) = answer.headers().get(&required) {
            response.headers_mut().insert(required, v.clone());
        }
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries() {
        let q = Query::parse("command=sh&command=-c&input=1&output=1&error=1&tty=1").ok().unwrap();
        assert_eq!((q.command.len(), q.stdin, q.stdout, q.stderr, q.tty), (2, true, true, false, true));
        assert_eq!(Query::parse("port=80,81&port=82").ok().unwrap().ports, [80, 81, 82]);
        assert!(Query::parse("port=0").is_err() && Query::parse("port=x").is_err());
        assert!(Query::parse("tty=1").ok().unwrap().wants_streams().is_err());
    }
}
