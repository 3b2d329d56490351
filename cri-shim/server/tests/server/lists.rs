//! The streamed lists, which are the lists in several messages, and a listener to events who is too slow.
//! Needs root, `orlop-monitor` (`cargo build -p orlop-monitor`, or ORLOP_MONITOR) and busybox-static.

use futures::StreamExt;
use orlop_proto::cri;
use orlop_proto::cri::image_service_client::ImageServiceClient;
use tonic::{Code, Streaming};

use crate::node::{Node, container_config, sandbox_config};

/// As in the server.
const BATCH: usize = 100;
/// As in the server: events that a listener may fall behind by.
const BACKLOG: usize = 1024;

/// The items of all messages. All but the last message are full.
async fn all<M, T>(stream: tonic::Response<Streaming<M>>, items: impl Fn(M) -> Vec<T>) -> Vec<T> {
    let mut stream = stream.into_inner();
    let (mut out, mut last) = (Vec::new(), BATCH);
    while let Some(message) = stream.message().await.unwrap() {
        assert_eq!(last, BATCH, "a message after one that was not full");
        let part = items(message);
        last = part.len();
        out.extend(part);
    }
    out
}

#[tokio::test]
async fn streams_tell_what_lists_do() {
    let node = Node::start("streams", &[]).await;
    let configs: Vec<_> = (0..=BATCH).map(|n| sandbox_config(&node, &format!("p{n}"), true)).collect();
    let made: Vec<_> =
        futures::stream::iter(&configs).map(|c| node.run_pod(c)).buffer_unordered(8).collect().await;
    let pods: Vec<String> = made.into_iter().map(Result::unwrap).collect();
    for pod in &pods[..2] {
        node.run_container(pod, container_config("main", &["sleep", "1000"]), &configs[0]).await;
    }
    let mut client = node.client().await;

    let listed = node.pods().await;
    let streamed = client.stream_pod_sandboxes(cri::StreamPodSandboxesRequest::default()).await.unwrap();
    assert_eq!(all(streamed, |m| m.pod_sandboxes).await, listed);
    assert_eq!(listed.len(), BATCH + 1);

    let of_pods = |stats: Vec<cri::PodSandboxStats>| -> Vec<String> {
        stats.into_iter().map(|s| s.attributes.unwrap().id).collect()
    };
    let listed = client.list_pod_sandbox_stats(cri::ListPodSandboxStatsRequest::default()).await.unwrap();
    let listed = of_pods(listed.into_inner().stats);
    let streamed =
        client.stream_pod_sandbox_stats(cri::StreamPodSandboxStatsRequest::default()).await.unwrap();
    assert_eq!(of_pods(all(streamed, |m| m.pod_sandbox_stats).await), listed);
    assert_eq!(listed.len(), BATCH + 1);
    let filter = cri::PodSandboxStatsFilter { id: pods[0].clone(), ..Default::default() };
    let request = cri::StreamPodSandboxStatsRequest { filter: Some(filter) };
    let streamed = client.stream_pod_sandbox_stats(request).await.unwrap();
    assert_eq!(of_pods(all(streamed, |m| m.pod_sandbox_stats).await), pods[..1]);

    let listed =
        client.list_pod_sandbox_metrics(cri::ListPodSandboxMetricsRequest {}).await.unwrap().into_inner();
    let streamed = client.stream_pod_sandbox_metrics(cri::StreamPodSandboxMetricsRequest {}).await.unwrap();
    let names = |metrics: &[cri::PodSandboxMetrics]| -> Vec<(String, Vec<String>)> {
        let of =
            |m: &cri::PodSandboxMetrics| m.container_metrics.iter().map(|c| c.container_id.clone()).collect();
        metrics.iter().map(|m| (m.pod_sandbox_id.clone(), of(m))).collect()
    };
    let (listed, streamed) =
        (names(&listed.pod_metrics), names(&all(streamed, |m| m.pod_sandbox_metrics).await));
    assert_eq!(streamed, listed);
    assert_eq!(listed.iter().filter(|(_, containers)| containers.len() == 1).count(), 2);

    let of_containers = |stats: Vec<cri::ContainerStats>| -> Vec<String> {
        stats.into_iter().map(|s| s.attributes.unwrap().id).collect()
    };
    let listed = client.list_container_stats(cri::ListContainerStatsRequest::default()).await.unwrap();
    let streamed = client.stream_container_stats(cri::StreamContainerStatsRequest::default()).await.unwrap();
    let listed = of_containers(listed.into_inner().stats);
    assert_eq!(of_containers(all(streamed, |m| m.container_stats).await), listed);
    assert_eq!(listed.len(), 2);

    node.add_image("localhost/other:1", |_, config| config.env(vec!["OTHER=1".to_owned()])).await;
    let mut images = ImageServiceClient::new(node.channel().await.unwrap());
    let listed = images.list_images(cri::ListImagesRequest::default()).await.unwrap().into_inner().images;
    let streamed = images.stream_images(cri::StreamImagesRequest::default()).await.unwrap();
    assert_eq!(all(streamed, |m| m.images).await, listed);
    assert_eq!(listed.len(), 2);
    let image = cri::ImageSpec { image: "localhost/none:1".to_owned(), ..Default::default() };
    let request = cri::StreamImagesRequest { filter: Some(cri::ImageFilter { image: Some(image) }) };
    let mut none = images.stream_images(request).await.unwrap().into_inner();
    assert_eq!(
        none.message().await.unwrap(),
        Some(cri::StreamImagesResponse::default()),
        "one empty message"
    );
    assert_eq!(none.message().await.unwrap(), None);
    node.purge_and_check();
}

/// What goes on in the meantime is not kept for ever for one who does not listen.
#[tokio::test]
async fn a_listener_who_falls_behind_is_told_so() {
    let node = Node::start("behind", &[]).await;
    // Events that soon fill what the connection holds.
    let config = |n: usize| cri::PodSandboxConfig {
        annotations: [("long".to_owned(), "x".repeat(20_000))].into(),
        ..sandbox_config(&node, &format!("behind{n}"), true)
    };
    let mut behind =
        node.client().await.get_container_events(cri::GetEventsRequest {}).await.unwrap().into_inner();
    let busy = async |n: usize| {
        let config = config(n);
        let pod = node.run_pod(&config).await.unwrap();
        let mut client = node.client().await;
        // Three events each: created, stopped, deleted.
        for round in 0..(BACKLOG + 400) / 12 {
            let container = container_config(&format!("c{round}"), &["true"]);
            let container_id = node.create(&pod, container, &config).await.unwrap();
            client.remove_container(cri::RemoveContainerRequest { container_id }).await.unwrap();
        }
    };
    futures::future::join_all((0..4).map(busy)).await;
    let mut seen = 0;
    let e = loop {
        match behind.message().await {
            Ok(event) => assert!(event.is_some(), "it ended after {seen} events without a word"),
            Err(e) => break e,
        }
        seen += 1;
    };
    assert_eq!(e.code(), Code::DataLoss, "{e}");
    // Who listens again hears what happens then.
    let mut client = node.client().await;
    let mut events = client.get_container_events(cri::GetEventsRequest {}).await.unwrap().into_inner();
    let pod = node.pods().await[0].id.clone();
    client.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await.unwrap();
    assert_eq!(events.message().await.unwrap().unwrap().container_id, pod);
    node.purge_and_check();
}
