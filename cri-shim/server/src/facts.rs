//! What this kernel and machine can do, read once at the start.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Capability;

/// See the module.
#[derive(Clone, Debug, Default)]
pub(crate) struct Facts {
    /// Only the unified hierarchy.
    pub cgroup_v2: bool,
    /// Version 1 controllers in which the runtime makes groups, as mounted below `/sys/fs/cgroup`.
    pub v1_controllers: Vec<String>,
    pub selinux: bool,
    /// There is a controller for huge pages.
    pub hugetlb: bool,
    /// The memory controller counts swap.
    pub swap_accounting: bool,
    /// Capabilities this process may hand on.
    pub capabilities: HashSet<Capability>,
    /// The least oom_score_adj that may be given to a container. Without CAP_SYS_RESOURCE it is our own.
    pub least_oom_score_adj: i32,
}

/// Every capability in the kernel's order (`linux/capability.h`).
pub(crate) const CAPABILITIES: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

const SYS_RESOURCE: u32 = 24;

/// The sets of `/proc/self/status`, as bit masks.
fn mask(status: &str, field: &str) -> u64 {
    status
        .lines()
        .find_map(|l| l.strip_prefix(field))
        .and_then(|v| u64::from_str_radix(v.trim_start_matches(':').trim(), 16).ok())
        .unwrap_or(0)
}

fn capabilities_of(mask: u64) -> HashSet<Capability> {
    CAPABILITIES.iter().enumerate().filter(|(i, _)| mask & (1 << i) != 0).map(|(_, c)| *c).collect()
}

impl Facts {
    /// Logs what this machine withholds from containers.
    pub fn warn(&self) {
        if self.least_oom_score_adj > -1000 {
            tracing::warn!(
                own = self.least_oom_score_adj,
                "no CAP_SYS_RESOURCE: a container's oom_score_adj cannot be below this process's own"
            );
        }
        if crate::apparmor::is_on() && !crate::apparmor::can_default() {
            tracing::warn!(
                "AppArmor is on, but apparmor_parser is missing: containers without a profile of their own have none"
            );
        }
    }

    pub fn read() -> Facts {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let own: i32 = fs::read_to_string("/proc/self/oom_score_adj")
            .ok()
            .and_then(|s| s.trim().parse().ok())
            .unwrap_or(0);
        let may_lower = mask(&status, "CapEff") & (1 << SYS_RESOURCE) != 0;
        let v2 = cgroup_v2_only();
        Facts {
            cgroup_v2: v2,
            v1_controllers: if v2 { Vec::new() } else { v1_controllers() },
            selinux: crate::selinux::is_on(),
            hugetlb: has_hugetlb(v2),
            swap_accounting: swap_accounting(v2),
            capabilities: capabilities_of(mask(&status, "CapBnd") & mask(&status, "CapEff")),
            least_oom_score_adj: if may_lower { -1000 } else { own },
        }
    }
}

/// Whether `/sys/fs/cgroup` itself is the unified hierarchy.
pub(crate) fn cgroup_v2_only() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

fn v1_controllers() -> Vec<String> {
    const KNOWN: [&str; 12] = [
        "blkio",
        "cpu",
        "cpuacct",
        "cpuset",
        "devices",
        "freezer",
        "hugetlb",
        "memory",
        "net_cls",
        "net_prio",
        "perf_event",
        "pids",
    ];
    let mounted = |c: &&str| Path::new("/sys/fs/cgroup").join(c).join("cgroup.procs").exists();
    KNOWN.iter().copied().filter(mounted).map(str::to_owned).collect()
}

fn has_hugetlb(v2: bool) -> bool {
    if !v2 {
        return Path::new("/sys/fs/cgroup/hugetlb/cgroup.procs").exists();
    }
    fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")
        .is_ok_and(|all| all.split_whitespace().any(|c| c == "hugetlb"))
}

fn swap_accounting(v2: bool) -> bool {
    if v2 {
        // The root group has no memory.* files; any child of it does when the controller is on. Where there is no child yet, as
        // without systemd, swap is counted like on all kernels since 5.8 that were not told otherwise.
        let children = || fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
        let any = |file: &str| children().any(|e| e.path().join(file).exists());
        any("memory.swap.max") || !any("memory.max")
    } else {
        Path::new("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes").exists()
    }
}

/// The folder of `controller`'s group `path` (absolute within the hierarchy).
pub(crate) fn cgroup_dir(v2: bool, controller: &str, path: &str) -> PathBuf {
    let base =
        if v2 { PathBuf::from("/sys/fs/cgroup") } else { Path::new("/sys/fs/cgroup").join(controller) };
    base.join(path.trim_start_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_the_kernels() {
        let header = fs::read_to_string("/usr/include/linux/capability.h");
        let header = header.expect("apt-get install linux-libc-dev");
        let mut found = 0;
        for line in header.lines() {
            let Some((name, number)) =
                line.strip_prefix("#define CAP_").and_then(|l| l.split_once(char::is_whitespace))
            else {
                continue;
            };
            let Ok(number) = number.trim().parse::<usize>() else { continue };
            assert_eq!(CAPABILITIES.get(number).map(ToString::to_string).as_deref(), Some(name));
            found += 1;
        }
        assert_eq!(found, CAPABILITIES.len());
    }

    #[test]
    fn capability_masks_are_read_in_the_kernels_order() {
        let status = "Name:\tx\nCapEff:\t0000000000200001\nCapBnd:\t000001ffffffffff\n";
        assert_eq!(
            capabilities_of(mask(status, "CapEff")),
            HashSet::from([Capability::Chown, Capability::SysAdmin])
        );
        assert_eq!(capabilities_of(mask(status, "CapBnd")).len(), 41);
    }
}
