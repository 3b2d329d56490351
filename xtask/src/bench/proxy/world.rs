//! Network namespaces that stand for a node with two pods and a client outside.

use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, setns};

use super::super::{Result, text};

pub const NODE: Ipv4Addr = Ipv4Addr::new(10, 72, 1, 1);
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 72, 1, 2);
pub const POD: Ipv4Addr = Ipv4Addr::new(10, 72, 128, 2);
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 72, 128, 3);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
pub const SERVICES: &str = "10.213.0.0/16";

/// A network namespace; deleted on drop.
pub struct Net(String);

impl Net {
    fn new(name: String) -> Result<Net> {
        run(Command::new("ip").args(["netns", "add", &name]))?;
        let net = Net(name);
        net.ip("link set lo up")?;
        Ok(net)
    }

    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.0)
    }

    fn ip(&self, args: &str) -> Result {
        run(Command::new("ip").args(["-n", &self.0]).args(args.split(' ')))
    }

    /// A command inside.
    pub fn command(&self, program: &Path) -> Command {
        let mut c = Command::new("nsenter");
        c.arg(format!("--net={}", self.path().display())).arg(program);
        c
    }

    /// Starts `work` on a thread of its own inside.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> std::thread::JoinHandle<Result<T>> {
        let path = self.path();
        std::thread::spawn(move || {
            let ns = File::open(&path).map_err(|e| format!("{}: {e}", path.display()))?;
            setns(ns, CloneFlags::CLONE_NEWNET).map_err(text)?;
            work()
        })
    }

    /// [`Net::spawn`], and waits for it.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        self.spawn(work).join().map_err(|_| "a thread of the bench panicked".to_owned())?
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        let _ = run(Command::new("ip").args(["netns", "del", &self.0]));
    }
}

pub fn run(command: &mut Command) -> Result {
    let out = command.stdin(Stdio::null()).output().map_err(|e| format!("{command:?}: {e}"))?;
    if out.status.success() {
        Ok(())
    } else {
        Err(format!("{command:?}: {}", String::from_utf8_lossy(&out.stderr)))
    }
}

/// A node with a pod that serves and one that asks, and somebody outside.
pub struct World {
    pub node: Net,
    pub pod: Net,
    pub client: Net,
    pub outside: Net,
}

impl World {
    pub fn new(tag: &str) -> Result<World> {
        let net = |role: &str| Net::new(format!("obp{}{tag}{role}", std::process::id()));
        let w = World { node: net("n")?, pod: net("p")?, client: net("c")?, outside: net("o")? };
        w.node.run(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").map_err(text))?;
        w.node.ip(&format!("link add up0 type veth peer name eth0 netns {}", w.outside.0))?;
        w.node.ip(&format!("addr add {NODE}/24 dev up0"))?;
        w.node.ip("link set up0 up")?;
        w.outside.ip(&format!("addr add {OUTSIDE}/24 dev eth0"))?;
        w.outside.ip("link set eth0 up")?;
        w.outside.ip(&format!("route add default via {NODE}"))?;
        w.attach("pod0", &w.pod, POD, 1)?;
        w.attach("pod1", &w.client, CLIENT, 2)?;
        // A connection to an address that no Service has yet fails at once, where it begins: the node would say so once a
        // second only.
        w.client.ip(&format!("route add unreachable {SERVICES}"))?;
        Ok(w)
    }

    /// As the CNI plugin does: host routes and permanent neighbours.
    fn attach(&self, name: &str, pod: &Net, address: Ipv4Addr, number: u8) -> Result {
        let (own, theirs) = (format!("02:72:00:00:00:{number:02x}"), format!("02:72:00:00:01:{number:02x}"));
        let peer = format!("type veth peer name eth0 address {theirs} netns {}", pod.0);
        self.node.ip(&format!("link add {name} address {own} {peer}"))?;
        self.node.ip(&format!("link set {name} up"))?;
        pod.ip("link set eth0 up")?;
        pod.ip(&format!("addr add {address}/32 dev eth0"))?;
        pod.ip(&format!("neigh replace {GATEWAY} lladdr {own} dev eth0 nud permanent"))?;
        pod.ip(&format!("route add {GATEWAY} dev eth0 scope link"))?;
        pod.ip(&format!("route add default via {GATEWAY} dev eth0"))?;
        self.node.ip(&format!("neigh replace {address} lladdr {theirs} dev {name} nud permanent"))?;
        self.node.ip(&format!("route add {address}/32 dev {name}"))
    }
}

/// A cgroup (version 2) that this process enters and leaves; removed on drop.
pub struct Cgroup {
    root: PathBuf,
    pub path: PathBuf,
}

impl Cgroup {
    pub fn new() -> Result<Cgroup> {
        let mounts = std::fs::read_to_string("/proc/mounts").map_err(text)?;
        let root = mounts.lines().find_map(|l| {
            let f: Vec<&str> = l.split(' ').collect();
            (f.get(2) == Some(&"cgroup2")).then(|| PathBuf::from(f[1]))
        });
        let root = root.ok_or("cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")?;
        let path = root.join(format!("orlop-bench-{}", std::process::id()));
        std::fs::create_dir(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Cgroup { root, path })
    }

    /// From now on the programs attached to the cgroup see this process; or not any more.
    pub fn enter(&self, inside: bool) -> Result {
        let procs = if inside { &self.path } else { &self.root }.join("cgroup.procs");
        std::fs::write(&procs, std::process::id().to_string())
            .map_err(|e| format!("{}: {e}", procs.display()))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = self.enter(false);
        let _ = std::fs::remove_dir(&self.path);
    }
}
