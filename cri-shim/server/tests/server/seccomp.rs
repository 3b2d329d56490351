//! Profiles of the node's administrator.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use crate::node::{Node, container_config, sandbox_config, shell};
use orlop_proto::cri;
use orlop_proto::cri::security_profile::ProfileType;
use serde_json::{Value, json};

/// From the file to the kernel and to whoever listens there. How calls are answered is in the monitor's tests.
#[tokio::test]
async fn a_localhost_profile_with_a_listener() {
    let node = Node::start("notify", &[]).await;
    let socket = node.dir.join("agent.sock");
    let profile = node.dir.join("profile.json");
    let text = json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": socket, "listenerMetadata": "ours",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}]});
    fs::write(&profile, text.to_string()).unwrap();
    let listener = UnixListener::bind(&socket).unwrap();
    let (tell, told) = sync_channel::<Value>(4);
    std::thread::spawn(move || {
        for mut peer in listener.incoming().flatten() {
            // Takes the state alone: without its descriptor the kernel answers by itself, with ENOSYS.
            let mut text = String::new();
            let read = peer.read_to_string(&mut text);
            if tell
                .send(read.map_or(Value::Null, |_| serde_json::from_str(&text).unwrap_or_default()))
                .is_err()
            {
                return;
            }
        }
    });
    let hear = || told.recv_timeout(Duration::from_secs(60)).expect("the listener is told");
    let config = sandbox_config(&node, "notify", true);
    let pod = node.run_pod(&config).await.unwrap();
    let with = |name: &str| {
        let mut c = container_config(name, &["sleep", "1000"]);
        let security = c.linux.get_or_insert_default().security_context.get_or_insert_default();
        security.seccomp = Some(cri::SecurityProfile {
            profile_type: ProfileType::Localhost as i32,
            localhost_ref: profile.to_str().unwrap().into(),
        });
        c
    };
    let id = node.run_container(&pod, with("main"), &config).await;
    let first = hear();
    assert_eq!((&first["metadata"], &first["state"]["id"]), (&json!("ours"), &json!(id)), "{first}");
    let annotations = first["state"]["annotations"].as_object().unwrap();
    assert!(annotations.values().any(|v| v == "main"), "whose it is, as for a hook: {first}");
    let out = shell(&node, &id, "mkdir /tmp/d 2>&1; true").await;
    assert!(out.contains("Function not implemented"), "{out}");
    assert_eq!(hear()["state"]["status"], "running");
    fs::remove_file(&socket).unwrap();
    let e = node.create(&pod, with("late"), &config).await.unwrap_err();
    assert!(e.message().contains("agent.sock"), "{e}");
    assert_eq!(node.list(None).await.len(), 1);
    node.purge_and_check();
}
