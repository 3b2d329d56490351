//! A node's network in a namespace of its own, with an API server and service proxies beside each other in it. Dropping it takes
//! everything back, also when the test fails.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::{program, run, wait_for};

const PATIENCE: Duration = Duration::from_secs(60);

/// The network has a link `eth0` with [`Place::ADDRESS`] and a default route that leads nowhere.
pub struct Place {
    name: String,
    dir: tempfile::TempDir,
    cgroup: PathBuf,
    children: BTreeMap<String, Child>,
}

impl Place {
    pub const ADDRESS: &str = "192.0.2.10";

    pub fn new() -> Place {
        let dir = tempfile::Builder::new().prefix("orlpr").tempdir_in("/tmp").expect("a folder in /tmp");
        let name = dir.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        let cgroup = cgroup2().join(&name);
        run(Command::new("ip").args(["netns", "add", &name]));
        let place = Place { name, dir, cgroup, children: BTreeMap::new() };
        std::fs::create_dir(&place.cgroup).expect("run as root");
        for line in [
            "link set lo up",
            "link add eth0 type veth peer name uplink",
            "link set uplink up",
            "link set eth0 up",
            &format!("address add {}/24 dev eth0", Place::ADDRESS),
            "route add default via 192.0.2.1",
        ] {
            run(place.inside("ip").args(line.split(' ')));
        }
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command in the namespace.
    pub fn inside(&self, program: impl AsRef<Path>) -> Command {
        let mut c = Command::new("nsenter");
        c.arg(format!("--net=/run/netns/{}", self.name)).arg(program.as_ref()).stdin(Stdio::null());
        c
    }

    /// Starts a process that [`Place::child`] knows by this name and that writes to [`Place::said`].
    pub fn start(&mut self, name: &str, mut command: Command) {
        let log = File::options().create(true).append(true).open(self.log(name)).expect("a log file");
        command.stdout(log.try_clone().expect("a file handle")).stderr(log);
        let child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        assert!(self.children.insert(name.to_owned(), child).is_none(), "{name} runs already");
    }

    pub fn pid(&self, name: &str) -> u32 {
        self.children[name].id()
    }

    /// Ends a process as a crash would.
    pub fn kill(&mut self, name: &str) {
        let mut child = self.children.remove(name).unwrap_or_else(|| panic!("{name} does not run"));
        child.kill().expect("SIGKILL");
        child.wait().expect("the killed process is reaped");
    }

    fn log(&self, name: &str) -> PathBuf {
        self.path(&format!("{name}.log"))
    }

    /// What all processes of this name have written.
    pub fn said(&self, name: &str) -> String {
        std::fs::read_to_string(self.log(name)).unwrap_or_default()
    }

    /// kubectl with the credentials in the file `admin`.
    pub fn kubectl(&self, args: &[&str]) -> Command {
        let mut c = self.inside("kubectl");
        c.env("KUBECONFIG", self.path("admin")).env("HOME", self.dir.path()).args(args);
        c
    }

    pub fn apply(&self, manifest: &str) {
        let file = self.path("apply.yaml");
        std::fs::write(&file, manifest).expect("a manifest file");
        run(&mut self.kubectl(&["apply", "-f", &file.to_string_lossy()]));
    }

    /// Starts `orlop proxy` as the process `proxy`, for the processes of this place's cgroup.
    pub fn start_proxy(&mut self, kubeconfig: &Path) {
        let mut c = self.inside(program("orlop"));
        c.args(["proxy", "--node-name", "n1", "--health-address", "127.0.0.1:10256"]);
        c.args(["--metrics-address", "none", "--kubeconfig"]).arg(kubeconfig);
        c.arg("--bpf-dir").arg(self.pins()).arg("--cgroup").arg(&self.cgroup);
        self.start("proxy", c);
    }

    /// Until a proxy, whichever it is, says that it is healthy.
    pub fn wait_healthy(&self) {
        wait_for("the proxy is healthy", PATIENCE, || {
            let mut curl = self.inside("curl");
            let out = curl.args(["--silent", "--fail", "http://127.0.0.1:10256/healthz"]).output().ok()?;
            out.status.success().then_some(())
        });
    }

    /// Where the proxy's programs and maps are.
    pub fn pins(&self) -> PathBuf {
        Path::new("/sys/fs/bpf").join(&self.name)
    }

    /// What `orlop proxy WHAT…` says, about this place's proxy.
    pub fn ask_proxy(&self, what: &[&str]) -> String {
        let mut c = self.inside(program("orlop"));
        run(c.arg("proxy").args(what).arg("--bpf-dir").arg(self.pins()))
    }

    /// A page, as a process in this place's cgroup is given it, or one that `orlop proxy` does not serve.
    pub fn get(&self, address: &str, served: bool) -> Option<String> {
        let join = format!("echo $$ >{}/cgroup.procs && ", self.cgroup.display());
        let join = if served { &join } else { "" };
        let mut c = self.inside("sh");
        c.arg("-c").arg(format!("{join}exec curl --silent --fail --max-time 2 http://{address}/"));
        let out = c.output().expect("a shell");
        out.status.success().then(|| String::from_utf8_lossy(&out.stdout).into_owned())
    }
}

impl Default for Place {
    fn default() -> Place {
        Place::new()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for (name, child) in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
            if std::thread::panicking() {
                let said = std::fs::read_to_string(self.dir.path().join(format!("{name}.log")));
                let said = said.unwrap_or_default();
                let lines: Vec<&str> = said.lines().collect();
                eprintln!("--- {name}:\n{}", lines[lines.len().saturating_sub(20)..].join("\n"));
            }
        }
        let mut cleanup = self.inside(program("orlop"));
        let _ = cleanup.args(["proxy", "cleanup", "--bpf-dir"]).arg(self.pins()).output();
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
        let _ = std::fs::remove_dir(&self.cgroup);
    }
}

fn cgroup2() -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/mounts").expect("/proc is mounted");
    let mut fields = mounts.lines().map(|l| l.split(' ').collect::<Vec<_>>());
    let found = fields.find(|f| f.get(2) == Some(&"cgroup2"));
    PathBuf::from(found.expect("cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")[1])
}
