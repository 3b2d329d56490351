//! What this kernel and machine offer to the load balancer.

use std::fs;
use std::path::{Path, PathBuf};

use aya::programs::ProgramType;
use aya::sys::{is_map_supported, is_program_supported};

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Ok,
    /// It works, with something less.
    Warning,
    /// The load balancer cannot run.
    Missing,
}

/// One checked requirement.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Finding {
    pub name: &'static str,
    pub level: Level,
    /// What was seen.
    pub detail: String,
    /// What to do; empty when all is well.
    pub remedy: String,
}

impl Finding {
    fn new(
        name: &'static str,
        good: bool,
        otherwise: Level,
        detail: impl Into<String>,
        remedy: &str,
    ) -> Finding {
        let level = if good { Level::Ok } else { otherwise };
        Finding {
            name,
            level,
            detail: detail.into(),
            remedy: if good { String::new() } else { remedy.to_owned() },
        }
    }
}

/// The oldest kernel: bpf_set_retval in socket programs.
const MIN_KERNEL: (u32, u32) = (5, 18);
const TCX_KERNEL: (u32, u32) = (6, 6);

fn kernel() -> (u32, u32) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    parse_release(&release)
}

fn parse_release(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Whether interfaces take programs by tcx links.
pub fn has_tcx() -> bool {
    kernel() >= TCX_KERNEL
}

/// Where cgroup version 2 is mounted.
pub fn cgroup2() -> Option<PathBuf> {
    find_cgroup2(&fs::read_to_string("/proc/self/mounts").ok()?)
}

fn find_cgroup2(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|l| {
        let mut f = l.split(' ').skip(1);
        let (at, kind) = (f.next()?, f.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(at))
    })
}

/// Checks everything that the load balancer needs of kernel and machine.
pub fn check() -> Vec<Finding> {
    let (major, minor) = kernel();
    let mut found = vec![Finding::new(
        "kernel",
        (major, minor) >= MIN_KERNEL,
        Level::Missing,
        format!("Linux {major}.{minor}"),
        "use Linux 5.18 or later (Debian 12 has 6.1)",
    )];
    let cgroup = cgroup2();
    found.push(Finding::new(
        "cgroup2",
        cgroup.is_some(),
        Level::Missing,
        cgroup.map_or("not mounted".into(), |p| format!("at {}", p.display())),
        "mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified",
    ));
    for (name, kind) in
        [("bpf-cgroup-socket", ProgramType::CgroupSockAddr), ("bpf-sched-cls", ProgramType::SchedClassifier)]
    {
        let supported = is_program_supported(kind);
        found.push(Finding::new(
            name,
            matches!(supported, Ok(true)),
            Level::Missing,
            match supported {
                Ok(true) => "supported".to_owned(),
                Ok(false) => "the kernel lacks this program type".to_owned(),
                Err(e) => e.to_string(),
            },
            "run as root, with a kernel built with CONFIG_BPF_SYSCALL, CONFIG_CGROUP_BPF and CONFIG_NET_CLS_ACT",
        ));
    }
    let lru = is_map_supported(aya::maps::MapType::LruHash);
    found.push(Finding::new(
        "bpf-lru-map",
        matches!(lru, Ok(true)),
        Level::Missing,
        if matches!(lru, Ok(true)) { "supported" } else { "not supported" },
        "run as root; give the process RLIMIT_MEMLOCK=infinity on kernels before 5.11",
    ));
    found.push(Finding::new(
        "packet-hooks",
        true,
        Level::Missing,
        if has_tcx() {
            "tcx"
        } else {
            "clsact (tcx needs Linux 6.6); modules sch_ingress and cls_bpf are needed"
        },
        "",
    ));
    let bpffs = Path::new("/sys/fs/bpf").is_dir();
    found.push(Finding::new(
        "bpffs",
        bpffs,
        Level::Missing,
        if bpffs { "can be mounted at /sys/fs/bpf" } else { "/sys/fs/bpf does not exist" },
        "mount sysfs at /sys, or choose another folder for pins",
    ));
    let forward = fs::read_to_string("/proc/sys/net/ipv4/ip_forward").is_ok_and(|v| v.trim() == "1");
    found.push(Finding::new(
        "ip-forward",
        forward,
        Level::Warning,
        if forward { "on" } else { "off: node ports reach no pod from outside" },
        "sysctl -w net.ipv4.ip_forward=1",
    ));
    found
}

/// Has the kernel look at every program, as it does when they are loaded: its own word, where [`check`] says why it may
/// be no.
pub fn verify_programs() -> Finding {
    let refused = crate::attach::verify().err().map(|e| {
        let mut text = e.to_string();
        let mut source = std::error::Error::source(&e);
        while let Some(s) = source {
            text.push_str(&format!(": {s}"));
            source = s.source();
        }
        // The verifier's log may be long; how it begins is enough here.
        text.chars().take(400).collect::<String>()
    });
    Finding::new(
        "bpf-programs",
        refused.is_none(),
        Level::Missing,
        refused.unwrap_or_else(|| "the kernel accepts all of them".to_owned()),
        "run as root, on Linux 5.18 or later with CONFIG_BPF_SYSCALL and CONFIG_CGROUP_BPF",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases() {
        assert_eq!(parse_release("6.1.0-40-cloud-amd64"), (6, 1));
        assert_eq!(parse_release("6.18.44-fc"), (6, 18));
        assert_eq!(parse_release("7"), (7, 0));
    }

    #[test]
    fn the_v2_mount_is_found_among_v1() {
        let mounts =
            "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(find_cgroup2(mounts), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(find_cgroup2("tmpfs / tmpfs rw 0 0\n"), None);
    }
}
