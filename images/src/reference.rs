//! Image references and digests, after the distribution project's grammar with docker.io's short names.

use std::fmt;
use std::str::FromStr;

use sha2::Digest as _;

use crate::{Error, Result};

/// How content is named: the algorithms that the OCI image specification registers for all to know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Algorithm {
    Sha256,
    Sha512,
}

impl Algorithm {
    /// As it stands before the colon, and in the path of a blob in an OCI layout.
    pub fn name(self) -> &'static str {
        match self {
            Algorithm::Sha256 => "sha256",
            Algorithm::Sha512 => "sha512",
        }
    }

    /// Hashes `bytes`.
    pub fn digest(self, bytes: &[u8]) -> Digest {
        let mut h = self.hasher();
        h.update(bytes);
        h.finish()
    }

    pub(crate) fn hasher(self) -> Hasher {
        match self {
            Algorithm::Sha256 => Hasher::Sha256(sha2::Sha256::new()),
            Algorithm::Sha512 => Hasher::Sha512(sha2::Sha512::new()),
        }
    }
}

/// A digest that is being computed.
pub(crate) enum Hasher {
    Sha256(sha2::Sha256),
    Sha512(sha2::Sha512),
}

impl Hasher {
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Hasher::Sha256(h) => h.update(bytes),
            Hasher::Sha512(h) => h.update(bytes),
        }
    }

    pub fn finish(self) -> Digest {
        match self {
            Hasher::Sha256(h) => Digest::Sha256(h.finalize().into()),
            Hasher::Sha512(h) => Digest::Sha512(h.finalize().into()),
        }
    }
}

/// What content is called and verified by.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Digest {
    Sha256([u8; 32]),
    Sha512([u8; 64]),
}

impl Digest {
    /// Hashes `bytes` as everything is hashed that nobody has named: with SHA-256.
    pub fn of(bytes: &[u8]) -> Digest {
        Algorithm::Sha256.digest(bytes)
    }

    pub fn algorithm(&self) -> Algorithm {
        match self {
            Digest::Sha256(_) => Algorithm::Sha256,
            Digest::Sha512(_) => Algorithm::Sha512,
        }
    }

    /// What `bytes` must have for this to be their digest.
    pub fn same_of(&self, bytes: &[u8]) -> Digest {
        self.algorithm().digest(bytes)
    }

    /// The 64 or 128 hexadecimal digits.
    pub fn hex(&self) -> String {
        use fmt::Write;
        let bytes: &[u8] = match self {
            Digest::Sha256(b) => b,
            Digest::Sha512(b) => b,
        };
        let mut out = String::with_capacity(2 * bytes.len());
        for b in bytes {
            // Writing to a String cannot fail.
            let _ = write!(out, "{b:02x}");
        }
        out
    }

    /// Reads lower-case hexadecimal digits; their number tells the algorithm.
    pub fn from_hex(hex: &str) -> Option<Digest> {
        match hex.len() {
            64 => Some(Digest::Sha256(read_hex(hex)?)),
            128 => Some(Digest::Sha512(read_hex(hex)?)),
            _ => None,
        }
    }
}

fn read_hex<const N: usize>(hex: &str) -> Option<[u8; N]> {
    let nibble = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    let mut out = [0u8; N];
    for (byte, pair) in out.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(out)
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm().name(), self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = Error;
    fn from_str(s: &str) -> Result<Digest> {
        let digest = s
            .split_once(':')
            .and_then(|(algorithm, hex)| Digest::from_hex(hex).filter(|d| d.algorithm().name() == algorithm));
        digest.ok_or_else(|| Error::Reference { text: s.to_owned(), why: DIGEST_FORM })
    }
}

const DIGEST_FORM: &str = "a digest is sha256: and 64, or sha512: and 128, lower-case hexadecimal digits; no other kind is known here";

impl serde::Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Digest, D::Error> {
        let s = <std::borrow::Cow<'de, str>>::deserialize(d)?;
        s.parse().map_err(serde::de::Error::custom)
    }
}

/// A complete image reference: registry, repository, and a tag or a digest or both.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    /// Host and optional port, such as `docker.io` or `localhost:5000`.
    pub registry: String,
    /// Path within the registry, such as `library/busybox`.
    pub repository: String,
    /// Absent only when there is a digest.
    pub tag: Option<String>,
    pub digest: Option<Digest>,
}

/// The most bytes of `registry/repository` that the distribution grammar allows.
const MAX_NAME: usize = 255;

impl Reference {
    /// Parses a reference as people write it: `busybox` means `docker.io/library/busybox:latest`.
    pub fn parse(text: &str) -> Result<Reference> {
        let bad = |why| Error::Reference { text: text.to_owned(), why };
        if text.is_empty() {
            return Err(bad("it is empty"));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, d)) => {
                let d = d.parse().map_err(|_| bad(DIGEST_FORM))?;
                (rest, Some(d))
            }
            None => (text, None),
        };
        let (name, tag) = match rest.rsplit_once(':') {
            // A colon before the last slash belongs to the registry's port.
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if let Some(tag) = tag
            && !is_tag(tag)
        {
            return Err(bad(
                "a tag is 1 to 128 of letters, digits, '_', '.', '-', not starting with '.' or '-'",
            ));
        }
        let (registry, path) = match name.split_once('/') {
            Some((first, path))
                if first.contains(['.', ':', '['])
                    || first == "localhost"
                    || first.bytes().any(|b| b.is_ascii_uppercase()) =>
            {
                (first, path)
            }
            _ => ("docker.io", name),
        };
        if !is_registry(registry) {
            return Err(bad("the registry is not a host name or address with an optional port"));
        }
        let registry = if registry == "index.docker.io" { "docker.io" } else { registry };
        let repository = if registry == "docker.io" && !path.contains('/') {
            format!("library/{path}")
        } else {
            path.to_owned()
        };
        if !path.split('/').all(is_path_component) {
            return Err(bad(
                "a repository is lower-case letters and digits, joined by '.', '_', '__' or '-', in parts separated by '/'",
            ));
        }
        if registry.len() + 1 + repository.len() > MAX_NAME {
            return Err(bad("registry and repository together are longer than 255 bytes"));
        }
        let tag = match (tag, digest) {
            (Some(t), _) => Some(t.to_owned()),
            (None, Some(_)) => None,
            (None, None) => Some("latest".to_owned()),
        };
        Ok(Reference { registry: registry.to_owned(), repository, tag, digest })
    }

    /// `registry/repository`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// The name with the tag, without the digest. `None` for a reference by digest alone.
    pub fn tagged(&self) -> Option<String> {
        self.tag.as_ref().map(|t| format!("{}/{}:{t}", self.registry, self.repository))
    }

    /// The name with `digest`.
    pub fn with_digest(&self, digest: &Digest) -> String {
        format!("{}/{}@{digest}", self.registry, self.repository)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(t) = &self.tag {
            write!(f, ":{t}")?;
        }
        if let Some(d) = &self.digest {
            write!(f, "@{d}")?;
        }
        Ok(())
    }
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let b = tag.as_bytes();
    !b.is_empty() && b.len() <= 128 && word(b[0]) && b.iter().all(|&c| word(c) || c == b'.' || c == b'-')
}

/// Alphanumeric runs joined by `.`, `_`, `__` or any number of `-`.
fn is_path_component(part: &str) -> bool {
    let alnum = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let b = part.as_bytes();
    let (Some(&first), Some(&last)) = (b.first(), b.last()) else { return false };
    if !alnum(first) || !alnum(last) {
        return false;
    }
    b.split(|&c| alnum(c))
        .filter(|sep| !sep.is_empty())
        .all(|sep| matches!(sep, b"." | b"_" | b"__") || sep.iter().all(|&c| c == b'-'))
}

fn is_registry(host: &str) -> bool {
    let (name, port) = if let Some(rest) = host.strip_prefix('[') {
        let Some((addr, port)) = rest.split_once(']') else { return false };
        if addr.parse::<std::net::Ipv6Addr>().is_err() {
            return false;
        }
        match port.strip_prefix(':') {
            Some(p) => ("", Some(p)),
            None if port.is_empty() => ("", None),
            None => return false,
        }
    } else {
        match host.split_once(':') {
            Some((n, p)) => (n, Some(p)),
            None => (host, None),
        }
    };
    let label = |l: &str| {
        !l.is_empty()
            && !l.starts_with('-')
            && !l.ends_with('-')
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    (host.starts_with('[') || name.split('.').all(label)) && port.is_none_or(|p| p.parse::<u16>().is_ok())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const D: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn short_names_become_complete() {
        for (text, want) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
            ("user/app", "docker.io/user/app:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/a/b:v1", "localhost:5000/a/b:v1"),
            ("127.0.0.1:5000/app", "127.0.0.1:5000/app:latest"),
            ("[::1]:5000/app:x", "[::1]:5000/app:x"),
            ("registry.k8s.io/pause:3.10", "registry.k8s.io/pause:3.10"),
            ("a/b__c-d--e.f_g", "docker.io/a/b__c-d--e.f_g:latest"),
            ("HOST/app", "HOST/app:latest"),
        ] {
            assert_eq!(Reference::parse(text).unwrap().to_string(), want, "{text}");
        }
        let r = Reference::parse(&format!("busybox@{D}")).unwrap();
        assert_eq!((r.tag.as_deref(), r.to_string()), (None, format!("docker.io/library/busybox@{D}")));
        let r = Reference::parse(&format!("quay.io/a/b:v1@{D}")).unwrap();
        assert_eq!(r.to_string(), format!("quay.io/a/b:v1@{D}"));
        assert_eq!(r.tagged().unwrap(), "quay.io/a/b:v1");
    }

    #[test]
    fn digests_of_both_kinds() {
        let long = Algorithm::Sha512.digest(b"");
        assert!(
            long.to_string()
                .starts_with("sha512:cf83e1357eefb8bdf1542850d66d8007d620e4050b5715dc83f4a921d36ce9ce")
        );
        assert_eq!(Digest::of(b"").to_string(), D);
        for d in [long, Digest::of(b"")] {
            assert_eq!(d.to_string().parse::<Digest>().unwrap(), d);
            assert_eq!(Digest::from_hex(&d.hex()), Some(d));
            assert_eq!(d.same_of(b""), d);
        }
        let name = format!("localhost:5000/a@{long}");
        assert_eq!(Reference::parse(&name).unwrap().to_string(), name);
        // Digits of one kind under the name of the other.
        for bad in [format!("sha512:{}", Digest::of(b"").hex()), format!("sha256:{}", long.hex())] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn malformed_references_are_refused() {
        let long = "a".repeat(256);
        for text in [
            "",
            ":v1",
            "@",
            "a:",
            "a:.x",
            "a//b",
            "/a",
            "a/",
            "A",
            "a/B",
            "a..b",
            "a___b",
            "-a",
            "a-",
            "x y",
            "a@sha256:12",
            "a@md5:00",
            "host:99999/a",
            "[::g]/a",
            "-h.io/a",
            "../a",
            "a:b:c",
            "h.io/",
            &long,
        ] {
            assert!(matches!(Reference::parse(text), Err(Error::Reference { .. })), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(s in "\\PC{0,80}") {
            let _ = Reference::parse(&s);
        }

        #[test]
        fn a_parsed_reference_parses_to_itself(
            host in prop::option::of("[a-z]{1,8}\\.[a-z]{2,3}(:[1-9][0-9]{0,3})?"),
            path in "[a-z0-9]{1,6}((\\.|_|__|-{1,3})[a-z0-9]{1,5}){0,2}(/[a-z0-9]{1,6}){0,2}",
            tag in prop::option::of("[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}"),
            digest in any::<bool>(),
        ) {
            // A first part with a dot would be a host.
            let mut text = host.map_or("u/".to_owned(), |h| h + "/") + &path;
            if let Some(t) = &tag { text = text + ":" + t; }
            if digest { text = text + "@" + D; }
            let r = Reference::parse(&text).unwrap();
            prop_assert_eq!(&Reference::parse(&r.to_string()).unwrap(), &r);
            prop_assert!(r.to_string().ends_with(&text) || tag.is_none());
        }
    }
}
