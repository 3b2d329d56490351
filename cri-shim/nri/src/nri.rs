//! The plugins that are there, how they come and go, and what they are asked.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use orlop_base::supervise::TaskGroup;
use parking_lot::RwLock;
use prost::Message;
use tokio::net::UnixStream;
use tokio::sync::{OwnedRwLockReadGuard, Semaphore, mpsc, oneshot};

use crate::api::{self, Event};
use crate::connection::{Connection, Incoming, LEFT};
use crate::error::Error;
use crate::launch::{self, Program};
use crate::listen::{self, Socket};
use crate::merge::{Creation, Updates, warn_of_evictions};
use crate::owners::Owners;
use crate::plugin::{Name, Plugin};
use crate::ttrpc::code;

/// Where upstream's plugins connect to.
const DEFAULT_SOCKET: &str = "/var/run/nri/nri.sock";
/// Plugins that may be connected at once; a node has a handful.
const MAX_CONNECTIONS: usize = 64;
/// The name of a plugin that has not said its own, which has digits at its beginning.
const UNREGISTERED: &str = "unregistered";
/// Before another try when no connection can be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// What plugins may take for the interface's level (RegisterPlugin and Configure tell each other theirs).
const NRI_VERSION: &str = "v0.12.5";

/// Where plugins are and how long they may take.
#[derive(Clone, Debug)]
pub struct Config {
    /// What plugins connect to.
    pub socket: PathBuf,
    /// Programs that are started as plugins.
    pub plugin_dir: PathBuf,
    /// Configuration of plugins.
    pub config_dir: PathBuf,
    /// From the connection to RegisterPlugin.
    pub registration_timeout: Duration,
    /// For one request.
    pub request_timeout: Duration,
    /// The runtime's name and version, for plugins to see.
    pub runtime_name: String,
    pub runtime_version: String,
}

impl Config {
    /// Upstream's places and times.
    pub fn new(runtime_name: &str, runtime_version: &str) -> Config {
        Config {
            socket: DEFAULT_SOCKET.into(),
            plugin_dir: "/opt/nri/plugins".into(),
            config_dir: "/etc/nri/conf.d".into(),
            registration_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(2),
            runtime_name: runtime_name.to_owned(),
            runtime_version: runtime_version.to_owned(),
        }
    }
}

/// The runtime, as plugins know it.
#[async_trait::async_trait]
pub trait Host: Send + Sync {
    /// Everything there is.
    async fn snapshot(&self) -> (Vec<api::PodSandbox>, Vec<api::Container>);

    /// Updates containers for a plugin, and returns those that could not be. Waits for no plugin.
    async fn update(&self, plugin: &str, updates: Vec<api::ContainerUpdate>) -> Vec<api::ContainerUpdate>;
}

/// While it is there, no new plugin is told of pods and containers: between a change and telling plugins of it.
pub struct Held(#[allow(dead_code)] OwnedRwLockReadGuard<()>);

/// What plugins make of a container that is created.
#[derive(Debug, Default)]
pub struct Created {
    pub adjust: api::ContainerAdjustment,
    /// Of other containers.
    pub updates: Vec<api::ContainerUpdate>,
    pub owners: Owners,
}

/// What plugins make of an update.
#[derive(Debug, Default)]
pub struct Updated {
    /// Of the container that is updated.
    pub resources: api::LinuxResources,
    /// Of others.
    pub updates: Vec<api::ContainerUpdate>,
    pub owners: Owners,
}

/// A handle. Cloning gives another.
#[derive(Clone)]
pub struct Nri(Arc<Inner>);

struct Inner {
    config: Option<Config>,
    /// By index; of one index by arrival.
    plugins: RwLock<Arc<[Arc<Plugin>]>>,
    sync: Arc<tokio::sync::RwLock<()>>,
    places: Arc<Semaphore>,
}

impl Nri {
    /// Without a configuration there never is a plugin.
    pub fn new(config: Option<Config>) -> Nri {
        Nri(Arc::new(Inner {
            config,
            plugins: RwLock::new(Arc::new([])),
            sync: Arc::default(),
            places: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        }))
    }

    /// Starts the plugins of the folder, returns when these are synchronized or have failed, and accepts others from then on. A
    /// socket that cannot be had is a warning: pods do not depend on it.
    pub async fn start(&self, host: Arc<dyn Host>, tasks: &TaskGroup) {
        let Some(config) = &self.0.config else { return };
        let socket = match listen::listen(&config.socket).await {
            Ok(socket) => Some(socket),
            // On a machine with several runtimes plugins are the first one's, unless somebody says otherwise.
            Err(e @ Error::Taken { .. }) if config.socket == Path::new(DEFAULT_SOCKET) => {
                tracing::info!(
                    "{e}: plugins cannot connect here; --nri-socket gives this server one of its own"
                );
                None
            }
            Err(e) => {
                tracing::warn!(error = %e, "NRI plugins cannot connect; another --nri-socket, or --nri=false, makes this server independent");
                None
            }
        };
        let mut started = Vec::new();
        for program in launch::programs(&config.plugin_dir, &config.config_dir) {
            match launch::start(&program) {
                Ok((stream, child)) => {
                    let (tell, told) = oneshot::channel();
                    let (nri, host, group) = (self.clone(), host.clone(), tasks.clone());
                    tasks.spawn(async move {
                        nri.serve(stream, Some(program), host, &group, tell).await;
                        launch::end(child).await;
                    });
                    started.push(told);
                }
                Err(e) => {
                    tracing::warn!(program = %program.path.display(), error = %e, "an NRI plugin cannot be started");
                }
            }
        }
        for told in started {
            // One that failed drops its end.
            let _ = told.await;
        }
        if let Some(socket) = socket {
            let (nri, group, stop) = (self.clone(), tasks.clone(), tasks.stop_token());
            tasks.spawn(async move {
                tokio::select! {
                    // A connection that is just accepted ends with the server anyhow.
                    () = nri.accept(&socket, host, &group) => {}
                    () = stop.cancelled() => {}
                }
            });
        }
    }

    async fn accept(&self, socket: &Socket, host: Arc<dyn Host>, tasks: &TaskGroup) {
        loop {
            let stream = match socket.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(e) => {
                    tracing::warn!(error = %e, "cannot accept an NRI plugin's connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(place) = self.0.places.clone().try_acquire_owned() else {
                tracing::warn!("{MAX_CONNECTIONS} NRI plugins are connected; no more are taken");
                continue;
            };
            let (nri, host, group) = (self.clone(), host.clone(), tasks.clone());
            tasks.spawn(async move {
                let _place = place;
                nri.serve(stream, None, host, &group, oneshot::channel().0).await;
            });
        }
    }

    /// A plugin's life, from its connection to its end. `ready` is told when it is served.
    async fn serve(
        &self,
        stream: UnixStream,
        program: Option<Program>,
        host: Arc<dyn Host>,
        tasks: &TaskGroup,
        ready: oneshot::Sender<()>,
    ) {
        let (connection, mut incoming) = Connection::start(stream, tasks);
        let (named, config) = program.map_or((None, String::new()), |p| (Some(p.name), p.config));
        let mut label = named.as_ref().map_or_else(|| UNREGISTERED.to_owned(), Name::to_string);
        match self.register(&connection, &mut incoming, named).await {
            Err(why) => connection.close(&why),
            Ok(name) => {
                label = name.to_string();
                let (of_plugin, plugin, to_host) = (connection.clone(), label.clone(), host.clone());
                tasks.spawn(async move { answer_calls(&of_plugin, incoming, &plugin, &*to_host).await });
                match self.join(name, &connection, config, &*host).await {
                    Err(why) => connection.close(&why),
                    Ok(()) => {
                        tracing::info!(plugin = label, "an NRI plugin is connected and synchronized");
                        // Nobody may wait for it.
                        let _ = ready.send(());
                    }
                }
            }
        }
        connection.ended().await;
        self.0.change(|plugins| plugins.retain(|p| !p.connection.is_closed()));
        if !tasks.stop_token().is_cancelled() {
            let why = connection.reason();
            if label == UNREGISTERED && why == LEFT {
                // Somebody looked whether the socket is served: another runtime that starts.
                return;
            }
            tracing::warn!(plugin = label, why, "an NRI plugin is gone; pods go on without it");
        }
    }

    /// Waits for the plugin's name.
    async fn register(
        &self,
        connection: &Connection,
        incoming: &mut mpsc::Receiver<Incoming>,
        named: Option<Name>,
    ) -> Result<Name, String> {
        let limit = self.0.config.as_ref().map_or(Duration::ZERO, |c| c.registration_timeout);
        let first = tokio::time::timeout(limit, async {
            tokio::select! {
                // A call that is lost with its connection needs no answer.
                call = incoming.recv() => call,
                () = connection.ended() => None,
            }
        });
        let call = match first.await {
            Err(_) => return Err(format!("it did not register within {limit:?}")),
            Ok(None) => return Err(connection.reason()),
            Ok(Some(call)) if call.method == "RegisterPlugin" => call,
            Ok(Some(call)) => return Err(format!("it called {} before it registered", call.method)),
        };
        let name = api::RegisterPluginRequest::decode(&*call.payload)
            .map_err(|e| format!("RegisterPlugin cannot be read: {e}"))
            .and_then(|r| named.map_or_else(|| Name::new(&r.plugin_idx, &r.plugin_name), Ok));
        match name {
            Ok(name) => {
                connection.answer(&call, Ok(api::Empty {}.encode_to_vec()));
                Ok(name)
            }
            Err(why) => {
                connection.answer(&call, Err((code::INVALID_ARGUMENT, why.clone())));
                Err(why)
            }
        }
    }

    /// Configures a registered plugin, tells it what there is, and takes it into the list.
    async fn join(
        &self,
        name: Name,
        connection: &Connection,
        config: String,
        host: &dyn Host,
    ) -> Result<(), String> {
        let Some(own) = &self.0.config else { return Err("NRI is off".to_owned()) };
        let millis = |d: Duration| i64::try_from(d.as_millis()).unwrap_or(i64::MAX);
        let request = api::ConfigureRequest {
            config,
            runtime_name: own.runtime_name.clone(),
            runtime_version: own.runtime_version.clone(),
            registration_timeout: millis(own.registration_timeout),
            request_timeout: millis(own.request_timeout),
            nri_version: NRI_VERSION.to_owned(),
        };
        let plugin = Plugin::configure(name, connection.clone(), &request, own.request_timeout).await?;
        let label = plugin.name.to_string();
        let updates = {
            let _alone = self.0.sync.write().await;
            let (pods, containers) = host.snapshot().await;
            let updates = plugin.synchronize(pods, containers).await?;
            self.0.change(|plugins| {
                let at = plugins.partition_point(|p| p.name.index <= plugin.name.index);
                plugins.insert(at, Arc::new(plugin));
            });
            updates
        };
        if !updates.is_empty() {
            host.update(&label, updates).await;
        }
        Ok(())
    }

    /// See [`Held`].
    pub async fn hold(&self) -> Held {
        Held(self.0.sync.clone().read_owned().await)
    }

    /// Whether any plugin wants to hear of it. One that does not exist costs nothing more.
    pub fn wants(&self, event: Event) -> bool {
        self.0.plugins.read().iter().any(|p| p.wants(event))
    }

    fn wanting(&self, event: Event) -> impl Iterator<Item = Arc<Plugin>> + use<> {
        let all = self.0.plugins.read().clone();
        (0..all.len()).map(move |i| all[i].clone()).filter(move |p| p.wants(event))
    }

    /// Asks about RunPodSandbox.
    ///
    /// # Errors
    /// When a plugin refuses; those after it are not asked.
    pub async fn run_pod(&self, pod: api::PodSandbox) -> Result<(), Error> {
        let event = Event::RunPodSandbox;
        let old = old_event(event, &pod, None);
        let request = api::PodRequest { pod: Some(pod) };
        for plugin in self.wanting(event) {
            plugin.ask::<api::Empty>(event, &request, Some(&old)).await?;
        }
        Ok(())
    }

    /// Asks about UpdatePodSandbox.
    ///
    /// # Errors
    /// As [`Nri::run_pod`].
    pub async fn update_pod(&self, request: api::UpdatePodSandboxRequest) -> Result<(), Error> {
        let event = Event::UpdatePodSandbox;
        for plugin in self.wanting(event) {
            plugin.ask::<api::Empty>(event, &request, None).await?;
        }
        Ok(())
    }

    /// Asks about StartContainer.
    ///
    /// # Errors
    /// As [`Nri::run_pod`].
    pub async fn start_container(
        &self,
        pod: api::PodSandbox,
        container: api::Container,
    ) -> Result<(), Error> {
        let event = Event::StartContainer;
        let old = old_event(event, &pod, Some(&container));
        let request = api::ContainerRequest { pod: Some(pod), container: Some(container) };
        for plugin in self.wanting(event) {
            plugin.ask::<api::Empty>(event, &request, Some(&old)).await?;
        }
        Ok(())
    }

    /// Tells of what has happened to a pod. What a plugin says against it is logged.
    pub async fn tell_of_pod(&self, event: Event, pod: api::PodSandbox) {
        let old = old_event(event, &pod, None);
        let request = api::PodRequest { pod: Some(pod) };
        for plugin in self.wanting(event) {
            if let Err(e) = plugin.ask::<api::Empty>(event, &request, Some(&old)).await {
                tracing::warn!(pod = %old.pod.as_ref().map_or("", |p| &p.id), error = %e, "an NRI plugin failed");
            }
        }
    }

    /// Tells of what has happened to a container. What a plugin says against it is logged. Of StopContainer's answers the updates
    /// of other containers are returned.
    pub async fn tell_of_container(
        &self,
        event: Event,
        pod: api::PodSandbox,
        container: api::Container,
    ) -> Vec<api::ContainerUpdate> {
        let old = old_event(event, &pod, Some(&container));
        let request = api::ContainerRequest { pod: Some(pod), container: Some(container) };
        let mut updates = Updates::default();
        for plugin in self.wanting(event) {
            // All other answers are empty, which this one reads as well.
            let told = match plugin.ask::<api::StopContainerResponse>(event, &request, Some(&old)).await {
                Ok(answer) => updates.apply(&plugin.name.to_string(), answer.unwrap_or_default().update),
                Err(e) => Err(e),
            };
            if let Err(e) = told {
                tracing::warn!(container = %old.container.as_ref().map_or("", |c| &c.id), error = %e, "an NRI plugin failed");
            }
        }
        updates.others
    }

    /// Asks what a container is to become.
    ///
    /// # Errors
    /// When a plugin refuses, two want the same, or a validator does not accept the whole.
    pub async fn create_container(
        &self,
        pod: api::PodSandbox,
        container: api::Container,
    ) -> Result<Created, Error> {
        let (event, all) = (Event::CreateContainer, self.0.plugins.read().clone());
        let validators: Vec<_> = self.wanting(Event::ValidateContainerAdjustment).collect();
        let pristine = (!validators.is_empty()).then(|| container.clone());
        let mut creation = Creation::new(container);
        for plugin in all.iter().filter(|p| p.wants(event)) {
            let container = Some(creation.container.clone());
            let request = api::ContainerRequest { pod: Some(pod.clone()), container };
            if let Some(answer) = plugin.ask::<api::CreateContainerResponse>(event, &request, None).await? {
                creation.apply(&plugin.name.to_string(), answer)?;
            }
        }
        if pristine.is_some() {
            let plugins = all
                .iter()
                .map(|p| api::PluginInstance { name: p.name.base.clone(), index: p.name.index.clone() });
            let request = api::ValidateContainerAdjustmentRequest {
                pod: Some(pod),
                container: pristine,
                adjust: Some(creation.adjust.clone()),
                update: creation.updates.others.clone(),
                owners: Some(creation.updates.owners.0.clone()),
                plugins: plugins.collect(),
            };
            // One that is gone meanwhile has nothing to say.
            for plugin in validators.iter().filter(|p| p.wants(Event::ValidateContainerAdjustment)) {
                plugin.validate(&request).await?;
            }
        }
        let Creation { adjust, updates, .. } = creation;
        Ok(Created { adjust, updates: updates.others, owners: updates.owners })
    }

    /// Asks what an update is to become.
    ///
    /// # Errors
    /// When a plugin refuses, or two want the same.
    pub async fn update_container(
        &self,
        pod: api::PodSandbox,
        container: api::Container,
        resources: api::LinuxResources,
    ) -> Result<Updated, Error> {
        let event = Event::UpdateContainer;
        let mut updates = Updates::requested(&container.id, resources);
        let mut request =
            api::UpdateContainerRequest { pod: Some(pod), container: Some(container), linux_resources: None };
        for plugin in self.wanting(event) {
            request.linux_resources = updates.requested.as_ref().map(|(_, resources)| resources.clone());
            let answer = plugin.ask::<api::UpdateContainerResponse>(event, &request, None).await?;
            let answer = answer.unwrap_or_default();
            let name = plugin.name.to_string();
            warn_of_evictions(&name, &answer.evict);
            updates.apply(&name, answer.update)?;
        }
        let resources = updates.requested.map(|(_, resources)| resources).unwrap_or_default();
        Ok(Updated { resources, updates: updates.others, owners: updates.owners })
    }
}

impl Inner {
    fn change(&self, change: impl FnOnce(&mut Vec<Arc<Plugin>>)) {
        let mut held = self.plugins.write();
        let mut next = held.to_vec();
        change(&mut next);
        *held = next.into();
    }
}

/// What a plugin of an older interface is told.
fn old_event(
    event: Event,
    pod: &api::PodSandbox,
    container: Option<&api::Container>,
) -> api::StateChangeEvent {
    api::StateChangeEvent { event: event as i32, pod: Some(pod.clone()), container: container.cloned() }
}

/// Answers a registered plugin's calls until its connection ends.
async fn answer_calls(
    connection: &Connection,
    mut calls: mpsc::Receiver<Incoming>,
    plugin: &str,
    host: &dyn Host,
) {
    loop {
        let call = tokio::select! {
            // A call that is lost with its connection needs no answer.
            call = calls.recv() => call,
            () = connection.ended() => None,
        };
        let Some(call) = call else { return };
        match call.method.as_str() {
            "UpdateContainers" => {
                let answer = match api::UpdateContainersRequest::decode(&*call.payload) {
                    Ok(request) => {
                        warn_of_evictions(plugin, &request.evict);
                        let failed = host.update(plugin, request.update).await;
                        Ok(api::UpdateContainersResponse { failed }.encode_to_vec())
                    }
                    Err(e) => Err((code::INVALID_ARGUMENT, format!("the request cannot be read: {e}"))),
                };
                connection.answer(&call, answer);
            }
            "RegisterPlugin" => {
                connection.answer(&call, Err((code::FAILED_PRECONDITION, "registered already".to_owned())));
                connection.close("it registered twice");
            }
            other => {
                connection.answer(&call, Err((code::UNIMPLEMENTED, format!("there is no method {other:?}"))));
            }
        }
    }
}

#[cfg(test)]
mod tests;
