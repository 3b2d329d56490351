//! `orlop check`: what this kernel and machine lack for a node, each with the remedy.

use std::path::Path;

use orlop_proxy::{Finding, Level};

use crate::Failure;

/// A file system that must be there: (name in /proc/filesystems, what for).
const FILE_SYSTEMS: [(&str, &str); 3] =
    [("overlay", "images' layers"), ("proc", "containers"), ("tmpfs", "containers' /dev and memory volumes")];

fn finding(name: &'static str, good: bool, detail: String, remedy: &str) -> Finding {
    let (level, remedy) = if good { (Level::Ok, String::new()) } else { (Level::Missing, remedy.to_owned()) };
    Finding { name, level, detail, remedy }
}

/// All requirements of a node.
pub fn findings() -> Vec<Finding> {
    let mut all = vec![finding(
        "root",
        nix::unistd::geteuid().is_root(),
        format!("running as user {}", nix::unistd::geteuid()),
        "run as root",
    )];
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    for (name, what) in FILE_SYSTEMS {
        let there = known.lines().any(|l| l.split_whitespace().last() == Some(name));
        let detail = format!("{name} is {} (for {what})", if there { "there" } else { "not there" });
        all.push(finding(
            "file system",
            there,
            detail,
            &format!("modprobe {name}, or use a kernel that has it"),
        ));
    }
    for ns in ["mnt", "net", "ipc", "uts", "pid", "user"] {
        let there = Path::new("/proc/self/ns").join(ns).exists();
        all.push(finding(
            "namespace",
            there,
            format!("{ns} namespaces are {}", if there { "there" } else { "not there" }),
            "use a kernel with CONFIG_NAMESPACES and all its kinds",
        ));
    }
    all.extend(cgroups());
    all.extend(orlop_proxy::check());
    all
}

fn cgroups() -> Vec<Finding> {
    let unified = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").ok();
    let has = |c: &str| match &unified {
        Some(list) => list.split_whitespace().any(|x| x == c),
        None => Path::new("/sys/fs/cgroup").join(c).is_dir(),
    };
    let version = if unified.is_some() { "version 2" } else { "version 1" };
    ["cpu", "memory", "pids", "cpuset"]
        .into_iter()
        .map(|c| {
            let detail =
                format!("{c} controller, cgroup {version}: {}", if has(c) { "there" } else { "not there" });
            finding(
                "cgroup",
                has(c),
                detail,
                "mount /sys/fs/cgroup with this controller (systemd does so at boot)",
            )
        })
        .collect()
}

/// Prints all findings; the error says how many are missing.
pub fn run() -> Result<(), Failure> {
    let mut all = findings();
    all.push(orlop_proxy::verify_programs());
    let mut missing = 0;
    for f in &all {
        let mark = match f.level {
            Level::Ok => "ok     ",
            Level::Warning => "warning",
            Level::Missing => {
                missing += 1;
                "MISSING"
            }
        };
        crate::say(format_args!("{mark}  {}: {}", f.name, f.detail))?;
        if !f.remedy.is_empty() {
            crate::say(format_args!("         remedy: {}", f.remedy))?;
        }
    }
    match missing {
        0 => Ok(()),
        n => Err(format!("{n} of {} requirements are missing; a node cannot run here", all.len()).into()),
    }
}

/// The first thing without which a node cannot run, as an error.
pub fn refuse_if_missing() -> Result<(), Failure> {
    match findings().into_iter().find(|f| f.level == Level::Missing) {
        Some(f) => Err(format!("{}: {}; {} (`orlop check` lists all)", f.name, f.detail, f.remedy).into()),
        None => Ok(()),
    }
}
