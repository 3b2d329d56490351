//! Connections to registries, directly or through a proxy.

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderValue, Uri};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tower::Service;
use url::Url;

use crate::options::Proxies;
use crate::{Error, Result};

/// A proxy's address and the `Proxy-Authorization` that it wants.
#[derive(Clone, Debug)]
struct Proxy {
    uri: Uri,
    authorization: Option<HeaderValue>,
}

/// [`Proxies`], checked.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    http: Option<Proxy>,
    https: Option<Proxy>,
    direct: Vec<String>,
}

fn proxy(text: &str) -> Result<Proxy> {
    // Without what may be a password.
    let shown = text.rsplit_once('@').map_or(text, |(_, host)| host);
    let bad = |why: &str| Error::Config { path: "proxy".into(), why: format!("{shown:?} {why}") };
    let full = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    let url = Url::parse(&full).map_err(|e| bad(&format!("is not a URL: {e}")))?;
    if url.scheme() != "http" {
        return Err(bad("is not a proxy that is spoken to by http://"));
    }
    let host = url.host_str().ok_or_else(|| bad("names no host"))?;
    let port = url.port_or_known_default().unwrap_or(80);
    let uri = format!("http://{host}:{port}").parse().map_err(|_| bad("is not a URL"))?;
    let decoded = |s: &str| {
        let pair = format!("x={}", s.replace('+', "%2B"));
        let value = url::form_urlencoded::parse(pair.as_bytes()).next().map(|(_, v)| v.into_owned());
        value.unwrap_or_default()
    };
    let authorization = match (url.username(), url.password()) {
        ("", None) => None,
        (user, password) => {
            let pair = format!("{}:{}", decoded(user), decoded(password.unwrap_or_default()));
            let mut value = HeaderValue::from_str(&format!("Basic {}", STANDARD.encode(pair)))
                .map_err(|_| bad("has credentials that cannot be sent"))?;
            value.set_sensitive(true);
            Some(value)
        }
    };
    Ok(Proxy { uri, authorization })
}

impl Routes {
    pub fn new(proxies: &Proxies) -> Result<Routes> {
        let one = |p: &Option<String>| p.as_deref().filter(|p| !p.is_empty()).map(proxy).transpose();
        let direct = proxies.no.split(',').map(|e| e.trim().to_ascii_lowercase());
        Ok(Routes {
            http: one(&proxies.http)?,
            https: one(&proxies.https)?,
            direct: direct.filter(|e| !e.is_empty()).collect(),
        })
    }

    /// The proxy for a URL of this scheme, host and port.
    fn choose(&self, scheme: &str, host: &str, port: Option<u16>) -> Option<&Proxy> {
        let proxy = if scheme == "https" { self.https.as_ref() } else { self.http.as_ref() }?;
        let host = host.trim_matches(['[', ']']).to_ascii_lowercase();
        let address: Option<IpAddr> = host.parse().ok();
        if host == "localhost" || address.is_some_and(|a| a.is_loopback()) {
            return None;
        }
        let port = port.unwrap_or(if scheme == "https" { 443 } else { 80 });
        (!self.direct.iter().any(|entry| covers(entry, &host, address, port))).then_some(proxy)
    }

    /// `Proxy-Authorization` for a plain request to `url`, which the proxy itself reads.
    pub fn authorization(&self, url: &Url) -> Option<HeaderValue> {
        if url.scheme() != "http" {
            return None;
        }
        self.choose("http", url.host_str()?, url.port())?.authorization.clone()
    }
}

/// Whether one entry of NO_PROXY means this host: `*`, a name (with all below it), `.name` (only those below it), an
/// address, a network in CIDR form; names and addresses may have a port.
fn covers(entry: &str, host: &str, address: Option<IpAddr>, port: u16) -> bool {
    if entry == "*" {
        return true;
    }
    if let (Some((network, bits)), Some(address)) = (entry.split_once('/'), address) {
        return in_network(network, bits, address);
    }
    let bare = entry.trim_matches(['[', ']']);
    if let (Ok(wanted), Some(address)) = (bare.parse::<IpAddr>(), address) {
        return wanted == address;
    }
    let (name, wanted_port) = match entry.rsplit_once(':') {
        Some((name, p)) if p.parse::<u16>().is_ok() => (name.trim_matches(['[', ']']), p.parse().ok()),
        _ => (entry, None),
    };
    if wanted_port.is_some_and(|p: u16| p != port) {
        return false;
    }
    let name = name.strip_prefix('*').unwrap_or(name);
    let below =
        |suffix: &str| host.strip_suffix(suffix).is_some_and(|rest| rest.ends_with('.') && rest.len() > 1);
    match name.strip_prefix('.') {
        Some(suffix) => below(suffix),
        None => host == name || below(name),
    }
}

fn in_network(network: &str, bits: &str, address: IpAddr) -> bool {
    let (Ok(network), Ok(bits)) = (network.parse::<IpAddr>(), bits.parse::<u32>()) else { return false };
    match (network, address) {
        (IpAddr::V4(n), IpAddr::V4(a)) if bits <= 32 => {
            let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
            n.to_bits() & mask == a.to_bits() & mask
        }
        (IpAddr::V6(n), IpAddr::V6(a)) if bits <= 128 => {
            let mask = u128::MAX.checked_shl(128 - bits).unwrap_or(0);
            n.to_bits() & mask == a.to_bits() & mask
        }
        _ => false,
    }
}

/// Opens TCP connections for the HTTP client.
#[derive(Clone)]
pub(crate) struct Connector {
    pub tcp: HttpConnector,
    pub routes: Arc<Routes>,
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl Service<Uri> for Connector {
    type Response = Stream;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Stream, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.tcp.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let secure = to.scheme_str() == Some("https");
        let scheme = if secure { "https" } else { "http" };
        let proxy = self.routes.choose(scheme, to.host().unwrap_or_default(), to.port_u16()).cloned();
        let mut tcp = self.tcp.clone();
        Box::pin(async move {
            let through = |p: &Proxy, e: &(dyn std::error::Error + 'static)| -> BoxError {
                format!("proxy {}: {}", p.uri, orlop_base::telemetry::chain(e)).into()
            };
            match proxy {
                None => Ok(Stream { io: tcp.call(to).await?, proxied: false }),
                Some(p) if secure => {
                    let mut tunnel = Tunnel::new(p.uri.clone(), tcp);
                    if let Some(a) = p.authorization.clone() {
                        tunnel = tunnel.with_auth(a);
                    }
                    let io = tunnel.call(to).await.map_err(|e| through(&p, &e))?;
                    Ok(Stream { io, proxied: false })
                }
                Some(p) => {
                    let io = tcp.call(p.uri.clone()).await.map_err(|e| through(&p, &e))?;
                    Ok(Stream { io, proxied: true })
                }
            }
        })
    }
}

/// A TCP connection that knows whether a proxy reads its requests, which then need whole URLs.
pub(crate) struct Stream {
    io: TokioIo<TcpStream>,
    proxied: bool,
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        self.io.connected().proxy(self.proxied)
    }
}

impl Read for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl Write for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_goes_through_a_proxy() {
        let routes = Routes::new(&Proxies {
            http: Some("plain:3128".into()),
            https: Some("http://u%40x:p%3Aq@secure:8080/".into()),
            no: "quay.io, .internal,10.0.0.0/8,192.0.2.7,host:5000,fd00::/8,*.star.example,[2001:db8::1]"
                .into(),
        })
        .unwrap();
        for (url, proxied) in [
            ("https://docker.io", true),
            ("http://docker.io", true),
            ("https://quay.io", false),
            ("https://cdn.quay.io", false),
            ("https://notquay.io", true),
            ("https://internal", true),
            ("https://a.internal", false),
            ("https://10.1.2.3:5000", false),
            ("https://11.1.2.3", true),
            ("https://192.0.2.7", false),
            ("https://host:5000", false),
            ("https://host:5001", true),
            ("https://[fd00::1]", false),
            ("https://[2001:db8::1]:5000", false),
            ("https://[2001:db8::2]", true),
            ("https://x.star.example", false),
            ("http://localhost:5000", false),
            ("http://127.3.0.1", false),
            ("https://[::1]:443", false),
        ] {
            let u = Url::parse(url).unwrap();
            let got = routes.choose(u.scheme(), u.host_str().unwrap(), u.port());
            assert_eq!(got.is_some(), proxied, "{url}");
        }
        let secure = routes.https.as_ref().unwrap();
        assert_eq!(secure.uri.to_string(), "http://secure:8080/");
        let want = format!("Basic {}", STANDARD.encode("u@x:p:q"));
        assert_eq!(secure.authorization.as_ref().unwrap().to_str().unwrap(), want);
        assert!(
            Routes::new(&Proxies { no: "*".into(), ..Proxies::default() })
                .unwrap()
                .choose("http", "a", None)
                .is_none()
        );
        for bad in
            ["socks5://a:1", "http://", "https://secure:1", "https://me:secret@secure:1", "http://me:secret@"]
        {
            let proxies = Proxies { http: Some(bad.into()), ..Proxies::default() };
            let e = Routes::new(&proxies).unwrap_err();
            assert!(matches!(e, Error::Config { .. }) && !e.to_string().contains("secret"), "{bad}: {e}");
        }
    }
}
