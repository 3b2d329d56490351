//! A node and its pods as network namespaces of this test: nothing outlives the threads and files that hold them.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use orlop_cni_invoke::{Builtin, Cni, Neighbours, PodNetwork};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

fn program_dir() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_orlop-cni")).parent().unwrap().to_owned()
}

pub const NODE_IP: &str = "192.168.77.1";

pub fn new_netns() -> File {
    // SAFETY: only the network namespace changes; file descriptors stay shared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
        .expect("cannot make a network namespace: run the tests as root");
    File::open("/proc/thread-self/ns/net").unwrap()
}

/// Runs a program in this thread's namespaces; panics with what it wrote when it fails.
pub fn run(line: &str) -> String {
    let mut words = line.split_whitespace();
    let out = std::process::Command::new(words.next().unwrap())
        .args(words)
        .output()
        .unwrap_or_else(|e| panic!("cannot run {line:?}: {e}; apt-get install iproute2"));
    assert!(out.status.success(), "{line}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// The test's node. The calling thread lives in its namespace from now on.
pub struct Node {
    pub dir: tempfile::TempDir,
    pub cni: Cni,
    pub netns: File,
}

impl Node {
    /// A node with an uplink of MTU 1400, a node address and a default route.
    pub fn new(conflist: &str) -> Node {
        let node = Node::without_address(conflist);
        run("ip link add up0 mtu 1400 type veth peer name up1");
        run("ip link set up1 up");
        run("ip link set up0 up");
        run(&format!("ip addr add {NODE_IP}/24 dev up0"));
        run("ip route add default via 192.168.77.254");
        node
    }

    pub fn without_address(conflist: &str) -> Node {
        let netns = new_netns();
        run("ip link set lo up");
        let dir = tempfile::tempdir().unwrap();
        for sub in ["conf", "bin"] {
            std::fs::create_dir(dir.path().join(sub)).unwrap();
        }
        let cni = Self::open(dir.path());
        let node = Node { dir, cni, netns };
        node.configure(conflist);
        node
    }

    /// The plugin is a part of the caller.
    pub fn builtin(mut self) -> Node {
        self.cni = Self::caller(self.dir.path(), Some(orlop_cni::builtin(program_dir())));
        self
    }

    /// A fresh caller on the same folders, as after a restart.
    pub fn open(dir: &Path) -> Cni {
        Self::caller(dir, None)
    }

    fn caller(dir: &Path, builtin: Option<Builtin>) -> Cni {
        Cni::among(
            dir.join("conf"),
            vec![dir.join("bin"), program_dir()],
            dir.join("cache"),
            Duration::from_secs(20),
            Neighbours::default(),
            builtin,
        )
    }

    /// Writes the network's configuration; `DATA` stands for the plugin's data folder.
    pub fn configure(&self, conflist: &str) {
        let text = conflist.replace("DATA", self.data().to_str().unwrap());
        std::fs::write(self.dir.path().join("conf/10-test.conflist"), text).unwrap();
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// The names of the plugin's interfaces on the node.
    pub fn host_links(&self) -> Vec<String> {
        run("ip -o link")
            .lines()
            .filter_map(|l| l.split(": ").nth(1))
            .filter(|n| n.starts_with("orlp"))
            .map(|n| n.split('@').next().unwrap().to_owned())
            .collect()
    }

    /// Addresses on record, by container.
    pub fn recorded(&self) -> Vec<(String, IpAddr)> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(self.data().join("test")).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "json") {
                let v: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
                for a in v["data"]["allocations"].as_array().unwrap() {
                    let id = a["containerID"].as_str().unwrap().to_owned();
                    found.push((id, a["ip"].as_str().unwrap().parse().unwrap()));
                }
            }
        }
        found
    }
}

/// A pod's network namespace.
pub struct Pod {
    pub netns: File,
    pub network: PodNetwork,
}

impl Pod {
    pub fn new(id: &str) -> Pod {
        let netns = std::thread::spawn(new_netns).join().unwrap();
        let network = PodNetwork {
            container_id: id.to_owned(),
            // The plugin is another process, which finds our open file here.
            netns: format!("/proc/{}/fd/{}", std::process::id(), netns.as_raw_fd()).into(),
            ifname: "eth0".to_owned(),
            pod_name: format!("pod-{id}"),
            pod_namespace: "default".to_owned(),
            pod_uid: "u".to_owned(),
            ..PodNetwork::default()
        };
        Pod { netns, network }
    }
}

/// Runs `f` on a thread inside a namespace.
pub fn inside<T: Send>(netns: &File, f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|s| {
        s.spawn(|| {
            move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            f()
        })
        .join()
        .unwrap()
    })
}

/// Talks TCP from one namespace to an address in another; gives the address that the server saw.
pub fn talk(from: &File, to: &File, ip: IpAddr) -> IpAddr {
    let listener = inside(to, || TcpListener::bind(SocketAddr::new(ip, 0)).unwrap());
    let address = listener.local_addr().unwrap();
    talk_by(from, listener, address)
}

/// As [`talk`], by an address that leads to the listener.
pub fn talk_by(from: &File, listener: TcpListener, address: SocketAddr) -> IpAddr {
    std::thread::scope(|s| {
        let client = s.spawn(move || {
            inside(from, || {
                let mut c = TcpStream::connect_timeout(&address, Duration::from_secs(30))
                    .unwrap_or_else(|e| panic!("connect to {address}: {e}"));
                c.write_all(b"ping").unwrap();
                let mut answer = [0; 4];
                c.read_exact(&mut answer).unwrap();
                assert_eq!(&answer, b"pong");
            })
        });
        listener.set_nonblocking(true).unwrap();
        let start = std::time::Instant::now();
        let (mut c, peer) = loop {
            match listener.accept() {
                Ok(pair) => break pair,
                Err(_) if start.elapsed() < Duration::from_secs(40) => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(e) => panic!("nobody came to {address}: {e}"),
            }
        };
        c.set_nonblocking(false).unwrap();
        let mut question = [0; 4];
        c.read_exact(&mut question).unwrap();
        c.write_all(b"pong").unwrap();
        client.join().unwrap();
        peer.ip()
    })
}
