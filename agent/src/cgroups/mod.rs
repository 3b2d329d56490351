//! The cgroup tree of pods: `kubepods/{burstable,besteffort}/pod<uid>` under the configured root, or the same as slices
//! (`kubepods-burstable-pod<uid>.slice`) when the runtime uses the systemd driver. Every level has limits.
//!
//! On a version 1 (or hybrid) host every controller has its own hierarchy and the tree is made in each; on version 2
//! there is one.

mod hierarchy;
pub mod limits;
mod systemd;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::PodSpec;
use orlop_api::pod::{QosClass, qos_class, requests};
use parking_lot::Mutex;

use crate::config::Config;
use crate::error::Error;
use hierarchy::Mounted;
use limits::Limits;

/// Makes, limits and removes pods' cgroups. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Cgroups(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    mounted: Mounted,
    /// Names above `kubepods`.
    root: Vec<String>,
    systemd: bool,
    pids: i64,
    page_sizes: Vec<String>,
    /// Thousandths of a CPU that each Burstable pod asks for.
    burstable: Mutex<HashMap<String, i64>>,
}

const CLASSES: [QosClass; 3] = [QosClass::Guaranteed, QosClass::Burstable, QosClass::BestEffort];

fn milli(spec: &PodSpec) -> i64 {
    requests(spec).get("cpu").map_or(0, |a| a.milli())
}

impl Cgroups {
    /// Looks at what is mounted; `systemd` when the runtime uses that driver.
    pub fn detect(config: &Config, systemd: bool) -> Cgroups {
        let mounted = Mounted::at(&config.cgroup_mount);
        let root = config.kubelet.cgroup_root.split('/').filter(|p| !p.is_empty());
        Cgroups(Arc::new(Inner {
            page_sizes: mounted.page_sizes(),
            mounted,
            root: root.map(str::to_owned).collect(),
            systemd,
            pids: config.kubelet.pod_pids_limit,
            burstable: Mutex::default(),
        }))
    }

    fn components<'a>(&'a self, class: QosClass, pod: Option<&'a str>) -> Vec<&'a str> {
        let class = match class {
            QosClass::Guaranteed => None,
            QosClass::Burstable => Some("burstable"),
            QosClass::BestEffort => Some("besteffort"),
        };
        self.0.root.iter().map(String::as_str).chain(["kubepods"]).chain(class).chain(pod).collect()
    }

    /// A cgroup's folder below each root; of all pods with `Guaranteed` and no pod.
    fn folder(&self, class: QosClass, pod: Option<&str>) -> String {
        let components = self.components(class, pod);
        if self.0.systemd { systemd::folder(&systemd::slice(&components)) } else { components.join("/") }
    }

    /// What the runtime is told as the sandbox's cgroup parent.
    pub fn parent(&self, spec: &PodSpec, uid: &str) -> String {
        let (class, pod) = (qos_class(spec), format!("pod{uid}"));
        if self.0.systemd {
            return systemd::slice(&self.components(class, Some(&pod)));
        }
        format!("/{}", self.folder(class, Some(&pod)))
    }

    /// One cgroup with its limits. Blocks with the systemd driver.
    fn ensure(&self, class: QosClass, pod: Option<&str>, l: &Limits) -> Result<(), Error> {
        if self.0.systemd {
            let slice = systemd::slice(&self.components(class, pod));
            systemd::ensure(&slice, l, self.0.mounted.is_v2())?;
        }
        let folder = self.folder(class, pod);
        self.0.mounted.create(&folder)?;
        // systemd knows no limit of huge pages, and not every controller of version 1.
        if let Err(e) = self.0.mounted.limit(&folder, l) {
            tracing::warn!(error = %e, "cgroup limit not set");
        }
        Ok(())
    }

    /// Makes the cgroups above pods'. `node` is what all pods may use together.
    pub async fn prepare(&self, node: Limits) -> Result<(), Error> {
        let all = self.clone();
        self.work(move || {
            all.ensure(QosClass::Guaranteed, None, &node)?;
            all.ensure(QosClass::BestEffort, None, &limits::class(0, &all.0.page_sizes))?;
            let sum = all.0.burstable.lock().values().sum();
            all.ensure(QosClass::Burstable, None, &limits::class(sum, &all.0.page_sizes))
        })
        .await
    }

    /// What all pods may use together.
    pub fn node_limits(
        &self,
        available: &BTreeMap<String, orlop_api::quantity::Amount>,
        pids: Option<i64>,
    ) -> Limits {
        limits::node(available, pids, &self.0.page_sizes)
    }

    /// Makes a pod's cgroup with its limits, or gives the one that is there new limits. Idempotent. `period` is the
    /// CFS period, `None` without quotas.
    pub async fn create(&self, spec: &PodSpec, uid: &str, period: Option<Duration>) -> Result<(), Error> {
        let class = qos_class(spec);
        let l = limits::pod(spec, period, self.0.pids, &self.0.page_sizes);
        let sum = (class == QosClass::Burstable).then(|| self.count(uid, Some(milli(spec)))).flatten();
        let (all, pod) = (self.clone(), format!("pod{uid}"));
        self.work(move || {
            all.ensure(class, Some(&pod), &l)?;
            all.weigh_burstable(sum)
        })
        .await
    }

    /// Gives a pod's cgroup the limits of `new`; with `old` those that fit both.
    pub async fn resize(
        &self,
        old: Option<&PodSpec>,
        new: &PodSpec,
        uid: &str,
        period: Option<Duration>,
    ) -> Result<(), Error> {
        let class = qos_class(new);
        let limits_of = |spec| limits::pod_in_force(spec, period, self.0.pids, &self.0.page_sizes);
        let l = match old {
            Some(old) => limits_of(new).wider(&limits_of(old)),
            None => limits_of(new),
        };
        let sum = (class == QosClass::Burstable).then(|| self.count(uid, Some(milli(new)))).flatten();
        let (all, pod) = (self.clone(), format!("pod{uid}"));
        self.work(move || {
            if all.0.systemd {
                let slice = systemd::slice(&all.components(class, Some(&pod)));
                systemd::ensure(&slice, &l, all.0.mounted.is_v2())?;
            }
            all.0.mounted.limit(&all.folder(class, Some(&pod)), &l)?;
            all.weigh_burstable(sum)
        })
        .await
    }

    /// systemd answers over its bus and is waited for elsewhere; the kernel's files answer at once.
    async fn work<F>(&self, work: F) -> Result<(), Error>
    where
        F: FnOnce() -> Result<(), Error> + Send + 'static,
    {
        if !self.0.systemd {
            return work();
        }
        let failed = |e| Error::io("ask systemd for", Path::new("pods' slices"), io::Error::other(e));
        tokio::task::spawn_blocking(work).await.map_err(failed)?
    }

    /// Notes what a Burstable pod asks for; the new sum when it differs.
    fn count(&self, uid: &str, milli: Option<i64>) -> Option<i64> {
        let mut all = self.0.burstable.lock();
        let old = match milli {
            Some(m) => all.insert(uid.to_owned(), m),
            None => all.remove(uid),
        };
        (old.unwrap_or(0) != milli.unwrap_or(0)).then(|| all.values().sum())
    }

    fn weigh_burstable(&self, sum: Option<i64>) -> Result<(), Error> {
        let Some(sum) = sum else { return Ok(()) };
        self.ensure(QosClass::Burstable, None, &limits::class(sum, &self.0.page_sizes))
    }

    /// Counts the pods there are: after a restart their cgroups are there already.
    pub fn count_all<'a>(&self, pods: impl Iterator<Item = (&'a str, &'a PodSpec)>) {
        let burstable = pods.filter(|(_, spec)| qos_class(spec) == QosClass::Burstable);
        *self.0.burstable.lock() = burstable.map(|(uid, spec)| (uid.to_owned(), milli(spec))).collect();
    }

    /// Removes a pod's cgroups in every class; processes that are left keep theirs with the cgroupfs driver.
    pub async fn remove(&self, uid: &str) {
        let sum = self.count(uid, None);
        let (all, pod) = (self.clone(), format!("pod{uid}"));
        let removed = self.work(move || {
            for class in CLASSES {
                let folder = all.folder(class, Some(&pod));
                let dirs: Vec<_> = all.0.mounted.roots().iter().map(|r| r.join(&folder)).collect();
                if all.0.systemd && dirs.iter().any(|d| d.exists()) {
                    systemd::stop(&systemd::slice(&all.components(class, Some(&pod))))?;
                }
                dirs.iter().for_each(|d| remove_tree(d));
            }
            all.weigh_burstable(sum)
        });
        if let Err(e) = removed.await {
            tracing::warn!(%uid, error = %e, "a pod's cgroup not removed");
        }
    }

    /// Uids that have cgroups, for finding orphans.
    pub fn pod_uids(&self) -> Vec<String> {
        let mut uids = Vec::new();
        for root in self.0.mounted.roots() {
            for class in CLASSES {
                let slice = systemd::slice(&self.components(class, Some("pod")));
                let prefix = slice.trim_end_matches(".slice");
                for e in fs::read_dir(root.join(self.folder(class, None))).into_iter().flatten().flatten() {
                    let name = e.file_name();
                    let name = name.to_str().unwrap_or_default();
                    let uid = match self.0.systemd {
                        false => name.strip_prefix("pod").map(str::to_owned),
                        true => name
                            .strip_prefix(prefix)
                            .and_then(|n| n.strip_suffix(".slice"))
                            .map(|n| n.replace('_', "-")),
                    };
                    uids.extend(uid);
                }
            }
        }
        uids.sort();
        uids.dedup();
        uids
    }

    /// Removes `kubepods` with all below it, then a root of our own that is empty. Blocks.
    pub fn purge(config: &Config) {
        for systemd in [false, true] {
            let cgroups = Cgroups::detect(config, systemd);
            let top = cgroups.folder(QosClass::Guaranteed, None);
            let roots = cgroups.0.mounted.roots();
            let there: Vec<_> = roots.iter().map(|r| r.join(&top)).filter(|d| d.is_dir()).collect();
            if systemd && !there.is_empty() {
                let slice = systemd::slice(&cgroups.components(QosClass::Guaranteed, None));
                if let Err(e) = systemd::stop(&slice) {
                    tracing::warn!(error = %e, "pods' slice not removed");
                }
            }
            for dir in there {
                remove_tree(&dir);
                if dir.exists() {
                    tracing::warn!(cgroup = %dir.display(), "cgroup not removed: processes are left in it");
                }
                // Anybody else's root is not empty and stays.
                if let (false, Some(root)) = (cgroups.0.root.is_empty(), dir.parent()) {
                    let _ = fs::remove_dir(root);
                }
            }
        }
    }
}

/// cgroups-rs would wait up to 150 ms for each cgroup in which a process ends just now; orphans are looked for anyway.
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
mod tests;
