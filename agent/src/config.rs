//! What the agent is told when it starts: plain values, nothing read from the environment.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Taint;
use serde::Deserialize;

/// Called with the node's podCIDRs once they are known and each time they change, so that whoever wires the node can
/// write the CNI configuration. The agent itself reaches networks only over CRI.
#[derive(Clone)]
pub struct PodCidrHook(pub Arc<PodCidrFn>);

/// Takes all podCIDRs of the node.
pub type PodCidrFn = dyn Fn(&[String]) + Send + Sync;

impl fmt::Debug for PodCidrHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PodCidrHook")
    }
}

/// How one agent runs. Several can run in one process: every path and address is here.
#[derive(Clone, Debug)]
pub struct Config {
    /// `None` runs static pods only, without an API server.
    pub kubeconfig: Option<PathBuf>,
    /// The Node object's name, lower case.
    pub node_name: String,
    /// Reported as InternalIP in this order; the first of each family is the pod's hostIP.
    pub node_ips: Vec<IpAddr>,
    /// Unix socket of the CRI runtime and image services.
    pub cri_socket: PathBuf,
    /// Pods' volumes and checkpoints: upstream's /var/lib/kubelet.
    pub root_dir: PathBuf,
    /// Upstream's /var/log/pods.
    pub pod_logs_dir: PathBuf,
    /// Upstream's /var/log/containers.
    pub container_logs_dir: PathBuf,
    /// Manifests of static pods; `None` for none.
    pub static_pod_dir: Option<PathBuf>,
    /// A CredentialProviderConfig, or a folder of them, and the folder of the programs that it names: both or none.
    pub image_credential_provider_config: Option<PathBuf>,
    pub image_credential_provider_bin_dir: Option<PathBuf>,
    pub on_pod_cidr: Option<PodCidrHook>,
    /// Where the node server (:10250) listens.
    pub listen: SocketAddr,
    /// Serving certificate and key of the node server.
    pub cert_dir: PathBuf,
    /// Labels the node registers with, besides the well-known ones.
    pub node_labels: BTreeMap<String, String>,
    /// Taints the node registers with.
    pub node_taints: Vec<Taint>,
    /// Where the cgroup file systems are mounted.
    pub cgroup_mount: PathBuf,
    pub kubelet: KubeletConfiguration,
}

impl Config {
    /// Upstream's paths and defaults for a node of this name.
    pub fn new(node_name: impl Into<String>, kubeconfig: Option<PathBuf>) -> Config {
        let root_dir = PathBuf::from("/var/lib/kubelet");
        Config {
            kubeconfig,
            node_name: node_name.into(),
            node_ips: Vec::new(),
            cri_socket: "/run/orlop/cri.sock".into(),
            cert_dir: root_dir.join("pki"),
            root_dir,
            pod_logs_dir: "/var/log/pods".into(),
            container_logs_dir: "/var/log/containers".into(),
            static_pod_dir: Some("/etc/kubernetes/manifests".into()),
            image_credential_provider_config: None,
            image_credential_provider_bin_dir: None,
            on_pod_cidr: None,
            listen: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 10250),
            node_labels: BTreeMap::new(),
            node_taints: Vec::new(),
            cgroup_mount: "/sys/fs/cgroup".into(),
            kubelet: KubeletConfiguration::default(),
        }
    }

    /// The folder of a pod: volumes, hosts file, termination logs, checkpoint.
    pub fn pod_dir(&self, uid: &str) -> PathBuf {
        self.root_dir.join("pods").join(uid)
    }

    /// The folder of a pod's container logs.
    pub fn pod_log_dir(&self, namespace: &str, name: &str, uid: &str) -> PathBuf {
        self.pod_logs_dir.join(format!("{namespace}_{name}_{uid}"))
    }
}

/// The part of `kubelet.config.k8s.io/v1beta1` KubeletConfiguration that is used. Unknown fields are kept aside, so that an
/// upstream file can be used as it is and the agent can say what has no effect.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct KubeletConfiguration {
    pub max_pods: u32,
    /// Processes per pod; negative for no limit.
    pub pod_pids_limit: i64,
    #[serde(rename = "clusterDNS")]
    pub cluster_dns: Vec<IpAddr>,
    pub cluster_domain: String,
    /// Where "Default" DNS settings come from; empty for none.
    pub resolv_conf: String,
    /// The cgroup under which `kubepods` is made.
    pub cgroup_root: String,
    /// `cgroupfs` or `systemd`; asked from the runtime when the runtime knows (KEP-4033).
    pub cgroup_driver: String,
    #[serde(rename = "imageGCHighThresholdPercent")]
    pub image_gc_high_threshold_percent: u8,
    #[serde(rename = "imageGCLowThresholdPercent")]
    pub image_gc_low_threshold_percent: u8,
    #[serde(rename = "imageMinimumGCAge", deserialize_with = "go_duration")]
    pub image_minimum_gc_age: Duration,
    /// How long an image may be unused; zero for as long as there is room. Counted from the agent's start at the earliest.
    #[serde(rename = "imageMaximumGCAge", deserialize_with = "go_duration")]
    pub image_maximum_gc_age: Duration,
    /// A quantity of bytes such as `10Mi`.
    pub container_log_max_size: String,
    pub container_log_max_files: u32,
    #[serde(deserialize_with = "go_duration")]
    pub node_status_update_frequency: Duration,
    #[serde(deserialize_with = "go_duration")]
    pub node_status_report_frequency: Duration,
    pub node_lease_duration_seconds: i32,
    pub max_parallel_image_pulls: Option<u32>,
    pub system_reserved: BTreeMap<String, String>,
    pub kube_reserved: BTreeMap<String, String>,
    pub eviction_hard: BTreeMap<String, String>,
    /// `pods` gives the cgroup of all pods limits; `none` or nothing does not. Reserved cgroups are not limited.
    pub enforce_node_allocatable: Vec<String>,
    pub register_node: bool,
    pub seccomp_default: bool,
    pub allowed_unsafe_sysctls: Vec<String>,
    #[serde(rename = "cpuCFSQuota")]
    pub cpu_cfs_quota: bool,
    #[serde(rename = "cpuCFSQuotaPeriod", deserialize_with = "go_duration")]
    pub cpu_cfs_quota_period: Duration,
    #[serde(deserialize_with = "go_duration")]
    pub file_check_frequency: Duration,
    pub tls_cert_file: String,
    pub tls_private_key_file: String,
    pub authentication: Authentication,
    pub authorization: Authorization,
    pub crash_loop_back_off: CrashLoopBackOff,
    pub user_namespaces: UserNamespacesConfiguration,
    /// What nothing here reads.
    #[serde(flatten)]
    pub(crate) other: serde_json::Map<String, serde_json::Value>,
}

/// Who may call the node server.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Authentication {
    pub x509: X509Authentication,
    pub webhook: Switch,
    pub anonymous: Switch,
    /// What nothing here reads.
    #[serde(flatten)]
    pub(crate) other: serde_json::Map<String, serde_json::Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct X509Authentication {
    pub client_ca_file: String,
    /// What nothing here reads.
    #[serde(flatten)]
    pub(crate) other: serde_json::Map<String, serde_json::Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Switch {
    /// Unset: on for the webhook, off for anonymous.
    pub enabled: Option<bool>,
    /// What nothing here reads.
    #[serde(flatten)]
    pub(crate) other: serde_json::Map<String, serde_json::Value>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct Authorization {
    /// `Webhook` or `AlwaysAllow`.
    pub mode: String,
    /// What nothing here reads.
    #[serde(flatten)]
    pub(crate) other: serde_json::Map<String, serde_json::Value>,
}

impl Default for Authorization {
    fn default() -> Self {
        Authorization { mode: "Webhook".into(), other: serde_json::Map::new() }
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CrashLoopBackOff {
    /// 1 s to 300 s.
    #[serde(deserialize_with = "go_duration_option")]
    pub max_container_restart_period: Option<Duration>,
    /// What nothing here reads.
    #[serde(flatten)]
    pub(crate) other: serde_json::Map<String, serde_json::Value>,
}

/// How pods with `hostUsers: false` get their ids.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct UserNamespacesConfiguration {
    /// A multiple of 65536.
    pub ids_per_pod: Option<u32>,
    /// What nothing here reads.
    #[serde(flatten)]
    pub(crate) other: serde_json::Map<String, serde_json::Value>,
}

impl UserNamespacesConfiguration {
    pub fn ids_per_pod(&self) -> u32 {
        self.ids_per_pod.unwrap_or(crate::userns::UNIT)
    }
}

impl Default for KubeletConfiguration {
    fn default() -> Self {
        let eviction = [
            ("memory.available", "100Mi"),
            ("nodefs.available", "10%"),
            ("nodefs.inodesFree", "5%"),
            ("imagefs.available", "15%"),
        ];
        KubeletConfiguration {
            max_pods: 110,
            pod_pids_limit: -1,
            cluster_dns: vec![IpAddr::V4(Ipv4Addr::new(169, 254, 20, 10))],
            cluster_domain: "cluster.local".into(),
            resolv_conf: "/etc/resolv.conf".into(),
            cgroup_root: "/".into(),
            cgroup_driver: "cgroupfs".into(),
            image_gc_high_threshold_percent: 85,
            image_gc_low_threshold_percent: 80,
            image_minimum_gc_age: Duration::from_secs(120),
            image_maximum_gc_age: Duration::ZERO,
            container_log_max_size: "10Mi".into(),
            container_log_max_files: 5,
            node_status_update_frequency: Duration::from_secs(10),
            node_status_report_frequency: Duration::from_secs(300),
            node_lease_duration_seconds: 40,
            max_parallel_image_pulls: None,
            system_reserved: BTreeMap::new(),
            kube_reserved: BTreeMap::new(),
            eviction_hard: eviction.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            enforce_node_allocatable: vec!["pods".into()],
            register_node: true,
            seccomp_default: false,
            allowed_unsafe_sysctls: Vec::new(),
            cpu_cfs_quota: true,
            cpu_cfs_quota_period: Duration::from_millis(100),
            file_check_frequency: Duration::from_secs(20),
            tls_cert_file: String::new(),
            tls_private_key_file: String::new(),
            authentication: Authentication::default(),
            authorization: Authorization::default(),
            crash_loop_back_off: CrashLoopBackOff::default(),
            user_namespaces: UserNamespacesConfiguration::default(),
            other: serde_json::Map::new(),
        }
    }
}

impl KubeletConfiguration {
    /// Whether all pods together are held to what the node has for them.
    pub fn enforces_allocatable(&self) -> bool {
        self.enforce_node_allocatable.iter().any(|e| e == "pods")
    }

    /// The longest wait between restarts of a container.
    pub fn max_restart_delay(&self) -> Duration {
        self.crash_loop_back_off
            .max_container_restart_period
            .unwrap_or(Duration::from_secs(300))
            .clamp(Duration::from_secs(1), Duration::from_secs(300))
    }
}

/// Go's duration text: `1h2m3.5s`, `300ms`.
pub fn parse_go_duration(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    if rest.is_empty() {
        return None;
    }
    let mut total = 0f64;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let factor = match &rest[..unit] {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        total += number * factor;
        rest = &rest[unit..];
    }
    Duration::try_from_secs_f64(total).ok()
}

fn go_duration<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(d)?;
    parse_go_duration(&text)
        .ok_or_else(|| serde::de::Error::custom(format!("{text:?} is no duration; write 10s, 5m or 1h30m")))
}

fn go_duration_option<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<Duration>, D::Error> {
    go_duration(d).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_an_upstream_file() {
        let text = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nmaxPods: 42\n\
                    clusterDNS: [10.96.0.10]\nimageMinimumGCAge: 1m30s\nevictionPressureTransitionPeriod: 0s\n\
                    authentication:\n  anonymous:\n    enabled: false\n";
        let k: KubeletConfiguration = serde_saphyr::from_str(text).unwrap();
        assert_eq!((k.max_pods, k.image_minimum_gc_age.as_secs()), (42, 90));
        assert_eq!(k.cluster_dns, ["10.96.0.10".parse::<IpAddr>().unwrap()]);
        assert_eq!(k.authentication.anonymous.enabled, Some(false));
    }

    #[test]
    fn go_durations() {
        let ms = |t| parse_go_duration(t).map(|d| d.as_millis());
        assert_eq!(ms("1h2m3.5s"), Some(3_723_500));
        assert_eq!(ms("300ms"), Some(300));
        assert_eq!(ms("0"), Some(0));
        assert_eq!(ms("5"), None);
        assert_eq!(ms("5 s"), None);
    }
}
