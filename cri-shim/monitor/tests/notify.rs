//! System calls that somebody outside of the container answers (SCMP_ACT_NOTIFY).

mod common;

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use common::*;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use orlop_proto::monitor::{client_frame::Body as Ask, server_frame::Body, *};
use serde_json::{Value, json};

/// What the listener was told of one process.
struct Told {
    state: Value,
    /// The connection was closed after it.
    descriptors: usize,
}

/// Answers every mkdir with ENOMEDIUM and lets all else pass, for whoever hands over a descriptor.
struct Agent {
    path: PathBuf,
    told: Receiver<Told>,
}

impl Agent {
    fn new(pod: &Pod) -> Agent {
        let path = pod.dir.join("agent.sock");
        let listener = UnixListener::bind(&path).unwrap();
        // Nobody but the host's root may connect.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let (tell, told) = sync_channel(16);
        std::thread::spawn(move || {
            // One after the other, as simple agents do: whoever keeps a connection open holds up the next.
            for peer in listener.incoming().flatten() {
                serve(peer, &tell);
            }
        });
        Agent { path, told }
    }

    fn profile(&self, names: &[&str]) -> Value {
        json!({"linux": {"seccomp": {
            "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": self.path, "listenerMetadata": "of the test",
            "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"],
            "syscalls": [{"names": names, "action": "SCMP_ACT_NOTIFY"}]}}})
    }

    fn hear(&self) -> Value {
        let told = self.told.recv_timeout(Duration::from_secs(60)).expect("the listener is told");
        assert_eq!(told.descriptors, 1);
        told.state
    }
}

fn serve(peer: UnixStream, tell: &SyncSender<Told>) {
    let mut text = Vec::new();
    let mut descriptors = Vec::new();
    while let Some(mut more) = kernel::receive(&peer, &mut text) {
        descriptors.append(&mut more);
    }
    let state = serde_json::from_slice(&text).unwrap_or_default();
    if tell.send(Told { state, descriptors: descriptors.len() }).is_err() {
        return;
    }
    for d in descriptors {
        std::thread::spawn(move || answer(&d));
    }
}

/// Until the last process with that filter has ended.
fn answer(d: &OwnedFd) {
    loop {
        let mut ready = [PollFd::new(d.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::NONE) {
            Ok(_) if ready[0].revents().is_some_and(|r| r.contains(PollFlags::POLLIN)) => {}
            Err(nix::Error::EINTR) => continue,
            _ => return,
        }
        kernel::answer_one(d, |nr| {
            let folders = [
                libc::SYS_mkdirat,
                #[cfg(target_arch = "x86_64")]
                libc::SYS_mkdir,
            ];
            folders.contains(&nr).then_some(libc::ENOMEDIUM)
        });
    }
}

/// `unsafe` lives here.
mod kernel {
    use super::*;
    use std::io::IoSliceMut;
    use std::os::fd::{FromRawFd, RawFd};

    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

    /// Adds what comes to `text`; `None` at the end.
    pub fn receive(peer: &UnixStream, text: &mut Vec<u8>) -> Option<Vec<OwnedFd>> {
        let mut buf = [0u8; 4096];
        let mut space = nix::cmsg_space!([RawFd; 4]);
        let mut parts = [IoSliceMut::new(&mut buf)];
        let m =
            recvmsg::<()>(peer.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC).ok()?;
        let rights = m.cmsgs().ok()?.filter_map(|c| match c {
            ControlMessageOwned::ScmRights(fds) => Some(fds),
            _ => None,
        });
        // SAFETY: the kernel has just installed these for us.
        let fds = rights.flatten().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect();
        let n = m.bytes;
        text.extend_from_slice(&buf[..n]);
        (n > 0).then_some(fds)
    }

    /// Answers one call with what `decide` says of its number; without an error number it is made.
    pub fn answer_one(d: &OwnedFd, decide: impl Fn(i64) -> Option<i32>) {
        const CONTINUE: u32 = 1;
        // SAFETY: plain structs of integers, for which the kernel wants zeros; both outlive the calls and are of the kernel's size.
        unsafe {
            let mut call: libc::seccomp_notif = std::mem::zeroed();
            if libc::ioctl(d.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut call) != 0 {
                return;
            }
            let mut reply: libc::seccomp_notif_resp = std::mem::zeroed();
            reply.id = call.id;
            match decide(i64::from(call.data.nr)) {
                Some(errno) => reply.error = -errno,
                None => reply.flags = CONTINUE,
            }
            // Fails when the process has ended meanwhile.
            libc::ioctl(d.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut reply);
        }
    }
}

const FOLDERS: [&str; 2] = ["mkdir", "mkdirat"];
const MAKE: &str = "busybox mkdir /tmp/d$$ 2>&1; grep Seccomp: /proc/self/status";

fn nothing_is_left(pod: &Pod, c: &mut Client) {
    assert!(c.state().containers.is_empty());
    assert_eq!(cgroups_of(&pod.name, false), Vec::<PathBuf>::new());
    assert_eq!(fs::read_dir(pod.dir.join("oci")).unwrap().count(), 0, "state is left");
}

#[test]
fn a_listener_answers_for_containers_and_execs() {
    let pod = Pod::new("notify");
    let mut c = pod.client();
    let agent = Agent::new(&pod);
    for (id, nnp, user) in
        [("plain", false, 0), ("nnp", true, 0), ("user", false, 1000), ("both", true, 1000)]
    {
        let process = json!({"noNewPrivileges": nnp, "user": {"uid": user, "gid": user}});
        let mut extra = agent.profile(&FOLDERS);
        extra["process"] = process.clone();
        extra["annotations"] = json!({"a": "b"});
        let pid = pod.create(&mut c, id, &["sh", "-c", &format!("{MAKE}; exec sleep 100")], extra);
        // At its creation, as with runc.
        let told = agent.hear();
        let bundle = pod.dir.join("b").join(id);
        let state = json!({"ociVersion": told["ociVersion"], "id": id, "status": "creating", "pid": pid,
            "bundle": bundle, "annotations": {"a": "b"}});
        let version = told["ociVersion"].as_str().unwrap();
        assert!(version.starts_with("1."), "{told}");
        let want = json!({"ociVersion": version, "fds": ["seccompFd"], "pid": pid,
            "metadata": "of the test", "state": state});
        assert_eq!(told, want, "{id}");
        c.start(id);
        wait_until(|| pod.log(id).len() == 2);
        let lines: Vec<String> = pod.log(id).into_iter().map(|l| l.2).collect();
        assert!(lines[0].contains("No medium found") && lines[1] == "Seccomp:\t2", "{id}: {lines:?}");
        let request = Exec {
            container_id: id.into(),
            process: common::process(&["sh", "-c", MAKE], process),
            ..Default::default()
        };
        let done = c.exec_with(request);
        let out = String::from_utf8_lossy(&done.stdout).into_owned();
        assert!(out.contains("No medium found") && out.contains("Seccomp:\t2"), "{id}: {out}");
        let told = agent.hear();
        let of = &told["state"];
        assert_eq!((&of["status"], &of["pid"], &of["id"]), (&json!("running"), &json!(pid), &json!(id)));
        let own = told["pid"].as_i64().unwrap();
        assert!(own > 1 && own != i64::from(pid), "{told}");
        assert_eq!(told["fds"], json!(["seccompFd"]));
        c.delete(id);
        nothing_is_left(&pod, &mut c);
    }
    pod.finish();
}

/// The process must not wait for an answer before anybody can give one, whichever calls a profile names. A terminal and hooks take
/// the same way as without.
#[test]
fn calls_that_the_runtime_makes_itself_may_be_answered() {
    let pod = Pod::new("notify-own");
    let mut c = pod.client();
    let agent = Agent::new(&pod);
    let own = ["write", "read", "close", "sendmsg", "execve", "openat", "rt_sigaction", "capset", "prctl"];
    for (id, nnp) in [("a", false), ("b", true)] {
        let mut extra = agent.profile(&own);
        extra["process"] = json!({"noNewPrivileges": nnp});
        extra["hooks"] = with_hooks()["hooks"].clone();
        let pid = pod.create(&mut c, id, &["sh", "-c", "echo here; exec sleep 100"], extra);
        assert_eq!(agent.hear()["pid"], json!(pid));
        c.start(id);
        wait_until(|| pod.log(id).len() == 1);
        let request = Exec {
            container_id: id.into(),
            process: process(&["sh", "-c", "tty; echo there"], json!({"terminal": true})),
            tty: true,
            ..Default::default()
        };
        let out = c.exec_with(request).stdout;
        assert!(String::from_utf8_lossy(&out).contains("there"), "{out:?}");
        agent.hear();
        c.delete(id);
    }
    pod.finish();
}

/// The helper has the host's rights for the listener, the process those of a user namespace for its filter.
#[test]
fn in_a_user_namespace() {
    let pod = Pod::new("notify-user");
    let mut c = pod.client();
    let agent = Agent::new(&pod);
    let map = || vec![IdMap { container_id: 0, host_id: 700_000, size: 65536 }];
    let sandbox =
        CreateSandbox { new_net: true, new_ipc: true, uid_map: map(), gid_map: map(), ..Default::default() };
    match c.call(Ask::CreateSandbox(sandbox)) {
        Body::SandboxCreated(_) => {}
        other => panic!("{other:?}"),
    }
    let mut extra = agent.profile(&FOLDERS);
    let mapping = json!([{"containerID": 0, "hostID": 700_000, "size": 65536}]);
    extra["linux"]["uidMappings"] = mapping.clone();
    extra["linux"]["gidMappings"] = mapping;
    let joined = |kind: &str, name: &str| json!({"type": kind, "path": pod.dir.join("ns").join(name)});
    extra["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "pid"}, {"type": "uts"},
        joined("user", "user"), joined("network", "net"), joined("ipc", "ipc")]);
    let pid = pod.create(&mut c, "a", &["sh", "-c", &format!("{MAKE}; exec sleep 100")], extra);
    assert_eq!(agent.hear()["pid"], json!(pid));
    c.start("a");
    wait_until(|| pod.log("a").len() == 2);
    assert!(pod.log("a")[0].2.contains("No medium found"), "{:?}", pod.log("a"));
    let out = c.exec_sync("a", &["sh", "-c", MAKE]).stdout;
    assert!(String::from_utf8_lossy(&out).contains("No medium found"), "{out:?}");
    agent.hear();
    pod.finish();
}

#[test]
fn without_a_listener_nothing_begins() {
    let pod = Pod::new("notify-none");
    let mut c = pod.client();
    let failure = |c: &mut Client, pod: &Pod, profile: Value| {
        let f = c.failure(Ask::CreateContainer(pod.bundle("a", &["true"], profile)));
        assert_eq!(f.stage, "seccomp", "{f:?}");
        assert_eq!(cgroups_of(&pod.name, false), Vec::<PathBuf>::new());
        nothing_is_left(pod, c);
        f
    };
    let agent = Agent::new(&pod);
    let mut without = agent.profile(&FOLDERS);
    without["linux"]["seccomp"]["listenerPath"] = Value::Null;
    assert_eq!(failure(&mut c, &pod, without).kind, FailureKind::Invalid as i32);
    assert_eq!(failure(&mut c, &pod, agent.profile(&["sendmmsg"])).kind, FailureKind::Invalid as i32);
    let at = |path: &Path| {
        let mut p = agent.profile(&FOLDERS);
        p["linux"]["seccomp"]["listenerPath"] = json!(path);
        p
    };
    let f = failure(&mut c, &pod, at(&pod.dir.join("none.sock")));
    assert!(f.errno == libc::ENOENT && f.message.contains("none.sock"), "{f:?}");
    let left = pod.dir.join("left.sock");
    drop(UnixListener::bind(&left).unwrap());
    assert_eq!(failure(&mut c, &pod, at(&left)).errno, libc::ECONNREFUSED);
    // A failure after the connection ends it without a word.
    let mut broken = agent.profile(&FOLDERS);
    broken["process"] = json!({"cwd": "/bin/busybox"});
    let f = c.failure(Ask::CreateContainer(pod.bundle("a", &["true"], broken)));
    assert_eq!((f.stage.as_str(), f.errno), ("cwd", libc::ENOTDIR), "{f:?}");
    let told = agent.told.recv_timeout(Duration::from_secs(60)).expect("the end of the connection");
    assert_eq!((told.descriptors, told.state), (0, Value::Null));
    nothing_is_left(&pod, &mut c);
    // A profile that kills for what it does not name: the first process's end is told.
    let mut kills = agent.profile(&FOLDERS);
    kills["linux"]["seccomp"]["defaultAction"] = json!("SCMP_ACT_KILL_PROCESS");
    let f = c.failure(Ask::CreateContainer(pod.bundle("a", &["true"], kills)));
    assert!(f.message.contains("died"), "{f:?}");
    nothing_is_left(&pod, &mut c);
    // The listener goes while the container runs: no process begins in it that nobody answers.
    let pid = pod.create(&mut c, "b", &["sleep", "100"], agent.profile(&FOLDERS));
    c.start("b");
    fs::remove_file(&agent.path).unwrap();
    let request =
        Exec { container_id: "b".into(), process: process(&["true"], json!({})), ..Default::default() };
    match c.call(Ask::Exec(request)) {
        Body::Failure(f) => assert_eq!((f.stage.as_str(), f.errno), ("seccomp", libc::ENOENT), "{f:?}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(c.container("b").pid, pid);
    let only = format!("{pid}\n");
    let alone = |g: &PathBuf| fs::read_to_string(g.join("cgroup.procs")).is_ok_and(|p| p == only);
    wait_until(|| cgroups_of(&pod.name, false).iter().all(alone));
    pod.finish();
}
