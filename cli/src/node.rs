//! The node side: CRI server, agent, proxy and DNS, each reached by the others only over its standard socket.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use orlop_agent::{KubeletConfiguration, PodCidrHook};
use orlop_apiserver::pki::Pki;
use orlop_base::durable::{self, Sync};
use orlop_base::supervise::{Ready, TaskGroup};
use orlop_cni_types::{OrlopNetwork, render_conflist};
use orlop_proxy::Question;

use crate::Failure;
use crate::args::{AgentArgs, CgroupDriver, CriArgs, NodeArgs, ProxyArgs, ProxyCommand, RuntimeArgs};
use crate::server::{default_address, wait};
use crate::values::socket_path;

const DRAIN: Duration = Duration::from_secs(10);
const CONFLIST: &str = "10-orlop.conflist";
/// When a node beside its control plane counts its disk as full, if no file says otherwise. Upstream's 10 % and 15 % are for machines
/// that do nothing else; people try a cluster out on disks that hold much besides. k3s has 5 % too.
const LEAST_DISK_OF_A_WHOLE_CLUSTER: &str = "5%";

/// The credentials of the node's parts.
pub struct Credentials {
    pub kubelet: PathBuf,
    pub proxy: PathBuf,
    pub dns: PathBuf,
}

/// A node's settings with all defaults filled in.
pub struct Node {
    pub name: String,
    pub ips: Vec<IpAddr>,
    pub data_dir: PathBuf,
    pub cluster_domain: String,
    /// Pods' addresses of the whole cluster, as far as they are known.
    pub cluster_cidrs: Vec<IpNet>,
    /// The control plane runs in this process too.
    pub is_whole_cluster: bool,
    pub args: NodeArgs,
}

impl Node {
    pub fn new(
        args: &NodeArgs,
        data_dir: &Path,
        cluster_domain: &str,
        cluster_cidrs: &[IpNet],
    ) -> Result<Node, Failure> {
        let name = match &args.node_name {
            Some(n) => n.to_ascii_lowercase(),
            None => host_name()?,
        };
        if !is_node_name(&name) {
            return Err(format!(
                "{name:?} cannot name a node: letters, digits, '-' and '.' only, a letter or digit at both ends; pass another --node-name"
            )
            .into());
        }
        let ips = if args.node_ips.is_empty() { vec![default_address()] } else { args.node_ips.clone() };
        Ok(Node {
            name,
            ips,
            data_dir: data_dir.to_owned(),
            cluster_domain: cluster_domain.to_owned(),
            cluster_cidrs: cluster_cidrs.to_vec(),
            is_whole_cluster: false,
            args: args.clone(),
        })
    }

    /// Fails on what is wrong with the flags, before anything is started.
    pub fn check(&self) -> Result<(), Failure> {
        if self.args.container_runtime_endpoint.is_none() {
            self.cri_config()?;
        }
        self.agent_config(None)?;
        let cni = &self.args.cni_conf_dir;
        match cni.exists() && !cni.is_dir() {
            true => Err(format!("{} is not a folder; choose another --cni-conf-dir", cni.display()).into()),
            false => Ok(()),
        }
    }

    /// Writes what the control plane's key material gives a node on its own machine.
    pub fn credentials(
        &self,
        pki: &Pki,
        server: &orlop_apiserver::Config,
        port: u16,
    ) -> Result<Credentials, Failure> {
        let kubelet = server.kubeconfig("kubelet");
        let host =
            if server.listen.ip().is_unspecified() { "127.0.0.1".parse()? } else { server.listen.ip() };
        let url = format!("https://{}", SocketAddr::new(host, port));
        pki.ensure_kubeconfig(&kubelet, &url, &format!("system:node:{}", self.name), Some("system:nodes"))?;
        let mut names: BTreeSet<String> = self.ips.iter().map(|ip| ip.to_string()).collect();
        names.insert(self.name.clone());
        let dir = self.args.kubelet_dir.join("pki");
        pki.ensure_kubelet_serving(&dir, &self.name, &names)?;
        durable::write_atomic(&dir.join("ca.crt"), pki.ca.cert_pem.as_bytes(), 0o644, Sync::Disk)?;
        Ok(Credentials { kubelet, proxy: server.kubeconfig("proxy"), dns: server.kubeconfig("dns") })
    }

    pub fn cri_config(&self) -> Result<orlop_cri::Config, Failure> {
        let a = &self.args;
        let socket = a.run_dir.join("cri.sock");
        cri_config(&socket, &self.data_dir, &a.run_dir, &a.cni_conf_dir, &a.cni_bin_dir, &a.runtime)
    }

    /// The socket of the runtime that this node uses.
    fn cri_socket(&self) -> PathBuf {
        match &self.args.container_runtime_endpoint {
            Some(s) => PathBuf::from(socket_path(s)),
            None => self.args.run_dir.join("cri.sock"),
        }
    }

    pub fn conflist(&self) -> PathBuf {
        self.args.cni_conf_dir.join(CONFLIST)
    }

    fn pod_cidr_hook(&self) -> PodCidrHook {
        let (path, data_dir) = (self.conflist(), self.data_dir.join("cni"));
        let not_masqueraded = self.cluster_cidrs.clone();
        PodCidrHook(Arc::new(move |cidrs: &[String]| {
            let pod_cidrs = cidrs.iter().filter_map(|c| c.parse().ok()).collect();
            let network = OrlopNetwork {
                data_dir: data_dir.clone(),
                not_masqueraded: not_masqueraded.clone(),
                ..OrlopNetwork::new(pod_cidrs)
            };
            if let Err(e) = write_conflist(&path, &render_conflist(&network)) {
                tracing::error!(error = %orlop_base::telemetry::chain(&e), "pods get no network");
            }
        }))
    }

    pub fn agent_config(&self, kubeconfig: Option<PathBuf>) -> Result<orlop_agent::Config, Failure> {
        let a = &self.args;
        let mut c = orlop_agent::Config::new(&*self.name, kubeconfig);
        c.node_ips = self.ips.clone();
        c.cri_socket = self.cri_socket();
        c.cert_dir = a.kubelet_dir.join("pki");
        c.root_dir = a.kubelet_dir.clone();
        c.pod_logs_dir = a.pod_logs_dir.clone();
        c.container_logs_dir = a.container_logs_dir.clone();
        c.static_pod_dir = Some(a.static_pod_dir.clone());
        c.image_credential_provider_config = a.image_credential_provider_config.clone();
        c.image_credential_provider_bin_dir = a.image_credential_provider_bin_dir.clone();
        c.on_pod_cidr = Some(self.pod_cidr_hook());
        c.listen = SocketAddr::from(([0, 0, 0, 0], a.kubelet_port));
        c.node_labels = labels(&a.node_labels)?;
        c.kubelet = match &a.config {
            Some(path) => KubeletConfiguration::read_over(path, &self.kubelet_defaults())?,
            None => KubeletConfiguration::from_values(self.kubelet_defaults())?,
        };
        let ca = c.cert_dir.join("ca.crt");
        // Without it callers prove themselves by tokens only.
        if c.kubelet.authentication.x509.client_ca_file.is_empty() && ca.exists() {
            c.kubelet.authentication.x509.client_ca_file = ca.to_string_lossy().into_owned();
        }
        Ok(c)
    }

    /// What the command line says where a KubeletConfiguration file does not.
    fn kubelet_defaults(&self) -> serde_json::Map<String, serde_json::Value> {
        let a = &self.args;
        let mut pairs = vec![
            ("clusterDNS", serde_json::json!([a.dns_address])),
            ("clusterDomain", serde_json::json!(self.cluster_domain)),
            ("cgroupRoot", serde_json::json!(a.cgroup_root)),
        ];
        if self.is_whole_cluster {
            let mut hard = KubeletConfiguration::default().eviction_hard;
            for signal in ["nodefs.available", "imagefs.available"] {
                hard.insert(signal.to_owned(), LEAST_DISK_OF_A_WHOLE_CLUSTER.to_owned());
            }
            pairs.push(("evictionHard", serde_json::json!(hard)));
        }
        pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
    }

    pub fn proxy_config(&self, kubeconfig: &Path) -> orlop_proxy::Config {
        let a = &self.args;
        let mut c = proxy_config(kubeconfig, &self.name, &a.bpf_dir);
        c.health_address = a.proxy_health_address.0;
        c.metrics_address = a.proxy_metrics_address.0;
        a.proxy.0.apply(&mut c);
        c
    }

    /// Starts the node's parts in `tasks`; returns once the agent is up.
    pub async fn start(&self, credentials: &Credentials, tasks: &TaskGroup) -> Result<(), Failure> {
        let stop = tasks.stop_token();
        // What the files say wrong is said before anything is made.
        let agent = self.agent_config(Some(credentials.kubelet.clone()))?;
        orlop_client::client_from_kubeconfig(&credentials.kubelet).await?;
        if self.args.container_runtime_endpoint.is_none() {
            let ready = Ready::default();
            let config = self.cri_config()?;
            tasks.spawn_essential("CRI server", orlop_cri::run(config, ready.clone(), stop.clone()));
            wait(&ready, &stop, "the CRI server did not start").await?;
        }
        let ready = Ready::default();
        tasks.spawn_essential("agent", orlop_agent::run(agent, ready.clone(), stop.clone()));
        if !self.args.no_proxy {
            let proxy = self.proxy_config(&credentials.proxy);
            tasks.spawn_essential("proxy", orlop_proxy::run(proxy, Ready::default(), stop.clone()));
        }
        if !self.args.no_dns {
            let client = orlop_client::client_from_kubeconfig(&credentials.dns).await?;
            let mut dns = orlop_dns::Config::new(client);
            dns.listen = vec![SocketAddr::new(self.args.dns_address, 53)];
            dns.cluster_domain = self.cluster_domain.clone();
            dns.link = Some(self.args.dns_link.clone());
            tasks.spawn_essential("DNS", orlop_dns::run(dns, Ready::default(), stop.clone()));
        }
        wait(&ready, &stop, "the agent did not start").await
    }
}

fn host_name() -> Result<String, Failure> {
    let name = nix::unistd::gethostname()?.to_string_lossy().to_ascii_lowercase();
    if name.is_empty() {
        return Err("this machine has no host name; set one or pass --node-name".into());
    }
    Ok(name)
}

/// A DNS subdomain (RFC 1123), as the API wants it of a Node's name.
fn is_node_name(name: &str) -> bool {
    let label = |l: &str| {
        l.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !l.is_empty()
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

fn write_conflist(path: &Path, text: &str) -> Result<(), durable::Error> {
    if std::fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    if let Some(dir) = path.parent() {
        // A failure shows in the write that follows, with the path.
        let _ = std::fs::create_dir_all(dir);
    }
    durable::write_atomic(path, text.as_bytes(), 0o644, Sync::Disk)
}

fn labels(all: &[String]) -> Result<BTreeMap<String, String>, Failure> {
    let pair = |l: &String| l.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned()));
    all.iter().map(|l| pair(l).ok_or_else(|| format!("--node-label {l:?}: write KEY=VALUE").into())).collect()
}

/// The folder of this program: the monitor and the CNI plugin lie beside it.
fn program_dir() -> Result<PathBuf, Failure> {
    let exe = std::env::current_exe()?;
    Ok(exe.parent().map(Path::to_owned).unwrap_or_default())
}

fn cri_config(
    socket: &Path,
    data_dir: &Path,
    run_dir: &Path,
    cni_conf_dir: &Path,
    cni_bin_dir: &Path,
    runtime: &RuntimeArgs,
) -> Result<orlop_cri::Config, Failure> {
    let programs = program_dir()?;
    let monitor = programs.join("orlop-monitor");
    if !monitor.exists() {
        return Err(format!("{} is missing; install it beside orlop", monitor.display()).into());
    }
    Ok(orlop_cri::Config {
        listen: socket.to_owned(),
        state_dir: data_dir.join("cri"),
        run_dir: run_dir.join("cri"),
        images_dir: data_dir.join("images"),
        images: orlop_images::Options {
            certs_dir: Some(runtime.registry_config_dir.clone()),
            docker_config: runtime.registry_auth_file.clone(),
            verifiers_dir: Some(runtime.image_verifier_dir.clone()),
            pinned: runtime.pinned_images.clone(),
            proxies: orlop_images::Proxies::from_env(),
            ..orlop_images::Options::default()
        },
        monitor,
        cni_conf_dir: cni_conf_dir.to_owned(),
        cni_bin_dirs: vec![cni_bin_dir.to_owned(), programs.clone()],
        cni_builtin: Some(orlop_cni::builtin(programs)),
        cni_cache_dir: data_dir.join("cri/cni"),
        streaming_idle_timeout: Duration::from_secs(runtime.streaming_idle_timeout),
        runtimes: runtime.runtime_handlers.iter().map(|h| (h.0.clone(), h.1.clone())).collect(),
        nri: runtime.nri.then(|| orlop_cri::NriConfig {
            socket: runtime.nri_socket.clone(),
            plugin_dir: runtime.nri_plugin_dir.clone(),
            config_dir: runtime.nri_config_dir.clone(),
            registration_timeout: Duration::from_secs(runtime.nri_registration_timeout),
            request_timeout: Duration::from_secs(runtime.nri_request_timeout),
            ..orlop_cri::nri_defaults()
        }),
        cgroup_driver: match runtime.cgroup_driver {
            CgroupDriver::Cgroupfs => orlop_cri::CgroupDriver::Cgroupfs,
            CgroupDriver::Systemd => orlop_cri::CgroupDriver::Systemd,
        },
        ..Default::default()
    })
}

fn proxy_config(kubeconfig: &Path, node: &str, bpf_dir: &Path) -> orlop_proxy::Config {
    let mut c = orlop_proxy::Config::new(kubeconfig.to_owned(), node.to_owned());
    c.datapath.pins = bpf_dir.to_owned();
    c
}

/// `orlop agent`.
pub async fn run(args: AgentArgs) -> Result<(), Failure> {
    let stop = crate::shutdown::on_signal()?;
    let tasks = TaskGroup::new(&stop);
    let node = Node::new(&args.node, &args.data_dir, &args.cluster_domain, &args.cluster_cidrs)?;
    node.check()?;
    let credentials = Credentials {
        kubelet: args.kubeconfig.clone(),
        proxy: args.kubeconfig.clone(),
        dns: args.kubeconfig.clone(),
    };
    if let Err(e) = node.start(&credentials, &tasks).await {
        tasks.stop_token().cancel();
        return Err(tasks.run_until_stopped(DRAIN).await.err().map_or(e, Into::into));
    }
    Ok(tasks.run_until_stopped(DRAIN).await?)
}

/// `orlop cri`.
pub async fn run_cri(args: CriArgs) -> Result<(), Failure> {
    let stop = crate::shutdown::on_signal()?;
    let socket = PathBuf::from(socket_path(&args.listen));
    let config = cri_config(
        &socket,
        &args.data_dir,
        &args.run_dir,
        &args.cni_conf_dir,
        &args.cni_bin_dir,
        &args.runtime,
    )?;
    Ok(orlop_cri::run(config, Ready::default(), stop).await?)
}

/// `orlop proxy`.
pub async fn run_proxy(args: ProxyArgs) -> Result<(), Failure> {
    orlop_base::memory::keep_small();
    let file = match &args.config {
        Some(path) => orlop_proxy::ConfigFile::read(path)?,
        None => Default::default(),
    };
    if !file.without_effect.is_empty() {
        tracing::warn!(fields = %file.without_effect.join(", "), "the configuration file sets what has no effect here");
    }
    let name = match args.node_name.or(file.node_name) {
        Some(n) => n,
        None => host_name()?,
    };
    let kubeconfig = args.kubeconfig.or(file.kubeconfig);
    let kubeconfig =
        kubeconfig.ok_or("--kubeconfig is missing, and clientConnection.kubeconfig in the file")?;
    let mut config = proxy_config(&kubeconfig, &name, &args.pins.bpf_dir);
    config.datapath.cgroup = args.cgroup;
    config.health_address =
        args.health_address.map_or(file.health_address.or(config.health_address), |a| a.0);
    config.metrics_address =
        args.metrics_address.map_or(file.metrics_address.or(config.metrics_address), |a| a.0);
    config.node_port_addresses = file.node_port_addresses;
    args.datapath.apply(&mut config);
    let stop = crate::shutdown::on_signal()?;
    Ok(orlop_proxy::run(config, Ready::default(), stop).await?)
}

/// `orlop proxy status` and the like.
pub fn ask_proxy(command: ProxyCommand) -> Result<(), Failure> {
    let (pins, question) = match command {
        ProxyCommand::Status(p) => (p, Question::Status),
        ProxyCommand::Services(p) => (p, Question::Services),
        ProxyCommand::Backends(p) => (p, Question::Backends),
        ProxyCommand::Flows { service, pins } => (pins, Question::Flows { service }),
        ProxyCommand::Trace { to, udp, outside, pins } => (pins, Question::Trace { to, udp, outside }),
        ProxyCommand::Cleanup { kube_proxy, pins } => {
            let config = proxy_config(Path::new(""), "", &pins.bpf_dir);
            orlop_proxy::purge(&config)?;
            if kube_proxy {
                let report = orlop_proxy::leftovers::remove()?;
                for removed in report.removed {
                    crate::say(format_args!("removed {removed}"))?;
                }
                for unseen in report.unseen {
                    crate::say(format_args!("not looked for: {unseen}"))?;
                }
            }
            return Ok(());
        }
    };
    crate::say(orlop_proxy::inspect(&pins.bpf_dir, &question)?.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_nodes() {
        for good in ["vm", "a-1.example.org", "1"] {
            assert!(is_node_name(good), "{good}");
        }
        for bad in ["", "a_b", "-a", "a-", "a..b", ".a", "A", "a b", &"a".repeat(254)] {
            assert!(!is_node_name(bad), "{bad}");
        }
    }
}
