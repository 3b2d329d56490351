//! The operations, each in a helper of its own.

use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use libcgroups::common::{CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager};
use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use nix::sys::signal::Signal;
use oci_spec::runtime::{LinuxIdMapping, LinuxResources, Process, Spec};
use serde::{Deserialize, Serialize};

use crate::adapt::{Rights, adapt, has_own_pid_namespace};
use crate::executor::{Exec, parse_report};
use crate::{Error, Helper, Kind, cgroup, convert, helper};

/// The child's ends of its standard streams; all `None` with a terminal. A stream without an end is /dev/null.
#[derive(Debug, Default)]
pub struct Stdio {
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
}

impl Stdio {
    fn fds(&self) -> Vec<RawFd> {
        [&self.stdin, &self.stdout, &self.stderr].into_iter().flatten().map(|f| f.as_raw_fd()).collect()
    }
}

/// What `create` needs to know.
#[derive(Debug)]
pub struct CreateSpec<'a> {
    /// Folder for this crate's state of all containers of the pod.
    pub root: &'a Path,
    pub id: &'a str,
    /// Folder with the caller's config.json; never written.
    pub bundle: &'a Path,
    pub tty: bool,
    pub systemd_cgroup: bool,
    pub stdio: Stdio,
    /// Write end of the pipe that reports a failed execve; give its read end to [`start`].
    pub exec_error: OwnedFd,
}

/// What `exec` needs to know.
#[derive(Debug)]
pub struct ExecSpec<'a> {
    pub root: &'a Path,
    pub id: &'a str,
    /// OCI Process as JSON.
    pub process: &'a [u8],
    pub tty: bool,
    pub stdio: Stdio,
}

/// A container that waits for its start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Created {
    pub pid: i32,
    /// Its cgroup folders in every hierarchy.
    pub cgroups: Vec<PathBuf>,
    /// The end of its init ends all its processes.
    pub own_pid_namespace: bool,
    /// What was changed in the spec, for the log.
    pub adapted: Vec<String>,
}

/// The answer to an operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    Created(Created),
    Executed { pid: i32 },
    Done,
}

fn state_root(root: &Path) -> PathBuf {
    root.join("state")
}

fn bundle_of(root: &Path, id: &str) -> PathBuf {
    root.join("bundles").join(id)
}

fn check_id(id: &str) -> Result<(), Error> {
    let ok = !id.is_empty() && id.len() <= 200 && id != "." && id != "..";
    if ok && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"_+-.".contains(&b)) {
        return Ok(());
    }
    Err(Error::new(
        Kind::Invalid,
        "spec",
        format!("container id {id:?} has characters beyond [A-Za-z0-9_+.-]"),
        0,
    ))
}

/// OCI "create": the container's process exists and waits. Answers [`Outcome::Created`], with the pty when `tty`.
pub fn create(c: CreateSpec<'_>) -> Result<Helper, Error> {
    check_id(c.id)?;
    let mut keep = c.stdio.fds();
    keep.push(c.exec_error.as_raw_fd());
    let exec_error = c.exec_error.as_raw_fd();
    let result = helper::run(&keep, |details| match create_in_helper(&c, exec_error, details) {
        Ok((created, console)) => (Ok(Outcome::Created(created)), console),
        Err(e) => (Err(e), None),
    });
    drop(c.exec_error);
    result
}

fn create_in_helper(
    c: &CreateSpec<'_>,
    exec_error: RawFd,
    details: &dyn Fn() -> String,
) -> Result<(Created, Option<OwnedFd>), Error> {
    let path = c.bundle.join("config.json");
    let mut spec = Spec::load(&path)
        .map_err(|e| Error::new(Kind::Invalid, "spec", format!("cannot read {}: {e}", path.display()), 0))?;
    let rights = Rights { oom_score_adj_floor: oom_score_adj_floor(&spec) };
    let adapted = adapt(&mut spec, c.tty, rights).iter().map(|a| format!("{a:?}")).collect();
    let owner = owner(&spec, spec.process().as_ref());
    give_to(&c.stdio, owner);
    let bundle = bundle_of(c.root, c.id);
    let state = state_root(c.root);
    for dir in [&bundle, &state] {
        fs::create_dir_all(dir)
            .map_err(|e| Error::io("state", &format!("cannot create {}", dir.display()), &e))?;
    }
    if state.join(c.id).exists() {
        return Err(Error::new(
            Kind::WrongState,
            "state",
            format!("container {} exists already", c.id),
            libc::EEXIST,
        ));
    }
    let result = build(c, &spec, &bundle, &state, exec_error, details);
    match result {
        Ok((pid, console)) => {
            if let (Some(console), Some(uid)) = (&console, owner) {
                give_pty_to(console, uid);
            }
            let created = Created {
                pid,
                cgroups: cgroup::of_process(pid, std::process::id() as i32),
                own_pid_namespace: has_own_pid_namespace(&spec),
                adapted,
            };
            Ok((created, console))
        }
        Err(e) => {
            let _ = fs::remove_dir_all(state.join(c.id));
            let _ = fs::remove_dir_all(&bundle);
            Err(e)
        }
    }
}

fn build(
    c: &CreateSpec<'_>,
    spec: &Spec,
    bundle: &Path,
    state: &Path,
    exec_error: RawFd,
    details: &dyn Fn() -> String,
) -> Result<(i32, Option<OwnedFd>), Error> {
    spec.save(bundle.join("config.json")).map_err(|e| {
        Error::new(Kind::Runtime, "state", format!("cannot write {}: {e}", bundle.display()), 0)
    })?;
    let convert = |e| convert::libcontainer(&e, &details());
    let mut builder = ContainerBuilder::new(c.id.to_owned(), SyscallType::default())
        .with_executor(Exec { error_fd: exec_error })
        .with_root_path(state)
        .and_then(ContainerBuilder::validate_id)
        .map_err(convert)?;
    let console = Console::for_tty(c.tty, c.root)?;
    match &console {
        Some(s) => builder = builder.with_console_socket(Some(&s.path)),
        None => builder = with_stdio(builder, &c.stdio)?,
    }
    let container =
        builder.as_init(bundle).with_systemd(c.systemd_cgroup).with_detach(true).build().map_err(convert)?;
    let pid = container
        .pid()
        .ok_or_else(|| Error::new(Kind::Runtime, "state", "libcontainer made no process", 0))?
        .as_raw();
    let master = console.map(Console::receive).transpose()?;
    Ok((pid, master))
}

fn with_stdio(mut b: ContainerBuilder, s: &Stdio) -> Result<ContainerBuilder, Error> {
    let dup =
        |f: &OwnedFd| f.try_clone().map_err(|e| Error::io("stdio", "cannot duplicate a descriptor", &e));
    if let Some(f) = &s.stdin {
        b = b.with_stdin(dup(f)?);
    }
    if let Some(f) = &s.stdout {
        b = b.with_stdout(dup(f)?);
    }
    if let Some(f) = &s.stderr {
        b = b.with_stderr(dup(f)?);
    }
    Ok(b)
}

/// OCI "start". Waits until the user's program runs; a program that cannot be executed is an error of stage "exec".
pub fn start(root: &Path, id: &str, exec_error: &OwnedFd) -> Result<Helper, Error> {
    check_id(id)?;
    helper::run(&[exec_error.as_raw_fd()], |details| {
        let result = (|| {
            let convert = |e| convert::libcontainer(&e, &details());
            Container::load(state_root(root).join(id)).map_err(convert)?.start().map_err(convert)?;
            let mut report = Vec::new();
            let mut pipe = fs::File::from(
                exec_error.try_clone().map_err(|e| Error::io("exec", "cannot duplicate a pipe", &e))?,
            );
            pipe.read_to_end(&mut report)
                .map_err(|e| Error::io("exec", "cannot read the exec report", &e))?;
            match parse_report(&report) {
                Some((errno, message)) => Err(Error::new(Kind::Runtime, "exec", message, errno)),
                None => Ok(Outcome::Done),
            }
        })();
        (result, None)
    })
}

/// Runs a process in a running container. Answers [`Outcome::Executed`] once the user's program runs.
pub fn exec(e: ExecSpec<'_>) -> Result<Helper, Error> {
    check_id(e.id)?;
    let keep = e.stdio.fds();
    helper::run(&keep, |details| match exec_in_helper(&e, details) {
        Ok((pid, console)) => (Ok(Outcome::Executed { pid }), console),
        Err(err) => (Err(err), None),
    })
}

fn exec_in_helper(e: &ExecSpec<'_>, details: &dyn Fn() -> String) -> Result<(i32, Option<OwnedFd>), Error> {
    let mut process: Process = serde_json::from_slice(e.process)
        .map_err(|err| Error::new(Kind::Invalid, "spec", format!("the process does not parse: {err}"), 0))?;
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(Error::new(Kind::Invalid, "spec", "the process has no arguments", 0));
    }
    process.set_terminal(Some(e.tty));
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    if process.oom_score_adj().is_some_and(|v| !set_oom_score_adj(v)) {
        process.set_oom_score_adj(None);
    }
    let config = bundle_of(e.root, e.id).join("config.json");
    let owner = Spec::load(&config).ok().and_then(|s| owner(&s, Some(&process)));
    give_to(&e.stdio, owner);
    let json = serde_json::to_vec(&process).map_err(|err| {
        Error::new(Kind::Invalid, "spec", format!("the process does not serialise: {err}"), 0)
    })?;
    let file = rustix::fs::memfd_create("process", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(|err| Error::io("exec", "memfd", &err.into()))?;
    rustix::io::write(&file, &json).map_err(|err| Error::io("exec", "memfd", &err.into()))?;
    let convert = |err| convert::libcontainer(&err, &details());
    let mut builder = ContainerBuilder::new(e.id.to_owned(), SyscallType::default())
        .with_executor(Exec { error_fd: -1 })
        .with_root_path(state_root(e.root))
        .map_err(convert)?;
    let console = Console::for_tty(e.tty, e.root)?;
    match &console {
        Some(s) => builder = builder.with_console_socket(Some(&s.path)),
        None => builder = with_stdio(builder, &e.stdio)?,
    }
    let pid = builder
        .as_tenant()
        .with_process(Some(format!("/proc/self/fd/{}", file.as_raw_fd())))
        .with_detach(true)
        .build()
        .map_err(convert)?;
    let master = console.map(Console::receive).transpose()?;
    if let (Some(m), Some(uid)) = (&master, owner) {
        give_pty_to(m, uid);
    }
    Ok((pid.as_raw(), master))
}

/// Applies new limits (OCI LinuxResources as JSON) to a container's cgroup.
pub fn update(root: &Path, id: &str, resources: &[u8], systemd_cgroup: bool) -> Result<Helper, Error> {
    check_id(id)?;
    let resources: LinuxResources = serde_json::from_slice(resources)
        .map_err(|e| Error::new(Kind::Invalid, "spec", format!("the resources do not parse: {e}"), 0))?;
    helper::run(&[], |_| {
        let result = (|| {
            let bad = |e: String| {
                Error::new(Kind::Runtime, "cgroup", e.clone(), convert::errno_in_text(&e).unwrap_or(0))
            };
            let config = libcontainer::config::YoukiConfig::load(state_root(root).join(id))
                .map_err(|e| Error::new(Kind::WrongState, "state", format!("container {id}: {e}"), 0))?;
            let manager = create_cgroup_manager(CgroupConfig {
                cgroup_path: config.cgroup_path,
                systemd_cgroup,
                container_name: id.to_owned(),
            })
            .map_err(|e| bad(e.to_string()))?;
            manager
                .apply(&ControllerOpt {
                    resources: &resources,
                    disable_oom_killer: false,
                    oom_score_adj: None,
                    freezer_state: None,
                })
                .map_err(|e| bad(e.to_string()))?;
            Ok(Outcome::Done)
        })();
        (result, None)
    })
}

/// Kills what is left in the cgroup and removes cgroup and state. Idempotent.
pub fn delete(root: &Path, id: &str, cgroups: &[PathBuf]) -> Result<Helper, Error> {
    check_id(id)?;
    helper::run(&[], |details| (delete_now(root, id, cgroups, details).map(|()| Outcome::Done), None))
}

/// The same in the calling process, for cleaning up after a monitor that is gone.
pub fn delete_in_place(root: &Path, id: &str, cgroups: &[PathBuf]) -> Result<(), Error> {
    check_id(id)?;
    delete_now(root, id, cgroups, &String::new)
}

fn delete_now(root: &Path, id: &str, cgroups: &[PathBuf], details: &dyn Fn() -> String) -> Result<(), Error> {
    let mut wait_ms = 1;
    loop {
        cgroup::signal_all(cgroups, Signal::SIGKILL as i32);
        let gone =
            cgroup::remove(cgroups).map_err(|e| Error::io("cgroup", "cannot remove the cgroup", &e))?;
        if gone {
            break;
        }
        if wait_ms > 2000 {
            return Err(Error::new(
                Kind::Runtime,
                "cgroup",
                "processes of the cgroup do not end",
                libc::EBUSY,
            ));
        }
        std::thread::sleep(std::time::Duration::from_millis(wait_ms));
        wait_ms *= 2;
    }
    let state = state_root(root).join(id);
    let mut failure = None;
    match Container::load(state.clone()) {
        // Ends a systemd unit and runs the poststop hooks.
        Ok(mut c) => failure = c.delete(true).err().map(|e| convert::libcontainer(&e, &details())),
        // A crash can leave libcontainer's state empty; nothing in it is needed from here on.
        Err(_) => {
            let _ = fs::remove_dir_all(&state);
        }
    }
    let _ = fs::remove_dir_all(bundle_of(root, id));
    match failure {
        Some(e) if state.exists() => Err(e),
        _ => Ok(()),
    }
}

/// The socket on which libcontainer hands over the pty.
struct Console {
    path: PathBuf,
    listener: UnixListener,
}

impl Console {
    fn for_tty(tty: bool, root: &Path) -> Result<Option<Console>, Error> {
        if !tty {
            return Ok(None);
        }
        let io = |e: std::io::Error| Error::io("tty", "cannot make the console socket", &e);
        let name = format!("console-{}", std::process::id());
        // Bound by a relative name: an absolute one may exceed what a socket address holds.
        std::env::set_current_dir(root).map_err(io)?;
        let _ = fs::remove_file(&name);
        let listener = UnixListener::bind(&name).map_err(io)?;
        std::env::set_current_dir("/").map_err(io)?;
        Ok(Some(Console { path: root.join(name), listener }))
    }

    fn receive(self) -> Result<OwnedFd, Error> {
        use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
        let bad = |m: &str| Error::new(Kind::Runtime, "tty", m, 0);
        // The connection and the message are there already when build() returns.
        self.listener.set_nonblocking(true).map_err(|e| Error::io("tty", "console socket", &e))?;
        let (conn, _) = self.listener.accept().map_err(|e| Error::io("tty", "no console was offered", &e))?;
        conn.set_nonblocking(true).map_err(|e| Error::io("tty", "console socket", &e))?;
        let mut byte = [0u8; 64];
        let mut iov = [std::io::IoSliceMut::new(&mut byte)];
        let mut cmsg = nix::cmsg_space!([RawFd; 1]);
        let m = recvmsg::<()>(conn.as_raw_fd(), &mut iov, Some(&mut cmsg), MsgFlags::MSG_CMSG_CLOEXEC)
            .map_err(|e| Error::io("tty", "no console was sent", &e.into()))?;
        for c in m.cmsgs().into_iter().flatten() {
            if let ControlMessageOwned::ScmRights(fds) = c
                && let Some(fd) = fds.first()
            {
                return helper::borrow(*fd)
                    .try_clone_to_owned()
                    .map_err(|e| Error::io("tty", "cannot keep the console", &e));
            }
        }
        Err(bad("the console message carried no descriptor"))
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// The host's user id of the process, so that it may reopen /dev/stdout and its terminal.
fn owner(spec: &Spec, process: Option<&Process>) -> Option<u32> {
    let uid = process?.user().uid();
    match spec.linux().as_ref().and_then(|l| l.uid_mappings().as_ref()).filter(|m| !m.is_empty()) {
        Some(maps) => map_id(maps, uid),
        None => Some(uid),
    }
}

fn map_id(maps: &[LinuxIdMapping], id: u32) -> Option<u32> {
    maps.iter().find_map(|m| {
        let offset = id.checked_sub(m.container_id())?;
        if offset < m.size() { m.host_id().checked_add(offset) } else { None }
    })
}

fn give_to(stdio: &Stdio, uid: Option<u32>) {
    let Some(uid) = uid.filter(|u| *u != 0) else { return };
    for f in [&stdio.stdin, &stdio.stdout, &stdio.stderr].into_iter().flatten() {
        // A pipe that keeps its owner still works through the inherited descriptor.
        let _ = rustix::fs::fchown(f, Some(rustix::fs::Uid::from_raw(uid)), None);
    }
}

fn give_pty_to(master: &OwnedFd, uid: u32) {
    use rustix::pty::OpenptFlags;
    if let Ok(peer) =
        rustix::pty::ioctl_tiocgptpeer(master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
    {
        let _ = rustix::fs::fchown(&peer, Some(rustix::fs::Uid::from_raw(uid)), None);
    }
}

fn set_oom_score_adj(value: i32) -> bool {
    fs::write("/proc/self/oom_score_adj", value.to_string()).is_ok()
}

/// Leaves the helper with the container's value (0 when it names none: the monitor's own must not be inherited).
fn oom_score_adj_floor(spec: &Spec) -> i32 {
    let wanted = spec.process().as_ref().and_then(|p| p.oom_score_adj()).unwrap_or(0);
    if set_oom_score_adj(wanted) {
        return -1000;
    }
    fs::read_to_string("/proc/self/oom_score_adj").ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0)
}
