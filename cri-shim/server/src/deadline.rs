//! A caller's deadline that passes is DEADLINE_EXCEEDED.
//!
//! The transport below enforces `grpc-timeout` itself, but answers CANCELLED, and whichever of client and server is first decides
//! what the caller sees. This layer is inside of it and a moment earlier.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderMap, Request, Response};
use tonic::Status;
use tonic::body::Body;
use tower::Service;

/// How much earlier: more than the timers' resolution.
const EARLIER: Duration = Duration::from_millis(2);

/// See the module.
#[derive(Clone)]
pub(crate) struct Deadline<S> {
    inner: S,
}

impl<S> Deadline<S> {
    pub fn new(inner: S) -> Self {
        Deadline { inner }
    }
}

/// `grpc-timeout` as gRPC over HTTP/2 has it: up to eight digits and a unit.
fn allowed(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(n * 3600),
        "M" => Duration::from_secs(n * 60),
        "S" => Duration::from_secs(n),
        "m" => Duration::from_millis(n),
        "u" => Duration::from_micros(n),
        "n" => Duration::from_nanos(n),
        _ => return None,
    })
}

impl<S, B> Service<Request<B>> for Deadline<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let limit = allowed(request.headers());
        let work = self.inner.call(request);
        let Some(limit) = limit else { return Box::pin(work) };
        Box::pin(async move {
            match tokio::time::timeout(limit.saturating_sub(EARLIER), work).await {
                Ok(done) => done,
                Err(_) => Ok(Status::deadline_exceeded("the caller's deadline has passed").into_http()),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        for (text, want) in [
            ("1m", Some(Duration::from_millis(1))),
            ("99999999H", Some(Duration::from_secs(99_999_999 * 3600))),
            ("5S", Some(Duration::from_secs(5))),
            ("5", None),
            ("", None),
            ("123456789S", None),
            ("xS", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", text.parse().unwrap());
            assert_eq!(allowed(&headers), want, "{text:?}");
        }
    }
}
