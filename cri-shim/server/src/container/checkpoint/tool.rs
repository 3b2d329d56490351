//! The program that does the work: criu for containers of our own, the runtime's `checkpoint` for those of another OCI runtime.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use orlop_base::strays;
use tokio::process::Command;
use tokio::time::timeout_at;

use super::criu::{self, Seen};
use super::work::Work;
use crate::config::{CgroupDriver, OciRuntime};
use crate::error::{Error, Result};
use crate::runtime::Runtime;

/// Nothing is read from the environment: these are searched for criu, and by criu for tar and gzip.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// For a program that only has to say what it knows.
const HELP_LIMIT: Duration = Duration::from_secs(10);

pub(super) enum Tool {
    Criu(PathBuf),
    /// `root`: where it keeps its containers.
    Runtime {
        handler: String,
        runtime: OciRuntime,
        root: PathBuf,
        systemd: bool,
    },
}

fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(PATH).map(|d| d.join(name)).find(|p| p.is_file())
}

impl Tool {
    pub fn of(server: &Runtime, handler: &str, sandbox: &str) -> Result<Tool> {
        if matches!(handler, "" | crate::status::RUNTIME) {
            let criu = match &server.config.criu {
                Some(named) => named.is_file().then(|| named.clone()),
                None => on_path("criu"),
            };
            return criu.map(Tool::Criu).ok_or_else(|| {
                Error::Unimplemented(format!(
                    "CheckpointContainer needs the program criu, which is not at {}: install it \
                     (Debian: apt-get install criu)",
                    server.config.criu.as_deref().unwrap_or(Path::new(PATH)).display()
                ))
            });
        }
        let runtime = server.config.runtimes.get(handler).ok_or_else(|| {
            Error::Invalid(format!("the pod's runtime handler {handler:?} is not known any more"))
        })?;
        Ok(Tool::Runtime {
            handler: handler.to_owned(),
            runtime: runtime.clone(),
            // As the monitor has it.
            root: server.config.sandbox_run_dir(sandbox).join("external/state"),
            systemd: server.config.cgroup_driver == CgroupDriver::Systemd,
        })
    }

    fn program(&self) -> &Path {
        match self {
            Tool::Criu(program) => program,
            Tool::Runtime { runtime, .. } => &runtime.program,
        }
    }

    /// In a process group of its own, with nothing of our environment.
    fn command(&self) -> Command {
        let mut command = Command::new(self.program());
        command.env_clear().env("PATH", PATH).current_dir("/").stdin(Stdio::null());
        command.process_group(0).kill_on_drop(true);
        command
    }

    /// Another runtime may not know the command.
    pub async fn check(&self, deadline: Instant) -> Result<()> {
        let Tool::Runtime { handler, runtime, .. } = self else { return Ok(()) };
        let mut command = self.command();
        command.args(&runtime.args).args(["checkpoint", "--help"]);
        let until = deadline.min(Instant::now() + HELP_LIMIT);
        if run(command, None, until).await?.is_some_and(|s| s.success()) {
            return Ok(());
        }
        Err(Error::Unimplemented(format!(
            "the pod's runtime {handler} ({}) has no command checkpoint",
            runtime.program.display()
        )))
    }

    fn arguments(&self, id: &str, work: &Work, seen: &Seen, log: &Path) -> Vec<OsString> {
        let Tool::Runtime { runtime, root, systemd, .. } = self else {
            return criu::arguments(work, seen);
        };
        let mut out: Vec<OsString> = runtime.args.iter().map(Into::into).collect();
        let mut add = |words: &[&dyn AsRef<std::ffi::OsStr>]| {
            out.extend(words.iter().map(|w| w.as_ref().to_owned()));
        };
        add(&[&"--root", root, &"--log", &log, &"--log-format", &"json"]);
        if *systemd {
            add(&[&"--systemd-cgroup"]);
        }
        let (images, logs) = (work.images(), work.archive());
        add(&[&"checkpoint", &"--image-path", &images, &"--work-path", &logs]);
        add(&[&"--leave-running", &"--file-locks", &id]);
        out
    }

    /// Writes the images of a frozen container.
    pub async fn run(&self, id: &str, work: &Work, seen: &Seen, deadline: Instant) -> Result<()> {
        let (output, log) = (work.file("output"), work.file("runtime.log"));
        let mut command = self.command();
        command.args(self.arguments(id, work, seen, &log)).env(strays::OWNER, work.dir());
        if let Tool::Runtime { .. } = self {
            // The one lock that is undone when the runtime and its criu are killed; no runtime has a flag for it.
            let config = work.file("criu.conf");
            fs::write(&config, "network-lock nftables\n").map_err(Error::io("write", &config))?;
            command.env("CRIU_CONFIG_FILE", config);
        }
        let file = File::create(&output).map_err(Error::io("create", &output))?;
        let Some(status) = run(command, Some(file), deadline).await? else {
            return Err(Error::Internal(format!("{} did not end in time", self.program().display())));
        };
        if status.success() {
            return Ok(());
        }
        let read = |p: PathBuf| String::from_utf8_lossy(&fs::read(p).unwrap_or_default()).into_owned();
        let message = criu::last_error(&read(work.archive().join("dump.log")))
            .or_else(|| runtime_error(&read(log)))
            .or_else(|| criu::last_error(&read(output.clone())))
            .or_else(|| read(output).lines().rev().find(|l| !l.trim().is_empty()).map(str::to_owned))
            .unwrap_or_else(|| format!("ended with {status} and said nothing"));
        Err(Error::Checkpoint { id: id.to_owned(), program: self.program().to_owned(), message })
    }
}

/// Pure: the last error in a log of JSON lines.
fn runtime_error(log: &str) -> Option<String> {
    log.lines().rev().find_map(|l| {
        let v: serde_json::Value = serde_json::from_str(l).ok()?;
        let is_error = matches!(v.get("level")?.as_str()?, "error" | "fatal");
        is_error.then(|| v.get("msg")?.as_str().map(str::to_owned))?
    })
}

/// A program with what it has started, which ends with this. criu detaches from the processes that it looks into when it dies,
/// and what it has put into them ends by itself.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            // Not reaped yet, so the number is still its own.
            let _ = killpg(leader, Signal::SIGKILL);
        }
    }
}

/// Runs a [`Tool::command`]; `None`: it had to be killed.
async fn run(mut command: Command, output: Option<File>, deadline: Instant) -> Result<Option<ExitStatus>> {
    let program = PathBuf::from(command.as_std().get_program());
    let failed = |e| Error::io("run", &program)(e);
    let end = |file: &Option<File>| {
        file.as_ref().map_or_else(|| Ok(Stdio::null()), |f| f.try_clone().map(Stdio::from))
    };
    command.stdout(end(&output).map_err(failed)?).stderr(end(&output).map_err(failed)?);
    let mut child = command.spawn().map_err(failed)?;
    // After the child, so that it goes before it when the request is dropped.
    let mut group = Group(child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw));
    match timeout_at(deadline.into(), child.wait()).await {
        Ok(status) => {
            group.0 = None;
            Ok(Some(status.map_err(failed)?))
        }
        Err(_) => {
            drop(group);
            child.wait().await.map_err(failed)?;
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtimes_last_error() {
        let log = "{\"level\":\"error\",\"msg\":\"first\"}\n{\"level\":\"error\",\"msg\":\"criu failed\"}\n{\"level\":\"info\",\"msg\":\"x\"}\n";
        assert_eq!(runtime_error(log), Some("criu failed".into()));
        assert_eq!(runtime_error("text"), None);
    }

    /// Whether the process whose number is in `file` has ended; `None`: nothing is there yet.
    fn ended(file: &Path) -> Option<bool> {
        let pid: u32 = fs::read_to_string(file).ok()?.trim().parse().ok()?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        Some(stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z')))
    }

    async fn until(what: &str, check: impl Fn() -> bool) {
        let check = || std::future::ready(check().then_some(()));
        orlop_base::testkit::wait_until(what, Duration::from_secs(20), check).await;
    }

    #[tokio::test]
    async fn a_program_that_does_not_end_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("child");
        let shell = |script: &str| {
            let mut command = Tool::Criu("/bin/sh".into()).command();
            command.args(["-c", script]);
            command
        };
        let hangs = || shell(&format!("sleep 1000 & echo $! > {}; wait", file.display()));
        // A loaded machine may take its time until there is a child.
        let mut limit = Duration::from_millis(200);
        while ended(&file).is_none() {
            assert!(run(hangs(), None, Instant::now() + limit).await.unwrap().is_none());
            limit *= 2;
        }
        until("the child's end at the deadline", || ended(&file) == Some(true)).await;
        // The same when the request is dropped.
        fs::remove_file(&file).unwrap();
        tokio::select! {
            done = run(hangs(), None, Instant::now() + Duration::from_secs(1000)) => panic!("{done:?}"),
            () = until("a child", || ended(&file).is_some()) => {}
        }
        until("the child's end", || ended(&file) == Some(true)).await;
        let status = run(shell("exit 3"), None, Instant::now() + HELP_LIMIT).await.unwrap().unwrap();
        assert_eq!(status.code(), Some(3));
    }
}
