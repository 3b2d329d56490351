use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::version::{SpecVersion, UnknownVersion};

/// What ADD gives: interfaces, addresses, routes and resolver settings, in the shape of 1.1.0.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CniResult {
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_empty")]
    pub interfaces: Vec<Interface>,
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_empty")]
    pub ips: Vec<IpConfig>,
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_empty")]
    pub routes: Vec<Route>,
    #[serde(default, skip_serializing_if = "Dns::is_empty", deserialize_with = "null_is_default")]
    pub dns: Dns,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    pub name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mac: String,
    /// Bytes; since 1.1.0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Path of the network namespace; empty for an interface of the host.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
    #[serde(rename = "socketPath", default, skip_serializing_if = "String::is_empty")]
    pub socket_path: String,
    #[serde(rename = "pciID", default, skip_serializing_if = "String::is_empty")]
    pub pci_id: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpConfig {
    /// The address with its prefix length; the host bits are kept.
    pub address: IpNet,
    /// Index into [`CniResult::interfaces`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    pub dst: IpNet,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advmss: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<u8>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_empty")]
    pub nameservers: Vec<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub domain: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_empty")]
    pub search: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_empty")]
    pub options: Vec<String>,
}

impl Dns {
    pub fn is_empty(&self) -> bool {
        self == &Dns::default()
    }
}

// Go plugins print `null` for an empty slice.
fn null_is_empty<'de, D, T>(d: D) -> Result<Vec<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de>,
{
    Ok(Option::<Vec<T>>::deserialize(d)?.unwrap_or_default())
}

fn null_is_default<'de, D, T>(d: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::<T>::deserialize(d)?.unwrap_or_default())
}

/// Why a result cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ResultError {
    #[error(transparent)]
    UnknownVersion(#[from] UnknownVersion),
    #[error("a result of cniVersion {0} cannot be read; set the network's cniVersion to 0.3.1 or newer")]
    Unsupported(SpecVersion),
    #[error("the result is not of the form that the specification gives")]
    Form(#[source] serde_json::Error),
    #[error("ips[{ip}] points to interface {interface}, but the result has {count} interfaces")]
    Interface { ip: usize, interface: usize, count: usize },
}

impl CniResult {
    /// Reads a result of any version from 0.3.0 on; a missing `cniVersion` is taken as `expected`.
    pub fn from_value(value: &Value, expected: SpecVersion) -> Result<CniResult, ResultError> {
        let version = match value.get("cniVersion").and_then(Value::as_str) {
            Some(v) => SpecVersion::parse(v)?,
            None => expected,
        };
        if !version.is_supported() {
            return Err(ResultError::Unsupported(version));
        }
        // 0.3 and 0.4 only add a "version" to each address, which says nothing that the address does not.
        let result = CniResult::deserialize(value).map_err(ResultError::Form)?;
        let count = result.interfaces.len();
        for (ip, c) in result.ips.iter().enumerate() {
            if let Some(interface) = c.interface
                && interface >= count
            {
                return Err(ResultError::Interface { ip, interface, count });
            }
        }
        Ok(result)
    }

    /// The JSON form for `version`: fields that it does not have are left out.
    pub fn to_value(&self, version: SpecVersion) -> Value {
        let mut value = serde_json::to_value(self).unwrap_or_else(|_| Value::Object(Map::new()));
        let Some(map) = value.as_object_mut() else { return value };
        if version < SpecVersion::V1_1_0 {
            for i in objects(map, "interfaces") {
                i.retain(|k, _| matches!(k.as_str(), "name" | "mac" | "sandbox"));
            }
            for r in objects(map, "routes") {
                r.retain(|k, _| matches!(k.as_str(), "dst" | "gw"));
            }
        }
        if version < SpecVersion::V1_0_0 {
            for (ip, c) in objects(map, "ips").zip(&self.ips) {
                let family = if c.address.addr().is_ipv4() { "4" } else { "6" };
                ip.insert("version".into(), family.into());
            }
        }
        map.insert("cniVersion".into(), version.as_str().into());
        value
    }

    /// The pod's addresses on `ifname` in the order of the result: those of that interface inside a namespace, or of none in particular.
    pub fn pod_ips(&self, ifname: &str) -> Vec<IpAddr> {
        self.ips
            .iter()
            .filter(|ip| match ip.interface.and_then(|i| self.interfaces.get(i)) {
                Some(interface) => interface.name == ifname && !interface.sandbox.is_empty(),
                None => true,
            })
            .map(|ip| ip.address.addr())
            .collect()
    }
}

fn objects<'a>(
    map: &'a mut Map<String, Value>,
    key: &str,
) -> impl Iterator<Item = &'a mut Map<String, Value>> {
    map.get_mut(key).and_then(Value::as_array_mut).into_iter().flatten().filter_map(Value::as_object_mut)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_old_result_is_read_and_written_back() {
        let old = json!({"cniVersion": "0.3.1", "interfaces": [{"name": "br0"}, {"name": "eth0", "sandbox": "/n"}],
            "ips": [{"version": "4", "address": "10.1.2.3/24", "gateway": "10.1.2.1", "interface": 1}],
            "routes": [{"dst": "0.0.0.0/0"}], "dns": {"nameservers": null}});
        let r = CniResult::from_value(&old, SpecVersion::V1_1_0).unwrap();
        assert_eq!(r.pod_ips("eth0"), vec!["10.1.2.3".parse::<IpAddr>().unwrap()]);
        let back = r.to_value(SpecVersion::V0_4_0);
        assert_eq!(back["ips"][0]["version"], "4");
        assert_eq!(back["ips"][0]["address"], "10.1.2.3/24");
        assert_eq!(r.to_value(SpecVersion::V1_0_0)["ips"][0].get("version"), None);
    }

    #[test]
    fn new_fields_do_not_reach_old_versions() {
        let r = CniResult {
            interfaces: vec![Interface { name: "eth0".into(), mtu: Some(1400), ..Default::default() }],
            ..Default::default()
        };
        assert_eq!(r.to_value(SpecVersion::V1_1_0)["interfaces"][0]["mtu"], 1400);
        assert_eq!(r.to_value(SpecVersion::V1_0_0)["interfaces"][0].get("mtu"), None);
    }

    #[test]
    fn bad_results_are_refused() {
        let read = |v: Value| CniResult::from_value(&v, SpecVersion::V1_0_0);
        assert!(matches!(read(json!({"cniVersion": "0.2.0", "ip4": {}})), Err(ResultError::Unsupported(_))));
        assert!(matches!(read(json!({"cniVersion": "9"})), Err(ResultError::UnknownVersion(_))));
        assert!(matches!(read(json!({"ips": [{"address": "x"}]})), Err(ResultError::Form(_))));
        assert!(matches!(
            read(json!({"ips": [{"address": "10.0.0.1/32", "interface": 0}]})),
            Err(ResultError::Interface { .. })
        ));
    }
}
