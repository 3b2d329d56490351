//! Archives: those that other tools write and read, damaged ones, and ones that reach for what is not theirs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use orlop_images::{Error, Image, ImageStore, Kind, Options, RootfsOptions};
use serde_json::json;

use crate::support::*;

fn layers() -> Vec<Blob> {
    vec![
        gzip(tar_of(&[("etc/", b""), ("etc/name", b"below"), ("etc/gone", b"x")])),
        zstd(tar_of(&[("bin/", b""), ("bin/run", b"#!")])),
        plain(tar_of(&[("etc/name", b"above"), ("etc/.wh.gone", b"")])),
    ]
}

fn run(program: &str, args: &[&str]) {
    let out = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("cannot run {program}: {e}; apt-get install {program}"));
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn skopeo(from: &str, to: &str) {
    let tls = ["--src-tls-verify=false", "--dest-tls-verify=false"];
    run("skopeo", &["copy", "--quiet", "--insecure-policy", tls[0], tls[1], from, to]);
}

async fn check(place: &Place, store: &ImageStore, image: &Image, what: &str) {
    let target = place.target("c");
    store.mount_image("c", image, &target, &RootfsOptions::default()).await.unwrap();
    let read = |name: &str| fs::read_to_string(target.join(name)).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!((read("etc/name").as_str(), read("bin/run").as_str()), ("above", "#!"), "{what}");
    assert!(!target.join("etc/gone").exists(), "{what}");
    assert_eq!(image.config.config().as_ref().unwrap().entrypoint(), &Some(vec!["/bin/run".to_owned()]));
    store.remove_rootfs("c").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_tools_read_and_write_the_same_archives() {
    let registry = Registry::start().await;
    registry.push("a", "v1", &layers()).await;
    // Docker's own formats know no zstd.
    let mut old = layers();
    old[1] = gzip(tar_of(&[("bin/", b""), ("bin/run", b"#!")]));
    registry.push("old", "v1", &old).await;
    let place = Place::new();
    let at = |name: &str| place.dir.path().join(name).display().to_string();
    let mut archives = Vec::new();
    for (form, file) in [("oci", "layout"), ("oci-archive", "oci.tar"), ("docker-archive", "docker.tar")] {
        let (image, name) = if form == "docker-archive" { ("old", "localhost/a:v1") } else { ("a", "v1") };
        skopeo(&format!("docker://{}/{image}:v1", registry.address), &format!("{form}:{}:{name}", at(file)));
        archives.push(at(file));
    }
    for file in ["oci.tar", "docker.tar"] {
        run("gzip", &["--keep", "-1", &at(file)]);
        run("zstd", &["--quiet", "--keep", &at(file)]);
        archives.extend([at(&format!("{file}.gz")), at(&format!("{file}.zst"))]);
    }
    for (n, archive) in archives.iter().enumerate() {
        let place = Place::new();
        let store = place.open_with(Options { keep_layer_blobs: n % 2 == 0, ..Options::default() }).await;
        let images = store.import(archive.as_ref(), Some("localhost/a")).await.unwrap();
        assert_eq!(images.len(), 1, "{archive}");
        let tag = "localhost/a:v1";
        assert_eq!(images[0].repo_tags, [tag], "{archive}");
        check(&place, &store, &images[0], archive).await;
        // What we write, they read in both ways; and what they have read from us is the same again.
        let ours = place.dir.path().join("ours.tar");
        store.export(&[tag], &ours).await.unwrap();
        for form in ["oci-archive", "docker-archive"] {
            if form == "docker-archive" && n % 2 == 0 && !archive.contains("docker") {
                continue; // Its layers are kept as they came, with zstd.
            }
            let name = format!("{}/{form}{n}:v1", registry.address);
            skopeo(&format!("{form}:{}", ours.display()), &format!("docker://{name}"));
            let other = Place::new();
            let second = other.open().await;
            let image = second.pull(&name, None).await.unwrap();
            check(&other, &second, &image, &name).await;
        }
    }
}

/// What is in the file, with one occurrence of `what` changed in place.
fn changed(bytes: &[u8], what: &[u8]) -> Vec<u8> {
    let at = bytes.windows(what.len()).position(|w| w == what).unwrap();
    let mut out = bytes.to_vec();
    out[at + what.len() / 2] ^= 1;
    out
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_archive_is_a_clear_error_and_leaves_nothing() {
    let registry = Registry::start().await;
    registry.push("a", "v1", &layers()).await;
    let place = Place::new();
    let store = place.open_with(Options { keep_layer_blobs: true, ..Options::default() }).await;
    let name = format!("{}/a:v1", registry.address);
    store.pull(&name, None).await.unwrap();
    let good = place.dir.path().join("good.tar");
    store.export(&[&name], &good).await.unwrap();
    let whole = fs::read(&good).unwrap();
    let packed = gzip(whole.clone()).bytes;
    let squeezed = zstd(whole.clone()).bytes;
    let all = layers();
    let half = |bytes: &[u8]| bytes[..bytes.len() / 2].to_vec();
    let config = config(&all);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", Vec::new()),
        ("cut early", whole[..700].to_vec()),
        ("cut", half(&whole)),
        ("cut gzip", half(&packed)),
        ("cut zstd", half(&squeezed)),
        ("another gzip", changed(&packed, &packed[packed.len() / 2..][..32])),
        ("another zstd", changed(&squeezed, &squeezed[squeezed.len() / 2..][..32])),
        ("another layer", changed(&whole, &all[0].bytes)),
        ("another plain layer", changed(&whole, b"above")),
        ("another config", changed(&whole, &config)),
        ("another manifest", changed(&whole, b"{\"config\":{\"digest\"")),
        ("an endless size", {
            let mut bytes = whole.clone();
            bytes[124..136].copy_from_slice(b"77777777777\0");
            bytes
        }),
        ("no index", tar_of(&[("oci-layout", b"{}")])),
        ("an index of nothing", tar_of(&[("index.json", b"{\"manifests\":[]}")])),
        ("no JSON", tar_of(&[("index.json", b"{")])),
        ("a docker archive of nothing", tar_of(&[("manifest.json", b"[]")])),
        ("a docker archive without its files", {
            let list = json!([{"Config": "c.json", "RepoTags": null, "Layers": []}]).to_string();
            tar_of(&[("manifest.json", list.as_bytes())])
        }),
        ("a docker archive without its layer", {
            let names = ["a", "b", "c"];
            let list = json!([{"Config": "c.json", "RepoTags": ["x:1"], "Layers": names}]).to_string();
            tar_of(&[("manifest.json", list.as_bytes()), ("c.json", &config), ("a", &all[0].bytes)])
        }),
    ];
    for (what, bytes) in cases {
        let place = Place::new();
        let store = place.open().await;
        let archive = place.dir.path().join("damaged.tar");
        fs::write(&archive, bytes).unwrap();
        let e = store.import(&archive, None).await.err().unwrap_or_else(|| panic!("{what}: imported"));
        assert_eq!(e.kind(), Kind::Corrupt, "{what}: {e}");
        assert!(e.to_string().contains("damaged.tar") || matches!(e, Error::Unpack { .. }), "{what}: {e}");
        assert!(store.list().is_empty(), "{what}");
        assert_eq!((place.count("ingest"), place.count("trash")), (0, 0), "{what}");
        let images = store.import(&good, None).await.unwrap();
        check(&place, &store, &images[0], what).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_lends_nothing_from_outside_it() {
    let place = Place::new();
    let outside = place.dir.path().join("secret.json");
    let layers = [plain(tar_of(&[("a", b"b")]))];
    fs::write(&outside, config(&layers)).unwrap();
    let layer = place.dir.path().join("layer.tar");
    fs::write(&layer, &layers[0].bytes).unwrap();
    let folder = place.dir.path().join("archive");
    fs::create_dir(&folder).unwrap();
    std::os::unix::fs::symlink(&outside, folder.join("link.json")).unwrap();
    let store = place.open().await;
    let import = async |config: &Path, layer: &Path| {
        let list = json!([{"Config": config, "RepoTags": ["x:1"], "Layers": [layer]}]).to_string();
        fs::write(folder.join("manifest.json"), list).unwrap();
        store.import(&folder, None).await
    };
    let inside = PathBuf::from("layer.tar");
    for name in [Path::new("../secret.json"), &outside, Path::new("link.json")] {
        let e = import(name, &inside).await.unwrap_err();
        assert!(e.to_string().contains("leads out of the folder"), "{}: {e}", name.display());
    }
    fs::copy(&outside, folder.join("config.json")).unwrap();
    let e = import(Path::new("config.json"), Path::new("../layer.tar")).await.unwrap_err();
    assert!(e.to_string().contains("leads out of the folder"), "{e}");
    fs::copy(&layer, folder.join("layer.tar")).unwrap();
    assert_eq!(import(Path::new("config.json"), &inside).await.unwrap()[0].repo_tags.len(), 1);
}
