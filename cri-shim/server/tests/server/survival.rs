//! What the server keeps through kills at random moments, full disks, broken records and broken plugins.
//! Needs root, `orlop-monitor` (`cargo build -p orlop-monitor`, or ORLOP_MONITOR) and busybox-static.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures::StreamExt;

use crate::node::{IMAGE, Node, container_config, exec, sandbox_config, wait_for};
use orlop_proto::{cri, images};
use rand::Rng;
use tonic::Code;

const EXITED: i32 = cri::ContainerState::ContainerExited as i32;
const READY: i32 = cri::PodSandboxState::SandboxReady as i32;

/// Installs a plugin that runs `add` on ADD and keeps a file per attached pod in `attached/`.
fn plugin(node: &Node, add: &str) {
    use std::os::unix::fs::PermissionsExt;
    let attached = node.dir.join("attached");
    fs::create_dir_all(&attached).unwrap();
    let bin = node.dir.join("cni-bin");
    fs::create_dir_all(&bin).unwrap();
    let script = format!(
        "#!/bin/sh\ncat > /dev/null\ncd {}\ncase $CNI_COMMAND in\nADD) {add};;\nDEL) rm -f $CNI_CONTAINERID;;\n\
         VERSION) echo '{{\"cniVersion\":\"1.0.0\",\"supportedVersions\":[\"1.0.0\"]}}';;\nesac\n",
        attached.display()
    );
    // Replaced as a whole: the old one may run just now.
    let file = bin.join("keeping");
    fs::write(bin.join("new"), script).unwrap();
    fs::set_permissions(bin.join("new"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(bin.join("new"), file).unwrap();
    let conf = r#"{"cniVersion":"1.0.0","name":"test","plugins":[{"type":"keeping"}]}"#;
    fs::write(node.dir.join("cni-conf/10-test.conflist"), conf).unwrap();
}

const GOOD_ADD: &str = r#"touch $CNI_CONTAINERID; echo "{\"cniVersion\":\"1.0.0\",\"interfaces\":[{\"name\":\"eth0\",\"sandbox\":\"$CNI_NETNS\"}],\"ips\":[{\"address\":\"10.99.0.7/24\",\"interface\":0}]}""#;

/// Names in `dir` that look like ids.
fn ids_in(dir: &Path) -> BTreeSet<String> {
    let names = fs::read_dir(dir).into_iter().flatten().flatten();
    names
        .filter_map(|e| e.file_name().into_string().ok())
        .filter(|n| n.len() >= 64 && n.as_bytes()[..64].iter().all(u8::is_ascii_hexdigit))
        .map(|n| n[..64].to_owned())
        .collect()
}

/// Sandboxes whose monitor runs, by the kernel's account.
fn monitors(node: &Node) -> BTreeSet<String> {
    let run = node.dir.join("run/s").to_string_lossy().into_owned();
    let lines =
        fs::read_dir("/proc").unwrap().flatten().filter_map(|e| fs::read(e.path().join("cmdline")).ok());
    lines
        .filter_map(|l| {
            let line = String::from_utf8_lossy(&l).replace('\0', " ");
            let at = line.find(&format!("--dir {run}/"))? + "--dir ".len() + run.len() + 1;
            line.get(at..at + 64).map(str::to_owned)
        })
        .collect()
}

/// The server's view of things against the kernel's.
async fn same_view(node: &Node, when: &str) {
    let mut client = node.client().await;
    let pods = node.pods().await;
    let containers = node.list(None).await;
    let ready: BTreeSet<String> = pods.iter().filter(|p| p.state == READY).map(|p| p.id.clone()).collect();
    let all: BTreeSet<String> =
        pods.iter().map(|p| p.id.clone()).chain(containers.iter().map(|c| c.id.clone())).collect();
    // A monitor answers its last request before it ends.
    wait_for(&format!("{when}: a monitor per ready pod"), || monitors(node) == ready).await;
    assert_eq!(ids_in(&node.dir.join("attached")), ready, "{when}: network attachments");
    assert_eq!(ids_in(&node.dir.join("run/s")), ready, "{when}: run folders");
    // One whose removal was cut short may lack its root file system already, but nothing that runs does.
    let known = |all: bool| -> BTreeSet<String> {
        containers.iter().filter(|c| all || c.state != EXITED).map(|c| c.id.clone()).collect()
    };
    let roots = ids_in(&node.dir.join("images/rootfs"));
    assert!(roots.is_subset(&known(true)), "{when}: root file systems of nobody: {roots:?}");
    assert!(known(false).is_subset(&roots), "{when}: root file systems are missing: {roots:?}");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let base = node.dir.join("run/s").to_string_lossy().into_owned();
    for point in mounts.lines().filter_map(|l| l.split(' ').nth(4)).filter(|p| p.starts_with(&base)) {
        let owner = point[base.len() + 1..].split('/').next().unwrap();
        assert!(ready.contains(owner), "{when}: {point} belongs to nobody");
    }
    for hierarchy in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let group = hierarchy.path().join(node.cgroup.trim_start_matches('/'));
        let left: Vec<String> = ids_in(&group).difference(&all).cloned().collect();
        assert!(left.is_empty(), "{when}: cgroups left in {}: {left:?}", group.display());
    }
    for c in &containers {
        // One may end between the two looks; the server hears of it a moment later.
        let start = Instant::now();
        loop {
            let request = cri::ContainerStatusRequest { container_id: c.id.clone(), verbose: true };
            let status = client.container_status(request).await.unwrap().into_inner();
            let info: serde_json::Value = serde_json::from_str(&status.info["info"]).unwrap();
            let pid = info["pid"].as_u64().unwrap_or(0);
            let (status, runs) =
                (status.status.unwrap(), pid > 0 && Path::new(&format!("/proc/{pid}")).exists());
            if runs == (status.state != EXITED) {
                break;
            }
            assert!(start.elapsed() < Duration::from_secs(30), "{when}: pid {pid}: {status:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// What the short-lived containers of [`busy`] end with.
const SHORT_CODE: i32 = 37;

/// Makes, uses and removes a pod of its own.
async fn use_a_pod(node: &Node, client: &mut Client, worker: usize) -> Result<(), tonic::Status> {
    let config = sandbox_config(node, &format!("busy{worker}"), false);
    let run = cri::RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
    let pod = client.run_pod_sandbox(run).await?.into_inner().pod_sandbox_id;
    let create = cri::CreateContainerRequest {
        pod_sandbox_id: pod.clone(),
        config: Some(container_config("main", &["sleep", "1000"])),
        sandbox_config: Some(config),
    };
    let short = cri::CreateContainerRequest {
        config: Some(container_config("short", &["sh", "-c", &format!("sleep 0.1; exit {SHORT_CODE}")])),
        ..create.clone()
    };
    let mut ids = Vec::new();
    for request in [short, create] {
        let container_id = client.create_container(request).await?.into_inner().container_id;
        ids.push(container_id.clone());
        client.start_container(cri::StartContainerRequest { container_id }).await?;
    }
    exec(client, &ids[1], &["true"], 30).await?;
    client.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await?;
    client.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: pod }).await?;
    Ok(())
}

type Client = cri::runtime_service_client::RuntimeServiceClient<tonic::transport::Channel>;

/// Keeps using pods, for ever. The server is killed only after this has been dropped, so nothing may fail.
async fn busy(node: &Node, worker: usize) {
    let mut client = node.client().await;
    loop {
        use_a_pod(node, &mut client, worker).await.unwrap_or_else(|e| panic!("worker {worker}: {e}"));
    }
}

/// Those of pods that nobody has begun to stop have the code that they ended with.
async fn ended_as_they_did(node: &Node, when: &str) {
    let ready: BTreeSet<String> =
        node.pods().await.into_iter().filter(|p| p.state == READY).map(|p| p.id).collect();
    for c in node.list(None).await.iter().filter(|c| ready.contains(&c.pod_sandbox_id)) {
        let status = node.status(&c.id).await;
        let short = status.metadata.as_ref().is_some_and(|m| m.name == "short");
        assert!(short || status.state != EXITED, "{when}: {status:?}");
        if status.state == EXITED {
            assert_eq!(status.exit_code, SHORT_CODE, "{when}: {status:?}");
        }
    }
}

/// The counter that a container prints has no gap and no repeat.
fn counted(log: &str) -> usize {
    let text = fs::read_to_string(log).unwrap();
    let numbers: Vec<usize> = text.lines().filter_map(|l| l.rsplit(' ').next()?.parse().ok()).collect();
    for (i, n) in numbers.iter().enumerate() {
        assert_eq!(i, *n, "a line is lost or repeated");
    }
    numbers.len()
}

/// How often the server is killed, and how many pods are made, used and removed at that time.
const ROUNDS: usize = 100;
const WORKERS: usize = 50;

#[tokio::test]
async fn kills_at_random_moments_lose_nothing() {
    let mut node = Node::start("random", &[]).await;
    plugin(&node, GOOD_ADD);
    let config = sandbox_config(&node, "steady", false);
    let steady = node.run_pod(&config).await.unwrap();
    let script = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done";
    let counter =
        node.run_container(&steady, container_config("counter", &["sh", "-c", script]), &config).await;
    let (pid, log) = (node.pid_of(&counter).await, node.status(&counter).await.log_path);
    for round in 0..ROUNDS {
        let moment = Duration::from_millis(rand::rng().random_range(1..600));
        {
            let work = futures::future::join_all((0..WORKERS).map(|n| busy(&node, n)));
            // Dropped in the middle, as a client whose server dies.
            let _ = tokio::time::timeout(moment, work).await;
        }
        node.kill();
        // Some end while nobody looks.
        tokio::time::sleep(Duration::from_millis(rand::rng().random_range(0..300))).await;
        node.restart(&[]).await;
        let when = format!("round {round}, killed after {moment:?}");
        same_view(&node, &when).await;
        ended_as_they_did(&node, &when).await;
        assert_eq!(node.pid_of(&counter).await, pid, "{when}");
        for pod in node.pods().await.into_iter().filter(|p| p.id != steady) {
            let request = cri::RemovePodSandboxRequest { pod_sandbox_id: pod.id };
            node.client().await.remove_pod_sandbox(request).await.unwrap();
        }
    }
    same_view(&node, "at the end").await;
    // Whatever the kills cut short, each name can be used again, from beginning to end.
    let once = (0..WORKERS).map(|worker| {
        let node = &node;
        async move { use_a_pod(node, &mut node.client().await, worker).await }
    });
    // Few at a time: a plugin has three seconds.
    let mut once = futures::stream::iter(once).buffer_unordered(4);
    while let Some(done) = once.next().await {
        done.unwrap();
    }
    let before = counted(&log);
    wait_for("more lines", || counted(&log) > before).await;
    node.purge_and_check();
}

#[tokio::test]
async fn a_plugin_that_hangs_or_talks_nonsense_costs_one_pod() {
    let mut node = Node::start("plugin", &[]).await;
    let config = sandbox_config(&node, "plugin", false);
    plugin(&node, "touch $CNI_CONTAINERID; exec sleep 20");
    // The server's own limit for a plugin is 3 s here.
    let e = node.run_pod(&config).await.unwrap_err();
    assert!(e.message().contains("network"), "{e}");
    // A caller that does not wait that long, and a server that is killed meanwhile.
    let mut request = tonic::Request::new(cri::RunPodSandboxRequest {
        config: Some(config.clone()),
        runtime_handler: String::new(),
    });
    request.set_timeout(Duration::from_millis(300));
    let e = node.client().await.run_pod_sandbox(request).await.unwrap_err();
    // Which of the two ends of the connection notices first decides.
    assert!(matches!(e.code(), Code::DeadlineExceeded | Code::Cancelled), "{e}");
    node.kill();
    plugin(&node, "touch $CNI_CONTAINERID; echo '{nonsense'");
    node.restart(&[]).await;
    let e = node.run_pod(&config).await.unwrap_err();
    assert!(e.message().contains("network"), "{e}");
    plugin(&node, GOOD_ADD);
    same_view(&node, "after three failures").await;
    node.run_pod(&config).await.unwrap();
    same_view(&node, "after a success").await;
    node.purge_and_check();
}

/// A plugin goes on when its server is killed. What it attaches then must not come after the next server's DEL.
#[tokio::test]
async fn a_plugin_of_a_killed_server_attaches_nothing_later() {
    let mut node = Node::start("late", &[]).await;
    let config = sandbox_config(&node, "late", false);
    let begun = node.dir.join("begun");
    // It calls others, as plugins do, and leaves one running for good, as some do.
    let add = format!(
        "setsid sleep 100 < /dev/null > /dev/null 2>&1 & echo $! $$ > {0}.new; mv {0}.new {0}; for i in $(seq 1000); do [ -e ../go ] && break; sleep 0.05; done; {GOOD_ADD}",
        begun.display(),
    );
    plugin(&node, &add);
    tokio::select! {
        done = node.run_pod(&config) => panic!("{done:?}"),
        () = wait_for("the plugin's start", || begun.exists()) => {}
    }
    let pids = fs::read_to_string(&begun).unwrap();
    let (stays, ends) = pids.trim().split_once(' ').unwrap();
    let lives = |pid: &str| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty());
    node.kill();
    assert!(lives(ends), "the test's plugin ended with its server");
    plugin(&node, GOOD_ADD);
    node.restart(&[]).await;
    let (still, daemon) = (lives(ends), lives(stays));
    fs::write(node.dir.join("go"), "").unwrap();
    let _ = nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(stays.parse().unwrap()),
        nix::sys::signal::Signal::SIGKILL,
    );
    assert!(!still, "the plugin goes on beside the next server");
    assert!(daemon, "what a plugin leaves running is not the next server's to end");
    same_view(&node, "after the restart").await;
    node.run_pod(&config).await.unwrap();
    same_view(&node, "after a success").await;
    node.purge_and_check();
}

#[tokio::test]
async fn broken_records_are_cleaned_up() {
    let mut node = Node::start("broken", &[]).await;
    plugin(&node, GOOD_ADD);
    let mut pods = Vec::new();
    for name in ["cut", "empty", "whole"] {
        let config = sandbox_config(&node, name, false);
        let pod = node.run_pod(&config).await.unwrap();
        let id = node.run_container(&pod, container_config("main", &["sleep", "1000"]), &config).await;
        pods.push((pod, id));
    }
    node.kill();
    // With their copies, or they would go on.
    let damage = |record: PathBuf, cut: fn(&[u8]) -> &[u8]| {
        for file in [record.clone(), record.with_file_name("answered.json")] {
            let text = fs::read(&file).unwrap();
            fs::write(&file, cut(&text)).unwrap();
        }
    };
    let record = |pod: &str| node.dir.join("state/sandboxes").join(pod).join("sandbox.json");
    damage(record(&pods[0].0), |text| &text[..text.len() / 2]);
    damage(record(&pods[1].0), |_| b"");
    damage(node.dir.join("state/containers").join(&pods[2].1).join("container.json"), |_| b"{");
    node.restart(&[]).await;
    same_view(&node, "after the restart").await;
    let left: Vec<String> = node.pods().await.into_iter().map(|p| p.id).collect();
    assert_eq!(left, [pods[2].0.as_str()]);
    assert!(node.list(None).await.is_empty());
    // All names are free again.
    for name in ["cut", "empty"] {
        node.run_pod(&sandbox_config(&node, name, false)).await.unwrap();
    }
    let config = sandbox_config(&node, "whole", false);
    node.run_container(&pods[2].0, container_config("main", &["sleep", "1000"]), &config).await;
    node.purge_and_check();
}

#[tokio::test]
async fn a_full_disk_is_said_and_leaves_nothing() {
    let node = Node::start_on_disk("full", "size=48m").await;
    plugin(&node, GOOD_ADD);
    let config = sandbox_config(&node, "full", false);
    let pod = node.run_pod(&config).await.unwrap();
    let id = node.run_container(&pod, container_config("before", &["sleep", "1000"]), &config).await;
    let filler = node.dir.join("filler");
    let mut block = vec![0u8; 1 << 20];
    let mut file = fs::File::create(&filler).unwrap();
    while !block.is_empty() {
        use std::io::Write;
        if file.write_all(&block).is_err() {
            block.truncate(block.len() / 2);
        }
    }
    let other = sandbox_config(&node, "other", false);
    for _ in 0..2 {
        let e = node.run_pod(&other).await.unwrap_err();
        assert_eq!(e.code(), Code::ResourceExhausted, "{e}");
        let e = node.create(&pod, container_config("during", &["true"]), &config).await.unwrap_err();
        assert_eq!(e.code(), Code::ResourceExhausted, "{e}");
    }
    // What runs is reachable.
    let mut client = node.client().await;
    assert_eq!(exec(&mut client, &id, &["true"], 5).await.unwrap().exit_code, 0);
    drop(file);
    fs::remove_file(&filler).unwrap();
    same_view(&node, "with room again").await;
    node.run_pod(&other).await.unwrap();
    node.run_container(&pod, container_config("during", &["sleep", "1000"]), &config).await;
    same_view(&node, "after it went on").await;
    node.purge_and_check();
}

#[tokio::test]
async fn the_run_folder_is_in_memory_and_goes_with_the_last_pod() {
    let mut node = Node::start("memory", &[]).await;
    node.network(false);
    let mounted = |node: &Node| node.mounts().0;
    assert!(matches!(&mounted(&node)[..], [one] if one.contains(" - tmpfs ")), "{:?}", mounted(&node));
    let pod = node.run_pod(&sandbox_config(&node, "p", false)).await.unwrap();
    // It holds the pod's life, with and without a server.
    node.terminate().await;
    assert_eq!(mounted(&node).len(), 1);
    node.restart(&[]).await;
    assert_eq!(mounted(&node).len(), 1, "not mounted over");
    assert_eq!(node.pods().await[0].state, READY);
    node.client()
        .await
        .remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: pod })
        .await
        .unwrap();
    node.terminate().await;
    assert!(mounted(&node).is_empty());

    // An earlier server kept its pods on the disk.
    let pod = node.dir.join("run/s/0123");
    fs::create_dir_all(&pod).unwrap();
    fs::write(pod.join("kept"), "").unwrap();
    node.restart(&[]).await;
    assert!(mounted(&node).is_empty());
    node.stop_and_check();
}

#[tokio::test]
async fn what_containers_mount_over_is_not_made_anew_for_each() {
    let node = Node::start("points", &[]).await;
    node.network(false);
    let pod = sandbox_config(&node, "p", false);
    let sandbox = node.run_pod(&pod).await.unwrap();
    let id = node.run_container(&sandbox, container_config("c", &["sleep", "1000"]), &pod).await;
    let upper = node.dir.join("images/rootfs").join(&id).join("upper");
    let made: Vec<_> = fs::read_dir(&upper).unwrap().flatten().map(|e| e.file_name()).collect();
    assert!(made.is_empty(), "{made:?}");
    assert_eq!(crate::node::shell(&node, &id, "hostname").await, "p");
    node.client()
        .await
        .remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: sandbox })
        .await
        .unwrap();
    node.stop_and_check();
}

#[tokio::test]
async fn archives_move_while_the_server_runs() {
    let node = Node::start("archive", &[]).await;
    let mut client = node.images().await;
    let request = images::ExportRequest { references: vec![IMAGE.to_owned()] };
    let mut stream = client.export(request).await.unwrap().into_inner();
    let mut archive = Vec::new();
    while let Some(part) = stream.message().await.unwrap() {
        archive.extend(part.data);
    }
    let request = cri::RemoveImageRequest {
        image: Some(cri::ImageSpec { image: IMAGE.to_owned(), ..Default::default() }),
    };
    let mut cri_images = cri::image_service_client::ImageServiceClient::new(node.channel().await.unwrap());
    cri_images.remove_image(request).await.unwrap();
    client.collect_garbage(images::CollectGarbageRequest::default()).await.unwrap();
    assert!(
        cri_images
            .list_images(cri::ListImagesRequest::default())
            .await
            .unwrap()
            .into_inner()
            .images
            .is_empty()
    );

    let import =
        |bytes: &[u8], store: &str| {
            let start = images::ImportStart { name: String::new(), store: store.to_owned() };
            let mut messages =
                vec![images::ImportRequest { body: Some(images::import_request::Body::Start(start)) }];
            messages.extend(bytes.chunks(100_000).map(|c| images::ImportRequest {
                body: Some(images::import_request::Body::Data(c.to_vec())),
            }));
            let mut client = client.clone();
            async move { client.import(futures::stream::iter(messages)).await }
        };
    assert_eq!(import(&archive, "/nowhere").await.unwrap_err().code(), Code::FailedPrecondition);
    // Half an archive is none.
    import(&archive[..archive.len() / 2], "").await.unwrap_err();
    let store = node.dir.join("images").to_string_lossy().into_owned();
    let done = import(&archive, &store).await.unwrap().into_inner();
    assert_eq!(done.images[0].repo_tags, [IMAGE]);
    let left = fs::read_dir(node.dir.join("state/transfer")).unwrap().count();
    assert_eq!(left, 0, "archives left");
    let config = sandbox_config(&node, "archive", true);
    let pod = node.run_pod(&config).await.unwrap();
    node.run_container(&pod, container_config("main", &["sleep", "1000"]), &config).await;
    node.purge_and_check();
}
