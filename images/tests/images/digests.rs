//! Images whose content is named by SHA-512, from a registry that names it so.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use orlop_images::{Algorithm, Digest, Error, Options, RootfsOptions};
use serde_json::json;

use crate::fake::*;
use crate::support::*;

fn sha512(bytes: &[u8]) -> Digest {
    Algorithm::Sha512.digest(bytes)
}

struct Long {
    manifest: Vec<u8>,
    config: Vec<u8>,
    layers: [Vec<u8>; 2],
}

/// One layer's files are named by SHA-512 as well, the other's by SHA-256.
fn long() -> Long {
    let tars = [tar_of(&[("one", b"1")]), tar_of(&[("two", b"2")])];
    let layers = [gzip(tars[0].clone()).bytes, zstd(tars[1].clone()).bytes];
    let mut config: serde_json::Value = serde_json::from_slice(&config(&[])).unwrap();
    config["rootfs"]["diff_ids"] = json!([sha512(&tars[0]), Digest::of(&tars[1])]);
    let config = config.to_string().into_bytes();
    let entry = |kind: &str, bytes: &[u8]| json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": sha512(bytes), "size": bytes.len()});
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": entry("config.v1+json", &config),
        "layers": [entry("layer.v1.tar+gzip", &layers[0]), entry("layer.v1.tar+zstd", &layers[1])],
    });
    Long { manifest: manifest.to_string().into_bytes(), config, layers }
}

/// Serves the image; with `damage` the second layer is not what it is called.
fn registry(image: &Long, damage: bool) -> Fake {
    let mut blobs = vec![image.config.clone()];
    blobs.extend(image.layers.iter().cloned());
    let names: Vec<String> = blobs.iter().map(|b| sha512(b).to_string()).collect();
    if damage {
        // Another valid layer, as long as the one that is asked for.
        let last = blobs.last_mut().unwrap();
        let n = last.len();
        last[n - 1] ^= 1;
    }
    let manifest = image.manifest.clone();
    Fake::start(Box::new(move |r, _| {
        let name = format!("docker-content-digest: {}\r\n", sha512(&manifest));
        let found = if r.line.contains("/manifests/") {
            Some((&manifest, name.as_str()))
        } else {
            names.iter().position(|n| r.line.contains(n)).map(|i| (&blobs[i], ""))
        };
        match found {
            Some((body, headers)) => {
                response("200 OK", headers, body.len(), if r.line.starts_with("HEAD") { b"" } else { body })
            }
            None => response("404 Not Found", "", 0, b""),
        }
    }))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_may_be_named_by_sha512() {
    let image = long();
    let fake = registry(&image, false);
    let by_tag = format!("{}/a:v1", fake.address);
    let by_digest = format!("{}/a@{}", fake.address, sha512(&image.manifest));
    for keep in [true, false] {
        let place = Place::new();
        let options = || Options { keep_layer_blobs: keep, ..Options::default() };
        let store = place.open_with(options()).await;
        let pulled = store.pull(&by_tag, None).await.unwrap();
        assert_eq!(pulled.id, sha512(&image.config).to_string());
        assert_eq!(pulled.repo_digests, [by_digest.as_str()]);
        let asked = fake.requests("GET").len();
        store.pull(&by_tag, None).await.unwrap();
        store.pull(&by_digest, None).await.unwrap();
        assert_eq!(fake.requests("GET").len(), asked, "what is here is not fetched again");
        drop(store);

        let store = place.open_with(options()).await;
        let hex = sha512(&image.config).hex();
        for name in [&pulled.id, &by_digest, &hex, &hex[..12].to_owned(), &format!("sha512:{}", &hex[..12])] {
            assert_eq!(store.get(name).map(|i| i.id.clone()).as_ref(), Some(&pulled.id), "{name}");
        }
        assert!(store.get(&format!("sha256:{}", &hex[..12])).is_none());
        let archive = place.dir.path().join("out.tar");
        store.export(&[&by_tag], &archive).await.unwrap();

        let other = Place::new();
        let second = other.open().await;
        let back = second.import(&archive, None).await.unwrap();
        assert_eq!(back[0].id == pulled.id, keep, "layers that are packed anew have other digests");
        let target = other.target("r");
        second.mount_image("r", &back[0], &target, &RootfsOptions::default()).await.unwrap();
        let text = |name: &str| fs::read_to_string(target.join(name)).unwrap();
        assert_eq!((text("one"), text("two")), ("1".to_owned(), "2".to_owned()));
        second.remove_rootfs("r").await.unwrap();

        assert!(store.remove(&pulled.id).await.unwrap());
        store.gc().await.unwrap();
        assert_eq!((place.count("content"), place.count("layers")), (0, 1));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_what_it_is_called_is_refused() {
    let image = long();
    let place = Place::new();
    let store = place.open().await;
    let damaged = registry(&image, true);
    let said = store.pull(&format!("{}/a:v1", damaged.address), None).await.unwrap_err().to_string();
    assert!(said.contains(&sha512(&image.layers[1]).to_string()), "{said}");
    // Another manifest than the one that was asked for.
    let other = sha512(b"another");
    let said = store.pull(&format!("{}/a@{other}", damaged.address), None).await.unwrap_err().to_string();
    assert!(said.contains(&other.to_string()), "{said}");
    assert!(store.list().is_empty());
    assert_eq!((place.count("ingest"), place.count("content")), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn programs_decide_what_is_pulled() {
    let image = long();
    let fake = registry(&image, false);
    let place = Place::new();
    let (dir, refuse) = (place.dir.path().join("verifiers"), place.dir.path().join("refuse"));
    fs::create_dir(&dir).unwrap();
    let text = format!("#!/bin/sh\n[ ! -e {} ] || {{ echo not today; exit 1; }}\n", refuse.display());
    fs::write(dir.join("asks"), text).unwrap();
    fs::set_permissions(dir.join("asks"), fs::Permissions::from_mode(0o755)).unwrap();
    let store = place.open_with(Options { verifiers_dir: Some(dir), ..Options::default() }).await;
    let names = [format!("{}/a:v1", fake.address), format!("{}/a@{}", fake.address, sha512(&image.manifest))];
    let refused = async |name: &String| {
        let e = store.pull(name, None).await.unwrap_err();
        assert!(matches!(e, Error::Refused { .. }) && e.to_string().contains("not today"), "{e}");
        assert!(e.to_string().contains(&sha512(&image.manifest).to_string()), "{e}");
    };
    fs::write(&refuse, "").unwrap();
    for name in &names {
        refused(name).await;
    }
    assert_eq!(fake.requests("/blobs/").len(), 0, "nothing of a refused image is fetched");
    fs::remove_file(&refuse).unwrap();
    for name in &names {
        store.pull(name, None).await.unwrap();
    }
    // It is here, but may not be pulled any more.
    fs::write(&refuse, "").unwrap();
    for name in &names {
        refused(name).await;
    }
    assert!(store.get(&names[0]).is_some());
}
