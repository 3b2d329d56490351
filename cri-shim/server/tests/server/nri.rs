//! NRI plugins: a program of upstream's own library (`tests/nri-plugin`) that notes what it is asked and answers as it is told.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use orlop_proto::cri;
use serde_json::{Value, json};

use crate::node::{Node, container_config, sandbox_config, shell, wait_for};

fn program() -> PathBuf {
    if let Some(path) = std::env::var_os("ORLOP_NRI_PLUGIN") {
        return path.into();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|d| d.join("nri-test-plugin")).find(|p| p.exists());
    found.expect("nri-test-plugin is not on PATH: run `scripts/deps.sh test` or set ORLOP_NRI_PLUGIN")
}

/// Requests of plugins may take this long, unless a test is about that: others may use the machine as well.
const PATIENT: &str = "30000";

/// A server whose plugins are those of its own folder.
async fn server(name: &str, request_timeout: &str) -> Node {
    let mut node = Node::start(&format!("nri-{name}"), &[]).await;
    node.terminate().await;
    for (flag, file) in
        [("socket", "nri/nri.sock"), ("plugin-dir", "nri-plugins"), ("config-dir", "nri-conf")]
    {
        node.flags.extend([format!("--nri-{flag}"), node.dir.join(file).to_string_lossy().into_owned()]);
    }
    node.flags.extend(["--nri-request-timeout".to_owned(), request_timeout.to_owned()]);
    node.restart(&[]).await;
    node
}

struct Plugin {
    child: Child,
    log: PathBuf,
    script: PathBuf,
}

impl Drop for Plugin {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn noted(log: &Path) -> Vec<(String, Value)> {
    let text = fs::read_to_string(log).unwrap_or_default();
    // The last line may be half-written.
    let lines = text.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
    lines.map(|v| (v["event"].as_str().unwrap().to_owned(), v["data"].clone())).collect()
}

impl Plugin {
    /// Returns once it knows what there is.
    async fn start(node: &Node, index: &str, name: &str, script: &Value) -> Plugin {
        let file = |kind: &str| node.dir.join(format!("{index}-{name}.{kind}"));
        let (log, script_file) = (file("log"), file("json"));
        fs::write(&script_file, script.to_string()).unwrap();
        let child = Command::new(program())
            .args(["-idx", index, "-name", name])
            .arg("-socket")
            .arg(node.dir.join("nri/nri.sock"))
            .arg("-log")
            .arg(&log)
            .arg("-script")
            .arg(&script_file)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let plugin = Plugin { child, log, script: script_file };
        plugin.waits_for("Synchronize", 1).await;
        plugin
    }

    fn script(&self, script: &Value) {
        let next = self.script.with_extension("next");
        fs::write(&next, script.to_string()).unwrap();
        fs::rename(next, &self.script).unwrap();
    }

    fn events(&self) -> Vec<String> {
        noted(&self.log).into_iter().map(|(name, _)| name).collect()
    }

    fn all(&self, event: &str) -> Vec<Value> {
        noted(&self.log).into_iter().filter(|(name, _)| name == event).map(|(_, data)| data).collect()
    }

    async fn waits_for(&self, event: &str, count: usize) -> Value {
        let what = format!("{count} {event} of {}", self.log.display());
        wait_for(&what, || self.all(event).len() >= count).await;
        self.all(event).pop().unwrap()
    }

    /// Asks for updates that nothing led to; returns those that failed.
    async fn updates(&mut self, updates: &Value) -> Value {
        let before = self.all("Updated").len();
        writeln!(self.child.stdin.as_mut().unwrap(), "{updates}").unwrap();
        let answer = self.waits_for("Updated", before + 1).await;
        assert_eq!(answer["error"], "", "{answer}");
        answer["failed"].clone()
    }
}

fn limit(mib: u64) -> Value {
    json!({"memory": {"limit": {"value": mib << 20}}})
}

/// The cgroup of a container as the kernel has it, and its memory limit in MiB.
async fn memory_of(node: &Node, id: &str) -> (String, u64) {
    let groups = fs::read_to_string(format!("/proc/{}/cgroup", node.pid_of(id).await)).unwrap();
    let v1 = groups.lines().find_map(|l| l.split_once(":memory:")).map(|(_, path)| path.to_owned());
    let file = match &v1 {
        Some(path) => format!("/sys/fs/cgroup/memory{path}/memory.limit_in_bytes"),
        None => format!("/sys/fs/cgroup{}/memory.max", groups.trim().trim_start_matches("0::")),
    };
    (v1.unwrap_or(groups), fs::read_to_string(file).unwrap().trim().parse::<u64>().unwrap() >> 20)
}

async fn update(node: &Node, id: &str, mib: i64) -> Result<(), tonic::Status> {
    let linux = cri::LinuxContainerResources { memory_limit_in_bytes: mib << 20, ..Default::default() };
    let request = cri::UpdateContainerResourcesRequest {
        container_id: id.to_owned(),
        linux: Some(linux),
        ..Default::default()
    };
    node.client().await.update_container_resources(request).await.map(drop)
}

async fn remove(node: &Node, pod: &str) {
    let pod_sandbox_id = pod.to_owned();
    let mut client = node.client().await;
    client
        .stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() })
        .await
        .unwrap();
    client.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id }).await.unwrap();
}

#[tokio::test]
async fn a_plugin_sees_the_whole_life_of_a_pod() {
    let node = server("life", PATIENT).await;
    node.network(false);
    let plugin = Plugin::start(&node, "10", "life", &json!({})).await;
    let mut config = sandbox_config(&node, "life", false);
    config.labels.insert("app".into(), "x".into());
    let pod = node.run_pod(&config).await.unwrap();
    let mut c = container_config("main", &["sleep", "1000"]);
    c.labels.insert("part".into(), "y".into());
    let id = node.run_container(&pod, c, &config).await;
    update(&node, &id, 64).await.unwrap();
    let mut client = node.client().await;
    let resources = cri::LinuxContainerResources { cpu_shares: 77, ..Default::default() };
    let request = cri::UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.clone(),
        resources: Some(resources),
        ..Default::default()
    };
    client.update_pod_sandbox_resources(request).await.unwrap();
    client.stop_container(cri::StopContainerRequest { container_id: id.clone(), timeout: 0 }).await.unwrap();
    client.remove_container(cri::RemoveContainerRequest { container_id: id.clone() }).await.unwrap();
    remove(&node, &pod).await;
    let events = plugin.events();
    let want = [
        "Configure",
        "Synchronize",
        "RunPodSandbox",
        "CreateContainer",
        "ValidateContainerAdjustment",
        "PostCreateContainer",
        "StartContainer",
        "PostStartContainer",
        "UpdateContainer",
        "PostUpdateContainer",
        "UpdatePodSandbox",
        "PostUpdatePodSandbox",
        "StopContainer",
        "RemoveContainer",
        "StopPodSandbox",
        "RemovePodSandbox",
    ];
    assert_eq!(events, want, "{}", node.log());
    let configured = &plugin.all("Configure")[0];
    assert_eq!((&configured["runtime"], &configured["config"]), (&json!("orlop"), &json!("")));
    let run = &plugin.all("RunPodSandbox")[0]["pod"];
    assert_eq!(
        (&run["id"], &run["name"], &run["namespace"]),
        (&json!(pod), &json!("life"), &json!("default"))
    );
    assert_eq!((&run["uid"], &run["labels"]["app"]), (&json!("uid-life"), &json!("x")));
    assert_eq!(run["ips"], json!(["10.99.0.7"]));
    assert_eq!(run["linux"]["cgroup_parent"], json!(node.cgroup));
    let pin = node.dir.join("run/s").join(&pod).join("ns/net");
    let namespaces = run["linux"]["namespaces"].as_array().unwrap();
    assert!(namespaces.contains(&json!({"type": "network", "path": pin})), "{namespaces:?}");
    let created = &plugin.all("CreateContainer")[0]["container"];
    assert_eq!((&created["id"], &created["pod_sandbox_id"]), (&json!(id), &json!(pod)));
    assert_eq!((&created["name"], &created["labels"]["part"]), (&json!("main"), &json!("y")));
    assert_eq!(created["args"], json!(["sleep", "1000"]));
    assert!(created["env"].as_array().unwrap().contains(&json!("PATH=/bin")), "{}", created["env"]);
    assert!(created["mounts"].as_array().unwrap().iter().any(|m| m["destination"] == "/proc"));
    assert_eq!(created["linux"]["cgroups_path"], json!(format!("{}/{id}", node.cgroup)));
    assert!(created["image"]["config_digest"].as_str().unwrap().starts_with("sha256:"));
    let started = &plugin.all("PostStartContainer")[0]["container"];
    assert!(started["pid"].as_u64().unwrap() > 1);
    assert_eq!(plugin.all("UpdateContainer")[0]["resources"]["memory"]["limit"]["value"], 64 << 20);
    let updated = &plugin.all("PostUpdateContainer")[0]["container"];
    assert_eq!(updated["linux"]["resources"]["memory"]["limit"]["value"], 64 << 20);
    assert_eq!(plugin.all("UpdatePodSandbox")[0]["resources"]["cpu"]["shares"]["value"], 77);
    let stopped = &plugin.all("StopContainer")[0]["container"];
    assert_eq!((&stopped["exit_code"], &stopped["args"][0]), (&json!(137), &json!("sleep")));
    drop(plugin);
    node.purge_and_check();
}

#[tokio::test]
async fn what_plugins_adjust_shows_in_the_container() {
    let node = server("adjust", PATIENT).await;
    fs::create_dir_all(node.dir.join("shared")).unwrap();
    fs::create_dir_all(node.dir.join("cdi")).unwrap();
    fs::write(node.dir.join("shared/file"), "from the host").unwrap();
    let cdi = "cdiVersion: 0.6.0\nkind: orlop.test/nri\ndevices:\n- {name: one, containerEdits: {env: [CDI=yes]}}\n";
    fs::write(node.dir.join("cdi/nri.yaml"), cdi).unwrap();
    let hook_ran = node.dir.join("hook-ran");
    let script = json!({"containers": {
        "main": {"adjust": {
            "annotations": {"nri.test/own": "1"},
            "env": [{"key": "ADDED", "value": "a=b"}, {"key": "-GONE"}],
            "args": ["sleep", "777"],
            "mounts": [
                {"destination": "/mnt/shared", "source": node.dir.join("shared"), "type": "bind", "options": ["rbind", "ro"]},
                {"destination": "-/gone"},
            ],
            "hooks": {
                "create_runtime": [{"path": "/bin/busybox", "args": ["busybox", "touch", hook_ran]}],
                "poststop": [{"path": "/bin/busybox", "args": ["busybox", "touch", node.dir.join("hook-ran-after")]}],
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 333, "soft": 222}],
            "CDI_devices": [{"name": "orlop.test/nri=one"}],
            "linux": {
                "devices": [{"path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "file_mode": {"value": 0o600}}],
                "resources": {"memory": {"limit": {"value": 40 << 20}}, "pids": {"limit": 100}},
                "oom_score_adj": {"value": 567},
                "seccomp_policy": {"default_action": "SCMP_ACT_ALLOW", "syscalls": [
                    {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errno_ret": {"value": 1}}]},
            },
        }},
        "moved": {"adjust": {"linux": {"cgroups_path": format!("{}/moved", node.cgroup)}}},
        // SCHED_BATCH, and best effort.
        "tuned": {"adjust": {"linux": {"sysctl": {"kernel.msgmax": "12345"}, "scheduler": {"policy": 4, "nice": 5},
            "io_priority": {"class": 2, "priority": 6}}}},
        "sysctl": {"adjust": {"linux": {"sysctl": {"kernel.panic": "1"}}}},
        "card": {"adjust": {"linux": {"net_devices": {"eth9": {"name": "eth1"}}}}},
        "class": {"adjust": {"linux": {"resources": {"blockio_class": {"value": "gold"}}}}},
        "nowhere": {"adjust": {"mounts": [{"destination": "/x", "source": "/nowhere", "type": "bind"}]}},
    }});
    let plugin = Plugin::start(&node, "10", "adjust", &script).await;
    let config = sandbox_config(&node, "adjust", true);
    let pod = node.run_pod(&config).await.unwrap();
    let mut c = container_config("main", &["sleep", "1000"]);
    c.envs.push(cri::KeyValue { key: "GONE".into(), value: b"1".to_vec() });
    c.mounts.push(cri::Mount {
        container_path: "/gone".into(),
        host_path: node.dir.join("shared").to_string_lossy().into_owned(),
        ..Default::default()
    });
    let id = node.run_container(&pod, c, &config).await;
    let script = "echo $ADDED ${GONE:-none} $CDI; cat /mnt/shared/file; echo; ls /gone 2>/dev/null | wc -l; \
                  touch /mnt/shared/no 2>/dev/null || echo ro; head -c 4 /dev/mine | wc -c; ulimit -n; ulimit -Hn; \
                  cat /proc/1/oom_score_adj; mkdir /tmp/d 2>/dev/null || echo refused; cat /proc/1/cmdline | tr '\\0' ' '";
    let script = script.replace(" | tr '\\0' ' '", "");
    let out = shell(&node, &id, &script).await;
    let got: Vec<_> = out.lines().map(|l| l.replace('\0', " ")).collect();
    let want =
        ["a=b none yes", "from the host", "0", "ro", "4", "222", "333", "567", "refused", "sleep 777 "];
    assert_eq!(got, want);
    assert_eq!(memory_of(&node, &id).await.1, 40);
    assert!(hook_ran.exists());
    let limits = node.status(&id).await.resources.unwrap().linux.unwrap();
    assert_eq!(limits.memory_limit_in_bytes, 40 << 20);
    // What the kubelet does not name stays as the plugin has it.
    let request = cri::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(cri::LinuxContainerResources { cpu_shares: 100, ..Default::default() }),
        ..Default::default()
    };
    node.client().await.update_container_resources(request).await.unwrap();
    assert_eq!(memory_of(&node, &id).await.1, 40);
    let validated = plugin.all("ValidateContainerAdjustment").remove(0);
    assert_eq!(validated["adjust"]["args"], json!(["sleep", "777"]));
    assert!(validated["owners"].to_string().contains("10-adjust"), "{validated}");
    assert!(plugin.all("StartContainer")[0]["container"]["annotations"]["nri.test/own"] == "1");

    let moved = node.run_container(&pod, container_config("moved", &["sleep", "1000"]), &config).await;
    assert!(memory_of(&node, &moved).await.0.contains(&format!("{}/moved", node.cgroup)));
    for (name, says) in [("card", "eth9"), ("class", "block I/O class"), ("nowhere", "/nowhere")] {
        let e = node.create(&pod, container_config(name, &["sleep", "1000"]), &config).await.unwrap_err();
        assert!(e.message().contains("10-adjust") && e.message().contains(says), "{name}: {e}");
    }
    let tuned = node.run_container(&pod, container_config("tuned", &["sleep", "1000"]), &config).await;
    let script = "cat /proc/sys/kernel/msgmax; cut -d' ' -f 19,41 /proc/1/stat; busybox ionice -p 1";
    assert_eq!(shell(&node, &tuned, script).await, "12345\n5 3\nbest-effort: prio 6");
    let e = node.create(&pod, container_config("sysctl", &["sleep", "1000"]), &config).await.unwrap_err();
    assert!(e.message().contains("kernel.panic"), "{e}");
    assert_eq!(node.list(None).await.len(), 3);
    remove(&node, &pod).await;
    assert!(node.dir.join("hook-ran-after").exists());
    drop(plugin);
    node.purge_and_check();
}

#[tokio::test]
async fn plugins_change_updates_and_ask_for_their_own() {
    let node = server("update", PATIENT).await;
    let script = json!({"containers": {"second": {"update": []}}});
    let mut plugin = Plugin::start(&node, "10", "update", &script).await;
    let config = sandbox_config(&node, "update", true);
    let pod = node.run_pod(&config).await.unwrap();
    let id = node.run_container(&pod, container_config("first", &["sleep", "1000"]), &config).await;
    update(&node, &id, 64).await.unwrap();
    assert_eq!(memory_of(&node, &id).await.1, 64);
    plugin.script(&json!({"resources": limit(48)}));
    update(&node, &id, 80).await.unwrap();
    assert_eq!(memory_of(&node, &id).await.1, 48);
    let of = |id: &str, mib: u64| json!({"container_id": id, "linux": {"resources": limit(mib)}});
    assert_eq!(plugin.updates(&json!([of(&id, 56)])).await, Value::Null);
    assert_eq!(memory_of(&node, &id).await.1, 56);
    let limits = node.status(&id).await.resources.unwrap().linux.unwrap();
    assert_eq!(limits.memory_limit_in_bytes, 56 << 20);
    let failed = plugin.updates(&json!([of("none", 56), of(&id, 60)])).await;
    assert_eq!((failed.as_array().unwrap().len(), &failed[0]["container_id"]), (1, &json!("none")));
    assert_eq!(memory_of(&node, &id).await.1, 60);
    // A container that comes may change one that is there.
    plugin.script(&json!({"containers": {"second": {"update": [of(&id, 72)]}}}));
    node.run_container(&pod, container_config("second", &["sleep", "1000"]), &config).await;
    assert_eq!(memory_of(&node, &id).await.1, 72);
    drop(plugin);
    node.purge_and_check();
}

/// Plugins are told of an end while the container is held: one that wants to change it just then must not wait for itself.
#[tokio::test]
async fn an_update_of_a_container_that_ends_waits_for_nothing() {
    let node = server("ends", PATIENT).await;
    let config = sandbox_config(&node, "ends", true);
    let pod = node.run_pod(&config).await.unwrap();
    let id = node.run_container(&pod, container_config("main", &["sleep", "1000"]), &config).await;
    let mut asks = Plugin::start(&node, "10", "asks", &json!({})).await;
    let hangs = Plugin::start(&node, "20", "hangs", &json!({"hang": ["StopContainer"]})).await;
    let mut client = node.client().await;
    let request = cri::RemoveContainerRequest { container_id: id.clone() };
    let removal = tokio::spawn(async move { client.remove_container(request).await });
    hangs.waits_for("StopContainer", 1).await;
    let update = json!([{"container_id": id, "linux": {"resources": limit(56)}}]);
    assert_eq!(asks.updates(&update).await.as_array().map(Vec::len), Some(1));
    assert!(!removal.is_finished(), "the answer came with the end of the wait only");
    drop(hangs);
    removal.await.unwrap().unwrap();
    asks.waits_for("RemoveContainer", 1).await;
    node.purge_and_check();
}

#[tokio::test]
async fn pods_come_up_without_plugins_that_fail() {
    let node = server("fail", "1000").await;
    let config = sandbox_config(&node, "fail", true);
    let pod = node.run_pod(&config).await.unwrap();
    let exits = Plugin::start(&node, "10", "exits", &json!({"exit": ["StartContainer"]})).await;
    node.run_container(&pod, container_config("one", &["sleep", "1000"]), &config).await;
    assert_eq!(exits.events().last().map(String::as_str), Some("StartContainer"));
    wait_for("the end of 10-exits", || node.log().contains("10-exits") && node.log().contains("is gone"))
        .await;
    drop(exits);
    let hangs = Plugin::start(&node, "20", "hangs", &json!({"hang": ["CreateContainer"]})).await;
    node.run_container(&pod, container_config("two", &["sleep", "1000"]), &config).await;
    wait_for("the end of 20-hangs", || node.log().contains("CreateContainer: no answer within 1s")).await;
    drop(hangs);
    // One that is the pod's condition.
    let policy = json!({"fail_request": true, "keep_connected": true});
    let needed =
        Plugin::start(&node, "30", "needed", &json!({"hang": ["CreateContainer"], "policy": policy})).await;
    for name in ["three", "four"] {
        let e = node.create(&pod, container_config(name, &["sleep", "1000"]), &config).await.unwrap_err();
        assert!(e.message().contains("30-needed") && e.message().contains("CreateContainer"), "{e}");
    }
    assert_eq!(needed.all("Configure").len(), 1, "it was disconnected");
    drop(needed);
    wait_for("the end of 30-needed", || node.log().contains("30-needed")).await;
    // What is no plugin.
    let mut garbage = UnixStream::connect(node.dir.join("nri/nri.sock")).unwrap();
    garbage.set_read_timeout(Some(std::time::Duration::from_secs(30))).unwrap();
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(garbage.read(&mut [0; 16]).unwrap_or(0), 0);
    wait_for("the end of garbage", || node.log().contains("does not speak NRI's protocol")).await;
    node.run_container(&pod, container_config("five", &["sleep", "1000"]), &config).await;
    assert_eq!(node.list(None).await.len(), 3);
    node.purge_and_check();
}

#[tokio::test]
async fn refusals_and_conflicts_name_the_plugins_and_leave_nothing() {
    let node = server("conflict", PATIENT).await;
    let env =
        |value: &str| json!({"containers": {"both": {"adjust": {"env": [{"key": "X", "value": value}]}}}});
    let first = Plugin::start(&node, "10", "first", &env("1")).await;
    let second = Plugin::start(&node, "20", "second", &env("2")).await;
    let config = sandbox_config(&node, "conflict", true);
    first.script(&json!({"refuse": {"RunPodSandbox": "not on this node"}}));
    let e = node.run_pod(&config).await.unwrap_err();
    assert!(e.message().contains("10-first") && e.message().contains("not on this node"), "{e}");
    assert!(node.pods().await.is_empty());
    node.nothing_runs("after a refusal");
    first.script(&env("1"));
    let pod = node.run_pod(&config).await.unwrap();
    let e = node.create(&pod, container_config("both", &["sleep", "1000"]), &config).await.unwrap_err();
    for says in ["10-first", "20-second", "environment variable X"] {
        assert!(e.message().contains(says), "{e}");
    }
    assert_eq!(e.code(), tonic::Code::FailedPrecondition);
    assert!(node.list(None).await.is_empty());
    assert_eq!(fs::read_dir(node.dir.join("images/rootfs")).map(|d| d.count()).unwrap_or(0), 0);
    // The order is that of the indices, and a plugin hears of what was taken back.
    second.script(&json!({"refuse": {"ValidateContainerAdjustment": "no environment here"}}));
    let e = node.create(&pod, container_config("both", &["sleep", "1000"]), &config).await.unwrap_err();
    assert!(e.message().contains("20-second") && e.message().contains("no environment here"), "{e}");
    assert_eq!(first.all("RemoveContainer").len(), 2);
    second.script(&json!({}));
    let id = node.run_container(&pod, container_config("both", &["sleep", "1000"]), &config).await;
    assert_eq!(shell(&node, &id, "echo $X").await, "1");
    let seen = second.all("CreateContainer").pop().unwrap();
    assert!(seen["container"]["env"].as_array().unwrap().contains(&json!("X=1")), "{seen}");
    // A start that is refused is a failed start.
    second.script(&json!({"refuse": {"StartContainer": "not now"}}));
    let late = node.create(&pod, container_config("late", &["sleep", "1000"]), &config).await.unwrap();
    let e = node.start_container(&late).await.unwrap_err();
    assert!(e.message().contains("20-second") && e.message().contains("not now"), "{e}");
    assert_eq!(
        (node.status(&late).await.exit_code, node.status(&late).await.reason.as_str()),
        (128, "StartError")
    );
    drop((first, second));
    node.purge_and_check();
}

#[tokio::test]
async fn plugins_come_back_to_a_server_that_starts_again() {
    let mut node = server("again", PATIENT).await;
    let plugin = Plugin::start(&node, "10", "again", &json!({})).await;
    assert_eq!(plugin.all("Synchronize")[0], json!({"pods": null, "containers": null}));
    let config = sandbox_config(&node, "again", true);
    let pod = node.run_pod(&config).await.unwrap();
    let id = node.run_container(&pod, container_config("main", &["sleep", "1000"]), &config).await;
    for (count, graceful) in [(2, false), (3, true)] {
        if graceful {
            node.terminate().await;
            assert!(!node.dir.join("nri/nri.sock").exists());
        } else {
            node.kill();
        }
        node.restart(&[]).await;
        let seen = plugin.waits_for("Synchronize", count).await;
        assert_eq!((&seen["pods"][0]["id"], &seen["containers"][0]["id"]), (&json!(pod), &json!(id)));
        assert_eq!(seen["containers"][0]["args"], json!(["sleep", "1000"]));
        assert_eq!(seen["containers"].as_array().unwrap().len(), 1);
    }
    node.run_container(&pod, container_config("later", &["sleep", "1000"]), &config).await;
    plugin.waits_for("PostStartContainer", 2).await;
    drop(plugin);
    node.purge_and_check();
}

#[tokio::test]
async fn programs_of_the_plugin_folder_live_with_the_server() {
    let mut node = server("installed", PATIENT).await;
    let (plugins, conf) = (node.dir.join("nri-plugins"), node.dir.join("nri-conf"));
    fs::create_dir_all(&plugins).unwrap();
    fs::create_dir_all(&conf).unwrap();
    let program_of_plugin = plugins.join("05-installed");
    std::os::unix::fs::symlink(program(), &program_of_plugin).unwrap();
    std::os::unix::fs::symlink("/bin/false", plugins.join("06-fails")).unwrap();
    let log = node.dir.join("installed.log");
    let adjust = json!({"adjust": {"env": [{"key": "BY", "value": "installed"}]}});
    let script = json!({"log": log, "containers": {"main": adjust}});
    fs::write(conf.join("installed.conf"), script.to_string()).unwrap();
    let running = || {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let name = program_of_plugin.to_string_lossy().into_owned();
        processes
            .filter(|p| fs::read(p.path().join("cmdline")).is_ok_and(|c| c.starts_with(name.as_bytes())))
            .count()
    };
    for start in 1..=2 {
        node.terminate().await;
        wait_for("the end of the plugin's program", || running() == 0).await;
        node.restart(&[]).await;
        assert_eq!(running(), 1);
        // It knows what there is before the server serves.
        let events: Vec<_> = noted(&log).into_iter().filter(|(name, _)| name == "Synchronize").collect();
        assert_eq!(events.len(), start, "{}", node.log());
    }
    assert_eq!(noted(&log)[0].1["config"], json!(script.to_string()));
    assert!(node.log().contains("06-fails"), "{}", node.log());
    let config = sandbox_config(&node, "installed", true);
    let pod = node.run_pod(&config).await.unwrap();
    let id = node.run_container(&pod, container_config("main", &["sleep", "1000"]), &config).await;
    assert_eq!(shell(&node, &id, "echo $BY").await, "installed");
    node.terminate().await;
    wait_for("the end of the plugin's program", || running() == 0).await;
    node.purge_and_check();
}
