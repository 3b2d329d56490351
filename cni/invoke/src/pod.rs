use std::path::PathBuf;

use orlop_cni_types::{Bandwidth, DnsConfig, IpRange, PortMapping};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::Error;

/// A pod's attachment to the network: what the plugins are told about it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PodNetwork {
    /// The sandbox's id.
    pub container_id: String,
    /// The pod's network namespace. On DEL it may be gone.
    pub netns: PathBuf,
    /// Name of the interface in the pod; `eth0` for Kubernetes.
    pub ifname: String,
    pub pod_name: String,
    pub pod_namespace: String,
    pub pod_uid: String,
    #[serde(default)]
    pub port_mappings: Vec<PortMapping>,
    #[serde(default)]
    pub bandwidth: Option<Bandwidth>,
    #[serde(default)]
    pub ip_ranges: Vec<Vec<IpRange>>,
    #[serde(default)]
    pub dns: Option<DnsConfig>,
    /// Fixed addresses, with or without a prefix length.
    #[serde(default)]
    pub ips: Vec<String>,
    #[serde(default)]
    pub mac: Option<String>,
    #[serde(default)]
    pub aliases: Vec<String>,
    #[serde(default)]
    pub cgroup_path: Option<String>,
    /// The pod's annotations (capability `io.kubernetes.cri.pod-annotations`).
    #[serde(default)]
    pub pod_annotations: std::collections::BTreeMap<String, String>,
}

impl PodNetwork {
    /// Refuses ids and interface names that the specification does not allow ("Parameters").
    pub(crate) fn validate(&self) -> Result<(), Error> {
        let id = &self.container_id;
        let id_ok = id.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
        if !id_ok {
            return Err(Error::InvalidName { what: "container id", value: id.clone() });
        }
        let name = &self.ifname;
        let name_ok = (1..16).contains(&name.len())
            && name != "."
            && name != ".."
            && !name.contains(['/', ':'])
            && !name.contains(char::is_whitespace);
        if !name_ok {
            return Err(Error::InvalidName { what: "interface name", value: name.clone() });
        }
        Ok(())
    }

    /// `CNI_ARGS`, as Kubernetes runtimes fill it.
    pub(crate) fn cni_args(&self) -> String {
        let args = [
            ("IgnoreUnknown", "1"),
            ("K8S_POD_NAMESPACE", self.pod_namespace.as_str()),
            ("K8S_POD_NAME", self.pod_name.as_str()),
            ("K8S_POD_INFRA_CONTAINER_ID", self.container_id.as_str()),
            ("K8S_POD_UID", self.pod_uid.as_str()),
        ];
        args.map(|(k, v)| format!("{k}={v}")).join(";")
    }

    /// Everything that a plugin may ask for by a capability (the spec's CONVENTIONS.md).
    pub(crate) fn runtime_config(&self) -> Map<String, Value> {
        let mut map = Map::new();
        let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
        if !self.port_mappings.is_empty() {
            put("portMappings", json!(self.port_mappings));
        }
        if let Some(b) = self.bandwidth {
            put("bandwidth", json!(b));
        }
        if !self.ip_ranges.is_empty() {
            put("ipRanges", json!(self.ip_ranges));
        }
        if let Some(d) = &self.dns {
            put("dns", json!(d));
        }
        if !self.ips.is_empty() {
            put("ips", json!(self.ips));
        }
        if let Some(m) = &self.mac {
            put("mac", json!(m));
        }
        if !self.aliases.is_empty() {
            put("aliases", json!(self.aliases));
        }
        if let Some(c) = &self.cgroup_path {
            put("cgroupPath", json!(c));
        }
        if !self.pod_annotations.is_empty() {
            put("io.kubernetes.cri.pod-annotations", json!(self.pod_annotations));
        }
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_their_folder_are_refused() {
        let pod = |id: &str, ifname: &str| PodNetwork {
            container_id: id.into(),
            ifname: ifname.into(),
            ..PodNetwork::default()
        };
        assert!(pod("a1-b_c.d", "eth0").validate().is_ok());
        for (id, ifname) in [
            ("", "eth0"),
            ("../a", "eth0"),
            ("a/b", "eth0"),
            ("a", ""),
            ("a", "a/b"),
            ("a", "0123456789abcdef"),
            ("a", ".."),
        ] {
            assert!(pod(id, ifname).validate().is_err(), "{id:?} {ifname:?}");
        }
    }
}
