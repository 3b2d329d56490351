//! Pods of an earlier release, whose monitor lives on, under this server.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use orlop_proto::cri;
use orlop_proto::monitor::{ClientFrame, HelloReply, ServerFrame, server_frame};
use prost::Message;

use crate::node::{Node, container_config, exec, sandbox_config, shell};

fn previous_monitor() -> PathBuf {
    if let Some(path) = std::env::var_os("ORLOP_PREVIOUS_MONITOR") {
        return path.into();
    }
    let target = std::env::current_exe().unwrap().ancestors().nth(3).unwrap().to_owned();
    let path = target.join("previous/orlop-monitor");
    assert!(path.exists(), "{} is missing: run scripts/previous-monitor.sh", path.display());
    path
}

/// A pod that an earlier release started. It is the real program of that time; its server spoke the same protocol version 1.
async fn node_with_old_pod(name: &str) -> (Node, cri::PodSandboxConfig, String, String) {
    let mut node = Node::start(name, &[]).await;
    node.kill();
    node.flags = vec!["--monitor".into(), previous_monitor().to_string_lossy().into_owned()];
    node.restart(&[]).await;
    let config = sandbox_config(&node, name, true);
    let pod = node.run_pod(&config).await.unwrap();
    let script = "trap 'exit 7' TERM; echo one; while :; do sleep 0.05; done";
    let id = node.run_container(&pod, container_config("main", &["sh", "-c", script]), &config).await;
    node.kill();
    node.flags = Vec::new();
    (node, config, pod, id)
}

#[tokio::test]
async fn pods_of_an_earlier_release_go_on() {
    let (mut node, config, pod, id) = node_with_old_pod("upgrade").await;
    node.restart(&[]).await;
    let mut client = node.client().await;
    let status = node.status(&id).await;
    assert_eq!(status.state, cri::ContainerState::ContainerRunning as i32);
    // Everything that there was goes on; new containers in the old pod, too.
    assert_eq!(shell(&node, &id, "echo $((6 * 7))").await, "42");
    assert_eq!(exec(&mut client, &id, &["sh", "-c", "exit 3"], 5).await.unwrap().exit_code, 3);
    let request = cri::ReopenContainerLogRequest { container_id: id.clone() };
    client.reopen_container_log(request).await.unwrap();
    let resources = cri::LinuxContainerResources { cpu_shares: 300, ..Default::default() };
    let update = cri::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(resources),
        ..Default::default()
    };
    client.update_container_resources(update).await.unwrap();
    let added = node.run_container(&pod, container_config("added", &["sh", "-c", "exit 5"]), &config).await;
    assert_eq!(node.ended(&added).await.exit_code, 5);
    client.remove_container(cri::RemoveContainerRequest { container_id: added }).await.unwrap();
    let request = cri::StopContainerRequest { container_id: id.clone(), timeout: 10 };
    client.stop_container(request).await.unwrap();
    assert_eq!(node.ended(&id).await.exit_code, 7);
    let log = std::fs::read_to_string(node.dir.join("logs/main.log")).unwrap();
    assert!(log.ends_with(" stdout F one\n"), "{log:?}");
    // A pod of today beside it.
    let today = sandbox_config(&node, "today", true);
    let pod_of_today = node.run_pod(&today).await.unwrap();
    let id = node.run_container(&pod_of_today, container_config("main", &["sleep", "1000"]), &today).await;
    assert_eq!(shell(&node, &id, "echo new").await, "new");
    client.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await.unwrap();
    client.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: pod }).await.unwrap();
    node.purge_and_check();
}

/// It knows of no spare ones, which pods must not notice.
#[tokio::test]
async fn an_earlier_monitor_program_serves_pod_after_pod() {
    let mut node = Node::start("upgrade-program", &[]).await;
    node.kill();
    node.flags = vec!["--monitor".into(), previous_monitor().to_string_lossy().into_owned()];
    node.restart(&[]).await;
    for name in ["first", "second", "third"] {
        let config = sandbox_config(&node, name, true);
        let pod = node.run_pod(&config).await.unwrap();
        let id = node.run_container(&pod, container_config("main", &["sleep", "1000"]), &config).await;
        assert_eq!(shell(&node, &id, "echo old").await, "old");
    }
    node.purge_and_check();
}

/// A pod with all that a monitor keeps for it: a network, a PID namespace of its own for all containers, a terminal.
#[tokio::test]
async fn an_old_pod_with_everything_goes_on() {
    use crate::streams::{Client, attach_url, exec_url};
    let mut node = Node::start("upgrade-all", &[]).await;
    node.network(false);
    node.kill();
    node.flags = vec!["--monitor".into(), previous_monitor().to_string_lossy().into_owned()];
    node.restart(&[]).await;
    let config = sandbox_config(&node, "all", false);
    let pod = node.run_pod(&config).await.unwrap();
    let echo = "trap 'exit 7' TERM; echo begun; while read line; do echo \"got $line\"; done";
    let mut terminal = container_config("terminal", &["sh", "-c", echo]);
    (terminal.tty, terminal.stdin) = (true, true);
    let terminal = node.run_container(&pod, terminal, &config).await;
    let counter = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done";
    let plain = node.run_container(&pod, container_config("plain", &["sh", "-c", counter]), &config).await;
    let own = |what: &str, id: &str| {
        let (path, node) = (what.to_owned(), &node);
        let id = id.to_owned();
        async move { std::fs::read_link(format!("/proc/{}/ns/{path}", node.pid_of(&id).await)).unwrap() }
    };
    let (pid_ns, net_ns) = (own("pid", &terminal).await, own("net", &terminal).await);
    assert_eq!(own("pid", &plain).await, pid_ns);
    node.kill();
    node.flags = Vec::new();
    node.restart(&[]).await;

    let own = |what: &str, id: &str| {
        let (path, node) = (what.to_owned(), &node);
        let id = id.to_owned();
        async move { std::fs::read_link(format!("/proc/{}/ns/{path}", node.pid_of(&id).await)).unwrap() }
    };
    let mut client = node.client().await;
    let request = cri::PodSandboxStatusRequest { pod_sandbox_id: pod.clone(), verbose: false };
    let status = client.pod_sandbox_status(request).await.unwrap().into_inner().status.unwrap();
    assert_eq!((status.state, status.network.unwrap().ip.as_str()), (0, "10.99.0.7"));
    let mut attached = Client::connect(&attach_url(&node, &terminal).await).await.unwrap();
    attached.send("typed\n").await;
    attached.until("got typed\r\n").await;
    // A second look at the same terminal.
    let mut second = Client::connect(&attach_url(&node, &terminal).await).await.unwrap();
    second.send("again\n").await;
    second.until("got again\r\n").await;
    attached.until("got again\r\n").await;
    drop((attached, second));
    for tty in [false, true] {
        // That release may tell what a command wrote to a terminal before it tells that it runs.
        let script = "test -t 0 && echo terminal || echo pipe; read line; echo \"got $line\"; exit 3";
        let mut exec =
            Client::connect(&exec_url(&node, &plain, &["sh", "-c", script], tty).await).await.unwrap();
        exec.until(if tty { "terminal" } else { "pipe" }).await;
        exec.send("typed\n").await;
        exec.until("got typed").await;
        let verdict = exec.verdict().await;
        assert_eq!(verdict["details"]["causes"][0]["message"], "3", "{verdict}");
    }
    // A container of today is in the old pod's namespaces.
    let added = node.run_container(&pod, container_config("added", &["sleep", "1000"]), &config).await;
    assert_eq!((own("pid", &added).await, own("net", &added).await), (pid_ns, net_ns));
    assert!(shell(&node, &added, "ps").await.contains("got $line"));

    let request = cri::ReopenContainerLogRequest { container_id: plain.clone() };
    client.reopen_container_log(request).await.unwrap();
    let log = |name: &str| std::fs::read_to_string(node.dir.join(format!("logs/{name}.log"))).unwrap();
    let before = log("plain").lines().count();
    crate::node::wait_for("more of the log", || log("plain").lines().count() > before).await;
    for (i, line) in log("plain").lines().enumerate() {
        assert!(line.ends_with(&format!(" stdout F {i}")), "{i}: {line}");
    }
    let request = cri::StopContainerRequest { container_id: terminal.clone(), timeout: 10 };
    client.stop_container(request).await.unwrap();
    assert_eq!(node.ended(&terminal).await.exit_code, 7);
    let text = log("terminal");
    assert!(text.contains("begun") && text.contains("got typed"), "{text:?}");
    client.remove_container(cri::RemoveContainerRequest { container_id: terminal }).await.unwrap();
    assert_eq!(shell(&node, &plain, "echo on").await, "on");
    client.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await.unwrap();
    assert_eq!(node.status(&plain).await.exit_code, 137);
    client.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: pod }).await.unwrap();
    assert_eq!(std::fs::read_to_string(node.dir.join("cni.log")).unwrap(), "ADD\nDEL\n");
    node.purge_and_check();
}

/// An orderly end of an old pod that runs.
#[tokio::test]
async fn pods_of_an_earlier_release_can_be_removed() {
    let (mut node, _, pod, _) = node_with_old_pod("upgrade-rm").await;
    node.restart(&[]).await;
    let mut client = node.client().await;
    client.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await.unwrap();
    client.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: pod }).await.unwrap();
    assert!(node.pods().await.is_empty());
    node.purge_and_check();
}

/// Answers every greeting as a monitor would that speaks only what this server does not know. Ends with the test's process.
fn foreign_monitor(listener: UnixListener) {
    while let Ok((mut socket, _)) = listener.accept() {
        let mut head = [0u8; 4];
        let Ok(()) = socket.read_exact(&mut head) else { continue };
        let mut body = vec![0u8; u32::from_be_bytes(head) as usize];
        let Ok(()) = socket.read_exact(&mut body) else { continue };
        let id = ClientFrame::decode(&body[..]).map_or(0, |f| f.id);
        let hello = HelloReply { version: 99, pid: 1, build: "99".into() };
        let answer = ServerFrame { id, body: Some(server_frame::Body::Hello(hello)) }.encode_to_vec();
        let _ = socket.write_all(&[&(answer.len() as u32).to_be_bytes()[..], &answer].concat());
    }
}

/// Puts the real monitor's socket back, also when the test fails: nobody could end the pod otherwise.
struct Kept {
    socket: PathBuf,
    kept: PathBuf,
}

impl Kept {
    fn aside(socket: PathBuf) -> Kept {
        let kept = socket.with_file_name("kept.sock");
        std::fs::rename(&socket, &kept).unwrap();
        Kept { socket, kept }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let _ = std::fs::rename(&self.kept, &self.socket);
    }
}

#[tokio::test]
async fn an_unknown_protocol_is_refused_and_nothing_is_lost() {
    let mut node = Node::start("foreign", &[]).await;
    let config = sandbox_config(&node, "foreign", true);
    let pod = node.run_pod(&config).await.unwrap();
    let id = node.run_container(&pod, container_config("main", &["sleep", "1000"]), &config).await;
    let pid = node.pid_of(&id).await;
    node.kill();
    let kept = Kept::aside(node.dir.join("run/s").join(&pod).join("monitor.sock"));
    // By a short name: a socket address holds 108 bytes. On the same file system, which the run folder is.
    let short = node.dir.join("run/foreign.sock");
    let _ = std::fs::remove_file(&short);
    let listener = UnixListener::bind(&short).unwrap();
    std::fs::rename(&short, &kept.socket).unwrap();
    std::thread::spawn(move || foreign_monitor(listener));
    node.restart(&[]).await;
    let mut client = node.client().await;
    let error = exec(&mut client, &id, &["true"], 5).await.unwrap_err();
    assert!(error.message().contains("version 99"), "{error}");
    let request = cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() };
    assert!(client.stop_pod_sandbox(request).await.unwrap_err().message().contains("version 99"));
    let status = node.status(&id).await;
    assert_eq!(status.state, cri::ContainerState::ContainerRunning as i32, "{status:?}");
    assert!(std::path::Path::new(&format!("/proc/{pid}")).exists());
    node.kill();
    drop(kept);
    node.restart(&[]).await;
    assert_eq!(node.pid_of(&id).await, pid);
    node.purge_and_check();
}
