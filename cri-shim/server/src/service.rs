//! The gRPC edge: each RPC hands over to the file of its name.

use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use orlop_proto::cri;
use orlop_proto::cri::image_service_server::ImageService;
use orlop_proto::cri::runtime_service_server::RuntimeService;
use tokio_stream::wrappers::BroadcastStream;
use tonic::{Request, Response, Status};

use crate::error::Error;
use crate::runtime::Runtime;

/// Both services.
#[derive(Clone)]
pub(crate) struct Service(pub Arc<Runtime>);

type Answer<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Items per message of the Stream* RPCs: large enough to be cheap, small enough to stay far below the message limit.
const BATCH: usize = 100;

fn answer<T>(name: &'static str, result: Result<T, Error>) -> Answer<T> {
    match result {
        Ok(v) => Ok(Response::new(v)),
        Err(e) => {
            let status = Status::from(e);
            tracing::info!(rpc = name, code = ?status.code(), message = status.message(), "refused");
            Err(status)
        }
    }
}

/// Sends `items` in batches of [`BATCH`]; an empty list is one empty message.
fn batches<T, M>(items: Vec<T>, wrap: fn(Vec<T>) -> M) -> Response<Streamed<M>>
where
    T: Send + 'static,
    M: Send + 'static,
{
    let mut messages = Vec::new();
    let mut items = items.into_iter().peekable();
    while items.peek().is_some() || messages.is_empty() {
        messages.push(Ok(wrap(items.by_ref().take(BATCH).collect())));
    }
    Response::new(Box::pin(futures::stream::iter(messages)))
}

#[tonic::async_trait]
impl RuntimeService for Service {
    async fn version(&self, _: Request<cri::VersionRequest>) -> Answer<cri::VersionResponse> {
        Ok(Response::new(crate::status::version()))
    }

    async fn run_pod_sandbox(
        &self,
        r: Request<cri::RunPodSandboxRequest>,
    ) -> Answer<cri::RunPodSandboxResponse> {
        answer("RunPodSandbox", self.0.run_pod_sandbox(r.into_inner()).await)
    }

    async fn stop_pod_sandbox(
        &self,
        r: Request<cri::StopPodSandboxRequest>,
    ) -> Answer<cri::StopPodSandboxResponse> {
        answer("StopPodSandbox", self.0.stop_pod_sandbox(r.into_inner()).await)
    }

    async fn remove_pod_sandbox(
        &self,
        r: Request<cri::RemovePodSandboxRequest>,
    ) -> Answer<cri::RemovePodSandboxResponse> {
        answer("RemovePodSandbox", self.0.remove_pod_sandbox(r.into_inner()).await)
    }

    async fn pod_sandbox_status(
        &self,
        r: Request<cri::PodSandboxStatusRequest>,
    ) -> Answer<cri::PodSandboxStatusResponse> {
        answer("PodSandboxStatus", self.0.pod_sandbox_status(r.into_inner()).await)
    }

    async fn list_pod_sandbox(
        &self,
        r: Request<cri::ListPodSandboxRequest>,
    ) -> Answer<cri::ListPodSandboxResponse> {
        let items = self.0.pod_sandboxes(r.into_inner().filter);
        Ok(Response::new(cri::ListPodSandboxResponse { items }))
    }

    type StreamPodSandboxesStream = Streamed<cri::StreamPodSandboxesResponse>;
    async fn stream_pod_sandboxes(
        &self,
        r: Request<cri::StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        let items = self.0.pod_sandboxes(r.into_inner().filter);
        Ok(batches(items, |pod_sandboxes| cri::StreamPodSandboxesResponse { pod_sandboxes }))
    }

    async fn create_container(
        &self,
        r: Request<cri::CreateContainerRequest>,
    ) -> Answer<cri::CreateContainerResponse> {
        answer("CreateContainer", self.0.create_container(r.into_inner()).await)
    }

    async fn start_container(
        &self,
        r: Request<cri::StartContainerRequest>,
    ) -> Answer<cri::StartContainerResponse> {
        answer("StartContainer", self.0.start_container(r.into_inner()).await)
    }

    async fn stop_container(
        &self,
        r: Request<cri::StopContainerRequest>,
    ) -> Answer<cri::StopContainerResponse> {
        answer("StopContainer", self.0.stop_container(r.into_inner()).await)
    }

    async fn remove_container(
        &self,
        r: Request<cri::RemoveContainerRequest>,
    ) -> Answer<cri::RemoveContainerResponse> {
        answer("RemoveContainer", self.0.remove_container(r.into_inner()).await)
    }

    async fn list_containers(
        &self,
        r: Request<cri::ListContainersRequest>,
    ) -> Answer<cri::ListContainersResponse> {
        let containers = self.0.list_containers(r.into_inner().filter);
        Ok(Response::new(cri::ListContainersResponse { containers }))
    }

    type StreamContainersStream = Streamed<cri::StreamContainersResponse>;
    async fn stream_containers(
        &self,
        r: Request<cri::StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        let items = self.0.list_containers(r.into_inner().filter);
        Ok(batches(items, |containers| cri::StreamContainersResponse { containers }))
    }

    async fn container_status(
        &self,
        r: Request<cri::ContainerStatusRequest>,
    ) -> Answer<cri::ContainerStatusResponse> {
        answer("ContainerStatus", self.0.container_status(r.into_inner()))
    }

    async fn update_container_resources(
        &self,
        r: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Answer<cri::UpdateContainerResourcesResponse> {
        answer("UpdateContainerResources", self.0.update_container_resources(r.into_inner()).await)
    }

    async fn reopen_container_log(
        &self,
        r: Request<cri::ReopenContainerLogRequest>,
    ) -> Answer<cri::ReopenContainerLogResponse> {
        answer("ReopenContainerLog", self.0.reopen_container_log(r.into_inner()).await)
    }

    async fn exec_sync(&self, r: Request<cri::ExecSyncRequest>) -> Answer<cri::ExecSyncResponse> {
        answer("ExecSync", self.0.exec_sync(r.into_inner()).await)
    }

    async fn exec(&self, r: Request<cri::ExecRequest>) -> Answer<cri::ExecResponse> {
        answer("Exec", self.0.exec_url(r.into_inner()))
    }

    async fn attach(&self, r: Request<cri::AttachRequest>) -> Answer<cri::AttachResponse> {
        answer("Attach", self.0.attach_url(r.into_inner()))
    }

    async fn port_forward(&self, r: Request<cri::PortForwardRequest>) -> Answer<cri::PortForwardResponse> {
        answer("PortForward", self.0.port_forward_url(r.into_inner()))
    }

    async fn container_stats(
        &self,
        r: Request<cri::ContainerStatsRequest>,
    ) -> Answer<cri::ContainerStatsResponse> {
        answer("ContainerStats", self.0.container_stats(&r.into_inner().container_id).await)
    }

    async fn list_container_stats(
        &self,
        r: Request<cri::ListContainerStatsRequest>,
    ) -> Answer<cri::ListContainerStatsResponse> {
        let stats = self.0.list_container_stats(r.into_inner().filter).await;
        Ok(Response::new(cri::ListContainerStatsResponse { stats }))
    }

    type StreamContainerStatsStream = Streamed<cri::StreamContainerStatsResponse>;
    async fn stream_container_stats(
        &self,
        r: Request<cri::StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        let items = self.0.list_container_stats(r.into_inner().filter).await;
        Ok(batches(items, |container_stats| cri::StreamContainerStatsResponse { container_stats }))
    }

    async fn pod_sandbox_stats(
        &self,
        r: Request<cri::PodSandboxStatsRequest>,
    ) -> Answer<cri::PodSandboxStatsResponse> {
        answer("PodSandboxStats", self.0.pod_sandbox_stats(&r.into_inner().pod_sandbox_id).await)
    }

    async fn list_pod_sandbox_stats(
        &self,
        r: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Answer<cri::ListPodSandboxStatsResponse> {
        let stats = self.0.list_pod_sandbox_stats(r.into_inner().filter).await;
        Ok(Response::new(cri::ListPodSandboxStatsResponse { stats }))
    }

    type StreamPodSandboxStatsStream = Streamed<cri::StreamPodSandboxStatsResponse>;
    async fn stream_pod_sandbox_stats(
        &self,
        r: Request<cri::StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        let items = self.0.list_pod_sandbox_stats(r.into_inner().filter).await;
        Ok(batches(items, |pod_sandbox_stats| cri::StreamPodSandboxStatsResponse { pod_sandbox_stats }))
    }

    async fn update_runtime_config(
        &self,
        _: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Answer<cri::UpdateRuntimeConfigResponse> {
        // The pod CIDR comes from the CNI configuration.
        Ok(Response::new(cri::UpdateRuntimeConfigResponse {}))
    }

    async fn status(&self, r: Request<cri::StatusRequest>) -> Answer<cri::StatusResponse> {
        Ok(Response::new(self.0.status(r.into_inner().verbose).await))
    }

    async fn checkpoint_container(
        &self,
        r: Request<cri::CheckpointContainerRequest>,
    ) -> Answer<cri::CheckpointContainerResponse> {
        answer("CheckpointContainer", self.0.checkpoint_container(r.into_inner()).await)
    }

    type GetContainerEventsStream = Streamed<cri::ContainerEventResponse>;
    async fn get_container_events(
        &self,
        _: Request<cri::GetEventsRequest>,
    ) -> Answer<Self::GetContainerEventsStream> {
        let stop = self.0.tasks.stop_token();
        let events = BroadcastStream::new(self.0.events.subscribe())
            .map(|e| {
                e.map(|e| (*e).clone()).map_err(|lag| {
                    Status::data_loss(format!("fell behind the events ({lag}); list and listen again"))
                })
            })
            .take_until(stop.cancelled_owned());
        Ok(Response::new(Box::pin(events)))
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Answer<cri::ListMetricDescriptorsResponse> {
        Ok(Response::new(cri::ListMetricDescriptorsResponse {
            descriptors: crate::stats::metrics::descriptors(),
        }))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Answer<cri::ListPodSandboxMetricsResponse> {
        let pod_metrics = self.0.pod_sandbox_metrics().await;
        Ok(Response::new(cri::ListPodSandboxMetricsResponse { pod_metrics }))
    }

    type StreamPodSandboxMetricsStream = Streamed<cri::StreamPodSandboxMetricsResponse>;
    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        let items = self.0.pod_sandbox_metrics().await;
        Ok(batches(items, |pod_sandbox_metrics| cri::StreamPodSandboxMetricsResponse { pod_sandbox_metrics }))
    }

    async fn runtime_config(
        &self,
        _: Request<cri::RuntimeConfigRequest>,
    ) -> Answer<cri::RuntimeConfigResponse> {
        Ok(Response::new(self.0.runtime_config()))
    }

    async fn update_pod_sandbox_resources(
        &self,
        r: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<cri::UpdatePodSandboxResourcesResponse> {
        answer("UpdatePodSandboxResources", self.0.update_pod_sandbox_resources(r.into_inner()).await)
    }
}

#[tonic::async_trait]
impl ImageService for Service {
    async fn list_images(&self, r: Request<cri::ListImagesRequest>) -> Answer<cri::ListImagesResponse> {
        let images = self.0.list_images(r.into_inner().filter);
        Ok(Response::new(cri::ListImagesResponse { images }))
    }

    type StreamImagesStream = Streamed<cri::StreamImagesResponse>;
    async fn stream_images(&self, r: Request<cri::StreamImagesRequest>) -> Answer<Self::StreamImagesStream> {
        let items = self.0.list_images(r.into_inner().filter);
        Ok(batches(items, |images| cri::StreamImagesResponse { images }))
    }

    async fn image_status(&self, r: Request<cri::ImageStatusRequest>) -> Answer<cri::ImageStatusResponse> {
        answer("ImageStatus", self.0.image_status(r.into_inner()))
    }

    async fn pull_image(&self, r: Request<cri::PullImageRequest>) -> Answer<cri::PullImageResponse> {
        answer("PullImage", self.0.pull_image(r.into_inner()).await)
    }

    async fn remove_image(&self, r: Request<cri::RemoveImageRequest>) -> Answer<cri::RemoveImageResponse> {
        answer("RemoveImage", self.0.remove_image(r.into_inner()).await)
    }

    async fn image_fs_info(&self, _: Request<cri::ImageFsInfoRequest>) -> Answer<cri::ImageFsInfoResponse> {
        answer("ImageFsInfo", self.0.image_fs_info().await)
    }
}
