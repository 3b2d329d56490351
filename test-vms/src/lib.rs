//! A cluster of its own for each test: every folder, address, port and cgroup differs, so that tests run beside each other
//! and beside a real installation. Dropping it takes everything back, also when the test fails.

pub mod footprint;
pub mod place;
pub mod vm;

use std::fs::File;
use std::io::Read;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// What the busybox of [`Cluster::busybox`] is linked as.
const APPLETS: &str = "sh cat echo sleep ls tar wget nslookup id env kill usleep date true false mkdir test printf stty \
                       hostname nc seq touch stat chown";

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned).unwrap_or_default()
}

/// A program of `make build`, or of the folder that ORLOP_PROGRAMS names.
pub fn program(name: &str) -> PathBuf {
    let dir = std::env::var_os("ORLOP_PROGRAMS").map_or_else(|| root().join("target/release"), PathBuf::from);
    let path = dir.join(name);
    assert!(path.exists(), "{} is missing; run `make build` first", path.display());
    path
}

/// Polls until `check` gives a value; panics with `what` after `limit`.
pub fn wait_for<T>(what: &str, limit: Duration, mut check: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(v) = check() {
            return v;
        }
        assert!(start.elapsed() < limit, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The body of an HTTP answer, or nothing when nobody answers.
pub fn http_get(address: &str) -> Option<String> {
    use std::io::Write;
    let target = address.parse().ok()?;
    let mut s = TcpStream::connect_timeout(&target, Duration::from_secs(1)).ok()?;
    s.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
    s.write_all(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n").ok()?;
    let mut text = String::new();
    s.read_to_string(&mut text).ok()?;
    text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned())
}

/// Makes an archive in `dir` of the image `name` with busybox's usual commands, which runs `command`.
pub fn busybox_archive(dir: &Path, name: &str, command: &[&str]) -> PathBuf {
    let stem = name.replace(['/', ':'], "-");
    let rootfs = dir.join(&stem);
    for d in ["bin", "tmp", "etc"] {
        std::fs::create_dir_all(rootfs.join(d)).expect("a folder");
    }
    std::fs::copy("/bin/busybox", rootfs.join("bin/busybox")).expect("busybox-static is installed");
    for applet in APPLETS.split(' ') {
        std::fs::hard_link(rootfs.join("bin/busybox"), rootfs.join("bin").join(applet)).expect("a hard link");
    }
    let archive = dir.join(format!("{stem}.tar"));
    let mut build = Command::new(program("orlop"));
    build.args(["image", "build"]).arg(&rootfs).arg("--output").arg(&archive);
    build.args(["--tag", name, "--env", "PATH=/bin"]);
    run(build.args(command.iter().flat_map(|word| ["--cmd", word])));
    archive
}

/// One `orlop up` with everything below a temporary folder.
pub struct Cluster {
    dir: tempfile::TempDir,
    number: u16,
    cgroup: String,
    args: Vec<String>,
    child: Option<Child>,
    down: bool,
}

impl Cluster {
    /// Prepares cluster `number` (0 to 99; each test has its own) with the demo's image in its store.
    pub fn prepare(number: u16) -> Cluster {
        let dir = tempfile::Builder::new().prefix("orl").tempdir_in("/tmp").expect("a folder in /tmp");
        let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
        // What several runs of the tests on one machine share differs by more than the number.
        let name = dir.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        let cgroup = format!("/orlop-test-{}", name.trim_start_matches('.'));
        let pairs = [
            ("--data-dir", at("data")),
            ("--write-kubeconfig", at("etc/admin.kubeconfig")),
            ("--listen", format!("0.0.0.0:{}", 17000 + number)),
            ("--service-cidr", format!("10.{}.0.0/16", 100 + number)),
            ("--cluster-cidr", format!("10.{}.0.0/16", 150 + number)),
            ("--node-name", format!("node{number}")),
            ("--run-dir", at("run")),
            ("--kubelet-dir", at("kubelet")),
            ("--pod-logs-dir", at("pods")),
            ("--container-logs-dir", at("containers")),
            ("--static-pod-dir", at("manifests")),
            ("--cni-conf-dir", at("cni")),
            ("--nri-socket", at("nri.sock")),
            ("--cgroup-root", cgroup.clone()),
            ("--config", at("kubelet.yaml")),
            ("--kubelet-port", (18000 + number).to_string()),
            ("--proxy-health-address", "none".into()),
            ("--proxy-metrics-address", "none".into()),
            ("--bpf-dir", format!("/sys/fs/bpf{cgroup}")),
            ("--dns-address", format!("169.254.21.{}", 10 + number)),
            ("--dns-link", format!("orl-dns{number}")),
        ];
        // A nearly full disk of the test machine is not what these tests are about.
        std::fs::write(
            dir.path().join("kubelet.yaml"),
            "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nevictionHard: {}\n\
             imageGCHighThresholdPercent: 100\n",
        )
        .expect("a kubelet configuration");
        let args = pairs.into_iter().flat_map(|(k, v)| [k.to_owned(), v]).collect();
        let c = Cluster { dir, number, cgroup, args, child: None, down: false };
        let image = root().join("target/demo/demo-web.tar");
        assert!(
            image.exists(),
            "{} is missing; run scripts/demo-image.sh target/demo/demo-web.tar",
            image.display()
        );
        c.import(&image);
        c
    }

    /// [`Cluster::prepare`] and start; returns when the node is Ready.
    pub fn start(number: u16) -> Cluster {
        let mut c = Cluster::prepare(number);
        c.up();
        c.wait_ready();
        c
    }

    /// More of the command line of `orlop up` and `orlop down`.
    pub fn add_args(&mut self, args: &[&str]) {
        self.args.extend(args.iter().map(|a| (*a).to_owned()));
    }

    /// The cgroup of all its pods.
    pub fn cgroup(&self) -> &str {
        &self.cgroup
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// An address of this cluster's Service range.
    pub fn service_ip(&self, last: u8) -> String {
        format!("10.{}.0.{last}", 100 + self.number)
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.path("etc/admin.kubeconfig")
    }

    pub fn cri_endpoint(&self) -> String {
        format!("unix://{}", self.path("run/cri.sock").display())
    }

    pub fn log(&self) -> PathBuf {
        self.path("up.log")
    }

    /// [`busybox_archive`] in the cluster's folder.
    pub fn busybox(&self, name: &str, command: &[&str]) -> PathBuf {
        busybox_archive(self.dir.path(), name, command)
    }

    /// Puts an image archive into the store; the cluster must not run.
    pub fn import(&self, archive: &Path) {
        let images = self.path("data/images");
        run(Command::new(program("orlop"))
            .args(["image", "import"])
            .arg(archive)
            .arg("--images-dir")
            .arg(images));
    }

    /// The command line of `orlop up` or `orlop down`.
    pub fn command(&self, role: &str) -> Command {
        let mut c = Command::new(program("orlop"));
        c.arg(role).args(&self.args).arg("--log-file").arg(self.log());
        c
    }

    /// Starts the daemon.
    pub fn up(&mut self) {
        let log = File::options().create(true).append(true).open(self.log()).expect("the log file");
        let mut c = self.command("up");
        c.stdin(Stdio::null()).stdout(log.try_clone().expect("a file handle")).stderr(log);
        self.child = Some(c.spawn().expect("orlop starts"));
    }

    /// The daemon's process id.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map(Child::id).expect("the daemon runs")
    }

    /// SIGKILL, as a crash would.
    pub fn kill(&mut self) {
        if let Some(mut c) = self.child.take() {
            c.kill().expect("SIGKILL");
            c.wait().expect("the killed daemon is reaped");
        }
    }

    pub fn wait_ready(&mut self) {
        wait_for("the node is Ready", Duration::from_secs(60), || {
            if let Some(status) = self.child.as_mut().and_then(|c| c.try_wait().ok().flatten()) {
                panic!("orlop up ended ({status}):\n{}", self.tail());
            }
            let path = "jsonpath={.items[*].status.conditions[?(@.type==\"Ready\")].status}";
            let out = self.kubectl_output(&["get", "nodes", "-o", path]);
            (String::from_utf8_lossy(&out.stdout) == "True").then_some(())
        });
    }

    /// The end of the daemon's log.
    pub fn tail(&self) -> String {
        let text = std::fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    pub fn kubectl_command(&self) -> Command {
        let mut c = Command::new("kubectl");
        c.env("KUBECONFIG", self.kubeconfig()).env("HOME", self.dir.path());
        c
    }

    pub fn kubectl_output(&self, args: &[&str]) -> Output {
        self.kubectl_command()
            .args(args)
            .stdin(Stdio::null())
            .output()
            .expect("kubectl is on PATH (scripts/deps.sh test builds it from its Go module when it is not)")
    }

    /// Runs kubectl, which must succeed; returns its standard output.
    pub fn kubectl(&self, args: &[&str]) -> String {
        let out = self.kubectl_output(args);
        assert!(
            out.status.success(),
            "kubectl {args:?}: {}{}\n--- orlop's log:\n{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr),
            self.tail()
        );
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    /// Runs kubectl, which must fail; returns what it says.
    pub fn kubectl_fails(&self, args: &[&str]) -> String {
        let out = self.kubectl_output(args);
        assert!(!out.status.success(), "kubectl {args:?} should have failed");
        String::from_utf8_lossy(&out.stderr).into_owned()
    }

    /// `kubectl apply` of a manifest's text.
    pub fn apply(&self, manifest: &str) {
        let path = self.path("apply.yaml");
        std::fs::write(&path, manifest).expect("a manifest file");
        self.kubectl(&["apply", "-f", &path.to_string_lossy()]);
    }

    pub fn crictl(&self, args: &[&str]) -> String {
        run(Command::new("crictl").args(["-r", &self.cri_endpoint(), "-i", &self.cri_endpoint()]).args(args))
    }

    /// `orlop down`, which must succeed.
    pub fn take_down(&mut self) {
        self.down = true;
        let out = self.command("down").output().expect("orlop down starts");
        if let Some(mut c) = self.child.take() {
            c.wait().expect("the stopped daemon is reaped");
        }
        assert!(out.status.success(), "orlop down: {}", String::from_utf8_lossy(&out.stderr));
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !self.down {
            // The test has failed or is done: take back what can be taken back.
            if std::thread::panicking() {
                eprintln!("--- orlop's log:\n{}", self.tail());
            }
            let _ = self.command("down").output();
            if let Some(mut c) = self.child.take() {
                let _ = c.kill();
                let _ = c.wait();
            }
        }
    }
}

/// Runs a start that must fail; returns the line on standard error that says why.
pub fn refusal(command: &mut Command) -> String {
    let out = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success(), "{command:?} should have failed: {said}");
    let line = said.lines().last().unwrap_or_default().to_owned();
    assert!(line.starts_with("orlop: ") && !said.contains("panicked"), "{said}");
    line
}

/// Runs a command that must succeed; returns its standard output.
pub fn run(command: &mut Command) -> String {
    let out = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(
        out.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8_lossy(&out.stdout).into_owned()
}
