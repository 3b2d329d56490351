//! What each RPC promises beyond the ways pods are usually run: the comments of cri-api's `api.proto`, and what the kubelet and crictl
//! rely on.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::node::{IMAGE, Node, container_config, exec, sandbox_config, shell};
use orlop_proto::cri;
use orlop_proto::cri::image_service_client::ImageServiceClient;
use tonic::Code;

fn labels(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

/// "This call is idempotent, and must not return an error if ... has already been stopped/removed"; all others say NotFound.
#[tokio::test]
async fn of_what_is_not_there() {
    let node = Node::start("unknown", &[]).await;
    let mut c = node.client().await;
    let id = || "0123456789abcdef".to_owned();
    c.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: id() }).await.unwrap();
    c.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: id() }).await.unwrap();
    c.stop_container(cri::StopContainerRequest { container_id: id(), timeout: 3 }).await.unwrap();
    c.remove_container(cri::RemoveContainerRequest { container_id: id() }).await.unwrap();
    let codes = [
        c.pod_sandbox_status(cri::PodSandboxStatusRequest { pod_sandbox_id: id(), verbose: false })
            .await
            .err(),
        c.container_status(cri::ContainerStatusRequest { container_id: id(), verbose: false }).await.err(),
        c.start_container(cri::StartContainerRequest { container_id: id() }).await.err(),
        c.exec_sync(cri::ExecSyncRequest { container_id: id(), cmd: vec!["true".into()], timeout: 1 })
            .await
            .err(),
        c.exec(cri::ExecRequest {
            container_id: id(),
            cmd: vec!["true".into()],
            stdout: true,
            ..Default::default()
        })
        .await
        .err(),
        c.attach(cri::AttachRequest { container_id: id(), stdout: true, ..Default::default() }).await.err(),
        c.port_forward(cri::PortForwardRequest { pod_sandbox_id: id(), port: vec![80] }).await.err(),
        c.container_stats(cri::ContainerStatsRequest { container_id: id() }).await.err(),
        c.pod_sandbox_stats(cri::PodSandboxStatsRequest { pod_sandbox_id: id() }).await.err(),
        c.update_container_resources(cri::UpdateContainerResourcesRequest {
            container_id: id(),
            ..Default::default()
        })
        .await
        .err(),
        c.update_pod_sandbox_resources(cri::UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: id(),
            ..Default::default()
        })
        .await
        .err(),
        c.reopen_container_log(cri::ReopenContainerLogRequest { container_id: id() }).await.err(),
        c.checkpoint_container(cri::CheckpointContainerRequest { container_id: id(), ..Default::default() })
            .await
            .err(),
    ];
    for (i, e) in codes.into_iter().enumerate() {
        assert_eq!(e.map(|e| e.code()), Some(Code::NotFound), "call {i}");
    }
    // Lists of it are empty.
    let filter = cri::ContainerFilter { id: id(), ..Default::default() };
    let list = c.list_containers(cri::ListContainersRequest { filter: Some(filter) }).await.unwrap();
    assert!(list.into_inner().containers.is_empty());
    let mut images = ImageServiceClient::new(node.channel().await.unwrap());
    let spec = Some(cri::ImageSpec { image: "localhost/none:1".into(), ..Default::default() });
    let status =
        images.image_status(cri::ImageStatusRequest { image: spec.clone(), verbose: false }).await.unwrap();
    assert!(status.into_inner().image.is_none());
    images.remove_image(cri::RemoveImageRequest { image: spec.clone() }).await.unwrap();
    let e = images.pull_image(cri::PullImageRequest { image: spec, ..Default::default() }).await.unwrap_err();
    // Nothing listens there: the kubelet shows this as a registry that is down.
    assert_eq!(e.code(), Code::Unknown);
    assert!(e.message().starts_with("RegistryUnavailable: "), "{e}");
    let bad = Some(cri::ImageSpec { image: "UPPER case".into(), ..Default::default() });
    let e = images.pull_image(cri::PullImageRequest { image: bad, ..Default::default() }).await.unwrap_err();
    assert_eq!(e.code(), Code::InvalidArgument);
    node.stop_and_check();
}

/// Names are reserved from the beginning of a creation: of many at once exactly one wins, and a failed one frees its name.
#[tokio::test]
async fn a_name_is_given_once() {
    let node = Node::start("names", &[]).await;
    let config = sandbox_config(&node, "names", true);
    let all = futures::future::join_all((0..8).map(|_| node.run_pod(&config))).await;
    let made: Vec<&String> = all.iter().filter_map(|r| r.as_ref().ok()).collect();
    assert_eq!(made.len(), 1);
    assert!(all.iter().filter_map(|r| r.as_ref().err()).all(|e| e.code() == Code::AlreadyExists));
    let pod = made[0].clone();
    let create = |name: &str| node.create(&pod, container_config(name, &["sleep", "1000"]), &config);
    let all = futures::future::join_all((0..8).map(|_| create("same"))).await;
    assert_eq!(all.iter().filter(|r| r.is_ok()).count(), 1);
    assert!(all.iter().filter_map(|r| r.as_ref().err()).all(|e| e.code() == Code::AlreadyExists));
    let mut missing = container_config("again", &["sleep", "1000"]);
    missing.image = Some(cri::ImageSpec { image: "localhost/none:1".into(), ..Default::default() });
    assert_eq!(node.create(&pod, missing, &config).await.unwrap_err().code(), Code::NotFound);
    create("again").await.unwrap();
    // Another attempt is another name.
    let mut next = container_config("same", &["sleep", "1000"]);
    next.metadata.as_mut().unwrap().attempt = 1;
    node.create(&pod, next, &config).await.unwrap();
    node.purge_and_check();
}

/// Filters are conjunctions; ids may be cut short; what the caller attached comes back as it was given.
#[tokio::test]
async fn lists_and_their_filters() {
    let node = Node::start("lists", &[]).await;
    let mut pods = Vec::new();
    for name in ["one", "two"] {
        let mut config = sandbox_config(&node, name, true);
        config.labels = labels(&[("app", name), ("tier", "x")]);
        config.annotations = labels(&[("note", "a=b,c\n\"ü\"")]);
        let pod = node.run_pod(&config).await.unwrap();
        for (c, run) in [("run", true), ("made", false)] {
            let mut container = container_config(c, &["sleep", "1000"]);
            container.labels = labels(&[("app", name), ("c", c)]);
            container.annotations = labels(&[("large", &"x".repeat(5000))]);
            let id = node.create(&pod, container, &config).await.unwrap();
            if run {
                node.start_container(&id).await.unwrap();
            }
        }
        pods.push(pod);
    }
    let mut client = node.client().await;
    let state = |s: cri::ContainerState| Some(cri::ContainerStateValue { state: s as i32 });
    for (filter, want) in [
        (cri::ContainerFilter::default(), 4),
        (cri::ContainerFilter { pod_sandbox_id: pods[0].clone(), ..Default::default() }, 2),
        (cri::ContainerFilter { pod_sandbox_id: pods[0][..13].to_owned(), ..Default::default() }, 2),
        (
            cri::ContainerFilter {
                state: state(cri::ContainerState::ContainerRunning),
                ..Default::default()
            },
            2,
        ),
        (
            cri::ContainerFilter { state: state(cri::ContainerState::ContainerExited), ..Default::default() },
            0,
        ),
        (cri::ContainerFilter { label_selector: labels(&[("app", "one")]), ..Default::default() }, 2),
        (
            cri::ContainerFilter {
                label_selector: labels(&[("app", "one"), ("c", "made")]),
                ..Default::default()
            },
            1,
        ),
        (
            cri::ContainerFilter {
                pod_sandbox_id: pods[1].clone(),
                label_selector: labels(&[("app", "one")]),
                ..Default::default()
            },
            0,
        ),
    ] {
        let request = cri::ListContainersRequest { filter: Some(filter.clone()) };
        let list = client.list_containers(request).await.unwrap().into_inner().containers;
        assert_eq!(list.len(), want, "{filter:?}");
        // The streamed list is the same.
        let request = cri::StreamContainersRequest { filter: Some(filter) };
        let mut stream = client.stream_containers(request).await.unwrap().into_inner();
        let mut streamed = Vec::new();
        while let Some(part) = stream.message().await.unwrap() {
            streamed.extend(part.containers);
        }
        assert_eq!(streamed, list);
    }
    let filter = cri::PodSandboxFilter {
        label_selector: labels(&[("tier", "x"), ("app", "two")]),
        ..Default::default()
    };
    let list = client.list_pod_sandbox(cri::ListPodSandboxRequest { filter: Some(filter) }).await.unwrap();
    let found = list.into_inner().items.remove(0);
    assert_eq!(found.id, pods[1]);
    assert_eq!(found.annotations, labels(&[("note", "a=b,c\n\"ü\"")]));
    // Stats of running containers only, with the same selectors.
    for (filter, want) in [
        (cri::ContainerStatsFilter::default(), 2),
        (cri::ContainerStatsFilter { pod_sandbox_id: pods[0].clone(), ..Default::default() }, 1),
        (cri::ContainerStatsFilter { label_selector: labels(&[("app", "none")]), ..Default::default() }, 0),
    ] {
        let request = cri::ListContainerStatsRequest { filter: Some(filter) };
        let stats = client.list_container_stats(request).await.unwrap().into_inner().stats;
        assert_eq!(stats.len(), want);
        for s in stats {
            let a = s.attributes.unwrap();
            assert_eq!(a.annotations["large"].len(), 5000);
            assert!(s.cpu.unwrap().usage_core_nano_seconds.is_some() && s.writable_layer.is_some());
        }
    }
    // A cut id that fits two is nobody's.
    let common: String =
        pods[0].chars().zip(pods[1].chars()).take_while(|(a, b)| a == b).map(|(a, _)| a).collect();
    let request = cri::PodSandboxStatusRequest { pod_sandbox_id: common, verbose: false };
    assert_eq!(client.pod_sandbox_status(request).await.unwrap_err().code(), Code::InvalidArgument);
    let request = cri::PodSandboxStatusRequest { pod_sandbox_id: pods[0][..20].to_owned(), verbose: true };
    let status = client.pod_sandbox_status(request).await.unwrap().into_inner();
    assert_eq!((status.status.unwrap().id.as_str(), status.containers_statuses.len()), (pods[0].as_str(), 2));
    assert!(status.timestamp > 0 && status.info.contains_key("info"));
    node.purge_and_check();
}

/// Stats of pods and of the image file system, and the metrics that replace cAdvisor's.
#[tokio::test]
async fn stats_and_metrics() {
    let node = Node::start("stats", &[]).await;
    node.network(false);
    let config = sandbox_config(&node, "stats", false);
    let pod = node.run_pod(&config).await.unwrap();
    let mut c =
        container_config("main", &["sh", "-c", "sleep 1000 & head -c 300000 /dev/zero > /tmp/data; wait"]);
    c.linux.get_or_insert_default().resources = Some(cri::LinuxContainerResources {
        memory_limit_in_bytes: 64 << 20,
        cpu_quota: 50_000,
        cpu_period: 100_000,
        ..Default::default()
    });
    let id = node.run_container(&pod, c, &config).await;
    shell(&node, &id, "while [ ! -s /tmp/data ]; do sleep 0.02; done; sleep 0.05").await;
    let mut client = node.client().await;
    let stats =
        client.pod_sandbox_stats(cri::PodSandboxStatsRequest { pod_sandbox_id: pod.clone() }).await.unwrap();
    let linux = stats.into_inner().stats.unwrap().linux.unwrap();
    assert!(linux.process.unwrap().process_count.unwrap().value >= 2);
    assert!(linux.memory.unwrap().usage_bytes.unwrap().value > 0);
    assert_eq!(linux.containers.len(), 1);
    let container = &linux.containers[0];
    let memory = container.memory.as_ref().unwrap();
    assert_eq!(
        memory.available_bytes.as_ref().unwrap().value + memory.working_set_bytes.as_ref().unwrap().value,
        64 << 20
    );
    assert!(container.writable_layer.as_ref().unwrap().used_bytes.as_ref().unwrap().value >= 300_000);
    assert!(linux.network.is_some());
    let described =
        client.list_metric_descriptors(cri::ListMetricDescriptorsRequest {}).await.unwrap().into_inner();
    let keys: BTreeMap<String, usize> =
        described.descriptors.iter().map(|d| (d.name.clone(), d.label_keys.len())).collect();
    let metrics =
        client.list_pod_sandbox_metrics(cri::ListPodSandboxMetricsRequest {}).await.unwrap().into_inner();
    assert_eq!(metrics.pod_metrics.len(), 1);
    let of = &metrics.pod_metrics[0].container_metrics[0];
    assert_eq!(of.container_id, id);
    for m in &of.metrics {
        assert_eq!(keys.get(&m.name), Some(&m.label_values.len()), "{}", m.name);
        assert_eq!(m.label_values[3..6], ["main", "stats", "default"], "{}", m.name);
    }
    let value = |name: &str| {
        of.metrics.iter().find(|m| m.name == name).unwrap_or_else(|| panic!("{name}")).value.unwrap().value
    };
    assert_eq!(value("container_spec_memory_limit_bytes"), 64 << 20);
    assert_eq!(value("container_spec_cpu_quota"), 50_000);
    assert!(value("container_processes") >= 2 && value("container_file_descriptors") > 0);
    assert!(value("container_start_time_seconds") > 1_600_000_000);
    assert!(value("container_fs_usage_bytes") >= 300_000);
    // A pod that has stopped has no stats, and the list goes on without it.
    client.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await.unwrap();
    let e = client.pod_sandbox_stats(cri::PodSandboxStatsRequest { pod_sandbox_id: pod }).await.unwrap_err();
    assert_eq!(e.code(), Code::FailedPrecondition);
    let list = client.list_pod_sandbox_stats(cri::ListPodSandboxStatsRequest::default()).await.unwrap();
    assert!(list.into_inner().stats.is_empty());
    let mut images = ImageServiceClient::new(node.channel().await.unwrap());
    let fs = images.image_fs_info(cri::ImageFsInfoRequest {}).await.unwrap().into_inner();
    let mountpoint = |f: &cri::FilesystemUsage| f.fs_id.clone().unwrap().mountpoint;
    // One file system holds both, so the kubelet must see one.
    assert_eq!(mountpoint(&fs.image_filesystems[0]), mountpoint(&fs.container_filesystems[0]));
    assert!(Path::new(&mountpoint(&fs.image_filesystems[0])).exists());
    assert!(fs.image_filesystems[0].used_bytes.as_ref().unwrap().value > 0);
    node.purge_and_check();
}

/// Each change of a container is one event, with the whole pod as it is then; several may listen.
#[tokio::test]
async fn events_tell_of_every_change() {
    use cri::ContainerEventType::*;
    let node = Node::start("events", &[]).await;
    let mut streams = Vec::new();
    for _ in 0..2 {
        let events = node.client().await.get_container_events(cri::GetEventsRequest {}).await.unwrap();
        streams.push(events.into_inner());
    }
    let config = sandbox_config(&node, "events", true);
    let pod = node.run_pod(&config).await.unwrap();
    let id = node.run_container(&pod, container_config("main", &["sh", "-c", "exit 3"]), &config).await;
    node.ended(&id).await;
    let mut client = node.client().await;
    client.remove_container(cri::RemoveContainerRequest { container_id: id.clone() }).await.unwrap();
    client.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await.unwrap();
    client.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: pod.clone() }).await.unwrap();
    let of = |what: cri::ContainerEventType, id: &str| (what as i32, id.to_owned());
    let want = [
        of(ContainerCreatedEvent, &pod),
        of(ContainerStartedEvent, &pod),
        of(ContainerCreatedEvent, &id),
        of(ContainerStartedEvent, &id),
        of(ContainerStoppedEvent, &id),
        of(ContainerDeletedEvent, &id),
        of(ContainerStoppedEvent, &pod),
        of(ContainerDeletedEvent, &pod),
    ];
    for mut events in streams {
        let mut got = Vec::new();
        for _ in 0..want.len() {
            let e = tokio::time::timeout(Duration::from_secs(10), events.message())
                .await
                .unwrap()
                .unwrap()
                .unwrap();
            let status = e.pod_sandbox_status.unwrap();
            assert_eq!(
                (status.id.as_str(), status.metadata.unwrap().name.as_str()),
                (pod.as_str(), "events")
            );
            assert!(e.created_at > 0);
            if e.container_event_type == ContainerStoppedEvent as i32 && e.container_id == id {
                assert_eq!(e.containers_statuses[0].exit_code, 3);
            }
            if e.container_event_type == ContainerDeletedEvent as i32 {
                assert!(e.containers_statuses.iter().all(|c| c.id != e.container_id));
            }
            got.push((e.container_event_type, e.container_id));
        }
        assert_eq!(got, want);
    }
    node.stop_and_check();
}

/// Resources change while a container runs; what is not named stays. Other calls in a state that does not allow them say so.
#[tokio::test]
async fn states_and_updates() {
    let node = Node::start("states", &[]).await;
    let config = sandbox_config(&node, "states", true);
    let pod = node.run_pod(&config).await.unwrap();
    let mut c = container_config("main", &["sleep", "1000"]);
    c.linux.get_or_insert_default().resources = Some(cri::LinuxContainerResources {
        cpu_shares: 512,
        memory_limit_in_bytes: 32 << 20,
        ..Default::default()
    });
    let id = node.create(&pod, c, &config).await.unwrap();
    let mut client = node.client().await;
    let e = exec(&mut client, &id, &["true"], 5).await.unwrap_err();
    assert_eq!(e.code(), Code::FailedPrecondition);
    // Not started: nothing to stop.
    client.stop_container(cri::StopContainerRequest { container_id: id.clone(), timeout: 1 }).await.unwrap();
    assert_eq!(node.status(&id).await.state, cri::ContainerState::ContainerCreated as i32);
    let linux = cri::LinuxContainerResources { memory_limit_in_bytes: 48 << 20, ..Default::default() };
    let request = cri::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(linux),
        annotations: labels(&[("changed", "yes")]),
        ..Default::default()
    };
    client.update_container_resources(request).await.unwrap();
    node.start_container(&id).await.unwrap();
    assert_eq!(node.start_container(&id).await.unwrap_err().code(), Code::FailedPrecondition);
    let status = node.status(&id).await;
    let held = status.resources.unwrap().linux.unwrap();
    assert_eq!((held.cpu_shares, held.memory_limit_in_bytes), (512, 48 << 20));
    assert_eq!(status.image.unwrap().image, IMAGE);
    let limit = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null; true";
    assert_eq!(shell(&node, &id, limit).await, (48 << 20).to_string());
    let overhead = cri::LinuxContainerResources { cpu_shares: 7, ..Default::default() };
    let request = cri::UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.clone(),
        overhead: Some(overhead),
        resources: None,
    };
    client.update_pod_sandbox_resources(request).await.unwrap();
    client.stop_container(cri::StopContainerRequest { container_id: id.clone(), timeout: 0 }).await.unwrap();
    for e in [
        client.reopen_container_log(cri::ReopenContainerLogRequest { container_id: id.clone() }).await.err(),
        client
            .update_container_resources(cri::UpdateContainerResourcesRequest {
                container_id: id.clone(),
                ..Default::default()
            })
            .await
            .err(),
        node.start_container(&id).await.err(),
        exec(&mut client, &id, &["true"], 5).await.err(),
    ] {
        assert_eq!(e.map(|e| e.code()), Some(Code::FailedPrecondition));
    }
    // An exited container still has its status and log; a stopped pod takes no new one.
    assert_eq!(node.status(&id).await.exit_code, 137);
    client.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await.unwrap();
    let e = node.create(&pod, container_config("late", &["true"]), &config).await.unwrap_err();
    assert_eq!(e.code(), Code::FailedPrecondition);
    node.purge_and_check();
}

/// The runtime describes itself; after the last pod nothing of it is left, not even the cgroup of pods that named none.
#[tokio::test]
async fn the_runtime_itself() {
    let node = Node::start("itself", &[]).await;
    let mut client = node.client().await;
    let version = client.version(cri::VersionRequest { version: "v1".into() }).await.unwrap().into_inner();
    assert_eq!((version.version.as_str(), version.runtime_api_version.as_str()), ("0.1.0", "v1"));
    let driver =
        client.runtime_config(cri::RuntimeConfigRequest {}).await.unwrap().into_inner().linux.unwrap();
    assert_eq!(driver.cgroup_driver, cri::CgroupDriver::Cgroupfs as i32);
    let status = client.status(cri::StatusRequest { verbose: true }).await.unwrap().into_inner();
    let conditions: BTreeMap<String, bool> =
        status.status.unwrap().conditions.into_iter().map(|c| (c.r#type, c.status)).collect();
    assert_eq!(
        conditions,
        BTreeMap::from([("RuntimeReady".to_owned(), true), ("NetworkReady".to_owned(), false)])
    );
    assert!(status.features.unwrap().supplemental_groups_policy);
    assert!(status.runtime_handlers.iter().all(|h| h.features.unwrap().recursive_read_only_mounts));
    assert!(status.info.contains_key("config"));
    // The network is looked at anew each time.
    node.network(false);
    let status = client.status(cri::StatusRequest { verbose: false }).await.unwrap().into_inner();
    assert!(status.status.unwrap().conditions.iter().all(|c| c.status) && status.info.is_empty());
    client.update_runtime_config(cri::UpdateRuntimeConfigRequest::default()).await.unwrap();

    let mut config = sandbox_config(&node, "itself", true);
    config.linux.as_mut().unwrap().cgroup_parent.clear();
    let parents = || {
        let of = |e: fs::DirEntry| e.path().join(node.cgroup.trim_start_matches('/'));
        let hierarchies = fs::read_dir("/sys/fs/cgroup").unwrap().flatten();
        hierarchies.map(of).filter(|p| p.is_dir()).count()
    };
    assert_eq!(parents(), 0);
    let pod = node.run_pod(&config).await.unwrap();
    node.run_container(&pod, container_config("main", &["sleep", "1000"]), &config).await;
    assert!(parents() > 0);
    client.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: pod }).await.unwrap();
    // Kept for the next pod, as long as the server runs.
    assert!(parents() > 0);
    let cgroup = node.cgroup.clone();
    node.stop_and_check();
    for hierarchy in ["", "pids", "memory"] {
        assert!(!Path::new("/sys/fs/cgroup").join(hierarchy).join(cgroup.trim_start_matches('/')).exists());
    }
}
