//! The monitor's process, apart from what it answers. A monitor that is slow, stopped or waits for a disk is silent but alive, and so
//! are its containers; only the end of its process makes it dead.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::time::timeout;

use super::{Error, Monitor, Result};

/// How long a killed monitor may take to be gone. Longer only in uninterruptible sleep.
const DEATH: Duration = Duration::from_secs(10);
/// How long cleaning up after a monitor may take: seconds for each container whose processes do not end.
const CLEANUP: Duration = Duration::from_secs(60);

/// A living process that was started as the monitor of one folder. The descriptor keeps it apart from a later one of the same number.
pub(crate) struct Process {
    pid: Pid,
    fd: OwnedFd,
}

impl Process {
    /// The monitor of `dir`, if it runs. An error when that cannot be seen: it must not be taken for dead then.
    fn of(dir: &Path) -> Result<Option<Process>> {
        let at = dir.join("monitor.pid");
        let told = fs::read_to_string(&at);
        let Some(told) = or_gone(told).map_err(|source| Error::Look { at, source })? else { return Ok(None) };
        match told.trim().parse() {
            Ok(pid) if is_for(pid, dir)? => Process::open(pid, dir),
            _ => Ok(None),
        }
    }

    fn open(number: i32, dir: &Path) -> Result<Option<Process>> {
        let Some(pid) = Pid::from_raw(number) else { return Ok(None) };
        let fd = rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK).map_err(std::io::Error::from);
        let at = || PathBuf::from(format!("/proc/{number}"));
        let Some(fd) = or_gone(fd).map_err(|source| Error::Look { at: at(), source })? else {
            return Ok(None);
        };
        // Once more, now that its number cannot pass to another.
        Ok(is_for(number, dir)?.then_some(Process { pid, fd }))
    }

    async fn kill(&self) -> Result<()> {
        // It may have ended just now.
        let _ = rustix::process::pidfd_send_signal(&self.fd, Signal::KILL);
        timeout(DEATH, self.ended()).await.map_err(|_| Error::Timeout("SIGKILL"))
    }

    /// Returns when it has ended.
    pub async fn ended(&self) {
        if let Err(e) = super::pidfd::ended(&self.fd).await {
            tracing::warn!(error = %e, "cannot wait for a monitor's end");
            std::future::pending::<()>().await;
        }
    }
}

/// `None` for what is not there any more.
fn or_gone<T>(result: std::io::Result<T>) -> std::io::Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Whether the process was started for `dir`: a monitor, or what one forked and did not execute yet.
fn is_for(pid: i32, dir: &Path) -> Result<bool> {
    let asked = format!("\0--dir\0{}\0", dir.display());
    let at = PathBuf::from(format!("/proc/{pid}/cmdline"));
    // That of a process that has ended is empty, reaped or not.
    let line = or_gone(fs::read(&at)).map_err(|source| Error::Look { at, source })?.unwrap_or_default();
    Ok(line.windows(asked.len()).any(|w| w == asked.as_bytes()))
}

impl Monitor {
    /// The monitor's process, if it runs.
    pub fn process(&self) -> Result<Option<Process>> {
        Process::of(&self.dir)
    }

    /// Kills a monitor that does not answer or is just starting, and waits for its end. What it leaves is for [`Monitor::clean_up`].
    pub async fn end(&self) -> Result<()> {
        if let Some(process) = self.process()? {
            tracing::warn!(pid = process.pid.as_raw_nonzero(), dir = %self.dir.display(), "killing a pod's monitor that does not answer");
            process.kill().await?;
        }
        if self.dir.join("monitor.pid").exists() {
            return Ok(());
        }
        // One that is just starting has not told its number yet, and forks.
        loop {
            let entries =
                fs::read_dir("/proc").map_err(|source| Error::Look { at: "/proc".into(), source })?;
            let names = entries.flatten().map(|e| e.file_name());
            let mut found = Vec::new();
            for pid in names.filter_map(|n| n.to_string_lossy().parse::<i32>().ok()) {
                if is_for(pid, &self.dir)? {
                    found.extend(Process::open(pid, &self.dir)?);
                }
            }
            if found.is_empty() {
                return Ok(());
            }
            for process in found {
                process.kill().await?;
            }
        }
    }

    /// Whether a monitor left a journal of what is not taken back.
    pub fn left_anything(&self) -> bool {
        let some = |dir: PathBuf| fs::read_dir(dir).is_ok_and(|mut d| d.next().is_some());
        self.dir.join("sandbox.json").exists() || some(self.dir.join("containers"))
    }

    /// Has the monitor's program end what a dead monitor ran, by its journal, and the cgroups `groups`. An error when something stays.
    pub async fn clean_up(&self, program: &Path, groups: &[String]) -> Result<()> {
        let mut command = tokio::process::Command::new(program);
        command.arg("--cleanup").arg("--dir").arg(&self.dir);
        for group in groups {
            command.arg("--cgroup").arg(group);
        }
        command.env_clear().current_dir("/").kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let done = timeout(CLEANUP, command.output()).await.map_err(|_| Error::Timeout("--cleanup"))?;
        let done = done.map_err(|source| Error::Spawn { program: program.to_owned(), source })?;
        let message = String::from_utf8_lossy(&done.stderr).trim().to_owned();
        if done.status.success() {
            if !message.is_empty() {
                tracing::warn!(dir = %self.dir.display(), "cleaned up after a monitor: {message}");
            }
            return Ok(());
        }
        Err(Error::CleanUp { dir: self.dir.clone(), message })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A shell that was started as the monitor of `dir` would be.
    async fn shell(script: &str, dir: &Path) -> tokio::process::Child {
        let mut command = tokio::process::Command::new("sh");
        command.args(["-c", script, "sh", "--dir"]).arg(dir).arg("end");
        let child = command.stdin(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        let pid = child.id().unwrap() as i32;
        // The caller goes on before the kernel has noted the new program's arguments.
        let limit = Duration::from_secs(20);
        orlop_base::testkit::wait_until("its arguments", limit, || async {
            is_for(pid, dir).unwrap().then_some(())
        })
        .await;
        child
    }

    #[tokio::test]
    async fn a_stopped_process_lives_and_a_killed_one_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let monitor = Monitor::at(dir.path().to_owned());
        assert!(monitor.process().unwrap().is_none());
        let mut child = shell("kill -STOP $$; read line", dir.path()).await;
        let pid = child.id().unwrap();
        assert!(monitor.process().unwrap().is_none(), "it has told nothing");
        let told = dir.path().join("monitor.pid");
        for (text, ours) in [(std::process::id(), false), (pid, true)] {
            fs::write(&told, format!("{text}\n")).unwrap();
            let found = monitor.process().unwrap();
            assert_eq!(found.is_some(), ours);
            if let Some(found) = found {
                assert!(timeout(Duration::from_millis(1), found.ended()).await.is_err());
            }
        }
        // Nobody has reaped it when its end is seen.
        monitor.end().await.unwrap();
        assert!(monitor.process().unwrap().is_none());
        child.wait().await.unwrap();
    }

    #[test]
    fn what_cannot_be_seen_is_not_dead() {
        let dir = tempfile::tempdir().unwrap();
        let monitor = Monitor::at(dir.path().to_owned());
        // Reading it fails, whoever reads.
        fs::create_dir(dir.path().join("monitor.pid")).unwrap();
        assert!(matches!(monitor.process(), Err(Error::Look { .. })));
        for (code, gone) in
            [(libc::ENOENT, true), (libc::ESRCH, true), (libc::EMFILE, false), (libc::ENOMEM, false)]
        {
            let seen = or_gone::<()>(Err(std::io::Error::from_raw_os_error(code)));
            assert_eq!(seen.is_ok(), gone, "{code}");
        }
    }

    #[tokio::test]
    async fn one_that_is_just_starting_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = shell("read line", dir.path()).await;
        Monitor::at(dir.path().to_owned()).end().await.unwrap();
        assert!(!child.wait().await.unwrap().success());
    }
}
