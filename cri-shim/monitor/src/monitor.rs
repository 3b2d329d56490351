//! The event loop and the state it owns. Everything happens on one thread; operations that may take long run in helpers.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use orlop_oci::{Helper, cgroup};
use orlop_proto::monitor::{Failure, FailureKind, server_frame::Body};

use crate::conn::{self, Conn, Health, Role};
use crate::container::Container;
use crate::daemon::OwnLog;
use crate::exec::Exec;
use crate::journal::{self, Phase, SandboxRecord};
use crate::log::{self, Stream};
use crate::oom;
use crate::poll::{EventFlags, Poll, Token};

/// Clients at once; a server has one for events, one per attach or exec, and one for each other request while it lasts.
const MAX_CONNS: usize = 640;
/// Attaches and execs, which may last for days, leave the rest of the places: a server that is not answered takes its monitor for hung.
const MAX_LASTING: usize = 512;
/// Descriptors that they leave.
const SPARE_FILES: usize = 64;
/// What an exec holds beside its connection: three streams, the report of its start, and its helper's socket.
const FILES_OF_EXEC: usize = 5;
/// What a container holds: its streams, its log, the channel for its start, and its notice of out-of-memory.
const FILES_OF_CONTAINER: usize = 8;
/// After Shutdown its answer may take so long to be read.
pub const FAREWELL: Duration = Duration::from_secs(5);
/// Quiet for so long, the monitor gives memory back.
const REST: Duration = Duration::from_secs(2);
/// An operation that takes longer is killed: its file system or hook hangs.
pub const OP_LIMIT: Duration = Duration::from_secs(110);

/// What a token stands for.
#[derive(Clone, Debug)]
pub enum Source {
    Listener,
    Signals,
    Conn,
    Op,
    ContainerOut(String, Stream),
    ContainerIn(String),
    ExecOut(u64, Stream),
    ExecIn(u64),
    ExecReport(u64),
    Oom(String),
}

/// An operation under way in a helper.
#[derive(Debug)]
pub struct Op {
    pub helper: Helper,
    pub kind: OpKind,
    pub conn: Token,
    pub request: u64,
    pub deadline: Instant,
}

#[derive(Clone, Debug)]
pub enum OpKind {
    Create(String),
    Start(String),
    /// Its hooks after the start, before which the request is not answered.
    Poststart(String),
    Delete(String),
    Update(String),
    /// By another OCI runtime, which does it in its own way.
    Signal,
    Exec(u64),
}

/// The monitor's whole state.
#[derive(Debug)]
pub struct Monitor {
    pub dir: PathBuf,
    pub poll: Poll,
    pub listener: UnixListener,
    pub signals: OwnedFd,
    pub sources: HashMap<Token, Source>,
    pub conns: BTreeMap<Token, Conn>,
    pub containers: BTreeMap<String, Container>,
    pub execs: BTreeMap<u64, Exec>,
    pub ops: BTreeMap<Token, Op>,
    pub sandbox: Option<SandboxRecord>,
    /// Who waits for DestroySandbox; present while it is under way.
    pub destroying: Option<Vec<(Token, u64)>>,
    /// Children that ended before the helper that made them had told their number.
    pub unclaimed: HashMap<i32, (i32, i64)>,
    pub own_log: OwnLog,
    /// Who has asked for the end, and when it comes even if that client reads no answer.
    pub stop: Option<(Token, Instant)>,
    pub next_exec: u64,
    pub buf: Box<[u8]>,
}

/// A refusal.
pub fn failure(kind: FailureKind, stage: &str, message: impl Into<String>) -> Failure {
    Failure { kind: kind as i32, message: message.into(), stage: stage.to_owned(), errno: 0 }
}

pub fn oci_failure(e: &orlop_oci::Error) -> Failure {
    let kind = match e.kind {
        orlop_oci::Kind::Invalid => FailureKind::Invalid,
        orlop_oci::Kind::WrongState => FailureKind::WrongState,
        orlop_oci::Kind::Runtime => FailureKind::Runtime,
    };
    Failure { kind: kind as i32, message: e.message.clone(), stage: e.stage.clone(), errno: e.errno }
}

impl Monitor {
    pub fn oci_root(&self) -> PathBuf {
        self.dir.join("oci")
    }

    pub fn external_root(&self) -> PathBuf {
        journal::external_root(&self.dir)
    }

    pub fn note(&mut self, text: &str) {
        self.own_log.line(text);
    }

    /// Serves until Shutdown.
    pub fn run(&mut self) -> io::Result<()> {
        let mut rested = false;
        while !self.is_over() {
            let deadline = self.next_deadline().map(|d| d.saturating_duration_since(Instant::now()));
            let resting = deadline.is_none() && !rested;
            let events = self.poll.wait(if resting { Some(REST) } else { deadline })?;
            if events.is_empty() && resting {
                orlop_base::memory::give_back();
                rested = true;
            }
            for (token, flags) in events {
                rested = false;
                self.dispatch(token, flags);
            }
            self.tick(Instant::now());
        }
        Ok(())
    }

    /// Whether Shutdown has been asked for and answered. What others have not read yet, suspended ones perhaps, is lost.
    fn is_over(&self) -> bool {
        self.stop.is_some_and(|(asker, latest)| {
            self.conns.get(&asker).is_none_or(|c| c.queued() == 0) || latest <= Instant::now()
        })
    }

    /// Whether an attach or exec would take a place that short requests need.
    pub fn has_no_place(&self) -> bool {
        let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let held = self.conns.len()
            + FILES_OF_EXEC * (self.execs.len() + 1)
            + FILES_OF_CONTAINER * self.containers.len()
            + SPARE_FILES;
        // The one that asks is among the connections.
        self.conns.len() > MAX_LASTING || files.is_some_and(|most| held as u64 > most)
    }

    fn dispatch(&mut self, token: Token, flags: EventFlags) {
        let Some(source) = self.sources.get(&token).cloned() else { return };
        match source {
            Source::Listener => self.accept(),
            Source::Signals => {
                let mut info = [0u8; 1024];
                while rustix::io::read(&self.signals, &mut info).is_ok_and(|n| n > 0) {}
                self.reap();
            }
            Source::Conn => {
                if flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
                    // What the client sent before it left is still carried out.
                    self.read_conn(token);
                    self.close_conn(token);
                    return;
                }
                if flags.contains(EventFlags::OUT) {
                    self.flush_conn(token);
                }
                if flags.contains(EventFlags::IN) {
                    self.read_conn(token);
                }
            }
            Source::Op => self.finish_op(token),
            Source::ContainerOut(id, stream) => self.pump_container(&id, stream, 4),
            Source::ContainerIn(id) => {
                if let Some(c) = self.containers.get_mut(&id)
                    && let Some(input) = &mut c.io.stdin
                    && (flags.intersects(EventFlags::ERR | EventFlags::HUP) || !input.flush(&self.poll))
                {
                    c.io.stdin = None;
                }
                self.resume_senders(|r| matches!(r, Role::Attach { container, .. } if *container == id));
            }
            Source::ExecOut(id, stream) => self.pump_exec(id, stream),
            Source::ExecIn(id) => {
                if let Some(e) = self.execs.get_mut(&id)
                    && let Some(input) = &mut e.io.stdin
                    && (flags.intersects(EventFlags::ERR | EventFlags::HUP) || !input.flush(&self.poll))
                {
                    e.io.stdin = None;
                }
                self.resume_senders(|r| *r == Role::Exec(id));
            }
            Source::ExecReport(id) => self.exec_confirmed(id),
            Source::Oom(id) => {
                if let Some(c) = self.containers.get_mut(&id) {
                    c.oom_check_until = Some(Instant::now() + oom::COUNTED_WITHIN);
                }
                self.check_oom(&id);
            }
        }
    }

    fn accept(&mut self) {
        while let Ok((socket, _)) = self.listener.accept() {
            let peer = rustix::net::sockopt::socket_peercred(&socket);
            let ours = rustix::process::geteuid();
            if self.conns.len() >= MAX_CONNS || !peer.is_ok_and(|p| p.uid == ours || p.uid.is_root()) {
                continue;
            }
            let token = self.poll.token();
            match Conn::new(&self.poll, socket, token) {
                Ok(c) => {
                    self.conns.insert(token, c);
                    self.sources.insert(token, Source::Conn);
                }
                Err(e) => self.note(&format!("cannot serve a client: {e}")),
            }
        }
    }

    fn read_conn(&mut self, token: Token) {
        let Some(c) = self.conns.get_mut(&token) else { return };
        if c.is_paused() {
            return;
        }
        let health = c.read(&mut self.buf);
        self.take_frames(token);
        if health == Health::Gone {
            self.close_conn(token);
        }
    }

    /// Carries out the whole frames that a connection holds, unless it is paused.
    pub fn take_frames(&mut self, token: Token) {
        while let Some(c) = self.conns.get_mut(&token)
            && !c.is_paused()
        {
            match c.decoder.next() {
                Ok(Some(frame)) => self.handle(token, frame),
                Ok(None) => return,
                Err(e) => {
                    self.note(&format!("a client is cut off: {e}"));
                    return self.close_conn(token);
                }
            }
        }
    }

    pub fn flush_conn(&mut self, token: Token) {
        let Some(c) = self.conns.get_mut(&token) else { return };
        if c.flush(&self.poll) == Health::Gone {
            return self.close_conn(token);
        }
        let low = c.queued() < conn::OUT_LOW;
        let role = c.role.clone();
        match role {
            Role::Attach { container, .. } if low => self.resume_container(&container),
            Role::Exec(id) if low => {
                if let Some(e) = self.execs.get_mut(&id) {
                    e.io.pause(&self.poll, false);
                }
            }
            Role::Requests if low => self.take_frames(token),
            _ => {}
        }
    }

    /// Answers a request, if its client is still there.
    pub fn answer(&mut self, token: Token, id: u64, body: Body) {
        if let Some(c) = self.conns.get_mut(&token)
            && c.send(&self.poll, id, body) == Health::Gone
        {
            self.close_conn(token);
        }
    }

    pub fn refuse(&mut self, token: Token, id: u64, f: Failure) {
        self.answer(token, id, Body::Failure(f));
    }

    /// Tells every subscriber; one that does not keep up is cut off.
    pub fn broadcast(&mut self, body: &Body) {
        let tokens: Vec<Token> =
            self.conns.iter().filter(|(_, c)| c.role == Role::Events).map(|(t, _)| *t).collect();
        for t in tokens {
            let Some(c) = self.conns.get_mut(&t) else { continue };
            if c.send(&self.poll, 0, body.clone()) == Health::Gone || c.queued() > conn::OUT_LIMIT {
                self.close_conn(t);
            }
        }
    }

    pub fn close_conn(&mut self, token: Token) {
        let Some(c) = self.conns.remove(&token) else { return };
        c.unregister(&self.poll);
        self.sources.remove(&token);
        if let Role::Attach { container, stdin, .. } = &c.role
            && let Some(k) = self.containers.get_mut(container)
        {
            k.attached.retain(|t| *t != token);
            if *stdin
                && k.stdin_once
                && let Some(input) = &mut k.io.stdin
                && !input.close(&self.poll)
            {
                k.io.stdin = None;
            }
            let id = container.clone();
            self.resume_container(&id);
        }
        // Nobody will hear of these: end them rather than leak them.
        let orphans: Vec<u64> =
            self.execs.iter().filter(|(_, e)| e.conn == Some(token)).map(|(i, _)| *i).collect();
        for id in orphans {
            self.abandon_exec(id);
        }
    }

    /// Stdin has room again: reads the connections that feed it.
    fn resume_senders(&mut self, feeds: impl Fn(&Role) -> bool) {
        let tokens: Vec<Token> = self.conns.iter().filter(|(_, c)| feeds(&c.role)).map(|(t, _)| *t).collect();
        for t in tokens {
            let full = match self.conns.get(&t).map(|c| &c.role) {
                Some(Role::Attach { container, .. }) => self
                    .containers
                    .get(container)
                    .and_then(|c| c.io.stdin.as_ref())
                    .is_some_and(|i| i.is_full()),
                Some(Role::Exec(id)) => {
                    self.execs.get(id).and_then(|e| e.io.stdin.as_ref()).is_some_and(|i| i.is_full())
                }
                _ => continue,
            };
            if let Some(c) = self.conns.get_mut(&t) {
                c.pause(&self.poll, full);
            }
            self.take_frames(t);
        }
    }

    /// Lets a container's output flow when neither its log nor a client holds it back.
    pub fn resume_container(&mut self, id: &str) {
        let Some(c) = self.containers.get_mut(id) else { return };
        let stuck =
            c.attached.iter().any(|t| self.conns.get(t).is_some_and(|c| c.queued() > conn::OUT_LIMIT));
        let hold = stuck || c.log_is_full();
        c.io.pause(&self.poll, hold);
    }

    fn check_oom(&mut self, id: &str) {
        let Some(c) = self.containers.get_mut(id) else { return };
        if let Some((_, watch)) = &c.oom {
            crate::oom::drain(watch);
        }
        let kills = cgroup::oom_kills(&c.record.cgroups);
        // The notification also comes without a kill, and once more when the cgroup is removed.
        if kills > c.oom_seen {
            c.oom_seen = kills;
            c.oom_check_until = None;
            c.record.oom_killed = true;
            if let Err(e) = journal::save_container(&self.dir, &c.record) {
                self.note(&format!("container {id}: {e}"));
            }
            self.broadcast(&Body::ContainerOom(orlop_proto::monitor::ContainerOom {
                container_id: id.to_owned(),
            }));
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let ops = self.ops.values().map(|o| o.deadline);
        let execs = self.execs.values().flat_map(|e| [e.deadline, e.drain_by].into_iter().flatten());
        let containers = self.containers.values().flat_map(|c| {
            let retry = (c.log.as_ref().is_some_and(|l| l.stalled().is_some()) || c.unsaved)
                .then(|| Instant::now() + log::RETRY);
            let oom = c.oom_check_until.map(|_| Instant::now() + oom::CHECK_AGAIN);
            [c.announce_by, retry, oom].into_iter().flatten()
        });
        let conns = self.conns.values().filter_map(|c| c.stuck_since).map(|s| s + conn::PATIENCE);
        let stop = self.stop.map(|(_, latest)| latest);
        ops.chain(execs).chain(containers).chain(conns).chain(stop).min()
    }

    fn tick(&mut self, now: Instant) {
        let late: Vec<Pid> = self.ops.values().filter(|o| o.deadline <= now).map(|o| o.helper.pid).collect();
        for pid in late {
            self.note(&format!("helper {pid} took too long and is killed"));
            kill_tree(pid);
            for o in self.ops.values_mut().filter(|o| o.helper.pid == pid) {
                // Its end of file answers the request; look again only if even that does not come.
                o.deadline = now + OP_LIMIT;
            }
        }
        let due: Vec<u64> = self
            .execs
            .iter()
            .filter(|(_, e)| e.deadline.is_some_and(|d| d <= now))
            .map(|(i, _)| *i)
            .collect();
        for id in due {
            self.exec_timed_out(id);
        }
        let drained: Vec<u64> = self
            .execs
            .iter()
            .filter(|(_, e)| e.drain_by.is_some_and(|d| d <= now))
            .map(|(i, _)| *i)
            .collect();
        for id in drained {
            self.finish_exec(id, true);
        }
        let due: Vec<String> = self
            .containers
            .iter()
            .filter(|(_, c)| c.announce_by.is_some_and(|d| d <= now))
            .map(|(i, _)| i.clone())
            .collect();
        for id in due {
            self.announce_exit(&id);
        }
        let oom: Vec<String> = self
            .containers
            .iter()
            .filter(|(_, c)| c.oom_check_until.is_some())
            .map(|(i, _)| i.clone())
            .collect();
        for id in oom {
            self.check_oom(&id);
            if let Some(c) = self.containers.get_mut(&id)
                && c.oom_check_until.is_some_and(|d| d <= now)
            {
                c.oom_check_until = None;
            }
        }
        self.retry_disk(now);
        let stuck: Vec<Token> = self
            .conns
            .iter()
            .filter(|(_, c)| c.stuck_since.is_some_and(|s| now.duration_since(s) >= conn::PATIENCE))
            .map(|(t, _)| *t)
            .collect();
        for t in stuck {
            self.note("a client that takes no output is cut off");
            self.close_conn(t);
        }
        for c in self.conns.values_mut() {
            match (c.queued() > conn::OUT_LIMIT, c.stuck_since) {
                (true, None) => c.stuck_since = Some(now),
                (false, Some(_)) => c.stuck_since = None,
                _ => {}
            }
        }
    }

    /// Logs and journals that a full disk has refused.
    fn retry_disk(&mut self, now: Instant) {
        let mut notes = Vec::new();
        let mut resume = Vec::new();
        for (id, c) in &mut self.containers {
            if let Some(l) = &mut c.log
                && l.stalled().is_some()
            {
                let before = l.dropped();
                l.flush(now);
                if l.dropped() > before {
                    notes.push(format!(
                        "container {id}: {} bytes of log dropped so far: its file takes none",
                        l.dropped()
                    ));
                }
                if !l.is_full() {
                    resume.push(id.clone());
                }
            }
            if c.unsaved && journal::save_container(&self.dir, &c.record).is_ok() {
                c.unsaved = false;
            }
        }
        for n in notes {
            self.note(&n);
        }
        for id in resume {
            self.resume_container(&id);
        }
    }

    /// Whether anything is left that only this process looks after.
    pub fn is_in_use(&self) -> bool {
        self.sandbox.is_some()
            || self.containers.values().any(|c| c.record.phase != Phase::Creating)
            || !self.containers.is_empty()
    }
}

/// A hanging helper with the processes it has forked so far.
pub fn kill_tree(pid: Pid) {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    for child in children.split_whitespace().filter_map(|c| c.parse().ok()) {
        let _ = cgroup::signal_pid(Pid::from_raw(child), libc::SIGKILL);
    }
    let _ = cgroup::signal_pid(pid, libc::SIGKILL);
}
