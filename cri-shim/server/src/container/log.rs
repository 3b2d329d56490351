//! ReopenContainerLog: the kubelet has renamed the file.

use std::fs;
use std::path::{Component, Path, PathBuf};

use orlop_proto::cri;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::runtime::Runtime;
use crate::store::ContainerPhase;

/// Makes the folders above the log file and returns the file's path with every symbolic link of the pod's log directory itself
/// resolved. Below that directory no link is followed: a container that has it as a volume could have put one there. The
/// monitor follows no link at all when it opens the path.
pub(super) fn prepare(directory: &str, config: &cri::ContainerConfig, path: &str) -> Result<PathBuf> {
    if path.is_empty() {
        return Ok(PathBuf::new());
    }
    let directory = Path::new(directory);
    fs::create_dir_all(directory).map_err(Error::io("create", directory))?;
    let mut at = fs::canonicalize(directory).map_err(Error::io("find", directory))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut folder =
        rustix::fs::openat(CWD, &at, flags, Mode::empty()).map_err(|e| Error::io("open", &at)(e.into()))?;
    let names: Vec<_> =
        Path::new(&config.log_path).components().filter(|c| matches!(c, Component::Normal(_))).collect();
    let Some((file, above)) = names.split_last() else { return Ok(PathBuf::new()) };
    for name in above {
        at.push(name);
        match rustix::fs::mkdirat(&folder, name.as_os_str(), Mode::from(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(Error::io("create", &at)(e.into())),
        }
        folder =
            rustix::fs::openat(&folder, name.as_os_str(), flags, Mode::empty()).map_err(|e| match e {
                Errno::LOOP | Errno::NOTDIR => {
                    Error::Invalid(format!("log folder {} is a link or no folder", at.display()))
                }
                e => Error::io("open", &at)(e.into()),
            })?;
    }
    at.push(file);
    if fs::symlink_metadata(&at).is_ok_and(|m| !m.is_file()) {
        return Err(Error::Invalid(format!("log {} is a link or no file", at.display())));
    }
    Ok(at)
}

impl Runtime {
    pub async fn reopen_container_log(
        &self,
        request: cri::ReopenContainerLogRequest,
    ) -> Result<cri::ReopenContainerLogResponse> {
        let container = self.store.container(&request.container_id)?;
        container.in_phase(&[ContainerPhase::Running], "reopen its log")?;
        self.store.sandbox(&container.sandbox_id)?.monitor.reopen_log(&container.id).await?;
        Ok(cri::ReopenContainerLogResponse {})
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_below_the_log_directory_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        fs::create_dir(base.join("real")).unwrap();
        fs::create_dir(base.join("elsewhere")).unwrap();
        symlink("real", base.join("pods")).unwrap();
        symlink("../elsewhere", base.join("real/linked")).unwrap();
        symlink("../elsewhere/file", base.join("real/0.log")).unwrap();
        let directory = base.join("pods");
        let of = |log_path: &str| {
            let config = cri::ContainerConfig { log_path: log_path.into(), ..Default::default() };
            prepare(directory.to_str().unwrap(), &config, "set")
        };
        assert_eq!(of("c/d/0.log").unwrap(), base.join("real/c/d/0.log"));
        assert!(base.join("real/c/d").is_dir());
        for bad in ["linked/0.log", "linked/more/0.log", "0.log", "c"] {
            assert!(of(bad).is_err(), "{bad}");
        }
        assert_eq!(fs::read_dir(base.join("elsewhere")).unwrap().count(), 0);
    }
}
