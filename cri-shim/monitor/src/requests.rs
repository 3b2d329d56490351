//! What clients ask for.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::unistd::{Pid, pipe2};
use orlop_oci::{CreateSpec, ExecSpec, Helper, Outcome, Reply, Runtime, cgroup};
use orlop_proto::monitor as pb;
use pb::{ClientFrame, Done, FailureKind, client_frame::Body as Ask, server_frame::Body};

use crate::conn::Role;
use crate::container::{Container, WAITING_LIMIT};
use crate::exec::{Exec, OUTPUT_LIMIT};
use crate::io::Io;
use crate::journal::{self, Phase, Record};
use crate::log::{DEFAULT_LINE_LIMIT, LogFile, Stream};
use crate::monitor::{FAREWELL, Monitor, OP_LIMIT, Op, OpKind, Source, failure, oci_failure};
use crate::poll::{EventFlags, Token};
use crate::sandbox;

/// The highest protocol version of proto/monitor.proto that this program speaks; it speaks all from 1 on.
pub const PROTOCOL: u32 = 2;

impl Monitor {
    pub fn handle(&mut self, token: Token, frame: ClientFrame) {
        let (id, Some(body)) = (frame.id, frame.body) else { return self.close_conn(token) };
        let Some(conn) = self.conns.get_mut(&token) else { return };
        match conn.role.clone() {
            Role::Events => return self.close_conn(token),
            Role::Attach { container, stdin, .. } => {
                return self.attach_frame(token, &container, stdin, body);
            }
            Role::Exec(exec) => return self.exec_frame(token, exec, body),
            Role::Requests => {}
        }
        match body {
            Ask::Hello(pb::Hello { version: 0 }) => {
                let text = format!("protocol version 0 is not spoken here, 1 to {PROTOCOL} are");
                self.refuse(token, id, failure(FailureKind::Invalid, "hello", text));
            }
            Ask::Hello(hello) => {
                conn.greeted = true;
                let reply = pb::HelloReply {
                    version: hello.version.min(PROTOCOL),
                    pid: std::process::id(),
                    build: env!("CARGO_PKG_VERSION").to_owned(),
                };
                self.answer(token, id, Body::Hello(reply));
            }
            _ if !conn.greeted => self.close_conn(token),
            Ask::CreateSandbox(r) => self.create_sandbox(token, id, r),
            Ask::DestroySandbox(_) => self.destroy_sandbox(token, id),
            Ask::Shutdown(_) => self.shutdown(token, id),
            Ask::GetState(_) => {
                let state = pb::State {
                    sandbox_created: self.sandbox.is_some(),
                    init_pid: self.sandbox.as_ref().map_or(0, |s| s.init_pid as u32),
                    containers: self
                        .containers
                        .values()
                        .filter(|c| c.record.phase != Phase::Creating)
                        .map(|c| c.record.state())
                        .collect(),
                };
                self.answer(token, id, Body::State(state));
            }
            Ask::Subscribe(_) => {
                self.answer(token, id, Body::Done(Done {}));
                if let Some(c) = self.conns.get_mut(&token) {
                    c.role = Role::Events;
                }
            }
            Ask::Stdin(_) | Ask::CloseStdin(_) | Ask::Resize(_) => self.close_conn(token),
            Ask::CreateContainer(r) => self.create_container(token, id, r),
            other => self.container_request(token, id, other),
        }
    }

    /// Requests about one existing container wait while an operation on it is under way.
    pub fn container_request(&mut self, token: Token, id: u64, body: Ask) {
        let name = match &body {
            Ask::StartContainer(r) => &r.container_id,
            Ask::SignalContainer(r) => &r.container_id,
            Ask::DeleteContainer(r) => &r.container_id,
            Ask::UpdateContainer(r) => &r.container_id,
            Ask::ReopenLog(r) => &r.container_id,
            Ask::Exec(r) => &r.container_id,
            Ask::Attach(r) => &r.container_id,
            _ => return self.close_conn(token),
        };
        let Some(c) = self.containers.get_mut(name) else {
            if matches!(body, Ask::DeleteContainer(_)) {
                return self.answer(token, id, Body::Done(Done {}));
            }
            let f = failure(FailureKind::NotFound, "state", format!("no container {name} in this sandbox"));
            return self.refuse(token, id, f);
        };
        // These three do not touch what the operation works on.
        let independent = matches!(body, Ask::ReopenLog(_))
            || (matches!(body, Ask::SignalContainer(_)) && c.record.pid > 0);
        if c.busy && !independent {
            if c.waiting.len() >= WAITING_LIMIT {
                let f = failure(FailureKind::Internal, "state", "too many requests wait for this container");
                return self.refuse(token, id, f);
            }
            return c.waiting.push_back((token, id, body));
        }
        if matches!(body, Ask::Exec(_) | Ask::Attach(_)) && self.has_no_place() {
            let text = "too many attaches and execs in this pod; end some of them";
            return self.refuse(token, id, failure(FailureKind::Internal, "state", text));
        }
        match body {
            Ask::StartContainer(r) => self.start_container(token, id, &r.container_id),
            Ask::SignalContainer(r) => self.signal_container(token, id, &r),
            Ask::DeleteContainer(r) => self.delete_container(token, id, &r.container_id, r.force),
            Ask::UpdateContainer(r) => self.update_container(token, id, &r),
            Ask::ReopenLog(r) => self.reopen_log(token, id, &r.container_id),
            Ask::Exec(r) => self.exec(token, id, r),
            Ask::Attach(r) => self.attach(token, id, r),
            _ => self.close_conn(token),
        }
    }

    fn create_sandbox(&mut self, token: Token, id: u64, r: pb::CreateSandbox) {
        if self.sandbox.is_some() {
            return self.refuse(
                token,
                id,
                failure(FailureKind::AlreadyExists, "state", "the sandbox exists already"),
            );
        }
        if self.destroying.is_some() {
            return self.refuse(
                token,
                id,
                failure(FailureKind::WrongState, "state", "the sandbox is being destroyed"),
            );
        }
        match sandbox::create(&self.dir, &r) {
            Ok(record) => {
                let init_pid = record.init_pid as u32;
                self.sandbox = Some(record);
                self.answer(token, id, Body::SandboxCreated(pb::SandboxCreated { init_pid }));
            }
            Err(e) => {
                let kind = if e.invalid { FailureKind::Invalid } else { FailureKind::Runtime };
                let f = pb::Failure { errno: e.errno, ..failure(kind, e.stage, e.message) };
                self.refuse(token, id, f);
            }
        }
        self.reap();
    }

    fn destroy_sandbox(&mut self, token: Token, id: u64) {
        self.destroying.get_or_insert_default().push((token, id));
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        for c in ids {
            // Nobody waits for the single answers: request 0 of no connection.
            let r = pb::DeleteContainer { container_id: c, force: true };
            self.container_request(0, 0, Ask::DeleteContainer(r));
        }
        self.continue_destroy();
    }

    /// Once no container is left, ends the sandbox and answers.
    pub fn continue_destroy(&mut self) {
        if self.destroying.is_none() || !self.containers.is_empty() {
            return;
        }
        let result = match &self.sandbox {
            Some(s) => sandbox::destroy(&self.dir, s),
            None => Ok(()),
        };
        let waiters = self.destroying.take().unwrap_or_default();
        match result {
            Ok(()) => {
                self.sandbox = None;
                for (t, i) in waiters {
                    self.answer(t, i, Body::Done(Done {}));
                }
            }
            Err(e) => {
                for (t, i) in waiters {
                    let f =
                        failure(FailureKind::Runtime, "sandbox", format!("cannot remove the sandbox: {e}"));
                    self.refuse(t, i, f);
                }
            }
        }
        self.reap();
    }

    fn shutdown(&mut self, token: Token, id: u64) {
        if self.is_in_use() {
            let f = failure(
                FailureKind::WrongState,
                "state",
                "a container or the sandbox is left: DestroySandbox first",
            );
            return self.refuse(token, id, f);
        }
        self.stop = Some((token, Instant::now() + FAREWELL));
        self.answer(token, id, Body::Done(Done {}));
    }

    fn create_container(&mut self, token: Token, id: u64, r: pb::CreateContainer) {
        if self.containers.contains_key(&r.container_id) {
            let f = failure(
                FailureKind::AlreadyExists,
                "state",
                format!("container {} exists already", r.container_id),
            );
            return self.refuse(token, id, f);
        }
        if self.destroying.is_some() {
            return self.refuse(
                token,
                id,
                failure(FailureKind::WrongState, "state", "the sandbox is being destroyed"),
            );
        }
        match self.begin_create(&r) {
            Ok((container, helper)) => {
                let name = r.container_id.clone();
                for (t, s) in [
                    (container.tokens[0], Source::ContainerIn(name.clone())),
                    (container.tokens[1], Source::ContainerOut(name.clone(), Stream::Stdout)),
                    (container.tokens[2], Source::ContainerOut(name.clone(), Stream::Stderr)),
                ] {
                    self.sources.insert(t, s);
                }
                self.containers.insert(name.clone(), container);
                self.begin_op(token, id, OpKind::Create(name), helper);
            }
            Err(f) => {
                let _ = journal::forget_container(&self.dir, &r.container_id);
                self.refuse(token, id, f);
            }
        }
    }

    fn begin_create(&mut self, r: &pb::CreateContainer) -> Result<(Container, Helper), pb::Failure> {
        let io_failure = |stage: &str, what: String, e: &io::Error| pb::Failure {
            errno: e.raw_os_error().unwrap_or(0),
            ..failure(FailureKind::Runtime, stage, format!("{what}: {e}"))
        };
        let name_ok = !r.container_id.is_empty()
            && r.container_id.len() <= 200
            && !r.container_id.starts_with('.')
            && r.container_id.bytes().all(|b| b.is_ascii_alphanumeric() || b"_+-.".contains(&b));
        if !name_ok {
            return Err(failure(
                FailureKind::Invalid,
                "spec",
                format!("bad container id {:?}", r.container_id),
            ));
        }
        if !Path::new(&r.bundle).is_absolute() {
            return Err(failure(
                FailureKind::Invalid,
                "spec",
                format!("bundle {:?} is not absolute", r.bundle),
            ));
        }
        let limit = if r.log_line_limit == 0 { DEFAULT_LINE_LIMIT } else { r.log_line_limit as usize };
        let log = match r.log_path.as_str() {
            "" => None,
            p => Some(
                LogFile::open(Path::new(p), limit)
                    .map_err(|e| io_failure("log", format!("cannot open the log {p}"), &e))?,
            ),
        };
        let runtime = r.runtime.clone().map(|o| Runtime { program: o.program.into(), args: o.args });
        if let Some(o) = runtime.as_ref().filter(|o| !o.program.is_absolute()) {
            let text = format!("OCI runtime {} is not absolute", o.program.display());
            return Err(failure(FailureKind::Invalid, "spec", text));
        }
        let record = Record {
            id: r.container_id.clone(),
            bundle: PathBuf::from(&r.bundle),
            log_path: PathBuf::from(&r.log_path),
            systemd_cgroup: r.systemd_cgroup,
            tty: r.tty,
            created_at_ns: journal::now_ns(),
            runtime,
            ..Default::default()
        };
        journal::save_container(&self.dir, &record)
            .map_err(|e| failure(FailureKind::Internal, "journal", e.to_string()))?;
        let (io, stdio, tokens) = Io::new(&mut self.poll, r.tty, r.stdin, true, true)
            .map_err(|e| io_failure("stdio", "cannot make pipes".into(), &e))?;
        let root = self.external_root();
        let (channel, helper) = match record.external(&root) {
            Some(external) => {
                std::fs::create_dir_all(&root)
                    .map_err(|e| io_failure("state", format!("cannot create {}", root.display()), &e))?;
                (None, external.create(Path::new(&r.bundle), r.tty, stdio))
            }
            None => {
                let (ours, theirs) = orlop_oci::start_channel().map_err(|e| oci_failure(&e))?;
                let spec = CreateSpec {
                    root: &self.oci_root(),
                    id: &r.container_id,
                    bundle: Path::new(&r.bundle),
                    tty: r.tty,
                    systemd_cgroup: r.systemd_cgroup,
                    stdio,
                    channel: theirs,
                };
                (Some(ours), orlop_oci::create(spec))
            }
        };
        let helper = helper.map_err(|e| oci_failure(&e))?;
        let mut container = Container::new(record, io, tokens, log, r.stdin_once);
        container.channel = channel;
        Ok((container, helper))
    }

    pub fn begin_op(&mut self, conn: Token, request: u64, kind: OpKind, helper: Helper) {
        let token = self.poll.token();
        let deadline = Instant::now() + OP_LIMIT;
        if let Err(e) = self.poll.add(helper.fd.as_fd(), token, EventFlags::IN) {
            // Without an event its answer would never be read: take it now, at the price of a short wait.
            self.note(&format!("epoll: {e}"));
            self.ops.insert(token, Op { helper, kind, conn, request, deadline });
            return self.finish_op(token);
        }
        self.sources.insert(token, Source::Op);
        self.ops.insert(token, Op { helper, kind, conn, request, deadline });
    }

    fn begin_container_op(
        &mut self,
        token: Token,
        id: u64,
        kind: OpKind,
        helper: Result<Helper, orlop_oci::Error>,
    ) {
        match helper {
            Ok(h) => {
                if let OpKind::Start(c) | OpKind::Delete(c) | OpKind::Update(c) = &kind
                    && let Some(c) = self.containers.get_mut(c)
                {
                    c.busy = true;
                }
                self.begin_op(token, id, kind, h);
            }
            Err(e) => self.refuse(token, id, oci_failure(&e)),
        }
    }

    fn start_container(&mut self, token: Token, id: u64, name: &str) {
        let root = self.external_root();
        let Some(c) = self.containers.get_mut(name) else { return };
        let helper = match (c.record.phase, c.channel.take(), c.record.external(&root)) {
            (Phase::Created, Some(channel), None) => orlop_oci::start(channel, c.record.pid),
            (Phase::Created, None, Some(external)) => external.start(),
            (phase, ..) => {
                let f = failure(
                    FailureKind::WrongState,
                    "state",
                    format!("container {name} is {phase:?}, not Created"),
                );
                return self.refuse(token, id, f);
            }
        };
        self.begin_container_op(token, id, OpKind::Start(name.to_owned()), helper);
    }

    fn signal_container(&mut self, token: Token, id: u64, r: &pb::SignalContainer) {
        let Some(c) = self.containers.get(&r.container_id) else { return };
        if !(1..=64).contains(&r.signal) {
            return self.refuse(
                token,
                id,
                failure(FailureKind::Invalid, "signal", format!("no signal {}", r.signal)),
            );
        }
        if r.all {
            cgroup::signal_all(&c.record.cgroups, r.signal as i32);
            return self.answer(token, id, Body::Done(Done {}));
        }
        // The process is an unreaped child of ours, so its number cannot have been given to another.
        if c.record.phase == Phase::Exited || c.early_exit.is_some() {
            let f =
                failure(FailureKind::WrongState, "state", format!("container {} has exited", r.container_id));
            return self.refuse(token, id, f);
        }
        if let Some(external) = c.record.external(&self.external_root()) {
            let helper = external.kill(r.signal as i32);
            return self.begin_container_op(token, id, OpKind::Signal, helper);
        }
        match cgroup::signal_pid(Pid::from_raw(c.record.pid), r.signal as i32) {
            Ok(()) => self.answer(token, id, Body::Done(Done {})),
            Err(e) => {
                let f = pb::Failure {
                    errno: e.raw_os_error().unwrap_or(0),
                    ..failure(FailureKind::Runtime, "signal", e.to_string())
                };
                self.refuse(token, id, f);
            }
        }
    }

    fn delete_container(&mut self, token: Token, id: u64, name: &str, force: bool) {
        let Some(c) = self.containers.get(name) else { return };
        if c.record.phase == Phase::Running && !force {
            let f = failure(FailureKind::WrongState, "state", format!("container {name} is running"));
            return self.refuse(token, id, f);
        }
        cgroup::signal_all(&c.record.cgroups, libc::SIGKILL);
        if c.record.phase != Phase::Exited && c.record.pid > 1 {
            let _ = cgroup::signal_pid(Pid::from_raw(c.record.pid), libc::SIGKILL);
        }
        if let Some(external) = c.record.external(&self.external_root()) {
            let helper = external.delete(&c.record.cgroups);
            return self.begin_container_op(token, id, OpKind::Delete(name.to_owned()), helper);
        }
        let root = self.oci_root();
        if c.record.phase == Phase::Exited && !c.context.poststop {
            // Nothing to wait for, as a rule.
            match orlop_oci::delete_now(&root, name, &c.record.cgroups) {
                Ok(false) => {}
                done => {
                    let result = done.map(|_| Outcome::Done);
                    return self.deleted(token, id, name, Reply { result, console: None });
                }
            }
        }
        let helper = orlop_oci::delete(&root, name, &c.record.cgroups);
        self.begin_container_op(token, id, OpKind::Delete(name.to_owned()), helper);
    }

    fn update_container(&mut self, token: Token, id: u64, r: &pb::UpdateContainer) {
        let Some(c) = self.containers.get(&r.container_id) else { return };
        if c.record.phase == Phase::Exited {
            let f =
                failure(FailureKind::WrongState, "state", format!("container {} has exited", r.container_id));
            return self.refuse(token, id, f);
        }
        let helper = match c.record.external(&self.external_root()) {
            Some(external) => external.update(&r.linux_resources),
            None => orlop_oci::update(
                &r.container_id,
                &c.context,
                &c.record.cgroups,
                &r.linux_resources,
                c.record.systemd_cgroup,
            ),
        };
        self.begin_container_op(token, id, OpKind::Update(r.container_id.clone()), helper);
    }

    fn reopen_log(&mut self, token: Token, id: u64, name: &str) {
        let Some(c) = self.containers.get_mut(name) else { return };
        let result = c.log.as_mut().map_or(Ok(()), |l| l.reopen(Instant::now()));
        match result {
            Ok(()) => {
                self.resume_container(name);
                self.answer(token, id, Body::Done(Done {}));
            }
            Err(e) => {
                let f = pb::Failure {
                    errno: e.raw_os_error().unwrap_or(0),
                    ..failure(FailureKind::Runtime, "log", format!("cannot reopen the log: {e}"))
                };
                self.refuse(token, id, f);
            }
        }
    }

    fn exec(&mut self, token: Token, id: u64, r: pb::Exec) {
        let Some(c) = self.containers.get(&r.container_id) else { return };
        if c.record.phase != Phase::Running {
            let f = failure(
                FailureKind::WrongState,
                "state",
                format!("container {} is {:?}, not Running", r.container_id, c.record.phase),
            );
            return self.refuse(token, id, f);
        }
        // A synchronous exec answers with both streams whatever the flags.
        let (stdout, stderr) = if r.stream { (r.stdout, r.stderr) } else { (true, true) };
        let (mut io, stdio, tokens) =
            match Io::new(&mut self.poll, r.tty, r.stream && r.stdin, stdout, stderr) {
                Ok(v) => v,
                Err(e) => {
                    return self.refuse(
                        token,
                        id,
                        failure(FailureKind::Runtime, "stdio", format!("cannot make pipes: {e}")),
                    );
                }
            };
        let (report, theirs) = match pipe2(OFlag::O_CLOEXEC) {
            Ok(p) => p,
            Err(e) => {
                let f = failure(FailureKind::Runtime, "stdio", format!("cannot make pipes: {}", e.desc()));
                return self.refuse(token, id, f);
            }
        };
        let begun = match c.record.external(&self.external_root()) {
            // It answers when the program runs: nothing is left to report.
            Some(external) => external.exec(self.next_exec, &r.process, r.tty, stdio),
            None => orlop_oci::exec(ExecSpec {
                root: &self.oci_root(),
                id: &r.container_id,
                init: c.record.pid,
                context: &c.context,
                cgroups: &c.record.cgroups,
                process: &r.process,
                tty: r.tty,
                stdio,
                report: theirs,
            }),
        };
        let helper = match begun {
            Ok(h) => h,
            Err(e) => return self.refuse(token, id, oci_failure(&e)),
        };
        // What a quick process writes must not overtake the answer that the stream is set up.
        io.pause(&self.poll, r.stream);
        self.next_exec += 1;
        let exec = self.next_exec;
        for (t, s) in [
            (tokens[0], Source::ExecIn(exec)),
            (tokens[1], Source::ExecOut(exec, Stream::Stdout)),
            (tokens[2], Source::ExecOut(exec, Stream::Stderr)),
        ] {
            self.sources.insert(t, s);
        }
        let limit = match r.output_limit as usize {
            0 => OUTPUT_LIMIT,
            n => n.min(OUTPUT_LIMIT),
        };
        self.execs.insert(
            exec,
            Exec {
                container: r.container_id,
                conn: Some(token),
                request: id,
                stream: r.stream,
                io,
                tokens,
                stdout: Vec::new(),
                stderr: Vec::new(),
                limit,
                pid: None,
                report: Some((self.poll.token(), report)),
                exit: None,
                deadline: (r.timeout_ms > 0).then(|| Instant::now() + Duration::from_millis(r.timeout_ms)),
                timed_out: false,
                drain_by: None,
            },
        );
        if r.stream
            && let Some(conn) = self.conns.get_mut(&token)
        {
            conn.role = Role::Exec(exec);
        }
        self.begin_op(token, id, OpKind::Exec(exec), helper);
    }

    fn attach(&mut self, token: Token, id: u64, r: pb::Attach) {
        let Some(c) = self.containers.get_mut(&r.container_id) else { return };
        if c.record.phase == Phase::Exited {
            let f =
                failure(FailureKind::WrongState, "state", format!("container {} has exited", r.container_id));
            return self.refuse(token, id, f);
        }
        c.attached.push(token);
        if let Some(conn) = self.conns.get_mut(&token) {
            conn.role = Role::Attach {
                container: r.container_id,
                stdin: r.stdin,
                stdout: r.stdout,
                stderr: r.stderr,
            };
        }
        self.answer(token, id, Body::StreamStarted(pb::StreamStarted { pid: 0 }));
    }

    fn attach_frame(&mut self, token: Token, container: &str, stdin: bool, body: Ask) {
        let Some(c) = self.containers.get_mut(container) else { return };
        let poll = &self.poll;
        let mut full = false;
        match body {
            Ask::Resize(r) => c.io.resize(clamp(r.width), clamp(r.height)),
            Ask::Stdin(bytes) if stdin => {
                if let Some(input) = &mut c.io.stdin {
                    let alive = input.push(poll, &bytes);
                    full = input.is_full();
                    if !alive {
                        c.io.stdin = None;
                    }
                }
            }
            Ask::CloseStdin(_) if stdin => {
                if c.io.stdin.as_mut().is_some_and(|i| !i.close(poll)) {
                    c.io.stdin = None;
                }
            }
            Ask::Stdin(_) | Ask::CloseStdin(_) => {}
            _ => return self.close_conn(token),
        }
        self.hold_sender(token, full);
    }

    fn exec_frame(&mut self, token: Token, exec: u64, body: Ask) {
        let Some(e) = self.execs.get_mut(&exec) else { return };
        let poll = &self.poll;
        let mut full = false;
        match body {
            Ask::Resize(r) => e.io.resize(clamp(r.width), clamp(r.height)),
            Ask::Stdin(bytes) => {
                if let Some(input) = &mut e.io.stdin {
                    let alive = input.push(poll, &bytes);
                    full = input.is_full();
                    if !alive {
                        e.io.stdin = None;
                    }
                }
            }
            Ask::CloseStdin(_) => {
                if e.io.stdin.as_mut().is_some_and(|i| !i.close(poll)) {
                    e.io.stdin = None;
                }
            }
            _ => return self.close_conn(token),
        }
        self.hold_sender(token, full);
    }

    fn hold_sender(&mut self, token: Token, full: bool) {
        if full && let Some(c) = self.conns.get_mut(&token) {
            c.pause(&self.poll, true);
        }
    }
}

fn clamp(v: u32) -> u16 {
    v.min(u32::from(u16::MAX)) as u16
}
