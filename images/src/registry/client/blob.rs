//! Transfers blobs, in as many parts as it takes.

use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_RANGE;
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Endpoint, Failure, Session, chain, final_failure, range_start};
use crate::unpack::Slots;
use crate::{Digest, Result};

/// A body that brings less within the patience stalls, even if some bytes trickle in.
const PROGRESS: usize = 4096;
/// Attempts without any progress before a transfer fails that has brought nothing, or before the next host is asked.
const ATTEMPTS: u32 = 5;
/// Bytes per second that a transfer must bring while pulls wait that could have its slot.
const SLOWEST: u64 = 8 << 10;

/// How fast a transfer is.
struct Pace {
    since: Instant,
    bytes: u64,
}

impl Pace {
    fn new(now: Instant) -> Pace {
        Pace { since: now, bytes: 0 }
    }

    /// Counts what came; once per `window` whether it has been enough.
    fn too_slow(&mut self, bytes: usize, now: Instant, window: Duration) -> bool {
        self.bytes += bytes as u64;
        let passed = now.saturating_duration_since(self.since);
        if passed < window {
            return false;
        }
        let slow = (self.bytes as f64) < SLOWEST as f64 * passed.as_secs_f64();
        *self = Pace::new(now);
        slow
    }
}

/// Who is asked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hosts {
    All,
    /// The registry, or the last mirror where there is only those.
    Registry,
}

impl Session {
    pub fn has_mirrors(&self) -> bool {
        self.endpoints.len() > 1
    }

    /// Sends a blob's bytes into `to`, then an empty chunk; or an error. Resumes where a connection broke off. Ends
    /// early when the receiver is gone.
    pub async fn blob(
        &self,
        digest: &Digest,
        size: u64,
        hosts: Hosts,
        to: &mpsc::Sender<Result<Bytes>>,
        slots: &Slots,
    ) {
        let path = format!("/{}/blobs/{digest}", self.reference.repository);
        let mut sent = 0u64;
        let mut attempt = 0;
        let mut progress = Instant::now();
        let mut last = None;
        let mut host = match hosts {
            Hosts::All => 0,
            Hosts::Registry => self.endpoints.len().saturating_sub(1),
        };
        while let Some(endpoint) = self.endpoints.get(host) {
            if !endpoint.host.pull {
                host += 1;
                continue;
            }
            let before = sent;
            match self.blob_part(endpoint, &path, size, &mut sent, to, slots).await {
                Ok(()) => {
                    // A receiver that is gone has reported its own failure.
                    let _ = to.send(Ok(Bytes::new())).await;
                    return;
                }
                Err(failure) => {
                    if to.is_closed() {
                        return;
                    }
                    attempt += 1;
                    if sent - before >= PROGRESS as u64 {
                        (attempt, progress) = (1, Instant::now());
                    }
                    tracing::debug!(%digest, sent, attempt, error = %failure.error, "blob transfer broke off");
                    let delay = failure.delay(attempt, self);
                    last = Some(*failure.error);
                    // What has begun to come is worth waiting for where nobody else has it: a registry restarts, a line fails.
                    let others = self.endpoints[host + 1..].iter().any(|e| e.host.pull);
                    let away = sent > 0 && !others && progress.elapsed() < self.outage;
                    match delay {
                        Some(delay) if attempt < ATTEMPTS || away => {
                            tokio::select! {
                                () = tokio::time::sleep(delay) => {}
                                // Nobody wants it any more.
                                () = to.closed() => return,
                            }
                        }
                        _ => {
                            attempt = 0;
                            host += 1;
                        }
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
        slots: &Slots,
    ) -> Result<(), Failure> {
        if *sent == size && size > 0 {
            return Ok(());
        }
        let range = (*sent > 0).then(|| format!("bytes={sent}-"));
        let mut response = self.request(endpoint, Method::GET, path, range.as_deref()).await?;
        if response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            // It has less than it sent before, or cannot do ranges: all of it, then.
            response = self.request(endpoint, Method::GET, path, None).await?;
        }
        // A server that ignores the range starts over: skip what is known.
        let mut skip = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let start = response.headers().get(CONTENT_RANGE).and_then(|v| range_start(v.to_str().ok()?));
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
        let (mut deadline, mut progress) = (Instant::now() + self.patience, 0);
        let mut pace = Pace::new(Instant::now());
        loop {
            let frame = tokio::select! {
                frame = tokio::time::timeout_at(deadline, body.frame()) => frame,
                () = to.closed() => return Ok(()),
            };
            let frame = match frame {
                Err(_) => {
                    let text = format!("the transfer stalled for {:?}", self.patience);
                    return Err(self.unreachable(endpoint, text));
                }
                Ok(None) if *sent == size => return Ok(()),
                Ok(None) => {
                    let text = format!("the transfer ended after {sent} of {size} bytes");
                    return Err(self.unreachable(endpoint, text));
                }
                Ok(Some(Err(e))) => return Err(self.unreachable(endpoint, chain(&e))),
                Ok(Some(Ok(frame))) => frame,
            };
            let Ok(mut data) = frame.into_data() else { continue };
            progress += data.len();
            if pace.too_slow(data.len(), Instant::now(), self.patience) && slots.starving() {
                let text = format!("it sends less than {SLOWEST} bytes per second, and other images wait");
                return Err(Failure { retry: false, ..self.unreachable(endpoint, text) });
            }
            if progress >= PROGRESS {
                (deadline, progress) = (Instant::now() + self.patience, 0);
            }
            let known = skip.min(data.len() as u64);
            skip -= known;
            let _ = data.split_to(known as usize);
            if data.is_empty() {
                continue;
            }
            if data.len() as u64 > size - *sent {
                let text = format!("a blob is larger than its descriptor's {size} bytes");
                return Err(final_failure(self.registry_error(endpoint, text)));
            }
            *sent += data.len() as u64;
            let ready = Instant::now();
            if to.send(Ok(data)).await.is_err() {
                return Ok(());
            }
            // A receiver that was busy is not the registry's fault.
            deadline += ready.elapsed();
            pace.since += ready.elapsed();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trickle_is_too_slow() {
        let (start, window) = (Instant::now(), Duration::from_secs(30));
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut pace = Pace::new(start);
        // Not before the time is over, and by what has come since the last look.
        assert!(!pace.too_slow(1, at(29), window));
        assert!(pace.too_slow(1000, at(30), window));
        assert!(!pace.too_slow(1 << 20, at(60), window));
        assert!(pace.too_slow(4096, at(91), window));
    }
}
