//! What a registry may do on the wire: break off, ask for a token, redirect, be one of several mirrors.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use crate::support::*;
use base64::Engine as _;
use orlop_images::{Auth, Digest, Error, ImageStore, Options};

/// One request as the server saw it.
#[derive(Clone, Debug)]
struct Seen {
    line: String,
    headers: HashMap<String, String>,
}

type Answer = dyn Fn(&Seen, &str) -> Vec<u8> + Send + Sync;

/// A server that answers each request by `answer(request, own address)` and closes the connection.
struct Fake {
    address: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Fake {
    fn start(answer: Box<Answer>) -> Fake {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let (seen2, address2) = (seen.clone(), address.clone());
        // Ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let Some(request) = read_request(&stream) else { continue };
                let bytes = answer(&request, &address2);
                seen2.lock().unwrap().push(request);
                let mut stream = stream;
                let _ = stream.write_all(&bytes);
            }
        });
        Fake { address, seen }
    }

    fn requests(&self, what: &str) -> Vec<Seen> {
        self.seen.lock().unwrap().iter().filter(|s| s.line.contains(what)).cloned().collect()
    }
}

fn read_request(stream: &TcpStream) -> Option<Seen> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut headers = HashMap::new();
    loop {
        let mut h = String::new();
        reader.read_line(&mut h).ok()?;
        let Some((k, v)) = h.trim().split_once(':') else { break };
        headers.insert(k.to_ascii_lowercase(), v.trim().to_owned());
    }
    let length = headers.get("content-length").and_then(|l| l.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    line.push_str(&String::from_utf8_lossy(&body));
    Some(Seen { line, headers })
}

fn response(status: &str, headers: &str, length: usize, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n");
    [head.as_bytes(), body].concat()
}

/// An image, as a function from path to document.
fn image() -> (Vec<u8>, Vec<u8>, Blob) {
    let noise: Vec<u8> = (0..400_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let layer = gzip(tar_of(&[("noise", &noise)]));
    let config = config(std::slice::from_ref(&layer));
    (manifest(&config, std::slice::from_ref(&layer)).to_string().into_bytes(), config, layer)
}

fn serve(line: &str, (manifest, config, layer): &(Vec<u8>, Vec<u8>, Blob)) -> Vec<u8> {
    let head = line.starts_with("HEAD");
    let body = if line.contains("/manifests/") {
        manifest
    } else if line.contains(&Digest::of(config).hex()) {
        config
    } else if line.contains(&Digest::of(&layer.bytes).hex()) {
        &layer.bytes
    } else {
        return response("404 Not Found", "", 0, b"");
    };
    response("200 OK", "", body.len(), if head { b"" } else { body })
}

async fn store(place: &Place, certs_dir: Option<std::path::PathBuf>) -> ImageStore {
    ImageStore::open(&place.root(), Options { certs_dir, ..Options::default() }).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_that_breaks_off_goes_on_where_it_was() {
    for honours_range in [true, false] {
        let data = image();
        let layer = data.2.clone();
        let fake = Fake::start(Box::new(move |r, _| {
            if !r.line.contains(&Digest::of(&layer.bytes).hex()) {
                return serve(&r.line, &data);
            }
            let all = &layer.bytes;
            match r.headers.get("range").filter(|_| honours_range) {
                Some(range) => {
                    let from: usize =
                        range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap();
                    // Breaks off again until it is near the end.
                    let part = &all[from..];
                    let stop = if part.len() > 100_000 { part.len() / 2 } else { part.len() };
                    let headers = format!("content-range: bytes {from}-{}/{}\r\n", all.len() - 1, all.len());
                    response("206 Partial Content", &headers, part.len(), &part[..stop])
                }
                None if r.headers.contains_key("range") => response("200 OK", "", all.len(), all),
                None => response("200 OK", "", all.len(), &all[..all.len() / 3]),
            }
        }));
        let place = Place::new();
        let store = store(&place, None).await;
        store.pull(&format!("{}/a:v1", fake.address), None).await.unwrap();
        let layers = fake.requests(&Digest::of(&image().2.bytes).hex());
        assert!(layers.len() >= 2 && layers[1].headers.contains_key("range"), "{layers:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lies_about_length_end_in_an_error() {
    let data = image();
    let layer = data.2.clone();
    let fake = Fake::start(Box::new(move |r, _| {
        if r.line.contains(&Digest::of(&layer.bytes).hex()) {
            let longer = [&layer.bytes[..], b"more"].concat();
            return response("200 OK", "", longer.len(), &longer);
        }
        serve(&r.line, &data)
    }));
    let place = Place::new();
    let store = store(&place, None).await;
    let e = store.pull(&format!("{}/a:v1", fake.address), None).await.unwrap_err();
    assert!(matches!(&e, Error::Registry { detail, .. } if detail.contains("larger")), "{e}");
    assert_eq!(place.count("ingest"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_and_passwords() {
    let data = image();
    let fake = Fake::start(Box::new(move |r, own| {
        let authorization = r.headers.get("authorization").cloned().unwrap_or_default();
        let basic = |u: &str| format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(u));
        if r.line.contains("/token") {
            let good = authorization == basic("user:hunter2")
                || (r.line.starts_with("POST") && r.line.contains("refresh_token=long-lived"));
            if !good || !r.line.contains("scope=repository") {
                return response("401 Unauthorized", "", 0, b"");
            }
            let body = br#"{"access_token":"ticket"}"#;
            return response("200 OK", "", body.len(), body);
        }
        if r.line.contains("/v2/basic/") {
            return match authorization == basic("user:hunter2") {
                true => serve(&r.line, &data),
                false => response("401 Unauthorized", "www-authenticate: Basic realm=\"x\"\r\n", 0, b""),
            };
        }
        match authorization == "Bearer ticket" {
            true => serve(&r.line, &data),
            false => {
                let header = format!(
                    "www-authenticate: Bearer realm=\"http://{own}/token\",service=\"me\",scope=\"repository:a:pull\"\r\n"
                );
                response("401 Unauthorized", &header, 0, b"")
            }
        }
    }));
    let user = Auth { username: "user".into(), password: "hunter2".into(), ..Auth::default() };
    let refresh = Auth { identity_token: "long-lived".into(), ..Auth::default() };
    let wrong = Auth { password: "wrong".into(), ..user.clone() };
    let elsewhere = Auth { server_address: "https://quay.io".into(), ..user.clone() };
    for (name, auth, fine) in [
        ("a", Some(&user), true),
        ("a", Some(&refresh), true),
        ("a", Some(&wrong), false),
        ("a", Some(&elsewhere), false),
        ("a", None, false),
        ("basic", Some(&user), true),
        ("basic", Some(&wrong), false),
        ("basic", None, false),
    ] {
        let place = Place::new();
        let result = store(&place, None).await.pull(&format!("{}/{name}:v1", fake.address), auth).await;
        match result {
            Ok(_) => assert!(fine, "{name} {auth:?}"),
            Err(e) => {
                assert!(!fine && matches!(e, Error::Unauthorized { .. }), "{name} {auth:?}: {e}");
                assert!(!e.to_string().contains("hunter2"));
            }
        }
    }
    let layer = Digest::of(&image().2.bytes).hex();
    assert!(
        fake.requests(&layer).iter().all(|r| r.headers.contains_key("authorization")),
        "one token for all"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mirrors_come_first_and_see_no_credentials() {
    let data = image();
    let upstream_data = image();
    let storage = {
        let data = image();
        Fake::start(Box::new(move |r, _| serve(&r.line, &data)))
    };
    let to = storage.address.clone();
    let upstream = Fake::start(Box::new(move |r, _| {
        if r.line.contains("/blobs/") {
            let path = r.line.split(' ').nth(1).unwrap();
            return response("307 Temporary Redirect", &format!("location: http://{to}{path}\r\n"), 0, b"");
        }
        match r.headers.get("authorization") {
            Some(_) => serve(&r.line, &upstream_data),
            None => response("401 Unauthorized", "www-authenticate: Basic realm=\"x\"\r\n", 0, b""),
        }
    }));
    // It resolves, but has lost its blobs.
    let mirror = Fake::start(Box::new(move |r, _| {
        if r.line.contains("/blobs/") { response("404 Not Found", "", 0, b"") } else { serve(&r.line, &data) }
    }));
    let place = Place::new();
    let certs = place.dir.path().join("certs.d");
    std::fs::create_dir_all(certs.join(&upstream.address)).unwrap();
    let hosts = format!("[host.\"http://{}\"]\n[host.\"http://{}\"]\n", own_address(), mirror.address);
    std::fs::write(certs.join(&upstream.address).join("hosts.toml"), hosts).unwrap();
    let user = Auth { username: "u".into(), password: "p".into(), ..Auth::default() };
    let store = store(&place, Some(certs.clone())).await;
    store.pull(&format!("{}/a:v1", upstream.address), Some(&user)).await.unwrap();
    assert!(!mirror.requests("/manifests/").is_empty());
    for other in [&mirror, &storage] {
        assert!(other.requests("").iter().all(|r| !r.headers.contains_key("authorization")));
    }
    assert!(upstream.requests("/manifests/").is_empty(), "the mirror had the manifest");
    std::fs::write(certs.join(&upstream.address).join("hosts.toml"), "server = 1").unwrap();
    let e = store.pull(&format!("{}/b:v1", upstream.address), None).await.unwrap_err();
    assert!(matches!(&e, Error::Config { path, .. } if path.ends_with("hosts.toml")), "{e}");
}
