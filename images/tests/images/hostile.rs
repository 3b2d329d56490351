//! Registries that stall, lie and wander: each ends in a clear error, leaves nothing, and the next pull works.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::fake::*;
use crate::support::*;
use orlop_images::{Auth, Digest, Error, ImageStore, Options, Proxies};

/// For those that stall; long enough for honest answers of a busy machine.
const SHORT: Duration = Duration::from_secs(1);

async fn open(place: &Place, options: Options) -> ImageStore {
    ImageStore::open(&place.root(), options).await.unwrap()
}

fn plain_options() -> Options {
    // A registry that stops in the middle is not waited for.
    Options { certs_dir: None, outage: Duration::ZERO, ..Options::default() }
}

fn layer_path() -> String {
    format!("/blobs/{}", Digest::of(&image().2.bytes))
}

fn config_path() -> String {
    format!("/blobs/{}", Digest::of(&image().1))
}

fn ok(body: &[u8]) -> Vec<u8> {
    response("200 OK", "", body.len(), body)
}

/// Answers paths with `what` in them by `by`, all else properly.
fn only(what: String, by: impl Fn(&Seen, &str) -> Vec<u8> + Send + Sync + 'static) -> Box<Answer> {
    let data = image();
    Box::new(move |r, own| if r.line.contains(&what) { by(r, own) } else { serve(&r.line, &data) })
}

fn manifests(body: impl Into<Vec<u8>>) -> Box<Answer> {
    let body = body.into();
    only("/manifests/".into(), move |_, _| ok(&body))
}

/// An image manifest that is right but for what `change` does.
fn changed(change: impl Fn(&mut serde_json::Value)) -> Box<Answer> {
    let mut value: serde_json::Value = serde_json::from_slice(&image().0).unwrap();
    change(&mut value);
    manifests(value.to_string())
}

/// A config that fits its manifest but is not what it should be.
fn with_config(config: serde_json::Value) -> Box<Answer> {
    let config = config.to_string().into_bytes();
    let digest = Digest::of(&config).to_string();
    let body = manifest(&config, &[image().2]).to_string().into_bytes();
    let data = image();
    Box::new(move |r, _| match () {
        () if r.line.contains("/manifests/") => ok(&body),
        () if r.line.contains(&digest) => ok(&config),
        () => serve(&r.line, &data),
    })
}

fn nested() -> Box<Answer> {
    let mut documents = vec![image().0];
    for _ in 0..5 {
        let below: serde_json::Value = serde_json::from_slice(documents.last().unwrap()).unwrap();
        let mut one = index(&below);
        one["manifests"][1]["mediaType"] = "application/vnd.oci.image.index.v1+json".into();
        documents.push(one.to_string().into_bytes());
    }
    only("/manifests/".into(), move |r, _| {
        let by_digest = documents.iter().find(|d| r.line.contains(&Digest::of(d).hex()));
        ok(by_digest.unwrap_or(documents.last().unwrap()))
    })
}

type Case = (&'static str, Box<Answer>, fn(&Error) -> bool, &'static str);

fn cases() -> Vec<Case> {
    let unreachable: fn(&Error) -> bool = |e| matches!(e, Error::Unreachable { .. }) && e.is_transient();
    let registry: fn(&Error) -> bool = |e| matches!(e, Error::Registry { .. });
    let malformed: fn(&Error) -> bool = |e| matches!(e, Error::Malformed { .. }) && !e.is_transient();
    let mismatch: fn(&Error) -> bool = |e| matches!(e, Error::DigestMismatch { .. }) && !e.is_transient();
    let platform: fn(&Error) -> bool = |e| matches!(e, Error::NoPlatform { .. });
    let limited: fn(&Error) -> bool = |e| matches!(e, Error::TooManyRequests { .. });
    let layer = image().2.bytes;
    let part = layer.len() / 3;
    let (hold, trickle, short, longer, wrong, whole) =
        (layer.clone(), layer.clone(), layer.clone(), layer.clone(), layer.clone(), layer.len());
    let fast = config(&[image().2]);
    vec![
        (
            "never answers",
            only("/manifests/".into(), |_, _| b"HTTP/1.1 200 OK\r\nx-hold: 1\r\n".to_vec()),
            unreachable,
            "no response within",
        ),
        (
            "stalls in a layer",
            only(layer_path(), move |_, _| response("200 OK", "x-hold: 1\r\n", whole, &hold[..part])),
            unreachable,
            "stalled",
        ),
        (
            "trickles",
            only(layer_path(), move |_, _| response("200 OK", "x-trickle: 1\r\n", whole, &trickle)),
            unreachable,
            "stalled",
        ),
        ("sends too little", only(layer_path(), move |_, _| ok(&short[..part])), unreachable, "ended after"),
        (
            "sends too much",
            only(layer_path(), move |_, _| ok(&[&longer[..], b"more"].concat())),
            registry,
            "larger than its descriptor",
        ),
        (
            "sends another layer",
            only(layer_path(), move |_, _| {
                let mut l = wrong.clone();
                l[part] ^= 1;
                ok(&l)
            }),
            mismatch,
            "a layer",
        ),
        (
            "sends another config",
            only(config_path(), move |_, _| {
                let mut c = fast.clone();
                c[0] ^= 1;
                ok(&c)
            }),
            mismatch,
            "the image config",
        ),
        (
            "lies about the config's size",
            changed(|m| m["config"]["size"] = 7.into()),
            registry,
            "larger than 7",
        ),
        (
            "announces a huge config",
            changed(|m| m["config"]["size"] = (1u64 << 40).into()),
            malformed,
            "more than",
        ),
        (
            "announces an endless layer",
            changed(|m| m["layers"][0]["size"] = u64::MAX.into()),
            unreachable,
            "ended after",
        ),
        ("negative size", changed(|m| m["layers"][0]["size"] = (-1).into()), malformed, "invalid value"),
        (
            "a path as digest",
            changed(|m| m["layers"][0]["digest"] = "sha256:../../etc/passwd".into()),
            malformed,
            "sha256",
        ),
        (
            "endless headers",
            only("/manifests/".into(), |_, _| {
                response("200 OK", &format!("x: {}\r\n", "y".repeat(2 << 20)), 0, b"")
            }),
            registry,
            "not usable HTTP",
        ),
        (
            "thousands of headers",
            only("/manifests/".into(), |_, _| response("200 OK", &"x: y\r\n".repeat(5000), 0, b"")),
            registry,
            "not usable HTTP",
        ),
        (
            "not HTTP",
            only("/manifests/".into(), |_, _| b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()),
            registry,
            "not usable HTTP",
        ),
        ("endless JSON", manifests(vec![b' '; 5 << 20]), registry, "larger than 4194304"),
        ("deep JSON", manifests("[".repeat(1 << 20)), malformed, "manifest"),
        (
            "many layers",
            changed(|m| {
                let l = m["layers"][0].clone();
                m["layers"] = vec![l; 600].into();
            }),
            malformed,
            "600 layers",
        ),
        ("no JSON", manifests("<html>"), malformed, "expected value"),
        ("schema 1", manifests("{\"schemaVersion\":1,\"fsLayers\":[]}"), malformed, "version 1"),
        ("indexes without end", nested(), malformed, "nested too deeply"),
        (
            "another number of layers",
            with_config(
                serde_json::json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}),
            ),
            malformed,
            "names 0 layers",
        ),
        (
            "another machine's config",
            with_config(
                serde_json::json!({"architecture": "mips", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [image().2.diff.to_string()]}}),
            ),
            platform,
            "linux/mips",
        ),
        (
            "redirects in a circle",
            only("/blobs/".into(), |r, _| {
                let path = r.line.split(' ').nth(1).unwrap_or("/").to_owned();
                response("307 Temporary Redirect", &format!("location: {path}\r\n"), 0, b"")
            }),
            registry,
            "redirects too often",
        ),
        (
            "redirects to nowhere",
            only("/blobs/".into(), |_, _| {
                response("307 Temporary Redirect", "location: ftp://x/\r\n", 0, b"")
            }),
            registry,
            "without a usable address",
        ),
        (
            "redirects without address",
            only("/manifests/".into(), |_, _| response("302 Found", "", 0, b"")),
            registry,
            "without a usable address",
        ),
        (
            "is broken",
            only("/manifests/".into(), |_, _| response("500 Internal Server Error", "", 0, b"")),
            registry,
            "HTTP 500",
        ),
        (
            "wants us to wait a day",
            only("/blobs/".into(), |_, _| {
                response("429 Too Many Requests", "retry-after: 86400\r\n", 0, b"")
            }),
            limited,
            "limits requests",
        ),
        (
            "another range than asked for",
            {
                let all = layer.clone();
                only(layer_path(), move |r, _| match r.headers.get("range") {
                    None => response("200 OK", "", whole, &all[..part]),
                    Some(_) => response(
                        "206 Partial Content",
                        &format!("content-range: bytes {}-{}/{}\r\n", whole - 5, whole - 1, whole),
                        5,
                        &all[..5],
                    ),
                })
            },
            registry,
            "another range",
        ),
        (
            "asks for odd credentials",
            only("/manifests/".into(), |_, _| {
                response("401 Unauthorized", "www-authenticate: Bearer realm=\"::::\"\r\n", 0, b"")
            }),
            |e| matches!(e, Error::Unauthorized { .. }),
            "token address",
        ),
        (
            "has an endless token",
            only("".into(), |r, own| match r.line.contains("/token") {
                true => ok(&vec![b' '; 2 << 20]),
                false => response(
                    "401 Unauthorized",
                    &format!("www-authenticate: Bearer realm=\"http://{own}/token\"\r\n"),
                    0,
                    b"",
                ),
            }),
            registry,
            "larger than 1048576",
        ),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_lie_is_a_clear_error_and_the_next_pull_works() {
    let data = image();
    let good = Fake::start(Box::new(move |r, _| serve(&r.line, &data)));
    let runs = cases().into_iter().map(|(name, answer, is_right, says)| {
        let good = format!("{}/good:v1", good.address);
        async move {
            let fake = Fake::start(answer);
            let place = Place::new();
            let mut options = plain_options();
            if matches!(says, "no response within" | "stalled") {
                options.patience = SHORT;
            }
            let store = open(&place, options).await;
            let bad = format!("{}/a:v1", fake.address);
            let pulling = store.pull(&bad, None);
            let result = tokio::time::timeout(Duration::from_secs(60), pulling).await.expect(name);
            let e = result.expect_err(name);
            assert!(is_right(&e) && e.to_string().contains(says), "{name}: {e}");
            assert!(e.to_string().len() < 2000, "{name}: a page of text");
            store.gc().await.unwrap();
            let left =
                (place.count("ingest"), place.count("trash"), place.count("layers"), place.count("content"));
            assert_eq!(left, (0, 0, 1, 0), "{name}");
            assert!(store.list().is_empty(), "{name}");
            store.pull(&good, None).await.expect(name);
        }
    });
    futures::future::join_all(runs).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_in_trouble_is_given_time() {
    for (status, headers) in [
        ("503 Service Unavailable", ""),
        ("429 Too Many Requests", "retry-after: 0\r\n"),
        ("429 Too Many Requests", "retry-after: Mon, 01 Jan 2024 00:00:00 GMT\r\n"),
        ("504 Gateway Timeout", "retry-after: nonsense\r\n"),
    ] {
        let data = image();
        let count = Arc::new(AtomicU32::new(0));
        let fake = Fake::start(Box::new(move |r, _| match count.fetch_add(1, Ordering::Relaxed) % 2 {
            0 => response(status, headers, 0, b""),
            _ => serve(&r.line, &data),
        }));
        let place = Place::new();
        let store = open(&place, plain_options()).await;
        store.pull(&format!("{}/a:v1", fake.address), None).await.expect(status);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dockers_own_types_are_pulled_by_platform_and_by_digest() {
    let (_, config, mut layer) = image();
    layer.kind = "application/vnd.docker.image.rootfs.diff.tar.gzip";
    let mut one = manifest(&config, std::slice::from_ref(&layer));
    one["mediaType"] = "application/vnd.docker.distribution.manifest.v2+json".into();
    one["config"]["mediaType"] = "application/vnd.docker.container.image.v1+json".into();
    let mut list = index(&one);
    list["mediaType"] = "application/vnd.docker.distribution.manifest.list.v2+json".into();
    let (one, list) = (one.to_string().into_bytes(), list.to_string().into_bytes());
    let digest = Digest::of(&list);
    let layer_hex = Digest::of(&layer.bytes).hex();
    let data = (one.clone(), config, layer);
    let fake = Fake::start(Box::new(move |r, _| {
        let is_list = r.line.contains("/manifests/") && !r.line.contains(&Digest::of(&one).hex());
        if is_list { ok(&list) } else { serve(&r.line, &data) }
    }));
    let place = Place::new();
    let store = open(&place, plain_options()).await;
    let name = format!("{}/a@{digest}", fake.address);
    let image = store.pull(&name, None).await.unwrap();
    assert_eq!((image.repo_tags.len(), &image.repo_digests[..]), (0, &[name.clone()][..]));
    let asked = fake.requests("/blobs/").iter().filter(|r| r.line.contains(&layer_hex)).count();
    store.pull(&name, None).await.unwrap();
    let again = fake.requests("/blobs/").iter().filter(|r| r.line.contains(&layer_hex)).count();
    assert_eq!(again, asked, "a layer that is here is not fetched again");
    let e = store.pull(&format!("{}/a@{}", fake.address, Digest::of(b"x")), None).await.unwrap_err();
    assert!(matches!(e, Error::DigestMismatch { .. }), "{e}");
}

/// Keys and certificates by openssl: an authority, a server on 127.0.0.1, a client.
fn certificates(dir: &std::path::Path) {
    let run = |args: &str| {
        let out = Command::new("openssl")
            .args(args.split(' '))
            .current_dir(dir)
            .output()
            .expect("openssl must be installed: apt-get install openssl");
        assert!(out.status.success(), "{args}: {}", String::from_utf8_lossy(&out.stderr));
    };
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    run(&format!("req -x509 {key} -keyout ca.key -out ca.pem -days 2 -subj /CN=ca"));
    for name in ["server", "client"] {
        let extra = "-addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:false";
        run(&format!(
            "req -x509 {key} -CA ca.pem -CAkey ca.key -keyout {name}.key -out {name}.pem -days 2 -subj /CN={name} {extra}"
        ));
    }
}

fn server_tls(dir: &std::path::Path, wants_client: bool) -> Arc<rustls::ServerConfig> {
    let pem = |name: &str| std::fs::read(dir.join(name)).unwrap();
    let certs =
        |name: &str| rustls_pemfile::certs(&mut &pem(name)[..]).map(Result::unwrap).collect::<Vec<_>>();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap();
    let builder = if wants_client {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(certs("ca.pem").remove(0)).unwrap();
        let verifier =
            rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
        builder.with_client_cert_verifier(verifier.unwrap())
    } else {
        builder.with_no_client_auth()
    };
    let key = rustls_pemfile::private_key(&mut &pem("server.key")[..]).unwrap().unwrap();
    Arc::new(builder.with_single_cert(certs("server.pem"), key).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_is_checked_as_hosts_toml_says() {
    let keys = tempfile::tempdir().unwrap();
    certificates(keys.path());
    let data = || image();
    let start = |answer: Box<Answer>, wants_client| {
        Fake::start_tls(answer, Some(server_tls(keys.path(), wants_client)))
    };
    let (one, two) = (data(), data());
    let open_to_all = start(Box::new(move |r, _| serve(&r.line, &one)), false);
    let for_clients = start(Box::new(move |r, _| serve(&r.line, &two)), true);
    let three = data();
    let plain = Fake::start(Box::new(move |r, _| serve(&r.line, &three)));
    let to = plain.address.clone();
    let downgrades = start(
        only("/blobs/".into(), move |r, _| {
            let path = r.line.split(' ').nth(1).unwrap();
            response("307 Temporary Redirect", &format!("location: http://{to}{path}\r\n"), 0, b"")
        }),
        false,
    );
    let service = plain.address.clone();
    let leaks = start(
        Box::new(move |_, _| {
            let header = format!("www-authenticate: Bearer realm=\"http://{service}/token\"\r\n");
            response("401 Unauthorized", &header, 0, b"")
        }),
        false,
    );
    let at = |name: &str| keys.path().join(name).display().to_string();
    let ca = format!("ca = {:?}", at("ca.pem"));
    let client = format!("{ca}\nclient = [[{:?}, {:?}]]", at("client.pem"), at("client.key"));
    let user = Auth { username: "u".into(), password: "hunter2".into(), ..Auth::default() };
    for (name, server, settings, error) in [
        ("unknown authority", &open_to_all, "", "certificate"),
        ("known authority", &open_to_all, &ca[..], ""),
        ("unchecked", &open_to_all, "skip_verify = true", ""),
        ("no client certificate", &for_clients, &ca, "CertificateRequired"),
        ("client certificate", &for_clients, &client, ""),
        ("no such file", &for_clients, "ca = \"nowhere.pem\"", "nowhere.pem"),
        ("not a certificate", &for_clients, "ca = \"hosts.toml\"", "no PEM certificate"),
        ("redirect to plain HTTP", &downgrades, &ca, "from TLS to plain HTTP"),
        ("password to plain HTTP", &leaks, &ca, "without TLS"),
    ] {
        let place = Place::new();
        let certs = place.dir.path().join("certs");
        let folder = certs.join(&server.address);
        std::fs::create_dir_all(&folder).unwrap();
        let text = format!("server = \"https://{}\"\n{settings}\n", server.address);
        std::fs::write(folder.join("hosts.toml"), text).unwrap();
        let store = open(&place, Options { certs_dir: Some(certs), ..Options::default() }).await;
        match store.pull(&format!("{}/a:v1", server.address), Some(&user)).await {
            Ok(_) => assert!(error.is_empty(), "{name}"),
            Err(e) => assert!(!error.is_empty() && e.to_string().contains(error), "{name}: {e}"),
        }
    }
    assert!(plain.requests("").is_empty(), "nothing goes over plain HTTP");
}

/// Whoever a plain registry sends on to by https is checked by the machine's authorities.
#[test]
fn a_plain_registry_may_redirect_to_tls() {
    const KEYS: &str = "ORLOP_TEST_KEYS";
    let Some(keys) = std::env::var_os(KEYS) else {
        let keys = tempfile::tempdir().unwrap();
        certificates(keys.path());
        // A process of its own: which authorities there are is the environment's to say.
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "hostile::a_plain_registry_may_redirect_to_tls", "--nocapture"])
            .env(KEYS, keys.path())
            .env("SSL_CERT_FILE", keys.path().join("ca.pem"))
            .env_remove("SSL_CERT_DIR")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout) + String::from_utf8_lossy(&child.stderr);
        assert!(child.status.success() && said.contains("1 passed"), "{said}");
        return;
    };
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let (data, stored) = (image(), image());
        let answer: Box<Answer> = Box::new(move |r, _| {
            let body = br#"{"token":"t"}"#;
            if r.line.contains("/token") {
                response("200 OK", "", body.len(), body)
            } else {
                serve(&r.line, &stored)
            }
        });
        let storage = Fake::start_tls(answer, Some(server_tls(keys.as_ref(), false)));
        let to = storage.address.clone();
        let plain = Fake::start(Box::new(move |r, _| {
            if !r.headers.contains_key("authorization") {
                let header = format!("www-authenticate: Bearer realm=\"https://{to}/token\"\r\n");
                return response("401 Unauthorized", &header, 0, b"");
            }
            if !r.line.contains("/blobs/") {
                return serve(&r.line, &data);
            }
            let path = r.line.split(' ').nth(1).unwrap();
            response("307 Temporary Redirect", &format!("location: https://{to}{path}\r\n"), 0, b"")
        }));
        let place = Place::new();
        let store = open(&place, plain_options()).await;
        store.pull(&format!("{}/a:v1", plain.address), None).await.unwrap();
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proxies_are_used_and_told_who_we_are() {
    let data = image();
    // A proxy that is the registry itself: it reads whole URLs.
    let proxy = Fake::start(Box::new(move |r, _| match r.headers.get("proxy-authorization") {
        Some(_) if r.line.contains(" http://registry.example:5000/v2/") => serve(&r.line, &data),
        Some(_) => response("403 Forbidden", "", 0, b""),
        None => response("407 Proxy Authentication Required", "", 0, b""),
    }));
    let place = Place::new();
    let certs = place.dir.path().join("certs");
    std::fs::create_dir_all(certs.join("_default")).unwrap();
    std::fs::write(certs.join("_default/hosts.toml"), "[host.\"http://registry.example:5000\"]\n").unwrap();
    let proxies = Proxies {
        http: Some(format!("http://me:secret@{}", proxy.address)),
        https: Some(proxy.address.clone()),
        no: "direct.invalid".into(),
    };
    let store = open(&place, Options { certs_dir: Some(certs), proxies, ..Options::default() }).await;
    store.pull("registry.example:5000/a:v1", None).await.unwrap();
    // With TLS the proxy only connects, and this one refuses.
    let place = Place::new();
    let proxies = Proxies { https: Some(format!("http://{}", proxy.address)), ..Proxies::default() };
    let store = open(&place, Options { proxies, ..plain_options() }).await;
    let e = store.pull("registry.example/a:v1", None).await.unwrap_err();
    assert!(matches!(&e, Error::Unreachable { detail, .. } if detail.contains("proxy http://")), "{e}");
    assert!(proxy.requests("CONNECT registry.example:443").len() > 1);
}

/// With TLS, a proxy carries what it cannot read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_carries_tls_to_the_registry() {
    use std::io::{BufRead, BufReader, Write};
    let keys = tempfile::tempdir().unwrap();
    certificates(keys.path());
    let data = image();
    let registry =
        Fake::start_tls(Box::new(move |r, _| serve(&r.line, &data)), Some(server_tls(keys.path(), false)));
    let to = registry.address.clone();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = listener.local_addr().unwrap();
    let heads: Arc<std::sync::Mutex<Vec<String>>> = Arc::default();
    let heads2 = heads.clone();
    // Ends with the test's process.
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let mut reader = BufReader::new(client.try_clone().unwrap());
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") && reader.read_line(&mut head).unwrap_or(0) > 0 {}
            heads2.lock().unwrap().push(head);
            let mut server = std::net::TcpStream::connect(&to).unwrap();
            let (mut back, mut out) = (server.try_clone().unwrap(), client.try_clone().unwrap());
            out.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").unwrap();
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut back, &mut out);
                let _ = out.shutdown(std::net::Shutdown::Write);
            });
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut reader, &mut server);
                let _ = server.shutdown(std::net::Shutdown::Write);
            });
        }
    });
    let place = Place::new();
    let certs = place.dir.path().join("certs");
    std::fs::create_dir_all(certs.join("registry.example")).unwrap();
    // Its certificate is for an address.
    std::fs::write(certs.join("registry.example/hosts.toml"), "skip_verify = true\n").unwrap();
    let proxies = Proxies { https: Some(format!("http://me:secret@{proxy}")), ..Proxies::default() };
    let store = open(&place, Options { certs_dir: Some(certs), proxies, ..Options::default() }).await;
    store.pull("registry.example/a:v1", None).await.unwrap();
    let heads = heads.lock().unwrap();
    let basic = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, "me:secret");
    for head in heads.iter() {
        assert!(head.starts_with("CONNECT registry.example:443 HTTP/1.1\r\n"), "{head}");
        assert!(
            head.to_lowercase().contains("proxy-authorization: basic") && head.contains(&basic),
            "{head}"
        );
    }
    let seen = registry.requests("");
    assert!(!heads.is_empty() && !seen.is_empty());
    assert!(seen.iter().all(|r| !r.headers.contains_key("proxy-authorization")), "{seen:?}");
}

/// A header is no proof: an image is called by what came.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_digest_in_a_header_is_not_believed() {
    let body = image().0;
    let own = Digest::of(&body);
    let fake = Fake::start(only("/manifests/".into(), move |r, _| {
        let header = format!("docker-content-digest: {}\r\n", Digest::of(b"another"));
        let head = r.line.starts_with("HEAD");
        response("200 OK", &header, body.len(), if head { b"" } else { &body })
    }));
    let place = Place::new();
    let store = open(&place, plain_options()).await;
    for _ in 0..2 {
        let image = store.pull(&format!("{}/a:v1", fake.address), None).await.unwrap();
        assert_eq!(image.repo_digests, [format!("{}/a@{own}", fake.address)]);
    }
    let e = store.pull(&format!("{}/a@{}", fake.address, Digest::of(b"another")), None).await.unwrap_err();
    assert!(matches!(e, Error::DigestMismatch { .. }), "{e}");
}
