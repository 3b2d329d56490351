//! Who asks: client certificates, then bearer tokens (service accounts, bootstrap tokens, a static file), else nobody.
//!
//! Anonymous requests reach only what monitoring and joining need without credentials: health, version and cluster-info.

mod bootstrap_token;
pub mod certificate;
pub mod impersonation;
pub mod service_account;
mod static_token;

use std::collections::HashMap;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::HeaderMap;
use http::header::{AUTHORIZATION, SEC_WEBSOCKET_PROTOCOL};

use crate::registry::Registry;
use crate::request_info::UserInfo;
use certificate::ClientIdentity;
pub use static_token::StaticTokens;

const WEBSOCKET_TOKEN_PREFIX: &str = "base64url.bearer.authorization.k8s.io.";

/// Why credentials were refused; the client is told only "Unauthorized".
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// A verified user and, for tokens, the audiences that the token is good for among those asked.
#[derive(Clone, Debug)]
pub struct Authenticated {
    pub user: UserInfo,
    pub audiences: Vec<String>,
}

/// All authenticators.
pub struct Authenticator {
    pub service_accounts: service_account::Tokens,
    pub static_tokens: StaticTokens,
    pub registry: Registry,
}

impl Authenticator {
    /// Identifies the user of a request; `None` when it carries no credentials.
    ///
    /// # Errors
    /// [`Refused`] when it carries credentials that are not good; the answer is 401 even where anonymous would do.
    pub async fn authenticate(
        &self,
        headers: &HeaderMap,
        peer: Option<&ClientIdentity>,
    ) -> Result<Option<UserInfo>, Refused> {
        let mut refusal = None;
        if let Some(identity) = peer {
            match identity.user() {
                Ok(user) => return Ok(Some(with_authenticated(user))),
                // A token may still do: a proxy on the way can have its own certificate.
                Err(e) => refusal = Some(e),
            }
        }
        if let Some(token) = bearer_token(headers) {
            return self.authenticate_token(&token, &[]).await.map(|a| Some(a.user));
        }
        match refusal {
            Some(e) => Err(e),
            None => Ok(None),
        }
    }

    /// Verifies a token for `audiences` (empty: the API server's own).
    ///
    /// # Errors
    /// [`Refused`] with the reason that a TokenReview shows.
    pub async fn authenticate_token(
        &self,
        token: &str,
        audiences: &[String],
    ) -> Result<Authenticated, Refused> {
        if let Some(user) = self.static_tokens.find(token) {
            return Ok(Authenticated { user: with_authenticated(user), audiences: audiences.to_vec() });
        }
        if let Some((id, secret)) = bootstrap_token::split(token) {
            let object = self
                .registry
                .get("", "secrets", "kube-system", &format!("bootstrap-token-{id}"))
                .await
                .map_err(|_| Refused("no such bootstrap token".to_owned()))?;
            let user = bootstrap_token::check(&object, id, secret, jiff::Timestamp::now())?;
            return Ok(Authenticated { user: with_authenticated(user), audiences: audiences.to_vec() });
        }
        let claims = self.service_accounts.verify(token, audiences)?;
        let user = service_account::resolve(&self.registry, &claims).await?;
        let good_for = match audiences.is_empty() {
            true => Vec::new(),
            false => audiences.iter().filter(|a| claims.aud.contains(a)).cloned().collect(),
        };
        Ok(Authenticated { user: with_authenticated(user), audiences: good_for })
    }
}

/// The user of a request without credentials.
pub fn anonymous() -> UserInfo {
    UserInfo {
        name: "system:anonymous".into(),
        groups: vec!["system:unauthenticated".into()],
        ..UserInfo::default()
    }
}

/// Where a request without credentials is let through to authorization.
pub fn anonymous_may_ask(path: &str) -> bool {
    let health = ["/healthz", "/livez", "/readyz"];
    health.iter().any(|h| path.strip_prefix(h).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
        || matches!(path, "/version" | "/version/" | "/api/v1/namespaces/kube-public/configmaps/cluster-info")
}

fn with_authenticated(mut user: UserInfo) -> UserInfo {
    if !user.in_group("system:authenticated") && user.name != "system:anonymous" {
        user.groups.push("system:authenticated".into());
    }
    user
}

/// The token from the Authorization header, or from the WebSocket subprotocol that browsers use in its place.
fn bearer_token(headers: &HeaderMap) -> Option<String> {
    if let Some(value) = headers.get(AUTHORIZATION).and_then(|v| v.to_str().ok()) {
        let (scheme, token) = value.trim().split_once(' ')?;
        let token = token.trim();
        return (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then(|| token.to_owned());
    }
    let protocols = headers.get_all(SEC_WEBSOCKET_PROTOCOL);
    protocols.iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(',')).find_map(|p| {
        let encoded = p.trim().strip_prefix(WEBSOCKET_TOKEN_PREFIX)?;
        String::from_utf8(URL_SAFE_NO_PAD.decode(encoded).ok()?).ok()
    })
}

/// Takes the credentials out, so that they go no further than authentication.
pub fn strip_credentials(headers: &mut HeaderMap) {
    headers.remove(AUTHORIZATION);
    let kept: Vec<String> = headers
        .get_all(SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .map(str::trim)
        .filter(|p| !p.starts_with(WEBSOCKET_TOKEN_PREFIX))
        .map(str::to_owned)
        .collect();
    headers.remove(SEC_WEBSOCKET_PROTOCOL);
    if !kept.is_empty()
        && let Ok(value) = kept.join(", ").parse()
    {
        headers.insert(SEC_WEBSOCKET_PROTOCOL, value);
    }
}

/// A bounded map for results that are dear to compute; emptied when full.
pub(crate) struct SmallCache<V>(parking_lot::Mutex<HashMap<[u8; 32], V>>);

impl<V: Clone> SmallCache<V> {
    /// Tokens in use at once by a large node's pods fit well; one entry is below a kilobyte.
    const LIMIT: usize = 2048;

    pub fn new() -> Self {
        SmallCache(parking_lot::Mutex::new(HashMap::new()))
    }

    pub fn get(&self, key: &[u8; 32]) -> Option<V> {
        self.0.lock().get(key).cloned()
    }

    pub fn put(&self, key: [u8; 32], value: V) {
        let mut map = self.0.lock();
        if map.len() >= Self::LIMIT {
            map.clear();
        }
        map.insert(key, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_found_and_stripped() {
        let mut h = HeaderMap::new();
        assert_eq!(bearer_token(&h), None);
        h.insert(AUTHORIZATION, "Bearer  abc".parse().unwrap());
        assert_eq!(bearer_token(&h).as_deref(), Some("abc"));
        h.insert(AUTHORIZATION, "Basic abc".parse().unwrap());
        assert_eq!(bearer_token(&h), None);
        h.remove(AUTHORIZATION);
        let encoded = format!("{WEBSOCKET_TOKEN_PREFIX}{}, v5.channel.k8s.io", URL_SAFE_NO_PAD.encode("tok"));
        h.insert(SEC_WEBSOCKET_PROTOCOL, encoded.parse().unwrap());
        assert_eq!(bearer_token(&h).as_deref(), Some("tok"));
        strip_credentials(&mut h);
        assert_eq!(h.get(SEC_WEBSOCKET_PROTOCOL).unwrap(), "v5.channel.k8s.io");
    }

    #[test]
    fn where_anonymous_may_ask() {
        for yes in ["/healthz", "/livez/ping", "/readyz", "/version"] {
            assert!(anonymous_may_ask(yes), "{yes}");
        }
        for no in ["/", "/api", "/healthzz", "/metrics", "/api/v1/namespaces/kube-public/configmaps/other"] {
            assert!(!anonymous_may_ask(no), "{no}");
        }
    }
}
