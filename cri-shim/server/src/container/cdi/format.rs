//! A CDI spec file (CDI specification, "CDI JSON Specification") and the names in it. Reads no file itself.

use serde::Deserialize;

/// Versions whose files mean what is written here.
const VERSIONS: [&str; 8] = ["0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0"];

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct File {
    cdi_version: String,
    /// `vendor/class`.
    pub kind: String,
    #[serde(default)]
    #[expect(dead_code, reason = "may be there, for other readers")]
    annotations: Option<serde_json::Value>,
    pub devices: Vec<Device>,
    /// Applied once, whichever of the devices is asked for.
    #[serde(default)]
    pub container_edits: Edits,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Device {
    pub name: String,
    #[serde(default)]
    #[expect(dead_code, reason = "may be there, for other readers")]
    annotations: Option<serde_json::Value>,
    pub container_edits: Edits,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Edits {
    #[serde(default)]
    pub env: Vec<String>,
    #[serde(default)]
    pub device_nodes: Vec<Node>,
    #[serde(default)]
    pub net_devices: Vec<serde_json::Value>,
    #[serde(default)]
    pub hooks: Vec<Hook>,
    #[serde(default)]
    pub mounts: Vec<Mount>,
    pub intel_rdt: Option<IntelRdt>,
    #[serde(default)]
    pub additional_gids: Vec<u32>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Node {
    pub path: String,
    #[serde(default)]
    pub host_path: String,
    #[serde(default)]
    pub r#type: String,
    #[serde(default)]
    pub major: i64,
    #[serde(default)]
    pub minor: i64,
    pub file_mode: Option<u32>,
    #[serde(default)]
    pub permissions: String,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Hook {
    pub hook_name: String,
    pub path: String,
    #[serde(default)]
    pub args: Vec<String>,
    #[serde(default)]
    pub env: Vec<String>,
    /// Seconds.
    pub timeout: Option<i64>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Mount {
    pub host_path: String,
    pub container_path: String,
    #[serde(default)]
    pub options: Vec<String>,
    #[serde(default)]
    pub r#type: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct IntelRdt {
    #[serde(default, rename = "closID")]
    pub clos_id: String,
    #[serde(default)]
    pub l3_cache_schema: String,
    #[serde(default)]
    pub mem_bw_schema: String,
    #[serde(default)]
    pub schemata: Vec<String>,
    #[serde(default, rename = "enableCMT")]
    pub enable_cmt: bool,
    #[serde(default, rename = "enableMBM")]
    pub enable_mbm: bool,
    #[serde(default)]
    pub enable_monitoring: bool,
}

fn name_of(text: &str, what: &str, more: &str, digit_first: bool) -> Result<(), String> {
    let alnum = |c: char| c.is_ascii_alphanumeric();
    let first = |c: char| if digit_first { alnum(c) } else { c.is_ascii_alphabetic() };
    let good = text.starts_with(first)
        && text.ends_with(alnum)
        && text.chars().all(|c| alnum(c) || "_-.".contains(c) || more.contains(c));
    if good { Ok(()) } else { Err(format!("{what} {text:?} is no CDI name")) }
}

/// Checks `vendor/class`.
fn kind(text: &str) -> Result<(), String> {
    let (vendor, class) = text.split_once('/').ok_or_else(|| format!("kind {text:?} is not vendor/class"))?;
    name_of(vendor, "vendor", "", false)?;
    name_of(class, "class", "", false)
}

/// Checks a fully qualified device name, `vendor/class=name`.
pub(super) fn qualified(text: &str) -> Result<(), String> {
    let (of, name) = text.split_once('=').ok_or_else(|| format!("{text:?} is not vendor/class=device"))?;
    kind(of)?;
    name_of(name, "device", ":", true)
}

impl Edits {
    fn check(&self) -> Result<(), String> {
        if let Some(e) = self.env.iter().find(|e| !e.contains('=') || e.starts_with('=') || e.contains('\0'))
        {
            return Err(format!("env {e:?} is no assignment"));
        }
        for n in &self.device_nodes {
            if !n.path.starts_with('/') {
                return Err(format!("device node {:?} is not an absolute path", n.path));
            }
            if !matches!(n.r#type.as_str(), "" | "b" | "c" | "u" | "p") {
                return Err(format!("device node {} has the unknown type {:?}", n.path, n.r#type));
            }
            if n.permissions.chars().any(|c| !"rwm".contains(c)) {
                return Err(format!("device node {} has permissions {:?}", n.path, n.permissions));
            }
        }
        for m in &self.mounts {
            if m.host_path.is_empty() || !m.container_path.starts_with('/') || m.container_path.contains("..")
            {
                return Err(format!("mount of {:?} at {:?} is not possible", m.host_path, m.container_path));
            }
        }
        if let Some(h) = self.hooks.iter().find(|h| !h.path.starts_with('/')) {
            return Err(format!("hook {:?} is not an absolute path", h.path));
        }
        if !self.net_devices.is_empty() {
            return Err("network devices are not supported".to_owned());
        }
        Ok(())
    }
}

impl File {
    /// `json` tells the two forms apart.
    pub fn parse(text: &str, json: bool) -> Result<File, String> {
        let file: File = if json {
            serde_json::from_str(text).map_err(|e| e.to_string())?
        } else {
            serde_saphyr::from_str(text).map_err(|e| e.to_string().replace('\n', " "))?
        };
        let version = file.cdi_version.trim_start_matches('v');
        if !VERSIONS.contains(&version) {
            return Err(format!("cdiVersion {version:?} is not known"));
        }
        kind(&file.kind)?;
        file.container_edits.check()?;
        if file.devices.is_empty() {
            return Err("it has no devices".to_owned());
        }
        for (i, d) in file.devices.iter().enumerate() {
            name_of(&d.name, "device", ":", true)?;
            d.container_edits.check().map_err(|e| format!("device {}: {e}", d.name))?;
            if file.devices[..i].iter().any(|other| other.name == d.name) {
                return Err(format!("device {} is there twice", d.name));
            }
        }
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (name, good) in [
            ("vendor.com/gpu=0", true),
            ("vendor.com/gpu=GPU-1:2.x", true),
            ("v/c_1-a=all", true),
            ("vendor.com/gpu", false),
            ("vendor.com=0", false),
            ("0v/gpu=0", false),
            ("v/gpu=", false),
            ("v/gpu=-a", false),
            ("v/gpu=a/b", false),
            ("v/=a", false),
        ] {
            assert_eq!(qualified(name).is_ok(), good, "{name}");
        }
    }

    #[test]
    fn files() {
        let good = "cdiVersion: \"0.6.0\"\nkind: a.b/c\ndevices:\n- name: d\n  containerEdits:\n    env: [A=b]\n    deviceNodes:\n    - path: /dev/x\n";
        let file = File::parse(good, false).unwrap();
        assert_eq!((file.kind.as_str(), file.devices[0].container_edits.env.len()), ("a.b/c", 1));
        for (from, to) in [
            ("0.6.0", "9.0.0"),
            ("a.b/c", "a.b"),
            ("A=b", "Ab"),
            ("path: /dev/x", "path: dev/x"),
            ("path: /dev/x", "path: /dev/x\n      surprise: 1"),
            ("name: d", "name: d/e"),
        ] {
            assert!(File::parse(&good.replace(from, to), false).is_err(), "{to}");
        }
        assert!(File::parse(r#"{"cdiVersion":"1.0.0","kind":"a/b","devices":[]}"#, true).is_err());
    }
}
