//! What the plugin is told: environment and standard input.

use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use orlop_cni_types::{
    Attachment, CniResult, IpRange, NetworkConfig, PortMapping, SpecVersion, VALID_ATTACHMENTS, stable_hash,
};
use serde::Deserialize;
use serde_json::Value;

use crate::error::Error;
use crate::ipam::{Range, RangeSet};
use crate::nat::Masquerade;

const DATA_DIR: &str = "/var/lib/orlop/cni";

#[derive(Debug, Default, Deserialize)]
struct RawConf {
    #[serde(default)]
    mtu: u32,
    #[serde(default)]
    masquerade: Option<Masquerade>,
    #[serde(default)]
    ipam: RawIpam,
    #[serde(rename = "runtimeConfig", default)]
    runtime: RawRuntime,
    #[serde(rename = "prevResult", default)]
    previous: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
struct RawIpam {
    #[serde(rename = "type", default)]
    ipam_type: Option<String>,
    #[serde(default)]
    ranges: Vec<RawRanges>,
    #[serde(default)]
    subnet: Option<IpNet>,
    #[serde(rename = "dataDir", default)]
    data_dir: Option<PathBuf>,
}

/// `"10.0.0.0/24"`, `{"subnet": …}`, or a set of these as the reference plugin `host-local` has it.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum RawRanges {
    Net(IpNet),
    Range(IpRange),
    Set(Vec<IpRange>),
}

#[derive(Debug, Default, Deserialize)]
struct RawRuntime {
    #[serde(default)]
    ips: Vec<String>,
    #[serde(default)]
    mac: Option<String>,
    #[serde(rename = "ipRanges", default)]
    ip_ranges: Vec<Vec<IpRange>>,
    #[serde(rename = "portMappings", default)]
    port_mappings: Vec<PortMapping>,
}

/// The configuration, checked.
#[derive(Debug)]
pub struct Conf {
    pub network: String,
    pub version: SpecVersion,
    pub plugin_type: String,
    /// Bytes; 0: as the interface with the default route.
    pub mtu: u32,
    /// One address is given from each set.
    pub ranges: Vec<RangeSet>,
    pub data_dir: PathBuf,
    pub wanted_ips: Vec<IpAddr>,
    pub mac: Option<[u8; 6]>,
    /// Ports of the node that lead to the pod.
    pub port_mappings: Vec<PortMapping>,
    pub masquerade: Option<Masquerade>,
    pub previous: Option<Value>,
    /// Only GC has them.
    pub valid: Option<Vec<Attachment>>,
}

impl Conf {
    pub fn parse(bytes: &[u8]) -> Result<Conf, Error> {
        // The same checks of name, version and type as the caller's side has.
        let head = NetworkConfig::parse_single(bytes)?;
        let plugin_type = head.plugins.first().map(|p| p.plugin_type.clone()).unwrap_or_default();
        let valid = head.plugins.first().and_then(|p| p.raw.get(VALID_ATTACHMENTS)).cloned();
        let valid = valid.map(serde_json::from_value).transpose().map_err(Error::Decode)?;
        let raw: RawConf = serde_json::from_slice(bytes).map_err(Error::Decode)?;
        let mut conf = Conf {
            network: head.name,
            version: head.version,
            plugin_type,
            mtu: raw.mtu,
            ranges: Vec::new(),
            data_dir: raw.ipam.data_dir.clone().unwrap_or_else(|| DATA_DIR.into()),
            wanted_ips: Vec::new(),
            mac: raw.runtime.mac.as_deref().map(parse_mac).transpose()?,
            port_mappings: raw.runtime.port_mappings,
            masquerade: raw.masquerade,
            previous: raw.previous,
            valid,
        };
        if conf.plugin_type == "loopback" {
            return Ok(conf);
        }
        if conf.mtu != 0 && !(68..=65535).contains(&conf.mtu) {
            return Err(field("mtu", format!("{} is not 0 or 68 to 65535", conf.mtu)));
        }
        if !conf.data_dir.is_absolute() {
            return Err(field(
                "ipam.dataDir",
                format!("{} is not an absolute path", conf.data_dir.display()),
            ));
        }
        for ip in &raw.runtime.ips {
            conf.wanted_ips.push(parse_ip(ip)?);
        }
        conf.ranges = range_sets(raw.ipam, raw.runtime.ip_ranges)?;
        Ok(conf)
    }

    /// The networks that pods' addresses are of.
    pub fn pod_nets(&self) -> impl Iterator<Item = IpNet> {
        self.ranges.iter().flatten().map(|r| r.subnet)
    }

    /// The name of the network's nf_tables table; other clusters on this machine have other folders.
    pub fn table(&self) -> String {
        let parts = [self.data_dir.as_os_str().as_encoded_bytes(), b"\0", self.network.as_bytes()];
        format!("orlop-cni-{:016x}", stable_hash(0, &parts))
    }

    /// `None` when there is no result of an earlier plugin.
    pub fn previous_result(&self) -> Result<Option<CniResult>, Error> {
        self.previous
            .as_ref()
            .map(|v| CniResult::from_value(v, self.version).map_err(Error::Previous))
            .transpose()
    }
}

fn field(field: &'static str, problem: String) -> Error {
    Error::Field { field, problem }
}

fn range_sets(ipam: RawIpam, overriding: Vec<Vec<IpRange>>) -> Result<Vec<RangeSet>, Error> {
    if let Some(t) = ipam.ipam_type.filter(|t| !t.is_empty() && t != "orlop-cni") {
        return Err(field(
            "ipam.type",
            format!("{t:?} is not served; orlop-cni allocates itself, remove the field"),
        ));
    }
    let mut sets: Vec<RangeSet> = Vec::new();
    if !overriding.is_empty() {
        for set in overriding {
            sets.push(set.iter().map(range).collect::<Result<_, _>>()?);
        }
        return Ok(sets);
    }
    // Single ranges form one set for each family, so that a pod gets one address of each.
    let mut single: [RangeSet; 2] = Default::default();
    let listed = ipam.subnet.map(RawRanges::Net).into_iter().chain(ipam.ranges);
    for entry in listed {
        match entry {
            RawRanges::Net(net) => single[usize::from(net.addr().is_ipv6())].push(range(&net.into())?),
            RawRanges::Range(r) => single[usize::from(r.subnet.addr().is_ipv6())].push(range(&r)?),
            RawRanges::Set(set) => sets.push(set.iter().map(range).collect::<Result<_, _>>()?),
        }
    }
    let mut all: Vec<RangeSet> = single.into_iter().filter(|s| !s.is_empty()).collect();
    all.append(&mut sets);
    if all.is_empty() || all.iter().any(Vec::is_empty) {
        return Err(field("ipam.ranges", "has no range; give the node's podCIDR".to_owned()));
    }
    Ok(all)
}

fn range(r: &IpRange) -> Result<Range, Error> {
    Range::new(r.subnet, r.range_start, r.range_end).map_err(|problem| field("ipam.ranges", problem))
}

fn parse_mac(text: &str) -> Result<[u8; 6], Error> {
    let wrong = || field("runtimeConfig.mac", format!("{text:?} is not a unicast hardware address"));
    let mut mac = [0u8; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        *byte = parts.next().and_then(|p| u8::from_str_radix(p, 16).ok()).ok_or_else(wrong)?;
    }
    if parts.next().is_some() || mac[0] & 1 != 0 || mac == [0; 6] {
        return Err(wrong());
    }
    Ok(mac)
}

fn parse_ip(text: &str) -> Result<IpAddr, Error> {
    let address = text.split_once('/').map_or(text, |(a, _)| a);
    address.parse().map_err(|_| field("runtimeConfig.ips", format!("{text:?} is not an address")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(more: &str) -> Result<Conf, Error> {
        Conf::parse(format!(r#"{{"cniVersion":"1.1.0","name":"n","type":"orlop-cni",{more}}}"#).as_bytes())
    }

    #[test]
    fn forms_of_ranges() {
        for (ipam, sets) in [
            (r#"{"subnet":"10.0.0.0/24"}"#, 1),
            (r#"{"ranges":["10.0.0.0/24","10.1.0.0/24"]}"#, 1),
            (r#"{"ranges":["10.0.0.0/24","fd00::/64"]}"#, 2),
            (
                r#"{"ranges":[[{"subnet":"10.0.0.0/24","rangeStart":"10.0.0.9"}],[{"subnet":"fd00::/64"}]]}"#,
                2,
            ),
        ] {
            assert_eq!(conf(&format!(r#""ipam":{ipam}"#)).unwrap().ranges.len(), sets, "{ipam}");
        }
    }

    #[test]
    fn bad_fields_are_named() {
        for (text, part) in [
            (r#""ipam":{}"#, "ipam.ranges"),
            (r#""ipam":{"ranges":[[]]}"#, "ipam.ranges"),
            (r#""ipam":{"type":"host-local","subnet":"10.0.0.0/24"}"#, "ipam.type"),
            (r#""mtu":9,"ipam":{"subnet":"10.0.0.0/24"}"#, "mtu"),
            (r#""ipam":{"subnet":"10.0.0.0/24","dataDir":"x"}"#, "ipam.dataDir"),
            (
                r#""runtimeConfig":{"mac":"01:00:00:00:00:00"},"ipam":{"subnet":"10.0.0.0/24"}"#,
                "runtimeConfig.mac",
            ),
            (r#""runtimeConfig":{"ips":["x"]},"ipam":{"subnet":"10.0.0.0/24"}"#, "runtimeConfig.ips"),
        ] {
            let e = conf(text).unwrap_err();
            assert!(e.to_string().starts_with(part), "{text}: {e}");
        }
    }
}
