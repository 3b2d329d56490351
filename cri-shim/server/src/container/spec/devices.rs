//! Device nodes: which the container gets, and what its cgroup allows.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};
use orlop_proto::cri;

use super::invalid;
use crate::error::{Error, Result};

/// A node found on the host.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Found {
    pub device: LinuxDevice,
    /// Of `rwm`.
    pub access: String,
}

pub(crate) fn node(host: &Path, container: PathBuf) -> Result<Option<LinuxDevice>> {
    let meta = fs::metadata(host).map_err(Error::io("look at device", host))?;
    let kind = match meta.file_type() {
        t if t.is_block_device() => LinuxDeviceType::B,
        t if t.is_char_device() => LinuxDeviceType::C,
        _ => return Ok(None),
    };
    let (major, minor) = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
    let mut device = LinuxDevice::default();
    device
        .set_path(container)
        .set_typ(kind)
        .set_major(i64::from(major))
        .set_minor(i64::from(minor))
        .set_file_mode(Some(meta.mode() & 0o7777))
        .set_uid(Some(meta.uid()))
        .set_gid(Some(meta.gid()));
    Ok(Some(device))
}

/// Nodes of a folder and what lies below it.
fn walk(dir: &Path, skip: &[&str], each: &mut impl FnMut(&Path) -> Result<()>) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))?.flatten() {
        let path = entry.path();
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            if !skip.iter().any(|s| entry.file_name() == **s) {
                walk(&path, skip, each)?;
            }
        } else if kind.is_block_device() || kind.is_char_device() {
            each(&path)?;
        }
    }
    Ok(())
}

/// The devices a container names; a folder stands for all nodes in it.
pub(crate) fn requested(devices: &[cri::Device]) -> Result<Vec<Found>> {
    let mut out = Vec::new();
    for d in devices {
        let access = if d.permissions.is_empty() { "rwm".to_owned() } else { d.permissions.clone() };
        if access.chars().any(|c| !"rwm".contains(c)) {
            return Err(invalid(format!("device permissions {access:?} are not of r, w and m")));
        }
        let host =
            fs::canonicalize(&d.host_path).map_err(Error::io("find device", Path::new(&d.host_path)))?;
        let container = Path::new(if d.container_path.is_empty() { &d.host_path } else { &d.container_path });
        if host.is_dir() {
            walk(&host, &[], &mut |path| {
                let below = path.strip_prefix(&host).unwrap_or(path);
                if let Some(device) = node(path, container.join(below))? {
                    out.push(Found { device, access: access.clone() });
                }
                Ok(())
            })?;
        } else {
            let device = node(&host, container.to_owned())?
                .ok_or_else(|| invalid(format!("{} is no device", d.host_path)))?;
            out.push(Found { device, access });
        }
    }
    Ok(out)
}

/// All of the host's, for a privileged container, less those every container has of its own.
pub(crate) fn of_host() -> Result<Vec<Found>> {
    const OWN: [&str; 8] = ["null", "zero", "full", "random", "urandom", "tty", "console", "ptmx"];
    let mut out = Vec::new();
    walk(Path::new("/dev"), &["pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts"], &mut |path| {
        if path.parent() == Some(Path::new("/dev")) && OWN.iter().any(|o| path.ends_with(o)) {
            return Ok(());
        }
        // A node may vanish between listing and looking.
        if let Ok(Some(device)) = node(path, path.to_owned()) {
            out.push(Found { device, access: "rwm".to_owned() });
        }
        Ok(())
    })?;
    Ok(out)
}

fn rule(
    allow: bool,
    kind: LinuxDeviceType,
    major: Option<i64>,
    minor: Option<i64>,
    access: &str,
) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(allow)
        .set_typ(Some(kind))
        .set_major(major)
        .set_minor(minor)
        .set_access(Some(access.to_owned()));
    rule
}

/// Deny all, then allow what is there; the runtime adds the nodes that every container has.
pub(super) fn cgroup_rules(devices: &[Found], privileged: bool) -> Vec<LinuxDeviceCgroup> {
    if privileged {
        return vec![rule(true, LinuxDeviceType::A, None, None, "rwm")];
    }
    let mut rules = vec![rule(false, LinuxDeviceType::A, None, None, "rwm")];
    for d in devices {
        rules.push(rule(true, d.device.typ(), Some(d.device.major()), Some(d.device.minor()), &d.access));
    }
    rules
}
