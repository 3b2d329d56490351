//! Limits of a cgroup, written by libcgroups.

use std::path::{Path, PathBuf};

use libcgroups::common::{
    AnyCgroupManager, CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager,
};
use nix29::unistd::Pid;
use oci_spec::runtime::LinuxResources;

use crate::{Error, Kind, convert};

fn error(e: impl std::error::Error) -> Error {
    let text = convert::chain(&e);
    let errno = convert::errno_in_text(&text).unwrap_or(0);
    Error::new(Kind::Runtime, "cgroup", text, errno)
}

pub(crate) fn manager(path: &Path, id: &str, systemd: bool) -> Result<AnyCgroupManager, Error> {
    let config = CgroupConfig {
        cgroup_path: PathBuf::from(path),
        systemd_cgroup: systemd,
        container_name: id.to_owned(),
    };
    create_cgroup_manager(config).map_err(error)
}

pub(crate) fn apply(manager: &AnyCgroupManager, resources: &LinuxResources) -> Result<(), Error> {
    let options =
        ControllerOpt { resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None };
    manager.apply(&options).map_err(error)
}

/// Asks systemd for a scope around the calling process.
pub(crate) fn enter_scope(manager: &AnyCgroupManager) -> Result<(), Error> {
    manager.add_task(Pid::this()).map_err(error)
}
