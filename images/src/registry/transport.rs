//! One HTTP client per host, because each may have its own certificates.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use orlop_base::tls::AnyCertificate;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use super::hosts::Host;
use super::proxy::{Connector, Routes};
use crate::{Error, Result};

pub(crate) type Http = Client<HttpsConnector<Connector>, Full<Bytes>>;

/// Which certificates of servers are good.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trust {
    /// Those that hosts.toml names. Reading the machine's hundred authorities costs 10 ms, which a host without TLS need not wait for.
    Named,
    /// Those of the machine as well.
    System,
}

impl Trust {
    /// For the host itself.
    pub fn of(host: &Host) -> Trust {
        if host.base.starts_with("https:") { Trust::System } else { Trust::Named }
    }
}

/// Blocks on reading certificates.
pub(crate) fn http_client(host: &Host, trust: Trust, routes: &Arc<Routes>) -> Result<Http> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_connect_timeout(Some(host.dial_timeout));
    tcp.set_nodelay(true);
    let tls = tls_config(host, trust)?;
    // HTTP/1.1 only: layers come over connections of their own, without one window for all of them.
    let connector = hyper_rustls::HttpsConnectorBuilder::new()
        .with_tls_config(tls)
        .https_or_http()
        .enable_http1()
        .wrap_connector(Connector { tcp, routes: routes.clone() });
    Ok(Client::builder(TokioExecutor::new()).pool_idle_timeout(Duration::from_secs(5)).build(connector))
}

fn tls_config(host: &Host, trust: Trust) -> Result<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| Error::Config { path: host.authority.clone().into(), why: e.to_string() })?;
    let builder = if host.skip_verify {
        // The operator wrote so for this host.
        builder.dangerous().with_custom_certificate_verifier(AnyCertificate::new(provider))
    } else {
        builder.with_root_certificates(roots(host, trust)?)
    };
    match &host.client {
        None => Ok(builder.with_no_client_auth()),
        Some((cert, key)) => {
            builder.with_client_auth_cert(certificates(cert)?, private_key(key)?).map_err(|e| Error::Config {
                path: cert.clone(),
                why: format!("not a usable client certificate: {e}"),
            })
        }
    }
}

fn roots(host: &Host, trust: Trust) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    if trust == Trust::System {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    }
    for path in &host.ca {
        for cert in certificates(path)? {
            roots.add(cert).map_err(|e| Error::Config {
                path: path.clone(),
                why: format!("not a CA certificate: {e}"),
            })?;
        }
    }
    Ok(roots)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let mut file = BufReader::new(File::open(path).map_err(Error::io("read", path))?);
    let certs: Vec<_> =
        rustls_pemfile::certs(&mut file).collect::<Result<_, _>>().map_err(Error::io("read", path))?;
    if certs.is_empty() {
        return Err(Error::Config { path: path.to_owned(), why: "holds no PEM certificate".into() });
    }
    Ok(certs)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    let mut file = BufReader::new(File::open(path).map_err(Error::io("read", path))?);
    rustls_pemfile::private_key(&mut file)
        .map_err(Error::io("read", path))?
        .ok_or_else(|| Error::Config { path: path.to_owned(), why: "holds no PEM private key".into() })
}
