//! /healthz, /livez and /readyz: named checks, each also at a path of its own; `?verbose` lists them, `?exclude=` leaves some out.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::{Response, StatusCode, header};

use crate::registry::{Body, Registry};

/// A store that has not answered by then counts as failed.
const STORE_LIMIT: Duration = Duration::from_secs(2);

/// What the checks look at.
pub struct Health {
    registry: Registry,
    bootstrapped: AtomicBool,
    stopping: AtomicBool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Endpoint {
    Healthz,
    Livez,
    Readyz,
}

impl Health {
    pub fn new(registry: Registry) -> Arc<Health> {
        Arc::new(Health { registry, bootstrapped: AtomicBool::new(false), stopping: AtomicBool::new(false) })
    }

    /// The system's own objects are in place.
    pub fn set_bootstrapped(&self) {
        self.bootstrapped.store(true, Ordering::Relaxed);
    }

    /// The server drains: it is still alive, but no longer ready.
    pub fn set_stopping(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// Answers a path at or below one of the endpoints; `None` for any other path.
    pub async fn answer(&self, path: &str, query: &str) -> Option<Response<Body>> {
        let (endpoint, name, rest) =
            [(Endpoint::Healthz, "healthz"), (Endpoint::Livez, "livez"), (Endpoint::Readyz, "readyz")]
                .into_iter()
                .find_map(|(e, n)| Some((e, n, path.strip_prefix('/')?.strip_prefix(n)?)))?;
        let one = match rest {
            "" | "/" => None,
            _ => Some(rest.strip_prefix('/')?),
        };
        let params: Vec<(String, String)> =
            url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        let verbose = params.iter().any(|(k, _)| k == "verbose");
        let excluded: Vec<&str> =
            params.iter().filter(|(k, _)| k == "exclude").map(|(_, v)| v.as_str()).collect();
        let mut results = Vec::new();
        for check in checks(endpoint) {
            if one.is_some_and(|o| o != *check) {
                continue;
            }
            let result = if excluded.contains(check) { None } else { Some(self.run(check).await) };
            results.push((*check, result));
        }
        if one.is_some() && results.is_empty() {
            return Some(text(StatusCode::NOT_FOUND, "404 page not found\n".into()));
        }
        Some(render(name, &results, verbose))
    }

    async fn run(&self, check: &str) -> Result<(), String> {
        match check {
            "etcd" | "etcd-readiness" => {
                match tokio::time::timeout(STORE_LIMIT, self.registry.revision()).await {
                    Ok(Ok(_)) => Ok(()),
                    Ok(Err(e)) => Err(e.message),
                    Err(_) => Err(format!("the store did not answer within {STORE_LIMIT:?}")),
                }
            }
            "shutdown" if self.stopping.load(Ordering::Relaxed) => Err("process is shutting down".into()),
            c if c.starts_with("poststarthook/") && !self.bootstrapped.load(Ordering::Relaxed) => {
                Err("not finished".into())
            }
            _ => Ok(()),
        }
    }
}

fn checks(endpoint: Endpoint) -> &'static [&'static str] {
    match endpoint {
        Endpoint::Healthz | Endpoint::Livez => &[
            "ping",
            "etcd",
            "poststarthook/rbac/bootstrap-roles",
            "poststarthook/scheduling/bootstrap-system-priority-classes",
        ],
        Endpoint::Readyz => &[
            "ping",
            "etcd",
            "etcd-readiness",
            "poststarthook/rbac/bootstrap-roles",
            "poststarthook/scheduling/bootstrap-system-priority-classes",
            "shutdown",
        ],
    }
}

/// `None` marks an excluded check.
fn render(name: &str, results: &[(&str, Option<Result<(), String>>)], verbose: bool) -> Response<Body> {
    let failed = results.iter().any(|(_, r)| matches!(r, Some(Err(_))));
    if !failed && !verbose {
        return text(StatusCode::OK, "ok".into());
    }
    let mut out = String::new();
    for (check, result) in results {
        out.push_str(&match result {
            None => format!("[+]{check} excluded: ok\n"),
            Some(Ok(())) => format!("[+]{check} ok\n"),
            Some(Err(reason)) => format!("[-]{check} failed: {reason}\n"),
        });
    }
    out.push_str(&format!("{name} check {}\n", if failed { "failed" } else { "passed" }));
    text(if failed { StatusCode::INTERNAL_SERVER_ERROR } else { StatusCode::OK }, out)
}

/// A plain text response.
pub fn text(code: StatusCode, body: String) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = code;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain; charset=utf-8"));
    response.headers_mut().insert("x-content-type-options", header::HeaderValue::from_static("nosniff"));
    response
}
