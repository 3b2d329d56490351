//! The cgroups of a container, by absolute folder: found once after creation, journalled, then used to signal, to watch for
//! out-of-memory and to clean up. Works for cgroup v1 (also beside an empty v2) and for v2.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use nix::unistd::Pid;

const ROOT: &str = "/sys/fs/cgroup";

/// Whether `/sys/fs/cgroup` itself is cgroup v2.
pub fn is_unified() -> bool {
    Path::new(ROOT).join("cgroup.controllers").exists()
}

/// The cgroup folders of a process in every hierarchy, without those in which it sits at the root or where it was before
/// (`not_below` is the process it was forked from, usually the caller).
pub fn of_process(pid: i32, parent: i32) -> Vec<PathBuf> {
    let read = |p: i32| fs::read_to_string(format!("/proc/{p}/cgroup")).unwrap_or_default();
    let theirs = folders(&read(pid), is_unified());
    let mine = folders(&read(parent), is_unified());
    theirs.into_iter().filter(|f| !mine.contains(f)).collect()
}

/// Pure: /proc/PID/cgroup to folders.
fn folders(text: &str, unified: bool) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let rel = path.trim_start_matches('/');
        if rel.is_empty() || rel.split('/').any(|c| c == "..") {
            continue;
        }
        let base = match (controllers, unified) {
            ("", true) => PathBuf::from(ROOT),
            ("", false) => Path::new(ROOT).join("unified"),
            (_, true) => continue,
            (c, false) => Path::new(ROOT).join(c.strip_prefix("name=").unwrap_or(c)),
        };
        out.push(base.join(rel));
    }
    out
}

/// The one folder whose `cgroup.procs` tells the members.
fn members_folder(folders: &[PathBuf]) -> Option<&PathBuf> {
    let prefer = |name: &str| folders.iter().find(|f| f.starts_with(Path::new(ROOT).join(name)));
    prefer("pids").or_else(|| prefer("memory")).or_else(|| prefer("devices")).or_else(|| folders.first())
}

/// Every process in the cgroup and below it.
pub fn processes(folders: &[PathBuf]) -> Vec<Pid> {
    let mut out = Vec::new();
    if let Some(f) = members_folder(folders) {
        collect(f, &mut out);
    }
    out
}

fn collect(folder: &Path, out: &mut Vec<Pid>) {
    let procs = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
    out.extend(procs.lines().filter_map(|l| l.parse().ok()).filter(|p| *p > 1).map(Pid::from_raw));
    for e in fs::read_dir(folder).into_iter().flatten().flatten() {
        if e.file_type().is_ok_and(|t| t.is_dir()) {
            collect(&e.path(), out);
        }
    }
}

/// Sends a signal to every process of the cgroup; for SIGKILL until none is left that was not seen before (a fork race).
/// Returns how many were signalled.
pub fn signal_all(folders: &[PathBuf], signal: i32) -> usize {
    let kill = signal == Signal::SIGKILL as i32;
    if kill
        && is_unified()
        && let Some(f) = folders.first()
        && fs::write(f.join("cgroup.kill"), "1").is_ok()
    {
        return processes(folders).len();
    }
    let mut seen: Vec<Pid> = Vec::new();
    // A fork bomb could outrun a single pass; the pids limit bounds it, the round limit bounds us.
    for _ in 0..if kill { 10 } else { 1 } {
        let fresh: Vec<Pid> = processes(folders).into_iter().filter(|p| !seen.contains(p)).collect();
        if fresh.is_empty() {
            break;
        }
        for p in &fresh {
            let _ = signal_pid(*p, signal);
        }
        seen.extend(fresh);
    }
    seen.len()
}

/// kill(2) with a raw number, so that real-time signals (SIGRTMIN+3 of systemd images) work.
pub fn signal_pid(pid: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes plain integers.
    if unsafe { libc::kill(pid.as_raw(), signal) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Removes the folders with what is below them. `Ok(false)`: still busy, try again soon.
pub fn remove(folders: &[PathBuf]) -> io::Result<bool> {
    let mut done = true;
    for f in folders {
        done &= remove_tree(f)?;
    }
    Ok(done)
}

fn remove_tree(folder: &Path) -> io::Result<bool> {
    match fs::remove_dir(folder) {
        Ok(()) => return Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::ENOTEMPTY)) => {}
        Err(e) => return Err(e),
    }
    let mut done = true;
    for e in fs::read_dir(folder).into_iter().flatten().flatten() {
        if e.file_type().is_ok_and(|t| t.is_dir()) {
            done &= remove_tree(&e.path())?;
        }
    }
    match fs::remove_dir(folder) {
        Ok(()) => Ok(done),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(done),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::ENOTEMPTY)) => Ok(false),
        Err(e) => Err(e),
    }
}

/// The folder of the memory controller.
pub fn memory_folder(folders: &[PathBuf]) -> Option<&PathBuf> {
    if is_unified() {
        return folders.iter().find(|f| f.join("memory.events").exists());
    }
    folders.iter().find(|f| f.starts_with(Path::new(ROOT).join("memory")))
}

/// How often the kernel killed a process of this cgroup for lack of memory.
pub fn oom_kills(folders: &[PathBuf]) -> u64 {
    let Some(f) = memory_folder(folders) else { return 0 };
    let file = if is_unified() { "memory.events" } else { "memory.oom_control" };
    keyed(&fs::read_to_string(f.join(file)).unwrap_or_default(), "oom_kill")
}

fn keyed(text: &str, key: &str) -> u64 {
    text.lines()
        .filter_map(|l| l.split_once(' '))
        .find(|(k, _)| *k == key)
        .and_then(|(_, v)| v.trim().parse().ok())
        .unwrap_or(0)
}

/// Makes `path` (below each hierarchy's root) and moves `pid` into it; returns the folders. For the pod's own init.
pub fn join(path: &str, pid: Pid) -> io::Result<Vec<PathBuf>> {
    let rel = path.trim_start_matches('/');
    if rel.is_empty() || rel.split('/').any(|c| c == ".." || c.is_empty()) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("bad cgroup path {path:?}")));
    }
    let mut out = Vec::new();
    if is_unified() {
        let f = Path::new(ROOT).join(rel);
        fs::create_dir_all(&f)?;
        fs::write(f.join("cgroup.procs"), pid.to_string())?;
        out.push(f);
        return Ok(out);
    }
    for hierarchy in fs::read_dir(ROOT)?.flatten() {
        let base = hierarchy.path();
        let name = hierarchy.file_name();
        // systemd's and the empty v2 hierarchy carry no controller of ours; links are alternative names.
        if name == "systemd" || name == "unified" || !hierarchy.file_type().is_ok_and(|t| t.is_dir()) {
            continue;
        }
        if !base.join("cgroup.procs").exists() {
            continue;
        }
        let f = base.join(rel);
        fs::create_dir_all(&f)?;
        inherit_cpuset(&base, rel);
        fs::write(f.join("cgroup.procs"), pid.to_string())?;
        out.push(f);
    }
    Ok(out)
}

/// A new v1 cpuset is empty and refuses members until it has its parent's CPUs and memory nodes.
fn inherit_cpuset(base: &Path, rel: &str) {
    if !base.join("cpuset.cpus").exists() {
        return;
    }
    let mut at = base.to_owned();
    for part in rel.split('/') {
        let parent = at.clone();
        at.push(part);
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if fs::read_to_string(at.join(file)).is_ok_and(|t| t.trim().is_empty())
                && let Ok(v) = fs::read_to_string(parent.join(file))
            {
                let _ = fs::write(at.join(file), v.trim());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_both_versions() {
        let v1 = "9:name=systemd:/\n4:memory:/kubepods/a\n1:cpu,cpuacct:/kubepods/a\n0::/\n";
        assert_eq!(
            folders(v1, false),
            [
                PathBuf::from("/sys/fs/cgroup/memory/kubepods/a"),
                "/sys/fs/cgroup/cpu,cpuacct/kubepods/a".into()
            ]
        );
        assert_eq!(folders("0::/kubepods/b\n", true), [PathBuf::from("/sys/fs/cgroup/kubepods/b")]);
        assert!(folders("0::/../x\nnonsense\n", true).is_empty());
    }

    #[test]
    fn keyed_values() {
        assert_eq!(keyed("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", "oom_kill"), 3);
        assert_eq!(keyed("", "oom_kill"), 0);
    }
}
