//! Takes back what the agent leaves on a node: volumes, logs, cgroups. Only folders that the agent itself made are
//! deleted, so that a purge on a machine with another kubelet costs it nothing.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

use crate::config::Config;
use crate::error::Error;
use crate::pods::checkpoint;

/// Lies in a folder that was missing or empty when the agent first started.
const MARK: &str = ".made-by-orlop";

fn folders(config: &Config) -> [&PathBuf; 3] {
    [&config.root_dir, &config.pod_logs_dir, &config.container_logs_dir]
}

/// Makes the agent's folders and marks those that nobody else uses.
pub fn claim(config: &Config) -> Result<(), Error> {
    for dir in folders(config) {
        let fresh = fs::read_dir(dir).map(|mut d| d.next().is_none()).unwrap_or(true);
        // The serving certificate is put there before the agent starts.
        let only_pki = fs::read_dir(dir).is_ok_and(|d| d.flatten().all(|e| e.path() == config.cert_dir));
        fs::create_dir_all(dir).map_err(|source| Error::io("create", dir, source))?;
        if fresh || only_pki {
            let mark = dir.join(MARK);
            fs::write(&mark, b"").map_err(|source| Error::io("write", &mark, source))?;
        }
    }
    Ok(())
}

/// Mount points at or below `dir`, deepest first.
fn mounts_below(dir: &Path, mountinfo: &str) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = mountinfo
        .lines()
        .filter_map(|l| l.split(' ').nth(4))
        .map(|p| PathBuf::from(unescape(p)))
        .filter(|p| p.starts_with(dir))
        .collect();
    all.reverse();
    all
}

/// The kernel writes blanks and the like as octal escapes.
fn unescape(p: &str) -> String {
    p.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

/// Unmounts what is mounted at or below a folder, and deletes it.
fn remove(dir: &Path, mountinfo: &str) -> Result<(), Error> {
    for m in mounts_below(dir, mountinfo) {
        umount2(&m, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            .map_err(|e| Error::io("unmount", &m, e.into()))?;
    }
    fs::remove_dir_all(dir).map_err(|source| Error::io("remove", dir, source))
}

/// Removes the agent's folders and the `kubepods` cgroups. The pods must have been removed before, over CRI.
pub async fn purge(config: &Config) -> Result<(), Error> {
    let config = config.clone();
    let work = tokio::task::spawn_blocking(move || {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for dir in folders(&config) {
            if dir.join(MARK).exists() {
                remove(dir, &mountinfo)?;
            }
        }
        for pod in fs::read_dir(config.root_dir.join("pods")).into_iter().flatten().flatten() {
            // Our pods' in a folder of others.
            if checkpoint::path(&pod.path()).exists() {
                remove(&pod.path(), &mountinfo)?;
            }
        }
        crate::cgroups::Cgroups::purge(&config);
        Ok(())
    });
    match work.await {
        Ok(result) => result,
        Err(e) => Err(Error::io("purge", Path::new("the agent's folders"), std::io::Error::other(e))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_deepest_first() {
        let info = "1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / /k/pods/a rw - tmpfs x rw\n3 2 0:3 / /k/pods/a/b\\040c rw - tmpfs x rw\n4 1 0:4 / /kk rw - tmpfs x rw\n";
        let all = mounts_below(Path::new("/k"), info);
        assert_eq!(all, [PathBuf::from("/k/pods/a/b c"), PathBuf::from("/k/pods/a")]);
    }

    #[tokio::test]
    async fn folders_of_others_stay() {
        let tmp = tempfile::tempdir().unwrap();
        let mut c = Config::new("n", None);
        c.root_dir = tmp.path().join("kubelet");
        c.pod_logs_dir = tmp.path().join("pods");
        c.container_logs_dir = tmp.path().join("containers");
        c.cgroup_mount = tmp.path().join("cgroup");
        fs::create_dir_all(c.pod_logs_dir.join("somebody's")).unwrap();
        fs::create_dir_all(c.root_dir.join("device-plugins")).unwrap();
        let (theirs, ours) = (c.pod_dir("theirs"), c.pod_dir("ours"));
        fs::create_dir_all(&theirs).unwrap();
        claim(&c).unwrap();
        fs::create_dir_all(ours.join("volumes")).unwrap();
        fs::write(checkpoint::path(&ours), "{}").unwrap();
        purge(&c).await.unwrap();
        assert!(c.pod_logs_dir.join("somebody's").exists() && theirs.exists());
        assert!(!ours.exists() && !c.container_logs_dir.exists());
    }
}
