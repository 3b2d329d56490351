//! What people and scripts do with crictl (PATH or ORLOP_CRICTL): each of its commands against the server.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::images::registry;
use crate::node::{IMAGE, Node, wait_for};

#[tokio::test]
async fn crictl_runs_a_pod() {
    let node = Node::start("crictl", &[]).await;
    node.network(false);
    let (pod, main) = (node.dir.join("pod.json"), node.dir.join("main.json"));
    let text = json!({
        "metadata": {"name": "crictl", "namespace": "default", "uid": "crictl", "attempt": 0},
        "log_directory": node.dir.join("logs"),
        "linux": {"cgroup_parent": node.cgroup},
    });
    fs::write(&pod, text.to_string()).unwrap();
    let script = "mkdir /www; echo page > /www/index.html; httpd -p 127.0.0.1:8099 -h /www; echo ready; cat; sleep 1000";
    let text = json!({
        "metadata": {"name": "main"}, "image": {"image": IMAGE}, "log_path": "main.log", "stdin": true,
        "command": ["sh", "-c", script], "linux": {},
    });
    fs::write(&main, text.to_string()).unwrap();
    let (pod, main) = (pod.to_str().unwrap(), main.to_str().unwrap());
    let p = node.crictl(&["runp", pod], "");
    let c = node.crictl(&["create", &p, main, pod], "");
    node.crictl(&["start", &c], "");
    wait_for("the container's first line", || node.crictl(&["logs", &c], "").contains("ready")).await;
    assert!(node.crictl(&["ps", "-q"], "").contains(&c));
    assert_eq!(node.crictl(&["exec", "-s", &c, "echo", "sync"], ""), "sync");
    for transport in ["spdy", "websocket"] {
        assert_eq!(
            node.crictl(&["exec", "--transport", transport, "-i", &c, "cat"], "typed"),
            "typed",
            "{transport}"
        );
        let (ok, text) = node.try_crictl(&["exec", "--transport", transport, &c, "sh", "-c", "exit 5"], "");
        assert!(!ok && text.contains("exit code 5"), "{transport}: {text}");
        let page = node.forward(&p, transport, 8099).await;
        assert!(page.ends_with("page\n"), "{transport}: {page:?}");
    }
    // A client that vanishes takes its command with it.
    let runs = || node.crictl(&["exec", "-s", &c, "ps"], "").contains("sleep 4321");
    node.vanish(&["exec", "-i", &c, "sleep", "4321"], runs).await;
    wait_for("the command of the client that vanished to end", || !runs()).await;
    node.crictl(&["stop", "-t", "1", &c], "");
    node.crictl(&["rm", &c], "");
    node.crictl(&["stopp", &p], "");
    node.crictl(&["rmp", &p], "");
    assert_eq!(node.crictl(&["pods", "-q"], ""), "");
    node.stop_and_check();
}

fn write(node: &Node, name: &str, content: &Value) -> PathBuf {
    let file = node.dir.join(name);
    fs::write(&file, content.to_string()).unwrap();
    file
}

fn pod_config(node: &Node, name: &str) -> PathBuf {
    let content = json!({
        "metadata": {"name": name, "namespace": "default", "uid": name, "attempt": 0}, "labels": {"of": name},
        "log_directory": node.dir.join("logs"), "linux": {"cgroup_parent": node.cgroup},
    });
    write(node, &format!("{name}.json"), &content)
}

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

fn ids(node: &Node, args: &[&str]) -> Vec<String> {
    // Flags come before names.
    node.crictl(&[&args[..1], &["-q"], &args[1..]].concat(), "").lines().map(str::to_owned).collect()
}

#[tokio::test]
async fn every_command_does_what_it_says() {
    let node = Node::start("commands", &[]).await;
    node.network(false);
    let crictl = |args: &[&str]| node.crictl(args, "");
    assert!(crictl(&["version"]).contains("RuntimeName:  orlop"));
    let info = parsed(&crictl(&["info"]));
    assert!(info["status"]["conditions"].as_array().unwrap().iter().all(|c| c["status"] == true), "{info}");
    assert_eq!(info["runtimeHandlers"][0]["features"]["recursive_read_only_mounts"], true, "{info}");
    assert!(crictl(&["runtime-config"]).contains("CGROUPFS"));
    crictl(&["update-runtime-config", "--pod-cidr", "10.1.0.0/16"]);

    // Events are heard from before the first pod on.
    let mut listener = node.crictl_command(&["events"]).stdin(Stdio::null()).spawn().unwrap();
    let heard = Arc::new(Mutex::new(Vec::<Value>::new()));
    let (events, all) = (listener.stdout.take().unwrap(), heard.clone());
    let hearing = std::thread::spawn(move || {
        for event in serde_json::Deserializer::from_reader(events).into_iter() {
            all.lock().unwrap().push(event.unwrap());
        }
    });
    let registry = registry(&node, &["one"]);
    let one = format!("{}/one:1", registry.address);
    let pulled = crictl(&["pull", &one]);
    let image = ids(&node, &["images", &one]).remove(0);
    assert!(pulled.ends_with(&image), "{pulled}: {image}");
    let inspected = parsed(&crictl(&["inspecti", &image]));
    assert_eq!(inspected["status"]["repoTags"][0], one, "{inspected}");
    assert_eq!(inspected["info"]["imageSpec"]["config"]["Env"][1], "NAME=one", "{inspected}");
    let space = parsed(&crictl(&["imagefsinfo"]));
    assert!(space["status"]["imageFilesystems"][0]["usedBytes"]["value"].is_string(), "{space}");

    let (first, second) = (pod_config(&node, "first"), pod_config(&node, "second"));
    let (first, second) = (first.to_str().unwrap(), second.to_str().unwrap());
    let pods = [crictl(&["runp", first]), crictl(&["runp", second])];
    // With a terminal's worth of lines for "logs", and a reader for "attach".
    let script = "i=0; while [ $i -lt 9 ]; do echo line $i; echo bad $i >&2; i=$((i+1)); done; while read l; do echo got $l; done; exit 5";
    let talker = json!({
        "metadata": {"name": "talker"}, "image": {"image": one}, "log_path": "talker.log", "stdin": true, "stdin_once": true,
        "labels": {"kind": "talker"}, "command": ["sh", "-c", script], "linux": {"resources": {"cpu_shares": 300}},
    });
    let talker = write(&node, "talker.json", &talker);
    let sleeper = json!({"metadata": {"name": "sleeper"}, "image": {"image": IMAGE}, "command": ["sleep", "1000"], "linux": {}});
    let sleeper = write(&node, "sleeper.json", &sleeper);
    let talker = crictl(&["create", &pods[0], talker.to_str().unwrap(), first]);
    assert_eq!(ids(&node, &["ps", "--state", "created"]), [talker.as_str()]);
    assert_eq!(crictl(&["start", &talker]), talker);
    let sleeper = crictl(&["create", &pods[1], sleeper.to_str().unwrap(), second]);
    crictl(&["start", &sleeper]);

    assert_eq!(ids(&node, &["pods", "--label", "of=first"]), [pods[0].as_str()]);
    assert_eq!(ids(&node, &["pods", "--name", "sec.nd", "--state", "ready"]), [pods[1].as_str()]);
    assert_eq!(ids(&node, &["pods", "--id", &pods[0][..13]]), [pods[0].as_str()]);
    assert_eq!(ids(&node, &["ps", "--label", "kind=talker"]), [talker.as_str()]);
    assert_eq!(ids(&node, &["ps", "--pod", &pods[1][..13]]), [sleeper.as_str()]);
    assert_eq!(ids(&node, &["ps", "--image", &one]), [talker.as_str()]);
    assert_eq!(ids(&node, &["ps", "--latest"]), [sleeper.as_str()]);
    assert!(crictl(&["ps", "-r"]).contains(&one));

    // What scripts take from the runtime's own part of these: where to look by nsenter.
    let pod = parsed(&crictl(&["inspectp", &pods[0][..13]]));
    assert_eq!(pod["status"]["network"]["ip"], "10.99.0.7", "{pod}");
    let namespaces = pod["info"]["runtimeSpec"]["linux"]["namespaces"].as_array().unwrap();
    let network = namespaces.iter().find(|n| n["type"] == "network").unwrap()["path"].as_str().unwrap();
    let container = parsed(&crictl(&["inspect", &talker]));
    let pid = &container["info"]["pid"];
    let inode = |path: &str| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
    assert_eq!(inode(network), inode(&format!("/proc/{pid}/ns/net")));
    assert_eq!(container["status"]["resources"]["linux"]["cpuShares"], "300", "{container}");
    assert_eq!(container["info"]["runtimeSpec"]["process"]["args"][0], "sh");

    let logs = |more: &[&str]| crictl(&[&["logs"], more, &[talker.as_str()]].concat());
    wait_for("the last line", || logs(&[]).contains("line 8")).await;
    assert!(logs(&["--stream", "stdout"]).ends_with("line 7\nline 8"));
    assert!(logs(&["--tail", "1"]).lines().count() <= 1);
    let timed = logs(&["--timestamps", "--stream", "stdout"]);
    let last = timed.lines().last().unwrap().strip_suffix(" line 8").unwrap_or_else(|| panic!("{timed}"));
    last.parse::<jiff::Timestamp>().unwrap_or_else(|e| panic!("{e}: {timed}"));
    let log = node.dir.join("logs/talker.log");
    fs::rename(&log, node.dir.join("logs/old.log")).unwrap();
    crictl(&["logs", "--reopen", &talker]);
    assert!(log.exists());

    crictl(&["update", "--cpu-share", "400", "--memory", "67108864", &talker]);
    let held = &parsed(&crictl(&["inspect", &talker]))["status"]["resources"]["linux"];
    assert_eq!(
        (&held["cpuShares"], &held["memoryLimitInBytes"]),
        (&json!("400"), &json!("67108864")),
        "{held}"
    );
    let stats = parsed(&crictl(&["stats", "-o", "json", "--id", &talker]));
    assert_eq!(stats["stats"][0]["attributes"]["metadata"]["name"], "talker", "{stats}");
    assert!(crictl(&["stats"]).contains(&sleeper[..13]));
    assert!(crictl(&["statsp"]).contains(&pods[1][..13]));
    assert!(crictl(&["metricdescs"]).contains("container_memory_working_set_bytes"));
    assert!(crictl(&["metricsp"]).contains("container_memory_working_set_bytes"));

    let both = crictl(&["exec", "-s", "--name", ".*er", "--parallel", "echo", "hello"]);
    assert_eq!(both.matches("hello").count(), 2, "{both}");
    // An end of the input ends the container, as it wants, and with it the command.
    let attached = node.crictl(&["attach", "-i", &talker], "typed\n");
    assert!(attached.contains("got typed"), "{attached}");
    wait_for("the end of the talker", || ids(&node, &["ps", "-a", "--state", "exited"]) == [talker.clone()])
        .await;
    assert_eq!(parsed(&crictl(&["inspect", &talker]))["status"]["exitCode"], 5);
    assert!(ids(&node, &["ps", "--label", "kind=talker"]).is_empty());

    // One that runs goes only by force; so does its pod.
    let (ok, text) = node.try_crictl(&["rm", &sleeper], "");
    assert!(!ok && text.contains("is running"), "{text}");
    let (ok, text) = node.try_crictl(&["rmp", &pods[1]], "");
    assert!(!ok && text.contains("is running"), "{text}");
    crictl(&["stop", &sleeper]);
    crictl(&["rm", "--all"]);
    assert!(ids(&node, &["ps", "-a"]).is_empty());
    let run = write(
        &node,
        "run.json",
        &json!({"metadata": {"name": "run"}, "image": {"image": one}, "command": ["sleep", "1000"], "linux": {}}),
    );
    let third = pod_config(&node, "third");
    let run = crictl(&["run", run.to_str().unwrap(), third.to_str().unwrap()]);
    assert_eq!(ids(&node, &["ps"]), [run.as_str()]);
    crictl(&["stopp", &pods[0]]);
    assert_eq!(ids(&node, &["pods", "--state", "notready"]), [pods[0].as_str()]);
    // What a container uses stays.
    crictl(&["rmi", "--prune"]);
    assert_eq!(ids(&node, &["images"]), [image.as_str()]);
    crictl(&["rmp", "--all", "--force"]);
    assert!(ids(&node, &["pods"]).is_empty());
    crictl(&["rmi", &one]);
    assert!(ids(&node, &["images"]).is_empty());

    let kinds = |id: &str| -> Vec<String> {
        let heard = heard.lock().unwrap();
        let of = heard.iter().filter(|e| e["containerId"] == id);
        of.map(|e| e["containerEventType"].as_str().unwrap().to_owned()).collect()
    };
    let life = ["CREATED", "STARTED", "STOPPED", "DELETED"].map(|k| format!("CONTAINER_{k}_EVENT"));
    for id in [&talker, &sleeper, &pods[0], &pods[1]] {
        wait_for("a whole life", || kinds(id).len() >= life.len()).await;
        assert_eq!(kinds(id), life);
    }
    listener.kill().unwrap();
    listener.wait().unwrap();
    hearing.join().unwrap();
    node.stop_and_check();
}
