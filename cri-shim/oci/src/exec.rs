//! A further process in a running container. All of it is this crate's own: the helper joins the container's namespaces through
//! a pidfd and forks the process, which goes into the cgroup, becomes the user and executes the program.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use libcontainer::container::ContainerStatus;
use nix::sched::{CloneFlags, setns};
use oci_spec::runtime::Process;
use rustix::process::PidfdFlags;

use crate::console::{self, Console};
use crate::create::Context;
use crate::executor::{Program, Report, send_report};
use crate::identity::{Identity, become_root};
use crate::kept::Kept;
use crate::lsm::Confinement;
use crate::notify::Notify;
use crate::ops::{Outcome, Stdio, check_id, filter_path, set_oom_score_adj};
use crate::rlimits::Rlimits;
use crate::schedule::Schedule;
use crate::seccomp::Filter;
use crate::{Error, Helper, Kind, cgroup, helper, sys};

/// What `exec` needs to know.
#[derive(Debug)]
pub struct ExecSpec<'a> {
    pub root: &'a Path,
    pub id: &'a str,
    /// The container's first process, which the caller has not reaped.
    pub init: i32,
    pub context: &'a Context,
    pub cgroups: &'a [PathBuf],
    /// OCI Process as JSON.
    pub process: &'a [u8],
    pub tty: bool,
    pub stdio: Stdio,
    /// Write end of a pipe that reports a failed start of the program to [`crate::read_report`]; closed without a word
    /// when the program runs.
    pub report: OwnedFd,
}

/// Begins a process in a running container. Answers [`Outcome::Executed`] as soon as the process exists; whether its program
/// runs is told by the report.
pub fn exec(e: ExecSpec<'_>) -> Result<Helper, Error> {
    check_id(e.id)?;
    let init = rustix::process::Pid::from_raw(e.init)
        .ok_or_else(|| Error::new(Kind::WrongState, "state", "the container has no process", 0))?;
    // Opened here, where the number cannot have been given to another process yet.
    let init = rustix::process::pidfd_open(init, PidfdFlags::empty())
        .map_err(|err| Error::io("state", "cannot find the container's process", &err.into()))?;
    let mut keep = e.stdio.fds();
    keep.extend([init.as_raw_fd(), e.report.as_raw_fd()]);
    helper::run(&keep, || match in_helper(&e, init.as_fd()) {
        Ok((pid, console)) => (Ok(Outcome::Executed { pid }), console),
        Err(err) => (Err(err), None),
    })
}

fn in_helper(e: &ExecSpec<'_>, init: BorrowedFd<'_>) -> Result<(i32, Option<OwnedFd>), Error> {
    let process = parse(e.process)?;
    let filter = match e.context.filtered {
        true => Some(read_filter(&filter_path(e.root, e.id))?),
        false => None,
    };
    e.stdio.give_to(e.context.host_uid(process.user().uid()));
    // The monitor's own score must not be inherited; the container's is that of its first process.
    let own = || fs::read_to_string(format!("/proc/{}/oom_score_adj", e.init)).ok()?.trim().parse().ok();
    if let Some(score) = process.oom_score_adj().or_else(own) {
        set_oom_score_adj(score);
    }
    nix::sys::prctl::set_dumpable(false).map_err(|err| Error::io("exec", "set undumpable", &err.into()))?;
    let userns = !e.context.uid_map.is_empty();
    let entry = cgroup::Entry::open(e.cgroups, userns)
        .map_err(|err| Error::io("cgroup", "cannot open the container's cgroup", &err))?;
    // A v2 cgroup that the container has divided takes no member itself: where its first process is, others may be.
    let beside_init = cgroup::Entry::open(&cgroup::of_process(e.init, std::process::id() as i32), false).ok();
    let confinement = Confinement::of(&process)?;
    let tty = Console::new(e.tty)?;
    let kept = e.context.kept.then(|| Kept::load(e.root, e.id)).transpose()?;
    let notify = match kept.as_ref().and_then(|k| k.listener.clone()) {
        Some(listener) => Some(Notify::connect(listener)?),
        None => None,
    };
    let limits = Rlimits::new(&process);
    let mut flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    // With cgroup v1 containers stay in the host's, which nobody may join from within a user namespace.
    let cgroups_of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/cgroup")).ok();
    let own_cgroups = cgroups_of("self") != cgroups_of(&e.init.to_string());
    if userns {
        flags |= CloneFlags::CLONE_NEWUSER;
        limits.set()?;
    }
    setns(init, flags).map_err(|err| match err {
        nix::Error::ESRCH => Error::new(Kind::WrongState, "state", "the container has exited", libc::ESRCH),
        err => Error::io("namespace", "cannot join the container's namespaces", &err.into()),
    })?;
    if userns {
        become_root().map_err(|err| Error::new(Kind::Runtime, "namespace", err.to_string(), err.errno))?;
    }
    let begun = Begun {
        cgroups: own_cgroups.then_some(init),
        entry: &entry,
        report: e.report.as_raw_fd(),
        stdio: &e.stdio,
        tty: tty.as_ref(),
        limits: (!userns).then_some(limits),
        schedule: Schedule::of(&process)?,
        confinement,
        cwd: process.cwd(),
        program: Program::new(&process),
        identity: Identity::new(&process, filter, notify.as_ref().map(Notify::courier)),
    };
    let forked = sys::fork_sibling(entry.folder()).or_else(|err| match (err.raw_os_error(), &beside_init) {
        (Some(libc::EBUSY | libc::EOPNOTSUPP), Some(other)) => sys::fork_sibling(other.folder()),
        _ => Err(err),
    });
    let Some(pid) = forked.map_err(|err| Error::io("exec", "cannot fork", &err))? else {
        if let Some(notify) = notify {
            notify.in_process();
        }
        begun.go()
    };
    let after = || -> Result<Option<OwnedFd>, Error> {
        let master = tty.map(Console::receive).transpose()?;
        if let (Some(n), Some(k)) = (notify, kept) {
            n.deliver(pid.as_raw(), &k.state(ContainerStatus::Running, Some(e.init)))?;
        }
        Ok(master)
    };
    match after() {
        Ok(master) => Ok((pid.as_raw(), master)),
        Err(err) => {
            // Nobody would answer it, or hear of its end.
            let _ = cgroup::signal_pid(pid, libc::SIGKILL);
            Err(err)
        }
    }
}

fn parse(json: &[u8]) -> Result<Process, Error> {
    let invalid = |m: String| Error::new(Kind::Invalid, "spec", m, 0);
    let process: Process =
        serde_json::from_slice(json).map_err(|e| invalid(format!("the process does not parse: {e}")))?;
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(invalid("the process has no arguments".into()));
    }
    if process.exec_cpu_affinity().is_some() {
        return Err(invalid("CPU affinity of an exec is not supported".into()));
    }
    Ok(process)
}

fn read_filter(path: &Path) -> Result<Filter, Error> {
    let what = format!("cannot read the seccomp filter {}", path.display());
    let bytes = fs::read(path).map_err(|e| Error::io("seccomp", &what, &e))?;
    Filter::from_bytes(&bytes)
        .ok_or_else(|| Error::new(Kind::Runtime, "seccomp", format!("{what}: damaged"), 0))
}

/// The new process, from its fork on.
struct Begun<'a> {
    /// The container's first process, where it has a cgroup namespace of its own.
    cgroups: Option<BorrowedFd<'a>>,
    entry: &'a cgroup::Entry,
    report: RawFd,
    stdio: &'a Stdio,
    tty: Option<&'a Console>,
    limits: Option<Rlimits>,
    schedule: Schedule,
    confinement: Option<Confinement>,
    cwd: &'a Path,
    program: Program,
    identity: Identity,
}

impl Begun<'_> {
    fn go(self) -> ! {
        let report = match self.prepare() {
            Ok(()) => self.program.run(&self.identity),
            Err(r) => r,
        };
        send_report(self.report, &report);
        helper::leave(1)
    }

    fn prepare(&self) -> Result<(), Report> {
        let io = |what: &'static str| {
            move |e: io::Error| (e.raw_os_error().unwrap_or(libc::EIO), format!("{what}: {e}"))
        };
        let nix = |what: &'static str| move |e: nix::Error| (e as i32, format!("{what}: {}", e.desc()));
        self.entry.enter().map_err(io("cannot enter the cgroup"))?;
        // Only now: where the hierarchy is mounted with `nsdelegate`, as systemd does, nothing gets into a cgroup namespace's
        // part of it from outside once the namespace is its own.
        if let Some(init) = self.cgroups {
            setns(init, CloneFlags::CLONE_NEWCGROUP).map_err(nix("cannot join the cgroup namespace"))?;
        }
        if let Some(l) = &self.limits {
            l.set().map_err(|e| (e.errno, e.message))?;
        }
        self.schedule.set().map_err(|e| (e.errno, e.message))?;
        nix::unistd::setsid().map_err(nix("cannot make a session"))?;
        self.connect().map_err(io("cannot connect the standard streams"))?;
        if let Some(c) = &self.confinement {
            c.set_for_execve().map_err(|e| (e.errno, e.to_string()))?;
        }
        // Nothing that is open here may be reachable for the program or as its folder (CVE-2024-21626).
        sys::close_on_exec_from(3).map_err(io("cannot mark descriptors"))?;
        self.identity.assume_in(self.cwd).map_err(|e| (e.errno, e.to_string()))
    }

    fn connect(&self) -> io::Result<()> {
        if let Some(console) = self.tty {
            let (master, slave) = console::open_in_container()?;
            console.send(&master)?;
            nix::unistd::dup2_stdin(&slave)?;
            nix::unistd::dup2_stdout(&slave)?;
            nix::unistd::dup2_stderr(&slave)?;
            sys::take_terminal()?;
            let uid = rustix::fs::Uid::from_raw(self.program.uid());
            let _ = rustix::fs::fchown(&slave, Some(uid), None);
            return Ok(());
        }
        // Without an end: the container's null device, else the host's, which is there already.
        let null = null_of_container();
        let end = |given: &Option<OwnedFd>| {
            given.as_ref().or(null.as_ref()).map(|f| f.as_raw_fd()).map(helper::borrow)
        };
        end(&self.stdio.stdin).map_or(Ok(()), nix::unistd::dup2_stdin)?;
        end(&self.stdio.stdout).map_or(Ok(()), nix::unistd::dup2_stdout)?;
        end(&self.stdio.stderr).map_or(Ok(()), nix::unistd::dup2_stderr)?;
        Ok(())
    }
}

/// Only if it is what its name says.
fn null_of_container() -> Option<OwnedFd> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW | libc::O_NOCTTY;
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open("/dev/null").ok()?;
    let m = file.metadata().ok()?;
    (m.file_type().is_char_device() && m.rdev() == libc::makedev(1, 3)).then_some(file.into())
}
