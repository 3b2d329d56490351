//! CRI servers of their own, with everything below a temporary folder.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use orlop_proto::cri;
use orlop_proto::cri::runtime_service_client::RuntimeServiceClient;
use orlop_test_vms::program;
use tonic::transport::{Channel, Endpoint};

use super::{Result, text};

/// One running CRI server. [`Node::end`] takes back its pods, dropping it only the process.
pub struct Node {
    dir: tempfile::TempDir,
    socket: PathBuf,
    cgroup: String,
    child: Child,
    pub runtime: RuntimeServiceClient<Channel>,
}

impl Node {
    /// `orlop cri` with these archives imported.
    pub async fn orlop(archives: &[&Path]) -> Result<Node> {
        let dir = folder("orlop")?;
        let at = |name: &str| dir.path().join(name);
        for archive in archives {
            let mut import = Command::new(program("orlop"));
            run(import.args(["image", "import"]).arg(archive).arg("--images-dir").arg(at("data/images")))?;
        }
        let socket = at("run/cri.sock");
        let mut command = Command::new(program("orlop"));
        command
            .args(["cri", "--listen", &format!("unix://{}", socket.display())])
            .arg("--data-dir")
            .arg(at("data"))
            .arg("--run-dir")
            .arg(at("run"))
            .arg("--cni-conf-dir")
            .arg(at("cni"));
        Node::start(dir, socket, command).await
    }

    async fn start(dir: tempfile::TempDir, socket: PathBuf, mut command: Command) -> Result<Node> {
        let log = File::create(dir.path().join("log")).map_err(text)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut child = command.spawn().map_err(|e| format!("{command:?}: {e}"))?;
        let started = Instant::now();
        let channel = loop {
            let endpoint = Endpoint::try_from(format!("unix://{}", socket.display())).map_err(text)?;
            if let Ok(channel) = endpoint.connect().await
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
        Ok(Node { dir, socket, cgroup, child, runtime: RuntimeServiceClient::new(channel) })
    }

    /// A pod in the node's cgroup, with the machine's network.
    pub fn pod(&self, name: &str) -> cri::PodSandboxConfig {
        let options = cri::NamespaceOption { network: cri::NamespaceMode::Node as i32, ..Default::default() };
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

    /// Removes all pods, then ends the server and takes back what it left in the kernel.
    pub async fn end(mut self) -> Result {
        let list =
            self.runtime.list_pod_sandbox(cri::ListPodSandboxRequest::default()).await.map_err(text)?;
        for pod in list.into_inner().items {
            let pod_sandbox_id = pod.id;
            let stop = cri::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() };
            self.runtime.stop_pod_sandbox(stop).await.map_err(text)?;
            let remove = cri::RemovePodSandboxRequest { pod_sandbox_id };
            self.runtime.remove_pod_sandbox(remove).await.map_err(text)?;
        }
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
        for hierarchy in std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let _ = std::fs::remove_dir(hierarchy.path().join(self.cgroup.trim_start_matches('/')));
        }
    }
}

fn folder(name: &str) -> Result<tempfile::TempDir> {
    tempfile::Builder::new().prefix(&format!("orlop-bench-{name}-")).tempdir_in("/tmp").map_err(text)
}

/// Runs a command that must succeed; gives its standard output.
pub fn run(command: &mut Command) -> Result<String> {
    let out = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if !out.status.success() {
        return Err(format!("{command:?}: {}", String::from_utf8_lossy(&out.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}
