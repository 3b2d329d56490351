//! `cargo bench -p orlop-images`: pull and unpack 10 layers, 5,000 files, about 130 MB of gzip from a registry on loopback, beside
//! Debian's containerd over its CRI socket. Rounds alternate, so that both meet the same machine; the ratio is what counts.
//! Needs root, docker-registry, containerd and crictl. `ORLOP_BENCH_ROUNDS` sets the number of rounds.

#[path = "../tests/images/support.rs"]
#[allow(dead_code)]
mod support;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use orlop_images::{ImageStore, Options};
use support::{Blob, Place, Registry, gzip_level};

const LAYERS: usize = 10;
const FILES: usize = 500;

fn main() {
    let mut args = std::env::args().skip(1);
    // A process of its own, whose memory is nobody else's.
    if args.next().as_deref() == Some("pull") {
        let (root, name) = (args.next().expect("root"), args.next().expect("name"));
        return pull_once(Path::new(&root), &name);
    }
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    runtime.block_on(compare());
}

/// One pull into an empty store; prints milliseconds, CPU milliseconds and the growth of memory in KiB.
fn pull_once(root: &Path, name: &str) {
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    let (wall, cpu, memory) = runtime.block_on(async {
        let options = Options { certs_dir: None, ..Options::default() };
        let store = ImageStore::open(root, options).await.expect("open");
        let (idle, cpu) = (status("VmRSS:"), cpu_ms(std::process::id()));
        let start = Instant::now();
        store.pull(name, None).await.expect("pull");
        let wall = start.elapsed();
        (wall, cpu_ms(std::process::id()) - cpu, status("VmHWM:") - idle)
    });
    println!("{} {cpu} {memory}", wall.as_millis());
}

fn status(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").expect("status");
    let line = text.lines().find_map(|l| l.strip_prefix(key)).expect("line");
    line.trim().trim_end_matches(" kB").parse().expect("number")
}

/// User and system time so far.
fn cpu_ms(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    let fields: Vec<&str> = text.rsplit(')').next().expect("fields").split_whitespace().collect();
    (fields[11].parse::<u64>().expect("utime") + fields[12].parse::<u64>().expect("stime")) * 10
}

/// Files of about 44 KB, three parts noise to five parts text, as programs are.
fn layer(number: usize) -> Blob {
    let mut seed = 0x9e37_79b9_7f4a_7c15u64 ^ (number as u64 + 1);
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let words: Vec<Vec<u8>> =
        (0..4000).map(|_| (0..3 + random() % 10).map(|_| random() as u8).collect()).collect();
    let mut tar = tar::Builder::new(Vec::new());
    for file in 0..FILES {
        let length = (random() % 44_000 + random() % 44_000) as usize;
        let mut data = Vec::with_capacity(length + 200);
        while data.len() < length {
            for _ in 0..10 {
                data.extend_from_slice(&words[random() as usize % words.len()]);
            }
            data.extend((0..5).map(|_| random() as u8));
        }
        let mut h = tar::Header::new_gnu();
        h.set_size(length as u64);
        h.set_mode(0o644);
        h.set_mtime(1_000_000_000);
        tar.append_data(&mut h, format!("l{number}/d{}/f{file}", file % 10), &data[..length]).expect("tar");
    }
    gzip_level(tar.into_inner().expect("tar"), 6)
}

async fn compare() {
    let rounds: usize = std::env::var("ORLOP_BENCH_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(5);
    let registry = Registry::start().await;
    let layers: Vec<Blob> = (0..LAYERS).map(layer).collect();
    let size: usize = layers.iter().map(|l| l.bytes.len()).sum();
    registry.push("bench", "v1", &layers).await;
    drop(layers);
    let name = format!("{}/bench:v1", registry.address);
    println!("{LAYERS} layers, {} files, {} MB gzip; {rounds} rounds", LAYERS * FILES, size / 1_000_000);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    // Kept until the end: ext4 without a journal looks for new inodes past all that were deleted within a minute, which
    // costs more than the pull.
    let mut kept: (Vec<Place>, Vec<Containerd>) = Default::default();
    for _ in 0..rounds {
        settle();
        let place = Place::new();
        let me = std::env::current_exe().expect("own path");
        let out = Command::new(me).arg("pull").arg(place.root()).arg(&name).output().expect("child");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        ours.push(text.split_whitespace().map(|n| n.parse().expect("number")).collect::<Vec<u64>>());
        kept.0.push(place);
        let containerd = Containerd::start(&registry.address);
        settle();
        theirs.push(containerd.pull(&name));
        kept.1.push(containerd);
    }
    let median = |v: &[Vec<u64>], i: usize| {
        let mut column: Vec<u64> = v.iter().map(|r| r[i]).collect();
        column.sort_unstable();
        column[column.len() / 2]
    };
    let (wall, cpu) = (median(&ours, 0), median(&ours, 1));
    let (their_wall, their_cpu) = (median(&theirs, 0), median(&theirs, 1));
    println!("              wall ms   CPU ms   memory above idle, KiB");
    println!("orlop        {wall:>8} {cpu:>8} {:>8}", median(&ours, 2));
    println!("containerd   {their_wall:>8} {their_cpu:>8}");
    println!("ratio        {:>8.2} {:>8.2}", their_wall as f64 / wall as f64, their_cpu as f64 / cpu as f64);
}

/// What earlier rounds wrote is on disk.
fn settle() {
    rustix::fs::sync();
    std::thread::sleep(Duration::from_secs(1));
}

struct Containerd {
    child: Child,
    dir: tempfile::TempDir,
}

impl Containerd {
    fn start(registry: &str) -> Containerd {
        let dir = tempfile::Builder::new().prefix("images-containerd-").tempdir().expect("folder");
        let at = |name: &str| dir.path().join(name);
        let hosts = at("certs").join(registry);
        std::fs::create_dir_all(&hosts).expect("folder");
        std::fs::write(hosts.join("hosts.toml"), format!("server = \"http://{registry}\""))
            .expect("hosts.toml");
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\n[grpc]\naddress = {:?}\n[plugins.'io.containerd.grpc.v1.cri'.registry]\nconfig_path = {:?}\n",
            at("root"),
            at("state"),
            at("sock"),
            at("certs")
        );
        std::fs::write(at("config.toml"), config).expect("config");
        let child = Command::new("containerd")
            .arg("-c")
            .arg(at("config.toml"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("containerd must be installed: apt-get install containerd");
        let containerd = Containerd { child, dir };
        let until = Instant::now() + Duration::from_secs(30);
        while !containerd.crictl(&["info"]) {
            assert!(Instant::now() < until, "containerd does not answer");
            std::thread::sleep(Duration::from_millis(200));
        }
        containerd
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("sock")
    }

    fn crictl(&self, args: &[&str]) -> bool {
        Command::new("crictl")
            .args(["--timeout", "120s", "--runtime-endpoint"])
            .arg(format!("unix://{}", self.socket().display()))
            .args(args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .expect("crictl must be installed: go install sigs.k8s.io/cri-tools/cmd/crictl@v1.36.0")
            .success()
    }

    /// Milliseconds of one pull, and of the daemon's CPU.
    fn pull(&self, name: &str) -> Vec<u64> {
        let cpu = cpu_ms(self.child.id());
        let start = Instant::now();
        assert!(self.crictl(&["pull", name]), "containerd cannot pull {name}");
        vec![start.elapsed().as_millis() as u64, cpu_ms(self.child.id()) - cpu]
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
