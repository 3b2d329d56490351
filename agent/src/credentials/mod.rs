//! Credentials from programs on the node (KEP-2133): each is asked for the images that it knows, with a request on its standard input.

mod config;
pub mod patterns;

use std::collections::{BTreeMap, HashMap};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use orlop_proto::cri::AuthConfig;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

use crate::config::{Config, parse_go_duration};
use crate::error::Error;
use config::Provider;
use patterns::{fits, repository};

/// A program may take as long as with upstream's kubelet.
const LIMIT: Duration = Duration::from_secs(60);
/// Credentials take a few kilobytes.
const OUTPUT: u64 = 1 << 20;

/// Credentials by the pattern of the images that they are for.
type Known = BTreeMap<String, Login>;

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
struct Login {
    username: String,
    password: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    api_version: String,
    kind: String,
    #[serde(default)]
    cache_key_type: String,
    cache_duration: Option<String>,
    auth: Option<Known>,
}

/// For which images an answer holds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Scope {
    Image(String),
    Registry(String),
    Global,
}

fn registry(repository: &str) -> String {
    repository.split('/').next().unwrap_or_default().to_owned()
}

struct Cached {
    until: Instant,
    known: Arc<Known>,
}

struct Source {
    provider: Provider,
    cache: Mutex<HashMap<Scope, Cached>>,
    /// Images that it is being asked for: others wait for the answer.
    asked: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

/// All programs of a node; a cheap handle.
#[derive(Clone, Default)]
pub struct CredentialProviders(Arc<Vec<Source>>);

/// What an answer says: the credentials, for what they hold, and for how long. Never says what stands in the text: it holds secrets. Pure.
fn understand(p: &Provider, text: &[u8], repository: &str) -> Result<(Known, Scope, Duration), String> {
    let r: Response =
        serde_json::from_slice(text).map_err(|_| "its answer is no CredentialProviderResponse".to_owned())?;
    if r.kind != "CredentialProviderResponse" || r.api_version != p.api_version {
        return Err(format!("its answer is a {} of {}, not of {}", r.kind, r.api_version, p.api_version));
    }
    let scope = match &*r.cache_key_type {
        "Image" => Scope::Image(repository.to_owned()),
        "Registry" => Scope::Registry(registry(repository)),
        "Global" => Scope::Global,
        other => return Err(format!("its answer's cacheKeyType is {other:?}")),
    };
    let holds = match r.cache_duration {
        Some(text) => {
            parse_go_duration(&text).ok_or_else(|| format!("its answer's cacheDuration is {text:?}"))?
        }
        None => p.cached,
    };
    Ok((r.auth.unwrap_or_default(), scope, holds))
}

async fn whole(from: Option<impl AsyncRead + Unpin>) -> Result<Vec<u8>, String> {
    let mut text = Vec::new();
    if let Some(from) = from {
        from.take(OUTPUT + 1).read_to_end(&mut text).await.map_err(|e| format!("its output breaks: {e}"))?;
    }
    if text.len() as u64 > OUTPUT {
        return Err(format!("it says more than {OUTPUT} bytes"));
    }
    Ok(text)
}

/// Runs the program once; it is killed when the answer is not waited for any more.
async fn run(p: &Provider, repository: &str) -> Result<Vec<u8>, String> {
    let request =
        json!({"apiVersion": p.api_version, "kind": "CredentialProviderRequest", "image": repository});
    let mut command = tokio::process::Command::new(&p.program);
    command.args(&p.args).envs(p.env.iter().map(|(k, v)| (k, v))).kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|e| format!("it does not start: {e}"))?;
    let (input, output, complaints) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let give = async move {
        if let Some(mut input) = input {
            // One that does not read its request knows what to answer.
            let _ = input.write_all(request.to_string().as_bytes()).await;
        }
        Ok(())
    };
    let (_, said, complaints) = tokio::try_join!(give, whole(output), whole(complaints))?;
    let status = child.wait().await.map_err(|e| format!("it cannot be waited for: {e}"))?;
    if !status.success() {
        let complaints = String::from_utf8_lossy(&complaints);
        let last: String = complaints.trim().lines().last().unwrap_or_default().chars().take(256).collect();
        return Err(format!("it ended with {status}: {last}"));
    }
    Ok(said)
}

impl Source {
    fn cached(&self, repository: &str) -> Option<Arc<Known>> {
        let (cache, now) = (self.cache.lock(), Instant::now());
        let scopes =
            [Scope::Image(repository.to_owned()), Scope::Registry(registry(repository)), Scope::Global];
        scopes.iter().find_map(|s| cache.get(s).filter(|c| c.until > now)).map(|c| c.known.clone())
    }

    /// What the program says of an image, now or before.
    async fn ask(&self, repository: &str) -> Result<Arc<Known>, String> {
        let turn = self.asked.lock().entry(repository.to_owned()).or_default().clone();
        let known = {
            let _turn = turn.lock().await;
            match self.cached(repository) {
                Some(known) => Ok(known),
                None => self.ask_anew(repository).await,
            }
        };
        drop(turn);
        self.asked.lock().retain(|_, t| Arc::strong_count(t) > 1);
        known
    }

    async fn ask_anew(&self, repository: &str) -> Result<Arc<Known>, String> {
        let said = tokio::time::timeout(LIMIT, run(&self.provider, repository)).await;
        let said = said.map_err(|_| format!("it did not answer within {LIMIT:?}"))??;
        let (known, scope, holds) = understand(&self.provider, &said, repository)?;
        let known = Arc::new(known);
        // Also what would hold for longer than time goes.
        if let Some(until) = Instant::now().checked_add(holds).filter(|_| !holds.is_zero()) {
            let mut cache = self.cache.lock();
            cache.retain(|_, c| c.until > Instant::now());
            cache.insert(scope, Cached { until, known: known.clone() });
        }
        Ok(known)
    }
}

impl CredentialProviders {
    /// As the configuration names them; none without one.
    pub fn read(config: &Config) -> Result<CredentialProviders, Error> {
        let (path, programs) =
            match (&config.image_credential_provider_config, &config.image_credential_provider_bin_dir) {
                (Some(path), Some(programs)) => (path, programs),
                (None, None) => return Ok(CredentialProviders::default()),
                (path, _) => {
                    let path = path.clone().unwrap_or_default();
                    let message = "a file and a folder of programs belong together; give both or none".into();
                    return Err(Error::CredentialProviders { path, message });
                }
            };
        let all = config::read(path, programs)?.into_iter();
        let all = all.map(|provider| Source { provider, cache: Mutex::default(), asked: Mutex::default() });
        Ok(CredentialProviders(Arc::new(all.collect())))
    }

    /// Credentials for an image, the most specific first. A program that fails is logged and passed over.
    pub async fn for_image(&self, image: &str) -> Vec<AuthConfig> {
        let repository = repository(image);
        let mut found = Vec::new();
        for source in self.0.iter() {
            if !source.provider.images.iter().any(|p| fits(p, &repository).is_some()) {
                continue;
            }
            match source.ask(&repository).await {
                Ok(known) => found.extend(known.iter().filter_map(|(pattern, login)| {
                    let auth = AuthConfig {
                        username: login.username.clone(),
                        password: login.password.clone(),
                        // No address, as upstream's kubelet: a runtime takes them for the image's registry.
                        ..Default::default()
                    };
                    Some((fits(pattern, &repository)?, auth))
                })),
                Err(error) => {
                    let provider = &source.provider.name;
                    tracing::warn!(provider, image, error, "credential provider gave nothing");
                }
            }
        }
        found.sort_by_key(|(rank, _)| std::cmp::Reverse(*rank));
        found.into_iter().map(|(_, auth)| auth).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    const VERSION: &str = "credentialprovider.kubelet.k8s.io/v1";

    /// A provider that is a script: run by the shell, not by itself, which another test's fork could hold open for writing.
    fn source(dir: &Path, script: &str, cached: Duration) -> CredentialProviders {
        let path = dir.join("script");
        std::fs::write(&path, script).unwrap();
        let provider = Provider {
            name: "sh".into(),
            program: "/bin/sh".into(),
            images: vec!["*.test".into()],
            cached,
            api_version: VERSION.into(),
            args: vec![path.to_string_lossy().into_owned()],
            env: vec![("DIR".into(), dir.to_string_lossy().into_owned())],
        };
        CredentialProviders(Arc::new(vec![Source {
            provider,
            cache: Mutex::default(),
            asked: Mutex::default(),
        }]))
    }

    /// Answers for the image that it is asked for; counts how often.
    fn answering(scope: &str, more: &str) -> String {
        format!(
            "cat >$DIR/request; echo x >>$DIR/asked\nprintf '{{\"apiVersion\": \"{VERSION}\", \"kind\": \"CredentialProviderResponse\", \"cacheKeyType\": \"{scope}\", {more} \
             \"auth\": {{\"*.test\": {{\"username\": \"wide\", \"password\": \"w\"}}, \"reg.test/team\": {{\"username\": \"team\", \"password\": \"t\"}}}}}}'\n"
        )
    }

    async fn users(p: &CredentialProviders, image: &str) -> Vec<String> {
        p.for_image(image).await.into_iter().map(|a| format!("{}:{}", a.username, a.password)).collect()
    }

    fn asked(dir: &Path) -> usize {
        std::fs::read_to_string(dir.join("asked")).map_or(0, |t| t.lines().count())
    }

    #[tokio::test]
    async fn a_program_is_asked_for_its_images_alone() {
        let t = tempfile::tempdir().unwrap();
        let p = source(t.path(), &answering("Image", ""), Duration::ZERO);
        assert_eq!(users(&p, "reg.test/team/app:1").await, ["team:t", "wide:w"]);
        let request: serde_json::Value =
            serde_json::from_slice(&std::fs::read(t.path().join("request")).unwrap()).unwrap();
        let wanted =
            json!({"apiVersion": VERSION, "kind": "CredentialProviderRequest", "image": "reg.test/team/app"});
        assert_eq!(request, wanted);
        assert_eq!(users(&p, "reg.test/other:1").await, ["wide:w"]);
        assert!(p.for_image("reg.test/other:1").await.iter().all(|a| a.server_address.is_empty()));
        assert!(users(&p, "busybox").await.is_empty());
        assert_eq!(asked(t.path()), 3, "not for others' images, and nothing was kept");
    }

    #[tokio::test]
    async fn answers_are_kept_as_far_as_they_say() {
        let images = ["reg.test/a:1", "reg.test/a:2", "reg.test/b", "other.test/a"];
        for (scope, more, cached, wanted) in [
            ("Image", "", 60, 3),
            ("Registry", "", 60, 2),
            ("Global", "", 60, 1),
            ("Global", "", 0, 4),
            ("Global", "\"cacheDuration\": \"0s\",", 60, 4),
            ("Image", "\"cacheDuration\": \"1h\",", 0, 3),
        ] {
            let t = tempfile::tempdir().unwrap();
            let p = source(t.path(), &answering(scope, more), Duration::from_secs(cached));
            for image in images {
                assert_eq!(users(&p, image).await, ["wide:w"]);
            }
            assert_eq!(asked(t.path()), wanted, "{scope} {more} {cached}");
        }
    }

    #[tokio::test]
    async fn many_pods_of_an_image_ask_once() {
        let t = tempfile::tempdir().unwrap();
        let p = source(t.path(), &answering("Image", ""), Duration::from_secs(60));
        let all = futures::future::join_all((0..10).map(|_| users(&p, "reg.test/a"))).await;
        assert!(all.iter().all(|u| *u == ["wide:w"]), "{all:?}");
        assert_eq!((asked(t.path()), p.0[0].asked.lock().len()), (1, 0));
    }

    #[tokio::test]
    async fn a_program_that_fails_gives_nothing_and_is_asked_again() {
        let good = answering("Global", "");
        for (script, says) in [
            ("echo no login >&2; exit 3".to_owned(), "exit status: 3: no login"),
            ("echo '{'".to_owned(), "no CredentialProviderResponse"),
            (good.replace("/v1\"", "/v1beta1\""), "not of credentialprovider.kubelet.k8s.io/v1"),
            (good.replace("Global", "World"), "cacheKeyType is \"World\""),
            (good.replace("\"auth\"", "\"cacheDuration\": \"soon\", \"auth\""), "cacheDuration is \"soon\""),
            ("dd if=/dev/zero bs=1M count=2 2>/dev/null".to_owned(), "says more than 1048576 bytes"),
        ] {
            let t = tempfile::tempdir().unwrap();
            let p = source(t.path(), &script, Duration::from_secs(60));
            let said = p.0[0].ask("reg.test/a").await.err().unwrap();
            assert!(said.contains(says) && !said.contains("wide"), "{script}: {said}");
            assert!(users(&p, "reg.test/a").await.is_empty());
            std::fs::write(t.path().join("script"), &good).unwrap();
            assert_eq!(users(&p, "reg.test/a").await, ["wide:w"]);
        }
        let nobody =
            answering("Global", "").split("\"auth\"").next().unwrap().to_owned() + "\"auth\": null}'";
        let t = tempfile::tempdir().unwrap();
        let p = source(t.path(), &nobody, Duration::ZERO);
        assert!(p.0[0].ask("reg.test/a").await.unwrap().is_empty(), "it knows none");
    }
}
