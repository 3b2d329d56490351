//! The node's network as it changes: configurations that are replaced under a running server, plugins of CNI 1.1 that say how they
//! are (STATUS) and free what nobody uses (GC), and results that outlive the server.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;

use crate::node::{Node, container_config, sandbox_config, shell};
use orlop_proto::cri;
use serde_json::{Value, json};

/// One run of a plugin.
struct Call {
    plugin: String,
    command: String,
    id: String,
    request: Value,
}

/// Installs plugins that write down what they are asked. They fail STATUS while there is a file `sick`, GC while there is `gc-fails`,
/// and hand out the address that their configuration calls `hand`.
fn recording(node: &Node) {
    let bin = node.dir.join("cni-bin");
    fs::create_dir_all(&bin).unwrap();
    let script = r#"#!/bin/sh
request=$(cat)
printf '{"plugin":"%s","command":"%s","id":"%s","request":%s}\n' "${0##*/}" $CNI_COMMAND "$CNI_CONTAINERID" "$request" >> DIR/calls
fail() { echo "{\"cniVersion\":\"1.1.0\",\"code\":$1,\"msg\":\"$2\"}"; exit 1; }
case $CNI_COMMAND in
ADD)
    hand=$(printf %s "$request" | sed 's/.*"hand":"\([^"]*\)".*/\1/')
    echo "{\"cniVersion\":\"1.1.0\",\"interfaces\":[{\"name\":\"eth0\",\"sandbox\":\"$CNI_NETNS\"}],\"ips\":[{\"address\":\"$hand\",\"interface\":0}]}";;
STATUS) [ ! -e DIR/sick ] || fail 50 "the bridge is missing";;
GC) [ ! -e DIR/gc-fails ] || fail 101 "cannot list the leases";;
VERSION) echo '{"cniVersion":"1.1.0","supportedVersions":["1.0.0","1.1.0"]}';;
esac
"#;
    for name in ["first", "second"] {
        fs::write(bin.join(name), script.replace("DIR", &node.dir.display().to_string())).unwrap();
        fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
}

/// Replaces the configuration in one step, as whoever installs a network does.
fn configure(node: &Node, text: &str) {
    let (new, file) = (node.dir.join("new.conflist"), node.dir.join("cni-conf/10-test.conflist"));
    fs::write(&new, text).unwrap();
    fs::rename(new, file).unwrap();
}

fn conflist(name: &str, plugin: &str, hand: &str) -> String {
    json!({"cniVersion": "1.1.0", "name": name, "plugins": [{"type": plugin, "hand": hand}]}).to_string()
}

/// Has both plugins answer ADD with this result; `NETNS` stands for the pod's.
fn answer(node: &Node, result: &Value) {
    for name in ["first", "second"] {
        let file = node.dir.join("cni-bin").join(name);
        let script = fs::read_to_string(&file).unwrap();
        let (before, rest) = script.split_once("ADD)\n").unwrap();
        let (_, after) = rest.split_once("STATUS)").unwrap();
        let result = result.to_string().replace("NETNS", "'$CNI_NETNS'");
        fs::write(file, format!("{before}ADD)\n    echo '{result}';;\nSTATUS){after}")).unwrap();
    }
}

fn calls(node: &Node, command: &str) -> Vec<Call> {
    let text = fs::read_to_string(node.dir.join("calls")).unwrap_or_default();
    let all = text.lines().map(|line| {
        let call: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        let text = |key: &str| call[key].as_str().unwrap().to_owned();
        Call {
            plugin: text("plugin"),
            command: text("command"),
            id: text("id"),
            request: call["request"].clone(),
        }
    });
    all.filter(|c| c.command == command).collect()
}

/// The one DEL of a pod.
fn del(node: &Node, pod: &str) -> Call {
    let mut found: Vec<Call> = calls(node, "DEL").into_iter().filter(|c| c.id == pod).collect();
    assert_eq!(found.len(), 1, "DELs of {pod}");
    found.remove(0)
}

/// Whether pods can be attached, and why not.
async fn ready(node: &Node) -> (bool, String) {
    let status = node.client().await.status(cri::StatusRequest { verbose: false }).await.unwrap();
    let conditions = status.into_inner().status.unwrap().conditions;
    let network = conditions.into_iter().find(|c| c.r#type == "NetworkReady").unwrap();
    (network.status, network.message)
}

async fn address(node: &Node, pod: &str) -> String {
    let request = cri::PodSandboxStatusRequest { pod_sandbox_id: pod.to_owned(), verbose: false };
    let status = node.client().await.pod_sandbox_status(request).await.unwrap().into_inner();
    status.status.unwrap().network.unwrap().ip
}

async fn run(node: &Node, name: &str) -> String {
    node.run_pod(&sandbox_config(node, name, false)).await.unwrap()
}

async fn remove(node: &Node, pod: &str) {
    let request = cri::RemovePodSandboxRequest { pod_sandbox_id: pod.to_owned() };
    node.client().await.remove_pod_sandbox(request).await.unwrap();
}

#[tokio::test]
async fn a_changed_configuration_is_for_new_pods() {
    let mut node = Node::start("reload", &[]).await;
    recording(&node);
    assert!(!ready(&node).await.0);
    configure(&node, &conflist("a", "first", "10.98.0.7/24"));
    assert_eq!(ready(&node).await, (true, String::new()));
    let (one, two) = (run(&node, "one").await, run(&node, "two").await);
    assert_eq!(address(&node, &one).await, "10.98.0.7");

    configure(&node, &conflist("b", "second", "10.97.0.8/24"));
    assert!(ready(&node).await.0);
    let three = run(&node, "three").await;
    assert_eq!(address(&node, &three).await, "10.97.0.8");
    // The old one is as it was, and can be left while the new configuration cannot be read.
    assert_eq!(address(&node, &one).await, "10.98.0.7");
    configure(&node, r#"{"cniVersion":"1.1.0","name":"c","plugins":[{"#);
    let (works, why) = ready(&node).await;
    assert!(!works && why.contains("cni-conf/10-test.conflist is broken"), "{why}");
    let lost = sandbox_config(&node, "lost", false);
    let e = node.run_pod(&lost).await.unwrap_err();
    assert!(e.message().contains("cni-conf/10-test.conflist is broken"), "{e}");
    assert_eq!(node.pods().await.len(), 3);
    remove(&node, &one).await;
    let old = |call: &Call, plugin: &str, network: &str, address: &str| {
        assert_eq!((call.plugin.as_str(), call.request["name"].as_str()), (plugin, Some(network)));
        assert_eq!(call.request["prevResult"]["ips"][0]["address"], address, "{}", call.request);
        assert_eq!(call.request["hand"], address);
    };
    old(&del(&node, &one), "first", "a", "10.98.0.7/24");

    // What ADD gave is known to the next server, too, which begins with a configuration that is none.
    node.kill();
    node.restart(&[]).await;
    assert!(!ready(&node).await.0);
    remove(&node, &two).await;
    old(&del(&node, &two), "first", "a", "10.98.0.7/24");
    configure(&node, &conflist("c", "first", "10.96.0.9/24"));
    assert_eq!(ready(&node).await, (true, String::new()));
    let four = node.run_pod(&lost).await.unwrap();
    assert_eq!(address(&node, &four).await, "10.96.0.9");
    // No configuration at all any more.
    fs::remove_file(node.dir.join("cni-conf/10-test.conflist")).unwrap();
    let (works, why) = ready(&node).await;
    assert!(!works && why.contains("put a .conflist there"), "{why}");
    remove(&node, &three).await;
    old(&del(&node, &three), "second", "b", "10.97.0.8/24");
    node.purge_and_check();
    old(&del(&node, &four), "first", "c", "10.96.0.9/24");
}

#[tokio::test]
async fn plugins_say_how_they_are() {
    let node = Node::start("sick", &[]).await;
    recording(&node);
    configure(&node, &conflist("a", "first", "10.98.0.7/24"));
    fs::write(node.dir.join("sick"), "").unwrap();
    let (works, why) = ready(&node).await;
    assert!(!works && why.contains("first") && why.contains("the bridge is missing"), "{why}");
    assert_eq!(calls(&node, "STATUS")[0].request["hand"], "10.98.0.7/24");
    fs::remove_file(node.dir.join("sick")).unwrap();
    assert_eq!(ready(&node).await, (true, String::new()));
    // A plugin that is not there is named before any pod is tried.
    configure(&node, &conflist("a", "third", "10.98.0.7/24"));
    let (works, why) = ready(&node).await;
    assert!(!works && why.contains("third") && why.contains("install it"), "{why}");
    // One of 1.0.0 is not asked.
    fs::write(node.dir.join("sick"), "").unwrap();
    configure(&node, &conflist("a", "first", "10.98.0.7/24").replace("1.1.0", "1.0.0"));
    assert_eq!(ready(&node).await, (true, String::new()));
    node.stop_and_check();
}

/// The attachments that the last GC was told are valid.
fn kept(node: &Node) -> BTreeSet<String> {
    let gc = calls(node, "GC");
    assert_eq!(gc.len(), 1);
    let valid = gc[0].request["cni.dev/valid-attachments"].as_array().unwrap();
    assert!(valid.iter().all(|v| v["ifname"] == "eth0"), "{valid:?}");
    valid.iter().map(|v| v["containerID"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_start_collects_what_nobody_has() {
    let mut node = Node::start("collect", &[]).await;
    recording(&node);
    configure(&node, &conflist("a", "first", "10.98.0.7/24"));
    let (one, two) = (run(&node, "one").await, run(&node, "two").await);
    let id = node
        .run_container(&one, container_config("c", &["sleep", "1000"]), &sandbox_config(&node, "one", false))
        .await;
    // Neither a pod that was stopped nor one on the node's own network has an attachment.
    let stopped = run(&node, "stopped").await;
    let request = cri::StopPodSandboxRequest { pod_sandbox_id: stopped.clone() };
    node.client().await.stop_pod_sandbox(request).await.unwrap();
    node.run_pod(&sandbox_config(&node, "host", true)).await.unwrap();
    // Nor one whose server was killed before anybody heard of it.
    node.kill();
    node.restart(&[("ORLOP_FAILPOINTS", "run-sandbox-before-ready=kill")]).await;
    node.run_pod(&sandbox_config(&node, "half", false)).await.unwrap_err();
    node.kill();
    let half = calls(&node, "ADD").pop().unwrap().id;
    assert!(![&one, &two, &stopped].contains(&&half));
    fs::remove_file(node.dir.join("calls")).unwrap();
    node.restart(&[]).await;
    assert_eq!(kept(&node), BTreeSet::from([one.clone(), two.clone()]));
    assert_eq!(del(&node, &half).request["prevResult"]["ips"][0]["address"], "10.98.0.7/24");
    assert_eq!(calls(&node, "DEL").len(), 1);

    // A plugin that cannot keeps no server from starting, and says so in its log.
    node.kill();
    fs::write(node.dir.join("gc-fails"), "").unwrap();
    node.restart(&[]).await;
    assert!(node.log().contains("cannot list the leases"), "{}", node.log());
    assert_eq!(shell(&node, &id, "echo on").await, "on");

    // A network that collects by itself is not told, but what the records say is over is taken off it.
    node.kill();
    fs::remove_dir_all(node.dir.join("state/sandboxes").join(&two)).unwrap();
    let quiet =
        json!({"cniVersion": "1.1.0", "name": "a", "disableGC": true, "plugins": [{"type": "first"}]});
    configure(&node, &quiet.to_string());
    fs::remove_file(node.dir.join("calls")).unwrap();
    node.restart(&[]).await;
    assert!(calls(&node, "GC").is_empty());
    assert_eq!(del(&node, &two).request["hand"], "10.98.0.7/24");
    assert_eq!(calls(&node, "DEL").len(), 1);
    node.purge_and_check();
}

#[tokio::test]
async fn a_pod_has_the_addresses_of_its_own_interface_or_does_not_run() {
    let node = Node::start("addresses", &[]).await;
    recording(&node);
    configure(&node, &conflist("test", "first", ""));
    let interfaces = json!([
        {"name": "host0"}, {"name": "net1", "sandbox": "NETNS"}, {"name": "eth0", "sandbox": "NETNS"}]);
    let of = |ips: &[(&str, usize)]| {
        let ips: Vec<Value> =
            ips.iter().map(|(ip, i)| json!({"address": format!("{ip}/24"), "interface": i})).collect();
        json!({"cniVersion": "1.1.0", "interfaces": interfaces, "ips": ips})
    };
    let config = sandbox_config(&node, "addresses", false);
    for ips in [&[][..], &[("10.99.0.1", 0), ("10.98.0.5", 1)]] {
        answer(&node, &of(ips));
        let before = calls(&node, "DEL").len();
        let e = node.run_pod(&config).await.unwrap_err();
        assert!(e.message().contains("eth0"), "{e}");
        assert!(node.pods().await.is_empty());
        assert!(calls(&node, "DEL").len() > before, "what was attached is detached");
    }
    let all = [("10.99.0.1", 0), ("10.98.0.5", 1), ("10.99.0.8", 2), ("10.99.0.7", 2)];
    answer(&node, &of(&all));
    let pod = node.run_pod(&config).await.unwrap();
    let status = async || {
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: pod.clone(), verbose: false };
        let status = node.client().await.pod_sandbox_status(request).await.unwrap().into_inner().status;
        let network = status.unwrap().network.unwrap();
        let others: Vec<String> = network.additional_ips.into_iter().map(|i| i.ip).collect();
        (network.ip, others)
    };
    assert_eq!(status().await, ("10.99.0.8".to_owned(), vec!["10.99.0.7".to_owned()]));
    let stop = cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() };
    node.client().await.stop_pod_sandbox(stop).await.unwrap();
    assert_eq!(status().await, (String::new(), vec![]), "they may be another pod's now");
    node.purge_and_check();
}
