//! What a checkpoint changes for a while, and how it is taken back: by the request itself, or by the next start when the server was
//! killed in between.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use orlop_base::durable::{self, Sync};
use serde::{Deserialize, Serialize};

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

    /// Opens the pod's network again where a killed criu has not.
    pub async fn unlock_network(&self) {
        let Some(pin) = self.network.clone() else { return };
        let pid = self.pid;
        match netns::inside(pin, move || nftables::delete_table(&format!("CRIU-{pid}"))).await {
            Ok(true) => tracing::warn!(pid, "opened a pod's network that criu had closed"),
            Ok(false) => {}
            Err(e) => {
                tracing::error!(pid, error = %e, "could not look whether criu left a pod's network closed")
            }
        }
    }
}

/// A checkpoint under way; dropping it takes everything back.
pub(super) struct Work {
    dir: PathBuf,
    pub undo: Undo,
}

impl Work {
    /// `below`: where unfinished archives lie. The container's own lock keeps a second one of the same container away.
    pub fn begin(below: &Path, id: &str, undo: Undo) -> Result<Work> {
        let dir = below.join(format!("{PREFIX}{id}"));
        crate::mounts::remove_tree(&dir)?;
        let work = Work { dir, undo };
        fs::create_dir_all(below).map_err(Error::io("create", below))?;
        for dir in [work.dir.clone(), work.archive(), work.images()] {
            fs::DirBuilder::new().mode(0o700).create(&dir).map_err(Error::io("create", &dir))?;
        }
        durable::write_json(&work.dir.join("undo.json"), VERSION, &work.undo, Sync::PageCache)?;
        Ok(work)
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
        forget(&self.dir, &self.undo);
    }
}

fn forget(dir: &Path, undo: &Undo) {
    let removed = match fs::remove_file(&undo.partial) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io("remove", &undo.partial)(e)),
        _ => crate::mounts::remove_tree(dir),
    };
    if let Err(e) = removed {
        tracing::warn!(error = %e, "could not remove a checkpoint's files; the next start does");
    }
}

/// Leaders of process groups that work in `dir`.
fn at_work_in(dir: &Path) -> Vec<Pid> {
    let dir = dir.to_string_lossy().into_owned();
    let names = fs::read_dir("/proc").into_iter().flatten().flatten().map(|e| e.file_name());
    let pids = names.filter_map(|n| n.to_string_lossy().parse::<i32>().ok());
    let ours = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.windows(dir.len()).any(|w| w == dir.as_bytes())
    };
    // Only what leads a group was started by us: that is how it is started.
    let leads = |pid: &Pid| nix::unistd::getpgid(Some(*pid)) == Ok(*pid);
    pids.filter(ours).map(Pid::from_raw).filter(leads).collect()
}

/// Takes back what a killed server left in `below`; its criu may still be at work.
pub(crate) async fn end_left_over(below: &Path) {
    for entry in fs::read_dir(below).into_iter().flatten().flatten() {
        let dir = entry.path();
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let Ok(Some(undo)) = durable::read_json::<Undo>(&dir.join("undo.json"), VERSION) else { continue };
        for _ in 0..200 {
            let at_work = at_work_in(&dir);
            if at_work.is_empty() {
                break;
            }
            for leader in at_work {
                let _ = killpg(leader, Signal::SIGKILL);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        undo.thaw();
        undo.unlock_network().await;
        forget(&dir, &undo);
        tracing::info!(folder = %dir.display(), "ended a checkpoint that an earlier server had begun");
    }
}
