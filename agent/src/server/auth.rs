//! Who calls, and whether it may: client certificates, else TokenReview; then SubjectAccessReview on `nodes/…`.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

use http::header::AUTHORIZATION;
use http::{Method, Request, StatusCode};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::Api;
use kube::api::PostParams;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use x509_parser::prelude::FromDer;

use super::Refusal;
use crate::context::Context;

/// Upstream's defaults for the webhooks' caches.
const TOKEN_LIFE: Duration = Duration::from_secs(120);
const ALLOWED_LIFE: Duration = Duration::from_secs(300);
const DENIED_LIFE: Duration = Duration::from_secs(30);
/// Answers remembered; beyond that the old ones go.
const REMEMBERED: usize = 1024;

/// A caller.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    pub user: String,
    pub groups: Vec<String>,
}

impl Identity {
    /// Common name and organisations of a verified certificate.
    pub fn of_certificate(der: &[u8]) -> Option<Identity> {
        let (_, cert) = x509_parser::certificate::X509Certificate::from_der(der).ok()?;
        let user = cert.subject().iter_common_name().next()?.as_str().ok()?.to_owned();
        let groups = cert.subject().iter_organization().filter_map(|o| o.as_str().ok().map(str::to_owned));
        Some(Identity { user, groups: groups.collect() })
    }
}

struct Remembered<K, V> {
    entries: Mutex<HashMap<K, (V, Instant)>>,
}

impl<K: Eq + Hash, V: Clone> Remembered<K, V> {
    fn new() -> Self {
        Remembered { entries: Mutex::new(HashMap::new()) }
    }

    fn get(&self, key: &K) -> Option<V> {
        let entries = self.entries.lock();
        entries.get(key).filter(|(_, until)| *until > Instant::now()).map(|(v, _)| v.clone())
    }

    fn put(&self, key: K, value: V, life: Duration) {
        let mut entries = self.entries.lock();
        if entries.len() >= REMEMBERED {
            let now = Instant::now();
            entries.retain(|_, (_, until)| *until > now);
            if entries.len() >= REMEMBERED {
                entries.clear();
            }
        }
        entries.insert(key, (value, Instant::now() + life));
    }
}

type Question = (Identity, &'static str, &'static str);

/// Decides about requests.
pub struct Auth {
    client: Option<kube::Client>,
    node: String,
    always_allow: bool,
    anonymous: bool,
    webhook: bool,
    tokens: Remembered<[u8; 32], Option<Identity>>,
    answers: Remembered<Question, bool>,
}

/// The verb and the subresource of `nodes` that stand for a request (fine-grained kubelet authorization, KEP-2862).
fn attributes(method: &Method, path: &str) -> (&'static str, &'static str) {
    let verb = match *method {
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "get",
    };
    let subresource = match path.trim_start_matches('/').split('/').next().unwrap_or_default() {
        "stats" => "stats",
        "metrics" => "metrics",
        "logs" => "log",
        "checkpoint" => "checkpoint",
        "pods" | "runningpods" => "pods",
        "healthz" | "livez" | "readyz" => "healthz",
        "configz" => "configz",
        _ => "proxy",
    };
    (verb, subresource)
}

impl Auth {
    pub fn new(ctx: &Context) -> Auth {
        let k = &ctx.config.kubelet;
        Auth {
            client: ctx.client.clone(),
            node: ctx.config.node_name.clone(),
            always_allow: k.authorization.mode == "AlwaysAllow",
            anonymous: k.authentication.anonymous.enabled == Some(true),
            webhook: k.authentication.webhook.enabled != Some(false),
            tokens: Remembered::new(),
            answers: Remembered::new(),
        }
    }

    /// Lets the request pass or says why not.
    pub async fn check<B>(&self, request: &Request<B>, peer: Option<&Identity>) -> Result<(), Refusal> {
        let unauthorized = || Refusal::new(StatusCode::UNAUTHORIZED, "Unauthorized");
        let identity = match (peer, self.bearer(request).await?) {
            (Some(p), _) => p.clone(),
            (None, Some(t)) => t,
            (None, None) if self.anonymous => {
                Identity { user: "system:anonymous".into(), groups: vec!["system:unauthenticated".into()] }
            }
            (None, None) => return Err(unauthorized()),
        };
        if self.always_allow {
            return Ok(());
        }
        let (verb, subresource) = attributes(request.method(), request.uri().path());
        if self.allowed(&identity, verb, subresource).await? {
            return Ok(());
        }
        // The general right covers the finer ones, for clients from before they existed.
        if !matches!(subresource, "proxy" | "stats" | "metrics" | "log" | "checkpoint")
            && self.allowed(&identity, verb, "proxy").await?
        {
            return Ok(());
        }
        let text = format!(
            "Forbidden (user={}, verb={verb}, resource=nodes, subresource={subresource})",
            identity.user
        );
        Err(Refusal::new(StatusCode::FORBIDDEN, text))
    }

    async fn bearer<B>(&self, request: &Request<B>) -> Result<Option<Identity>, Refusal> {
        let header = request.headers().get(AUTHORIZATION).and_then(|v| v.to_str().ok());
        let Some(token) = header.and_then(|h| h.strip_prefix("Bearer ")) else { return Ok(None) };
        let Some(client) = self.client.as_ref().filter(|_| self.webhook) else { return Ok(None) };
        let key: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        if let Some(known) = self.tokens.get(&key) {
            return Ok(known);
        }
        let spec = TokenReviewSpec { token: token.to_owned(), ..Default::default() };
        let review = TokenReview { spec, ..Default::default() };
        let api: Api<TokenReview> = Api::all(client.clone());
        let answer = api.create(&PostParams::default(), &review).await.map_err(|e| Refusal::internal(&e))?;
        let status = answer.status.filter(|s| s.authenticated == Some(true));
        let identity = status
            .and_then(|s| s.user)
            .map(|u| Identity { user: u.username.unwrap_or_default(), groups: u.groups.unwrap_or_default() });
        self.tokens.put(key, identity.clone(), TOKEN_LIFE);
        Ok(identity)
    }

    async fn allowed(
        &self,
        who: &Identity,
        verb: &'static str,
        subresource: &'static str,
    ) -> Result<bool, Refusal> {
        let question = (who.clone(), verb, subresource);
        if let Some(known) = self.answers.get(&question) {
            return Ok(known);
        }
        let Some(client) = &self.client else {
            let text = "no API server to ask; set authorization.mode: AlwaysAllow for a node without one";
            return Err(Refusal::new(StatusCode::FORBIDDEN, text));
        };
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(who.user.clone()),
                groups: Some(who.groups.clone()),
                resource_attributes: Some(ResourceAttributes {
                    verb: Some(verb.into()),
                    version: Some("v1".into()),
                    resource: Some("nodes".into()),
                    subresource: Some(subresource.into()),
                    name: Some(self.node.clone()),
                    ..Default::default()
                }),
                ..Default::default()
            },
            ..Default::default()
        };
        let api: Api<SubjectAccessReview> = Api::all(client.clone());
        let answer = api.create(&PostParams::default(), &review).await.map_err(|e| Refusal::internal(&e))?;
        let yes = answer.status.is_some_and(|s| s.allowed);
        self.answers.put(question, yes, if yes { ALLOWED_LIFE } else { DENIED_LIFE });
        Ok(yes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_map_to_node_subresources() {
        for (m, p, want) in [
            (Method::GET, "/containerLogs/n/p/c", ("get", "proxy")),
            (Method::POST, "/exec/n/p/c", ("create", "proxy")),
            (Method::GET, "/stats/summary", ("get", "stats")),
            (Method::GET, "/metrics/resource", ("get", "metrics")),
            (Method::GET, "/pods", ("get", "pods")),
        ] {
            assert_eq!(attributes(&m, p), want, "{p}");
        }
    }

    #[test]
    fn answers_expire() {
        let r = Remembered::new();
        r.put("a", 1, Duration::ZERO);
        r.put("b", 2, Duration::from_secs(60));
        assert_eq!((r.get(&"a"), r.get(&"b")), (None, Some(2)));
    }
}
