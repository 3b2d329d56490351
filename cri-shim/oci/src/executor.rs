//! The last step before the user's program: looks the program up, becomes the user, undoes what the monitor's signal set-up would
//! leave behind, and reports a failed `execve` to whoever holds the other end of a channel (end of file without data: it runs).

use std::ffi::CString;
use std::fs;
use std::io::Read;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcontainer::container::State;
use nix::errno::Errno;
use oci_spec::runtime::{Hook, Process};

use crate::identity::{Identity, home_of};
use crate::lsm::{self, Confinement};
use crate::{Error, Kind, helper};

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Says that a container may start.
pub(crate) const GO: &[u8] = b"go";

/// A failure as it goes through the channel.
pub(crate) type Report = (i32, String);

/// The file that `name` stands for, looked up as execvp(3) does; the error is what the user is told.
fn resolve(name: &str, path: &str) -> Result<PathBuf, Report> {
    if name.is_empty() {
        return Err((libc::ENOENT, "the command is empty".into()));
    }
    let check = |p: &Path| -> Option<bool> {
        let m = fs::metadata(p).ok()?;
        Some(m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    if name.contains('/') {
        return match check(Path::new(name)) {
            Some(true) => Ok(PathBuf::from(name)),
            Some(false) => Err((libc::EACCES, format!("exec: \"{name}\": permission denied"))),
            None => Err((libc::ENOENT, format!("exec: \"{name}\": stat {name}: no such file or directory"))),
        };
    }
    let mut found_unusable = false;
    for dir in path.split(':') {
        let dir = if dir.is_empty() { "." } else { dir };
        let p = Path::new(dir).join(name);
        match check(&p) {
            Some(true) => return Ok(p),
            Some(false) => found_unusable = true,
            None => {}
        }
    }
    if found_unusable {
        return Err((libc::EACCES, format!("exec: \"{name}\": permission denied")));
    }
    Err((libc::ENOENT, format!("exec: \"{name}\": executable file not found in $PATH")))
}

/// A program with what it is given.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    args: Vec<String>,
    env: Vec<String>,
    uid: u32,
}

impl Program {
    pub(crate) fn new(p: &Process) -> Program {
        Program {
            args: p.args().clone().unwrap_or_default(),
            env: p.env().clone().unwrap_or_default(),
            uid: p.user().uid(),
        }
    }

    pub(crate) fn uid(&self) -> u32 {
        self.uid
    }

    fn variable(&self, name: &str) -> Option<&str> {
        self.env.iter().find_map(|v| v.strip_prefix(name)?.strip_prefix('='))
    }

    fn find(&self) -> Result<PathBuf, Report> {
        let name = self.args.first().map_or("", String::as_str);
        resolve(name, self.variable("PATH").unwrap_or(DEFAULT_PATH))
    }

    /// Returns only when it fails.
    pub(crate) fn run(&self, identity: &Identity) -> Report {
        let name = self.args.first().map_or("", String::as_str);
        let file = match self.find() {
            Ok(f) => f,
            Err(e) => return e,
        };
        let mut env = self.env.clone();
        if self.variable("HOME").is_none_or(str::is_empty) {
            env.retain(|v| !v.starts_with("HOME="));
            env.push(format!("HOME={}", home_of(self.uid, &passwd())));
        }
        let strings =
            |all: &[String]| all.iter().map(|a| CString::new(a.as_bytes())).collect::<Result<Vec<_>, _>>();
        let (Ok(path), Ok(args), Ok(env)) =
            (CString::new(file.as_os_str().as_bytes()), strings(&self.args), strings(&env))
        else {
            return (libc::EINVAL, format!("exec: {name:?}: an argument or variable holds a NUL byte"));
        };
        reset_signals();
        if let Err(e) = identity.finish() {
            return (e.errno, format!("exec: \"{name}\": {e}"));
        }
        match nix::unistd::execve(&path, &args, &env) {
            Ok(never) => match never {},
            Err(e) => (e as i32, format!("exec: \"{name}\": {}", e.desc().to_lowercase())),
        }
    }
}

/// The start of the container's user list; its length is the container's to decide.
fn passwd() -> String {
    let mut text = Vec::new();
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = fs::File::options().read(true).custom_flags(flags).open("/etc/passwd");
    // A FIFO or a device in its place, which might never end, is not read; what cannot be read counts as not there.
    if let Ok(f) = file
        && f.metadata().is_ok_and(|m| m.is_file())
    {
        let _ = f.take(1 << 20).read_to_end(&mut text);
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// Writes a failure to the channel, in one piece, for [`read_report`].
pub(crate) fn send_report(channel: RawFd, (errno, message): &Report) {
    let text = format!("{errno} {message}");
    let bytes = &text.as_bytes()[..text.floor_char_boundary(3000)];
    let _ = nix::unistd::write(helper::borrow(channel), bytes);
}

/// Waits until the program runs (`None`) or has failed to.
pub fn read_report(channel: &OwnedFd) -> Option<Error> {
    let mut buf = [0u8; 4096];
    loop {
        return match nix::unistd::read(channel, &mut buf) {
            Ok(0) | Err(Errno::ECONNRESET) => None,
            Ok(n) => {
                let (errno, message) = parse_report(&buf[..n]);
                Some(Error::new(Kind::Runtime, "exec", message, errno))
            }
            Err(Errno::EINTR) => continue,
            Err(e) => Some(Error::io("exec", "cannot read the report of the program's start", &e.into())),
        };
    }
}

fn parse_report(bytes: &[u8]) -> Report {
    let text = String::from_utf8_lossy(bytes);
    let split = text.split_once(' ').and_then(|(n, m)| Some((n.parse().ok()?, m.to_owned())));
    split.unwrap_or((0, text.into_owned()))
}

/// The end of a container's first process.
pub(crate) struct Init {
    pub program: Program,
    pub identity: Identity,
    pub confinement: Option<Rc<Confinement>>,
    /// Close-on-exec; brings [`GO`], takes a report.
    pub channel: RawFd,
    /// startContainer hooks.
    pub hooks: Option<(Vec<Hook>, State)>,
}

impl Init {
    /// Sets profile and label for the user's program.
    pub(crate) fn confine(&self) -> Result<(), lsm::Failure> {
        self.confinement.as_ref().map_or(Ok(()), |c| c.set_for_execve())
    }

    /// Never returns: it executes the user's program after the word to start, or ends.
    pub(crate) fn wait_and_run(&self) -> ! {
        if !self.may_go() {
            // The monitor is gone: nobody would look after the container.
            helper::leave(1);
        }
        if let Some((hooks, state)) = &self.hooks
            && let Err(e) = libcontainer::hooks::run_hooks(Some(hooks), Some(state), None, None, None)
        {
            send_report(self.channel, &(0, format!("startContainer hook: {e}")));
            helper::leave(1);
        }
        let report = self.program.run(&self.identity);
        send_report(self.channel, &report);
        helper::leave(1)
    }

    fn may_go(&self) -> bool {
        let mut buf = [0u8; 8];
        loop {
            match nix::unistd::read(helper::borrow(self.channel), &mut buf) {
                Ok(n) => return &buf[..n] == GO,
                Err(Errno::EINTR) => {}
                Err(_) => return false,
            }
        }
    }
}

/// Rust ignores SIGPIPE, whoever started the monitor may ignore more, and the monitor blocks what its signalfd reads: all of it
/// would be inherited.
fn reset_signals() {
    use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
    crate::helper::default_signals();
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lookup() {
        assert_eq!(resolve("sh", "/nonexistent:/bin"), Ok(PathBuf::from("/bin/sh")));
        assert_eq!(resolve("/bin/sh", ""), Ok(PathBuf::from("/bin/sh")));
        assert_eq!(resolve("no-such-program", "/bin").unwrap_err().0, libc::ENOENT);
        assert_eq!(resolve("/etc/passwd", "").unwrap_err().0, libc::EACCES);
        assert_eq!(resolve("passwd", "/etc").unwrap_err().0, libc::EACCES);
        assert_eq!(resolve("/", "").unwrap_err().0, libc::EACCES);
        assert_eq!(resolve("", "/bin").unwrap_err().0, libc::ENOENT);
        assert_eq!(parse_report(b"2 exec: x"), (2, "exec: x".into()));
        assert_eq!(parse_report(b"junk"), (0, "junk".into()));
    }
}
