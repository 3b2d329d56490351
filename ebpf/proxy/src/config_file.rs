//! Reading kube-proxy's configuration file: what is wrong is refused with the field's name, what has no effect here is
//! named.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::{Error, NodePortAddress};

const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
const KIND: &str = "KubeProxyConfiguration";
const HEALTH_PORT: u16 = 10256;
const METRICS_PORT: u16 = 10249;
/// Upstream's other fields: about packet rules and connection tracking, which there are none of, and about local traffic,
/// which is known by the interface that it comes from.
const OTHERS: [&str; 19] = [
    "bindAddress",
    "bindAddressHardFail",
    "clusterCIDR",
    "configSyncPeriod",
    "conntrack",
    "detectLocal",
    "detectLocalMode",
    "enableProfiling",
    "featureGates",
    "iptables",
    "ipvs",
    "logging",
    "mode",
    "nftables",
    "oomScoreAdj",
    "portRange",
    "showHiddenMetricsForVersion",
    "windowsRunAsService",
    "winkernel",
];

/// A KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1), YAML or JSON. What it does not say is `None` or empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ConfigFile {
    /// clientConnection.kubeconfig.
    pub kubeconfig: Option<PathBuf>,
    /// hostnameOverride.
    pub node_name: Option<String>,
    /// healthzBindAddress.
    pub health_address: Option<SocketAddr>,
    /// metricsBindAddress.
    pub metrics_address: Option<SocketAddr>,
    /// nodePortAddresses.
    pub node_port_addresses: Vec<NodePortAddress>,
    /// Fields that were given a value and change nothing here.
    pub without_effect: Vec<String>,
}

impl ConfigFile {
    pub fn read(path: &Path) -> Result<ConfigFile, Error> {
        let bad = |message| Error::ConfigFile { path: path.to_owned(), message };
        let text = std::fs::read_to_string(path).map_err(|e| bad(e.to_string()))?;
        parse(&text).map_err(bad)
    }
}

fn parse(text: &str) -> Result<ConfigFile, String> {
    let one_line = |s: String| s.split_whitespace().collect::<Vec<_>>().join(" ");
    let file: Value = serde_saphyr::from_str(text).map_err(|e| one_line(e.to_string()))?;
    let Value::Object(mut file) = file else { return Err("it holds no fields".into()) };
    for (field, value) in [("apiVersion", API_VERSION), ("kind", KIND)] {
        match file.remove(field) {
            Some(v) if v == value => {}
            Some(v) => return Err(format!("{field} is {v}; it must be {value}")),
            None => return Err(format!("{field} is missing; it must be {value}")),
        }
    }
    let mut client = match file.remove("clientConnection") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(m)) => m,
        Some(v) => return Err(format!("clientConnection is {v}; it must hold fields")),
    };
    let mut c = ConfigFile {
        kubeconfig: string(&mut client, "kubeconfig", "clientConnection.")?.map(PathBuf::from),
        node_name: string(&mut file, "hostnameOverride", "")?.map(|n| n.trim().to_ascii_lowercase()),
        health_address: address(&mut file, "healthzBindAddress", HEALTH_PORT)?,
        metrics_address: address(&mut file, "metricsBindAddress", METRICS_PORT)?,
        node_port_addresses: node_port_addresses(file.remove("nodePortAddresses"))?,
        without_effect: Vec::new(),
    };
    for (name, value) in client {
        if !["acceptContentTypes", "burst", "contentType", "qps"].contains(&&*name) {
            return Err(format!("clientConnection.{name} is not a field of a {KIND}"));
        }
        note(&mut c.without_effect, format!("clientConnection.{name}"), &value);
    }
    for (name, value) in file {
        if !OTHERS.contains(&&*name) {
            return Err(format!("{name} is not a field of a {KIND}"));
        }
        note(&mut c.without_effect, name, &value);
    }
    Ok(c)
}

/// Notes what has a value; files of kubeadm name every field, most of them empty.
fn note(found: &mut Vec<String>, name: String, value: &Value) {
    match value {
        Value::Object(fields) => fields.iter().for_each(|(n, v)| note(found, format!("{name}.{n}"), v)),
        Value::Null | Value::Bool(false) => {}
        Value::Array(list) if list.is_empty() => {}
        Value::String(s) if s.is_empty() || s == "0s" => {}
        Value::Number(n) if n.as_f64() == Some(0.0) => {}
        _ => found.push(name),
    }
}

fn string(from: &mut Map<String, Value>, field: &str, prefix: &str) -> Result<Option<String>, String> {
    match from.remove(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(s)) => Ok(Some(s).filter(|s| !s.is_empty())),
        Some(v) => Err(format!("{prefix}{field} is {v}; it must be a string")),
    }
}

/// An address alone gets upstream's port.
fn address(from: &mut Map<String, Value>, field: &str, port: u16) -> Result<Option<SocketAddr>, String> {
    let Some(text) = string(from, field, "")? else { return Ok(None) };
    let alone = || text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, port));
    match text.parse().or_else(|_| alone()) {
        Ok(a) => Ok(Some(a)),
        Err(_) => Err(format!("{field} is {text:?}; write IP:PORT")),
    }
}

fn node_port_addresses(value: Option<Value>) -> Result<Vec<NodePortAddress>, String> {
    let list = match value {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(v) => return Err(format!("nodePortAddresses is {v}; it must be a list")),
    };
    let read = |v: &Value| {
        let read = v.as_str().and_then(|t| t.parse().ok());
        read.ok_or_else(|| format!("nodePortAddresses has {v}; write addresses as CIDRs, or primary alone"))
    };
    let list: Vec<NodePortAddress> = list.iter().map(read).collect::<Result<_, _>>()?;
    if list.len() > 1 && list.contains(&NodePortAddress::Primary) {
        return Err("nodePortAddresses has primary beside others; it must stand alone".into());
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";

    #[test]
    fn a_file_as_kubeadm_writes_it() {
        let c = parse(&format!(
            "{HEAD}bindAddress: 0.0.0.0\nbindAddressHardFail: false\nclientConnection:\n  acceptContentTypes: \"\"\n  burst: 0\n  \
             contentType: \"\"\n  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf\n  qps: 0\nclusterCIDR: 10.244.0.0/16\n\
             configSyncPeriod: 0s\nconntrack:\n  maxPerCore: null\n  min: null\ndetectLocal:\n  bridgeInterface: \"\"\n\
             enableProfiling: false\nhealthzBindAddress: 127.0.0.1\nhostnameOverride: Node1\niptables:\n  masqueradeAll: true\n  \
             masqueradeBit: null\nlogging:\n  flushFrequency: 0\n  options:\n    json:\n      infoBufferSize: \"0\"\n\
             metricsBindAddress: \"[::1]:9\"\nmode: \"\"\nnodePortAddresses: [10.0.0.0/8]\noomScoreAdj: null\nportRange: \"\"\n"
        ))
        .unwrap();
        assert_eq!(c.kubeconfig.unwrap(), Path::new("/var/lib/kube-proxy/kubeconfig.conf"));
        assert_eq!(c.node_name.unwrap(), "node1");
        assert_eq!(c.health_address.unwrap().to_string(), "127.0.0.1:10256");
        assert_eq!(c.metrics_address.unwrap().to_string(), "[::1]:9");
        assert_eq!(c.node_port_addresses, ["10.0.0.0/8".parse().unwrap()]);
        let named =
            ["bindAddress", "clusterCIDR", "iptables.masqueradeAll", "logging.options.json.infoBufferSize"];
        let mut found = c.without_effect;
        found.sort();
        assert_eq!(found, named);
    }

    /// Upstream's other fields, each with a value: every one is named, and none is taken for a mistake.
    #[test]
    fn what_has_no_effect_is_named() {
        let fields = [
            ("bindAddress", "10.0.0.1"),
            ("bindAddressHardFail", "true"),
            ("clientConnection.acceptContentTypes", "x"),
            ("clientConnection.burst", "1"),
            ("clientConnection.contentType", "x"),
            ("clientConnection.qps", "1.5"),
            ("clusterCIDR", "10.244.0.0/16"),
            ("configSyncPeriod", "1m"),
            ("conntrack.maxPerCore", "1"),
            ("conntrack.min", "1"),
            ("conntrack.tcpBeLiberal", "true"),
            ("conntrack.tcpCloseWaitTimeout", "1h"),
            ("conntrack.tcpEstablishedTimeout", "24h"),
            ("conntrack.udpStreamTimeout", "1m"),
            ("conntrack.udpTimeout", "1m"),
            ("detectLocal.bridgeInterface", "cni0"),
            ("detectLocal.interfaceNamePrefix", "veth"),
            ("detectLocalMode", "BridgeInterface"),
            ("enableProfiling", "true"),
            ("featureGates.AllAlpha", "true"),
            ("iptables.localhostNodePorts", "true"),
            ("iptables.masqueradeAll", "true"),
            ("iptables.masqueradeBit", "14"),
            ("iptables.minSyncPeriod", "1s"),
            ("iptables.syncPeriod", "30s"),
            ("ipvs.excludeCIDRs", "[10.0.0.0/8]"),
            ("ipvs.minSyncPeriod", "1s"),
            ("ipvs.scheduler", "rr"),
            ("ipvs.strictARP", "true"),
            ("ipvs.syncPeriod", "30s"),
            ("ipvs.tcpFinTimeout", "1s"),
            ("ipvs.tcpTimeout", "1s"),
            ("ipvs.udpTimeout", "1s"),
            ("logging.format", "json"),
            ("mode", "nftables"),
            ("nftables.masqueradeAll", "true"),
            ("nftables.masqueradeBit", "14"),
            ("nftables.minSyncPeriod", "1s"),
            ("nftables.syncPeriod", "30s"),
            ("oomScoreAdj", "-999"),
            ("portRange", "1-2"),
            ("showHiddenMetricsForVersion", "1.35"),
            ("windowsRunAsService", "true"),
            ("winkernel.enableDSR", "true"),
            ("winkernel.forwardHealthCheckVip", "true"),
            ("winkernel.networkName", "x"),
            ("winkernel.rootHnsEndpointName", "x"),
            ("winkernel.sourceVip", "x"),
        ];
        for (field, value) in fields {
            let text = match field.split_once('.') {
                Some((outer, inner)) => format!("{HEAD}{outer}: {{{inner}: {value}}}\n"),
                None => format!("{HEAD}{field}: {value}\n"),
            };
            assert_eq!(parse(&text).unwrap().without_effect, [field], "{text}");
        }
        let c = parse(&format!("{HEAD}nodePortAddresses: [primary]\n")).unwrap();
        assert_eq!(c.node_port_addresses, [NodePortAddress::Primary]);
        assert!(c.without_effect.is_empty());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            ("kind: KubeProxyConfiguration\n".to_owned(), "apiVersion is missing"),
            (HEAD.replace("v1alpha1", "v1"), "it must be kubeproxy.config.k8s.io/v1alpha1"),
            (format!("{HEAD}hostNameOverride: x\n"), "hostNameOverride is not a field"),
            (
                format!("{HEAD}clientConnection: {{kubeConfig: x}}\n"),
                "clientConnection.kubeConfig is not a field",
            ),
            (format!("{HEAD}healthzBindAddress: x\n"), "healthzBindAddress is \"x\"; write IP:PORT"),
            (format!("{HEAD}nodePortAddresses: [primary, 10.0.0.0/8]\n"), "it must stand alone"),
            (format!("{HEAD}nodePortAddresses: primary\n"), "it must be a list"),
            (format!("{HEAD}nodePortAddresses: [10.0.0.1]\n"), "nodePortAddresses has \"10.0.0.1\""),
            ("[]".to_owned(), "no fields"),
            (format!("{HEAD}: : :"), ""),
        ] {
            let e = parse(&text).unwrap_err();
            assert!(e.contains(part) && !e.contains('\n'), "{e}");
        }
    }
}
