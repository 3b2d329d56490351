//! Probing by an HTTP(S) GET. Certificates are not checked, as upstream has it: the probe asks whether the container
//! answers, not who it is.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Container, HTTPGetAction};
use orlop_base::tls::AnyCertificate;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::port_of;

/// Upstream reads at most this much of an answer.
const MAX_BODY: usize = 10 << 10;
const MAX_REDIRECTS: usize = 10;

/// Where and how to ask.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    pub tls: bool,
    pub host: String,
    pub port: u16,
    pub path: String,
    pub headers: Vec<(String, String)>,
}

impl Request {
    pub fn from_action(a: &HTTPGetAction, pod_ip: &str, c: &Container) -> Result<Request, String> {
        let host = a.host.clone().filter(|h| !h.is_empty()).unwrap_or_else(|| pod_ip.to_owned());
        let mut path = a.path.clone().unwrap_or_default();
        if !path.starts_with('/') {
            path.insert(0, '/');
        }
        let headers = a.http_headers.iter().flatten().map(|h| (h.name.clone(), h.value.clone())).collect();
        let tls = a.scheme.as_deref().is_some_and(|s| s.eq_ignore_ascii_case("https"));
        Ok(Request { tls, host, port: port_of(&a.port, c)?, path, headers })
    }

    fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

/// Asks; the status code on success (200 to 399).
pub async fn get(request: &Request, timeout: Duration) -> Result<u16, String> {
    match tokio::time::timeout(timeout, follow(request)).await {
        Ok(r) => r,
        Err(_) => Err(format!(
            "Get \"{}://{}{}\": context deadline exceeded (Client.Timeout exceeded while awaiting headers)",
            if request.tls { "https" } else { "http" },
            request.authority(),
            request.path
        )),
    }
}

async fn follow(request: &Request) -> Result<u16, String> {
    let mut request = request.clone();
    for _ in 0..MAX_REDIRECTS {
        let (status, location) = once(&request).await?;
        match (status, location) {
            (301 | 302 | 303 | 307 | 308, Some(to)) => match redirect(&request, &to) {
                Some(next) => request = next,
                // Another host is not probed: the answer itself counts as success.
                None => return Ok(status),
            },
            (200..=399, _) => return Ok(status),
            (code, _) => return Err(format!("HTTP probe failed with statuscode: {code}")),
        }
    }
    Err(format!("stopped after {MAX_REDIRECTS} redirects"))
}

fn redirect(from: &Request, to: &str) -> Option<Request> {
    let base = format!("{}://{}{}", if from.tls { "https" } else { "http" }, from.authority(), from.path);
    let url = url::Url::parse(&base).ok()?.join(to).ok()?;
    let host = url.host_str()?.trim_matches(['[', ']']).to_owned();
    if host != from.host {
        return None;
    }
    let path = match url.query() {
        Some(q) => format!("{}?{q}", url.path()),
        None => url.path().to_owned(),
    };
    Some(Request {
        tls: url.scheme() == "https",
        host,
        port: url.port_or_known_default()?,
        path,
        headers: from.headers.clone(),
    })
}

async fn once(r: &Request) -> Result<(u16, Option<String>), String> {
    let tcp = TcpStream::connect((r.host.as_str(), r.port))
        .await
        .map_err(|e| format!("Get \"{}{}\": dial tcp {}: {e}", r.authority(), r.path, r.authority()))?;
    if !r.tls {
        return exchange(r, tcp).await;
    }
    let name = ServerName::try_from(r.host.clone()).map_err(|e| e.to_string())?;
    let tls = TLS.connect(name, tcp).await.map_err(|e| format!("TLS with {}: {e}", r.authority()))?;
    exchange(r, tls).await
}

async fn exchange(
    r: &Request,
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> Result<(u16, Option<String>), String> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(io)).await.map_err(|e| e.to_string())?;
    let mut request = http::Request::get(&r.path).header("Connection", "close");
    let has = |name: &str| r.headers.iter().any(|(n, _)| n.eq_ignore_ascii_case(name));
    if !has("host") {
        request = request.header("Host", r.authority());
    }
    if !has("user-agent") {
        request = request.header("User-Agent", "kube-probe/1.36");
    }
    if !has("accept") {
        request = request.header("Accept", "*/*");
    }
    for (name, value) in r.headers.iter().filter(|(_, v)| !v.is_empty()) {
        request = request.header(name, value);
    }
    let request = request.body(Empty::<Bytes>::new()).map_err(|e| e.to_string())?;
    let answer = async {
        let response = sender
            .send_request(request)
            .await
            .map_err(|e| format!("Get \"{}{}\": {e}", r.authority(), r.path))?;
        let location = response.headers().get("location").and_then(|l| l.to_str().ok()).map(str::to_owned);
        let status = response.status().as_u16();
        // The body is read so that the server sees a whole exchange; what is beyond the limit does not matter.
        let _ = Limited::new(response.into_body(), MAX_BODY).collect().await;
        Ok((status, location))
    };
    let mut connection = std::pin::pin!(connection);
    let mut answer = std::pin::pin!(answer);
    let mut open = true;
    loop {
        // The connection only drives the exchange; when it ends the answer resolves by itself.
        tokio::select! {
            r = &mut answer => return r,
            _ = &mut connection, if open => open = false,
        }
    }
}

static TLS: LazyLock<TlsConnector> = LazyLock::new(|| {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = AnyCertificate::new(provider.clone());
    let versions =
        rustls::ClientConfig::builder_with_provider(provider).with_protocol_versions(rustls::ALL_VERSIONS);
    let config = match versions {
        Ok(b) => b.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth(),
        // ring supports all versions that rustls knows.
        Err(_) => rustls::ClientConfig::builder()
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth(),
    };
    TlsConnector::from(Arc::new(config))
});

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn server(answers: Vec<&'static str>) -> u16 {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            for a in answers {
                let (mut s, _) = listener.accept().await.unwrap();
                let mut buf = [0; 2048];
                let n = s.read(&mut buf).await.unwrap();
                assert!(String::from_utf8_lossy(&buf[..n]).contains("kube-probe/"));
                s.write_all(a.as_bytes()).await.unwrap();
            }
        });
        port
    }

    #[tokio::test]
    async fn codes_and_redirects() {
        let ask = |port: u16| async move {
            let r = Request { tls: false, host: "127.0.0.1".into(), port, path: "/".into(), headers: vec![] };
            get(&r, Duration::from_secs(2)).await
        };
        let ok = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
        assert_eq!(ask(server(vec![ok]).await).await, Ok(200));
        let bad = "HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n";
        assert_eq!(ask(server(vec![bad]).await).await, Err("HTTP probe failed with statuscode: 503".into()));
        let here = "HTTP/1.1 302 F\r\nlocation: /x\r\ncontent-length: 0\r\n\r\n";
        assert_eq!(ask(server(vec![here, ok]).await).await, Ok(200));
        let elsewhere = "HTTP/1.1 302 F\r\nlocation: http://192.0.2.1/\r\ncontent-length: 0\r\n\r\n";
        assert_eq!(ask(server(vec![elsewhere]).await).await, Ok(302));
        assert!(ask(1).await.is_err());
    }
}
