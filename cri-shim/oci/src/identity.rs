//! Who a process is when it begins: user, groups, capabilities, no_new_privs and the seccomp filter. The one place for both
//! the first process of a container and an exec.
//!
//! In two steps, because without no_new_privs a filter needs CAP_SYS_ADMIN: [`Identity::assume`] gives up all but what the
//! filter needs, [`Identity::finish`] is the last thing before execve. A filter with a listener is the exception.

use std::io;
use std::os::fd::RawFd;
use std::path::Path;

use caps::{CapSet, Capability, CapsHashSet};
use libcontainer::capabilities::CapabilityExt;
use nix::sys::prctl;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use oci_spec::runtime::{Capabilities, Process};

use crate::seccomp::Filter;
use crate::sys;

/// Capabilities that have a name here: the numbers below this.
const KNOWN: u32 = 41;

/// What failed, for the user.
#[derive(Debug)]
pub(crate) struct Failure {
    pub stage: &'static str,
    pub what: &'static str,
    pub errno: i32,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.what, io::Error::from_raw_os_error(self.errno))
    }
}

fn nix(what: &'static str) -> impl Fn(nix::Error) -> Failure {
    move |e| Failure { stage: "user", what, errno: e as i32 }
}

#[derive(Clone, Debug)]
struct Sets {
    bounding: CapsHashSet,
    inheritable: CapsHashSet,
    effective: CapsHashSet,
    permitted: CapsHashSet,
    ambient: CapsHashSet,
}

#[derive(Clone, Debug)]
pub(crate) struct Identity {
    uid: u32,
    gid: u32,
    groups: Vec<Gid>,
    umask: Option<u32>,
    /// `None`: as the kernel leaves them.
    capabilities: Option<Sets>,
    no_new_privileges: bool,
    filter: Option<Filter>,
    /// Takes the filter's listener.
    courier: Option<RawFd>,
}

impl Identity {
    pub(crate) fn new(p: &Process, filter: Option<Filter>, courier: Option<RawFd>) -> Identity {
        let set = |s: &Option<Capabilities>| s.iter().flatten().map(CapabilityExt::to_cap).collect();
        let user = p.user();
        Identity {
            uid: user.uid(),
            gid: user.gid(),
            groups: user.additional_gids().iter().flatten().map(|g| Gid::from_raw(*g)).collect(),
            umask: user.umask(),
            capabilities: p.capabilities().as_ref().map(|c| Sets {
                bounding: set(c.bounding()),
                inheritable: set(c.inheritable()),
                effective: set(c.effective()),
                permitted: set(c.permitted()),
                ambient: set(c.ambient()),
            }),
            no_new_privileges: p.no_new_privileges().unwrap_or(false),
            filter,
            courier,
        }
    }

    fn filter_needs_rights(&self) -> bool {
        self.filter.is_some() && !self.no_new_privileges
    }

    /// [`Identity::assume`], with `cwd` as the working directory, which must lie inside the container.
    pub(crate) fn assume_in(&self, cwd: &Path) -> Result<(), Failure> {
        let failed = |e: nix::Error| Failure {
            stage: "cwd",
            what: "change to the working directory",
            errno: e as i32,
        };
        // As root first, then as the user: each may be allowed what the other is not.
        let first = nix::unistd::chdir(cwd);
        self.assume()?;
        match first {
            Err(nix::Error::EPERM | nix::Error::EACCES) => nix::unistd::chdir(cwd).map_err(failed)?,
            other => other.map_err(failed)?,
        }
        let outside = |e| Failure {
            stage: "cwd",
            what: "the working directory is outside the container",
            errno: e as i32,
        };
        let inside = nix::unistd::getcwd().map_err(outside)?;
        if !inside.is_absolute() {
            return Err(outside(nix::Error::ENOENT));
        }
        // Whoever answers must be there before the container exists, as with runc. What is left to do until execve is done under
        // the filter then.
        if self.courier.is_some() { self.load() } else { Ok(()) }
    }

    /// The calling process becomes the user. It keeps CAP_SYS_ADMIN only where the filter needs it.
    pub(crate) fn assume(&self) -> Result<(), Failure> {
        if let Some(mask) = self.umask {
            umask(Mode::from_bits_truncate(mask));
        }
        if let Some(c) = &self.capabilities {
            for cap in caps::all() {
                // Capabilities that this kernel does not know are not there to be dropped.
                if !c.bounding.contains(&cap) && caps::has_cap(None, CapSet::Bounding, cap).unwrap_or(false) {
                    caps::drop(None, CapSet::Bounding, cap).map_err(capability)?;
                }
            }
            // Those of a newer kernel have no name here, so that nobody can have asked for them.
            for number in KNOWN..64 {
                match sys::in_bounding_set(number) {
                    Some(true) => sys::drop_from_bounding_set(number).map_err(|_| capability_failure())?,
                    Some(false) => {}
                    None => break,
                }
            }
        }
        prctl::set_keepcaps(true).map_err(nix("keep capabilities"))?;
        setgroups(&self.groups).map_err(nix("set the supplementary groups"))?;
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        setresgid(gid, gid, gid).map_err(nix("set the group"))?;
        setresuid(uid, uid, uid).map_err(nix("set the user"))?;
        prctl::set_keepcaps(false).map_err(nix("keep capabilities"))?;
        match &self.capabilities {
            Some(c) if self.filter_needs_rights() => {
                let have = caps::read(None, CapSet::Permitted).map_err(capability)?;
                let mut until_then: CapsHashSet = c.permitted.union(&c.effective).copied().collect();
                // The second lets the inheritable set be made at the end.
                until_then.extend([Capability::CAP_SYS_ADMIN, Capability::CAP_SETPCAP]);
                until_then.retain(|c| have.contains(c));
                caps::set(None, CapSet::Effective, &until_then).map_err(capability)?;
                caps::set(None, CapSet::Permitted, &until_then).map_err(capability)
            }
            Some(_) => self.narrow(),
            None => {
                let have = caps::read(None, CapSet::Permitted).map_err(capability)?;
                caps::set(None, CapSet::Effective, &have).map_err(capability)
            }
        }
    }

    /// The capabilities as asked for.
    fn narrow(&self) -> Result<(), Failure> {
        let Some(c) = &self.capabilities else { return Ok(()) };
        caps::set(None, CapSet::Inheritable, &c.inheritable).map_err(capability)?;
        caps::set(None, CapSet::Effective, &c.effective).map_err(capability)?;
        caps::set(None, CapSet::Permitted, &c.permitted).map_err(capability)?;
        if !c.ambient.is_empty() {
            caps::set(None, CapSet::Ambient, &c.ambient).map_err(capability)?;
        }
        Ok(())
    }

    /// Nothing but execve may follow.
    pub(crate) fn finish(&self) -> Result<(), Failure> {
        if self.courier.is_some() { Ok(()) } else { self.load() }
    }

    /// no_new_privs, the filter, then the last capabilities.
    fn load(&self) -> Result<(), Failure> {
        let load = || match &self.filter {
            Some(f) => sys::load_filter(f, self.courier).map_err(|e| Failure {
                stage: "seccomp",
                what: "load the seccomp filter",
                errno: e.raw_os_error().unwrap_or(libc::EIO),
            }),
            None => Ok(()),
        };
        if self.no_new_privileges {
            prctl::set_no_new_privs().map_err(nix("set no_new_privs"))?;
            return load();
        }
        load()?;
        if self.filter_needs_rights() { self.narrow() } else { Ok(()) }
    }
}

/// After a user namespace has been joined: its root, with nothing of the host's.
pub(crate) fn become_root() -> Result<(), Failure> {
    setgroups(&[]).map_err(nix("drop the supplementary groups"))?;
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(gid, gid, gid).map_err(nix("become root of the user namespace"))?;
    setresuid(uid, uid, uid).map_err(nix("become root of the user namespace"))?;
    // The change of the user has made it dumpable by its own setting; others must not look into it.
    prctl::set_dumpable(false).map_err(nix("set undumpable"))
}

/// The library tells no number; it comes from the call that it has just made.
fn capability(_: caps::errors::CapsError) -> Failure {
    capability_failure()
}

fn capability_failure() -> Failure {
    Failure {
        stage: "capabilities",
        what: "set the capabilities",
        errno: io::Error::last_os_error().raw_os_error().unwrap_or(libc::EPERM),
    }
}

/// The home of a user by the container's own /etc/passwd; read by hand, since the C library might load code from the container.
pub(crate) fn home_of(uid: u32, passwd: &str) -> String {
    let found = passwd.lines().find_map(|l| {
        let mut fields = l.split(':');
        let id = fields.nth(2)?.parse::<u32>().ok()?;
        if id == uid { fields.nth(2).map(str::to_owned) } else { None }
    });
    found.filter(|h| !h.is_empty()).unwrap_or_else(|| "/".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Those of a newer kernel than these headers are dropped by their numbers.
    #[test]
    fn capabilities_are_the_kernels() {
        let mut header = crate::headers::numbers("linux/capability.h", "CAP_");
        // Words of a set, not a capability.
        header.retain(|name, _| !name.contains("LAST"));
        for (name, number) in &header {
            let known: oci_spec::runtime::Capability = serde_json::from_value(format!("CAP_{name}").into())
                .unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(u32::from(known.to_cap().index()), *number, "{name}");
        }
        assert_eq!(header.values().max().map(|n| n + 1), Some(KNOWN), "as many as there are");
        assert_eq!(caps::all().len(), KNOWN as usize);
        let last: u32 =
            std::fs::read_to_string("/proc/sys/kernel/cap_last_cap").unwrap().trim().parse().unwrap();
        for n in 0..64 {
            assert_eq!(sys::in_bounding_set(n).is_some(), n <= last, "{n}");
        }
    }

    /// CVE-2024-21626: whatever folder of the host leads to it, a working directory outside the root is none.
    #[test]
    fn a_working_directory_outside_the_root_is_refused() {
        use std::os::unix::process::CommandExt;
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir(&root).unwrap();
        let try_in = |folder: &Path| {
            let (root, identity) = (root.clone(), Identity::new(&Process::default(), None, None));
            let mut command = std::process::Command::new("/bin/true");
            command.current_dir(folder);
            let become_user = move || {
                // The folder stays what it is.
                std::os::unix::fs::chroot(&root)?;
                let outcome = identity.assume_in(Path::new("."));
                // Nothing is executed: the error tells how it went.
                Err(io::Error::from_raw_os_error(outcome.map_or_else(|f| f.errno, |()| libc::EXDEV)))
            };
            // SAFETY: what runs between fork and exec is what a container's first process does there.
            unsafe { command.pre_exec(become_user) };
            command.spawn().unwrap_err().raw_os_error()
        };
        assert_eq!(try_in(&root), Some(libc::EXDEV), "inside");
        assert_eq!(try_in(dir.path()), Some(libc::ENOENT), "outside");
    }

    #[test]
    fn homes() {
        let passwd =
            "root:x:0:0:root:/root:/bin/sh\nbad line\nweb:x:33:33::/var/www:/bin/false\nempty:x:7:7:::\n";
        for (uid, home) in [(0, "/root"), (33, "/var/www"), (7, "/"), (99, "/")] {
            assert_eq!(home_of(uid, passwd), home, "{uid}");
        }
    }
}
