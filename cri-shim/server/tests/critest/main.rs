//! Kubernetes' own suite for CRI runtimes (critest of cri-tools 1.36) against this server: every spec must pass but those that
//! docs/conformance.md names. Needs root, critest and ginkgo (`scripts/deps.sh test` builds them), docker-registry, skopeo,
//! busybox-static and a C compiler.

mod images;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use images::Registry;
use orlop_base::testkit::{built_program, free_network, unique_name};
use serde_json::{Value, json};

/// The digest that is compiled into critest; the image behind it cannot be had here, ours takes its place.
const THEIR_DIGEST: &str = "9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf";

/// A program on PATH.
fn tool(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    dirs.push("/var/cache/orlop-tools".into());
    let found = dirs.iter().map(|d| d.join(name)).find(|p| p.exists());
    found.unwrap_or_else(|| panic!("{name} is not on PATH: run scripts/deps.sh test"))
}

struct Setup {
    dir: PathBuf,
    server: Option<Child>,
    _registry: Registry,
}

impl Setup {
    fn start() -> Setup {
        assert!(nix::unistd::geteuid().is_root(), "run this test as root");
        let dir = PathBuf::from("/tmp").join(unique_name("critest-"));
        for d in ["cni-conf", "cni-bin", "certs.d", "tmp"] {
            fs::create_dir_all(dir.join(d)).unwrap();
        }
        let registry = Registry::start(&dir);
        registry.write_certs(&dir.join("certs.d"));
        let digest = images::make(&dir, &registry);
        let mut setup = Setup { dir, server: None, _registry: registry };
        setup.patch(&digest);
        setup.network();
        setup.serve();
        setup
    }

    /// A copy of critest that knows the digest of our image.
    fn patch(&self, digest: &str) {
        let mut bytes = fs::read(tool("critest")).unwrap();
        let ours = digest.strip_prefix("sha256:").unwrap().as_bytes();
        let places: Vec<usize> = bytes
            .windows(THEIR_DIGEST.len())
            .enumerate()
            .filter_map(|(i, w)| (w == THEIR_DIGEST.as_bytes()).then_some(i))
            .collect();
        assert!(!places.is_empty(), "this critest names another image by digest");
        for at in places {
            bytes[at..at + ours.len()].copy_from_slice(ours);
        }
        let mut file = fs::File::create(self.dir.join("critest")).unwrap();
        file.write_all(&bytes).unwrap();
        file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }

    fn network(&self) {
        let plugin =
            built_program("orlop-cni", "ORLOP_CNI", "run `cargo build -p orlop-cni` or set ORLOP_CNI");
        let bin = self.dir.join("cni-bin");
        fs::copy(plugin, bin.join("orlop-cni")).unwrap();
        let conf = json!({
            "cniVersion": "1.0.0",
            "name": "critest",
            "plugins": [{
                "type": "orlop-cni",
                "capabilities": { "portMappings": true },
                "ipam": { "ranges": [free_network()], "dataDir": self.dir.join("ipam") },
            }],
        });
        fs::write(self.dir.join("cni-conf/10-critest.conflist"), conf.to_string()).unwrap();
    }

    fn command(&self) -> Command {
        let monitor = built_program(
            "orlop-monitor",
            "ORLOP_MONITOR",
            "run `cargo build -p orlop-monitor` or set ORLOP_MONITOR",
        );
        let server =
            built_program("examples/cri", "ORLOP_CRI_EXAMPLE", "run `cargo build -p orlop-cri --examples`");
        let mut command = Command::new(server);
        for (flag, value) in [
            ("--root", self.dir.join("node")),
            ("--monitor", monitor),
            ("--cni-conf", self.dir.join("cni-conf")),
            ("--cni-bin", self.dir.join("cni-bin")),
            ("--certs-dir", self.dir.join("certs.d")),
            ("--cgroup-parent", Path::new("/").join(self.dir.file_name().unwrap())),
        ] {
            command.arg(flag).arg(value);
        }
        command
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("node/cri.sock")
    }

    fn serve(&mut self) {
        let log = fs::File::create(self.dir.join("server.log")).unwrap();
        self.server = Some(self.command().stdout(Stdio::null()).stderr(log).spawn().unwrap());
        let start = Instant::now();
        while std::os::unix::net::UnixStream::connect(self.socket()).is_err() {
            assert!(start.elapsed() < Duration::from_secs(20), "the server does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs the suite; gives every spec's state with why it was skipped or failed.
    fn suite(&self, name: &str, args: &[&str]) -> BTreeMap<String, (String, String)> {
        let report = self.dir.join(format!("{name}.json"));
        let log = fs::File::create(self.dir.join(format!("{name}.log"))).unwrap();
        let path = std::env::var("PATH").unwrap_or_default();
        let ginkgo = tool("ginkgo");
        // Its exit status says no more than the report.
        let _ = Command::new(self.dir.join("critest"))
            .arg(format!("--runtime-endpoint=unix://{}", self.socket().display()))
            .arg(format!("--ginkgo.json-report={}", report.display()))
            .arg("--ginkgo.no-color")
            .args(args)
            .env("PATH", format!("{path}:{}", ginkgo.parent().unwrap().display()))
            // The suite leaves folders there.
            .env("TMPDIR", self.dir.join("tmp"))
            .current_dir(&self.dir)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .status()
            .unwrap();
        let text = fs::read(&report).unwrap_or_else(|e| {
            let log = fs::read_to_string(self.dir.join(format!("{name}.log"))).unwrap_or_default();
            panic!("critest wrote no report ({e}): {log}")
        });
        let suites: Value = serde_json::from_slice(&text).unwrap();
        let specs = suites.as_array().unwrap().iter().flat_map(|s| s["SpecReports"].as_array().unwrap());
        specs.filter(|s| s["LeafNodeType"] == "It").filter_map(outcome).collect()
    }
}

/// A spec's name, state and message; nothing when a filter left it out.
fn outcome(spec: &Value) -> Option<(String, (String, String))> {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let containers = spec["ContainerHierarchyTexts"].as_array()?;
    let mut name: Vec<String> = containers.iter().map(text).collect();
    name.push(text(&spec["LeafNodeText"]));
    let (state, why) = (text(&spec["State"]), text(&spec["Failure"]["Message"]));
    (state != "skipped" || !why.is_empty()).then(|| (name.join(" "), (state, why)))
}

impl Drop for Setup {
    fn drop(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            let _ = server.wait();
        }
        if std::thread::panicking() && std::env::var_os("ORLOP_KEEP").is_some() {
            eprintln!("left for you: {}", self.dir.display());
            let _ = self.command().arg("--purge").output();
            return;
        }
        let purged = self.command().arg("--purge").output();
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let _ = fs::remove_dir(hierarchy.path().join(self.dir.file_name().unwrap()));
        }
        let _ = fs::remove_dir_all(&self.dir);
        if let Ok(out) = purged
            && !out.status.success()
        {
            eprintln!("purge: {}", String::from_utf8_lossy(&out.stderr));
        }
    }
}

fn check(name: &str, specs: &BTreeMap<String, (String, String)>, least: usize) {
    let conformance =
        fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/conformance.md")).unwrap();
    let passed = specs.values().filter(|(state, _)| state == "passed").count();
    // "- `AppArmor`" names a whole group, anything longer one spec by the end of its name.
    let named: Vec<&str> = conformance.split('`').skip(1).step_by(2).collect();
    let excused = |spec: &str, state: &str| {
        named.iter().any(|n| spec.ends_with(n) || (state == "skipped" && spec.contains(&format!(" {n} "))))
    };
    let wrong: Vec<String> = specs
        .iter()
        .filter(|(spec, (state, _))| state != "passed" && !excused(spec, state))
        .map(|(spec, (state, why))| format!("{state}: {spec}: {why}"))
        .collect();
    let skipped: Vec<&String> = specs.iter().filter(|(_, (s, _))| s == "skipped").map(|(n, _)| n).collect();
    println!("{name}: {passed} passed of {}; skipped: {skipped:#?}", specs.len());
    assert!(wrong.is_empty(), "{name}: {passed} passed of {}, but\n{}", specs.len(), wrong.join("\n"));
    assert!(passed >= least, "{name}: only {passed} specs ran");
}

/// The whole suite, then the streaming specs over WebSocket.
#[test]
fn every_spec_passes() {
    let setup = Setup::start();
    let all = setup.suite("critest", &["--parallel=4"]);
    let streaming = setup.suite(
        "websocket",
        &["--ginkgo.focus=Streaming", "--websocket-exec", "--websocket-attach", "--websocket-portforward"],
    );
    check("critest over WebSocket", &streaming, 5);
    check("critest", &all, 108);
}
