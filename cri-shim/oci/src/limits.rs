//! Limits of a cgroup. The files of cgroup v1 that pods use are written here, because libcgroups looks for its hierarchies anew
//! for each controller; cgroup v2, systemd's scopes and what is rare on v1 are left to it.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use libcgroups::common::{
    AnyCgroupManager, CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager,
};
use nix29::unistd::Pid;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, LinuxMemory, LinuxResources};

use crate::{Error, Kind, cgroup, convert};

fn error(e: impl std::error::Error) -> Error {
    let text = convert::chain(&e);
    let errno = convert::errno_in_text(&text).unwrap_or(0);
    Error::new(Kind::Runtime, "cgroup", text, errno)
}

fn manager(path: &Path, id: &str, systemd: bool) -> Result<AnyCgroupManager, Error> {
    let config = CgroupConfig {
        cgroup_path: PathBuf::from(path),
        systemd_cgroup: systemd,
        container_name: id.to_owned(),
    };
    create_cgroup_manager(config).map_err(error)
}

/// Whose limits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group<'a> {
    /// As in the spec.
    pub path: &'a Path,
    pub id: &'a str,
    pub systemd: bool,
    /// Its folders in every hierarchy; none while only systemd knows them.
    pub folders: &'a [PathBuf],
}

impl Group<'_> {
    /// `create`: the group is new and has no device rules yet.
    pub(crate) fn apply(&self, resources: &LinuxResources, create: bool) -> Result<(), Error> {
        for l in resources.hugepage_limits().iter().flatten() {
            check_page_size(l.page_size())?;
        }
        if !self.systemd
            && !cgroup::is_unified()
            && let Some(wanted) = writes_of_v1(resources, create)
        {
            return self.write(&wanted, resources.memory().as_ref());
        }
        let options =
            ControllerOpt { resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None };
        manager(self.path, self.id, self.systemd)?.apply(&options).map_err(error)?;
        match self.folders.first() {
            // libcgroups takes it for "not given". A kernel that does not count swap lacks the file.
            Some(folder) if cgroup::is_unified() && no_swap(resources) && folder.join(SWAP_MAX).exists() => {
                write_all(&folder.join(SWAP_MAX), &["0".to_owned()])
            }
            _ => Ok(()),
        }
    }

    /// Asks systemd for a scope around the calling process.
    pub(crate) fn enter_scope(&self) -> Result<(), Error> {
        manager(self.path, self.id, self.systemd)?.add_task(Pid::this()).map_err(error)
    }

    fn write(&self, wanted: &[Setting], memory: Option<&LinuxMemory>) -> Result<(), Error> {
        let mut again = None;
        for s in wanted {
            let Some(folder) = cgroup::v1_folder(self.folders, s.controller) else {
                return Err(Error::new(
                    Kind::Runtime,
                    "cgroup",
                    format!("{}: this machine has no {} controller", s.file, s.controller),
                    libc::ENOENT,
                ));
            };
            let file = folder.join(&s.file);
            if s.optional && !file.exists() {
                continue;
            }
            match write_all(&file, &s.values) {
                // A shorter period with the old quota may be more than the parent allows; with the new one it is not.
                Err(e) if e.errno == libc::EINVAL && s.file == "cpu.cfs_period_us" => again = Some((file, s)),
                other => other?,
            }
        }
        if let Some((file, s)) = again {
            write_all(&file, &s.values)?;
        }
        match (memory, cgroup::v1_folder(self.folders, "memory")) {
            (Some(m), Some(folder)) => set_memory(folder, m),
            _ => Ok(()),
        }
    }
}

/// Values for one file, one write each.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Setting {
    controller: &'static str,
    file: String,
    values: Vec<String>,
    /// Not every kernel has the file.
    optional: bool,
}

const SWAP_MAX: &str = "memory.swap.max";

/// Pure: whether the group may not swap, which on cgroup v2 is a limit of 0.
fn no_swap(r: &LinuxResources) -> bool {
    let equal =
        r.memory().as_ref().is_some_and(|m| m.limit().is_some_and(|l| l > 0) && m.limit() == m.swap());
    equal && !r.unified().as_ref().is_some_and(|u| u.contains_key(SWAP_MAX))
}

/// As the kernel names them, `2MB` or `64KB`: it becomes part of a file's name.
fn check_page_size(size: &str) -> Result<(), Error> {
    let digits = size.trim_end_matches("KB").trim_end_matches("MB").trim_end_matches("GB");
    if digits.len() + 2 == size.len() && !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) {
        return Ok(());
    }
    let text = format!("{size:?} is no size of huge pages, as 2MB and 1GB are");
    Err(Error::new(Kind::Invalid, "cgroup", text, libc::EINVAL))
}

fn write_all(path: &Path, values: &[String]) -> Result<(), Error> {
    let failed =
        |e: &io::Error| Error::io("cgroup", &format!("cannot write {values:?} to {}", path.display()), e);
    let mut file = OpenOptions::new().write(true).open(path).map_err(|e| failed(&e))?;
    for v in values {
        file.write_all(v.as_bytes()).map_err(|e| failed(&e))?;
    }
    Ok(())
}

/// Pure: what to write for everything but memory, whose order depends on what is in force. `None`: something is asked for that is
/// not written here.
fn writes_of_v1(r: &LinuxResources, create: bool) -> Option<Vec<Setting>> {
    let memory_is_plain = r.memory().as_ref().is_none_or(|m| {
        m.reservation().is_none()
            && m.kernel().is_none()
            && m.kernel_tcp().is_none()
            && m.swappiness().is_none()
            && !m.disable_oom_killer().unwrap_or(false)
            && !m.use_hierarchy().unwrap_or(false)
            && !m.check_before_update().unwrap_or(false)
    });
    let cpu_is_plain = r.cpu().as_ref().is_none_or(|c| {
        c.burst().is_none()
            && c.realtime_period().is_none()
            && c.realtime_runtime().is_none()
            && c.idle().is_none()
    });
    let rest_is_absent = r.block_io().is_none()
        && r.network().is_none()
        && r.rdma().as_ref().is_none_or(|m| m.is_empty())
        && r.unified().as_ref().is_none_or(|m| m.is_empty());
    if !(memory_is_plain && cpu_is_plain && rest_is_absent) {
        return None;
    }
    let mut out = Vec::new();
    let mut set = |controller, file: &str, values: Vec<String>| {
        let optional = file.ends_with("rsvd.limit_in_bytes");
        out.push(Setting { controller, file: file.to_owned(), values, optional });
    };
    if let Some(c) = r.cpu() {
        if let Some(v) = c.shares().filter(|v| *v != 0) {
            set("cpu", "cpu.shares", vec![v.to_string()]);
        }
        if let Some(v) = c.period().filter(|v| *v != 0) {
            set("cpu", "cpu.cfs_period_us", vec![v.to_string()]);
        }
        if let Some(v) = c.quota().filter(|v| *v != 0) {
            set("cpu", "cpu.cfs_quota_us", vec![v.to_string()]);
        }
        if let Some(v) = c.cpus().as_ref().filter(|v| !v.is_empty()) {
            set("cpuset", "cpuset.cpus", vec![v.clone()]);
        }
        if let Some(v) = c.mems().as_ref().filter(|v| !v.is_empty()) {
            set("cpuset", "cpuset.mems", vec![v.clone()]);
        }
    }
    if let Some(p) = r.pids() {
        let limit = p.limit();
        set("pids", "pids.max", vec![if limit > 0 { limit.to_string() } else { "max".to_owned() }]);
    }
    for l in r.hugepage_limits().iter().flatten() {
        // The second counts what is mapped, so that too much is refused rather than killed when it is touched.
        for kind in ["limit_in_bytes", "rsvd.limit_in_bytes"] {
            set("hugetlb", &format!("hugetlb.{}.{kind}", l.page_size()), vec![l.limit().to_string()]);
        }
    }
    if create && let Some(rules) = r.devices() {
        for (allow, lines) in device_rules(rules) {
            set("devices", if allow { "devices.allow" } else { "devices.deny" }, lines);
        }
    }
    Some(out)
}

/// The rules of a spec, then those for the devices that every container has, in runs of the same kind. A spec that ends with
/// "everything" is left alone.
fn device_rules(rules: &[LinuxDeviceCgroup]) -> Vec<(bool, Vec<String>)> {
    let mut all: Vec<(bool, String)> = rules.iter().map(|r| (r.allow(), device_line(r))).collect();
    if !all.last().is_some_and(|(allow, line)| *allow && line.starts_with("a ")) {
        let standard = ["c 1:3", "c 1:5", "c 1:7", "c 1:8", "c 1:9", "c 5:0", "c 5:1", "c 5:2", "c 136:*"];
        all.extend(["c *:* m", "b *:* m"].map(|l| (true, l.to_owned())));
        all.extend(standard.map(|l| (true, format!("{l} rwm"))));
    }
    let mut runs: Vec<(bool, Vec<String>)> = Vec::new();
    for (allow, line) in all {
        match runs.last_mut() {
            Some((a, lines)) if *a == allow => lines.push(line),
            _ => runs.push((allow, vec![line])),
        }
    }
    runs
}

fn device_line(r: &LinuxDeviceCgroup) -> String {
    let kind = match r.typ().unwrap_or(LinuxDeviceType::A) {
        LinuxDeviceType::B => "b",
        LinuxDeviceType::C | LinuxDeviceType::U => "c",
        LinuxDeviceType::A | LinuxDeviceType::P => "a",
    };
    let number = |n: Option<i64>| n.filter(|n| *n >= 0).map_or("*".to_owned(), |n| n.to_string());
    let access = r.access().clone().unwrap_or_else(|| "rwm".to_owned());
    format!("{kind} {}:{} {access}", number(r.major()), number(r.minor()))
}

/// The kernel wants memory plus swap to be at least memory at every moment, so a rise begins with the former.
fn set_memory(folder: &Path, m: &LinuxMemory) -> Result<(), Error> {
    let limit = m.limit().filter(|v| *v != 0);
    // Without a limit there is none on memory plus swap either.
    let swap = m.swap().filter(|v| *v != 0).or(limit.filter(|l| *l == -1));
    let (limit_file, swap_file) =
        (folder.join("memory.limit_in_bytes"), folder.join("memory.memsw.limit_in_bytes"));
    let put = |path: &Path, v: i64| write_all(path, &[v.to_string()]);
    // A kernel that does not count swap lacks the file.
    let swap = swap.filter(|_| swap_file.exists());
    let (Some(l), Some(s)) = (limit, swap) else {
        limit.map_or(Ok(()), |l| put(&limit_file, l))?;
        return swap.map_or(Ok(()), |s| put(&swap_file, s));
    };
    let now: u64 =
        fs::read_to_string(&swap_file).ok().and_then(|t| t.trim().parse().ok()).unwrap_or(u64::MAX);
    if s == -1 || u64::try_from(s).is_ok_and(|s| s > now) {
        put(&swap_file, s)?;
        put(&limit_file, l)
    } else {
        put(&limit_file, l)?;
        put(&swap_file, s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn writes(v: Value, create: bool) -> Option<Vec<(String, Vec<String>)>> {
        let r: LinuxResources = serde_json::from_value(v).expect("resources");
        writes_of_v1(&r, create).map(|all| all.into_iter().map(|s| (s.file, s.values)).collect())
    }

    fn one(file: &str, value: &str) -> (String, Vec<String>) {
        (file.to_owned(), vec![value.to_owned()])
    }

    #[test]
    fn what_is_written_on_v1() {
        let cpu = json!({"cpu": {"shares": 512, "quota": -1, "period": 50000, "cpus": "0-1", "mems": ""}});
        assert_eq!(
            writes(cpu, true),
            Some(vec![
                one("cpu.shares", "512"),
                one("cpu.cfs_period_us", "50000"),
                one("cpu.cfs_quota_us", "-1"),
                one("cpuset.cpus", "0-1"),
            ])
        );
        assert_eq!(writes(json!({"cpu": {"shares": 0}, "memory": {"limit": 5}}), true), Some(vec![]));
        assert_eq!(writes(json!({"pids": {"limit": 7}}), false), Some(vec![one("pids.max", "7")]));
        assert_eq!(writes(json!({"pids": {"limit": -1}}), false), Some(vec![one("pids.max", "max")]));
        assert_eq!(
            writes(json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}]}), true),
            Some(vec![
                one("hugetlb.2MB.limit_in_bytes", "4194304"),
                one("hugetlb.2MB.rsvd.limit_in_bytes", "4194304")
            ])
        );
        for left_to_libcgroups in [
            json!({"cpu": {"realtimePeriod": 5}}),
            json!({"memory": {"swappiness": 5}}),
            json!({"blockIO": {"weight": 10}}),
            json!({"unified": {"a": "b"}}),
            json!({"network": {"classID": 5}}),
        ] {
            assert_eq!(writes(left_to_libcgroups.clone(), true), None, "{left_to_libcgroups}");
        }
    }

    #[test]
    fn sizes_of_huge_pages() {
        for good in ["2MB", "1GB", "64KB"] {
            assert_eq!(check_page_size(good), Ok(()), "{good}");
        }
        for bad in ["", "MB", "2", "2mb", "2/../x", "../2MB", "2MBMB", "2KBMB", "2TB"] {
            assert!(check_page_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn memory_without_swap_on_v2() {
        let of = |v: Value| no_swap(&serde_json::from_value(v).expect("resources"));
        assert!(of(json!({"memory": {"limit": 5, "swap": 5}})));
        for swaps in [
            json!({}),
            json!({"memory": {"limit": 5}}),
            json!({"memory": {"limit": 5, "swap": 6}}),
            json!({"memory": {"limit": -1, "swap": -1}}),
            json!({"memory": {"limit": 5, "swap": 5}, "unified": {"memory.swap.max": "max"}}),
        ] {
            assert!(!of(swaps.clone()), "{swaps}");
        }
    }

    #[test]
    fn device_rules_on_v1() {
        let rules = json!({"devices": [
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "b", "major": 8, "minor": 0, "access": "rw"},
            {"allow": true, "type": "c", "major": 10, "access": "r"},
        ]});
        let got = writes(rules.clone(), true).expect("written here");
        assert_eq!(got[0], one("devices.deny", "a *:* rwm"));
        assert_eq!(got[1].1[..3], ["b 8:0 rw", "c 10:* r", "c *:* m"].map(str::to_owned));
        assert!(got[1].1.contains(&"c 136:* rwm".to_owned()));
        assert_eq!(writes(rules, false), Some(vec![]), "an update leaves the rules");
        let all = json!({"devices": [{"allow": true, "access": "rwm"}]});
        assert_eq!(writes(all, true), Some(vec![one("devices.allow", "a *:* rwm")]));
    }

    #[test]
    fn memory_rises_and_falls() {
        let dir = std::env::temp_dir().join(format!("orlop-oci-memory-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a folder");
        let file = |n: &str| dir.join(n);
        fs::write(file("memory.limit_in_bytes"), "100").expect("a file");
        fs::write(file("memory.memsw.limit_in_bytes"), "200").expect("a file");
        let m = |v: Value| serde_json::from_value::<LinuxMemory>(v).expect("memory");
        set_memory(&dir, &m(json!({"limit": 300, "swap": 400}))).expect("written");
        let read = |n: &str| fs::read_to_string(file(n)).expect("a file");
        // A real file keeps what a shorter write leaves; these have the same length.
        assert_eq!(
            (read("memory.limit_in_bytes"), read("memory.memsw.limit_in_bytes")),
            ("300".into(), "400".into())
        );
        fs::remove_dir_all(dir).expect("the folder goes");
    }
}
