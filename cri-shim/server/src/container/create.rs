//! CreateContainer: root file system, spec, and the OCI "create" in the pod's monitor. Whatever fails, all of it is taken back.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::image::ImageConfiguration;
use orlop_base::failpoint;
use orlop_images::{Image, RootfsOptions};
use orlop_nri::api::Event;
use orlop_proto::{cri, monitor as proto};

use super::spec::mounts::Resolved;
use super::spec::{
    self, Input, Namespaces, PidNamespace, SandboxFiles, cgroups_path, devices, seccomp, security, user,
};
use super::{cdi, log, signal};
use crate::config::CgroupDriver;
use crate::error::{Error, Result};
use crate::idmap;
use crate::mounts::{self, Propagation};
use crate::runtime::{Runtime, new_id, now_ns};
use crate::selinux;
use crate::store::names::container_name;
use crate::store::{CONTAINER_RECORD, Container, ContainerPhase, ContainerRecord, Encoded, Sandbox};

/// The pod's own files, which each of its containers sees.
pub(crate) const SANDBOX_FILES: [&str; 3] = ["resolv.conf", "hostname", "hosts"];

/// What is known of the image's own config without the rest of it.
fn image_user(image: &ImageConfiguration) -> String {
    image.config().as_ref().and_then(|c| c.user().clone()).unwrap_or_default()
}

/// A reference by digest where there is one: what the kubelet shows as imageID.
pub(crate) fn image_ref(image: &Image) -> String {
    image.repo_digests.first().unwrap_or(&image.id).clone()
}

/// A log path that stays below the pod's log directory.
fn log_path(sandbox: &cri::PodSandboxConfig, config: &cri::ContainerConfig) -> Result<String> {
    if sandbox.log_directory.is_empty() || config.log_path.is_empty() {
        return Ok(String::new());
    }
    let below = Path::new(&config.log_path);
    if below
        .components()
        .any(|c| !matches!(c, std::path::Component::Normal(_) | std::path::Component::CurDir))
    {
        return Err(Error::Invalid(format!(
            "log path {:?} leads out of the pod's log directory",
            config.log_path
        )));
    }
    Ok(Path::new(&sandbox.log_directory).join(below).to_string_lossy().into_owned())
}

impl Runtime {
    pub async fn create_container(
        self: &Arc<Self>,
        request: cri::CreateContainerRequest,
    ) -> Result<cri::CreateContainerResponse> {
        let sandbox = self.store.sandbox(&request.pod_sandbox_id)?;
        let config = request.config.unwrap_or_default();
        let meta = config
            .metadata
            .clone()
            .filter(|m| !m.name.is_empty())
            .ok_or_else(|| Error::Invalid("the container config has no name".into()))?;
        let wanted = config.image.as_ref().map(|i| i.image.clone()).unwrap_or_default();
        let image = self.images.get(&wanted).ok_or(Error::NoImage(wanted))?;
        let pod = sandbox.record();
        let id = new_id();
        let parent = pod.config.linux.as_ref().map(|l| l.cgroup_parent.clone()).unwrap_or_default();
        let stop_signal = signal::stop_signal(&config, &image.config)?;
        let record = ContainerRecord {
            id: id.clone(),
            sandbox_id: sandbox.id.clone(),
            phase: ContainerPhase::Creating,
            resources: Encoded(config.linux.as_ref().and_then(|l| l.resources.clone()).unwrap_or_default()),
            image_id: image.id.clone(),
            image_ref: image_ref(&image),
            log_path: log_path(&pod.config, &config)?,
            cgroups_path: cgroups_path(
                self.config.cgroup_driver,
                &parent,
                &self.config.default_cgroup_parent,
                &id,
            ),
            user: Default::default(),
            stop_signal,
            image_volumes: Vec::new(),
            selinux: self.container_labels(&config, &pod.selinux)?,
            pid: 0,
            created_at_ns: now_ns(),
            started_at_ns: 0,
            finished_at_ns: 0,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            start_unanswered: false,
            config: Encoded(config),
        };
        self.store.names.reserve(&container_name(&meta, &pod.metadata()), &id)?;
        let this = self.clone();
        self.detached(async move {
            // Against a stop of the sandbox in the middle.
            let _held = sandbox.op.lock().await;
            match this.make_container(&sandbox, record, &image).await {
                Ok(container) => {
                    this.emit(&container, cri::ContainerEventType::ContainerCreatedEvent);
                    Ok(cri::CreateContainerResponse { container_id: id })
                }
                Err(e) => {
                    this.store.names.release(&id);
                    Err(e)
                }
            }
        })
        .await
    }

    async fn make_container(
        &self,
        sandbox: &Arc<Sandbox>,
        record: ContainerRecord,
        image: &Image,
    ) -> Result<Arc<Container>> {
        sandbox.ready("create a container in it")?;
        let state_dir = self.config.container_state_dir(&record.id);
        let container = Container::new(record, state_dir.join(CONTAINER_RECORD));
        let built = async {
            self.container_folders.place(&state_dir, &*container.record())?;
            self.build_container(sandbox, &container, image).await
        }
        .await;
        if let Err(e) = built {
            self.plugins_see_container_undone(&container).await;
            if let Err(again) = self.take_back(&container, Some(sandbox)).await {
                tracing::warn!(container = %container.id, error = %again, "could not take back all of a failed container; the next start will");
            }
            return Err(e);
        }
        Ok(container)
    }

    async fn build_container(
        &self,
        sandbox: &Arc<Sandbox>,
        container: &Arc<Container>,
        image: &Image,
    ) -> Result<()> {
        let bundle = self.config.bundle_dir(&sandbox.id, &container.id);
        let rootfs = bundle.join("rootfs");
        fs::create_dir_all(&rootfs).map_err(Error::io("create", &rootfs))?;
        failpoint::pass("create-container-before-rootfs")?;
        // Always with a writable layer: mount points must be made in it; the spec makes it read-only afterwards.
        let mut options = RootfsOptions {
            mount_points: true,
            user_namespace: sandbox.record().user_namespace(),
            ..RootfsOptions::default()
        };
        let label = &container.record().selinux.mount;
        if !label.is_empty() {
            options.extra.push(("context".to_owned(), label.clone()));
        }
        self.images.prepare_rootfs(&container.id, image, &rootfs, &options).await?;
        let record = container.record();
        let mut volumes = self
            .mount_image_volumes(container, &bundle, &options)
            .await
            .map_err(|e| Error::ImageVolume(Box::new(e)))?;
        self.relabel(sandbox, &record).await?;
        self.mount_translated(sandbox, &record, &bundle, &mut volumes)?;
        let apparmor = self.apparmor_profile(&record.config).await?;
        let mut spec = self.spec(sandbox, &record, image, &rootfs, &volumes, apparmor)?;
        let runtime = self.oci_runtime(&sandbox.record().runtime_handler)?;
        if runtime.is_some() {
            // crun before 1.9 refuses all but 1.0; runtimes that know more do not look at the version.
            spec.0.set_version("1.0.2".to_owned());
        }
        // Until it is among those that a new plugin is told of.
        let told = self.plugins.hold().await;
        let adjusted = self.adjust(sandbox, container, &mut spec.0, &spec.1, runtime.is_none()).await?;
        if let Some(adjusted) = &adjusted {
            container.update(|r| {
                r.resources = Encoded(adjusted.resources.clone());
                if let Some(path) = &adjusted.cgroups_path {
                    r.cgroups_path.clone_from(path);
                }
            })?;
        }
        let path = bundle.join("config.json");
        let text =
            serde_json::to_vec(&spec.0).map_err(|e| Error::Internal(format!("cannot write a spec: {e}")))?;
        fs::write(&path, text).map_err(Error::io("write", &path))?;
        failpoint::pass("create-container-before-create")?;
        let config = &*record.config;
        let log_path = log::prepare(&sandbox.record().config.log_directory, config, &record.log_path)?;
        let pid = sandbox
            .monitor
            .create_container(proto::CreateContainer {
                container_id: container.id.clone(),
                bundle: bundle.to_string_lossy().into_owned(),
                log_path: log_path.to_string_lossy().into_owned(),
                stdin: config.stdin,
                stdin_once: config.stdin_once,
                tty: config.tty,
                systemd_cgroup: self.config.cgroup_driver == CgroupDriver::Systemd,
                log_line_limit: 0,
                runtime,
            })
            .await
            .map_err(|e| match &adjusted {
                Some(adjusted) => adjusted.context(e.into()),
                None => e.into(),
            })?;
        failpoint::pass("create-container-before-record")?;
        // Before the record says so, for the monitor's events find it by id.
        container.update(|r| {
            r.phase = ContainerPhase::Created;
            r.pid = pid;
            r.user = spec.1;
            r.created_at_ns = now_ns();
        })?;
        container.keep_copy()?;
        self.store.add_container(container.clone());
        drop(told);
        self.plugins_see(container, Event::PostCreateContainer).await;
        Ok(())
    }

    /// What runs containers of a handler; `None` is the monitor itself.
    fn oci_runtime(&self, handler: &str) -> Result<Option<proto::OciRuntime>> {
        if matches!(handler, "" | crate::status::RUNTIME) {
            return Ok(None);
        }
        let Some(runtime) = self.config.runtimes.get(handler) else {
            return Err(Error::Invalid(format!(
                "the pod's runtime handler {handler:?} is not known any more; start the server with it again"
            )));
        };
        let program = runtime.program.to_string_lossy().into_owned();
        Ok(Some(proto::OciRuntime { program, args: runtime.args.clone() }))
    }

    /// Mounts each image volume and returns the content's place by the index of its mount (KEP-4639).
    async fn mount_image_volumes(
        &self,
        container: &Container,
        bundle: &Path,
        options: &RootfsOptions,
    ) -> Result<Vec<Volume>> {
        let record = container.record();
        let mut out = Vec::with_capacity(record.config.mounts.len());
        for (i, mount) in record.config.mounts.iter().enumerate() {
            let Some(wanted) = mount.image.as_ref().filter(|s| !s.image.is_empty()) else {
                out.push(Volume::Host);
                continue;
            };
            let image = self.images.get(&wanted.image).ok_or_else(|| Error::NoImage(wanted.image.clone()))?;
            let key = format!("{}-volume{i}", container.id);
            let target = bundle.join(format!("volume{i}"));
            fs::create_dir_all(&target).map_err(Error::io("create", &target))?;
            container.update(|r| r.image_volumes.push(key.clone()))?;
            self.images.mount_image(&key, &image, &target, options).await?;
            out.push(Volume::Image(inside(&target, &mount.image_sub_path)?));
        }
        Ok(out)
    }

    /// Gives the container's SELinux label to the pod's own files and to the volumes that are to have it.
    async fn relabel(&self, sandbox: &Sandbox, record: &ContainerRecord) -> Result<()> {
        if record.selinux.mount.is_empty() {
            return Ok(());
        }
        let own = self.config.sandbox_state_dir(&sandbox.id);
        let files: Vec<PathBuf> = SANDBOX_FILES.iter().map(|name| own.join(name)).collect();
        let wanted = record.config.mounts.iter().filter(|m| m.selinux_relabel && !m.host_path.is_empty());
        let volumes = wanted.map(host_source).collect::<Result<Vec<_>>>()?;
        let label = record.selinux.mount.clone();
        // A volume may be large.
        let done = tokio::task::spawn_blocking(move || {
            files.iter().try_for_each(|f| selinux::label_file(f, &label))?;
            volumes.iter().try_for_each(|v| selinux::relabel(v, &label))
        });
        done.await.map_err(|e| Error::Internal(format!("setting labels ended: {e}")))?
    }

    /// Mounts the volumes whose owners are to be those of the pod's user namespace.
    fn mount_translated(
        &self,
        sandbox: &Sandbox,
        record: &ContainerRecord,
        bundle: &Path,
        volumes: &mut [Volume],
    ) -> Result<()> {
        let namespaces = sandbox.record().namespaces();
        for (i, (mount, volume)) in record.config.mounts.iter().zip(volumes).enumerate() {
            if !matches!(volume, Volume::Host) || !idmap::wanted(mount, namespaces.userns_options.as_ref())? {
                continue;
            }
            let resolved = Resolved::new(mount, host_source(mount)?)?;
            check_propagation(&resolved)?;
            let at = bundle.join(format!("translated{i}"));
            let slave = resolved.propagation == cri::MountPropagation::PropagationHostToContainer;
            let user = self.config.sandbox_run_dir(&sandbox.id).join("ns/user");
            idmap::mount(&resolved.source, &at, &user, slave)?;
            *volume = Volume::Translated(at);
        }
        Ok(())
    }

    fn spec(
        &self,
        sandbox: &Sandbox,
        record: &ContainerRecord,
        image: &Image,
        rootfs: &Path,
        volumes: &[Volume],
        apparmor: Option<String>,
    ) -> Result<(oci_spec::runtime::Spec, crate::store::records::User)> {
        let config = &*record.config;
        let pod = sandbox.record();
        let security = security(config);
        let run_dir = self.config.sandbox_run_dir(&sandbox.id);
        let state_dir = self.config.sandbox_state_dir(&sandbox.id);
        let accounts = user::Accounts::read(rootfs)?;
        let user = user::resolve(&security, &image_user(&image.config), &accounts)?;
        let mounts = self.resolve_mounts(config, volumes)?;
        let mut found = if security.privileged { devices::of_host()? } else { Vec::new() };
        found.extend(devices::requested(&config.devices)?);
        let host_ipc = pod.namespaces().ipc() == cri::NamespaceMode::Node;
        let hostname = crate::sandbox_hostname(&pod.config);
        let mut spec = spec::generate(&Input {
            sandbox_id: &sandbox.id,
            config,
            sandbox: &pod.config,
            image: &image.config,
            rootfs,
            namespaces: self.namespaces(&pod, &security, &run_dir)?,
            files: SandboxFiles {
                resolv_conf: state_dir.join(SANDBOX_FILES[0]),
                hostname: state_dir.join(SANDBOX_FILES[1]),
                hosts: state_dir.join(SANDBOX_FILES[2]),
                shm: if host_ipc { "/dev/shm".into() } else { run_dir.join("shm") },
            },
            hostname: &hostname,
            user: &user,
            mounts: &mounts,
            devices: &found,
            cgroups_path: &record.cgroups_path,
            localhost_seccomp: seccomp::read_localhost(&security, &self.config.seccomp_profile_root)?,
            apparmor,
            selinux: &record.selinux,
            facts: &self.facts,
        })?;
        cdi::inject(&mut spec, &cdi::requested(config)?, &self.config.cdi_spec_dirs)?;
        Ok((spec, user))
    }

    fn namespaces(
        &self,
        pod: &crate::store::SandboxRecord,
        security: &cri::LinuxContainerSecurityContext,
        run_dir: &Path,
    ) -> Result<Namespaces> {
        let sandbox = pod.namespaces();
        // The container may only differ in the PID namespace.
        let own = security.namespace_options.clone().unwrap_or_else(|| sandbox.clone());
        let pin = |name: &str| run_dir.join("ns").join(name);
        let node = cri::NamespaceMode::Node;
        let own_network = sandbox.network() != node;
        let pid = match own.pid() {
            cri::NamespaceMode::Container => PidNamespace::Own,
            cri::NamespaceMode::Node => PidNamespace::Host,
            cri::NamespaceMode::Pod if sandbox.pid() == cri::NamespaceMode::Pod => {
                PidNamespace::Join(pin("pid"))
            }
            // The pod has no shared one to join.
            cri::NamespaceMode::Pod if sandbox.pid() == node => PidNamespace::Host,
            cri::NamespaceMode::Pod => PidNamespace::Own,
            cri::NamespaceMode::Target => {
                let target = self.store.container(&own.target_id)?.record();
                if target.sandbox_id != pod.id {
                    return Err(Error::Invalid(format!(
                        "target container {} is in another pod",
                        own.target_id
                    )));
                }
                if target.phase != ContainerPhase::Running || target.pid == 0 {
                    return Err(Error::WrongState {
                        what: "container",
                        id: target.id.clone(),
                        state: target.phase.name(),
                        wanted: "share its PID namespace",
                    });
                }
                PidNamespace::Join(format!("/proc/{}/ns/pid", target.pid).into())
            }
        };
        let userns = sandbox.userns_options.as_ref().is_some_and(|u| u.mode() == cri::NamespaceMode::Pod);
        Ok(Namespaces {
            net: own_network.then(|| pin("net")),
            ipc: (sandbox.ipc() != node).then(|| pin("ipc")),
            uts: own_network.then(|| pin("uts")),
            pid,
            user: userns.then(|| pin("user")),
        })
    }

    fn resolve_mounts(&self, config: &cri::ContainerConfig, volumes: &[Volume]) -> Result<Vec<Resolved>> {
        let mut out = Vec::with_capacity(config.mounts.len());
        for (i, mount) in config.mounts.iter().enumerate() {
            match volumes.get(i) {
                Some(Volume::Image(place)) => {
                    let readonly = cri::Mount { readonly: true, ..mount.clone() };
                    out.push(Resolved::new(&readonly, place.clone())?);
                }
                Some(Volume::Translated(place)) => out.push(Resolved::new(mount, place.clone())?),
                _ => {
                    let resolved = Resolved::new(mount, host_source(mount)?)?;
                    check_propagation(&resolved)?;
                    check_proc(&resolved)?;
                    out.push(resolved);
                }
            }
        }
        Ok(out)
    }
}

/// Where a mount's content lies.
enum Volume {
    /// At the host path that the mount names.
    Host,
    /// Mounted for this container: an image, or a part of it.
    Image(PathBuf),
    /// Mounted for this container: the host path with owners translated.
    Translated(PathBuf),
}

/// The host path free of symbolic links.
fn host_source(mount: &cri::Mount) -> Result<PathBuf> {
    let host = Path::new(&mount.host_path);
    if !host.is_absolute() {
        return Err(Error::Invalid(format!("mount source {:?} is not absolute", mount.host_path)));
    }
    // As runtimes before us: a host path that is missing becomes a folder.
    match fs::symlink_metadata(host) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            fs::create_dir_all(host).map_err(Error::io("create", host))?;
        }
        other => drop(other),
    }
    fs::canonicalize(host).map_err(Error::io("find mount source", host))
}

/// Propagation that the host's mount cannot give is an error, not silence.
fn check_propagation(mount: &Resolved) -> Result<()> {
    let needs_shared = match mount.propagation {
        cri::MountPropagation::PropagationPrivate => return Ok(()),
        cri::MountPropagation::PropagationHostToContainer => false,
        cri::MountPropagation::PropagationBidirectional => true,
    };
    let has = mounts::propagation_of(&mount.source);
    if has == Propagation::Shared || (!needs_shared && has == Propagation::Slave) {
        return Ok(());
    }
    let kind = if needs_shared { "shared" } else { "shared or slave" };
    Err(Error::Invalid(format!(
        "{} is not on a {kind} mount, which its mount propagation needs; run `mount --make-rshared` on it",
        mount.source.display()
    )))
}

/// What may lie over a file of the container's own /proc: files that tools like lxcfs fill in.
const PROC_FILES: [&str; 9] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/net/dev",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
];

/// A runtime writes confinement through /proc; a volume there would receive it instead (CVE-2019-16884).
fn check_proc(mount: &Resolved) -> Result<()> {
    let at = &mount.destination;
    if !at.starts_with("/proc") || PROC_FILES.iter().any(|f| at == Path::new(f)) {
        return Ok(());
    }
    let is_proc = || rustix::fs::statfs(&mount.source).is_ok_and(|s| s.f_type == libc::PROC_SUPER_MAGIC);
    if at == Path::new("/proc") && is_proc() {
        return Ok(());
    }
    Err(Error::Invalid(format!("a mount at {} would hide the container's own /proc", at.display())))
}

/// `sub` below `root`, without leaving it through links or dots.
fn inside(root: &Path, sub: &str) -> Result<PathBuf> {
    if sub.is_empty() {
        return Ok(root.to_owned());
    }
    let bad = |why: &str| Error::Invalid(format!("image sub path {sub:?} {why}"));
    let below = Path::new(sub);
    if below.is_absolute() || below.components().any(|c| c == std::path::Component::ParentDir) {
        return Err(bad("leads out of the image"));
    }
    let joined = root.join(below);
    let real = fs::canonicalize(&joined).map_err(|_| bad("is not in the image"))?;
    // The run folder's own path may lead through links.
    if !real.starts_with(fs::canonicalize(root).map_err(Error::io("look up", root))?) {
        return Err(bad("leads out of the image"));
    }
    Ok(real)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_paths_stay_in_the_pods_folder() {
        let sandbox = cri::PodSandboxConfig { log_directory: "/var/log/pods/x".into(), ..Default::default() };
        for (path, want) in [
            ("c/0.log", Some("/var/log/pods/x/c/0.log")),
            ("", Some("")),
            ("../0.log", None),
            ("/etc/shadow", None),
        ] {
            let config = cri::ContainerConfig { log_path: path.into(), ..Default::default() };
            assert_eq!(log_path(&sandbox, &config).ok().as_deref(), want, "{path}");
        }
        assert_eq!(
            log_path(
                &Default::default(),
                &cri::ContainerConfig { log_path: "x".into(), ..Default::default() }
            )
            .unwrap(),
            ""
        );
    }

    #[test]
    fn sub_paths_stay_in_the_image() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        fs::create_dir(root.join("a")).unwrap();
        std::os::unix::fs::symlink("/etc", root.join("out")).unwrap();
        assert_eq!(inside(&root, "a").unwrap(), root.join("a"));
        let linked = dir.path().join("linked");
        std::os::unix::fs::symlink(&root, &linked).unwrap();
        assert_eq!(inside(&linked, "a").unwrap(), root.join("a"));
        for bad in ["../x", "/a", "out", "missing"] {
            assert!(inside(&root, bad).is_err() && inside(&linked, bad).is_err(), "{bad}");
        }
    }
}
