//! `make up`, `make down` and `make purge` as a user runs them, with the folders, addresses and ports that they have by
//! default. Only `make build` is left out, which the gate has done.

use std::collections::BTreeSet;
use std::fs::File;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use orlop_test_vms::footprint::Footprint;
use orlop_test_vms::{program, root, run, wait_for};
use serde_json::Value;

const DATA: &str = "/var/lib/orlop";
const RUN: &str = "/run/orlop";
/// What takes root's rights from a command.
const AS_NOBODY: [&str; 4] = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];

/// This machine, for one test at a time; dropping it takes back what a failed test has left.
struct Machine {
    before: Footprint,
    /// Where the scripts put temporary files.
    tmp: tempfile::TempDir,
    _turn: File,
}

impl Machine {
    fn take() -> Machine {
        let turn = File::create("/tmp/orlop-make-test.lock").unwrap();
        turn.lock().unwrap();
        for there in [DATA, RUN, "/etc/orlop", "/var/log/orlop.log"] {
            assert!(
                !Path::new(there).exists(),
                "{there} exists: this test needs the default folders for itself; save what you need, then `make purge`"
            );
        }
        Machine { before: Footprint::take(), tmp: tempfile::tempdir().unwrap(), _turn: turn }
    }

    /// A command in the repository with the environment of a user's shell.
    fn command(&self, line: &[&str]) -> Command {
        let mut c = Command::new(line[0]);
        c.args(&line[1..]).current_dir(root()).stdin(Stdio::null());
        c.env("ORLOP_PROGRAMS", program("orlop").parent().unwrap()).env("TMPDIR", self.tmp.path());
        for (name, _) in std::env::vars() {
            if ["CARGO_", "RUST", "MAKE", "LD_"].iter().any(|p| name.starts_with(p)) && name != "CARGO_HOME" {
                c.env_remove(name);
            }
        }
        c
    }

    fn run(&self, line: &[&str]) -> Output {
        self.command(line).output().unwrap_or_else(|e| panic!("{line:?}: {e}"))
    }

    /// Runs make, which must succeed in silence on standard error; returns what it prints.
    fn make(&self, goal: &str) -> String {
        let out = self.run(&["make", "--old-file=build", goal]);
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        let errors = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "make {goal}: {said}{errors}\n--- orlop's log:\n{}", log());
        assert!(errors.is_empty(), "make {goal}: {errors}");
        said
    }

    /// Runs a command that must fail with one line; returns the line.
    fn refusal(&self, line: &[&str]) -> String {
        let out = self.run(line);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(
            !out.status.success(),
            "{line:?} should have failed: {}",
            String::from_utf8_lossy(&out.stdout)
        );
        assert_eq!(said.lines().count(), 1, "{line:?}: {said}");
        said
    }

    /// Nothing has come to this machine since the test began but, perhaps, the data folder.
    fn is_as_before(&self, when: &str) {
        let mut left = Vec::new();
        // The kernel frees BPF objects a little after their last user is gone.
        for _ in 0..50 {
            left = self.before.left_by(&Footprint::take());
            if left.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        let tmp: Vec<_> = std::fs::read_dir(self.tmp.path()).unwrap().flatten().map(|e| e.path()).collect();
        assert!(left.is_empty() && tmp.is_empty(), "{when} there is {tmp:?}\n{}", left.join("\n"));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if Path::new(RUN).exists() || Path::new(DATA).exists() {
            let _ = self.run(&["make", "purge"]);
            let _ = std::fs::remove_file(DATA);
        }
    }
}

fn log() -> String {
    let text = std::fs::read_to_string("/var/log/orlop.log").unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

fn daemon() -> u32 {
    std::fs::read_to_string("/run/orlop/up/pid").unwrap().trim().parse().unwrap()
}

/// Processes that run `orlop up` with the default run folder.
fn daemons() -> Vec<String> {
    let now = Footprint::take().processes.into_iter();
    now.filter(|p| p.contains("orlop up") && p.contains(DATA)).collect()
}

/// What `make up` says about how to go on.
struct Hints {
    kubeconfig: String,
    urls: Vec<String>,
}

impl Hints {
    fn read(said: &str) -> Hints {
        let lines = || said.lines().map(str::trim);
        let kubeconfig = lines().find_map(|l| l.strip_prefix("export KUBECONFIG=")).expect(said).to_owned();
        let urls = lines().filter_map(|l| l.strip_prefix("curl ")?.split(' ').next().map(str::to_owned));
        let urls: Vec<String> = urls.collect();
        assert_eq!(urls.len(), 2, "the Service's address and the node port: {said}");
        assert!(lines().any(|l| l.starts_with("make down")), "{said}");
        Hints { kubeconfig, urls }
    }

    fn kubectl(&self, args: &[&str]) -> Value {
        let text =
            run(Command::new("kubectl").env("KUBECONFIG", &self.kubeconfig).args(args).args(["-o", "json"]));
        serde_json::from_str(&text).unwrap()
    }

    /// The demo's ready pods: name, and what tells a container from its successor.
    fn pods(&self) -> BTreeSet<(String, String)> {
        let list = self.kubectl(&["-n", "demo", "get", "pods"]);
        let ready = list["items"].as_array().unwrap().iter().filter_map(|p| {
            let status = &p["status"]["containerStatuses"][0];
            let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
            (status["ready"] == true).then(|| (text(&p["metadata"]["name"]), text(&status["containerID"])))
        });
        ready.collect()
    }

    fn node_is_ready(&self) -> bool {
        let list = self.kubectl(&["get", "nodes"]);
        let nodes = list["items"].as_array().unwrap();
        let ready = |c: &Value| c["type"] == "Ready" && c["status"] == "True";
        nodes.len() == 1 && nodes[0]["status"]["conditions"].as_array().unwrap().iter().any(ready)
    }

    /// Both replicas answer at both addresses.
    fn both_answer(&self) {
        let names: BTreeSet<String> = self.pods().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), 2, "{names:?}");
        for url in &self.urls {
            wait_for(&format!("{url} reaches both replicas"), Duration::from_secs(20), || {
                let ask = || run(Command::new("curl").args(["--silent", "--fail", "--max-time", "5", url]));
                let seen = (0..30).filter_map(|_| ask().split_whitespace().next().map(str::to_owned));
                (seen.collect::<BTreeSet<_>>() == names).then_some(())
            });
        }
    }
}

/// These lines are there, in this order.
fn in_order(said: &str, wanted: &[&str]) {
    let mut lines = said.lines();
    for want in wanted {
        assert!(lines.any(|l| l.contains(want)), "{want:?} is missing or out of order in:\n{said}");
    }
}

#[test]
fn up_down_and_purge() {
    let m = Machine::take();
    let said = m.make("up");
    in_order(
        &said,
        &[
            "up: building the demo's image",
            "up: importing",
            "up: starting",
            "orlop: waiting for: API server",
            "is Ready",
            "orlop: ready",
            "up: the demo answers: web-",
            "export KUBECONFIG=",
        ],
    );
    let hints = Hints::read(&said);
    assert!(hints.node_is_ready(), "{said}");
    hints.both_answer();
    let (pid, pods) = (daemon(), hints.pods());

    let again = m.make("up");
    assert!(again.starts_with(&format!("up: it runs already (process {pid})")), "{again}");
    assert_eq!(Hints::read(&again).urls, hints.urls);
    assert_eq!((daemon(), daemons().len()), (pid, 1), "{:?}", daemons());

    without_programs_nothing_is_touched(&m, pid);
    a_crash_is_gone_on_from(&m, &hints, &pods);
    a_failed_start_spares_what_was_there(&m, &hints, &pods);

    let down = m.make("down");
    assert!(down.contains("down: stopped; /var/lib/orlop is kept"), "{down}");
    assert!(Path::new(DATA).exists(), "the data folder is kept");
    m.is_as_before("after make down");
    let down = m.make("down");
    assert!(down.contains("down: nothing ran"), "{down}");
    m.is_as_before("after a second make down");

    // From the kept data folder the same cluster comes back, with the pods that it remembers.
    let hints = Hints::read(&m.make("up"));
    hints.both_answer();
    let names = |p: &BTreeSet<(String, String)>| p.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&hints.pods()), names(&pods));

    let purged = m.make("purge");
    in_order(&purged, &["down: stopped", "purge: /var/lib/orlop is deleted"]);
    assert!(!Path::new(DATA).exists());
    m.is_as_before("after make purge");
    assert_eq!(m.make("down"), "down: nothing runs\n");
    assert!(!Path::new(DATA).exists(), "a second make down makes nothing");
}

fn without_programs_nothing_is_touched(m: &Machine, pid: u32) {
    let none = tempfile::tempdir().unwrap();
    for script in ["scripts/down.sh", "scripts/up.sh"] {
        let out = m.command(&[script]).env("ORLOP_PROGRAMS", none.path()).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && said.lines().count() == 1 && said.contains("make build"), "{said}");
    }
    assert_eq!((daemon(), daemons().len()), (pid, 1));
}

fn kill_daemon() {
    let pid = daemon();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    // Its command line is gone before its locks and sockets are.
    let gone = || (!Path::new(&format!("/proc/{pid}")).exists()).then_some(());
    wait_for("the daemon is gone", Duration::from_secs(10), gone);
    assert!(daemons().is_empty());
}

fn a_crash_is_gone_on_from(m: &Machine, hints: &Hints, pods: &BTreeSet<(String, String)>) {
    kill_daemon();
    let said = m.make("up");
    assert!(!said.contains("runs already"), "a killed daemon's lock and pid file hold nobody up: {said}");
    assert_eq!(&hints.pods(), pods, "the same pods with the same containers");
    hints.both_answer();
}

fn a_failed_start_spares_what_was_there(m: &Machine, hints: &Hints, pods: &BTreeSet<(String, String)>) {
    kill_daemon();
    let taken = TcpListener::bind("0.0.0.0:6443").unwrap();
    let line = m.refusal(&["scripts/up.sh"]);
    assert!(line.contains("6443"), "{line}");
    drop(taken);
    m.make("up");
    assert_eq!(&hints.pods(), pods, "the pods of the killed daemon outlive a start that failed");
}

#[test]
fn a_taken_port_leaves_nothing() {
    let m = Machine::take();
    // API server, kubelet, health of the proxy.
    for port in [6443, 10250, 10256] {
        let taken = TcpListener::bind(("0.0.0.0", port)).unwrap();
        let line = m.refusal(&["scripts/up.sh"]);
        assert!(line.contains(&port.to_string()), "{line}");
        drop(taken);
        m.is_as_before(&format!("after a start without port {port}"));
        assert!(!Path::new(DATA).exists(), "half-made");
    }
    // No image either, when there is no room for it.
    std::fs::write(DATA, "a file").unwrap();
    let line = m.refusal(&["scripts/up.sh"]);
    let kept = std::fs::read_to_string(DATA);
    std::fs::remove_file(DATA).unwrap();
    assert!(line.contains(DATA) && kept.is_ok_and(|k| k == "a file"), "{line}");
    m.is_as_before("after a start without a data folder");
}

#[test]
fn without_root() {
    let m = Machine::take();
    for script in ["up", "down", "deps", "bench", "test"] {
        let path = format!("scripts/{script}.sh");
        let line = m.refusal(&[&AS_NOBODY[..], &[&path]].concat());
        assert!(line.starts_with(&format!("{script}: not root")), "{line}");
    }
    m.is_as_before("without root");
}

#[test]
fn without_programs() {
    let m = Machine::take();
    let none = tempfile::tempdir().unwrap();
    let script = |name: &str| m.command(&[name]).env("ORLOP_PROGRAMS", none.path()).output().unwrap();
    let down = script("scripts/down.sh");
    assert!(down.status.success(), "{down:?}");
    assert_eq!(String::from_utf8_lossy(&down.stdout), "down: nothing runs\n");
    let up = script("scripts/up.sh");
    let said = String::from_utf8_lossy(&up.stderr).into_owned();
    assert!(!up.status.success() && said.contains("orlop is missing; run make build"), "{said}");
    assert!(!Path::new(DATA).exists(), "half-made");
}

#[test]
fn up_installs_and_builds_first() {
    let out = Command::new("make").args(["--dry-run", "up"]).current_dir(root()).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    in_order(&said, &["scripts/deps.sh build", "scripts/build.sh", "scripts/up.sh"]);
}
