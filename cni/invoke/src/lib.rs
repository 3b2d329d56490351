//! The caller's side of the Container Network Interface: finds the network configuration, runs its plugins by the
//! execution protocol and remembers what they gave (specification 1.1.0).

mod builtin;
mod cache;
mod config;
mod error;
mod exec;
mod locks;
mod neighbours;
mod pod;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cache::{Cache, Entry};
pub use error::{Error, Stderr};
use locks::{Held, Locks};
pub use neighbours::Neighbours;
pub use orlop_cni_types::{Attachment, Bandwidth, Builtin, CniResult, DnsConfig, IpRange, PortMapping};
use orlop_cni_types::{Call, Command, NetworkConfig, SpecVersion, VALID_ATTACHMENTS, VersionResult, code};
pub use pod::PodNetwork;
use serde_json::{Map, Value};

type Result<T, E = Error> = std::result::Result<T, E>;

/// How long one run of a plugin may take before it is killed.
const PLUGIN_LIMIT: Duration = Duration::from_secs(60);
/// How long STATUS may take: it is asked for within the CRI's Status, and a kubelet that waits half a minute for that takes the whole
/// runtime for dead.
const STATUS_LIMIT: Duration = Duration::from_secs(10);

/// What serves a type.
enum Plugin<'a> {
    Program(PathBuf),
    Builtin(&'a Builtin),
}

/// A handle to the node's pod network. Clones share their locks.
#[derive(Clone, Debug)]
pub struct Cni {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    conf_dir: PathBuf,
    bin_dirs: Vec<PathBuf>,
    cache: Cache,
    cache_dir: PathBuf,
    neighbours: Neighbours,
    limit: Duration,
    locks: Locks,
    builtin: Option<Builtin>,
}

impl Cni {
    /// Reads configurations from `conf_dir` (usually `/etc/cni/net.d`), plugins from the first of `bin_dirs` that has
    /// them (usually `/opt/cni/bin`), and keeps results in `cache_dir`. Touches nothing yet.
    pub fn new(conf_dir: impl Into<PathBuf>, bin_dirs: Vec<PathBuf>, cache_dir: impl AsRef<Path>) -> Cni {
        Self::with_limit(conf_dir, bin_dirs, cache_dir, PLUGIN_LIMIT)
    }

    /// [`Cni::new`] with another limit for one run of a plugin.
    pub fn with_limit(
        conf_dir: impl Into<PathBuf>,
        bin_dirs: Vec<PathBuf>,
        cache_dir: impl AsRef<Path>,
        limit: Duration,
    ) -> Cni {
        Self::among(conf_dir, bin_dirs, cache_dir, limit, Neighbours::default(), None)
    }

    /// [`Cni::with_limit`] on a machine where others may use the same networks. `builtin` serves its type, unless one of `bin_dirs`
    /// before its own has a program of that name. It keeps to `limit` itself and goes on when a call is dropped: the next
    /// operation on its container waits for it.
    pub fn among(
        conf_dir: impl Into<PathBuf>,
        bin_dirs: Vec<PathBuf>,
        cache_dir: impl AsRef<Path>,
        limit: Duration,
        neighbours: Neighbours,
        builtin: Option<Builtin>,
    ) -> Cni {
        let inner = Inner {
            conf_dir: conf_dir.into(),
            bin_dirs,
            cache: Cache::new(cache_dir.as_ref()),
            cache_dir: cache_dir.as_ref().to_owned(),
            neighbours,
            limit,
            locks: Locks::default(),
            builtin,
        };
        Cni { inner: Arc::new(inner) }
    }

    /// Ends plugins that an earlier process with this cache was killed over. Before anything else is asked of this handle: what they
    /// were just making would come after it was deleted.
    pub async fn end_strays(&self) {
        orlop_base::strays::end(&self.inner.cache_dir).await;
    }

    /// Fails when the cache is a later release's, which this one would take for empty. Before anything else is asked of this handle.
    pub fn check_version(&self) -> Result<()> {
        self.inner.cache.check_version()
    }

    /// The network in effect and the file it comes from. Files are read anew each time, so a change counts at once.
    pub fn network(&self) -> Result<(PathBuf, NetworkConfig)> {
        config::load(&self.inner.conf_dir)
    }

    /// Attaches the pod. When a plugin fails, all are told to delete and the error is that of ADD. The attachment is
    /// on disk before the first plugin runs, so that a later [`Cni::del`] cleans up whatever a crash left.
    pub async fn add(&self, pod: &PodNetwork) -> Result<CniResult> {
        pod.validate()?;
        let held = self.inner.locks.one(&pod.container_id).await;
        let (_, network) = self.network()?;
        let mut entry = Entry { pod: pod.clone(), network: network.to_value(), result: None };
        self.inner.cache.put(&entry)?;
        self.inner
            .neighbours
            .join(&network.name, &self.inner.cache_dir)
            .map_err(|source| Error::Cache { container_id: pod.container_id.clone(), source })?;
        match self.add_all(&network, pod, &held).await {
            Ok((raw, result)) => {
                entry.result = Some(raw);
                if let Err(e) = self.inner.cache.put(&entry) {
                    self.roll_back(&network, pod, entry.result.as_ref(), &held).await;
                    return Err(e);
                }
                Ok(result)
            }
            Err((previous, error)) => {
                self.roll_back(&network, pod, previous.as_ref(), &held).await;
                Err(error)
            }
        }
    }

    async fn add_all(
        &self,
        network: &NetworkConfig,
        pod: &PodNetwork,
        held: &Held,
    ) -> Result<(Value, CniResult), (Option<Value>, Error)> {
        let runtime = pod.runtime_config();
        let mut previous: Option<Value> = None;
        let mut result = CniResult::default();
        for plugin in &network.plugins {
            let request = plugin.request(network, &runtime, previous.as_ref());
            let name = &plugin.plugin_type;
            let mut value = match self.run(name, Command::Add, pod, &request, held).await {
                Ok(v) => v,
                Err(e) => return Err((previous, e)),
            };
            if let Some(map) = value.as_object_mut() {
                map.entry("cniVersion").or_insert_with(|| network.version.as_str().into());
            }
            result = match CniResult::from_value(&value, network.version) {
                Ok(r) => r,
                Err(source) => {
                    let e = Error::BadResult { plugin: name.clone(), command: Command::Add, source };
                    return Err((previous, e));
                }
            };
            previous = Some(value);
        }
        Ok((previous.unwrap_or_default(), result))
    }

    /// DEL after a failed ADD. What it cannot clean stays on record for a later DEL or GC.
    async fn roll_back(
        &self,
        network: &NetworkConfig,
        pod: &PodNetwork,
        previous: Option<&Value>,
        held: &Held,
    ) {
        let done = match self.del_all(network, pod, previous, held).await {
            Ok(()) => self.inner.cache.remove(&pod.container_id, &pod.ifname),
            Err(e) => Err(e),
        };
        if let Err(e) = done {
            tracing::warn!(container = %pod.container_id, "cannot undo a failed network ADD yet: {}",
                orlop_base::telemetry::chain(&e));
        }
    }

    /// Detaches the pod. Succeeds when there is nothing to detach, also when the namespace or the configuration is gone.
    /// Uses the configuration of the time of ADD; after an ADD that failed, the present one as well.
    pub async fn del(&self, pod: &PodNetwork) -> Result<()> {
        pod.validate()?;
        let held = self.inner.locks.one(&pod.container_id).await;
        self.del_locked(pod, &held).await
    }

    async fn del_locked(&self, pod: &PodNetwork, held: &Held) -> Result<()> {
        let entry = self.inner.cache.get(&pod.container_id, &pod.ifname);
        let network = match entry.as_ref().and_then(Entry::network) {
            Some(network) => network,
            None => match self.network() {
                Ok((_, network)) => network,
                // An ADD is on record before its first plugin runs: nothing was added, and nothing tells how to delete.
                Err(Error::NoConfig { .. } | Error::ReadConfig { .. } | Error::BrokenConfig { .. }) => {
                    return self.inner.cache.remove(&pod.container_id, &pod.ifname);
                }
                Err(e) => return Err(e),
            },
        };
        // The plugins see the parameters that ADD had, but the namespace as it is now.
        let mut original = pod.clone();
        if let Some(e) = &entry {
            original = PodNetwork { netns: pod.netns.clone(), ..e.pod.clone() };
        }
        let previous = entry.as_ref().and_then(|e| e.result.as_ref());
        if let Err(error) = self.del_all(&network, &original, previous, held).await {
            // An ADD that failed may have failed for its configuration, which may have been corrected since.
            let present = match (previous, self.network()) {
                (None, Ok((_, present))) if present.to_value() != network.to_value() => present,
                _ => return Err(error),
            };
            self.del_all(&present, &original, None, held).await?;
        }
        self.inner.cache.remove(&pod.container_id, &pod.ifname)
    }

    /// Runs DEL on every plugin, last first. The first error is given, but none keeps the others from running.
    async fn del_all(
        &self,
        network: &NetworkConfig,
        pod: &PodNetwork,
        previous: Option<&Value>,
        held: &Held,
    ) -> Result<()> {
        let runtime = pod.runtime_config();
        let mut pod = pod.clone();
        if !pod.netns.exists() {
            pod.netns = PathBuf::new();
        }
        // Before 0.4.0 DEL got no prevResult.
        let previous = previous.filter(|_| network.version >= SpecVersion::V0_4_0);
        let mut first_error = None;
        for plugin in network.plugins.iter().rev() {
            let request = plugin.request(network, &runtime, previous);
            match self.run(&plugin.plugin_type, Command::Del, &pod, &request, held).await {
                Ok(_) => {}
                Err(Error::Plugin { source, .. }) if source.code == code::UNKNOWN_CONTAINER => {}
                Err(e) => {
                    first_error.get_or_insert(e);
                }
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    /// Asks the plugins whether the attachment is still as ADD made it. Succeeds where the network's version has no CHECK
    /// or its configuration turns CHECK off.
    pub async fn check(&self, pod: &PodNetwork) -> Result<()> {
        pod.validate()?;
        let held = self.inner.locks.one(&pod.container_id).await;
        let entry = self.inner.cache.get(&pod.container_id, &pod.ifname);
        let known = entry.and_then(|e| Some((e.network()?, e.result?, e.pod)));
        let Some((network, result, original)) = known else {
            return Err(Error::NotAttached { container_id: pod.container_id.clone() });
        };
        if network.version < Command::Check.since() || network.disable_check {
            return Ok(());
        }
        let runtime = original.runtime_config();
        let original = PodNetwork { netns: pod.netns.clone(), ..original };
        for plugin in &network.plugins {
            let request = plugin.request(&network, &runtime, Some(&result));
            self.run(&plugin.plugin_type, Command::Check, &original, &request, &held).await?;
        }
        Ok(())
    }

    /// The result of the pod's ADD, also after a restart.
    pub fn result(&self, container_id: &str, ifname: &str) -> Option<CniResult> {
        let entry = self.inner.cache.get(container_id, ifname)?;
        CniResult::from_value(entry.result.as_ref()?, entry.network()?.version).ok()
    }

    /// Everything that is attached, or was about to be when the process ended.
    pub fn attachments(&self) -> Vec<PodNetwork> {
        self.inner.cache.all().into_iter().map(|e| e.pod).collect()
    }

    /// Whether pods can be attached: a valid configuration, all plugins there, and none that says no (STATUS of 1.1.0).
    pub async fn status(&self) -> Result<()> {
        let (_, network) = self.network()?;
        for plugin in &network.plugins {
            self.plugin(&plugin.plugin_type)?;
        }
        let held = Held::default();
        if network.version < Command::Status.since() {
            return Ok(());
        }
        for plugin in &network.plugins {
            let request = plugin.request(&network, &Map::new(), None);
            self.run(&plugin.plugin_type, Command::Status, &PodNetwork::default(), &request, &held).await?;
        }
        Ok(())
    }

    /// This server's attachments are gone for good, as is its cache.
    pub fn leave(&self) {
        self.inner.neighbours.leave(&self.inner.cache_dir);
    }

    /// Deletes every attachment on record that is not in `valid`, then lets the plugins free what they hold for others
    /// than these and those of [`Neighbours`] (GC of 1.1.0). Waits for running operations and holds new ones back meanwhile.
    pub async fn gc(&self, valid: &[Attachment]) -> Result<()> {
        let held = self.inner.locks.all().await;
        let keep: BTreeSet<&Attachment> = valid.iter().collect();
        let mut first_error = None;
        for entry in self.inner.cache.all() {
            let pod = entry.pod;
            let key = Attachment { container_id: pod.container_id.clone(), ifname: pod.ifname.clone() };
            if !keep.contains(&key)
                && let Err(e) = self.del_locked(&pod, &held).await
            {
                first_error.get_or_insert(e);
            }
        }
        let network = match self.network() {
            Ok((_, network)) => network,
            Err(Error::NoConfig { .. }) => return first_error.map_or(Ok(()), Err),
            Err(e) => return Err(first_error.unwrap_or(e)),
        };
        if network.version >= Command::Gc.since() && !network.disable_gc {
            let mut all = match self.inner.neighbours.attachments(&network.name, &self.inner.cache_dir) {
                Ok(theirs) => theirs,
                Err(source) => {
                    let network = network.name;
                    return Err(first_error.unwrap_or(Error::Neighbours { network, source }));
                }
            };
            all.extend(valid.iter().cloned());
            let list = serde_json::to_value(&all).unwrap_or_default();
            for plugin in &network.plugins {
                let mut request = plugin.request(&network, &Map::new(), None);
                request.insert(VALID_ATTACHMENTS.to_owned(), list.clone());
                let done =
                    self.run(&plugin.plugin_type, Command::Gc, &PodNetwork::default(), &request, &held).await;
                if let Err(e) = done {
                    first_error.get_or_insert(e);
                }
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    /// The specification versions that `plugin` says it knows.
    pub async fn plugin_versions(&self, plugin: &str) -> Result<Vec<String>> {
        let mut request = Map::new();
        request.insert("cniVersion".into(), SpecVersion::V1_1_0.as_str().into());
        let value =
            self.run(plugin, Command::Version, &PodNetwork::default(), &request, &Held::default()).await?;
        match serde_json::from_value::<VersionResult>(value) {
            Ok(v) => Ok(v.supported_versions),
            Err(e) => Err(Error::BadResult {
                plugin: plugin.to_owned(),
                command: Command::Version,
                source: orlop_cni_types::ResultError::Form(e),
            }),
        }
    }

    fn plugin(&self, name: &str) -> Result<Plugin<'_>> {
        let found = exec::find(name, &self.inner.bin_dirs);
        match &self.inner.builtin {
            Some(b)
                if b.name == name && found.as_ref().map_or(true, |p| p.parent() == Some(&b.program_dir)) =>
            {
                Ok(Plugin::Builtin(b))
            }
            _ => found.map(Plugin::Program),
        }
    }

    async fn run(
        &self,
        plugin: &str,
        command: Command,
        pod: &PodNetwork,
        request: &Map<String, Value>,
        held: &Held,
    ) -> Result<Value> {
        let limit = match command {
            Command::Status => self.inner.limit.min(STATUS_LIMIT),
            _ => self.inner.limit,
        };
        let args = if pod.container_id.is_empty() { String::new() } else { pod.cni_args() };
        let path = match self.plugin(plugin)? {
            Plugin::Program(path) => path,
            Plugin::Builtin(builtin) => {
                let call = Call {
                    command,
                    container_id: pod.container_id.clone(),
                    netns: pod.netns.clone(),
                    ifname: pod.ifname.clone(),
                    args,
                    conf: serde_json::to_vec(request).unwrap_or_default(),
                    limit,
                };
                return builtin::call(builtin, call, held.clone()).await;
            }
        };
        let run = exec::Run {
            plugin,
            path,
            command,
            container_id: &pod.container_id,
            netns: &pod.netns,
            ifname: &pod.ifname,
            args: &args,
            bin_dirs: &self.inner.bin_dirs,
            owner: &self.inner.cache_dir,
            limit,
        };
        run.execute(request).await
    }
}
