//! The proxy on a cluster whose control plane is not ours to change: a user with the system:node-proxier role is enough, and
//! a right that is missing is said once.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use orlop_base::testkit::unique_name;
use orlop_test_vms::{program, run, wait_for};

const PATIENCE: Duration = Duration::from_secs(60);

/// An API server in a network namespace, and what a proxy beside it needs; all taken back on drop.
struct Place {
    name: String,
    dir: tempfile::TempDir,
    cgroup: PathBuf,
    children: Vec<Child>,
}

impl Place {
    fn new() -> Place {
        let name = unique_name("orlpr");
        let dir = tempfile::tempdir().unwrap();
        let cgroup = cgroup2().join(&name);
        run(Command::new("ip").args(["netns", "add", &name]));
        let mut place = Place { name, dir, cgroup, children: Vec::new() };
        std::fs::create_dir(&place.cgroup).expect("run as root");
        run(place.inside(Path::new("ip")).args(["link", "set", "lo", "up"]));
        let mut server = place.inside(&program("orlop"));
        server.args(["server", "--listen", "127.0.0.1:6443", "--advertise-address", "127.0.0.1"]);
        for (flag, name) in
            [("--data-dir", "data"), ("--write-kubeconfig", "admin"), ("--manifests", "manifests")]
        {
            server.arg(flag).arg(place.path(name));
        }
        place.start(server, "server.log");
        wait_for("the API server answers", PATIENCE, || {
            let mut c = place.kubectl(&["get", "clusterrole", "system:node-proxier"]);
            c.output().ok()?.status.success().then_some(())
        });
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn pins(&self) -> PathBuf {
        Path::new("/sys/fs/bpf").join(&self.name)
    }

    /// A command in the namespace.
    fn inside(&self, program: &Path) -> Command {
        let mut c = Command::new("nsenter");
        c.arg(format!("--net=/run/netns/{}", self.name)).arg(program).stdin(Stdio::null());
        c
    }

    fn start(&mut self, mut command: Command, log: &str) {
        let log = File::create(self.path(log)).unwrap();
        self.children.push(command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap());
    }

    fn kubectl(&self, args: &[&str]) -> Command {
        let mut c = self.inside(Path::new("kubectl"));
        c.env("KUBECONFIG", self.path("admin")).env("HOME", self.dir.path()).args(args);
        c
    }

    /// A kubeconfig of a new service account.
    fn user(&self, name: &str) -> PathBuf {
        run(&mut self.kubectl(&["create", "serviceaccount", name]));
        let token = run(&mut self.kubectl(&["create", "token", name]));
        let config = run(&mut self.kubectl(&["config", "view", "--raw", "--output", "json"]));
        let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
        config["users"][0]["user"] = serde_json::json!({"token": token.trim()});
        let path = self.path(name);
        std::fs::write(&path, config.to_string()).unwrap();
        path
    }

    fn bind(&self, role: &str, user: &str) {
        let (role, user) = (format!("--clusterrole={role}"), format!("--serviceaccount=default:{user}"));
        run(&mut self.kubectl(&["create", "clusterrolebinding", &self.name, &role, &user]));
    }

    /// A proxy that runs as this user.
    fn proxy(&mut self, kubeconfig: &Path) {
        let mut c = self.inside(&program("orlop"));
        c.args(["proxy", "--node-name", "n1", "--health-address", "127.0.0.1:10256"]);
        c.args(["--metrics-address", "none", "--kubeconfig"]).arg(kubeconfig);
        c.arg("--bpf-dir").arg(self.pins()).arg("--cgroup").arg(&self.cgroup);
        self.start(c, "proxy.log");
    }

    fn said(&self) -> String {
        std::fs::read_to_string(self.path("proxy.log")).unwrap_or_default()
    }

    fn wait_healthy(&self) {
        wait_for("the proxy is healthy", PATIENCE, || {
            let mut curl = self.inside(Path::new("curl"));
            let out = curl.args(["--silent", "--fail", "http://127.0.0.1:10256/healthz"]).output().ok()?;
            out.status.success().then_some(())
        });
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the proxy's log:\n{}", self.said());
        }
        for c in &mut self.children {
            let _ = c.kill();
            let _ = c.wait();
        }
        let _ =
            Command::new(program("orlop")).args(["proxy", "cleanup", "--bpf-dir"]).arg(self.pins()).output();
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
        let _ = std::fs::remove_dir(&self.cgroup);
    }
}

fn cgroup2() -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let mut fields = mounts.lines().map(|l| l.split(' ').collect::<Vec<_>>());
    let found = fields.find(|f| f.get(2) == Some(&"cgroup2"));
    PathBuf::from(found.expect("cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")[1])
}

const OBJECTS: &str = r#"
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {topology.kubernetes.io/zone: here}}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: "", port: 8080}]
endpoints:
- {addresses: [10.9.9.1], zone: here, hints: {forZones: [{name: here}]}}
- {addresses: [10.9.9.2], zone: there, hints: {forZones: [{name: there}]}}
"#;

#[test]
fn the_role_of_kube_proxy_is_enough_and_a_missing_right_is_said_once() {
    let mut place = Place::new();
    let objects = place.path("objects.yaml");
    std::fs::write(&objects, OBJECTS).unwrap();
    run(&mut place.kubectl(&["apply", "-f", &objects.to_string_lossy()]));

    let some = ["create", "clusterrole", "some", "--verb=list,watch", "--resource=services,nodes"];
    run(&mut place.kubectl(&some));
    let user = place.user("px");
    run(&mut place.kubectl(&[
        "create",
        "clusterrolebinding",
        "some",
        "--clusterrole=some",
        "--serviceaccount=default:px",
    ]));
    place.proxy(&user);
    wait_for("the proxy says what it lacks", PATIENCE, || {
        place.said().contains("system:node-proxier").then_some(())
    });

    // Given what it lacks, it goes on by itself.
    run(&mut place.kubectl(&["delete", "clusterrolebinding", "some"]));
    place.bind("system:node-proxier", "px");
    place.wait_healthy();
    let said = place.said();
    let (ranges, lines): (Vec<&str>, Vec<&str>) =
        said.lines().filter(|l| l.contains("forbidden")).partition(|l| l.contains("servicecidrs"));
    assert!(ranges.len() == 1 && ranges[0].contains("WARN"), "it goes on without the Service range:\n{said}");
    assert_eq!(lines.len(), 1, "{said}");
    assert!(
        lines[0].contains("endpointslices")
            && lines[0].contains("refuses the proxy's user")
            && lines[0].contains("system:node-proxier"),
        "{said}"
    );

    // Services, endpoints and the node have been read.
    let mut inspect = Command::new(program("orlop"));
    let shown = run(inspect.args(["proxy", "backends", "--bpf-dir"]).arg(place.pins()));
    assert!(shown.contains("10.9.9.1") && !shown.contains("10.9.9.2"), "the node's zone decides:\n{shown}");
}
