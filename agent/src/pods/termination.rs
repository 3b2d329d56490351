//! In which order the containers of an ending pod stop, and how long each gets.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::PodSpec;
use orlop_api::pod::is_sidecar;

use crate::runtime::{Container, ObservedPod, State};

/// Even a container whose turn comes late gets this long, unless the pod is killed at once.
const LEAST_GRACE: i64 = 2;

/// Containers to stop now.
pub struct Stops<'a> {
    /// With the seconds each gets.
    pub now: Vec<(&'a Container, i64)>,
    /// No container runs any more.
    pub none_left: bool,
}

/// Regular containers (and init and ephemeral ones) stop together; then sidecars, last started first, each after those
/// that were started after it (KEP-753). `grace` seconds count from `since`.
pub fn next_stops<'a>(
    spec: &PodSpec,
    observed: &'a ObservedPod,
    since: Timestamp,
    grace: i64,
    now: Timestamp,
) -> Stops<'a> {
    let alive: Vec<&Container> = observed.containers.iter().filter(|c| c.state != State::Exited).collect();
    let elapsed = now.duration_since(since).as_secs().max(0);
    let left = if grace == 0 { 0 } else { (grace - elapsed).max(LEAST_GRACE) };
    let sidecars: Vec<&str> =
        spec.init_containers.iter().flatten().filter(|c| is_sidecar(c)).map(|c| c.name.as_str()).collect();
    let is_side = |c: &Container| sidecars.contains(&c.name.as_str());
    let main: Vec<_> = alive.iter().filter(|c| !is_side(c)).copied().collect();
    let turn = if main.is_empty() {
        let last = sidecars.iter().rev().find(|n| alive.iter().any(|c| c.name == **n));
        alive.iter().filter(|c| last.is_some_and(|n| c.name == **n)).copied().collect()
    } else {
        main
    };
    Stops { now: turn.into_iter().map(|c| (c, left)).collect(), none_left: alive.is_empty() }
}
