//! State files that somebody or something damaged: what is kept, what is rebuilt, and that the next call works.

use std::fs;
use std::path::{Path, PathBuf};

use orlop_images::{ImageStore, Options, RootfsOptions};

use crate::support::*;

#[derive(Clone, Copy, Debug)]
enum Damage {
    Empty,
    Half,
    Garbage,
    Folder,
    Missing,
}

const ALL: [Damage; 5] = [Damage::Empty, Damage::Half, Damage::Garbage, Damage::Folder, Damage::Missing];

impl Damage {
    fn to(self, file: &Path) {
        let bytes = fs::read(file).unwrap();
        match self {
            Damage::Empty => fs::write(file, "").unwrap(),
            Damage::Half => fs::write(file, &bytes[..bytes.len() / 2]).unwrap(),
            Damage::Garbage => fs::write(file, [0xff; 700]).unwrap(),
            Damage::Folder => {
                fs::remove_file(file).unwrap();
                fs::create_dir(file).unwrap();
                fs::write(file.join("in-the-way"), "").unwrap();
            }
            Damage::Missing => fs::remove_file(file).unwrap(),
        }
    }
}

fn layers() -> Vec<Blob> {
    vec![
        gzip(tar_of(&[("etc/", b""), ("etc/name", b"below")])),
        zstd(tar_of(&[("bin/", b""), ("bin/run", b"#!")])),
        gzip(tar_of(&[("etc/name", b"above")])),
    ]
}

async fn registry() -> Registry {
    let registry = Registry::start().await;
    registry.push("a", "v1", &layers()).await;
    registry
}

/// A store with an image that has three layers, and what containers use: two writable root file systems, a read-only one and an image
/// volume. One of the writable ones is not mounted, as after a reboot.
struct Used {
    place: Place,
    name: String,
    id: String,
}

const MOUNTED: [&str; 3] = ["c", "r", "v"];
const KEYS: [&str; 4] = ["c", "r", "u", "v"];

impl Used {
    async fn new(registry: &Registry) -> Used {
        let place = Place::new();
        let name = format!("{}/a:v1", registry.address);
        let store = Used::open(&place).await;
        let image = store.pull(&name, None).await.unwrap();
        let plain = RootfsOptions { mount_points: true, ..RootfsOptions::default() };
        let readonly = RootfsOptions { readonly: true, ..RootfsOptions::default() };
        store.prepare_rootfs("c", &image, &place.target("c"), &plain).await.unwrap();
        store.prepare_rootfs("r", &image, &place.target("r"), &readonly).await.unwrap();
        store.prepare_rootfs("u", &image, &place.target("u"), &plain).await.unwrap();
        store.mount_image("v", &image, &place.target("v"), &plain).await.unwrap();
        for key in ["c", "u"] {
            fs::write(place.target(key).join("mine"), key).unwrap();
        }
        rustix::mount::unmount(place.target("u"), rustix::mount::UnmountFlags::DETACH).unwrap();
        Used { place, name, id: image.id.clone() }
    }

    async fn open(place: &Place) -> ImageStore {
        place.open_with(Options { sync_before_answer: true, ..Options::default() }).await
    }

    fn records(&self) -> Vec<PathBuf> {
        KEYS.iter().map(|k| self.place.root().join("rootfs").join(k).join("rootfs.json")).collect()
    }

    fn layer_records(&self) -> Vec<PathBuf> {
        let layers = fs::read_dir(self.place.root().join("layers")).unwrap();
        layers.map(|e| e.unwrap().path().join("layer.json")).filter(|f| f.exists()).collect()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.place.root().join(name)
    }

    /// Containers notice nothing, and what they wrote is there.
    fn check_files(&self, what: &str) {
        for key in MOUNTED {
            let at = |name: &str| fs::read_to_string(self.place.target(key).join(name));
            assert_eq!(at("etc/name").unwrap(), "above", "{what}: {key}");
            assert_eq!(at("bin/run").unwrap(), "#!", "{what}: {key}");
        }
        assert_eq!(fs::read_to_string(self.place.target("c").join("mine")).unwrap(), "c", "{what}");
        fs::write(self.place.target("c").join("more"), what).unwrap();
        assert_eq!(fs::read_to_string(self.file("rootfs/u/upper/mine")).unwrap(), "u", "{what}");
    }

    /// After all containers and images are gone, nothing is.
    async fn check_end(&self, store: &ImageStore, what: &str) {
        for key in KEYS {
            store.remove_rootfs(key).await.unwrap_or_else(|e| panic!("{what}: {key}: {e}"));
            assert!(!mounted(&self.place.target(key)), "{what}: {key} is mounted");
        }
        store.remove(&self.id).await.unwrap();
        store.gc().await.unwrap();
        let count = |name| self.place.count(name);
        assert_eq!((count("rootfs"), count("layers"), count("content")), (0, 1, 0), "{what}");
        assert_eq!((count("trash"), count("ingest")), (0, 0), "{what}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writable_layer_outlives_its_record() {
    let registry = registry().await;
    for damage in ALL {
        let used = Used::new(&registry).await;
        let what = format!("{damage:?}");
        let before: Vec<Vec<u8>> = used.records().iter().map(|f| fs::read(f).unwrap()).collect();
        used.records().iter().for_each(|f| damage.to(f));
        let store = Used::open(&used.place).await;
        assert_eq!(store.rootfs_keys(), KEYS, "{what}");
        used.check_files(&what);
        for (file, before) in used.records().iter().zip(before) {
            let kept = PathBuf::from(format!("{}.damaged", file.display()));
            assert_eq!(kept.exists(), !matches!(damage, Damage::Missing), "{what}: {}", kept.display());
            // All that is mounted is known again.
            if !file.parent().unwrap().ends_with("u") {
                assert_eq!(fs::read_to_string(file).unwrap(), String::from_utf8(before).unwrap(), "{what}");
            }
        }
        assert!(store.rootfs_usage("u").await.unwrap().bytes > 0);
        // The layers are in use, whatever happens to their image, and whoever starts next.
        store.remove(&used.id).await.unwrap();
        store.gc().await.unwrap();
        used.check_files(&what);
        drop(store);
        let store = Used::open(&used.place).await;
        assert_eq!(store.rootfs_keys(), KEYS, "{what}");
        assert_eq!(used.place.count("layers"), 1 + 3, "{what}");
        used.check_files(&what);
        // The same once more, now that no image tells which layers these are.
        used.records().iter().for_each(|f| damage.to(f));
        drop(store);
        let store = Used::open(&used.place).await;
        store.gc().await.unwrap();
        used.check_files(&what);
        let image = store.pull(&used.name, None).await.unwrap();
        assert_eq!(image.id, used.id);
        store
            .prepare_rootfs("new", &image, &used.place.target("new"), &RootfsOptions::default())
            .await
            .unwrap();
        store.remove_rootfs("new").await.unwrap();
        used.check_end(&store, &what).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_list_of_images_is_there_twice() {
    let registry = registry().await;
    for damage in ALL {
        for both in [false, true] {
            let used = Used::new(&registry).await;
            let what = format!("{damage:?}, both: {both}");
            damage.to(&used.file("images.json"));
            if both {
                damage.to(&used.file("images.copy.json"));
            }
            for round in ["first", "second"] {
                let store = Used::open(&used.place).await;
                assert_eq!(store.rootfs_keys(), KEYS, "{what}");
                // Without any list, an image is pulled again.
                assert_eq!(store.get(&used.name).is_some(), !both, "{what}, {round} start");
                assert_eq!(store.list().len(), usize::from(!both), "{what}");
                used.check_files(&what);
            }
            assert_eq!(
                used.file("images.json.damaged").exists(),
                !matches!(damage, Damage::Missing),
                "{what}"
            );
            let store = Used::open(&used.place).await;
            store.gc().await.unwrap();
            used.check_files(&what);
            assert_eq!(store.pull(&used.name, None).await.unwrap().id, used.id, "{what}");
            used.check_end(&store, &what).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_that_runs_outlives_its_record() {
    let registry = registry().await;
    for damage in ALL {
        // Alone; with the records of those who use it; with everything.
        for more in 0..3 {
            let used = Used::new(&registry).await;
            let what = format!("{damage:?}, {more} more");
            used.layer_records().iter().for_each(|f| damage.to(f));
            if more > 0 {
                used.records().iter().for_each(|f| damage.to(f));
            }
            if more > 1 {
                damage.to(&used.file("images.json"));
                damage.to(&used.file("images.copy.json"));
            }
            for _ in 0..2 {
                let store = Used::open(&used.place).await;
                assert_eq!(store.rootfs_keys(), KEYS, "{what}");
                assert_eq!(store.get(&used.name).is_some(), more < 2, "{what}");
                store.gc().await.unwrap();
                used.check_files(&what);
            }
            let store = Used::open(&used.place).await;
            let image = store.pull(&used.name, None).await.unwrap();
            let target = used.place.target("new");
            store.prepare_rootfs("new", &image, &target, &RootfsOptions::default()).await.unwrap();
            assert_eq!(fs::read_to_string(target.join("etc/name")).unwrap(), "above", "{what}");
            store.remove_rootfs("new").await.unwrap();
            used.check_files(&what);
            if more == 2 {
                for key in KEYS {
                    store.remove_rootfs(key).await.unwrap();
                }
                // Nobody knew what these layers are: the start after their end drops them.
                assert_eq!(used.place.count("layers"), 1 + 3 + 3, "{what}");
                drop(store);
                let store = Used::open(&used.place).await;
                assert_eq!(used.place.count("layers"), 1 + 3, "{what}");
                used.check_end(&store, &what).await;
            } else {
                used.check_end(&store, &what).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_runs_on_is_pulled_again() {
    let registry = registry().await;
    for damage in ALL {
        let used = Used::new(&registry).await;
        let what = format!("{damage:?}");
        let store = Used::open(&used.place).await;
        for key in KEYS {
            store.remove_rootfs(key).await.unwrap();
        }
        drop(store);
        let content = || fs::read_dir(used.file("content")).unwrap().map(|e| e.unwrap().path());
        assert_eq!(content().count(), 2);
        let files: Vec<PathBuf> = used.layer_records().into_iter().chain(content()).collect();
        for file in files {
            damage.to(&file);
            let store = Used::open(&used.place).await;
            assert!(store.get(&used.name).is_none(), "{what}: {}", file.display());
            assert_eq!(store.pull(&used.name, None).await.unwrap().id, used.id, "{what}");
            assert!(fs::metadata(&file).unwrap().is_file(), "{what}: {}", file.display());
        }
        let store = Used::open(&used.place).await;
        used.check_end(&store, &what).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_programs_files_are_left_alone() {
    let registry = registry().await;
    let used = Used::new(&registry).await;
    let files = used.records().into_iter().chain(used.layer_records()).chain([used.file("images.json")]);
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let later = text.replace("\"version\":1,", "\"version\":2,");
        fs::write(&file, &later).unwrap();
        let e = ImageStore::open(&used.place.root(), Options::default()).await.err().unwrap();
        assert!(e.to_string().contains("is of version 2"), "{e}");
        assert_eq!(fs::read_to_string(&file).unwrap(), later);
        fs::write(&file, text).unwrap();
    }
    // Of a damaged list, what a newer program wrote is not thrown away either.
    let (list, copy) = (used.file("images.json"), used.file("images.copy.json"));
    let text = fs::read_to_string(&copy).unwrap();
    fs::write(&copy, text.replace("\"version\":1,", "\"version\":2,")).unwrap();
    fs::write(&list, "").unwrap();
    let e = ImageStore::open(&used.place.root(), Options::default()).await.err().unwrap();
    assert!(e.to_string().contains("is of version 2"), "{e}");
    fs::write(&copy, text).unwrap();
    let store = Used::open(&used.place).await;
    assert!(store.get(&used.name).is_some());
    used.check_end(&store, "later").await;
}
