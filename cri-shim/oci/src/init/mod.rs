//! The first process of a container, from its fork to its start.

mod dev;
mod mount;
pub(crate) mod plan;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use libcontainer::container::State;
use libcontainer::hooks::run_hooks;
use nix::sched::{setns, unshare};
use nix::sys::stat::{Mode, umask};
use oci_spec::runtime::Hook;
pub(crate) use plan::Plan;

use crate::console::Console;
use crate::executor::Init;
use crate::ops::Stdio;
use crate::rlimits::Rlimits;
use crate::{Error, Kind, cgroup, convert, helper, sys};

/// What failed in the first process, for its helper.
#[derive(Debug)]
pub(crate) struct Failure {
    stage: &'static str,
    message: String,
    errno: i32,
}

impl Failure {
    fn io(stage: &'static str, what: impl std::fmt::Display, e: &io::Error) -> Failure {
        Failure { stage, message: format!("{what}: {e}"), errno: e.raw_os_error().unwrap_or(0) }
    }
}

/// Descriptors that the helper opened while it had the host's rights.
#[derive(Default)]
pub(crate) struct Opened {
    namespaces: Vec<OwnedFd>,
    /// By the index of the mount; only with a user namespace.
    sources: Vec<Option<OwnedFd>>,
}

impl Opened {
    /// `sources`: those of bind mounts, too, because what is opened later has the rights of a user namespace.
    pub(crate) fn new(plan: &Plan, sources: bool) -> Result<Opened, Error> {
        let open = |p: &Path| {
            File::open(p)
                .map(OwnedFd::from)
                .map_err(|e| Error::io("namespace", &format!("cannot open {}", p.display()), &e))
        };
        let source = |m: &plan::Mount| match &m.source {
            plan::Source::Bind { path, recursive } => mount::open_source(path, *recursive)
                .map(Some)
                .map_err(|e| Error::io("mount", &format!("cannot bind {}", path.display()), &e)),
            _ => Ok(None),
        };
        let mut out = Opened {
            namespaces: plan.join.iter().map(|(p, _)| open(p)).collect::<Result<_, _>>()?,
            ..Opened::default()
        };
        if sources {
            out.sources = plan.mounts.iter().map(source).collect::<Result<_, _>>()?;
        }
        Ok(out)
    }
}

/// Everything that the first process needs.
pub(crate) struct First<'a> {
    pub plan: &'a Plan,
    pub opened: Opened,
    pub rootfs: &'a Path,
    pub entry: &'a cgroup::Entry,
    pub limits: Option<Rlimits>,
    pub stdio: &'a Stdio,
    pub tty: Option<&'a Console>,
    pub init: Init,
    /// Hooks that run while the container is created.
    pub hooks: Option<Hooking<'a>>,
    /// Takes a [`Failure`], or [`READY`]; before that [`HOOKS`], if there are any.
    pub report: RawFd,
}

/// It is ready to be started.
pub(crate) const READY: &[u8] = b"+";
/// All mounts are made: the helper is to run its hooks now, and to say when they have ended.
pub(crate) const HOOKS: &[u8] = b"h";

/// The first process's part of the hooks at creation.
pub(crate) struct Hooking<'a> {
    /// Brings a byte when the helper has run its own.
    pub resumed: RawFd,
    /// createContainer: in the container's namespaces, before its root changes.
    pub hooks: &'a Option<Vec<Hook>>,
    pub state: &'a State,
}

impl Hooking<'_> {
    fn run(&self, report: RawFd) -> Result<(), Failure> {
        let failed = |message: String| Failure { stage: "hook", message, errno: 0 };
        nix::unistd::write(helper::borrow(report), HOOKS).map_err(|e| failed(e.to_string()))?;
        let mut byte = [0u8; 1];
        loop {
            match nix::unistd::read(helper::borrow(self.resumed), &mut byte) {
                Err(nix::errno::Errno::EINTR) => {}
                Ok(1) => break,
                other => return Err(failed(format!("the hooks of the runtime did not end: {other:?}"))),
            }
        }
        run_hooks(self.hooks.as_ref(), Some(self.state), None, None, None)
            .map_err(|e| failed(format!("createContainer hook: {}", convert::chain(&e))))
    }
}

impl First<'_> {
    /// Never returns: it executes the user's program or ends.
    pub(crate) fn go(mut self) -> ! {
        let word = match self.prepare() {
            Ok(()) => READY.to_vec(),
            Err(f) => format!("-{}\t{}\t{}", f.stage, f.errno, f.message).into_bytes(),
        };
        let told = nix::unistd::write(helper::borrow(self.report), &word[..word.len().min(4096)]);
        if word != READY || told.is_err() {
            helper::leave(1);
        }
        self.init.wait_and_run()
    }

    fn prepare(&mut self) -> Result<(), Failure> {
        let plan = self.plan;
        let io = |stage: &'static str, what: &'static str| move |e: io::Error| Failure::io(stage, what, &e);
        let nix = |stage: &'static str, what: &'static str| {
            move |e: nix::Error| Failure::io(stage, what, &e.into())
        };
        self.entry.enter().map_err(io("cgroup", "cannot enter the cgroup"))?;
        if let Some(l) = self.limits.take() {
            l.set().map_err(|e| Failure { stage: "rlimit", message: e.message, errno: e.errno })?;
        }
        let failure = |e: Error| Failure { stage: "scheduler", message: e.message, errno: e.errno };
        plan.schedule.set().map_err(failure)?;
        nix::unistd::setsid().map_err(nix("runtime", "cannot make a session"))?;
        self.connect().map_err(nix("stdio", "cannot connect the standard streams"))?;
        let hosts = plan.sysctls.iter().map(|s| own_namespace(s.namespace)).collect::<Result<Vec<_>, _>>();
        let hosts = hosts.map_err(io("namespace", "cannot tell the host's namespaces"))?;
        for (fd, (path, flag)) in self.opened.namespaces.iter().zip(&plan.join) {
            setns(fd, *flag).map_err(|e| {
                Failure::io("namespace", format!("cannot join {}", path.display()), &e.into())
            })?;
        }
        unshare(plan.make).map_err(nix("namespace", "cannot make the namespaces"))?;
        if let Some(name) = &plan.hostname {
            sys::set_host_name(name).map_err(io("namespace", "cannot set the host name"))?;
        }
        if let Some(name) = &plan.domainname {
            sys::set_domain_name(name).map_err(io("namespace", "cannot set the domain name"))?;
        }
        for (s, host) in plan.sysctls.iter().zip(&hosts) {
            set_sysctl(s, host)
                .map_err(|e| Failure::io("sysctl", format!("cannot set {} to {:?}", s.name, s.value), &e))?;
        }
        self.file_system()?;
        self.close_off()?;
        self.init.confine().map_err(|e| Failure {
            stage: e.stage,
            message: e.to_string(),
            errno: e.errno,
        })?;
        // Nothing that is open here may be reachable for the program or as its folder (CVE-2024-21626).
        sys::close_on_exec_from(3).map_err(io("runtime", "cannot mark descriptors"))?;
        let becomes = self.init.identity.assume_in(&plan.cwd);
        becomes.map_err(|e| Failure { stage: e.stage, message: e.to_string(), errno: e.errno })
    }

    fn connect(&self) -> nix::Result<()> {
        if let Some(fd) = &self.stdio.stdin {
            nix::unistd::dup2_stdin(fd)?;
        }
        if let Some(fd) = &self.stdio.stdout {
            nix::unistd::dup2_stdout(fd)?;
        }
        if let Some(fd) = &self.stdio.stderr {
            nix::unistd::dup2_stderr(fd)?;
        }
        Ok(())
    }

    /// Until the process is inside its own root.
    fn file_system(&mut self) -> Result<(), Failure> {
        let plan = self.plan;
        let failed = |what: &'static str| move |e: io::Error| Failure::io("rootfs", what, &e);
        let root = mount::open_root(self.rootfs, plan.host_propagation)
            .map_err(failed("cannot use the root file system"))?;
        let before = umask(Mode::empty());
        let mut sources = std::mem::take(&mut self.opened.sources).into_iter();
        for m in &plan.mounts {
            mount::mount(&root, m, plan.mount_label.as_deref(), sources.next().flatten())?;
        }
        if plan.own_dev {
            dev::fill(&root, &plan.nodes)?;
        }
        umask(before);
        // An image's working directory need not exist (the OCI image spec does not say so).
        if plan.cwd.is_absolute()
            && let Err(e) = root.folder(&plan.cwd)
            && e != rustix::io::Errno::ROFS
        {
            return Err(Failure::io("cwd", format!("cannot use {}", plan.cwd.display()), &e.into()));
        }
        if let Some(h) = &self.hooks {
            h.run(self.report)?;
        }
        mount::enter(&root, plan.host_propagation).map_err(failed("cannot change the root"))?;
        if let Some(p) = plan.root_propagation {
            rustix::mount::mount_change("/", p)
                .map_err(|e| Failure::io("rootfs", "cannot set the root's propagation", &e.into()))?;
        }
        Ok(())
    }

    /// Terminal and null device, then what must not be seen or written.
    fn close_off(&self) -> Result<(), Failure> {
        let plan = self.plan;
        let null = dev::null().map_err(|e| Failure::io("rootfs", "cannot open /dev/null", &e))?;
        dev::take_null(&null).map_err(|e| Failure::io("stdio", "cannot use /dev/null", &e))?;
        if let Some(console) = self.tty {
            dev::take_console(console).map_err(|e| Failure::io("tty", "cannot set up the terminal", &e))?;
        }
        if plan.readonly_root {
            mount::make_root_readonly()
                .map_err(|e| Failure::io("rootfs", "cannot make the root read-only", &e))?;
        }
        for path in &plan.readonly {
            mount::make_readonly(path)
                .map_err(|e| Failure::io("mount", format!("cannot make {} read-only", path.display()), &e))?;
        }
        mount::mask(&plan.masked, null.as_fd(), plan.mount_label.as_deref())
    }
}

/// What tells a namespace of this process from all others of its kind.
fn own_namespace(name: &str) -> io::Result<PathBuf> {
    fs::read_link(Path::new("/proc/self/ns").join(name))
}

/// By the host's /proc, whose files are those of the namespaces that the caller is in. `host`: the namespace that is the host's,
/// which a path in the spec may lead to.
fn set_sysctl(s: &plan::Sysctl, host: &Path) -> io::Result<()> {
    if own_namespace(s.namespace)? == host {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "that namespace is the host's"));
    }
    fs::write(&s.file, &s.value)
}

/// Waits until the first process says `word`, or why it cannot.
pub(crate) fn hear(from: BorrowedFd<'_>, word: &[u8]) -> Result<(), Error> {
    let mut buf = [0u8; 4096];
    let n = loop {
        match nix::unistd::read(from, &mut buf) {
            Err(nix::errno::Errno::EINTR) => {}
            other => {
                break other.map_err(|e| Error::io("runtime", "cannot hear the first process", &e.into()))?;
            }
        }
    };
    match &buf[..n] {
        heard if heard == word => Ok(()),
        [b'-', rest @ ..] => {
            let text = String::from_utf8_lossy(rest);
            let mut parts = text.splitn(3, '\t');
            let stage = parts.next().unwrap_or("runtime");
            let errno = parts.next().and_then(|n| n.parse().ok()).unwrap_or(0);
            Err(Error::new(Kind::Runtime, stage, parts.next().unwrap_or_default(), errno))
        }
        _ => Err(Error::new(
            Kind::Runtime,
            "runtime",
            "the container's first process died while it was set up",
            0,
        )),
    }
}
