//! Connections to kubelets and pods, and passing bytes between two upgraded ones.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use orlop_base::tls::AnyCertificate;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use super::locate::{Target, Tls};
use crate::pki::Pki;

const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// How long a client may keep its side open after the other side has ended.
const LINGER: Duration = Duration::from_secs(5);

/// Either a plain or a TLS connection.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Opens connections.
pub struct Connector {
    kubelet: TlsConnector,
    unverified: TlsConnector,
}

impl Connector {
    /// # Errors
    /// A message when the key material does not fit.
    pub fn new(pki: &Pki, verify_kubelets: bool) -> Result<Connector, String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = || {
            ClientConfig::builder_with_provider(provider.clone())
                .with_safe_default_protocol_versions()
                .map_err(|e| e.to_string())
        };
        let (chain, key) = pki.kubelet_client.to_rustls()?;
        let unchecked = AnyCertificate::new(provider.clone());
        let kubelet = if verify_kubelets {
            let (anchors, _) = pki.ca.to_rustls()?;
            let mut roots = RootCertStore::empty();
            for anchor in anchors {
                roots.add(anchor).map_err(|e| e.to_string())?;
            }
            builder()?.with_root_certificates(roots)
        } else {
            builder()?.dangerous().with_custom_certificate_verifier(unchecked.clone())
        };
        let kubelet = kubelet.with_client_auth_cert(chain, key).map_err(|e| e.to_string())?;
        let unverified =
            builder()?.dangerous().with_custom_certificate_verifier(unchecked).with_no_client_auth();
        Ok(Connector { kubelet: Arc::new(kubelet).into(), unverified: Arc::new(unverified).into() })
    }

    /// Connects to a target.
    ///
    /// # Errors
    /// What failed, with the remedy for a certificate that does not verify.
    pub async fn open(&self, target: &Target) -> Result<Pin<Box<dyn Stream>>, String> {
        match tokio::time::timeout(CONNECT_LIMIT, self.open_unlimited(target)).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(e)) if e.to_string().contains("certificate") => Err(format!(
                "{e}; its serving certificate must be signed by the cluster CA for this address (see the node's kubernetes.io/kubelet-serving requests)"
            )),
            Ok(Err(e)) => Err(e.to_string()),
            Err(_) => Err(format!("no connection within {CONNECT_LIMIT:?}")),
        }
    }

    async fn open_unlimited(&self, target: &Target) -> io::Result<Pin<Box<dyn Stream>>> {
        let stream = TcpStream::connect((target.host.as_str(), target.port)).await?;
        stream.set_nodelay(true)?;
        super::super::transport::keep_alive(&stream);
        let connector = match target.tls {
            Tls::None => return Ok(Box::pin(stream)),
            Tls::Kubelet => &self.kubelet,
            Tls::Unverified => &self.unverified,
        };
        let name = ServerName::try_from(target.host.clone()).map_err(io::Error::other)?;
        Ok(Box::pin(connector.connect(name, stream).await?))
    }
}

/// Passes bytes both ways until both sides have ended, one breaks, or the server stops.
///
/// The client ending its side (stdin at its end) leaves the answer running. The backend ending its side leaves the client a moment
/// to end too: nothing that it sends can arrive any more.
pub async fn splice<C, B>(client: C, backend: B, stop: CancellationToken)
where
    C: AsyncRead + AsyncWrite + Send,
    B: AsyncRead + AsyncWrite + Send,
{
    splice_lingering(client, backend, stop, LINGER).await;
}

async fn splice_lingering<C, B>(client: C, backend: B, stop: CancellationToken, linger: Duration)
where
    C: AsyncRead + AsyncWrite + Send,
    B: AsyncRead + AsyncWrite + Send,
{
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (mut from_backend, mut to_backend) = tokio::io::split(backend);
    let up = async {
        let result = tokio::io::copy(&mut from_client, &mut to_backend).await;
        let shut = to_backend.shutdown().await;
        result.is_ok() && shut.is_ok()
    };
    let down = async {
        let result = tokio::io::copy(&mut from_backend, &mut to_client).await;
        // Errors here mean that the client is gone, which is what was to be achieved.
        let _ = to_client.shutdown().await;
        result.is_ok()
    };
    let both = async {
        tokio::pin!(up, down);
        tokio::select! {
            whole = &mut up => {
                if whole {
                    down.await;
                }
            }
            whole = &mut down => {
                if whole {
                    let _ = tokio::time::timeout(linger, up).await;
                }
            }
        }
    };
    tokio::select! {
        // Dropping the copies closes both connections, which is the point.
        () = stop.cancelled() => {}
        () = both => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    async fn half_close_lets_the_answer_through() {
        let (mut client, client_far) = tokio::io::duplex(64);
        let (mut backend, backend_far) = tokio::io::duplex(64);
        let stop = CancellationToken::new();
        let task = tokio::task::spawn(splice(client_far, backend_far, stop));
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut got = Vec::new();
        backend.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"question");
        backend.write_all(b"answer").await.unwrap();
        drop(backend);
        let mut got = Vec::new();
        client.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"answer");
        task.await.unwrap();
    }

    #[tokio::test]
    async fn a_vanished_backend_does_not_leave_the_client_hanging() {
        let (mut client, client_far) = tokio::io::duplex(64);
        let (backend, backend_far) = tokio::io::duplex(64);
        let linger = Duration::from_millis(20);
        let task =
            tokio::task::spawn(splice_lingering(client_far, backend_far, CancellationToken::new(), linger));
        drop(backend);
        let mut got = Vec::new();
        client.read_to_end(&mut got).await.unwrap();
        tokio::time::timeout(Duration::from_secs(5), task).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn stopping_ends_the_stream() {
        let (_client, client_far) = tokio::io::duplex(64);
        let (_backend, backend_far) = tokio::io::duplex(64);
        let stop = CancellationToken::new();
        let task = tokio::task::spawn(splice(client_far, backend_far, stop.clone()));
        stop.cancel();
        task.await.unwrap();
    }
}
