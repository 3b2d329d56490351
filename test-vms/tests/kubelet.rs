//! Upstream's kubelet in our agent's place, on our CRI server, network plugin and control plane: what it asks of a runtime is more
//! than crictl can.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use orlop_test_vms::footprint::Footprint;
use orlop_test_vms::{busybox_archive, http_get, program, root, run, wait_for};
use rcgen::{CertificateParams, DnType, Issuer, KeyPair};

const SOON: Duration = Duration::from_secs(60);
const MISSING: &str = "kubelet is not on PATH: run scripts/deps.sh test, which builds it from its Go module";
const SHELL: &str = "orlop.local/busybox:1";
const NAME: &str = "upstream";
/// Where a kubelet listens for device plugins and links containers' logs, wherever its other folders are.
const FIXED: [&str; 2] = ["/var/lib/kubelet", "/var/log/containers"];
const API: &str = "127.0.0.1:17047";
const KUBELET_PORT: u16 = 18047;
const PODS: &str = "10.197.0.0/24";
/// What the kubelet sets for the whole machine when it starts.
const SYSCTLS: [&str; 6] = [
    "kernel/keys/root_maxbytes",
    "kernel/keys/root_maxkeys",
    "kernel/panic",
    "kernel/panic_on_oops",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
];

/// The parts of one node and its control plane, each a process of its own. Dropping it takes back what they left.
struct Node {
    dir: tempfile::TempDir,
    cgroup: String,
    server: Option<Child>,
    cri: Option<Child>,
    kubelet: Option<Child>,
    sysctls: Vec<(PathBuf, String)>,
}

impl Node {
    fn start() -> Node {
        let dir = tempfile::Builder::new().prefix("orlup").tempdir_in("/tmp").unwrap();
        let cgroup = format!("orlop-test-{}", dir.path().file_name().unwrap().to_string_lossy());
        let sysctls = SYSCTLS.iter().map(|name| Path::new("/proc/sys").join(name));
        let sysctls = sysctls.map(|path| (path.clone(), fs::read_to_string(path).unwrap())).collect();
        let mut node = Node { dir, cgroup, server: None, cri: None, kubelet: None, sysctls };
        for dir in FIXED {
            fs::create_dir_all(dir).unwrap();
            // This one's alone: what another kubelet has there stays below.
            nix::mount::mount(Some("orlop-test"), dir, Some("tmpfs"), MsFlags::empty(), None::<&str>)
                .unwrap();
        }
        for hierarchy in hierarchies() {
            // A hierarchy that cannot be written has no part in this.
            let _ = fs::create_dir(hierarchy.join(&node.cgroup));
        }
        for folder in ["pki", "cni", "manifests", "pods"] {
            fs::create_dir(node.at(folder)).unwrap();
        }
        node.server = Some(node.spawn(Command::new(program("orlop")).arg("server").args([
            "--listen",
            API,
            "--service-cidr",
            "10.147.0.0/16",
            "--cluster-cidr",
            "10.197.0.0/16",
            "--data-dir",
            &node.text("data"),
            "--write-kubeconfig",
            &node.text("admin.kubeconfig"),
        ])));
        node.configure();
        for archive in
            [root().join("target/demo/demo-web.tar"), busybox_archive(node.dir.path(), SHELL, &["sh"])]
        {
            let mut import = Command::new(program("orlop"));
            run(import.args(["image", "import", "--images-dir", &node.text("cri/images")]).arg(archive));
        }
        wait_for("the API server answers", SOON, || {
            node.kubectl_output(&["get", "namespace", "default"]).status.success().then_some(())
        });
        node.certify();
        node.start_cri();
        node.start_kubelet();
        let ready = "jsonpath={.items[*].status.conditions[?(@.type==\"Ready\")].status}";
        wait_for("the node is Ready", SOON, || {
            let out = node.kubectl_output(&["get", "nodes", "-o", ready]);
            (String::from_utf8_lossy(&out.stdout) == "True").then_some(())
        });
        node
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.at(name).to_string_lossy().into_owned()
    }

    fn spawn(&self, command: &mut Command) -> Child {
        let log = File::options().create(true).append(true).open(self.at("log")).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"))
    }

    fn endpoint(&self) -> String {
        format!("unix://{}", self.text("cri.sock"))
    }

    fn configure(&self) {
        let network = serde_json::json!({
            "cniVersion": "1.0.0",
            "name": NAME,
            "plugins": [{
                "type": "orlop-cni",
                "capabilities": {"portMappings": true},
                "masquerade": {"except": []},
                "ipam": {"ranges": [PODS], "dataDir": self.at("ipam")},
            }],
        });
        fs::write(self.at("cni/10-upstream.conflist"), network.to_string()).unwrap();
        // As strict as upstream's default with our authority; no figure of this machine's disk is what the test is about.
        let config = serde_json::json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "failCgroupV1": false,
            "containerRuntimeEndpoint": self.endpoint(),
            "authentication": {
                "anonymous": {"enabled": false},
                "webhook": {"enabled": true},
                "x509": {"clientCAFile": self.at("data/server/pki/ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": self.at("pki/node.crt"),
            "tlsPrivateKeyFile": self.at("pki/node.key"),
            "port": KUBELET_PORT,
            "healthzPort": 0,
            "makeIPTablesUtilChains": false,
            "staticPodPath": self.at("manifests"),
            "podLogsDir": self.at("pods"),
            "volumePluginDir": self.at("plugins"),
            "clusterDNS": ["10.147.0.10"],
            "clusterDomain": "cluster.local",
            "cgroupRoot": format!("/{}", self.cgroup),
            "evictionHard": {},
            "imageGCHighThresholdPercent": 100,
            "featureGates": {"PodAndContainerStatsFromCRI": true},
        });
        fs::write(self.at("kubelet.yaml"), config.to_string()).unwrap();
    }

    /// One certificate for both ends, as `kubeadm` would have it signed, and the kubeconfig with it.
    fn certify(&self) {
        let pki = |name: &str| fs::read_to_string(self.at("data/server/pki").join(name)).unwrap();
        let issuer =
            Issuer::from_ca_cert_pem(&pki("ca.crt"), KeyPair::from_pem(&pki("ca.key")).unwrap()).unwrap();
        let mut params = CertificateParams::new([NAME.to_owned(), own_address()]).unwrap();
        params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
        params.distinguished_name.push(DnType::CommonName, format!("system:node:{NAME}"));
        let key = KeyPair::generate().unwrap();
        fs::write(self.at("pki/node.crt"), params.signed_by(&key, &issuer).unwrap().pem()).unwrap();
        fs::write(self.at("pki/node.key"), key.serialize_pem()).unwrap();
        let config = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": NAME, "cluster": {
                "server": format!("https://{API}"),
                "certificate-authority": self.at("data/server/pki/ca.crt"),
            }}],
            "users": [{"name": NAME, "user": {
                "client-certificate": self.at("pki/node.crt"),
                "client-key": self.at("pki/node.key"),
            }}],
            "contexts": [{"name": NAME, "context": {"cluster": NAME, "user": NAME}}],
            "current-context": NAME,
        });
        fs::write(self.at("node.kubeconfig"), config.to_string()).unwrap();
    }

    fn start_cri(&mut self) {
        let cri = self.spawn(Command::new(program("orlop")).arg("cri").args([
            "--listen",
            &self.text("cri.sock"),
            "--data-dir",
            &self.text("cri"),
            "--run-dir",
            &self.text("run"),
            "--cni-conf-dir",
            &self.text("cni"),
            "--nri-socket",
            &self.text("nri.sock"),
        ]));
        self.cri = Some(cri);
        wait_for("the CRI server answers", SOON, || {
            self.crictl(&["version"]).output().unwrap().status.success().then_some(())
        });
    }

    fn start_kubelet(&mut self) {
        let kubelet = Command::new("kubelet")
            .args(["--config", &self.text("kubelet.yaml"), "--kubeconfig", &self.text("node.kubeconfig")])
            .args(["--hostname-override", NAME, "--node-ip", &own_address()])
            .args(["--root-dir", &self.text("kubelet"), "--cert-dir", &self.text("kubelet/pki")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::options().create(true).append(true).open(self.at("kubelet.log")).unwrap())
            .spawn();
        self.kubelet = Some(kubelet.expect(MISSING));
    }

    fn crictl(&self, args: &[&str]) -> Command {
        let mut c = Command::new("crictl");
        c.args(["-r", &self.endpoint(), "-i", &self.endpoint()]).args(args);
        c
    }

    fn containers(&self) -> BTreeSet<String> {
        run(&mut self.crictl(&["ps", "--quiet"])).lines().map(str::to_owned).collect()
    }

    fn kubectl_output(&self, args: &[&str]) -> Output {
        let mut c = Command::new("kubectl");
        c.env("KUBECONFIG", self.at("admin.kubeconfig")).env("HOME", self.dir.path());
        c.args(args).stdin(Stdio::null()).output().expect("kubectl is on PATH: run scripts/deps.sh test")
    }

    fn kubectl(&self, args: &[&str]) -> String {
        let out = self.kubectl_output(args);
        let [said, error] = [&out.stdout, &out.stderr].map(|t| String::from_utf8_lossy(t).into_owned());
        assert!(out.status.success(), "kubectl {args:?}: {said}{error}");
        said
    }

    fn shell(&self, script: &str) -> Output {
        self.kubectl_output(&["exec", "both", "-c", "shell", "--", "sh", "-c", script])
    }

    fn shell_says(&self, script: &str) -> String {
        let out = self.shell(script);
        assert!(out.status.success(), "{script}: {out:?}");
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    /// A field of the container `shell`'s status.
    fn status(&self, field: &str) -> String {
        let path = format!("jsonpath={{.status.containerStatuses[?(@.name==\"shell\")].{field}}}");
        self.kubectl(&["get", "pod", "both", "-o", &path])
    }

    /// What the kubelet knows of the pod's use: of its own, and of each container.
    fn summary(&self) -> Option<serde_json::Value> {
        let raw = format!("/api/v1/nodes/{NAME}/proxy/stats/summary");
        let out = self.kubectl_output(&["get", "--raw", &raw]);
        let whole: serde_json::Value = serde_json::from_slice(&out.stdout).ok()?;
        whole["pods"].as_array()?.iter().find(|p| p["podRef"]["name"] == "both").cloned()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for log in ["log", "kubelet.log"] {
                let text = fs::read_to_string(self.at(log)).unwrap_or_default();
                let lines: Vec<&str> = text.lines().collect();
                eprintln!("--- {log}:\n{}", lines[lines.len().saturating_sub(30)..].join("\n"));
            }
        }
        end(&mut self.kubelet);
        // Pods of a test that failed.
        if self.cri.is_some() {
            let _ = self.crictl(&["rmp", "-fa"]).output();
        }
        end(&mut self.cri);
        end(&mut self.server);
        for dir in FIXED {
            let _ = nix::mount::umount2(dir, MntFlags::MNT_DETACH);
            // Fails where it has a purpose besides.
            let _ = fs::remove_dir(dir);
        }
        for (path, value) in &self.sysctls {
            let _ = fs::write(path, value);
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let own = self.dir.path().to_string_lossy();
        for at in mounts.lines().rev().filter_map(|l| l.split(' ').nth(4)).filter(|p| p.starts_with(&*own)) {
            let _ = nix::mount::umount2(at, MntFlags::MNT_DETACH);
        }
        for hierarchy in hierarchies() {
            remove_cgroups(&hierarchy.join(&self.cgroup));
        }
    }
}

/// This machine's address on its default route; a kubelet does not take a loopback address.
fn own_address() -> String {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.connect("198.51.100.1:9").expect("a default route: run under scripts/isolated.sh");
    socket.local_addr().unwrap().ip().to_string()
}

/// Every mounted hierarchy of cgroups.
fn hierarchies() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let of = |l: &str| {
        let (before, after) = l.split_once(" - ")?;
        after.starts_with("cgroup").then(|| PathBuf::from(before.split(' ').nth(4).unwrap_or_default()))
    };
    mounts.lines().filter_map(of).collect()
}

fn remove_cgroups(dir: &Path) {
    for e in fs::read_dir(dir).into_iter().flatten().flatten() {
        if e.file_type().is_ok_and(|t| t.is_dir()) {
            remove_cgroups(&e.path());
        }
    }
    let _ = fs::remove_dir(dir);
}

/// SIGTERM, and SIGKILL to one that does not listen.
fn end(child: &mut Option<Child>) {
    let Some(mut child) = child.take() else { return };
    let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM);
    for _ in 0..200 {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let _ = child.kill();
    let _ = child.wait();
}

const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: both, labels: {app: both}}
spec:
  terminationGracePeriodSeconds: 1
  volumes:
    - {name: scratch, emptyDir: {medium: Memory, sizeLimit: 8Mi}}
    - {name: settings, configMap: {name: settings}}
    - {name: image, image: {reference: 'orlop.local/busybox:1', pullPolicy: Never}}
  initContainers:
    - name: first
      image: orlop.local/busybox:1
      imagePullPolicy: Never
      command: [sh, -c, 'echo first > /scratch/first']
      volumeMounts: [{name: scratch, mountPath: /scratch}]
    - name: side
      image: orlop.local/busybox:1
      imagePullPolicy: Never
      restartPolicy: Always
      command: [sleep, '100000']
      startupProbe: {exec: {command: [test, -e, /bin/sleep]}, periodSeconds: 1}
  containers:
    - name: web
      image: orlop.local/demo-web:latest
      imagePullPolicy: Never
      ports: [{containerPort: 8080, hostPort: 17147}]
      readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
      resources: {limits: {memory: 32Mi, cpu: 200m}}
    - name: shell
      image: orlop.local/busybox:1
      imagePullPolicy: Never
      command: [sh, -c, 'echo begun $HOSTNAME; while [ ! -e /scratch/end ]; do sleep 0.1; done; rm /scratch/end; exit 3']
      readinessProbe: {exec: {command: [test, -e, /scratch/hook]}, periodSeconds: 1}
      lifecycle: {postStart: {exec: {command: [touch, /scratch/hook]}}}
      resources: {requests: {memory: 16Mi}, limits: {memory: 48Mi}}
      securityContext: {runAsUser: 1000, runAsGroup: 1000, readOnlyRootFilesystem: true}
      volumeMounts:
        - {name: scratch, mountPath: /scratch}
        - {name: settings, mountPath: /settings}
        - {name: settings, mountPath: /one, subPath: greeting}
        - {name: image, mountPath: /image}
---
apiVersion: v1
kind: Pod
metadata: {name: apart}
spec:
  hostUsers: false
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: orlop.local/busybox:1
      imagePullPolicy: Never
      command: [sleep, '100000']
---
apiVersion: v1
kind: Pod
metadata: {name: greedy}
spec:
  restartPolicy: Never
  containers:
    - name: main
      image: orlop.local/busybox:1
      imagePullPolicy: Never
      command: [sh, -c, 'x=a; while :; do x=$x$x; done']
      resources: {limits: {memory: 16Mi}}
---
apiVersion: v1
kind: Pod
metadata: {name: wrong}
spec:
  restartPolicy: Never
  containers:
    - {name: main, image: 'orlop.local/busybox:1', imagePullPolicy: Never, command: [nosuch]}
";

#[test]
fn a_pods_life_under_upstreams_kubelet() {
    let before = Footprint::take();
    let mut n = Node::start();
    let info = |field: &str| {
        n.kubectl(&["get", "nodes", "-o", &format!("jsonpath={{.items[0].status.nodeInfo.{field}}}")])
    };
    assert!(info("containerRuntimeVersion").starts_with("orlop://"));
    assert!(info("kubeletVersion").starts_with("v1.36."), "this test is about upstream's kubelet");

    n.kubectl(&["create", "configmap", "settings", "--from-literal=greeting=hello"]);
    fs::write(n.at("pods.yaml"), POD).unwrap();
    n.kubectl(&["apply", "-f", &n.text("pods.yaml")]);
    n.kubectl(&["wait", "--for=condition=Ready", "pod/both", "pod/apart", "--timeout=90s"]);
    what_runs_is_as_asked(&n);
    ends_are_told(&n);

    // A kubelet and a CRI server that come back find what runs.
    let containers = n.containers();
    end(&mut n.kubelet);
    let mut cri = n.cri.take().unwrap();
    cri.kill().unwrap();
    cri.wait().unwrap();
    n.start_cri();
    n.start_kubelet();
    wait_for("the kubelet answers again", SOON, || n.shell("true").status.success().then_some(()));
    n.kubectl(&["wait", "--for=condition=Ready", "pod/both", "--timeout=60s"]);
    assert_eq!(n.containers(), containers);
    assert_eq!(n.status("restartCount"), "1");

    n.kubectl(&["delete", "pods", "--all", "--timeout=60s"]);
    wait_for("nothing runs", SOON, || n.containers().is_empty().then_some(()));
    run(&mut n.crictl(&["rmp", "--all"]));
    let mut names = vec![n.cgroup.clone(), n.dir.path().to_string_lossy().into_owned()];
    names.extend(FIXED.map(str::to_owned));
    drop(n);
    let mut left = before.left_by(&Footprint::take());
    // The network is the tests' own; whatever else others do on this machine has other names.
    left.retain(|l| {
        ["link ", "route ", "nf_tables "].iter().any(|w| l.starts_with(w))
            || names.iter().any(|n| l.contains(n))
    });
    assert!(left.is_empty(), "left behind:\n{}", left.join("\n"));
}

fn what_runs_is_as_asked(n: &Node) {
    assert!(n.kubectl(&["logs", "both", "-c", "shell"]).starts_with("begun both\n"));
    assert_eq!(n.shell_says("cat /settings/greeting /one /scratch/first; id -u"), "hellohellofirst\n1000\n");
    assert_eq!(n.shell("touch /new").status.code(), Some(1), "the root is read-only");
    assert!(n.shell_says("ls /image/bin").contains("busybox"), "the volume shows the image's files");
    assert_eq!(n.shell("exit 7").status.code(), Some(7), "the command's exit code comes through");
    let address = n.kubectl(&["get", "pod", "both", "-o", "jsonpath={.status.podIP}:8080"]);
    assert!(address.starts_with("10.197.0.") && http_get(&address).is_some(), "the node reaches {address}");
    assert!(http_get(&format!("{}:17147", own_address())).is_some(), "the host port leads to the pod");

    let map = n.kubectl(&["exec", "apart", "--", "cat", "/proc/self/uid_map"]);
    assert!(map.split_whitespace().nth(1).is_some_and(|outside| outside != "0"), "{map}");

    let used = wait_for("the pod's use is known", SOON, || {
        let pod = n.summary()?;
        let network = pod["network"]["rxBytes"].as_u64()?;
        let cpu = pod["cpu"]["usageCoreNanoSeconds"].as_u64()?;
        let memory = pod["memory"]["workingSetBytes"].as_u64()?;
        let of: Vec<&str> = pod["containers"].as_array()?.iter().filter_map(|c| c["name"].as_str()).collect();
        (network > 0 && cpu > 0 && memory > 0 && of.len() == 3).then_some(of.join(" "))
    });
    assert!(["web", "shell", "side"].iter().all(|c| used.contains(c)), "{used}");
    let metrics = n.kubectl(&["get", "--raw", &format!("/api/v1/nodes/{NAME}/proxy/metrics/cadvisor")]);
    for name in ["container_cpu_usage_seconds_total", "container_memory_working_set_bytes"] {
        let of_ours =
            |l: &str| l.starts_with(name) && l.contains("container=\"web\"") && l.contains("pod=\"both\"");
        assert!(metrics.lines().any(of_ours), "no {name} of the container web:\n{metrics}");
    }
}

fn ends_are_told(n: &Node) {
    let reason = |pod: &str| {
        let path = "jsonpath={.status.containerStatuses[0].state.terminated.reason}";
        n.kubectl(&["get", "pod", pod, "-o", path])
    };
    wait_for("a container without memory is killed", SOON, || {
        (reason("greedy") == "OOMKilled").then_some(())
    });
    wait_for("a program that is missing is said", SOON, || (reason("wrong") == "StartError").then_some(()));
    n.shell_says("touch /scratch/end");
    wait_for("the container runs again", SOON, || {
        (n.status("restartCount") == "1" && n.status("ready") == "true").then_some(())
    });
    assert_eq!(n.status("lastState.terminated.exitCode"), "3");
    assert!(n.kubectl(&["logs", "both", "-c", "shell", "--previous"]).starts_with("begun both\n"));
}
