//! What a checkpoint changes for a while, and how it is taken back: by the request itself, or by the next start when the server was
//! killed in between.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use orlop_base::durable::{self, Sync};
use orlop_base::strays;
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use super::nftables;
use crate::error::{Error, Result};
use crate::streaming::netns;

const VERSION: u32 = 1;
const PREFIX: &str = "checkpoint-";

/// `undo.json` in the work folder.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Undo {
    /// The container's group in the hierarchy that can freeze it.
    pub freezer: PathBuf,
    /// The container's first process, as the host counts.
    pub pid: u32,
    /// The pod's network namespace, which criu closes while it works; `None` is the host's.
    pub network: Option<PathBuf>,
    /// The archive until it is whole.
    pub partial: PathBuf,
}

/// The two forms of the kernel's switch (cgroup-v2.rst, "cgroup.freeze"; freezer-subsystem.rst).
struct Switch {
    file: PathBuf,
    frozen: &'static str,
    thawed: &'static str,
    /// Where the kernel says that all processes stand, and what.
    seen: (PathBuf, &'static str),
}

impl Undo {
    fn switch(&self) -> Option<Switch> {
        let at = |name: &str| self.freezer.join(name);
        let (v2, v1) = (at("cgroup.freeze"), at("freezer.state"));
        if v2.exists() {
            return Some(Switch {
                file: v2,
                frozen: "1",
                thawed: "0",
                seen: (at("cgroup.events"), "frozen 1"),
            });
        }
        let seen = (v1.clone(), "FROZEN");
        v1.exists().then_some(Switch { file: v1, frozen: "FROZEN", thawed: "THAWED", seen })
    }

    /// Until every process of the container stands still.
    pub async fn freeze(&self, deadline: Instant) -> Result<()> {
        let switch = self.switch().ok_or_else(|| {
            let group = self.freezer.display();
            Error::Unsupported(format!("{group} cannot be frozen: this kernel has no freezer cgroup there"))
        })?;
        loop {
            // Version 1 wants to be told again when a process was in the middle of something.
            fs::write(&switch.file, switch.frozen).map_err(Error::io("freeze", &switch.file))?;
            let (file, word) = &switch.seen;
            let text = fs::read_to_string(file).map_err(Error::io("read", file))?;
            if text.lines().any(|l| l == *word) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Error::io("freeze", &switch.file)(ErrorKind::TimedOut.into()));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// The container goes on. A group that is gone needs nothing.
    pub fn thaw(&self) {
        if let Some(s) = self.switch()
            && let Err(e) = fs::write(&s.file, s.thawed)
        {
            tracing::error!(group = %self.freezer.display(), error = %e, "could not let a container go on");
        }
    }

    /// Opens the pod's network again where a killed criu has not; `false`: it may still be closed.
    async fn unlock_network(&self) -> bool {
        let Some(pin) = self.network.clone() else { return true };
        let pid = self.pid;
        match netns::inside(pin, move || nftables::delete_table(&format!("CRIU-{pid}"))).await {
            Ok(true) => tracing::warn!(pid, "opened a pod's network that criu had closed"),
            Ok(false) => {}
            // The pod is gone.
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => {
                tracing::error!(pid, error = %e, "could not look whether criu left a pod's network closed");
                return false;
            }
        }
        true
    }
}

/// A checkpoint under way. One that is dropped without [`Work::end`] (a panic, a server that stops) lets the container go on; its
/// record stays, by which the next checkpoint of the container or the next start takes back the rest.
pub(super) struct Work {
    dir: PathBuf,
    pub undo: Undo,
}

impl Work {
    /// `below`: where unfinished archives lie. The container's own lock keeps a second one of the same container away.
    pub async fn begin(below: &Path, id: &str, undo: Undo) -> Result<Work> {
        let dir = below.join(format!("{PREFIX}{id}"));
        take_back(&dir).await;
        crate::mounts::remove_tree(&dir)?;
        let work = Work { dir, undo };
        fs::create_dir_all(below).map_err(Error::io("create", below))?;
        for dir in [work.dir.clone(), work.archive(), work.images()] {
            fs::DirBuilder::new().mode(0o700).create(&dir).map_err(Error::io("create", &dir))?;
        }
        durable::write_json(&work.dir.join("undo.json"), VERSION, &work.undo, Sync::PageCache)?;
        Ok(work)
    }

    /// Takes everything back, after success as well: criu has opened the network then. No program works in the folder any more.
    pub async fn end(self) {
        self.undo.thaw();
        if self.undo.unlock_network().await {
            forget(&self.dir, &self.undo).await;
        }
    }

    /// The folder; it marks the programs that work in it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What becomes the archive.
    pub fn archive(&self) -> PathBuf {
        self.dir.join("archive")
    }

    /// criu's images in it.
    pub fn images(&self) -> PathBuf {
        self.archive().join("checkpoint")
    }

    /// For what does not go into the archive.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.undo.thaw();
    }
}

/// The images may be gigabytes.
async fn forget(dir: &Path, undo: &Undo) {
    let (dir, partial) = (dir.to_owned(), undo.partial.clone());
    let removed = spawn_blocking(move || match fs::remove_file(&partial) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io("remove", &partial)(e)),
        _ => crate::mounts::remove_tree(&dir),
    });
    if let Err(e) = super::joined(removed.await).flatten() {
        tracing::warn!(error = %e, "could not remove a checkpoint's files; the next start does");
    }
}

/// Takes back what `dir` has a record of; its criu may still be at work.
async fn take_back(dir: &Path) {
    let Ok(Some(undo)) = durable::read_json::<Undo>(&dir.join("undo.json"), VERSION) else { return };
    strays::end(dir).await;
    undo.thaw();
    undo.unlock_network().await;
    forget(dir, &undo).await;
    tracing::info!(folder = %dir.display(), "ended a checkpoint that was broken off");
}

/// Takes back what a killed server left in `below`.
pub(crate) async fn end_left_over(below: &Path) {
    for entry in fs::read_dir(below).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            take_back(&entry.path()).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::process::Command;

    use super::*;

    #[tokio::test]
    async fn what_is_broken_off_is_taken_back_by_the_next_one() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let below = at("below");
        fs::write(at("cgroup.freeze"), "1").unwrap();
        let undo = Undo { freezer: at(""), pid: 1, network: None, partial: at("partial") };
        let state = || fs::read_to_string(at("cgroup.freeze")).unwrap();
        let work = Work::begin(&below, "a", undo.clone()).await.unwrap();
        let folder = work.dir().to_owned();
        fs::write(&undo.partial, "half").unwrap();
        drop(work);
        assert_eq!(state(), "0");
        assert!(folder.join("undo.json").exists() && undo.partial.exists());

        fs::write(at("cgroup.freeze"), "1").unwrap();
        let mut criu = Command::new("/bin/sleep");
        let mut criu = criu.arg("1000").env(strays::OWNER, &folder).process_group(0).spawn().unwrap();
        let work = Work::begin(&below, "a", undo.clone()).await.unwrap();
        assert!(!criu.wait().await.unwrap().success());
        assert!(!undo.partial.exists() && state() == "0");
        work.end().await;
        assert!(!folder.exists());
    }

    #[tokio::test]
    async fn the_record_stays_while_the_network_may_be_closed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        // No namespace is pinned in a file, and none is left without one.
        fs::write(at("pin"), "").unwrap();
        for (pin, stays) in [("pin", true), ("gone", false)] {
            let undo = Undo { freezer: at(""), pid: 1, network: Some(at(pin)), partial: at("partial") };
            let work = Work::begin(&at("below"), pin, undo).await.unwrap();
            let record = work.file("undo.json");
            work.end().await;
            assert_eq!(record.exists(), stays, "{pin}");
        }
    }
}
