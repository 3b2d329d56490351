//! Pull and unpack over CRI: 10 layers, 5,000 files, about 130 MB of gzip, from a registry on loopback, beside Debian's containerd.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use orlop_proto::cri;
use serde_json::json;
use sha2::Digest as _;

use super::node::Node;
use super::table::{Goal, Table, Times, Unit};
use super::{Options, Result, block_on, process, text};

const LAYERS: usize = 10;

pub fn run(options: &Options) -> Result<Vec<Table>> {
    let registry = Registry::start()?;
    let size = registry.push(options.files)?;
    let name = format!("{}/bench:v1", registry.address);
    let rounds = options.rounds;
    let files = LAYERS * options.files;
    let (mut ours, mut theirs) = (Pulls::default(), Pulls::default());
    block_on(async {
        // Kept until the end: ext4 without a journal looks for new inodes past all that were deleted within a minute, which costs
        // more than the pull.
        let mut kept = Vec::new();
        for _ in 0..rounds {
            let node = Node::orlop(&[]).await?;
            ours.one(&node, &name).await?;
            kept.push(node);
            if let Some(node) = Node::containerd(&[], "none", Some(&registry.address)).await? {
                theirs.one(&node, &name).await?;
                kept.push(node);
            }
        }
        Ok(())
    })?;
    let there = (!theirs.peak.is_empty()).then_some(&theirs);
    let title =
        format!("pull of {LAYERS} layers, {files} files, {} MB gzip, {rounds} times", size / 1_000_000);
    let mut table = Table::new(title, there.map(|_| "containerd"));
    table.times("PullImage", &ours.wall, there.map(|t| &t.wall), [Some(Goal::Times(2.6)), None]);
    table.times("CPU of the server", &ours.cpu, there.map(|t| &t.cpu), [None, None]);
    let peak = |p: &Pulls| p.peak.iter().copied().fold(0.0, f64::max);
    let goal = Some(Goal::Figure(64.0));
    table.row("peak memory above idle", Unit::MiB, peak(&ours), there.map(peak), goal);
    Ok(vec![table])
}

#[derive(Default)]
struct Pulls {
    wall: Times,
    cpu: Times,
    /// MiB above what the server had before.
    peak: Vec<f64>,
}

impl Pulls {
    async fn one(&mut self, node: &Node, name: &str) -> Result {
        // What earlier rounds wrote is on disk.
        super::node::run(&mut Command::new("sync"))?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let idle = process::reset_peak(node.pid());
        let cpu = process::cpu(node.pid());
        let begun = Instant::now();
        let image = Some(cri::ImageSpec { image: name.to_owned(), ..Default::default() });
        let request = cri::PullImageRequest { image, ..Default::default() };
        node.images().pull_image(request).await.map_err(text)?;
        self.wall.add(begun.elapsed());
        self.cpu.add(process::cpu(node.pid()).saturating_sub(cpu));
        self.peak.push(process::peak(node.pid()) - idle);
        Ok(())
    }
}

/// Debian's docker-registry in a folder of its own.
struct Registry {
    address: String,
    child: Child,
    _dir: tempfile::TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Registry {
    fn start() -> Result<Registry> {
        let dir = tempfile::Builder::new().prefix("orlop-bench-registry-").tempdir().map_err(text)?;
        // An address that no other process uses, outside of the range of tests.
        let pid = std::process::id();
        let address = format!("127.{}.{}.{}:5000", 128 + (pid >> 16) % 64, (pid >> 8) & 0xff, pid & 0xff);
        let config = dir.path().join("config.yml");
        let body = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {address}\n",
            dir.path().join("data").display()
        );
        std::fs::write(&config, body).map_err(text)?;
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("docker-registry: {e}; apt-get install docker-registry"))?;
        let registry = Registry { address, child, _dir: dir };
        let begun = Instant::now();
        while registry.send("GET", "/v2/", "", b"").is_err() {
            if begun.elapsed() > Duration::from_secs(20) {
                return Err(format!("docker-registry does not answer at {}", registry.address));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(registry)
    }

    /// One request; gives the `Location` of a success.
    fn send(&self, method: &str, path: &str, kind: &str, body: &[u8]) -> Result<String> {
        let path = path.strip_prefix(&format!("http://{}", self.address)).unwrap_or(path);
        let mut stream = TcpStream::connect(&self.address).map_err(text)?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
            self.address,
            body.len()
        );
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).map_err(text)?;
        let mut reader = BufReader::new(stream);
        let mut status = String::new();
        reader.read_line(&mut status).map_err(text)?;
        let mut rest = String::new();
        reader.read_to_string(&mut rest).map_err(text)?;
        if !status.split(' ').nth(1).is_some_and(|code| code.starts_with('2')) {
            return Err(format!("{method} {path}: {}", status.trim()));
        }
        let location = rest.lines().find_map(|l| {
            let (key, value) = l.split_once(':')?;
            key.eq_ignore_ascii_case("location").then(|| value.trim().to_owned())
        });
        Ok(location.unwrap_or_default())
    }

    fn push_blob(&self, blob: &[u8]) -> Result<serde_json::Value> {
        let digest = digest(blob);
        let location = self.send("POST", "/v2/bench/blobs/uploads/", "text/plain", b"")?;
        let separator = if location.contains('?') { '&' } else { '?' };
        let to = format!("{location}{separator}digest={digest}");
        self.send("PUT", &to, "application/octet-stream", blob)?;
        Ok(json!({"digest": digest, "size": blob.len()}))
    }

    /// Pushes `bench:v1` with so many files a layer; gives the bytes of its layers.
    fn push(&self, files: usize) -> Result<u64> {
        let (mut layers, mut diffs, mut size) = (Vec::new(), Vec::new(), 0);
        for number in 0..LAYERS {
            let tar = layer(number, files)?;
            diffs.push(digest(&tar));
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
            gzip.write_all(&tar).map_err(text)?;
            let blob = gzip.finish().map_err(text)?;
            size += blob.len() as u64;
            let mut descriptor = self.push_blob(&blob)?;
            descriptor["mediaType"] = json!("application/vnd.oci.image.layer.v1.tar+gzip");
            layers.push(descriptor);
        }
        let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let config = json!({"architecture": arch, "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": diffs}});
        let mut config = self.push_blob(config.to_string().as_bytes())?;
        config["mediaType"] = json!("application/vnd.oci.image.config.v1+json");
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers});
        self.send("PUT", "/v2/bench/manifests/v1", kind, manifest.to_string().as_bytes())?;
        Ok(size)
    }
}

fn digest(bytes: &[u8]) -> String {
    let hex: Vec<String> = sha2::Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
    format!("sha256:{}", hex.concat())
}

/// Files of about 44 KB, three parts noise to five parts text, as programs are.
fn layer(number: usize, files: usize) -> Result<Vec<u8>> {
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
    for file in 0..files {
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
        tar.append_data(&mut h, format!("l{number}/d{}/f{file}", file % 10), &data[..length])
            .map_err(text)?;
    }
    tar.into_inner().map_err(text)
}
