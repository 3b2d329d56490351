use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::version::{SpecVersion, UnknownVersion};

/// What is wrong with a network configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfError {
    #[error("it is not valid JSON: {0}")]
    Json(#[source] serde_json::Error),
    #[error("it is not a JSON object")]
    NotAnObject,
    #[error("field {field} is missing")]
    Missing { field: &'static str },
    #[error("field {field} is not {wanted}")]
    Type { field: &'static str, wanted: &'static str },
    #[error(
        "network name {0:?} is not allowed; begin with a letter or digit and use only letters, digits, '_', '.', '-'"
    )]
    Name(String),
    #[error("plugins is empty")]
    NoPlugins,
    #[error("plugins[{index}]: {source}")]
    Plugin { index: usize, source: Box<ConfError> },
    #[error("plugin type {0:?} is not a file name")]
    PluginType(String),
    #[error(transparent)]
    Version(#[from] UnknownVersion),
    #[error("cniVersion {0} is too old; use 0.3.0 to 1.1.0")]
    Unsupported(SpecVersion),
}

/// A network: its plugins in the order of ADD.
#[derive(Clone, Debug, PartialEq)]
pub struct NetworkConfig {
    pub name: String,
    pub version: SpecVersion,
    pub disable_check: bool,
    pub disable_gc: bool,
    /// When false, plugins may lie as single files in a folder named as the network (1.1.0).
    pub load_only_inlined_plugins: bool,
    pub plugins: Vec<PluginConfig>,
}

/// One plugin of a network as it was written.
#[derive(Clone, Debug, PartialEq)]
pub struct PluginConfig {
    pub plugin_type: String,
    /// Capabilities that the configuration turns on.
    pub capabilities: BTreeSet<String>,
    pub raw: Map<String, Value>,
}

fn object(bytes: &[u8]) -> Result<Map<String, Value>, ConfError> {
    match serde_json::from_slice(bytes).map_err(ConfError::Json)? {
        Value::Object(map) => Ok(map),
        _ => Err(ConfError::NotAnObject),
    }
}

fn text<'a>(map: &'a Map<String, Value>, field: &'static str) -> Result<Option<&'a str>, ConfError> {
    match map.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(s)) => Ok(Some(s)),
        Some(_) => Err(ConfError::Type { field, wanted: "a string" }),
    }
}

// Upstream reads "true" in quotes as well.
fn flag(map: &Map<String, Value>, field: &'static str) -> Result<bool, ConfError> {
    match map.get(field) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(b)) => Ok(*b),
        Some(Value::String(s)) if s.eq_ignore_ascii_case("true") => Ok(true),
        Some(Value::String(s)) if s.eq_ignore_ascii_case("false") => Ok(false),
        Some(_) => Err(ConfError::Type { field, wanted: "true or false" }),
    }
}

fn valid_name(name: &str) -> bool {
    name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

fn version(map: &Map<String, Value>) -> Result<SpecVersion, ConfError> {
    let mut versions = Vec::new();
    if let Some(list) = map.get("cniVersions").filter(|v| !v.is_null()) {
        let wrong = ConfError::Type { field: "cniVersions", wanted: "a list of strings" };
        let Some(list) = list.as_array() else { return Err(wrong) };
        for v in list {
            let Some(v) = v.as_str() else { return Err(wrong) };
            // A list exists so that an older runtime picks what it knows; unknown ones are for newer runtimes.
            versions.extend(SpecVersion::parse(v).ok());
        }
    }
    match text(map, "cniVersion")? {
        Some(v) => match SpecVersion::parse(v) {
            Ok(v) => versions.push(v),
            Err(e) if versions.is_empty() => return Err(e.into()),
            Err(_) => {}
        },
        None if versions.is_empty() => return Err(ConfError::Missing { field: "cniVersion" }),
        None => {}
    }
    let best = versions.into_iter().max().unwrap_or(SpecVersion::V0_1_0);
    if best.is_supported() { Ok(best) } else { Err(ConfError::Unsupported(best)) }
}

impl PluginConfig {
    fn from_map(raw: Map<String, Value>) -> Result<PluginConfig, ConfError> {
        let plugin_type =
            text(&raw, "type")?.filter(|t| !t.is_empty()).ok_or(ConfError::Missing { field: "type" })?;
        if plugin_type.contains('/') || plugin_type == "." || plugin_type == ".." {
            return Err(ConfError::PluginType(plugin_type.to_owned()));
        }
        let capabilities = match raw.get("capabilities") {
            None | Some(Value::Null) => BTreeSet::new(),
            Some(Value::Object(c)) => {
                c.iter().filter(|(_, v)| v.as_bool() == Some(true)).map(|(k, _)| k.clone()).collect()
            }
            Some(_) => {
                return Err(ConfError::Type { field: "capabilities", wanted: "an object of booleans" });
            }
        };
        Ok(PluginConfig { plugin_type: plugin_type.to_owned(), capabilities, raw })
    }

    /// Reads a file that holds one plugin.
    pub fn parse(bytes: &[u8]) -> Result<PluginConfig, ConfError> {
        Self::from_map(object(bytes)?)
    }

    /// What the plugin gets on standard input (specification, "Deriving request configuration from plugin configuration"):
    /// name and version of the network, those of `runtime` that the plugin declares, and the result so far.
    pub fn request(
        &self,
        network: &NetworkConfig,
        runtime: &Map<String, Value>,
        previous: Option<&Value>,
    ) -> Map<String, Value> {
        let mut request = self.raw.clone();
        request.remove("capabilities");
        request.remove("prevResult");
        request.insert("name".into(), network.name.clone().into());
        request.insert("cniVersion".into(), network.version.as_str().into());
        let wanted: Map<_, _> = runtime
            .iter()
            .filter(|(k, _)| self.capabilities.contains(k.as_str()))
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        if !wanted.is_empty() {
            request.insert("runtimeConfig".into(), Value::Object(wanted));
        }
        if let Some(previous) = previous {
            request.insert("prevResult".into(), previous.clone());
        }
        request
    }
}

impl NetworkConfig {
    /// Reads a `.conflist`: a network with its list of plugins. `plugins` may be empty only when the file lets plugins
    /// be loaded from a folder; see [`NetworkConfig::check_plugins`].
    pub fn parse_list(bytes: &[u8]) -> Result<NetworkConfig, ConfError> {
        let map = object(bytes)?;
        let mut network = Self::head(&map)?;
        let listed = match map.get("plugins") {
            None | Some(Value::Null) => &Vec::new(),
            Some(Value::Array(list)) => list,
            Some(_) => return Err(ConfError::Type { field: "plugins", wanted: "a list" }),
        };
        for (index, plugin) in listed.iter().enumerate() {
            let parsed = match plugin {
                Value::Object(raw) => PluginConfig::from_map(raw.clone()),
                _ => Err(ConfError::NotAnObject),
            };
            network.plugins.push(parsed.map_err(|e| ConfError::Plugin { index, source: Box::new(e) })?);
        }
        Ok(network)
    }

    /// Reads a `.conf` or `.json`: one plugin that is a network by itself.
    pub fn parse_single(bytes: &[u8]) -> Result<NetworkConfig, ConfError> {
        let map = object(bytes)?;
        if map.contains_key("plugins") {
            return Self::parse_list(bytes);
        }
        let mut network = Self::head(&map)?;
        network.load_only_inlined_plugins = true;
        network.plugins.push(PluginConfig::from_map(map)?);
        Ok(network)
    }

    fn head(map: &Map<String, Value>) -> Result<NetworkConfig, ConfError> {
        let name =
            text(map, "name")?.filter(|n| !n.is_empty()).ok_or(ConfError::Missing { field: "name" })?;
        if !valid_name(name) {
            return Err(ConfError::Name(name.to_owned()));
        }
        Ok(NetworkConfig {
            name: name.to_owned(),
            version: version(map)?,
            disable_check: flag(map, "disableCheck")?,
            disable_gc: flag(map, "disableGC")?,
            load_only_inlined_plugins: flag(map, "loadOnlyInlinedPlugins")?,
            plugins: Vec::new(),
        })
    }

    /// Fails when the network, complete, has no plugin.
    pub fn check_plugins(&self) -> Result<(), ConfError> {
        if self.plugins.is_empty() { Err(ConfError::NoPlugins) } else { Ok(()) }
    }

    /// A `.conflist` that [`NetworkConfig::parse_list`] reads back to the same network, for the result cache.
    pub fn to_value(&self) -> Value {
        json!({
            "name": self.name,
            "cniVersion": self.version.as_str(),
            "disableCheck": self.disable_check,
            "disableGC": self.disable_gc,
            "loadOnlyInlinedPlugins": self.load_only_inlined_plugins,
            "plugins": self.plugins.iter().map(|p| Value::Object(p.raw.clone())).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> Result<NetworkConfig, ConfError> {
        NetworkConfig::parse_list(text.as_bytes())
    }

    #[test]
    fn bad_configurations_say_what_is_wrong() {
        for (text, part) in [
            ("{", "not valid JSON"),
            ("[]", "not a JSON object"),
            (r#"{"cniVersion":"1.0.0"}"#, "field name is missing"),
            (r#"{"name":"a"}"#, "field cniVersion is missing"),
            (r#"{"name":"../a","cniVersion":"1.0.0"}"#, "network name"),
            (r#"{"name":"a","cniVersion":"7.0.0"}"#, "not known"),
            (r#"{"name":"a","cniVersion":"0.2.0"}"#, "too old"),
            (r#"{"name":"a","cniVersion":"1.0.0","plugins":{}}"#, "plugins is not a list"),
            (r#"{"name":"a","cniVersion":"1.0.0","plugins":[{}]}"#, "plugins[0]: field type is missing"),
            (r#"{"name":"a","cniVersion":"1.0.0","plugins":[{"type":"../x"}]}"#, "not a file name"),
            (r#"{"name":"a","cniVersion":"1.0.0","disableCheck":3}"#, "disableCheck is not true or false"),
        ] {
            let e = list(text).unwrap_err().to_string();
            assert!(e.contains(part), "{text}: {e}");
        }
        assert!(list(r#"{"name":"a","cniVersion":"1.0.0"}"#).unwrap().check_plugins().is_err());
    }

    #[test]
    fn the_highest_common_version_is_taken() {
        let n = list(
            r#"{"name":"a","cniVersion":"1.0.0","cniVersions":["1.0.0","1.1.0","2.0.0"],"plugins":[{"type":"x"}]}"#,
        );
        assert_eq!(n.unwrap().version, SpecVersion::V1_1_0);
    }

    #[test]
    fn only_declared_capabilities_reach_the_plugin() {
        let n = list(
            r#"{"name":"a","cniVersion":"1.0.0","plugins":[
               {"type":"x","capabilities":{"portMappings":true,"mac":false},"k":1}]}"#,
        )
        .unwrap();
        let runtime = json!({"portMappings": [], "mac": "m", "dns": {}});
        let r = n.plugins[0].request(&n, runtime.as_object().unwrap(), Some(&json!({"ips": []})));
        assert_eq!(
            Value::Object(r),
            json!({"name":"a","cniVersion":"1.0.0","type":"x","k":1,"runtimeConfig":{"portMappings":[]},"prevResult":{"ips":[]}})
        );
        assert_eq!(list(&n.to_value().to_string()).unwrap(), n);
    }
}
