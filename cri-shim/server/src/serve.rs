//! Starting and stopping the server.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use orlop_base::durable::DirLock;
use orlop_base::supervise::{Ready, TaskGroup};
use orlop_images::ImageStore;
use orlop_proto::cri;
use orlop_proto::cri::image_service_server::ImageServiceServer;
use orlop_proto::cri::runtime_service_server::RuntimeServiceServer;
use orlop_proto::images::images_server::ImagesServer;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;

use crate::config::{CgroupDriver, Config};
use crate::container::create::SANDBOX_FILES;
use crate::deadline::Deadline;
use crate::error::{Error, Result};
use crate::events::Events;
use crate::facts::Facts;
use crate::monitor::Starter;
use crate::network::Network;
use crate::nri::Plugins;
use crate::runtime::{Runtime, new_id};
use crate::service::Service;
use crate::store::{CONTAINER_RECORD, Folders, SANDBOX_RECORD, Store};
use crate::streaming::{self, Sessions};

/// The largest message either way: upstream's kubelet and crictl use the same.
const MAX_MESSAGE: usize = 16 << 20;
/// How long running requests may take to finish once told to stop.
const DRAIN: Duration = Duration::from_secs(10);

async fn open(
    config: Config,
    stop: &CancellationToken,
    streaming_at: std::net::SocketAddr,
) -> Result<Arc<Runtime>> {
    for dir in [&config.state_dir, &config.run_dir] {
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o711))
            .map_err(Error::io("set the mode of", dir))?;
    }
    crate::mounts::keep_in_memory(&config.run_dir)?;
    // Nobody else lists pods, whose names lead to root file systems (CVE-2021-41103, CVE-2024-25621).
    for dir in
        [config.run_dir.join("s"), config.state_dir.join("sandboxes"), config.state_dir.join("containers")]
    {
        fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o711))
            .map_err(Error::io("set the mode of", &dir))?;
    }
    let images = ImageStore::open(&config.images_dir, config.images.clone()).await?;
    crate::selinux::label_images(&config.images_dir).await;
    let runtime = Arc::new(Runtime {
        network: Network::new(&config),
        images,
        store: Store::default(),
        sandbox_folders: Folders::new(config.workshop_dir("sandboxes"), SANDBOX_RECORD, &SANDBOX_FILES)?,
        container_folders: Folders::new(config.workshop_dir("containers"), CONTAINER_RECORD, &[])?,
        monitors: Starter::new(&config.monitor, config.sandbox_run_dir(&new_id()).as_os_str().len()),
        events: Events::default(),
        sessions: Sessions::new(streaming_at),
        facts: Facts::read(),
        apparmor: Default::default(),
        plugins: Plugins::new(config.nri.clone()),
        layers: Default::default(),
        tasks: TaskGroup::new(stop),
        config,
    });
    crate::container::checkpoint::end_left_over(&runtime.config.transfer_dir()).await;
    // Archives that a killed server was receiving.
    crate::mounts::remove_tree(&runtime.config.transfer_dir())?;
    runtime.keep_writing();
    runtime.recover().await?;
    Ok(runtime)
}

/// A socket file that nobody listens on is left from a killed server.
async fn listen(path: &Path) -> Result<UnixListener> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    }
    let at = || path.display().to_string();
    if path.exists() {
        if UnixStream::connect(path).await.is_ok() {
            return Err(Error::Listen { at: at(), source: std::io::ErrorKind::AddrInUse.into() });
        }
        fs::remove_file(path).map_err(Error::io("remove", path))?;
    }
    let listener = UnixListener::bind(path).map_err(|source| Error::Listen { at: at(), source })?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))
        .map_err(Error::io("set the mode of", path))?;
    Ok(listener)
}

/// Where the bus is by the D-Bus specification, unless the environment says something else.
const SYSTEM_BUS: &str = "/var/run/dbus/system_bus_socket";

/// Scopes are asked for over the system's bus. On cgroup v1 the driver makes folders itself.
fn check_bus(driver: CgroupDriver) -> Result<()> {
    let elsewhere = std::env::var_os("DBUS_SYSTEM_BUS_ADDRESS").is_some();
    if driver == CgroupDriver::Systemd
        && crate::facts::cgroup_v2_only()
        && !elsewhere
        && !Path::new(SYSTEM_BUS).exists()
    {
        return Err(Error::NoSystemBus { at: SYSTEM_BUS });
    }
    Ok(())
}

/// Serves both CRI services until `stop`. Sandboxes and containers of an earlier run are adopted first.
///
/// # Errors
/// When the folders are in use by another server, cannot be written, or a socket cannot be made. Containers run on in any case.
pub async fn run(config: Config, ready: Ready, stop: CancellationToken) -> Result<()> {
    check_bus(config.cgroup_driver)?;
    let _lock = DirLock::take(&config.state_dir).await?;
    let streaming = TcpListener::bind(config.streaming_listen)
        .await
        .map_err(|source| Error::Listen { at: config.streaming_listen.to_string(), source })?;
    let at = streaming
        .local_addr()
        .map_err(|source| Error::Listen { at: "the streaming address".into(), source })?;
    let (socket, run_dir) = (config.listen.clone(), config.run_dir.clone());
    let (parent, v2) = (config.default_cgroup_parent.clone(), crate::facts::cgroup_v2_only());
    let listener = listen(&socket).await?;
    let runtime = open(config, &stop, at).await?;
    runtime.facts.warn();
    runtime.start_plugins().await;
    let tasks = runtime.tasks.clone();
    tasks.spawn_essential("streaming server", streaming::serve(runtime.clone(), streaming));
    let service = Service(runtime.clone());
    let server = tonic::transport::Server::builder()
        .layer(tower::layer::layer_fn(Deadline::new))
        .add_service(
            RuntimeServiceServer::new(service.clone())
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(36 << 20),
        )
        .add_service(
            ImageServiceServer::new(service.clone())
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(MAX_MESSAGE),
        )
        .add_service(ImagesServer::new(service));
    let token = tasks.stop_token();
    tasks.spawn_essential("CRI server", async move {
        let stopped = token.clone();
        // Event streams end only with their clients, so a graceful end is waited for, but not for ever.
        let serving =
            server.serve_with_incoming_shutdown(UnixListenerStream::new(listener), token.cancelled_owned());
        tokio::select! {
            done = serving => done,
            () = async { stopped.cancelled().await; tokio::time::sleep(DRAIN / 2).await } => Ok(()),
        }
    });
    runtime.keep_spares();
    tracing::info!(socket = %socket.display(), streaming = %at, "CRI server is ready");
    ready.set();
    let ended = tasks.run_until_stopped(DRAIN).await;
    runtime.images.close(DRAIN).await;
    crate::mounts::let_go_if_unused(&run_dir);
    // Not with the last pod: the next one would make it anew, in every hierarchy.
    crate::stats::cgroup::remove_empty_parent(v2, &parent);
    // Another server may have replaced the file only after we let go of the lock, which we still hold.
    let _ = fs::remove_file(&socket);
    Ok(ended?)
}

/// Stops and removes every sandbox and everything of it: processes, mounts, namespaces, network attachments. For `make down`.
/// Images stay.
pub async fn purge(config: Config) -> Result<()> {
    let _lock = DirLock::take(&config.state_dir).await?;
    if let Some(nri) = &config.nri {
        orlop_nri::remove_dead_socket(&nri.socket).await;
    }
    let run_dir = config.run_dir.clone();
    let parent = config.default_cgroup_parent.clone();
    let v2 = crate::facts::cgroup_v2_only();
    let stop = CancellationToken::new();
    let runtime = open(config, &stop, ([127, 0, 0, 1], 0).into()).await?;
    let mut first_error = None;
    for sandbox in runtime.store.sandboxes() {
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: sandbox.id.clone() };
        if let Err(e) = runtime.remove_pod_sandbox(request).await {
            tracing::error!(sandbox = %sandbox.id, error = %e, "could not remove the sandbox");
            first_error.get_or_insert(e);
        }
    }
    let tasks = runtime.tasks.clone();
    stop.cancel();
    let ended = tasks.run_until_stopped(DRAIN).await;
    runtime.images.close(DRAIN).await;
    ended?;
    if let Some(e) = first_error {
        return Err(e);
    }
    runtime.network.leave();
    crate::mounts::remove_tree(&run_dir)?;
    crate::stats::cgroup::remove_empty_parent(v2, &parent);
    Ok(())
}
