//! The last step before the user's program: undoes what the monitor's signal set-up would leave behind and reports a
//! failed `execve` to whoever holds the read end of the error pipe (end of file without data: it runs).

use std::ffi::CString;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use oci_spec::runtime::Spec;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// `error_fd` is a close-on-exec descriptor of the calling process tree; -1 reports nowhere.
#[derive(Clone)]
pub(crate) struct Exec {
    pub error_fd: RawFd,
}

fn args(spec: &Spec) -> Option<&Vec<String>> {
    spec.process().as_ref().and_then(|p| p.args().as_ref()).filter(|a| !a.is_empty())
}

/// The file that `name` stands for, looked up as execvp(3) does; the error is what the user is told.
fn resolve(name: &str, path: &str) -> Result<PathBuf, (i32, String)> {
    if name.is_empty() {
        return Err((libc::ENOENT, "the command is empty".into()));
    }
    let check = |p: &Path| -> Option<bool> {
        let m = std::fs::metadata(p).ok()?;
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

impl Executor for Exec {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let bad = |m: String| Err(ExecutorValidationError::ArgValidationError(m));
        let Some(args) = args(spec) else { return bad("no command to execute".into()) };
        let env = spec.process().as_ref().and_then(|p| p.env().as_ref());
        let path = env.and_then(|e| e.iter().find_map(|v| v.strip_prefix("PATH="))).unwrap_or(DEFAULT_PATH);
        match resolve(&args[0], path) {
            Ok(_) => Ok(()),
            Err((errno, m)) => bad(format!("{m} (os error {errno})")),
        }
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let args = args(spec).ok_or(ExecutorError::InvalidArg)?;
        let path = std::env::var("PATH").unwrap_or_else(|_| DEFAULT_PATH.to_owned());
        let failure = match resolve(&args[0], &path) {
            Err(e) => e,
            Ok(file) => {
                let file =
                    CString::new(file.as_os_str().as_bytes()).map_err(|_| ExecutorError::InvalidArg)?;
                let argv: Vec<CString> = args
                    .iter()
                    .map(|a| CString::new(a.as_bytes()))
                    .collect::<Result<_, _>>()
                    .map_err(|_| ExecutorError::InvalidArg)?;
                reset_signals();
                let errno = match nix::unistd::execv(&file, &argv) {
                    Ok(never) => match never {},
                    Err(e) => e,
                };
                (errno as i32, format!("exec: \"{}\": {}", args[0], errno.desc().to_lowercase()))
            }
        };
        if self.error_fd >= 0 {
            let text = format!("{} {}", failure.0, failure.1);
            let bytes = &text.as_bytes()[..text.len().min(3000)];
            let _ = nix::unistd::write(crate::helper::borrow(self.error_fd), bytes);
        }
        Err(ExecutorError::Other(failure.1))
    }
}

/// Rust ignores SIGPIPE, whoever started the monitor may ignore more, and the monitor blocks what its signalfd reads: all of it
/// would be inherited.
fn reset_signals() {
    use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
    crate::helper::default_signals();
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
}

/// Reads what [`Exec`] wrote: errno and message.
pub(crate) fn parse_report(bytes: &[u8]) -> Option<(i32, String)> {
    let text = String::from_utf8_lossy(bytes);
    let (n, m) = text.split_once(' ')?;
    Some((n.parse().ok()?, m.to_owned()))
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
        assert_eq!(parse_report(b"2 exec: x"), Some((2, "exec: x".into())));
        assert_eq!(parse_report(b"junk"), None);
    }
}
