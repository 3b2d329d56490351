//! The mount table of a container.

use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount;
use orlop_proto::cri;

use super::{Input, invalid};
use crate::error::Result;

/// A config mount with its source looked up: a host path free of symbolic links, or an image's mounted content.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Resolved {
    pub source: PathBuf,
    pub destination: PathBuf,
    pub readonly: bool,
    pub recursive_readonly: bool,
    pub propagation: cri::MountPropagation,
}

impl Resolved {
    /// Checks what the CRI asks of a mount, and takes over what does not depend on the source.
    pub fn new(mount: &cri::Mount, source: PathBuf) -> Result<Resolved> {
        if !mount.container_path.starts_with('/') {
            return Err(invalid(format!("mount destination {:?} is not absolute", mount.container_path)));
        }
        if Path::new(&mount.container_path).components().any(|c| c == std::path::Component::ParentDir) {
            return Err(invalid(format!("mount destination {:?} contains ..", mount.container_path)));
        }
        if mount.recursive_read_only {
            // KEP-3857.
            if !mount.readonly {
                return Err(invalid("a recursively read-only mount must also be read-only"));
            }
            if mount.propagation() != cri::MountPropagation::PropagationPrivate {
                return Err(invalid("a recursively read-only mount must have private propagation"));
            }
        }
        Ok(Resolved {
            source,
            destination: mount.container_path.clone().into(),
            readonly: mount.readonly,
            recursive_readonly: mount.recursive_read_only,
            propagation: mount.propagation(),
        })
    }

    fn options(&self) -> Vec<&'static str> {
        let propagation = match self.propagation {
            cri::MountPropagation::PropagationPrivate => "rprivate",
            cri::MountPropagation::PropagationHostToContainer => "rslave",
            cri::MountPropagation::PropagationBidirectional => "rshared",
        };
        let access = match (self.readonly, self.recursive_readonly) {
            (true, true) => "rro",
            (true, false) => "ro",
            _ => "rw",
        };
        vec!["rbind", propagation, access]
    }
}

fn mount(destination: impl Into<PathBuf>, kind: &str, source: impl Into<PathBuf>, options: &[&str]) -> Mount {
    let mut m = Mount::default();
    m.set_destination(destination.into())
        .set_typ(Some(kind.to_owned()))
        .set_source(Some(source.into()))
        .set_options(Some(options.iter().map(|o| (*o).to_owned()).collect()));
    m
}

/// The container's root passes on what its most open mount needs, in the words of the OCI runtime specification.
pub(super) fn rootfs_propagation(mounts: &[Resolved]) -> Option<String> {
    let any = |p| mounts.iter().any(|m| m.propagation == p);
    if any(cri::MountPropagation::PropagationBidirectional) {
        Some("shared".to_owned())
    } else if any(cri::MountPropagation::PropagationHostToContainer) {
        Some("slave".to_owned())
    } else {
        None
    }
}

/// Version 2 is one mount. Of version 1 the runtime would make writable mounts, so each controller's group of the container is bound
/// here, with the access that the container is to have.
fn cgroup_mounts(input: &Input, access: &str, out: &mut Vec<Mount>) {
    const ROOT: &str = "/sys/fs/cgroup";
    if input.facts.cgroup_v2 {
        out.push(mount(ROOT, "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", access]));
        return;
    }
    out.push(mount(ROOT, "tmpfs", "tmpfs", &["nosuid", "noexec", "nodev", "mode=755", "size=64k"]));
    let group = crate::stats::cgroup::host_path(input.cgroups_path);
    for controller in &input.facts.v1_controllers {
        let source = crate::facts::cgroup_dir(false, controller, &group);
        let at = Path::new(ROOT).join(controller);
        out.push(mount(at, "bind", source, &["bind", "nosuid", "noexec", "nodev", "rprivate", access]));
    }
}

/// The kubelet's choice of what is at `destination` replaces ours, and below its /dev or /sys nothing of ours may appear: it would be
/// made in the host's. The pod's shared memory stays the pod's.
fn hides(destination: &Path, ours: &Mount) -> bool {
    let at = ours.destination();
    let whole = destination.starts_with("/dev") || destination.starts_with("/sys");
    at == destination || (whole && at.starts_with(destination) && at != Path::new("/dev/shm"))
}

pub(super) fn mounts(input: &Input, security: &cri::LinuxContainerSecurityContext) -> Result<Vec<Mount>> {
    let access = if security.privileged { "rw" } else { "ro" };
    let mut out = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
    ];
    if input.namespaces.user.is_some() && input.namespaces.net.is_none() {
        // sysfs belongs to the network namespace's owner, which is not this user namespace.
        out.push(mount("/sys", "bind", "/sys", &["rbind", "nosuid", "noexec", "nodev", "ro"]));
    } else {
        out.push(mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", access]));
    }
    cgroup_mounts(input, access, &mut out);
    let private = ["rbind", "rprivate", "rw"];
    out.push(mount("/dev/shm", "bind", &input.files.shm, &private));
    let own_files = [
        ("/etc/resolv.conf", &input.files.resolv_conf),
        ("/etc/hostname", &input.files.hostname),
        ("/etc/hosts", &input.files.hosts),
    ];
    for (at, file) in own_files {
        let access = if security.readonly_rootfs { "ro" } else { "rw" };
        out.push(mount(at, "bind", file, &["rbind", "rprivate", access]));
    }
    out.retain(|ours| !input.mounts.iter().any(|m| hides(&m.destination, ours)));
    for m in input.mounts {
        // Of two for one place the last counts.
        out.retain(|o| o.destination() != &m.destination);
        out.push(mount(&m.destination, "bind", &m.source, &m.options()));
    }
    // A parent before what lies in it; equal depth keeps the order given.
    out.sort_by_key(|m| m.destination().components().count());
    Ok(out)
}
