//! A pod's sandbox as CRI has it: names, DNS, ports, namespaces.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::core::v1::{Pod, PodSpec};
use orlop_proto::cri::{
    DnsConfig, LinuxPodSandboxConfig, PodSandboxConfig, PodSandboxMetadata, PortMapping, Protocol,
    UserNamespace,
};

use super::security;
use crate::config::Config;
use crate::runtime::labels;

/// The node's own resolver settings.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostDns {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

impl HostDns {
    /// Reads the resolv.conf(5) format; the last `search` line counts.
    pub fn parse(text: &str) -> HostDns {
        let mut dns = HostDns::default();
        for line in text.lines() {
            let mut words = line.split_whitespace().map(str::to_owned);
            match words.next().as_deref() {
                Some("nameserver") => dns.servers.extend(words.next()),
                Some("search") => dns.searches = words.collect(),
                Some("options") => dns.options = words.collect(),
                _ => {}
            }
        }
        dns
    }
}

/// At most this many nameservers and search domains go into a resolv.conf.
const MAX_SERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;

fn unique(list: &mut Vec<String>, limit: usize) {
    let mut seen = std::collections::HashSet::new();
    list.retain(|s| seen.insert(s.clone()));
    list.truncate(limit);
}

/// The pod's resolver settings by its dnsPolicy and dnsConfig.
pub fn dns(pod: &Pod, config: &Config, host: &HostDns) -> DnsConfig {
    let empty = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&empty);
    let host_network = spec.host_network == Some(true);
    let k = &config.kubelet;
    let cluster = || {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let domain = &k.cluster_domain;
        let mut searches = vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.clone()];
        searches.extend(host.searches.clone());
        DnsConfig {
            servers: k.cluster_dns.iter().map(ToString::to_string).collect(),
            searches,
            options: vec!["ndots:5".into()],
        }
    };
    let node = || DnsConfig {
        servers: host.servers.clone(),
        searches: host.searches.clone(),
        options: host.options.clone(),
    };
    let mut dns = match spec.dns_policy.as_deref().unwrap_or("ClusterFirst") {
        "None" => DnsConfig::default(),
        "ClusterFirstWithHostNet" if !k.cluster_dns.is_empty() => cluster(),
        "ClusterFirst" if !host_network && !k.cluster_dns.is_empty() => cluster(),
        _ => node(),
    };
    if let Some(c) = &spec.dns_config {
        dns.servers.extend(c.nameservers.iter().flatten().cloned());
        dns.searches.extend(c.searches.iter().flatten().cloned());
        let own: Vec<(String, Option<String>)> =
            c.options.iter().flatten().filter_map(|o| Some((o.name.clone()?, o.value.clone()))).collect();
        dns.options.retain(|o| {
            let name = o.split(':').next().unwrap_or_default();
            !own.iter().any(|(n, _)| n == name)
        });
        dns.options.extend(own.into_iter().map(|(n, v)| match v {
            Some(v) => format!("{n}:{v}"),
            None => n,
        }));
    }
    unique(&mut dns.servers, MAX_SERVERS);
    unique(&mut dns.searches, MAX_SEARCHES);
    dns
}

/// The longest host name the kernel takes, without its terminating zero.
const MAX_HOSTNAME: usize = 63;

/// Host name and domain (empty without a subdomain) of a pod.
pub fn host_and_domain(pod: &Pod, cluster_domain: &str) -> (String, String) {
    let spec = pod.spec.as_ref();
    let cut = |name: &str| {
        let short: String = name.chars().take(MAX_HOSTNAME).collect();
        short.trim_end_matches(['-', '.']).to_owned()
    };
    if let Some(name) = spec.and_then(|s| s.hostname_override.as_deref()) {
        return (cut(name), String::new());
    }
    let hostname = spec.and_then(|s| s.hostname.as_deref()).filter(|h| !h.is_empty());
    let name = cut(hostname.or(pod.metadata.name.as_deref()).unwrap_or_default());
    let domain = match spec.and_then(|s| s.subdomain.as_deref()).filter(|s| !s.is_empty()) {
        Some(sub) => {
            format!("{sub}.{}.svc.{cluster_domain}", pod.metadata.namespace.as_deref().unwrap_or_default())
        }
        None => String::new(),
    };
    (name, domain)
}

fn protocol(name: Option<&str>) -> i32 {
    match name {
        Some("UDP") => Protocol::Udp as i32,
        Some("SCTP") => Protocol::Sctp as i32,
        _ => Protocol::Tcp as i32,
    }
}

fn ports(spec: &PodSpec) -> Vec<PortMapping> {
    if spec.host_network == Some(true) {
        return Vec::new();
    }
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let ports = containers.flat_map(|c| c.ports.iter().flatten());
    ports
        .map(|p| PortMapping {
            protocol: protocol(p.protocol.as_deref()),
            container_port: p.container_port,
            host_port: p.host_port.unwrap_or(0),
            host_ip: p.host_ip.clone().unwrap_or_default(),
        })
        .collect()
}

/// The labels by which sandboxes and containers of a pod are found again.
pub fn identity(pod: &Pod) -> HashMap<String, String> {
    let m = &pod.metadata;
    HashMap::from([
        (labels::POD_NAME.to_owned(), m.name.clone().unwrap_or_default()),
        (labels::POD_NAMESPACE.to_owned(), m.namespace.clone().unwrap_or_default()),
        (labels::POD_UID.to_owned(), m.uid.clone().unwrap_or_default()),
    ])
}

/// The sandbox's configuration. `cgroup_parent` is empty when the runtime is to choose; `users` are the pod's own.
pub fn config(
    pod: &Pod,
    config: &Config,
    host: &HostDns,
    attempt: u32,
    cgroup_parent: String,
    users: Option<UserNamespace>,
) -> PodSandboxConfig {
    let empty = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&empty);
    let m = &pod.metadata;
    let (name, namespace, uid) = (
        m.name.clone().unwrap_or_default(),
        m.namespace.clone().unwrap_or_default(),
        m.uid.clone().unwrap_or_default(),
    );
    let (hostname, domain) = host_and_domain(pod, &config.kubelet.cluster_domain);
    let fqdn = spec.set_hostname_as_fqdn == Some(true) && !domain.is_empty();
    let mut labels = identity(pod);
    for (k, v) in m.labels.iter().flatten() {
        labels.entry(k.clone()).or_insert_with(|| v.clone());
    }
    let annotations: BTreeMap<_, _> = m.annotations.clone().unwrap_or_default();
    let sysctls = spec.security_context.as_ref().and_then(|c| c.sysctls.as_ref());
    PodSandboxConfig {
        log_directory: config.pod_log_dir(&namespace, &name, &uid).to_string_lossy().into_owned(),
        metadata: Some(PodSandboxMetadata { name, uid, namespace, attempt }),
        // With the node's network comes the node's name.
        hostname: match (spec.host_network, fqdn) {
            (Some(true), _) => String::new(),
            (_, true) => format!("{hostname}.{domain}"),
            _ => hostname,
        },
        dns_config: Some(dns(pod, config, host)),
        port_mappings: ports(spec),
        labels,
        annotations: annotations.into_iter().collect(),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent,
            security_context: Some(security::sandbox(spec, &seccomp_root(config), users)),
            sysctls: sysctls
                .into_iter()
                .flatten()
                .map(|s| (s.name.replace('/', "."), s.value.clone()))
                .collect(),
            ..Default::default()
        }),
        windows: None,
    }
}

/// Where seccomp profiles of type Localhost lie.
pub fn seccomp_root(config: &Config) -> String {
    config.root_dir.join("seccomp").to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(spec: serde_json::Value) -> Pod {
        let mut spec = spec;
        spec["containers"] = json!([{"name": "c", "ports": [{"containerPort": 80, "hostPort": 8080}]}]);
        serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"}, "spec": spec}))
            .unwrap()
    }

    #[test]
    fn dns_policies() {
        let c = Config::new("node", None);
        let host = HostDns::parse("# x\nnameserver 1.1.1.1\nsearch corp.example\noptions edns0\n");
        let d = |spec| dns(&pod(spec), &c, &host);
        let first = d(json!({}));
        assert_eq!(first.servers, ["169.254.20.10"]);
        assert_eq!(
            first.searches,
            ["n.svc.cluster.local", "svc.cluster.local", "cluster.local", "corp.example"]
        );
        assert_eq!(first.options, ["ndots:5"]);
        assert_eq!(d(json!({"hostNetwork": true})).servers, ["1.1.1.1"]);
        assert_eq!(
            d(json!({"hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet"})).servers,
            ["169.254.20.10"]
        );
        assert_eq!(d(json!({"dnsPolicy": "Default"})).options, ["edns0"]);
        let own = d(
            json!({"dnsConfig": {"nameservers": ["9.9.9.9"], "searches": ["x"], "options": [{"name": "ndots", "value": "2"}, {"name": "rotate"}]}}),
        );
        assert_eq!(own.options, ["ndots:2", "rotate"]);
        assert_eq!(own.servers, ["169.254.20.10", "9.9.9.9"]);
        assert_eq!(d(json!({"dnsPolicy": "None"})), DnsConfig::default());
    }

    #[test]
    fn host_names() {
        let h = |spec| host_and_domain(&pod(spec), "cluster.local");
        assert_eq!(h(json!({})), ("p".into(), String::new()));
        assert_eq!(
            h(json!({"hostname": "h", "subdomain": "s"})),
            ("h".into(), "s.n.svc.cluster.local".into())
        );
        assert_eq!(h(json!({"hostnameOverride": "o.x", "subdomain": "s"})), ("o.x".into(), String::new()));
        let long = "a".repeat(62) + "-b";
        assert_eq!(h(json!({"hostname": long})).0.len(), 62);
        let c = Config::new("node", None);
        let s = config(
            &pod(json!({"subdomain": "s", "setHostnameAsFQDN": true})),
            &c,
            &HostDns::default(),
            0,
            String::new(),
            None,
        );
        assert_eq!(s.hostname, "p.s.n.svc.cluster.local");
        assert_eq!(s.port_mappings[0].host_port, 8080);
    }
}
