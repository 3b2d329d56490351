//! NRI: where plugins are asked, and what becomes of their answers.

mod adjust;
mod describe;
mod resources;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use oci_spec::runtime::Spec;
use orlop_nri::api::{self, Event, Field};
use orlop_nri::{Held, Host, Nri, Owners};
use orlop_proto::cri;
use parking_lot::Mutex;
use tokio::sync::{OnceCell, mpsc};
use tokio::time::timeout;

use crate::container::cdi;
use crate::container::spec::{cgroups_path, resources as oci_resources};
use crate::error::{Error, Result};
use crate::runtime::Runtime;
use crate::store::{Container, ContainerPhase, ContainerRecord, Encoded, Sandbox};
use resources::{Who, extend, overlay, to_nri};

/// Containers that have ended and of which plugins have not been told yet. One that does not fit is told of when it is removed.
const ENDED: usize = 1024;

/// The server's plugins.
pub(crate) struct Plugins {
    nri: Nri,
    ended: mpsc::Sender<String>,
    to_tell: Mutex<Option<mpsc::Receiver<String>>>,
}

/// What plugins have been told of a container or sandbox by this run of the server.
#[derive(Default)]
pub(crate) struct Told {
    /// Of its making.
    made: AtomicBool,
    /// Of its end.
    end: OnceCell<()>,
}

impl Told {
    /// Of one that had ended before the server started plugins are not told.
    pub fn new(ended: bool) -> Told {
        let end = if ended { OnceCell::new_with(Some(())) } else { OnceCell::new() };
        Told { end, ..Told::default() }
    }
}

/// A container as plugins want it.
pub(crate) struct Adjusted {
    /// Their names.
    plugins: String,
    pub resources: cri::LinuxContainerResources,
    pub cgroups_path: Option<String>,
}

impl Adjusted {
    /// Says in an error that plugins had a part in what failed.
    pub fn context(&self, e: Error) -> Error {
        if self.plugins.is_empty() {
            return e;
        }
        Error::Adjusted { plugins: self.plugins.clone(), source: Box::new(e) }
    }
}

impl Plugins {
    pub fn new(config: Option<orlop_nri::Config>) -> Plugins {
        let (ended, to_tell) = mpsc::channel(ENDED);
        Plugins { nri: Nri::new(config), ended, to_tell: Mutex::new(Some(to_tell)) }
    }

    /// Until it is dropped, no new plugin is told of what there is.
    pub async fn hold(&self) -> Held {
        self.nri.hold().await
    }

    /// Notes a container's end, to tell plugins of it.
    pub fn has_ended(&self, container: &Container) {
        if self.nri.wants(Event::StopContainer) {
            // See ENDED.
            let _ = self.ended.try_send(container.id.clone());
        }
    }
}

impl Runtime {
    /// Starts the plugins of the folder and lets others connect.
    pub async fn start_plugins(self: &Arc<Self>) {
        let Some(mut to_tell) = self.plugins.to_tell.lock().take() else { return };
        let (this, stop) = (self.clone(), self.tasks.stop_token());
        self.tasks.spawn(async move {
            loop {
                let id = tokio::select! {
                    // What is left when the server stops, plugins hear of no more.
                    id = to_tell.recv() => id,
                    () = stop.cancelled() => None,
                };
                let Some(id) = id else { return };
                if let Ok(container) = this.store.container(&id) {
                    this.plugins_see_end(&container).await;
                }
            }
        });
        self.plugins.nri.start(self.clone(), &self.tasks).await;
    }

    fn nri_pod(&self, sandbox: &Sandbox) -> api::PodSandbox {
        let record = sandbox.record();
        let ns = record.namespaces();
        let pins = self.config.sandbox_run_dir(&sandbox.id).join("ns");
        let own = |mode: cri::NamespaceMode| mode == cri::NamespaceMode::Pod;
        let user = ns.userns_options.as_ref().is_some_and(|u| own(u.mode()));
        let names = [
            ("network", "net", own(ns.network())),
            ("uts", "uts", own(ns.network())),
            ("ipc", "ipc", own(ns.ipc())),
            ("pid", "pid", own(ns.pid())),
            ("user", "user", user),
        ];
        let namespaces = names.into_iter().filter(|(.., own)| *own);
        let namespaces =
            namespaces.map(|(kind, pin, _)| (kind, pins.join(pin).to_string_lossy().into_owned()));
        let parent = record.config.linux.as_ref().map(|l| l.cgroup_parent.as_str()).unwrap_or_default();
        let path =
            cgroups_path(self.config.cgroup_driver, parent, &self.config.default_cgroup_parent, &sandbox.id);
        describe::pod(&record, path, namespaces.collect())
    }

    fn nri_pod_of(&self, container: &Container) -> api::PodSandbox {
        self.store.sandbox(&container.sandbox_id).map(|s| self.nri_pod(&s)).unwrap_or_default()
    }

    /// Once the sandbox is stopped its bundles are gone, and with them what only they know.
    fn nri_container(&self, container: &Container) -> api::Container {
        let record = container.record();
        let file = self.config.bundle_dir(&record.sandbox_id, &record.id).join("config.json");
        let spec = std::fs::read(file).ok().and_then(|text| serde_json::from_slice(&text).ok());
        describe::container(&record, spec.as_ref())
    }

    /// Asks plugins about a sandbox that is about to be ready.
    pub async fn plugins_see_run(&self, sandbox: &Sandbox, ips: &[String], init_pid: u32) -> Result<()> {
        if !self.plugins.nri.wants(Event::RunPodSandbox) {
            return Ok(());
        }
        sandbox.told.made.store(true, Ordering::Relaxed);
        let pod = api::PodSandbox { ips: ips.to_vec(), pid: init_pid, ..self.nri_pod(sandbox) };
        Ok(self.plugins.nri.run_pod(pod).await?)
    }

    /// Tells plugins of what has happened to a sandbox.
    pub async fn plugins_see_pod(&self, sandbox: &Sandbox, event: Event) {
        if self.plugins.nri.wants(event) {
            self.plugins.nri.tell_of_pod(event, self.nri_pod(sandbox)).await;
        }
    }

    /// Tells plugins that a sandbox of which they know was never answered.
    pub async fn plugins_see_sandbox_undone(&self, sandbox: &Sandbox) {
        if sandbox.told.made.load(Ordering::Relaxed) {
            self.plugins_see_pod(sandbox, Event::StopPodSandbox).await;
            self.plugins_see_pod(sandbox, Event::RemovePodSandbox).await;
        }
    }

    /// Asks plugins about a pod's new resources.
    pub async fn plugins_see_pod_update(
        &self,
        sandbox: &Sandbox,
        request: &cri::UpdatePodSandboxResourcesRequest,
    ) -> Result<()> {
        if !self.plugins.nri.wants(Event::UpdatePodSandbox) {
            return Ok(());
        }
        let request = api::UpdatePodSandboxRequest {
            pod: Some(self.nri_pod(sandbox)),
            overhead_linux_resources: request.overhead.as_ref().map(to_nri),
            linux_resources: request.resources.as_ref().map(to_nri),
        };
        Ok(self.plugins.nri.update_pod(request).await?)
    }

    /// Asks plugins what a container is to become and changes its spec accordingly. `own`: our own runtime runs it.
    pub async fn adjust(
        &self,
        sandbox: &Sandbox,
        container: &Container,
        spec: &mut Spec,
        user: &crate::store::records::User,
        own: bool,
    ) -> Result<Option<Adjusted>> {
        let nri = &self.plugins.nri;
        if !nri.wants(Event::CreateContainer) {
            let wanted = nri.wants(Event::PostCreateContainer) || nri.wants(Event::StartContainer);
            container.told.made.store(wanted, Ordering::Relaxed);
            return Ok(None);
        }
        container.told.made.store(true, Ordering::Relaxed);
        let mut record = ContainerRecord::clone(&container.record());
        record.user = user.clone();
        let json =
            serde_json::to_value(&*spec).map_err(|e| Error::Internal(format!("cannot write a spec: {e}")))?;
        let asked = describe::container(&record, Some(&json));
        let created = nri.create_container(self.nri_pod(sandbox), asked).await?;
        // As upstream: what cannot be updated is warned of, and the container comes all the same.
        self.plugins_update("several", created.updates).await;
        let given = created.adjust;
        let target = adjust::Target {
            id: &container.id,
            owners: &created.owners,
            own,
            least_oom_score_adj: self.facts.least_oom_score_adj,
        };
        let names: Vec<_> = given.cdi_devices.iter().map(|d| d.name.clone()).collect();
        if let Some(name) = names.first() {
            cdi::inject(spec, &names, &self.config.cdi_spec_dirs).map_err(|e| {
                resources::refused(target.who(Field::CdiDevices, Some(name)), "CDI devices", &e.to_string())
            })?;
        }
        *spec = adjust::adjust(spec, &given, &target)?;
        let linux = given.linux.unwrap_or_default();
        let who: Who = &|field, key| target.who(field, key);
        let mut resources = record.resources.0.clone();
        if let Some(given) = &linux.resources {
            resources = overlay(&resources, given, &self.facts, who)?;
            let mut oci = oci_resources::resources(&resources, &self.facts)?;
            let held = spec.linux().as_ref().and_then(|l| l.resources().as_ref()?.devices().clone());
            oci.set_devices(held);
            extend(&mut oci, given, who)?;
            let mut section = spec.linux().clone().unwrap_or_default();
            section.set_resources(Some(oci));
            spec.set_linux(Some(section));
        }
        if let Some(score) = linux.oom_score_adj {
            resources.oom_score_adj = score.value;
        }
        let cgroups_path = (!linux.cgroups_path.is_empty()).then_some(linux.cgroups_path);
        if let Some(path) = &cgroups_path {
            self.move_cgroup(spec, &record.cgroups_path, path);
        }
        let plugins = created.owners.all(&container.id).join(", ");
        Ok(Some(Adjusted { plugins, resources, cgroups_path }))
    }

    /// Another group for the container, also where it is bound into its /sys/fs/cgroup.
    fn move_cgroup(&self, spec: &mut Spec, from: &str, to: &str) {
        let folder = |controller: &str, path: &str| {
            crate::facts::cgroup_dir(false, controller, &crate::stats::cgroup::host_path(path))
        };
        for m in spec.mounts_mut().iter_mut().flatten() {
            for controller in &self.facts.v1_controllers {
                if m.source().as_ref() == Some(&folder(controller, from)) {
                    m.set_source(Some(folder(controller, to)));
                }
            }
        }
        let mut linux = spec.linux().clone().unwrap_or_default();
        linux.set_cgroups_path(Some(to.into()));
        spec.set_linux(Some(linux));
    }

    /// Asks plugins about a container that is about to start.
    pub async fn plugins_see_start(&self, container: &Container) -> Result<()> {
        if !self.plugins.nri.wants(Event::StartContainer) {
            return Ok(());
        }
        let pod = self.nri_pod_of(container);
        Ok(self.plugins.nri.start_container(pod, self.nri_container(container)).await?)
    }

    /// Tells plugins of what has happened to a container.
    pub async fn plugins_see(&self, container: &Container, event: Event) {
        if !self.plugins.nri.wants(event) {
            return;
        }
        let pod = self.nri_pod_of(container);
        let updates = self.plugins.nri.tell_of_container(event, pod, self.nri_container(container)).await;
        self.plugins_update("several", updates).await;
    }

    /// Tells plugins that a container of which they know was never answered.
    pub async fn plugins_see_container_undone(&self, container: &Container) {
        if container.told.made.load(Ordering::Relaxed) {
            self.plugins_see(container, Event::RemoveContainer).await;
        }
    }

    /// Tells plugins of a container's end, once. Returns when they have been told, whoever does it.
    pub async fn plugins_see_end(&self, container: &Container) {
        container.told.end.get_or_init(|| self.plugins_see(container, Event::StopContainer)).await;
    }

    /// Asks plugins what an update is to become. The caller holds the container's `op`. Returns what is to be in force, and what of
    /// it only OCI knows.
    pub async fn plugins_see_update(
        &self,
        container: &Container,
        update: &cri::LinuxContainerResources,
        merged: cri::LinuxContainerResources,
    ) -> Result<(cri::LinuxContainerResources, Option<api::LinuxResources>)> {
        if !self.plugins.nri.wants(Event::UpdateContainer) {
            return Ok((merged, None));
        }
        let (pod, view) = (self.nri_pod_of(container), self.nri_container(container));
        let updated = self.plugins.nri.update_container(pod, view, to_nri(update)).await?;
        let who: Who = &|field, key| who_of(&updated.owners, &container.id, field, key);
        let merged = overlay(&merged, &updated.resources, &self.facts, who)?;
        self.plugins_update("several", updated.updates).await;
        Ok((merged, Some(updated.resources)))
    }

    /// Updates containers as plugins ask; returns what could not be. Waits for no container longer than a plugin may for its
    /// answer: whoever holds it may be waiting for a plugin.
    async fn plugins_update(
        &self,
        plugin: &str,
        updates: Vec<api::ContainerUpdate>,
    ) -> Vec<api::ContainerUpdate> {
        let mut failed = Vec::new();
        for update in updates {
            if let Err(e) = self.plugin_updates_one(plugin, &update).await {
                tracing::warn!(plugin, container = %update.container_id, error = %orlop_base::telemetry::chain(&e), "could not update a container as an NRI plugin asked");
                if !update.ignore_failure {
                    failed.push(update);
                }
            }
        }
        failed
    }

    async fn plugin_updates_one(&self, plugin: &str, update: &api::ContainerUpdate) -> Result<()> {
        let container = self.store.container(&update.container_id)?;
        let Some(given) = update.linux.as_ref().and_then(|l| l.resources.as_ref()) else { return Ok(()) };
        let limit = self.config.nri.as_ref().map(|c| c.request_timeout).unwrap_or_default();
        let busy = |_| Error::Internal(format!("container {} is busy", container.id));
        let alive = || {
            container.in_phase(&[ContainerPhase::Created, ContainerPhase::Running], "change its resources")
        };
        // Whoever holds one that ends may be waiting for this very plugin.
        let _held = tokio::select! {
            biased;
            // Dropping the wait for the lock gives up our place in the queue, which nobody needs any more.
            () = container.ended() => return alive().map(drop),
            held = timeout(limit, container.op.lock()) => held.map_err(busy)?,
        };
        let record = alive()?;
        let who: Who = &|_, _| plugin.to_owned();
        let merged = overlay(&record.resources, given, &self.facts, who)?;
        self.put_resources(&container, merged, Some(given), HashMap::new()).await
    }

    /// Writes what is to be in force to the container's cgroup and its record. The caller holds the container's `op`.
    pub async fn put_resources(
        &self,
        container: &Container,
        merged: cri::LinuxContainerResources,
        given: Option<&api::LinuxResources>,
        annotations: HashMap<String, String>,
    ) -> Result<()> {
        let sandbox = self.store.sandbox(&container.sandbox_id)?;
        let mut oci = oci_resources::resources(&merged, &self.facts)?;
        if let Some(given) = given {
            extend(&mut oci, given, &|_, _| "unknown".to_owned())?;
        }
        let json =
            serde_json::to_vec(&oci).map_err(|e| Error::Internal(format!("cannot write resources: {e}")))?;
        sandbox.monitor.update_container(&container.id, json).await?;
        container.update(|r| {
            r.resources = Encoded(merged);
            r.config.0.annotations.extend(annotations);
        })?;
        container.keep_copy()
    }
}

fn who_of(owners: &Owners, container: &str, field: Field, key: Option<&str>) -> String {
    owners.of(container, field, key).unwrap_or("unknown").to_owned()
}

#[tonic::async_trait]
impl Host for Runtime {
    async fn snapshot(&self) -> (Vec<api::PodSandbox>, Vec<api::Container>) {
        let pods = self.store.sandboxes().iter().map(|s| self.nri_pod(s)).collect();
        // As upstream: not those that have ended.
        let containers = self.store.containers();
        let alive = containers.iter().filter(|c| !c.record().phase.has_ended());
        (pods, alive.map(|c| self.nri_container(c)).collect())
    }

    async fn update(&self, plugin: &str, updates: Vec<api::ContainerUpdate>) -> Vec<api::ContainerUpdate> {
        self.plugins_update(plugin, updates).await
    }
}
