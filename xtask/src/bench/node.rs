//! CRI servers of their own, ours and containerd, with everything below a temporary folder.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use orlop_proto::cri;
use orlop_proto::cri::image_service_client::ImageServiceClient;
use orlop_proto::cri::runtime_service_client::RuntimeServiceClient;
use orlop_test_vms::program;
use serde_json::json;
use tonic::transport::{Channel, Endpoint};

use super::{Result, process, text};

/// Where Debian puts the reference CNI plugins.
const REFERENCE_PLUGINS: &str = "/usr/lib/cni";
/// The most that one call may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// One running CRI server. [`Node::end`] takes back its pods, dropping it only the process.
pub struct Node {
    dir: tempfile::TempDir,
    cgroup: String,
    child: Child,
    /// The program that lives in every pod.
    shim: &'static str,
    /// Made by a CNI plugin for all pods.
    bridge: Option<String>,
    channel: Channel,
}

/// How a pod reaches the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    Own,
    Host,
}

impl Node {
    /// `orlop cri` with its own network plugin and these archives imported.
    pub async fn orlop(archives: &[&Path]) -> Result<Node> {
        let dir = folder("orlop")?;
        let at = |name: &str| dir.path().join(name);
        for archive in archives {
            let mut import = Command::new(program("orlop"));
            run(import.args(["image", "import"]).arg(archive).arg("--images-dir").arg(at("data/images")))?;
        }
        network_config(
            &at("cni"),
            &json!({"type": "orlop-cni", "mtu": 1500, "capabilities": {"ips": true, "mac": true},
                "ipam": {"ranges": [subnet(0)], "dataDir": at("addresses")}}),
        )?;
        let socket = at("run/cri.sock");
        let mut command = Command::new(program("orlop"));
        command
            .args(["cri", "--listen", &format!("unix://{}", socket.display())])
            .arg("--data-dir")
            .arg(at("data"))
            .arg("--run-dir")
            .arg(at("run"))
            .arg("--cni-conf-dir")
            .arg(at("cni"))
            .arg("--nri-socket")
            .arg(at("nri.sock"));
        Node::start(dir, &socket, command, "orlop-monitor", None).await
    }

    /// Debian's containerd with runc and the reference plugins; `None` when these are not installed. `sandbox_image` must be in the
    /// first archive.
    pub async fn containerd(
        archives: &[&Path],
        sandbox_image: &str,
        registry: Option<&str>,
    ) -> Result<Option<Node>> {
        let there = |program: &str| Command::new(program).arg("--version").output().is_ok();
        if !there("containerd") || !there("runc") || !Path::new(REFERENCE_PLUGINS).join("bridge").exists() {
            eprintln!("bench: no counterpart; apt-get install containerd runc containernetworking-plugins");
            return Ok(None);
        }
        let dir = folder("containerd")?;
        let at = |name: &str| dir.path().join(name);
        let bridge = format!("orlb{}", std::process::id() % 100_000);
        network_config(
            &at("cni"),
            &json!({"type": "bridge", "bridge": bridge, "isGateway": true,
                "ipam": {"type": "host-local", "dataDir": at("addresses"), "ranges": [[{"subnet": subnet(1)}]]}}),
        )?;
        if let Some(registry) = registry {
            let hosts = at("certs").join(registry);
            std::fs::create_dir_all(&hosts).map_err(text)?;
            std::fs::write(hosts.join("hosts.toml"), format!("server = \"http://{registry}\""))
                .map_err(text)?;
        }
        let socket = at("sock");
        // Without CAP_SYS_RESOURCE a score cannot be lowered.
        let config = format!(
            r#"version = 2
root = {:?}
state = {:?}
[grpc]
address = {socket:?}
[plugins."io.containerd.internal.v1.opt"]
path = {:?}
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = {sandbox_image:?}
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = {REFERENCE_PLUGINS:?}
conf_dir = {:?}
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = {:?}
"#,
            at("root"),
            at("state"),
            at("opt"),
            at("cni"),
            at("certs")
        );
        std::fs::write(at("config.toml"), config).map_err(text)?;
        let mut command = Command::new("containerd");
        command.arg("-c").arg(at("config.toml"));
        let node = Node::start(dir, &socket, command, "containerd-shim-runc-v2", Some(bridge)).await?;
        for archive in archives {
            let mut import = Command::new("ctr");
            run(import
                .arg("--address")
                .arg(&socket)
                .args(["-n", "k8s.io", "images", "import"])
                .arg(archive))?;
        }
        Ok(Some(node))
    }

    async fn start(
        dir: tempfile::TempDir,
        socket: &Path,
        mut command: Command,
        shim: &'static str,
        bridge: Option<String>,
    ) -> Result<Node> {
        let log = File::create(dir.path().join("log")).map_err(text)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut child = command.spawn().map_err(|e| format!("{command:?}: {e}"))?;
        let started = Instant::now();
        let channel = loop {
            let endpoint = Endpoint::try_from(format!("unix://{}", socket.display())).map_err(text)?;
            if let Ok(channel) = endpoint.timeout(PATIENCE).connect().await
                && RuntimeServiceClient::new(channel.clone())
                    .version(cri::VersionRequest::default())
                    .await
                    .is_ok()
            {
                break channel;
            }
            let ended = child.try_wait().map_err(text)?;
            if ended.is_some() || started.elapsed() > Duration::from_secs(30) {
                let _ = child.kill();
                let _ = child.wait();
                let log = std::fs::read_to_string(dir.path().join("log")).unwrap_or_default();
                return Err(format!("{command:?} does not answer: {log}"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        let cgroup = format!("/{}", dir.path().file_name().unwrap_or_default().to_string_lossy());
        Ok(Node { dir, cgroup, child, shim, bridge, channel })
    }

    pub fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone())
    }

    pub fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
    }

    /// The server's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The processes that live in the pods besides containers.
    pub fn shims(&self) -> Vec<u32> {
        process::find(self.shim, self.dir.path())
    }

    /// A pod in the node's cgroup.
    pub fn pod(&self, name: &str, network: Network) -> cri::PodSandboxConfig {
        let mode = match network {
            Network::Own => cri::NamespaceMode::Pod,
            Network::Host => cri::NamespaceMode::Node,
        };
        let options = cri::NamespaceOption {
            network: mode as i32,
            pid: cri::NamespaceMode::Container as i32,
            ..Default::default()
        };
        cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: name.to_owned(),
                uid: name.to_owned(),
                namespace: "bench".to_owned(),
                attempt: 0,
            }),
            log_directory: self.dir.path().join("logs").join(name).to_string_lossy().into_owned(),
            linux: Some(cri::LinuxPodSandboxConfig {
                cgroup_parent: self.cgroup.clone(),
                security_context: Some(cri::LinuxSandboxSecurityContext {
                    namespace_options: Some(options),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// Stops and removes one pod.
    pub async fn remove_pod(&self, id: &str) -> Result {
        let mut runtime = self.runtime();
        let stop = cri::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        runtime.stop_pod_sandbox(stop).await.map_err(text)?;
        let remove = cri::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        runtime.remove_pod_sandbox(remove).await.map_err(text)?;
        Ok(())
    }

    /// Removes all pods.
    pub async fn end(&self) -> Result {
        let list = self.runtime().list_pod_sandbox(cri::ListPodSandboxRequest::default()).await;
        for pod in list.map_err(text)?.into_inner().items {
            self.remove_pod(&pod.id).await?;
        }
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Asked to end, it unmounts its run folder, which nobody could delete otherwise.
        process::end(&mut self.child);
        if let Some(bridge) = &self.bridge {
            // Not there when no pod had a network.
            let _ = Command::new("ip").args(["link", "del", bridge]).output();
        }
        for hierarchy in std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let _ = std::fs::remove_dir(hierarchy.path().join(self.cgroup.trim_start_matches('/')));
        }
    }
}

fn folder(name: &str) -> Result<tempfile::TempDir> {
    tempfile::Builder::new().prefix(&format!("orlop-bench-{name}-")).tempdir_in("/tmp").map_err(text)
}

/// Address ranges that differ between benches that run at the same time.
fn subnet(number: u32) -> String {
    format!("10.{}.{}.0/24", 220 + std::process::id() / 128 % 30, (std::process::id() % 128) * 2 + number)
}

fn network_config(dir: &Path, plugin: &serde_json::Value) -> Result {
    std::fs::create_dir_all(dir).map_err(text)?;
    let list = json!({"cniVersion": "1.0.0", "name": "bench", "plugins": [plugin]});
    std::fs::write(dir.join("10-bench.conflist"), list.to_string()).map_err(text)
}

/// Builds an archive of an image with busybox as `sleep` and `true`; it sleeps when nothing else is asked for.
pub fn busybox_image(dir: &Path, name: &str) -> Result<PathBuf> {
    let rootfs = dir.join("rootfs");
    let bin = rootfs.join("bin");
    std::fs::create_dir_all(&bin).map_err(text)?;
    std::fs::copy("/bin/busybox", bin.join("busybox"))
        .map_err(|e| format!("/bin/busybox: {e}; apt-get install busybox-static"))?;
    for applet in ["sleep", "true"] {
        std::fs::hard_link(bin.join("busybox"), bin.join(applet)).map_err(text)?;
    }
    let archive = dir.join("busybox.tar");
    let mut build = Command::new(program("orlop"));
    build.args(["image", "build", "--tag", name, "--entrypoint", "/bin/sleep", "--cmd", "2147483647"]);
    run(build.arg(&rootfs).arg("--output").arg(&archive))?;
    Ok(archive)
}

/// Runs a command that must succeed; gives its standard output.
pub fn run(command: &mut Command) -> Result<String> {
    let out = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if !out.status.success() {
        return Err(format!("{command:?}: {}", String::from_utf8_lossy(&out.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}
