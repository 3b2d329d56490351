//! Volumes of pods with a user namespace: mounted a second time with owners translated, so that a file of the host's root
//! belongs to the container's root (KEP-127, mount_setattr(2) with `MOUNT_ATTR_IDMAP`).

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;

use orlop_proto::cri;
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::error::{Error, Result};
use crate::mount_setattr::{self, Change};

/// What `mount` asks for, checked against the pod's own mappings; whether it is to be translated.
///
/// # Errors
/// Mappings other than the pod's would give files to ids that the container cannot be, and a mount that shares with the host cannot
/// be in another user namespace.
pub(crate) fn wanted(mount: &cri::Mount, pod: Option<&cri::UserNamespace>) -> Result<bool> {
    if mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty() {
        return Ok(false);
    }
    let at = &mount.container_path;
    let Some(pod) = pod.filter(|u| u.mode() == cri::NamespaceMode::Pod) else {
        return Err(Error::Invalid(format!("mount {at} has id mappings, but the pod has no user namespace")));
    };
    if mount.uid_mappings != pod.uids || mount.gid_mappings != pod.gids {
        return Err(Error::Invalid(format!("mount {at} has other id mappings than its pod")));
    }
    if mount.propagation() == cri::MountPropagation::PropagationBidirectional {
        return Err(Error::Invalid(format!(
            "mount {at} cannot propagate to the host: the pod has a user namespace"
        )));
    }
    Ok(true)
}

/// Mounts `source` at `at`, which is made, with owners as `user_namespace` has them.
///
/// # Errors
/// [`Error::Unsupported`] when the source's file system cannot do that.
pub(crate) fn mount(source: &Path, at: &Path, user_namespace: &Path, slave: bool) -> Result<()> {
    let namespace = File::open(user_namespace).map_err(Error::io("open", user_namespace))?;
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let tree =
        open_tree(CWD, source, flags).map_err(|e| Error::io("clone the mount of", source)(e.into()))?;
    // First of all: what is unmounted below a shared copy would go from the host too.
    let propagation = if slave { libc::MS_SLAVE } else { libc::MS_PRIVATE };
    mount_setattr::set(tree.as_fd(), Change::Propagation(propagation), true)
        .map_err(Error::io("set the propagation of", source))?;
    let change = Change::Idmap(namespace.as_fd());
    // What is mounted below and cannot be translated stays as it is; its files belong to nobody inside.
    mount_setattr::set(tree.as_fd(), change, true)
        .or_else(|_| mount_setattr::set(tree.as_fd(), change, false))
        .map_err(|e| {
            Error::Unsupported(format!(
                "the file system of {} cannot translate owners ({e}); a pod with a user namespace cannot use this volume",
                source.display()
            ))
        })?;
    if source.is_dir() {
        fs::create_dir_all(at).map_err(Error::io("create", at))?;
    } else {
        File::create(at).map_err(Error::io("create", at))?;
    }
    move_mount(&tree, "", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|e| Error::io("mount at", at)(e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_mounts_are_translated() {
        let map = |host_id| vec![cri::IdMapping { host_id, container_id: 0, length: 65536 }];
        let pod = cri::UserNamespace { mode: 0, uids: map(1000), gids: map(1000) };
        let of = |host: Option<u32>, propagation: i32| cri::Mount {
            uid_mappings: host.map(map).unwrap_or_default(),
            gid_mappings: host.map(map).unwrap_or_default(),
            propagation,
            ..Default::default()
        };
        assert!(!wanted(&of(None, 2), Some(&pod)).unwrap());
        assert!(wanted(&of(Some(1000), 1), Some(&pod)).unwrap());
        assert!(wanted(&of(Some(2000), 0), Some(&pod)).is_err());
        assert!(wanted(&of(Some(1000), 2), Some(&pod)).is_err());
        assert!(wanted(&of(Some(1000), 0), None).is_err());
    }
}
