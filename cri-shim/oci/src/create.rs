//! OCI "create". The helper process prepares what needs the host's rights and forks the container's first process, which sets
//! itself up ([`crate::init`]): namespaces, root file system, mounts, devices, masked paths, terminal. A spec that asks for more than
//! that is refused, since a second way to set containers up would need the same care: libcontainer's goes by path where a volume's
//! other users can exchange links, and mounts, links and nodes then land on the host's files or on the container's /proc.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use libcontainer::container::State;
use libcontainer::hooks::run_hooks;
use libcontainer::validator::Validator;
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::Pid;
use oci_spec::runtime::{Hook, Hooks, LinuxNamespace, LinuxNamespaceType, Spec};
use serde::{Deserialize, Serialize};

use crate::adapt::{self, Adaptation, Taken};
use crate::console::{self, Console};
use crate::executor::{Init, Program};
use crate::identity::{Identity, become_root};
use crate::init::{First, HOOKS, Hooking, Opened, Plan, READY, hear};
use crate::keeper::Keeper;
use crate::kept::{self, Kept, Listener};
use crate::lsm::{self, Confinement};
use crate::notify::Notify;
use crate::ops::{Outcome, Stdio, check_id, filter_path, forget, set_oom_score_adj};
use crate::rlimits::Rlimits;
use crate::seccomp::{self, Filter};
use crate::{Error, Helper, Kind, cgroup, convert, devices, helper, hooks, limits, sys};

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
    /// One end of [`crate::start_channel`]; give the other to [`crate::start`].
    pub channel: OwnedFd,
}

/// A container that waits for its start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Created {
    pub pid: i32,
    /// Its cgroup folders in every hierarchy.
    pub cgroups: Vec<PathBuf>,
    /// The end of its init ends all its processes.
    pub own_pid_namespace: bool,
    pub context: Context,
    /// What was changed in the spec, for the log.
    pub adapted: Vec<String>,
}

/// What must be known of a container to act on it later.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Context {
    /// Of its user namespace, empty without: container id, host id, size.
    pub uid_map: Vec<(u32, u32, u32)>,
    /// It has a seccomp filter, which lies beside the state.
    pub filtered: bool,
    /// More of it lies there, for later.
    pub kept: bool,
    /// It has hooks for after its start.
    pub poststart: bool,
    /// It has hooks for after its end.
    pub poststop: bool,
    /// As in the spec.
    pub cgroup_path: PathBuf,
}

impl Context {
    /// The host's user id of one of the container.
    pub(crate) fn host_uid(&self, uid: u32) -> Option<u32> {
        if self.uid_map.is_empty() {
            return Some(uid);
        }
        self.uid_map.iter().find_map(|(inside, outside, size)| {
            let offset = uid.checked_sub(*inside)?;
            if offset < *size { outside.checked_add(offset) } else { None }
        })
    }
}

/// OCI "create": the container's process exists and waits. Answers [`Outcome::Created`], with the pty when `tty`.
pub fn create(c: CreateSpec<'_>) -> Result<Helper, Error> {
    check_id(c.id)?;
    let mut keep = c.stdio.fds();
    keep.push(c.channel.as_raw_fd());
    helper::run(&keep, || match in_helper(&c) {
        Ok((created, console)) => (Ok(Outcome::Created(created)), console),
        Err(e) => (Err(e), None),
    })
}

fn in_helper(c: &CreateSpec<'_>) -> Result<(Created, Option<OwnedFd>), Error> {
    let path = c.bundle.join("config.json");
    let mut spec = read_spec(&path)
        .map_err(|e| Error::new(Kind::Invalid, "spec", format!("cannot read {}: {e}", path.display()), 0))?;
    let (taken, mut adapted) = adapt::take(&mut spec, c.id, c.tty)?;
    adapt::label_mounts(&mut spec, lsm::selinux_is_on());
    Validator::validate_spec(&spec).map_err(|e| convert::libcontainer(&e.into()))?;
    let filter = taken.seccomp.as_ref().map(seccomp::compile).transpose()?.flatten();
    let listener = taken.seccomp.as_ref().filter(|_| filter.as_ref().is_some_and(Filter::notifies));
    let listener = listener.and_then(|s| {
        let metadata = s.listener_metadata().clone();
        Some(Listener { path: s.listener_path().clone()?, metadata })
    });
    let state = kept::state(c.id, c.bundle, &spec);
    let notify = listener.clone().map(Notify::connect).transpose()?;
    let kept =
        Kept::new(state.clone(), listener, taken.hooks.poststart.clone(), taken.hooks.poststop.clone());
    let context = Context {
        uid_map: taken.uid_map.clone(),
        filtered: filter.is_some(),
        kept: kept.is_some(),
        poststart: kept.as_ref().is_some_and(|k| !k.poststart.is_empty()),
        poststop: kept.as_ref().is_some_and(|k| !k.poststop.is_empty()),
        cgroup_path: taken.cgroup_path.clone(),
    };
    c.stdio.give_to(context.host_uid(taken.process.user().uid()));
    // The helper takes the container's score, which its fork keeps; the monitor's own must not be inherited.
    let score = taken.process.oom_score_adj().unwrap_or(0);
    if !set_oom_score_adj(score) {
        adapted.push(Adaptation::OomScoreAdjDropped(score));
    }
    // From here on others in a shared PID namespace must not look into what is forked (CVE-2016-9962).
    nix::sys::prctl::set_dumpable(false).map_err(|e| Error::io("state", "set undumpable", &e.into()))?;
    if let Some(f) = &filter {
        let at = filter_path(c.root, c.id);
        fs::write(&at, f.to_bytes())
            .map_err(|e| Error::io("state", &format!("cannot write {}", at.display()), &e))?;
    }
    if let Some(k) = &kept {
        k.save(c.root).inspect_err(|_| drop(forget(c.root, c.id)))?;
    }
    let own_pid_namespace = adapt::has_own_pid_namespace(&spec);
    let mut made = Made::default();
    match make(c, Asked { spec, taken, filter, state, notify }, &mut made) {
        Ok(console) => {
            if let Some(keeper) = made.keeper.take() {
                keeper.leave();
            }
            adapted.extend(made.clamped.into_iter().map(Adaptation::RlimitClamped));
            let adapted = adapted.iter().map(|a| format!("{a:?}")).collect();
            Ok((
                Created { pid: made.pid, cgroups: made.cgroups, own_pid_namespace, context, adapted },
                console,
            ))
        }
        Err(mut e) => {
            for warning in take_back(c, &mut made) {
                e.message.push_str(&format!("; {warning}"));
            }
            Err(e)
        }
    }
}

/// In one piece, which takes half the time of what `Spec::load` does.
fn read_spec(path: &Path) -> std::io::Result<Spec> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

/// What exists already, also when the rest fails.
#[derive(Default)]
struct Made {
    cgroups: Vec<PathBuf>,
    /// They are a scope of systemd, with the helper in it, and go when that is empty.
    by_systemd: bool,
    pid: i32,
    clamped: Vec<String>,
    keeper: Option<Keeper>,
}

/// What went wrong on the way.
fn take_back(c: &CreateSpec<'_>, made: &mut Made) -> Vec<String> {
    if made.pid > 1 {
        let _ = cgroup::signal_pid(Pid::from_raw(made.pid), libc::SIGKILL);
    }
    match made.keeper.take() {
        Some(keeper) => keeper.take_back(),
        None => remove_made(c, made),
    }
}

fn remove_made(c: &CreateSpec<'_>, made: &Made) -> Vec<String> {
    if !made.by_systemd {
        // A folder with members that are not ours stays.
        let _ = cgroup::remove_within(&made.cgroups, Duration::from_secs(2));
    }
    // A container that has been made in part has come to its end, too.
    let warnings = hooks::poststop(c.root, c.id);
    let _ = forget(c.root, c.id);
    warnings
}

/// What the fork of the first process starts from.
struct Parts<'a> {
    c: &'a CreateSpec<'a>,
    spec: Spec,
    rootfs: PathBuf,
    entry: cgroup::Entry,
    tty: Option<Console>,
    init: Init,
    limits: Rlimits,
    /// The user namespace to join.
    users: Option<LinuxNamespace>,
    state: State,
    notify: Option<Notify>,
}

/// What the spec says, taken apart.
struct Asked {
    spec: Spec,
    taken: Taken,
    filter: Option<Filter>,
    state: State,
    notify: Option<Notify>,
}

fn make(c: &CreateSpec<'_>, asked: Asked, made: &mut Made) -> Result<Option<OwnedFd>, Error> {
    let Asked { spec, taken, filter, state, notify } = asked;
    let plan = Plan::of(&spec)?;
    let rootfs = spec.root().as_ref().map(|r| r.path().clone()).unwrap_or_default();
    let rootfs = fs::canonicalize(c.bundle.join(&rootfs))
        .map_err(|e| Error::io("rootfs", &format!("cannot use {}", rootfs.display()), &e))?;
    let entry = place(c, &spec, &taken, made)?;
    let init = Init {
        program: Program::new(&taken.process),
        identity: Identity::new(&taken.process, filter, notify.as_ref().map(Notify::courier)),
        confinement: Confinement::of(&taken.process)?.map(Rc::new),
        channel: c.channel.as_raw_fd(),
        hooks: (!taken.hooks.start_container.is_empty())
            .then(|| (taken.hooks.start_container.clone(), state.clone())),
    };
    let limits = Rlimits::new(&taken.process);
    made.clamped = limits.clamped().to_vec();
    let users = namespace(&spec, LinuxNamespaceType::User);
    let tty = Console::new(c.tty)?;
    let parts = Parts { c, spec, rootfs, entry, tty, init, limits, users, state, notify };
    let tty = parts.by_plan(&plan, made)?;
    let uid = taken.process.user().uid();
    tty.map(Console::receive).transpose().inspect(|master| {
        if let Some(m) = master {
            // With a user namespace this process is in it: the container's ids are right in both cases.
            console::give_to(m, uid);
        }
    })
}

impl Parts<'_> {
    /// Joins what a fork must be in from its beginning, then forks. `None` in the first process.
    fn fork(&self, made: &mut Made) -> Result<Option<Pid>, Error> {
        if let Some(users) = &self.users {
            // Raising limits needs the host's rights.
            self.limits.set()?;
            let hooks = |pid| match self.spec.hooks() {
                Some(hooks) => run_creation_hooks(hooks, &self.state, pid),
                None => Ok(()),
            };
            let keeper = Keeper::new(hooks, || remove_made(self.c, made));
            made.keeper = Some(keeper.map_err(|e| Error::io("helper", "cannot fork", &e))?);
            enter(users, CloneFlags::CLONE_NEWUSER)?;
            become_root().map_err(|e| Error::new(Kind::Runtime, "namespace", e.to_string(), e.errno))?;
        }
        for (kind, flag) in [
            (LinuxNamespaceType::Time, CloneFlags::from_bits_retain(libc::CLONE_NEWTIME)),
            (LinuxNamespaceType::Pid, CloneFlags::CLONE_NEWPID),
        ] {
            if let Some(n) = namespace(&self.spec, kind) {
                enter(&n, flag)?;
            }
        }
        let pid =
            sys::fork_sibling(self.entry.folder()).map_err(|e| Error::io("namespace", "cannot fork", &e))?;
        if let Some(pid) = pid {
            made.pid = pid.as_raw();
        }
        Ok(pid)
    }

    fn by_plan(mut self, plan: &Plan, made: &mut Made) -> Result<Option<Console>, Error> {
        let failed = |e: nix::Error| Error::io("helper", "cannot make a pipe", &e.into());
        let opened = Opened::new(plan, self.users.is_some())?;
        let (ready, report) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(failed)?;
        let (resumed, resume) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(failed)?;
        let hooks = self.spec.hooks().clone();
        let here = fs::File::open("/proc/self/ns/pid")
            .map_err(|e| Error::io("namespace", "/proc/self/ns/pid", &e))?;
        let Some(pid) = self.fork(made)? else {
            // So that the helper's end is an end of file here.
            drop(resume);
            if let Some(notify) = self.notify.take() {
                notify.in_process();
            }
            let hooks = hooks.as_ref().map(|hooks| Hooking {
                resumed: resumed.as_raw_fd(),
                hooks: hooks.create_container(),
                state: &self.state,
            });
            let limits = self.users.is_none().then_some(self.limits);
            let first = First {
                plan,
                opened,
                rootfs: &self.rootfs,
                entry: &self.entry,
                limits,
                stdio: &self.c.stdio,
                tty: self.tty.as_ref(),
                init: self.init,
                hooks,
                report: report.as_raw_fd(),
            };
            first.go();
        };
        // So that the end of the first process is an end of file here.
        drop((report, resumed));
        if let Some(hooks) = hooks {
            hear(ready.as_fd(), HOOKS)?;
            match &made.keeper {
                Some(keeper) => keeper.run_hooks(pid)?,
                None => {
                    setns(&here, CloneFlags::CLONE_NEWPID).map_err(|e| {
                        Error::io("hook", "cannot leave the container's PID namespace", &e.into())
                    })?;
                    run_creation_hooks(&hooks, &self.state, pid)?;
                }
            }
            nix::unistd::write(&resume, b"+")
                .map_err(|e| Error::io("hook", "the first process is gone", &e.into()))?;
        }
        if let Some(notify) = self.notify.take() {
            self.state.pid = Some(pid.as_raw());
            notify.deliver(pid.as_raw(), &self.state)?;
        }
        hear(ready.as_fd(), READY)?;
        Ok(self.tty.take())
    }
}

/// Those that run in the runtime's namespaces, once the container's mounts are made.
fn run_creation_hooks(hooks: &Hooks, state: &State, pid: Pid) -> Result<(), Error> {
    let run = |h: &Option<Vec<Hook>>| {
        run_hooks(h.as_ref(), Some(state), None, Some(nix29::unistd::Pid::from_raw(pid.as_raw())), None)
            .map_err(|e| Error::new(Kind::Runtime, "hook", convert::chain(&e), 0))
    };
    #[allow(deprecated)]
    run(hooks.prestart())?;
    run(hooks.create_runtime())
}

fn group<'a>(c: &CreateSpec<'a>, path: &'a Path, folders: &'a [PathBuf]) -> limits::Group<'a> {
    limits::Group { path, id: c.id, systemd: c.systemd_cgroup, folders }
}

/// Makes the cgroup with its limits.
fn place(c: &CreateSpec<'_>, spec: &Spec, taken: &Taken, made: &mut Made) -> Result<cgroup::Entry, Error> {
    let path = &taken.cgroup_path;
    made.by_systemd = c.systemd_cgroup && cgroup::is_unified() && !path.is_absolute();
    if made.by_systemd {
        group(c, path, &[]).enter_scope()?;
        // systemd has named it.
        let (own, parent) = (nix::unistd::getpid(), nix::unistd::getppid());
        made.cgroups = cgroup::of_process(own.as_raw(), parent.as_raw());
    } else {
        let text = path.to_string_lossy();
        made.cgroups = cgroup::make(&text)
            .map_err(|e| Error::io("cgroup", &format!("cannot make the cgroup {text}"), &e))?;
    }
    if let Some(r) = spec.linux().as_ref().and_then(|l| l.resources().as_ref()) {
        group(c, path, &made.cgroups).apply(r, true)?;
        if cgroup::is_unified() {
            let Some(folder) = made.cgroups.first() else {
                let text = "the container has no cgroup of its own that device rules could be set for";
                return Err(Error::new(Kind::Runtime, "cgroup", text, libc::ENOENT));
            };
            devices::confine(folder, r.devices().as_deref().unwrap_or_default())?;
        }
    }
    if made.by_systemd {
        return Ok(cgroup::Entry::Here);
    }
    let in_user_namespace = !taken.uid_map.is_empty();
    cgroup::Entry::open(&made.cgroups, in_user_namespace)
        .map_err(|e| Error::io("cgroup", "cannot open the cgroup", &e))
}

fn namespace(spec: &Spec, kind: LinuxNamespaceType) -> Option<LinuxNamespace> {
    let all = spec.linux().as_ref()?.namespaces().as_ref()?;
    all.iter().find(|n| n.typ() == kind).cloned()
}

fn enter(n: &LinuxNamespace, flag: CloneFlags) -> Result<(), Error> {
    match n.path() {
        Some(path) => {
            let file = fs::File::open(path)
                .map_err(|e| Error::io("namespace", &format!("cannot open {}", path.display()), &e))?;
            setns(file, flag)
                .map_err(|e| Error::io("namespace", &format!("cannot join {}", path.display()), &e.into()))
        }
        None => unshare(flag)
            .map_err(|e| Error::io("namespace", &format!("cannot make a {} namespace", n.typ()), &e.into())),
    }
}
