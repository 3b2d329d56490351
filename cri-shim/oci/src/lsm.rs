//! What the kernel's security modules make of a process: its AppArmor profile and its SELinux label, both from its next execve on.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use oci_spec::runtime::Process;
use rustix::fs::{CWD, Mode, OFlags};

use crate::{Error, Kind};

/// Whether the kernel has SELinux and a policy: only then are there labels.
pub(crate) fn selinux_is_on() -> bool {
    // The folder is there on every kernel that was built with it.
    Path::new("/sys/fs/selinux/enforce").exists()
        && std::fs::read("/proc/self/attr/current").is_ok_and(|label| !label.starts_with(b"kernel\0"))
}

/// What failed, for the user.
#[derive(Debug)]
pub(crate) struct Failure {
    pub stage: &'static str,
    pub what: String,
    pub errno: i32,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.what, io::Error::from_raw_os_error(self.errno))
    }
}

/// Profile and label with the host's /proc, through which they are set: after the change of the mount namespace, what is at /proc is
/// the container's to decide (CVE-2025-52881). A process may write only its own, so the file itself is opened by it.
#[derive(Debug)]
pub(crate) struct Confinement {
    proc: OwnedFd,
    apparmor: Option<String>,
    selinux: Option<String>,
}

impl Confinement {
    /// `None` for a process that names neither.
    pub(crate) fn of(process: &Process) -> Result<Option<Confinement>, Error> {
        let named = |text: &Option<String>| text.clone().filter(|t| !t.is_empty());
        let (apparmor, selinux) = (named(process.apparmor_profile()), named(process.selinux_label()));
        if apparmor.is_none() && selinux.is_none() {
            return Ok(None);
        }
        if selinux.is_some() && !selinux_is_on() {
            let text = "the process has an SELinux label, but this kernel has no SELinux or no policy";
            return Err(Error::new(Kind::Invalid, "selinux", text, libc::EINVAL));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc = rustix::fs::openat(CWD, "/proc", flags, Mode::empty())
            .map_err(|e| Error::io("runtime", "cannot open /proc", &e.into()))?;
        Ok(Some(Confinement { proc, apparmor, selinux }))
    }

    /// For the calling process, which must not execute anything else before.
    pub(crate) fn set_for_execve(&self) -> Result<(), Failure> {
        if let Some(profile) = &self.apparmor {
            let done = self.write(&["attr/apparmor/exec", "attr/exec"], &format!("exec {profile}"));
            done.map_err(failed("apparmor", || format!("cannot set the AppArmor profile {profile}")))?;
        }
        if let Some(label) = &self.selinux {
            let done = self.write(&["attr/exec"], label);
            done.map_err(failed("selinux", || format!("cannot set the SELinux label {label}")))?;
        }
        Ok(())
    }

    /// To the first of the files that there is. The kernel wants all of it in one write.
    fn write(&self, files: &[&str], text: &str) -> io::Result<()> {
        let open = |file: &&str| {
            let path = format!("thread-self/{file}");
            rustix::fs::openat(&self.proc, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
        };
        let mut last = io::ErrorKind::NotFound.into();
        for file in files {
            match open(file) {
                Ok(fd) => return std::fs::File::from(fd).write_all(text.as_bytes()),
                Err(e) => last = e.into(),
            }
        }
        Err(last)
    }
}

fn failed(stage: &'static str, what: impl FnOnce() -> String) -> impl FnOnce(io::Error) -> Failure {
    move |e| Failure { stage, what: what(), errno: e.raw_os_error().unwrap_or(libc::EIO) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_needs_selinux() {
        let mut process = Process::default();
        process.set_apparmor_profile(None).set_selinux_label(Some(String::new()));
        assert!(Confinement::of(&process).unwrap().is_none());
        process.set_selinux_label(Some("u:r:t:s0".into()));
        match selinux_is_on() {
            true => assert!(Confinement::of(&process).unwrap().is_some()),
            false => assert_eq!(Confinement::of(&process).unwrap_err().stage, "selinux"),
        }
    }

    #[test]
    fn a_failure_names_what_was_wanted() {
        let mut process = Process::default();
        process.set_selinux_label(None).set_apparmor_profile(Some("no-such-profile".into()));
        let c = Confinement::of(&process).unwrap().unwrap();
        let e = c.set_for_execve().unwrap_err();
        assert_eq!(e.stage, "apparmor");
        assert!(e.to_string().starts_with("cannot set the AppArmor profile no-such-profile: "), "{e}");
    }
}
