//! Full disks, and kills at any moment.

use std::fs;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::fake::Fake;
use crate::support::*;
use orlop_base::testkit::{built_program, wait_until};
use orlop_images::{Digest, Error, ImageStore, Options, RootfsOptions};
use rustix::mount::{MountFlags, mount, mount_remount};

/// Serves one image under every name.
fn serving(layers: Vec<Blob>) -> Fake {
    let config = config(&layers);
    let manifest = manifest(&config, &layers).to_string().into_bytes();
    Fake::start(Box::new(move |r, _| {
        let by_digest = |bytes: &[u8]| r.line.contains(&Digest::of(bytes).hex());
        let body = match layers.iter().find(|l| by_digest(&l.bytes)) {
            Some(layer) => &layer.bytes,
            None if r.line.contains("/manifests/") => &manifest,
            None => &config,
        };
        let head = r.line.starts_with("HEAD");
        crate::fake::response("200 OK", "", body.len(), if head { b"" } else { body })
    }))
}

fn noise(length: usize, seed: usize) -> Vec<u8> {
    (0..length as u32).map(|i| ((i ^ seed as u32).wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_is_named_and_gets_its_space_back() {
    let small = gzip(tar_of(&[("small", b"s")]));
    let big = plain(tar_of(&[("one", &noise(3 << 20, 1)), ("two", &noise(9 << 20, 2)), ("three", b"3")]));
    let names: Vec<String> = (0..2000).map(|i| format!("d/f{i}")).collect();
    let many = gzip(tar_of(&names.iter().map(|n| (n.as_str(), &b"x"[..])).collect::<Vec<_>>()));
    for (what, layer, tight, wide) in
        [("space", big, c"size=8m", c"size=64m"), ("inodes", many, c"nr_inodes=500", c"nr_inodes=5000")]
    {
        let fake = serving(vec![small.clone(), layer]);
        let name = format!("{}/a:v1", fake.address);
        let place = Place::new();
        fs::create_dir_all(place.root()).unwrap();
        mount("images-full", place.root(), "tmpfs", MountFlags::empty(), Some(tight)).unwrap();
        let options = Options { certs_dir: None, keep_layer_blobs: what == "inodes", ..Options::default() };
        let store = ImageStore::open(&place.root(), options).await.unwrap();
        let free = || {
            let s = rustix::fs::statvfs(place.root()).unwrap();
            (s.f_bfree, s.f_ffree)
        };
        let before = free();
        for _ in 0..2 {
            let e = store.pull(&name, None).await.unwrap_err();
            assert!(matches!(&e, Error::Full { root, .. } if *root == place.root()), "{what}: {e}");
            assert!(e.to_string().contains("No space left") && e.is_transient(), "{what}: {e}");
            assert_eq!((place.count("ingest"), place.count("layers"), place.count("content")), (0, 1, 0));
            // A process that another test is just starting holds copies of open files until its exec.
            wait_until(&format!("{what}: all of it is given back"), PATIENCE, || async {
                (free() == before).then_some(())
            })
            .await;
        }
        mount_remount(place.root(), MountFlags::empty(), wide).unwrap();
        let image = store.pull(&name, None).await.expect(what);
        let target = place.target("c");
        store.prepare_rootfs("c", &image, &target, &RootfsOptions::default()).await.unwrap();
        assert_eq!(fs::read(target.join("small")).unwrap(), b"s");

        // Nothing is left for a second container.
        let ballast = place.root().join("ballast");
        let mut made = 0;
        fs::create_dir(&ballast).unwrap();
        match what {
            "space" => assert!(fs::write(ballast.join("big"), vec![1u8; 64 << 20]).is_err()),
            _ => {
                while fs::write(ballast.join(made.to_string()), "").is_ok() {
                    made += 1
                }
            }
        }
        let second = place.target("d");
        let e = store.prepare_rootfs("d", &image, &second, &RootfsOptions::default()).await.unwrap_err();
        assert!(matches!(e, Error::Full { .. }), "{what}: {e}");
        assert_eq!(store.rootfs_keys(), ["c"]);
        fs::remove_dir_all(&ballast).unwrap();
        store.prepare_rootfs("d", &image, &second, &RootfsOptions::default()).await.unwrap();
        store.remove_rootfs("c").await.unwrap();
        store.remove_rootfs("d").await.unwrap();
    }
}

/// Whoever has a full disk removes images: the list of what is left must not need more room than there is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_can_be_removed_from_a_full_disk() {
    for (what, tight) in [("space", c"size=8m"), ("inodes", c"nr_inodes=500")] {
        let fake = serving(vec![gzip(tar_of(&[("small", b"s")]))]);
        let names = ["a", "b", "c"].map(|n| format!("{}/{n}:v1", fake.address));
        let place = Place::new();
        fs::create_dir_all(place.root()).unwrap();
        mount("images-full", place.root(), "tmpfs", MountFlags::empty(), Some(tight)).unwrap();
        let store = place.open().await;
        for name in &names {
            store.pull(name, None).await.unwrap();
        }
        let ballast = place.root().join("ballast");
        let mut made = 0;
        fs::create_dir(&ballast).unwrap();
        match what {
            "space" => assert!(fs::write(ballast.join("big"), vec![1u8; 64 << 20]).is_err()),
            _ => {
                while fs::write(ballast.join(made.to_string()), "").is_ok() {
                    made += 1
                }
            }
        }
        // Again and again: each removal leaves what the next one needs.
        for name in &names {
            assert!(store.remove(name).await.expect(what));
        }
        assert_eq!((place.count("layers"), place.count("content")), (1, 0), "{what}");
        drop(store);
        assert!(place.open().await.list().is_empty());
    }
}

/// What a pull has finished when it fails is there for the next try, and not for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layers_of_a_failed_pull_stay_for_another_try_only() {
    let layers = [gzip(tar_of(&[("one", b"1")])), gzip(tar_of(&[("two", b"2")]))];
    let config = config(&layers);
    let manifest = manifest(&config, &layers).to_string().into_bytes();
    let whole = Arc::new(AtomicBool::new(false));
    let (is_whole, data) = (whole.clone(), layers.clone());
    let fake = Fake::start(Box::new(move |r, _| {
        if r.line.contains(&data[1].digest.hex()) && !is_whole.load(SeqCst) {
            return crate::fake::response("404 Not Found", "", 0, b"");
        }
        let layer = data.iter().find(|l| r.line.contains(&l.digest.hex())).unwrap_or(&data[0]);
        crate::fake::serve(&r.line, &(manifest.clone(), config.clone(), layer.clone()))
    }));
    let name = format!("{}/a:v1", fake.address);
    let place = Place::new();
    let one_layer = |parallel_layers| Options { parallel_layers, ..Options::default() };
    let soon = Options { keep_unfinished: Duration::from_millis(1), ..one_layer(1) };
    let collected = || async {
        wait_until("they are gone", PATIENCE, || async { (place.count("layers") == 1).then_some(()) }).await
    };
    // One after the other, so that the first is finished when the second fails.
    let store = place.open_with(one_layer(1)).await;
    store.pull(&name, None).await.unwrap_err();
    assert_eq!(place.count("layers"), 2);
    drop(store);
    let store = place.open_with(soon).await;
    collected().await;
    store.pull(&name, None).await.unwrap_err();
    collected().await;
    drop(store);
    let store = place.open_with(one_layer(1)).await;
    store.pull(&name, None).await.unwrap_err();
    let before = fake.requests(&layers[0].digest.hex()).len();
    whole.store(true, SeqCst);
    store.pull(&name, None).await.unwrap();
    assert_eq!(fake.requests(&layers[0].digest.hex()).len(), before, "the next try has the first layer");
    // And whatever try brought a layer, the disk has it in the end.
    let synced = |dir: std::io::Result<fs::DirEntry>| {
        fs::read_to_string(dir.unwrap().path().join("layer.json"))
            .is_ok_and(|r| r.contains("\"unsynced_since\":null"))
    };
    wait_until("both layers are on the disk", PATIENCE, || async {
        let count = fs::read_dir(place.root().join("layers"))
            .unwrap()
            .filter_map(|d| synced(d).then_some(()))
            .count();
        (count == 2).then_some(())
    })
    .await;
}

const FILES: usize = 15;

fn ten_layers() -> Vec<Blob> {
    (0..10)
        .map(|l| {
            let files: Vec<(String, Vec<u8>)> =
                (0..FILES).map(|f| (format!("l{l}/f{f}"), noise(3000 + 100 * f, l * 100 + f))).collect();
            gzip(tar_of(&files.iter().map(|(n, d)| (n.as_str(), &d[..])).collect::<Vec<_>>()))
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thirty_kills_leave_nothing_that_the_next_start_does_not_repair() {
    const ROUNDS: u32 = 30;
    let churn =
        built_program("examples/churn", "ORLOP_CHURN", "run `cargo build -p orlop-images --examples`");
    let fake = serving(ten_layers());
    let name = format!("{}/a:v1", fake.address);
    let place = Place::new();
    // How long one turn of the child takes here and now.
    let turn = {
        let store = place.open().await;
        let start = Instant::now();
        store.pull(&name, None).await.unwrap();
        store.remove(&name).await.unwrap();
        start.elapsed() * 2
    };
    let (mut listed, mut leftovers) = (0, 0);
    for round in 0..ROUNDS {
        let mut child =
            Command::new(&churn).arg(place.root()).arg(&name).stdout(Stdio::piped()).spawn().unwrap();
        let mut output = std::io::BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("working") {
            line.clear();
            assert!(std::io::BufRead::read_line(&mut output, &mut line).unwrap() > 0, "the child works");
        }
        tokio::time::sleep(turn * round / ROUNDS).await;
        child.kill().unwrap();
        child.wait().unwrap();
        leftovers += place.count("ingest") + place.count("trash");
        // The lock goes with the last process that has it, which may be one that stands for a user namespace.
        let options = || Options { certs_dir: None, ..Options::default() };
        let store = wait_until("the lock is free", Duration::from_secs(60), async || {
            ImageStore::open(&place.root(), options()).await.ok()
        })
        .await;
        let now = (place.count("ingest"), place.count("trash"), place.count("mapped"));
        assert_eq!(now, (0, 0, 0), "round {round}");
        for key in store.rootfs_keys() {
            store.remove_rootfs(&key).await.unwrap();
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(place.dir.path().to_str().unwrap()), "round {round}: {mounts}");
        if let Some(image) = store.get(&name) {
            listed += 1;
            check_files(&store, &image, &place).await;
        }
        if round % 2 == 0 {
            store.gc().await.unwrap();
            let layers = if store.list().is_empty() { 1 } else { 11 };
            assert_eq!(place.count("layers"), layers, "round {round}");
        }
    }
    println!("{ROUNDS} kills: {listed} with the image, {leftovers} things half done");
    let store = place.open().await;
    let image = store.pull(&name, None).await.unwrap();
    check_files(&store, &image, &place).await;
    store.remove(&name).await.unwrap();
    assert_eq!((place.count("layers"), place.count("content"), place.count("rootfs")), (1, 0, 0));
}

async fn check_files(store: &ImageStore, image: &orlop_images::Image, place: &Place) {
    let target = place.target("check");
    store.mount_image("check", image, &target, &RootfsOptions::default()).await.unwrap();
    for l in 0..10 {
        for f in 0..FILES {
            let data = fs::read(target.join(format!("l{l}/f{f}"))).unwrap();
            assert!(data == noise(3000 + 100 * f, l * 100 + f), "l{l}/f{f}");
        }
    }
    store.remove_rootfs("check").await.unwrap();
}
