//! Making sure of images: pull policies, credentials, back-off, events; and collecting unused images.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use k8s_openapi::api::core::v1::{Container, Pod, Secret};
use orlop_api::backoff::Backoff;
use orlop_proto::cri::{
    AuthConfig, Image, ImageSpec, ImageStatusRequest, ListImagesRequest, PodSandboxConfig, PullImageRequest,
    RemoveImageRequest,
};
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::sync::Semaphore;

use crate::context::Context;
use crate::credentials::CredentialProviders;
use crate::credentials::patterns::fits;
use crate::pods::ContainerKind;
use crate::pods::state::Waiting;
use crate::spec::security::ImageUser;

/// Pulls at the same time unless configured: more only share the same network.
const PARALLEL: usize = 8;

struct Trouble {
    failures: u32,
    until: Instant,
    message: String,
}

/// Shared by all pods.
#[derive(Clone)]
pub struct Images {
    pulls: Arc<Semaphore>,
    trouble: Arc<Mutex<HashMap<String, Trouble>>>,
    /// When each image was last seen in use, by id.
    used: Arc<Mutex<HashMap<String, Instant>>>,
    providers: CredentialProviders,
}

/// An image that is present.
#[derive(Clone, Debug, PartialEq)]
pub struct Present {
    /// What to create the container with.
    pub reference: String,
    pub user: ImageUser,
}

/// The effective pull policy: `Always` for `latest` or no tag.
pub fn policy(c: &Container) -> &str {
    if let Some(p) = c.image_pull_policy.as_deref().filter(|p| !p.is_empty()) {
        return p;
    }
    let image = c.image.as_deref().unwrap_or_default();
    let last = image.rsplit('/').next().unwrap_or(image);
    let tag = if last.contains('@') { Some("") } else { last.split_once(':').map(|(_, t)| t) };
    if tag.is_none_or(|t| t == "latest") { "Always" } else { "IfNotPresent" }
}

/// Reason and message for the container's status: runtimes say by the first word whose fault it is (cri-api's errors). Pure.
fn blame(image: &str, message: String) -> (&'static str, String) {
    let known = [
        ("RegistryUnavailable", "because the registry is unavailable"),
        ("SignatureValidationFailed", "because the signature validation failed"),
    ];
    for (word, why) in known {
        if let Some(rest) = message.strip_prefix(word) {
            return (word, format!("image pull failed for {image} {why}{rest}"));
        }
    }
    ("ErrImagePull", message)
}

/// Images that nobody has used for `age`, the longest unused first: when that was, their ids and sizes. `used` remembers when each was last seen in
/// use, or first seen at all. Pure.
fn unused(
    images: &[Image],
    in_use: &HashSet<String>,
    used: &mut HashMap<String, Instant>,
    now: Instant,
    age: Duration,
) -> Vec<(Instant, String, u64)> {
    let ids: HashSet<&String> = images.iter().map(|i| &i.id).collect();
    used.retain(|id, _| ids.contains(id));
    let mut found = Vec::new();
    for i in images {
        let held =
            in_use.contains(&i.id) || i.repo_tags.iter().chain(&i.repo_digests).any(|n| in_use.contains(n));
        let last = used.entry(i.id.clone()).or_insert(now);
        if held {
            *last = now;
        } else if !i.pinned && now.duration_since(*last) >= age {
            found.push((*last, i.id.clone(), i.size));
        }
    }
    found.sort();
    found
}

impl Images {
    pub fn new(parallel: Option<u32>, providers: CredentialProviders) -> Images {
        let permits = parallel.map_or(PARALLEL, |p| p.max(1) as usize);
        Images {
            pulls: Arc::new(Semaphore::new(permits)),
            trouble: Arc::default(),
            used: Arc::default(),
            providers,
        }
    }

    async fn status(&self, ctx: &Context, image: &str) -> Result<Option<Present>, Waiting> {
        let spec = ImageSpec { image: image.to_owned(), ..Default::default() };
        let request = ImageStatusRequest { image: Some(spec), verbose: false };
        let found = ctx.cri.image_status(request).await.map_err(|e| Waiting {
            reason: "ImageInspectError".into(),
            message: format!("Failed to inspect image {image:?}: {}", e.message()),
        })?;
        Ok(found.image.map(|i| Present {
            reference: i.id,
            user: ImageUser { uid: i.uid.map(|v| v.value), name: i.username },
        }))
    }

    /// Makes sure of a container's image. The error is what its status shows while it waits.
    pub async fn ensure(
        &self,
        ctx: &Context,
        pod: &Pod,
        (c, kind): (&Container, ContainerKind),
        sandbox: PodSandboxConfig,
    ) -> Result<Present, Waiting> {
        let image = c.image.clone().unwrap_or_default();
        let policy = policy(c);
        let present = self.status(ctx, &image).await?;
        match (policy, present) {
            ("Never", None) => {
                let message = format!("Container image {image:?} is not present with pull policy of Never");
                ctx.events.container_warning(pod, (&c.name, kind), "ErrImageNeverPull", message.clone());
                return Err(Waiting { reason: "ErrImageNeverPull".into(), message });
            }
            ("Never" | "IfNotPresent", Some(p)) => {
                let message = format!(
                    "Container image {image:?} already present on machine and can be accessed by the pod"
                );
                ctx.events.container(pod, (&c.name, kind), "Pulled", message);
                return Ok(p);
            }
            _ => {}
        }
        let backed_off = {
            let trouble = self.trouble.lock();
            trouble.get(&image).filter(|t| t.until > Instant::now()).map(|t| t.message.clone())
        };
        if let Some(message) = backed_off {
            let text = format!("Back-off pulling image {image:?}");
            ctx.events.container(pod, (&c.name, kind), "BackOff", text.clone());
            return Err(Waiting { reason: "ImagePullBackOff".into(), message: format!("{text}: {message}") });
        }
        ctx.events.container(pod, (&c.name, kind), "Pulling", format!("Pulling image {image:?}"));
        let started = Instant::now();
        match self.pull(ctx, pod, &image, sandbox).await {
            Ok(reference) => {
                self.trouble.lock().remove(&image);
                let took = started.elapsed();
                let message = format!("Successfully pulled image {image:?} in {}ms", took.as_millis());
                ctx.events.container(pod, (&c.name, kind), "Pulled", message);
                let present = self.status(ctx, &reference).await?;
                Ok(present.unwrap_or(Present { reference, user: ImageUser::default() }))
            }
            Err(message) => {
                ctx.events.container_warning(
                    pod,
                    (&c.name, kind),
                    "Failed",
                    format!("Failed to pull image {image:?}: {message}"),
                );
                let (reason, message) = blame(&image, message);
                self.failed(&image, &format!("{reason}: {message}"));
                ctx.events.container_warning(pod, (&c.name, kind), "Failed", format!("Error: {reason}"));
                Err(Waiting { reason: reason.into(), message })
            }
        }
    }

    fn failed(&self, image: &str, message: &str) {
        let mut trouble = self.trouble.lock();
        // Images nobody asks for any more need no memory.
        trouble.retain(|_, t| t.until + Duration::from_secs(600) > Instant::now());
        let failures = trouble.get(image).map_or(0, |t| t.failures) + 1;
        let until = Instant::now() + Backoff::CRASH_LOOP.delay(failures);
        trouble.insert(image.to_owned(), Trouble { failures, until, message: message.to_owned() });
    }

    /// How long to wait before asking for an image again.
    pub fn retry_in(&self, image: &str) -> Duration {
        let trouble = self.trouble.lock();
        trouble
            .get(image)
            .map_or(Duration::from_secs(10), |t| t.until.saturating_duration_since(Instant::now()))
    }

    async fn pull(
        &self,
        ctx: &Context,
        pod: &Pod,
        image: &str,
        sandbox: PodSandboxConfig,
    ) -> Result<String, String> {
        let mut known = credentials(ctx, pod, image).await;
        known.extend(self.providers.for_image(image).await);
        let mut tries: Vec<Option<AuthConfig>> = known.into_iter().map(Some).collect();
        tries.push(None);
        // A program that is slow to say its credentials holds up no other image.
        let _permit = self.pulls.acquire().await.map_err(|e| e.to_string())?;
        let spec = ImageSpec { image: image.to_owned(), ..Default::default() };
        let mut last = String::new();
        for auth in tries {
            let request =
                PullImageRequest { image: Some(spec.clone()), auth, sandbox_config: Some(sandbox.clone()) };
            match ctx.cri.pull_image(request).await {
                Ok(r) => return Ok(r.image_ref),
                Err(e) => last = e.message(),
            }
        }
        Err(last)
    }

    /// Notes that an image is in use now.
    pub fn touch(&self, id: &str) {
        self.used.lock().insert(id.to_owned(), Instant::now());
    }

    /// Deletes unused images, least recently used first, until `free` bytes are won. Gives what was won.
    pub async fn collect(&self, ctx: &Context, free: u64, min_age: Duration) -> u64 {
        let Ok(list) = ctx.cri.list_images(ListImagesRequest { filter: None }).await else { return 0 };
        let containers = ctx.cri.list_containers(Default::default()).await.map(|r| r.containers);
        let Ok(containers) = containers else { return 0 };
        let in_use: HashSet<String> = containers
            .into_iter()
            .flat_map(|c| [c.image_ref, c.image_id, c.image.map(|i| i.image).unwrap_or_default()])
            .collect();
        let candidates = unused(&list.images, &in_use, &mut self.used.lock(), Instant::now(), min_age);
        let mut won = 0;
        for (_, id, size) in candidates {
            if won >= free {
                break;
            }
            let image = Some(ImageSpec { image: id.clone(), ..Default::default() });
            match ctx.cri.remove_image(RemoveImageRequest { image }).await {
                Ok(_) => {
                    won += size;
                    tracing::info!(image = %id, bytes = size, "unused image deleted");
                }
                Err(e) => tracing::warn!(image = %id, error = %e.message(), "unused image not deleted"),
            }
        }
        won
    }
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, DockerAuth>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct DockerAuth {
    username: String,
    password: String,
    auth: String,
    identitytoken: String,
    registrytoken: String,
}

/// Credentials in a docker config (or the older dockercfg) that serve an image, the most specific first.
fn matching(secret: &Secret, image: &str) -> Vec<(usize, AuthConfig)> {
    let data = secret.data.as_ref();
    let bytes = |k: &str| data.and_then(|d| d.get(k)).map(|b| b.0.as_slice());
    let auths = match (bytes(".dockerconfigjson"), bytes(".dockercfg")) {
        (Some(json), _) => serde_json::from_slice::<DockerConfig>(json).map(|c| c.auths).unwrap_or_default(),
        (None, Some(json)) => serde_json::from_slice(json).unwrap_or_default(),
        _ => BTreeMap::new(),
    };
    let usable = auths.into_iter().filter_map(|(server, a)| {
        let rank = fits(&server, image)?;
        let decoded = base64::engine::general_purpose::STANDARD.decode(a.auth.trim()).unwrap_or_default();
        let decoded = String::from_utf8(decoded).unwrap_or_default();
        let (user, password) = decoded.split_once(':').unwrap_or_default();
        let pick = |own: String, other: &str| if own.is_empty() { other.to_owned() } else { own };
        Some((
            rank,
            AuthConfig {
                username: pick(a.username, user),
                password: pick(a.password, password),
                identity_token: a.identitytoken,
                registry_token: a.registrytoken,
                // No address, as upstream's kubelet: a key may have wildcards or a path, and a runtime that compares it with the
                // registry's name would then not use them.
                ..Default::default()
            },
        ))
    });
    usable.collect()
}

async fn credentials(ctx: &Context, pod: &Pod, image: &str) -> Vec<AuthConfig> {
    let Some(secrets) = &ctx.volumes.secrets else { return Vec::new() };
    let (uid, namespace) =
        (pod.metadata.uid.clone().unwrap_or_default(), pod.metadata.namespace.clone().unwrap_or_default());
    let mut found = Vec::new();
    for r in pod.spec.iter().flat_map(|s| s.image_pull_secrets.iter().flatten()) {
        let key = orlop_api::meta::Key::new(namespace.clone(), r.name.clone());
        match secrets.get(&uid, &key).await {
            Ok(Some(s)) => found.extend(matching(&s, image)),
            Ok(None) => {
                let message = format!(
                    "Unable to retrieve some image pull secrets ({}); attempting to pull the image may not succeed.",
                    r.name
                );
                ctx.events.pod_warning(pod, "FailedToRetrieveImagePullSecret", message);
            }
            Err(e) => tracing::warn!(error = %e, "pull secret not read"),
        }
    }
    found.sort_by_key(|(rank, _)| std::cmp::Reverse(*rank));
    found.into_iter().map(|(_, a)| a).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn whose_fault_a_failed_pull_is() {
        let of = |message: &str| blame("a:1", message.to_owned());
        assert_eq!(
            of("RegistryUnavailable: no route"),
            (
                "RegistryUnavailable",
                "image pull failed for a:1 because the registry is unavailable: no route".to_owned()
            )
        );
        let (reason, message) = of("SignatureValidationFailed: not signed");
        assert_eq!(reason, "SignatureValidationFailed");
        assert!(message.ends_with("the signature validation failed: not signed"), "{message}");
        assert_eq!(of("no such image"), ("ErrImagePull", "no such image".to_owned()));
    }

    #[test]
    fn images_grow_old_when_nobody_uses_them() {
        let image = |id: &str, tag: &str, pinned| Image {
            id: id.into(),
            repo_tags: vec![tag.into()],
            size: 5,
            pinned,
            ..Default::default()
        };
        let all = [image("1", "a:1", false), image("2", "b:1", false), image("3", "c:1", true)];
        let (start, hour) = (Instant::now(), Duration::from_secs(3600));
        let mut used = HashMap::from([("gone".to_owned(), start)]);
        let mut look = |at: u32, in_use: &[&str], images: &[Image]| {
            let in_use = in_use.iter().map(|n| (*n).to_owned()).collect();
            let found = unused(images, &in_use, &mut used, start + hour * at, hour * 2);
            found.into_iter().map(|(_, id, _)| id).collect::<Vec<_>>()
        };
        assert!(look(0, &[], &all).is_empty(), "first seen");
        assert!(look(1, &["a:1"], &all).is_empty());
        assert_eq!(
            look(2, &[], &all),
            ["2"],
            "a tag in use holds its image, and nobody deletes what is pinned"
        );
        assert_eq!(look(3, &[], &all), ["2", "1"], "the longest unused first");
        assert!(look(4, &["1", "2"], &all).is_empty());
        assert!(look(4, &[], &[]).is_empty());
        assert!(look(9, &[], &all).is_empty(), "gone and pulled again");
    }

    #[test]
    fn policies() {
        let of =
            |image: &str| policy(&Container { image: Some(image.into()), ..Default::default() }).to_owned();
        assert_eq!(of("a"), "Always");
        assert_eq!(of("host:5000/a"), "Always");
        assert_eq!(of("host:5000/a:latest"), "Always");
        assert_eq!(of("a:1"), "IfNotPresent");
        assert_eq!(of("a@sha256:00"), "IfNotPresent");
    }

    #[test]
    fn the_most_specific_credentials_come_first() {
        let config = json!({"auths": {
            "https://index.docker.io/v1/": {"auth": "dTpw"},
            "reg.example": {"username": "host", "password": "x"},
            "reg.example/team": {"username": "team", "password": "x"},
            "*.example": {"username": "wild", "password": "x"}}});
        let secret: Secret = serde_json::from_value(json!({"data": {".dockerconfigjson":
            base64::engine::general_purpose::STANDARD.encode(config.to_string())}}))
        .unwrap();
        let users = |image: &str| {
            let mut m = matching(&secret, image);
            m.sort_by_key(|(r, _)| std::cmp::Reverse(*r));
            m.into_iter().map(|(_, a)| a.username).collect::<Vec<_>>()
        };
        assert_eq!(users("reg.example/team/a:1"), ["team", "host", "wild"]);
        assert_eq!(users("reg.example/teams/a:1"), ["host", "wild"]);
        assert_eq!(users("busybox"), ["u"]);
        let addresses = |image: &str| {
            matching(&secret, image).into_iter().map(|(_, a)| a.server_address).collect::<String>()
        };
        assert_eq!(
            addresses("reg.example/team/a:1") + &addresses("busybox"),
            "",
            "a runtime might not recognize the image's registry"
        );
        assert!(users("other.test/a").is_empty());
    }
}
