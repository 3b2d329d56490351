//! The pod network, as far as the CRI server knows it: CNI for attaching, and the pod's resolver files.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use orlop_api::quantity::Amount;
use orlop_cni_invoke::{Attachment, Bandwidth, Cni, DnsConfig, PodNetwork, PortMapping};
use orlop_proto::cri;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::store::SandboxRecord;

/// The interface that Kubernetes knows.
pub(crate) const INTERFACE: &str = "eth0";

/// See the module.
pub(crate) struct Network {
    cni: Cni,
}

impl Network {
    pub fn new(config: &Config) -> Network {
        Network {
            cni: Cni::among(
                config.cni_conf_dir.clone(),
                config.cni_bin_dirs.clone(),
                &config.cni_cache_dir,
                config.cni_timeout,
                config.cni_neighbours.clone(),
                config.cni_builtin.clone(),
            ),
        }
    }

    /// Before anything else: see [`Cni::check_version`].
    pub fn check_version(&self) -> Result<()> {
        Ok(self.cni.check_version()?)
    }

    /// Before anything else: see [`Cni::end_strays`].
    pub async fn end_strays(&self) {
        self.cni.end_strays().await;
    }

    /// Attaches the pod and returns its addresses, the primary one first. An error when it got none: the kubelet would take the pod
    /// for one that is not ready for ever.
    pub async fn attach(&self, record: &SandboxRecord, netns: PathBuf) -> Result<Vec<String>> {
        bandwidth(&record.config)?;
        let result = self.cni.add(&pod_network(record, netns)).await?;
        let ips: Vec<String> = result.pod_ips(INTERFACE).iter().map(ToString::to_string).collect();
        if ips.is_empty() {
            return Err(Error::NoAddress { interface: INTERFACE });
        }
        Ok(ips)
    }

    /// Idempotent; the namespace may be gone.
    pub async fn detach(&self, record: &SandboxRecord, netns: PathBuf) -> Result<()> {
        Ok(self.cni.del(&pod_network(record, netns)).await?)
    }

    /// Why pods cannot be attached now, if so.
    pub async fn problem(&self) -> Option<String> {
        self.cni.status().await.err().map(|e| orlop_base::telemetry::chain(&e))
    }

    /// The network's name and the file that defines it, for a verbose status.
    pub fn describe(&self) -> Option<(String, PathBuf)> {
        self.cni.network().ok().map(|(file, network)| (network.name, file))
    }

    /// No pod of this server is on any network, nor will be.
    pub fn leave(&self) {
        self.cni.leave();
    }

    /// Detaches everything but `sandboxes`.
    pub async fn keep_only(&self, sandboxes: &[String]) -> Result<()> {
        let valid: Vec<Attachment> = sandboxes
            .iter()
            .map(|id| Attachment { container_id: id.clone(), ifname: INTERFACE.to_owned() })
            .collect();
        Ok(self.cni.gc(&valid).await?)
    }
}

fn pod_network(record: &SandboxRecord, netns: PathBuf) -> PodNetwork {
    let meta = record.metadata();
    let config = &record.config;
    let mappings = config.port_mappings.iter().filter(|p| p.host_port > 0);
    PodNetwork {
        container_id: record.id.clone(),
        netns,
        ifname: INTERFACE.to_owned(),
        pod_name: meta.name,
        pod_namespace: meta.namespace,
        pod_uid: meta.uid,
        port_mappings: mappings.filter_map(port_mapping).collect(),
        // What is wrong was said when the pod was attached.
        bandwidth: bandwidth(config).unwrap_or_default(),
        dns: config.dns_config.as_ref().map(|d| DnsConfig {
            servers: d.servers.clone(),
            searches: d.searches.clone(),
            options: d.options.clone(),
        }),
        cgroup_path: config.linux.as_ref().map(|l| l.cgroup_parent.clone()).filter(|p| !p.is_empty()),
        pod_annotations: config.annotations.clone().into_iter().collect(),
        ..Default::default()
    }
}

fn port_mapping(p: &cri::PortMapping) -> Option<PortMapping> {
    let protocol = match p.protocol() {
        cri::Protocol::Tcp => "tcp",
        cri::Protocol::Udp => "udp",
        cri::Protocol::Sctp => "sctp",
    };
    Some(PortMapping {
        host_port: u16::try_from(p.host_port).ok()?,
        container_port: u16::try_from(p.container_port).ok()?,
        protocol: protocol.to_owned(),
        host_ip: p.host_ip.clone(),
    })
}

/// `kubernetes.io/ingress-bandwidth` and its pair hold a quantity of bits per second, between 1k and 1P.
fn bandwidth(config: &cri::PodSandboxConfig) -> Result<Option<Bandwidth>> {
    let rate = |which: &str| {
        let name = format!("kubernetes.io/{which}-bandwidth");
        let Some(text) = config.annotations.get(&name) else { return Ok(0) };
        let bits = bits(text).filter(|b| (1_000..=1_000_000_000_000_000).contains(b));
        bits.ok_or_else(|| {
            Error::Invalid(format!(
                "annotation {name}: {text:?} is no quantity of bits per second between 1k and 1P"
            ))
        })
    };
    let (ingress_rate, egress_rate) = (rate("ingress")?, rate("egress")?);
    // A burst as large as the kernel's token buckets take: what upstream runtimes hand over too.
    let burst = |rate: u64| if rate == 0 { 0 } else { u64::from(i32::MAX as u32) };
    Ok((ingress_rate > 0 || egress_rate > 0).then_some(Bandwidth {
        ingress_rate,
        ingress_burst: burst(ingress_rate),
        egress_rate,
        egress_burst: burst(egress_rate),
    }))
}

/// A Kubernetes quantity in whole bits, rounded up.
fn bits(quantity: &str) -> Option<u64> {
    u64::try_from(quantity.parse::<Amount>().ok()?.units()).ok()
}

/// resolv.conf(5) of a pod. Without a DNS config the host's is taken over.
pub(crate) fn resolv_conf(dns: Option<&cri::DnsConfig>, hosts: &str) -> String {
    let Some(dns) = dns.filter(|d| !(d.servers.is_empty() && d.searches.is_empty() && d.options.is_empty()))
    else {
        return hosts.to_owned();
    };
    let mut out = String::new();
    // Writing to a String cannot fail.
    if !dns.searches.is_empty() {
        let _ = writeln!(out, "search {}", dns.searches.join(" "));
    }
    for server in &dns.servers {
        let _ = writeln!(out, "nameserver {server}");
    }
    if !dns.options.is_empty() {
        let _ = writeln!(out, "options {}", dns.options.join(" "));
    }
    out
}

/// Where the monitor pins the pod's network namespace.
pub(crate) fn netns_path(run_dir: &Path) -> PathBuf {
    run_dir.join("ns/net")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolver_files() {
        let dns = cri::DnsConfig {
            servers: vec!["10.96.0.10".into(), "1.1.1.1".into()],
            searches: vec!["a.svc".into(), "b".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(
            resolv_conf(Some(&dns), "host"),
            "search a.svc b\nnameserver 10.96.0.10\nnameserver 1.1.1.1\noptions ndots:5\n"
        );
        assert_eq!(resolv_conf(None, "host"), "host");
        assert_eq!(resolv_conf(Some(&cri::DnsConfig::default()), "host"), "host");
    }

    #[test]
    fn bandwidth_quantities() {
        for (text, want) in [
            ("10M", Some(10_000_000)),
            ("1Ki", Some(1024)),
            ("5", Some(5)),
            ("1.5M", Some(1_500_000)),
            ("1e6", Some(1_000_000)),
            ("1E3", Some(1000)),
            ("1T", Some(1_000_000_000_000)),
            ("1m", Some(1)),
            (".5k", Some(500)),
            ("x", None),
            ("", None),
            ("1.2.3", None),
            ("-1M", None),
            ("1MB", None),
            // As many as can be told; the caller's limit is lower.
            ("99999999999E", Some(i64::MAX as u64)),
        ] {
            assert_eq!(bits(text), want, "{text}");
        }
        let of = |ingress: &str, egress: &str| {
            let annotations =
                [("ingress", ingress), ("egress", egress)].into_iter().filter(|(_, q)| !q.is_empty());
            let annotations =
                annotations.map(|(w, q)| (format!("kubernetes.io/{w}-bandwidth"), q.to_owned())).collect();
            bandwidth(&cri::PodSandboxConfig { annotations, ..Default::default() })
        };
        assert!(of("", "").unwrap().is_none());
        assert_eq!(of("1.5M", "1P").unwrap().unwrap().egress_rate, 1_000_000_000_000_000);
        for bad in ["nonsense", "999", "2P", "0"] {
            assert!(of("", bad).is_err() && of(bad, "").is_err(), "{bad}");
        }
    }
}
