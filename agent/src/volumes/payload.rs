//! The files of configMap, secret, downwardAPI and projected volumes.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{
    ConfigMap, DownwardAPIVolumeFile, KeyToPath, Secret, ServiceAccount, ServiceAccountTokenProjection,
    Volume,
};
use kube::Api;
use kube::api::PostParams;

use super::atomic::{File, Files};
use super::{Error, Job};
use crate::pods::find_container;
use crate::spec::field;

const DEFAULT_MODE: i32 = 0o644;

type Collected = Result<(Files, Option<Timestamp>), Error>;

/// All files of a volume, and when it has to be collected again at the latest.
pub(crate) async fn collect(job: &Job<'_>, v: &Volume) -> Collected {
    let mut files = Files::new();
    let mut refresh = None;
    if let Some(s) = &v.config_map {
        let mode = s.default_mode.unwrap_or(DEFAULT_MODE);
        config_map(job, &s.name, s.items.as_deref(), s.optional == Some(true), mode, &mut files).await?;
    } else if let Some(s) = &v.secret {
        let mode = s.default_mode.unwrap_or(DEFAULT_MODE);
        let name = s.secret_name.clone().unwrap_or_default();
        secret(job, &name, s.items.as_deref(), s.optional == Some(true), mode, &mut files).await?;
    } else if let Some(s) = &v.downward_api {
        downward(job, s.items.as_deref(), s.default_mode.unwrap_or(DEFAULT_MODE), &mut files)?;
    } else if let Some(p) = &v.projected {
        let mode = p.default_mode.unwrap_or(DEFAULT_MODE);
        for s in p.sources.iter().flatten() {
            if let Some(c) = &s.config_map {
                config_map(job, &c.name, c.items.as_deref(), c.optional == Some(true), mode, &mut files)
                    .await?;
            } else if let Some(c) = &s.secret {
                secret(job, &c.name, c.items.as_deref(), c.optional == Some(true), mode, &mut files).await?;
            } else if let Some(d) = &s.downward_api {
                downward(job, d.items.as_deref(), mode, &mut files)?;
            } else if let Some(t) = &s.service_account_token {
                let at = token(job, t, mode, &mut files).await?;
                refresh = Some(refresh.map_or(at, |r: Timestamp| r.min(at)));
            } else {
                return Err(Error::Unsupported(
                    "a projected source other than configMap, secret, downwardAPI and serviceAccountToken"
                        .into(),
                ));
            }
        }
    }
    Ok((files, refresh))
}

fn pick(
    kind: &'static str,
    data: BTreeMap<String, Vec<u8>>,
    items: Option<&[KeyToPath]>,
    optional: bool,
    default_mode: i32,
    files: &mut Files,
) -> Result<(), Error> {
    let file = |data: Vec<u8>, mode: i32| File { data, mode: mode as u32 & 0o777, uid: None };
    let Some(items) = items.filter(|i| !i.is_empty()) else {
        files.extend(data.into_iter().map(|(k, v)| (k, file(v, default_mode))));
        return Ok(());
    };
    for item in items {
        match data.get(&item.key) {
            Some(v) => {
                files.insert(item.path.clone(), file(v.clone(), item.mode.unwrap_or(default_mode)));
            }
            None if optional => {}
            None => return Err(Error::NoKey { kind, key: item.key.clone() }),
        }
    }
    Ok(())
}

async fn config_map(
    job: &Job<'_>,
    name: &str,
    items: Option<&[KeyToPath]>,
    optional: bool,
    mode: i32,
    files: &mut Files,
) -> Result<(), Error> {
    let data = match job.config_map(name).await? {
        Some(m) => config_map_data(&m),
        None if optional => BTreeMap::new(),
        None => return Err(Error::NotFound { kind: "configmap", name: name.to_owned() }),
    };
    pick("config", data, items, optional, mode, files)
}

fn config_map_data(m: &ConfigMap) -> BTreeMap<String, Vec<u8>> {
    let text = m.data.iter().flatten().map(|(k, v)| (k.clone(), v.clone().into_bytes()));
    text.chain(m.binary_data.iter().flatten().map(|(k, v)| (k.clone(), v.0.clone()))).collect()
}

fn secret_data(s: &Secret) -> BTreeMap<String, Vec<u8>> {
    s.data.iter().flatten().map(|(k, v)| (k.clone(), v.0.clone())).collect()
}

async fn secret(
    job: &Job<'_>,
    name: &str,
    items: Option<&[KeyToPath]>,
    optional: bool,
    mode: i32,
    files: &mut Files,
) -> Result<(), Error> {
    let data = match job.secret(name).await? {
        Some(s) => secret_data(&s),
        None if optional => BTreeMap::new(),
        None => return Err(Error::NotFound { kind: "secret", name: name.to_owned() }),
    };
    pick("secret", data, items, optional, mode, files)
}

fn downward(
    job: &Job<'_>,
    items: Option<&[DownwardAPIVolumeFile]>,
    default_mode: i32,
    files: &mut Files,
) -> Result<(), Error> {
    for item in items.into_iter().flatten() {
        let text = if let Some(f) = &item.field_ref {
            field::field(job.pod, &f.field_path, job.facts)?
        } else if let Some(r) = &item.resource_field_ref {
            let name = r.container_name.as_deref().unwrap_or_default();
            let (c, _) = find_container(job.pod, name).ok_or_else(|| {
                crate::spec::SpecError::UnknownResource(r.resource.clone(), name.to_owned())
            })?;
            field::resource(&c, r, job.facts)?
        } else {
            continue;
        };
        let mode = item.mode.unwrap_or(default_mode) as u32 & 0o777;
        files.insert(item.path.clone(), File { data: text.into_bytes(), mode, uid: None });
    }
    Ok(())
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct TokenKey {
    uid: String,
    account: String,
    audience: Option<String>,
    seconds: Option<i64>,
}

struct Token {
    text: String,
    refresh_at: Timestamp,
}

/// Tokens of pods, so that a refresh asks for a new one only when it is time.
#[derive(Default)]
pub struct TokenCache {
    tokens: HashMap<TokenKey, Token>,
}

impl TokenCache {
    pub fn forget(&mut self, uid: &str) {
        self.tokens.retain(|k, _| k.uid != uid);
    }
}

/// When to replace a token: after 80 % of its life, at the latest after a day.
pub fn refresh_time(now: Timestamp, expires: Timestamp) -> Timestamp {
    let life = expires.duration_since(now);
    let early = SignedDuration::from_secs(life.as_secs() * 8 / 10).min(SignedDuration::from_hours(24));
    now + early.max(SignedDuration::from_secs(10))
}

/// The user all containers of the pod run as, if it is one and the same: it owns the token then.
fn only_user(job: &Job<'_>) -> Option<u32> {
    let spec = job.pod.spec.as_ref()?;
    let of_pod = spec.security_context.as_ref().and_then(|c| c.run_as_user);
    let all = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let mut users = all.map(|c| c.security_context.as_ref().and_then(|s| s.run_as_user).or(of_pod));
    let first = users.next()??;
    users.all(|u| u == Some(first)).then(|| u32::try_from(first).ok()).flatten()
}

async fn token(
    job: &Job<'_>,
    t: &ServiceAccountTokenProjection,
    default_mode: i32,
    files: &mut Files,
) -> Result<Timestamp, Error> {
    let account = job
        .pod
        .spec
        .as_ref()
        .and_then(|s| s.service_account_name.clone())
        .unwrap_or_else(|| "default".into());
    let key = TokenKey {
        uid: job.uid.to_owned(),
        account,
        audience: t.audience.clone(),
        seconds: t.expiration_seconds,
    };
    let now = Timestamp::now();
    let cached = {
        let cache = job.volumes.tokens.lock();
        cache.tokens.get(&key).filter(|t| t.refresh_at > now).map(|t| (t.text.clone(), t.refresh_at))
    };
    let (text, refresh_at) = match cached {
        Some(hit) => hit,
        None => {
            let (text, refresh_at) = request(job, &key, now).await?;
            let token = Token { text: text.clone(), refresh_at };
            job.volumes.tokens.lock().tokens.insert(key, token);
            (text, refresh_at)
        }
    };
    let (mode, uid) = match (job.fs_group(), only_user(job)) {
        (Some(_), _) => (0o600, None),
        (None, Some(user)) => (0o600, Some(user)),
        (None, None) => (default_mode as u32 & 0o777, None),
    };
    files.insert(t.path.clone(), File { data: text.into_bytes(), mode, uid });
    Ok(refresh_at)
}

async fn request(job: &Job<'_>, key: &TokenKey, now: Timestamp) -> Result<(String, Timestamp), Error> {
    let client = job.ctx.client.clone().ok_or(Error::NoApi)?;
    let api: Api<ServiceAccount> = Api::namespaced(client, job.namespace);
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            audiences: Some(key.audience.iter().cloned().collect()),
            expiration_seconds: Some(key.seconds.unwrap_or(3600)),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                name: job.pod.metadata.name.clone(),
                uid: job.pod.metadata.uid.clone(),
            }),
        }),
        ..Default::default()
    };
    let params = PostParams::default();
    let made = api.create_token_request(&key.account, &params, &request);
    let made = tokio::time::timeout(Duration::from_secs(10), made)
        .await
        .map_err(|_| Error::Token("the API server did not answer within 10 s".into()))?
        .map_err(|e| Error::Token(orlop_base::telemetry::chain(&e)))?;
    let (text, expires) = made
        .status
        .and_then(|s| s.token.zip(s.expiration_timestamp))
        .ok_or_else(|| Error::Token("the answer has no token".into()))?;
    Ok((text, refresh_time(now, expires.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_replaced_in_time() {
        let now = Timestamp::from_second(1000).unwrap();
        let at = |secs: i64| refresh_time(now, now + SignedDuration::from_secs(secs)).as_second() - 1000;
        assert_eq!(at(3600), 2880);
        assert_eq!(at(365 * 86400), 86400);
        assert_eq!(at(1), 10);
    }

    #[test]
    fn items_choose_rename_and_set_modes() {
        let data = BTreeMap::from([("a".to_owned(), b"1".to_vec()), ("b".to_owned(), b"2".to_vec())]);
        let item = |key: &str, path: &str, mode| KeyToPath { key: key.into(), path: path.into(), mode };
        let mut files = Files::new();
        pick("config", data.clone(), Some(&[item("a", "x/y", Some(0o400))]), false, 0o644, &mut files)
            .unwrap();
        assert_eq!(files.keys().collect::<Vec<_>>(), ["x/y"]);
        assert_eq!(files["x/y"].mode, 0o400);
        let missing = pick("config", data.clone(), Some(&[item("z", "z", None)]), false, 0o644, &mut files);
        assert_eq!(missing.unwrap_err().to_string(), "references non-existent config key: z");
        files.clear();
        pick("config", data, None, false, 0o640, &mut files).unwrap();
        assert_eq!((files.len(), files["b"].mode), (2, 0o640));
    }
}
