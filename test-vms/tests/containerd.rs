//! Debian's containerd in our CRI server's place, with our CNI plugin below it: what the agent asks of a runtime stands in the
//! CRI, and what runtimes ask of the plugin in CNI. It is as old as they come: without container events, runtime
//! configuration, handlers' features and CNI 1.1.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use orlop_test_vms::footprint::Footprint;
use orlop_test_vms::{Cluster, http_get, program, root, run, wait_for};

const SOON: Duration = Duration::from_secs(60);
const MISSING: &str = "containerd is missing: run scripts/deps.sh test";
const PAUSE: &str = "orlop.local/pause:1";
const SHELL: &str = "orlop.local/busybox:1";

/// A containerd of the test's own below one folder. Dropping it takes back what it left.
struct Containerd {
    dir: tempfile::TempDir,
    child: Child,
}

impl Containerd {
    fn start(cni_conf: &Path) -> Containerd {
        let dir = tempfile::Builder::new().prefix("orlctd").tempdir_in("/tmp").unwrap();
        let at = |name: &str| dir.path().join(name);
        let plugins = at("cni-bin");
        fs::create_dir(&plugins).unwrap();
        symlink(program("orlop-cni"), plugins.join("orlop-cni")).unwrap();
        // containerd brings the loopback interface up by a plugin as well.
        symlink("/usr/lib/cni/loopback", plugins.join("loopback")).unwrap();
        let config = format!(
            r#"version = 2
root = "{0}/root"
state = "{0}/state"
[grpc]
address = "{0}/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
path = "{0}/opt"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{1}"
conf_dir = "{2}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
Root = "{0}/runc"
"#,
            dir.path().display(),
            plugins.display(),
            cni_conf.display()
        );
        fs::write(at("config.toml"), config).unwrap();
        let log = File::create(at("containerd.log")).unwrap();
        let mut command = Command::new("containerd");
        command.arg("--config").arg(at("config.toml")).stdout(Stdio::null()).stderr(log);
        let containerd = Containerd { child: command.spawn().expect(MISSING), dir };
        wait_for("containerd answers", SOON, || {
            containerd.ctr(&["version"]).output().expect(MISSING).status.success().then_some(())
        });
        containerd
    }

    fn endpoint(&self) -> String {
        format!("unix://{}/containerd.sock", self.dir.path().display())
    }

    fn ctr(&self, args: &[&str]) -> Command {
        let mut c = Command::new("ctr");
        c.arg("--address")
            .arg(self.dir.path().join("containerd.sock"))
            .args(["--namespace", "k8s.io"])
            .args(args);
        c
    }

    fn list(&self, what: &str) -> BTreeSet<String> {
        let out = self.ctr(&[what, "list", "--quiet"]).output().expect(MISSING);
        String::from_utf8_lossy(&out.stdout).lines().map(str::to_owned).collect()
    }

    /// Processes that were started with something of this folder.
    fn processes(&self) -> Vec<i32> {
        let own = self.dir.path().to_string_lossy();
        let all = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = all.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| {
            let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.contains(&*own) && line.starts_with("/usr/bin/containerd-shim")
        })
        .collect()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Pods of a test that failed: their network goes by the plugin.
        let endpoint = self.endpoint();
        let _ = Command::new("crictl").args(["-r", &endpoint, "-i", &endpoint, "rmp", "-fa"]).output();
        for id in self.list("task") {
            let _ = self.ctr(&["task", "delete", "--force", &id]).output();
        }
        for pid in self.processes() {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let text = fs::read_to_string(self.dir.path().join("containerd.log")).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            eprintln!("--- containerd's log:\n{}", lines[lines.len().saturating_sub(40)..].join("\n"));
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let own = self.dir.path().to_string_lossy();
        for at in mounts.lines().rev().filter_map(|l| l.split(' ').nth(4)).filter(|p| p.starts_with(&*own)) {
            let _ = nix::mount::umount2(at, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: both, labels: {app: both}}
spec:
  terminationGracePeriodSeconds: 1
  volumes:
    - name: scratch
      emptyDir: {}
    - name: settings
      configMap: {name: settings}
  containers:
    - name: web
      image: orlop.local/demo-web:latest
      imagePullPolicy: Never
      readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
      resources: {limits: {memory: 32Mi, cpu: 200m}}
    - name: shell
      image: orlop.local/busybox:1
      imagePullPolicy: Never
      command: [sh, -c, 'echo begun $HOSTNAME; touch /scratch/there; while [ ! -e /scratch/end ]; do sleep 0.1; done; rm /scratch/end; exit 3']
      readinessProbe: {exec: {command: [test, -e, /scratch/there]}, periodSeconds: 1}
      volumeMounts:
        - {name: scratch, mountPath: /scratch}
        - {name: settings, mountPath: /settings}
";

#[test]
fn a_pods_life_on_containerd() {
    let before = Footprint::take();
    let mut c = Cluster::prepare(46);
    let containerd = Containerd::start(&c.path("cni"));
    for image in [
        root().join("target/demo/demo-web.tar"),
        c.busybox(SHELL, &["sh"]),
        c.busybox(PAUSE, &["sleep", "100000"]),
    ] {
        run(containerd.ctr(&["images", "import"]).arg(image));
    }
    c.add_args(&["--container-runtime-endpoint", &containerd.endpoint(), "--no-proxy", "--no-dns"]);
    c.up();
    c.wait_ready();
    let runtime = "jsonpath={.items[0].status.nodeInfo.containerRuntimeVersion}";
    assert!(c.kubectl(&["get", "nodes", "-o", runtime]).starts_with("containerd://1."));

    c.kubectl(&["create", "configmap", "settings", "--from-literal=greeting=hello"]);
    c.apply(POD);
    c.kubectl(&["wait", "--for=condition=Ready", "pod/both", "--timeout=60s"]);
    assert_eq!(containerd.list("task").len(), 3, "the sandbox and two containers");
    let exec = |script: &str| c.kubectl(&["exec", "both", "-c", "shell", "--", "sh", "-c", script]);
    assert_eq!(c.kubectl(&["logs", "both", "-c", "shell"]), "begun both\n");
    assert_eq!(exec("cat /settings/greeting"), "hello");
    assert!(!exec("wget -q -O - http://127.0.0.1:8080/").is_empty(), "containers share the network");
    let address = c.kubectl(&["get", "pod", "both", "-o", "jsonpath={.status.podIP}:8080"]);
    assert!(address.starts_with("10.196.0.") && http_get(&address).is_some(), "the node reaches {address}");
    let failed = c.kubectl_output(&["exec", "both", "-c", "shell", "--", "sh", "-c", "exit 7"]);
    assert_eq!(failed.status.code(), Some(7), "the command's exit code comes through");

    exec("touch /scratch/end");
    let status = |field: &str| {
        let path = format!("jsonpath={{.status.containerStatuses[?(@.name==\"shell\")].{field}}}");
        c.kubectl(&["get", "pod", "both", "-o", &path])
    };
    wait_for("the container runs again", SOON, || {
        (status("restartCount") == "1" && status("ready") == "true").then_some(())
    });
    assert_eq!(status("lastState.terminated.exitCode"), "3");
    assert_eq!(c.kubectl(&["logs", "both", "-c", "shell", "--previous"]), "begun both\n");

    // A restarted agent finds what runs.
    let tasks = containerd.list("task");
    c.kill();
    c.up();
    // The node's status is still that of before.
    wait_for("the agent answers again", SOON, || {
        c.kubectl_output(&["exec", "both", "-c", "shell", "--", "true"]).status.success().then_some(())
    });
    c.kubectl(&["wait", "--for=condition=Ready", "pod/both", "--timeout=60s"]);
    assert_eq!(containerd.list("task"), tasks);

    c.kubectl(&["delete", "pod", "both", "--timeout=60s"]);
    wait_for("containerd has nothing of it", SOON, || containerd.list("container").is_empty().then_some(()));
    wait_for("its shim has ended", SOON, || containerd.processes().is_empty().then_some(()));
    c.take_down();
    let dir = containerd.dir.path().to_string_lossy().into_owned();
    drop(containerd);
    let mut left = before.left_by(&Footprint::take());
    // The network is the tests' own; whatever else others do on this machine has other names.
    let names = [c.cgroup().trim_start_matches("/orlop-test-").to_owned(), dir];
    left.retain(|l| {
        ["link ", "route ", "nf_tables "].iter().any(|w| l.starts_with(w))
            || names.iter().any(|n| l.contains(n))
    });
    assert!(left.is_empty(), "left behind:\n{}", left.join("\n"));
}
