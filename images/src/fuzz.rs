//! Fuzz targets: everything that reads what a registry, an archive or an operator wrote. Known good inputs are mutated;
//! proptest shrinks what fails. The gate runs a fixed number of cases; for longer:
//! `PROPTEST_CASES=1000000 cargo test --release -p orlop-images fuzz`.

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;

use orlop_fuzz::{cases, mutated};
use proptest::prelude::*;
use tar::{Builder, EntryType, Header};

use crate::registry::{auth, client, hosts};
use crate::{Reference, manifest, unpack};

const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// Pieces that mean something to one of the formats.
const WORDS: &[&str] = &[
    "..",
    "/",
    "../../canary",
    "a/../..",
    ".wh.",
    ".wh..wh..opq",
    ".wh...",
    "\0",
    "\n",
    " ",
    "=",
    ",",
    ":",
    "@",
    "\"",
    "\\",
    "{",
    "}",
    "[",
    "]",
    "null",
    "true",
    "-1",
    "0",
    "7777777",
    "18446744073709551615",
    "18446744073709551616",
    "1e999",
    "sha256:",
    "sha512:",
    "Bearer ",
    "Basic ",
    "realm=",
    "bytes ",
    "-",
    "/dev/null",
    "http://",
    "https://[::1]:0/",
    "GNU.sparse.map=",
    "path=",
    "SCHILY.xattr.trusted.overlay.redirect=",
    "[host.\"http://x\"]\n",
    "ca = 1\n",
    "\u{feff}",
    "\u{1F433}",
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
];

fn texts(seeds: &[&str]) -> impl Strategy<Value = String> {
    let seeds = seeds.iter().map(|s| s.as_bytes().to_vec()).collect();
    mutated(seeds, WORDS).prop_map(|b| String::from_utf8_lossy(&b).into_owned())
}

fn add(tar: &mut Builder<Vec<u8>>, name: &str, kind: EntryType, link: &str, data: &[u8]) {
    let mut h = Header::new_gnu();
    h.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    if !link.is_empty() {
        h.set_link_name_literal(link).unwrap();
    }
    h.set_entry_type(kind);
    h.set_mode(0o755);
    h.set_uid(0);
    h.set_gid(0);
    h.set_mtime(1);
    h.set_size(data.len() as u64);
    h.set_cksum();
    tar.append(&h, data).unwrap();
}

fn layers() -> Vec<Vec<u8>> {
    use EntryType as T;
    let make = |fill: &dyn Fn(&mut Builder<Vec<u8>>)| {
        let mut tar = Builder::new(Vec::new());
        fill(&mut tar);
        tar.into_inner().unwrap()
    };
    vec![
        make(&|t| {
            add(t, "d/", T::Directory, "", b"");
            add(t, "d/f", T::Regular, "", b"data");
            add(t, "d/l", T::Symlink, "../..", b"");
            add(t, "d/l/x", T::Regular, "", b"through a link");
            add(t, "h", T::Link, "d/f", b"");
            add(t, "d/.wh.gone", T::Regular, "", b"");
            add(t, "e/.wh..wh..opq", T::Regular, "", b"");
        }),
        make(&|t| {
            add(t, "abs", T::Symlink, "/", b"");
            add(t, "abs/canary", T::Regular, "", b"changed");
            add(t, "up", T::Symlink, "../../..", b"");
            add(t, "up/.wh.canary", T::Regular, "", b"");
            add(t, "hard", T::Link, "up/canary", b"");
            add(t, "hard", T::Regular, "", b"changed");
            add(t, "abs", T::Directory, "", b"");
            add(t, "fifo", T::Fifo, "", b"");
            add(t, "null", T::Char, "", b"");
        }),
        make(&|t| {
            let long = "n/".repeat(90);
            let records = [("path", long.as_bytes()), ("SCHILY.xattr.user.a", b"\n\0"), ("mtime", b"1.5")];
            t.append_pax_extensions(records).unwrap();
            add(t, "short", T::Regular, "", b"pax");
            t.append_pax_extensions([
                ("GNU.sparse.major", &b"1"[..]),
                ("GNU.sparse.minor", b"0"),
                ("GNU.sparse.realsize", b"4096"),
            ])
            .unwrap();
            let mut map = b"1\n1024\n4\n".to_vec();
            map.resize(512, 0);
            map.extend(b"data");
            add(t, "sparse", T::Regular, "", &map);
            add(t, "././@LongLink", T::GNULongName, "", &[b'y'; 300]);
            add(t, "y", T::Regular, "", b"gnu");
        }),
    ]
}

/// Makes the checksum of every header right, so that mutations get past it.
fn sum_up(tar: &mut [u8]) {
    for block in tar.chunks_exact_mut(512).filter(|b| &b[257..262] == b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}

fn compressed() -> Vec<Vec<u8>> {
    use std::io::Write;
    let plain: Vec<u8> = (0..2000u32).flat_map(|i| (i / 3).to_le_bytes()).collect();
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gz.write_all(&plain).unwrap();
    vec![gz.finish().unwrap(), zstd::encode_all(&plain[..], 3).unwrap(), plain]
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn fuzz_layer(data in mutated(layers(), WORDS), summed in prop::bool::weighted(0.8)) {
        let mut data = data;
        if summed {
            sum_up(&mut data);
        }
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("a/b/root");
        fs::create_dir_all(&root).unwrap();
        let outside = ["canary", "a/canary", "a/b/canary"].map(|c| dir.path().join(c));
        outside.iter().for_each(|c| fs::write(c, "outside").unwrap());
        let fd = crate::tree::open(&root).unwrap();
        let _ = unpack::unpack(&data[..], fd.as_fd());
        for canary in &outside {
            prop_assert_eq!(fs::read_to_string(canary).unwrap(), "outside");
        }
        for (folder, entries) in [(dir.path().to_owned(), 2), (dir.path().join("a"), 2), (dir.path().join("a/b"), 2)] {
            prop_assert_eq!(fs::read_dir(folder).unwrap().count(), entries, "nothing new outside");
        }
    }

    #[test]
    fn fuzz_compression(data in mutated(compressed(), WORDS)) {
        let (_, read) = unpack::decompress_while(
            &data[..],
            None,
            (crate::Algorithm::Sha256, crate::Algorithm::Sha512),
            None,
            |mut r| {
                let _ = std::io::copy(&mut (&mut r).take(1 << 20), &mut std::io::sink());
                r.finish(&AtomicBool::new(false)).is_ok()
            },
            |_| false,
        );
        prop_assert_eq!(read.unwrap().1, data.len() as u64, "the digest covers all that came");
    }

    #[test]
    fn fuzz_manifest(text in texts(&[
        &format!(r#"{{"schemaVersion":2,"config":{{"digest":"{DIGEST}","size":7}},"layers":[{{"mediaType":"x","digest":"{DIGEST}","size":9}}]}}"#),
        &format!(r#"{{"schemaVersion":2,"manifests":[{{"digest":"{DIGEST}","size":7,"platform":{{"os":"linux","architecture":"amd64","variant":"v8"}},"annotations":{{"a":"b"}}}}]}}"#),
    ])) {
        if let Ok(manifest::Manifest::Index(entries)) = manifest::parse(text.as_bytes(), "x") {
            let _ = manifest::select(&entries, "x");
        }
    }

    #[test]
    fn fuzz_config(text in texts(&[
        &format!(r#"{{"architecture":"amd64","os":"linux","config":{{"User":"1:2","Env":["A=b"],"ExposedPorts":{{"80/tcp":{{}}}}}},"rootfs":{{"type":"layers","diff_ids":["{DIGEST}"]}},"history":[{{"created":"2024-01-01T00:00:00Z"}}]}}"#),
    ])) {
        if let Ok((_, diffs)) = manifest::parse_config(text.as_bytes(), 1, "x") {
            prop_assert_eq!(manifest::chain_ids(&diffs).len(), 1);
        }
    }

    #[test]
    fn fuzz_challenge(text in texts(&[
        "Bearer realm=\"https://a/t\",service=\"r\",scope=\"repository:a/b:pull\"",
        "Basic realm=\"x\", Bearer realm=https://b",
    ])) {
        let _ = auth::parse_challenge(&text);
    }

    #[test]
    fn fuzz_headers(text in texts(&["bytes 5-9/10", "120", "Fri, 31 Dec 1999 23:59:59 GMT"])) {
        let _ = client::range_start(&text);
        let _ = client::retry_after(&text);
    }

    #[test]
    fn fuzz_hosts(text in texts(&[
        "server = \"https://a\"\n[host.\"https://b:1/p\"]\ncapabilities = [\"pull\", \"resolve\"]\nca = [\"x\"]\nclient = [[\"c\", \"k\"]]\n[host.\"https://b:1/p\".header]\nx = [\"1\"]\n",
        "skip_verify = true\noverride_path = true\n[host.\"http://[::1]:5000\"]\nca = \"x\"\nclient = \"c\"\n",
    ])) {
        if let Ok(found) = hosts::parse(&text, "quay.io", std::path::Path::new("/c"), false) {
            prop_assert!(!found.is_empty());
            for host in found {
                prop_assert!(host.base.starts_with("http://") || host.base.starts_with("https://"), "{}", host.base);
            }
        }
    }

    #[test]
    fn fuzz_docker_config(text in texts(&[r#"{"auths":{"https://quay.io/v1/":{"auth":"dTpwOnE="},"b":{"username":"a","identitytoken":"t"}}}"#])) {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        let _ = auth::from_docker_config(file.path(), "quay.io");
    }

    #[test]
    fn fuzz_reference(text in texts(&["busybox", "quay.io/a/b:v1", "[::1]:5000/a", &format!("h:1/a/b:t@{DIGEST}")])) {
        if let Ok(r) = Reference::parse(&text) {
            prop_assert_eq!(&Reference::parse(&r.to_string()).unwrap(), &r);
            // Both become parts of paths and URLs.
            prop_assert!(!r.registry.contains('/') && r.registry != ".." && !r.registry.is_empty());
            prop_assert!(r.repository.split('/').all(|p| !matches!(p, "" | "." | "..")));
        }
    }
}
