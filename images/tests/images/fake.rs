//! A registry made of one function, which does what no real one should.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::*;
use orlop_images::{Digest, ImageStore, Options};

/// One request as the server saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub line: String,
    pub headers: HashMap<String, String>,
}

pub type Answer = dyn Fn(&Seen, &str) -> Vec<u8> + Send + Sync;

/// A server that answers each request by `answer(request, own address)` and closes the connection; with a header
/// `x-hold` only after a while, and with `x-trickle` byte by byte.
pub struct Fake {
    pub address: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Fake {
    pub fn start(answer: Box<Answer>) -> Fake {
        Fake::start_tls(answer, None)
    }

    pub fn start_tls(answer: Box<Answer>, tls: Option<Arc<rustls::ServerConfig>>) -> Fake {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let answer: Arc<Answer> = answer.into();
        let (seen2, address2) = (seen.clone(), address.clone());
        // Ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (answer, seen, address, tls) =
                    (answer.clone(), seen2.clone(), address2.clone(), tls.clone());
                std::thread::spawn(move || match tls {
                    None => serve_one(stream, &*answer, &seen, &address),
                    Some(config) => {
                        let tls = rustls::ServerConnection::new(config).unwrap();
                        serve_one(rustls::StreamOwned::new(tls, stream), &*answer, &seen, &address);
                    }
                });
            }
        });
        Fake { address, seen }
    }

    pub fn requests(&self, what: &str) -> Vec<Seen> {
        self.seen.lock().unwrap().iter().filter(|s| s.line.contains(what)).cloned().collect()
    }
}

fn serve_one(mut stream: impl Read + Write, answer: &Answer, seen: &Mutex<Vec<Seen>>, address: &str) {
    let Some(request) = read_request(&mut stream) else { return };
    let bytes = answer(&request, address);
    seen.lock().unwrap().push(request);
    let head = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned();
    if head.contains("x-trickle") {
        let body = bytes.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
        let _ = stream.write_all(&bytes[..body]);
        for byte in &bytes[body..] {
            if stream.write_all(&[*byte]).and_then(|()| stream.flush()).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let _ = stream.write_all(&bytes);
    let _ = stream.flush();
    if head.contains("x-hold") {
        std::thread::sleep(Duration::from_secs(20));
    }
}

fn read_request(stream: &mut impl Read) -> Option<Seen> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut headers = HashMap::new();
    loop {
        let mut h = String::new();
        reader.read_line(&mut h).ok()?;
        let Some((k, v)) = h.trim().split_once(':') else { break };
        let value = headers.entry(k.to_ascii_lowercase()).or_insert_with(String::new);
        if !value.is_empty() {
            value.push_str(", ");
        }
        value.push_str(v.trim());
    }
    let length = headers.get("content-length").and_then(|l| l.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    line.push_str(&String::from_utf8_lossy(&body));
    Some(Seen { line, headers })
}

pub fn response(status: &str, headers: &str, length: usize, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n");
    [head.as_bytes(), body].concat()
}

/// An image, as a function from path to document.
pub fn image() -> (Vec<u8>, Vec<u8>, Blob) {
    let noise: Vec<u8> = (0..400_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let layer = gzip(tar_of(&[("noise", &noise)]));
    let config = config(std::slice::from_ref(&layer));
    (manifest(&config, std::slice::from_ref(&layer)).to_string().into_bytes(), config, layer)
}

pub fn serve(line: &str, (manifest, config, layer): &(Vec<u8>, Vec<u8>, Blob)) -> Vec<u8> {
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

pub async fn store(place: &Place, certs_dir: Option<std::path::PathBuf>) -> ImageStore {
    ImageStore::open(&place.root(), Options { certs_dir, ..Options::default() }).await.unwrap()
}
