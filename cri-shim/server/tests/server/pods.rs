//! Pods on a real server with the real monitor: through kills of the server and of a monitor.
//! Needs root, `orlop-monitor` (`cargo build -p orlop-monitor`, or ORLOP_MONITOR) and busybox-static.

use std::fs;
use std::time::Duration;

use crate::node::{Node, container_config, exec, sandbox_config, wait_for};
use orlop_proto::cri;

const RUNNING: i32 = cri::ContainerState::ContainerRunning as i32;
const EXITED: i32 = cri::ContainerState::ContainerExited as i32;

#[tokio::test]
async fn a_pods_life() {
    let node = Node::start("life", &[]).await;
    let mut client = node.client().await;
    let config = sandbox_config(&node, "life", true);
    let pod = node.run_pod(&config).await.unwrap();
    // The name is taken.
    let again = node.run_pod(&config).await.unwrap_err();
    assert_eq!(again.code(), tonic::Code::AlreadyExists, "{again}");
    let mut c = container_config(
        "main",
        &["sh", "-c", "trap 'exit 7' TERM; echo out; echo err >&2; while :; do sleep 0.05; done"],
    );
    c.envs.push(cri::KeyValue { key: "GREETING".into(), value: b"hi".to_vec() });
    let id = node.create(&pod, c, &config).await.unwrap();
    assert_eq!(node.status(&id).await.state, 0);
    node.start_container(&id).await.unwrap();
    let status = node.status(&id).await;
    assert_eq!((status.state, status.image_id.starts_with("sha256:")), (RUNNING, true));
    let done = exec(&mut client, &id, &["sh", "-c", "echo $GREETING; id -u; exit 3"], 5).await.unwrap();
    assert_eq!((done.exit_code, String::from_utf8_lossy(&done.stdout).as_ref()), (3, "hi\n0\n"));
    let slow = exec(&mut client, &id, &["sleep", "30"], 1).await.unwrap_err();
    assert_eq!(slow.code(), tonic::Code::DeadlineExceeded, "{slow}");
    wait_for("both lines in the log", || {
        let text = fs::read_to_string(&status.log_path).unwrap_or_default();
        text.contains(" stdout F out\n") && text.contains(" stderr F err\n")
    })
    .await;
    let stats =
        client.container_stats(cri::ContainerStatsRequest { container_id: id.clone() }).await.unwrap();
    assert!(stats.into_inner().stats.unwrap().memory.unwrap().usage_bytes.unwrap().value > 0);
    // What the container sees of its cgroup is not writable.
    let write = [
        "sh",
        "-c",
        "for f in $(find /sys/fs/cgroup -name cgroup.procs); do echo 1 > $f && exit 1; done 2>/dev/null; true",
    ];
    assert_eq!(exec(&mut client, &id, &write, 5).await.unwrap().exit_code, 0);

    // Its own answer to the stop signal is the exit code; stopping again is fine.
    for _ in 0..2 {
        client
            .stop_container(cri::StopContainerRequest { container_id: id.clone(), timeout: 10 })
            .await
            .unwrap();
    }
    let status = node.status(&id).await;
    assert_eq!((status.state, status.exit_code, status.reason.as_str()), (EXITED, 7, "Error"));
    assert!(status.finished_at >= status.started_at && status.started_at > 0);
    for _ in 0..2 {
        client.remove_container(cri::RemoveContainerRequest { container_id: id.clone() }).await.unwrap();
    }
    // Removing a pod takes a running container with it.
    let id = node.run_container(&pod, container_config("main", &["sleep", "1000"]), &config).await;
    assert_eq!(node.list(Some(&id[..12])).await.len(), 1);
    for _ in 0..2 {
        client.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await.unwrap();
    }
    assert_eq!(node.status(&id).await.state, EXITED);
    for _ in 0..2 {
        client
            .remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: pod.clone() })
            .await
            .unwrap();
    }
    assert!(node.list(None).await.is_empty());
    node.stop_and_check();
}

#[tokio::test]
async fn how_containers_end() {
    let node = Node::start("ends", &[]).await;
    let config = sandbox_config(&node, "ends", true);
    let pod = node.run_pod(&config).await.unwrap();
    let mut eater = container_config("eater", &["sh", "-c", "a=0123456789abcdef; while :; do a=$a$a; done"]);
    eater.linux.get_or_insert_default().resources =
        Some(cri::LinuxContainerResources { memory_limit_in_bytes: 16 << 20, ..Default::default() });
    for (config_of, code, reason) in [
        (container_config("ok", &["true"]), 0, "Completed"),
        (container_config("bad", &["sh", "-c", "exit 9"]), 9, "Error"),
        (container_config("killed", &["sh", "-c", "kill -9 $$"]), 137, "Error"),
        (eater, 137, "OOMKilled"),
    ] {
        let name = config_of.metadata.clone().unwrap().name;
        let id = node.run_container(&pod, config_of, &config).await;
        let status = node.ended(&id).await;
        // A shell cannot SIGKILL itself as PID 1 of its namespace; then it goes on and ends with 0.
        if name == "killed" && status.exit_code == 0 {
            continue;
        }
        assert_eq!((status.exit_code, status.reason.as_str()), (code, reason), "{name}");
    }
    // A program that is not there fails the start, as in containerd, and the container has ended with that.
    let missing =
        node.create(&pod, container_config("missing", &["/no/such/program"]), &config).await.unwrap();
    assert_eq!(node.status(&missing).await.state, cri::ContainerState::ContainerCreated as i32);
    let error = node.start_container(&missing).await.unwrap_err();
    assert!(error.message().contains("no/such/program"), "{error}");
    let status = node.ended(&missing).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (128, "StartError"));
    assert!(status.message.contains("no/such/program"), "{}", status.message);
    let user = |name: &str| {
        let mut c = container_config(name, &["sh", "-c", "id -u; id -g; sleep 1000"]);
        let s = c.linux.get_or_insert_default().security_context.get_or_insert_default();
        s.run_as_username = "www".into();
        s.readonly_rootfs = true;
        s.no_new_privs = true;
        s.capabilities =
            Some(cri::Capability { drop_capabilities: vec!["ALL".into()], ..Default::default() });
        c
    };
    let id = node.run_container(&pod, user("user"), &config).await;
    let mut client = node.client().await;
    let done = exec(
        &mut client,
        &id,
        &["sh", "-c", "id -u; touch /x 2>/dev/null; echo $?; grep CapBnd /proc/self/status"],
        5,
    )
    .await
    .unwrap();
    assert_eq!(String::from_utf8_lossy(&done.stdout), "33\n1\nCapBnd:\t0000000000000000\n");
    node.purge_and_check();
}

#[tokio::test]
async fn a_pod_on_a_network_shares_what_it_should() {
    let node = Node::start("net", &[]).await;
    node.network(false);
    let mut config = sandbox_config(&node, "net", false);
    config.hostname = "web-0".into();
    config.dns_config = Some(cri::DnsConfig { servers: vec!["10.9.9.9".into()], ..Default::default() });
    config
        .linux
        .get_or_insert_default()
        .sysctls
        .insert("net.ipv4.ip_unprivileged_port_start".into(), "0".into());
    let pod = node.run_pod(&config).await.unwrap();
    let mut client = node.client().await;
    let status = client
        .pod_sandbox_status(cri::PodSandboxStatusRequest { pod_sandbox_id: pod.clone(), verbose: true })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(status.status.unwrap().network.unwrap().ip, "10.99.0.7");
    let first = node.run_container(&pod, container_config("first", &["sleep", "1000"]), &config).await;
    let second = node.run_container(&pod, container_config("second", &["sleep", "1001"]), &config).await;
    let script = "hostname; cat /etc/resolv.conf; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; echo x > /dev/shm/shared; ls /sys/class/net";
    let seen = exec(&mut client, &first, &["sh", "-c", script], 5).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&seen.stdout), "web-0\nnameserver 10.9.9.9\n0\nlo\n");
    let ns = ["sh", "-c", "cat /dev/shm/shared; readlink /proc/self/ns/net; readlink /proc/self/ns/ipc"];
    let (a, b) =
        (exec(&mut client, &first, &ns, 5).await.unwrap(), exec(&mut client, &second, &ns, 5).await.unwrap());
    assert_eq!(a.stdout, b.stdout);
    let own = |c: &str| fs::read_link(format!("/proc/self/ns/{c}")).unwrap().to_string_lossy().into_owned();
    assert!(!String::from_utf8_lossy(&a.stdout).contains(&own("net")));
    // The pod's PID namespace is shared when it asks for it.
    let processes =
        exec(&mut client, &first, &["sh", "-c", "ps | grep -c 'sleep 100[01]'"], 5).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&processes.stdout).trim(), "2");
    node.purge_and_check();
    assert_eq!(fs::read_to_string(node.dir.join("cni.log")).unwrap(), "ADD\nDEL\n");
}

#[tokio::test]
async fn a_failed_network_leaves_nothing() {
    let node = Node::start("fail", &[]).await;
    node.network(true);
    let config = sandbox_config(&node, "fail", false);
    for _ in 0..2 {
        let e = node.run_pod(&config).await.unwrap_err();
        assert!(e.message().contains("out of addresses"), "{e}");
    }
    assert!(node.list(None).await.is_empty());
    node.stop_and_check();
}

#[tokio::test]
async fn a_failed_sandbox_that_cannot_be_taken_back_stays_known() {
    let node = Node::start("stuck", &[]).await;
    node.network(true);
    let deaf = node.dir.join("del-fails");
    fs::write(&deaf, "").unwrap();
    let config = sandbox_config(&node, "stuck", false);
    let e = node.run_pod(&config).await.unwrap_err();
    assert_eq!(e.message().matches("out of addresses").count(), 1, "{e}");
    let mut client = node.client().await;
    let all =
        client.list_pod_sandbox(cri::ListPodSandboxRequest::default()).await.unwrap().into_inner().items;
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].state(), cri::PodSandboxState::SandboxNotready);
    assert_eq!(node.run_pod(&config).await.unwrap_err().code(), tonic::Code::AlreadyExists);
    let remove = cri::RemovePodSandboxRequest { pod_sandbox_id: all[0].id.clone() };
    client.remove_pod_sandbox(remove.clone()).await.unwrap_err();
    fs::remove_file(deaf).unwrap();
    client.remove_pod_sandbox(remove).await.unwrap();
    assert_eq!(node.run_pod(&config).await.unwrap_err().code(), tonic::Code::Unknown);
    assert!(
        client
            .list_pod_sandbox(cri::ListPodSandboxRequest::default())
            .await
            .unwrap()
            .into_inner()
            .items
            .is_empty()
    );
    node.stop_and_check();
}

#[tokio::test]
async fn a_killed_server_adopts_what_runs() {
    let mut node = Node::start("adopt", &[]).await;
    let config = sandbox_config(&node, "adopt", true);
    let pod = node.run_pod(&config).await.unwrap();
    let steady = node.run_container(&pod, container_config("steady", &["sleep", "1000"]), &config).await;
    let until_told = ["sh", "-c", "until [ -e /end ]; do sleep 0.01; done; exit 42"];
    let brief = node.run_container(&pod, container_config("brief", &until_told), &config).await;
    let (pid, brief_pid) = (node.pid_of(&steady).await, node.pid_of(&brief).await);
    node.kill();
    fs::write(format!("/proc/{brief_pid}/root/end"), "").unwrap();
    let process = std::path::PathBuf::from(format!("/proc/{brief_pid}"));
    wait_for("the brief process to end while no server runs", || !process.exists()).await;
    node.restart(&[]).await;
    assert_eq!(node.pid_of(&steady).await, pid);
    let status = node.ended(&brief).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (42, "Error"));
    let mut client = node.client().await;
    assert_eq!(exec(&mut client, &steady, &["true"], 5).await.unwrap().exit_code, 0);
    // The names are still held, and events still arrive.
    assert_eq!(node.run_pod(&config).await.unwrap_err().code(), tonic::Code::AlreadyExists);
    let mut events = client.get_container_events(cri::GetEventsRequest {}).await.unwrap().into_inner();
    client
        .stop_container(cri::StopContainerRequest { container_id: steady.clone(), timeout: 0 })
        .await
        .unwrap();
    let event = events.message().await.unwrap().unwrap();
    assert_eq!(
        (event.container_id, event.container_event_type),
        (steady, cri::ContainerEventType::ContainerStoppedEvent as i32)
    );
    node.purge_and_check();
}

#[tokio::test]
async fn containers_of_a_dead_monitor_are_lost_and_cleaned_up() {
    let node = Node::start("dead", &[]).await;
    let config = sandbox_config(&node, "dead", true);
    let pod = node.run_pod(&config).await.unwrap();
    let id = node.run_container(&pod, container_config("main", &["sleep", "1000"]), &config).await;
    let pid = node.pid_of(&id).await;
    let monitor = fs::read_to_string(node.dir.join("run/s").join(&pod).join("monitor.pid")).unwrap();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(monitor.trim().parse().unwrap()),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    let status = node.ended(&id).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (255, "Unknown"));
    wait_for("the orphaned process to be gone", || !std::path::Path::new(&format!("/proc/{pid}")).exists())
        .await;
    let mut client = node.client().await;
    let mut state = 0;
    for _ in 0..6000 {
        let all = client.list_pod_sandbox(cri::ListPodSandboxRequest::default()).await.unwrap().into_inner();
        state = all.items[0].state;
        if state == cri::PodSandboxState::SandboxNotready as i32 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(state, cri::PodSandboxState::SandboxNotready as i32);
    node.purge_and_check();
}

#[tokio::test]
async fn the_end_of_the_input_is_no_end_of_the_output() {
    let node = Node::start("halfclose", &[]).await;
    let config = sandbox_config(&node, "halfclose", true);
    let pod = node.run_pod(&config).await.unwrap();
    let id = node.run_container(&pod, container_config("main", &["sleep", "1000"]), &config).await;
    let text = "0123456789abcde\n".repeat(20_000);
    for transport in ["spdy", "websocket"] {
        let exec =
            |script| ["exec", "-i", "--transport", transport, &id, "sh", "-c", script].map(str::to_owned);
        let run = |script| {
            let args = exec(script);
            node.try_crictl(&args.each_ref().map(String::as_str), &text)
        };
        let (ok, out) = run("cat; sleep 0.2; echo end");
        assert!(ok && out == format!("{text}end\n"), "{transport}: {ok}, {} bytes", out.len());
        let (ok, out) = run("cat > /dev/null; exit 7");
        assert!(!ok && out.contains("exit code 7"), "{transport}: {out}");
    }
    node.purge_and_check();
}

pub fn signal_monitor(node: &Node, pod: &str, signal: nix::sys::signal::Signal) {
    let file = node.dir.join("run/s").join(pod).join("monitor.pid");
    let pid: i32 = fs::read_to_string(file).unwrap().trim().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).unwrap();
}

/// Not so one that its parent has not reaped yet.
pub fn lives(pid: u64) -> bool {
    fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())
}

/// As systemd or Docker in a pod: groups below the container's, one of them frozen.
#[tokio::test]
async fn groups_below_those_of_a_dead_monitor_end_too() {
    let node = Node::start("nested", &[]).await;
    let config = sandbox_config(&node, "nested", true);
    let pod = node.run_pod(&config).await.unwrap();
    let command = ["sh", "-c", "sleep 1001 & sleep 1002 & echo $!; wait"];
    let id = node.run_container(&pod, container_config("main", &command), &config).await;
    let log = node.status(&id).await.log_path;
    wait_for("both processes", || fs::read_to_string(&log).is_ok_and(|l| l.contains("stdout"))).await;
    let main = node.pid_of(&id).await;
    let children = fs::read_to_string(format!("/proc/{main}/task/{main}/children")).unwrap();
    let children: Vec<&str> = children.split_whitespace().collect();
    assert_eq!(children.len(), 2);
    let mut nested = Vec::new();
    let groups = fs::read_to_string(format!("/proc/{main}/cgroup")).unwrap();
    for line in groups.lines().filter(|l| l.contains(&id)) {
        let parts: Vec<&str> = line.splitn(3, ':').collect();
        let base =
            std::path::Path::new("/sys/fs/cgroup").join(parts[1]).join(parts[2].trim_start_matches('/'));
        for (depth, child) in ["a", "a/b"].iter().zip(&children) {
            let group = base.join(depth);
            fs::create_dir(&group).unwrap();
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if let Ok(value) = fs::read(base.join(file)) {
                    fs::write(group.join(file), value).unwrap();
                }
            }
            fs::write(group.join("cgroup.procs"), child).unwrap();
            let state = group.join("freezer.state");
            if state.exists() {
                fs::write(state, "FROZEN").unwrap();
            }
            nested.push(group);
        }
    }
    assert!(!nested.is_empty(), "{groups}");
    signal_monitor(&node, &pod, nix::sys::signal::Signal::SIGKILL);
    let status = node.ended(&id).await;
    assert_eq!(status.exit_code, 255);
    let left: Vec<&&str> = children.iter().filter(|c| lives(c.parse().unwrap())).collect();
    assert!(left.is_empty(), "reported as ended while {left:?} of it run");
    let request = cri::RemovePodSandboxRequest { pod_sandbox_id: pod };
    node.client().await.remove_pod_sandbox(request).await.unwrap();
    let left: Vec<_> = nested.iter().filter(|g| g.exists()).collect();
    assert!(left.is_empty(), "{left:?}");
    node.purge_and_check();
}

#[tokio::test]
async fn a_monitor_that_stands_still_is_waited_for() {
    use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};
    let mut node = Node::start("still", &[]).await;
    let config = sandbox_config(&node, "still", true);
    let pod = node.run_pod(&config).await.unwrap();
    let id = node.run_container(&pod, container_config("main", &["sleep", "1000"]), &config).await;
    let script = ["sh", "-c", "while [ ! -e /go ]; do sleep 0.1; done; exit 7"];
    let ends = node.run_container(&pod, container_config("ends", &script), &config).await;
    let (pid, ending) = (node.pid_of(&id).await, node.pid_of(&ends).await);
    signal_monitor(&node, &pod, SIGSTOP);
    // A server that starts anew asks every monitor.
    node.kill();
    node.restart(&[]).await;
    for id in [&id, &ends] {
        assert_eq!(node.status(id).await.state, RUNNING);
    }
    assert_eq!(node.pods().await[0].state, cri::PodSandboxState::SandboxReady as i32);
    fs::write(format!("/proc/{ending}/root/go"), "").unwrap();
    signal_monitor(&node, &pod, SIGCONT);
    assert_eq!(node.ended(&ends).await.exit_code, 7);
    assert_eq!((node.status(&id).await.state, node.pid_of(&id).await), (RUNNING, pid));
    assert_eq!(exec(&mut node.client().await, &id, &["true"], 5).await.unwrap().exit_code, 0);

    signal_monitor(&node, &pod, SIGSTOP);
    let mut client = node.client().await;
    client.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await.unwrap();
    client.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: pod }).await.unwrap();
    assert!(!lives(pid));
    node.nothing_runs("after the removal");
    node.purge_and_check();
}

#[tokio::test]
async fn a_kill_at_any_step_leaves_nothing_half_made() {
    let mut node = Node::start("kill", &[]).await;
    node.network(false);
    let config = sandbox_config(&node, "kill", false);
    for point in ["before-monitor", "before-namespaces", "before-network", "before-ready"] {
        node.kill();
        node.restart(&[("ORLOP_FAILPOINTS", &format!("run-sandbox-{point}=kill"))]).await;
        node.run_pod(&config).await.unwrap_err();
        node.kill();
        node.restart(&[]).await;
        assert!(node.pods().await.is_empty(), "{point}");
        node.nothing_runs(point);
    }
    let pod = node.run_pod(&config).await.unwrap();
    for point in ["before-rootfs", "before-create", "before-record"] {
        node.kill();
        node.restart(&[("ORLOP_FAILPOINTS", &format!("create-container-{point}=kill"))]).await;
        node.create(&pod, container_config("main", &["sleep", "1000"]), &config).await.unwrap_err();
        node.kill();
        node.restart(&[]).await;
        assert!(node.list(None).await.is_empty(), "{point}");
        assert_eq!(node.pods().await.len(), 1, "{point}");
    }
    // The name is free again, and the pod still works.
    let id = node.run_container(&pod, container_config("main", &["sleep", "1000"]), &config).await;
    assert_eq!(node.status(&id).await.state, RUNNING);
    node.purge_and_check();
}
