//! What survives this process: `<dir>/sandbox.json` and `<dir>/containers/<id>.json`.
//!
//! Written before the request that caused it is answered, to the page cache: it need not outlive a reboot, since the processes do not.
//! A server that finds the monitor dead reads these files (or runs `orlop-monitor --cleanup`).

use std::path::{Path, PathBuf};

use orlop_base::durable;
use orlop_oci::{External, Runtime};
use orlop_proto::monitor::{ContainerPhase, ContainerState};
use serde::{Deserialize, Serialize};

/// Version of both files; a reader refuses others.
pub const VERSION: u32 = 1;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Being made: a monitor that dies now leaves a half-made container.
    #[default]
    Creating,
    Created,
    Running,
    Exited,
}

/// One container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub id: String,
    pub bundle: PathBuf,
    pub log_path: PathBuf,
    pub phase: Phase,
    /// Process id on the host; with `pid_start` (clock ticks since boot) it is unambiguous.
    pub pid: i32,
    pub pid_start: u64,
    pub cgroups: Vec<PathBuf>,
    pub own_pid_namespace: bool,
    pub systemd_cgroup: bool,
    pub tty: bool,
    pub created_at_ns: i64,
    pub started_at_ns: i64,
    pub finished_at_ns: i64,
    /// 128 + signal when a signal ended it.
    pub exit_code: i32,
    pub oom_killed: bool,
    /// The cgroup's kill counter at creation.
    pub oom_baseline: u64,
    /// The OCI runtime that runs it, when it is not this program itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<Runtime>,
}

impl Record {
    /// Its container as one of another OCI runtime; `root` is [`external_root`].
    pub fn external<'a>(&'a self, root: &'a Path) -> Option<External<'a>> {
        let runtime = self.runtime.as_ref()?;
        Some(External { runtime, root, id: &self.id, systemd_cgroup: self.systemd_cgroup })
    }

    pub fn state(&self) -> ContainerState {
        ContainerState {
            container_id: self.id.clone(),
            phase: match self.phase {
                Phase::Creating | Phase::Created => ContainerPhase::Created,
                Phase::Running => ContainerPhase::Running,
                Phase::Exited => ContainerPhase::Exited,
            } as i32,
            pid: self.pid.max(0) as u32,
            created_at_ns: self.created_at_ns,
            started_at_ns: self.started_at_ns,
            finished_at_ns: self.finished_at_ns,
            exit_code: self.exit_code,
            oom_killed: self.oom_killed,
        }
    }
}

/// The sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxRecord {
    pub id: String,
    /// Names of the pinned namespaces in `<dir>/ns`.
    pub namespaces: Vec<String>,
    pub init_pid: i32,
    pub init_start: u64,
    pub init_cgroups: Vec<PathBuf>,
}

/// State of other OCI runtimes.
pub fn external_root(dir: &Path) -> PathBuf {
    dir.join("external")
}

pub fn sandbox_path(dir: &Path) -> PathBuf {
    dir.join("sandbox.json")
}

pub fn containers_dir(dir: &Path) -> PathBuf {
    dir.join("containers")
}

fn container_path(dir: &Path, id: &str) -> PathBuf {
    containers_dir(dir).join(format!("{id}.json"))
}

pub fn save_container(dir: &Path, r: &Record) -> Result<(), durable::Error> {
    durable::append_json(&container_path(dir, &r.id), VERSION, r)
}

pub fn forget_container(dir: &Path, id: &str) -> std::io::Result<()> {
    ignore_missing(std::fs::remove_file(container_path(dir, id)))
}

pub fn save_sandbox(dir: &Path, r: &SandboxRecord) -> Result<(), durable::Error> {
    durable::append_json(&sandbox_path(dir), VERSION, r)
}

pub fn forget_sandbox(dir: &Path) -> std::io::Result<()> {
    ignore_missing(std::fs::remove_file(sandbox_path(dir)))
}

pub fn load_sandbox(dir: &Path) -> Result<Option<SandboxRecord>, durable::Error> {
    durable::read_json(&sandbox_path(dir), VERSION)
}

/// Every container record that reads, and the errors of those that do not.
pub fn load_containers(dir: &Path) -> (Vec<Record>, Vec<durable::Error>) {
    let mut records = Vec::new();
    let mut errors = Vec::new();
    for e in std::fs::read_dir(containers_dir(dir)).into_iter().flatten().flatten() {
        let name = e.file_name();
        let name = name.to_string_lossy();
        if name.starts_with('.') || !name.ends_with(".json") {
            continue;
        }
        match durable::read_json(&e.path(), VERSION) {
            Ok(Some(r)) => records.push(r),
            Ok(None) => {}
            Err(err) => errors.push(err),
        }
    }
    (records, errors)
}

fn ignore_missing(r: std::io::Result<()>) -> std::io::Result<()> {
    match r {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The process's start in clock ticks since boot (field 22 of /proc/PID/stat); 0 when there is none.
pub fn start_ticks(pid: i32) -> u64 {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).ok().and_then(|t| parse_start(&t)).unwrap_or(0)
}

/// The command name in parentheses may hold spaces and parentheses itself.
fn parse_start(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

pub fn now_ns() -> i64 {
    i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_of_a_process_with_a_strange_name() {
        let stat = "12 (a) b (c)) S 1 12 12 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 424242 1 1";
        assert_eq!(parse_start(stat), Some(424242));
        assert!(start_ticks(std::process::id() as i32) > 0);
        assert_eq!(start_ticks(-1), 0);
    }

    #[test]
    fn records_come_back() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(containers_dir(dir.path())).unwrap();
        let r = Record { id: "a".into(), phase: Phase::Exited, exit_code: 3, ..Default::default() };
        save_container(dir.path(), &r).unwrap();
        std::fs::write(containers_dir(dir.path()).join("b.json"), b"{").unwrap();
        let (records, errors) = load_containers(dir.path());
        assert_eq!((records, errors.len()), (vec![r], 1));
        forget_container(dir.path(), "a").unwrap();
        forget_container(dir.path(), "a").unwrap();
    }
}
