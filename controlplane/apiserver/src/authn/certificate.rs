//! Client certificates: asked for in the handshake, verified against the cluster CA, their subject read once per connection.
//!
//! A certificate that does not verify must not break the handshake: a person with an outdated kubeconfig is to get a 401 that says
//! so, not a TLS alert. So the handshake only proves possession of the key, and the verdict is kept for authentication.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme};
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::Refused;
use crate::request_info::UserInfo;

/// Asks for a client certificate, lets any through, and tells afterwards what to think of it.
#[derive(Debug)]
pub struct LateVerifier {
    strict: Arc<dyn ClientCertVerifier>,
}

impl LateVerifier {
    /// Trusts certificates signed by `ca`.
    ///
    /// # Errors
    /// A message when `ca` is no usable trust anchor.
    pub fn new(ca: Vec<CertificateDer<'static>>) -> Result<LateVerifier, String> {
        let mut roots = RootCertStore::empty();
        for cert in ca {
            roots.add(cert).map_err(|e| e.to_string())?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let strict = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
            .allow_unauthenticated()
            .build()
            .map_err(|e| e.to_string())?;
        Ok(LateVerifier { strict })
    }

    /// Who the certificates of a finished handshake stand for; `None` without any.
    pub fn identify(&self, chain: Option<&[CertificateDer<'_>]>) -> Option<ClientIdentity> {
        let (leaf, intermediates) = chain?.split_first()?;
        let verdict = self
            .strict
            .verify_client_cert(leaf, intermediates, UnixTime::now())
            .map_err(|e| format!("client certificate: {e}"))
            .and_then(|_| read_subject(leaf));
        Some(ClientIdentity { verdict })
    }
}

impl ClientCertVerifier for LateVerifier {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.strict.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.strict.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.strict.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.strict.supported_verify_schemes()
    }
}

/// What a connection's client certificate says.
#[derive(Clone, Debug)]
pub struct ClientIdentity {
    verdict: Result<(UserInfo, SystemTime), String>,
}

impl ClientIdentity {
    /// The user, as long as the certificate has not expired meanwhile.
    ///
    /// # Errors
    /// [`Refused`] when the certificate did not verify or has expired.
    pub fn user(&self) -> Result<UserInfo, Refused> {
        match &self.verdict {
            Ok((user, expiry)) if *expiry > SystemTime::now() => Ok(user.clone()),
            Ok(_) => Err(Refused("client certificate: expired".to_owned())),
            Err(e) => Err(Refused(e.clone())),
        }
    }
}

/// CN is the user, each O a group, as upstream reads them.
fn read_subject(leaf: &CertificateDer<'_>) -> Result<(UserInfo, SystemTime), String> {
    let (_, cert) = X509Certificate::from_der(leaf).map_err(|e| e.to_string())?;
    let subject = cert.subject();
    let name = subject.iter_common_name().find_map(|a| a.as_str().ok()).unwrap_or_default();
    if name.is_empty() {
        return Err("client certificate: no common name".to_owned());
    }
    let fingerprint: String = Sha256::digest(leaf.as_ref()).iter().map(|b| format!("{b:02x}")).collect();
    let user = UserInfo {
        name: name.to_owned(),
        groups: subject.iter_organization().filter_map(|a| a.as_str().ok()).map(str::to_owned).collect(),
        extra: [(
            "authentication.kubernetes.io/credential-id".to_owned(),
            vec![format!("X509SHA256={fingerprint}")],
        )]
        .into(),
        ..UserInfo::default()
    };
    let expiry = u64::try_from(cert.validity().not_after.timestamp()).unwrap_or_default();
    Ok((user, UNIX_EPOCH + Duration::from_secs(expiry)))
}
