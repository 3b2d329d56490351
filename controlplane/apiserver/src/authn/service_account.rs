//! Service-account tokens: ES256 JWTs bound to an account and optionally to a pod, node or secret (KEP-1205, KEP-2799).

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use rcgen::{KeyPair, PublicKeyData};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{Refused, SmallCache};
use crate::registry::Registry;
use crate::request_info::UserInfo;

/// Seconds by which clocks may differ.
const LEEWAY: u64 = 60;

/// A token's claims.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Claims {
    pub iss: String,
    pub sub: String,
    #[serde(deserialize_with = "one_or_many")]
    pub aud: Vec<String>,
    pub exp: u64,
    pub iat: u64,
    pub nbf: u64,
    #[serde(default)]
    pub jti: String,
    #[serde(rename = "kubernetes.io")]
    pub kubernetes: Bound,
}

/// What a token is bound to.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Bound {
    pub namespace: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<Reference>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<Reference>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret: Option<Reference>,
    pub serviceaccount: Reference,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warnafter: Option<u64>,
}

/// An object by name and UID.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, Eq)]
pub struct Reference {
    pub name: String,
    #[serde(default)]
    pub uid: String,
}

fn one_or_many<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        One(String),
        Many(Vec<String>),
    }
    Ok(match Form::deserialize(d)? {
        Form::One(s) => vec![s],
        Form::Many(v) => v,
    })
}

/// Signs and verifies tokens.
pub struct Tokens {
    issuer: String,
    audiences: Vec<String>,
    key_id: String,
    encoding: EncodingKey,
    decoding: DecodingKey,
    jwks: Value,
    verified: SmallCache<Arc<Claims>>,
}

impl Tokens {
    /// `key_pem` is the PKCS#8 PEM of a P-256 key. `audiences` are the API server's own; the first is the default of new tokens.
    ///
    /// # Errors
    /// A message when the key is not usable.
    pub fn new(key_pem: &str, issuer: &str, audiences: Vec<String>) -> Result<Tokens, String> {
        let pair = KeyPair::from_pem(key_pem).map_err(|e| e.to_string())?;
        let point = pair.public_key_raw();
        if point.len() != 65 || point[0] != 4 {
            return Err("the service-account key is no P-256 key".to_owned());
        }
        let x = URL_SAFE_NO_PAD.encode(&point[1..33]);
        let y = URL_SAFE_NO_PAD.encode(&point[33..]);
        let key_id = URL_SAFE_NO_PAD.encode(Sha256::digest(pair.subject_public_key_info()));
        Ok(Tokens {
            encoding: EncodingKey::from_ec_pem(key_pem.as_bytes()).map_err(|e| e.to_string())?,
            decoding: DecodingKey::from_ec_components(&x, &y).map_err(|e| e.to_string())?,
            jwks: json!({"keys": [{"use": "sig", "kty": "EC", "kid": key_id, "crv": "P-256", "alg": "ES256", "x": x, "y": y}]}),
            issuer: issuer.to_owned(),
            audiences,
            key_id,
            verified: SmallCache::new(),
        })
    }

    /// The API server's own audiences.
    pub fn audiences(&self) -> &[String] {
        &self.audiences
    }

    /// The JSON Web Key Set of /openid/v1/jwks.
    pub fn jwks(&self) -> &Value {
        &self.jwks
    }

    /// The document of /.well-known/openid-configuration.
    pub fn discovery(&self, jwks_uri: &str) -> Value {
        json!({
            "issuer": self.issuer,
            "jwks_uri": jwks_uri,
            "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["ES256"],
        })
    }

    /// Makes a token that lives `seconds` from now.
    ///
    /// # Errors
    /// A message when signing fails.
    pub fn sign(&self, audiences: Vec<String>, seconds: u64, bound: Bound) -> Result<String, String> {
        let now = jsonwebtoken::get_current_timestamp();
        let claims = Claims {
            iss: self.issuer.clone(),
            sub: format!("system:serviceaccount:{}:{}", bound.namespace, bound.serviceaccount.name),
            aud: audiences,
            exp: now + seconds,
            iat: now,
            nbf: now,
            jti: uuid::Uuid::new_v4().to_string(),
            kubernetes: bound,
        };
        let mut header = Header::new(Algorithm::ES256);
        header.typ = None;
        header.kid = Some(self.key_id.clone());
        jsonwebtoken::encode(&header, &claims, &self.encoding).map_err(|e| e.to_string())
    }

    /// Checks signature, issuer, times and that the token is for one of `audiences` (empty: the server's own).
    ///
    /// # Errors
    /// [`Refused`] with what is wrong.
    pub fn verify(&self, token: &str, audiences: &[String]) -> Result<Arc<Claims>, Refused> {
        // Signatures are dear, and a client sends the same token with each request.
        let key: [u8; 32] = Sha256::digest(token).into();
        let claims = match self.verified.get(&key) {
            Some(claims) => claims,
            None => {
                let mut validation = Validation::new(Algorithm::ES256);
                validation.set_issuer(&[&self.issuer]);
                validation.validate_aud = false;
                validation.validate_nbf = true;
                validation.leeway = LEEWAY;
                let data = jsonwebtoken::decode::<Claims>(token, &self.decoding, &validation)
                    .map_err(|e| Refused(format!("invalid bearer token: {e}")))?;
                let claims = Arc::new(data.claims);
                self.verified.put(key, claims.clone());
                claims
            }
        };
        if claims.exp + LEEWAY < jsonwebtoken::get_current_timestamp() {
            return Err(Refused("service account token has expired".to_owned()));
        }
        let wanted = if audiences.is_empty() { &self.audiences } else { audiences };
        if !claims.aud.iter().any(|a| wanted.contains(a)) {
            return Err(Refused(format!(
                "invalid bearer token, token audiences {:?} is invalid for the target audiences {wanted:?}",
                claims.aud
            )));
        }
        let expected = format!(
            "system:serviceaccount:{}:{}",
            claims.kubernetes.namespace, claims.kubernetes.serviceaccount.name
        );
        if claims.sub != expected {
            return Err(Refused("invalid bearer token: subject and account differ".to_owned()));
        }
        Ok(claims)
    }
}

/// Checks that what the token is bound to still exists, and says whose it is.
pub async fn resolve(registry: &Registry, claims: &Claims) -> Result<UserInfo, Refused> {
    let bound = &claims.kubernetes;
    let ns = bound.namespace.as_str();
    let alive = async |resource: &str, namespace: &str, reference: &Reference| {
        let gone = || Refused(format!("service account token has been invalidated: its {resource} is gone"));
        let object = registry.get("", resource, namespace, &reference.name).await.map_err(|_| gone())?;
        let uid = object.pointer("/metadata/uid").and_then(Value::as_str).unwrap_or_default();
        let deleted = object.pointer("/metadata/deletionTimestamp").and_then(Value::as_str);
        let deleted = deleted.and_then(|t| t.parse::<jiff::Timestamp>().ok());
        // deletionTimestamp of a pod lies at the end of its grace period.
        let dead =
            deleted.is_some_and(|t| t.as_second() + (LEEWAY as i64) < jiff::Timestamp::now().as_second());
        if uid != reference.uid || dead { Err(gone()) } else { Ok(()) }
    };
    alive("serviceaccounts", ns, &bound.serviceaccount).await?;
    let mut extra = std::collections::BTreeMap::new();
    let mut say = |key: &str, value: &str| {
        extra.insert(format!("authentication.kubernetes.io/{key}"), vec![value.to_owned()]);
    };
    if !claims.jti.is_empty() {
        say("credential-id", &format!("JTI={}", claims.jti));
    }
    if let Some(secret) = &bound.secret {
        alive("secrets", ns, secret).await?;
    }
    if let Some(pod) = &bound.pod {
        alive("pods", ns, pod).await?;
        say("pod-name", &pod.name);
        say("pod-uid", &pod.uid);
    } else if let Some(node) = &bound.node {
        alive("nodes", "", node).await?;
    }
    if let Some(node) = &bound.node {
        say("node-name", &node.name);
        if !node.uid.is_empty() {
            say("node-uid", &node.uid);
        }
    }
    Ok(UserInfo {
        name: claims.sub.clone(),
        uid: bound.serviceaccount.uid.clone(),
        groups: vec!["system:serviceaccounts".into(), format!("system:serviceaccounts:{ns}")],
        extra,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens() -> Tokens {
        let key = KeyPair::generate().unwrap().serialize_pem();
        Tokens::new(&key, "https://iss", vec!["https://iss".into()]).unwrap()
    }

    fn bound() -> Bound {
        Bound {
            namespace: "d".into(),
            serviceaccount: Reference { name: "a".into(), uid: "u".into() },
            ..Bound::default()
        }
    }

    #[test]
    fn a_token_verifies_only_for_its_issuer_and_audience() {
        let t = tokens();
        let token = t.sign(vec!["https://iss".into()], 600, bound()).unwrap();
        assert_eq!(t.verify(&token, &[]).unwrap().sub, "system:serviceaccount:d:a");
        assert_eq!(t.verify(&token, &[]).unwrap().kubernetes.serviceaccount.uid, "u");
        assert!(t.verify(&token, &["vault".into()]).is_err());
        assert!(tokens().verify(&token, &[]).is_err());
        let other = t.sign(vec!["vault".into()], 600, bound()).unwrap();
        assert!(t.verify(&other, &[]).is_err());
        assert!(t.verify(&other, &["vault".into(), "x".into()]).is_ok());
        let (head, tail) = token.rsplit_once('.').unwrap();
        let flipped = if tail.starts_with('A') { "B" } else { "A" };
        assert!(t.verify(&format!("{head}.{flipped}{}", &tail[1..]), &[]).is_err());
        for garbage in ["", "a.b.c", "....", "abc"] {
            assert!(t.verify(garbage, &[]).is_err());
        }
    }

    #[test]
    fn an_unsigned_token_is_refused() {
        let t = tokens();
        let token = t.sign(vec!["https://iss".into()], 600, bound()).unwrap();
        let claims = token.split('.').nth(1).unwrap();
        let none = URL_SAFE_NO_PAD.encode(br#"{"alg":"none"}"#);
        assert!(t.verify(&format!("{none}.{claims}."), &[]).is_err());
    }
}
