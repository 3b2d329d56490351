//! The command line. It is a contract: scripts and docs rely on it.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::{IpNet, Ipv4Net};

use crate::datapath::{DatapathArgs, PrefixedDatapathArgs};
use crate::values;

/// What clap says of a mistake, without its usage lines.
pub fn on_one_line(message: &str) -> String {
    let said =
        message.lines().take_while(|l| !l.starts_with("Usage:") && !l.starts_with("For more information"));
    let words: Vec<&str> = said.flat_map(str::split_whitespace).collect();
    format!("{}; --help lists what there is", words.join(" ").trim_start_matches("error: "))
}

/// Where a server listens: IP:PORT, or "none" for nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address(pub Option<SocketAddr>);

impl FromStr for Address {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Address, Self::Err> {
        match text {
            "none" => Ok(Address(None)),
            t => t.parse().map(|a| Address(Some(a))).map_err(|_| "write IP:PORT or none"),
        }
    }
}

fn image_name(text: &str) -> Result<String, orlop_images::Error> {
    orlop_images::Reference::parse(text).map(|_| text.to_owned())
}

fn key_value(text: &str) -> Result<String, &'static str> {
    match text.split_once('=') {
        Some((key, _)) if !key.is_empty() => Ok(text.to_owned()),
        _ => Err("write KEY=VALUE"),
    }
}

/// The node side of Kubernetes and a compact control plane, in one program.
#[derive(Debug, Parser)]
#[command(name = "orlop", version, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Control plane and node on this machine
    Up(Box<UpArgs>),
    /// Stop what `orlop up` started and take back all of it but the data folder
    Down(Box<UpArgs>),
    /// Control plane only: API server, scheduler, controllers
    Server(ServerArgs),
    /// Node only: kubelet, CRI server, proxy, DNS
    Agent(Box<AgentArgs>),
    /// CRI server only
    Cri(CriArgs),
    /// eBPF service load balancer only
    Proxy(ProxyArgs),
    /// Images of this node
    #[command(subcommand)]
    Image(ImageCommand),
    /// What this kernel and machine lack, each with the remedy
    Check,
    /// Print the administrator's kubeconfig
    Kubeconfig {
        /// Where the server wrote it
        #[arg(long, default_value = "/etc/orlop/admin.kubeconfig")]
        path: PathBuf,
    },
}

/// Control plane and node together.
#[derive(Clone, Debug, Args)]
pub struct UpArgs {
    #[command(flatten)]
    pub server: ServerArgs,

    #[command(flatten)]
    pub node: NodeArgs,

    /// Go into the background once the node is ready
    #[arg(long)]
    pub detach: bool,

    /// With --detach: where the logs go
    #[arg(long, default_value = "/var/log/orlop.log")]
    pub log_file: PathBuf,

    /// With --detach: seconds to wait for the node and the manifests' Deployments
    #[arg(long, default_value_t = 120)]
    pub wait: u64,
}

/// What a node needs to know, whatever control plane it belongs to.
#[derive(Clone, Debug, Args)]
pub struct NodeArgs {
    /// The Node's name [default: the host name]
    #[arg(long)]
    pub node_name: Option<String>,

    /// The Node's addresses, one per family [default: that of the default route]
    #[arg(long = "node-ip")]
    pub node_ips: Vec<IpAddr>,

    /// Labels that the Node registers with
    #[arg(long = "node-label", value_name = "KEY=VALUE", value_parser = key_value)]
    pub node_labels: Vec<String>,

    /// KubeletConfiguration file
    #[arg(long)]
    pub config: Option<PathBuf>,

    /// Use the CRI runtime at this socket instead of our own
    #[arg(long, value_name = "SOCK", value_parser = values::endpoint)]
    pub container_runtime_endpoint: Option<String>,

    /// Leave Services to another proxy
    #[arg(long)]
    pub no_proxy: bool,

    /// Leave cluster DNS to another server
    #[arg(long)]
    pub no_dns: bool,

    /// Sockets, namespaces and other things that do not outlive a reboot
    #[arg(long, default_value = "/run/orlop")]
    pub run_dir: PathBuf,

    /// The kubelet's folder
    #[arg(long, default_value = "/var/lib/kubelet")]
    pub kubelet_dir: PathBuf,

    /// Pods' logs
    #[arg(long, default_value = "/var/log/pods")]
    pub pod_logs_dir: PathBuf,

    /// Links to pods' logs by container
    #[arg(long, default_value = "/var/log/containers")]
    pub container_logs_dir: PathBuf,

    /// Manifests of static pods
    #[arg(long, default_value = "/etc/kubernetes/manifests")]
    pub static_pod_dir: PathBuf,

    /// Programs that know credentials of registries: a CredentialProviderConfig, or a folder of them
    #[arg(long, requires = "image_credential_provider_bin_dir")]
    pub image_credential_provider_config: Option<PathBuf>,

    /// Where these programs are
    #[arg(long, requires = "image_credential_provider_config")]
    pub image_credential_provider_bin_dir: Option<PathBuf>,

    /// CNI configuration
    #[arg(long, default_value = "/etc/cni/net.d")]
    pub cni_conf_dir: PathBuf,

    /// CNI plugins, besides those beside this program
    #[arg(long, default_value = "/opt/cni/bin")]
    pub cni_bin_dir: PathBuf,

    #[command(flatten)]
    pub runtime: RuntimeArgs,

    /// The cgroup below which pods' cgroups are made
    #[arg(long, default_value = "/", value_parser = values::cgroup)]
    pub cgroup_root: String,

    /// Port of the kubelet's server
    #[arg(long, default_value_t = 10250)]
    pub kubelet_port: u16,

    /// Where the proxy answers health checks; "none" for nowhere
    #[arg(long, default_value = "0.0.0.0:10256")]
    pub proxy_health_address: Address,

    /// Where the proxy shows its metrics; "none" for nowhere
    #[arg(long, default_value = "127.0.0.1:10249")]
    pub proxy_metrics_address: Address,

    /// Pins of the proxy's programs and maps
    #[arg(long, default_value = "/sys/fs/bpf/orlop")]
    pub bpf_dir: PathBuf,

    #[command(flatten)]
    pub proxy: PrefixedDatapathArgs,

    /// Address of the node's DNS server
    #[arg(long, default_value = "169.254.20.10", value_parser = values::dns_address)]
    pub dns_address: IpAddr,

    /// The link that carries the DNS server's address
    #[arg(long, default_value = "orlop-dns", value_parser = values::link_name)]
    pub dns_link: String,
}

/// A node that joins a control plane.
#[derive(Clone, Debug, Args)]
pub struct AgentArgs {
    /// Credentials of the node (system:node:NAME)
    #[arg(long)]
    pub kubeconfig: PathBuf,

    /// DNS domain of the cluster
    #[arg(long, default_value = "cluster.local")]
    pub cluster_domain: String,

    /// Pods' addresses of the whole cluster: pods talk to these under their own address, to others under the node's (repeatable)
    #[arg(long = "cluster-cidr")]
    pub cluster_cidrs: Vec<IpNet>,

    /// State of all parts
    #[arg(long, default_value = "/var/lib/orlop")]
    pub data_dir: PathBuf,

    #[command(flatten)]
    pub node: NodeArgs,
}

/// The CRI server alone.
#[derive(Clone, Debug, Args)]
pub struct CriArgs {
    /// Unix socket of both CRI services
    #[arg(long, default_value = "unix:///run/orlop/cri.sock", value_parser = values::endpoint)]
    pub listen: String,

    /// State and images
    #[arg(long, default_value = "/var/lib/orlop")]
    pub data_dir: PathBuf,

    /// Sockets, namespaces and bundles
    #[arg(long, default_value = "/run/orlop")]
    pub run_dir: PathBuf,

    /// CNI configuration
    #[arg(long, default_value = "/etc/cni/net.d")]
    pub cni_conf_dir: PathBuf,

    /// CNI plugins, besides those beside this program
    #[arg(long, default_value = "/opt/cni/bin")]
    pub cni_bin_dir: PathBuf,

    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// Who makes cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CgroupDriver {
    /// The runtime itself
    Cgroupfs,
    /// systemd, on the runtime's request
    Systemd,
}

/// How the CRI server works, wherever it runs.
#[derive(Clone, Debug, Args)]
pub struct RuntimeArgs {
    /// Who makes cgroups; a kubelet asks the CRI server and follows
    #[arg(long, value_enum, default_value = "cgroupfs")]
    pub cgroup_driver: CgroupDriver,

    /// Mirrors and certificates of registries: <DIR>/<host>/hosts.toml, as containerd reads them
    #[arg(long, value_name = "DIR", default_value = "/etc/containerd/certs.d")]
    pub registry_config_dir: PathBuf,

    /// Programs that decide which images may be pulled: every file of this folder, all executable, called as containerd calls its verifiers
    #[arg(long, value_name = "DIR", default_value = "/opt/containerd/image-verifier/bin")]
    pub image_verifier_dir: PathBuf,

    /// Image that the kubelet's garbage collection keeps, by tag or digest (repeatable)
    #[arg(long = "pin-image", value_name = "REFERENCE", value_parser = image_name)]
    pub pinned_images: Vec<String>,

    /// Credentials of registries for pulls that bring none: a docker config.json
    #[arg(long, value_name = "FILE")]
    pub registry_auth_file: Option<PathBuf>,

    /// OCI runtime for pods whose RuntimeClass has this handler: NAME=/PROGRAM [ARGUMENT]..., as runc=/usr/sbin/runc (repeatable)
    #[arg(long = "runtime-handler", value_name = "NAME=PROGRAM")]
    pub runtime_handlers: Vec<orlop_cri::Handler>,

    /// Serve NRI plugins
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub nri: bool,

    /// What NRI plugins connect to
    #[arg(long, value_name = "SOCK", default_value = "/var/run/nri/nri.sock")]
    pub nri_socket: PathBuf,

    /// Programs NN-NAME that are started as NRI plugins
    #[arg(long, value_name = "DIR", default_value = "/opt/nri/plugins")]
    pub nri_plugin_dir: PathBuf,

    /// Configuration of these: NN-NAME.conf or NAME.conf
    #[arg(long, value_name = "DIR", default_value = "/etc/nri/conf.d")]
    pub nri_config_dir: PathBuf,

    /// How long an NRI plugin may take to register once it is connected, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub nri_registration_timeout: u64,

    /// How long an NRI plugin may take for a request, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub nri_request_timeout: u64,

    /// End exec, attach and port-forward sessions on which nothing has moved for this long, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 4 * 3600, value_parser = clap::value_parser!(u64).range(1..))]
    pub streaming_idle_timeout: u64,
}

/// The service load balancer alone, or a look at what is in the kernel.
#[derive(Clone, Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct ProxyArgs {
    #[command(subcommand)]
    pub command: Option<ProxyCommand>,

    /// Credentials with the rights of system:node-proxier
    #[arg(long, required_unless_present = "config")]
    pub kubeconfig: Option<PathBuf>,

    /// kube-proxy's configuration file (KubeProxyConfiguration v1alpha1); flags go before it
    #[arg(long)]
    pub config: Option<PathBuf>,

    /// This node's name [default: the host name]
    #[arg(long)]
    pub node_name: Option<String>,

    #[command(flatten)]
    pub pins: BpfDir,

    /// Serve the processes of this cgroup (version 2) only [default: the root of the hierarchy]
    #[arg(long, value_name = "DIR")]
    pub cgroup: Option<PathBuf>,

    /// Where health checks are answered; "none" for nowhere [default: 0.0.0.0:10256]
    #[arg(long)]
    pub health_address: Option<Address>,

    /// Where metrics are shown; "none" for nowhere [default: 127.0.0.1:10249]
    #[arg(long)]
    pub metrics_address: Option<Address>,

    #[command(flatten)]
    pub datapath: DatapathArgs,
}

#[derive(Clone, Debug, Args)]
pub struct BpfDir {
    /// Pins of programs and maps
    #[arg(long, default_value = "/sys/fs/bpf/orlop")]
    pub bpf_dir: PathBuf,
}

/// What is read from the maps, whether or not a proxy runs.
#[derive(Clone, Debug, Subcommand)]
pub enum ProxyCommand {
    /// Programs, interfaces, sizes and counters
    Status(BpfDir),
    /// Service addresses, with counters
    Services(BpfDir),
    /// Endpoints, and the Services that use them
    Backends(BpfDir),
    /// Connections and sockets that were given an endpoint
    Flows {
        /// Only of Services whose namespace/name:port contains this
        #[arg(long)]
        service: Option<String>,
        #[command(flatten)]
        pins: BpfDir,
    },
    /// What would happen to a new connection
    Trace {
        /// IP:PORT
        to: SocketAddr,
        #[arg(long)]
        udp: bool,
        /// As for a client outside of the node
        #[arg(long)]
        outside: bool,
        #[command(flatten)]
        pins: BpfDir,
    },
    /// Remove all programs, maps and links; the proxy must not run
    Cleanup {
        /// Remove what kube-proxy left as well: its nftables tables, iptables chains and IPVS servers
        #[arg(long)]
        kube_proxy: bool,
        #[command(flatten)]
        pins: BpfDir,
    },
}

/// What `orlop image` does. All but `build` go to the CRI server, which owns the store, when it runs.
#[derive(Clone, Debug, Subcommand)]
pub enum ImageCommand {
    /// Pull an image from its registry
    Pull {
        /// Name of the image, by tag or digest
        reference: String,
        #[command(flatten)]
        cri: CriSocket,
    },
    /// Import an OCI layout or docker archive
    Import {
        /// A tar file, or the folder of an OCI layout
        archive: PathBuf,
        /// Name for an image that has none
        #[arg(long)]
        name: Option<String>,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Write images into an OCI layout archive
    Export {
        /// Names or ids
        #[arg(required = true)]
        references: Vec<String>,
        /// The archive to write
        #[arg(long, short)]
        output: PathBuf,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// List images
    Ls {
        #[command(flatten)]
        cri: CriSocket,
    },
    /// Remove an image with all its names
    Rm {
        /// Name or id of the image
        reference: String,
        #[command(flatten)]
        cri: CriSocket,
    },
    /// Delete what no image and no container needs
    Gc {
        #[command(flatten)]
        store: StoreArgs,
    },
    /// A root file system folder and a configuration -> an OCI archive
    Build {
        /// Folder that becomes the root file system
        rootfs: PathBuf,
        /// The archive to write
        #[arg(long, short)]
        output: PathBuf,
        /// Name and tag of the image
        #[arg(long, short)]
        tag: String,
        /// Program that the container runs (repeatable: one argument each)
        #[arg(long)]
        entrypoint: Vec<String>,
        /// Default arguments (repeatable)
        #[arg(long)]
        cmd: Vec<String>,
        /// Environment (repeatable)
        #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
        env: Vec<String>,
        /// User, numeric or by name
        #[arg(long)]
        user: Option<String>,
        /// Working directory
        #[arg(long)]
        workdir: Option<String>,
    },
}

/// Which store: the CRI server's when it answers, else the folder itself.
#[derive(Clone, Debug, Args)]
pub struct StoreArgs {
    #[command(flatten)]
    pub cri: CriSocket,

    /// The store's folder; given, a CRI server must be that one's [default: /var/lib/orlop/images]
    #[arg(long, value_name = "DIR")]
    pub images_dir: Option<PathBuf>,
}

/// Which CRI server.
#[derive(Clone, Debug, Args)]
pub struct CriSocket {
    /// Unix socket of the CRI server
    #[arg(
        long,
        default_value = "unix:///run/orlop/cri.sock",
        env = "CONTAINER_RUNTIME_ENDPOINT",
        value_parser = values::endpoint
    )]
    pub endpoint: String,
}

/// Where the cluster's state is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StoreKind {
    /// A database of its own in the data folder
    Embedded,
}

/// What the control plane needs to know.
#[derive(Clone, Debug, Args)]
pub struct ServerArgs {
    /// Where the cluster's state is kept
    #[arg(long, value_enum, default_value = "embedded")]
    pub store: StoreKind,

    /// State of all parts
    #[arg(long, default_value = "/var/lib/orlop")]
    pub data_dir: PathBuf,

    /// Address and port of the API server
    #[arg(long, default_value = "0.0.0.0:6443")]
    pub listen: SocketAddr,

    /// Address under which nodes and pods reach the API server [default: that of the default route]
    #[arg(long)]
    pub advertise_address: Option<IpAddr>,

    /// Addresses of Services
    #[arg(long, default_value = "10.96.0.0/12", value_parser = values::service_cidr)]
    pub service_cidr: Ipv4Net,

    /// Addresses of pods; each node gets a /24
    #[arg(long, default_value = "10.244.0.0/16", value_parser = values::cluster_cidr)]
    pub cluster_cidr: IpNet,

    /// DNS domain of the cluster
    #[arg(long, default_value = "cluster.local")]
    pub cluster_domain: String,

    /// Further names and addresses for the serving certificate (repeatable)
    #[arg(long = "tls-san")]
    pub tls_sans: Vec<String>,

    /// Where the administrator's kubeconfig is written
    #[arg(long, default_value = "/etc/orlop/admin.kubeconfig")]
    pub write_kubeconfig: PathBuf,

    /// Apply the manifests of this folder [default: <data-dir>/server/manifests]
    #[arg(long)]
    pub manifests: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(words: &[&str]) -> String {
        let e = Cli::try_parse_from(std::iter::once(&"orlop").chain(words)).unwrap_err();
        on_one_line(&e.render().to_string())
    }

    #[test]
    fn a_mistake_is_one_line_that_names_the_flag() {
        let table: [(&[&str], &[&str]); 12] = [
            (&["bogus"], &["unrecognized subcommand 'bogus'"]),
            (&["up", "--bogus"], &["unexpected argument '--bogus'"]),
            (&["up", "--wait", "abc"], &["'abc'", "--wait"]),
            (&["up", "--node-label", "x"], &["--node-label", "write KEY=VALUE"]),
            (&["up", "--proxy-health-address", "x"], &["--proxy-health-address", "write IP:PORT or none"]),
            (&["up", "--cluster-cidr", "10.0.0.0/28"], &["--cluster-cidr", "each node gets a /24"]),
            (&["up", "--dns-link", "averyveryverylongname"], &["--dns-link", "1 to 15"]),
            (&["cri", "--listen", "tcp://1.2.3.4:5"], &["--listen", "write unix:///PATH"]),
            (&["cri", "--pin-image", "UPPER CASE"], &["--pin-image", "invalid image reference"]),
            (&["image", "ls", "--endpoint", "tcp://1.2.3.4:5"], &["--endpoint", "write unix:///PATH"]),
            (&["image", "pull"], &["required arguments were not provided: <REFERENCE>"]),
            (&["image", "build", "/", "-o", "o", "-t", "t", "--env", "=x"], &["--env", "write KEY=VALUE"]),
        ];
        for (words, parts) in table {
            let line = refusal(words);
            assert!(!line.contains('\n') && !line.contains("Usage"), "{line}");
            assert!(parts.iter().all(|p| line.contains(p)), "{line}");
        }
    }

    #[test]
    fn images_are_pinned_wherever_the_cri_server_runs() {
        let flags =
            ["--pin-image", "pause:3.10", "--pin-image", "quay.io/a@b", "--registry-auth-file", "/a.json"];
        let pinned = |role: &[&str]| {
            let words = [&["orlop"], role, &flags[..2], &flags[4..]].concat();
            match Cli::try_parse_from(words).unwrap().command {
                Command::Cri(a) => a.runtime,
                Command::Agent(a) => a.node.runtime,
                Command::Up(a) => a.node.runtime,
                other => panic!("{other:?}"),
            }
        };
        for role in [&["cri"][..], &["agent", "--kubeconfig", "k"], &["up"]] {
            let runtime = pinned(role);
            assert_eq!(runtime.pinned_images, ["pause:3.10"]);
            assert_eq!(runtime.registry_auth_file.as_deref(), Some(std::path::Path::new("/a.json")));
        }
        assert!(refusal(&[&["cri"], &flags[..]].concat()).contains("quay.io/a@b"));
    }

    #[test]
    fn an_address_may_be_none() {
        assert_eq!("none".parse(), Ok(Address(None)));
        assert_eq!("127.0.0.1:1".parse(), Ok(Address(Some(([127, 0, 0, 1], 1).into()))));
    }
}
