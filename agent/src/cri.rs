//! A thin client of the CRI runtime and image services.

use std::path::{Path, PathBuf};
use std::time::Duration;

use orlop_proto::cri::image_service_client::ImageServiceClient;
use orlop_proto::cri::runtime_service_client::RuntimeServiceClient;
use orlop_proto::cri::*;
use tonic::transport::{Channel, Endpoint, Uri};

/// A CRI call that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the container runtime's {call} failed: {}", status.message())]
    Call { call: &'static str, status: Box<tonic::Status> },
    #[error("cannot use the CRI socket {path}; is the container runtime running?", path = path.display())]
    Connect { path: PathBuf, source: tonic::transport::Error },
}

impl Error {
    /// The gRPC code, `Unknown` for connection set-up.
    pub fn code(&self) -> tonic::Code {
        match self {
            Error::Call { status, .. } => status.code(),
            Error::Connect { .. } => tonic::Code::Unknown,
        }
    }

    pub fn is_not_found(&self) -> bool {
        self.code() == tonic::Code::NotFound
    }

    /// The runtime's own words.
    pub fn message(&self) -> String {
        match self {
            Error::Call { status, .. } => status.message().to_owned(),
            Error::Connect { source, .. } => source.to_string(),
        }
    }
}

/// Calls that should be quick; upstream's runtime-request-timeout.
const TIMEOUT: Duration = Duration::from_secs(120);
/// Image pulls may take as long as they make progress; the runtime itself gives up on a stuck one.
const PULL_TIMEOUT: Duration = Duration::from_secs(3600);
/// Every call's bound, whatever a pod or a caller names: tonic panics on what its header cannot say (99999999 hours).
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);
/// Messages up to 16 MiB, as upstream's client allows.
const MAX_MESSAGE: usize = 16 << 20;

/// Handle to the runtime; cloning is cheap and shares one connection, which reconnects by itself.
#[derive(Clone, Debug)]
pub struct Cri {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

/// Pure: how long to wait for a checkpoint that may take `seconds`; the runtime takes an hour at most.
fn checkpoint_limit(seconds: i64) -> Duration {
    match u64::try_from(seconds) {
        Ok(0) | Err(_) => PULL_TIMEOUT,
        Ok(s) => Duration::from_secs(s).min(PULL_TIMEOUT) + Duration::from_secs(10),
    }
}

macro_rules! call {
    ($self:ident.$client:ident.$name:ident, $request:expr, $timeout:expr, $label:literal) => {{
        let mut request = tonic::Request::new($request);
        request.set_timeout($timeout.min(LONGEST));
        let call = $self.$client.clone().$name(request).await;
        call.map(tonic::Response::into_inner)
            .map_err(|status| Error::Call { call: $label, status: Box::new(status) })
    }};
}

macro_rules! calls {
    ($($client:ident.$name:ident($req:ident) -> $resp:ident, $label:literal;)*) => {
        /// One method per RPC, with the standard time limit.
        impl Cri {
            $(pub async fn $name(&self, request: $req) -> Result<$resp, Error> {
                call!(self.$client.$name, request, TIMEOUT, $label)
            })*
        }
    };
}

calls! {
    runtime.version(VersionRequest) -> VersionResponse, "Version";
    runtime.status(StatusRequest) -> StatusResponse, "Status";
    runtime.runtime_config(RuntimeConfigRequest) -> RuntimeConfigResponse, "RuntimeConfig";
    runtime.run_pod_sandbox(RunPodSandboxRequest) -> RunPodSandboxResponse, "RunPodSandbox";
    runtime.stop_pod_sandbox(StopPodSandboxRequest) -> StopPodSandboxResponse, "StopPodSandbox";
    runtime.remove_pod_sandbox(RemovePodSandboxRequest) -> RemovePodSandboxResponse, "RemovePodSandbox";
    runtime.pod_sandbox_status(PodSandboxStatusRequest) -> PodSandboxStatusResponse, "PodSandboxStatus";
    runtime.list_pod_sandbox(ListPodSandboxRequest) -> ListPodSandboxResponse, "ListPodSandbox";
    runtime.create_container(CreateContainerRequest) -> CreateContainerResponse, "CreateContainer";
    runtime.start_container(StartContainerRequest) -> StartContainerResponse, "StartContainer";
    runtime.remove_container(RemoveContainerRequest) -> RemoveContainerResponse, "RemoveContainer";
    runtime.list_containers(ListContainersRequest) -> ListContainersResponse, "ListContainers";
    runtime.container_status(ContainerStatusRequest) -> ContainerStatusResponse, "ContainerStatus";
    runtime.update_container_resources(UpdateContainerResourcesRequest) -> UpdateContainerResourcesResponse, "UpdateContainerResources";
    runtime.reopen_container_log(ReopenContainerLogRequest) -> ReopenContainerLogResponse, "ReopenContainerLog";
    runtime.update_runtime_config(UpdateRuntimeConfigRequest) -> UpdateRuntimeConfigResponse, "UpdateRuntimeConfig";
    runtime.exec(ExecRequest) -> ExecResponse, "Exec";
    runtime.attach(AttachRequest) -> AttachResponse, "Attach";
    runtime.port_forward(PortForwardRequest) -> PortForwardResponse, "PortForward";
    runtime.container_stats(ContainerStatsRequest) -> ContainerStatsResponse, "ContainerStats";
    runtime.list_container_stats(ListContainerStatsRequest) -> ListContainerStatsResponse, "ListContainerStats";
    runtime.list_pod_sandbox_stats(ListPodSandboxStatsRequest) -> ListPodSandboxStatsResponse, "ListPodSandboxStats";
    runtime.pod_sandbox_stats(PodSandboxStatsRequest) -> PodSandboxStatsResponse, "PodSandboxStats";
    runtime.list_metric_descriptors(ListMetricDescriptorsRequest) -> ListMetricDescriptorsResponse, "ListMetricDescriptors";
    runtime.list_pod_sandbox_metrics(ListPodSandboxMetricsRequest) -> ListPodSandboxMetricsResponse, "ListPodSandboxMetrics";
    images.list_images(ListImagesRequest) -> ListImagesResponse, "ListImages";
    images.image_status(ImageStatusRequest) -> ImageStatusResponse, "ImageStatus";
    images.remove_image(RemoveImageRequest) -> RemoveImageResponse, "RemoveImage";
    images.image_fs_info(ImageFsInfoRequest) -> ImageFsInfoResponse, "ImageFsInfo";
}

impl Cri {
    /// Uses the socket; connects with the first call, so the runtime may start later.
    pub fn new(socket: &Path) -> Result<Cri, Error> {
        let path = socket.to_owned();
        let bad = |source| Error::Connect { path: socket.to_owned(), source };
        // The authority is not used over a unix socket but must be there.
        let endpoint = Endpoint::try_from("http://cri").map_err(bad)?.connect_timeout(Duration::from_secs(5));
        let channel = endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
        }));
        Ok(Cri {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE),
            images: ImageServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE),
        })
    }

    /// Stops a container; `grace` in seconds between SIGTERM and SIGKILL.
    pub async fn stop_container(&self, container_id: &str, grace: i64) -> Result<(), Error> {
        let timeout = TIMEOUT + Duration::from_secs(grace.max(0) as u64);
        let request = StopContainerRequest { container_id: container_id.to_owned(), timeout: grace };
        call!(self.runtime.stop_container, request, timeout, "StopContainer").map(|_| ())
    }

    /// Runs a command to its end; `timeout` zero waits as long as it takes.
    pub async fn exec_sync(
        &self,
        container_id: &str,
        cmd: Vec<String>,
        timeout: Duration,
    ) -> Result<ExecSyncResponse, Error> {
        let limit = if timeout.is_zero() { PULL_TIMEOUT } else { timeout + Duration::from_secs(10) };
        let request = ExecSyncRequest {
            container_id: container_id.to_owned(),
            cmd,
            timeout: timeout.as_secs_f64().ceil() as i64,
        };
        call!(self.runtime.exec_sync, request, limit, "ExecSync")
    }

    /// Returns when the archive is written; a timeout of zero is the runtime's own.
    pub async fn checkpoint_container(&self, request: CheckpointContainerRequest) -> Result<(), Error> {
        let limit = checkpoint_limit(request.timeout);
        call!(self.runtime.checkpoint_container, request, limit, "CheckpointContainer").map(|_| ())
    }

    pub async fn pull_image(&self, request: PullImageRequest) -> Result<PullImageResponse, Error> {
        call!(self.images.pull_image, request, PULL_TIMEOUT, "PullImage")
    }

    /// The runtime's event stream; an error with `Unimplemented` when it has none.
    pub async fn container_events(&self) -> Result<tonic::Streaming<ContainerEventResponse>, Error> {
        let call = self.runtime.clone().get_container_events(GetEventsRequest {}).await;
        call.map(tonic::Response::into_inner)
            .map_err(|status| Error::Call { call: "GetContainerEvents", status: Box::new(status) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_ends_within_an_hour() {
        let seconds = |s| checkpoint_limit(s).as_secs();
        assert_eq!([0, -1, 5, i64::MAX].map(seconds), [3600, 3600, 15, 3610]);
    }

    #[tokio::test]
    async fn no_time_is_too_long_for_a_call() {
        let dir = tempfile::tempdir().unwrap();
        let cri = Cri::new(&dir.path().join("nobody.sock")).unwrap();
        let request = CheckpointContainerRequest { timeout: i64::MAX, ..Default::default() };
        assert!(cri.checkpoint_container(request).await.is_err());
        assert!(cri.stop_container("a", i64::MAX).await.is_err());
    }
}
