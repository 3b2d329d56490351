//! Reading a KubeletConfiguration file: what is wrong is refused with the field's name, what has no effect is named.

use std::path::Path;

use serde_json::{Map, Value};

use crate::config::KubeletConfiguration;
use crate::error::Error;

impl KubeletConfiguration {
    /// Reads a KubeletConfiguration file, YAML or JSON. Fields that it lacks are taken from `otherwise`, then from upstream's defaults.
    pub fn read_over(path: &Path, otherwise: &Map<String, Value>) -> Result<KubeletConfiguration, Error> {
        let bad = |message: String| Error::ConfigFile { path: path.to_owned(), message };
        let text = std::fs::read_to_string(path).map_err(|source| Error::io("read", path, source))?;
        let file: Value = serde_saphyr::from_str(&text).map_err(|e| bad(one_line(&e.to_string())))?;
        let Value::Object(mut file) = file else { return Err(bad("it holds no fields".into())) };
        let wanted = [("apiVersion", "kubelet.config.k8s.io/v1beta1"), ("kind", "KubeletConfiguration")];
        for (field, value) in wanted {
            match file.remove(field) {
                Some(v) if v != value => return Err(bad(format!("{field} is {v}; it must be {value}"))),
                _ => {}
            }
        }
        let mut all = otherwise.clone();
        all.extend(file);
        from_fields(all).map_err(bad)
    }

    /// From fields alone.
    pub fn from_values(values: Map<String, Value>) -> Result<KubeletConfiguration, Error> {
        from_fields(values).map_err(|message| Error::ConfigFile { path: "the command line".into(), message })
    }

    /// Fields that were given a value and change nothing here: misspelt ones, and upstream's that are not supported.
    pub fn without_effect(&self) -> Vec<String> {
        let mut found = Vec::new();
        let nested = [
            ("", &self.other),
            ("authentication.", &self.authentication.other),
            ("authentication.x509.", &self.authentication.x509.other),
            ("authentication.webhook.", &self.authentication.webhook.other),
            ("authentication.anonymous.", &self.authentication.anonymous.other),
            ("authorization.", &self.authorization.other),
            ("crashLoopBackOff.", &self.crash_loop_back_off.other),
            ("userNamespaces.", &self.user_namespaces.other),
        ];
        for (prefix, fields) in nested {
            for (name, value) in fields.iter().filter(|(_, v)| is_set(v)) {
                found.push(match value {
                    // Kubeadm's files have whole sections; what is set in them is what matters.
                    Value::Object(_) => format!("{prefix}{name}.*"),
                    _ => format!("{prefix}{name}"),
                });
            }
        }
        for e in self.enforce_node_allocatable.iter().filter(|e| *e != "pods" && *e != "none") {
            found.push(format!("enforceNodeAllocatable: {e}"));
        }
        found
    }

    fn check(&self) -> Result<(), String> {
        let one_of = |field: &str, value: &str, allowed: &[&str]| {
            let known = allowed.contains(&value);
            known.then_some(()).ok_or_else(|| format!("{field} is {value:?}; it must be one of {allowed:?}"))
        };
        one_of("cgroupDriver", &self.cgroup_driver, &["cgroupfs", "systemd"])?;
        one_of("authorization.mode", &self.authorization.mode, &["AlwaysAllow", "Webhook"])?;
        let (low, high) = (self.image_gc_low_threshold_percent, self.image_gc_high_threshold_percent);
        if high > 100 || low >= high {
            return Err(format!(
                "imageGCHighThresholdPercent is {high}; it must be at most 100 and above imageGCLowThresholdPercent ({low})"
            ));
        }
        let (least, most) = (self.image_minimum_gc_age, self.image_maximum_gc_age);
        if !most.is_zero() && most <= least {
            return Err(format!(
                "imageMaximumGCAge is {most:?}; it must be 0s or above imageMinimumGCAge ({least:?})"
            ));
        }
        let kinds = [
            "pods",
            "none",
            "system-reserved",
            "kube-reserved",
            "system-reserved-compressible",
            "kube-reserved-compressible",
        ];
        for e in &self.enforce_node_allocatable {
            one_of("enforceNodeAllocatable", e, &kinds)?;
        }
        let ids = self.user_namespaces.ids_per_pod();
        if ids == 0 || !ids.is_multiple_of(crate::userns::UNIT) {
            return Err(format!(
                "userNamespaces.idsPerPod is {ids}; it must be a multiple of {}",
                crate::userns::UNIT
            ));
        }
        if self.container_log_max_files < 2 {
            return Err("containerLogMaxFiles must be at least 2".into());
        }
        if self.node_lease_duration_seconds <= 0 {
            return Err("nodeLeaseDurationSeconds must be above 0".into());
        }
        if self.node_status_update_frequency.is_zero() || self.file_check_frequency.is_zero() {
            return Err("nodeStatusUpdateFrequency and fileCheckFrequency must be above 0".into());
        }
        let quantity = |field: String, text: &str| match text.parse::<orlop_api::quantity::Amount>() {
            Ok(_) => Ok(()),
            Err(e) => Err(format!("{field}: {e}")),
        };
        quantity("containerLogMaxSize".into(), &self.container_log_max_size)?;
        for (name, text) in &self.system_reserved {
            quantity(format!("systemReserved.{name}"), text)?;
        }
        for (name, text) in &self.kube_reserved {
            quantity(format!("kubeReserved.{name}"), text)?;
        }
        for (name, text) in &self.eviction_hard {
            let field = format!("evictionHard.{name}");
            match text.strip_suffix('%') {
                Some(n) if n.parse::<f64>().is_ok_and(|n| (0.0..=100.0).contains(&n)) => {}
                Some(_) => {
                    return Err(format!("{field} is {text:?}; it must be a percentage from 0% to 100%"));
                }
                None => quantity(field, text)?,
            }
        }
        Ok(())
    }
}

fn from_fields(fields: Map<String, Value>) -> Result<KubeletConfiguration, String> {
    let whole: Result<KubeletConfiguration, _> = serde_json::from_value(fields.clone().into());
    let config = whole.map_err(|e| {
        // The message alone does not tell where: the field that cannot be read alone is the culprit.
        let alone = fields.into_iter().find_map(|(name, value)| {
            let one = Map::from_iter([(name.clone(), value)]);
            Some((name, serde_json::from_value::<KubeletConfiguration>(one.into()).err()?))
        });
        alone.map_or_else(|| e.to_string(), |(name, e)| format!("{name}: {e}"))
    })?;
    config.check()?;
    Ok(config)
}

/// Whether a value says anything: upstream writes every field, most of them empty.
fn is_set(v: &Value) -> bool {
    match v {
        Value::Null => false,
        Value::Bool(b) => *b,
        Value::Number(n) => n.as_f64() != Some(0.0),
        Value::String(s) => !matches!(s.as_str(), "" | "0s"),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => fields.values().any(is_set),
    }
}

/// A parser's message without the excerpt that it draws below.
pub(crate) fn one_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<KubeletConfiguration, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        KubeletConfiguration::read_over(file.path(), &Map::new()).map_err(|e| e.to_string())
    }

    #[test]
    fn a_file_goes_before_the_command_line() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "maxPods: 7\nclusterDomain: file.local\n").unwrap();
        let flags = serde_json::json!({"clusterDomain": "flag.local", "cgroupRoot": "/flag"});
        let k = KubeletConfiguration::read_over(file.path(), flags.as_object().unwrap()).unwrap();
        assert_eq!((k.max_pods, &*k.cluster_domain, &*k.cgroup_root), (7, "file.local", "/flag"));
    }

    #[test]
    fn what_is_wrong_is_refused_by_name() {
        for (text, says) in [
            ("[]", "holds no fields"),
            ("a: [", "line 1"),
            ("kind: Pod", "kind is \"Pod\"; it must be KubeletConfiguration"),
            ("apiVersion: v1", "apiVersion is"),
            ("maxPods: many", "maxPods: invalid type"),
            ("imageMinimumGCAge: 5", "imageMinimumGCAge: "),
            (
                "imageMaximumGCAge: 2m",
                "imageMaximumGCAge is 120s; it must be 0s or above imageMinimumGCAge (120s)",
            ),
            ("imageMinimumGCAge: 5 days", "imageMinimumGCAge: \"5 days\" is no duration"),
            ("clusterDNS: [nowhere]", "clusterDNS: "),
            ("authorization: {mode: Sometimes}", "authorization.mode is \"Sometimes\""),
            ("imageGCHighThresholdPercent: 70", "imageGCHighThresholdPercent is 70"),
            ("containerLogMaxSize: big", "containerLogMaxSize: \"big\" is no quantity"),
            ("evictionHard: {memory.available: 120%}", "evictionHard.memory.available"),
            ("cgroupDriver: none", "cgroupDriver is \"none\""),
            ("userNamespaces: {idsPerPod: 1000}", "userNamespaces.idsPerPod is 1000"),
        ] {
            let said = read(text).err().unwrap_or_else(|| panic!("{text} was taken"));
            assert!(said.contains(says) && !said.contains('\n'), "{text}: {said}");
        }
    }

    #[test]
    fn what_has_no_effect_is_named() {
        let k = read(
            "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nmaxPod: 3\nsyncFrequency: 0s\n\
             memorySwap: {}\nlogging: {verbosity: 0, options: {json: {infoBufferSize: '0'}}}\nrotateCertificates: true\n\
             authentication: {webhook: {enabled: true, cacheTTL: 2m}, x509: {}}\n",
        );
        let named = k.unwrap().without_effect();
        assert_eq!(named, ["logging.*", "maxPod", "rotateCertificates", "authentication.webhook.cacheTTL"]);
    }
}
