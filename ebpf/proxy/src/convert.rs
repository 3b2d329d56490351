//! From API objects to the model. Pure.

use std::net::IpAddr;

use ipnet::IpNet;
use orlop_ebpf_common::{TCP, UDP};

use crate::desired::Selection;
use crate::model::{Endpoint, Hint, Hints, Port, Service, Slice, SlicePort};
use crate::objects::{self, keys};

/// Services and slices with one of these labels are somebody else's; used as a selector at the server too.
pub const SELECTOR: &str = "!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless";
const FOREIGN: [&str; 2] = [keys::PROXY_NAME, keys::HEADLESS];
/// The API's default of sessionAffinityConfig.clientIP.timeoutSeconds.
const AFFINITY_SECONDS: u32 = 10_800;

/// `namespace/name`.
pub fn name(meta: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta) -> String {
    format!("{}/{}", meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
}

/// Whether a node is being removed: it is deleted, or the cluster's autoscaler is about to take its machine away.
pub fn node_goes(node: &objects::Node) -> bool {
    let taints = node.spec.iter().filter_map(|s| s.taints.as_ref()).flatten();
    node.metadata.deletion_timestamp.is_some() || taints.into_iter().any(|t| t.key == keys::TO_BE_DELETED)
}

/// The addresses by which the node is known, one of each family: internal ones first, as upstream chooses them.
pub fn primary_ips(node: &objects::Node) -> Vec<IpAddr> {
    let addresses = || node.status.iter().filter_map(|s| s.addresses.as_ref()).flatten();
    let of = |kind: &'static str| {
        addresses().filter(move |a| a.type_ == kind).filter_map(|a| a.address.parse().ok())
    };
    let all: Vec<IpAddr> = of("InternalIP").chain(of("ExternalIP")).collect();
    let Some(first) = all.first() else { return Vec::new() };
    let other = all.iter().find(|ip| ip.is_ipv4() != first.is_ipv4());
    [Some(first), other].into_iter().flatten().copied().collect()
}

/// Addresses that a ServiceCIDR reserves for ClusterIPs.
pub fn cidrs(range: &objects::ServiceCIDR) -> Vec<IpNet> {
    let texts = range.spec.iter().filter_map(|s| s.cidrs.as_ref()).flatten();
    texts.filter_map(|c| c.parse().ok()).collect()
}

fn proto(name: Option<&str>) -> Option<u8> {
    match name.unwrap_or("TCP") {
        "TCP" => Some(TCP),
        "UDP" => Some(UDP),
        // SCTP: no socket hook of the kernel sees it before connect, and many kernels lack it.
        _ => None,
    }
}

fn port(n: i32) -> u16 {
    u16::try_from(n).unwrap_or(0)
}

fn addresses(list: Option<&Vec<String>>) -> Vec<IpAddr> {
    list.into_iter().flatten().filter_map(|a| address(a)).collect()
}

/// IPv4 addresses may have leading zeros, as the API allows what older versions took; they are decimal.
fn address(text: &str) -> Option<IpAddr> {
    if text.contains(':') {
        return text.parse().ok();
    }
    let digits = |o: &str| o.bytes().all(|b| b.is_ascii_digit()).then(|| o.parse().ok())?;
    let octets: Vec<u8> = text.split('.').map(digits).collect::<Option<_>>()?;
    <[u8; 4]>::try_from(octets).ok().map(IpAddr::from)
}

/// `None`: headless, an external name, or handled by another proxy.
pub fn service(s: &objects::Service) -> Option<Service> {
    let spec = s.spec.as_ref()?;
    let labels = s.metadata.labels.as_ref();
    if FOREIGN.iter().any(|l| labels.is_some_and(|m| m.contains_key(*l)))
        || spec.type_.as_deref() == Some("ExternalName")
        || matches!(spec.cluster_ip.as_deref(), Some("None" | ""))
    {
        return None;
    }
    let mut cluster_ips = addresses(spec.cluster_ips.as_ref());
    if cluster_ips.is_empty() {
        cluster_ips.extend(spec.cluster_ip.as_deref().and_then(address));
    }
    if cluster_ips.is_empty() {
        return None;
    }
    let mut external_ips = addresses(spec.external_ips.as_ref());
    let mut load_balancer_ips = Vec::new();
    let ingress = s.status.as_ref().and_then(|s| s.load_balancer.as_ref()).and_then(|l| l.ingress.as_ref());
    if spec.type_.as_deref() == Some("LoadBalancer") {
        for i in ingress.into_iter().flatten().filter(|i| i.ip_mode.as_deref() != Some("Proxy")) {
            load_balancer_ips.extend(i.ip.as_deref().and_then(address));
        }
    }
    for list in [&mut external_ips, &mut load_balancer_ips] {
        list.sort_unstable();
        list.dedup();
    }
    // Who may come by the one way may not be kept off by the other.
    load_balancer_ips.retain(|ip| !external_ips.contains(ip));
    let mut ports: Vec<Port> = spec
        .ports
        .iter()
        .flatten()
        .filter_map(|p| {
            Some(Port {
                name: p.name.as_deref().unwrap_or_default().into(),
                proto: proto(p.protocol.as_deref())?,
                port: port(p.port),
                node_port: port(p.node_port.unwrap_or(0)),
            })
        })
        .collect();
    // There are thousands of each; none grows later.
    ports.shrink_to_fit();
    cluster_ips.shrink_to_fit();
    let affinity_seconds = if spec.session_affinity.as_deref() == Some("ClientIP") {
        spec.session_affinity_config
            .as_ref()
            .and_then(|c| c.client_ip.as_ref()?.timeout_seconds)
            .and_then(|t| u32::try_from(t).ok())
            .unwrap_or(AFFINITY_SECONDS)
    } else {
        0
    };
    Some(Service {
        cluster_ips,
        external_ips,
        load_balancer_ips,
        source_ranges: source_ranges(spec),
        ports,
        internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        external_local: spec.external_traffic_policy.as_deref() == Some("Local"),
        affinity_seconds,
        health_check_node_port: port(spec.health_check_node_port.unwrap_or(0)),
        selection: s.metadata.annotations.as_ref().and_then(|a| Selection::named(a.get(keys::SELECTION)?)),
    })
}

/// Blanks around a range are allowed, as the API allows them. What cannot be read admits nobody, but is a range all the same:
/// without any everybody would be admitted.
fn source_ranges(spec: &objects::ServiceSpec) -> Vec<IpNet> {
    let read = |text: &str| {
        let (ip, bits) = text.split_once('/')?;
        IpNet::new(address(ip)?, bits.bytes().all(|b| b.is_ascii_digit()).then(|| bits.parse().ok())??).ok()
    };
    let ranges = spec.load_balancer_source_ranges.iter().flatten().map(|r| r.trim());
    ranges
        .map(|r| {
            read(r).unwrap_or_else(|| {
                tracing::warn!(range = r, "a Service's source range cannot be read; it admits nobody");
                let nobody = if r.contains(':') { IpAddr::from([0u16; 8]) } else { IpAddr::from([0; 4]) };
                nobody.into()
            })
        })
        .collect()
}

/// `None`: of no Service, of names in place of addresses, or handled by another proxy. `node` and `zone` are
/// this node's (an empty zone is none).
pub fn slice(s: &objects::EndpointSlice, node: &str, zone: &str) -> Option<Slice> {
    let labels = s.metadata.labels.as_ref()?;
    if FOREIGN.iter().any(|l| labels.contains_key(*l)) {
        return None;
    }
    let v4 = match s.address_type.as_str() {
        "IPv4" => true,
        "IPv6" => false,
        _ => return None,
    };
    let service = format!("{}/{}", s.metadata.namespace.as_deref()?, labels.get(keys::SERVICE_NAME)?);
    let mut ports: Vec<SlicePort> = s
        .ports
        .iter()
        .flatten()
        .filter_map(|p| {
            Some(SlicePort {
                name: p.name.as_deref().unwrap_or_default().into(),
                proto: proto(p.protocol.as_deref())?,
                port: port(p.port?),
            })
        })
        .collect();
    let mut endpoints: Vec<Endpoint> = s
        .endpoints
        .iter()
        .flatten()
        .filter_map(|e| {
            let c = e.conditions.as_ref();
            // An unknown condition counts as the API says: ready, and serving as ready is.
            let ready = c.and_then(|c| c.ready).unwrap_or(true);
            Some(Endpoint {
                ip: e.address.filter(|a| a.is_ipv4() == v4)?,
                ready,
                serving: c.and_then(|c| c.serving).unwrap_or(ready),
                terminating: c.and_then(|c| c.terminating).unwrap_or(false),
                local: e.node_name.as_deref() == Some(node),
                hints: hints(e.hints.as_ref(), node, zone),
            })
        })
        .collect();
    ports.shrink_to_fit();
    endpoints.shrink_to_fit();
    Some(Slice { service: service.into(), v4, ports, endpoints })
}

fn hints(h: Option<&objects::Hints>, node: &str, zone: &str) -> Hints {
    fn hint<'a>(names: impl Iterator<Item = &'a str>, ours: &str) -> Hint {
        names.fold(Hint::None, |h, n| if n == ours || h == Hint::Ours { Hint::Ours } else { Hint::Others })
    }
    let Some(h) = h else { return Hints::default() };
    Hints {
        node: hint(h.for_nodes.iter().flatten().map(|n| n.name.as_str()), node),
        zone: hint(h.for_zones.iter().flatten().map(|z| z.name.as_str()), zone),
    }
}

/// When the endpoints changed, as their controller noted it: start of network_programming_duration.
pub fn trigger_time(s: &objects::EndpointSlice) -> Option<std::time::SystemTime> {
    let text = s.metadata.annotations.as_ref()?.get(keys::TRIGGER_TIME)?;
    let t: k8s_openapi::jiff::Timestamp = text.parse().ok()?;
    Some(t.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(spec: serde_json::Value) -> Option<Service> {
        let mut o = json!({"metadata": {"name": "s", "namespace": "n"}});
        o["spec"] = spec;
        o["status"] = json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}, {"ip": "192.0.2.2", "ipMode": "Proxy"}]}});
        service(&serde_json::from_value(o).unwrap())
    }

    #[test]
    fn services() {
        let port = json!([{"port": 80, "nodePort": 30080}, {"port": 9, "protocol": "SCTP"}]);
        for spec in [
            json!({"clusterIP": "None", "ports": port}),
            json!({"type": "ExternalName", "externalName": "x"}),
            json!({"ports": port}),
        ] {
            assert_eq!(parse(spec.clone()), None, "{spec}");
        }
        let s = parse(json!({"type": "LoadBalancer", "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00::1"], "ports": port,
            "sessionAffinity": "ClientIP", "externalTrafficPolicy": "Local", "loadBalancerSourceRanges": [" 10.0.0.0/8 "]}))
        .unwrap();
        assert_eq!(s.cluster_ips.len(), 2);
        assert_eq!(s.load_balancer_ips, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(s.source_ranges, ["10.0.0.0/8".parse::<IpNet>().unwrap()]);
        assert_eq!(s.ports.len(), 1, "SCTP is left out");
        assert_eq!(s.affinity_seconds, 10_800);
        assert!(s.external_local && !s.internal_local);
    }

    #[test]
    fn source_ranges_are_read_as_the_api_reads_them_and_none_opens_a_service() {
        for (text, expected) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            (" 010.000.0.0/08 ", "10.0.0.0/8"),
            ("192.168.001.1/32", "192.168.1.1/32"),
            ("fd00::/16", "fd00::/16"),
            ("10.0.0.0", "0.0.0.0/32"),
            ("10.0.0.0/33", "0.0.0.0/32"),
            ("10.0.0.256/8", "0.0.0.0/32"),
            ("10.0.0/8", "0.0.0.0/32"),
            ("+10.0.0.0/8", "0.0.0.0/32"),
            ("fd00::/129", "::/128"),
            ("", "0.0.0.0/32"),
        ] {
            let s = parse(json!({"clusterIP": "10.96.0.1", "loadBalancerSourceRanges": [text]})).unwrap();
            assert_eq!(s.source_ranges, [expected.parse::<IpNet>().unwrap()], "{text:?}");
        }
        let s = parse(json!({"clusterIP": "010.096.0.1", "externalIPs": ["192.000.2.1"]})).unwrap();
        assert_eq!(
            (s.cluster_ips[0].to_string(), s.external_ips[0].to_string()),
            ("10.96.0.1".into(), "192.0.2.1".into())
        );
    }

    #[test]
    fn a_node_is_known_by_one_address_of_each_family() {
        type Case<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str]);
        let cases: [Case; 5] = [
            (
                &[("ExternalIP", "192.0.2.1"), ("InternalIP", "10.0.0.1"), ("InternalIP", "10.0.0.2")],
                &["10.0.0.1"],
            ),
            (&[("InternalIP", "fd00::1"), ("InternalIP", "10.0.0.1")], &["fd00::1", "10.0.0.1"]),
            (&[("InternalIP", "10.0.0.1"), ("ExternalIP", "2001:db8::1")], &["10.0.0.1", "2001:db8::1"]),
            (&[("Hostname", "10.0.0.1"), ("ExternalIP", "192.0.2.1"), ("InternalIP", "x")], &["192.0.2.1"]),
            (&[("Hostname", "n")], &[]),
        ];
        for (addresses, expected) in cases {
            let list: Vec<_> = addresses.iter().map(|(t, a)| json!({"type": t, "address": a})).collect();
            let node = serde_json::from_value(json!({"status": {"addresses": list}})).unwrap();
            let ips: Vec<String> = primary_ips(&node).iter().map(IpAddr::to_string).collect();
            assert_eq!(ips, expected, "{addresses:?}");
        }
        assert_eq!(primary_ips(&objects::Node::default()), Vec::<IpAddr>::new());
    }

    #[test]
    fn slices() {
        let s: objects::EndpointSlice = serde_json::from_value(json!({
            "metadata": {"name": "s-1", "namespace": "n", "labels": {"kubernetes.io/service-name": "s"}},
            "addressType": "IPv4", "ports": [{"port": 8080}],
            "endpoints": [
                {"addresses": ["10.1.0.1"], "nodeName": "me", "hints": {"forZones": [{"name": "y"}, {"name": "z"}, {"name": "x"}]}},
                {"addresses": ["10.1.0.2"], "conditions": {"ready": false, "serving": true, "terminating": true}},
                {"addresses": ["bad"]},
            ]
        }))
        .unwrap();
        let m = slice(&s, "me", "z").unwrap();
        assert_eq!(&*m.service, "n/s");
        let states: Vec<_> =
            m.endpoints.iter().map(|e| (e.ready, e.serving, e.terminating, e.local)).collect();
        assert_eq!(m.endpoints[0].hints, Hints { node: Hint::None, zone: Hint::Ours });
        assert_eq!(states, [(true, true, false, true), (false, true, true, false)]);
    }
}
