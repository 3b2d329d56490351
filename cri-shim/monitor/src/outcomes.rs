//! What happens by itself: operations finish, output comes, processes end.

use std::collections::{BTreeMap, HashSet};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use orlop_oci::{Created, Outcome, Reply, cgroup};
use orlop_proto::monitor as pb;
use pb::{Done, FailureKind, server_frame::Body};

use crate::conn::{self, Role};
use crate::container::{self, Container, Exit};
use crate::exec::{self, Exec};
use crate::io::Chunk;
use crate::journal::{self, Phase};
use crate::log::Stream;
use crate::monitor::{Monitor, OpKind, Source, failure, kill_tree, oci_failure};
use crate::oom;
use crate::poll::{EventFlags, Token};

/// Exit code of a container whose program could not be executed, as other runtimes report it.
const NOT_EXECUTED: i32 = 128;
/// Stage of an operation whose helper has not told what became of it.
const HELPER: &str = "helper";
/// Ended children that nobody has claimed yet while helpers are at work.
const UNCLAIMED_LIMIT: usize = 4096;

impl Monitor {
    pub fn finish_op(&mut self, token: Token) {
        let Some(op) = self.ops.remove(&token) else { return };
        self.sources.remove(&token);
        self.poll.remove(&op.helper.fd);
        let reply = op.helper.reply();
        if let (Ok(Outcome::Warned(warnings)), OpKind::Delete(id)) = (&reply.result, &op.kind) {
            for w in warnings {
                self.own_log.line(&format!("container {id}: {w}"));
            }
        }
        match op.kind {
            OpKind::Create(id) => self.created(op.conn, op.request, &id, reply),
            OpKind::Start(id) => self.started(op.conn, op.request, &id, reply),
            OpKind::Poststart(id) => self.poststarted(op.conn, op.request, &id, reply),
            OpKind::Delete(id) => self.deleted(op.conn, op.request, &id, reply),
            OpKind::Update(id) => {
                self.plain_answer(op.conn, op.request, reply);
                self.not_busy(&id);
            }
            OpKind::Signal => self.plain_answer(op.conn, op.request, reply),
            OpKind::Exec(id) => self.exec_begun(id, reply),
        }
    }

    fn plain_answer(&mut self, conn: Token, request: u64, reply: Reply) {
        match reply.result {
            Ok(_) => self.answer(conn, request, Body::Done(Done {})),
            Err(e) => self.refuse(conn, request, oci_failure(&e)),
        }
    }

    /// The operation is over: handles an end seen meanwhile, then the requests that waited.
    fn not_busy(&mut self, id: &str) {
        let Some(c) = self.containers.get_mut(id) else { return };
        c.busy = false;
        if let Some(exit) = c.early_exit.take() {
            self.container_exited(id, exit);
        }
        while let Some(c) = self.containers.get_mut(id)
            && !c.busy
            && let Some((conn, request, body)) = c.waiting.pop_front()
        {
            self.container_request(conn, request, body);
        }
    }

    fn created(&mut self, conn: Token, request: u64, id: &str, reply: Reply) {
        match reply.result {
            Ok(Outcome::Created(created)) => {
                if let Err(f) = self.adopt_created(id, created, reply.console) {
                    self.note(&format!("container {id}: {}", f.message));
                    self.refuse(conn, request, f);
                    // Exists, but cannot be recorded: take it back.
                    if let Some(c) = self.containers.get_mut(id) {
                        c.busy = false;
                    }
                    let r = pb::DeleteContainer { container_id: id.to_owned(), force: true };
                    return self.container_request(0, 0, pb::client_frame::Body::DeleteContainer(r));
                }
                let pid = self.containers.get(id).map_or(0, |c| c.record.pid as u32);
                self.answer(conn, request, Body::ContainerCreated(pb::ContainerCreated { pid }));
                self.not_busy(id);
            }
            Ok(_) => {
                self.refuse(conn, request, failure(FailureKind::Internal, "helper", "unexpected answer"))
            }
            Err(e) if e.stage == HELPER => {
                self.note(&format!("container {id}: {e}"));
                self.refuse(conn, request, oci_failure(&e));
                self.take_back_unmade(id);
            }
            Err(e) => {
                let waiting = self.drop_container(id);
                self.refuse(conn, request, oci_failure(&e));
                for (t, i, body) in waiting {
                    self.container_request(t, i, body);
                }
                self.continue_destroy();
            }
        }
    }

    /// The helper of a creation was killed, or could not even fork: it took nothing back, and what it made is in no record.
    fn take_back_unmade(&mut self, id: &str) {
        let Some(c) = self.containers.get_mut(id) else { return };
        c.busy = false;
        c.record.cgroups = orlop_oci::own_cgroups(&c.record.bundle, id);
        if let Err(e) = journal::save_container(&self.dir, &c.record) {
            self.own_log.line(&format!("container {id}: {e}"));
        }
        let r = pb::DeleteContainer { container_id: id.to_owned(), force: true };
        self.container_request(0, 0, pb::client_frame::Body::DeleteContainer(r));
    }

    fn adopt_created(
        &mut self,
        id: &str,
        created: Created,
        console: Option<std::os::fd::OwnedFd>,
    ) -> Result<(), pb::Failure> {
        for a in &created.adapted {
            self.own_log.line(&format!("container {id}: spec adapted: {a}"));
        }
        let Some(c) = self.containers.get_mut(id) else { return Ok(()) };
        c.record.phase = Phase::Created;
        c.record.pid = created.pid;
        c.record.pid_start = journal::start_ticks(created.pid);
        c.record.own_pid_namespace = created.own_pid_namespace;
        c.context = created.context;
        c.record.created_at_ns = journal::now_ns();
        c.record.oom_baseline = cgroup::oom_kills(&created.cgroups);
        c.oom_seen = c.record.oom_baseline;
        c.record.cgroups = created.cgroups;
        if let Some((code, at_ns)) = self.unclaimed.remove(&created.pid) {
            c.early_exit = Some(Exit { code, at_ns });
        }
        if let Some(master) = console {
            c.io.set_console(&self.poll, c.tokens, master)
                .map_err(|e| failure(FailureKind::Runtime, "tty", format!("cannot use the terminal: {e}")))?;
        }
        match oom::watch(&c.record.cgroups) {
            Ok(Some(watch)) => {
                let token = self.poll.token();
                if self.poll.add(&watch.fd, token, EventFlags::IN).is_ok() {
                    self.sources.insert(token, Source::Oom(id.to_owned()));
                    c.oom = Some((token, watch));
                }
            }
            Ok(None) => {}
            // The counter is looked at when the container ends, too.
            Err(e) => self.own_log.line(&format!("container {id}: no notice of out-of-memory: {e}")),
        }
        journal::save_container(&self.dir, &c.record)
            .map_err(|e| failure(FailureKind::Internal, "journal", e.to_string()))
    }

    fn started(&mut self, conn: Token, request: u64, id: &str, reply: Reply) {
        let Some(c) = self.containers.get_mut(id) else { return };
        match reply.result {
            Ok(_) => {
                c.record.phase = Phase::Running;
                // Its end may have been seen before the news of its start.
                c.record.started_at_ns = c.early_exit.as_ref().map_or_else(journal::now_ns, |e| e.at_ns);
                if let Err(e) = journal::save_container(&self.dir, &c.record) {
                    c.unsaved = true;
                    self.own_log.line(&format!("container {id}: {e}"));
                }
                let (state, hooks) = (c.record.state(), c.context.poststart);
                if !hooks {
                    self.answer(conn, request, Body::Done(Done {}));
                }
                self.broadcast(&Body::ContainerStarted(pb::ContainerStarted { container: Some(state) }));
                if hooks {
                    return self.begin_poststart(conn, request, id);
                }
            }
            Err(e) => {
                if e.stage == "exec" {
                    // Its process ends by itself; that end is the container's.
                    if let Some(exit) = &mut c.early_exit {
                        exit.code = NOT_EXECUTED;
                    } else {
                        c.record.exit_code = NOT_EXECUTED;
                    }
                }
                self.refuse(conn, request, oci_failure(&e));
            }
        }
        self.not_busy(id);
    }

    /// The container runs; its start is answered when its hooks have ended.
    fn begin_poststart(&mut self, conn: Token, request: u64, id: &str) {
        let root = self.oci_root();
        let Some(c) = self.containers.get_mut(id) else { return };
        let pid = c.record.pid;
        if let Some(exit) = c.early_exit.take() {
            self.container_exited(id, exit);
        }
        match orlop_oci::poststart(&root, id, pid) {
            Ok(helper) => self.begin_op(conn, request, OpKind::Poststart(id.to_owned()), helper),
            Err(e) => self.poststarted(conn, request, id, Reply { result: Err(e), console: None }),
        }
    }

    fn poststarted(&mut self, conn: Token, request: u64, id: &str, reply: Reply) {
        if let (Err(e), Some(c)) = (&reply.result, self.containers.get(id)) {
            // The start has failed, as the OCI runtime spec has it: what has begun must end.
            self.own_log.line(&format!("container {id} is ended: {e}"));
            cgroup::signal_all(&c.record.cgroups, libc::SIGKILL);
            if c.record.phase != Phase::Exited {
                let _ = cgroup::signal_pid(Pid::from_raw(c.record.pid), libc::SIGKILL);
            }
        }
        self.plain_answer(conn, request, reply);
        self.not_busy(id);
    }

    pub fn deleted(&mut self, conn: Token, request: u64, id: &str, reply: Reply) {
        // The end of the process may not have been seen yet; it comes before the end of the container.
        self.reap();
        if let Some(c) = self.containers.get_mut(id)
            && let Some(exit) = c.early_exit.take()
        {
            self.container_exited(id, exit);
        }
        match reply.result {
            Ok(_) => {
                self.announce_exit(id);
                let waiting = self.drop_container(id);
                self.answer(conn, request, Body::Done(Done {}));
                for (t, i, body) in waiting {
                    self.container_request(t, i, body);
                }
                self.continue_destroy();
            }
            Err(e) => {
                self.note(&format!("container {id} cannot be deleted: {e}"));
                self.refuse(conn, request, oci_failure(&e));
                for (t, i) in self.destroying.take().unwrap_or_default() {
                    self.refuse(t, i, oci_failure(&e));
                }
                self.not_busy(id);
            }
        }
    }

    /// Forgets a container; returns the requests that waited for it.
    fn drop_container(&mut self, id: &str) -> Vec<(Token, u64, pb::client_frame::Body)> {
        let Some(mut c) = self.containers.remove(id) else { return Vec::new() };
        for t in c.tokens.into_iter().chain(c.oom.as_ref().map(|o| o.0)) {
            self.sources.remove(&t);
        }
        for t in std::mem::take(&mut c.attached) {
            self.close_conn(t);
        }
        if let Err(e) = journal::forget_container(&self.dir, id) {
            self.note(&format!("container {id}: cannot remove its record: {e}"));
        }
        c.waiting.into()
    }

    /// Collects every child that has ended.
    pub fn reap(&mut self) {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => self.child_ended(pid, code),
                Ok(WaitStatus::Signaled(pid, signal, _)) => self.child_ended(pid, 128 + signal as i32),
                Ok(WaitStatus::StillAlive) => break,
                Ok(_) | Err(Errno::EINTR) => {}
                // A real-time signal ended it: nix has no name for that, the status was taken all the same.
                Err(Errno::EINVAL) => {}
                Err(_) => break,
            }
        }
        if self.ops.is_empty() {
            self.unclaimed.clear();
        }
    }

    fn child_ended(&mut self, pid: Pid, code: i32) {
        let pid = pid.as_raw();
        let at_ns = journal::now_ns();
        if let Some((id, c)) =
            self.containers.iter_mut().find(|(_, c)| c.record.pid == pid && c.record.phase != Phase::Exited)
        {
            let code = if c.record.exit_code != 0 { c.record.exit_code } else { code };
            let exit = Exit { code, at_ns };
            let starting = self.ops.values().any(|o| matches!(&o.kind, OpKind::Start(s) if s == id));
            if starting {
                // Its start is told first.
                c.early_exit = Some(exit);
                return;
            }
            let id = id.clone();
            return self.container_exited(&id, exit);
        }
        if let Some((id, e)) = self.execs.iter_mut().find(|(_, e)| e.pid == Some(pid) && e.exit.is_none()) {
            e.exit = Some(code);
            let id = *id;
            return self.exec_ended(id);
        }
        let helper = self.ops.values().any(|o| o.helper.pid.as_raw() == pid);
        if !helper && !self.ops.is_empty() && self.unclaimed.len() < UNCLAIMED_LIMIT {
            self.unclaimed.insert(pid, (code, at_ns));
        }
    }

    fn container_exited(&mut self, id: &str, exit: Exit) {
        let Some(c) = self.containers.get_mut(id) else { return };
        c.record.phase = Phase::Exited;
        c.record.exit_code = exit.code;
        c.record.finished_at_ns = exit.at_ns;
        let kills = cgroup::oom_kills(&c.record.cgroups);
        let newly_oom = kills > c.oom_seen;
        c.oom_seen = kills.max(c.oom_seen);
        c.record.oom_killed |= newly_oom;
        if !c.record.own_pid_namespace {
            // No PID 1 of its own whose end would take the rest along.
            cgroup::signal_all(&c.record.cgroups, libc::SIGKILL);
        }
        if let Err(e) = journal::save_container(&self.dir, &c.record) {
            c.unsaved = true;
            self.own_log.line(&format!("container {id}: {e}"));
        }
        c.io.process_ended();
        c.announce_by = Some(Instant::now() + container::DRAIN);
        if newly_oom {
            self.broadcast(&Body::ContainerOom(pb::ContainerOom { container_id: id.to_owned() }));
        }
        for stream in [Stream::Stdout, Stream::Stderr] {
            // A pipe holds 64 KiB, at most 1 MiB by fcntl: 32 reads empty it.
            self.pump_container(id, stream, 32);
        }
        self.announce_if_drained(id);
    }

    fn announce_if_drained(&mut self, id: &str) {
        if self.containers.get(id).is_some_and(|c| c.announce_by.is_some() && c.io.is_drained()) {
            self.announce_exit(id);
        }
    }

    /// Tells subscribers and attached clients, once.
    pub fn announce_exit(&mut self, id: &str) {
        let Some(c) = self.containers.get_mut(id) else { return };
        if c.announce_by.take().is_none() {
            return;
        }
        let state = c.record.state();
        let code = state.exit_code;
        let attached = std::mem::take(&mut c.attached);
        self.broadcast(&Body::ContainerExited(pb::ContainerExited { container: Some(state) }));
        for t in attached {
            self.end_stream_conn(t, code);
        }
    }

    fn end_stream_conn(&mut self, token: Token, exit_code: i32) {
        if let Some(c) = self.conns.get_mut(&token) {
            c.close_when_sent = true;
        }
        self.answer(token, 0, Body::StreamEnded(pb::StreamEnded { exit_code }));
    }

    /// Moves output to the log and to attached clients, at most `reads` chunks.
    pub fn pump_container(&mut self, id: &str, stream: Stream, reads: usize) {
        let now = Instant::now();
        for _ in 0..reads {
            let Some(c) = self.containers.get_mut(id) else { return };
            let Some(out) = c.io.output(stream) else { return };
            if out.is_paused() {
                return;
            }
            match out.read(&mut self.buf) {
                Chunk::Nothing => return,
                Chunk::End => {
                    c.end_stream(stream, now);
                    return self.announce_if_drained(id);
                }
                Chunk::Data(n) => {
                    if let Some(log) = &mut c.log {
                        log.write(stream, &self.buf[..n], now);
                    }
                    let followers = c.attached.clone();
                    if !followers.is_empty() {
                        self.fan_out(&followers, stream, n);
                    }
                    self.resume_container(id);
                }
            }
        }
    }

    fn fan_out(&mut self, followers: &[Token], stream: Stream, n: usize) {
        for t in followers {
            let Some(conn) = self.conns.get(t) else { continue };
            let wants = match (&conn.role, stream) {
                (Role::Attach { stdout, .. }, Stream::Stdout) => *stdout,
                (Role::Attach { stderr, .. }, Stream::Stderr) => *stderr,
                _ => false,
            };
            if wants {
                let body = stream_body(stream, &self.buf[..n]);
                self.answer(*t, 0, body);
            }
        }
    }

    fn exec_begun(&mut self, id: u64, reply: Reply) {
        let Some(e) = self.execs.get_mut(&id) else { return };
        match reply.result {
            Ok(Outcome::Executed { pid }) => {
                e.pid = Some(pid);
                if let Some(master) = reply.console
                    && let Err(err) = e.io.set_console(&self.poll, e.tokens, master)
                {
                    self.own_log.line(&format!("exec: cannot use the terminal: {err}"));
                }
                if e.report.is_some() {
                    // The terminal, too, waits until its client has heard that the stream is set up.
                    e.io.pause(&self.poll, e.stream);
                }
                let exit = self.unclaimed.remove(&pid).map(|(code, _)| code);
                e.exit = exit;
                if e.conn.is_none() || e.timed_out {
                    kill_session(pid, &self.containers, &e.container);
                }
                if exit.is_some() {
                    return self.exec_ended(id);
                }
                if let Some((token, pipe)) = &e.report {
                    self.sources.insert(*token, Source::ExecReport(id));
                    if let Err(err) = self.poll.add(pipe, *token, EventFlags::IN) {
                        self.own_log.line(&format!("exec: no word of its start: {err}"));
                        self.exec_confirmed(id);
                    }
                }
            }
            Err(err) => self.exec_failed(id, oci_failure(&err)),
            Ok(_) => self.exec_failed(id, failure(FailureKind::Internal, "helper", "unexpected answer")),
        }
    }

    /// The program runs, or the report says why it does not. Waits for the report, which its end or its start completes.
    pub fn exec_confirmed(&mut self, id: u64) {
        let Some(e) = self.execs.get_mut(&id) else { return };
        let Some((token, pipe)) = e.report.take() else { return };
        self.sources.remove(&token);
        self.poll.remove(&pipe);
        if let Some(err) = orlop_oci::read_report(&pipe) {
            return self.exec_failed(id, oci_failure(&err));
        }
        if !e.stream {
            return;
        }
        let pid = e.pid.unwrap_or(0) as u32;
        if let Some(conn) = e.conn {
            let request = e.request;
            self.answer(conn, request, Body::StreamStarted(pb::StreamStarted { pid }));
        }
        if let Some(e) = self.execs.get_mut(&id) {
            e.io.pause(&self.poll, false);
        }
    }

    fn exec_failed(&mut self, id: u64, f: pb::Failure) {
        let Some(e) = self.execs.get_mut(&id) else { return };
        if e.timed_out {
            return self.finish_exec(id, true);
        }
        let (conn, request, stream) = (e.conn, e.request, e.stream);
        self.drop_exec(id);
        if let Some(t) = conn {
            if stream && let Some(c) = self.conns.get_mut(&t) {
                c.close_when_sent = true;
            }
            self.refuse(t, request, f);
        }
    }

    pub fn pump_exec(&mut self, id: u64, stream: Stream) {
        for _ in 0..4 {
            let Some(e) = self.execs.get_mut(&id) else { return };
            let Some(out) = e.io.output(stream) else { return };
            if out.is_paused() {
                return;
            }
            match out.read(&mut self.buf) {
                Chunk::Nothing => return,
                Chunk::End => {
                    *e.io.output(stream) = None;
                    return self.finish_exec(id, false);
                }
                Chunk::Data(n) => {
                    let bytes = &self.buf[..n];
                    match (e.stream, e.conn, stream) {
                        (true, Some(conn), _) => {
                            let body = stream_body(stream, bytes);
                            self.answer(conn, 0, body);
                            let full = self.conns.get(&conn).is_some_and(|c| c.queued() > conn::OUT_LIMIT);
                            if full && let Some(e) = self.execs.get_mut(&id) {
                                e.io.pause(&self.poll, true);
                            }
                        }
                        (true, None, _) => {}
                        (false, _, Stream::Stdout) => Exec::keep(&mut e.stdout, bytes, e.limit),
                        (false, _, Stream::Stderr) => Exec::keep(&mut e.stderr, bytes, e.limit),
                    }
                }
            }
        }
    }

    fn exec_ended(&mut self, id: u64) {
        self.exec_confirmed(id);
        let Some(e) = self.execs.get_mut(&id) else { return };
        e.io.process_ended();
        e.deadline = None;
        e.drain_by = Some(Instant::now() + exec::DRAIN);
        self.pump_exec(id, Stream::Stdout);
        self.pump_exec(id, Stream::Stderr);
        self.finish_exec(id, false);
    }

    /// Answers once the process has ended and its output is complete, or `give_up` says that enough was waited.
    pub fn finish_exec(&mut self, id: u64, give_up: bool) {
        let Some(e) = self.execs.get_mut(&id) else { return };
        let Some(code) = e.exit.or((e.timed_out && e.pid.is_none() && give_up).then_some(137)) else {
            return;
        };
        if !e.io.is_drained() && !give_up {
            return;
        }
        // A client that still takes output gets all of it before the end.
        let held_back = [&e.io.stdout, &e.io.stderr].into_iter().flatten().any(|o| o.is_paused());
        if held_back && e.conn.is_some() {
            e.drain_by = Some(Instant::now() + exec::DRAIN);
            return;
        }
        let Some(e) = self.drop_exec(id) else { return };
        let Some(conn) = e.conn else { return };
        if e.stream {
            return self.end_stream_conn(conn, code);
        }
        let done =
            pb::ExecDone { exit_code: code, stdout: e.stdout, stderr: e.stderr, timed_out: e.timed_out };
        self.answer(conn, e.request, Body::ExecDone(done));
    }

    fn drop_exec(&mut self, id: u64) -> Option<Exec> {
        let e = self.execs.remove(&id)?;
        for t in e.tokens {
            self.sources.remove(&t);
        }
        Some(e)
    }

    pub fn exec_timed_out(&mut self, id: u64) {
        let Some(e) = self.execs.get_mut(&id) else { return };
        e.deadline = None;
        e.timed_out = true;
        match e.pid {
            Some(pid) => kill_session(pid, &self.containers, &e.container),
            None => self.kill_exec_helper(id),
        }
    }

    /// The client has gone: the process is ended, its end is still collected.
    pub fn abandon_exec(&mut self, id: u64) {
        let Some(e) = self.execs.get_mut(&id) else { return };
        e.conn = None;
        e.io.stdin = None;
        e.io.pause(&self.poll, false);
        if let Some(pid) = e.pid
            && e.exit.is_none()
        {
            kill_session(pid, &self.containers, &e.container);
        }
    }

    fn kill_exec_helper(&mut self, id: u64) {
        let helper =
            self.ops.values().find(|o| matches!(o.kind, OpKind::Exec(i) if i == id)).map(|o| o.helper.pid);
        if let Some(pid) = helper {
            kill_tree(pid);
        }
    }
}

fn stream_body(stream: Stream, bytes: &[u8]) -> Body {
    match stream {
        Stream::Stdout => Body::Stdout(bytes.to_vec()),
        Stream::Stderr => Body::Stderr(bytes.to_vec()),
    }
}

/// The exec'd process leads a session, which holds what it has started unless that left on purpose: its group, and those that a
/// shell with job control has made.
fn kill_session(pid: i32, containers: &BTreeMap<String, Container>, container: &str) {
    let leader = Pid::from_raw(pid);
    let _ = cgroup::signal_pid(Pid::from_raw(-pid), libc::SIGKILL);
    let _ = cgroup::signal_pid(leader, libc::SIGKILL);
    let Some(c) = containers.get(container) else { return };
    // Until none is left that was not seen before: what is not killed yet may fork.
    let mut seen = HashSet::new();
    for _ in 0..10 {
        let all = cgroup::processes(&c.record.cgroups).into_iter();
        let ours = all.filter(|p| nix::unistd::getsid(Some(*p)) == Ok(leader));
        let fresh: Vec<Pid> = ours.filter(|p| seen.insert(*p)).collect();
        if fresh.is_empty() {
            return;
        }
        for p in fresh {
            let _ = cgroup::signal_pid(p, libc::SIGKILL);
        }
    }
}
