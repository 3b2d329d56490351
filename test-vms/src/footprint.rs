//! What a cluster could leave on a machine: a snapshot before and one after must be equal.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Processes, mounts, links, routes, cgroups, files (pinned namespaces and BPF objects too) and BPF objects, each as text
/// that names it.
#[derive(Debug, PartialEq)]
pub struct Footprint {
    pub processes: BTreeSet<String>,
    pub mounts: BTreeSet<String>,
    pub links: BTreeSet<String>,
    pub routes: BTreeSet<String>,
    /// Tables of nf_tables.
    pub tables: BTreeSet<String>,
    pub cgroups: BTreeSet<String>,
    pub programs: BTreeSet<u32>,
    pub maps: BTreeSet<u32>,
    pub files: BTreeSet<String>,
}

/// Folders and files that an installation writes to.
const FOLDERS: [&str; 12] = [
    "/etc/orlop",
    "/etc/cni",
    "/etc/kubernetes",
    "/opt/cni",
    "/run/orlop",
    "/run/orlop-cni-networks",
    "/run/netns",
    "/sys/fs/bpf",
    "/var/lib/kubelet",
    "/var/log/containers",
    "/var/log/orlop.log",
    "/var/log/pods",
];

fn processes() -> BTreeSet<String> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter(|e| e.file_name().to_string_lossy().bytes().all(|b| b.is_ascii_digit()));
    pids.filter_map(|e| {
        let command = fs::read_to_string(e.path().join("cmdline")).ok()?.replace('\0', " ");
        let ours =
            command.contains("orlop-monitor") || command.contains("orlop up") || command.contains("/web");
        ours.then(|| format!("{} {command}", e.file_name().to_string_lossy()))
    })
    .collect()
}

fn folders_below(dir: &Path, found: &mut BTreeSet<String>) {
    for e in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = e.path();
        if e.file_type().is_ok_and(|t| t.is_dir()) {
            found.insert(path.to_string_lossy().into_owned());
            folders_below(&path, found);
        }
    }
}

fn files_below(path: &Path, found: &mut BTreeSet<String>) {
    if path.exists() {
        found.insert(path.to_string_lossy().into_owned());
        for e in fs::read_dir(path).into_iter().flatten().flatten() {
            files_below(&e.path(), found);
        }
    }
}

/// Interface, destination and prefix of each route, as the kernel writes them.
fn routes() -> BTreeSet<String> {
    let of = |path: &str, columns: &[usize]| -> Vec<String> {
        let text = fs::read_to_string(path).unwrap_or_default();
        let route = |l: &str| {
            let words: Vec<&str> = l.split_whitespace().collect();
            columns.iter().filter_map(|c| words.get(*c).copied()).collect::<Vec<_>>().join(" ")
        };
        text.lines().map(route).collect()
    };
    // Every link gets and loses these with its address, in the kernel's own time.
    let of_link =
        |r: &String| r.split(' ').nth(1).is_some_and(|to| to.starts_with("fe80") || to.starts_with("ff00"));
    let v6 = of("/proc/net/ipv6_route", &[9, 0, 1]).into_iter().filter(|r| !of_link(r));
    of("/proc/net/route", &[0, 1, 7]).into_iter().chain(v6).collect()
}

/// Not from /sys, whose mount may show another network namespace.
fn links() -> BTreeSet<String> {
    let out =
        Command::new("ip").args(["-o", "link"]).output().expect("ip is installed: apt-get install iproute2");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    text.lines().filter_map(|l| l.split(": ").nth(1)).map(str::to_owned).collect()
}

fn tables() -> BTreeSet<String> {
    let out = Command::new("nft").args(["list", "tables"]).output();
    let out = out.expect("nft is installed: apt-get install nftables");
    String::from_utf8_lossy(&out.stdout).lines().map(str::to_owned).collect()
}

impl Footprint {
    pub fn take() -> Footprint {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mounts = mounts.lines().filter_map(|l| l.split(' ').nth(4)).map(str::to_owned).collect();
        let mut cgroups = BTreeSet::new();
        folders_below(Path::new("/sys/fs/cgroup"), &mut cgroups);
        let mut files = BTreeSet::new();
        FOLDERS.iter().for_each(|f| files_below(Path::new(f), &mut files));
        Footprint {
            processes: processes(),
            mounts,
            links: links(),
            routes: routes(),
            tables: tables(),
            cgroups,
            programs: aya::programs::loaded_programs().flatten().map(|p| p.id()).collect(),
            maps: aya::maps::loaded_maps().flatten().map(|m| m.id()).collect(),
            files,
        }
    }

    /// What is in `after` and was not in `self`, a line each.
    pub fn left_by(&self, after: &Footprint) -> Vec<String> {
        let mut left = Vec::new();
        let mut text = |what: &str, a: &BTreeSet<String>, b: &BTreeSet<String>| {
            left.extend(b.difference(a).map(|x| format!("{what} {x}")));
        };
        text("process", &self.processes, &after.processes);
        text("mount", &self.mounts, &after.mounts);
        text("link", &self.links, &after.links);
        text("route", &self.routes, &after.routes);
        text("nf_tables", &self.tables, &after.tables);
        text("cgroup", &self.cgroups, &after.cgroups);
        text("file", &self.files, &after.files);
        left.extend(after.programs.difference(&self.programs).map(|x| format!("BPF program {x}")));
        left.extend(after.maps.difference(&self.maps).map(|x| format!("BPF map {x}")));
        left
    }
}
