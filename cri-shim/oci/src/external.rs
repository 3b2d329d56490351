//! Containers by another OCI runtime: a program such as runc or crun with the command line that they share (`create`, `start`,
//! `exec`, `kill`, `update`, `delete`). It runs in a helper, so that the container's processes become children of the caller, a
//! sub-reaper, as soon as the program has ended.

use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio as Ends};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use oci_spec::runtime::{Process, Spec};
use serde::{Deserialize, Serialize};

use crate::adapt::has_own_pid_namespace;
use crate::create::{Context, Created};
use crate::ops::{Outcome, Stdio, check_id, set_oom_score_adj};
use crate::{Error, Helper, Kind, cgroup, helper};

/// The program.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runtime {
    /// Absolute.
    pub program: PathBuf,
    /// Before the command, as in `--debug`.
    pub args: Vec<String>,
}

/// A container of such a program. `root`: folder of the pod for the program's own state, absolute and of the caller alone.
#[derive(Clone, Copy, Debug)]
pub struct External<'a> {
    pub runtime: &'a Runtime,
    pub root: &'a Path,
    pub id: &'a str,
    pub systemd_cgroup: bool,
}

fn runtime_error(stage: &str, message: impl Into<String>, errno: i32) -> Error {
    Error::new(Kind::Runtime, stage, message, errno)
}

/// Pure: the last error in a log of JSON lines, as runc and crun write them, or what of it is text.
fn said(log: &str) -> Option<String> {
    let message = |l: &str| {
        let v: serde_json::Value = serde_json::from_str(l).ok()?;
        let level = v.get("level").and_then(|l| l.as_str()).unwrap_or("error");
        let msg = v.get("msg")?.as_str()?;
        matches!(level, "error" | "fatal" | "panic").then(|| msg.to_owned())
    };
    log.lines().rev().find_map(message).or_else(|| {
        let last = log.lines().rev().map(str::trim).find(|l| !l.is_empty())?;
        (!last.starts_with('{')).then(|| last.to_owned())
    })
}

/// Pure: a program that is missing or may not be executed is said in words only.
fn classify(command: &str, message: &str) -> (&'static str, i32) {
    let text = message.to_lowercase();
    let has = |words: &[&str]| words.iter().any(|w| text.contains(w));
    match command {
        "create" | "start" | "exec" if has(&["executable file not found", "executable file `"]) => {
            ("exec", libc::ENOENT)
        }
        "create" | "start" | "exec"
            if text.contains("exec") && text.contains("no such file or directory") =>
        {
            ("exec", libc::ENOENT)
        }
        "create" | "start" | "exec" if text.contains("exec") && text.contains("permission denied") => {
            ("exec", libc::EACCES)
        }
        _ => ("runtime", 0),
    }
}

impl<'a> External<'a> {
    fn file(&self, suffix: &str) -> PathBuf {
        self.root.join(format!("{}.{suffix}", self.id))
    }

    fn state_dir(&self) -> PathBuf {
        self.root.join("state")
    }

    fn command(&self, log: &Path, name: &str) -> Command {
        let mut c = Command::new(&self.runtime.program);
        c.args(&self.runtime.args);
        c.arg("--root").arg(self.state_dir()).arg("--log").arg(log).args(["--log-format", "json"]);
        if self.systemd_cgroup {
            c.arg("--systemd-cgroup");
        }
        c.arg(name).env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        c.current_dir("/").stdin(Ends::null()).stdout(Ends::null()).stderr(Ends::null());
        c
    }

    fn spawned(&self, child: io::Result<Child>) -> Result<Child, Error> {
        child.map_err(|e| {
            let what = format!("cannot run the OCI runtime {}", self.runtime.program.display());
            Error::io("runtime", &what, &e)
        })
    }

    fn ended(&self, name: &str, mut child: Child, log: &Path) -> Result<(), Error> {
        let status = child.wait().map_err(|e| Error::io("runtime", "cannot wait for the OCI runtime", &e))?;
        if status.success() {
            return Ok(());
        }
        let text = fs::read_to_string(log).unwrap_or_default();
        let program = self.runtime.program.display();
        let message = said(&text).unwrap_or_else(|| format!("ended with {status} and said nothing"));
        let (stage, errno) = classify(name, &message);
        Err(runtime_error(stage, format!("{program} {name}: {message}"), errno))
    }

    /// Runs a command to its end.
    fn run(&self, name: &str, args: &[&str]) -> Result<(), Error> {
        let log = self.file(&format!("{name}.log"));
        let mut command = self.command(&log, name);
        let done = self.spawned(command.args(args).spawn()).and_then(|child| self.ended(name, child, &log));
        let _ = fs::remove_file(log);
        done
    }

    fn in_helper(
        &self,
        keep: &Stdio,
        work: impl FnOnce() -> Result<(Outcome, Option<OwnedFd>), Error>,
    ) -> Result<Helper, Error> {
        check_id(self.id)?;
        helper::run(&keep.fds(), || {
            // Whoever made the caller may have told it to ignore the end of children.
            helper::default_signals();
            match work() {
                Ok((outcome, console)) => (Ok(outcome), console),
                Err(e) => (Err(e), None),
            }
        })
    }

    /// OCI "create" from `bundle`/config.json; answers [`Outcome::Created`].
    pub fn create(&self, bundle: &Path, tty: bool, stdio: Stdio) -> Result<Helper, Error> {
        self.in_helper(&stdio, || {
            let done = self.create_here(bundle, tty, &stdio);
            if done.is_err() {
                let _ = self.delete_here(&[]);
            }
            done
        })
    }

    fn create_here(
        &self,
        bundle: &Path,
        tty: bool,
        stdio: &Stdio,
    ) -> Result<(Outcome, Option<OwnedFd>), Error> {
        let path = bundle.join("config.json");
        let spec = Spec::load(&path).map_err(|e| {
            Error::new(Kind::Invalid, "spec", format!("cannot read {}: {e}", path.display()), 0)
        })?;
        let state = self.state_dir();
        fs::create_dir_all(&state).map_err(|e| Error::io("state", "cannot make the runtime's folder", &e))?;
        let pid_file = self.file("pid");
        let log = self.file("create.log");
        // What the spec does not name must not be the monitor's.
        set_oom_score_adj(spec.process().as_ref().and_then(Process::oom_score_adj).unwrap_or(0));
        let mut command = self.command(&log, "create");
        command.arg("--bundle").arg(bundle).arg("--pid-file").arg(&pid_file);
        let console = self.run_with_streams(command, tty, stdio, "create", &log)?;
        let pid = read_pid(&pid_file)?;
        // The program's own process is gone; the caller's is its parent, whose groups are the ones to leave out.
        let cgroups = cgroup::of_process(pid, nix::unistd::getppid().as_raw());
        let cgroup_path = spec.linux().as_ref().and_then(|l| l.cgroups_path().clone()).unwrap_or_default();
        let created = Created {
            pid,
            cgroups,
            own_pid_namespace: has_own_pid_namespace(&spec),
            context: Context { cgroup_path, ..Context::default() },
            adapted: Vec::new(),
        };
        Ok((Outcome::Created(created), console))
    }

    /// Runs create or exec with the streams, or the terminal, of the container's process; ends the command line with the id.
    fn run_with_streams(
        &self,
        mut command: Command,
        tty: bool,
        stdio: &Stdio,
        name: &str,
        log: &Path,
    ) -> Result<Option<OwnedFd>, Error> {
        let end = |fd: &Option<OwnedFd>| match fd {
            Some(fd) => {
                fd.try_clone().map(Ends::from).map_err(|e| Error::io("stdio", "cannot pass on a stream", &e))
            }
            None => Ok(Ends::null()),
        };
        let console = match tty {
            true => Some(ConsoleSocket::new(self.root, self.id, name)?),
            false => {
                command.stdin(end(&stdio.stdin)?).stdout(end(&stdio.stdout)?).stderr(end(&stdio.stderr)?);
                None
            }
        };
        if let Some(c) = &console {
            command.arg("--console-socket").arg(&c.path);
        }
        let child = self.spawned(command.arg(self.id).spawn())?;
        let done = self.ended(name, child, log);
        let _ = fs::remove_file(log);
        done?;
        console.map(ConsoleSocket::receive).transpose()
    }

    /// OCI "start". A program that cannot be executed is an error of stage "exec".
    pub fn start(&self) -> Result<Helper, Error> {
        self.in_helper(&Stdio::default(), || self.run("start", &[self.id]).map(|()| (Outcome::Done, None)))
    }

    /// A signal for the container's first process.
    pub fn kill(&self, signal: i32) -> Result<Helper, Error> {
        self.in_helper(&Stdio::default(), || {
            self.run("kill", &[self.id, &signal.to_string()]).map(|()| (Outcome::Done, None))
        })
    }

    /// Applies new limits (OCI LinuxResources as JSON).
    pub fn update(&self, resources: &[u8]) -> Result<Helper, Error> {
        let file = self.file("resources.json");
        self.in_helper(&Stdio::default(), || {
            write_private(&file, resources)?;
            let done = self.run("update", &["--resources", &file.to_string_lossy(), self.id]);
            let _ = fs::remove_file(&file);
            done.map(|()| (Outcome::Done, None))
        })
    }

    /// A further process; answers [`Outcome::Executed`] when its program runs. `number` is the caller's own for this exec.
    pub fn exec(&self, number: u64, process: &[u8], tty: bool, stdio: Stdio) -> Result<Helper, Error> {
        let invalid = |e| Error::new(Kind::Invalid, "spec", format!("the process does not parse: {e}"), 0);
        let mut parsed: Process = serde_json::from_slice(process).map_err(invalid)?;
        parsed.set_terminal(Some(tty));
        self.in_helper(&stdio, || {
            let (file, pid_file) =
                (self.file(&format!("{number}.json")), self.file(&format!("{number}.pid")));
            let log = self.file(&format!("{number}.log"));
            let text = serde_json::to_vec(&parsed)
                .map_err(|e| runtime_error("spec", format!("cannot write a process: {e}"), 0))?;
            write_private(&file, &text)?;
            set_oom_score_adj(parsed.oom_score_adj().unwrap_or(0));
            let mut command = self.command(&log, "exec");
            command.arg("--detach").arg("--process").arg(&file).arg("--pid-file").arg(&pid_file);
            let done = self
                .run_with_streams(command, tty, &stdio, "exec", &log)
                .and_then(|console| Ok((Outcome::Executed { pid: read_pid(&pid_file)? }, console)));
            let _ = fs::remove_file(&file);
            let _ = fs::remove_file(&pid_file);
            done
        })
    }

    /// Ends what is left and removes it. Idempotent.
    pub fn delete(&self, cgroups: &[PathBuf]) -> Result<Helper, Error> {
        self.in_helper(&Stdio::default(), || self.delete_here(cgroups).map(|()| (Outcome::Done, None)))
    }

    /// The same in the calling process, for cleaning up after a monitor that is gone.
    pub fn delete_here(&self, cgroups: &[PathBuf]) -> Result<(), Error> {
        check_id(self.id)?;
        let known = self.state_dir().join(self.id).exists();
        let done = if known { self.run("delete", &["--force", self.id]) } else { Ok(()) };
        let _ = fs::remove_file(self.file("pid"));
        // The processes and the groups are ended whatever the program says; its answer counts if something is left of it.
        crate::ops::delete_in_place(self.root, self.id, cgroups)?;
        if self.state_dir().join(self.id).exists() { done } else { Ok(()) }
    }
}

fn write_private(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    use std::os::unix::fs::OpenOptionsExt;
    let write = || {
        let mut f = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        f.write_all(bytes)
    };
    write().map_err(|e: io::Error| Error::io("state", &format!("cannot write {}", path.display()), &e))
}

fn read_pid(path: &Path) -> Result<i32, Error> {
    let text =
        fs::read_to_string(path).map_err(|e| Error::io("runtime", "the OCI runtime told no process", &e))?;
    let pid = text.trim().parse().ok().filter(|p| *p > 1);
    pid.ok_or_else(|| runtime_error("runtime", format!("the OCI runtime told no process, but {text:?}"), 0))
}

/// Where the program connects to, to hand over a terminal. In a folder of the root, by a relative name while it is bound, since
/// an absolute one may exceed what a socket address holds; the program gets it through /proc for the same reason.
struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
    file: PathBuf,
    _folder: fs::File,
}

impl ConsoleSocket {
    fn new(root: &Path, id: &str, name: &str) -> Result<ConsoleSocket, Error> {
        let io = |e: io::Error| Error::io("tty", "cannot make the console socket", &e);
        let short = format!("{}.{name}.{}", &id[..id.len().min(12)], std::process::id());
        let file = root.join(&short);
        let folder = fs::File::open(root).map_err(io)?;
        let path = PathBuf::from(format!("/proc/{}/fd/{}/{short}", std::process::id(), folder.as_raw_fd()));
        let _ = fs::remove_file(&file);
        let listener = UnixListener::bind(&path).map_err(io)?;
        Ok(ConsoleSocket { listener, path, file, _folder: folder })
    }

    /// After the program has ended well: it has sent.
    fn receive(self) -> Result<OwnedFd, Error> {
        let io = |e: io::Error| Error::io("tty", "no console was sent", &e);
        let _ = fs::remove_file(&self.file);
        self.listener.set_nonblocking(true).map_err(io)?;
        let (socket, _) = self.listener.accept().map_err(io)?;
        let mut buf = [0u8; 4096];
        let mut iov = [io::IoSliceMut::new(&mut buf)];
        let mut cmsg = nix::cmsg_space!([std::os::fd::RawFd; 1]);
        let m = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut cmsg), MsgFlags::MSG_CMSG_CLOEXEC)
            .map_err(|e| io(e.into()))?;
        for c in m.cmsgs().into_iter().flatten() {
            if let ControlMessageOwned::ScmRights(fds) = c
                && let Some(fd) = fds.first()
            {
                return helper::borrow(*fd).try_clone_to_owned().map_err(io);
            }
        }
        Err(runtime_error("tty", "no console was sent", 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_said() {
        let runc = r#"{"level":"warning","msg":"odd","time":"t"}
{"level":"error","msg":"unable to start: exec: \"x\": executable file not found in $PATH","time":"t"}
"#;
        assert!(said(runc).unwrap().contains("executable file not found"));
        let crun = r#"{ "msg" : "executable file `x` not found in $PATH", "level" : "error" }"#;
        assert!(said(crun).unwrap().contains("executable file `x`"));
        assert_eq!(said("plain text\n\n"), Some("plain text".into()));
        assert_eq!(said(""), None);
        assert_eq!(said(r#"{"level":"info","msg":"fine"}"#), None);
    }

    #[test]
    fn errors_have_their_stage() {
        for (command, message, want) in [
            ("start", "exec: \"x\": executable file not found in $PATH", ("exec", libc::ENOENT)),
            (
                "create",
                "executable file `x` not found in $PATH: No such file or directory",
                ("exec", libc::ENOENT),
            ),
            ("exec", "exec failed: exec: \"/etc\": permission denied", ("exec", libc::EACCES)),
            ("create", "error mounting \"/x\"", ("runtime", 0)),
            ("delete", "executable file not found", ("runtime", 0)),
        ] {
            assert_eq!(classify(command, message), want, "{message}");
        }
    }
}
