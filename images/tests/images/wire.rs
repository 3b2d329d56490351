//! What a registry may do on the wire: break off, ask for a token, redirect, be one of several mirrors.

use crate::fake::*;
use crate::support::*;
use base64::Engine as _;
use orlop_images::{Auth, Digest, Error, Options};

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

/// An image that is here is only for those whom its registry lets have it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_here_is_not_everybodys() {
    let data = image();
    let digest = Digest::of(&data.0);
    let good = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode("u:p"));
    let up = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let is_up = up.clone();
    for names_digest in [true, false] {
        let (data, good, is_up) = (data.clone(), good.clone(), is_up.clone());
        up.store(true, std::sync::atomic::Ordering::SeqCst);
        let fake = Fake::start(Box::new(move |r, _| {
            if !is_up.load(std::sync::atomic::Ordering::SeqCst) {
                return Vec::new();
            }
            if r.headers.get("authorization") != Some(&good) {
                return response("401 Unauthorized", "www-authenticate: Basic realm=\"x\"\r\n", 0, b"");
            }
            if names_digest && r.line.starts_with("HEAD") {
                let header = format!("docker-content-digest: {}\r\n", Digest::of(&data.0));
                return response("200 OK", &header, data.0.len(), b"");
            }
            serve(&r.line, &data)
        }));
        let place = Place::new();
        let patience = std::time::Duration::from_millis(300);
        let store = place.open_with(Options { patience, ..Options::default() }).await;
        let user = |name: &str| Auth { username: "u".into(), password: name.into(), ..Auth::default() };
        let names = [
            format!("{}/a:v1", fake.address),
            format!("{}/a@{digest}", fake.address),
            format!("{}/a:v1@{digest}", fake.address),
        ];
        store.pull(&names[0], Some(&user("p"))).await.unwrap();
        let blobs = fake.requests("/blobs/").len();
        for name in &names {
            for auth in [None, Some(user("other"))] {
                let e = store.pull(name, auth.as_ref()).await.unwrap_err();
                assert!(matches!(e, Error::Unauthorized { .. }), "{name}: {e}");
            }
            store.pull(name, Some(&user("p"))).await.unwrap();
        }
        if names_digest {
            assert_eq!(fake.requests("/blobs/").len(), blobs, "what is here is not fetched again");
        }
        up.store(false, std::sync::atomic::Ordering::SeqCst);
        store.pull(&names[1], Some(&user("p"))).await.unwrap_err();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_expires_between_requests_is_renewed() {
    let data = image();
    let given = std::sync::atomic::AtomicU32::new(0);
    let fake = Fake::start(Box::new(move |r, own| {
        use std::sync::atomic::Ordering::SeqCst;
        if r.line.contains("/token") {
            let body = format!("{{\"token\":\"t{}\",\"expires_in\":1}}", given.fetch_add(1, SeqCst) + 1);
            return response("200 OK", "", body.len(), body.as_bytes());
        }
        // Each token is good for one document: its number is the number of those that were served.
        let good = match r.line.split('/').nth(3) {
            Some("manifests") => "Bearer t1",
            _ if r.line.contains(&Digest::of(&data.1).hex()) => "Bearer t2",
            _ => "Bearer t3",
        };
        if r.headers.get("authorization").is_some_and(|a| a == good) {
            return serve(&r.line, &data);
        }
        let header =
            format!("www-authenticate: Bearer realm=\"http://{own}/token\",error=\"invalid_token\"\r\n");
        response("401 Unauthorized", &header, 0, b"")
    }));
    let place = Place::new();
    let store = store(&place, None).await;
    store.pull(&format!("{}/a:v1", fake.address), None).await.unwrap();
    let tokens = fake.requests("/token");
    assert_eq!(tokens.len(), 3, "{tokens:?}");
    // Without a scope in the challenge: the repository, to read.
    assert!(tokens.iter().all(|t| t.line.contains("scope=repository%3Aa%3Apull")), "{tokens:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_is_asked_as_hosts_toml_says() {
    let data = image();
    let mirror = Fake::start(Box::new(move |r, _| match r.line.split(' ').nth(1) {
        // The path is used as it stands, and the mirror learns which registry is meant.
        Some(p) if p.starts_with("/proxy/cache/team/a/") && p.ends_with("?ns=registry.example") => {
            serve(&r.line, &data)
        }
        _ => response("404 Not Found", "", 0, b""),
    }));
    let blobs = {
        let data = image();
        Fake::start(Box::new(move |r, _| serve(&r.line, &data)))
    };
    let place = Place::new();
    let certs = place.dir.path().join("certs.d");
    std::fs::create_dir_all(certs.join("_default")).unwrap();
    // The second serves no names, so the first must.
    let hosts = format!(
        "[host.\"http://{}\"]\ncapabilities = [\"pull\"]\n\
         [host.\"http://{}/proxy/cache\"]\noverride_path = true\n\
         [host.\"http://{}/proxy/cache\".header]\nx-token = [\"one\", \"two\"]\nauthorization = \"Basic bWU6aXQ=\"\n",
        blobs.address, mirror.address, mirror.address
    );
    std::fs::write(certs.join("_default/hosts.toml"), hosts).unwrap();
    let store = store(&place, Some(certs)).await;
    let image = store.pull("registry.example/team/a:v1", None).await.unwrap();
    assert_eq!(image.repo_tags, ["registry.example/team/a:v1"]);
    let names = mirror.requests("/manifests/v1");
    assert!(!names.is_empty() && blobs.requests("/manifests/v1").is_empty());
    assert!(!blobs.requests("/blobs/").is_empty() && mirror.requests("/blobs/").is_empty());
    for r in names {
        assert_eq!(r.headers.get("authorization").map(String::as_str), Some("Basic bWU6aXQ="), "{r:?}");
        assert!(r.headers.contains_key("x-token"), "{r:?}");
    }
}

/// A registry may have less of a blob than it sent before the connection broke, or no ranges at all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_range_that_cannot_be_had_means_all_of_it() {
    let data = image();
    let layer = data.2.clone();
    let path = Digest::of(&layer.bytes).hex();
    let plain = std::sync::atomic::AtomicU32::new(0);
    let fake = Fake::start(Box::new(move |r, _| {
        if !r.line.contains(&Digest::of(&layer.bytes).hex()) {
            return serve(&r.line, &data);
        }
        let all = &layer.bytes;
        if r.headers.contains_key("range") {
            return response("416 Range Not Satisfiable", "content-range: bytes */7\r\n", 0, b"");
        }
        // The first breaks off.
        let first = plain.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0;
        response("200 OK", "", all.len(), if first { &all[..all.len() / 2] } else { all })
    }));
    let place = Place::new();
    store(&place, None).await.pull(&format!("{}/a:v1", fake.address), None).await.unwrap();
    let asked = fake.requests(&path);
    let ranges: Vec<bool> = asked.iter().map(|r| r.headers.contains_key("range")).collect();
    assert_eq!(ranges, [false, true, false]);
}

/// The token of a long transfer may be no good any more when the transfer breaks off.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_goes_on_with_a_new_token() {
    let data = image();
    let layer = data.2.clone();
    let path = Digest::of(&layer.bytes).hex();
    let given = std::sync::atomic::AtomicUsize::new(0);
    let fake = Fake::start(Box::new(move |r, own| {
        use std::sync::atomic::Ordering::SeqCst;
        if r.line.contains("/token") {
            let body = format!("{{\"token\":\"t{}\"}}", given.fetch_add(1, SeqCst) + 1);
            return response("200 OK", "", body.len(), body.as_bytes());
        }
        let is_layer = r.line.contains(&Digest::of(&layer.bytes).hex());
        let from: Option<usize> = r
            .headers
            .get("range")
            .map(|v| v.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap());
        let all = &layer.bytes;
        // Each third of the layer wants the next token.
        let third = all.len() / 3;
        let wanted = match (is_layer, from) {
            (true, Some(n)) => format!("Bearer t{}", n / third + 1),
            _ => "Bearer t1".to_owned(),
        };
        if r.headers.get("authorization") != Some(&wanted) {
            let header = format!("www-authenticate: Bearer realm=\"http://{own}/token\"\r\n");
            return response("401 Unauthorized", &header, 0, b"");
        }
        match (is_layer, from) {
            (false, _) => serve(&r.line, &data),
            (true, None) => response("200 OK", "", all.len(), &all[..third]),
            (true, Some(n)) => {
                let headers = format!("content-range: bytes {n}-{}/{}\r\n", all.len() - 1, all.len());
                let end = if n / third == 1 { 2 * third } else { all.len() };
                response("206 Partial Content", &headers, all.len() - n, &all[n..end])
            }
        }
    }));
    let place = Place::new();
    store(&place, None).await.pull(&format!("{}/a:v1", fake.address), None).await.unwrap();
    assert_eq!(fake.requests("/token").len(), 3, "{:?}", fake.requests(""));
    assert_eq!(fake.requests(&path).len(), 5, "{:?}", fake.requests(&path));
}

/// A host where no connection comes about costs the time that hosts.toml gives it, and whoever a registry redirects to sees none of
/// the headers that are meant for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_mirror_costs_its_dial_timeout() {
    // One whose queue is full: what comes next is not answered at all.
    let silent = tokio::net::TcpSocket::new_v4().unwrap();
    silent.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let silent = silent.listen(1).unwrap();
    let at = silent.local_addr().unwrap();
    let limit = std::time::Duration::from_millis(500);
    let mut queue = Vec::new();
    while let Ok(stream) = std::net::TcpStream::connect_timeout(&at, limit) {
        queue.push(stream);
        assert!(queue.len() < 100, "a queue of one takes any number");
    }
    let (data, stored) = (image(), image());
    let storage = Fake::start(Box::new(move |r, _| serve(&r.line, &stored)));
    let to = storage.address.clone();
    let fake = Fake::start(Box::new(move |r, _| {
        if !r.line.contains("/blobs/") {
            return serve(&r.line, &data);
        }
        let path = r.line.split(' ').nth(1).unwrap();
        response("307 Temporary Redirect", &format!("location: http://{to}{path}\r\n"), 0, b"")
    }));
    let place = Place::new();
    let certs = place.dir.path().join("certs.d");
    std::fs::create_dir_all(certs.join("registry.example")).unwrap();
    let hosts = format!(
        "server = \"http://{}\"\nheader = {{ x-secret = \"s\", authorization = \"Basic c2VjcmV0\" }}\n\
         [host.\"http://{at}\"]\ncapabilities = [\"resolve\"]\ndial_timeout = \"300ms\"\n",
        fake.address
    );
    std::fs::write(certs.join("registry.example/hosts.toml"), hosts).unwrap();
    let begun = std::time::Instant::now();
    store(&place, Some(certs)).await.pull("registry.example/a:v1", None).await.unwrap();
    // Three attempts of ten seconds otherwise.
    assert!(begun.elapsed().as_secs() < 20, "{:?}", begun.elapsed());
    assert!(fake.requests("").iter().all(|r| r.headers.contains_key("x-secret")));
    let redirected = storage.requests("");
    assert!(!redirected.is_empty());
    for r in redirected {
        assert!(!r.headers.contains_key("x-secret") && !r.headers.contains_key("authorization"), "{r:?}");
    }
}

/// Whoever a registry redirects to gets no say in where its credentials go.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redirect_does_not_lead_credentials_away() {
    for challenge in ["Bearer realm=\"http://REALM/token\",service=\"s\"", "Basic realm=\"x\""] {
        let thief = Fake::start(Box::new(|_, _| {
            let body = br#"{"token":"t"}"#;
            response("200 OK", "", body.len(), body)
        }));
        let challenge = challenge.replace("REALM", &thief.address);
        let storage = Fake::start(Box::new(move |_, _| {
            response("401 Unauthorized", &format!("www-authenticate: {challenge}\r\n"), 0, b"")
        }));
        let (data, to) = (image(), storage.address.clone());
        let registry = Fake::start(Box::new(move |r, _| {
            if !r.line.contains("/blobs/") {
                return serve(&r.line, &data);
            }
            let path = r.line.split(' ').nth(1).unwrap();
            response("307 Temporary Redirect", &format!("location: http://{to}{path}\r\n"), 0, b"")
        }));
        let place = Place::new();
        let store = store(&place, None).await;
        let user = Auth { username: "user".into(), password: "hunter2".into(), ..Auth::default() };
        let refresh = Auth { identity_token: "long-lived".into(), ..Auth::default() };
        for auth in [user, refresh] {
            let e = store.pull(&format!("{}/a:v1", registry.address), Some(&auth)).await.unwrap_err();
            assert!(matches!(&e, Error::Unauthorized { detail, .. } if detail.contains("redirects")), "{e}");
        }
        assert!(!storage.requests("").is_empty());
        for r in [thief.requests(""), storage.requests(""), registry.requests("")].concat() {
            let told = r.line.contains("long-lived") || r.headers.contains_key("authorization");
            assert!(!told, "{r:?}");
        }
    }
}

/// A registry that has begun to send a layer may be away for a while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_outlives_an_outage() {
    let data = image();
    let layer = data.2.clone();
    let path = Digest::of(&layer.bytes).hex();
    let asked = std::sync::atomic::AtomicU32::new(0);
    let fake = Fake::start(Box::new(move |r, _| {
        if !r.line.contains(&Digest::of(&layer.bytes).hex()) {
            return serve(&r.line, &data);
        }
        let all = &layer.bytes;
        match (asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst), r.headers.get("range")) {
            (0, None) => response("200 OK", "", all.len(), &all[..all.len() / 2]),
            (12.., Some(range)) => {
                let from: usize = range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap();
                let headers = format!("content-range: bytes {from}-{}/{}\r\n", all.len() - 1, all.len());
                response("206 Partial Content", &headers, all.len() - from, &all[from..])
            }
            _ => Vec::new(),
        }
    }));
    let name = format!("{}/a:v1", fake.address);
    let place = Place::new();
    let pause = std::time::Duration::from_millis(1);
    let store = place.open_with(Options { pause, ..Options::default() }).await;
    store.pull(&name, None).await.unwrap();
    assert!(fake.requests(&path).len() >= 13);
}

/// What hosts.toml gives a host as its authorization goes when the host wants something else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_granted_token_takes_the_place_of_the_configured_header() {
    let data = image();
    let fake = Fake::start(Box::new(move |r, own| {
        if r.line.contains("/token") {
            return response("200 OK", "", 13, br#"{"token":"t"}"#);
        }
        if r.headers.get("authorization").is_some_and(|a| a == "Bearer t") {
            return serve(&r.line, &data);
        }
        let header = format!("www-authenticate: Bearer realm=\"http://{own}/token\"\r\n");
        response("401 Unauthorized", &header, 0, b"")
    }));
    let place = Place::new();
    let certs = place.dir.path().join("certs.d");
    std::fs::create_dir_all(certs.join("registry.example")).unwrap();
    let hosts =
        format!("server = \"http://{}\"\nheader = {{ authorization = \"Basic eDp5\" }}\n", fake.address);
    std::fs::write(certs.join("registry.example/hosts.toml"), hosts).unwrap();
    store(&place, Some(certs)).await.pull("registry.example/a:v1", None).await.unwrap();
}

/// A mirror that breaks off may have sent something else than the registry goes on with.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_bytes_of_a_mirror_are_fetched_again_from_the_registry() {
    let data = image();
    let layer = data.2.clone();
    let path = Digest::of(&layer.bytes).hex();
    let mirror = Fake::start(Box::new(move |r, _| {
        if !r.line.contains("/blobs/") || r.headers.contains_key("range") {
            return response("404 Not Found", "", 0, b"");
        }
        // Of the right length, and not all of it.
        response("200 OK", "", layer.bytes.len(), &vec![7; layer.bytes.len() / 2])
    }));
    let all = data.2.bytes.clone();
    let registry = Fake::start(Box::new(move |r, _| match r.headers.get("range") {
        Some(range) => {
            let from: usize = range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap();
            let headers = format!("content-range: bytes {from}-{}/{}\r\n", all.len() - 1, all.len());
            response("206 Partial Content", &headers, all.len() - from, &all[from..])
        }
        None => serve(&r.line, &data),
    }));
    let place = Place::new();
    let certs = place.dir.path().join("certs.d");
    std::fs::create_dir_all(certs.join("registry.example")).unwrap();
    let hosts = format!("server = \"http://{}\"\n[host.\"http://{}\"]\n", registry.address, mirror.address);
    std::fs::write(certs.join("registry.example/hosts.toml"), hosts).unwrap();
    store(&place, Some(certs)).await.pull("registry.example/a:v1", None).await.unwrap();
    assert!(!mirror.requests(&path).is_empty());
    let ranges: Vec<bool> =
        registry.requests(&path).iter().map(|r| r.headers.contains_key("range")).collect();
    assert_eq!(ranges, [true, false]);
}
