//! The pod's namespaces: made by short-lived forks, kept by bind mounts at `<dir>/ns/NAME`.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use orlop_oci::cgroup;
use orlop_oci::helper::{fork_clean, fork_into, leave};
use orlop_proto::monitor::{CreateSandbox, IdMap};

use crate::journal::{self, SandboxRecord};
use crate::netdev;

/// What failed while a sandbox was made.
#[derive(Debug, thiserror::Error)]
#[error("{stage}: {message}")]
pub struct SandboxError {
    pub stage: &'static str,
    pub message: String,
    pub errno: i32,
    pub invalid: bool,
}

fn fail(stage: &'static str, what: impl std::fmt::Display, e: &io::Error) -> SandboxError {
    SandboxError {
        stage,
        message: format!("{what}: {e}"),
        errno: e.raw_os_error().unwrap_or(0),
        invalid: false,
    }
}

fn invalid(stage: &'static str, message: String) -> SandboxError {
    SandboxError { stage, message, errno: libc::EINVAL, invalid: true }
}

/// Pure: which namespaces a request makes, as (name of the pin, flag).
pub fn wanted(r: &CreateSandbox) -> Vec<(&'static str, CloneFlags)> {
    let mut out = Vec::new();
    if !r.uid_map.is_empty() || !r.gid_map.is_empty() {
        out.push(("user", CloneFlags::CLONE_NEWUSER));
    }
    if r.new_net {
        out.push(("net", CloneFlags::CLONE_NEWNET));
    }
    if r.new_ipc {
        out.push(("ipc", CloneFlags::CLONE_NEWIPC));
    }
    if r.new_uts {
        out.push(("uts", CloneFlags::CLONE_NEWUTS));
    }
    if r.shared_pid {
        out.push(("pid", CloneFlags::CLONE_NEWPID));
    }
    out
}

/// Pure: a sysctl's file, when its namespace is the sandbox's own.
pub fn sysctl_file(name: &str, r: &CreateSandbox) -> Result<PathBuf, SandboxError> {
    let (of, file) = orlop_oci::sysctl_file(name).map_err(|text| invalid("sysctl", text))?;
    if !wanted(r).iter().any(|(_, flag)| *flag == of) {
        return Err(invalid("sysctl", format!("{name} is not in a namespace of this sandbox")));
    }
    Ok(file)
}

/// Makes and pins everything, or nothing.
pub fn create(dir: &Path, r: &CreateSandbox) -> Result<SandboxRecord, SandboxError> {
    let mut sysctls = Vec::new();
    for (name, value) in &r.sysctls {
        sysctls.push((sysctl_file(name, r)?, name.clone(), value.clone()));
    }
    let names = wanted(r);
    let mut record = SandboxRecord {
        id: r.sandbox_id.clone(),
        namespaces: names.iter().map(|(n, _)| n.to_string()).collect(),
        ..Default::default()
    };
    if r.shared_pid && !r.cgroup_path.is_empty() {
        record.init_cgroups = cgroup::make(&r.cgroup_path)
            .map_err(|e| fail("cgroup", format!("cannot make {}", r.cgroup_path), &e))?;
    }
    // First the record, then the pins: whoever cleans up after a crash finds all of them.
    journal::save_sandbox(dir, &record).map_err(|e| SandboxError {
        stage: "journal",
        message: e.to_string(),
        errno: 0,
        invalid: false,
    })?;
    if names.is_empty() {
        return Ok(record);
    }
    let made = make(dir, r, &names, &sysctls, &mut record).and_then(|()| {
        journal::save_sandbox(dir, &record).map_err(|e| SandboxError {
            stage: "journal",
            message: e.to_string(),
            errno: 0,
            invalid: false,
        })
    });
    if let Err(e) = made {
        let _ = destroy(dir, &record);
        return Err(e);
    }
    Ok(record)
}

/// One line over a socket at a time; `N text` fails.
fn say(to: &OwnedFd, text: &str) {
    let _ = rustix::net::send(to, text.as_bytes(), rustix::net::SendFlags::NOSIGNAL);
}

fn hear(from: &OwnedFd) -> io::Result<String> {
    let mut fds = [rustix::event::PollFd::new(from, rustix::event::PollFlags::IN)];
    let ten_seconds = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
    if rustix::event::poll(&mut fds, Some(&ten_seconds))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut buf = [0u8; 1024];
    let n = rustix::io::read(from, &mut buf)?;
    if n == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(String::from_utf8_lossy(&buf[..n]).into_owned())
}

fn make(
    dir: &Path,
    r: &CreateSandbox,
    names: &[(&'static str, CloneFlags)],
    sysctls: &[(PathBuf, String, String)],
    record: &mut SandboxRecord,
) -> Result<(), SandboxError> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(|e| fail("namespace", "socketpair", &e.into()))?;
    let child = match fork_clean(&[theirs.as_raw_fd()]).map_err(|e| fail("namespace", "fork", &e.into()))? {
        Some(pid) => pid,
        None => {
            let text = match in_child(r, names, sysctls, &record.init_cgroups, &theirs) {
                Ok(()) => "done".to_owned(),
                Err((stage, message, errno)) => format!("fail\t{stage}\t{errno}\t{message}"),
            };
            say(&theirs, &text);
            // Stays until its namespaces are pinned.
            let _ = hear(&theirs);
            leave(0);
        }
    };
    drop(theirs);
    let result = drive(dir, r, names, record, child, &ours);
    drop(ours);
    let _ = nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL);
    let _ = waitpid(child, None);
    result
}

fn drive(
    dir: &Path,
    r: &CreateSandbox,
    names: &[(&'static str, CloneFlags)],
    record: &mut SandboxRecord,
    child: Pid,
    ours: &OwnedFd,
) -> Result<(), SandboxError> {
    let lost = |e: io::Error| fail("namespace", "the helper process is gone", &e);
    loop {
        let word = hear(ours).map_err(lost)?;
        let mut parts = word.splitn(4, '\t');
        match parts.next() {
            Some("map") => {
                write_maps(child, &r.uid_map, &r.gid_map)
                    .map_err(|e| fail("namespace", "cannot write the id maps", &e))?;
                say(ours, "mapped");
            }
            Some("init") => {
                record.init_pid = parts.next().and_then(|p| p.parse().ok()).unwrap_or(0);
                record.init_start = journal::start_ticks(record.init_pid);
            }
            Some("done") => break,
            _ => {
                let mut rest = word.splitn(4, '\t').skip(1);
                let stage = match rest.next() {
                    Some("hostname") => "hostname",
                    Some("loopback") => "loopback",
                    Some("sysctl") => "sysctl",
                    Some("cgroup") => "cgroup",
                    _ => "namespace",
                };
                let errno = rest.next().and_then(|n| n.parse().ok()).unwrap_or(0);
                let message = rest.next().unwrap_or("unknown").to_owned();
                return Err(SandboxError { stage, message, errno, invalid: false });
            }
        }
    }
    let ns = dir.join("ns");
    fs::create_dir_all(&ns).map_err(|e| fail("mount", ns.display(), &e))?;
    for (name, _) in names {
        let source = match *name {
            "pid" => format!("/proc/{}/ns/pid", record.init_pid),
            n => format!("/proc/{child}/ns/{n}"),
        };
        pin(&ns.join(name), Path::new(&source))
            .map_err(|e| fail("mount", format!("cannot pin {name}"), &e))?;
    }
    Ok(())
}

fn pin(at: &Path, source: &Path) -> io::Result<()> {
    File::options().write(true).create(true).truncate(false).mode(0o444).open(at)?;
    mount(Some(source), at, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    Ok(())
}

fn write_maps(child: Pid, uid: &[IdMap], gid: &[IdMap]) -> io::Result<()> {
    let text = |maps: &[IdMap]| {
        maps.iter().map(|m| format!("{} {} {}\n", m.container_id, m.host_id, m.size)).collect::<String>()
    };
    fs::write(format!("/proc/{child}/uid_map"), text(uid))?;
    fs::write(format!("/proc/{child}/gid_map"), text(gid))
}

type ChildFailure = (&'static str, String, i32);

fn in_child(
    r: &CreateSandbox,
    names: &[(&'static str, CloneFlags)],
    sysctls: &[(PathBuf, String, String)],
    cgroups: &[PathBuf],
    parent: &OwnedFd,
) -> Result<(), ChildFailure> {
    let nix =
        |stage: &'static str, what: &str, e: nix::Error| (stage, format!("{what}: {}", e.desc()), e as i32);
    let io = |stage: &'static str, what: String, e: io::Error| {
        (stage, format!("{what}: {e}"), e.raw_os_error().unwrap_or(0))
    };
    // While the host's rights are there.
    let entry = cgroup::Entry::open(cgroups, !r.uid_map.is_empty())
        .map_err(|e| io("cgroup", format!("cannot join {}", r.cgroup_path), e))?;
    let has = |flag| names.iter().any(|(_, f)| *f == flag);
    if has(CloneFlags::CLONE_NEWUSER) {
        unshare(CloneFlags::CLONE_NEWUSER)
            .map_err(|e| nix("namespace", "cannot make a user namespace", e))?;
        say(parent, "map");
        hear(parent).map_err(|e| io("namespace", "no id maps".into(), e))?;
        let root = |e| nix("namespace", "cannot become root of the user namespace", e);
        nix::unistd::setgid(0.into()).map_err(root)?;
        nix::unistd::setuid(0.into()).map_err(root)?;
    }
    let rest =
        names.iter().map(|(_, f)| *f).filter(|f| *f != CloneFlags::CLONE_NEWUSER).collect::<CloneFlags>();
    unshare(rest).map_err(|e| nix("namespace", "cannot make the namespaces", e))?;
    if r.new_uts && !r.hostname.is_empty() {
        nix::unistd::sethostname(&r.hostname).map_err(|e| nix("hostname", "cannot set the host name", e))?;
    }
    if r.new_net {
        netdev::up("lo").map_err(|e| io("loopback", "cannot bring lo up".into(), e))?;
    }
    for (file, name, value) in sysctls {
        fs::write(file, value).map_err(|e| io("sysctl", format!("cannot set {name} to {value:?}"), e))?;
    }
    if r.shared_pid {
        if r.oom_score_adj != 0 {
            // Lowering is not allowed everywhere; the pod's init is small and last in line anyway.
            let _ = fs::write("/proc/self/oom_score_adj", r.oom_score_adj.to_string());
        }
        match fork_into(&entry).map_err(|e| io("namespace", "cannot fork the pod's init".into(), e))? {
            None => crate::init::run(),
            Some(pid) => {
                // The monitor reads the number from its own namespace: this child has not changed its own.
                say(parent, &format!("init\t{pid}"));
            }
        }
    }
    Ok(())
}

/// Ends the init, removes its cgroup and the pins. Every step is idempotent.
pub fn destroy(dir: &Path, record: &SandboxRecord) -> io::Result<()> {
    if record.init_pid > 1 && journal::start_ticks(record.init_pid) == record.init_start {
        let pid = Pid::from_raw(record.init_pid);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        // A child of ours is reaped here, anyone else's by its own parent. It has nothing to do but end.
        let mut pause = std::time::Duration::from_micros(250);
        for _ in 0..200 {
            match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => {}
                Ok(_) => break,
                Err(_) if journal::start_ticks(record.init_pid) != record.init_start => break,
                Err(_) => {}
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(std::time::Duration::from_millis(5));
        }
    }
    cgroup::remove_within(&record.init_cgroups, std::time::Duration::from_millis(250))?;
    unpin_all(dir)?;
    journal::forget_sandbox(dir)
}

fn unpin_all(dir: &Path) -> io::Result<()> {
    let ns = dir.join("ns");
    for e in fs::read_dir(&ns).into_iter().flatten().flatten() {
        // A crash between two starts may have stacked mounts.
        while umount2(&e.path(), MntFlags::MNT_DETACH).is_ok() {}
        fs::remove_file(e.path())?;
    }
    match fs::remove_dir(&ns) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_names() {
        let r = CreateSandbox { new_net: true, new_ipc: true, ..Default::default() };
        let ok = |n: &str| sysctl_file(n, &r).map(|p| p.display().to_string()).map_err(|e| e.message);
        assert_eq!(ok("net.ipv4.ip_forward"), Ok("/proc/sys/net/ipv4/ip_forward".into()));
        assert_eq!(ok("kernel.shmmax"), Ok("/proc/sys/kernel/shmmax".into()));
        for bad in ["kernel.panic", "kernel.hostname"] {
            assert!(ok(bad).is_err(), "{bad}");
        }
        let host_net = CreateSandbox { new_ipc: true, ..Default::default() };
        assert!(sysctl_file("net.ipv4.ip_forward", &host_net).is_err());
    }

    #[test]
    fn wanted_namespaces() {
        let r = CreateSandbox {
            new_net: true,
            shared_pid: true,
            uid_map: vec![IdMap::default()],
            ..Default::default()
        };
        let names: Vec<_> = wanted(&r).into_iter().map(|(n, _)| n).collect();
        assert_eq!(names, ["user", "net", "pid"]);
    }
}
