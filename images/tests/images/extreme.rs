//! Images as large as they come, and layers with everything that a file system can hold.

use std::fs;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::process::Command;

use orlop_images::{Digest, Image, ImageStore, Options, RootfsOptions};
use tar::{Builder, EntryType, Header};

use crate::fake::*;
use crate::support::*;

const FILES: usize = 100_000;
const LARGE_LAYERS: usize = 8;
/// Bytes of noise in each of them.
const NOISE: usize = 16 << 20;
/// Logical bytes of a sparse file in each of them.
const HOLES: u64 = 2 << 30;
/// What a pull may need above what the idle store has.
const MEMORY: u64 = 64 << 20;

fn header(kind: EntryType, size: u64) -> Header {
    let mut h = Header::new_gnu();
    h.set_entry_type(kind);
    h.set_mode(0o644);
    h.set_mtime(1_000_000_000);
    h.set_size(size);
    h
}

/// Every tenth file has content.
fn many_files() -> Vec<u8> {
    let mut tar = Builder::new(Vec::with_capacity(FILES * 570));
    for i in 0..FILES {
        let data: &[u8] = if i % 10 == 0 { b"some text" } else { b"" };
        let mut h = header(EntryType::Regular, data.len() as u64);
        tar.append_data(&mut h, format!("many/d{}/f{i}", i / 1000), data).unwrap();
    }
    tar.into_inner().unwrap()
}

/// Noise, and a file of the old GNU format with a piece at each end.
fn large(number: usize, noise: &[u8]) -> Vec<u8> {
    let mut tar = Builder::new(Vec::with_capacity(noise.len() + 4096));
    tar.append_data(&mut header(EntryType::Regular, noise.len() as u64), format!("noise{number}"), noise)
        .unwrap();
    let mut h = header(EntryType::GNUSparse, 8);
    h.set_path(format!("sparse{number}")).unwrap();
    let gnu = h.as_gnu_mut().unwrap();
    gnu.set_real_size(HOLES);
    for (piece, offset) in gnu.sparse.iter_mut().zip([0, HOLES - 4]) {
        piece.set_offset(offset);
        piece.set_length(4);
    }
    h.set_cksum();
    tar.append(&h, &b"headtail"[..]).unwrap();
    tar.into_inner().unwrap()
}

/// 10 GiB in one file, in PAX format 1.0; what is not a hole lies at its end.
fn larger() -> Vec<u8> {
    let size: u64 = 10 << 30;
    let mut data = format!("1\n{}\n4\n", size - 4).into_bytes();
    data.resize(512, 0);
    data.extend_from_slice(b"tail");
    let mut tar = Builder::new(Vec::new());
    tar.append_pax_extensions([
        ("GNU.sparse.major", &b"1"[..]),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"ten"),
        ("GNU.sparse.realsize", size.to_string().as_bytes()),
    ])
    .unwrap();
    tar.append_data(&mut header(EntryType::Regular, data.len() as u64), "GNUSparseFile.0/ten", &data[..])
        .unwrap();
    tar.into_inner().unwrap()
}

fn status(key: &str) -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix(key)).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// The pull of the test below, in a process whose memory is nobody else's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the child of the test below"]
async fn pulls_and_weighs_itself() {
    let Ok(root) = std::env::var("IMAGES_TEST_ROOT") else { return };
    let name = std::env::var("IMAGES_TEST_NAME").unwrap();
    let options = Options { certs_dir: None, ..Options::default() };
    let store = ImageStore::open(root.as_ref(), options).await.unwrap();
    let idle = status("VmRSS:");
    store.pull(&name, None).await.unwrap();
    let above = status("VmHWM:") - idle;
    println!("{} KiB above idle", above >> 10);
    assert!(above < MEMORY, "{above} bytes above idle");
}

/// A registry with one image.
fn serving(layers: Vec<Blob>) -> Fake {
    let config = config(&layers);
    let manifest = manifest(&config, &layers).to_string().into_bytes();
    Fake::start(Box::new(move |r, _| {
        let body = if r.line.contains("/manifests/") {
            Some(&manifest)
        } else if r.line.contains(&Digest::of(&config).hex()) {
            Some(&config)
        } else {
            let named = |l: &&Blob| r.line.contains(&l.digest.hex());
            layers.iter().find(named).map(|l| &l.bytes)
        };
        match body {
            Some(body) => response("200 OK", "", body.len(), body),
            None => response("404 Not Found", "", 0, b""),
        }
    }))
}

/// A pull in a process of its own, which fails when that takes too much memory.
fn weigh(root: &std::path::Path, name: &str) {
    let out = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "extreme::pulls_and_weighs_itself", "--ignored", "--nocapture"])
        .env("IMAGES_TEST_ROOT", root)
        .env("IMAGES_TEST_NAME", name)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && said.contains("above idle"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_files_and_26_gigabytes_need_little_memory_and_disk() {
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed.to_le_bytes()
    })
    .take(NOISE / 8)
    .flatten()
    .collect();
    let mut layers = vec![zstd(many_files()), gzip(larger())];
    for i in 0..LARGE_LAYERS {
        let tar = large(i, &noise);
        // Without compression at all, which costs the test nothing.
        layers.push(if i % 2 == 0 { gzip_level(tar, 0) } else { zstd(tar) });
    }
    let fake = serving(layers);
    let place = Place::new();
    // In memory: a disk's time for so many files is not what is tested.
    fs::create_dir_all(place.root()).unwrap();
    rustix::mount::mount("images-extreme", place.root(), "tmpfs", rustix::mount::MountFlags::empty(), None)
        .unwrap();
    let name = format!("{}/a:v1", fake.address);
    weigh(&place.root(), &name);

    let store = place.open().await;
    let image = store.get(&name).unwrap();
    let usage = store.usage().await.unwrap();
    assert!(usage.inodes > FILES as u64, "{usage:?}");
    assert!(usage.bytes < (LARGE_LAYERS * NOISE) as u64 + (8 << 20), "holes take no space: {usage:?}");
    let target = place.target("c");
    store.prepare_rootfs("c", &image, &target, &RootfsOptions::default()).await.unwrap();
    let tail = |name: &str| {
        let file = fs::File::open(target.join(name)).unwrap();
        let (mut end, meta) = ([0u8; 4], file.metadata().unwrap());
        file.read_exact_at(&mut end, meta.len() - 4).unwrap();
        assert!(meta.blocks() * 512 < 64 << 10, "{name}: {} blocks", meta.blocks());
        (meta.len(), end)
    };
    assert_eq!(tail("ten"), (10 << 30, *b"tail"));
    for i in 0..LARGE_LAYERS {
        assert_eq!(tail(&format!("sparse{i}")), (HOLES, *b"tail"));
        assert_eq!(fs::metadata(target.join(format!("noise{i}"))).unwrap().len(), NOISE as u64);
    }
    let folders = fs::read_dir(target.join("many")).unwrap().map(|d| d.unwrap().path());
    let files: usize = folders.map(|d| fs::read_dir(d).unwrap().count()).sum();
    assert_eq!(files, FILES);
    assert_eq!(fs::read(target.join("many/d99/f99990")).unwrap(), b"some text");
    store.remove_rootfs("c").await.unwrap();
    store.remove(&name).await.unwrap();
    assert_eq!((place.count("layers"), place.count("trash")), (1, 0));
}

/// Of the layer below; to compute it in the test would take as long as the test.
const TEN_GIGABYTES: &str = "sha256:bcf07cc1a838b71bb2e687075983dad1912876a8925ec0ddad3d2e0795c2afd0";

/// 10 GiB of one file in the archive itself, whose size fits into no octal field. The first GiB is not zeros.
fn ten_gigabytes() -> Blob {
    const UNIT: usize = 64 << 20;
    let size: u64 = 10 << 30;
    let mut h = header(EntryType::Regular, size);
    h.set_path("ten").unwrap();
    h.set_cksum();
    assert_eq!(h.as_bytes()[124], 0x80, "base 256");
    let frame = |data: &[u8]| zstd::encode_all(data, 1).unwrap();
    let text: Vec<u8> = (0..UNIT as u32 / 4).flat_map(|i| (i % 1000 + 1).to_le_bytes()).collect();
    let (text, zeros) = (frame(&text), frame(&vec![0; UNIT]));
    let texts = (1 << 30) / UNIT;
    let rest = size as usize / UNIT - texts;
    let bytes = [frame(h.as_bytes()), text.repeat(texts), zeros.repeat(rest), frame(&[0; 1024])].concat();
    Blob {
        digest: Digest::of(&bytes),
        diff: TEN_GIGABYTES.parse().unwrap(),
        bytes,
        kind: "application/vnd.oci.image.layer.v1.tar+zstd",
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_of_ten_gigabytes_is_written_to_disk() {
    let fake = serving(vec![ten_gigabytes()]);
    let place = Place::new();
    let room = rustix::fs::statvfs(place.dir.path()).unwrap();
    assert!(
        room.f_bavail * room.f_frsize > 3 << 30,
        "{} has less than 3 GiB left: free some, or set TMPDIR to another disk",
        place.dir.path().display()
    );
    let name = format!("{}/a:v1", fake.address);
    weigh(&place.root(), &name);
    let store = place.open().await;
    let image = store.get(&name).unwrap();
    let target = place.target("c");
    store.prepare_rootfs("c", &image, &target, &RootfsOptions::default()).await.unwrap();
    let file = fs::File::open(target.join("ten")).unwrap();
    let meta = file.metadata().unwrap();
    assert_eq!(meta.len(), 10 << 30);
    let taken = meta.blocks() * 512;
    assert!((1 << 30..(1 << 30) + (8 << 20)).contains(&taken), "{taken} bytes on disk");
    let number = |at: u64| {
        let mut n = [0; 4];
        file.read_exact_at(&mut n, at).unwrap();
        u32::from_le_bytes(n)
    };
    assert_eq!([number(0), number(4 * 999), number((1 << 30) - (64 << 20))], [1, 1000, 1]);
    assert_eq!([number(1 << 30), number((10 << 30) - 4)], [0, 0]);
    store.remove_rootfs("c").await.unwrap();
    store.remove(&name).await.unwrap();
    assert_eq!((place.count("layers"), place.count("trash")), (1, 0));
}

/// cap_net_raw, effective, as setcap writes it.
const CAPABILITY: &[u8] = b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";

/// A layer made by hand.
struct Layer(Builder<Vec<u8>>);

impl Layer {
    fn new() -> Layer {
        Layer(Builder::new(Vec::new()))
    }

    fn attributes(mut self, records: &[(&str, &[u8])]) -> Layer {
        let names: Vec<String> = records.iter().map(|(n, _)| format!("SCHILY.xattr.{n}")).collect();
        self.0
            .append_pax_extensions(names.iter().map(String::as_str).zip(records.iter().map(|(_, v)| *v)))
            .unwrap();
        self
    }

    fn entry(mut self, kind: EntryType, name: &str, data: &[u8]) -> Layer {
        let mut h = header(kind, data.len() as u64);
        h.set_mode(if kind == EntryType::Directory { 0o755 } else { 0o644 });
        self.0.append_data(&mut h, name, data).unwrap();
        self
    }

    fn file(self, name: &str, data: &str) -> Layer {
        self.entry(EntryType::Regular, name, data.as_bytes())
    }

    fn dir(self, name: &str) -> Layer {
        self.entry(EntryType::Directory, name, b"")
    }

    fn link(mut self, name: &str, to: &str) -> Layer {
        self.0.append_link(&mut header(EntryType::Link, 0), name, to).unwrap();
        self
    }

    fn device(mut self, kind: EntryType, name: &str, major: u32, minor: u32) -> Layer {
        let mut h = header(kind, 0);
        h.set_device_major(major).unwrap();
        h.set_device_minor(minor).unwrap();
        self.0.append_data(&mut h, name, &b""[..]).unwrap();
        self
    }

    fn blob(self) -> Blob {
        gzip(self.0.into_inner().unwrap())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_sees_what_its_layers_say_and_no_layer_reaches_what_is_hidden() {
    let below = Layer::new()
        .attributes(&[("user.folder", b"kept")])
        .dir("bin/")
        .attributes(&[("security.capability", CAPABILITY), ("user.note", b"kept")])
        .file("bin/ping", "#!")
        .link("bin/ping6", "bin/ping")
        .device(EntryType::Char, "dev/zero", 1, 5)
        .device(EntryType::Block, "dev/loop", 7, 0)
        .entry(EntryType::Fifo, "pipe", b"")
        .dir("opaque/")
        .file("opaque/old", "old")
        .dir("kept/")
        .file("kept/old", "old")
        .dir("secret/")
        .file("secret/key", "key")
        .blob();
    // A layer must not use overlayfs' own marks: with them it would hide, or show under another name, what is below.
    let above = Layer::new()
        .dir("opaque/")
        .file("opaque/.wh..wh..opq", "")
        .file("opaque/new", "new")
        .attributes(&[("trusted.overlay.opaque", b"y"), ("user.overlay.opaque", b"y")])
        .dir("kept/")
        .attributes(&[("trusted.overlay.redirect", b"/secret"), ("trusted.overlay.origin", b"x")])
        .dir("public/")
        .file("secret/.wh.key", "")
        .link("bin/ping-again", "bin/ping")
        .blob();
    let registry = Registry::start().await;
    registry.push("marks", "v1", &[below, above]).await;
    let place = Place::new();
    let store = place.open().await;
    let image = store.pull(&format!("{}/marks:v1", registry.address), None).await.unwrap();
    check_marks(&place, &store, &image).await;
    // The same after a way through an archive, with layers packed anew from their files.
    let archive = place.dir.path().join("marks.tar");
    store.export(&[&image.id], &archive).await.unwrap();
    let second = Place::new();
    let store = second.open().await;
    let images = store.import(&archive, None).await.unwrap();
    check_marks(&second, &store, &images[0]).await;
}

async fn check_marks(place: &Place, store: &ImageStore, image: &Image) {
    let target = place.target("c");
    store.prepare_rootfs("c", image, &target, &RootfsOptions::default()).await.unwrap();
    let at = |name: &str| target.join(name);
    let names = |dir: &str| {
        let mut names: Vec<_> =
            fs::read_dir(at(dir)).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(names("opaque"), ["new"]);
    assert_eq!(names("kept"), ["old"]);
    assert!(names("public").is_empty() && names("secret").is_empty());
    let attribute = |name: &str, key: &str| {
        let mut value = [0u8; 64];
        rustix::fs::lgetxattr(at(name), key, &mut value[..]).map(|n| value[..n].to_vec())
    };
    // A hard link to a file of a lower layer is a copy of it, with all that it has.
    for name in ["bin/ping", "bin/ping6", "bin/ping-again"] {
        for (key, value) in [("security.capability", CAPABILITY), ("user.note", b"kept")] {
            assert_eq!(attribute(name, key).as_deref(), Ok(value), "{key} of {name}");
        }
    }
    assert!(attribute("kept", "user.overlay.opaque").is_err());
    // A folder without an entry in the upper layer has what the lower one says.
    assert_eq!(attribute("bin", "user.folder").as_deref(), Ok(&b"kept"[..]));
    let (one, two) = (fs::metadata(at("bin/ping")).unwrap(), fs::metadata(at("bin/ping6")).unwrap());
    assert_eq!((one.ino(), one.nlink()), (two.ino(), 2));
    let zero = fs::metadata(at("dev/zero")).unwrap();
    assert_eq!((zero.rdev(), zero.file_type().is_char_device()), (rustix::fs::makedev(1, 5), true));
    let disk = fs::metadata(at("dev/loop")).unwrap();
    assert_eq!((disk.rdev(), disk.file_type().is_block_device()), (rustix::fs::makedev(7, 0), true));
    assert!(fs::metadata(at("pipe")).unwrap().file_type().is_fifo());
    store.remove_rootfs("c").await.unwrap();
}
