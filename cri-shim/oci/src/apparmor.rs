//! AppArmor profiles.

use std::io::{self, Write};
use std::os::fd::OwnedFd;

use rustix::fs::{CWD, Mode, OFlags};

use crate::Error;

/// The host's /proc for the profile of the next execve: after the change of the mount namespace, what is at /proc is the
/// container's to decide (CVE-2025-52881). A process may write only its own profile, so the file itself is opened by it.
pub(crate) struct AppArmor {
    proc: OwnedFd,
    profile: String,
}

impl AppArmor {
    pub(crate) fn open(profile: &str) -> Result<AppArmor, Error> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc = rustix::fs::openat(CWD, "/proc", flags, Mode::empty())
            .map_err(|e| Error::io("apparmor", "cannot open /proc", &e.into()))?;
        Ok(AppArmor { proc, profile: profile.to_owned() })
    }

    /// For the calling process.
    pub(crate) fn set_for_execve(&self) -> io::Result<()> {
        let open = |p| rustix::fs::openat(&self.proc, p, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
        let file = open("thread-self/attr/apparmor/exec").or_else(|_| open("thread-self/attr/exec"))?;
        std::fs::File::from(file).write_all(format!("exec {}", self.profile).as_bytes())
    }
}
