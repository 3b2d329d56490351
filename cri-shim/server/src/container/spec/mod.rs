//! From what the kubelet, the image and the pod say to an OCI runtime spec. A pure function: every fact it needs about the
//! machine or the image's files is in its input.

pub(crate) mod capabilities;
pub(crate) mod devices;
pub(crate) mod mounts;
pub(crate) mod process;
pub(crate) mod resources;
pub(crate) mod seccomp;
pub(crate) mod user;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::{
    Linux, LinuxIdMapping, LinuxIdMappingBuilder, LinuxNamespace, LinuxNamespaceType, LinuxSeccomp, Root,
    Spec,
};
use orlop_proto::cri;

use crate::config::CgroupDriver;
use crate::error::{Error, Result};
use crate::facts::Facts;
use crate::selinux::label::Labels;
use crate::store::records::User;

/// Where the pod's namespaces are pinned. `None` is the host's.
#[derive(Clone, Debug, Default)]
pub(crate) struct Namespaces {
    pub net: Option<PathBuf>,
    pub ipc: Option<PathBuf>,
    pub uts: Option<PathBuf>,
    pub pid: PidNamespace,
    pub user: Option<PathBuf>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum PidNamespace {
    /// One of its own.
    #[default]
    Own,
    Host,
    /// The pod's, or another container's.
    Join(PathBuf),
}

/// Files of the sandbox that containers see.
#[derive(Clone, Debug)]
pub(crate) struct SandboxFiles {
    pub resolv_conf: PathBuf,
    pub hostname: PathBuf,
    pub hosts: PathBuf,
    pub shm: PathBuf,
}

/// Everything a spec depends on.
pub(crate) struct Input<'a> {
    pub sandbox_id: &'a str,
    pub config: &'a cri::ContainerConfig,
    pub sandbox: &'a cri::PodSandboxConfig,
    pub image: &'a ImageConfiguration,
    pub rootfs: &'a Path,
    pub namespaces: Namespaces,
    pub files: SandboxFiles,
    pub hostname: &'a str,
    pub user: &'a User,
    /// Config mounts with host paths resolved.
    pub mounts: &'a [mounts::Resolved],
    /// Config devices, or the host's for a privileged container.
    pub devices: &'a [devices::Found],
    pub cgroups_path: &'a str,
    /// The contents of a localhost profile, when one is asked for.
    pub localhost_seccomp: Option<LinuxSeccomp>,
    /// A profile that the kernel has.
    pub apparmor: Option<String>,
    pub selinux: &'a Labels,
    pub facts: &'a Facts,
}

/// The security context, or its defaults.
pub(crate) fn security(config: &cri::ContainerConfig) -> cri::LinuxContainerSecurityContext {
    config.linux.as_ref().and_then(|l| l.security_context.clone()).unwrap_or_default()
}

/// OCI `linux.cgroupsPath` of a container, or of the pod's init (OCI runtime spec, config-linux, "Cgroups Path").
pub(crate) fn cgroups_path(driver: CgroupDriver, parent: &str, default_parent: &str, id: &str) -> String {
    let parent = if parent.is_empty() { default_parent } else { parent };
    match driver {
        CgroupDriver::Cgroupfs => format!("{}/{id}", parent.trim_end_matches('/')),
        CgroupDriver::Systemd => {
            // The kubelet hands over the slice's whole path; its last element is the unit.
            let slice = parent.rsplit('/').next().filter(|s| s.ends_with(".slice")).unwrap_or("system.slice");
            format!("{slice}:orlop:{id}")
        }
    }
}

/// The spec of a container.
pub(crate) fn generate(input: &Input) -> Result<Spec> {
    let security = security(input.config);
    let linux = linux(input, &security)?;
    let mut root = Root::default();
    root.set_path(input.rootfs.to_owned()).set_readonly(Some(security.readonly_rootfs));
    let mut spec = Spec::default();
    spec.set_version("1.2.0".to_owned())
        .set_root(Some(root))
        .set_process(Some(process::process(input, &security)?))
        .set_mounts(Some(mounts::mounts(input, &security)?))
        .set_annotations(Some(annotations(input)))
        .set_linux(Some(linux));
    // The UTS namespace is the pod's and has its hostname already; a host one must not be changed.
    spec.set_hostname(None);
    Ok(spec)
}

fn annotations(input: &Input) -> HashMap<String, String> {
    let meta = input.sandbox.metadata.clone().unwrap_or_default();
    let name = input.config.metadata.as_ref().map(|m| m.name.clone()).unwrap_or_default();
    // The names that tools around CRI runtimes look for.
    let own = [
        ("io.kubernetes.cri.container-type", "container".to_owned()),
        ("io.kubernetes.cri.sandbox-id", input.sandbox_id.to_owned()),
        ("io.kubernetes.cri.sandbox-name", meta.name),
        ("io.kubernetes.cri.sandbox-namespace", meta.namespace),
        ("io.kubernetes.cri.sandbox-uid", meta.uid),
        ("io.kubernetes.cri.container-name", name),
    ];
    own.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
}

fn namespace(kind: LinuxNamespaceType, path: Option<&PathBuf>) -> LinuxNamespace {
    let mut ns = LinuxNamespace::default();
    ns.set_typ(kind).set_path(path.cloned());
    ns
}

fn namespaces(n: &Namespaces, facts: &Facts) -> Vec<LinuxNamespace> {
    let mut out = vec![namespace(LinuxNamespaceType::Mount, None)];
    let joined = [
        (LinuxNamespaceType::User, &n.user),
        (LinuxNamespaceType::Network, &n.net),
        (LinuxNamespaceType::Ipc, &n.ipc),
        (LinuxNamespaceType::Uts, &n.uts),
    ];
    for (kind, path) in joined {
        if path.is_some() {
            out.push(namespace(kind, path.as_ref()));
        }
    }
    match &n.pid {
        PidNamespace::Own => out.push(namespace(LinuxNamespaceType::Pid, None)),
        PidNamespace::Join(path) => out.push(namespace(LinuxNamespaceType::Pid, Some(path))),
        PidNamespace::Host => {}
    }
    // On the unified hierarchy a container sees its own group as the root; on v1 the mounts are bound to it instead.
    if facts.cgroup_v2 {
        out.push(namespace(LinuxNamespaceType::Cgroup, None));
    }
    out
}

/// The CRI's user namespace mappings in OCI form.
fn id_mappings(maps: &[cri::IdMapping]) -> Result<Vec<LinuxIdMapping>> {
    maps.iter()
        .map(|m| {
            LinuxIdMappingBuilder::default()
                .host_id(m.host_id)
                .container_id(m.container_id)
                .size(m.length)
                .build()
                .map_err(|e| invalid(format!("id mapping: {e}")))
        })
        .collect()
}

/// Hides what a container should not see, unless the pod has a user namespace, where `procMount: Unmasked` sends empty lists
/// (the API allows it only there). Elsewhere empty lists mean that a simple client did not fill them in.
fn path_lists(security: &cri::LinuxContainerSecurityContext, userns: bool) -> (Vec<String>, Vec<String>) {
    const MASKED: [&str; 12] = [
        "/proc/asound",
        "/proc/acpi",
        "/proc/interrupts",
        "/proc/kcore",
        "/proc/keys",
        "/proc/latency_stats",
        "/proc/timer_list",
        "/proc/timer_stats",
        "/proc/sched_debug",
        "/proc/scsi",
        "/sys/firmware",
        "/sys/devices/virtual/powercap",
    ];
    const READONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
    if security.privileged {
        return (Vec::new(), Vec::new());
    }
    if security.masked_paths.is_empty() && security.readonly_paths.is_empty() && !userns {
        return (MASKED.map(str::to_owned).to_vec(), READONLY.map(str::to_owned).to_vec());
    }
    (security.masked_paths.clone(), security.readonly_paths.clone())
}

fn linux(input: &Input, security: &cri::LinuxContainerSecurityContext) -> Result<Linux> {
    let mut linux = Linux::default();
    let given = input.config.linux.as_ref().and_then(|l| l.resources.clone()).unwrap_or_default();
    let mut resources = resources::resources(&given, input.facts)?;
    let rules = devices::cgroup_rules(input.devices, security.privileged);
    resources.set_devices(Some(rules));
    let (masked, readonly) = path_lists(security, input.namespaces.user.is_some());
    linux
        .set_namespaces(Some(namespaces(&input.namespaces, input.facts)))
        .set_cgroups_path(Some(PathBuf::from(input.cgroups_path)))
        .set_resources(Some(resources))
        .set_devices(Some(input.devices.iter().map(|d| d.device.clone()).collect()))
        .set_masked_paths(Some(masked))
        .set_readonly_paths(Some(readonly))
        .set_rootfs_propagation(mounts::rootfs_propagation(input.mounts))
        .set_mount_label(label(&input.selinux.mount))
        .set_sysctl(None)
        .set_seccomp(seccomp::choose(input, security)?);
    if let Some(userns) = crate::store::records::namespaces(input.sandbox).userns_options
        && userns.mode() == cri::NamespaceMode::Pod
    {
        linux
            .set_uid_mappings(Some(id_mappings(&userns.uids)?))
            .set_gid_mappings(Some(id_mappings(&userns.gids)?));
    }
    Ok(linux)
}

fn label(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

/// Shorthand for what a client asked for and cannot have.
pub(crate) fn invalid(text: impl Into<String>) -> Error {
    Error::Invalid(text.into())
}
