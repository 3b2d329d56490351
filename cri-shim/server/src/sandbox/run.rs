//! RunPodSandbox: a monitor, namespaces, network. Whatever fails, all of it is taken back.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use orlop_base::failpoint;
use orlop_nri::Held;
use orlop_proto::{cri, monitor as proto};

use crate::config::{CgroupDriver, OciRuntime};
use crate::container::spec::cgroups_path;
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::network::{netns_path, resolv_conf};
use crate::runtime::{Runtime, new_id, now_ns};
use crate::store::names::sandbox_name;
use crate::store::records::namespaces;
use crate::store::{SANDBOX_RECORD, Sandbox, SandboxPhase, SandboxRecord};
use crate::{mounts, store};

/// The size that Docker and containerd give /dev/shm.
const SHM_BYTES: u64 = 64 << 20;
/// The longest hostname the kernel takes.
const MAX_HOSTNAME: usize = 64;

/// The pod's own hostname, or the node's for host-network pods.
pub(crate) fn hostname(config: &cri::PodSandboxConfig) -> String {
    if !config.hostname.is_empty() {
        return config.hostname.clone();
    }
    let node = || nix::unistd::gethostname().map(|h| h.to_string_lossy().into_owned()).unwrap_or_default();
    if namespaces(config).network() == cri::NamespaceMode::Node {
        return node();
    }
    config.metadata.as_ref().map(|m| m.name.chars().take(MAX_HOSTNAME - 1).collect()).unwrap_or_else(node)
}

type Runtimes = BTreeMap<String, OciRuntime>;

fn check_handler(config: &cri::PodSandboxConfig, handler: &str, runtimes: &Runtimes) -> Result<()> {
    if matches!(handler, "" | crate::status::RUNTIME) {
        return Ok(());
    }
    let Some(runtime) = runtimes.get(handler) else {
        let mut known = vec![crate::status::RUNTIME];
        known.extend(runtimes.keys().map(String::as_str));
        return Err(Error::Invalid(format!(
            "runtime handler {handler:?} is not known; this node has {known:?} (--runtime-handler adds one)"
        )));
    };
    if !runtime.program.exists() {
        let program = runtime.program.display();
        return Err(Error::Invalid(format!("runtime handler {handler:?}: {program} is missing; install it")));
    }
    let users = namespaces(config).userns_options;
    if users.is_some_and(|u| u.mode() == cri::NamespaceMode::Pod) {
        return Err(Error::Invalid(format!(
            "runtime handler {handler:?} does not offer user namespaces; set hostUsers or another RuntimeClass"
        )));
    }
    Ok(())
}

fn check(
    config: &cri::PodSandboxConfig,
    handler: &str,
    runtimes: &Runtimes,
) -> Result<cri::PodSandboxMetadata> {
    let Some(meta) = config.metadata.clone() else {
        return Err(Error::Invalid("the sandbox config has no metadata".into()));
    };
    if meta.name.is_empty() || meta.uid.is_empty() && meta.namespace.is_empty() {
        return Err(Error::Invalid("the sandbox's metadata needs a name, and a namespace or uid".into()));
    }
    check_handler(config, handler, runtimes)?;
    if config.hostname.len() > MAX_HOSTNAME {
        return Err(Error::Invalid(format!("hostname {:?} is longer than {MAX_HOSTNAME}", config.hostname)));
    }
    let ns = namespaces(config);
    for (what, mode) in [("network", ns.network()), ("ipc", ns.ipc())] {
        if !matches!(mode, cri::NamespaceMode::Pod | cri::NamespaceMode::Node) {
            return Err(Error::Invalid(format!(
                "{what} namespace mode {mode:?} makes no sense for a sandbox"
            )));
        }
    }
    check_user_namespace(&ns)?;
    for (name, value) in config.linux.iter().flat_map(|l| &l.sysctls) {
        // One line is one value; what follows would be for somebody else to misread (CVE-2022-0811).
        if value.contains(['\n', '\0']) {
            return Err(Error::Invalid(format!("the value {value:?} of sysctl {name} is not one line")));
        }
        let host_net = ns.network() == cri::NamespaceMode::Node && name.starts_with("net.");
        let host_ipc = ns.ipc() == cri::NamespaceMode::Node
            && (name.starts_with("kernel.") || name.starts_with("fs.mqueue."));
        if host_net || host_ipc {
            return Err(Error::Invalid(format!(
                "sysctl {name} would change the node's: the pod shares that namespace"
            )));
        }
        if name.contains("..") || name.starts_with('/') {
            return Err(Error::Invalid(format!("sysctl name {name:?} is not valid")));
        }
    }
    Ok(meta)
}

/// One range that begins with root, as the kubelet hands out and upstream runtimes take (KEP-127).
fn check_user_namespace(ns: &cri::NamespaceOption) -> Result<()> {
    let Some(user) = &ns.userns_options else { return Ok(()) };
    let refuse = |what: String| Err(Error::Invalid(format!("user namespace: {what}")));
    match user.mode() {
        cri::NamespaceMode::Node if user.uids.is_empty() && user.gids.is_empty() => return Ok(()),
        cri::NamespaceMode::Node => return refuse("mode NODE takes no mappings".into()),
        cri::NamespaceMode::Pod => {}
        other => return refuse(format!("mode {other:?} makes no sense for a sandbox")),
    }
    if ns.network() == cri::NamespaceMode::Node {
        return refuse("a pod on the host's network cannot have one".into());
    }
    for (what, maps) in [("uid", &user.uids), ("gid", &user.gids)] {
        let [map] = maps.as_slice() else {
            return refuse(format!("exactly one {what} mapping is supported, not {}", maps.len()));
        };
        if map.container_id != 0 || map.length == 0 || map.host_id.checked_add(map.length).is_none() {
            return refuse(format!(
                "the {what} mapping must map a range that begins with 0, not {} from {}",
                map.length, map.container_id
            ));
        }
    }
    if user.uids != user.gids {
        return refuse("uid and gid mappings must be the same".into());
    }
    Ok(())
}

/// Only root enters the folder, and the root of the pod's user namespace, who mounts what lies in it.
fn protect(dir: &Path, user_namespace: Option<&orlop_images::UserNamespace>) -> Result<()> {
    let group = user_namespace.and_then(|u| u.gids.first()).map(|m| m.host);
    if let Some(group) = group {
        std::os::unix::fs::chown(dir, None, Some(group)).map_err(Error::io("set the group of", dir))?;
    }
    let mode = if group.is_some() { 0o710 } else { 0o700 };
    fs::set_permissions(dir, fs::Permissions::from_mode(mode)).map_err(Error::io("set the mode of", dir))
}

impl Runtime {
    pub async fn run_pod_sandbox(
        self: &Arc<Self>,
        request: cri::RunPodSandboxRequest,
    ) -> Result<cri::RunPodSandboxResponse> {
        let config = request.config.unwrap_or_default();
        let meta = check(&config, &request.runtime_handler, &self.config.runtimes)?;
        let id = new_id();
        self.store.names.reserve(&sandbox_name(&meta), &id)?;
        let selinux = self.sandbox_labels(&config, &id).inspect_err(|_| self.store.names.release(&id))?;
        let record = SandboxRecord {
            id: id.clone(),
            phase: SandboxPhase::Creating,
            config: store::Encoded(config),
            runtime_handler: request.runtime_handler,
            created_at_ns: now_ns(),
            ips: Vec::new(),
            network_attached: false,
            init_pid: 0,
            stopped: false,
            selinux,
        };
        let this = self.clone();
        self.detached(async move {
            match this.make_sandbox(record).await {
                Ok((sandbox, told)) => {
                    this.store.add_sandbox(sandbox.clone());
                    drop(told);
                    this.watch(sandbox.clone(), None);
                    this.emit_sandbox(&sandbox, cri::ContainerEventType::ContainerCreatedEvent);
                    this.emit_sandbox(&sandbox, cri::ContainerEventType::ContainerStartedEvent);
                    tracing::info!(sandbox = %id, pod = %sandbox_name(&sandbox.record().metadata()), "pod sandbox runs");
                    Ok(cri::RunPodSandboxResponse { pod_sandbox_id: id })
                }
                Err(e) => {
                    // One that could not be taken back stays known, under its name.
                    if this.store.sandbox(&id).is_err() {
                        this.store.names.release(&id);
                    }
                    Err(e)
                }
            }
        })
        .await
    }

    /// Builds the sandbox, or takes back what there is of it. What cannot be taken back now (a network plugin may fail DEL too)
    /// shows as a sandbox that is not ready, for the kubelet to stop and remove; else each try would leave one more behind.
    async fn make_sandbox(&self, record: SandboxRecord) -> Result<(Arc<Sandbox>, Held)> {
        let state_dir = self.config.sandbox_state_dir(&record.id);
        let run_dir = self.config.sandbox_run_dir(&record.id);
        let sandbox = Sandbox::new(record, state_dir.join(SANDBOX_RECORD), Monitor::at(run_dir.clone()));
        let built = async {
            self.sandbox_folders.place(&state_dir, &*sandbox.record())?;
            fs::create_dir_all(&run_dir).map_err(Error::io("create", &run_dir))?;
            for dir in [&state_dir, &run_dir] {
                protect(dir, sandbox.record().user_namespace().as_ref())?;
            }
            self.build_sandbox(&sandbox, &state_dir, &run_dir).await
        }
        .await;
        let e = match built {
            Ok(told) => return Ok((sandbox, told)),
            Err(e) => e,
        };
        if let Err(again) = self.tear_down(&sandbox).await {
            tracing::warn!(sandbox = %sandbox.id, error = %again, "could not take back all of a failed sandbox; stopping it tries again");
            self.store.note_sandbox(&sandbox, |r| r.phase = SandboxPhase::NotReady);
            self.store.add_sandbox(sandbox);
            return Err(e);
        }
        self.plugins_see_sandbox_undone(&sandbox).await;
        if let Err(again) = mounts::remove_tree(&state_dir) {
            tracing::warn!(sandbox = %sandbox.id, error = %again, "could not delete a failed sandbox's state");
        }
        Err(e)
    }

    async fn build_sandbox(&self, sandbox: &Arc<Sandbox>, state_dir: &Path, run_dir: &Path) -> Result<Held> {
        let record = sandbox.record();
        let config = &*record.config;
        let ns = record.namespaces();
        let hostname = hostname(config);
        write_files(config, &hostname, state_dir)?;
        if !config.log_directory.is_empty() {
            let dir = Path::new(&config.log_directory);
            fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        }
        failpoint::pass("run-sandbox-before-monitor")?;
        self.monitors.start(run_dir.to_owned()).await?;
        failpoint::pass("run-sandbox-before-namespaces")?;
        let created = sandbox.monitor.create_sandbox(self.sandbox_request(&record, &hostname)).await?;
        if ns.ipc() != cri::NamespaceMode::Node {
            let root = record.user_namespace().map_or(0, |u| u.uids.first().map_or(0, |m| m.host));
            mounts::mount_shm(&run_dir.join("shm"), SHM_BYTES, root, &record.selinux.mount)?;
        }
        let own_network = ns.network() != cri::NamespaceMode::Node;
        let mut ips = Vec::new();
        if own_network {
            sandbox.update(|r| r.network_attached = true)?;
            failpoint::pass("run-sandbox-before-network")?;
            ips = self.network.attach(&record, netns_path(run_dir)).await?;
        }
        // Until it is among those that a new plugin is told of.
        let told = self.plugins.hold().await;
        self.plugins_see_run(sandbox, &ips, created.init_pid).await?;
        failpoint::pass("run-sandbox-before-ready")?;
        sandbox.update(|r| {
            r.phase = SandboxPhase::Ready;
            r.created_at_ns = now_ns();
            r.ips = ips;
            r.init_pid = created.init_pid;
        })?;
        sandbox.keep_copy()?;
        Ok(told)
    }

    fn sandbox_request(&self, record: &SandboxRecord, hostname: &str) -> proto::CreateSandbox {
        let ns = record.namespaces();
        let pod = |mode: cri::NamespaceMode| mode == cri::NamespaceMode::Pod;
        let own_network = pod(ns.network());
        let linux = record.config.linux.clone().unwrap_or_default();
        let maps = |list: &[cri::IdMapping]| {
            list.iter()
                .map(|m| proto::IdMap { container_id: m.container_id, host_id: m.host_id, size: m.length })
                .collect::<Vec<_>>()
        };
        let userns = ns.userns_options.clone().filter(|u| pod(u.mode())).unwrap_or_default();
        let parent = linux.cgroup_parent.as_str();
        let path =
            cgroups_path(self.config.cgroup_driver, parent, &self.config.default_cgroup_parent, &record.id);
        proto::CreateSandbox {
            sandbox_id: record.id.clone(),
            hostname: if own_network { hostname.to_owned() } else { String::new() },
            new_net: own_network,
            new_ipc: pod(ns.ipc()),
            // A host-network pod has the node's name.
            new_uts: own_network,
            shared_pid: pod(ns.pid()),
            uid_map: maps(&userns.uids),
            gid_map: maps(&userns.gids),
            sysctls: linux.sysctls.clone(),
            cgroup_path: path,
            oom_score_adj: SANDBOX_OOM_SCORE_ADJ.max(self.facts.least_oom_score_adj),
            systemd_cgroup: self.config.cgroup_driver == CgroupDriver::Systemd,
        }
    }

    /// Ends the monitor and whatever it holds, detaches the network, removes the run folder. Idempotent, also for a sandbox
    /// of which only a part was made.
    pub async fn tear_down(&self, sandbox: &Sandbox) -> Result<()> {
        let run_dir = self.config.sandbox_run_dir(&sandbox.id);
        self.detach(sandbox).await?;
        if run_dir.join("monitor.sock").exists() {
            let ended = async {
                sandbox.monitor.destroy_sandbox().await?;
                sandbox.monitor.shutdown().await
            }
            .await;
            match ended {
                Ok(()) => {}
                // It is dead, or hangs. What it left is taken away below.
                Err(e) if e.is_silence() => sandbox.monitor.end().await?,
                Err(e) => return Err(e.into()),
            }
        }
        self.end_leftovers(sandbox).await?;
        mounts::remove_tree(&run_dir)
    }

    /// Takes the pod off the network, once.
    pub async fn detach(&self, sandbox: &Sandbox) -> Result<()> {
        let record = sandbox.record();
        if record.network_attached {
            self.network.detach(&record, netns_path(&self.config.sandbox_run_dir(&sandbox.id))).await?;
            self.store.note_sandbox(sandbox, |r| r.network_attached = false);
        }
        Ok(())
    }
}

/// What the kubelet gives to a pod's infrastructure.
const SANDBOX_OOM_SCORE_ADJ: i32 = -998;

fn write_files(config: &cri::PodSandboxConfig, hostname: &str, dir: &Path) -> Result<()> {
    let host = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let resolv = resolv_conf(config.dns_config.as_ref(), &host("/etc/resolv.conf"));
    let files =
        [("resolv.conf", resolv), ("hostname", format!("{hostname}\n")), ("hosts", host("/etc/hosts"))];
    for (name, text) in files {
        let path = dir.join(name);
        // Nobody reads it before the pod's first container is made.
        let file = File::options().write(true).create(true).truncate(true).mode(0o644).open(&path);
        let written = file.and_then(|mut f| f.write_all(text.as_bytes()));
        written.map_err(Error::io("write", &path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(config: &cri::PodSandboxConfig, handler: &str) -> Result<cri::PodSandboxMetadata> {
        let runtime = |program: &str| OciRuntime { program: program.into(), args: Vec::new() };
        let runtimes =
            [("there".to_owned(), runtime("/proc/self/exe")), ("gone".to_owned(), runtime("/nonexistent"))];
        super::check(config, handler, &runtimes.into())
    }

    fn config(change: impl FnOnce(&mut cri::PodSandboxConfig)) -> cri::PodSandboxConfig {
        let mut c = cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: "a".into(),
                namespace: "b".into(),
                ..Default::default()
            }),
            linux: Some(Default::default()),
            ..Default::default()
        };
        change(&mut c);
        c
    }

    fn host_network(c: &mut cri::PodSandboxConfig) {
        let options = cri::NamespaceOption { network: cri::NamespaceMode::Node as i32, ..Default::default() };
        c.linux.as_mut().unwrap().security_context =
            Some(cri::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() });
    }

    #[test]
    fn configs() {
        let sysctl = |c: &mut cri::PodSandboxConfig, name: &str| {
            c.linux.as_mut().unwrap().sysctls.insert(name.into(), "1".into());
        };
        assert!(check(&config(|_| {}), "").is_ok());
        let unknown = check(&config(|_| {}), "kata").unwrap_err().to_string();
        assert!(unknown.contains("\"kata\"") && unknown.contains("\"there\""), "{unknown}");
        assert!(check(&config(|_| {}), "there").is_ok());
        assert!(check(&config(|_| {}), "gone").unwrap_err().to_string().contains("install it"));
        assert!(check(&config(|c| c.metadata = None), "").is_err());
        assert!(check(&config(|c| c.hostname = "h".repeat(65)), "").is_err());
        assert!(check(&config(|c| sysctl(c, "net.ipv4.ip_forward")), "").is_ok());
        assert!(check(&config(|c| sysctl(c, "../x")), "").is_err());
        let shared = config(|c| {
            host_network(c);
            sysctl(c, "net.ipv4.ip_forward");
        });
        assert!(check(&shared, "").is_err());
    }

    #[test]
    fn user_namespaces() {
        use cri::NamespaceMode::{Container, Node, Pod, Target};
        let one = |container_id, host_id, length| cri::IdMapping { container_id, host_id, length };
        let ok = |mode: cri::NamespaceMode, maps: &[cri::IdMapping]| {
            let user = cri::UserNamespace { mode: mode as i32, uids: maps.to_vec(), gids: maps.to_vec() };
            check_user_namespace(&cri::NamespaceOption { userns_options: Some(user), ..Default::default() })
                .is_ok()
        };
        let good = one(0, 1000, 65536);
        assert!(ok(Pod, &[good]) && ok(Node, &[]));
        for (mode, maps) in [
            (Pod, vec![]),
            (Pod, vec![good, one(0, 9000, 5)]),
            (Pod, vec![one(1, 1000, 5)]),
            (Pod, vec![one(0, 1000, 0)]),
            (Pod, vec![one(0, u32::MAX, 2)]),
            (Node, vec![good]),
            (Container, vec![]),
            (Target, vec![]),
        ] {
            assert!(!ok(mode, &maps), "{mode:?} {maps:?}");
        }
    }

    #[test]
    fn a_pod_without_a_hostname_is_called_by_its_name() {
        assert_eq!(hostname(&config(|_| {})), "a");
        assert_eq!(hostname(&config(|c| c.hostname = "h".into())), "h");
    }
}
