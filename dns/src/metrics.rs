//! Figures under the names that CoreDNS gives them, so that its dashboards work.

use std::time::Instant;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use orlop_base::telemetry::Metrics;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;

use crate::forward::Transport;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Request {
    proto: &'static str,
    r#type: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Response {
    rcode: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Forwarded {
    result: &'static str,
}

/// Counters of one server.
#[derive(Clone, Debug)]
pub struct DnsMetrics {
    requests: Family<Request, Counter>,
    responses: Family<Response, Counter>,
    forwards: Family<Forwarded, Counter>,
    seconds: Histogram,
}

impl DnsMetrics {
    pub fn new(metrics: &Metrics) -> DnsMetrics {
        // From what a table look-up takes to the forwarder's limit.
        let buckets = [0.000_025, 0.000_1, 0.000_25, 0.001, 0.004, 0.016, 0.064, 0.256, 1.0, 4.0];
        DnsMetrics {
            requests: metrics.add(
                "coredns_dns_requests",
                "Questions by transport and type",
                Family::default(),
            ),
            responses: metrics.add("coredns_dns_responses", "Answers by response code", Family::default()),
            forwards: metrics.add(
                "coredns_forward_requests",
                "Questions sent on, by result",
                Family::default(),
            ),
            seconds: metrics.add(
                "coredns_dns_request_duration_seconds",
                "Time from question to answer",
                Histogram::new(buckets),
            ),
        }
    }

    /// `kind` is missing for what cannot be read.
    pub(crate) fn request(&self, transport: Transport, kind: Option<RecordType>) {
        let proto = match transport {
            Transport::Udp => "udp",
            Transport::Tcp => "tcp",
        };
        // A fixed set: askers must not be able to make new series.
        let r#type = match kind {
            Some(RecordType::A) => "A",
            Some(RecordType::AAAA) => "AAAA",
            Some(RecordType::SRV) => "SRV",
            Some(RecordType::PTR) => "PTR",
            Some(RecordType::CNAME) => "CNAME",
            Some(RecordType::TXT) => "TXT",
            Some(RecordType::MX) => "MX",
            Some(RecordType::NS) => "NS",
            Some(RecordType::SOA) => "SOA",
            _ => "other",
        };
        self.requests.get_or_create(&Request { proto, r#type }).inc();
    }

    pub(crate) fn response(&self, code: ResponseCode, start: Instant) {
        let rcode = match code {
            ResponseCode::NoError => "NOERROR",
            ResponseCode::NXDomain => "NXDOMAIN",
            ResponseCode::ServFail => "SERVFAIL",
            ResponseCode::FormErr => "FORMERR",
            ResponseCode::Refused => "REFUSED",
            ResponseCode::NotImp => "NOTIMP",
            _ => "other",
        };
        self.responses.get_or_create(&Response { rcode }).inc();
        self.seconds.observe(start.elapsed().as_secs_f64());
    }

    pub(crate) fn forwarded(&self, answered: bool) {
        let result = if answered { "answered" } else { "failed" };
        self.forwards.get_or_create(&Forwarded { result }).inc();
    }
}
