//! Volumes of pods: prepared before containers start, refreshed while they run, taken away afterwards.
//!
//! A volume lies at `<pod dir>/volumes/kubernetes.io~<kind>/<name>`, upstream's layout. Preparing is idempotent: the
//! same call makes, repairs after a restart, and refreshes.

pub mod atomic;
pub mod emptydir;
pub mod hostpath;
pub mod mounts;
pub mod payload;
pub mod subpath;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret, Volume};
use orlop_api::meta::Key;
use parking_lot::Mutex;

use crate::context::Context;
use crate::objects::{NotSynced, Objects};
use crate::spec::SpecError;
use crate::spec::field::NodeFacts;
use payload::TokenCache;

/// Why a volume cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{what} {path}", path = path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{kind} {name:?} not found")]
    NotFound { kind: &'static str, name: String },
    #[error("references non-existent {kind} key: {key}")]
    NoKey { kind: &'static str, key: String },
    #[error("hostPath type check failed: {path} is not {wanted}")]
    WrongType { path: String, wanted: &'static str },
    #[error("the path {0:?} leaves the volume")]
    Escapes(String),
    #[error("an emptyDir's medium {medium} {why}")]
    Medium { medium: String, why: String },
    #[error("volumes of this kind are not supported by this node: {0}")]
    Unsupported(String),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    NotSynced(#[from] NotSynced),
    #[error("cannot get a service-account token: {0}")]
    Token(String),
    #[error("this node runs without an API server: volumes of API objects cannot be used")]
    NoApi,
}

impl Error {
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { what, path, source }
    }
}

/// One volume, ready to be mounted into containers.
#[derive(Clone, Debug, PartialEq)]
pub enum Mounted {
    /// A file or folder on the host; `read_only` whatever the container asks for. `own`: made for the pod, not the node's.
    Host { path: PathBuf, read_only: bool, own: bool },
    /// An image that the runtime mounts itself.
    Image { reference: String, pull_policy: Option<String> },
}

/// All volumes of a pod by name, and when the next refresh is due at the latest.
#[derive(Clone, Debug, Default)]
pub struct PodVolumes {
    pub by_name: HashMap<String, Mounted>,
    pub refresh_at: Option<Timestamp>,
}

/// Prepares the volumes of all pods.
#[derive(Clone)]
pub struct Volumes {
    pub config_maps: Option<Objects<ConfigMap>>,
    pub secrets: Option<Objects<Secret>>,
    tokens: Arc<Mutex<TokenCache>>,
}

/// What preparing needs to know of the pod.
pub(crate) struct Job<'a> {
    pub ctx: &'a Context,
    pub pod: &'a Pod,
    pub uid: &'a str,
    pub namespace: &'a str,
    pub facts: &'a NodeFacts,
    pub volumes: &'a Volumes,
}

impl Job<'_> {
    pub fn fs_group(&self) -> Option<u32> {
        let c = self.pod.spec.as_ref()?.security_context.as_ref()?;
        c.fs_group.and_then(|g| u32::try_from(g).ok())
    }

    pub fn path(&self, kind: &str, name: &str) -> PathBuf {
        self.ctx.config.pod_dir(self.uid).join("volumes").join(format!("kubernetes.io~{kind}")).join(name)
    }

    pub async fn config_map(&self, name: &str) -> Result<Option<Arc<ConfigMap>>, Error> {
        let all = self.volumes.config_maps.as_ref().ok_or(Error::NoApi)?;
        Ok(all.get(self.uid, &Key::new(self.namespace, name)).await?)
    }

    pub async fn secret(&self, name: &str) -> Result<Option<Arc<Secret>>, Error> {
        let all = self.volumes.secrets.as_ref().ok_or(Error::NoApi)?;
        Ok(all.get(self.uid, &Key::new(self.namespace, name)).await?)
    }
}

impl Volumes {
    /// `on_change` is told the uid of each pod whose ConfigMap or Secret changed.
    pub fn new(
        client: Option<kube::Client>,
        tasks: &orlop_base::supervise::TaskGroup,
        on_change: impl Fn(&str) + Clone + Send + Sync + 'static,
    ) -> Volumes {
        Volumes {
            config_maps: client.clone().map(|c| Objects::new(c, tasks.clone(), on_change.clone())),
            secrets: client.map(|c| Objects::new(c, tasks.clone(), on_change)),
            tokens: Arc::default(),
        }
    }

    /// Makes, repairs or refreshes all volumes of a pod, at the same time. The error names the first volume that failed.
    pub async fn set_up(
        &self,
        ctx: &Context,
        pod: &Pod,
        facts: &NodeFacts,
    ) -> Result<PodVolumes, (String, Error)> {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let job = Job { ctx, pod, uid, namespace, facts, volumes: self };
        let used = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
        let one = |v: Volume| {
            let job = &job;
            async move {
                let name = v.name.clone();
                match set_up_one(job, &v).await {
                    Ok((mounted, refresh)) => Ok((name, mounted, refresh)),
                    Err(e) => Err((name, e)),
                }
            }
        };
        let all = futures::future::try_join_all(used.cloned().map(one)).await?;
        let mut out = PodVolumes::default();
        for (name, mounted, refresh) in all {
            out.by_name.insert(name, mounted);
            out.refresh_at = match (out.refresh_at, refresh) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
        Ok(out)
    }

    /// Unmounts and deletes all volumes of a pod. Files behind mounts are never deleted.
    pub async fn tear_down(&self, ctx: &Context, uid: &str) -> Result<(), Error> {
        self.forget(uid);
        let dir = ctx.config.pod_dir(uid);
        blocking(move || {
            mounts::unmount_below(&dir)?;
            for part in ["volumes", "volume-subpaths"] {
                mounts::remove_tree(&dir.join(part))?;
            }
            Ok(())
        })
        .await
    }

    /// Ends watches and tokens of a pod.
    pub fn forget(&self, uid: &str) {
        if let Some(o) = &self.config_maps {
            o.leave(uid);
        }
        if let Some(o) = &self.secrets {
            o.leave(uid);
        }
        self.tokens.lock().forget(uid);
    }
}

/// Runs file system work off the async threads.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(r) => r,
        Err(e) => Err(Error::Io { what: "work on", path: PathBuf::new(), source: io::Error::other(e) }),
    }
}

async fn set_up_one(job: &Job<'_>, v: &Volume) -> Result<(Mounted, Option<Timestamp>), Error> {
    let host = |path: PathBuf, own: bool| Mounted::Host { path, read_only: false, own };
    if let Some(e) = &v.empty_dir {
        let path = job.path("empty-dir", &v.name);
        let medium = match &job.pod.spec {
            Some(spec) => emptydir::Medium::of(e, spec)?,
            None => emptydir::Medium::Disk,
        };
        let (group, made) = (job.fs_group(), path.clone());
        blocking(move || emptydir::set_up(&made, medium, group)).await?;
        return Ok((host(path, true), None));
    }
    if let Some(h) = &v.host_path {
        let h = h.clone();
        let path = PathBuf::from(&h.path);
        blocking(move || hostpath::check(&h)).await?;
        return Ok((host(path, false), None));
    }
    if let Some(i) = &v.image {
        let reference = i.reference.clone().unwrap_or_default();
        return Ok((Mounted::Image { reference, pull_policy: i.pull_policy.clone() }, None));
    }
    let (kind, tmpfs) = match v {
        Volume { config_map: Some(_), .. } => ("configmap", false),
        Volume { secret: Some(_), .. } => ("secret", true),
        Volume { downward_api: Some(_), .. } => ("downward-api", false),
        Volume { projected: Some(p), .. } => {
            let secret =
                p.sources.iter().flatten().any(|s| s.secret.is_some() || s.service_account_token.is_some());
            ("projected", secret)
        }
        _ => return Err(Error::Unsupported(kind_of(v))),
    };
    let (files, refresh) = payload::collect(job, v).await?;
    let path = job.path(kind, &v.name);
    let (group, made) = (job.fs_group(), path.clone());
    blocking(move || {
        emptydir::make_dir(&made, 0o777)?;
        if tmpfs {
            emptydir::mount_tmpfs(&made, None)?;
        }
        atomic::write(&made, &files, group)?;
        Ok(())
    })
    .await?;
    Ok((Mounted::Host { path, read_only: true, own: true }, refresh))
}

/// The volume's kind as its field is called.
fn kind_of(v: &Volume) -> String {
    let json = serde_json::to_value(v).unwrap_or_default();
    let kind = json.as_object().into_iter().flatten().map(|(k, _)| k).find(|k| *k != "name");
    kind.cloned().unwrap_or_else(|| "no kind given".into())
}
