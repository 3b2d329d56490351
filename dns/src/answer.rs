//! What a question is answered with: the Kubernetes DNS specification 1.1.0 over the tables. No I/O.

use std::net::IpAddr;

use hickory_proto::op::{Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, NS, PTR, SOA, SRV, TXT};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use crate::zone::{Entry, Kind, Port, Protocol, Zone, undash};

/// The version of the specification, for `dns-version.<zone>`.
const SCHEMA_VERSION: &str = "1.1.0";

/// The zone's fixed properties.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The cluster domain, absolute.
    pub domain: Name,
    /// Lower-case labels of the domain.
    labels: Vec<String>,
    /// Seconds.
    pub ttl: u32,
    /// Addresses of the zone's name server.
    pub server_ips: Vec<IpAddr>,
}

impl Settings {
    /// `None` when `domain` is no domain name.
    pub fn new(domain: &str, ttl: u32, server_ips: Vec<IpAddr>) -> Option<Settings> {
        let mut name = Name::from_ascii(domain.to_ascii_lowercase()).ok()?;
        name.set_fqdn(true);
        let labels = name.iter().map(|l| String::from_utf8_lossy(l).into_owned()).collect::<Vec<_>>();
        (!labels.is_empty()).then_some(Settings { domain: name, labels, ttl, server_ips })
    }
}

/// An answer from the tables.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    pub code: ResponseCode,
    pub answers: Vec<Record>,
    pub additionals: Vec<Record>,
    /// For negative answers: the zone's SOA record, which says how long they hold (RFC 2308).
    pub authorities: Vec<Record>,
    /// The answers end with an alias to this name outside of the zone, which is to be resolved as well.
    pub chase: Option<Name>,
}

/// What to do with a question.
#[derive(Clone, Debug)]
pub enum Decision {
    Answer(Answer),
    /// Not a name of the cluster.
    Forward,
}

/// What a name below the zone is.
enum Found<'a> {
    /// NXDOMAIN.
    Nothing,
    /// The name exists but holds no records (an empty non-terminal).
    Empty,
    Apex,
    Version,
    Addresses(Vec<IpAddr>),
    Alias(&'a str),
    Ports(Vec<(u16, String, Vec<IpAddr>)>),
}

/// Decides on one question of class IN.
pub fn decide(zone: &Zone, settings: &Settings, query: &Query) -> Decision {
    if query.query_class() != DNSClass::IN {
        return Decision::Answer(Answer { code: ResponseCode::Refused, ..Answer::default() });
    }
    let labels: Vec<String> =
        query.name().iter().map(|l| String::from_utf8_lossy(l).to_ascii_lowercase()).collect();
    match labels.strip_suffix(settings.labels.as_slice()) {
        Some(relative) => {
            let relative: Vec<&str> = relative.iter().map(String::as_str).collect();
            Decision::Answer(in_zone(zone, settings, query, &relative))
        }
        None if labels.last().is_some_and(|l| l == "arpa") => reverse(zone, settings, query),
        None => Decision::Forward,
    }
}

fn in_zone(zone: &Zone, settings: &Settings, query: &Query, relative: &[&str]) -> Answer {
    let mut answer = Answer::default();
    let (name, wanted) = (query.name(), query.query_type());
    let record = |data| Record::from_rdata(name.clone(), settings.ttl, data);
    let asks = |t: RecordType| wanted == t || wanted == RecordType::ANY;
    match find(zone, settings, relative) {
        Found::Nothing => answer.code = ResponseCode::NXDomain,
        Found::Empty => {}
        Found::Apex => {
            if asks(RecordType::SOA) {
                answer.answers.push(soa(zone, settings));
            }
            if asks(RecordType::NS) {
                answer.answers.push(record(RData::NS(NS(server_name(settings)))));
                answer.additionals = addresses(&server_name(settings), settings, &settings.server_ips, None);
            }
        }
        Found::Version if asks(RecordType::TXT) => {
            answer.answers.push(record(RData::TXT(TXT::new(vec![SCHEMA_VERSION.to_owned()]))));
        }
        Found::Version => {}
        Found::Addresses(ips) => answer.answers = addresses(name, settings, &ips, Some(wanted)),
        Found::Alias(target) => {
            let target = Name::from_ascii(format!("{target}."));
            if let Ok(target) = target {
                answer.answers.push(record(RData::CNAME(CNAME(target.clone()))));
                if wanted != RecordType::CNAME {
                    answer.chase = Some(target);
                }
            } else {
                answer.code = ResponseCode::ServFail;
            }
        }
        Found::Ports(targets) if asks(RecordType::SRV) => {
            // All targets are equal: weights that add up to 100, as far as that goes.
            let weight = u16::try_from(100 / targets.len().max(1)).unwrap_or(1).max(1);
            for (port, target, ips) in targets {
                if let Ok(target) = Name::from_ascii(&target) {
                    let data = SRV::new(0, weight, port, target.clone());
                    answer.answers.push(record(RData::SRV(data)));
                    answer.additionals.extend(addresses(&target, settings, &ips, None));
                }
            }
        }
        Found::Ports(_) => {}
    }
    if answer.answers.is_empty() {
        answer.authorities.push(soa(zone, settings));
    }
    answer
}

/// `relative` are the labels before the zone's, in lower case, the leftmost first.
fn find<'a>(zone: &'a Zone, settings: &Settings, relative: &[&str]) -> Found<'a> {
    let in_namespace = |ns: &str| if zone.has_namespace(ns) { Found::Empty } else { Found::Nothing };
    match *relative {
        [] => Found::Apex,
        ["dns-version"] => Found::Version,
        ["dns" | "svc" | "pod"] => Found::Empty,
        ["ns", "dns"] => Found::Addresses(settings.server_ips.clone()),
        [ns, "svc" | "pod"] => in_namespace(ns),
        [label, ns, "pod"] if zone.has_namespace(ns) => match undash(label) {
            Some(ip) => Found::Addresses(vec![ip]),
            None => Found::Nothing,
        },
        [.., service, ns, "svc"] => match zone.service(ns, service) {
            Some(entry) => {
                below_service(entry, settings, relative.split_at(relative.len() - 3).0, service, ns)
            }
            None => Found::Nothing,
        },
        _ => Found::Nothing,
    }
}

fn below_service<'a>(
    entry: &'a Entry,
    settings: &Settings,
    before: &[&str],
    service: &str,
    ns: &str,
) -> Found<'a> {
    let Some(spec) = &entry.spec else { return Found::Nothing };
    let has_protocol = |p: Protocol| {
        spec.ports.iter().any(|x| x.protocol == p)
            || entry.published().any(|(_, ports)| ports.iter().any(|x| x.protocol == p))
    };
    match (before, &spec.kind) {
        ([], Kind::ExternalName(target)) => Found::Alias(target),
        (_, Kind::ExternalName(_)) => Found::Nothing,
        ([], Kind::ClusterIp(ips)) => Found::Addresses(ips.to_vec()),
        ([], Kind::Headless { .. }) => Found::Addresses(unique(entry.published().map(|(e, _)| e.ip))),
        ([protocol], _) if protocol.starts_with('_') => match Protocol::from_label(protocol) {
            Some(p) if has_protocol(p) => Found::Empty,
            _ => Found::Nothing,
        },
        ([label], Kind::Headless { .. }) => {
            let ips = unique(entry.published().filter(|(e, _)| e.has_label(label)).map(|(e, _)| e.ip));
            if ips.is_empty() { Found::Nothing } else { Found::Addresses(ips) }
        }
        ([port, protocol], kind) => {
            let (Some(port), Some(protocol)) = (port.strip_prefix('_'), Protocol::from_label(protocol))
            else {
                return Found::Nothing;
            };
            let is = |p: &&Port| &*p.name == port && p.protocol == protocol;
            let base = format!("{service}.{ns}.svc.{}", settings.domain);
            let mut targets: Vec<(u16, String, Vec<IpAddr>)> = Vec::new();
            if let Kind::ClusterIp(ips) = kind {
                targets.extend(spec.ports.iter().find(is).map(|p| (p.port, base, ips.to_vec())));
            } else {
                for (endpoint, ports) in entry.published() {
                    let Some(p) = ports.iter().find(is) else { continue };
                    let target = format!("{}.{base}", endpoint.label());
                    // Both addresses of a dual-stack pod, or a shared hostname, are one target.
                    match targets.iter_mut().find(|t| t.0 == p.port && t.1 == target) {
                        Some(t) => t.2.push(endpoint.ip),
                        None => targets.push((p.port, target, vec![endpoint.ip])),
                    }
                }
            }
            match targets.is_empty() {
                // The port exists, just nobody serves it.
                true if spec.ports.iter().any(|p| is(&p)) => Found::Empty,
                true => Found::Nothing,
                false => Found::Ports(targets),
            }
        }
        _ => Found::Nothing,
    }
}

fn unique(ips: impl Iterator<Item = IpAddr>) -> Vec<IpAddr> {
    let mut all: Vec<IpAddr> = ips.collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// A and AAAA records; only those of `wanted` when that is one of the two.
fn addresses(name: &Name, settings: &Settings, ips: &[IpAddr], wanted: Option<RecordType>) -> Vec<Record> {
    ips.iter()
        .filter(|ip| match wanted {
            None | Some(RecordType::ANY) => true,
            Some(RecordType::A) => ip.is_ipv4(),
            Some(RecordType::AAAA) => ip.is_ipv6(),
            Some(_) => false,
        })
        .map(|ip| {
            let data = match ip {
                IpAddr::V4(a) => RData::A(A(*a)),
                IpAddr::V6(a) => RData::AAAA(AAAA(*a)),
            };
            Record::from_rdata(name.clone(), settings.ttl, data)
        })
        .collect()
}

fn server_name(settings: &Settings) -> Name {
    below(settings, "ns.dns")
}

fn below(settings: &Settings, labels: &str) -> Name {
    // Labels of our own in front of a valid domain; too long a name is the only way to fail.
    Name::from_ascii(format!("{labels}.{}", settings.domain)).unwrap_or_else(|_| settings.domain.clone())
}

/// The zone's SOA record. Its last number, how long a negative answer may be kept, is the TTL.
pub fn soa(zone: &Zone, settings: &Settings) -> Record {
    let mailbox = below(settings, "hostmaster");
    let data = SOA::new(server_name(settings), mailbox, zone.serial(), 7200, 1800, 86400, settings.ttl);
    Record::from_rdata(settings.domain.clone(), settings.ttl, RData::SOA(data))
}

fn reverse(zone: &Zone, settings: &Settings, query: &Query) -> Decision {
    let Ok(net) = query.name().parse_arpa_name() else { return Decision::Forward };
    if net.prefix_len() != net.max_prefix_len() {
        return Decision::Forward;
    }
    let ip = net.addr();
    let names: Vec<String> = match zone.service_of_ip(ip) {
        Some((ns, name)) => vec![format!("{name}.{ns}.svc")],
        None => {
            zone.endpoints_of_ip(ip).iter().map(|(label, s, ns)| format!("{label}.{s}.{ns}.svc")).collect()
        }
    };
    if names.is_empty() {
        return Decision::Forward;
    }
    let mut answer = Answer::default();
    if matches!(query.query_type(), RecordType::PTR | RecordType::ANY) {
        answer.answers.extend(names.iter().map(|n| {
            Record::from_rdata(query.name().clone(), settings.ttl, RData::PTR(PTR(below(settings, n))))
        }));
    }
    Decision::Answer(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::zone::{Endpoint, Slice, Spec};

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn port(name: &str, protocol: Protocol, port: u16) -> Port {
        Port { name: name.into(), protocol, port }
    }

    fn endpoint(address: &str, hostname: Option<&str>, ready: bool) -> Endpoint {
        Endpoint { ip: ip(address), hostname: hostname.map(Into::into), ready }
    }

    fn zone() -> Zone {
        let mut z = Zone::default();
        z.set_namespace("default", true);
        z.set_namespace("empty", true);
        let web = Kind::ClusterIp([ip("10.96.0.10"), ip("fd00::10")].into());
        let ports = [port("http", Protocol::Tcp, 80), port("dns", Protocol::Udp, 53)];
        z.set_service("default", "web", Some(Spec { kind: web, ports: ports.into() }));
        let kind = Kind::Headless { publish_not_ready: false };
        let spec = Spec { kind, ports: [port("peer", Protocol::Tcp, 7000)].into() };
        z.set_service("default", "db", Some(spec));
        let endpoints = [
            endpoint("10.244.0.5", Some("db-0"), true),
            endpoint("10.244.0.6", Some("db-1"), false),
            endpoint("10.244.0.7", None, true),
        ];
        let slice = Slice { endpoints: endpoints.into(), ports: [port("peer", Protocol::Tcp, 7000)].into() };
        z.set_slice("default", "db", "db-x", Some(slice.clone()));
        z.set_slice("default", "web", "web-x", Some(slice.clone()));
        let spec = Spec { kind: Kind::Headless { publish_not_ready: true }, ports: Box::default() };
        z.set_service("default", "all", Some(spec));
        z.set_slice("default", "all", "all-x", Some(slice));
        let none = Spec { kind: Kind::Headless { publish_not_ready: false }, ports: Box::default() };
        z.set_service("default", "nobody", Some(none));
        for (name, target) in [("out", "www.example.com"), ("in", "web.default.svc.cluster.local")] {
            let kind = Kind::ExternalName(target.into());
            z.set_service("default", name, Some(Spec { kind, ports: Box::default() }));
        }
        z
    }

    /// The answer as one line: `NXDOMAIN`, `-` for none, else the records' data in order; `>` before a name to be chased.
    fn ask(z: &Zone, name: &str, kind: RecordType) -> String {
        let settings = Settings::new("cluster.local", 5, vec![ip("169.254.20.10")]).unwrap();
        let query = Query::query(Name::from_ascii(format!("{name}.")).unwrap(), kind);
        let answer = match decide(z, &settings, &query) {
            Decision::Forward => return "forward".to_owned(),
            Decision::Answer(a) => a,
        };
        if answer.code != ResponseCode::NoError {
            assert!(answer.answers.is_empty());
            return answer.code.to_string();
        }
        let mut words: Vec<String> = answer.answers.iter().map(|r| r.data.to_string()).collect();
        words.extend(answer.chase.iter().map(|n| format!(">{n}")));
        if words.is_empty() { "-".to_owned() } else { words.join(" | ") }
    }

    #[test]
    fn the_specification() {
        use RecordType::*;
        let z = zone();
        let nx = ResponseCode::NXDomain.to_string();
        let nx = nx.as_str();
        for (name, kind, expected) in [
            ("web.default.svc.cluster.local", A, "10.96.0.10"),
            ("WEB.Default.svc.CLUSTER.local", A, "10.96.0.10"),
            ("web.default.svc.cluster.local", AAAA, "fd00::10"),
            ("web.default.svc.cluster.local", MX, "-"),
            ("web.default.svc.cluster.local", ANY, "10.96.0.10 | fd00::10"),
            ("x.web.default.svc.cluster.local", A, nx),
            ("10-244-0-5.web.default.svc.cluster.local", A, nx),
            ("_http._tcp.web.default.svc.cluster.local", SRV, "0 100 80 web.default.svc.cluster.local."),
            ("_http._tcp.web.default.svc.cluster.local", A, "-"),
            ("_tcp.web.default.svc.cluster.local", SRV, "-"),
            ("_sctp.web.default.svc.cluster.local", SRV, nx),
            ("_http._udp.web.default.svc.cluster.local", SRV, nx),
            ("http._tcp.web.default.svc.cluster.local", SRV, nx),
            ("db.default.svc.cluster.local", A, "10.244.0.5 | 10.244.0.7"),
            ("db.default.svc.cluster.local", AAAA, "-"),
            ("all.default.svc.cluster.local", A, "10.244.0.5 | 10.244.0.6 | 10.244.0.7"),
            ("nobody.default.svc.cluster.local", A, "-"),
            ("db-0.db.default.svc.cluster.local", A, "10.244.0.5"),
            ("db-1.db.default.svc.cluster.local", A, nx),
            ("10-244-0-7.db.default.svc.cluster.local", A, "10.244.0.7"),
            (
                "_peer._tcp.db.default.svc.cluster.local",
                SRV,
                "0 50 7000 db-0.db.default.svc.cluster.local. | 0 50 7000 10-244-0-7.db.default.svc.cluster.local.",
            ),
            ("out.default.svc.cluster.local", A, "www.example.com. | >www.example.com."),
            ("out.default.svc.cluster.local", CNAME, "www.example.com."),
            ("10-244-0-99.default.pod.cluster.local", A, "10.244.0.99"),
            ("fd00--1.default.pod.cluster.local", AAAA, "fd00::1"),
            ("10-244-0-99.nowhere.pod.cluster.local", A, nx),
            ("10-244-0-300.default.pod.cluster.local", A, nx),
            ("default.svc.cluster.local", A, "-"),
            ("empty.svc.cluster.local", A, "-"),
            ("nowhere.svc.cluster.local", A, nx),
            ("svc.cluster.local", A, "-"),
            ("cluster.local", A, "-"),
            ("cluster.local", NS, "ns.dns.cluster.local."),
            ("ns.dns.cluster.local", A, "169.254.20.10"),
            ("dns-version.cluster.local", TXT, "1.1.0"),
            // What a search path makes of outside names stays here.
            ("www.example.com.default.svc.cluster.local", A, nx),
            ("www.example.com.svc.cluster.local", A, nx),
            ("www.example.com.cluster.local", A, nx),
            ("www.example.com", A, "forward"),
            ("local", A, "forward"),
            ("notcluster.local", A, "forward"),
            ("10.0.96.10.in-addr.arpa", PTR, "forward"),
            ("10.0.96.10.in-addr.arpa", A, "forward"),
            ("5.0.244.10.in-addr.arpa", A, "-"),
            ("244.10.in-addr.arpa", PTR, "forward"),
        ] {
            let expected = match (name, kind) {
                ("10.0.96.10.in-addr.arpa", PTR) => "web.default.svc.cluster.local.",
                ("10.0.96.10.in-addr.arpa", A) => "-",
                _ => expected,
            };
            assert_eq!(ask(&z, name, kind), expected, "{kind} {name}");
        }
        assert!(ask(&z, "7.0.244.10.in-addr.arpa", PTR).contains("10-244-0-7.db.default.svc.cluster.local."));
        assert!(
            ask(&z, "cluster.local", SOA).starts_with("ns.dns.cluster.local. hostmaster.cluster.local. ")
        );
        let v6 = "0.1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa";
        assert_eq!(ask(&z, v6, PTR), "web.default.svc.cluster.local.");
    }

    #[test]
    fn negative_answers_carry_the_soa_record() {
        let (z, settings) = (zone(), Settings::new("cluster.local.", 7, vec![]).unwrap());
        for name in ["nothing.default.svc.cluster.local.", "nobody.default.svc.cluster.local."] {
            let query = Query::query(Name::from_ascii(name).unwrap(), RecordType::A);
            let Decision::Answer(a) = decide(&z, &settings, &query) else { panic!("forwarded") };
            assert_eq!(a.authorities.len(), 1);
            assert_eq!(a.authorities[0].name.to_string(), "cluster.local.");
            assert!(matches!(&a.authorities[0].data, RData::SOA(s) if s.minimum == 7));
        }
    }

    #[test]
    fn nothing_stays_of_what_is_deleted() {
        let mut z = zone();
        for (ns, name) in z.services() {
            z.set_service(&ns, &name, None);
        }
        assert_eq!(
            ask(&z, "web.default.svc.cluster.local", RecordType::A),
            ResponseCode::NXDomain.to_string()
        );
        assert_eq!(ask(&z, "10.0.96.10.in-addr.arpa", RecordType::PTR), "forward");
        for (ns, service, name) in z.slices() {
            z.set_slice(&ns, &service, &name, None);
        }
        for ns in z.namespaces() {
            z.set_namespace(&ns, false);
        }
        assert!(!z.has_namespace("default") && !z.has_namespace("empty"));
    }

    #[test]
    fn a_reused_address_and_a_moved_slice() {
        let mut z = zone();
        let kind = Kind::ClusterIp([ip("10.96.0.10")].into());
        z.set_service("default", "new", Some(Spec { kind, ports: Box::default() }));
        z.set_service("default", "web", None);
        assert_eq!(ask(&z, "10.0.96.10.in-addr.arpa", RecordType::PTR), "new.default.svc.cluster.local.");
        let slice = Slice { endpoints: [endpoint("10.244.0.9", None, true)].into(), ports: Box::default() };
        z.set_slice("default", "nobody", "db-x", Some(slice));
        assert_eq!(ask(&z, "db.default.svc.cluster.local", RecordType::A), "-");
        assert_eq!(ask(&z, "nobody.default.svc.cluster.local", RecordType::A), "10.244.0.9");
    }
}
