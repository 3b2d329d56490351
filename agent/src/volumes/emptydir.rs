//! emptyDir volumes: a folder, or a tmpfs for medium Memory.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use k8s_openapi::api::core::v1::EmptyDirVolumeSource;
use nix::mount::{MsFlags, mount};
use orlop_api::quantity::Amount;

use super::{Error, mounts};

/// Makes a folder with exactly this mode, whatever the umask.
pub fn make_dir(path: &Path, mode: u32) -> Result<(), Error> {
    if !path.is_dir() {
        fs::create_dir_all(path).map_err(Error::io("create", path))?;
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
            .map_err(Error::io("set the mode of", path))?;
    }
    Ok(())
}

/// Mounts a tmpfs unless one is mounted there; `size` in bytes.
pub fn mount_tmpfs(path: &Path, size: Option<i64>) -> Result<(), Error> {
    if mounts::is_mount_point(path)? {
        return Ok(());
    }
    let mut options = String::from("mode=0777");
    if let Some(s) = size {
        options.push_str(&format!(",size={s}"));
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), path, Some("tmpfs"), flags, Some(options.as_str()))
        .map_err(|e| Error::io("mount a tmpfs at", path)(e.into()))
}

/// Makes the volume; content of an earlier call stays.
pub fn set_up(path: &Path, e: &EmptyDirVolumeSource, group: Option<u32>) -> Result<(), Error> {
    let fresh = !path.is_dir();
    make_dir(path, 0o777)?;
    match e.medium.as_deref().unwrap_or("") {
        "" => {}
        "Memory" => {
            let limit = e.size_limit.as_ref().and_then(|q| Amount::try_from(q).ok()).map(Amount::units);
            mount_tmpfs(path, limit.filter(|l| *l > 0))?;
        }
        other => return Err(Error::Unsupported(format!("emptyDir with medium {other}"))),
    }
    if let (Some(g), true) = (group, fresh) {
        std::os::unix::fs::chown(path, None, Some(g)).map_err(Error::io("change the group of", path))?;
        // New files inherit the group.
        fs::set_permissions(path, fs::Permissions::from_mode(0o2777))
            .map_err(Error::io("set the mode of", path))?;
    }
    Ok(())
}
