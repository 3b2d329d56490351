//! Exec, Attach and PortForward: one-time URLs on a loopback HTTP server, upgraded to SPDY/3.1 or WebSocket.

pub(crate) mod netns;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use orlop_proto::cri;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::error::{Error, Result};
use crate::runtime::Runtime;
use crate::store::ContainerPhase;

#[cfg(test)]
mod fuzz;
mod http;
mod portforward;
mod remote;
mod spdy;
mod websocket;

/// How long a URL may wait for its connection.
const TOKEN_LIFE: Duration = Duration::from_secs(60);
/// Connections that have not named a session yet. Whoever reaches the address may open them, a container in the host's network too.
const MAX_STRANGERS: usize = 256;
/// URLs handed out and not used yet. The kubelet connects at once, so that many means a client that only asks.
const MAX_TOKENS: usize = 1000;

/// What a URL stands for.
#[derive(Clone, Debug)]
pub(crate) enum Session {
    Exec(cri::ExecRequest),
    Attach(cri::AttachRequest),
    PortForward(cri::PortForwardRequest),
}

impl Session {
    fn path(&self) -> &'static str {
        match self {
            Session::Exec(_) => "exec",
            Session::Attach(_) => "attach",
            Session::PortForward(_) => "portforward",
        }
    }
}

/// One-time tokens.
pub(crate) struct Sessions {
    address: SocketAddr,
    waiting: Mutex<HashMap<String, (Instant, Session)>>,
}

impl Sessions {
    pub fn new(address: SocketAddr) -> Sessions {
        Sessions { address, waiting: Mutex::default() }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    fn offer(&self, session: Session) -> Result<String> {
        let path = session.path();
        let token = crate::runtime::new_id();
        let mut waiting = self.waiting.lock();
        waiting.retain(|_, (since, _)| since.elapsed() < TOKEN_LIFE);
        if waiting.len() >= MAX_TOKENS {
            return Err(Error::TooMany(
                "too many streaming requests wait for their connection; try again later".into(),
            ));
        }
        waiting.insert(token.clone(), (Instant::now(), session));
        Ok(format!("http://{}/{path}/{token}", self.address))
    }

    /// Each token works once.
    fn redeem(&self, token: &str) -> Option<Session> {
        let (since, session) = self.waiting.lock().remove(token)?;
        (since.elapsed() < TOKEN_LIFE).then_some(session)
    }
}

/// Connections that have not named a session yet. A new one always has its place: the oldest goes, since who has a URL names it at once.
#[derive(Default)]
struct Strangers(Mutex<Queue>);

#[derive(Default)]
struct Queue {
    next: u64,
    waiting: BTreeMap<u64, CancellationToken>,
}

impl Strangers {
    fn admit(self: &Arc<Self>) -> Stranger {
        let mut queue = self.0.lock();
        let (number, sent_away) = (queue.next, CancellationToken::new());
        queue.next += 1;
        queue.waiting.insert(number, sent_away.clone());
        if queue.waiting.len() > MAX_STRANGERS
            && let Some((_, oldest)) = queue.waiting.pop_first()
        {
            oldest.cancel();
        }
        Stranger { all: self.clone(), number, sent_away }
    }
}

/// One of them; nobody sends it away any more once this is dropped.
struct Stranger {
    all: Arc<Strangers>,
    number: u64,
    sent_away: CancellationToken,
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.all.0.lock().waiting.remove(&self.number);
    }
}

fn check_streams(tty: bool, stdin: bool, stdout: bool, stderr: bool) -> Result<()> {
    if tty && stderr {
        return Err(Error::Invalid(
            "a terminal has no separate stderr: tty and stderr exclude each other".into(),
        ));
    }
    if !(stdin || stdout || stderr) {
        return Err(Error::Invalid("at least one of stdin, stdout and stderr is needed".into()));
    }
    Ok(())
}

impl Runtime {
    pub fn exec_url(&self, mut request: cri::ExecRequest) -> Result<cri::ExecResponse> {
        check_streams(request.tty, request.stdin, request.stdout, request.stderr)?;
        let container = self.store.container(&request.container_id)?;
        // What is wrong shows here rather than on the stream.
        self.exec_process(&container, &request.cmd, request.tty)?;
        request.container_id.clone_from(&container.id);
        Ok(cri::ExecResponse { url: self.sessions.offer(Session::Exec(request))? })
    }

    pub fn attach_url(&self, mut request: cri::AttachRequest) -> Result<cri::AttachResponse> {
        check_streams(request.tty, request.stdin, request.stdout, request.stderr)?;
        let container = self.store.container(&request.container_id)?;
        let record = container.in_phase(&[ContainerPhase::Running], "attach to it")?;
        // Whether there is a terminal is the container's business, not the client's.
        request.tty = record.config.tty;
        request.stderr &= !request.tty;
        request.stdin &= record.config.stdin;
        request.container_id.clone_from(&container.id);
        Ok(cri::AttachResponse { url: self.sessions.offer(Session::Attach(request))? })
    }

    pub fn port_forward_url(&self, mut request: cri::PortForwardRequest) -> Result<cri::PortForwardResponse> {
        let sandbox = self.store.sandbox(&request.pod_sandbox_id)?;
        sandbox.ready("forward ports to it")?;
        request.pod_sandbox_id.clone_from(&sandbox.id);
        Ok(cri::PortForwardResponse { url: self.sessions.offer(Session::PortForward(request))? })
    }
}

/// Accepts streaming connections until the server stops.
pub(crate) async fn serve(runtime: Arc<Runtime>, listener: TcpListener) -> Result<()> {
    let stop = runtime.tasks.stop_token();
    let strangers = Arc::new(Strangers::default());
    loop {
        tokio::select! {
            // Dropping accept loses no connection: it stays in the backlog.
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    // Interactive: a keystroke must not wait for the next.
                    let _ = stream.set_nodelay(true);
                    runtime.tasks.spawn(http::serve(runtime.clone(), stream, strangers.admit()));
                }
                Err(e) => {
                    tracing::warn!(error = %e, "could not accept a streaming connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            () = stop.cancelled() => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_works_once_and_on_its_own_path() {
        let sessions = Sessions::new(([127, 0, 0, 1], 4000).into());
        let url = sessions.offer(Session::PortForward(Default::default())).unwrap();
        let token = url.strip_prefix("http://127.0.0.1:4000/portforward/").unwrap();
        assert!(sessions.redeem(token).is_some());
        assert!(sessions.redeem(token).is_none());
        assert!(sessions.redeem("").is_none());
    }

    #[test]
    fn a_token_expires() {
        let sessions = Sessions::new(([127, 0, 0, 1], 4000).into());
        let session = || Session::Attach(Default::default());
        let old = Instant::now().checked_sub(TOKEN_LIFE).unwrap();
        sessions.waiting.lock().insert("old".into(), (old, session()));
        assert!(sessions.redeem("old").is_none());
        // Those that nobody fetches take no place.
        for i in 0..MAX_TOKENS {
            sessions.waiting.lock().insert(i.to_string(), (old, session()));
        }
        sessions.offer(session()).unwrap();
        assert_eq!(sessions.waiting.lock().len(), 1);
    }

    #[test]
    fn tokens_are_bounded() {
        let sessions = Sessions::new(([127, 0, 0, 1], 4000).into());
        for _ in 0..MAX_TOKENS {
            sessions.offer(Session::Attach(Default::default())).unwrap();
        }
        assert!(matches!(sessions.offer(Session::Attach(Default::default())), Err(Error::TooMany(_))));
    }

    #[test]
    fn silent_connections_make_room_for_new_ones() {
        let all = Arc::new(Strangers::default());
        let (oldest, named) = (all.admit(), all.admit());
        let token = named.sent_away.clone();
        drop(named);
        let rest: Vec<Stranger> = (1..MAX_STRANGERS).map(|_| all.admit()).collect();
        assert!(!oldest.sent_away.is_cancelled(), "all have a place");
        let newest = all.admit();
        assert!(oldest.sent_away.is_cancelled());
        let more: Vec<Stranger> = (1..MAX_STRANGERS).map(|_| all.admit()).collect();
        assert!(rest.iter().all(|s| s.sent_away.is_cancelled()));
        assert!(!token.is_cancelled() && !newest.sent_away.is_cancelled(), "who has named a session stays");
        drop((oldest, rest, newest, more));
        assert!(all.0.lock().waiting.is_empty());
    }

    #[test]
    fn combinations_of_streams() {
        assert!(check_streams(true, true, true, false).is_ok());
        assert!(check_streams(true, true, true, true).is_err());
        assert!(check_streams(false, false, false, false).is_err());
    }
}
