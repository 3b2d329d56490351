//! What a cgroup used, read from the kernel's files: version 1 and version 2.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use orlop_proto::cri;

use crate::facts::cgroup_dir;

/// One group's usage. Bytes and nanoseconds.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Usage {
    pub cpu_ns: u64,
    pub memory: u64,
    pub working_set: u64,
    pub rss: u64,
    pub memory_limit: Option<u64>,
    pub page_faults: u64,
    pub major_page_faults: u64,
    pub swap: Option<u64>,
    pub swap_limit: Option<u64>,
    /// As the pids controller counts them: threads.
    pub processes: u64,
    pub processes_limit: Option<u64>,
    pub cpu_user_ns: u64,
    pub cpu_system_ns: u64,
    /// Of the CFS quota: all periods, those in which the group was held back, and for how long.
    pub periods: u64,
    pub throttled_periods: u64,
    pub throttled_ns: u64,
    /// File pages.
    pub cache: u64,
    pub mapped_file: u64,
    pub active_file: u64,
    pub inactive_file: u64,
    pub memory_peak: Option<u64>,
    pub memory_failures: u64,
    pub oom_kills: u64,
    pub disks: Vec<Disk>,
    pub psi_cpu: Option<cri::PsiStats>,
    pub psi_memory: Option<cri::PsiStats>,
    pub psi_io: Option<cri::PsiStats>,
}

/// What a group did on one disk since it began.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Disk {
    pub major: u32,
    pub minor: u32,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub reads: u64,
    pub writes: u64,
}

/// Version 2, `io.stat`: `8:0 rbytes=1 wbytes=2 rios=3 wios=4 …`.
fn disks_v2(text: &str) -> Vec<Disk> {
    let disk = |line: &str| {
        let (id, values) = line.split_once(' ')?;
        let (major, minor) = id.split_once(':')?;
        let mut d = Disk { major: major.parse().ok()?, minor: minor.parse().ok()?, ..Default::default() };
        for (key, value) in values.split(' ').filter_map(|f| f.split_once('=')) {
            let value = value.parse().unwrap_or(0);
            match key {
                "rbytes" => d.read_bytes = value,
                "wbytes" => d.written_bytes = value,
                "rios" => d.reads = value,
                "wios" => d.writes = value,
                _ => {}
            }
        }
        Some(d)
    };
    text.lines().filter_map(disk).collect()
}

/// Version 1, two files of lines `8:0 Read 123`.
fn disks_v1(bytes: &str, operations: &str) -> Vec<Disk> {
    let mut out: Vec<Disk> = Vec::new();
    for (text, count_bytes) in [(bytes, true), (operations, false)] {
        for line in text.lines() {
            let mut f = line.split(' ');
            let (Some(id), Some(kind), Some(Ok(value))) = (f.next(), f.next(), f.next().map(str::parse))
            else {
                continue;
            };
            let Some((Ok(major), Ok(minor))) = id.split_once(':').map(|(a, b)| (a.parse(), b.parse())) else {
                continue;
            };
            let at = out.iter().position(|d| (d.major, d.minor) == (major, minor)).unwrap_or_else(|| {
                out.push(Disk { major, minor, ..Default::default() });
                out.len() - 1
            });
            let d = &mut out[at];
            match (kind, count_bytes) {
                ("Read", true) => d.read_bytes = value,
                ("Write", true) => d.written_bytes = value,
                ("Read", false) => d.reads = value,
                ("Write", false) => d.writes = value,
                _ => {}
            }
        }
    }
    out
}

impl Usage {
    /// For a pod that has no group of its own.
    pub fn add(&mut self, other: &Usage) {
        self.cpu_ns += other.cpu_ns;
        self.memory += other.memory;
        self.working_set += other.working_set;
        self.rss += other.rss;
        self.page_faults += other.page_faults;
        self.major_page_faults += other.major_page_faults;
        self.processes += other.processes;
    }
}

/// A group's path in the hierarchy, from an OCI cgroupsPath: either the path itself, or `slice:prefix:name`.
pub(crate) fn host_path(cgroups_path: &str) -> String {
    match cgroups_path.split(':').collect::<Vec<_>>()[..] {
        [slice, prefix, name] => format!("{}/{prefix}-{name}.scope", slice_path(slice)),
        _ => cgroups_path.to_owned(),
    }
}

/// `a-b.slice` lies at `/a.slice/a-b.slice` (systemd.slice(5)); a path stays as it is.
pub(crate) fn slice_path(parent: &str) -> String {
    let Some(name) = parent.strip_suffix(".slice").filter(|n| !n.contains('/') && *n != "-") else {
        return parent.to_owned();
    };
    let mut path = String::new();
    for (i, _) in name.match_indices('-').chain([(name.len(), "")]) {
        path.push('/');
        path.push_str(&name[..i]);
        path.push_str(".slice");
    }
    path
}

/// Removes the default parent where it is empty; one with groups in it stays.
pub(crate) fn remove_empty_parent(v2: bool, path: &str) {
    if path.trim_matches('/').is_empty() || path.ends_with(".slice") {
        return;
    }
    let hierarchies: Vec<String> = if v2 {
        vec![String::new()]
    } else {
        fs::read_dir("/sys/fs/cgroup")
            .map(|d| d.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect())
            .unwrap_or_default()
    };
    for controller in hierarchies {
        // Fails where it is not there or not empty; both are fine.
        let _ = fs::remove_dir(cgroup_dir(v2, &controller, path));
    }
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// A limit; "max" and the kernel's largest number are none.
fn limit(path: &Path) -> Option<u64> {
    number(path).filter(|l| *l < (1 << 60))
}

/// `key value` lines.
fn table(text: &str) -> HashMap<&str, u64> {
    text.lines()
        .filter_map(|l| l.split_once(' '))
        .filter_map(|(k, v)| Some((k, v.trim().parse().ok()?)))
        .collect()
}

fn psi_line(line: &str) -> cri::PsiData {
    let mut out = cri::PsiData::default();
    for (key, value) in line.split(' ').filter_map(|f| f.split_once('=')) {
        match key {
            "avg10" => out.avg10 = value.parse().unwrap_or(0.0),
            "avg60" => out.avg60 = value.parse().unwrap_or(0.0),
            "avg300" => out.avg300 = value.parse().unwrap_or(0.0),
            // The file counts microseconds, the CRI nanoseconds.
            "total" => out.total = value.parse::<u64>().unwrap_or(0) * 1000,
            _ => {}
        }
    }
    out
}

fn psi(text: &str) -> cri::PsiStats {
    let line = |kind: &str| text.lines().find(|l| l.starts_with(kind)).map(psi_line);
    cri::PsiStats { full: line("full "), some: line("some ") }
}

/// The usage of the group at `path`; `None` when there is no such group.
pub(crate) fn read(v2: bool, path: &str) -> Option<Usage> {
    if v2 { read_v2(&cgroup_dir(true, "", path)) } else { read_v1(path) }
}

/// The processes of the group at `path`, without those of groups below it.
pub(crate) fn pids(v2: bool, path: &str) -> Vec<u32> {
    let dir = cgroup_dir(v2, if v2 { "" } else { "memory" }, path);
    let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|l| l.parse().ok()).collect()
}

fn read_v2(dir: &Path) -> Option<Usage> {
    let cpu = fs::read_to_string(dir.join("cpu.stat")).ok()?;
    let times = table(&cpu);
    let micros = |key: &str| times.get(key).copied().unwrap_or(0) * 1000;
    let mut u = Usage { cpu_ns: micros("usage_usec"), ..Default::default() };
    (u.cpu_user_ns, u.cpu_system_ns) = (micros("user_usec"), micros("system_usec"));
    u.throttled_ns = micros("throttled_usec");
    u.periods = times.get("nr_periods").copied().unwrap_or(0);
    u.throttled_periods = times.get("nr_throttled").copied().unwrap_or(0);
    u.memory = number(&dir.join("memory.current")).unwrap_or(0);
    let text = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let stat = table(&text);
    let of = |key: &str| stat.get(key).copied().unwrap_or(0);
    u.working_set = u.memory.saturating_sub(of("inactive_file"));
    u.rss = of("anon");
    (u.page_faults, u.major_page_faults) = (of("pgfault"), of("pgmajfault"));
    (u.cache, u.mapped_file) = (of("file"), of("file_mapped"));
    (u.active_file, u.inactive_file) = (of("active_file"), of("inactive_file"));
    let text = fs::read_to_string(dir.join("memory.events")).unwrap_or_default();
    let events = table(&text);
    u.memory_failures = events.get("max").copied().unwrap_or(0);
    u.oom_kills = events.get("oom_kill").copied().unwrap_or(0);
    u.memory_peak = number(&dir.join("memory.peak"));
    u.disks = disks_v2(&fs::read_to_string(dir.join("io.stat")).unwrap_or_default());
    u.processes_limit = limit(&dir.join("pids.max"));
    u.memory_limit = limit(&dir.join("memory.max"));
    u.swap = number(&dir.join("memory.swap.current"));
    u.swap_limit = limit(&dir.join("memory.swap.max"));
    u.processes = number(&dir.join("pids.current")).unwrap_or(0);
    let pressure = |name: &str| fs::read_to_string(dir.join(name)).ok().map(|t| psi(&t));
    u.psi_cpu = pressure("cpu.pressure");
    u.psi_memory = pressure("memory.pressure");
    u.psi_io = pressure("io.pressure");
    Some(u)
}

fn read_v1(path: &str) -> Option<Usage> {
    let dir = |controller: &str| cgroup_dir(false, controller, path);
    let memory = dir("memory");
    let cpu = number(&dir("cpuacct").join("cpuacct.usage"));
    let used = number(&memory.join("memory.usage_in_bytes"));
    if cpu.is_none() && used.is_none() {
        return None;
    }
    let mut u = Usage { cpu_ns: cpu.unwrap_or(0), memory: used.unwrap_or(0), ..Default::default() };
    let text = fs::read_to_string(memory.join("memory.stat")).unwrap_or_default();
    let stat = table(&text);
    let of = |key: &str| stat.get(key).copied().unwrap_or(0);
    u.working_set = u.memory.saturating_sub(of("total_inactive_file"));
    u.rss = of("total_rss");
    (u.page_faults, u.major_page_faults) = (of("total_pgfault"), of("total_pgmajfault"));
    (u.cache, u.mapped_file) = (of("total_cache"), of("total_mapped_file"));
    (u.active_file, u.inactive_file) = (of("total_active_file"), of("total_inactive_file"));
    u.memory_peak = number(&memory.join("memory.max_usage_in_bytes"));
    u.memory_failures = number(&memory.join("memory.failcnt")).unwrap_or(0);
    let text = fs::read_to_string(memory.join("memory.oom_control")).unwrap_or_default();
    u.oom_kills = table(&text).get("oom_kill").copied().unwrap_or(0);
    u.cpu_user_ns = number(&dir("cpuacct").join("cpuacct.usage_user")).unwrap_or(0);
    u.cpu_system_ns = number(&dir("cpuacct").join("cpuacct.usage_sys")).unwrap_or(0);
    let text = fs::read_to_string(dir("cpu").join("cpu.stat")).unwrap_or_default();
    let cfs = table(&text);
    u.periods = cfs.get("nr_periods").copied().unwrap_or(0);
    u.throttled_periods = cfs.get("nr_throttled").copied().unwrap_or(0);
    u.throttled_ns = cfs.get("throttled_time").copied().unwrap_or(0);
    let blkio = |name: &str| fs::read_to_string(dir("blkio").join(name)).unwrap_or_default();
    u.disks = disks_v1(
        &blkio("blkio.throttle.io_service_bytes_recursive"),
        &blkio("blkio.throttle.io_serviced_recursive"),
    );
    u.processes_limit = limit(&dir("pids").join("pids.max"));
    u.memory_limit = limit(&memory.join("memory.limit_in_bytes"));
    // memsw counts memory and swap together.
    u.swap = number(&memory.join("memory.memsw.usage_in_bytes")).map(|m| m.saturating_sub(u.memory));
    u.swap_limit = limit(&memory.join("memory.memsw.limit_in_bytes"))
        .map(|l| l.saturating_sub(u.memory_limit.unwrap_or(0)));
    u.processes = number(&dir("pids").join("pids.current")).unwrap_or_else(|| {
        let text = fs::read_to_string(memory.join("cgroup.procs")).unwrap_or_default();
        text.lines().count() as u64
    });
    Some(u)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        for (path, want) in [
            ("/kubepods/podx/id", "/kubepods/podx/id"),
            (
                "kubepods-burstable-podx.slice:orlop:id",
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podx.slice/orlop-id.scope",
            ),
            ("system.slice:orlop:id", "/system.slice/orlop-id.scope"),
        ] {
            assert_eq!(host_path(path), want);
        }
        assert_eq!(slice_path("/kubepods.slice/a.slice"), "/kubepods.slice/a.slice");
    }

    #[test]
    fn version_two_files() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        put("cpu.stat", "usage_usec 1500\nuser_usec 1000\nnr_periods 5\nnr_throttled 2\nthrottled_usec 7\n");
        put("io.stat", "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\nbroken\n");
        put("memory.events", "low 0\nmax 3\noom 1\noom_kill 1\n");
        put("memory.current", "1000\n");
        put("memory.max", "max\n");
        put("memory.stat", "anon 300\nfile 600\ninactive_file 400\npgfault 7\npgmajfault 2\n");
        put("pids.current", "3\n");
        put(
            "cpu.pressure",
            "some avg10=1.50 avg60=0.00 avg300=0.00 total=12\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=4\n",
        );
        let u = read_v2(dir.path()).unwrap();
        assert_eq!((u.cpu_ns, u.memory, u.working_set, u.rss, u.processes), (1_500_000, 1000, 600, 300, 3));
        assert_eq!((u.cpu_user_ns, u.periods, u.throttled_periods, u.throttled_ns), (1_000_000, 5, 2, 7000));
        assert_eq!((u.memory_failures, u.oom_kills), (3, 1));
        let disk = Disk { major: 8, minor: 0, read_bytes: 1, written_bytes: 2, reads: 3, writes: 4 };
        assert_eq!(u.disks, std::slice::from_ref(&disk));
        let (bytes, operations) =
            ("8:0 Read 1\n8:0 Write 2\n8:0 Total 3\nTotal 3\n", "8:0 Read 3\n8:0 Write 4\n");
        assert_eq!(disks_v1(bytes, operations), [disk]);
        assert_eq!((u.memory_limit, u.page_faults, u.major_page_faults), (None, 7, 2));
        let psi = u.psi_cpu.unwrap();
        assert_eq!((psi.some.unwrap().total, psi.full.unwrap().total), (12_000, 4_000));
        assert!(read_v2(Path::new("/nonexistent")).is_none());
    }
}
