//! Upstream's reference plugins as callees, each test in a network namespace of its own that stands for the node: bridge, host-local,
//! tuning, portmap, and a plugin that delegates as flannel does. Needs root, containernetworking-plugins, nftables and
//! portmap 1.9 (`scripts/deps.sh test`).

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags};
use nix::sched::{CloneFlags, setns, unshare};
use orlop_cni_invoke::{Cni, PodNetwork, PortMapping};
use serde_json::{Value, json};

const PLUGINS: &str = "/usr/lib/cni";

fn tools() -> PathBuf {
    std::env::var_os("ORLOP_TOOLS").map_or_else(|| "/var/cache/orlop-tools".into(), PathBuf::from)
}

fn run(program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// A node: the calling thread's own network namespace, and folders.
struct Node {
    dir: tempfile::TempDir,
    namespaces: Vec<PathBuf>,
}

impl Node {
    fn new() -> Node {
        for needed in [Path::new(PLUGINS).join("bridge"), tools().join("portmap")] {
            assert!(needed.exists(), "{} is missing: run scripts/deps.sh test", needed.display());
        }
        // Plugins are started by this thread, which the test's runtime never leaves.
        unshare(CloneFlags::CLONE_NEWNET).expect("run this test as root");
        run("ip", &["link", "set", "lo", "up"]);
        let dir = tempfile::tempdir().unwrap();
        for sub in ["conf", "bin", "leases", "delegates"] {
            fs::create_dir(dir.path().join(sub)).unwrap();
        }
        Node { dir, namespaces: Vec::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn configure(&self, file: &str, network: &Value) {
        fs::write(self.path("conf").join(file), network.to_string()).unwrap();
    }

    fn cni(&self) -> Cni {
        let bin = vec![self.path("bin"), tools(), PLUGINS.into()];
        Cni::with_limit(self.path("conf"), bin, self.path("cache"), Duration::from_secs(20))
    }

    /// A pod with a namespace pinned by a file.
    fn pod(&mut self, id: &str) -> PodNetwork {
        let at = self.path(id);
        fs::File::create(&at).unwrap();
        let target = at.clone();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            nix::mount::mount(
                Some("/proc/thread-self/ns/net"),
                &target,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )
            .unwrap();
        })
        .join()
        .unwrap();
        self.namespaces.push(at.clone());
        PodNetwork {
            container_id: id.into(),
            netns: at,
            ifname: "eth0".into(),
            pod_name: id.into(),
            pod_namespace: "ns".into(),
            pod_uid: id.into(),
            ..PodNetwork::default()
        }
    }

    fn leases(&self, network: &str) -> usize {
        let lease = |n: &str| n.starts_with(|c: char| c.is_ascii_digit());
        fs::read_dir(self.path("leases").join(network))
            .map(|d| d.flatten().filter(|e| lease(&e.file_name().to_string_lossy())).count())
            .unwrap_or(0)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for at in &self.namespaces {
            let _ = nix::mount::umount2(at, MntFlags::MNT_DETACH);
        }
    }
}

/// Serves `text` once on the pod's port 8080.
fn serve(pod: &PodNetwork, text: &'static str) -> std::thread::JoinHandle<()> {
    let netns = pod.netns.clone();
    let (tell, told) = std::sync::mpsc::channel();
    let served = std::thread::spawn(move || {
        setns(fs::File::open(netns).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
        let listener = TcpListener::bind("0.0.0.0:8080").unwrap();
        tell.send(()).unwrap();
        listener.accept().unwrap().0.write_all(text.as_bytes()).unwrap();
    });
    told.recv().unwrap();
    served
}

fn fetch(at: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(3))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

fn bridge(name: &str, subnet: &str, node: &Node) -> Value {
    json!({"type": "bridge", "bridge": name, "isGateway": true, "ipMasq": false, "hairpinMode": true,
        "ipam": {"type": "host-local", "dataDir": node.path("leases"), "ranges": [[{"subnet": subnet}]],
            "routes": [{"dst": "0.0.0.0/0"}]}})
}

#[tokio::test]
async fn bridge_tuning_and_portmap() {
    let mut node = Node::new();
    let network = json!({"cniVersion": "1.0.0", "name": "cbr0", "plugins": [
        bridge("cri-cbr0", "10.201.0.0/24", &node),
        {"type": "tuning", "sysctl": {"net.core.somaxconn": "500"}},
        {"type": "portmap", "backend": "nftables", "snat": true, "capabilities": {"portMappings": true}},
    ]});
    node.configure("10-cbr0.conflist", &network);
    node.cni().status().await.unwrap();
    let mut pod = node.pod("first");
    pod.port_mappings = vec![PortMapping {
        host_port: 18080,
        container_port: 8080,
        protocol: "tcp".into(),
        host_ip: String::new(),
    }];
    let result = node.cni().add(&pod).await.unwrap();
    let ip = result.pod_ips("eth0")[0];
    assert_eq!(ip, "10.201.0.2".parse::<IpAddr>().unwrap());
    for at in [SocketAddr::new(ip, 8080), "10.201.0.1:18080".parse().unwrap()] {
        let served = serve(&pod, "from the pod");
        assert_eq!(fetch(at).unwrap(), "from the pod", "{at}");
        served.join().unwrap();
    }
    let inside = format!("--net={}", pod.netns.display());
    assert_eq!(run("nsenter", &[&inside, "cat", "/proc/sys/net/core/somaxconn"]).trim(), "500");
    // Another process knows the result and can check the attachment, which notices what somebody broke.
    let again = node.cni();
    assert_eq!(again.result("first", "eth0").unwrap().pod_ips("eth0"), [ip]);
    again.check(&pod).await.unwrap();
    run("nsenter", &[&inside, "ip", "address", "del", &format!("{ip}/24"), "dev", "eth0"]);
    again.check(&pod).await.unwrap_err();
    for _ in 0..2 {
        again.del(&pod).await.unwrap();
    }
    assert_eq!(node.leases("cbr0"), 0);
    assert!(!run("ip", &["-o", "link"]).contains("veth"));
    assert!(fetch("10.201.0.1:18080".parse().unwrap()).is_err());
    assert!(!run("nft", &["list", "ruleset"]).contains("18080"));
}

/// As flannel's plugin: what it delegates depends on a file that its daemon writes, and DEL uses what ADD wrote down.
fn install_delegating_plugin(node: &Node) {
    let script = r#"#!/bin/sh
kept=DIR/delegates/$CNI_CONTAINERID
case $CNI_COMMAND in
ADD) . DIR/subnet.env
  cat > /dev/null
  printf '{"cniVersion":"0.3.1","name":"cbr0","type":"bridge","bridge":"cri-flan0","mtu":%s,"hairpinMode":true,"isDefaultGateway":true,"ipam":{"type":"host-local","dataDir":"DIR/leases","subnet":"%s"}}' "$FLANNEL_MTU" "$FLANNEL_SUBNET" > $kept
  exec PLUGINS/bridge < $kept;;
DEL) cat > /dev/null
  [ -e $kept ] || exit 0
  PLUGINS/bridge < $kept && rm $kept;;
VERSION) echo '{"cniVersion":"0.3.1","supportedVersions":["0.3.0","0.3.1"]}';;
esac
"#;
    let text = script.replace("DIR", &node.dir.path().display().to_string()).replace("PLUGINS", PLUGINS);
    let at = node.path("bin/flannel");
    fs::write(&at, text).unwrap();
    fs::set_permissions(&at, fs::Permissions::from_mode(0o755)).unwrap();
}

#[tokio::test]
async fn a_delegating_plugin_and_a_network_that_changes() {
    let mut node = Node::new();
    install_delegating_plugin(&node);
    fs::write(node.path("subnet.env"), "FLANNEL_SUBNET=10.202.3.0/24\nFLANNEL_MTU=1450\n").unwrap();
    let flannel = json!({"cniVersion": "0.3.1", "name": "cbr0", "plugins": [
        {"type": "flannel", "delegate": {"hairpinMode": true, "isDefaultGateway": true}},
        {"type": "portmap", "backend": "nftables", "capabilities": {"portMappings": true}},
    ]});
    node.configure("10-flannel.conflist", &flannel);
    let cni = node.cni();
    let first = node.pod("first");
    let ip = cni.add(&first).await.unwrap().pod_ips("eth0")[0];
    assert_eq!(ip, "10.202.3.2".parse::<IpAddr>().unwrap());
    let served = serve(&first, "delegated");
    assert_eq!(fetch(SocketAddr::new(ip, 8080)).unwrap(), "delegated");
    served.join().unwrap();
    let link =
        run("nsenter", &[&format!("--net={}", first.netns.display()), "ip", "-o", "link", "show", "eth0"]);
    assert!(link.contains("mtu 1450"), "{link}");

    // A file that sorts before it counts from the next pod on, without a restart; the first pod keeps what it has.
    node.configure(
        "05-other.conflist",
        &json!({"cniVersion": "1.0.0", "name": "other",
        "plugins": [bridge("cri-other0", "10.203.0.0/24", &node)]}),
    );
    let second = node.pod("second");
    assert_eq!(cni.add(&second).await.unwrap().pod_ips("eth0"), ["10.203.0.2".parse::<IpAddr>().unwrap()]);
    fs::remove_file(node.path("conf/10-flannel.conflist")).unwrap();
    cni.del(&first).await.unwrap();
    assert_eq!((node.leases("cbr0"), node.leases("other")), (0, 1));
    assert_eq!(fs::read_dir(node.path("delegates")).unwrap().count(), 0);
    // A broken file is said, and what runs can still be taken away.
    fs::write(node.path("conf/01-broken.conflist"), "{").unwrap();
    assert!(cni.status().await.is_err());
    nix::mount::umount2(&second.netns, MntFlags::MNT_DETACH).unwrap();
    fs::remove_file(&second.netns).unwrap();
    cni.del(&second).await.unwrap();
    assert_eq!(node.leases("other"), 0);
}

#[tokio::test]
async fn single_plugin_files_and_collection_after_a_crash() {
    let mut node = Node::new();
    let mut conf = bridge("cri-one0", "10.204.0.0/24", &node);
    conf["name"] = "one".into();
    conf["cniVersion"] = "0.4.0".into();
    node.configure("10-one.conf", &conf);
    let (kept, lost) = (node.pod("kept"), node.pod("lost"));
    for pod in [&kept, &lost] {
        node.cni().add(pod).await.unwrap();
    }
    assert_eq!(node.leases("one"), 2);
    // The next start knows only one of them.
    let valid = orlop_cni_invoke::Attachment { container_id: "kept".into(), ifname: "eth0".into() };
    node.cni().gc(std::slice::from_ref(&valid)).await.unwrap();
    assert_eq!(node.leases("one"), 1);
    node.cni().check(&kept).await.unwrap();
    node.cni().del(&kept).await.unwrap();
    assert_eq!(node.leases("one"), 0);
}
