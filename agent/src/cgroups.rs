//! The cgroup tree of pods: `kubepods/{burstable,besteffort}/pod<uid>` under the configured root.
//!
//! On a version 1 (or hybrid) host every controller has its own hierarchy and the tree is made in each; on version 2
//! there is one. With the systemd driver the runtime asks systemd to make the slices and only names are given here.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::PodSpec;
use orlop_api::pod::{QosClass, qos_class};

use crate::config::Config;
use crate::error::Error;
use crate::spec::resources::{self, PodLimits};

/// Which interface the kernel offers.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Layout {
    /// One folder per controller.
    V1(Vec<PathBuf>),
    V2(PathBuf),
}

/// Makes and removes pods' cgroups.
#[derive(Clone, Debug)]
pub struct Cgroups {
    layout: Layout,
    root: String,
    systemd: bool,
    pids: i64,
}

const CONTROLLERS: [&str; 9] =
    ["cpu", "cpuacct", "cpuset", "memory", "pids", "blkio", "devices", "freezer", "systemd"];

impl Cgroups {
    /// Looks at what is mounted; `systemd` when the runtime uses that driver.
    pub fn detect(config: &Config, systemd: bool) -> Cgroups {
        let mount = &config.cgroup_mount;
        let layout = if mount.join("cgroup.controllers").exists() {
            Layout::V2(mount.clone())
        } else {
            // A controller may be mounted twice under a joined name (cpu,cpuacct) with links; links are left out.
            let dirs = CONTROLLERS.iter().map(|c| mount.join(c));
            Layout::V1(dirs.filter(|d| d.is_dir() && d.join("cgroup.procs").exists()).collect())
        };
        let root = config.kubelet.cgroup_root.trim_matches('/').to_owned();
        Cgroups { layout, root, systemd, pids: config.kubelet.pod_pids_limit }
    }

    fn top(&self) -> String {
        if self.root.is_empty() { "kubepods".into() } else { format!("{}/kubepods", self.root) }
    }

    fn class_dir(&self, class: QosClass) -> String {
        match class {
            QosClass::Guaranteed => self.top(),
            QosClass::Burstable => format!("{}/burstable", self.top()),
            QosClass::BestEffort => format!("{}/besteffort", self.top()),
        }
    }

    /// What the runtime is told as the sandbox's cgroup parent.
    pub fn parent(&self, spec: &PodSpec, uid: &str) -> String {
        let class = qos_class(spec);
        if self.systemd {
            let middle = match class {
                QosClass::Guaranteed => "",
                QosClass::Burstable => "burstable-",
                QosClass::BestEffort => "besteffort-",
            };
            return format!("kubepods-{middle}pod{}.slice", uid.replace('-', "_"));
        }
        format!("/{}/pod{uid}", self.class_dir(class))
    }

    fn bases(&self) -> Vec<&Path> {
        match &self.layout {
            Layout::V1(dirs) => dirs.iter().map(PathBuf::as_path).collect(),
            Layout::V2(dir) => vec![dir],
        }
    }

    /// Makes a pod's cgroups with its limits. Idempotent.
    pub fn create(
        &self,
        spec: &PodSpec,
        uid: &str,
        period: Option<std::time::Duration>,
    ) -> Result<(), Error> {
        if self.systemd {
            return Ok(());
        }
        let class = qos_class(spec);
        let rel = format!("{}/pod{uid}", self.class_dir(class));
        for base in self.bases() {
            make(base, &rel, matches!(self.layout, Layout::V2(_)))?;
        }
        let limits = resources::pod(spec, period);
        let shares = if class == QosClass::BestEffort { 2 } else { limits.cpu_shares };
        self.limit(&rel, &PodLimits { cpu_shares: shares, ..limits });
        if class == QosClass::BestEffort {
            self.limit(&self.class_dir(class), &PodLimits { cpu_shares: 2, ..Default::default() });
        }
        Ok(())
    }

    /// Limits are best effort: a host without a controller still runs pods.
    fn limit(&self, rel: &str, l: &PodLimits) {
        let put = |path: PathBuf, value: String| {
            if let Err(e) = fs::write(&path, &value)
                && e.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %value, error = %e, "cgroup limit not set");
            }
        };
        match &self.layout {
            Layout::V1(dirs) => {
                let of = |c: &str| dirs.iter().find(|d| d.ends_with(c)).map(|d| d.join(rel));
                if let Some(cpu) = of("cpu") {
                    put(cpu.join("cpu.shares"), l.cpu_shares.to_string());
                    if let Some(q) = l.cpu_quota {
                        put(cpu.join("cpu.cfs_period_us"), l.cpu_period.to_string());
                        put(cpu.join("cpu.cfs_quota_us"), q.to_string());
                    }
                }
                if let (Some(memory), Some(bytes)) = (of("memory"), l.memory) {
                    put(memory.join("memory.limit_in_bytes"), bytes.to_string());
                }
                if let (Some(pids), true) = (of("pids"), self.pids > 0) {
                    put(pids.join("pids.max"), self.pids.to_string());
                }
            }
            Layout::V2(base) => {
                let dir = base.join(rel);
                put(dir.join("cpu.weight"), weight(l.cpu_shares).to_string());
                if let Some(q) = l.cpu_quota {
                    put(dir.join("cpu.max"), format!("{q} {}", l.cpu_period));
                }
                if let Some(bytes) = l.memory {
                    put(dir.join("memory.max"), bytes.to_string());
                }
                if self.pids > 0 {
                    put(dir.join("pids.max"), self.pids.to_string());
                }
            }
        }
    }

    /// Removes a pod's cgroups in every class; processes that are left keep theirs.
    pub fn remove(&self, uid: &str) {
        if self.systemd {
            return;
        }
        for class in [QosClass::Guaranteed, QosClass::Burstable, QosClass::BestEffort] {
            let rel = format!("{}/pod{uid}", self.class_dir(class));
            for base in self.bases() {
                remove_tree(&base.join(&rel));
            }
        }
    }

    /// Uids that have cgroups, for finding orphans.
    pub fn pod_uids(&self) -> Vec<String> {
        let mut uids = Vec::new();
        for base in self.bases() {
            for class in [QosClass::Guaranteed, QosClass::Burstable, QosClass::BestEffort] {
                for e in fs::read_dir(base.join(self.class_dir(class))).into_iter().flatten().flatten() {
                    let name = e.file_name();
                    uids.extend(name.to_str().and_then(|n| n.strip_prefix("pod")).map(str::to_owned));
                }
            }
        }
        uids.sort();
        uids.dedup();
        uids
    }
}

/// cpu.weight of version 2 for cpu.shares of version 1, as the OCI runtimes convert them.
fn weight(shares: i64) -> i64 {
    1 + ((shares.clamp(2, 262_144) - 2) * 9999) / 262_142
}

fn make(base: &Path, rel: &str, v2: bool) -> Result<(), Error> {
    let mut dir = base.to_owned();
    for part in rel.split('/') {
        if v2 {
            delegate(&dir);
        }
        let parent = dir.clone();
        dir.push(part);
        match fs::create_dir(&dir) {
            Ok(()) => inherit_cpuset(&parent, &dir),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(Error::io("create the cgroup", &dir, e)),
        }
    }
    if v2 {
        delegate(&dir);
    }
    Ok(())
}

/// Version 2: children may use the controllers that the parent has.
fn delegate(dir: &Path) {
    let have = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    for c in have.split_whitespace() {
        let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{c}"));
    }
}

/// Version 1: a new cpuset is empty and takes no process until it has CPUs and memory nodes.
fn inherit_cpuset(parent: &Path, dir: &Path) {
    for f in ["cpuset.cpus", "cpuset.mems"] {
        if let Ok(v) = fs::read_to_string(parent.join(f))
            && dir.join(f).exists()
        {
            let _ = fs::write(dir.join(f), v.trim());
        }
    }
}

fn remove_tree(dir: &Path) {
    for e in fs::read_dir(dir).into_iter().flatten().flatten() {
        if e.file_type().is_ok_and(|t| t.is_dir()) {
            remove_tree(&e.path());
        }
    }
    if let Err(e) = fs::remove_dir(dir)
        && e.kind() != io::ErrorKind::NotFound
    {
        tracing::debug!(path = %dir.display(), error = %e, "cgroup not removed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_by_class_and_driver() {
        let mut config = Config::new("n", None);
        config.cgroup_mount = "/nonexistent".into();
        config.kubelet.cgroup_root = "/a/b".into();
        let spec = PodSpec::default();
        let c = Cgroups::detect(&config, false);
        assert_eq!(c.parent(&spec, "u-1"), "/a/b/kubepods/besteffort/podu-1");
        let s = Cgroups::detect(&config, true);
        assert_eq!(s.parent(&spec, "u-1"), "kubepods-besteffort-podu_1.slice");
    }

    #[test]
    fn weights() {
        assert_eq!((weight(2), weight(1024), weight(262_144)), (1, 39, 10_000));
    }
}
