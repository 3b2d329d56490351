//! TLS of the node server: a certificate that is read again when its file changes, and client certificates where offered.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::auth::Identity;
use crate::context::Context;
use crate::error::Error;

/// Does the handshakes.
pub struct Acceptor {
    inner: TlsAcceptor,
}

fn bad(path: &Path, message: impl ToString) -> Error {
    Error::Certificate { path: path.to_owned(), message: message.to_string() }
}

/// The serving certificate from its files.
#[derive(Debug)]
struct FromFiles {
    cert: PathBuf,
    key: PathBuf,
    loaded: Mutex<(Option<SystemTime>, Arc<CertifiedKey>)>,
}

fn load(cert: &Path, key: &Path) -> Result<CertifiedKey, Error> {
    let chain = CertificateDer::pem_file_iter(cert)
        .and_then(|i| i.collect::<Result<Vec<_>, _>>())
        .map_err(|e| bad(cert, e))?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|e| bad(key, e))?;
    let signer = rustls::crypto::ring::sign::any_supported_type(&private).map_err(|e| bad(key, e))?;
    Ok(CertifiedKey::new(chain, signer))
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|m| m.modified()).ok()
}

impl ResolvesServerCert for FromFiles {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let now = modified(&self.cert);
        let mut loaded = self.loaded.lock();
        if loaded.0 != now {
            match load(&self.cert, &self.key) {
                Ok(fresh) => *loaded = (now, Arc::new(fresh)),
                // Half-replaced files: the old pair serves until both are there.
                Err(e) => tracing::debug!(error = %e, "serving certificate not reloaded"),
            }
        }
        Some(loaded.1.clone())
    }
}

/// Makes a self-signed pair where there is none, as upstream's kubelet does: callers that verify need a signed one.
fn ensure_pair(ctx: &Context, cert: &Path, key: &Path) -> Result<(), Error> {
    if cert.exists() && key.exists() {
        return Ok(());
    }
    let names = [ctx.config.node_name.clone(), "localhost".to_owned()];
    let made = rcgen::generate_simple_self_signed(names).map_err(|e| bad(cert, e))?;
    if let Some(dir) = cert.parent() {
        std::fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, e))?;
    }
    let write = |path: &Path, text: String, mode| {
        orlop_base::durable::write_atomic(path, text.as_bytes(), mode, orlop_base::durable::Sync::Disk)
            .map_err(|e| bad(path, orlop_base::telemetry::chain(&e)))
    };
    write(key, made.signing_key.serialize_pem(), 0o600)?;
    write(cert, made.cert.pem(), 0o644)
}

impl Acceptor {
    pub fn new(ctx: &Context) -> Result<Acceptor, Error> {
        let k = &ctx.config.kubelet;
        let or = |given: &str, default: &str| match given {
            "" => ctx.config.cert_dir.join(default),
            path => PathBuf::from(path),
        };
        let (cert, key) = (or(&k.tls_cert_file, "kubelet.crt"), or(&k.tls_private_key_file, "kubelet.key"));
        ensure_pair(ctx, &cert, &key)?;
        let first = (modified(&cert), Arc::new(load(&cert, &key)?));
        let resolver = Arc::new(FromFiles { cert, key, loaded: Mutex::new(first) });
        let builder = rustls::ServerConfig::builder();
        let ca = Path::new(&k.authentication.x509.client_ca_file);
        let builder = if ca.as_os_str().is_empty() {
            builder.with_no_client_auth()
        } else {
            let mut roots = RootCertStore::empty();
            for c in CertificateDer::pem_file_iter(ca).map_err(|e| bad(ca, e))? {
                roots.add(c.map_err(|e| bad(ca, e))?).map_err(|e| bad(ca, e))?;
            }
            let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).allow_unauthenticated().build();
            builder.with_client_cert_verifier(verifier.map_err(|e| bad(ca, e))?)
        };
        let mut config = builder.with_cert_resolver(resolver);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Acceptor { inner: TlsAcceptor::from(Arc::new(config)) })
    }

    /// The connection, and who the client's certificate says it is.
    pub async fn accept(
        &self,
        stream: TcpStream,
    ) -> std::io::Result<(TlsStream<TcpStream>, Option<Identity>)> {
        let stream = self.inner.accept(stream).await?;
        let peer = stream.get_ref().1.peer_certificates().and_then(|c| c.first());
        let identity = peer.and_then(|c| Identity::of_certificate(c));
        Ok((stream, identity))
    }
}
