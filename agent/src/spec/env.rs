//! A container's environment: services, envFrom, env, and `$(NAME)` references.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Container, EnvVar, Pod, Secret, Service};

use super::SpecError;
use super::field::{self, NodeFacts};

/// The objects that a container's environment refers to, fetched beforehand; `None` for one that does not exist.
#[derive(Clone, Default)]
pub struct Lookups {
    pub config_maps: HashMap<String, Option<Arc<ConfigMap>>>,
    pub secrets: HashMap<String, Option<Arc<Secret>>>,
    pub services: Vec<Arc<Service>>,
}

/// Names of the ConfigMaps and Secrets that a container's environment refers to.
pub fn references(c: &Container) -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut maps, mut secrets) = (BTreeSet::new(), BTreeSet::new());
    for from in c.env_from.iter().flatten() {
        maps.extend(from.config_map_ref.iter().map(|r| r.name.clone()));
        secrets.extend(from.secret_ref.iter().map(|r| r.name.clone()));
    }
    for source in c.env.iter().flatten().filter_map(|e| e.value_from.as_ref()) {
        maps.extend(source.config_map_key_ref.iter().map(|r| r.name.clone()));
        secrets.extend(source.secret_key_ref.iter().map(|r| r.name.clone()));
    }
    (maps, secrets)
}

/// Replaces `$(NAME)` by values; unknown names stay, `$$` is a plain `$`.
pub fn expand(text: &str, values: &HashMap<String, String>) -> String {
    if !text.contains('$') {
        return text.to_owned();
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(tail) = rest.strip_prefix('$') {
            out.push('$');
            rest = tail;
        } else if let Some((name, tail)) = rest.strip_prefix('(').and_then(|r| r.split_once(')')) {
            match values.get(name) {
                Some(v) => out.push_str(v),
                None => {
                    out.push_str("$(");
                    out.push_str(name);
                    out.push(')');
                }
            }
            rest = tail;
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    out
}

struct Env {
    values: HashMap<String, String>,
    order: Vec<String>,
}

impl Env {
    fn set(&mut self, name: &str, value: String) {
        if self.values.insert(name.to_owned(), value).is_none() {
            self.order.push(name.to_owned());
        }
    }
}

fn env_name(service: &str) -> String {
    service.replace('-', "_").to_uppercase()
}

fn has_ip(s: &Service) -> Option<&str> {
    let ip = s.spec.as_ref()?.cluster_ip.as_deref()?;
    (!ip.is_empty() && ip != "None").then_some(ip)
}

fn host_port(ip: &str, port: i32) -> String {
    if ip.contains(':') { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") }
}

/// `{NAME}_SERVICE_HOST` and the like of one Service.
fn service_variables(s: &Service) -> Vec<(String, String)> {
    let (Some(ip), Some(spec)) = (has_ip(s), &s.spec) else { return Vec::new() };
    let prefix = env_name(s.metadata.name.as_deref().unwrap_or_default());
    let ports: Vec<_> = spec.ports.iter().flatten().collect();
    let Some(first) = ports.first() else { return Vec::new() };
    let mut out = vec![
        (format!("{prefix}_SERVICE_HOST"), ip.to_owned()),
        (format!("{prefix}_SERVICE_PORT"), first.port.to_string()),
    ];
    for p in &ports {
        if let Some(name) = p.name.as_deref().filter(|n| !n.is_empty()) {
            out.push((format!("{prefix}_SERVICE_PORT_{}", env_name(name)), p.port.to_string()));
        }
    }
    for (i, p) in ports.iter().enumerate() {
        let protocol = p.protocol.as_deref().unwrap_or("TCP");
        let address = format!("{}://{}", protocol.to_lowercase(), host_port(ip, p.port));
        if i == 0 {
            out.push((format!("{prefix}_PORT"), address.clone()));
        }
        let port = format!("{prefix}_PORT_{}_{}", p.port, protocol.to_uppercase());
        out.push((port.clone(), address));
        out.push((format!("{port}_PROTO"), protocol.to_lowercase()));
        out.push((format!("{port}_PORT"), p.port.to_string()));
        out.push((format!("{port}_ADDR"), ip.to_owned()));
    }
    out
}

/// Variables of the pod's namespace's Services (with service links) and of `default/kubernetes`.
pub fn from_services(services: &[Arc<Service>], namespace: &str, links: bool) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    let of = |s: &Service| (s.metadata.namespace.clone().unwrap_or_default(), s.metadata.name.clone());
    for s in services {
        if of(s) == ("default".into(), Some("kubernetes".into())) {
            out.extend(service_variables(s));
        }
    }
    if links {
        for s in services.iter().filter(|s| s.metadata.namespace.as_deref() == Some(namespace)) {
            out.extend(service_variables(s));
        }
    }
    out
}

fn lookup<'a, T>(
    all: &'a HashMap<String, Option<Arc<T>>>,
    kind: &'static str,
    name: &str,
    optional: bool,
) -> Result<Option<&'a T>, SpecError> {
    match all.get(name).and_then(Option::as_deref) {
        Some(o) => Ok(Some(o)),
        None if optional => Ok(None),
        None => Err(SpecError::NotFound { kind, name: name.to_owned() }),
    }
}

/// Environment variable names may be nearly anything printable (KEP-4369).
fn usable(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| (' '..='~').contains(&c) && c != '=')
}

fn value_from(
    pod: &Pod,
    c: &Container,
    e: &EnvVar,
    lookups: &Lookups,
    facts: &NodeFacts,
) -> Result<Option<String>, SpecError> {
    let namespace = pod.metadata.namespace.clone().unwrap_or_default();
    let Some(source) = &e.value_from else { return Ok(Some(String::new())) };
    if let Some(f) = &source.field_ref {
        return field::field(pod, &f.field_path, facts).map(Some);
    }
    if let Some(r) = &source.resource_field_ref {
        let other = r.container_name.as_deref().filter(|n| !n.is_empty() && *n != c.name);
        return match other {
            None => field::resource(c, r, facts).map(Some),
            Some(n) => {
                let (c, _) = crate::pods::find_container(pod, n)
                    .ok_or_else(|| SpecError::UnknownResource(r.resource.clone(), n.to_owned()))?;
                field::resource(&c, r, facts).map(Some)
            }
        };
    }
    let no_key = |kind, name: &str, key: &str| SpecError::NoKey {
        kind,
        namespace: namespace.clone(),
        name: name.to_owned(),
        key: key.to_owned(),
    };
    if let Some(r) = &source.config_map_key_ref {
        let optional = r.optional == Some(true);
        let Some(map) = lookup(&lookups.config_maps, "configmap", &r.name, optional)? else {
            return Ok(None);
        };
        return match map.data.as_ref().and_then(|d| d.get(&r.key)) {
            Some(v) => Ok(Some(v.clone())),
            None if optional => Ok(None),
            None => Err(no_key("ConfigMap", &r.name, &r.key)),
        };
    }
    if let Some(r) = &source.secret_key_ref {
        let optional = r.optional == Some(true);
        let Some(secret) = lookup(&lookups.secrets, "secret", &r.name, optional)? else { return Ok(None) };
        return match secret.data.as_ref().and_then(|d| d.get(&r.key)) {
            Some(v) => Ok(Some(String::from_utf8_lossy(&v.0).into_owned())),
            None if optional => Ok(None),
            None => Err(no_key("Secret", &r.name, &r.key)),
        };
    }
    Ok(Some(String::new()))
}

/// Names and values.
pub type Variables = Vec<(String, String)>;

/// The environment in order of first mention. The second value lists keys of `envFrom` that cannot be names.
pub fn build(
    pod: &Pod,
    c: &Container,
    lookups: &Lookups,
    facts: &NodeFacts,
) -> Result<(Variables, Vec<String>), SpecError> {
    let mut env = Env { values: HashMap::new(), order: Vec::new() };
    let mut skipped = Vec::new();
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let links = pod.spec.as_ref().and_then(|s| s.enable_service_links).unwrap_or(true);
    let mut services = from_services(&lookups.services, namespace, links);
    for from in c.env_from.iter().flatten() {
        let prefix = from.prefix.as_deref().unwrap_or_default();
        let mut put = |key: &String, value: String| {
            let name = format!("{prefix}{key}");
            if usable(&name) { env.set(&name, value) } else { skipped.push(key.clone()) }
        };
        if let Some(r) = &from.config_map_ref {
            let map = lookup(&lookups.config_maps, "configmap", &r.name, r.optional == Some(true))?;
            map.and_then(|m| m.data.as_ref()).into_iter().flatten().for_each(|(k, v)| put(k, v.clone()));
        }
        if let Some(r) = &from.secret_ref {
            let secret = lookup(&lookups.secrets, "secret", &r.name, r.optional == Some(true))?;
            let data = secret.and_then(|s| s.data.as_ref());
            data.into_iter().flatten().for_each(|(k, v)| put(k, String::from_utf8_lossy(&v.0).into_owned()));
        }
    }
    // References may name Services' variables, but those do not override what the user sets.
    let mut known: HashMap<String, String> = services.clone().into_iter().collect();
    known.extend(env.values.clone());
    for e in c.env.iter().flatten() {
        let value = match &e.value {
            Some(v) if !v.is_empty() => Some(expand(v, &known)),
            _ => value_from(pod, c, e, lookups, facts)?,
        };
        if let Some(v) = value {
            known.insert(e.name.clone(), v.clone());
            services.remove(&e.name);
            env.set(&e.name, v);
        }
    }
    for (name, value) in services {
        if !env.values.contains_key(&name) {
            env.set(&name, value);
        }
    }
    let Env { mut values, order } = env;
    let list = order.into_iter().filter_map(|n| values.remove(&n).map(|v| (n, v))).collect();
    Ok((list, skipped))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn vars(list: &[(&str, &str)]) -> HashMap<String, String> {
        list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn expansion() {
        let v = vars(&[("A", "1"), ("B", "two")]);
        for (text, wanted) in [
            ("$(A)-$(B)", "1-two"),
            ("$$(A)", "$(A)"),
            ("$(C)", "$(C)"),
            ("$A $", "$A $"),
            ("$(A", "$(A"),
            ("$$$(A)", "$1"),
            ("plain", "plain"),
        ] {
            assert_eq!(expand(text, &v), wanted, "{text}");
        }
    }

    #[test]
    fn sources_order_and_overrides() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "n"},
            "spec": {"containers": [{"name": "c",
                "envFrom": [{"configMapRef": {"name": "m"}, "prefix": "X_"}, {"secretRef": {"name": "gone", "optional": true}}],
                "env": [
                    {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                    {"name": "URL", "value": "http://$(WEB_SERVICE_HOST)/$(NAME)/$(X_a)"},
                    {"name": "X_a", "value": "over"},
                    {"name": "OPT", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "none", "optional": true}}},
                    {"name": "WEB_SERVICE_PORT", "value": "mine"}]}]}
        })).unwrap();
        let map: ConfigMap = serde_json::from_value(json!({"data": {"a": "1", "b=c": "2"}})).unwrap();
        let web: Service = serde_json::from_value(json!({"metadata": {"name": "web", "namespace": "n"},
            "spec": {"clusterIP": "10.96.1.1", "ports": [{"port": 80, "name": "http"}]}}))
        .unwrap();
        let lookups = Lookups {
            config_maps: HashMap::from([("m".to_owned(), Some(Arc::new(map)))]),
            secrets: HashMap::from([("gone".to_owned(), None)]),
            services: vec![Arc::new(web)],
        };
        let c = &pod.spec.as_ref().unwrap().containers[0];
        let (list, skipped) = build(&pod, c, &lookups, &NodeFacts::default()).unwrap();
        let all: HashMap<_, _> = list.into_iter().collect();
        assert_eq!(skipped, ["b=c"]);
        assert_eq!(all["URL"], "http://10.96.1.1/p/1");
        assert_eq!(all["X_a"], "over");
        assert_eq!(all["WEB_SERVICE_PORT"], "mine");
        assert_eq!(all["WEB_SERVICE_PORT_HTTP"], "80");
        assert_eq!(all["WEB_PORT_80_TCP"], "tcp://10.96.1.1:80");
        assert!(!all.contains_key("OPT"));
    }

    #[test]
    fn a_missing_key_is_an_error_that_names_it() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "n"},
            "spec": {"containers": [{"name": "c", "env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}]}
        })).unwrap();
        let c = &pod.spec.as_ref().unwrap().containers[0];
        let mut lookups = Lookups::default();
        let e = build(&pod, c, &lookups, &NodeFacts::default()).unwrap_err();
        assert_eq!(e.to_string(), "secret \"s\" not found");
        lookups.secrets.insert("s".into(), Some(Arc::default()));
        let e = build(&pod, c, &lookups, &NodeFacts::default()).unwrap_err();
        assert_eq!(e.to_string(), "couldn't find key k in Secret n/s");
    }
}
