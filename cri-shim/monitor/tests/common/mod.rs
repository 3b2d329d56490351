//! A pod in a temporary folder and a small blocking client, for the integration tests.
#![allow(dead_code)]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use orlop_proto::monitor::{client_frame::Body as Ask, server_frame::Body, *};
use prost::Message;
use serde_json::{Value, json};

pub const MONITOR: &str = env!("CARGO_BIN_EXE_orlop-monitor");

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A connection.
pub struct Client {
    pub socket: UnixStream,
    pub next: u64,
    pub stray: Vec<ServerFrame>,
}

impl Client {
    pub fn raw(dir: &Path) -> Client {
        let socket = UnixStream::connect(dir.join("monitor.sock")).expect("the monitor listens");
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Client { socket, next: 0, stray: Vec::new() }
    }

    pub fn new(dir: &Path) -> Client {
        let mut c = Client::raw(dir);
        match c.call(Ask::Hello(Hello { version: 2 })) {
            Body::Hello(h) => assert_eq!(h.version, 2),
            other => panic!("{other:?}"),
        }
        c
    }

    pub fn send(&mut self, body: Ask) -> u64 {
        self.next += 1;
        let bytes = ClientFrame { id: self.next, body: Some(body) }.encode_to_vec();
        self.socket.write_all(&(bytes.len() as u32).to_be_bytes()).unwrap();
        self.socket.write_all(&bytes).unwrap();
        self.next
    }

    /// `None` at the end of the connection.
    pub fn recv(&mut self) -> Option<ServerFrame> {
        let mut head = [0u8; 4];
        self.socket.read_exact(&mut head).ok()?;
        let mut body = vec![0u8; u32::from_be_bytes(head) as usize];
        self.socket.read_exact(&mut body).ok()?;
        Some(ServerFrame::decode(&body[..]).expect("a server frame"))
    }

    pub fn wait(&mut self, id: u64) -> Body {
        if let Some(at) = self.stray.iter().position(|f| f.id == id) {
            return self.stray.remove(at).body.unwrap();
        }
        loop {
            let f = self.recv().expect("an answer");
            if f.id == id {
                return f.body.unwrap();
            }
            self.stray.push(f);
        }
    }

    pub fn call(&mut self, body: Ask) -> Body {
        let id = self.send(body);
        self.wait(id)
    }

    pub fn done(&mut self, body: Ask) {
        match self.call(body) {
            Body::Done(_) => {}
            other => panic!("{other:?}"),
        }
    }

    pub fn failure(&mut self, body: Ask) -> Failure {
        match self.call(body) {
            Body::Failure(f) => f,
            other => panic!("{other:?}"),
        }
    }

    pub fn state(&mut self) -> State {
        match self.call(Ask::GetState(GetState {})) {
            Body::State(s) => s,
            other => panic!("{other:?}"),
        }
    }

    pub fn container(&mut self, id: &str) -> ContainerState {
        self.state().containers.into_iter().find(|c| c.container_id == id).expect("the container")
    }

    pub fn start(&mut self, id: &str) {
        self.done(Ask::StartContainer(StartContainer { container_id: id.into() }));
    }

    pub fn signal(&mut self, id: &str, signal: u32) {
        self.done(Ask::SignalContainer(SignalContainer { container_id: id.into(), signal, all: false }));
    }

    pub fn delete(&mut self, id: &str) {
        self.done(Ask::DeleteContainer(DeleteContainer { container_id: id.into(), force: true }));
    }

    pub fn wait_exit(&mut self, id: &str) -> ContainerState {
        let mut last = None;
        wait_until(|| {
            let s = self.container(id);
            let done = s.phase == ContainerPhase::Exited as i32;
            last = Some(s);
            done
        });
        last.unwrap()
    }

    pub fn exec_sync(&mut self, id: &str, args: &[&str]) -> ExecDone {
        self.exec_with(Exec {
            container_id: id.into(),
            process: process(args, json!({})),
            ..Default::default()
        })
    }

    pub fn exec_with(&mut self, e: Exec) -> ExecDone {
        match self.call(Ask::Exec(e)) {
            Body::ExecDone(d) => d,
            other => panic!("{other:?}"),
        }
    }

    /// Everything until the stream's end: stdout, stderr, exit code.
    pub fn stream_to_end(&mut self) -> (Vec<u8>, Vec<u8>, i32) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        loop {
            match self.recv().expect("the stream ends with StreamEnded").body.unwrap() {
                Body::Stdout(b) => out.extend(b),
                Body::Stderr(b) => err.extend(b),
                Body::StreamEnded(e) => return (out, err, e.exit_code),
                Body::StreamStarted(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Output until it holds `text`.
    pub fn stream_until(&mut self, text: &str) -> String {
        let mut out = String::new();
        while !out.contains(text) {
            match self.recv().expect("more output").body.unwrap() {
                Body::Stdout(b) | Body::Stderr(b) => out.push_str(&String::from_utf8_lossy(&b)),
                Body::StreamStarted(_) => {}
                other => panic!("{other:?} after {out:?}"),
            }
        }
        out
    }
}

/// For what must come; a loaded machine takes its time.
const PATIENCE: Duration = Duration::from_secs(60);

#[track_caller]
pub fn wait_until(mut f: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !f() {
        assert!(Instant::now() < end, "not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// An OCI process as JSON.
pub fn process(args: &[&str], extra: Value) -> Vec<u8> {
    serde_json::to_vec(&process_value(args, extra)).unwrap()
}

fn process_value(args: &[&str], extra: Value) -> Value {
    let caps = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_KILL",
        "CAP_SETUID",
        "CAP_SETGID",
        "CAP_MKNOD"
    ]);
    let mut p = json!({
        "args": args, "cwd": "/", "env": ["PATH=/bin", "HOME=/"],
        "user": {"uid": 0, "gid": 0},
        "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
    });
    merge(&mut p, extra);
    p
}

fn merge(a: &mut Value, b: Value) {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            for (k, v) in b {
                merge(a.entry(k).or_insert(Value::Null), v);
            }
        }
        (a, b) => *a = b,
    }
}

/// Hooks as a device's vendor has them run while a container is created.
pub fn with_hooks() -> Value {
    let hook = json!([{"path": "/bin/busybox", "args": ["true"]}]);
    json!({"hooks": {"createRuntime": hook, "createContainer": hook}})
}

/// A monitor with its folder and a busybox root file system.
pub struct Pod {
    pub dir: PathBuf,
    pub name: String,
    /// Its containers have hooks.
    pub hooked: bool,
}

impl Pod {
    /// The folder without a monitor.
    pub fn prepare(test: &str) -> Pod {
        assert!(rustix::process::geteuid().is_root(), "these tests make containers: run them as root");
        assert!(Path::new("/bin/busybox").exists(), "install busybox-static");
        let name = format!("orlopmon-{test}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = PathBuf::from(format!("/tmp/{name}"));
        let bin = dir.join("rootfs/bin");
        fs::create_dir_all(&bin).unwrap();
        for d in ["proc", "dev", "tmp", "etc", "sys"] {
            fs::create_dir_all(dir.join("rootfs").join(d)).unwrap();
        }
        // Linked, since a copy for each test would be megabytes; another file system cannot link and copies.
        if fs::hard_link("/bin/busybox", bin.join("busybox")).is_err() {
            fs::copy("/bin/busybox", bin.join("busybox")).unwrap();
        }
        for a in [
            "sh", "sleep", "cat", "echo", "true", "false", "ls", "ps", "id", "hostname", "stty", "tty",
            "head", "dd", "kill", "env", "grep", "usleep", "wc", "yes", "seq", "sysctl", "ip", "mount", "tr",
            "touch", "pwd", "readlink",
        ] {
            std::os::unix::fs::symlink("busybox", bin.join(a)).unwrap();
        }
        Pod { dir, name, hooked: false }
    }

    pub fn new(test: &str) -> Pod {
        let pod = Pod::prepare(test);
        pod.spawn();
        pod
    }

    pub fn spawn(&self) {
        let out = self.run(&["--dir"]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }

    pub fn run(&self, args: &[&str]) -> Output {
        Command::new(MONITOR).args(args).arg(&self.dir).output().unwrap()
    }

    pub fn client(&self) -> Client {
        Client::new(&self.dir)
    }

    pub fn monitor_pid(&self) -> i32 {
        fs::read_to_string(self.dir.join("monitor.pid")).unwrap().trim().parse().unwrap()
    }

    pub fn cgroup(&self, id: &str) -> String {
        format!("/{}/{id}", self.name)
    }

    pub fn log_path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.log"))
    }

    /// The log's lines as (stream, tag, text).
    pub fn log(&self, id: &str) -> Vec<(String, String, String)> {
        parse_log(&self.log_path(id))
    }

    /// Writes a bundle and returns the request that creates it; `extra` is merged into the spec.
    pub fn bundle(&self, id: &str, args: &[&str], extra: Value) -> CreateContainer {
        let bundle = self.dir.join("b").join(id);
        fs::create_dir_all(&bundle).unwrap();
        let mut spec = json!({
            "ociVersion": "1.2.0",
            "process": process_value(args, json!({})),
            "root": {"path": self.dir.join("rootfs"), "readonly": false},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            ],
            "linux": {
                "cgroupsPath": self.cgroup(id),
                "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"}],
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            },
        });
        merge(&mut spec, extra);
        if self.hooked {
            merge(&mut spec, with_hooks());
        }
        fs::write(bundle.join("config.json"), serde_json::to_vec_pretty(&spec).unwrap()).unwrap();
        CreateContainer {
            container_id: id.into(),
            bundle: bundle.to_str().unwrap().into(),
            log_path: self.log_path(id).to_str().unwrap().into(),
            ..Default::default()
        }
    }

    pub fn create(&self, c: &mut Client, id: &str, args: &[&str], extra: Value) -> u32 {
        let r = self.bundle(id, args, extra);
        create(c, r)
    }

    pub fn create_started(&self, c: &mut Client, id: &str, args: &[&str]) -> u32 {
        let pid = self.create(c, id, args, json!({}));
        c.start(id);
        pid
    }

    /// Destroys by the protocol and checks that nothing is left.
    pub fn finish(&self) {
        let mut c = self.client();
        c.done(Ask::DestroySandbox(DestroySandbox {}));
        let pid = self.monitor_pid();
        c.done(Ask::Shutdown(Shutdown {}));
        wait_until(|| !Path::new(&format!("/proc/{pid}")).exists());
        self.assert_clean();
    }

    pub fn assert_clean(&self) {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let left: Vec<_> = mounts.lines().filter(|l| l.contains(&self.name)).collect();
        assert!(left.is_empty(), "mounts left: {left:?}");
        assert_eq!(cgroups_of(&self.name, false), Vec::<PathBuf>::new(), "cgroups left");
        assert!(!self.dir.join("monitor.sock").exists() && !self.dir.join("ns").exists());
        assert_eq!(fs::read_dir(self.dir.join("containers")).map_or(0, |d| d.count()), 0);
        assert!(processes_of(&self.dir).is_empty(), "processes left: {:?}", processes_of(&self.dir));
    }
}

/// Processes whose root or command line lies in `dir`.
pub fn processes_of(dir: &Path) -> Vec<(String, String)> {
    let mut out = Vec::new();
    for e in fs::read_dir("/proc").unwrap().flatten() {
        let root = fs::read_link(e.path().join("root")).unwrap_or_default();
        let cmd = fs::read(e.path().join("cmdline")).unwrap_or_default();
        let cmd = String::from_utf8_lossy(&cmd).replace('\0', " ");
        if root.starts_with(dir) || (cmd.contains(MONITOR) && cmd.contains(dir.to_str().unwrap())) {
            out.push((e.file_name().to_string_lossy().into_owned(), cmd));
        }
    }
    out
}

/// The pod's cgroup folders; the pod level itself (made on the way, owned by whoever named it) only with `all`.
pub fn cgroups_of(name: &str, all: bool) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for h in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let pod = h.path().join(name);
        if all && pod.exists() {
            out.push(pod.clone());
        }
        for c in fs::read_dir(pod).into_iter().flatten().flatten() {
            if c.path().is_dir() {
                out.push(c.path());
            }
        }
    }
    out
}

impl Drop for Pod {
    fn drop(&mut self) {
        if let Ok(pid) = fs::read_to_string(self.dir.join("monitor.pid")) {
            let pid: i32 = pid.trim().parse().unwrap();
            if let Some(pid) = rustix::process::Pid::from_raw(pid)
                && fs::read_to_string(format!("/proc/{}/cmdline", pid.as_raw_nonzero()))
                    .is_ok_and(|c| c.contains(&self.name))
            {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                let gone = Instant::now() + PATIENCE;
                while Instant::now() < gone && rustix::process::test_kill_process(pid).is_ok() {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        }
        let _ = self.run(&["--cleanup", "--dir"]);
        for c in cgroups_of(&self.name, false).into_iter().chain(cgroups_of(&self.name, true)) {
            let _ = fs::remove_dir(c);
        }
        if std::thread::panicking() {
            eprintln!(
                "monitor log: {}",
                fs::read_to_string(self.dir.join("monitor.log")).unwrap_or_default()
            );
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

pub fn create(c: &mut Client, r: CreateContainer) -> u32 {
    match c.call(Ask::CreateContainer(r)) {
        Body::ContainerCreated(r) => r.pid,
        other => panic!("{other:?}"),
    }
}

pub fn parse_log(path: &Path) -> Vec<(String, String, String)> {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.lines()
        .map(|l| {
            let mut p = l.splitn(4, ' ');
            let time = p.next().unwrap();
            assert!(time.len() == 30 && time.ends_with('Z'), "{l}");
            (p.next().unwrap().into(), p.next().unwrap().into(), p.next().unwrap().into())
        })
        .collect()
}
