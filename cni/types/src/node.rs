use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// One container's interface in a network.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Attachment {
    #[serde(rename = "containerID")]
    pub container_id: String,
    pub ifname: String,
}

/// A port of the node that leads to one of the pod (capability `portMappings`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    #[serde(rename = "hostPort")]
    pub host_port: u16,
    #[serde(rename = "containerPort")]
    pub container_port: u16,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    /// Empty: every address of the node.
    #[serde(rename = "hostIP", default, skip_serializing_if = "String::is_empty")]
    pub host_ip: String,
}

/// Limits of the pod's traffic (capability `bandwidth`). Rates in bits per second, bursts in bits; 0 is unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    #[serde(rename = "ingressRate", default, skip_serializing_if = "is_zero")]
    pub ingress_rate: u64,
    #[serde(rename = "ingressBurst", default, skip_serializing_if = "is_zero")]
    pub ingress_burst: u64,
    #[serde(rename = "egressRate", default, skip_serializing_if = "is_zero")]
    pub egress_rate: u64,
    #[serde(rename = "egressBurst", default, skip_serializing_if = "is_zero")]
    pub egress_burst: u64,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// Resolver settings (capability `dns`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsConfig {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub servers: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub searches: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

/// A range to allocate from (capability `ipRanges`, and `ranges` of an IPAM section).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpRange {
    pub subnet: IpNet,
    #[serde(rename = "rangeStart", default, skip_serializing_if = "Option::is_none")]
    pub range_start: Option<IpAddr>,
    #[serde(rename = "rangeEnd", default, skip_serializing_if = "Option::is_none")]
    pub range_end: Option<IpAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
}

impl From<IpNet> for IpRange {
    fn from(subnet: IpNet) -> Self {
        IpRange { subnet, range_start: None, range_end: None, gateway: None }
    }
}

/// The pod network of one node, for [`render_conflist`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OrlopNetwork {
    pub name: String,
    /// The node's podCIDRs, at most one of each family.
    pub pod_cidrs: Vec<IpNet>,
    /// Bytes; 0: that of the interface with the default route.
    pub mtu: u32,
    /// Where the plugin keeps its allocations.
    pub data_dir: PathBuf,
    /// What pods send elsewhere than to these networks and their own gets the node's address as its source.
    pub not_masqueraded: Vec<IpNet>,
}

impl OrlopNetwork {
    /// The usual network, as in `/etc/cni/net.d/10-orlop.conflist`.
    pub fn new(pod_cidrs: Vec<IpNet>) -> OrlopNetwork {
        OrlopNetwork {
            name: "orlop".to_owned(),
            pod_cidrs,
            mtu: 0,
            data_dir: Path::new("/var/lib/orlop/cni").to_owned(),
            not_masqueraded: Vec::new(),
        }
    }
}

/// The text of the conflist that makes `orlop-cni` serve `network`; equal networks give equal texts.
pub fn render_conflist(network: &OrlopNetwork) -> String {
    let texts = |nets: &[IpNet]| nets.iter().map(|n| n.trunc().to_string()).collect::<Vec<_>>();
    let value = serde_json::json!({
        // Runtimes whose library is older than 1.1 read the first field only.
        "cniVersion": "1.0.0",
        "cniVersions": ["1.0.0", "1.1.0"],
        "name": network.name,
        "plugins": [{
            "type": "orlop-cni",
            "mtu": network.mtu,
            "capabilities": {"ips": true, "mac": true, "portMappings": true},
            "masquerade": {"except": texts(&network.not_masqueraded)},
            "ipam": {"ranges": texts(&network.pod_cidrs), "dataDir": network.data_dir},
        }],
    });
    format!("{value:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rendered_conflist_is_a_valid_network() {
        let network =
            OrlopNetwork::new(vec!["10.244.3.7/24".parse().unwrap(), "fd00:1::/64".parse().unwrap()]);
        let text = render_conflist(&network);
        let parsed = crate::NetworkConfig::parse_list(text.as_bytes()).unwrap();
        assert_eq!(parsed.name, "orlop");
        assert_eq!(parsed.version, crate::SpecVersion::V1_1_0);
        assert_eq!(parsed.plugins[0].plugin_type, "orlop-cni");
        assert_eq!(
            parsed.plugins[0].raw["ipam"]["ranges"],
            serde_json::json!(["10.244.3.0/24", "fd00:1::/64"])
        );
        assert_eq!(render_conflist(&network), text);
    }
}
