//! Starting monitors. One that runs already waits for the next pod: executing the program is a tenth of what a pod's start takes.

use std::ffi::OsStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::{Error, Monitor, Result, seal};

/// How long a monitor may take until it listens.
const START: Duration = Duration::from_secs(20);

/// Starts `program` for pods.
#[derive(Debug)]
pub(crate) struct Starter {
    program: PathBuf,
    /// Blanks, as many as a pod's folder's path has bytes: others see the path there once the monitor has it.
    room: String,
    spare: Mutex<Spare>,
    wanted: Notify,
}

#[derive(Debug)]
enum Spare {
    None,
    Waits(Box<Started>),
    /// The program is a release that knows of no spare ones.
    NeverAgain,
}

impl Starter {
    /// `longest`: bytes of the longest path of a pod's folder.
    pub fn new(program: &Path, longest: usize) -> Starter {
        let spare = Mutex::new(Spare::None);
        Starter { program: program.to_owned(), room: " ".repeat(longest), spare, wanted: Notify::new() }
    }

    /// Starts a monitor for `dir` and returns when it listens.
    pub async fn start(&self, dir: PathBuf) -> Result<Monitor> {
        let refused = |message| Error::Start { program: self.program.clone(), dir: dir.clone(), message };
        if let Some(mut spare) = self.take() {
            match timeout(START, spare.serve(&dir)).await {
                Ok(Ok(())) => return Ok(Monitor::at(dir)),
                Ok(Err(NotServing::Says(message))) => return Err(refused(message)),
                // Somebody has killed it, and will not have meant this pod.
                Ok(Err(NotServing::Ended(why))) => tracing::info!(why, "a spare monitor was gone"),
                Err(_) => return Err(Error::Timeout("its start")),
            }
        }
        let mut fresh = Started::new(&self.program, "--dir", dir.as_os_str())?;
        match timeout(START, fresh.listens()).await {
            Ok(Ok(())) => Ok(Monitor::at(dir)),
            Ok(Err(NotServing::Says(message) | NotServing::Ended(message))) => Err(refused(message)),
            Err(_) => Err(Error::Timeout("its start")),
        }
    }

    /// The spare one, if it is alive.
    fn take(&self) -> Option<Box<Started>> {
        let mut spare = self.spare.lock();
        let mut started = match std::mem::replace(&mut *spare, Spare::None) {
            Spare::Waits(started) => started,
            other => {
                *spare = other;
                return None;
            }
        };
        let ended = started.child.as_mut().map(Child::try_wait);
        match ended {
            Some(Ok(None)) => return Some(started),
            // It did not understand what it was to be.
            Some(Ok(Some(status))) if status.code().is_some() => *spare = Spare::NeverAgain,
            _ => {}
        }
        None
    }

    /// A pod may come, and there is time until then.
    pub fn want_spare(&self) {
        self.wanted.notify_one();
    }

    /// Returns when somebody wants a spare one.
    pub async fn spare_wanted(&self) {
        self.wanted.notified().await;
    }

    /// Makes a spare one if there is none.
    pub fn make_spare(&self) {
        if !matches!(*self.spare.lock(), Spare::None) {
            return;
        }
        match Started::new(&self.program, "--spare", OsStr::new(&self.room)) {
            Ok(started) => *self.spare.lock() = Spare::Waits(Box::new(started)),
            // The next pod's start says it to somebody who can do something about it.
            Err(e) => tracing::debug!(error = %orlop_base::telemetry::chain(&e), "no spare monitor"),
        }
    }

    /// Ends the spare one.
    pub async fn end(&self) {
        let spare = std::mem::replace(&mut *self.spare.lock(), Spare::NeverAgain);
        if let Spare::Waits(mut started) = spare
            && let Some(child) = &mut started.child
        {
            // One that has ended is as good.
            let _ = child.kill().await;
        }
    }
}

/// A monitor that is not known to serve yet. It is killed when nobody waits for it any more.
#[derive(Debug)]
struct Started {
    child: Option<Child>,
    /// On which it says how its start went, and a spare one is told its folder.
    word: UnixStream,
}

/// Why a monitor does not listen.
enum NotServing {
    Says(String),
    Ended(String),
}

impl Started {
    fn new(program: &Path, flag: &str, value: &OsStr) -> Result<Started> {
        let spawn_err = |source| Error::Spawn { program: program.to_owned(), source };
        let (word, theirs) = word_of_child().map_err(spawn_err)?;
        // The descriptor's name is looked up by the child, before it is closed there.
        let sealed = seal::read_only(program).ok();
        let path = sealed.as_ref().map(|s| PathBuf::from(format!("/proc/self/fd/{}", s.as_raw_fd())));
        let child = tokio::process::Command::new(path.as_deref().unwrap_or(program))
            .arg0(program)
            .arg(flag)
            .arg(value)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(spawn_err)?;
        // Before it has anything to start. Nobody has waited for it, so the number is not another's yet.
        let pid = child.id().and_then(|pid| rustix::process::Pid::from_raw(i32::try_from(pid).ok()?));
        if let Some(pid) = pid
            && let Err(error) = orlop_base::descriptors::give_found(pid)
        {
            tracing::warn!(%error, "the pod's containers may open more files than they should");
        }
        Ok(Started { child: Some(child), word })
    }

    /// Has a spare one serve `dir`; returns when it listens.
    async fn serve(&mut self, dir: &Path) -> std::result::Result<(), NotServing> {
        let told = self.word.write_all(dir.as_os_str().as_bytes()).await;
        told.map_err(|e| NotServing::Ended(e.to_string()))?;
        self.listens().await
    }

    /// Returns when it listens. Then it is reaped by this process's runtime when it ends, or by init when the server does before.
    async fn listens(&mut self) -> std::result::Result<(), NotServing> {
        let mut said = [0; 4096];
        let n = self.word.read(&mut said).await.unwrap_or(0);
        match said[..n].split_first() {
            Some((b'+', _)) => {
                self.child = None;
                return Ok(());
            }
            Some((_, message)) => {
                return Err(NotServing::Says(String::from_utf8_lossy(message).trim().to_owned()));
            }
            None => {}
        }
        // Dead, or a release that ends once its daemon listens.
        let Some(child) = &mut self.child else { return Ok(()) };
        let status = child.wait().await.map_err(|e| NotServing::Ended(e.to_string()))?;
        if status.success() {
            return Ok(());
        }
        let mut message = Vec::new();
        if let Some(stderr) = child.stderr.take() {
            // Whoever still holds the pipe's other end must not hold this one up.
            let _ = timeout(Duration::from_secs(1), stderr.take(4096).read_to_end(&mut message)).await;
        }
        let message = String::from_utf8_lossy(&message).trim().to_owned();
        Err(NotServing::Ended(if message.is_empty() { status.to_string() } else { message }))
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // One that has ended is as good.
            let _ = child.start_kill();
        }
    }
}

/// The socket on which a monitor says how its start went, and the monitor's end of it.
fn word_of_child() -> std::io::Result<(UnixStream, OwnedFd)> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::io::ioctl_fionbio(&theirs, false)?;
    Ok((UnixStream::from_std(ours.into())?, theirs))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With a spare one that has run `script` to its end.
    async fn after(script: &str) -> Starter {
        // Refuses what it is asked to be, as an earlier release does.
        let starter = Starter::new(Path::new("/bin/false"), 10);
        let mut child = tokio::process::Command::new("sh").args(["-c", script]).spawn().unwrap();
        child.wait().await.unwrap();
        let (word, _) = word_of_child().unwrap();
        *starter.spare.lock() = Spare::Waits(Box::new(Started { child: Some(child), word }));
        starter
    }

    #[tokio::test]
    async fn a_program_that_knows_no_spare_ones_is_started_in_vain_once() {
        let starter = after("exit 1").await;
        for _ in 0..3 {
            assert!(starter.take().is_none());
            starter.make_spare();
            assert!(matches!(*starter.spare.lock(), Spare::NeverAgain));
        }
    }

    #[tokio::test]
    async fn one_that_was_killed_is_replaced() {
        let starter = after("kill -9 $$").await;
        assert!(starter.take().is_none());
        starter.make_spare();
        assert!(matches!(*starter.spare.lock(), Spare::Waits(_)));
        starter.end().await;
    }
}
