//! The cgroups of a container, by absolute folder: found once after creation, journalled, then used to signal, to watch for
//! out-of-memory and to clean up. Works for cgroup v1 (also beside an empty v2) and for v2.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

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

/// Sends a signal to every process of the cgroup and below; for SIGKILL until none is left that was not seen before (a fork
/// race). Returns how many were signalled.
pub fn signal_all(folders: &[PathBuf], signal: i32) -> usize {
    let kill = signal == Signal::SIGKILL as i32;
    if kill
        && is_unified()
        && let Some(f) = folders.first()
        && fs::write(f.join("cgroup.kill"), "1").is_ok()
    {
        return processes(folders).len();
    }
    let mut seen: HashSet<Pid> = HashSet::new();
    for round in 0..if kill { 10 } else { 1 } {
        // What still has new ones forks faster than they are counted: nothing forks while it is frozen.
        let frozen = (round > 1).then(|| freeze(folders));
        let fresh: Vec<Pid> =
            processes(folders).into_iter().filter(|p| frozen == Some(true) || !seen.contains(p)).collect();
        for p in &fresh {
            let _ = signal_pid(*p, signal);
        }
        if kill {
            // Also what froze itself: it would not die.
            thaw(folders);
        }
        if fresh.is_empty() || frozen == Some(true) {
            break;
        }
        seen.extend(fresh);
    }
    seen.len()
}

/// Whether nothing in the cgroup runs any more. A process that waits in the kernel is not waited for.
fn freeze(folders: &[PathBuf]) -> bool {
    let Some(folder) = v1_folder(folders, "freezer") else { return false };
    let file = folder.join("freezer.state");
    for _ in 0..50 {
        // Again and again: a process that is forked in between is missed by one write.
        if fs::write(&file, "FROZEN").is_err() {
            return false;
        }
        if fs::read_to_string(&file).is_ok_and(|s| s.trim() == "FROZEN") {
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

/// Lets the cgroup and those below it run.
fn thaw(folders: &[PathBuf]) {
    fn each(folder: &Path) {
        let file = folder.join("freezer.state");
        if fs::read_to_string(&file).is_ok_and(|s| s.trim() != "THAWED") {
            // One that is gone meanwhile is as good.
            let _ = fs::write(&file, "THAWED");
        }
        for e in fs::read_dir(folder).into_iter().flatten().flatten() {
            if e.file_type().is_ok_and(|t| t.is_dir()) {
                each(&e.path());
            }
        }
    }
    if let Some(folder) = v1_folder(folders, "freezer") {
        each(folder);
    }
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

/// The same, waiting for processes that are ending; what is left in any hierarchy is killed again.
pub fn remove_within(folders: &[PathBuf], limit: Duration) -> io::Result<bool> {
    let end = Instant::now() + limit;
    let mut pause = Duration::from_micros(250);
    while !remove(folders)? {
        if Instant::now() >= end {
            return Ok(false);
        }
        signal_all(folders, Signal::SIGKILL as i32);
        // Version 1: one that left the members' hierarchy keeps the other folders busy.
        let mut left = Vec::new();
        folders.iter().for_each(|f| collect(f, &mut left));
        for p in left {
            let _ = signal_pid(p, Signal::SIGKILL as i32);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
    Ok(true)
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

/// The folder of a v1 controller, which may be mounted together with others (`cpu,cpuacct`).
pub(crate) fn v1_folder<'a>(folders: &'a [PathBuf], controller: &str) -> Option<&'a Path> {
    let carries = |f: &&PathBuf| {
        let hierarchy = f.strip_prefix(ROOT).ok().and_then(|r| r.components().next());
        hierarchy.is_some_and(|h| h.as_os_str().to_string_lossy().split(',').any(|c| c == controller))
    };
    folders.iter().find(carries).map(PathBuf::as_path)
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

/// The folders of `path` that are there, in every hierarchy. None for the root.
pub fn existing(path: &str) -> Vec<PathBuf> {
    let rel = path.trim_start_matches('/');
    if rel.is_empty() || rel.split('/').any(|c| c == ".." || c.is_empty()) {
        return Vec::new();
    }
    let bases: Vec<PathBuf> = if is_unified() {
        vec![ROOT.into()]
    } else {
        let entries = fs::read_dir(ROOT).into_iter().flatten().flatten();
        // Links are alternative names.
        entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect()
    };
    bases.into_iter().map(|b| b.join(rel)).filter(|f| f.join("cgroup.procs").exists()).collect()
}

/// Makes `path` (below each hierarchy's root); returns the folders.
pub fn make(path: &str) -> io::Result<Vec<PathBuf>> {
    let rel = path.trim_start_matches('/');
    if rel.is_empty() || rel.split('/').any(|c| c == ".." || c.is_empty()) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("bad cgroup path {path:?}")));
    }
    if is_unified() {
        return Ok(vec![make_unified(rel)?]);
    }
    let mut out = Vec::new();
    for hierarchy in fs::read_dir(ROOT)?.flatten() {
        let name = hierarchy.file_name();
        // systemd's and the empty v2 hierarchy carry no controller of ours; links are alternative names.
        if name == "systemd" || name == "unified" || !hierarchy.file_type().is_ok_and(|t| t.is_dir()) {
            continue;
        }
        let base = hierarchy.path();
        let folder = base.join(rel);
        match fs::create_dir(&folder) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(_) if !base.join("cgroup.procs").exists() => continue,
            Err(_) => fs::create_dir_all(&folder)?,
        }
        if name.to_string_lossy().split(',').any(|c| c == "cpuset") {
            inherit_cpuset(&base, rel)?;
        }
        out.push(folder);
    }
    Ok(out)
}

/// Controllers must be handed down by every folder above.
fn make_unified(rel: &str) -> io::Result<PathBuf> {
    let mut at = PathBuf::from(ROOT);
    let all = fs::read_to_string(at.join("cgroup.controllers"))?;
    for part in rel.split('/') {
        let control = at.join("cgroup.subtree_control");
        let given = fs::read_to_string(&control)?;
        for c in all.split_whitespace().filter(|c| !given.split_whitespace().any(|g| g == *c)) {
            // One that cannot be handed down is missed when a limit needs it, not before.
            let _ = fs::write(&control, format!("+{c}"));
        }
        at.push(part);
        match fs::create_dir(&at) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
    }
    Ok(at)
}

/// A new v1 cpuset is empty and refuses members until it has its parent's CPUs and memory nodes.
fn inherit_cpuset(base: &Path, rel: &str) -> io::Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        cpuset_value(base, Path::new(rel), file)?;
    }
    Ok(())
}

/// What a folder has, after those above it have handed down theirs where it has nothing.
fn cpuset_value(base: &Path, rel: &Path, file: &str) -> io::Result<String> {
    let at = base.join(rel).join(file);
    let own = fs::read_to_string(&at)?;
    let Some(above) = rel.parent().filter(|_| own.trim().is_empty()) else { return Ok(own) };
    let value = cpuset_value(base, above, file)?;
    fs::write(&at, value.trim())?;
    Ok(value)
}

/// How a process gets into its cgroup. Opened by whoever has the rights, used by whoever goes in.
///
/// Moving any process but oneself waits for the end of an RCU grace period (tens of milliseconds on a busy machine), since
/// the whole thread group must hold still. On v1 a task that moves itself through `tasks` does not wait, on v2 neither does
/// a process that begins its life in the cgroup.
#[derive(Debug)]
pub enum Entry {
    /// v1: the `tasks` files.
    Tasks(Vec<fs::File>),
    /// v2: the folder, for clone.
    Folder(OwnedFd),
    /// The caller is in it already.
    Here,
}

impl Entry {
    /// `by_caller`: on v2 the caller itself goes in, for its forks. The kernel lets a fork begin in a cgroup only with rights
    /// over it, which are gone once the caller has joined a user namespace.
    pub fn open(folders: &[PathBuf], by_caller: bool) -> io::Result<Entry> {
        use std::os::unix::fs::OpenOptionsExt;
        if let (true, true, Some(folder)) = (by_caller, is_unified(), folders.first()) {
            fs::write(folder.join("cgroup.procs"), "0")?;
            return Ok(Entry::Here);
        }
        if is_unified() {
            let Some(folder) = folders.first() else { return Ok(Entry::Here) };
            let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
            return Ok(Entry::Folder(
                fs::OpenOptions::new().read(true).custom_flags(flags).open(folder)?.into(),
            ));
        }
        let tasks = folders.iter().map(|f| fs::OpenOptions::new().write(true).open(f.join("tasks")));
        Ok(Entry::Tasks(tasks.collect::<io::Result<_>>()?))
    }

    /// For the clone of the process that goes in.
    pub fn folder(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Entry::Folder(f) => Some(f.as_fd()),
            _ => None,
        }
    }

    /// The calling single-threaded process goes in, unless it was cloned into it.
    pub fn enter(&self) -> io::Result<()> {
        if let Entry::Tasks(all) = self {
            for mut f in all.iter() {
                f.write_all(b"0")?;
            }
        }
        Ok(())
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
    fn controllers_by_folder() {
        let all = [PathBuf::from("/sys/fs/cgroup/cpu,cpuacct/a"), "/sys/fs/cgroup/memory/a".into()];
        assert_eq!(v1_folder(&all, "cpu"), Some(all[0].as_path()));
        assert_eq!(v1_folder(&all, "memory"), Some(all[1].as_path()));
        assert_eq!(v1_folder(&all, "cpuset"), None);
    }

    #[test]
    fn keyed_values() {
        assert_eq!(keyed("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", "oom_kill"), 3);
        assert_eq!(keyed("", "oom_kill"), 0);
    }
}
