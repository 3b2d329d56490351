//! A container runtime in memory, served over a real CRI socket. It counts what is asked of it.

use std::collections::BTreeMap;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use futures::Stream;
use orlop_proto::cri::image_service_server::{ImageService, ImageServiceServer};
use orlop_proto::cri::runtime_service_server::{RuntimeService, RuntimeServiceServer};
use orlop_proto::cri::*;
use parking_lot::Mutex;
use tokio::sync::broadcast;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{BroadcastStream, UnixListenerStream};
use tonic::{Request, Response, Status};

type Answer<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[derive(Default)]
pub struct World {
    pub sandboxes: BTreeMap<String, (PodSandboxConfig, bool, i64)>,
    pub containers: BTreeMap<String, Made>,
    /// What was asked, in order: `run p`, `create a`, `start a`, `stop a 30`, `exec true`.
    pub calls: Vec<String>,
    /// Exit code that exec answers with.
    pub exec_code: i32,
    /// What images are pulled with; empty without credentials.
    pub password: String,
}

#[derive(Clone)]
pub struct Made {
    pub config: ContainerConfig,
    pub sandbox: String,
    pub state: ContainerState,
    pub created: i64,
    pub finished: i64,
    pub code: i32,
}

#[derive(Clone)]
pub struct Fake {
    pub world: Arc<Mutex<World>>,
    events: broadcast::Sender<ContainerEventResponse>,
    next: Arc<AtomicI64>,
}

impl Fake {
    pub fn serve(socket: &Path) -> Fake {
        let fake = Fake {
            world: Arc::default(),
            events: broadcast::channel(64).0,
            next: Arc::new(AtomicI64::new(1)),
        };
        let listener = UnixListenerStream::new(tokio::net::UnixListener::bind(socket).unwrap());
        let serve = tonic::transport::Server::builder()
            .add_service(RuntimeServiceServer::new(fake.clone()))
            .add_service(ImageServiceServer::new(fake.clone()))
            .serve_with_incoming(listener);
        tokio::spawn(serve);
        fake
    }

    fn time(&self) -> i64 {
        jiff::Timestamp::now().as_nanosecond() as i64 + self.next.fetch_add(1, Ordering::SeqCst)
    }

    fn tell(&self, kind: ContainerEventType, id: &str, sandbox: &str) {
        let metadata = self.world.lock().sandboxes.get(sandbox).and_then(|s| s.0.metadata.clone());
        let pod_sandbox_status = Some(PodSandboxStatus { metadata, ..Default::default() });
        let _ = self.events.send(ContainerEventResponse {
            container_id: id.to_owned(),
            container_event_type: kind as i32,
            pod_sandbox_status,
            ..Default::default()
        });
    }

    /// A container's process ends by itself.
    pub fn exit(&self, name: &str, code: i32) {
        let (id, sandbox) = {
            let mut w = self.world.lock();
            let running = |m: &Made| {
                m.state == ContainerState::ContainerRunning
                    && m.config.metadata.as_ref().is_some_and(|c| c.name == name)
            };
            let (id, m) =
                w.containers.iter_mut().find(|(_, m)| running(m)).expect("no such running container");
            m.state = ContainerState::ContainerExited;
            m.code = code;
            m.finished = jiff::Timestamp::now().as_nanosecond() as i64;
            (id.clone(), m.sandbox.clone())
        };
        self.tell(ContainerEventType::ContainerStoppedEvent, &id, &sandbox);
    }

    pub fn running(&self, name: &str) -> Vec<String> {
        let w = self.world.lock();
        let all = w.containers.iter().filter(|(_, m)| m.state == ContainerState::ContainerRunning);
        all.filter(|(_, m)| m.config.metadata.as_ref().is_some_and(|c| c.name == name))
            .map(|(id, _)| id.clone())
            .collect()
    }

    pub fn called(&self, what: &str) -> usize {
        self.world.lock().calls.iter().filter(|c| *c == what).count()
    }
}

fn name_of(c: &ContainerConfig) -> String {
    c.metadata.as_ref().map(|m| m.name.clone()).unwrap_or_default()
}

fn fits(
    labels: &std::collections::HashMap<String, String>,
    wanted: &std::collections::HashMap<String, String>,
) -> bool {
    wanted.iter().all(|(k, v)| labels.get(k) == Some(v))
}

fn not_found() -> Status {
    Status::not_found("no such thing")
}

macro_rules! absent {
    ({$($name:ident($req:ident) -> $resp:ident;)*} {$($stream:ident $sname:ident($sreq:ident) -> $sresp:ident;)*} $($rest:tt)*) => {
        #[tonic::async_trait]
        impl RuntimeService for Fake {
            $(async fn $name(&self, _: Request<$req>) -> Answer<$resp> {
                Err(Status::unimplemented(stringify!($name)))
            })*
            $(type $stream = Streamed<$sresp>;
            async fn $sname(&self, _: Request<$sreq>) -> Answer<Self::$stream> {
                Err(Status::unimplemented(stringify!($sname)))
            })*
            $($rest)*
        }
    };
}

absent! {
    {
        update_container_resources(UpdateContainerResourcesRequest) -> UpdateContainerResourcesResponse;
        reopen_container_log(ReopenContainerLogRequest) -> ReopenContainerLogResponse;
        exec(ExecRequest) -> ExecResponse;
        attach(AttachRequest) -> AttachResponse;
        port_forward(PortForwardRequest) -> PortForwardResponse;
        container_stats(ContainerStatsRequest) -> ContainerStatsResponse;
        list_container_stats(ListContainerStatsRequest) -> ListContainerStatsResponse;
        pod_sandbox_stats(PodSandboxStatsRequest) -> PodSandboxStatsResponse;
        list_pod_sandbox_stats(ListPodSandboxStatsRequest) -> ListPodSandboxStatsResponse;
        update_runtime_config(UpdateRuntimeConfigRequest) -> UpdateRuntimeConfigResponse;
        checkpoint_container(CheckpointContainerRequest) -> CheckpointContainerResponse;
        list_metric_descriptors(ListMetricDescriptorsRequest) -> ListMetricDescriptorsResponse;
        list_pod_sandbox_metrics(ListPodSandboxMetricsRequest) -> ListPodSandboxMetricsResponse;
        update_pod_sandbox_resources(UpdatePodSandboxResourcesRequest) -> UpdatePodSandboxResourcesResponse;
    }
    {
        StreamPodSandboxesStream stream_pod_sandboxes(StreamPodSandboxesRequest) -> StreamPodSandboxesResponse;
        StreamContainersStream stream_containers(StreamContainersRequest) -> StreamContainersResponse;
        StreamContainerStatsStream stream_container_stats(StreamContainerStatsRequest) -> StreamContainerStatsResponse;
        StreamPodSandboxStatsStream stream_pod_sandbox_stats(StreamPodSandboxStatsRequest) -> StreamPodSandboxStatsResponse;
        StreamPodSandboxMetricsStream stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest) -> StreamPodSandboxMetricsResponse;
    }

    type GetContainerEventsStream = Streamed<ContainerEventResponse>;

    async fn get_container_events(&self, _: Request<GetEventsRequest>) -> Answer<Self::GetContainerEventsStream> {
        let stream = BroadcastStream::new(self.events.subscribe()).filter_map(|e| e.ok().map(Ok));
        Ok(Response::new(Box::pin(stream)))
    }

    async fn version(&self, _: Request<VersionRequest>) -> Answer<VersionResponse> {
        Ok(Response::new(VersionResponse {
            version: "v1".into(),
            runtime_name: "fake".into(),
            runtime_version: "1".into(),
            runtime_api_version: "v1".into(),
        }))
    }

    async fn runtime_config(&self, _: Request<RuntimeConfigRequest>) -> Answer<RuntimeConfigResponse> {
        let linux = Some(LinuxRuntimeConfiguration { cgroup_driver: CgroupDriver::Cgroupfs as i32 });
        Ok(Response::new(RuntimeConfigResponse { linux }))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Answer<StatusResponse> {
        let conditions = ["RuntimeReady", "NetworkReady"]
            .map(|t| RuntimeCondition { r#type: t.into(), status: true, ..Default::default() })
            .into();
        Ok(Response::new(StatusResponse { status: Some(RuntimeStatus { conditions }), ..Default::default() }))
    }

    async fn run_pod_sandbox(&self, r: Request<RunPodSandboxRequest>) -> Answer<RunPodSandboxResponse> {
        let config = r.into_inner().config.unwrap_or_default();
        let at = self.time();
        let pod_sandbox_id = format!("s{at}");
        let mut w = self.world.lock();
        w.calls.push(format!("run {}", config.metadata.as_ref().map(|m| m.name.as_str()).unwrap_or_default()));
        w.sandboxes.insert(pod_sandbox_id.clone(), (config, true, at));
        Ok(Response::new(RunPodSandboxResponse { pod_sandbox_id }))
    }

    async fn stop_pod_sandbox(&self, r: Request<StopPodSandboxRequest>) -> Answer<StopPodSandboxResponse> {
        if let Some(s) = self.world.lock().sandboxes.get_mut(&r.into_inner().pod_sandbox_id) {
            s.1 = false;
        }
        Ok(Response::new(StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(&self, r: Request<RemovePodSandboxRequest>) -> Answer<RemovePodSandboxResponse> {
        let id = r.into_inner().pod_sandbox_id;
        let mut w = self.world.lock();
        w.sandboxes.remove(&id);
        w.containers.retain(|_, m| m.sandbox != id);
        Ok(Response::new(RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(&self, r: Request<PodSandboxStatusRequest>) -> Answer<PodSandboxStatusResponse> {
        let id = r.into_inner().pod_sandbox_id;
        let w = self.world.lock();
        let (config, ready, at) = w.sandboxes.get(&id).ok_or_else(not_found)?;
        let status = PodSandboxStatus {
            id,
            metadata: config.metadata.clone(),
            state: i32::from(!ready),
            created_at: *at,
            network: Some(PodSandboxNetworkStatus { ip: "127.0.0.1".into(), additional_ips: vec![] }),
            ..Default::default()
        };
        Ok(Response::new(PodSandboxStatusResponse { status: Some(status), ..Default::default() }))
    }

    async fn list_pod_sandbox(&self, r: Request<ListPodSandboxRequest>) -> Answer<ListPodSandboxResponse> {
        let wanted = r.into_inner().filter.unwrap_or_default().label_selector;
        let w = self.world.lock();
        let items = w.sandboxes.iter().filter(|(_, s)| fits(&s.0.labels, &wanted));
        let items = items.map(|(id, (config, ready, at))| PodSandbox {
            id: id.clone(),
            metadata: config.metadata.clone(),
            state: i32::from(!ready),
            created_at: *at,
            labels: config.labels.clone(),
            annotations: config.annotations.clone(),
            ..Default::default()
        });
        Ok(Response::new(ListPodSandboxResponse { items: items.collect() }))
    }

    async fn create_container(&self, r: Request<CreateContainerRequest>) -> Answer<CreateContainerResponse> {
        let r = r.into_inner();
        let config = r.config.unwrap_or_default();
        let created = self.time();
        let container_id = format!("c{created}");
        let mut w = self.world.lock();
        w.calls.push(format!("create {}", name_of(&config)));
        let made = Made { config, sandbox: r.pod_sandbox_id, state: ContainerState::ContainerCreated, created, finished: 0, code: 0 };
        w.containers.insert(container_id.clone(), made);
        Ok(Response::new(CreateContainerResponse { container_id }))
    }

    async fn start_container(&self, r: Request<StartContainerRequest>) -> Answer<StartContainerResponse> {
        let id = r.into_inner().container_id;
        let sandbox = {
            let mut w = self.world.lock();
            let m = w.containers.get_mut(&id).ok_or_else(not_found)?;
            m.state = ContainerState::ContainerRunning;
            let (name, sandbox) = (name_of(&m.config), m.sandbox.clone());
            w.calls.push(format!("start {name}"));
            sandbox
        };
        self.tell(ContainerEventType::ContainerStartedEvent, &id, &sandbox);
        Ok(Response::new(StartContainerResponse {}))
    }

    async fn stop_container(&self, r: Request<StopContainerRequest>) -> Answer<StopContainerResponse> {
        let r = r.into_inner();
        let sandbox = {
            let mut w = self.world.lock();
            let m = w.containers.get_mut(&r.container_id).ok_or_else(not_found)?;
            m.state = ContainerState::ContainerExited;
            m.code = 143;
            m.finished = jiff::Timestamp::now().as_nanosecond() as i64;
            let (name, sandbox) = (name_of(&m.config), m.sandbox.clone());
            w.calls.push(format!("stop {name} {}", r.timeout));
            sandbox
        };
        self.tell(ContainerEventType::ContainerStoppedEvent, &r.container_id, &sandbox);
        Ok(Response::new(StopContainerResponse {}))
    }

    async fn remove_container(&self, r: Request<RemoveContainerRequest>) -> Answer<RemoveContainerResponse> {
        self.world.lock().containers.remove(&r.into_inner().container_id);
        Ok(Response::new(RemoveContainerResponse {}))
    }

    async fn list_containers(&self, r: Request<ListContainersRequest>) -> Answer<ListContainersResponse> {
        let wanted = r.into_inner().filter.unwrap_or_default().label_selector;
        let w = self.world.lock();
        let all = w.containers.iter().filter(|(_, m)| fits(&m.config.labels, &wanted));
        let containers = all.map(|(id, m)| Container {
            id: id.clone(),
            pod_sandbox_id: m.sandbox.clone(),
            metadata: m.config.metadata.clone(),
            state: m.state as i32,
            created_at: m.created,
            labels: m.config.labels.clone(),
            annotations: m.config.annotations.clone(),
            ..Default::default()
        });
        Ok(Response::new(ListContainersResponse { containers: containers.collect() }))
    }

    async fn container_status(&self, r: Request<ContainerStatusRequest>) -> Answer<ContainerStatusResponse> {
        let id = r.into_inner().container_id;
        let w = self.world.lock();
        let m = w.containers.get(&id).ok_or_else(not_found)?;
        let status = ContainerStatus {
            id: id.clone(),
            metadata: m.config.metadata.clone(),
            state: m.state as i32,
            created_at: m.created,
            started_at: m.created,
            finished_at: m.finished,
            exit_code: m.code,
            image: m.config.image.clone(),
            labels: m.config.labels.clone(),
            annotations: m.config.annotations.clone(),
            mounts: m.config.mounts.clone(),
            ..Default::default()
        };
        Ok(Response::new(ContainerStatusResponse { status: Some(status), ..Default::default() }))
    }

    async fn exec_sync(&self, r: Request<ExecSyncRequest>) -> Answer<ExecSyncResponse> {
        let mut w = self.world.lock();
        w.calls.push(format!("exec {}", r.into_inner().cmd.join(" ")));
        Ok(Response::new(ExecSyncResponse { exit_code: w.exec_code, ..Default::default() }))
    }
}

#[tonic::async_trait]
impl ImageService for Fake {
    type StreamImagesStream = Streamed<StreamImagesResponse>;

    async fn stream_images(&self, _: Request<StreamImagesRequest>) -> Answer<Self::StreamImagesStream> {
        Err(Status::unimplemented("stream_images"))
    }

    async fn list_images(&self, _: Request<ListImagesRequest>) -> Answer<ListImagesResponse> {
        Ok(Response::new(ListImagesResponse::default()))
    }

    async fn image_status(&self, r: Request<ImageStatusRequest>) -> Answer<ImageStatusResponse> {
        let id = r.into_inner().image.unwrap_or_default().image;
        Ok(Response::new(ImageStatusResponse {
            image: Some(Image { id, ..Default::default() }),
            ..Default::default()
        }))
    }

    async fn pull_image(&self, r: Request<PullImageRequest>) -> Answer<PullImageResponse> {
        let r = r.into_inner();
        let image_ref = r.image.unwrap_or_default().image;
        let password = r.auth.map(|a| a.password).unwrap_or_default();
        let mut w = self.world.lock();
        if password != w.password {
            return Err(Status::unknown(format!("pull access denied for {image_ref}")));
        }
        w.calls.push(format!("pull {image_ref}"));
        Ok(Response::new(PullImageResponse { image_ref }))
    }

    async fn remove_image(&self, _: Request<RemoveImageRequest>) -> Answer<RemoveImageResponse> {
        Ok(Response::new(RemoveImageResponse {}))
    }

    async fn image_fs_info(&self, _: Request<ImageFsInfoRequest>) -> Answer<ImageFsInfoResponse> {
        Ok(Response::new(ImageFsInfoResponse::default()))
    }
}
