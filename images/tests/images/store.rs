//! Pull, mount, remove, repair, import, export.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use crate::support::*;
use orlop_images::{
    Build, Digest, Error, IdMapping, ImageStore, Options, RootfsOptions, UserNamespace, build,
};

fn three_layers() -> Vec<Blob> {
    vec![
        gzip(tar_of(&[
            ("etc/", b""),
            ("etc/conf", b"low"),
            ("dir/", b""),
            ("dir/gone", b"x"),
            ("dir/stays", b"y"),
            ("opq/", b""),
            ("opq/old", b"o"),
        ])),
        zstd(tar_of(&[("dir/.wh.gone", b""), ("opq/.wh..wh..opq", b""), ("opq/new", b"n")])),
        plain(tar_of(&[("etc/conf", b"high"), ("top", b"t")])),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pull_mount_write_and_remove() {
    let registry = Registry::start().await;
    let place = Place::new();
    let layers = three_layers();
    registry.push("team/app", "only-amd64", &layers).await;
    let top = registry.push_manifest("team/app", "v1", &index(&manifest(&config(&layers), &layers))).await;
    let store = place.open().await;
    let name = format!("{}/team/app:v1", registry.address);

    let pulls = (0..8).map(|_| store.pull(&name, None));
    let images = futures::future::try_join_all(pulls).await.unwrap();
    assert!(images.iter().all(|i| Arc::ptr_eq(i, &images[0])), "one transfer for all");
    let image = &images[0];
    assert_eq!(image.repo_tags, std::slice::from_ref(&name));
    assert_eq!(image.repo_digests, [format!("{}/team/app@{top}", registry.address)]);
    assert_eq!(image.config.config().as_ref().unwrap().env().as_ref().unwrap(), &["A=b"]);
    for known in [name.as_str(), &image.id, &image.id[7..20], &image.repo_digests[0]] {
        assert_eq!(store.get(known).unwrap().id, image.id, "{known}");
    }
    assert!(store.get("elsewhere").is_none());
    assert_eq!((place.count("ingest"), place.count("trash")), (0, 0));
    assert!(store.usage().await.unwrap().bytes > 0);

    let target = place.target("c1");
    store.prepare_rootfs("c1", image, &target, &RootfsOptions::default()).await.unwrap();
    store.prepare_rootfs("c1", image, &target, &RootfsOptions::default()).await.unwrap();
    let read = |p: &str| fs::read_to_string(target.join(p)).ok();
    assert_eq!(read("etc/conf").as_deref(), Some("high"));
    assert_eq!((read("dir/gone"), read("dir/stays").as_deref()), (None, Some("y")));
    assert_eq!((read("opq/old"), read("opq/new").as_deref()), (None, Some("n")));
    fs::write(target.join("etc/conf"), vec![1u8; 100_000]).unwrap();
    fs::remove_file(target.join("top")).unwrap();
    let usage = store.rootfs_usage("c1").await.unwrap();
    assert!(usage.bytes >= 100_000 && usage.inodes >= 3, "{usage:?}");

    let other = place.target("c2");
    store.prepare_rootfs("c2", image, &other, &RootfsOptions::default()).await.unwrap();
    assert_eq!(fs::read_to_string(other.join("etc/conf")).unwrap(), "high", "containers do not share writes");
    assert!(!other.join("etc/hosts").exists());
    store.remove_rootfs("c2").await.unwrap();
    let with_points = RootfsOptions { mount_points: true, ..RootfsOptions::default() };
    store.prepare_rootfs("c2", image, &other, &with_points).await.unwrap();
    assert_eq!(fs::read_to_string(other.join("etc/conf")).unwrap(), "high");
    for point in ["etc/hosts", "etc/hostname", "etc/resolv.conf"] {
        assert_eq!(fs::metadata(other.join(point)).unwrap().len(), 0, "{point}");
    }
    assert!(["proc", "sys", "dev"].iter().all(|d| other.join(d).is_dir()));
    let volume = place.target("vol");
    store.mount_image("vol", image, &volume, &RootfsOptions::default()).await.unwrap();
    assert_eq!(fs::read_to_string(volume.join("top")).unwrap(), "t");
    assert!(fs::write(volume.join("x"), "x").is_err(), "an image volume is read-only");

    assert_eq!(store.rootfs_keys(), ["c1", "c2", "vol"]);
    for key in ["c1", "c2", "vol", "c1", "never"] {
        store.remove_rootfs(key).await.unwrap();
    }
    assert!(!mounted(&target) && !mounted(&volume));
    assert_eq!((store.rootfs_keys().len(), place.count("rootfs"), place.count("trash")), (0, 0, 0));
    assert!(matches!(store.rootfs_usage("c1").await, Err(Error::NoRootfs(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_or_absent_source_is_a_clear_error_and_leaves_nothing() {
    let registry = Registry::start().await;
    let place = Place::new();
    let layers = three_layers();
    registry.push("a", "v1", &layers).await;
    let store = place.open().await;
    let name = format!("{}/a:v1", registry.address);
    for (i, layer) in layers.iter().enumerate() {
        let file = registry.blob_file(&orlop_images::Digest::of(&layer.bytes));
        let mut bytes = fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0xff;
        fs::write(&file, &bytes).unwrap();
        let e = store.pull(&name, None).await.unwrap_err();
        assert!(
            matches!(&e, Error::DigestMismatch { reference, .. } if *reference == name),
            "layer {i}: {e}"
        );
        fs::write(&file, &layer.bytes).unwrap();
        assert!(store.list().is_empty());
        store.gc().await.unwrap();
        assert_eq!((place.count("ingest"), place.count("layers"), place.count("content")), (0, 1, 0));
    }
    // A config that names another diff id: the bytes are what the manifest says, the files are not.
    let mut lying = layers.clone();
    lying[0].diff = orlop_images::Digest::of(b"something else");
    registry.push("a", "lying", &lying).await;
    let e = store.pull(&format!("{}/a:lying", registry.address), None).await.unwrap_err();
    assert!(e.to_string().contains("uncompressed layer"), "{e}");

    let e = store.pull(&format!("{}/a:v2", registry.address), None).await.unwrap_err();
    assert!(matches!(&e, Error::NotFound { registry: r, .. } if *r == registry.address), "{e}");
    let nobody = own_address();
    let e = store.pull(&format!("{nobody}/a:v1"), None).await.unwrap_err();
    assert!(matches!(e, Error::Unreachable { .. }) && e.is_transient(), "{e}");
    assert!(e.to_string().contains(&nobody), "{e}");
    assert!(matches!(store.pull("UPPER CASE", None).await, Err(Error::Reference { .. })));
    store.pull(&name, None).await.unwrap();
}

/// However a name is written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_are_pinned_by_tag_and_by_digest() {
    let registry = Registry::start().await;
    let digest = registry.push("a", "v1", &[gzip(tar_of(&[("a", b"a")]))]).await;
    registry.push("b", "latest", &[gzip(tar_of(&[("b", b"b")]))]).await;
    let other = Digest::of(b"another");
    for (pin, pull, pinned) in [
        (format!("a:v1@{digest}"), "a:v1".to_owned(), true),
        (format!("a@{digest}"), format!("a:v1@{digest}"), true),
        (format!("a:v1@{other}"), "a:v1".to_owned(), false),
        ("b".to_owned(), "b:latest".to_owned(), true),
        ("b:v1".to_owned(), "b:latest".to_owned(), false),
    ] {
        let full = |name: &str| format!("{}/{name}", registry.address);
        let place = Place::new();
        let store = place.open_with(Options { pinned: vec![full(&pin)], ..Options::default() }).await;
        assert_eq!(store.pull(&full(&pull), None).await.unwrap().pinned, pinned, "{pin}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_move_and_layers_stay_while_used() {
    let registry = Registry::start().await;
    let place = Place::new();
    let store = place
        .open_with(Options { pinned: vec![format!("{}/a:v2", registry.address)], ..Options::default() })
        .await;
    let base = gzip(tar_of(&[("base", b"b")]));
    let app = gzip(tar_of(&[("app", b"1")]));
    let newer = gzip(tar_of(&[("app", b"2")]));
    let name = format!("{}/a:v1", registry.address);
    registry.push("a", "v1", &[base.clone(), app]).await;
    let old = store.pull(&name, None).await.unwrap();
    registry.push("a", "v1", &[base.clone(), newer.clone()]).await;
    registry.push("a", "v2", &[base, newer]).await;
    let new = store.pull(&name, None).await.unwrap();
    assert_ne!(old.id, new.id);
    assert_eq!(place.count("layers"), 1 + 3, "the base is shared");
    assert!(store.get(&old.id).unwrap().repo_tags.is_empty(), "the tag moved");
    let two = store.pull(&format!("{}/a:v2", registry.address), None).await.unwrap();
    assert_eq!((two.id == new.id, two.repo_tags.len(), two.pinned), (true, 2, true));

    let target = place.target("c");
    store.prepare_rootfs("c", &old, &target, &RootfsOptions::default()).await.unwrap();
    let e = store.prepare_rootfs("c", &new, &target, &RootfsOptions::default()).await.unwrap_err();
    assert!(matches!(e, Error::RootfsExists { .. }), "{e}");
    assert!(store.remove(&old.id).await.unwrap());
    assert!(!store.remove(&old.id).await.unwrap());
    assert_eq!(fs::read_to_string(target.join("app")).unwrap(), "1", "a running container keeps its files");
    assert_eq!(place.count("layers"), 1 + 3);
    store.remove_rootfs("c").await.unwrap();
    assert_eq!(place.count("layers"), 1 + 2);
    assert!(store.remove(&name).await.unwrap());
    assert_eq!(store.list()[0].repo_tags.len(), 1, "a tag takes only itself");
    assert!(store.remove(&new.id).await.unwrap());
    assert_eq!((place.count("layers"), place.count("content")), (1, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_open_repairs_what_a_crash_left() {
    let registry = Registry::start().await;
    let place = Place::new();
    let name = format!("{}/a:v1", registry.address);
    registry.push("a", "v1", &three_layers()).await;
    let options = || Options { sync_before_answer: true, ..Options::default() };
    let store = place.open_with(options()).await;
    assert!(
        matches!(ImageStore::open(&place.root(), Options::default()).await, Err(Error::State(_))),
        "locked"
    );
    let image = store.pull(&name, None).await.unwrap();
    let target = place.target("c");
    store.prepare_rootfs("c", &image, &target, &RootfsOptions::default()).await.unwrap();
    fs::write(target.join("mine"), "kept").unwrap();
    drop(store);
    let root = place.root();
    fs::create_dir_all(root.join("ingest/7/fs/half")).unwrap();
    fs::write(root.join("ingest/8"), "half a blob").unwrap();
    fs::create_dir_all(root.join("trash/3/upper")).unwrap();
    fs::create_dir_all(root.join("layers/0123456789abcdef01234567/fs")).unwrap();
    // A writable layer whose record is gone stays until it is asked for by name; what holds nothing goes.
    fs::create_dir_all(root.join("rootfs/broken/upper")).unwrap();
    fs::create_dir_all(root.join("rootfs/void")).unwrap();

    let store = place.open_with(options()).await;
    assert_eq!((place.count("ingest"), place.count("trash"), place.count("layers")), (0, 0, 1 + 3));
    assert_eq!(store.rootfs_keys(), ["broken", "c"]);
    store.remove_rootfs("broken").await.unwrap();
    assert_eq!(place.count("rootfs"), 1);
    assert_eq!(fs::read_to_string(target.join("mine")).unwrap(), "kept", "a mount outlives the daemon");
    let image = store.get(&name).unwrap();
    rustix::mount::unmount(&target, rustix::mount::UnmountFlags::DETACH).unwrap();
    store.prepare_rootfs("c", &image, &target, &RootfsOptions::default()).await.unwrap();
    assert_eq!(fs::read_to_string(target.join("mine")).unwrap(), "kept", "and so does the writable layer");
    store.remove_rootfs("c").await.unwrap();
    drop(store);

    // A layer that was not on disk when the machine went down.
    let layer =
        fs::read_dir(root.join("layers")).unwrap().map(|e| e.unwrap().path()).find(|p| !p.ends_with("empty"));
    let record = layer.unwrap().join("layer.json");
    let text = fs::read_to_string(&record).unwrap();
    fs::write(&record, text.replace("\"unsynced_since\":null", "\"unsynced_since\":\"another-boot\""))
        .unwrap();
    let store = place.open_with(options()).await;
    assert!(store.get(&name).is_none());
    store.pull(&name, None).await.unwrap();
    drop(store);

    // A config that the disk damaged.
    let id = image.id.trim_start_matches("sha256:");
    fs::write(root.join("content").join(id), "{}").unwrap();
    let store = place.open_with(options()).await;
    assert!(store.list().is_empty());
    assert_eq!(store.pull(&name, None).await.unwrap().id, image.id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn build_import_and_export_round_trip() {
    let place = Place::new();
    let rootfs = place.dir.path().join("rootfs");
    fs::create_dir_all(rootfs.join("bin")).unwrap();
    fs::write(rootfs.join("bin/run"), "#!/bin/sh\n").unwrap();
    fs::hard_link(rootfs.join("bin/run"), rootfs.join("bin/also")).unwrap();
    std::os::unix::fs::symlink("run", rootfs.join("bin/sh")).unwrap();
    let mut run = oci_spec::image::Config::default();
    run.set_entrypoint(Some(vec!["/bin/run".to_owned()]));
    run.set_labels(Some((0..20).map(|i| (format!("l{i}"), "v".to_owned())).collect()));
    let spec =
        Build { rootfs, name: "demo:v1".into(), config: run, created: 1_700_000_000, root_owned: true };
    let (one, two) = (place.dir.path().join("one.tar"), place.dir.path().join("two.tar"));
    let id = build(&spec, &one).unwrap();
    build(&spec, &two).unwrap();
    assert!(fs::read(&one).unwrap() == fs::read(&two).unwrap(), "reproducible");

    for keep in [true, false] {
        let place = Place::new();
        let store = place.open_with(Options { keep_layer_blobs: keep, ..Options::default() }).await;
        let images = store.import(&one, None).await.unwrap();
        assert_eq!((images.len(), images[0].id.as_str()), (1, id.as_str()));
        assert_eq!(images[0].repo_tags, ["docker.io/library/demo:v1"]);
        let exported = place.dir.path().join("out.tar");
        store.export(&["demo:v1"], &exported).await.unwrap();
        let second = Place::new();
        let again = second.open().await;
        let back = again.import(&exported, None).await.unwrap();
        assert_eq!(back[0].id, id, "keep_layer_blobs: {keep}");
        let target = second.target("r");
        again.mount_image("r", &back[0], &target, &RootfsOptions::default()).await.unwrap();
        let meta = fs::metadata(target.join("bin/run")).unwrap();
        assert_eq!((meta.nlink(), meta.mtime(), meta.uid()), (2, 1_700_000_000, 0));
        assert_eq!(fs::read_link(target.join("bin/sh")).unwrap().to_str(), Some("run"));
        again.remove_rootfs("r").await.unwrap();
    }

    // A docker archive, compressed as a whole, that names nothing.
    let layers = three_layers();
    let config = config(&layers);
    let names = ["a/layer.tar", "b/layer.tar", "c/layer.tar"];
    let list = serde_json::json!([{"Config": "c.json", "RepoTags": null, "Layers": names}]).to_string();
    let mut files = vec![("manifest.json", list.as_bytes()), ("c.json", &config)];
    files.extend(names.iter().copied().zip(layers.iter().map(|l| l.bytes.as_slice())));
    let archive = place.dir.path().join("docker.tgz");
    fs::write(&archive, gzip(tar_of(&files)).bytes).unwrap();
    let store = place.open().await;
    let images = store.import(&archive, Some("mine:x")).await.unwrap();
    assert_eq!(images[0].repo_tags, ["docker.io/library/mine:x"]);
    let junk = place.dir.path().join("junk.tar");
    fs::write(&junk, tar_of(&[("a", b"b")])).unwrap();
    assert!(matches!(store.import(&junk, None).await, Err(Error::Archive { .. })));
    fs::write(&junk, "junk").unwrap();
    assert!(matches!(store.import(&junk, None).await, Err(Error::Archive { .. })));
    assert!(matches!(store.export(&["nothing"], &junk).await, Err(Error::NoImage(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_and_twenty_layers_mount() {
    let registry = Registry::start().await;
    let place = Place::new();
    let layers: Vec<Blob> =
        (0..120).map(|i| gzip(tar_of(&[(&format!("f{i}"), b"x"), ("last", &[i])]))).collect();
    registry.push("deep", "v1", &layers).await;
    let store = place.open().await;
    let image = store.pull(&format!("{}/deep:v1", registry.address), None).await.unwrap();
    let target = place.target("c");
    store.prepare_rootfs("c", &image, &target, &RootfsOptions::default()).await.unwrap();
    assert_eq!(fs::read_dir(&target).unwrap().count(), 121);
    assert_eq!(fs::read(target.join("last")).unwrap(), [119]);
    store.remove_rootfs("c").await.unwrap();
}

/// What a container in a user namespace sees, and what it may do.
fn inside(ns: &UserNamespace, target: &std::path::Path, script: &str) -> String {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let mut child = Command::new("unshare")
        .args(["--user", "--keep-caps", "sh", "-c"])
        .arg("echo; read mapped; exec setpriv --reuid=0 --regid=0 --clear-groups sh -c \"$0\"")
        .arg(script)
        .current_dir(target)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("unshare must be installed: apt-get install util-linux");
    let mut out = child.stdout.take().unwrap();
    // It has its namespace when it speaks.
    std::io::Read::read_exact(&mut out, &mut [0]).unwrap();
    for (name, maps) in [("uid_map", &ns.uids), ("gid_map", &ns.gids)] {
        let one = maps[0];
        let text = format!("{} {} {}", one.container, one.host, one.length);
        fs::write(format!("/proc/{}/{name}", child.id()), text).unwrap();
    }
    child.stdin.take().unwrap().write_all(b"\n").unwrap();
    let text = std::io::read_to_string(out).unwrap();
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "{script}: {}", String::from_utf8_lossy(&done.stderr));
    text.trim().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_belong_to_the_ids_of_a_user_namespace() {
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |name: &str, kind: tar::EntryType, uid: u64, mode: u32, data: &[u8]| {
        let mut h = tar::Header::new_gnu();
        h.set_entry_type(kind);
        h.set_uid(uid);
        h.set_gid(uid);
        h.set_mode(mode);
        h.set_size(data.len() as u64);
        if kind.is_symlink() {
            h.set_link_name("root").unwrap();
        }
        tar.append_data(&mut h, name, data).unwrap();
    };
    use tar::EntryType as T;
    add("./", T::Directory, 0, 0o755, b"");
    add("root", T::Regular, 0, 0o600, b"r");
    add("user", T::Regular, 1000, 0o4755, b"u");
    add("dir/", T::Directory, 1000, 0o2755, b"");
    add("dir/deep", T::Regular, 65534, 0o644, b"d");
    add("link", T::Symlink, 1000, 0o777, b"");
    let registry = Registry::start().await;
    registry.push("a", "v1", &[gzip(tar.into_inner().unwrap()), gzip(tar_of(&[("above", b"a")]))]).await;
    let place = Place::new();
    let store = place.open().await;
    let image = store.pull(&format!("{}/a:v1", registry.address), None).await.unwrap();
    let map = |host| vec![IdMapping { container: 0, host, length: 65536 }];
    let ns = UserNamespace { uids: map(100_000), gids: map(200_000) };
    let options = RootfsOptions { user_namespace: Some(ns.clone()), ..RootfsOptions::default() };
    for (round, idmapped) in [(1, true), (2, false)] {
        // Failpoints hold for the whole process, and no other test mounts for user namespaces.
        orlop_base::failpoint::set(if idmapped { "" } else { "images.idmap=error" }).unwrap();
        let (key, volume_key) = (format!("c{round}"), format!("v{round}"));
        let (target, volume) = (place.target(&key), place.target(&volume_key));
        store.prepare_rootfs(&key, &image, &target, &options).await.unwrap();
        store.mount_image(&volume_key, &image, &volume, &options).await.unwrap();
        let upper = place.root().join("rootfs").join(&key).join("upper");
        assert_eq!(upper.join("user").exists(), !idmapped, "only then every file was copied");
        for at in [&target, &volume] {
            let owner = |name: &str| {
                let m = fs::symlink_metadata(at.join(name)).unwrap();
                (m.uid(), m.gid(), m.mode() & 0o7777)
            };
            assert_eq!(owner("."), (100_000, 200_000, 0o755));
            assert_eq!(owner("root"), (100_000, 200_000, 0o600));
            assert_eq!(owner("user"), (101_000, 201_000, 0o4755));
            assert_eq!(owner("dir"), (101_000, 201_000, 0o2755));
            assert_eq!(owner("dir/deep").0, 165_534);
            assert_eq!((owner("link").0, owner("above").0), (101_000, 100_000));
            assert_eq!(
                inside(&ns, at, "stat -c %u:%g root user dir dir/deep | tr '\\n' ' '; cat root"),
                "0:0 1000:1000 1000:1000 65534:65534 r"
            );
        }
        inside(&ns, &target, "echo more >> root; chown 7:7 dir/deep; mkdir new; ln user also");
        let made = fs::metadata(target.join("new")).unwrap();
        assert_eq!((made.uid(), fs::metadata(target.join("dir/deep")).unwrap().uid()), (100_000, 100_007));
        assert_eq!(fs::read_to_string(target.join("root")).unwrap(), "rmore\n");
        assert!(fs::write(volume.join("x"), "x").is_err(), "an image volume is read-only");

        // The machine restarts: the writable layer stays, and another namespace is another container.
        for t in [&target, &volume] {
            rustix::mount::unmount(t, rustix::mount::UnmountFlags::DETACH).unwrap();
        }
        let e = store.prepare_rootfs(&key, &image, &target, &RootfsOptions::default()).await.unwrap_err();
        assert!(matches!(e, Error::RootfsExists { .. }), "{e}");
        store.prepare_rootfs(&key, &image, &target, &options).await.unwrap();
        store.mount_image(&volume_key, &image, &volume, &options).await.unwrap();
        assert_eq!(inside(&ns, &target, "stat -c %u root new dir/deep; cat root"), "0\n0\n7\nrmore");
        assert_eq!(inside(&ns, &volume, "stat -c %u user; cat root"), "1000\nr");
        for key in [&key, &volume_key] {
            store.remove_rootfs(key).await.unwrap();
        }
        assert_eq!((place.count("mapped"), place.count("rootfs")), (0, 0));
    }
    orlop_base::failpoint::set("").unwrap();
    // Nothing was changed in the layers.
    let target = place.target("plain");
    store.prepare_rootfs("plain", &image, &target, &RootfsOptions::default()).await.unwrap();
    assert_eq!(fs::metadata(target.join("user")).unwrap().uid(), 1000);
    assert_eq!(fs::read_to_string(target.join("root")).unwrap(), "r");
    store.remove_rootfs("plain").await.unwrap();
}
