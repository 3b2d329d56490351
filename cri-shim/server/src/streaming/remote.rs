//! A command's streams, whatever the transport: between the client's channels and the pod's monitor.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use orlop_proto::monitor as proto;
use serde_json::json;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::Session;
use crate::error::{Error, Result};
use crate::monitor::{Reply, Request};
use crate::runtime::Runtime;

/// Frames in flight each way: enough to keep both sides busy, little enough that a stalled client costs nothing.
pub(super) const QUEUE: usize = 16;

/// Versions of the remote command protocol, as far as they differ for the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    /// v1 to v3: the error channel carries text, and only on failure.
    Text,
    /// v4: a `metav1.Status` on the error channel.
    Status,
    /// v5: and a close signal for a channel.
    StatusAndClose,
}

impl Version {
    pub fn of(name: &str) -> Version {
        match name {
            "v4.channel.k8s.io" => Version::Status,
            "v5.channel.k8s.io" => Version::StatusAndClose,
            _ => Version::Text,
        }
    }
}

/// From the client.
#[derive(Debug)]
pub(super) enum In {
    Stdin(Bytes),
    StdinClosed,
    Resize { width: u16, height: u16 },
}

/// To the client.
#[derive(Debug)]
pub(super) enum Out {
    Stdout(Bytes),
    Stderr(Bytes),
    /// For the error channel; the last there is.
    End(Option<Bytes>),
}

/// A terminal's size as clients send it.
#[derive(serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Size {
    width: u16,
    height: u16,
}

/// Takes whole sizes off the front of `buffer`; several may come at once, one in parts.
pub(super) fn sizes(buffer: &mut Vec<u8>) -> Vec<In> {
    let mut out = Vec::new();
    let mut stream = serde_json::Deserializer::from_slice(buffer).into_iter::<Size>();
    let mut taken = 0;
    let mut broken = false;
    loop {
        match stream.next() {
            Some(Ok(s)) => {
                out.push(In::Resize { width: s.width, height: s.height });
                taken = stream.byte_offset();
            }
            Some(Err(e)) => {
                broken = !e.is_eof();
                break;
            }
            None => break,
        }
    }
    if broken || buffer.len() > 4096 {
        // What is no size never becomes one.
        buffer.clear();
    } else {
        buffer.drain(..taken);
    }
    out
}

/// Which channels the client has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wants {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

impl Session {
    pub(super) fn wants(&self) -> Wants {
        match self {
            Session::Exec(r) => Wants { stdin: r.stdin, stdout: r.stdout, stderr: r.stderr, tty: r.tty },
            Session::Attach(r) => Wants { stdin: r.stdin, stdout: r.stdout, stderr: r.stderr, tty: r.tty },
            Session::PortForward(_) => Wants { stdin: false, stdout: false, stderr: false, tty: false },
        }
    }
}

/// What goes on the error channel at the end.
fn verdict(version: Version, end: &Result<i32>) -> Option<Bytes> {
    let text = match (version, end) {
        (Version::Text, Ok(0)) => return None,
        (Version::Text, Ok(code)) => format!("command terminated with exit code {code}"),
        (Version::Text, Err(e)) => orlop_base::telemetry::chain(e),
        (_, Ok(0)) => json!({"metadata": {}, "status": "Success"}).to_string(),
        (_, Ok(code)) => json!({
            "metadata": {},
            "status": "Failure",
            "message": format!("command terminated with non-zero exit code: exit status {code}"),
            "reason": "NonZeroExitCode",
            "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
        })
        .to_string(),
        (_, Err(e)) => json!({
            "metadata": {},
            "status": "Failure",
            "message": format!("error executing command in container: {}", orlop_base::telemetry::chain(e)),
            "reason": "InternalError",
            "details": {"causes": [{"message": orlop_base::telemetry::chain(e)}]},
            "code": 500,
        })
        .to_string(),
    };
    Some(text.into())
}

/// When something last moved, for the idle timeout.
pub(super) struct Activity {
    start: Instant,
    last_ms: AtomicU64,
}

impl Activity {
    pub fn new() -> Activity {
        Activity { start: Instant::now(), last_ms: AtomicU64::new(0) }
    }

    pub fn note(&self) {
        self.last_ms
            .store(u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Returns once nothing has moved for `limit`.
    pub async fn idle(&self, limit: Duration) {
        loop {
            let quiet = self
                .start
                .elapsed()
                .saturating_sub(Duration::from_millis(self.last_ms.load(Ordering::Relaxed)));
            match limit.checked_sub(quiet) {
                Some(left) if !left.is_zero() => tokio::time::sleep(left).await,
                _ => return,
            }
        }
    }
}

/// Runs a session beside what writes its output. A client that is connected and reads nothing keeps neither: what is left to write
/// when the session has ended may take `limit`.
pub(super) async fn beside(
    session: impl Future<Output = ()>,
    writing: impl Future<Output = ()>,
    limit: Duration,
) {
    let ended = CancellationToken::new();
    let guard = ended.clone().drop_guard();
    let session = async {
        session.await;
        drop(guard);
    };
    let writing = async {
        tokio::select! {
            () = writing => {}
            () = async { ended.cancelled().await; tokio::time::sleep(limit).await } => {
                tracing::info!("gave up a client that does not read");
            }
        }
    };
    tokio::join!(session, writing);
}

/// Runs the session until the command ends, the client goes (its `input` closes), or nothing moves for too long. Only a client that
/// went is not told. Dropping the monitor's connection ends an exec's process.
pub(super) async fn run(
    runtime: &Arc<Runtime>,
    session: Session,
    version: Version,
    input: mpsc::Receiver<In>,
    out: mpsc::Sender<Out>,
) {
    let end = drive(runtime, session, input, &out).await;
    if let Some(end) = end {
        // A client that is gone needs no verdict, and one that does not read gets none.
        let told = out.send(Out::End(verdict(version, &end)));
        let _ = tokio::time::timeout(runtime.config.streaming_idle_timeout, told).await;
    }
}

/// `None` when the client went.
async fn drive(
    runtime: &Arc<Runtime>,
    session: Session,
    mut input: mpsc::Receiver<In>,
    out: &mpsc::Sender<Out>,
) -> Option<Result<i32>> {
    let connection = match open(runtime, &session).await {
        Ok(c) => c,
        Err(e) => return Some(Err(e)),
    };
    let (mut reader, mut writer) = (connection.reader, connection.writer);
    let attach = matches!(session, Session::Attach(_));
    let wants = session.wants();
    let activity = Activity::new();
    let from_client = async {
        let mut deaf = false;
        while let Some(item) = input.recv().await {
            activity.note();
            if deaf {
                continue;
            }
            let sent = match item {
                In::Stdin(data) if wants.stdin => writer.stdin(data).await,
                In::StdinClosed if wants.stdin => {
                    writer.send([(0, Request::CloseStdin(proto::CloseStdin {}))]).await
                }
                In::Resize { width, height } => {
                    let size = proto::Resize { width: width.into(), height: height.into() };
                    writer.send([(0, Request::Resize(size))]).await
                }
                In::Stdin(_) | In::StdinClosed => Ok(()),
            };
            // The command has ended; its last output and its exit code are still to come.
            deaf = sent.is_err();
        }
    };
    let from_monitor = async {
        loop {
            let frame = match reader.next().await {
                Ok(Some(f)) => f,
                Ok(None) => return Some(Err(Error::Internal("the pod's monitor ended the stream".into()))),
                Err(e) => return Some(Err(e.into())),
            };
            activity.note();
            let item = match frame.body {
                Some(Reply::Stdout(data)) if wants.stdout => Out::Stdout(data.into()),
                Some(Reply::Stderr(data)) if wants.stderr => Out::Stderr(data.into()),
                // The container's own exit code is not attach's.
                Some(Reply::StreamEnded(e)) => return Some(Ok(if attach { 0 } else { e.exit_code })),
                Some(Reply::Failure(f)) => return Some(Err(Error::Internal(f.message))),
                _ => continue,
            };
            out.send(item).await.ok()?;
        }
    };
    tokio::select! {
        // Whichever is dropped held nothing that anybody still wants.
        end = from_monitor => end,
        () = from_client => None,
        () = activity.idle(runtime.config.streaming_idle_timeout) => {
            tracing::info!("ended a stream that was idle");
            Some(Err(Error::StreamIdle { seconds: runtime.config.streaming_idle_timeout.as_secs() }))
        }
    }
}

async fn open(runtime: &Runtime, session: &Session) -> Result<crate::monitor::Connection> {
    let id = match session {
        Session::Exec(r) => &r.container_id,
        Session::Attach(r) => &r.container_id,
        Session::PortForward(_) => return Err(Error::Internal("a port-forward has no command".into())),
    };
    let container = runtime.store.container(id)?;
    let sandbox = runtime.store.sandbox(&container.sandbox_id)?;
    let wants = session.wants();
    let connection = match session {
        Session::Exec(r) => {
            let exec = proto::Exec {
                container_id: container.id.clone(),
                process: runtime.exec_process(&container, &r.cmd, r.tty)?,
                tty: r.tty,
                stream: true,
                stdin: wants.stdin,
                stdout: wants.stdout,
                stderr: wants.stderr,
                timeout_ms: 0,
                output_limit: 0,
            };
            sandbox.monitor.stream("Exec", Request::Exec(exec)).await?
        }
        _ => {
            let attach = proto::Attach {
                container_id: container.id.clone(),
                stdin: wants.stdin,
                stdout: wants.stdout,
                stderr: wants.stderr,
            };
            sandbox.monitor.stream("Attach", Request::Attach(attach)).await?
        }
    };
    Ok(connection)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts() {
        let text = |v, end: Result<i32>| verdict(v, &end).map(|b| String::from_utf8(b.to_vec()).unwrap());
        assert_eq!(text(Version::Text, Ok(0)), None);
        assert_eq!(text(Version::Text, Ok(3)).unwrap(), "command terminated with exit code 3");
        let v: serde_json::Value = serde_json::from_str(&text(Version::Status, Ok(3)).unwrap()).unwrap();
        assert_eq!(v["status"], "Failure");
        assert_eq!(v["reason"], "NonZeroExitCode");
        assert_eq!(v["details"]["causes"][0]["message"], "3");
        let v: serde_json::Value =
            serde_json::from_str(&text(Version::StatusAndClose, Ok(0)).unwrap()).unwrap();
        assert_eq!(v["status"], "Success");
        assert!(text(Version::Status, Err(Error::Internal("x".into()))).unwrap().contains("InternalError"));
    }

    #[test]
    fn sizes_come_whole_in_parts_and_broken() {
        let mut buffer = br#"{"Width":80,"Height":24}{"Width":1,"Hei"#.to_vec();
        let got = sizes(&mut buffer);
        assert!(matches!(got[..], [In::Resize { width: 80, height: 24 }]));
        buffer.extend_from_slice(br#"ght":2}"#);
        assert!(matches!(sizes(&mut buffer)[..], [In::Resize { width: 1, height: 2 }]));
        assert!(buffer.is_empty());
        buffer.extend_from_slice(b"nonsense");
        assert!(sizes(&mut buffer).is_empty() && buffer.is_empty());
    }
}
