//! The server's metrics, under upstream's names.

use std::collections::HashSet;
use std::time::Duration;

use orlop_base::telemetry::Metrics;
use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

use crate::request_info::RequestInfo;

/// Labels of `apiserver_request_total`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    code: u16,
    component: &'static str,
    dry_run: &'static str,
    group: String,
    resource: String,
    scope: &'static str,
    subresource: String,
    verb: &'static str,
    version: String,
}

/// Labels of `apiserver_request_duration_seconds`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DurationLabels {
    component: &'static str,
    group: String,
    resource: String,
    scope: &'static str,
    subresource: String,
    verb: &'static str,
    version: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    request_kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

/// How a request was authenticated or failed to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthnResult {
    Success,
    Failure,
    Error,
}

const BUCKETS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 5.0, 15.0, 60.0];
/// Distinct resources that get labels of their own; a client that makes names up must not fill the memory.
const RESOURCE_LIMIT: usize = 512;

/// The server's counters.
pub struct ServerMetrics {
    exposition: Metrics,
    requests: Family<RequestLabels, Counter>,
    durations: Family<DurationLabels, Histogram>,
    inflight: Family<KindLabel, Gauge>,
    rejected: Family<KindLabel, Counter>,
    authentication: Family<ResultLabel, Counter>,
    seen: Mutex<HashSet<(String, String, String)>>,
}

impl Default for ServerMetrics {
    fn default() -> Self {
        let exposition = Metrics::default();
        let durations = Family::new_with_constructor((|| Histogram::new(BUCKETS)) as fn() -> Histogram);
        ServerMetrics {
            requests: exposition.add(
                "apiserver_request",
                "Requests by verb, resource and HTTP code",
                Family::default(),
            ),
            durations: exposition.add(
                "apiserver_request_duration_seconds",
                "Time to the start of the response, without watches and streams",
                durations,
            ),
            inflight: exposition.add(
                "apiserver_current_inflight_requests",
                "Requests being served",
                Family::default(),
            ),
            rejected: exposition.add(
                "apiserver_dropped_requests",
                "Requests refused because too many were in flight",
                Family::default(),
            ),
            authentication: exposition.add(
                "authentication_attempts",
                "Authenticated attempts",
                Family::default(),
            ),
            seen: Mutex::default(),
            exposition,
        }
    }
}

/// A request that is being served.
pub struct InFlight(Gauge);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl ServerMetrics {
    /// The text of /metrics.
    pub fn encode(&self) -> String {
        self.exposition.encode()
    }

    /// Counts an answered request. `elapsed` is `None` for long-running ones.
    pub fn observe(
        &self,
        info: &RequestInfo,
        connect: bool,
        code: u16,
        dry_run: bool,
        elapsed: Option<Duration>,
    ) {
        // Without credentials anybody can make names up; those of refused requests are not kept.
        let (group, resource, subresource) =
            if code == 401 { Default::default() } else { self.resource_labels(info) };
        let verb = verb_label(info, connect);
        let version = if resource.is_empty() { String::new() } else { info.api_version.clone() };
        if let Some(elapsed) = elapsed {
            let labels = DurationLabels {
                component: "apiserver",
                group: group.clone(),
                resource: resource.clone(),
                scope: info.scope(),
                subresource: subresource.clone(),
                verb,
                version: version.clone(),
            };
            self.durations.get_or_create(&labels).observe(elapsed.as_secs_f64());
        }
        let labels = RequestLabels {
            code,
            component: "apiserver",
            dry_run: if dry_run { "All" } else { "" },
            group,
            resource,
            scope: info.scope(),
            subresource,
            verb,
            version,
        };
        self.requests.get_or_create(&labels).inc();
    }

    fn resource_labels(&self, info: &RequestInfo) -> (String, String, String) {
        if !info.is_resource_request {
            return Default::default();
        }
        let key = (info.api_group.clone(), info.resource.clone(), info.subresource.clone());
        let mut seen = self.seen.lock();
        if seen.contains(&key) {
            return key;
        }
        if seen.len() >= RESOURCE_LIMIT {
            return ("other".into(), "other".into(), String::new());
        }
        seen.insert(key.clone());
        key
    }

    /// Counts a request as in flight until the value is dropped, which also happens when its client goes away.
    pub fn inflight(&self, read_only: bool) -> InFlight {
        let gauge = self.inflight.get_or_create_owned(&kind(read_only));
        gauge.inc();
        InFlight(gauge)
    }

    /// Counts a request refused with 429.
    pub fn reject(&self, read_only: bool) {
        self.rejected.get_or_create(&kind(read_only)).inc();
    }

    /// Counts an authentication.
    pub fn authenticated(&self, result: AuthnResult) {
        let result = match result {
            AuthnResult::Success => "success",
            AuthnResult::Failure => "failure",
            AuthnResult::Error => "error",
        };
        self.authentication.get_or_create(&ResultLabel { result }).inc();
    }
}

fn kind(read_only: bool) -> KindLabel {
    KindLabel { request_kind: if read_only { "readOnly" } else { "mutating" } }
}

fn verb_label(info: &RequestInfo, connect: bool) -> &'static str {
    if connect {
        return "CONNECT";
    }
    match info.verb.as_str() {
        "get" => "GET",
        "list" => "LIST",
        "watch" => "WATCH",
        "create" | "post" => "POST",
        "update" | "put" => "PUT",
        "patch" => "PATCH",
        "delete" => "DELETE",
        "deletecollection" => "DELETECOLLECTION",
        _ => "other",
    }
}
