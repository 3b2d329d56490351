//! The cgroup file systems as cgroups-rs wants them described, at the configured mount point.
//!
//! Only folders are made and limits written here. Processes enter by the runtime: moving one by its number waits for an
//! RCU grace period.

use std::path::{Path, PathBuf};

use cgroups_rs::fs::blkio::BlkIoController;
use cgroups_rs::fs::cpu::CpuController;
use cgroups_rs::fs::cpuacct::CpuAcctController;
use cgroups_rs::fs::cpuset::CpuSetController;
use cgroups_rs::fs::devices::DevicesController;
use cgroups_rs::fs::freezer::FreezerController;
use cgroups_rs::fs::hugetlb::HugeTlbController;
use cgroups_rs::fs::memory::MemController;
use cgroups_rs::fs::pid::PidController;
use cgroups_rs::fs::systemd::SystemdController;
use cgroups_rs::fs::{Cgroup, Hierarchy, MaxValue, Subsystem};

use super::limits::{Limits, weight};
use crate::error::Error;

/// Controllers whose trees pods get on version 1, where each has its own; those that are limited come first.
const CONTROLLERS: [&str; 10] =
    ["cpu", "memory", "pids", "hugetlb", "cpuset", "cpuacct", "blkio", "devices", "freezer", "systemd"];

/// What is mounted.
#[derive(Clone, Debug)]
pub struct Mounted {
    root: PathBuf,
    v2: bool,
    subsystems: Vec<Subsystem>,
    /// Of every tree, also of those where pods get nothing from us: runtimes make groups in all that they find, below a pod's (`net_cls`,
    /// `perf_event`, an empty version 2 beside version 1).
    roots: Vec<PathBuf>,
}

impl Hierarchy for Mounted {
    fn subsystems(&self) -> Vec<Subsystem> {
        self.subsystems.clone()
    }

    fn root(&self) -> PathBuf {
        self.root.clone()
    }

    fn root_control_group(&self) -> Cgroup {
        self.cgroup("")
    }

    fn parent_control_group(&self, path: &str) -> Cgroup {
        self.cgroup(path.rsplit_once('/').map_or("", |(parent, _)| parent))
    }

    fn v2(&self) -> bool {
        self.v2
    }
}

fn subsystem(controller: &str, at: PathBuf, v2: bool) -> Option<Subsystem> {
    let root = PathBuf::from(if v2 { "" } else { "/" });
    Some(match controller {
        "cpu" => Subsystem::Cpu(CpuController::new(at, root, v2)),
        "memory" => Subsystem::Mem(MemController::new(at, root, v2)),
        "pids" => Subsystem::Pid(PidController::new(at, root, v2)),
        "hugetlb" => Subsystem::HugeTlb(HugeTlbController::new(at, root, v2)),
        "cpuset" => Subsystem::CpuSet(CpuSetController::new(at, root, v2)),
        "cpuacct" => Subsystem::CpuAcct(CpuAcctController::new(at, root)),
        "blkio" => Subsystem::BlkIo(BlkIoController::new(at, root, v2)),
        "devices" => Subsystem::Devices(DevicesController::new(at, root)),
        "freezer" => Subsystem::Freezer(FreezerController::new(at, root, v2)),
        "systemd" => Subsystem::Systemd(SystemdController::new(at, root, v2)),
        _ => return None,
    })
}

/// The trees of version 1, and a version 2 beside them. Links are other names of the same (`cpu` of `cpu,cpuacct`).
fn trees(mount: &Path) -> Vec<PathBuf> {
    let all = std::fs::read_dir(mount).into_iter().flatten().flatten();
    let folders = all.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path());
    folders.filter(|d| d.join("cgroup.procs").exists()).collect()
}

impl Mounted {
    /// Looks at what there is: one tree of version 2, or one for each controller of version 1 (also beside an empty
    /// version 2).
    pub fn at(mount: &Path) -> Mounted {
        let unified = std::fs::read_to_string(mount.join("cgroup.controllers"));
        let v2 = unified.is_ok();
        let present = |c: &str| match &unified {
            Ok(have) => have.split_whitespace().any(|h| h == c),
            Err(_) => mount.join(c).join("cgroup.procs").exists(),
        };
        let at = |c: &str| if v2 { mount.to_owned() } else { mount.join(c) };
        let found = CONTROLLERS.iter().filter(|c| present(c));
        Mounted {
            root: mount.to_owned(),
            v2,
            subsystems: found.filter_map(|c| subsystem(c, at(c), v2)).collect(),
            roots: if v2 { vec![mount.to_owned()] } else { trees(mount) },
        }
    }

    pub fn is_v2(&self) -> bool {
        self.v2
    }

    pub fn roots(&self) -> &[PathBuf] {
        &self.roots
    }

    /// Huge page sizes that can be limited, as the kernel writes them.
    pub fn page_sizes(&self) -> Vec<String> {
        let sizes = self.subsystems.iter().find_map(|s| match s {
            Subsystem::HugeTlb(h) => Some(h.get_sizes()),
            _ => None,
        });
        sizes.unwrap_or_default()
    }

    fn cgroup(&self, path: &str) -> Cgroup {
        Cgroup::load(Box::new(self.clone()), path)
    }

    /// Makes a cgroup and those above it. Idempotent.
    pub fn create(&self, path: &str) -> Result<(), Error> {
        self.cgroup(path).create().map_err(|e| error("make the cgroup", path, &e))
    }

    /// Writes limits. All are tried; the first that the kernel refused is the error. A limit whose controller is
    /// missing is left out.
    pub fn limit(&self, path: &str, l: &Limits) -> Result<(), Error> {
        let cgroup = self.cgroup(path);
        let mut first = Ok(());
        let mut tried = |what: &'static str, result: cgroups_rs::fs::error::Result<()>| {
            if let (Err(e), true) = (result, first.is_ok()) {
                first = Err(error(what, path, &e));
            }
        };
        for s in cgroup.subsystems() {
            match s {
                Subsystem::Cpu(cpu) => {
                    if let Some(shares) = l.cpu_shares {
                        let value = if self.v2 { weight(shares) } else { shares.max(0) as u64 };
                        tried("set the CPU weight of cgroup", cpu.set_shares(value));
                    }
                    if let Some((quota, period)) = l.cpu_quota {
                        tried("set the CPU quota of cgroup", quota_of(cpu, self.v2, quota, period));
                    }
                }
                Subsystem::Mem(memory) => {
                    if let Some(bytes) = l.memory {
                        tried("set the memory limit of cgroup", memory.set_limit(bytes));
                    }
                }
                Subsystem::Pid(pids) => {
                    if let Some(n) = l.pids {
                        tried("limit the processes of cgroup", pids.set_pid_max(MaxValue::Value(n)));
                    }
                }
                Subsystem::HugeTlb(huge) => {
                    for (size, bytes) in &l.hugepages {
                        let set = huge.set_limit_in_bytes(size, *bytes);
                        tried("limit the huge pages of cgroup", set);
                    }
                }
                _ => {}
            }
        }
        first
    }
}

/// Version 1 wants the period first: a quota is checked against the one that stands there.
fn quota_of(cpu: &CpuController, v2: bool, quota: i64, period: i64) -> cgroups_rs::fs::error::Result<()> {
    let period = period.max(0) as u64;
    if v2 {
        return cpu.set_cfs_quota_and_period(Some(quota), Some(period));
    }
    cpu.set_cfs_period(period)?;
    cpu.set_cfs_quota(quota)
}

/// cgroups-rs repeats the cause in its text.
fn error(what: &'static str, path: &str, e: &cgroups_rs::fs::error::Error) -> Error {
    let message = match std::error::Error::source(e) {
        Some(cause) => format!("{}: {cause}", e.kind()),
        None => e.kind().to_string(),
    };
    Error::Cgroup { what, path: path.to_owned(), message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_looked_for_in_every_tree() {
        let t = tempfile::tempdir().unwrap();
        let at = |name: &str| t.path().join(name);
        for tree in ["cpu,cpuacct", "perf_event", "unified"] {
            std::fs::create_dir(at(tree)).unwrap();
            std::fs::write(at(tree).join("cgroup.procs"), "").unwrap();
        }
        std::fs::create_dir(at("not-mounted")).unwrap();
        for link in ["cpu", "cpuacct"] {
            std::os::unix::fs::symlink("cpu,cpuacct", at(link)).unwrap();
        }
        let mut roots = Mounted::at(t.path()).roots().to_vec();
        roots.sort();
        assert_eq!(roots, ["cpu,cpuacct", "perf_event", "unified"].map(at));
        std::fs::write(at("cgroup.controllers"), "cpu memory").unwrap();
        assert_eq!(Mounted::at(t.path()).roots(), [t.path()], "version 2 is one tree");
    }
}
