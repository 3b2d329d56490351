//! The cluster's keys and certificates: made on first start, checked and renewed at every later one.
//!
//! Everything is ECDSA P-256. The cluster CA signs the serving certificate, the client certificate for kubelets and those in
//! the kubeconfig files; service-account tokens have their own key; the front-proxy CA is kept for the aggregation layer.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use orlop_base::durable::{self, Sync, write_atomic};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, DnValue, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

const DAY: Duration = Duration::from_secs(24 * 3600);
const CA_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
const LEAF_LIFE: Duration = Duration::from_secs(365 * 24 * 3600);
/// A leaf with less than this left is renewed at start.
const RENEW_WITHIN: Duration = Duration::from_secs(60 * 24 * 3600);
/// Of the layout of the folder.
const VERSION: u32 = 1;

/// What is wrong with the key material, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    File(#[from] durable::Error),
    #[error("cannot {what} {path}", path = path.display())]
    Io { what: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{path} is damaged ({reason}); restore it from a backup, or move {dir} away to make a new cluster identity", path = path.display(), dir = dir.display())]
    Damaged { path: PathBuf, dir: PathBuf, reason: String },
    #[error("cannot make a certificate for {subject}: {source}")]
    Make { subject: String, source: rcgen::Error },
    #[error(
        "{0} is neither a DNS name nor an IP address; correct the certificate names in the configuration"
    )]
    Name(String),
}

/// A certificate and its key, PEM.
#[derive(Clone)]
pub struct Pair {
    pub cert_pem: String,
    pub key_pem: String,
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pair(..)")
    }
}

impl Pair {
    /// Certificates and key in the form rustls takes.
    ///
    /// # Errors
    /// A message when the PEM does not hold them.
    pub fn to_rustls(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), String> {
        let certs = CertificateDer::pem_slice_iter(self.cert_pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| e.to_string())?;
        let key = PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes()).map_err(|e| e.to_string())?;
        Ok((certs, key))
    }
}

/// The cluster's key material, loaded.
#[derive(Clone, Debug)]
pub struct Pki {
    dir: PathBuf,
    pub ca: Pair,
    pub front_proxy_ca: Pair,
    pub serving: Pair,
    pub kubelet_client: Pair,
    /// PKCS#8 PEM of the key that signs service-account tokens.
    pub service_account_key: String,
}

/// What a certificate is for.
enum Purpose<'a> {
    Server { names: &'a BTreeSet<String> },
    Client { group: Option<&'a str> },
}

impl Pki {
    /// Loads `dir`, making what is missing and renewing what expires soon or lacks one of `names` (DNS names or IPs of the server).
    ///
    /// # Errors
    /// See [`Error`]: a damaged file is never replaced silently, because that would change the cluster's identity.
    pub fn open(dir: &Path, names: &BTreeSet<String>) -> Result<Pki, Error> {
        std::fs::create_dir_all(dir).map_err(|source| Error::Io {
            what: "create",
            path: dir.to_owned(),
            source,
        })?;
        restrict(dir, 0o700)?;
        let marker = dir.join("version.json");
        if durable::read_json::<()>(&marker, VERSION)?.is_none() {
            durable::write_json(&marker, VERSION, &(), Sync::Disk)?;
        }
        let files = Files { dir };
        let ca = files.authority("ca", "kubernetes-ca")?;
        let front_proxy_ca = files.authority("front-proxy-ca", "kubernetes-front-proxy-ca")?;
        let serving = files.leaf("apiserver", "kube-apiserver", &Purpose::Server { names }, &ca)?;
        let kubelet_client = files.leaf(
            "apiserver-kubelet-client",
            "kube-apiserver-kubelet-client",
            &Purpose::Client { group: None },
            &ca,
        )?;
        let service_account_key = files.service_account_key()?;
        Ok(Pki { dir: dir.to_owned(), ca, front_proxy_ca, serving, kubelet_client, service_account_key })
    }

    /// A kubeconfig with a fresh client certificate for `user` in `group` (a client certificate's organisation).
    ///
    /// # Errors
    /// [`Error::Make`] when the certificate cannot be made.
    pub fn kubeconfig_for(&self, server_url: &str, user: &str, group: Option<&str>) -> Result<String, Error> {
        let pair = Files { dir: &self.dir }.issue(user, &Purpose::Client { group }, &self.ca)?;
        Ok(kubeconfig(server_url, &self.ca.cert_pem, user, &pair))
    }

    /// Keeps the kubeconfig at `path` fit: rewrites it (mode 0600, atomically) when it is missing, points elsewhere, was signed by
    /// another CA or expires soon; leaves it alone otherwise.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn ensure_kubeconfig(
        &self,
        path: &Path,
        server_url: &str,
        user: &str,
        group: Option<&str>,
    ) -> Result<(), Error> {
        if let Ok(text) = std::fs::read_to_string(path)
            && self.kubeconfig_is_fit(&text, server_url, user)
        {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|source| Error::Io {
                what: "create",
                path: parent.to_owned(),
                source,
            })?;
        }
        Ok(write_atomic(path, self.kubeconfig_for(server_url, user, group)?.as_bytes(), 0o600, Sync::Disk)?)
    }

    /// Keeps a kubelet's serving pair at `cert` and `key` fit for `names` (DNS names or addresses), as a
    /// kubernetes.io/kubelet-serving request would give it to a node that is not on the server's own machine.
    ///
    /// # Errors
    /// When the pair on disk is damaged, or cannot be written.
    pub fn ensure_kubelet_serving(
        &self,
        dir: &Path,
        node: &str,
        names: &BTreeSet<String>,
    ) -> Result<(), Error> {
        std::fs::create_dir_all(dir).map_err(|source| Error::Io {
            what: "create",
            path: dir.to_owned(),
            source,
        })?;
        let purpose = Purpose::Server { names };
        let files = Files { dir };
        if let Some(pair) = files.load("kubelet")?
            && leaf_is_fit(&pair, &purpose, &self.ca).unwrap_or(false)
        {
            return Ok(());
        }
        let pair = Files { dir: &self.dir }.issue(&format!("system:node:{node}"), &purpose, &self.ca)?;
        files.store("kubelet", &pair)
    }

    fn kubeconfig_is_fit(&self, text: &str, server_url: &str, user: &str) -> bool {
        let field = |name: &str| {
            text.lines().find_map(|l| l.trim_start().strip_prefix(name)).map(|v| v.trim().trim_matches('"'))
        };
        let decode = |v: &str| STANDARD.decode(v).ok();
        let ca_same = field("certificate-authority-data:").and_then(decode).as_deref()
            == Some(self.ca.cert_pem.as_bytes());
        let expiry = field("client-certificate-data:").and_then(decode).and_then(|pem| expiry_of(&pem).ok());
        ca_same
            && field("server:") == Some(server_url)
            // A machine may get another name between two starts.
            && field("user: \"") == Some(user)
            && expiry.is_some_and(|e| e > SystemTime::now() + RENEW_WITHIN)
    }
}

/// The kubeconfig file for one user of one cluster.
pub fn kubeconfig(server_url: &str, ca_pem: &str, user: &str, pair: &Pair) -> String {
    format!(
        r#"apiVersion: v1
kind: Config
clusters:
- name: orlop
  cluster:
    server: "{server_url}"
    certificate-authority-data: "{ca}"
users:
- name: "{user}"
  user:
    client-certificate-data: "{cert}"
    client-key-data: "{key}"
contexts:
- name: orlop
  context:
    cluster: orlop
    user: "{user}"
current-context: orlop
"#,
        ca = STANDARD.encode(ca_pem),
        cert = STANDARD.encode(&pair.cert_pem),
        key = STANDARD.encode(&pair.key_pem),
    )
}

fn restrict(path: &Path, mode: u32) -> Result<(), Error> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(|source| Error::Io {
        what: "restrict the mode of",
        path: path.to_owned(),
        source,
    })
}

struct Files<'a> {
    dir: &'a Path,
}

impl Files<'_> {
    fn damaged(&self, path: &Path, reason: impl ToString) -> Error {
        Error::Damaged { path: path.to_owned(), dir: self.dir.to_owned(), reason: reason.to_string() }
    }

    fn read(&self, path: &Path) -> Result<Option<String>, Error> {
        match std::fs::read(path) {
            Ok(bytes) => String::from_utf8(bytes).map(Some).map_err(|_| self.damaged(path, "not PEM")),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::Io { what: "read", path: path.to_owned(), source }),
        }
    }

    fn paths(&self, name: &str) -> (PathBuf, PathBuf) {
        (self.dir.join(format!("{name}.crt")), self.dir.join(format!("{name}.key")))
    }

    /// Both files of a pair, checked to belong together; `None` when neither is there.
    fn load(&self, name: &str) -> Result<Option<Pair>, Error> {
        let (cert_path, key_path) = self.paths(name);
        let (cert_pem, key_pem) = match (self.read(&cert_path)?, self.read(&key_path)?) {
            (Some(c), Some(k)) => (c, k),
            // The key is written first: a crash between the two leaves a key alone, which nothing has used yet.
            (None, _) => return Ok(None),
            (Some(_), None) => {
                return Err(self.damaged(&key_path, "the certificate is there, its key is missing"));
            }
        };
        let key = KeyPair::from_pem(&key_pem).map_err(|e| self.damaged(&key_path, e))?;
        let der =
            CertificateDer::from_pem_slice(cert_pem.as_bytes()).map_err(|e| self.damaged(&cert_path, e))?;
        let (_, cert) = X509Certificate::from_der(&der).map_err(|e| self.damaged(&cert_path, e))?;
        if cert.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            return Err(self.damaged(&cert_path, "certificate and key do not belong together"));
        }
        Ok(Some(Pair { cert_pem, key_pem }))
    }

    fn store(&self, name: &str, pair: &Pair) -> Result<(), Error> {
        let (cert_path, key_path) = self.paths(name);
        write_atomic(&key_path, pair.key_pem.as_bytes(), 0o600, Sync::Disk)?;
        Ok(write_atomic(&cert_path, pair.cert_pem.as_bytes(), 0o644, Sync::Disk)?)
    }

    fn authority(&self, name: &str, common_name: &str) -> Result<Pair, Error> {
        if let Some(pair) = self.load(name)? {
            let (cert_path, _) = self.paths(name);
            let expiry = expiry_of(pair.cert_pem.as_bytes()).map_err(|e| self.damaged(&cert_path, e))?;
            if expiry < SystemTime::now() {
                return Err(self.damaged(&cert_path, "the authority has expired"));
            }
            return Ok(pair);
        }
        let make = |source| Error::Make { subject: common_name.to_owned(), source };
        let key = KeyPair::generate().map_err(make)?;
        let mut params = base_params(common_name, CA_LIFE);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![dns(common_name)?];
        let cert = params.self_signed(&key).map_err(make)?;
        let pair = Pair { cert_pem: cert.pem(), key_pem: key.serialize_pem() };
        self.store(name, &pair)?;
        Ok(pair)
    }

    fn leaf(&self, name: &str, common_name: &str, purpose: &Purpose<'_>, ca: &Pair) -> Result<Pair, Error> {
        if let Some(pair) = self.load(name)? {
            let (cert_path, _) = self.paths(name);
            let fit = leaf_is_fit(&pair, purpose, ca).map_err(|e| self.damaged(&cert_path, e))?;
            if fit {
                return Ok(pair);
            }
            tracing::info!(certificate = %cert_path.display(), "renewing");
        }
        let pair = self.issue(common_name, purpose, ca)?;
        self.store(name, &pair)?;
        Ok(pair)
    }

    fn issue(&self, common_name: &str, purpose: &Purpose<'_>, ca: &Pair) -> Result<Pair, Error> {
        let make = |source| Error::Make { subject: common_name.to_owned(), source };
        let (ca_cert, ca_key) = self.paths("ca");
        let ca_key = KeyPair::from_pem(&ca.key_pem).map_err(|e| self.damaged(&ca_key, e))?;
        let issuer = Issuer::from_ca_cert_pem(&ca.cert_pem, ca_key).map_err(|e| self.damaged(&ca_cert, e))?;
        let mut params = base_params(common_name, LEAF_LIFE);
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        match purpose {
            Purpose::Server { names } => {
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
                params.subject_alt_names = names.iter().map(|n| san(n)).collect::<Result<_, _>>()?;
            }
            Purpose::Client { group } => {
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
                if let Some(group) = group {
                    params
                        .distinguished_name
                        .push(DnType::OrganizationName, DnValue::Utf8String((*group).to_owned()));
                }
            }
        }
        let key = KeyPair::generate().map_err(make)?;
        let cert = params.signed_by(&key, &issuer).map_err(make)?;
        Ok(Pair { cert_pem: cert.pem(), key_pem: key.serialize_pem() })
    }

    fn service_account_key(&self) -> Result<String, Error> {
        let path = self.dir.join("sa.key");
        if let Some(pem) = self.read(&path)? {
            KeyPair::from_pem(&pem).map_err(|e| self.damaged(&path, e))?;
            return Ok(pem);
        }
        let key = KeyPair::generate()
            .map_err(|source| Error::Make { subject: "service-account tokens".to_owned(), source })?;
        let pem = key.serialize_pem();
        write_atomic(&path, pem.as_bytes(), 0o600, Sync::Disk)?;
        write_atomic(&self.dir.join("sa.pub"), key.public_key_pem().as_bytes(), 0o644, Sync::Disk)?;
        Ok(pem)
    }
}

fn base_params(common_name: &str, life: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, DnValue::Utf8String(common_name.to_owned()));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    // An hour back, because the clocks of joining machines differ.
    params.not_before = epoch + now.saturating_sub(Duration::from_secs(3600));
    params.not_after = epoch + now + life;
    params
}

fn dns(name: &str) -> Result<SanType, Error> {
    Ok(SanType::DnsName(name.try_into().map_err(|_| Error::Name(name.to_owned()))?))
}

fn san(name: &str) -> Result<SanType, Error> {
    if let Ok(ip) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(ip));
    }
    let plain = !name.is_empty()
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '*' | '_'));
    if plain { dns(name) } else { Err(Error::Name(name.to_owned())) }
}

fn expiry_of(cert_pem: &[u8]) -> Result<SystemTime, String> {
    let der = CertificateDer::from_pem_slice(cert_pem).map_err(|e| e.to_string())?;
    let (_, cert) = X509Certificate::from_der(&der).map_err(|e| e.to_string())?;
    let secs = u64::try_from(cert.validity().not_after.timestamp()).map_err(|e| e.to_string())?;
    Ok(UNIX_EPOCH + Duration::from_secs(secs))
}

/// Signed by this CA, long enough to go, and for all the names wanted.
fn leaf_is_fit(pair: &Pair, purpose: &Purpose<'_>, ca: &Pair) -> Result<bool, String> {
    if expiry_of(pair.cert_pem.as_bytes())? < SystemTime::now() + RENEW_WITHIN {
        return Ok(false);
    }
    let ca_der = CertificateDer::from_pem_slice(ca.cert_pem.as_bytes()).map_err(|e| e.to_string())?;
    let (_, ca_cert) = X509Certificate::from_der(&ca_der).map_err(|e| e.to_string())?;
    let der = CertificateDer::from_pem_slice(pair.cert_pem.as_bytes()).map_err(|e| e.to_string())?;
    let (_, cert) = X509Certificate::from_der(&der).map_err(|e| e.to_string())?;
    if cert.verify_signature(Some(ca_cert.public_key())).is_err() {
        return Ok(false);
    }
    let Purpose::Server { names } = purpose else { return Ok(true) };
    let mut have = BTreeSet::new();
    if let Ok(Some(sans)) = cert.subject_alternative_name() {
        for name in &sans.value.general_names {
            match name {
                GeneralName::DNSName(d) => {
                    have.insert((*d).to_owned());
                }
                GeneralName::IPAddress(raw) => {
                    if let Ok(v4) = <[u8; 4]>::try_from(*raw) {
                        have.insert(IpAddr::from(v4).to_string());
                    } else if let Ok(v6) = <[u8; 16]>::try_from(*raw) {
                        have.insert(IpAddr::from(v6).to_string());
                    }
                }
                _ => {}
            }
        }
    }
    Ok(names.is_subset(&have))
}

/// How long a renewed leaf lives, for messages: whole days.
pub fn leaf_days() -> u64 {
    LEAF_LIFE.as_secs() / DAY.as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> BTreeSet<String> {
        list.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn a_second_start_keeps_everything_and_a_new_name_renews_only_the_serving_certificate() {
        let dir = tempfile::tempdir().unwrap();
        let p = dir.path().join("pki");
        let first = Pki::open(&p, &names(&["localhost", "127.0.0.1"])).unwrap();
        let second = Pki::open(&p, &names(&["localhost"])).unwrap();
        assert_eq!(first.ca.cert_pem, second.ca.cert_pem);
        assert_eq!(first.serving.cert_pem, second.serving.cert_pem);
        assert_eq!(first.service_account_key, second.service_account_key);
        let third = Pki::open(&p, &names(&["localhost", "10.0.0.1", "fd00::1"])).unwrap();
        assert_eq!(first.ca.cert_pem, third.ca.cert_pem);
        assert_ne!(first.serving.cert_pem, third.serving.cert_pem);
        let fourth = Pki::open(&p, &names(&["localhost", "10.0.0.1", "fd00::1"])).unwrap();
        assert_eq!(third.serving.cert_pem, fourth.serving.cert_pem);
    }

    #[test]
    fn damage_is_named_and_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let p = dir.path();
        Pki::open(p, &names(&["localhost"])).unwrap();
        let good = std::fs::read(p.join("ca.crt")).unwrap();
        std::fs::write(p.join("ca.crt"), b"garbage").unwrap();
        let e = Pki::open(p, &names(&["localhost"])).unwrap_err().to_string();
        assert!(e.contains("ca.crt is damaged") && e.contains("backup"), "{e}");
        std::fs::write(p.join("ca.crt"), good).unwrap();
        std::fs::copy(p.join("front-proxy-ca.key"), p.join("ca.key")).unwrap();
        let e = Pki::open(p, &names(&["localhost"])).unwrap_err().to_string();
        assert!(e.contains("do not belong together"), "{e}");
        std::fs::write(p.join("version.json"), b"{\"version\":9,\"data\":null}").unwrap();
        assert!(matches!(
            Pki::open(p, &names(&["localhost"])),
            Err(Error::File(durable::Error::Version { found: 9, .. }))
        ));
    }

    #[test]
    fn kubeconfigs_are_private_and_kept_while_fit() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::open(dir.path(), &names(&["localhost"])).unwrap();
        let path = dir.path().join("sub/admin.kubeconfig");
        pki.ensure_kubeconfig(&path, "https://localhost:1", "admin", Some("system:masters")).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let first = std::fs::read_to_string(&path).unwrap();
        pki.ensure_kubeconfig(&path, "https://localhost:1", "admin", Some("system:masters")).unwrap();
        assert_eq!(first, std::fs::read_to_string(&path).unwrap());
        pki.ensure_kubeconfig(&path, "https://localhost:2", "admin", Some("system:masters")).unwrap();
        let second = std::fs::read_to_string(&path).unwrap();
        assert_ne!(first, second);
        pki.ensure_kubeconfig(&path, "https://localhost:2", "another", Some("system:masters")).unwrap();
        assert_ne!(second, std::fs::read_to_string(&path).unwrap());
    }

    #[test]
    fn a_name_that_is_none_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Pki::open(dir.path(), &names(&["no such name"])), Err(Error::Name(_))));
    }
}
