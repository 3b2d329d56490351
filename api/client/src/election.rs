//! Leader election through a Lease, so that one of several schedulers or controller managers acts.

use std::future::Future;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::Api;
use kube::api::PostParams;
use tokio_util::sync::CancellationToken;

/// Which Lease, and the timing that client-go uses by default: 15 s, 10 s, 2 s.
#[derive(Debug, Clone)]
pub struct ElectionConfig {
    pub namespace: String,
    pub name: String,
    pub identity: String,
    /// How long others wait after the last renewal before they take over.
    pub lease_duration: Duration,
    /// The leader gives up when it could not renew for this long.
    pub renew_deadline: Duration,
    pub retry_period: Duration,
}

impl ElectionConfig {
    pub fn new(name: &str, identity: &str) -> Self {
        ElectionConfig {
            namespace: "kube-system".into(),
            name: name.into(),
            identity: identity.into(),
            lease_duration: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry_period: Duration::from_secs(2),
        }
    }
}

/// What to do about the Lease as it was seen.
#[derive(Debug, PartialEq)]
enum Step {
    Create,
    /// Ours, free, or expired: write it with us as the holder.
    Take,
    Wait,
}

fn step(lease: Option<&Lease>, me: &str, observed_for: Duration) -> Step {
    let Some(spec) = lease.map(|l| l.spec.clone().unwrap_or_default()) else { return Step::Create };
    let holder = spec.holder_identity.unwrap_or_default();
    let duration = Duration::from_secs(spec.lease_duration_seconds.unwrap_or(0).max(0) as u64);
    if holder.is_empty() || holder == me || observed_for >= duration { Step::Take } else { Step::Wait }
}

/// Takes part in an election.
pub struct Election {
    api: Api<Lease>,
    config: ElectionConfig,
    /// The last renewal seen of another holder and when we first saw it, by our own clock: clocks of other machines are not trusted.
    observed: Option<(Option<String>, tokio::time::Instant)>,
}

impl Election {
    pub fn new(client: kube::Client, config: ElectionConfig) -> Self {
        Election { api: Api::namespaced(client, &config.namespace), config, observed: None }
    }

    /// Whether we hold the Lease after this attempt.
    async fn attempt(&mut self) -> Result<bool, kube::Error> {
        let current = self.api.get_opt(&self.config.name).await?;
        let rv = current.as_ref().and_then(|l| l.metadata.resource_version.clone());
        let now = tokio::time::Instant::now();
        let first_seen = match &self.observed {
            Some((seen, at)) if *seen == rv => *at,
            _ => {
                self.observed = Some((rv, now));
                now
            }
        };
        let me = self.config.identity.clone();
        let spec = |old: Option<&LeaseSpec>| {
            let stays = old.is_some_and(|s| s.holder_identity.as_deref() == Some(&me));
            let stamp = MicroTime(Timestamp::now());
            let transitions = old.and_then(|s| s.lease_transitions).unwrap_or(0);
            LeaseSpec {
                holder_identity: Some(me.clone()),
                lease_duration_seconds: Some(self.config.lease_duration.as_secs() as i32),
                acquire_time: if stays {
                    old.and_then(|s| s.acquire_time.clone())
                } else {
                    Some(stamp.clone())
                },
                renew_time: Some(stamp),
                lease_transitions: Some(if stays || old.is_none() { transitions } else { transitions + 1 }),
                ..Default::default()
            }
        };
        match step(current.as_ref(), &me, now - first_seen) {
            Step::Wait => Ok(false),
            Step::Create => {
                let mut lease = Lease { spec: Some(spec(None)), ..Default::default() };
                lease.metadata.name = Some(self.config.name.clone());
                lost_race(self.api.create(&PostParams::default(), &lease).await)
            }
            Step::Take => {
                let Some(mut lease) = current else { return Ok(false) };
                lease.spec = Some(spec(lease.spec.as_ref()));
                lost_race(self.api.replace(&self.config.name, &PostParams::default(), &lease).await)
            }
        }
    }

    /// Waits until we lead. Returns false when `stop` came first.
    pub async fn acquire(&mut self, stop: &CancellationToken) -> bool {
        loop {
            match self.attempt().await {
                Ok(true) => return true,
                Ok(false) => {}
                Err(e) => {
                    tracing::warn!(lease = %self.config.name, error = %e, "leader election: cannot reach the API")
                }
            }
            tokio::select! {
                () = stop.cancelled() => return false,
                () = tokio::time::sleep(self.config.retry_period) => {}
            }
        }
    }

    /// Keeps leading; returns when leadership is lost or `stop` is cancelled. On `stop` the Lease is released.
    pub async fn hold(&mut self, stop: &CancellationToken) {
        let mut renewed = tokio::time::Instant::now();
        loop {
            tokio::select! {
                () = stop.cancelled() => {
                    self.release().await;
                    return;
                }
                () = tokio::time::sleep(self.config.retry_period) => {}
            }
            // An answer that comes too late is none: somebody else may lead by then.
            match tokio::time::timeout_at(renewed + self.config.renew_deadline, self.attempt()).await {
                Ok(Ok(true)) => renewed = tokio::time::Instant::now(),
                Ok(Ok(false)) => return,
                Ok(Err(e)) if renewed.elapsed() < self.config.renew_deadline => {
                    tracing::warn!(lease = %self.config.name, error = %e, "leader election: renewal failed");
                }
                Ok(Err(_)) | Err(_) => return,
            }
        }
    }

    async fn release(&self) {
        let released = async {
            let mut lease = self.api.get(&self.config.name).await?;
            if let Some(spec) = &mut lease.spec
                && spec.holder_identity.as_deref() == Some(&self.config.identity)
            {
                spec.holder_identity = None;
                spec.lease_duration_seconds = Some(1);
                self.api.replace(&self.config.name, &PostParams::default(), &lease).await?;
            }
            Ok::<(), kube::Error>(())
        };
        // Best effort: without it others only wait for the Lease to expire.
        let _ = tokio::time::timeout(Duration::from_secs(1), released).await;
    }
}

/// Leadership went to somebody else while we acted.
#[derive(Debug, thiserror::Error)]
#[error("lost the leader election; another instance has taken over")]
pub struct LostLeadership;

/// Runs `serve` until `stop`: at once without an `identity`, else while this instance holds the Lease `name`.
///
/// # Errors
/// `serve`'s own, and [`LostLeadership`].
pub async fn lead<F, Fut, E>(
    client: &kube::Client,
    name: &str,
    identity: Option<&str>,
    stop: &CancellationToken,
    serve: F,
) -> Result<(), E>
where
    F: FnOnce(CancellationToken) -> Fut,
    Fut: Future<Output = Result<(), E>>,
    E: From<LostLeadership>,
{
    let Some(identity) = identity else { return serve(stop.clone()).await };
    let mut election = Election::new(client.clone(), ElectionConfig::new(name, identity));
    if !election.acquire(stop).await {
        return Ok(());
    }
    let leading = stop.child_token();
    let (result, lost) =
        both(serve(leading.clone()), &leading, async |ended| election.hold(ended).await).await;
    if lost && !stop.is_cancelled() { Err(LostLeadership.into()) } else { result }
}

/// Runs `serve` and `hold` until both have ended: `leading` is cancelled once `hold` gives up, and `hold`'s token only when
/// nothing acts any more, so that the Lease is not free before. The second value tells whether `hold` gave up first.
async fn both<T>(
    serve: impl Future<Output = T>,
    leading: &CancellationToken,
    hold: impl AsyncFnOnce(&CancellationToken),
) -> (T, bool) {
    let ended = CancellationToken::new();
    tokio::join!(
        async {
            let result = serve.await;
            ended.cancel();
            result
        },
        async {
            hold(&ended).await;
            let lost = !ended.is_cancelled();
            leading.cancel();
            lost
        }
    )
}

fn lost_race<T>(r: Result<T, kube::Error>) -> Result<bool, kube::Error> {
    match r {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(s)) if s.code == 409 => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_lease_is_held_as_long_as_somebody_acts_and_no_longer() {
        let (stop, second) = (CancellationToken::new(), Duration::from_secs(1));
        // Told to stop, it acts a moment longer.
        let leading = stop.child_token();
        let (l, begun) = (leading.clone(), tokio::time::Instant::now());
        let serve = async {
            l.cancelled().await;
            tokio::time::sleep(second).await;
        };
        let stopper = async {
            tokio::time::sleep(second).await;
            stop.cancel();
        };
        let held = both(serve, &leading, async |ended| ended.cancelled().await);
        let (((), lost), ()) = tokio::join!(held, stopper);
        assert_eq!((lost, begun.elapsed()), (false, 2 * second));
        // What fails by itself ends the holding too.
        let leading = CancellationToken::new();
        let held = both(async { Err::<(), _>("failed") }, &leading, async |ended| ended.cancelled().await);
        assert_eq!(held.await, (Err("failed"), false));
        // Lost: what acts is told to stop.
        let leading = CancellationToken::new();
        assert_eq!(both(leading.cancelled(), &leading, async |_| ()).await, ((), true));
    }

    #[test]
    fn a_live_lease_of_another_is_left_alone_until_it_expires() {
        let spec = LeaseSpec {
            holder_identity: Some("other".into()),
            lease_duration_seconds: Some(15),
            ..Default::default()
        };
        let l = Lease { spec: Some(spec), ..Default::default() };
        assert_eq!(step(None, "me", Duration::ZERO), Step::Create);
        assert_eq!(step(Some(&l), "me", Duration::from_secs(14)), Step::Wait);
        assert_eq!(step(Some(&l), "me", Duration::from_secs(15)), Step::Take);
        assert_eq!(step(Some(&l), "other", Duration::ZERO), Step::Take);
    }
}
