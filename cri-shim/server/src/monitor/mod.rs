//! The client of `orlop-monitor`: starts one, and speaks the protocol of `monitor.proto` with it.
//!
//! Every request has a connection of its own: a unix connect costs some ten microseconds, and neither a slow
//! answer nor a dropped future can then disturb another request.

mod frame;
mod pidfd;
mod process;
mod seal;
mod start;

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::Duration;

use orlop_proto::monitor::{self as proto, server_frame};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

pub(crate) use proto::FailureKind as Kind;
pub(crate) use proto::client_frame::Body as Request;
pub(crate) use proto::server_frame::Body as Reply;

/// The highest protocol version spoken here; all from 1 on are.
const VERSION: u32 = 2;
/// Frames of output that may come before the answer to the request for it.
const MAX_EARLY: usize = 64;
/// How long anything but an exec may take. Container creation on a machine under load is the slowest.
const CALL_LIMIT: Duration = Duration::from_secs(120);
/// How long a monitor may take to accept a connection and say Hello. It does nothing that takes that long.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// How long sending a signal may take: the monitor only sends it.
const SIGNAL_LIMIT: Duration = Duration::from_secs(15);

/// Why a monitor did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot start {program}; is it installed?", program = program.display())]
    Spawn { program: PathBuf, source: std::io::Error },
    #[error("{program} --dir {dir} failed: {message}", program = program.display(), dir = dir.display())]
    Start { program: PathBuf, dir: PathBuf, message: String },
    #[error("cannot reach the pod's monitor at {socket}", socket = socket.display())]
    Connect { socket: PathBuf, source: std::io::Error },
    #[error("the connection to the pod's monitor broke")]
    Broken(#[source] std::io::Error),
    #[error(
        "the pod's monitor does not speak the protocol of this server, versions 1 to {VERSION} ({0}); the pod goes on: use the server that started it"
    )]
    Foreign(String),
    #[error("the pod's monitor is older than {0}: it speaks protocol version {1}; make the pod anew")]
    TooOld(&'static str, u32),
    #[error("the pod's monitor answered {got} to {to}")]
    Unexpected { to: &'static str, got: String },
    #[error("the pod's monitor did not answer {0} in time")]
    Timeout(&'static str),
    #[error("cannot tell by {at} how the pod's monitor's process is", at = at.display())]
    Look { at: PathBuf, source: std::io::Error },
    #[error("could not clean up after the pod's monitor in {dir}: {message}", dir = dir.display())]
    CleanUp { dir: PathBuf, message: String },
    #[error("{message}{}", stage_suffix(.stage, .errno))]
    Refused { kind: Kind, message: String, stage: String, errno: i32 },
}

fn stage_suffix(stage: &str, errno: &i32) -> String {
    match (stage.is_empty(), *errno) {
        (true, 0) => String::new(),
        (true, n) => format!(" ({})", std::io::Error::from_raw_os_error(n)),
        (false, 0) => format!(" (at stage {stage})"),
        (false, n) => format!(" (at stage {stage}: {})", std::io::Error::from_raw_os_error(n)),
    }
}

impl Error {
    /// Nobody answered: whether the monitor is dead or only slow is told by its [`process`](Monitor::process). What does not speak our
    /// language lives all the same, and a server that could not ask has heard nothing.
    pub(crate) fn is_silence(&self) -> bool {
        matches!(self, Error::Connect { .. } | Error::Broken(_) | Error::Timeout(_)) && !self.is_shortage()
    }

    /// This server, or the whole machine, has no descriptor or no memory left: it says nothing about the monitor, and passes.
    pub(crate) fn is_shortage(&self) -> bool {
        let source = match self {
            Error::Spawn { source, .. } | Error::Connect { source, .. } | Error::Look { source, .. } => {
                source
            }
            Error::Broken(source) => source,
            _ => return false,
        };
        let code = source.raw_os_error();
        [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::ENOBUFS].iter().any(|c| code == Some(*c))
    }

    /// The monitor's own verdict; `None` when it could not be asked.
    pub(crate) fn kind(&self) -> Option<Kind> {
        match self {
            Error::Refused { kind, .. } => Some(*kind),
            _ => None,
        }
    }
}

type Result<T> = std::result::Result<T, Error>;

/// A monitor, named by its folder. Holds no connection.
#[derive(Clone, Debug)]
pub(crate) struct Monitor {
    dir: PathBuf,
}

/// A connection after Hello.
pub(crate) struct Connection {
    /// What both sides speak.
    version: u32,
    pub reader: FrameReader,
    pub writer: FrameWriter,
}

pub(crate) use frame::{FrameReader, FrameWriter};
pub(crate) use start::Starter;

impl Monitor {
    /// The monitor that works, or worked, in `dir`.
    pub fn at(dir: PathBuf) -> Monitor {
        Monitor { dir }
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("monitor.sock")
    }

    /// Connects and says Hello.
    pub async fn connect(&self) -> Result<Connection> {
        self.connect_with(None).await
    }

    /// Connects, says Hello and, without waiting for its answer, `request`.
    async fn connect_with(&self, request: Option<Request>) -> Result<Connection> {
        timeout(HELLO_LIMIT, self.say_hello(request)).await.map_err(|_| Error::Timeout("Hello"))?
    }

    async fn say_hello(&self, request: Option<Request>) -> Result<Connection> {
        let socket = self.socket();
        let connect_err = |source| Error::Connect { socket: socket.clone(), source };
        let stream = if socket.as_os_str().len() < 100 {
            UnixStream::connect(&socket).await.map_err(connect_err)?
        } else {
            // sun_path holds 108 bytes; a descriptor of the folder makes a long path short.
            let dir = std::fs::File::open(&self.dir).map_err(connect_err)?;
            let short = format!("/proc/self/fd/{}/monitor.sock", dir.as_raw_fd());
            UnixStream::connect(short).await.map_err(connect_err)?
        };
        let (r, w): (OwnedReadHalf, OwnedWriteHalf) = stream.into_split();
        let (mut reader, mut writer) = (FrameReader::new(r), FrameWriter::new(w));
        // A monitor that refuses Hello does nothing of what follows.
        let hello = [(0, Request::Hello(proto::Hello { version: VERSION }))];
        writer.send(hello.into_iter().chain(request.map(|r| (1, r)))).await?;
        match reader.next().await?.map(|f| f.body) {
            Some(Some(Reply::Hello(h))) if (1..=VERSION).contains(&h.version) => {
                Ok(Connection { version: h.version, reader, writer })
            }
            Some(Some(Reply::Hello(h))) => Err(Error::Foreign(format!("it speaks version {}", h.version))),
            Some(Some(Reply::Failure(f))) => Err(Error::Foreign(f.message)),
            other => Err(Error::Unexpected { to: "Hello", got: format!("{other:?}") }),
        }
    }

    async fn call_within(&self, what: &'static str, request: Request, limit: Duration) -> Result<Reply> {
        let work = async {
            let needs_version_2 = matches!(&request, Request::CreateContainer(r) if r.runtime.is_some());
            let mut c = if needs_version_2 {
                // An older one would leave the runtime out of account.
                let mut c = self.connect().await?;
                if c.version < 2 {
                    return Err(Error::TooOld("runtime handlers", c.version));
                }
                c.writer.send([(1, request)]).await?;
                c
            } else {
                self.connect_with(Some(request)).await?
            };
            loop {
                let Some(frame) = c.reader.next().await? else {
                    return Err(Error::Broken(std::io::ErrorKind::UnexpectedEof.into()));
                };
                match frame {
                    proto::ServerFrame { id: 1, body: Some(Reply::Failure(f)) } => return Err(refused(f)),
                    proto::ServerFrame { id: 1, body: Some(body) } => return Ok(body),
                    _ => continue,
                }
            }
        };
        timeout(limit, work).await.map_err(|_| Error::Timeout(what))?
    }

    async fn done(&self, what: &'static str, request: Request) -> Result<()> {
        self.done_within(what, request, CALL_LIMIT).await
    }

    async fn done_within(&self, what: &'static str, request: Request, limit: Duration) -> Result<()> {
        match self.call_within(what, request, limit).await? {
            Reply::Done(_) => Ok(()),
            other => Err(unexpected(what, &other)),
        }
    }

    pub async fn create_sandbox(&self, request: proto::CreateSandbox) -> Result<proto::SandboxCreated> {
        match self.call_within("CreateSandbox", Request::CreateSandbox(request), CALL_LIMIT).await? {
            Reply::SandboxCreated(s) => Ok(s),
            other => Err(unexpected("CreateSandbox", &other)),
        }
    }

    pub async fn destroy_sandbox(&self) -> Result<()> {
        self.done("DestroySandbox", Request::DestroySandbox(proto::DestroySandbox {})).await
    }

    /// Ends the monitor. A connection that breaks instead of an answer is as good.
    pub async fn shutdown(&self) -> Result<()> {
        match self.done("Shutdown", Request::Shutdown(proto::Shutdown {})).await {
            Err(e @ (Error::Broken(_) | Error::Connect { .. })) if !e.is_shortage() => Ok(()),
            other => other,
        }
    }

    /// Returns the container's process id.
    pub async fn create_container(&self, request: proto::CreateContainer) -> Result<u32> {
        match self.call_within("CreateContainer", Request::CreateContainer(request), CALL_LIMIT).await? {
            Reply::ContainerCreated(c) => Ok(c.pid),
            other => Err(unexpected("CreateContainer", &other)),
        }
    }

    pub async fn start_container(&self, id: &str) -> Result<()> {
        let container_id = id.to_owned();
        self.done("StartContainer", Request::StartContainer(proto::StartContainer { container_id })).await
    }

    pub async fn signal(&self, id: &str, signal: i32, all: bool) -> Result<()> {
        let request =
            proto::SignalContainer { container_id: id.to_owned(), signal: signal.unsigned_abs(), all };
        self.done_within("SignalContainer", Request::SignalContainer(request), SIGNAL_LIMIT).await
    }

    pub async fn delete_container(&self, id: &str) -> Result<()> {
        let request = proto::DeleteContainer { container_id: id.to_owned(), force: true };
        self.done("DeleteContainer", Request::DeleteContainer(request)).await
    }

    pub async fn update_container(&self, id: &str, linux_resources: Vec<u8>) -> Result<()> {
        let request = proto::UpdateContainer { container_id: id.to_owned(), linux_resources };
        self.done("UpdateContainer", Request::UpdateContainer(request)).await
    }

    pub async fn reopen_log(&self, id: &str) -> Result<()> {
        self.done("ReopenLog", Request::ReopenLog(proto::ReopenLog { container_id: id.to_owned() })).await
    }

    pub async fn state(&self) -> Result<proto::State> {
        match self.call_within("GetState", Request::GetState(proto::GetState {}), CALL_LIMIT).await? {
            Reply::State(s) => Ok(s),
            other => Err(unexpected("GetState", &other)),
        }
    }

    /// A synchronous exec. `limit` of `None` waits for ever.
    pub async fn exec(&self, request: proto::Exec, limit: Option<Duration>) -> Result<proto::ExecDone> {
        // The monitor enforces the limit; this one only guards against a monitor that does not answer.
        let guard = limit.map_or(Duration::from_secs(365 * 86400), |l| l + Duration::from_secs(15));
        match self.call_within("Exec", Request::Exec(request), guard).await? {
            Reply::ExecDone(d) => Ok(d),
            other => Err(unexpected("Exec", &other)),
        }
    }

    /// Attach, streaming Exec, or Subscribe: returns the connection once the monitor has accepted.
    pub async fn stream(&self, what: &'static str, request: Request) -> Result<Connection> {
        let work = async {
            let mut c = self.connect_with(Some(request)).await?;
            let mut early = Vec::new();
            loop {
                let frame = c.reader.next().await?;
                match frame.as_ref().and_then(|f| f.body.as_ref()) {
                    Some(Reply::StreamStarted(_) | Reply::Done(_)) => break,
                    // Monitors of the first release may tell a terminal's output before that.
                    Some(Reply::Stdout(_) | Reply::Stderr(_)) if early.len() < MAX_EARLY => {
                        early.extend(frame);
                    }
                    Some(Reply::Failure(f)) => return Err(refused(f.clone())),
                    Some(other) => return Err(unexpected(what, other)),
                    None => return Err(Error::Unexpected { to: what, got: "nothing".to_owned() }),
                }
            }
            c.reader.put_back(early);
            Ok(c)
        };
        timeout(CALL_LIMIT, work).await.map_err(|_| Error::Timeout(what))?
    }

    pub async fn subscribe(&self) -> Result<Connection> {
        self.stream("Subscribe", Request::Subscribe(proto::Subscribe {})).await
    }
}

fn refused(f: proto::Failure) -> Error {
    Error::Refused { kind: f.kind(), message: f.message, stage: f.stage, errno: f.errno }
}

fn unexpected(to: &'static str, got: &server_frame::Body) -> Error {
    // Output may be megabytes; the kind is what matters.
    let got = format!("{got:?}");
    Error::Unexpected { to, got: got.chars().take(80).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_without_descriptors_has_heard_no_silence() {
        let connect =
            |code| Error::Connect { socket: PathBuf::new(), source: std::io::Error::from_raw_os_error(code) };
        let broken = |code| Error::Broken(std::io::Error::from_raw_os_error(code));
        for code in [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::ENOBUFS] {
            for e in [connect(code), broken(code)] {
                assert!(e.is_shortage() && !e.is_silence(), "{e:?}");
            }
        }
        for e in [connect(libc::ECONNREFUSED), broken(libc::ECONNRESET), Error::Timeout("Hello")] {
            assert!(e.is_silence() && !e.is_shortage(), "{e:?}");
        }
    }
}
