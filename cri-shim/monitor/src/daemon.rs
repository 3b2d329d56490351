//! Becoming a daemon: own session, nothing inherited. `unsafe` is in `orlop_oci::helper`.
//!
//! A starter that goes on gives a SOCK_SEQPACKET socket as standard input: the daemon is then its child, which two forks and three
//! ends of a process less need, and says there how its start went. Any other starter, a shell or a server of an earlier release, waits
//! for the end of the process that it started; the daemon is a child of init.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::unistd::{pipe2, setsid};
use orlop_oci::helper::{fork_clean, inherit_nothing, leave};
use rustix::net::SocketType;

/// What the daemon tells its starter.
pub struct Starter(OwnedFd);

impl Starter {
    /// The socket listens: a starter that waits exits 0.
    pub fn ready(self) {
        let _ = rustix::io::write(&self.0, b"+");
    }

    /// The folder that a server names; `None` when it has ended instead.
    pub fn folder(&self) -> io::Result<Option<PathBuf>> {
        let mut path = vec![0; 4096];
        let n = loop {
            match rustix::io::read(&self.0, &mut path) {
                Err(rustix::io::Errno::INTR) => {}
                // A starter that waits has only one end of a pipe to hear with.
                Err(rustix::io::Errno::BADF) => return Err(io::Error::other("--spare is for servers")),
                other => break other?,
            }
        };
        path.truncate(n);
        Ok((n > 0).then(|| OsString::from_vec(path).into()))
    }

    /// A starter that waits prints `message` and exits 1.
    pub fn failed(self, message: &str) {
        let _ = rustix::io::write(&self.0, format!("-{message}").as_bytes());
    }
}

/// Returns in the daemon only. A calling process that is not the daemon itself waits for [`Starter`]'s word and exits.
pub fn daemonise() -> io::Result<Starter> {
    let starter = match starter_that_goes_on()? {
        Some(starter) => {
            inherit_nothing(&[starter.as_raw_fd()]);
            setsid()?;
            starter
        }
        None => fork_twice()?,
    };
    std::env::set_current_dir("/")?;
    // Containers start with this mask when their spec names none.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    Ok(Starter(starter))
}

fn starter_that_goes_on() -> io::Result<Option<OwnedFd>> {
    let stdin = io::stdin();
    match rustix::net::sockopt::socket_type(&stdin) {
        Ok(SocketType::SEQPACKET) => Ok(Some(stdin.as_fd().try_clone_to_owned()?)),
        _ => Ok(None),
    }
}

fn fork_twice() -> io::Result<OwnedFd> {
    let (read, write) = pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    if fork_clean(&[write.as_raw_fd()])?.is_some() {
        drop(write);
        wait_for_word(read);
    }
    drop_quietly(read);
    setsid()?;
    if fork_clean(&[write.as_raw_fd()])?.is_some() {
        leave(0);
    }
    Ok(write)
}

/// fork_clean has closed it in this process already.
fn drop_quietly(fd: OwnedFd) {
    std::mem::forget(fd);
}

fn wait_for_word(read: OwnedFd) -> ! {
    let mut word = Vec::new();
    let _ = File::from(read).read_to_end(&mut word);
    match word.split_first() {
        Some((b'+', _)) => std::process::exit(0),
        Some((_, message)) => {
            let _ = writeln!(io::stderr(), "orlop-monitor: {}", String::from_utf8_lossy(message));
            std::process::exit(1)
        }
        None => {
            let _ = writeln!(io::stderr(), "orlop-monitor: the daemon died while it started");
            std::process::exit(1)
        }
    }
}

/// Standard streams to /dev/null.
pub fn close_stdio() -> io::Result<()> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    Ok(())
}

/// The kernel should end containers before the process that reports their end. Not allowed without CAP_SYS_RESOURCE.
pub fn protect_from_oom() -> bool {
    std::fs::write("/proc/self/oom_score_adj", "-999").is_ok()
}

/// The monitor's own log, `<dir>/monitor.log`: begun anew when it reaches a megabyte, since the monitor logs only what is odd.
#[derive(Debug)]
pub struct OwnLog {
    file: File,
    written: u64,
}

const OWN_LOG_LIMIT: u64 = 1 << 20;

impl OwnLog {
    pub fn open(dir: &Path) -> io::Result<OwnLog> {
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(dir.join("monitor.log"))?;
        let written = file.metadata()?.len();
        Ok(OwnLog { file, written })
    }

    pub fn line(&mut self, text: &str) {
        if self.written > OWN_LOG_LIMIT && self.file.set_len(0).is_ok() {
            self.written = 0;
        }
        let line = format!("{} {}\n", crate::log::now(), text);
        // Nobody is left to tell when this fails.
        if self.file.write_all(line.as_bytes()).is_ok() {
            self.written += line.len() as u64;
        }
    }
}
